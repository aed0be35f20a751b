"""Samples of what goes on: how many bytes open connections have moved, and how much each second."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from itertools import islice, pairwise
from math import inf
from typing import Protocol

from rspd.engine.loop import Loop, Task, news
from rspd.engine.side import Handed
from rspd.histogram import begins_anew, rows
from rspd.observing.pace import Pace
from rspd.routing.pools import Pools
from rspd.serving.connection import Connection
from rspd.serving.proxy import Proxy
from rspd.serving.tally import Tally
from rspd.snapshot import Rate

# Seconds between two samples, as long as something goes on; and the longest time that a rate is for.
STEP, LONGEST = 5.0, 60.0

# How many samples are kept: after each idle time, there is one more than after each STEP.
KEPT = int(2 * LONGEST / STEP) + 2

# How many connections, and how many proxies, are looked at in one turn of the loop: less than a millisecond of work.
SLICE, LARGE = 200, 20


class Everyone(Protocol):
    """All proxies; see running/proxies.py."""

    configured: dict[str, Proxy]
    pools: Pools
    tallies: dict[str, Tally]

    def everyone(self) -> list[Proxy]:
        """As for `Proxies`."""

    def accepted(self, name: str) -> int:
        """As for `Proxies`."""


# When a sample was taken; then what there had been by then: clients, bytes from clients, bytes from backends.
Sample = tuple[float, int, int, int]


class Sampler:
    """Takes samples of all proxies, as long as somebody could look. An idle process is not woken.

    The bytes of open connections are counted at each sample, and at each look.
    queued: how many clients of each proxy wait for a backend, by the last count.
    """

    def __init__(self, loop: Loop, pace: Pace, proxies: Everyone, watchers: set[Task]) -> None:
        """watchers: as for `Proxy`."""
        self._loop = loop
        self._pace = pace
        self._proxies = proxies
        self._watchers = watchers
        self._samples: dict[str, deque[Sample]] = {}
        # The bytes of each connection at the last two samples, with the time of each sample.
        self._before: tuple[float, Mapping[Connection, int]] = -inf, {}
        self._latest: tuple[float, Mapping[Connection, int]] = -inf, {}
        self._task: Task | None = None
        self.queued: Mapping[str, int] = {}

    def start(self) -> None:
        """Take samples from now on. Call it after each reload: what is new since has its first sample then."""
        if not self._task:
            self._task = self._loop.spawn(self._take_samples())
            return
        for name in self._proxies.tallies.keys() - self._samples.keys():
            self._add_sample(name)

    def stop(self) -> None:
        """Take no more samples."""
        if self._task:
            self._task.cancel()
            self._task = None
            self._before = self._latest = -inf, {}

    async def count_bytes(self) -> dict[Connection, int]:
        """Count the bytes of all open connections. Returns how many each has moved."""
        totals: dict[Connection, int] = {}
        queued: Counter[str] = Counter()
        for proxy in self._proxies.everyone():
            connections = iter(list(proxy.connections.values()))
            while part := list(islice(connections, SLICE)):
                for connection in part:
                    relay, backend = connection.relay, connection.backend
                    if relay and backend and not connection.task.done:
                        sent, received = relay.upload.total, relay.download.total
                        proxy.tally.count_bytes(connection, backend.name, sent, received)
                        totals[connection] = sent + received
                    elif connection.attempts and connection.attempts.queued_at:
                        queued[proxy.config.name] += 1
                await self._pace.slice()
        self.queued = queued
        return totals

    def rate(self, name: str, seconds: float) -> Rate:
        """What went on in a proxy each second, in the time up to now; in a shorter time if it is not older."""
        samples = self._samples.get(name)
        if not samples:
            return Rate()
        now = self._loop.now
        begin = max(now - seconds, samples[0][0])
        elapsed = now - begin
        if elapsed <= 0:
            return Rate()
        latest = self._sample(name)
        then = _at(begin, [*samples, latest])
        return Rate(*((after - before) / elapsed for before, after in zip(then, latest[1:], strict=True)))

    def rate_of(self, connection: Connection, total: int) -> float:
        """How many bytes a second a connection has moved since a sample that is at least a second old.

        Since its begin if there is no such sample.
        """
        now = self._loop.now
        at, totals = self._latest if self._latest[0] <= now - 1.0 else self._before
        begin = at if connection in totals else max(connection.started, at)
        return (total - totals.get(connection, 0)) / max(now - begin, 1.0)

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process."""
        return {"samples": [(name, list(samples)) for name, samples in self._samples.items()]}

    def resume(self, handed: Handed) -> None:
        """Go on with the samples of the process before."""
        try:
            known = rows(handed.get("samples", ()), str, list)
            samples = {name: [(*one,) for one in rows(own, float, int, int, int)] for name, own in known}
        except ValueError as error:
            begins_anew("samples", error)
            return
        self._samples.update((name, deque(own, maxlen=KEPT)) for name, own in samples.items() if own)

    def _add_sample(self, name: str) -> None:
        self._samples.setdefault(name, deque(maxlen=KEPT)).append(self._sample(name))

    def _sample(self, name: str) -> Sample:
        volumes = self._proxies.tallies[name].volumes
        accepted = self._proxies.accepted(name)
        return self._loop.now, accepted, sum(one.sent for one in volumes), sum(one.received for one in volumes)

    def _activity(self) -> tuple[int, int]:
        """How many connections are open, and how many clients have come to those proxies that are there."""
        everyone = self._proxies.everyone()
        return sum(proxy.open for proxy in everyone), sum(proxy.accepted for proxy in everyone)

    async def _take_samples(self) -> None:
        loop, task = self._loop, self._loop.current
        try:
            while True:
                self._before, self._latest = self._latest, (loop.now, await self.count_bytes())
                before = self._activity()
                for number, name in enumerate(list(self._proxies.tallies), 1):
                    self._add_sample(name)
                    if not number % LARGE:
                        await self._pace.slice()
                # If a connection came or went since, its counts are in no sample yet.
                if before == self._activity() and not before[0]:
                    self._before = self._latest = loop.now, {}  # to let go of those that have ended
                    self._watchers.add(task)
                    await news()
                    self._watchers.discard(task)
                    for samples in self._samples.values():
                        samples.append((loop.now, *samples[-1][1:]))  # nothing went on until now
                await loop.sleep(STEP)
        finally:
            self._watchers.discard(task)


def _at(when: float, samples: list[Sample]) -> list[float]:
    """What there had been at a time between two samples, as if it had come evenly."""
    for before, after in pairwise(samples):
        if before[0] <= when <= after[0]:
            share = (when - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 1.0
            return [then + (now - then) * share for then, now in zip(before[1:], after[1:], strict=True)]
    return [float(number) for number in samples[0][1:]]
