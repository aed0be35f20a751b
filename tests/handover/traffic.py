"""Thousands of connections through rspd, and what became of each."""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

from tests.handover.peers import ABORTED, HEADER
from tests.handover.talks import fields, stored
from tests.support import eventually
from tests.system.machine import Machine

PROJECT = Path(__file__).parent.parent.parent

# The proxy of each kind of connection: where it listens, and where its backend does.
UNIX_LISTEN, UNIX_BACKEND = "/run/rspd/load.sock", "/run/load.sock"
PROXIES: dict[str, tuple[str | int, str | int]] = {
    "plain": (8081, 8001),
    "splice": (8082, 8002),
    "held": (8083, 8003),
    "half": (8084, 8004),
    "slow": (8085, 8005),
    "from-unix": (UNIX_LISTEN, 8006),
    "to-unix": (8087, UNIX_BACKEND),
    "quiet": (8088, 8008),
    "short": (8089, 8009),
    "idle": (8090, 8010),
    "half-idle": (8091, 8011),
    "aborting": (8092, 8012),
    "queued": (8093, 8013),
    "dialling": (8094, 8014),
    "dialling-late": (8095, 8015),
    "proxied": (8096, 8016),
    "retired": (8097, 8017),
    "moved": (8098, 8018),
}

# Kinds that use the proxy of another.
SHARED = {"from-unix-bulk": "from-unix", "to-unix-bulk": "to-unix"}

# How the backend's end of a connection is that its client aborts: all of it is there first.
RESET = "ConnectionResetError while reading"

INFO = 6  # the priority (syslog(3))

SETTLED = 60.0  # seconds for thousands of connections to do something


def configuration(
    proxies: Mapping[str, int], more: str = "", keys: Mapping[str, Mapping[str, object]] = MappingProxyType({})
) -> str:
    """The file for these proxies, each for so many clients at once. keys: more of them, of some proxies."""
    lines = ["idle_timeout: off", "half_close_timeout: off", more, "proxies:"]
    for name, clients in proxies.items():
        listen, backend = (f"127.0.0.1:{place}" if isinstance(place, int) else place for place in PROXIES[name])
        own = {"listen": listen, "backend": backend, "max_connections": clients, **keys.get(name, {})}
        lines.append(f"  {name}: {json.dumps(own)}")
    return "\n".join(line for line in lines if line) + "\n"


class Peers:
    """A process of tests/handover/peers.py."""

    def __init__(self, role: str, *options: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.handover.peers", role, *map(str, options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT,
        )
        self._received = b""

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def tell(self, do: str, **arguments: object) -> Any:
        """Tell it something, and return the reply."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> bytes:
        assert self._process.stdout
        deadline = time.monotonic() + SETTLED
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                assert selector.select(max(0.0, deadline - time.monotonic())), "no reply"
                part = os.read(self._process.stdout.fileno(), 1 << 20)
                assert part, f"it has ended with {self._process.wait()}"
                self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line


class Ended(NamedTuple):
    """A connection that has ended: its bytes as rspd counts them."""

    kind: str
    client: str  # as the log names it
    sent: int
    received: int


class Traffic:
    """Connections of several kinds. The unix sockets are below `root`."""

    def __init__(self, counts: Mapping[str, int], root: str = "", period: float = 1.5) -> None:
        self.counts = dict(counts)
        self.root = root
        self.clients = Peers("clients", period)
        self.backends = Peers("backends", period)

    def __enter__(self) -> Traffic:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clients.__exit__(kind, error, trace)
        self.backends.__exit__(kind, error, trace)

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    def _place(self, place: str | int) -> str | int:
        return self.root + place if isinstance(place, str) else place

    def listen(self, also: Iterable[str] = (), full: Iterable[str] = ()) -> None:
        """Let the backends listen, those of some more proxies too. full: some have no room for anybody."""
        proxies = dict.fromkeys([*(SHARED.get(kind, kind) for kind in self.counts), *also])
        places = {name: self._place(PROXIES[name][1]) for name in proxies}
        for name in full:
            self.backends.tell("fill", place=places.pop(name))
        self.backends.tell("listen", places=list(places.values()))

    def open(self) -> None:
        """Open all connections; each has relayed bytes in both directions afterwards, but for those that wait."""
        places = {kind: self._place(PROXIES[SHARED.get(kind, kind)][0]) for kind in self.counts}
        self.clients.tell("open", counts=self.counts, places=places)
        eventually(lambda: not self.clients.tell("state")["waiting"], "all are connected", SETTLED)
        assert self.lost() == []

    def lost(self) -> list[str]:
        """Connections that are lost, at most some."""
        lost: list[str] = self.clients.tell("state")["lost"]
        return lost

    def mark(self) -> None:
        """Ask from here whether bytes move."""
        self.clients.tell("mark")

    def move(self) -> None:
        """Wait until each client that reads has received something since `mark`."""
        silent: dict[str, int] = {}

        def nobody_is_silent() -> bool:
            silent.clear()
            silent.update(self.clients.tell("silent"))
            return not silent

        try:
            eventually(nobody_is_silent, "bytes move", SETTLED)
        except AssertionError:
            raise AssertionError(f"silent: {silent}, lost: {self.lost()}") from None

    def finish(self) -> list[Ended]:
        """End all in order. Fails if one has ended otherwise, or if something was lost on the way."""
        for peers in self.clients, self.backends:
            peers.tell("finish")
        for peers in self.clients, self.backends:
            with suppress(AssertionError):  # what is still open is among the faults
                eventually(lambda peers=peers: not peers.tell("state")["open"], "all end", SETTLED)  # type: ignore[misc]
        clients = {row[0]: row for row in self.clients.tell("report")}
        backends = {row[0]: row for row in self.backends.tell("report")}
        faults = [fault for index, row in clients.items() for fault in _faults(row, backends.get(index))]
        kinds = Counter(fault.split()[0] for fault in faults)
        assert not faults, f"{len(faults)} of {len(clients)}, {dict(kinds)}:\n" + "\n".join(faults[:20])
        assert clients.keys() == backends.keys(), "a backend with a connection of no client"
        assert len(clients) == self.total
        return [
            # What has reached the backend of a client that aborts is right up to there, and may be less than was sent.
            Ended(kind, f"127.0.0.1:{port}" if port else "unix", HEADER.size + backends[index][5][0], received[0])
            for index, kind, port, _, _, received in clients.values()
        ]


def _faults(client: list[Any], backend: list[Any] | None) -> list[str]:
    """What is wrong with a connection, as its two ends know it."""
    index, kind, _, outcome, sent, received = client
    name = f"{kind} {index}: "
    if backend is None:
        return [f"{name}has not reached its backend, {outcome}"]
    found = []
    expected = RESET if outcome == ABORTED else "in order"
    if outcome not in ("in order", ABORTED) or backend[3] != expected:
        found.append(f"{name}the client's end is {outcome!r}, the backend's {backend[3]!r}")
    for way, (size, digest, _), (came, found_digest, wrong) in (
        ("up", sent, backend[5]),
        ("down", backend[4], received),
    ):
        if wrong >= 0:
            found.append(f"{name}{way}: another stream from byte {wrong} of {came} on")
        if (size != came or digest != found_digest) and not (way == "up" and outcome == ABORTED and came <= size):
            found.append(f"{name}{way}: sent {size} {digest[:8]}, came {came} {found_digest[:8]}")
    return found


def log_of(
    machine: Machine, changes: int, reloads: int, ended: list[Ended], short: int
) -> tuple[list[dict[str, str]], list[int]]:
    """Stop rspd. Its log has no warning, and one line for each connection, with all its bytes.

    Returns these lines, but for those of short connections, and how many connections were taken over each time.
    """
    machine.systemctl("stop", "rspd")
    assert stored(machine) == 0
    entries = machine.journal()
    own = [entry for entry in entries if entry.get("SYSLOG_IDENTIFIER") == "rspd"]
    assert [entry["MESSAGE"] for entry in own if int(entry["PRIORITY"]) < INFO][:20] == []
    about = [entry for entry in entries if "rspd.service" in (entry.get("UNIT"), entry.get("_SYSTEMD_UNIT"))]
    assert [entry["MESSAGE"] for entry in about if int(entry["PRIORITY"]) < INFO - 1][:20] == []

    messages = [entry["MESSAGE"] for entry in own]
    given = [int(fields(line)["connections"]) for line in messages if line.startswith("handed over ")]
    taken = [int(fields(line)["connections"]) for line in messages if line.startswith("took over ")]
    assert len(taken) == changes
    assert taken == given
    assert sum(line.startswith("reloaded") for line in messages) == reloads
    assert [line for line in messages if line.startswith("ending ")] == ["ending connections=0 drain_timeout=30"]

    closed = [fields(line) for line in messages if line.startswith("connection closed ")]
    of_short = [line for line in closed if line["proxy"] == "short"]
    assert len(of_short) == short
    assert {line["cause"] for line in of_short} == {"client-closed"}
    lines = [line for line in closed if line["proxy"] != "short"]
    counted = Counter((line["client"], int(line["sent"]), int(line["received"])) for line in lines)
    expected = Counter((end.client, end.sent, end.received) for end in ended)
    wrong = counted - expected
    assert list(wrong)[:10] == [], f"{len(wrong)} lines have other counts of bytes than the clients"
    assert list(expected - counted)[:10] == [], "connections without a line"
    return lines, taken


def small_buffers(machine: Machine) -> None:
    """Let the kernel keep little for each connection of the machine, so that thousands that are full have room.

    All TCP sockets of a host have only so many pages together (tcp_mem, tcp(7)). Near that, the kernel drops packets.
    """
    machine.shell(
        "echo 4096 32768 65536 > /proc/sys/net/ipv4/tcp_rmem && echo 4096 16384 32768 > /proc/sys/net/ipv4/tcp_wmem"
    )


def memory_of_tcp() -> int:
    """Bytes that the TCP sockets of the host have now."""
    pages = Path("/proc/net/sockstat").read_text().partition("\nTCP: ")[2].partition(" mem ")[2].split()[0]
    return int(pages) * resource.getpagesize()


LISTENING = {str(listen): name for name, (listen, _) in PROXIES.items()}
BACKENDS = {str(backend): name for name, (_, backend) in PROXIES.items()}


def held_back(machine: Machine) -> Counter[str]:
    """Of how many TCP sockets rspd leaves bytes unread, since the other side is full; by the proxy."""
    found = Counter[str]()
    for line in machine.run("ss", "-Htn", "state", "established").stdout.splitlines():
        unread, _, local, remote = line.split()[:4]
        # rspd's own end of a connection with a client, or with a backend.
        name = LISTENING.get(local.rpartition(":")[2]) or BACKENDS.get(remote.rpartition(":")[2])
        if name and int(unread):
            found[name] += 1
    return found


def pipes(machine: Machine) -> int:
    """How many pipes rspd has for splice(2), by their two ends."""
    # Descriptors come and go meanwhile, and ls complains.
    return int(machine.shell(f"ls -l /proc/{machine.pid()}/fd 2>/dev/null | grep -c pipe:").stdout) // 2
