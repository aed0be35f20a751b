"""Running out of descriptors: who waits, for how long, and what the log hears."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rspd.engine.loop import Loop, Task, news
from rspd.net.descriptors import QUIET, RETRY, SHORT, Shortage
from tests.engine.test_loop import advance, rounds
from tests.engine.test_pipes import no_descriptors
from tests.namespaces import in_namespace
from tests.support import PATIENCE, FakeClock, run

BEGIN = 'accepting pauses; raise LimitNOFILE or ulimit -n reason="Too many open files"'
END = "accepting goes on"


@pytest.fixture(autouse=True)
def all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "rspd")


def no_descriptor() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def until_quiet(loop: Loop, clock: FakeClock) -> None:
    await advance(loop, clock, QUIET)
    await rounds(loop)


def test_running_out_of_descriptors_is_a_shortage() -> None:
    with no_descriptors(), pytest.raises(OSError, match="Too many open files") as caught:
        socket.socket()
    assert caught.value.errno in SHORT
    assert errno.ECONNABORTED not in SHORT


def test_who_waits_finds_the_spare_descriptor_free() -> None:
    async def main(loop: Loop) -> None:
        shortage = Shortage(loop)
        shortage.keep_spare()
        with no_descriptors():
            with pytest.raises(OSError, match="Too many open files"):
                os.open(os.devnull, os.O_RDONLY)
            await shortage.wait(no_descriptor())
            os.close(os.open(os.devnull, os.O_RDONLY))
            shortage.keep_spare()
            with pytest.raises(OSError, match="Too many open files"):
                os.open(os.devnull, os.O_RDONLY)
        shortage.give_up_spare()
        while shortage.active:
            await loop.sleep(RETRY)

    run(main)


def test_who_waits_tries_again_after_a_moment_and_not_before() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        task = loop.spawn(Shortage(loop).wait(no_descriptor()))
        await advance(loop, clock, RETRY * 0.9)
        task.wake()
        await rounds(loop)
        assert not task.done
        await advance(loop, clock, RETRY * 0.2)
        assert task.done
        await until_quiet(loop, clock)

    assert pytest.approx(0.1) == RETRY
    run(main, clock)


def test_the_end_of_a_connection_lets_all_who_wait_try_again_in_the_order_in_which_they_came() -> None:
    clock = FakeClock()
    resumed: list[int] = []

    async def wait(shortage: Shortage, number: int) -> None:
        await shortage.wait(no_descriptor())
        resumed.append(number)

    async def main(loop: Loop) -> None:
        shortage = Shortage(loop)
        for number in range(5):
            loop.spawn(wait(shortage, number))
        await rounds(loop)
        assert resumed == []
        shortage.relieve()
        await rounds(loop)
        assert resumed == [0, 1, 2, 3, 4]
        shortage.relieve()
        await until_quiet(loop, clock)

    run(main, clock)
    assert resumed == [0, 1, 2, 3, 4]


def test_relief_before_anybody_waits_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        shortage = Shortage(loop)
        shortage.relieve()
        task = loop.spawn(shortage.wait(no_descriptor()))
        await rounds(loop)
        assert not task.done
        await until_quiet(loop, clock)

    run(main, clock)
    assert caplog.messages == [BEGIN, END]


def test_who_is_cancelled_while_waiting_leaves_the_others_their_places() -> None:
    clock = FakeClock()
    ended: list[Task] = []

    async def main(loop: Loop) -> None:
        shortage = Shortage(loop)
        tasks = [loop.spawn(shortage.wait(no_descriptor()), ended.append) for _ in range(3)]
        tasks[1].cancel()
        await rounds(loop)
        assert ended == [tasks[1]]
        shortage.relieve()
        await rounds(loop)
        assert ended == [tasks[1], tasks[0], tasks[2]]
        await until_quiet(loop, clock)

    run(main, clock)


def test_who_has_tried_again_is_not_disturbed_by_a_later_relief() -> None:
    clock = FakeClock()
    resumed: list[int] = []

    async def wait(shortage: Shortage) -> None:
        await shortage.wait(no_descriptor())
        while True:
            await news()
            resumed.append(1)

    async def main(loop: Loop) -> None:
        shortage = Shortage(loop)
        task = loop.spawn(wait(shortage))
        await advance(loop, clock, RETRY)
        shortage.relieve()
        await rounds(loop)
        assert not resumed
        task.cancel()
        await until_quiet(loop, clock)

    run(main, clock)


@pytest.mark.parametrize("relieved", [True, False], ids=["connections end", "nothing ends"])
def test_a_shortage_with_many_failures_is_two_lines_in_the_log(
    relieved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()

    async def accept(loop: Loop, shortage: Shortage) -> None:
        for _ in range(100):
            await shortage.wait(no_descriptor())

    async def main(loop: Loop) -> None:
        shortage = Shortage(loop)
        task = loop.spawn(accept(loop, shortage))
        while not task.done:
            assert caplog.messages == [BEGIN]
            if relieved:
                shortage.relieve()
            await advance(loop, clock, 0.05 if relieved else RETRY)
        assert caplog.messages == [BEGIN]
        await advance(loop, clock, QUIET * 0.8)
        assert caplog.messages == [BEGIN]
        await until_quiet(loop, clock)
        assert caplog.messages == [BEGIN, END]

    run(main, clock)
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


def test_failures_within_a_second_of_each_other_are_one_shortage_later_ones_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()

    async def fail(loop: Loop, shortage: Shortage, pause: float) -> None:
        loop.spawn(shortage.wait(no_descriptor()))
        await advance(loop, clock, pause)
        await rounds(loop)

    async def main(loop: Loop) -> None:
        shortage = Shortage(loop)
        for _ in range(3):
            await fail(loop, shortage, QUIET * 0.9)
        assert caplog.messages == [BEGIN]
        await fail(loop, shortage, QUIET * 1.1)
        assert caplog.messages == [BEGIN, END]
        await fail(loop, shortage, QUIET * 1.1)

    run(main, clock)
    assert caplog.messages == [BEGIN, END] * 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)), '"No buffer space available"'),
        (OSError("no text of the system"), '"no text of the system"'),
        (OSError(errno.EMFILE, 'a "quoted"\nreason'), r'"a \"quoted\"\nreason"'),
    ],
)
def test_the_log_tells_the_reason_on_one_line(error: OSError, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        loop.spawn(Shortage(loop).wait(error))
        await until_quiet(loop, clock)

    run(main, clock)
    assert caplog.messages[0].endswith(f"reason={reason}")


COARSE = """
import logging
from rspd.engine.loop import Loop
from rspd.net.descriptors import QUIET, Shortage
from tests.support import FakeClock
from tests.engine.test_loop import advance, rounds

clock = FakeClock()
clock.now = 2.0**20 - 2.0**-33 * 3

async def main(loop):
    loop.spawn(Shortage(loop).wait(OSError("x")))
    await advance(loop, clock, QUIET)
    await rounds(loop, 6)
    await advance(loop, clock, 0.001)
    await rounds(loop, 6)

logging.basicConfig(level=logging.INFO, format="%(message)s")
with Loop(clock) as loop:
    loop.run(main(loop))
"""


def test_a_second_that_the_clock_cannot_tell_exactly_does_not_stop_the_loop() -> None:
    """2**20 s after the start of the host, the numbers of the clock get coarser: 1 s later is then not one of them."""
    root = Path(__file__).parent.parent.parent
    log = subprocess.run(
        [sys.executable, "-c", COARSE], cwd=root, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=True
    ).stderr
    assert log.splitlines()[1:] == [END]


def test_whether_a_descriptor_is_free_is_tried() -> None:
    with Loop() as loop:
        shortage = Shortage(loop)
        assert not shortage.none_free
        with no_descriptors():
            assert shortage.none_free
        assert not shortage.none_free


def tell_whether_none_is_free() -> None:
    """Run in a namespace."""
    with Loop() as loop:
        print(os.path.exists(os.devnull), Shortage(loop).none_free)


def test_where_there_is_no_null_device_descriptors_are_not_short_for_that() -> None:
    assert in_namespace(tell_whether_none_is_free, prepare="mount -t tmpfs tmpfs /dev") == ["False False"]
