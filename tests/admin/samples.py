"""What a made-up rspd says, and processes that say it: HTTP/1.1 over a real unix socket, as the daemon's."""

from __future__ import annotations

import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from rspd.snapshot import (
    Backend,
    Checks,
    Distribution,
    Ends,
    Listener,
    Pool,
    Process,
    Proxy,
    Refusals,
    Route,
    Snapshot,
    Volume,
    as_json,
)
from tests.support import PATIENCE

# Of everything one at least. Two proxies; a backend that is up, and one that is down.
SAMPLE = Snapshot(
    Process(
        "0.3.0",
        126,
        origin="b",
        lineage="a",
        now=1_796_000_000.4,
        age=5.0,
        service_age=1000.1,
        reloads=4,
        reloads_failed=1,
        handovers=2,
        descriptors=40,
        descriptors_max=1024,
        turns=Distribution((900, 50, 40, 6, 2, 1, 0, 0, 1), 2.25),
    ),
    (
        Proxy(
            "web",
            listeners=(Listener("*:80", 3), Listener("*:81", 4)),
            open=8,
            most=100,
            accepted=60,
            queue=2,
            refused=(Refusals("deny", 5),),
            ends=(
                Ends("10.0.0.11:80", "client-closed", 30),
                Ends("10.0.0.12:80", "backend-aborted", 7),
                Ends("-", "queue-timeout", 10),
            ),
            volumes=(Volume("10.0.0.11:80", 3000, 123_456_789_012), Volume("10.0.0.12:80", 700, 9)),
            seconds=Distribution((1, 2, 3, 4, 5, 6, 7, 8, 11), 90_000.5),
            queue_seconds=Distribution((0, 0, 0, 3, 0, 0, 0, 0, 1), 62.5),
        ),
        Proxy("ssh", listeners=(Listener("*:22", 0),), open=1, most=1, accepted=1),
    ),
    (Route("web", "docs", "host docs.example.org", clients=12),),
    (Pool("web", "docs", queue=2), Pool("ssh", "", queue=0)),
    (
        Backend(
            "web",
            "docs",
            name="10.0.0.11:80",
            open=6,
            chosen=36,
            connect=Distribution((0, 30, 5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0), 1.5),
            checks=Checks(100, 2),
        ),
        Backend(
            "web",
            "docs",
            name="10.0.0.12:80",
            state="down",
            why="Connection refused",
            open=2,
            chosen=9,
            failed=3,
            connect=Distribution((9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), 0.002),
            checks=Checks(90, 12),
        ),
        Backend("ssh", "", name="10.0.0.5:22", open=1, chosen=1),
    ),
)


class Worker(socketserver.ThreadingUnixStreamServer):
    """A process that says `snapshot` at its control socket, or `answer` as it is if there is one."""

    def __init__(self, path: Path, snapshot: Snapshot) -> None:
        super().__init__(str(path), _Handler)
        self.path = str(path)
        self.snapshot = snapshot
        self.answer: bytes | None = None
        self.at_work = threading.Event()  # not set: it is frozen
        self.at_work.set()
        self.intervals: list[float] = []  # how long a thread may keep others waiting, at each request


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Worker

    def do_GET(self) -> None:
        """Answer."""
        self.server.intervals.append(sys.getswitchinterval())
        self.server.at_work.wait(PATIENCE)
        self.close_connection = True
        if self.server.answer is not None:
            self.wfile.write(self.server.answer)
            return
        assert self.path == "/v1/status"
        content = as_json(self.server.snapshot).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            self.wfile.write(content)
        except BrokenPipeError:  # who has asked waited no longer
            pass

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def worker(path: Path, snapshot: Snapshot) -> Iterator[Worker]:
    """A process, until the end."""
    with Worker(path, snapshot) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.at_work.set()
            server.shutdown()
            thread.join(PATIENCE)
            path.unlink()


def grown(snapshot: Snapshot, number: int) -> Snapshot:
    """The same a while later: so many connections more have ended in its first proxy, with 100 bytes each."""
    proxy = snapshot.proxies[0]
    ends = proxy.ends[0]._replace(number=proxy.ends[0].number + number)
    volume = proxy.volumes[0]._replace(sent=proxy.volumes[0].sent + 100 * number)
    first, *others = proxy.seconds.counts
    seconds = Distribution((first + number, *others), proxy.seconds.total + number / 1024)
    later = proxy._replace(
        accepted=proxy.accepted + number,
        ends=(ends, *proxy.ends[1:]),
        volumes=(volume, *proxy.volumes[1:]),
        seconds=seconds,
    )
    return snapshot._replace(proxies=(later, *snapshot.proxies[1:]))


def of_lineage(snapshot: Snapshot, lineage: str) -> Snapshot:
    """The same, said by another process that nobody before has handed over to."""
    return snapshot._replace(process=snapshot.process._replace(lineage=lineage, origin=lineage))
