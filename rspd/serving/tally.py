"""What a proxy has counted so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from rspd.engine.cause import Cause
from rspd.engine.side import Handed
from rspd.histogram import Counts, Histogram
from rspd.snapshot import CONNECTION_BOUNDS, OTHER, QUEUE_BOUNDS, TEN_MINUTES, Ends, Failure, Refusals, Volume

# An end: the backend's name or `-`, the cause, seconds since the client was accepted, bytes from the client, and bytes
# from the backend.
End = tuple[str, Cause, float, int, int]

# How many ends are put down before they are counted. Together, they take half as long.
BATCH = 256

# How many backends that are in no pool any more keep their own counts: those that were used last. And how many more
# there may be before they are looked for.
KEPT, MORE = 100, 20

# The key of clients that were refused in a process that did not say by which one.
UNKNOWN = "unknown"

# Failures are kept by the minute, for so many minutes.
MINUTES = int(TEN_MINUTES // 60)

_BACKEND, _SECONDS, _SENT, _RECEIVED = (itemgetter(place) for place in (0, 2, 3, 4))
_backend_and_cause = itemgetter(0, 1)


class Tally:
    """The counts of a proxy, over reloads, and over processes that hand over. They only grow.

    new: ends that have been put down, one for each line `connection closed` of the log, whatever the log's level. Who
        appends the last of a BATCH calls `settle`.
    shares: of open connections, the bytes that have been counted: those from the client, and those from the backend.
    queue_seconds: how long clients waited for a backend.
    accepted: how many clients were accepted by proxies of this name that are gone.

    Names and addresses change without end, so the counts of backends that are long gone are added to those of OTHER.
    """

    def __init__(self) -> None:
        self.new: list[End] = []
        self.shares: dict[object, tuple[int, int]] = {}
        self.queue_seconds = Histogram(QUEUE_BOUNDS)
        self.accepted = 0
        self._ends: Counter[tuple[str, str]] = Counter()
        # By backend: bytes from clients, bytes from backends. Those that moved some, or had an end, last come last.
        self._volumes: dict[str, list[int]] = {}
        self._members: Callable[[], Iterable[str]] = tuple
        self._most = KEPT  # of backends, before they are looked at again
        self._seconds = Histogram(CONNECTION_BOUNDS)
        self._refused: Counter[str] = Counter()
        # By the minute, the latest one last; by cause and backend: the number, the last reason, and when that was.
        self._failures: dict[int, dict[tuple[str, str], tuple[int, str, float]]] = {}

    def settle(self) -> None:
        """Count the ends that were put down."""
        ends = sorted(self.new, key=_BACKEND)
        self.new.clear()
        self._ends.update(map(_backend_and_cause, ends))
        for backend, group in groupby(ends, _BACKEND):
            own = list(group)
            self._add(backend, sum(map(_SENT, own)), sum(map(_RECEIVED, own)))
        self._seconds.note_all(sorted(map(_SECONDS, ends)))
        if len(self._volumes) > self._most:
            self._fold()

    def _add(self, backend: str, sent: int, received: int) -> None:
        before = self._volumes.pop(backend, (0, 0))
        self._volumes[backend] = [before[0] + sent, before[1] + received]

    def go_by(self, members: Callable[[], Iterable[str]]) -> None:
        """Keep the counts of these backends apart from now on. members: returns the names of those in pools."""
        self._members = members
        self._most = KEPT

    def _fold(self) -> None:
        """Add the counts of backends that are long gone to those of OTHER. The sums stay."""
        stay = {*self._members(), "-", OTHER}
        gone = [backend for backend in self._volumes if backend not in stay]
        folded = set(gone[:-KEPT])
        for key in [key for key in self._ends if key[0] in folded]:
            self._ends[OTHER, key[1]] += self._ends.pop(key)
        for backend in folded:
            self._add(OTHER, *self._volumes.pop(backend))
        self._most = len(self._volumes) + MORE

    def count_bytes(self, connection: object, backend: str, sent: int, received: int) -> None:
        """Count the bytes that are new of an open connection, which has moved so many in all."""
        before = self.shares.get(connection, (0, 0))
        if before != (sent, received):
            self._add(backend, sent - before[0], received - before[1])
            self.shares[connection] = sent, received

    def less_share(self, connection: object, end: End) -> End:
        """The end of a connection with a share, with the bytes that have not been counted."""
        backend, cause, seconds, sent, received = end
        before = self.shares.pop(connection)
        return backend, cause, seconds, sent - before[0], received - before[1]

    def note_lost(self, handed: Handed, cause: Cause, reason: str, now: float) -> End:
        """A connection has ended that was handed over by the process before. Returns its end, for the log.

        It has moved the bytes that it had moved there. Those that were counted there are not counted again.
        """
        backend, relay = handed.get("backend", "-"), handed.get("relay", {})
        counted = handed.get("counted") or (0, 0)
        moved = (relay.get(flow, {}).get("total", 0) for flow in ("upload", "download"))
        sent, received = map(max, moved, counted)  # what lacks in the document may be its bytes
        seconds = now - handed.get("started", now)
        self.new.append((backend, cause, seconds, sent - counted[0], received - counted[1]))
        if len(self.new) >= BATCH:
            self.settle()
        self.note_failure(cause, backend, reason, now)
        return backend, cause, seconds, sent, received

    def note_failure(self, cause: str, backend: str, reason: str, now: float) -> None:
        """A connection has ended otherwise than by both ends of its streams, or a client was refused."""
        minute = int(now // 60)
        if minute not in self._failures:
            self._failures[minute] = {}
            self._forget(now)
        of_minute = self._failures[minute]
        count, before, _ = of_minute.get((cause, backend), (0, "", 0.0))
        of_minute[cause, backend] = count + 1, reason or before, now

    def note_refusal(self, key: str, reason: str, now: float) -> None:
        """A client may not come, by a key of the configuration."""
        self._refused[key] += 1
        self.note_failure(f"refused: {key}", "-", reason, now)

    def refused_at_least(self, number: int) -> None:
        """So many clients were refused by the process before, whatever of that its own counts say."""
        if (missing := number - self._refused.total()) > 0:
            self._refused[UNKNOWN] += missing

    def _forget(self, now: float) -> None:
        oldest = int(now // 60) - MINUTES
        for minute in [minute for minute in self._failures if minute < oldest]:
            del self._failures[minute]

    def _each_failure(self) -> Iterator[tuple[int, tuple[str, str], tuple[int, str, float]]]:
        for minute, of_minute in self._failures.items():
            for key, known in of_minute.items():
                yield minute, key, known

    # What is known

    @property
    def ends(self) -> tuple[Ends, ...]:
        """How many connections have ended."""
        self.settle()
        return tuple(Ends(backend, cause, number) for (backend, cause), number in self._ends.items())

    @property
    def volumes(self) -> tuple[Volume, ...]:
        """Bytes, those of open connections up to the last `count_bytes` of each."""
        self.settle()
        return tuple(Volume(backend, *volume) for backend, volume in self._volumes.items() if any(volume))

    @property
    def refused(self) -> tuple[Refusals, ...]:
        """How many clients were refused, by key."""
        return tuple(Refusals(key, number) for key, number in self._refused.items())

    @property
    def seconds(self) -> Histogram:
        """How long connections lasted."""
        self.settle()
        return self._seconds

    def failures(self, now: float) -> tuple[Failure, ...]:
        """Those of the last ten minutes, the most frequent first."""
        self._forget(now)
        found: dict[tuple[str, str], Failure] = {}
        for _, (cause, backend), (number, reason, at) in self._each_failure():
            before = found.get((cause, backend), Failure())
            found[cause, backend] = Failure(cause, backend, before.number + number, reason or before.reason, now - at)
        return tuple(sorted(found.values(), key=lambda failure: -failure.number))

    # Handover

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process, but for the shares: their connections say them."""
        self.settle()
        return {
            "accepted": self.accepted,
            "ends": [(*key, number) for key, number in self._ends.items()],
            "volumes": [(backend, *volume) for backend, volume in self._volumes.items()],
            "refused": list(self._refused.items()),
            "seconds": self._seconds.hand_over(),
            "queue_seconds": self.queue_seconds.hand_over(),
            "failures": [(minute, *key, *known) for minute, key, known in self._each_failure()],
        }

    def resume(self, handed: Handed, name: str = "") -> None:
        """Go on with the counts of the process before. name: of the proxy."""
        counts = Counts(handed, f"proxy {name!r:.40}" if name else "the proxy")
        self.accepted += counts.one("accepted", int, 0)
        for backend, cause, number in counts.table("ends", str, str, int):
            self._ends[backend, cause] += number
        for backend, sent, received in counts.table("volumes", str, int, int):
            self._add(backend, sent, received)
        for key, number in counts.table("refused", str, int):
            self._refused[key] += number
        counts.durations("seconds", self._seconds)
        counts.durations("queue_seconds", self.queue_seconds)
        for minute, cause, backend, *known in counts.table("failures", int, str, str, int, str, float):
            self._failures.setdefault(minute, {})[cause, backend] = (*known,)
