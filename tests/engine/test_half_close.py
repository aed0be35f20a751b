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
from rspd.engine.flow import BUFFER_SIZE, Flow
from rspd.engine.loop import IN, RDHUP, Loop, news
from rspd.engine.pipes import MOST, PIPE_SIZE, Pipes
from rspd.engine.relay import PAUSE, SENDING_MAX, Relay
from rspd.engine.side import Side, UnixSide
from tests.engine.test_relay import (
    Outcome,
    Pair,
    Script,
    left_to_read,
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
    open_descriptors,
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

    async def tell_both_the_end(self, data: bytes) -> None:
        """Have both peers send this, and the client end, and wait until both sides have been told the end.

        No peer reads.
        """
        self.start()
        await self.send(self.backend, data)
        await self.send(self.client, data)
        self.client.shutdown(socket.SHUT_WR)
        while not self.relay.client.ended:
            await self.loop.sleep(0.001)

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
            # There is what one turn may move, and what was on its way.
            assert 0 <= relayed.relay.download.total - SENDING_MAX < MOST + (1 << 20)

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


# What was sent to the other side


@pipes_or_none
@who_ends
@pytest.mark.parametrize("pair", [narrow_reader, unix_pair])
def test_a_slow_reader_that_goes_on_sending_gets_all_and_no_reset(who: str, pair: Pair, pipes: int) -> None:
    """Of a socket that is closed with bytes unread the kernel makes a reset, which destroys what is on its way."""
    answer = os.urandom(MUCH if pair is narrow_reader else MUCH // 10)  # the kernel takes all of it

    def script(ends: socket.socket, other: socket.socket) -> None:
        reader = in_thread(lambda: receive_all(ends))
        ends.sendall(answer)
        ends.shutdown(socket.SHUT_WR)
        sender = in_thread(lambda: flood(other))
        reader.join(PATIENCE)  # it has its end: nothing more is taken from the sender
        assert receive_all(other) == answer
        sender.join(PATIENCE)
        assert not sender.is_alive()

    sent = converse(by_turns(who, script), pipes=pipes, pair=pair)
    assert (sent.cause, sent.lost) == (ended_by(who), 0)


@pipes_or_none
@who_ends
def test_a_side_that_sends_much_before_it_reads_gets_all_it_was_sent(who: str, pipes: int) -> None:
    """If nobody took what it sends, it would never read."""
    question = os.urandom(MUCH)  # the kernel takes all of it, but not the side's own

    def script(ends: socket.socket, other: socket.socket) -> None:
        ends.sendall(question)
        ends.shutdown(socket.SHUT_WR)
        reader = in_thread(lambda: receive_all(ends))
        for _ in range(64):
            other.sendall(bytes(1 << 20))
        assert receive_all(other) == question
        reader.join(PATIENCE)

    outcome = converse(by_turns(who, script), inf, pipes, narrow_reader, inf)
    assert (outcome.cause, outcome.lost) == (ended_by(who), 0)


def test_a_flow_that_was_held_back_tells_of_what_is_to_be_thrown_away() -> None:
    async def main(loop: Loop) -> None:
        near, source = unix_pair()
        target, far = unix_pair()
        with near, far:
            flow = Flow(side_of(loop, source), side_of(loop, target), Pipes(0))
            flow.source.watch()
            flow.target.watch()
            near.setblocking(False)
            while not flow.waiting:
                with suppress(BlockingIOError):
                    near.send(bytes(BUFFER_SIZE))
                await loop.yield_turn()
                flow.pump()
            flow.drop()
            while flow.waste() is not None:
                pass
            near.send(b"late")
            while not flow.source.ready & IN:
                await news()
            assert flow.waste() == 4
            flow.source.close()
            flow.target.close()

    run(main)


def test_a_slow_reader_is_let_go_when_it_has_acknowledged_all_though_nothing_else_happens() -> None:
    data = os.urandom(MUCH)
    got: list[bytes] = []

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, narrow_reader)
        with relayed.client as client, relayed.backend as backend:
            relayed.start()
            await relayed.send(backend, data)
            backend.shutdown(socket.SHUT_WR)
            while not relayed.relay.backend.ended:
                await loop.sleep(0.001)
            assert not relayed.ends
            reader = in_thread(lambda: got.append(receive_all(client)))
            assert await relayed.end() == ("backend-closed", 0)
            reader.join(PATIENCE)

    run(main)
    assert got == [data]


@pytest.fixture
def no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look at what a peer has acknowledged comes too late for any test."""
    monkeypatch.setattr(rspd.engine.relay, "FIRST_LOOK", 2 * PATIENCE)


@pytest.mark.usefixtures("no_look")
def test_a_side_that_has_acknowledged_all_but_the_end_is_let_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Side, "at_risk", lambda side: int(side.ended))

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop)
        with relayed.client as client, relayed.backend as backend:
            relayed.start()
            backend.sendall(b"answer")
            while not relayed.relay.download.total:
                await loop.yield_turn()
            assert client.recv(100) == b"answer"
            backend.shutdown(socket.SHUT_WR)
            assert await relayed.end() == ("backend-closed", 0)
            assert receive_all(client) == b""
            assert receive_all(backend) == b""

    run(main)


@pytest.mark.usefixtures("no_look")
def test_a_slow_reader_that_has_ended_too_is_let_go_at_once() -> None:
    """It will send nothing more, so nothing makes a reset."""
    data = os.urandom(MUCH)

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, narrow_reader)
        with relayed.client as client, relayed.backend as backend:
            relayed.start()
            await relayed.send(backend, data)
            backend.shutdown(socket.SHUT_WR)
            while not relayed.relay.backend.ended:
                await loop.sleep(0.001)
            client.shutdown(socket.SHUT_WR)
            assert await relayed.end() == ("backend-closed", 0)
            assert receive_all(client) == data

    run(main)


# Aborts and timeouts meanwhile


@pipes_or_none
@who_ends
def test_what_a_side_sent_that_aborts_after_the_end_is_delivered_to_a_slow_reader(who: str, pipes: int) -> None:
    def script(ends: socket.socket, other: socket.socket) -> None:
        arrived = send_all_that_goes(other)
        ends.shutdown(socket.SHUT_WR)
        assert receive_all(other) == b""
        reset(other)
        assert read_to_reset(ends) >= arrived

    outcome = converse(by_turns(who, script), pipes=pipes, pair=narrow_reader)
    assert (outcome.cause, outcome.lost) == ("backend-aborted" if who == "client" else "client-aborted", 0)


@who_ends
def test_a_side_that_aborts_after_its_end_is_gone_and_the_other_is_reset(who: str) -> None:
    def script(ends: socket.socket, other: socket.socket) -> None:
        fill(other)
        ends.shutdown(socket.SHUT_WR)
        assert receive_all(other) == b""
        reset(ends)
        eventually(lambda: other.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    outcome = converse(by_turns(who, script), pair=narrow_reader)
    assert (outcome.cause, outcome.lost) == (f"{who}-aborted", 0)


def test_a_slow_reader_gets_all_though_the_other_side_aborts_when_both_have_been_told_the_end() -> None:
    data = os.urandom(MUCH)
    got: list[int] = []

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, narrow_reader)
        with relayed.client as client, relayed.backend as backend:
            await relayed.tell_both_the_end(data)
            reset(client)
            while not relayed.relay.client.aborted:
                await loop.sleep(0.001)
            reader = in_thread(lambda: got.append(read_to_reset(backend)))
            assert await relayed.end() == ("client-aborted", 0)
            reader.join(PATIENCE)

    run(main)
    assert got == [MUCH]


def test_a_side_that_aborts_when_both_have_been_told_the_end_takes_nothing_from_the_other() -> None:
    """Neither side has read what it was sent. The one that aborts gives up its own."""
    data = os.urandom(MUCH)

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, narrow_reader)
        with relayed.client as client, relayed.backend as backend:
            await relayed.tell_both_the_end(data)
            reset(backend)
            assert await relayed.end() == ("backend-aborted", 0)
            assert receive_all(client) == data

    run(main)


def fill_up(sock: socket.socket) -> None:
    """Send until nobody takes more; a busy machine may make a pause in between."""
    while fill(sock):
        pass


@pytest.mark.parametrize("pair", [narrow_reader, unix_pair])
@pipes_or_none
@who_ends
def test_a_reader_that_has_stopped_ends_the_connection_and_what_it_had_not_taken_is_lost(
    who: str, pair: Pair, pipes: int
) -> None:
    got: list[int] = []

    def script(ends: socket.socket, other: socket.socket) -> None:
        fill_up(other)
        ends.shutdown(socket.SHUT_WR)
        got.append(left_to_read(ends))

    outcome = converse(by_turns(who, script), 0.5, pipes, pair)
    assert outcome.cause == "half-close-timeout"
    taken = outcome.received if who == "client" else outcome.sent
    assert 0 <= outcome.lost - (taken - got[0]) <= (PIPE_SIZE if pipes else BUFFER_SIZE)
    assert outcome.lost > 0


def test_the_idle_timeout_holds_for_a_reader_that_has_stopped_if_it_is_shorter() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        fill_up(backend)
        client.shutdown(socket.SHUT_WR)
        left_to_read(client)

    outcome = converse(script, pair=narrow_reader, idle=3)
    assert outcome.cause == "idle-timeout"
    assert outcome.lost > 0


@pytest.mark.parametrize("sends", [False, True])
def test_a_reader_that_has_stopped_is_let_go_and_loses_something_only_if_it_sends_at_the_last_moment(
    sends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(MUCH)
    if sends:
        monkeypatch.setattr(Flow, "waste", lambda _: None)  # as if it came after the last look

    async def main(loop: Loop) -> None:
        relayed = Relayed(loop, narrow_reader, half_close=0.3)
        with relayed.client as client, relayed.backend as backend:
            relayed.start()
            await relayed.send(backend, data)
            backend.shutdown(socket.SHUT_WR)
            while not relayed.relay.backend.ended:
                await loop.sleep(0.001)
            if sends:
                client.sendall(b"late")
            cause, lost = await relayed.end()
            got = left_to_read(client) if sends else len(receive_all(client))
            assert cause == "half-close-timeout"
            assert (got == MUCH, lost > 0) == (not sends, sends)
            assert got + lost >= MUCH

    run(main)


def test_a_hundred_connections_leave_no_descriptor() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        sender = in_thread(lambda: flood(backend))
        assert client.recv(1)
        client.shutdown(socket.SHUT_WR)
        receive_all(client)
        sender.join(PATIENCE)

    before = open_descriptors()
    for _ in range(50):
        for pair in (tcp_pair, unix_pair):
            converse(script, pair=pair)
    assert open_descriptors() == before
