"""The work of all who look, over the turns of a real loop."""

from __future__ import annotations

import pytest

from rspd.engine.loop import Loop, news
from rspd.observing.pace import Pace
from tests.support import run


def test_each_turn_has_one_slice_however_many_look() -> None:
    turns: list[tuple[int, int]] = []

    async def main(loop: Loop) -> None:
        pace = Pace(loop)

        async def look(number: int) -> None:
            for _ in range(5):
                await pace.slice()
                turns.append((loop.turn, number))
            loop_task.wake()

        loop_task = loop.current
        tasks = [loop.spawn(look(number)) for number in range(4)]
        while not all(task.done for task in tasks):
            await news()

    run(main)
    assert len({turn for turn, _ in turns}) == len(turns) == 20
    assert [number for _, number in turns[:8]] == [0, 1, 2, 3, 0, 1, 2, 3]  # they take turns


def test_who_has_gone_waits_no_more() -> None:
    async def main(loop: Loop) -> None:
        with pytest.raises(ConnectionAbortedError):
            await Pace(loop).slice(lambda: True)

    run(main)
