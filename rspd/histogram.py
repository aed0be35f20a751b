"""Counting durations, and reading what another process has counted."""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from reprlib import repr as shortened
from typing import Any, TypeVar

from rspd.snapshot import Distribution

T = TypeVar("T")

# No count and no time is so large, and a float has no gaps up to about there.
MOST = 1 << 63

log = logging.getLogger(__name__)


class Histogram:
    """How many durations were in each bucket, and their sum, in seconds.

    bounds: the upper ones of all buckets but the last; see snapshot.py. counts: one more.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def note(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def note_all(self, seconds: Sequence[float]) -> None:
        """Count these, which are sorted."""
        below = 0
        for place, bound in enumerate(self.bounds):
            here = bisect_right(seconds, bound)
            self.counts[place] += here - below
            below = here
        self.counts[-1] += len(seconds) - below
        self.total += sum(seconds)

    def snapshot(self) -> Distribution:
        """What it has counted so far."""
        return Distribution(tuple(self.counts), self.total)

    def hand_over(self) -> list[object]:
        """What `resume` takes, in the next process."""
        return [self.counts, self.total]

    def resume(self, handed: Sequence[Any] | None) -> None:
        """Add what the process before has counted, if it had the same bounds. Raises ValueError if it does not fit."""
        if not handed:
            return
        ((counts, total),) = rows([handed], list, float)
        if not all(fits(count, int) for count in counts):
            raise ValueError(f"expected whole numbers, found {shortened(counts)}")
        if len(counts) == len(self.counts):
            self.counts = [own + before for own, before in zip(self.counts, counts, strict=True)]
            self.total += total


class Counts:
    """What a process before has handed over of what it had counted: some value of JSON.

    Counts must not cost a connection. So each part is checked when it is read. A part that does not fit begins anew,
    and the log says so.
    """

    def __init__(self, handed: object, whose: str) -> None:
        """whose: for people."""
        self._whose = whose
        self._parts = handed if isinstance(handed, dict) else {}
        if not isinstance(handed, dict):
            begins_anew(whose, f"expected an object, found {shortened(handed)}")

    def one(self, key: str, kind: type[T], default: T) -> T:
        """A text or a number."""
        value: T = self._parts.get(key, default)
        if fits(value, kind):
            return value
        begins_anew(f"{key} of {self._whose}", f"expected {kind.__name__}, found {shortened(value)}")
        return default

    def table(self, key: str, *kinds: type) -> Sequence[Any]:
        """Rows; none if there are none."""
        try:
            return rows(self._parts.get(key, ()), *kinds)
        except ValueError as error:
            begins_anew(f"{key} of {self._whose}", error)
            return ()

    def durations(self, key: str, histogram: Histogram) -> None:
        """Add those of a histogram to another one."""
        try:
            histogram.resume(self._parts.get(key))
        except ValueError as error:
            begins_anew(f"{key} of {self._whose}", error)


def fits(value: object, kind: type) -> bool:
    """Whether a value of JSON is of a kind. Numbers are those of things that can be counted, or of seconds."""
    if kind not in (int, float):
        return isinstance(value, (list, tuple) if kind is list else kind)
    return (type(value) is int or (kind is float and type(value) is float)) and 0 <= value < MOST


def rows(value: Any, *kinds: type) -> Sequence[Any]:
    """The rows of a table, each with columns of these kinds. Raises ValueError if it is none."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a list, found {shortened(value)}")
    for row in value:
        if not isinstance(row, (list, tuple)) or len(row) != len(kinds) or not all(map(fits, row, kinds)):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"expected a list of {names}, found {shortened(row)}")
    return value


def begins_anew(what: str, why: object) -> None:
    """What another process has counted cannot be read: say so."""
    log.warning("counts begin anew: %s: %s", what, why)
