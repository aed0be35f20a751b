"""Restarts of rspd and of its peers under load, side by side: `make bench-restarts`. See bench/README.md."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import counters, peers, report
from bench.__main__ import RESULTS, check_output, machine, refuse, usual_python
from bench.peers import PeerError, Place
from bench.ways import Way, ways
from bench.works import say

PAGE = peers.ROOT / "docs" / "service.md"
BEGIN, END = "<!-- made by python -m bench.restarts -->", "<!-- end of what python -m bench.restarts made -->"
ROUNDS = 1
PATIENCE = 60.0  # seconds for an answer of the visitors


@dataclass(frozen=True)
class Sizes:
    """How much of everything, for each contestant."""

    rate: int = 200  # new connections a second
    long: int = 200  # connections before the first restart
    more: int = 20  # long connections between two restarts
    restarts: int = 5
    pause: float = 2.0  # seconds between two restarts
    after: float = 60.0  # seconds until what is left is counted


QUICK = Sizes(rate=50, long=40, more=10, restarts=2, pause=0.5, after=5.0)


@dataclass(frozen=True)
class Left:
    """What there is of a contestant."""

    processes: int
    memory: int  # bytes, Pss

    @classmethod
    def of(cls, way: Way) -> Left:
        """Now."""
        pids = way.pids()
        return cls(len(pids), counters.memory(pids))


@dataclass(frozen=True)
class Found:
    """What became of the connections, and of the contestant."""

    told: str
    restarts: int  # after which another process served
    seconds: float  # that they took, the median
    new: int
    refused: int
    cut: int
    slowest_new: float  # seconds: of the longest waits for an answer around each restart, the median
    long: int
    long_cut: int
    slowest_long: float  # the same for an echo
    before: Left
    after: Left


class Visitors:
    """The program of clients and backend, which runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, command: str) -> dict[str, Any]:
        """Let it do something, and return what became of all connections so far. Raises PeerError."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the load could not {command.split()[0]}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def visitors(port: int, backend: int, cpus: set[int], output: Path) -> Iterator[Visitors]:
    """Clients for a port, and their backend."""
    with open(output, "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.visitors", str(port), str(backend)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=peers.ROOT,
            env=peers.environment(),
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )
    with process:
        try:
            yield Visitors(process)
        finally:
            process.kill()


@contextmanager
def bound(listens: bool) -> Iterator[socket.socket]:
    """A socket with a port that nobody else gets; whoever sets SO_REUSEADDR may bind it too (socket(7))."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        if listens:
            held.listen(4096)
        yield held


def measure(way: Way, folder: Path, sizes: Sizes, cpus: Sequence[int]) -> Found:
    """Restart a contestant under load. Raises PeerError."""
    folder.mkdir()
    with bound(way.peer.passed) as held, bound(False) as other, open(folder / "output", "ab") as output:
        place = Place(folder, held.getsockname()[1], [other.getsockname()[1]], None)
        with visitors(place.port, place.backend, set(cpus[1:]), folder / "visitors") as load:
            load.tell("state")  # the backend listens
            way.prepare(place, held, output.fileno(), {cpus[0]})
            try:
                way.start()
                load.tell(f"open {sizes.long}")
                load.tell(f"new {sizes.rate}")
                time.sleep(sizes.pause)
                before = Left.of(way)
                made = [restart(way, load, sizes, bool(number)) for number in range(sizes.restarts)]
                time.sleep(sizes.after)
                after = Left.of(way)
                end = load.tell("finish")
            finally:
                way.close()
    new, long = end["new"], end["long"]
    return Found(
        way.told,
        restarts=sum(one.done for one in made),
        seconds=median(one.seconds for one in made),
        new=sum(new.values()),
        refused=new.get("refused", 0),
        cut=new.get("cut", 0) + new.get("unanswered", 0),
        slowest_new=median(one.slowest_new for one in made),
        long=sum(long.values()),
        long_cut=sum(long.values()) - long.get("whole", 0),
        slowest_long=median(one.slowest_long for one in made),
        before=before,
        after=after,
    )


@dataclass(frozen=True)
class Made:
    """A restart."""

    done: bool  # another process serves new connections
    seconds: float
    slowest_new: float  # of those that have ended since it began
    slowest_long: float


def restart(way: Way, load: Visitors, sizes: Sizes, more: bool) -> Made:
    """Restart it, after more long connections have come."""
    if more:
        load.tell(f"open {sizes.more}")
    load.tell("state")
    began = time.monotonic()
    done = way.restart()
    seconds = time.monotonic() - began
    way.pids()  # numbers of those that have ended are forgotten before others have them
    time.sleep(sizes.pause)
    state = load.tell("state")
    return Made(done, seconds, state["slowest_new"], state["slowest_long"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write restarts.json and restarts.md."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: ended by SIGTERM"))
    if not options.report_only:
        try:
            run(options)
        except KeyboardInterrupt:
            say("bench: ended by Ctrl-C; nothing written")
            sys.exit(130)
    raw = json.loads((options.output / "restarts.json").read_text())
    made = text(raw["about"], raw["sizes"], raw["ways"], raw["failed"])
    (options.output / "restarts.md").write_text(f"# Restarts, side by side\n\n{made}")
    if options.publish:
        report.put_table(made, PAGE, BEGIN, END)
    print(made, end="")
    written = [options.output / "restarts.md", options.output / "restarts.json"]
    say(f"written: {', '.join(map(str, written + [PAGE] * options.publish))}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Ends the process if they are wrong."""
    known = [way.name for way in ways(sys.executable)]
    parser = argparse.ArgumentParser(prog="python -m bench.restarts", description="Restarts under load, side by side.")
    parser.add_argument(
        "--quick", action="store_true", help="few connections, and a look after 5 s: shows that it works"
    )
    parser.add_argument("--only", metavar="NAME;...", help=f"some of {'; '.join(known)}")
    parser.add_argument("--python", help="the interpreter of rspd; as for python -m bench if not given")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", metavar="DIR", type=Path, help="where the results go; build/bench if not given")
    where.add_argument("--publish", action="store_true", help="into bench/results and docs/service.md instead")
    parser.add_argument("--report-only", action="store_true", help="make the tables again")
    options = parser.parse_args(arguments)
    if options.publish and (options.quick or options.only):
        parser.error("--publish: expected a whole run, found --quick or --only; use --output")
    options.output = options.output or (RESULTS if options.publish else peers.ROOT / "build" / "bench")
    options.only = [name.strip() for name in options.only.split(";")] if options.only else known
    if unknown := set(options.only) - set(known):
        parser.error(f"--only: expected some of {'; '.join(known)}, found {'; '.join(sorted(unknown))}")
    if options.report_only and not (options.output / "restarts.json").exists():
        parser.error(f"--report-only: expected {options.output}/restarts.json, found none; run without it first")
    return options


def run(options: argparse.Namespace) -> None:
    """All ways, one after the other, into restarts.json."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        refuse("two processors are needed, one for the contestant and one for the load; this process has one")
    check_output(options.output)
    python = options.python or usual_python()
    here = [way for way in ways(python) if way.name in options.only]
    for missing in dict.fromkeys(filter(None, (way.peer.missing() for way in here))):
        say(f"bench: {missing}; going on without it")
    here = [way for way in here if not way.peer.missing()]
    sizes = QUICK if options.quick else Sizes()
    about = machine([way.peer for way in here], python, options.quick)
    found: dict[str, Found] = {}
    failed: dict[str, str] = {}
    began = time.monotonic()
    os.sched_setaffinity(0, set(cpus[1:]))
    with tempfile.TemporaryDirectory(prefix="rspd-bench-") as name:
        Path(name).chmod(0o755)  # nginx's worker is another user
        for number, way in enumerate(here):
            say(way.name)
            try:
                found[way.name] = measure(way, Path(name, str(number)), sizes, cpus)
            except PeerError as error:
                failed[way.name] = str(error)
                say(f"{way.name}: {error}")
    about |= {"minutes": round((time.monotonic() - began) / 60, 1), "rounds": ROUNDS}
    written = {
        "about": about,
        "sizes": asdict(sizes),
        "ways": {key: asdict(one) for key, one in found.items()},
        "failed": failed,
    }
    (options.output / "restarts.json").write_text(json.dumps(written, indent=1) + "\n")


HEADINGS = [
    *("contestant", "restart", "done", "new refused", "new cut", "slowest new, ms", "long cut", "slowest echo, ms"),
    *("processes", "memory, MB"),
]


def text(about: dict[str, Any], sizes: dict[str, Any], found: dict[str, dict[str, Any]], failed: dict[str, str]) -> str:
    """The table, and what it was made with."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- | --- |" + " ---: |" * (len(HEADINGS) - 2)]
    for name, one in found.items():
        cells = [
            f"**{name}**" if name == peers.RSPD else name,
            one["told"],
            f"{one['restarts']} of {sizes['restarts']}",
        ]
        cells += [f"{one[key]:,}" for key in ("refused", "cut")]
        cells += [f"{1000 * one['slowest_new']:,.0f}", f"{one['long_cut']} of {one['long']}"]
        cells += ["-" if one["long_cut"] == one["long"] else f"{1000 * one['slowest_long']:,.0f}"]
        cells += [f"{one['before']['processes']} → {one['after']['processes']}"]
        cells += [f"{one['before']['memory'] / 1e6:.1f} → {one['after']['memory'] / 1e6:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | failed: {why} |" + " |" * (len(HEADINGS) - 2) for name, why in failed.items()]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    busy = f"In the second before, other programs kept {about['busy_before']:.1f} CPUs busy."
    made = f"Measured {about['date']} on {report.describe(about)} {busy} Versions: {versions}."
    return "\n".join([*lines, "", made, ""])


if __name__ == "__main__":
    main()
