"""This process: which one it is, and what has become of it so far."""

from __future__ import annotations

import os
import resource
import time

import pytest

from rspd.engine.loop import Loop
from rspd.engine.side import Handed
from rspd.observing.life import Life
from rspd.running.document import read, write
from rspd.snapshot import TURN_BOUNDS, Distribution, Process
from tests.support import FakeClock, open_descriptors, run


def play(*lives: str, measured: bool = False) -> list[Process]:
    """One process after the other, ten seconds each, with handovers between them. lives: their versions."""
    clock = FakeClock()
    handed: Handed = {}
    seen = []
    for version in lives:

        async def main(loop: Loop, version: str = version) -> Process:
            nonlocal handed
            life = Life(loop, version, "3")
            if handed:
                life.resume(handed)
            if measured:
                life.measure_turns()
            clock.advance(10)
            await loop.yield_turn()
            life.reloads += 2
            life.reloads_failed += 1
            life.failure = f"of {version}"
            handed = read(b"".join(write(life.hand_over())))
            return await life.snapshot()

        seen.append(run(main, clock))
    return seen


def test_a_process_knows_itself() -> None:
    async def main(loop: Loop) -> Process:
        return await Life(loop, "1.2", "").snapshot()

    seen = run(main)
    assert (seen.version, seen.pid, seen.worker, seen.processes) == ("1.2", os.getpid(), "", 1)
    assert len(seen.origin) == 8
    assert seen.lineage == seen.origin
    assert abs(seen.now - time.time()) < 60
    assert seen.descriptors_max == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert (seen.reloads, seen.reloads_failed, seen.handovers, seen.failure, seen.ending) == (0, 0, 0, "", False)
    assert seen.turns == Distribution()


def test_counts_go_on_over_handovers_and_the_rest_does_not() -> None:
    first, second, third = play("1", "2", "3")
    assert [one.version for one in (first, second, third)] == ["1", "2", "3"]
    assert len({first.origin, second.origin, third.origin}) == 3
    assert first.origin == first.lineage == second.lineage == third.lineage
    assert [one.handovers for one in (first, second, third)] == [0, 1, 2]
    assert [(one.reloads, one.reloads_failed) for one in (first, second, third)] == [(2, 1), (4, 2), (6, 3)]
    assert [(one.age, one.service_age) for one in (first, second, third)] == [(10, 10), (10, 20), (10, 30)]
    assert [one.failure for one in (first, second, third)] == ["of 1", "of 2", "of 3"]


def test_after_a_version_that_knew_nothing_of_this_there_was_one_handover() -> None:
    async def main(loop: Loop) -> Process:
        life = Life(loop, "1", "")
        life.resume({})
        return await life.snapshot()

    seen = run(main)
    assert (seen.handovers, seen.reloads, seen.lineage) == (1, 0, seen.origin)


def test_turns_are_measured_if_asked_for_and_handed_over() -> None:
    first, second = play("1", "2", measured=True)
    assert len(first.turns.counts) == len(TURN_BOUNDS) + 1
    assert first.turns.counts[-1] >= 1  # the turn in which the clock went on
    assert second.turns.number > first.turns.number
    assert second.turns.total == pytest.approx(2 * first.turns.total)


@pytest.mark.parametrize("place", ["/proc/self/fd", "/proc/self/fdinfo"])
def test_descriptors_are_counted_as_on_older_kernels_too(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fdinfo, no kernel says the size: so they are counted one by one, over many turns."""
    monkeypatch.setattr("rspd.observing.life.DESCRIPTORS", place)
    monkeypatch.setattr("rspd.observing.life.SLICE", 10)
    spare = [os.dup(0) for _ in range(57)]
    try:

        async def main(loop: Loop) -> tuple[int, int]:
            process = await Life(loop, "", "").snapshot()
            return process.descriptors, open_descriptors() - 1

        counted, there = run(main)
    finally:
        for one in spare:
            os.close(one)
    assert counted == there > 57


def test_where_descriptors_cannot_be_counted_it_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rspd.observing.life.DESCRIPTORS", "/nowhere")

    async def main(loop: Loop) -> int:
        return (await Life(loop, "", "").snapshot()).descriptors

    assert run(main) == 0
