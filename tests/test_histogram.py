"""Counting durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspd.histogram import Histogram
from rspd.snapshot import Distribution

BOUNDS = (0.01, 0.1, 1.0)

SECONDS = st.lists(st.one_of(st.sampled_from([0.0, *BOUNDS]), st.floats(0, 10)), max_size=20)


def test_a_duration_counts_in_the_bucket_whose_upper_bound_it_does_not_exceed() -> None:
    histogram = Histogram(BOUNDS)
    for seconds in (0.0, 0.01, 0.011, 0.1, 0.5, 1.0, 1.001, 3600.0):
        histogram.note(seconds)
    assert histogram.counts == [2, 2, 2, 2]
    assert histogram.total == pytest.approx(3602.622)
    assert histogram.snapshot() == Distribution((2, 2, 2, 2), histogram.total)


@given(SECONDS, SECONDS)
def test_many_at_once_count_as_one_by_one(first: list[float], then: list[float]) -> None:
    single, many = Histogram(BOUNDS), Histogram(BOUNDS)
    for seconds in first + then:
        single.note(seconds)
    many.note_all(sorted(first))
    many.note_all(sorted(then))
    assert many.counts == single.counts
    assert many.total == pytest.approx(single.total)


def test_it_goes_on_with_what_the_process_before_has_counted() -> None:
    before, after = Histogram(BOUNDS), Histogram(BOUNDS)
    before.note(0.5)
    after.note(2.0)
    after.resume(before.hand_over())
    assert after.snapshot() == Distribution((0, 0, 1, 1), 2.5)
    assert before.snapshot() == Distribution((0, 0, 1, 0), 0.5)


@pytest.mark.parametrize("handed", [None, [], [[1, 2], 5.0]])
def test_counts_of_other_bounds_and_none_are_left_out(handed: list[object] | None) -> None:
    histogram = Histogram(BOUNDS)
    histogram.note(0.5)
    histogram.resume(handed)
    assert histogram.snapshot() == Distribution((0, 0, 1, 0), 0.5)
