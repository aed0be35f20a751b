"""What rspd is to reach, and whether a run's figures do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.peers import (
    DIRECT,
    FEW_BACKENDS,
    HAPROXY,
    MANY_BACKENDS,
    MANY_SUFFIX,
    NGINX,
    OURS,
    RSPD,
    SOCAT,
    SOCKET_PROXYD_NAME,
)
from bench.works import BARE, BESIDE, BESIDE_DOWN, FOUR_1, FOUR_64, HUNDRED, Results

Run = dict[str, Results]
IDLE_OPEN = 5000  # idle connections, without which nothing is said about them
BURST = 400  # new connections beside busy ones, likewise


@dataclass(frozen=True)
class Target:
    """A target: what is measured, and how much it may be at most."""

    text: str
    most: float
    value: Callable[[Run], float]  # raises KeyError where the figures are missing
    unit: str = ""
    aim: bool = False  # hoped for, not required
    hidden: Callable[[Run], str | None] = lambda run: None  # why the figures are not rspd's own

    def measured(self, run: Run) -> float | None:
        """What this run says; None if it cannot."""
        try:
            return self.value(run)
        except KeyError:
            return None

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


def middle(run: Run, work: str, name: str, figure: str) -> float:
    """The median over the rounds. Raises KeyError if there is none."""
    rounds = run[work].rounds[name]
    return median(figures[figure] for figures in rounds)


def _ratio(work: str, peer: str, figure: str = "cpu") -> Callable[[Run], float]:
    return lambda run: middle(run, work, RSPD, figure) / middle(run, work, peer, figure)


def _to_best(work: str, figure: str = "cpu", needed: Sequence[str] = (NGINX, HAPROXY)) -> Callable[[Run], float]:
    def value(run: Run) -> float:
        peers = [name for name in run[work].rounds if name not in (*OURS, DIRECT)]
        if not set(needed) <= set(peers):
            raise KeyError(work)
        return middle(run, work, RSPD, figure) / min(middle(run, work, name, figure) for name in peers)

    return value


def _idle(figure: str) -> Callable[[Run], float]:
    def value(run: Run) -> float:
        if middle(run, "idle", RSPD, "count") < IDLE_OPEN:
            raise KeyError("idle")
        return middle(run, "idle", RSPD, figure)

    return value


def full_burst(run: Run, work: str) -> bool:
    """Whether as many new connections came beside busy ones as the names of targets and panels say."""
    try:
        return middle(run, work, RSPD, "count") >= BURST
    except KeyError:
        return False


def _beside(work: str, figure: str) -> Callable[[Run], float]:
    ratio = _to_best(work, figure)

    def value(run: Run) -> float:
        if not full_burst(run, work):
            raise KeyError(work)
        return ratio(run)

    return value


def _slow_ground(run: Run) -> str | None:
    """The p99 without a proxy, if it is so large that it hides what a proxy adds."""
    if DIRECT not in run["rate"].rounds:
        return None
    floor = middle(run, "rate", DIRECT, "p99")
    return f"without a proxy it is {1000 * floor:.2f} ms" if floor > middle(run, "rate", NGINX, "p99") / 2 else None


def _list() -> list[Target]:
    good = (NGINX, HAPROXY, SOCKET_PROXYD_NAME)
    found = [
        Target(f"CPU per GB, {title}: rspd ÷ best peer", 0.8, _to_best(work, needed=good))
        for work, title in (
            ("down-1", "download, 1 stream"),
            ("down-8", "download, 8 streams"),
            ("up-1", "upload, 1 stream"),
            ("up-8", "upload, 8 streams"),
        )
    ]
    for work, title in (("new-1", "1 at a time"), ("new-64", "64 at a time")):
        text = f"CPU per new connection, {title}: rspd ÷ "
        found += [
            Target(text + "nginx", 1.2, _ratio(work, NGINX)),
            Target(text + "socket-proxyd", 0.75, _ratio(work, SOCKET_PROXYD_NAME)),
            Target(text + "socat", 0.2, _ratio(work, SOCAT)),
            Target(text + "HAProxy", 1.0, _ratio(work, HAPROXY), aim=True),
        ]
    for work, title in (("new-1-logs", "1 at a time"), ("new-64-logs", "64 at a time")):
        found.append(Target(f"the same with logs, {title}: rspd ÷ nginx", 1.3, _ratio(work, NGINX)))
    for work, title in ((FOUR_1, "1 at a time"), (FOUR_64, "64 at a time")):
        text = f"CPU per new connection, four backends, {title}: rspd ÷ "
        found += [
            Target(text + "nginx", 1.2, _ratio(work, NGINX)),
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
            f"CPU per new connection, 64 at a time: rspd with {MANY_BACKENDS} backends ÷ with {FEW_BACKENDS}",
            1.1,
            lambda run: middle(run, HUNDRED, RSPD + MANY_SUFFIX, "cpu") / middle(run, HUNDRED, RSPD, "cpu"),
        ),
        Target("CPU per kept-alive request: rspd ÷ nginx", 1.4, _ratio("requests-16", NGINX)),
        Target("CPU per kept-alive request: rspd ÷ socket-proxyd", 0.8, _ratio("requests-16", SOCKET_PROXYD_NAME)),
        Target("p99 at half of nginx's top rate: rspd ÷ nginx", 1.5, _ratio("rate", NGINX, "p99"), hidden=_slow_ground),
        *beside,
        Target("memory of an idle connection", 3000, _idle("memory"), " B"),
        Target("CPU per new connection, 5,000 idle ones open ÷ none", 1.1, _idle("growth")),
        Target(
            "start, over bare python3 -c pass",
            100,
            lambda run: 1000 * (middle(run, "start", RSPD, "seconds") - middle(run, "start", BARE, "seconds")),
            " ms",
        ),
        Target("resident memory after the start", 20, lambda run: middle(run, "start", RSPD, "resident") / 1e6, " MB"),
    ]


TARGETS = _list()
