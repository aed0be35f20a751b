"""How a task waits for an answer: until it is woken, late, or given up."""

from __future__ import annotations

import errno

import pytest

from rspd.engine.loop import Loop
from rspd.net.waiting import wait
from tests.engine.test_loop import advance
from tests.support import FakeClock, run


def test_whoever_is_woken_looks_for_the_answer_and_waits_on() -> None:
    async def main(loop: Loop) -> None:
        answers: list[str] = []

        async def ask() -> str:
            while not answers:
                await wait(loop, loop.now + 5)
            return answers[0]

        looked: list[str] = []

        async def keep() -> None:
            looked.append(await ask())

        task = loop.spawn(keep())
        task.wake()
        await loop.yield_turn()
        assert not task.done
        answers.append("here")
        task.wake()
        await loop.yield_turn()
        assert looked == ["here"]

    run(main)


def test_at_the_deadline_it_is_late_and_not_before() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        async def ask() -> None:
            with pytest.raises(TimeoutError, match=r"^no answer$"):
                while True:
                    await wait(loop, deadline, "no answer")

        deadline = loop.now + 5
        task = loop.spawn(ask())
        await advance(loop, clock, 4.9)
        task.wake()
        await loop.yield_turn()
        assert not task.done
        await advance(loop, clock, 0.1)
        assert task.done

    run(main, clock)


def test_once_it_is_given_up_the_next_wait_says_so() -> None:
    async def main(loop: Loop) -> None:
        gone: list[str] = []

        async def ask() -> None:
            with pytest.raises(ConnectionAbortedError, match="nobody is there") as caught:
                while True:
                    await wait(loop, loop.now + 5, "no answer", lambda: bool(gone), "nobody is there")
            assert caught.value.errno == errno.ECONNABORTED

        task = loop.spawn(ask())
        task.wake()
        await loop.yield_turn()
        assert not task.done
        gone.append("the client")
        task.wake()
        await loop.yield_turn()
        assert task.done

    run(main)
