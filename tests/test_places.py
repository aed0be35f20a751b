"""All places taken: when the log hears of it, how many are said to wait, and when it is over."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from rspd.address import parse_address, resolve
from rspd.listener import Listener, open_listeners
from rspd.loop import Loop
from rspd.places import INTERVAL, QUIET, STANDSTILL, Places
from tests.support import FakeClock, abstract_name, eventually, run
from tests.test_loop import advance, rounds

END = "clients no longer wait for a place max_connections=1"


def begin(waiting: object) -> str:
    return f"all places taken, clients wait max_connections=1 waiting={waiting}"


@pytest.fixture(autouse=True)
def all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "rspd")


class Host:
    """Listeners, and clients that come to them and are accepted."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def listen(self, address: str = "127.0.0.1:0") -> Listener:
        (listener,) = open_listeners(parse_address(address), resolve(parse_address(address)), 8)
        self.stack.callback(listener.close)
        return listener

    def unix(self) -> Listener:
        return self.listen(f"@{abstract_name()}")

    def come(self, listener: Listener, count: int = 1) -> None:
        """So many clients connect; returns when the kernel has them in the backlog."""
        before = listener.waiting()
        where = listener.reached_at[0]
        for _ in range(count):
            client = socket.socket(socket.AF_INET if isinstance(where, tuple) else socket.AF_UNIX)
            self.stack.enter_context(client).connect(where)
        if before is not None and isinstance(where, tuple):
            eventually(lambda: listener.waiting() == before + count)

    def accept(self, listener: Listener) -> None:
        sock, _ = listener.accept()
        sock.close()


@pytest.fixture
def host(no_descriptor_is_left_open: None) -> Iterator[Host]:
    host = Host()
    with host.stack:
        yield host


class Proxy:
    """As much of one as matters here: one place, which is taken."""

    def __init__(self, loop: Loop, listeners: Sequence[Listener], shared: bool = False, tag: str = "") -> None:
        self.taken = ["somebody"]
        self.changes: list[str] = []
        self.listeners = listeners
        self.places = Places(loop, tag, self.taken, lambda: self.changes.append(self.places.waiting))
        self.places.apply(1, listeners, shared)
        self.places.all_taken()

    def serve_next(self, host: Host) -> None:
        """One client goes, and another is accepted."""
        host.accept(self.listeners[0])
        self.places.all_taken()

    async def end(self, loop: Loop, clock: FakeClock) -> None:
        """Nobody is there any more; all that looks has ended."""
        self.taken.clear()
        for _ in range(5):
            await advance(loop, clock, STANDSTILL)


def play(script: Callable[[Loop, FakeClock], Coroutine[Any, Any, None]]) -> None:
    """Run a script where time passes when it says so."""
    clock = FakeClock()
    run(lambda loop: script(loop, clock), clock)


def test_clients_that_wait_for_a_second_are_told_and_that_it_is_over(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 3)
        await advance(loop, clock, STANDSTILL * 0.9)
        assert (caplog.messages, proxy.places.waiting) == ([], "")
        await advance(loop, clock, STANDSTILL * 0.2)
        assert (caplog.messages, proxy.places.waiting) == ([begin(3)], "3")
        for _ in range(100):
            await advance(loop, clock, STANDSTILL)
        assert caplog.messages == [begin(3)]
        proxy.taken.clear()
        for _ in range(3):
            host.accept(proxy.listeners[0])
        assert proxy.places.waiting == ""
        await advance(loop, clock, QUIET * 0.6)
        assert caplog.messages == [begin(3)]
        await proxy.end(loop, clock)

    play(main)
    assert caplog.messages == [begin(3), END]
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


def test_the_lines_name_their_proxy(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()], tag=" proxy=web")
        host.come(proxy.listeners[0])
        await advance(loop, clock, STANDSTILL)
        await proxy.end(loop, clock)

    play(main)
    assert caplog.messages == [
        "all places taken, clients wait proxy=web max_connections=1 waiting=1",
        "clients no longer wait for a place proxy=web max_connections=1",
    ]


def test_where_nobody_waits_nothing_is_told_until_somebody_does(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen(), host.unix()])
        for _ in range(10):
            await advance(loop, clock, STANDSTILL)
        assert (caplog.messages, proxy.changes) == ([], [])
        host.come(proxy.listeners[0])
        await advance(loop, clock, STANDSTILL)
        assert caplog.messages == [begin(1)]
        await proxy.end(loop, clock)

    play(main)


def test_a_proxy_that_has_a_place_looks_no_more(host: Host) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        before = loop.tasks
        proxy = Proxy(loop, [host.listen()])
        assert loop.tasks == before + 1
        proxy.taken.clear()
        await advance(loop, clock, STANDSTILL)
        assert loop.tasks == before
        proxy.taken.append("another")
        proxy.places.all_taken()
        assert loop.tasks == before + 1
        await proxy.end(loop, clock)

    play(main)


@pytest.mark.parametrize(
    ("clients", "waiting"),
    [((2, 3), "5"), ((0, 1), "1"), ((0, 0, 2), "some"), ((1, 2, 1), "3+"), ((1, 2, 0), "3")],
)
def test_tcp_listeners_are_added_up_and_a_unix_socket_says_only_that_somebody_waits(
    clients: Sequence[int], waiting: str, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        listeners = [host.listen(), host.listen(), host.unix()][: len(clients)]
        for listener, count in zip(listeners, clients, strict=True):
            host.come(listener, count)
        proxy = Proxy(loop, listeners)
        await advance(loop, clock, STANDSTILL)
        assert proxy.places.waiting == waiting
        assert caplog.messages == [begin(waiting)]
        await proxy.end(loop, clock)

    play(main)


def test_how_many_wait_is_looked_at_each_second_and_told_when_it_changes(host: Host) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        for _ in range(3):
            host.come(proxy.listeners[0], 2)
            for _ in range(3):
                await advance(loop, clock, STANDSTILL)
        assert proxy.changes == ["2", "4", "6"]
        proxy.serve_next(host)
        await advance(loop, clock, STANDSTILL)
        assert proxy.changes == ["2", "4", "6", "5"]
        await proxy.end(loop, clock)
        assert proxy.changes == ["2", "4", "6", "5", ""]

    play(main)


@pytest.mark.parametrize(("pause", "lines"), [(0.9, 0), (1.1, 2), (1.5, 2), (2.9, 2)])
def test_a_queue_that_moves_on_is_one_wait_if_it_is_one(
    pause: float, lines: int, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 8)
        for _ in range(8):
            for _ in range(10):
                await advance(loop, clock, pause / 10)
            proxy.serve_next(host)
        assert caplog.messages == [begin(8)][: lines // 2]
        await proxy.end(loop, clock)

    play(main)
    assert caplog.messages == [begin(8), END][:lines]


def test_it_is_over_when_clients_do_not_wait_for_long_any_more(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 8)
        await advance(loop, clock, STANDSTILL)
        for left in range(7, 1, -1):
            proxy.serve_next(host)
            await advance(loop, clock, STANDSTILL * 0.7)
            if left > 3:
                assert int(proxy.places.waiting) in (left, left + 1)
                assert caplog.messages == [begin(8)]
        assert (caplog.messages, proxy.places.waiting) == ([begin(8), END], "")
        await proxy.end(loop, clock)

    play(main)


async def wait_and_end(host: Host, proxy: Proxy, loop: Loop, clock: FakeClock, seconds: int) -> None:
    """A client waits for so long and is served; and that is over."""
    host.come(proxy.listeners[0])
    proxy.taken.append("somebody")
    proxy.places.all_taken()
    for _ in range(seconds):
        await advance(loop, clock, STANDSTILL)
    host.accept(proxy.listeners[0])
    await proxy.end(loop, clock)


def test_a_minute_has_one_pair_of_lines_at_most(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        began = clock.now + STANDSTILL
        await wait_and_end(host, proxy, loop, clock, 2)
        while clock.now + 8 < began + INTERVAL:
            await wait_and_end(host, proxy, loop, clock, 2)
            assert proxy.changes[-2:] == ["1", ""], "the status tells it all the same"
            assert caplog.messages == [begin(1), END]
        clock.now = began + INTERVAL
        await wait_and_end(host, proxy, loop, clock, 2)

    play(main)
    assert caplog.messages == [begin(1), END] * 2


def test_a_wait_that_began_too_soon_is_told_when_the_minute_is_over(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        began = clock.now + STANDSTILL
        await wait_and_end(host, proxy, loop, clock, 2)
        host.come(proxy.listeners[0], 2)
        proxy.taken.append("somebody")
        proxy.places.all_taken()
        while clock.now + STANDSTILL < began + INTERVAL:
            await advance(loop, clock, STANDSTILL)
            assert caplog.messages == [begin(1), END]
        await advance(loop, clock, STANDSTILL)
        assert caplog.messages == [begin(1), END, begin(2)]
        await proxy.end(loop, clock)

    play(main)
    assert caplog.messages == [begin(1), END, begin(2), END]


def test_a_client_whom_another_process_accepts_does_not_wait(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()], shared=True)
        for _ in range(3):
            host.come(proxy.listeners[0])
            await advance(loop, clock, STANDSTILL)
            host.accept(proxy.listeners[0])
            await advance(loop, clock, STANDSTILL)
        assert caplog.messages == []
        host.come(proxy.listeners[0])
        await advance(loop, clock, STANDSTILL)
        assert caplog.messages == []
        await advance(loop, clock, STANDSTILL)
        assert caplog.messages == [begin(1)]
        await proxy.end(loop, clock)

    play(main)


def test_more_places_end_it(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 2)
        await advance(loop, clock, STANDSTILL)
        proxy.places.apply(4, proxy.listeners, False)
        assert proxy.places.waiting == ""
        before = loop.tasks
        for _ in range(4):
            await advance(loop, clock, STANDSTILL)
        assert loop.tasks == before - 1

    play(main)
    assert caplog.messages == [begin(2), END.replace("=1", "=4")]


def test_other_listeners_have_other_clients(host: Host) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 2)
        await advance(loop, clock, STANDSTILL)
        other = host.listen()
        host.come(other)
        proxy.places.apply(1, [other], False)
        assert proxy.places.waiting == "1"
        proxy.places.apply(1, [host.listen()], False)
        assert proxy.places.waiting == ""
        await proxy.end(loop, clock)

    play(main)


def test_closed_it_leaves_nothing_behind(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        before = loop.tasks
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 2)
        await advance(loop, clock, STANDSTILL)
        proxy.places.close()
        assert proxy.places.waiting == ""
        await rounds(loop)
        assert loop.tasks == before
        await advance(loop, clock, QUIET)

    play(main)
    assert caplog.messages == [begin(2)]
