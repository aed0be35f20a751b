"""rspd as a process whose numbers are compared: those of its log, of its metrics and of its status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fleet import REPOSITORY
from tests.numbers import Numbers, ask, busy, differences, failed, failures, logged, measured, told
from tests.support import PATIENCE, eventually, free_port, receive_all

LOCAL = "127.0.0.1"

PROGRAM = "import sys\nfrom rspd.__main__ import main\n{}raise SystemExit(main())\n"


class Log:
    """A log in a file, read as it grows. numbers: what its lines have said so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0
        self.lines: list[str] = []
        self.numbers = Numbers()

    def read(self) -> Sequence[str]:
        """All lines that are there by now."""
        with open(self._path, "rb") as file:
            file.seek(self._place)
            whole, end, _ = file.read().rpartition(b"\n")
        self._place += len(whole + end)
        new = whole.decode().splitlines()
        self.lines += new
        self.numbers += logged(new)
        return self.lines


class Service:
    """rspd in the foreground, with its log in a file. Each proxy listens on a port of its own.

    ports: by the names of the proxies. proxies: as they are in its file. folder: all that it has is there.
    """

    def __init__(self, folder: str, proxies: Mapping[str, Mapping[str, Any]], change: str, **keys: Any) -> None:
        """change: of the program, see `program`. keys: of the file, at its top."""
        self.folder = Path(folder)
        self.control, self.metrics = f"{folder}/control.sock", f"{folder}/metrics.sock"
        self.ports = {name: free_port() for name in proxies}
        self._keys = {"control": self.control, "metrics": self.metrics, "log_level": "info", **keys}
        self.proxies = {name: {"listen": f"{LOCAL}:{self.ports[name]}", **own} for name, own in proxies.items()}
        self._clients: list[socket.socket] = []
        self.write()
        self.program(change)
        command = [sys.executable, str(self.folder / "program"), "--foreground", "-c", str(self.folder / "rspd.yaml")]
        with open(self.folder / "log", "w") as log:
            # Whatever is installed, the program is to be the one that is tested.
            env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=env)
        self.log = Log(self.folder / "log")

    def program(self, change: str) -> None:
        """What is executed from now on, if the process is upgraded: rspd, after these statements of Python."""
        (self.folder / "program").write_text(PROGRAM.format(change))

    def write(self, **change: Any) -> None:
        """Write the file, with other proxies for this time: None takes one out."""
        proxies = {name: own for name, own in {**self.proxies, **change}.items() if own is not None}
        new = self.folder / "new"
        new.write_text(json.dumps({**self._keys, "proxies": proxies}))  # JSON is YAML
        os.replace(new, self.folder / "rspd.yaml")

    def wait_for(self, pattern: str, count: int = 1, after: int = 0) -> None:
        """Wait for so many lines of the log that match. after: how many lines are not looked at."""

        def found() -> bool:
            lines = self.log.read()
            assert self.process.poll() is None, "\n".join(lines[-100:])
            return sum(bool(re.search(pattern, line)) for line in lines[after:]) >= count

        eventually(found, f"{count} lines with {pattern}", 2 * PATIENCE)

    def reload(self, says: str = "reloaded", **change: Any) -> None:
        """Have the file read, changed as by `write`, and wait for what the log says then."""
        before = len(self.log.read())
        self.write(**change)
        self.process.send_signal(signal.SIGHUP)
        self.wait_for(says, after=before)

    def upgrade(self) -> int:
        """Let all go on in the program as it is now. Returns the exit code of the command, 0 if it was done."""
        command = [sys.executable, "-m", "rspd", "upgrade", str(self.process.pid)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=4 * PATIENCE).returncode

    def end(self) -> None:
        """Make sure that it has ended."""
        self.process.kill()
        self.process.wait(PATIENCE)
        for sock in self._clients:
            sock.close()

    # Clients

    def come(self, proxy: str, data: bytes = b"", source: str = LOCAL) -> socket.socket:
        """A client that has said this, unless it was refused before."""
        sock = socket.socket()
        self._clients.append(sock)
        sock.settimeout(PATIENCE)
        sock.bind((source, 0))
        with suppress(ConnectionError):
            sock.connect((LOCAL, self.ports[proxy]))
            sock.sendall(data)
        return sock

    def talk(self, proxy: str, data: bytes = b"hello") -> socket.socket:
        """A client that has said this and heard it."""
        sock = self.come(proxy)
        exchange(sock, data)
        return sock

    # What is counted

    def status(self) -> dict[str, Any]:
        """What its status says."""
        found: dict[str, Any] = json.loads(ask(self.control, "/v1/status"))
        return found

    def bytes_from_clients(self) -> Counter[str]:
        """How many each proxy has counted, by the status."""
        found: Counter[str] = Counter()
        for proxy in self.status()["proxies"]:
            found[proxy["name"]] += sum(volume["sent"] for volume in proxy["volumes"])
        return found

    @property
    def open(self) -> int:
        """How many connections are open, by the status."""
        return sum(proxy["open"] for proxy in self.status()["proxies"])

    def agrees(self, still_open: int = 0) -> Numbers:
        """Wait until no more connections are open. The metrics and the status say what the log says: that is this.

        Those that are still open have moved no byte. The log tells a second later of clients that were refused.
        """
        eventually(lambda: self.open == still_open)
        with suppress(AssertionError):
            eventually(lambda: not self._disagreement(still_open), patience=PATIENCE)
        assert not (found := self._disagreement(still_open)), "\n".join(found)
        return +self.log.numbers

    def _disagreement(self, still_open: int) -> list[str]:
        """In words: what the log says, and what the other says."""
        metrics, status = ask(self.metrics, "/metrics"), self.status()
        self.log.read()
        by_log = +self.log.numbers
        found = [f"log, metrics: {line}" for line in differences(by_log, measured(metrics))]
        found += [f"log, status: {line}" for line in differences(by_log, told(status))]
        found += [f"log, failures: {line}" for line in differences(failures(by_log), failed(status))]
        if still_open:
            # Who is accepted and still there has no line yet.
            return [line for line in found if ": accepted " not in line]
        return found + busy(metrics)


def exchange(sock: socket.socket, data: bytes) -> None:
    """Say this, and hear it."""
    sock.sendall(data)
    heard = b""
    while len(heard) < len(data):
        part = sock.recv(len(data) - len(heard))
        assert part, "the end"
        heard += part
    assert heard == data


def wait_for_end(sock: socket.socket) -> None:
    """Wait until the stream ends, in whatever way."""
    with sock:
        try:
            receive_all(sock)
        except TimeoutError:
            raise
        except OSError:
            pass
