"""What goes on each second, by the difference of looks at a running rspd: of each proxy, and of each backend."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from math import ceil
from typing import NamedTuple

from rspd.snapshot import Backend, Distribution, Proxy, Rate, Snapshot

# Seconds. How far back a rate goes, and the looks that are kept; and about what is between two of these, at least.
RECENT, KEPT, APART = 3.0, 60.0, 0.45

# Whose counts they are: proxy, pool, whether the pool is shared, backend. A proxy's own have no pool and no backend.
Key = tuple[str, str, bool, str]

Bytes = tuple[int, int]

NONE = Distribution()


def key_of(thing: Proxy | Backend) -> Key:
    """Whose counts those of a proxy, or of a backend, are."""
    return (
        (thing.name, "", False, "") if isinstance(thing, Proxy) else (thing.proxy, thing.pool, thing.shared, thing.name)
    )


class Counts(NamedTuple):
    """Counts that go up: connections begun, bytes from clients, bytes from backends. connect: see Backend."""

    begun: int
    sent: int
    received: int
    connect: Distribution


class Series(NamedTuple):
    """The looks at which the counts of one proxy or backend were seen. Times are in seconds, monotonic."""

    times: list[float]
    counts: list[Counts]

    def add(self, when: float, counts: Counts) -> None:
        """Add a look, and drop those that are too old."""
        if len(self.times) > 1 and when - self.times[-2] < APART:
            del self.times[-1], self.counts[-1]
        while len(self.times) > 1 and self.times[1] < when - KEPT:
            del self.times[0], self.counts[0]
        self.times.append(when)
        self.counts.append(counts)

    @property
    def begun(self) -> int:
        """How many connections have begun since the first of these looks."""
        return self.counts[-1].begun - self.counts[0].begun if self.counts else 0

    def rate(self) -> Rate | None:
        """What went on lately; None if there were too few looks to tell."""
        if len(self.times) < 2:
            return None
        first = max(0, bisect_left(self.times, self.times[-1] - RECENT + APART) - 1)
        seconds = self.times[-1] - self.times[first]
        begun, sent, received, _ = self.counts[first]
        last = self.counts[-1]
        return Rate((last.begun - begun) / seconds, (last.sent - sent) / seconds, (last.received - received) / seconds)

    def connections(self, cells: int) -> list[float | None]:
        """Connections a second over the last minute, in so many parts of it, the latest one last.

        None: nobody looked then. The parts begin at the same times at each look, and the last one is not over yet.
        """
        if len(self.times) < 2 or cells < 1:
            return [None] * cells
        width = KEPT / cells
        begin, now = self.times[0], self.times[-1]
        last = (ceil(now / width) - 1) * width
        parts: list[float | None] = []
        for number in range(cells):
            edge = last - (cells - 1 - number) * width
            end = min(edge + width, now)
            # What has just begun is too short to tell.
            edge = max(min(edge, end - APART), begin)
            parts.append((self._begun(end) - self._begun(edge)) / (end - edge) if end - edge > 0.001 else None)
        return parts

    def connect(self) -> Distribution:
        """How long connecting took within the last minute; over all that is known if nobody connected since then."""
        if not self.counts:
            return NONE
        first, last = self.counts[0].connect, self.counts[-1].connect
        if len(first.counts) != len(last.counts) or last.number <= first.number:
            return last
        counts = tuple(now - before for now, before in zip(last.counts, first.counts, strict=True))
        return Distribution(counts, last.total - first.total)

    def _begun(self, when: float) -> float:
        """How many connections had begun; between two looks, as if they came evenly."""
        after = bisect_left(self.times, when)
        if after == 0:
            return self.counts[0].begun
        after = min(after, len(self.times) - 1)
        before = after - 1
        part = (when - self.times[before]) / (self.times[after] - self.times[before])
        return self.counts[before].begun + part * (self.counts[after].begun - self.counts[before].begun)


class Rates:
    """The looks of the last minute."""

    def __init__(self) -> None:
        self._series: dict[Key, Series] = {}
        self._who: object = None

    def note(self, snapshot: Snapshot, when: float) -> None:
        """Take a look into account. when: seconds, monotonic, later than that of the look before."""
        process = snapshot.process
        # Other processes count from other numbers.
        who = (process.lineage, process.processes, process.unanswered)
        known = self._series if who == self._who else {}
        self._who = who
        self._series = {}
        for key, counts in _counts(snapshot).items():
            series = known.get(key)
            if series is None or any(
                now < before for now, before in zip(counts[:3], series.counts[-1][:3], strict=True)
            ):
                series = Series([], [])
            series.add(when, counts)
            self._series[key] = series

    def of(self, thing: Proxy | Backend) -> Series:
        """The looks at a proxy or a backend. If it was new meanwhile, or counts anew, those since then."""
        return self._series.get(key_of(thing)) or Series([], [])


def _counts(snapshot: Snapshot) -> Mapping[Key, Counts]:
    volumes = {
        (proxy.name, one.backend): (one.sent, one.received) for proxy in snapshot.proxies for one in proxy.volumes
    }
    users: dict[str, set[str]] = {}
    for route in snapshot.routes:
        if route.pool_shared:
            users.setdefault(route.pool, set()).add(route.proxy)
    found: dict[Key, Counts] = {}
    for proxy in snapshot.proxies:
        moved = _sum(volumes[proxy.name, one.backend] for one in proxy.volumes)
        # The counts of a name are in its first entry. A second one is of connections of a proxy that was taken out.
        found.setdefault(key_of(proxy), Counts(proxy.accepted, *moved, NONE))
    for backend in snapshot.backends:
        proxies = users.get(backend.pool, set()) if backend.shared else {backend.proxy}
        moved = _sum(volumes.get((proxy, backend.name), (0, 0)) for proxy in proxies)
        found[key_of(backend)] = Counts(backend.chosen, *moved, backend.connect)
    return found


def _sum(volumes: Iterator[Bytes]) -> Bytes:
    sent = received = 0
    for one in volumes:
        sent += one[0]
        received += one[1]
    return sent, received
