"""A real name server, NSD, that says of `web.test` what a test wants. It needs a network of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from bench.peers import SEARCH
from tests.namespaces import SILENT_DNS
from tests.support import PATIENCE, eventually

# For `in_namespace`: names are asked of 127.0.0.1, with these options of resolv.conf(5). If there is no address, the
# resolver asks again for `web.test.test`, which nobody has.
OWN_NAMES = f"{SILENT_DNS}\necho 'search test\noptions @OPTIONS@' >>/etc/resolv.conf\n"

# While NSD reads a zone again, it may lose a question.
PATIENT = "timeout:2 attempts:5"
IMPATIENT = "timeout:1 attempts:1"

CONFIG = """
server:
    ip-address: 127.0.0.1
    do-ip6: no
    username: ""
    server-count: 1
    rrl-ratelimit: 0
    database: ""
    pidfile: ""
    xfrdfile: ""
    xfrdir: "@FOLDER@"
    zonesdir: "@FOLDER@"
    zonelistfile: "@FOLDER@/zone.list"
remote-control:
    control-enable: no
zone:
    name: test
    zonefile: zone
"""

# `version-N` exists in the Nth version, and tells that it is in force.
ZONE = """$ORIGIN test.
$TTL 0
@ SOA ns root @VERSION@ 3600 600 86400 0
@ NS ns
ns A 127.0.0.1
version-@VERSION@ TXT here
"""

# RFC 1035, 4.1.1 and 4.2.2
HEADER = struct.Struct(">6H")
ASK_TXT = struct.pack(">HH", 16, 1)
NO_ERROR, SERVFAIL = 0, 2


def nsd() -> str:
    """Where its program is; skips the test if it is missing."""
    path = shutil.which("nsd", path=SEARCH)
    if not path:
        pytest.skip("nsd is not here: apt install nsd")
    return path


class NameServer:
    """NSD at 127.0.0.1. When a method returns, what it says is in force, and nothing else is answered any more."""

    def __init__(self, folder: Path, *addresses: str) -> None:
        """addresses: of `web.test`, at the start."""
        self._zone = folder / "zone"
        self._version = 0
        self._write(f"A {address}" for address in addresses)
        config = folder / "nsd.conf"
        config.write_text(CONFIG.replace("@FOLDER@", str(folder)))
        self._output = folder / "nsd.output"
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [nsd(), "-d", "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # to signal all of its processes
            )

    def __enter__(self) -> NameServer:
        try:
            self._wait_until_in_force()
        except BaseException:
            self.__exit__()
            raise
        self._usual = len(self._states())
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)

    def says(self, *addresses: str) -> None:
        """`web.test` stands for these addresses; without any, it does not exist."""
        self._write(f"A {address}" for address in addresses)
        self._reload()

    def says_that_it_has_no_address(self) -> None:
        """`web.test` exists, with something else."""
        self._write(["TXT there-is-no-address"])
        self._reload()

    def fails(self) -> None:
        """The answer to every question is SERVFAIL: the zone cannot be loaded."""
        self._zone.write_text("")
        self._code = SERVFAIL
        self._reload()

    def is_silent(self) -> None:
        """It answers nothing until `speaks`."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        eventually(lambda: set(self._states()) == {"T"}, "all processes of nsd stop")

    def speaks(self) -> None:
        """It answers again. When this returns, what it was asked before has its answer."""
        os.killpg(self._process.pid, signal.SIGCONT)
        self._wait_until_in_force()

    def answers_once_more(self) -> None:
        """Wait for a question that is asked from now on, and have it answered."""
        self.is_silent()
        eventually(lambda: self.waiting() > 0, "nsd is asked")
        self.speaks()

    def waiting(self) -> int:
        """The size of the questions that it has not read (proc_net_udp(5))."""
        rows = [row.split() for row in Path("/proc/net/udp").read_text().splitlines()[1:]]
        return sum(int(row[4].partition(":")[2], 16) for row in rows if row[1] == "0100007F:0035")

    def _write(self, records: Iterable[str]) -> None:
        self._version += 1
        self._code = NO_ERROR
        zone = ZONE.replace("@VERSION@", str(self._version))
        self._zone.write_text(zone + "".join(f"web {record}\n" for record in records))

    def _reload(self) -> None:
        self._process.send_signal(signal.SIGHUP)
        self._wait_until_in_force()
        # For a moment there is a process more, and those with the zone before answer too.
        eventually(lambda: len(self._states()) == self._usual, "the processes of nsd from before the reload end")

    def _wait_until_in_force(self) -> None:
        try:
            eventually(lambda: self._process.poll() is not None or self._code_now() == self._code, "nsd has the zone")
            assert self._process.poll() is None, "nsd ended"
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._output.read_text()}") from None

    def _code_now(self) -> int | None:
        """The code of its answer to the question for this version; None if it does not answer."""
        labels = (f"version-{self._version}", "test", "")
        name = b"".join(bytes([len(label)]) + label.encode() for label in labels)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(PATIENCE / 10)
            client.connect(("127.0.0.1", 53))
            try:
                client.send(HEADER.pack(7, 0, 1, 0, 0, 0) + name + ASK_TXT)
                flags: int = HEADER.unpack(client.recv(512)[: HEADER.size])[1]
            except OSError:  # it does not listen yet
                return None
        return flags & 15

    def _states(self) -> list[str]:
        """The state of each of its processes that has not ended (proc_pid_stat(5))."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                state, _, group, *_ = path.read_text().rpartition(")")[2].split()
                if int(group) == self._process.pid and state not in "ZX":
                    found.append(state)
        return found
