"""The loop: tasks, deadlines, readiness, signals and threads."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rspd.engine.loop import EDGE, ERR, HUP, IN, OUT, RDHUP, Cancelled, Loop, Task, Watch, news
from tests.support import FakeClock, eventually, run, tasks_of


async def rounds(loop: Loop, count: int = 2) -> None:
    """Let the other tasks run for so many rounds."""
    for _ in range(count):
        await loop.yield_turn()


async def advance(loop: Loop, clock: FakeClock, seconds: float) -> None:
    """Let time pass, and let those run whose deadline is then over."""
    clock.advance(seconds)
    await rounds(loop)


async def wait_for(condition: Callable[[], object]) -> None:
    """Wait, woken by others, until a condition holds."""
    while not condition():
        await news()


async def forever() -> None:
    while True:
        await news()


@contextmanager
def socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        yield near, far


# Tasks


def test_run_returns_what_the_main_task_returns() -> None:
    async def main(loop: Loop) -> str:
        await rounds(loop)
        return "result"

    assert run(main) == "result"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), Cancelled()])
def test_run_raises_what_the_main_task_raises(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop) -> None:
        await rounds(loop)
        raise error

    with pytest.raises(type(error)) as caught:
        run(main)
    assert caught.value is error
    assert not caplog.records


def test_an_exit_asked_for_in_any_task_ends_the_loop() -> None:
    async def leave(loop: Loop) -> None:
        await rounds(loop)
        raise SystemExit(3)

    async def main(loop: Loop) -> None:
        loop.spawn(leave(loop))
        await loop.sleep(60)

    with pytest.raises(SystemExit):
        run(main)


def test_the_main_task_lives_on_though_nothing_else_knows_of_it() -> None:
    async def leave(loop: Loop) -> None:
        await rounds(loop)
        gc.collect()
        raise SystemExit(3)

    async def main(loop: Loop) -> None:
        loop.spawn(leave(loop))
        await forever()

    with pytest.raises(SystemExit):
        run(main)


def test_a_loop_runs_one_main_task_after_another() -> None:
    async def main(loop: Loop, result: int) -> int:
        await rounds(loop)
        return result

    with Loop() as loop:
        assert [loop.run(main(loop, number)) for number in range(3)] == [0, 1, 2]


def test_a_spawned_task_runs_at_once_up_to_its_first_wait() -> None:
    said: list[object] = []

    async def child(loop: Loop) -> None:
        said.append(loop.current)
        await news()
        said.append("second")

    async def main(loop: Loop) -> None:
        parent = loop.current
        task = loop.spawn(child(loop))
        assert said == [task]
        assert loop.current is parent
        task.wake()
        assert said == [task]
        await rounds(loop)
        assert said == [task, "second"]
        assert task.done

    run(main)


def test_tasks_are_counted_until_they_end() -> None:
    async def main(loop: Loop) -> None:
        before = tasks_of(loop)
        task = loop.spawn(forever())
        loop.spawn(loop.sleep(0))
        assert tasks_of(loop) == before + 1
        task.cancel()
        await rounds(loop)
        assert tasks_of(loop) == before

    run(main)


@pytest.mark.parametrize("error", [None, ValueError("x"), Cancelled()])
@pytest.mark.parametrize("waits", [0, 1])
def test_the_end_of_a_task_is_told_once_and_logged_if_it_is_a_failure(
    error: BaseException | None, waits: int, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[Task] = []

    async def child(loop: Loop) -> None:
        await rounds(loop, waits)
        if error:
            raise error

    def on_done(task: Task) -> None:
        assert task.done
        ended.append(task)

    async def main(loop: Loop) -> None:
        task = loop.spawn(child(loop), on_done)
        await rounds(loop, 4)
        assert ended == [task]

    run(main)
    assert [record.exc_info and record.exc_info[1] for record in caplog.records] == (
        [error] if isinstance(error, ValueError) else []
    )


def test_an_exception_of_a_task_is_logged_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []

    async def fail(loop: Loop) -> None:
        await rounds(loop)
        raise ValueError("the reason")

    async def work(loop: Loop) -> None:
        await rounds(loop, 4)
        said.append("done")

    async def main(loop: Loop) -> None:
        loop.spawn(fail(loop))
        loop.spawn(work(loop))
        await rounds(loop, 6)

    run(main)
    assert said == ["done"]
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "the reason"


def test_a_task_woken_many_times_is_resumed_once() -> None:
    resumed: list[int] = []

    async def child() -> None:
        while True:
            await news()
            resumed.append(1)

    async def main(loop: Loop) -> None:
        task = loop.spawn(child())
        for _ in range(3):
            task.wake()
        await rounds(loop, 4)
        assert len(resumed) == 1
        task.cancel()
        await rounds(loop)

    run(main)


def test_a_task_that_is_done_is_not_resumed(caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop) -> None:
        before = tasks_of(loop)
        task = loop.spawn(loop.sleep(0))
        task.wake()
        task.cancel()
        task.wake_at(loop.now)
        await rounds(loop, 4)
        assert tasks_of(loop) == before

    run(main)
    assert not caplog.records


@pytest.mark.parametrize("stir", [Task.wake, Task.cancel], ids=["woken", "cancelled"])
@pytest.mark.parametrize("waits", [0, 1])
def test_a_task_that_is_stirred_just_before_it_ends_ends_once(
    stir: Callable[[Task], None], waits: int, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[Task] = []

    async def child(loop: Loop) -> None:
        await rounds(loop, waits)
        stir(loop.current)

    async def main(loop: Loop) -> None:
        before = tasks_of(loop)
        task = loop.spawn(child(loop), ended.append)
        await rounds(loop, 4)
        assert ended == [task]
        assert tasks_of(loop) == before

    run(main)
    assert not caplog.records


def test_tasks_that_yield_take_turns() -> None:
    said: list[str] = []

    async def talk(loop: Loop, name: str) -> None:
        for number in range(3):
            said.append(f"{name}{number}")
            await loop.yield_turn()

    async def main(loop: Loop) -> None:
        loop.spawn(talk(loop, "a"))
        loop.spawn(talk(loop, "b"))
        await rounds(loop, 5)

    run(main)
    assert said == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_task_that_always_yields_keeps_neither_descriptors_nor_timers_waiting() -> None:
    async def busy(loop: Loop) -> None:
        while True:
            await loop.yield_turn()

    async def main(loop: Loop) -> None:
        task = loop.spawn(busy(loop))
        with socket_pair() as (near, far):
            watch = Watch(near.fileno())
            loop.watch(watch, IN | EDGE)
            far.send(b"x")
            await wait_for(lambda: watch.ready)
            loop.forget(watch)
        await loop.sleep(0.001)
        task.cancel()
        await rounds(loop)

    run(main)


# Cancel


def test_a_cancelled_task_unwinds_from_where_it_waits() -> None:
    said: list[str] = []

    async def child() -> None:
        try:
            await forever()
        except Exception:
            said.append("stopped by except Exception")
        finally:
            said.append("cleaned up")

    async def main(loop: Loop) -> None:
        task = loop.spawn(child())
        task.cancel()
        assert not task.done
        await rounds(loop)
        assert task.done

    run(main)
    assert said == ["cleaned up"]


@pytest.mark.parametrize("wake_first", [True, False])
def test_a_task_woken_and_cancelled_at_once_is_cancelled_once(
    wake_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []

    async def child(loop: Loop) -> None:
        try:
            await news()
            said.append("woken")
        except Cancelled:
            said.append("cancelled")
        await rounds(loop, 2)
        said.append("gone on")

    async def main(loop: Loop) -> None:
        task = loop.spawn(child(loop))
        task.wake_at(loop.now)
        for stir in (Task.wake, Task.cancel) if wake_first else (Task.cancel, Task.wake):
            stir(task)
        task.cancel()
        await rounds(loop, 6)

    run(main)
    assert said == ["cancelled", "gone on"]
    assert not caplog.records


def test_a_task_that_cancels_itself_ends_at_its_next_wait() -> None:
    said: list[str] = []

    async def child(loop: Loop) -> None:
        loop.current.cancel()
        said.append("before")
        await news()
        said.append("after")

    async def main(loop: Loop) -> None:
        task = loop.spawn(child(loop))
        await rounds(loop)
        assert task.done

    run(main)
    assert said == ["before"]


# Time


def test_time_is_that_of_the_clock_and_stands_still_within_a_round() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        assert loop.now == clock.now
        begun = loop.now
        clock.advance(3)
        assert loop.now == begun
        await loop.yield_turn()
        assert loop.now == begun + 3

    run(main, clock)


def test_a_sleeper_is_up_at_its_time_and_not_before_however_often_it_is_woken() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        sleeper = loop.spawn(loop.sleep(10))
        for _ in range(3):
            await advance(loop, clock, 3)
            sleeper.wake()
            await rounds(loop)
            assert not sleeper.done
        await advance(loop, clock, 1)
        assert sleeper.done

    run(main, clock)


def test_an_idle_loop_waits_in_real_time_no_longer_than_asked() -> None:
    async def main(loop: Loop) -> float:
        begun = loop.now
        await loop.sleep(0.03)
        return loop.now - begun

    assert 0.03 <= run(main) < 1


@pytest.mark.parametrize(
    ("deadlines", "due"),
    [
        ([5], 5),
        ([5, 2], 2),
        ([5, 9], 9),
        ([5, 2, 7], 7),
        ([2, 7, 5], 5),
        ([5, 9, 5], 5),
        ([5, inf, 7], 7),
        ([0], 0),
        ([-3], 0),
        ([5, inf], inf),
        ([inf], inf),
    ],
)
def test_the_last_deadline_set_is_the_one_that_counts(deadlines: list[float], due: float) -> None:
    clock = FakeClock()
    resumed: list[float] = []

    async def child(loop: Loop) -> None:
        while True:
            await news()
            resumed.append(loop.now)

    async def main(loop: Loop) -> None:
        begun = loop.now
        task = loop.spawn(child(loop))
        for seconds in deadlines:
            task.wake_at(begun + seconds)
        await rounds(loop)
        for _ in range(20):
            await advance(loop, clock, 1)
        assert resumed == ([begun + due] if due < inf else [])
        task.cancel()
        await rounds(loop)

    run(main, clock)


@given(
    st.lists(
        st.one_of(
            # A quarter is less than how far the loop sees ahead.
            st.tuples(st.just("advance"), st.just(0), st.integers(0, 24).map(lambda quarters: quarters / 4)),
            st.tuples(
                st.just("set"),
                st.integers(0, 3),
                st.one_of(st.integers(-8, 48).map(lambda quarters: quarters / 4), st.just(inf)),
            ),
        ),
        max_size=60,
    )
)
@example([("set", 0, 1.25), ("advance", 0, 0.5), ("set", 1, 10), ("advance", 0, 1)])
def test_each_deadline_resumes_its_task_once_when_it_has_passed(steps: list[tuple[str, int, float]]) -> None:
    clock = FakeClock()
    resumed: list[tuple[int, float]] = []

    async def child(loop: Loop, number: int) -> None:
        while True:
            await news()
            resumed.append((number, loop.now))

    async def main(loop: Loop) -> None:
        tasks = [loop.spawn(child(loop, number)) for number in range(4)]
        pending = dict.fromkeys(range(4), inf)
        for action, number, seconds in steps:
            if action == "set":
                tasks[number].wake_at(loop.now + seconds)
                pending[number] = loop.now + seconds
                continue
            clock.advance(seconds)
            resumed.clear()
            await rounds(loop)
            due = sorted((when, number) for number, when in pending.items() if when <= clock.now)
            assert sorted(resumed) == sorted((number, clock.now) for _, number in due)
            pending.update({number: inf for _, number in due})
        for task in tasks:
            task.cancel()
        await rounds(loop)

    run(main, clock)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_timers_fire_in_the_order_of_their_deadlines(delays: list[float]) -> None:
    clock = FakeClock()
    woken: list[float] = []

    async def child(loop: Loop, delay: float) -> None:
        await loop.sleep(delay)
        woken.append(delay)

    async def main(loop: Loop) -> None:
        for delay in delays:
            loop.spawn(child(loop, delay))
        await advance(loop, clock, 101)
        at_once = [delay for delay in delays if clock.now - 101 + delay == clock.now - 101]
        assert woken == at_once + sorted((delay for delay in delays if delay not in at_once), key=lambda d: 1000.0 + d)

    run(main, clock)


@pytest.mark.parametrize("seconds", [30 * 86400.0, 1e10, 1e300], ids=["a month", "centuries", "for ever"])
def test_a_deadline_may_be_far_away(seconds: float) -> None:
    async def main(loop: Loop) -> str:
        sleeper = loop.spawn(loop.sleep(seconds))
        told: list[str | Exception] = []
        task = loop.current

        def then(outcome: str | Exception) -> None:
            told.append(outcome)
            task.wake()

        loop.wakeups.run_in_thread(lambda: "the loop still runs", then)
        await wait_for(lambda: told)
        sleeper.cancel()
        await rounds(loop)
        return str(told[0])

    assert run(main) == "the loop still runs"


def test_a_task_that_waits_for_long_wakes_the_loop_for_one_look_at_its_deadline() -> None:
    async def main(loop: Loop) -> int:
        await loop.yield_turn()
        begun = loop.turn
        await loop.sleep(2.2)
        return loop.turn - begun

    assert run(main) <= 2


@pytest.mark.parametrize("seconds", [0.5, 60])
def test_a_timer_that_many_tasks_left_behind_keeps_none_of_them_in_memory(seconds: float) -> None:
    async def child(loop: Loop) -> None:
        loop.current.wake_at(loop.now + seconds)

    async def main(loop: Loop) -> int:
        for _ in range(5000):
            loop.spawn(child(loop))
        return sum(isinstance(thing, Task) for thing in gc.get_objects())

    assert run(main) < 500


@pytest.mark.parametrize("pattern", ["earlier", "far and near"])
def test_a_deadline_that_is_moved_for_ever_needs_no_more_memory(pattern: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> int:
        task = loop.spawn(forever())
        until = loop.now + 1e6

        async def move(times: int) -> None:
            nonlocal until
            for _ in range(times):
                if pattern == "earlier":
                    until -= 1
                    task.wake_at(until)
                else:
                    task.wake_at(until)
                    task.wake_at(loop.now + 1)
                    clock.advance(1)
                    await loop.yield_turn()

        await move(500)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await move(3000)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        task.cancel()
        await rounds(loop)
        return after - before

    assert run(main, clock) < 50_000


def test_a_deadline_is_not_put_off_by_a_task_that_takes_long() -> None:
    async def hold_up(loop: Loop) -> None:
        await loop.sleep(0.01)
        time.sleep(0.3)

    async def main(loop: Loop) -> float:
        begun = time.monotonic()
        loop.spawn(hold_up(loop))
        await loop.sleep(0.4)
        return time.monotonic() - begun

    # The median: a busy machine may be late.
    assert sorted(run(main) for _ in range(3))[1] < 0.6


def test_a_deadline_that_passed_before_the_loop_runs_is_seen_at_once() -> None:
    clock = FakeClock()

    async def wait(loop: Loop, waked: Task) -> None:
        await loop.sleep(1)
        waked.wake()

    async def forward(loop: Loop) -> None:
        loop.spawn(wait(loop, loop.current))
        clock.advance(2)
        await news()

    run(forward, clock)


# Descriptors


def test_readiness_is_told_once_until_it_changes() -> None:
    async def main(loop: Loop) -> None:
        with socket_pair() as (near, far):
            watch = Watch(near.fileno())
            loop.watch(watch, IN | OUT | RDHUP | EDGE)
            await wait_for(lambda: watch.ready)
            assert watch.ready == OUT
            watch.ready = 0
            far.send(b"x")
            await wait_for(lambda: watch.ready)
            assert watch.ready == IN | OUT
            watch.ready = 0
            await rounds(loop, 3)
            assert not watch.ready
            far.send(b"y")
            await wait_for(lambda: watch.ready)
            assert watch.ready & IN
            watch.ready = 0
            far.close()
            await wait_for(lambda: watch.ready)
            assert watch.ready & (RDHUP | HUP) == RDHUP | HUP
            loop.forget(watch)

    run(main)


def test_bits_are_kept_until_somebody_clears_them() -> None:
    async def main(loop: Loop) -> None:
        with socket_pair() as (near, far):
            watch = Watch(near.fileno())
            loop.watch(watch, IN | EDGE)
            watch.ready |= ERR  # as a call that failed may tell
            far.send(b"x")
            await wait_for(lambda: watch.ready & IN)
            assert watch.ready == IN | ERR
            loop.forget(watch)

    run(main)


def test_a_level_triggered_watch_tells_again_while_it_is_ready() -> None:
    async def main(loop: Loop) -> None:
        with socket_pair() as (near, far):
            watch = Watch(near.fileno())
            loop.watch(watch, IN)
            far.send(b"x")
            for _ in range(3):
                await wait_for(lambda: watch.ready)
                watch.ready = 0
            near.recv(1)
            await rounds(loop, 3)
            assert not watch.ready
            loop.forget(watch)

    run(main)


def test_an_unwatched_descriptor_is_silent_and_can_be_watched_again() -> None:
    async def main(loop: Loop) -> None:
        with socket_pair() as (near, far):
            watch = Watch(near.fileno())
            loop.watch(watch, IN | EDGE)
            far.send(b"x")
            await wait_for(lambda: watch.ready)
            loop.unwatch(watch)
            assert not watch.ready
            far.send(b"y")
            await rounds(loop, 3)
            assert not watch.ready
            loop.watch(watch, IN | EDGE)
            await wait_for(lambda: watch.ready)
            loop.unwatch(watch)

    run(main)


def test_a_watch_resumes_the_task_that_began_it() -> None:
    said: list[str] = []

    async def child(loop: Loop, sock: socket.socket) -> None:
        watch = Watch(sock.fileno())
        loop.watch(watch, IN | EDGE)
        await wait_for(lambda: watch.ready)
        said.append(sock.recv(9).decode())
        loop.unwatch(watch)

    async def main(loop: Loop) -> None:
        with socket_pair() as (near, far), socket_pair() as (other_near, other_far):
            loop.spawn(child(loop, near))
            other = loop.spawn(child(loop, other_near))
            other_far.send(b"first")
            await rounds(loop, 3)
            assert other.done
            assert said == ["first"]
            far.send(b"second")
            await rounds(loop, 3)

    run(main)
    assert said == ["first", "second"]


def test_a_task_with_news_of_two_descriptors_at_once_is_resumed_once() -> None:
    async def main(loop: Loop) -> None:
        with socket_pair() as (near, far):
            watches = [Watch(sock.fileno()) for sock in (near, far)]
            for watch in watches:
                loop.watch(watch, OUT | EDGE)
            await news()
            assert [watch.ready for watch in watches] == [OUT, OUT]
            loop.current.wake_at(loop.now + 0.01)
            await news()
            assert loop.now >= loop.current.deadline
            for watch in watches:
                loop.forget(watch)

    run(main)


def test_more_descriptors_than_one_batch_holds_are_all_served() -> None:
    async def child(loop: Loop, sock: socket.socket) -> None:
        watch = Watch(sock.fileno())
        loop.watch(watch, IN | EDGE)
        await wait_for(lambda: watch.ready)
        loop.unwatch(watch)

    async def main(loop: Loop) -> None:
        pairs = [socket.socketpair() for _ in range(200)]
        tasks = [loop.spawn(child(loop, near)) for near, _ in pairs]
        for _, far in pairs:
            far.send(b"x")
        await rounds(loop, 6)
        assert all(task.done for task in tasks)
        for pair in pairs:
            for sock in pair:
                sock.close()

    run(main)


def test_a_task_woken_in_each_turn_runs_no_more_often_than_each_of_many_with_descriptors_ready() -> None:
    pairs = [socket.socketpair() for _ in range(300)]

    async def main(loop: Loop) -> int:
        heard: list[int] = []

        async def listen(fd: int) -> None:
            loop.watch(watch := Watch(fd), IN)
            while not watch.ready:
                await news()
            heard.append(fd)
            loop.unwatch(watch)

        for near, far in pairs:
            near.send(b"x")
            loop.spawn(listen(far.fileno()))
        turns = 0
        while len(heard) < len(pairs):
            await loop.yield_turn()
            turns += 1
        return turns

    assert run(main) == 2
    for near, far in pairs:
        near.close()
        far.close()


def test_whatever_is_ready_is_known_before_any_timer_fires() -> None:
    """As after a freeze: all have news, more than one batch holds, and all deadlines have passed."""
    clock = FakeClock()
    told: list[int] = []

    async def child(loop: Loop, sock: socket.socket) -> None:
        watch = Watch(sock.fileno())
        loop.watch(watch, IN | EDGE)
        loop.current.wake_at(loop.now + 10)
        await news()
        told.append(watch.ready)
        loop.unwatch(watch)

    async def main(loop: Loop) -> None:
        pairs = [socket.socketpair() for _ in range(300)]
        for near, _ in pairs:
            loop.spawn(child(loop, near))
        for _, far in pairs:
            far.send(b"x")
        await advance(loop, clock, 11)
        assert told == [IN] * 300
        for pair in pairs:
            for sock in pair:
                sock.close()

    run(main, clock)


def test_what_a_thread_has_found_is_told_before_a_timer_fires() -> None:
    """As after a freeze: the answer is there, and its deadline has passed."""
    clock = FakeClock()
    outcomes: list[object] = []
    seen: list[object] = []

    async def ask(loop: Loop) -> None:
        task, deadline = loop.current, loop.now + 10

        def take(outcome: object) -> None:
            outcomes.append(outcome)
            task.wake()

        loop.wakeups.run_in_thread(lambda: "answer", take)
        task.wake_at(deadline)
        while not outcomes and loop.now < deadline:
            await news()
        seen.extend(outcomes)

    async def main(loop: Loop) -> None:
        threads = threading.active_count()
        task = loop.spawn(ask(loop))
        eventually(lambda: threading.active_count() == threads)  # no turn of the loop passes meanwhile
        await advance(loop, clock, 11)
        assert task.done
        assert seen == ["answer"]

    run(main, clock)


def test_a_descriptor_that_epoll_refuses_is_an_error_and_is_not_watched(tmp_path: Path) -> None:
    async def main(loop: Loop) -> None:
        with (tmp_path / "file").open("wb") as file, pytest.raises(PermissionError):
            loop.watch(Watch(file.fileno()), IN | EDGE)
        with socket_pair() as (near, far):
            watch = Watch(near.fileno())
            loop.watch(watch, IN | EDGE)
            with pytest.raises(FileExistsError):
                loop.watch(Watch(near.fileno()), IN | EDGE)
            far.send(b"x")
            await wait_for(lambda: watch.ready)
            loop.forget(watch)

    run(main)


def test_an_event_does_not_reach_the_new_owner_of_a_descriptor_closed_in_the_same_batch() -> None:
    """Two sockets get data at once. The first one's task closes the second, whose number goes to a silent socket."""
    found: list[int] = []

    async def close_the_other(loop: Loop, mine: Watch, other: Watch, sock: socket.socket) -> None:
        loop.watch(mine, IN | EDGE)
        await wait_for(lambda: mine.ready)
        number = sock.fileno()
        loop.forget(other)
        sock.close()
        near, far = socket.socketpair()
        with near, far:
            assert near.fileno() == number, "the kernel gave another number: the test shows nothing"
            watch = Watch(number)
            loop.watch(watch, IN | EDGE)
            await rounds(loop, 3)
            found.append(watch.ready)
            far.send(b"x")
            await wait_for(lambda: watch.ready)
            loop.forget(watch)
        loop.unwatch(mine)

    async def be_closed(loop: Loop, watch: Watch) -> None:
        loop.watch(watch, IN | EDGE)
        await news()

    async def main(loop: Loop) -> None:
        with socket_pair() as (first, first_peer), socket_pair() as (second, second_peer):
            other = Watch(second.fileno())
            closer = loop.spawn(close_the_other(loop, Watch(first.fileno()), other, second))
            loop.spawn(be_closed(loop, other))
            first_peer.send(b"x")
            second_peer.send(b"x")
            while not closer.done:
                await loop.yield_turn()

    run(main)
    assert found == [0]


def test_a_closed_descriptor_of_which_somebody_has_a_copy_does_not_end_the_loop() -> None:
    async def main(loop: Loop) -> None:
        with socket_pair() as (near, far), socket_pair() as (other, other_far):
            watch, next_watch = Watch(near.fileno()), Watch(other.fileno())
            loop.watch(watch, IN | EDGE)
            loop.watch(next_watch, IN | EDGE)
            with near.dup():  # as in a child, or in systemd's store
                loop.forget(watch)
                near.close()
                far.send(b"x")
                other_far.send(b"x")
                await wait_for(lambda: next_watch.ready)
            assert not watch.ready
            loop.unwatch(next_watch)

    run(main)


# Signals


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Handlers as they were, after the test."""
    numbers = signal.SIGUSR1, signal.SIGUSR2
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_signal_during_the_handler_of_another_interrupts_no_python_code() -> None:
    """Else a storm of signals ends in RecursionError."""

    async def main(loop: Loop) -> None:
        loop.wakeups.on_signal(signal.SIGUSR1, lambda: None)
        handler = signal.getsignal(signal.SIGUSR1)
        assert callable(handler)
        assert not hasattr(handler, "__code__")

    run(main)


def kill_from_thread(loop: Loop, number: int) -> None:
    loop.wakeups.run_in_thread(lambda: os.kill(os.getpid(), number), lambda _: None)


@pytest.mark.usefixtures("own_signals")
def test_a_signal_wakes_an_idle_loop_each_time() -> None:
    async def main(loop: Loop) -> None:
        task = loop.current
        got: list[str] = []

        def action(name: str) -> Callable[[], None]:
            def note() -> None:
                got.append(name)
                task.wake()

            return note

        loop.wakeups.on_signal(signal.SIGUSR1, action("one"))
        loop.wakeups.on_signal(signal.SIGUSR2, action("two"))
        for number, expected in [(signal.SIGUSR1, "one"), (signal.SIGUSR2, "two"), (signal.SIGUSR1, "one")]:
            kill_from_thread(loop, number)
            await wait_for(lambda: got)
            assert got == [expected]
            got.clear()

    run(main)


@pytest.mark.usefixtures("own_signals")
def test_a_signal_to_an_idle_loop_needs_no_other_news() -> None:
    sender = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))

    async def main(loop: Loop) -> None:
        task = loop.current
        got: list[int] = []

        def action() -> None:
            got.append(1)
            task.wake()

        loop.wakeups.on_signal(signal.SIGUSR1, action)
        sender.start()
        await wait_for(lambda: got)

    run(main)
    sender.join()


@pytest.mark.usefixtures("own_signals")
def test_a_closed_loop_gives_signals_back_to_who_had_them() -> None:
    got: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))

    async def main(loop: Loop) -> None:
        loop.wakeups.on_signal(signal.SIGUSR1, lambda: None)

    run(main)
    os.kill(os.getpid(), signal.SIGUSR1)
    eventually(lambda: got == [signal.SIGUSR1])
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.usefixtures("own_signals")
def test_a_second_action_for_a_signal_replaces_the_first_until_the_loop_is_closed() -> None:
    before = signal.getsignal(signal.SIGUSR1)

    async def main(loop: Loop) -> list[str]:
        task = loop.current
        got: list[str] = []

        def second() -> None:
            got.append("second")
            task.wake()

        loop.wakeups.on_signal(signal.SIGUSR1, lambda: got.append("first"))
        loop.wakeups.on_signal(signal.SIGUSR1, second)
        kill_from_thread(loop, signal.SIGUSR1)
        await wait_for(lambda: got)
        return got

    assert run(main) == ["second"]
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.usefixtures("own_signals")
def test_a_signal_is_heard_after_so_many_others_that_the_wake_up_socket_is_full() -> None:
    async def main(loop: Loop) -> None:
        got: list[str] = []
        loop.wakeups.on_signal(signal.SIGUSR1, lambda: None)
        loop.wakeups.on_signal(signal.SIGUSR2, lambda: got.append("heard"))
        for _ in range(2000):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        await rounds(loop, 5)
        assert got == ["heard"]

    run(main)


def fail() -> None:
    raise ValueError("the reason")


async def hears_signals(loop: Loop) -> bool:
    got: list[int] = []
    loop.wakeups.on_signal(signal.SIGUSR2, lambda: got.append(1))
    os.kill(os.getpid(), signal.SIGUSR2)
    await rounds(loop, 4)
    return bool(got)


@pytest.mark.usefixtures("own_signals")
def test_an_action_that_fails_is_logged_and_later_signals_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop) -> bool:
        loop.wakeups.on_signal(signal.SIGUSR1, fail)
        os.kill(os.getpid(), signal.SIGUSR1)
        await rounds(loop, 4)
        return await hears_signals(loop)

    heard = run_with_any_tasks(main)
    assert "the reason" in caplog.text
    assert heard


@pytest.mark.usefixtures("own_signals")
def test_a_thread_s_outcome_that_cannot_be_used_is_logged_and_signals_are_heard(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main(loop: Loop) -> bool:
        loop.wakeups.run_in_thread(lambda: None, lambda _: fail())
        while "the reason" not in caplog.text:
            await loop.yield_turn()
        return await hears_signals(loop)

    assert run_with_any_tasks(main)


@pytest.mark.usefixtures("own_signals")
def test_a_signal_that_is_somebody_else_s_leaves_the_loop_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    got: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))

    async def main(loop: Loop) -> bool:
        assert await hears_signals(loop)
        os.kill(os.getpid(), signal.SIGUSR1)
        await rounds(loop, 4)
        return await hears_signals(loop)

    assert run_with_any_tasks(main)
    assert got == [signal.SIGUSR1]
    assert not caplog.records


def run_with_any_tasks(main: Callable[[Loop], object]) -> object:
    """As `run`, but whether a task of the loop itself has ended is for the test to find out."""
    with Loop() as loop:
        return loop.run(main(loop))  # type: ignore[arg-type]


# Threads


@pytest.mark.parametrize(
    ("function", "expected"),
    [(lambda: 42, "42"), (lambda: None, "None"), (fail, "ValueError('the reason')")],
    ids=["a value", "nothing", "an exception"],
)
def test_the_outcome_of_a_thread_reaches_the_loop(function: Callable[[], object], expected: str) -> None:
    async def main(loop: Loop) -> None:
        task = loop.current
        here = threading.get_ident()
        got: list[object] = []

        def then(outcome: object) -> None:
            assert threading.get_ident() == here
            got.append(outcome)
            task.wake()

        loop.wakeups.run_in_thread(function, then)
        await wait_for(lambda: got)
        assert list(map(repr, got)) == [expected]

    run(main)


def test_the_loop_goes_on_while_a_thread_blocks() -> None:
    blocked = threading.Event()
    release = threading.Event()
    got: list[object] = []

    def block() -> str:
        blocked.set()
        assert release.wait(20)
        return "released"

    async def main(loop: Loop) -> None:
        task = loop.current

        def then(outcome: object) -> None:
            got.append(outcome)
            task.wake()

        loop.wakeups.run_in_thread(block, then)
        while not blocked.is_set():
            await loop.sleep(0.001)
        await rounds(loop, 5)
        assert not got
        release.set()
        await wait_for(lambda: got)

    run(main)
    assert got == ["released"]


def test_the_outcomes_of_more_threads_than_the_wake_up_socket_holds_all_arrive() -> None:
    count = 400
    ended: list[int] = []
    got: list[object] = []

    async def main(loop: Loop) -> None:
        for number in range(count):
            loop.wakeups.run_in_thread(partial(ended.append, number), got.append)
        eventually(lambda: len(ended) == count and threading.active_count() < 20)
        assert not got
        await rounds(loop, 5)
        assert len(got) == count

    run(main)


def test_a_thread_that_cannot_be_started_is_an_error_and_leaves_nothing_behind() -> None:
    got: list[object] = []

    async def main(loop: Loop) -> None:
        threads = threading.active_count()
        with no_threads(), pytest.raises(RuntimeError):
            loop.wakeups.run_in_thread(lambda: 1, got.append)
        assert threading.active_count() == threads
        await rounds(loop, 4)
        assert not got

    run(main)


@contextmanager
def no_threads() -> Iterator[None]:
    """No thread can be started: none finds room for its stack."""
    before = threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(before)


def test_a_thread_may_outlive_the_loop() -> None:
    release = threading.Event()
    threads: list[threading.Thread] = []
    got: list[object] = []

    def block() -> str:
        threads.append(threading.current_thread())
        assert release.wait(20)
        return "too late"

    async def main(loop: Loop) -> None:
        loop.wakeups.run_in_thread(block, got.append)
        eventually(lambda: threads)

    run(main)
    assert threads[0].daemon
    release.set()
    threads[0].join(20)
    assert not threads[0].is_alive()
    assert not got


def test_a_loop_gives_its_descriptors_back() -> None:
    async def main(loop: Loop) -> None:
        await rounds(loop)

    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run(main)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_signals_are_not_delivered_to_threads() -> None:
    async def main(loop: Loop) -> set[int]:
        outcomes: list[object] = []
        loop.wakeups.run_in_thread(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()), outcomes.append)
        while not outcomes:
            await loop.sleep(0.001)
        blocked = outcomes[0]
        assert isinstance(blocked, set)
        return blocked

    assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} <= run(main)


def test_each_turn_is_measured_once_also_one_in_which_a_timer_is_due() -> None:
    seconds: list[float] = []

    async def main(loop: Loop) -> int:
        loop.measure_turns(seconds, lambda: None)
        await rounds(loop)
        measured, turn = len(seconds), loop.turn
        for _ in range(20):
            await loop.sleep(0.001)
        return loop.turn - turn - (len(seconds) - measured)

    assert run(main) == 0
