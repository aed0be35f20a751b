"""Counting durations."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from rspd.snapshot import Distribution


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

    def resume(self, handed: Sequence[object] | None) -> None:
        """Add what the process before has counted, if it had the same bounds."""
        if not handed:
            return
        counts, total = handed
        assert isinstance(counts, list)
        assert isinstance(total, (int, float))
        if len(counts) == len(self.counts):
            self.counts = [own + before for own, before in zip(self.counts, counts, strict=True)]
            self.total += total
