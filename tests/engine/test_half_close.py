"""Relays that end both sides when one has ended (`half_close: off`), told as conversations."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from math import inf

import pytest

import rspd.engine.relay
from rspd.engine.cause import Cause
from rspd.engine.flow import BUFFER_SIZE
from rspd.engine.loop import RDHUP, Loop, news
from rspd.engine.pipes import Pipes
from rspd.engine.relay import PAUSE, SENDING_MAX, Relay
from rspd.engine.side import Side, UnixSide
from tests.engine.test_relay import (
    Outcome,
    Pair,
    Script,
    narrow_reader,
    outcome_of,
    pairs,
    pipes_or_none,
    side_of,
    unacknowledged,
    unix_pair,
)
from tests.support import (
    PATIENCE,
    FakeClock,
    eventually,
    fill,
    receive_all,
    reset,
    run,
    tcp_pair,
)

# More than the kernel has for a reader, and less than a pipe, the relay's socket and its reader's have together.
MUCH = 300_000


def converse(
    script: Script, half_close: float = PATIENCE, pipes: int = 4, pair: Pair = tcp_pair, idle: float = PATIENCE
) -> Outcome:
    return outcome_of(script, idle, half_close, pipes, pair, together=True)


def ended_by(who: str) -> Cause:
    return "client-closed" if who == "client" else "backend-closed"


def aborted_by(who: str) -> Cause:
    return "client-aborted" if who == "client" else "backend-aborted"


def by_turns(who: str, script: Script) -> Script:
    """The script, with the client as the first of the two sockets, or the backend."""
    return script if who == "client" else lambda client, backend: script(backend, client)


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def flood(sock: socket.socket) -> None:
    """Send until that is no longer possible."""
    with suppress(OSError):
        while True:
            sock.sendall(bytes(BUFFER_SIZE))


def read_to_reset(sock: socket.socket) -> int:
    """How many bytes come before the end, which may be a reset."""
    got = 0
    with suppress(ConnectionResetError):
        while data := sock.recv(1 << 20):
            got += len(data)
    return got


who_ends = pytest.mark.parametrize("who", ["client", "backend"])


@pairs
@who_ends
def test_when_one_side_ends_both_get_the_end(who: str, pair: Pair) -> None:
    def script(ends: socket.socket, other: socket.socket) -> None:
        ends.sendall(b"question")
        assert other.recv(100) == b"question"
        other.sendall(b"answer")
        assert ends.recv(100) == b"answer"
        ends.shutdown(socket.SHUT_WR)
        assert receive_all(other) == b""
        assert receive_all(ends) == b""

    sent, received = (8, 6) if who == "client" else (6, 8)
    assert converse(by_turns(who, script), pair=pair) == (ended_by(who), sent, received, 0)


class Relayed:
    """A relay in a task of its own, beside a test that plays both peers in the same thread. `ends` has how it ended."""

    def __init__(self, loop: Loop, pair: Pair = tcp_pair, half_close: float = PATIENCE) -> None:
        self.loop = loop
        self.client, near = pair()
        self.backend, far = pair()
        self.ends: list[tuple[Cause, int]] = []
        self.relay = Relay(
            loop, side_of(loop, near), side_of(loop, far), Pipes(1), max(PATIENCE, half_close), half_close, False
        )
        self._task = loop.current

    def start(self) -> None:
        self.loop.spawn(self._run())

    async def _run(self) -> None:
        self.relay.client.watch()
        self.relay.backend.watch()
        cause = await self.relay.run()
        self.ends.append((cause, self.relay.close()))
        self._task.wake()

    async def send(self, sock: socket.socket, data: bytes) -> None:
        """Send while the relay runs."""
        sock.setblocking(False)
        while data:
            with suppress(BlockingIOError):
                data = data[sock.send(data) :]
            await self.loop.yield_turn()
        sock.settimeout(PATIENCE)

    async def has_sent(self, data: bytes) -> None:
        """Have the client end, and the backend send this before the relay looks, and wait until the client has it."""
        self.start()
        self.client.shutdown(socket.SHUT_WR)
        while not self.relay.client.ready & RDHUP:
            await self.loop.yield_turn()
        await self.goes_on(data)

    async def goes_on(self, data: bytes) -> None:
        """Have the backend send, and wait until the client has it."""
        self.backend.sendall(data)
        got = b""
        self.client.setblocking(False)
        while got != data:
            await self.loop.yield_turn()
            with suppress(BlockingIOError):
                got += self.client.recv(100)
        self.client.settimeout(PATIENCE)

    async def goes_on_for(self, turns: int) -> None:
        for _ in range(turns):
            await self.loop.yield_turn()
        assert not self.ends

    async def end(self) -> tuple[Cause, int]:
        """Wait for the end: why, and how many bytes were lost."""
        while not self.ends:
            await news()
        return self.ends[0]


def test_an_end_that_both_have_sent_is_the_end_as_ever() -> None:
    async def main(loop: Loop) -> None:
        relayed = Relayed(loop)
        with relayed.client as client, relayed.backend as backend:
            client.sendall(b"question")
            backend.sendall(b"answer")
            client.shutdown(socket.SHUT_WR)
            backend.shutdown(socket.SHUT_WR)
            relayed.start()
            assert await relayed.end() == ("client-closed", 0)
            assert receive_all(client) == b"answer"
            assert receive_all(backend) == b"question"

    run(main)


# What the other side has sent by then


def send_all_that_goes(sock: socket.socket) -> int:
    """Send until nobody takes more; how much of it has reached the relay's kernel or the relay."""
    sent = fill(sock)
    return sent - (unacknowledged(sock) if sock.family == socket.AF_INET else 0)


@pytest.fixture
def long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for what a side may still have in its own kernel is too long for any test."""
    monkeypatch.setattr(rspd.engine.relay, "PAUSE", 2 * PATIENCE)


@pytest.mark.usefixtures("long_pause")
@pytest.mark.parametrize("pair", [narrow_reader, unix_pair])
@pipes_or_none
@who_ends
def test_what_a_slow_reader_was_sent_before_it_ended_reaches_it_and_then_the_end(
    who: str, pair: Pair, pipes: int
) -> None:
    """It waits in the reader's kernel, in the relay, in the relay's kernel, and in the sender's own kernel."""

    def script(ends: socket.socket, other: socket.socket) -> None:
        sent = fill(other)
        ends.shutdown(socket.SHUT_WR)
        assert receive_all(other) == b""
        other.shutdown(socket.SHUT_WR)
        assert len(receive_all(ends)) == sent

    outcome = converse(by_turns(who, script), pipes=pipes, pair=pair)
    assert (outcome.cause, outcome.lost) == (ended_by(who), 0)


@pipes_or_none
@who_ends
@pytest.mark.parametrize("pair", [tcp_pair, narrow_reader, unix_pair])
def test_a_side_that_sends_without_end_does_not_prolong_the_connection(who: str, pair: Pair, pipes: int) -> None:
    def script(ends: socket.socket, other: socket.socket) -> None:
        sender = in_thread(lambda: flood(other))
        assert ends.recv(1)
        ends.shutdown(socket.SHUT_WR)
        while ends.recv(1000):  # slower than the sender, so that the relay never has read all there is
            pass
        sender.join(PATIENCE)
        assert not sender.is_alive()
        assert receive_all(other) == b""

    outcome = converse(by_turns(who, script), pipes=pipes, pair=pair)
    assert (outcome.cause, outcome.lost) == (ended_by(who), 0)


@pairs
def test_a_side_that_sends_without_end_is_cut_after_what_its_kernel_may_have_had(pair: Pair) -> None:
    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, pair)
        with relayed.client as client, relayed.backend as backend:
            relayed.relay.backend.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            await relayed.has_sent(b"!")
            threads = in_thread(lambda: flood(backend)), in_thread(lambda: receive_all(client))
            assert await relayed.end() == ("client-closed", 0)
            for thread in threads:
                thread.join(PATIENCE)
            # A turn may move a megabyte, and there is what was on its way.
            assert 0 <= relayed.relay.download.total - SENDING_MAX < 2 << 20

    run(main, FakeClock())  # so that no pause ends it


@pairs
def test_a_silent_side_is_not_waited_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Side, "at_risk", lambda side: int(side.ended))  # TCP may acknowledge later

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, pair)
        with relayed.client as client, relayed.backend as backend:
            relayed.start()
            await relayed.send(client, b"question")
            await relayed.goes_on(b"answer")
            client.shutdown(socket.SHUT_WR)
            assert await relayed.end() == ("client-closed", 0)
            assert receive_all(backend) == b"question"
            assert receive_all(client) == b""

    run(main, FakeClock())  # no time passes


@pairs
@pytest.mark.parametrize("timeout", [PATIENCE, inf], ids=["timeout", "off"])
def test_a_side_that_was_sending_is_heard_until_it_makes_a_pause(pair: Pair, timeout: float) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, pair, timeout)
        with relayed.client as client, relayed.backend as backend:
            await relayed.has_sent(b"first")
            for word in (b"second", b"third"):
                clock.advance(0.9 * PAUSE)
                await relayed.goes_on_for(10)
                await relayed.goes_on(word)
            clock.advance(1.1 * PAUSE)
            assert await relayed.end() == ("client-closed", 0)
            assert receive_all(client) == b""
            assert receive_all(backend) == b""

    run(main, clock)


def test_a_side_that_sends_a_little_for_ever_without_a_pause_ends_by_timeout() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> int:
        relayed = Relayed(loop, half_close=10 * PAUSE)
        with relayed.client, relayed.backend:
            await relayed.has_sent(b"first")
            words = 0
            while not relayed.ends and words < 100:
                await relayed.goes_on(b"more")
                words += 1
                clock.advance(0.5 * PAUSE)
                for _ in range(10):
                    await loop.yield_turn()
            assert await relayed.end() == ("client-closed", 0)
            return words

    assert 19 <= run(main, clock) <= 21


@pytest.mark.usefixtures("long_pause")
@pairs
def test_a_side_that_ends_in_the_pause_ends_it(pair: Pair) -> None:
    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, pair)
        with relayed.client as client, relayed.backend as backend:
            await relayed.has_sent(b"first")
            await relayed.goes_on(b"second")
            backend.shutdown(socket.SHUT_WR)
            assert await relayed.end() == ("client-closed", 0)
            assert receive_all(client) == b""
            assert receive_all(backend) == b""

    run(main)


@pytest.mark.usefixtures("long_pause")
@who_ends
def test_a_side_that_aborts_in_the_pause_aborts_the_other(who: str) -> None:
    async def main(loop: Loop) -> None:
        relayed = Relayed(loop)
        with relayed.client as client, relayed.backend as backend:
            await relayed.has_sent(b"first")
            await relayed.goes_on_for(10)
            aborts, other = (client, backend) if who == "client" else (backend, client)
            reset(aborts)
            assert await relayed.end() == (aborted_by(who), 0)
            assert eventually(lambda: other.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    run(main)


def test_a_reader_that_stops_after_a_pause_has_begun_ends_the_connection_by_timeout() -> None:
    clock = FakeClock()
    began = clock.now

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, narrow_reader, 5)
        with relayed.backend as backend, relayed.client:
            await relayed.has_sent(b"first")
            await relayed.goes_on_for(10)
            backend.setblocking(False)
            while not relayed.relay.download.waiting:
                with suppress(BlockingIOError):
                    backend.send(bytes(BUFFER_SIZE))
                await loop.yield_turn()
            clock.advance(1.1 * PAUSE)
            await relayed.goes_on_for(10)
            while not relayed.ends:
                clock.advance(1)
                await loop.yield_turn()
            cause, lost = relayed.ends[0]
            assert cause == "half-close-timeout"
            assert lost > 0
            assert 5 <= clock.now - began < 13

    run(main, clock)


def before_the_relay_looks(
    data: bytes, check: Callable[[socket.socket, socket.socket], object], pair: Pair = unix_pair
) -> None:
    """Have a backend send when its client has ended and the relay has yet to see it; then check both."""

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, pair)
        with relayed.client as client, relayed.backend as backend:
            backend.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            relayed.relay.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            relayed.start()
            client.shutdown(socket.SHUT_WR)
            while not relayed.relay.client.ready & RDHUP:
                await loop.yield_turn()  # this task runs before the relay's, which the event woke
            backend.sendall(data)
            assert await relayed.end() == ("client-closed", 0)
            check(client, backend)

    run(main)


@pairs
def test_what_came_before_the_end_is_delivered_though_epoll_has_yet_to_tell_of_it(pair: Pair) -> None:
    def check(client: socket.socket, backend: socket.socket) -> None:
        assert receive_all(client) == b"answer"
        assert receive_all(backend) == b""

    before_the_relay_looks(b"answer", check, pair)


def test_bytes_behind_an_urgent_one_are_among_those_sent_by_then() -> None:
    """The kernel counts what waits up to the urgent byte."""

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop)
        with relayed.client as client, relayed.backend as backend:
            relayed.start()
            client.shutdown(socket.SHUT_WR)
            while not relayed.relay.client.ready & RDHUP:
                await loop.yield_turn()
            backend.sendall(b"before")
            backend.send(b"!", socket.MSG_OOB)
            backend.sendall(b"behind")
            assert await relayed.end() == ("client-closed", 0)
            assert receive_all(client) == b"beforebehind"

    run(main)


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow makes one step in a turn."""
    monkeypatch.setattr(Pipes, "allowance", lambda *_: 1)


@pytest.mark.usefixtures("one_step")
def test_what_takes_several_turns_is_delivered_in_the_next_ones() -> None:
    data = os.urandom(5 * BUFFER_SIZE)  # by few events

    def check(client: socket.socket, backend: socket.socket) -> None:
        assert receive_all(client) == data
        assert receive_all(backend) == b""

    before_the_relay_looks(data, check)


@pytest.mark.usefixtures("one_step")
def test_a_unix_peer_of_which_bytes_are_left_reads_the_end_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnixSide, "unread", lambda _: 0)  # as if all had come too late

    def check(client: socket.socket, backend: socket.socket) -> None:
        assert 0 < len(receive_all(client)) < 3 * BUFFER_SIZE
        assert receive_all(backend) == b""

    before_the_relay_looks(bytes(3 * BUFFER_SIZE), check)
