"""What a look at rspd each second costs its connections: `make bench-looking`. See bench/README.md.

Many connections are open, to many backends, and some more come and go. Beside them, a few clients exchange one message
after another, and each exchange is timed: by turns while nobody looks, and while somebody asks for the metrics, for the
status, and for what `rspd top` shows, each second.
"""

from __future__ import annotations

import argparse
import http.client
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import Event, Pipe, Process, Queue
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue as Outcomes
from multiprocessing.synchronize import Event as Flag
from pathlib import Path
from statistics import median

from rspd.admin.client import ask

BACKENDS = 100
PROBES = 10  # clients whose exchanges are timed
CHURN = 5  # connections that come and go, every 20 ms
MOST = 0.005  # seconds that a look each second may add, at p99
LATE = 60.0

TARGETS = "/v1/status", "/v1/connections?sort=rate&limit=20"


def serve(ports: Connection) -> None:
    """Echo on BACKENDS ports, and send their numbers."""
    poll = select.epoll()
    listeners = {}
    for _ in range(BACKENDS):
        listener = socket.create_server(("127.0.0.2", 0), backlog=1024)
        listener.setblocking(False)
        listeners[listener.fileno()] = listener
        poll.register(listener, select.EPOLLIN)
    ports.send([listener.getsockname()[1] for listener in listeners.values()])
    clients: dict[int, socket.socket] = {}
    while True:
        for fd, _ in poll.poll():
            if fd in listeners:
                client, _ = listeners[fd].accept()
                clients[client.fileno()] = client
                poll.register(client, select.EPOLLIN)
                continue
            try:
                data = clients[fd].recv(65536)
                clients[fd].sendall(data)
            except OSError:
                data = b""
            if not data:
                poll.unregister(fd)
                clients.pop(fd).close()


def churn(port: int) -> None:
    """Connections that come, exchange one message, and go."""
    while True:
        for _ in range(CHURN):
            with socket.create_connection(("127.0.0.1", port), LATE) as client:
                exchange(client)
        time.sleep(0.02)


def exchange(client: socket.socket) -> None:
    """One message, and its echo."""
    client.sendall(b"x" * 64)
    client.recv(64, socket.MSG_WAITALL)


def look(metrics: int, control: str, looking: Flag, spent: Outcomes[list[float]]) -> None:
    """Look once a second, while `looking`. Puts the seconds of each answer: of the metrics, and of each target."""
    while True:
        looking.wait()
        began = time.monotonic()
        times = [_timed(lambda: _scrape(metrics))]
        times += [_timed(lambda target=target: ask(control, target)) for target in TARGETS]  # type: ignore[misc]
        spent.put(times)
        time.sleep(max(0.0, began + 1.0 - time.monotonic()))


def _scrape(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LATE)
    connection.request("GET", "/metrics")
    assert b"rspd_open_connections" in connection.getresponse().read()


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


@contextmanager
def process(*work: object) -> Iterator[None]:
    """A process that runs a function with arguments, and is killed at the end."""
    function, *arguments = work
    started = Process(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
    started.start()
    try:
        yield
    finally:
        started.kill()
        started.join()


@contextmanager
def rspd(folder: Path, connections: int, port: int, metrics: int, backends: list[int]) -> Iterator[int]:
    """rspd with these backends; yields its process."""
    addresses = ", ".join(f"127.0.0.2:{backend}" for backend in backends)
    places = connections + PROBES + 10 * CHURN
    (folder / "rspd.yaml").write_text(
        f"listen: 127.0.0.1:{port}\nmax_connections: {places}\nidle_timeout: off\nlog_level: warning\n"
        f"metrics: 127.0.0.1:{metrics}\nbackends: [{addresses}]\n"
    )
    command = [sys.executable, "-m", "rspd", "--foreground", "-c", str(folder / "rspd.yaml")]
    running = subprocess.Popen(command, env={**os.environ, "RUNTIME_DIRECTORY": str(folder)})
    try:
        deadline = time.monotonic() + LATE
        while not (folder / "control.sock").exists():
            if running.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("rspd does not start; see above")
            time.sleep(0.01)
        yield running.pid
    finally:
        running.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        running.wait(LATE)


def measure(probes: list[socket.socket], seconds: float) -> list[float]:
    """The seconds of each exchange, for so long."""
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for probe in probes:
            times.append(_timed(lambda probe=probe: exchange(probe)))  # type: ignore[misc]
            time.sleep(0.001)
    return times


def percentile(values: list[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody else gets; whoever sets SO_REUSEADDR may bind it too (socket(7))."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def main() -> int:
    """Print what was measured. Returns 1 if a look adds more than MOST."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--connections", type=int, default=9500, help="open at once; each takes two descriptors")
    parser.add_argument("--rounds", type=int, default=10, help="of one window with looks and one without")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each window")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 2 * options.connections + 500:
        parser.error(
            f"expected {2 * options.connections + 500} descriptors, found {hard}: raise ulimit -Hn, or --connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        near, far = Pipe()
        stack.enter_context(process(serve, far))
        port, metrics = (stack.enter_context(free_port()) for _ in range(2))
        pid = stack.enter_context(rspd(folder, options.connections, port, metrics, near.recv()))

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", port), LATE))

        opened = [connect() for _ in range(options.connections)]
        probes = [connect() for _ in range(PROBES)]
        for client in (opened[-1], *probes):
            exchange(client)
        looking, spent = Event(), Queue()  # type: ignore[var-annotated]
        stack.enter_context(process(churn, port))
        stack.enter_context(process(look, metrics, str(folder / "control.sock"), looking, spent))
        looking.set()
        answers = [spent.get(timeout=LATE)]  # rspd imports what it needs for the first one
        times: dict[bool, list[list[float]]] = {False: [], True: []}
        cpu = {False: 0.0, True: 0.0}
        for number in range(options.rounds):
            for looked in (False, True) if number % 2 else (True, False):
                (looking.set if looked else looking.clear)()
                time.sleep(0.3)
                before = _cpu(pid)
                times[looked].append(measure(probes, options.seconds))
                cpu[looked] += _cpu(pid) - before
        looking.clear()
        answers += [spent.get() for _ in range(spent.qsize())]
    return report(options, times, cpu, answers)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(
    options: argparse.Namespace,
    times: dict[bool, list[list[float]]],
    cpu: dict[bool, float],
    answers: list[list[float]],
) -> int:
    """Print the figures. Returns 1 if a look adds more than MOST."""
    names = {False: "nobody looks", True: "a look each second"}
    print(
        f"{options.connections} connections, {BACKENDS} backends, {options.rounds} rounds of {options.seconds:g} s each"
    )
    for looked, name in names.items():
        every = [one for window in times[looked] for one in window]
        shown = " ".join(f"{1000 * percentile(every, share):8.2f}" for share in (0.5, 0.99, 0.999))
        seconds = options.rounds * options.seconds
        print(f"{name:20} p50 p99 p99.9 in ms: {shown}   CPU: {100 * cpu[looked] / seconds:5.1f} %")
    p99 = {looked: median(percentile(window, 0.99) for window in times[looked]) for looked in names}
    added = p99[True] - p99[False]
    print(f"added at p99, by the medians of the windows: {1000 * added:.2f} ms, at most {1000 * MOST:g} ms")
    for place, name in enumerate(("/metrics", *TARGETS)):
        print(f"{name:40} {1000 * median(answer[place] for answer in answers):6.1f} ms")
    return int(added > MOST)


if __name__ == "__main__":
    sys.exit(main())
