"""What rspd is to reach, and whether a run's figures do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from bench.peers import (
    DIRECT,
    FEW_BACKENDS,
    HAPROXY,
    MANY_BACKENDS,
    MANY_SUFFIX,
    NGINX,
    RSPD,
    SERIAL,
    SOCAT,
    SOCKET_PROXYD_NAME,
)
from bench.works import BARE, BESIDE, BESIDE_DOWN, FOUR_1, FOUR_64, HUNDRED, TURNS, Results

Run = dict[str, Results]
IDLE_OPEN = 5000  # idle connections, without which nothing is said about them
BURST = 400  # new connections beside busy ones, likewise


@dataclass(frozen=True)
class Target:
    """A target: what is measured, and how much it may be at most."""

    text: str
    most: float
    values: Callable[[Run], list[float]]  # of each round; raises KeyError where the figures are missing
    unit: str = ""
    aim: bool = False  # hoped for, not required
    hidden: Callable[[Run], str | None] = lambda run: None  # why the figures are not rspd's own

    def found(self, run: Run) -> list[float]:
        """What each round of this run says; nothing if the run cannot say."""
        try:
            return self.values(run)
        except KeyError:
            return []

    def measured(self, run: Run) -> float | None:
        """What this run says; None if it cannot."""
        found = self.found(run)
        return median(found) if found else None

    def verdict(self, run: Run) -> str:
        """Whether this run meets it; "-" if it has no figures."""
        value = self.measured(run)
        if value is None:
            return "-"
        if why := self.hidden(run):
            return f"not measurable: {why}"
        met = value <= self.most
        if self.aim:
            return "aim reached" if met else "aim not reached"
        return "yes" if met else "**no**"


def figures_of(run: Run, work: str, name: str, figure: str) -> list[float]:
    """A figure of each round of a contestant. Raises KeyError if there is none."""
    found = [figures[figure] for figures in run[work].rounds[name]]
    if not found:
        raise KeyError(name)
    return found


def middle(run: Run, work: str, name: str, figure: str) -> float:
    """The median over the rounds. Raises KeyError if there is none."""
    return median(figures_of(run, work, name, figure))


def in_pairs(ours: list[float], its: list[float]) -> list[tuple[float, float]]:
    """The two figures of each round; the two medians if there are not as many rounds of both."""
    return list(zip(ours, its, strict=True)) if len(ours) == len(its) else [(median(ours), median(its))]


def ratios(run: Run, work: str, ours: str, peer: str, figure: str) -> list[float]:
    """One contestant ÷ another in each round: what the machine did meanwhile met both.

    Raises KeyError if one of them has no figures, or a figure is 0.
    """
    pairs = in_pairs(figures_of(run, work, ours, figure), figures_of(run, work, peer, figure))
    if not all(its for _, its in pairs):
        raise KeyError(figure)
    return [our / its for our, its in pairs]


def _ratio(work: str, peer: str, figure: str = "cpu", ours: str = RSPD) -> Callable[[Run], list[float]]:
    return lambda run: ratios(run, work, ours, peer, figure)


def _idle(figure: str) -> Callable[[Run], list[float]]:
    def values(run: Run) -> list[float]:
        if middle(run, "idle", RSPD, "count") < IDLE_OPEN:
            raise KeyError("idle")
        return figures_of(run, "idle", RSPD, figure)

    return values


def _over_bare(run: Run) -> list[float]:
    pairs = in_pairs(figures_of(run, "start", RSPD, "seconds"), figures_of(run, "start", BARE, "seconds"))
    return [1000 * (ours - bare) for ours, bare in pairs]


def _longest_turn(run: Run) -> list[float]:
    return [1000 * longest for longest in figures_of(run, TURNS, RSPD, "cpu_longest")]


def _most(processes: int) -> Callable[[Run], list[float]]:
    return lambda run: figures_of(run, "processes-new-64", f"{RSPD}, {processes} processes", "most")


def full_burst(run: Run, work: str) -> bool:
    """Whether as many new connections came beside busy ones as the names of targets and panels say."""
    try:
        return middle(run, work, RSPD, "count") >= BURST
    except KeyError:
        return False


def _beside(work: str, figure: str) -> Callable[[Run], list[float]]:
    def values(run: Run) -> list[float]:
        if not full_burst(run, work):
            raise KeyError(work)
        return max((ratios(run, work, RSPD, peer, figure) for peer in (NGINX, HAPROXY)), key=median)

    return values


def _slow_ground(run: Run) -> str | None:
    """The p99 without a proxy, if it is so large that it hides what a proxy adds."""
    if DIRECT not in run["rate"].rounds:
        return None
    floor = middle(run, "rate", DIRECT, "p99")
    return f"without a proxy it is {1000 * floor:.2f} ms" if floor > middle(run, "rate", NGINX, "p99") / 2 else None


def _list() -> list[Target]:
    found = []
    for work, title in (("down", "download"), ("up", "upload")):
        text = f"CPU per GB, {title}, "
        found += [
            Target(text + "1 stream: rspd ÷ socket-proxyd", 1.0, _ratio(f"{work}-1", SOCKET_PROXYD_NAME)),
            Target(text + "8 streams: rspd ÷ socket-proxyd", 0.8, _ratio(f"{work}-8", SOCKET_PROXYD_NAME)),
            Target(text + "8 streams: rspd ÷ nginx", 0.5, _ratio(f"{work}-8", NGINX)),
        ]
    one, many = "CPU per new connection, 1 at a time: ", "CPU per new connection, 64 at a time: "
    found += [
        Target(one + "rspd ÷ nginx", 1.35, _ratio("new-1", NGINX)),
        Target(one + "rspd ÷ socket-proxyd", 0.75, _ratio("new-1", SOCKET_PROXYD_NAME)),
        Target(one + "rspd ÷ socat", 0.2, _ratio("new-1", SOCAT)),
        Target(one + "rspd ÷ HAProxy", 1.0, _ratio("new-1", HAPROXY), aim=True),
        Target(one + "rspd, serial ÷ rspd", 1.05, _ratio("new-1", RSPD, ours=SERIAL)),
        Target(many + "rspd ÷ nginx", 1.3, _ratio("new-64", NGINX)),
        Target(many + "rspd ÷ HAProxy", 1.25, _ratio("new-64", HAPROXY)),
        Target(many + "rspd ÷ socket-proxyd", 0.75, _ratio("new-64", SOCKET_PROXYD_NAME)),
        Target(many + "rspd ÷ socat", 0.2, _ratio("new-64", SOCAT)),
    ]
    for work, title in (("new-1-logs", "1 at a time"), ("new-64-logs", "64 at a time")):
        found.append(Target(f"the same with logs, {title}: rspd ÷ nginx", 1.35, _ratio(work, NGINX)))
    text = "CPU per new connection of ab to a web server, 64 at a time: rspd ÷ nginx"
    found.append(Target(text, 1.25, _ratio("ab-64", NGINX)))
    for work, title in ((FOUR_1, "1 at a time"), (FOUR_64, "64 at a time")):
        text = f"CPU per new connection, four backends, {title}: rspd ÷ "
        found += [
            Target(text + "nginx", 1.35, _ratio(work, NGINX)),
            Target(text + "HAProxy", 1.0, _ratio(work, HAPROXY), aim=True),
        ]
    beside = [
        Target(f"new connections beside {title}, {name}: rspd ÷ better of nginx and HAProxy", 1, _beside(work, figure))
        for work, title in ((BESIDE, "1,000 busy ones"), (BESIDE_DOWN, "300 downloads"))
        for figure, name in (("p50", "p50"), ("p99", "p99"), ("all", "until all have an answer"))
    ]
    return [
        *found,
        Target(
            f"{many}rspd with {MANY_BACKENDS} backends ÷ with {FEW_BACKENDS}",
            1.1,
            _ratio(HUNDRED, RSPD, ours=RSPD + MANY_SUFFIX),
        ),
        Target("CPU per kept-alive request: rspd ÷ nginx", 1.4, _ratio("requests-16", NGINX)),
        Target("CPU per kept-alive request: rspd ÷ socket-proxyd", 0.8, _ratio("requests-16", SOCKET_PROXYD_NAME)),
        Target("p99 at half of nginx's top rate: rspd ÷ nginx", 1.5, _ratio("rate", NGINX, "p99"), hidden=_slow_ground),
        Target("longest turn of rspd's loop at that rate, CPU time", 1, _longest_turn, " ms"),
        *beside,
        *(
            Target(
                f"new connections, 64 at a time, {count} processes: part of the process with the most", most, found_by
            )
            for count, most, found_by in ((2, 0.65, _most(2)), (4, 0.45, _most(4)))
        ),
        Target("memory of an idle connection", 3000, _idle("memory"), " B"),
        Target("CPU per new connection, 5,000 idle ones open ÷ none", 1.1, _idle("growth")),
        Target("start, over bare python3 -c pass", 30, _over_bare, " ms"),
        Target(
            "resident memory after the start",
            14,
            lambda run: [size / 1e6 for size in figures_of(run, "start", RSPD, "resident")],
            " MB",
        ),
    ]


TARGETS = _list()
