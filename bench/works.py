"""What each contestant is given to do, and what is read of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from bench import counters
from bench.peers import (
    FEW_BACKENDS,
    MANY_BACKENDS,
    NGINX,
    QUESTION,
    RSPD,
    Direct,
    Peer,
    PeerError,
    Running,
    TimedRspd,
    environment,
    first_answer,
    running,
)

# A round of a contestant: its figures by name. What they mean stands at `Work.measure`.
Figures = dict[str, float]

MANY = 64  # connections at a time
CONNECTIONS = 16  # that carry requests
STREAMS = 8
FOUR = 4  # backends
PROCESSES = "processes"
PORTS = 256  # of the backend: each contestant has its own, so that none finds the other's ports in TIME_WAIT
SLOW = 120.0  # seconds after which a load has failed
UNANSWERED = 10.0  # seconds: the PATIENCE of load.c, what who has no answer by then counts as beside busy ones


@dataclass(frozen=True)
class Sizes:
    """How much of everything, for each contestant and round."""

    one_at_a_time: int = 3000
    many_at_a_time: int = 6000
    requests_one: int = 5000  # over one connection
    requests: int = 30_000
    bytes: int = 1_000_000_000
    rate_seconds: float = 0.4  # short, so that a stall of the machine spoils few rounds
    idle: int = 5000
    beside_idle: int = 1000
    burst: int = 400  # new connections beside busy ones
    busy: int = 1000
    busy_streams: int = 300
    starts: int = 9
    rounds: int = 5


QUICK = Sizes(100, 200, 300, 500, 20_000_000, 0.1, 100, 50, 40, 100, 30, 1, 1)


@dataclass
class Ground:
    """Where the works happen: the load's program, the backend's ports, a folder, and who has which processors."""

    program: Path
    folder: Path
    proxy_cpus: set[int]
    load_cpus: set[int]
    sizes: Sizes
    backend: subprocess.Popen[str]
    ports: list[int]
    folders: int = 0
    question: bytes = QUESTION  # what the backend answers

    def new_folder(self) -> Path:
        """A path for a contestant's files."""
        self.folders += 1
        return self.folder / str(self.folders)

    def load(self, *words: object) -> dict[str, float]:
        """Run the load to its end, and return what it reports. Raises PeerError."""
        run = self.run([str(self.program), *map(str, words)])
        if run.returncode:
            raise PeerError(run.stderr.strip().removeprefix("load: "))
        found: dict[str, float] = json.loads(run.stdout)
        return found

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a load on its processors to its end. Raises PeerError if that takes too long."""
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=SLOW,
                preexec_fn=lambda: os.sched_setaffinity(0, self.load_cpus),
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"not done after {SLOW:.0f} s") from None

    def accepted(self, ports: Sequence[int]) -> list[int]:
        """How many connections the backend has accepted so far on each of these ports of it."""
        assert self.backend.stdin
        assert self.backend.stdout
        self.backend.stdin.write("?\n")
        self.backend.stdin.flush()
        found = dict(zip(self.ports, map(int, self.backend.stdout.readline().split()), strict=True))
        return [found[port] for port in ports]

    @contextmanager
    def holding(self, port: int, count: int) -> Iterator[None]:
        """Connections that have had one answer each, and are open and idle. Raises PeerError."""
        with subprocess.Popen(
            [str(self.program), "hold", str(port), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, self.load_cpus),
        ) as process:
            assert process.stdout
            assert process.stderr
            if not process.stdout.readline():
                raise PeerError(process.stderr.read().strip().removeprefix("load: "))
            yield


@contextmanager
def ground(
    program: Path, folder: Path, proxy: set[int], load: set[int], sizes: Sizes, request: int = len(QUESTION)
) -> Iterator[Ground]:
    """The backend, on the load's processors; it ends with this. request: the bytes that it answers."""
    with subprocess.Popen(
        [str(program), "backend", str(PORTS), str(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, load),
    ) as backend:
        assert backend.stdout
        ports = [int(backend.stdout.readline()) for _ in range(PORTS)]
        yield Ground(program, folder, proxy, load, sizes, backend, ports)


@dataclass(frozen=True)
class Work:
    """A work: its key, its title, and what is done in a round."""

    key: str
    group: str
    title: str
    unit: str  # of which CPU seconds are counted: "GB", "connection", "request"
    words: Callable[[Sizes, float], list[object]]  # the load's subcommand and what follows the port, for a share
    amount: Callable[[Sizes, float], float]  # how many units that is
    logs: bool = False
    serial: bool = False  # rspd, serial takes part
    processes: bool = False  # one process against several
    often: int = 1  # times as many rounds, where a small difference is looked for

    def measure(self, one: Running, place: Ground, share: float = 1.0) -> Figures:
        """One round. Raises PeerError.

        cpu: CPU seconds of the contestant for a unit; rate: units per second; busy, load: processors that the
        contestant, and load and backend together, had at work; most, least: the parts of the new connections that its
        process with the most, and the one with the least, have accepted.
        """
        share *= one.peer.work
        kind, *rest = self.words(place.sizes, share)
        amount = self.amount(place.sizes, share)
        earlier = place.accepted(one.backends)
        before = counters.settled(one.cpu)
        backend = counters.cpu_seconds([place.backend.pid])
        found = place.load(kind, one.port, *rest)
        backend = counters.cpu_seconds([place.backend.pid]) - backend
        used = counters.settled(one.cpu) - before
        one.check()
        accepted = [now - then for then, now in zip(earlier, place.accepted(one.backends), strict=True)]
        seconds = found.pop("seconds")
        figures = {"rate": amount / seconds, "load": (found.pop("cpu") + backend) / seconds, **found}
        if one.peer.own_backends:
            figures |= {"most": max(accepted) / sum(accepted), "least": min(accepted) / sum(accepted)}
        elif len(accepted) > 1:
            check_spread(amount, accepted)
        if not isinstance(one.peer, Direct):
            figures |= {"cpu": used / amount, "busy": used / seconds}
        return figures


def check_spread(amount: float, found: Sequence[int]) -> None:
    """Whether so many connections were spread evenly over the backends. Raises PeerError.

    Taking turns, each backend gets its part to the connection, or to the next whole number if the parts are not whole.
    """
    part = amount / len(found)
    if sum(found) != amount or any(abs(count - part) >= 1 for count in found):
        got = f"from {min(found)} to {max(found)}, {sum(found)} in all"
        raise PeerError(f"expected {part:g} connections to each of {len(found)} backends, got {got}")


def _bulk(key: str, title: str, streams: int, serial: bool) -> Work:
    def words(sizes: Sizes, share: float) -> list[object]:
        return [key.partition("-")[0], int(sizes.bytes * share) // streams, streams]

    def amount(sizes: Sizes, share: float) -> float:
        return int(sizes.bytes * share) // streams * streams / 1e9

    return Work(key, "bulk", title, "GB", words, amount, serial=serial)


def _connections(
    key: str, title: str, at_a_time: int, group: str = "connections", logs: bool = False, often: int = 1
) -> Work:
    def count(sizes: Sizes, share: float) -> float:
        return max(at_a_time, int((sizes.one_at_a_time if at_a_time == 1 else sizes.many_at_a_time) * share))

    def words(sizes: Sizes, share: float) -> list[object]:
        return ["connections", count(sizes, share), at_a_time]

    return Work(key, group, title, "connection", words, count, logs, group == "connections", group == PROCESSES, often)


def _requests(key: str, title: str, connections: int, group: str = "requests") -> Work:
    def count(sizes: Sizes, share: float) -> float:
        return max(connections, int((sizes.requests_one if connections == 1 else sizes.requests) * share))

    def words(sizes: Sizes, share: float) -> list[object]:
        return ["requests", count(sizes, share), connections]

    several = group == PROCESSES
    return Work(key, group, title, "request", words, count, serial=connections == 1, processes=several)


def at_rate(rate: float) -> Work:
    """Requests at so many per second."""

    def count(sizes: Sizes, share: float) -> float:
        return max(CONNECTIONS, int(rate * sizes.rate_seconds))

    def words(sizes: Sizes, share: float) -> list[object]:
        return ["rate", count(sizes, share), CONNECTIONS, rate]

    title = f"kept-alive requests, {rate:.0f} per second"
    return Work(RATE, "requests", title, "request", words, count, often=4)


SEVERAL = (2, 4)  # processes, beside one
IN_SEVERAL = "1, 2 and 4 processes"
FOUR_1, FOUR_64, HUNDRED = "four-1", "four-64", "hundred-64"
WORKS = [
    _bulk("down-1", "download, 1 stream", 1, True),
    _bulk("down-8", "download, 8 streams", STREAMS, False),
    _bulk("up-1", "upload, 1 stream", 1, True),
    _bulk("up-8", "upload, 8 streams", STREAMS, False),
    _connections("new-1", "new connections, 1 at a time", 1),
    _connections("new-64", f"new connections, {MANY} at a time", MANY),
    _connections("new-1-logs", "new connections, 1 at a time, logs on", 1, logs=True),
    _connections("new-64-logs", f"new connections, {MANY} at a time, logs on", MANY, logs=True),
    _connections(FOUR_1, "four backends: new connections, 1 at a time", 1, "balancing"),
    _connections(FOUR_64, f"four backends: new connections, {MANY} at a time", MANY, "balancing"),
    _connections(
        *(HUNDRED, f"{FEW_BACKENDS} backends, and {MANY_BACKENDS}: new connections, {MANY} at a time", MANY),
        group="balancing",
        often=5,
    ),
    _requests("requests-1", "kept-alive requests, 1 connection", 1),
    _requests("requests-16", f"kept-alive requests, {CONNECTIONS} connections", CONNECTIONS),
    _connections("processes-new-64", f"{IN_SEVERAL}: new connections, {MANY} at a time", MANY, PROCESSES),
    _requests("processes-requests-64", f"{IN_SEVERAL}: kept-alive requests, {MANY} connections", MANY, PROCESSES),
]
IDLE, RATE, TURNS, START, BARE = "idle", "rate", "turns", "start", "python3 -c pass"
BESIDE, BESIDE_DOWN = "beside", "beside-down"
OWN_RUN = "a run of its own: "  # in a note, before the date of the run
GROUPS = ("bulk", "connections", "requests", "idle", BESIDE, "start", PROCESSES, "balancing", "ab")


@dataclass
class Results:
    """The figures of one work: for each contestant its rounds, or why it failed.

    silent: who logs nothing, logs on; absent: who takes no part, since it cannot have several backends.
    """

    title: str
    unit: str = ""
    rounds: dict[str, list[Figures]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For results.json."""
        return dict(vars(self))


def say(text: str) -> None:
    """Progress, for who waits."""
    print(text, file=sys.stderr, flush=True)


def rounds_told(count: int) -> str:
    """How many rounds, in words."""
    return f"{count} round{'s' * (count != 1)}"


def run(
    results: Results,
    peers: Sequence[Peer],
    place: Ground,
    logs: bool,
    measure: Callable[[Running, float], Figures],
    rounds: int,
) -> Results:
    """Start all contestants, warm them up, and measure them in turn, another one first in each round.

    One that fails is ended, and the others go on. `measure` gets the contestant and the share of the full work.
    """
    with ExitStack() as stack:
        alive: dict[str, tuple[Running, ExitStack]] = {}

        def attempt(name: str, what: Callable[[], None]) -> None:
            try:
                what()
            except PeerError as error:
                why = str(error)
                last = alive[name][0].last_line() if name in alive else None
                if last and last not in why:
                    why += f"; its last line: {last}"
                say(f"  {name}: {why}")
                results.failed[name] = why
                results.rounds.pop(name, None)
                if name in alive:
                    alive.pop(name)[1].close()

        def begin(peer: Peer, ports: Sequence[int]) -> None:
            own = stack.enter_context(ExitStack())
            one = own.enter_context(running(peer, place.new_folder(), ports, logs, place.proxy_cpus))
            alive[peer.name] = one, own
            first_answer(one, time.monotonic(), question=peer.question or place.question)
            measure(one, 0.1)

        def go(name: str) -> None:
            figures = measure(alive[name][0], 1.0)
            results.rounds.setdefault(name, []).append(figures)

        say(results.title)
        free = iter(place.ports)
        for peer in peers:
            ports = list(islice(free, peer.backends))
            attempt(peer.name, lambda peer=peer, ports=ports: begin(peer, ports))  # type: ignore[misc]
        names = [peer.name for peer in peers]
        for turn in range(rounds):
            first = turn * len(names) // rounds
            for name in names[first:] + names[:first]:
                if name in alive:
                    attempt(name, lambda name=name: go(name))  # type: ignore[misc]
    return results


def run_work(work: Work, peers: Sequence[Peer], place: Ground) -> Results:
    """All rounds of a work."""

    def measure(one: Running, share: float) -> Figures:
        return work.measure(one, place, share)

    results = Results(work.title, work.unit)
    run(results, peers, place, work.logs, measure, place.sizes.rounds * work.often)
    if work.often > 1:
        results.notes.append(f"{rounds_told(place.sizes.rounds * work.often)}.")
    if work.logs:
        results.silent = [peer.name for peer in peers if not peer.logs]
        results.notes += [f"{name} logs nothing of connections." for name in results.silent]
    return results


def run_turns(work: Work, peers: Sequence[TimedRspd], place: Ground) -> Results:
    """How long the turns of rspd's loop are, in each round of a work.

    turns: how many there were in the round; cpu_longest, wall_longest: the seconds of the longest; cpu_over,
    wall_over: how many took over a millisecond of each.
    """
    results = Results(f"turns of the loop: {work.title}")
    say(results.title)
    for number, peer in enumerate(peers):
        folder = place.new_folder()
        try:
            with running(peer, folder, [place.ports[number]], False, place.proxy_cpus) as one:
                first_answer(one, time.monotonic())
                work.measure(one, place)  # to warm up
                ask_turns(one, folder / peer.TURNS)
                rounds = []
                for _ in range(place.sizes.rounds * work.often):
                    work.measure(one, place)
                    rounds.append(ask_turns(one, folder / peer.TURNS))
            results.rounds[peer.name] = rounds
        except PeerError as error:
            say(f"  {peer.name}: {error}")
            results.failed[peer.name] = str(error)
    results.notes.append(
        "The same load once more, for rspd with a clock in its loop. "
        "A turn goes from the return of one poll of epoll to the call of the next. "
        "Turns in which a connection begins or ends are left out. "
        "Each round has a longest turn of its own. "
        "Wall time has in it what the machine did meanwhile."
    )
    return results


def ask_turns(one: Running, path: Path) -> Figures:
    """What turns.py knows since it was asked before. Raises PeerError."""
    path.unlink(missing_ok=True)
    one.processes[0].send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + UNANSWERED
    while not path.exists() and time.monotonic() < deadline:
        one.check()
        time.sleep(0.001)
    return read_turns(path)


def read_turns(path: Path) -> Figures:
    """What turns.py has written. Raises PeerError."""
    try:
        found: Figures = json.loads(path.read_text())
    except OSError:
        raise PeerError("expected the times of its turns, found none") from None
    if not found["turns"]:
        raise PeerError("expected turns of its loop, found none: it does not use select.epoll")
    return found


def run_idle(peers: Sequence[Peer], place: Ground, descriptors: int) -> Results:
    """Memory of an idle connection, and the cost of a new one beside many.

    memory: bytes for each; none, open: CPU seconds of a new connection without and with them; growth: open / none.
    """
    sizes = place.sizes
    connections = next(work for work in WORKS if work.key == "new-1")
    share = sizes.beside_idle / sizes.one_at_a_time
    base: dict[str, int] = {}

    def most(peer: Peer) -> int:
        return min(sizes.idle, peer.idle_max, (descriptors - 200) // peer.descriptors)

    def measure(one: Running, part: float) -> Figures:
        if part < 1:  # to warm up; nothing is held before memory is read for the first time
            return connections.measure(one, place, share)
        count = most(one.peer)
        none = connections.measure(one, place, share)["cpu"]
        before = base.setdefault(one.peer.name, counters.memory(one.pids()))
        with place.holding(one.port, count):
            counters.settled(one.cpu)
            memory = (counters.memory(one.pids()) - before) / count
            beside = connections.measure(one, place, share)["cpu"]
        counters.settled(one.cpu)
        return {"memory": memory, "none": none, "open": beside, "growth": beside / none, "count": count}

    results = Results(f"{sizes.idle} idle connections", "connection")
    for peer in peers:
        if most(peer) < min(sizes.idle, peer.idle_max):
            why = f"each takes {peer.descriptors} descriptors, and the hard limit is {descriptors} (ulimit -Hn)"
            results.notes.append(f"{peer.name} was given {most(peer)}: {why}.")
        elif peer.idle_max < sizes.idle:
            results.notes.append(f"{peer.name} was given {peer.idle_max}: it has a process for each.")
    return run(results, peers, place, False, measure, min(3, sizes.rounds))


def run_beside(key: str, peers: Sequence[Peer], place: Ground) -> Results:
    """New connections, all at once, beside many that are busy: that ask without a pause, or download without an end.

    p50, p99: seconds of a new one, from connecting to its whole answer; all: until the last of them has it; answered:
    how many have one after 10 s: the others count as 10 s; again: how many sent something twice, for instance since the
    backlog was full; meanwhile: answers, or GB, per second of the busy ones until then; count: how many came. cpu: CPU
    seconds of the contestant for an answer, or a GB, all in all: from the first busy connection until all are closed.
    """
    sizes = place.sizes
    busy, unit, scale = (sizes.busy, "answer", 1.0) if key == BESIDE else (sizes.busy_streams, "GB", 1e9)

    def measure(one: Running, share: float) -> Figures:
        count = int(sizes.burst * share)
        before = counters.settled(one.cpu)
        found = place.load(key, one.port, count, int(busy * share))
        used = counters.settled(one.cpu) - before
        one.check()
        amount = found["others"] / scale + (count if key == BESIDE else 0)
        figures = {name: found[name] for name in ("p50", "p99", "answered", "again")}
        figures |= {"all": found["seconds"], "meanwhile": found["meanwhile"] / scale, "count": count}
        return figures if isinstance(one.peer, Direct) else {**figures, "cpu": used / amount}

    others = f"{busy:,} busy ones" if key == BESIDE else f"{busy} downloads"
    results = Results(f"{sizes.burst} new connections beside {others}", unit)
    results.notes.append(
        "*Answered*: who had an answer within ten seconds; the others count as ten seconds. "
        "*Sent again*: who had to send something twice, mostly to connect, since the backlog was full."
    )
    return run(results, peers, place, False, measure, sizes.rounds)


def run_start(peers: Sequence[Peer], place: Ground, python: str) -> Results:
    """Seconds from starting it until the first request is answered through it, and its memory then, in bytes."""
    results = Results("start")

    def bare() -> Figures:
        began = time.monotonic()
        subprocess.run(
            [python, "-c", "pass"],
            env=environment(),
            stdin=subprocess.DEVNULL,
            check=True,
            preexec_fn=lambda: os.sched_setaffinity(0, place.proxy_cpus),
        )
        return {"seconds": time.monotonic() - began}

    def begin(peer: Peer, port: int) -> Figures:
        began = time.monotonic()
        with running(peer, place.new_folder(), [port], False, place.proxy_cpus) as one:
            seconds = first_answer(one, began)
            counters.settled(one.cpu)
            pss, rss = (counters.memory(one.pids(), kind) for kind in ("Pss", "Rss"))
            return {"seconds": seconds, "memory": pss, "resident": rss}

    say(results.title)
    for turn in range(place.sizes.starts + 1):
        found: dict[str, Figures] = {BARE: bare()}
        for number, peer in enumerate(peers):
            if peer.name in results.failed:
                continue
            try:
                found[peer.name] = begin(peer, place.ports[number])
            except PeerError as error:
                results.failed[peer.name] = str(error)
                results.rounds.pop(peer.name, None)
        for name, figures in found.items() if turn else ():  # the first start finds cold caches
            results.rounds.setdefault(name, []).append(figures)
    return results


def top_rate(results: Results) -> tuple[str, float]:
    """Whose top rate the fixed rate is half of (nginx's, or rspd's without nginx), and that rate."""
    for name in (NGINX, RSPD, *results.rounds):
        if name in results.rounds:
            return name, median(figures["rate"] for figures in results.rounds[name])
    raise PeerError("nobody served requests")
