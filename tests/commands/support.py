"""Something at a real unix socket that answers as rspd does, with what a test says that there is."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import socketserver
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from math import inf
from pathlib import Path

import pytest

from rspd.admin.query import read_query
from rspd.errors import StartError
from rspd.log import complain
from rspd.snapshot import (
    Backend,
    Checks,
    Connection,
    Connections,
    Distribution,
    Listener,
    Pool,
    Process,
    Proxy,
    Rate,
    Refusals,
    Snapshot,
    Volume,
    as_json,
)
from tests.support import PATIENCE

# What a command says: its exit code, stdout, stderr.
Said = tuple[int, str, str]

# Without what hides that Python writes again at its end what it could not write.
BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}


# A service with two backends, all of it well.
PROCESS = Process(
    "0.3.0", 123, age=60.0, service_age=273_600.0, handovers=2, reloads=1, descriptors=57, descriptors_max=65536
)
# A tenth of a second for most, and a few in two seconds.
TIMES = Distribution((0, 0, 0, 0, 0, 0, 0, 90, 0, 0, 0, 10, 0, 0, 0), 20.0)
FIRST = Backend(name="10.0.0.11:80", state_age=273_600.0, open=18, chosen=300, connect=TIMES, checks=Checks(9, 0, 2.0))
SECOND = Backend(name="10.0.0.12:80", state_age=250.0, limit=50.0, chosen=100, checks=Checks())
LONE = Snapshot(
    PROCESS,
    (
        Proxy(
            listeners=(Listener("127.0.0.1:8080"), Listener("[::1]:8080", 0)),
            open=18,
            most=100,
            accepted=12_357,
            refused=(Refusals("deny", 12),),
            volumes=(Volume("10.0.0.11:80", 1_200_000_000, 3_400_000_000),),
            last_10s=Rate(12.3, 1_200_000.0, 4_500_000.0),
            last_minute=Rate(0.25, 999.0, 0.0),
        ),
    ),
    (),
    (Pool(balance="round-robin"),),
    (FIRST, SECOND),
)
REFUSED = SECOND._replace(state="down", why="Connection refused", checks=None)
HOLDER = Connection("a-1", client="192.0.2.7:5000", age=250.0, idle=239.0)


def lone(**changes: object) -> Snapshot:
    """The snapshot with another proxy."""
    return LONE._replace(proxies=(LONE.proxies[0]._replace(**changes),))  # type: ignore[arg-type]


def process(**changes: object) -> Snapshot:
    """The snapshot with another process."""
    return LONE._replace(process=PROCESS._replace(**changes))  # type: ignore[arg-type]


class Answering(socketserver.ThreadingUnixStreamServer):
    """Answers with a snapshot, and with those of the connections that are asked for.

    asked: the targets so far. instead: what is sent in place of any answer. only: the one target that is known.
    """

    def __init__(
        self, path: str, snapshot: Snapshot, connections: Sequence[Connection], instead: bytes | None, only: str
    ) -> None:
        super().__init__(path, _Request)
        self.snapshot = snapshot
        self.connections = connections
        self.instead = instead
        self.only = only
        self.asked: list[str] = []

    def answer(self, target: str) -> tuple[int, str]:
        """Status and content."""
        self.asked.append(target)
        path, _, words = target.partition("?")
        if self.only and path != self.only:
            return 503, "too many look"
        if path == "/v1/status":
            return 200, as_json(self.snapshot)
        if path != "/v1/connections":
            return 404, "nothing is there"
        query = read_query(words)
        found = sorted(filter(query.matches, self.connections), key=query.key, reverse=True)
        shown = found if query.limit == inf else found[: int(query.limit)]
        return 200, as_json(Connections(self.snapshot.process, len(found), tuple(shown)))


class _Request(BaseHTTPRequestHandler):
    server: Answering

    def do_GET(self) -> None:
        if self.server.instead is not None:
            self.wfile.write(self.server.instead)
            return
        status, content = self.server.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def answering(
    path: str | Path,
    snapshot: Snapshot = Snapshot(),  # noqa: B008  it never changes
    connections: Sequence[Connection] = (),
    instead: bytes | None = None,
    only: str = "",
) -> Iterator[Answering]:
    """It answers at a path, whose folder is made too."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with Answering(str(path), snapshot, connections, instead, only) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def run(command: Callable[[Sequence[str]], int], words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command in this process, as the command line does."""
    try:
        code = command(words)
    except StartError as error:
        complain(str(error))
        code = error.exit_code
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else -1
    return code, *capsys.readouterr()


def in_terminal(command: Sequence[str], columns: int = 80) -> list[str]:
    """The lines that a program writes to a terminal so wide, without ends."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        while select.select([ours], [], [], PATIENCE)[0]:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # EIO: the program has ended
                break
            written += data
        os.close(ours)
        assert process.wait(PATIENCE) == 0, written.decode()
    return written.decode().replace("\r\n", "\n").splitlines()
