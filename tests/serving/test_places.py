"""All places taken: when the log hears of it, how many are said to wait, and when it is over."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from rspd.config.addresses import parse_address
from rspd.engine.loop import Loop
from rspd.net.address import resolve
from rspd.net.listener import Listener, open_listeners
from rspd.serving.places import INTERVAL, QUIET, STANDSTILL, Places, who_waits
from tests.engine.test_loop import advance, rounds
from tests.support import FakeClock, abstract_name, eventually, run, tasks_of


def begin(waiting: object) -> str:
    return f"all places taken, clients wait max_connections=1 waiting={waiting}"


def end(seconds: float) -> str:
    return f"clients no longer wait for a place max_connections=1 seconds={seconds:.3f}"


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

    def __init__(self, loop: Loop, listeners: Sequence[Listener], tag: str = "") -> None:
        self.taken = ["somebody"]
        self.changes: list[str] = []
        self.listeners = listeners
        self.loop = loop
        self.accepted_at = loop.now
        self.places: Places = Places(
            *(loop, tag, self.taken, lambda: self.accepted_at, lambda: self.changes.append(self.places.waiting))
        )
        self.places.apply(1, listeners)
        self.fill()

    def fill(self) -> None:
        """The place has just been taken."""
        self.accepted_at = self.loop.now
        if not self.places.looking:
            self.places.look()

    def serve_next(self, host: Host) -> None:
        """One client goes, and another is accepted."""
        host.accept(self.listeners[0])
        self.fill()

    async def stand(self, loop: Loop, clock: FakeClock, looks: int = 2) -> None:
        """Time passes, in which nobody is accepted."""
        for _ in range(looks):
            await advance(loop, clock, STANDSTILL)

    async def end(self, loop: Loop, clock: FakeClock) -> None:
        """Nobody is there any more; all that looks has ended."""
        self.taken.clear()
        for _ in range(5):
            await advance(loop, clock, STANDSTILL)


def play(script: Callable[[Loop, FakeClock], Coroutine[Any, Any, None]]) -> None:
    """Run a script where time passes when it says so."""
    clock = FakeClock()
    run(lambda loop: script(loop, clock), clock)


def test_clients_that_wait_for_two_looks_are_told_and_that_it_is_over(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 3)
        await advance(loop, clock, STANDSTILL * 0.9)
        assert (caplog.messages, proxy.places.waiting) == ([], "")
        await advance(loop, clock, STANDSTILL * 0.1)
        assert (caplog.messages, proxy.places.waiting) == ([], "3")
        await advance(loop, clock, STANDSTILL * 0.9)
        assert caplog.messages == []
        await advance(loop, clock, STANDSTILL * 0.1)
        assert (caplog.messages, proxy.places.waiting) == ([begin(3)], "3")
        await proxy.stand(loop, clock, 100)
        assert caplog.messages == [begin(3)]
        proxy.taken.clear()
        for _ in range(3):
            host.accept(proxy.listeners[0])
        assert proxy.places.waiting == ""
        await proxy.stand(loop, clock, int(QUIET / STANDSTILL) - 1)
        assert caplog.messages == [begin(3)]
        await proxy.end(loop, clock)

    play(main)
    assert caplog.messages == [begin(3), end(102)]
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


def test_a_client_that_has_come_just_before_the_look_is_not_told_of(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        await advance(loop, clock, STANDSTILL * 9.97)
        for _ in range(8):
            await advance(loop, clock, STANDSTILL * 0.97)
            host.come(proxy.listeners[0])
            await advance(loop, clock, STANDSTILL * 0.03)
            assert proxy.places.waiting == "1", "the status tells it all the same"
            await advance(loop, clock, STANDSTILL * 0.5)
            proxy.serve_next(host)
            await advance(loop, clock, STANDSTILL * 0.5)
        await proxy.end(loop, clock)

    play(main)
    assert caplog.messages == []


def test_how_long_clients_waited_counts_from_when_the_first_was_found(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        await proxy.stand(loop, clock, 40)
        host.come(proxy.listeners[0], 2)
        await proxy.stand(loop, clock, 5)
        await proxy.end(loop, clock)

    play(main)
    assert caplog.messages == [begin(2), end(4)]


def test_how_long_clients_waited_counts_from_when_the_queue_stood_still(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 8)
        for _ in range(5):
            await advance(loop, clock, STANDSTILL * 0.5)
            proxy.serve_next(host)
        await proxy.stand(loop, clock, 5)
        await proxy.end(loop, clock)

    play(main)
    assert caplog.messages == [begin(3), end(5)]


def test_the_lines_name_their_proxy(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()], tag=" proxy=web")
        host.come(proxy.listeners[0])
        await proxy.stand(loop, clock)
        await proxy.end(loop, clock)

    play(main)
    assert caplog.messages == [
        "all places taken, clients wait proxy=web max_connections=1 waiting=1",
        "clients no longer wait for a place proxy=web max_connections=1 seconds=2.000",
    ]


def test_where_nobody_waits_nothing_is_told_until_somebody_does(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen(), host.unix()])
        await proxy.stand(loop, clock, 10)
        assert (caplog.messages, proxy.changes) == ([], [])
        host.come(proxy.listeners[0])
        await proxy.stand(loop, clock)
        assert caplog.messages == [begin(1)]
        await proxy.end(loop, clock)

    play(main)


def test_a_proxy_that_has_a_place_looks_no_more(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look(listener: Listener) -> int:
        looks.append(listener)
        return 0

    monkeypatch.setattr(Listener, "waiting", look)

    async def main(loop: Loop, clock: FakeClock) -> None:
        before = tasks_of(loop)
        proxy = Proxy(loop, [host.listen()])
        assert tasks_of(loop) == before + 1
        proxy.taken.clear()
        await advance(loop, clock, STANDSTILL)
        assert tasks_of(loop) == before
        assert not looks, "for a connection that ended within a second"
        proxy.taken.append("another")
        proxy.fill()
        assert tasks_of(loop) == before + 1
        await proxy.stand(loop, clock, 3)
        assert len(looks) == 3
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
        assert who_waits(listeners) == waiting
        proxy = Proxy(loop, listeners)
        await proxy.stand(loop, clock)
        assert proxy.places.waiting == waiting
        assert caplog.messages == [begin(waiting)]
        await proxy.end(loop, clock)

    play(main)


def test_how_many_wait_is_looked_at_each_second_and_told_when_it_changes(host: Host) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        for _ in range(3):
            host.come(proxy.listeners[0], 2)
            await proxy.stand(loop, clock, 3)
        assert proxy.changes == ["2", "4", "6"]
        proxy.serve_next(host)
        await advance(loop, clock, STANDSTILL)
        assert proxy.changes == ["2", "4", "6", "5"]
        await proxy.end(loop, clock)
        assert proxy.changes == ["2", "4", "6", "5", ""]

    play(main)


@pytest.mark.parametrize(("pause", "lines"), [(0.3, 0), (0.9, 0), (1.7, 2), (2.1, 2), (2.9, 2)])
def test_a_queue_that_moves_on_is_one_wait_if_it_is_one(
    pause: float, lines: int, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 8)
        for left in range(8, 0, -1):
            for _ in range(10):
                await advance(loop, clock, pause / 10)
            if proxy.changes:
                assert int(proxy.places.waiting) >= left, "the status tells it all the same"
            proxy.serve_next(host)
        assert len(proxy.changes) >= 2
        assert len(caplog.messages) == lines // 2
        if pause > 2:
            assert caplog.messages == [begin(8)]
        await proxy.end(loop, clock)

    play(main)
    assert [message.split(" max")[0] for message in caplog.messages] == [
        "all places taken, clients wait",
        "clients no longer wait for a place",
    ][:lines]


def test_it_is_over_when_clients_do_not_wait_for_long_any_more(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 8)
        await proxy.stand(loop, clock)
        for left in range(7, 1, -1):
            proxy.serve_next(host)
            await advance(loop, clock, STANDSTILL * 0.7)
            assert int(proxy.places.waiting) in (left, left + 1), "the status tells it all the same"
            if left > 3:
                assert caplog.messages == [begin(8)]
        assert caplog.messages == [begin(8), end(2)]
        await proxy.end(loop, clock)

    play(main)


async def wait_and_end(host: Host, proxy: Proxy, loop: Loop, clock: FakeClock, seconds: int) -> None:
    """A client waits for so long and is served; and that is over."""
    host.come(proxy.listeners[0])
    proxy.taken.append("somebody")
    proxy.fill()
    await proxy.stand(loop, clock, seconds)
    host.accept(proxy.listeners[0])
    await proxy.end(loop, clock)


def test_a_minute_has_one_pair_of_lines_at_most(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        told = clock.now + 2 * STANDSTILL
        await wait_and_end(host, proxy, loop, clock, 3)
        while clock.now + 8 < told + INTERVAL:
            await wait_and_end(host, proxy, loop, clock, 3)
            assert proxy.changes[-2:] == ["1", ""], "the status tells it all the same"
            assert caplog.messages == [begin(1), end(3)]
        await advance(loop, clock, told + INTERVAL - clock.now)
        await wait_and_end(host, proxy, loop, clock, 3)

    play(main)
    assert caplog.messages == [begin(1), end(3)] * 2


def test_a_wait_that_began_too_soon_is_told_when_the_minute_is_over(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        told = clock.now + 2 * STANDSTILL
        await wait_and_end(host, proxy, loop, clock, 3)
        host.come(proxy.listeners[0], 2)
        proxy.taken.append("somebody")
        proxy.fill()
        began = clock.now
        while clock.now + STANDSTILL < told + INTERVAL:
            await advance(loop, clock, STANDSTILL)
            assert caplog.messages == [begin(1), end(3)]
        await advance(loop, clock, STANDSTILL)
        assert caplog.messages == [begin(1), end(3), begin(2)]
        seconds = clock.now - began
        await proxy.end(loop, clock)
        assert caplog.messages == [begin(1), end(3), begin(2), end(seconds)]

    play(main)


def test_a_client_whom_another_process_accepts_does_not_wait(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        for _ in range(3):
            host.come(proxy.listeners[0])
            await advance(loop, clock, STANDSTILL)
            host.accept(proxy.listeners[0])
            await advance(loop, clock, STANDSTILL)
        assert caplog.messages == []
        host.come(proxy.listeners[0])
        await proxy.stand(loop, clock)
        assert caplog.messages == [begin(1)]
        await proxy.end(loop, clock)

    play(main)


def test_more_places_end_it_and_the_line_has_the_limit_of_the_warning(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 2)
        await proxy.stand(loop, clock)
        proxy.places.apply(4, proxy.listeners)
        assert proxy.places.waiting == ""
        before = tasks_of(loop)
        await proxy.stand(loop, clock, 4)
        assert tasks_of(loop) == before - 1

    play(main)
    assert caplog.messages == [begin(2), end(2)]


def test_other_listeners_have_other_clients(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 2)
        await advance(loop, clock, STANDSTILL)
        other = host.listen()
        host.come(other)
        proxy.places.apply(1, [other])
        assert proxy.places.waiting == "1"
        await advance(loop, clock, STANDSTILL)
        assert caplog.messages == [], "one look has found them"
        await advance(loop, clock, STANDSTILL)
        assert caplog.messages == [begin(1)]
        proxy.places.apply(1, [host.listen()])
        assert proxy.places.waiting == ""
        await proxy.end(loop, clock)

    play(main)


def test_closed_it_leaves_nothing_behind(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop, clock: FakeClock) -> None:
        before = tasks_of(loop)
        proxy = Proxy(loop, [host.listen()])
        host.come(proxy.listeners[0], 2)
        await proxy.stand(loop, clock)
        proxy.places.close()
        assert proxy.places.waiting == ""
        await rounds(loop)
        assert tasks_of(loop) == before
        await advance(loop, clock, QUIET)

    play(main)
    assert caplog.messages == [begin(2)]
