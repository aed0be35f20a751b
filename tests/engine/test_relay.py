"""Relays between real sockets, told as conversations."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import inf
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rspd.engine.pipes
from rspd.engine.cause import Cause
from rspd.engine.flow import BUFFER_SIZE, BULK, Flow
from rspd.engine.loop import ERR, IN, OUT, Loop, news
from rspd.engine.pipes import LOOK, PIPE_SIZE, PROVEN, SLOW, Borrower, Pace, Pipe, Pipes
from rspd.engine.relay import Relay
from rspd.engine.side import Side, UnixSide
from tests.support import (
    PATIENCE,
    FakeClock,
    eventually,
    fill,
    is_reset,
    receive_all,
    reset,
    run,
    send_and_close,
    tasks_of,
    tcp_pair,
)

Script = Callable[[socket.socket, socket.socket], object]
Pair = Callable[[], tuple[socket.socket, socket.socket]]


def unix_pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.settimeout(PATIENCE)
    return near, far


def side_of(loop: Loop, sock: socket.socket) -> Side:
    own = socket.SocketType(sock.family, sock.type, 0, sock.detach())
    own.setblocking(False)
    return UnixSide(loop, own) if own.family == socket.AF_UNIX else Side(loop, own)


class Outcome(NamedTuple):
    """How a relay ended, and the bytes: both ways, and lost."""

    cause: Cause
    sent: int
    received: int
    lost: int


class Wanting:
    """Who wants a pipe, and is fast whenever somebody looks."""

    @property
    def total(self) -> int:
        self._total = 1000 * self._total
        return self._total

    _total = PROVEN

    def empty_into_memory(self, pace: Pace) -> int:
        raise AssertionError("taken from who is fast")


def converse(
    script: Script, idle: float = PATIENCE, half_close: float = PATIENCE, pipes: int = 4, pair: Pair = tcp_pair
) -> tuple[Cause, int, int]:
    """Run a script in a thread as client and backend, with a relay between; the cause, and the bytes both ways."""
    return outcome_of(script, idle, half_close, pipes, pair)[:3]


def outcome_of(
    script: Script,
    idle: float = PATIENCE,
    half_close: float = PATIENCE,
    pipes: int = 4,
    pair: Pair = tcp_pair,
    *,
    together: bool = False,
) -> Outcome:
    """The same, with the bytes that were lost. together: whether both sides end when one does."""
    client, client_far = pair()
    backend, backend_far = pair()
    failures: list[BaseException] = []

    def play() -> None:
        try:
            script(client, backend)
        except BaseException as error:
            failures.append(error)
        finally:
            client.close()
            backend.close()

    thread = threading.Thread(target=play)

    async def main(loop: Loop) -> Outcome:
        client_side, backend_side = side_of(loop, client_far), side_of(loop, backend_far)
        client_side.watch()
        backend_side.watch()
        pool = Pipes(pipes)
        relay = Relay(loop, client_side, backend_side, pool, idle, half_close, not together)
        thread.start()
        try:
            cause = await relay.run()
        finally:
            lost = relay.close()
            pool.close()
            assert pool.made == pool.in_memory == 0, "a pipe was not given back, or memory"
        return Outcome(cause, relay.upload.total, relay.download.total, lost)

    try:
        result = run(main)
    finally:
        thread.join(PATIENCE)
    if failures:
        raise failures[0]
    return result


def random_bytes(size: int) -> bytes:
    return os.urandom(size)


pairs = pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
pipes_or_none = pytest.mark.parametrize("pipes", [4, 0], ids=["splice", "copy"])


@pairs
@pipes_or_none
def test_bytes_go_both_ways_and_ends_are_passed_on(pair: Pair, pipes: int) -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        client.sendall(b"question")
        assert backend.recv(100) == b"question"
        backend.sendall(b"answer")
        assert client.recv(100) == b"answer"
        client.shutdown(socket.SHUT_WR)
        assert backend.recv(100) == b""
        backend.sendall(b"last words")
        assert client.recv(100) == b"last words"
        backend.close()
        assert client.recv(100) == b""

    assert converse(script, pair=pair, pipes=pipes) == ("client-closed", 8, 16)


def test_the_backend_may_speak_and_end_first() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        backend.sendall(b"220 ready")
        backend.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"220 ready"
        for word in (b"still", b"sending"):
            client.sendall(word)
            assert backend.recv(100) == word
        client.close()
        assert backend.recv(100) == b""

    assert converse(script) == ("backend-closed", 12, 9)


def test_a_connection_without_a_byte_ends_like_any_other() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        client.close()
        assert backend.recv(1) == b""

    assert converse(script) == ("client-closed", 0, 0)


@pairs
@pipes_or_none
def test_bulk_data_both_ways_at_once_arrives_whole(pair: Pair, pipes: int) -> None:
    up, down = random_bytes(12_000_000), random_bytes(17_000_001)

    def script(client: socket.socket, backend: socket.socket) -> None:
        def send(sock: socket.socket, data: bytes) -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        threads = [threading.Thread(target=send, args=pair) for pair in ((client, up), (backend, down))]
        received: list[bytes] = []
        threads.append(threading.Thread(target=lambda: received.append(receive_all(backend))))
        for thread in threads:
            thread.start()
        got = receive_all(client)
        for thread in threads:
            thread.join(PATIENCE)
        assert hashlib.sha1(got).digest() == hashlib.sha1(down).digest()
        assert hashlib.sha1(received[0]).digest() == hashlib.sha1(up).digest()

    _, sent, received = converse(script, pair=pair, pipes=pipes)
    assert (sent, received) == (len(up), len(down))


@pairs
@pipes_or_none
def test_an_end_that_comes_with_the_data_is_not_missed(pair: Pair, pipes: int) -> None:
    data = random_bytes(BUFFER_SIZE + 100)

    def script(client: socket.socket, backend: socket.socket) -> None:
        client.sendall(data)
        client.close()
        assert receive_all(backend) == data

    assert converse(script, pair=pair, pipes=pipes)[:2] == ("client-closed", len(data))


@pipes_or_none
def test_a_reader_that_stops_for_a_while_gets_everything_and_holds_the_sender(pipes: int) -> None:
    data = random_bytes(40_000_000)

    def script(client: socket.socket, backend: socket.socket) -> None:
        # By itself it may grow to hold all of it (tcp_rmem in tcp(7)).
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sent = fill(backend)
        rest = threading.Thread(target=send_and_close, args=(backend, data))
        rest.start()
        got = receive_all(client)
        assert len(got) == sent + len(data)
        assert hashlib.sha1(got[sent:]).digest() == hashlib.sha1(data).digest()
        rest.join(PATIENCE)

    assert converse(script, pipes=pipes)[0] == "backend-closed"


def test_small_segments_that_fill_the_slots_of_a_pipe_do_not_stall_the_flow() -> None:
    start, count = random_bytes(4 * BUFFER_SIZE), 20_000

    def script(client: socket.socket, backend: socket.socket) -> None:
        backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        backend.sendall(start)

        def dribble() -> None:
            for _ in range(count):
                backend.send(b"x")
            backend.sendall(start)
            backend.close()

        thread = threading.Thread(target=dribble)
        thread.start()
        assert receive_all(client) == start + b"x" * count + start
        thread.join(PATIENCE)

    assert converse(script)[2] == 2 * len(start) + count


@pipes_or_none
def test_urgent_data_neither_stalls_nor_cuts_the_stream(pipes: int) -> None:
    start = random_bytes(3 * BUFFER_SIZE)

    def script(client: socket.socket, backend: socket.socket) -> None:
        # While nothing is read, the urgent byte is in the middle of what waits.
        client.sendall(start)
        client.send(b"!", socket.MSG_OOB)
        client.sendall(start)
        client.sendall(b"end")
        client.close()
        assert receive_all(backend) == start + start + b"end"

    assert converse(script, pipes=pipes)[0] == "client-closed"


def test_after_urgent_data_a_bulk_flow_goes_on() -> None:
    start = random_bytes(10 * BUFFER_SIZE)

    def script(client: socket.socket, backend: socket.socket) -> None:
        def send() -> None:
            client.sendall(start)
            client.send(b"!", socket.MSG_OOB)

        sender = threading.Thread(target=send)
        sender.start()
        got = 0
        while got < len(start):
            got += len(backend.recv(1 << 20))
        sender.join(PATIENCE)
        client.sendall(start)
        while got < 2 * len(start):
            got += len(backend.recv(1 << 20))
        client.close()
        assert backend.recv(1) == b""

    assert converse(script)[:2] == ("client-closed", 2 * len(start))


# Aborts


@pytest.mark.parametrize("who", ["client", "backend"])
def test_a_reset_arrives_as_a_reset_at_the_other_side(who: str) -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        near, far = (client, backend) if who == "client" else (backend, client)
        far.sendall(b"hello")
        assert near.recv(100) == b"hello"
        reset(near)
        assert is_reset(far)

    assert converse(script)[0] == f"{who}-aborted"


@pytest.mark.parametrize("size", [100, 3_000_000])
@pipes_or_none
def test_what_a_backend_sent_before_its_reset_is_delivered(size: int, pipes: int) -> None:
    answer = random_bytes(size)

    def script(client: socket.socket, backend: socket.socket) -> None:
        client.sendall(b"POST " + b"x" * 100_000)
        backend.recv(5)
        got = bytearray()
        with pytest.raises(ConnectionResetError):
            backend.settimeout(0.3)
            sent = 0
            while sent < size:
                sent += backend.send(answer[sent:])
                while len(got) < sent:
                    got += client.recv(1 << 20)
            backend.close()  # what it has not read makes this a reset
            while data := client.recv(1 << 20):
                got += data
        assert got == answer

    assert converse(script, pipes=pipes)[0] == "backend-aborted"


def test_an_answer_is_delivered_to_a_client_that_goes_on_sending_into_a_reset() -> None:
    answer = b"HTTP/1.1 414 URI Too Long\r\n\r\n"

    def script(client: socket.socket, backend: socket.socket) -> None:
        client.sendall(b"GET /" + b"x" * 1000)
        backend.recv(5)
        backend.sendall(answer)
        backend.close()
        try:
            for _ in range(1000):
                client.send(b"x" * 1000)
        except OSError:
            pass
        got = bytearray()
        try:
            while data := client.recv(100):
                got += data
        except ConnectionResetError:
            pass
        assert got == answer

    assert converse(script)[0] == "backend-aborted"


def test_a_reset_after_a_half_close_still_arrives() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(backend) == b"question"
        reset(client)
        # Its stream has ended already, so that a read says nothing new.
        eventually(lambda: backend.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    assert converse(script)[0] == "client-aborted"


def reset_once_delivered(sock: socket.socket) -> None:
    """Reset when the peer's kernel has all: what it has not is lost."""
    eventually(lambda: not unacknowledged(sock))
    reset(sock)


def test_a_slow_reader_gets_all_that_was_sent_before_a_reset() -> None:
    size = 2_000_000

    def script(client: socket.socket, backend: socket.socket) -> None:
        # The relay's kernel has nearly all of it when the reset comes, and the client takes longer than any timeout.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
        backend.sendall(b"x" * size)
        threading.Thread(target=reset_once_delivered, args=(backend,)).start()
        got = 0
        for _ in range(25):
            time.sleep(0.1)
            got += len(client.recv(30_000))
        try:
            while data := client.recv(1 << 20):
                got += len(data)
        except ConnectionResetError:
            pass
        assert got == size

    assert converse(script, half_close=1.8)[0] == "backend-aborted"


def test_a_unix_backend_that_has_not_read_yet_does_not_hold_up_the_end_of_an_aborted_client() -> None:
    async def main(loop: Loop) -> tuple[Cause, float]:
        near, client_far = tcp_pair()
        backend_far, backend = unix_pair()
        sides = side_of(loop, client_far), side_of(loop, backend)
        for side in sides:
            side.watch()
        backend_far.send(b"unread")
        near.sendall(b"x" * 1000)
        while sides[1].ready & IN == 0:
            await news()
        relay = Relay(loop, *sides, Pipes(0), PATIENCE, PATIENCE)
        reset(near)
        started = loop.now
        cause = await relay.run()
        relay.close()
        assert backend_far.recv(2000) == b"x" * 1000
        backend_far.close()
        return cause, loop.now - started

    cause, seconds = run(main)
    assert cause == "client-aborted"
    assert seconds < PATIENCE / 2


def test_without_a_half_close_timeout_the_idle_timeout_holds_on() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        client.shutdown(socket.SHUT_WR)
        assert backend.recv(1) == b""
        assert is_reset(client)

    assert converse(script, idle=0.6, half_close=inf)[0] == "idle-timeout"


def test_an_abort_does_not_wait_for_ever_for_a_reader_that_has_stopped() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        fill(backend)
        reset(backend)
        started = time.monotonic()
        eventually(lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        assert time.monotonic() - started < PATIENCE / 2

    assert converse(script, half_close=0.3)[0] == "backend-aborted"


def test_when_both_sides_abort_the_connection_is_over() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        reset(client)
        reset(backend)

    assert converse(script)[0] in ("client-aborted", "backend-aborted")


# Timeouts


def test_silence_for_the_idle_timeout_aborts_both_sides() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        client.sendall(b"x")
        assert backend.recv(1) == b"x"
        assert is_reset(client)
        assert is_reset(backend)

    assert converse(script, idle=0.5)[0] == "idle-timeout"


def test_after_a_half_close_silence_of_the_other_flow_ends_the_connection() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        client.sendall(b"x")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(backend) == b"x"
        assert is_reset(client), "an answer that never came must not look complete"

    assert converse(script, half_close=0.5)[0] == "half-close-timeout"


def test_a_client_that_has_its_whole_answer_sees_no_reset_at_the_half_close_timeout() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        backend.sendall(b"whole")
        backend.close()
        assert client.recv(100) == b"whole"
        assert client.recv(100) == b""
        time.sleep(0.3)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0

    assert converse(script, half_close=0.1)[0] == "half-close-timeout"


@pytest.mark.parametrize("half_close", [False, True])
def test_silence_after_a_prompt_answer_lasts_no_longer_than_the_timeout(half_close: bool) -> None:
    timeout = 0.4
    lasted = []

    def script(client: socket.socket, backend: socket.socket) -> None:
        client.sendall(b"request")
        if half_close:
            client.shutdown(socket.SHUT_WR)
        assert backend.recv(100) == b"request"
        backend.sendall(b"answer")
        begun = time.monotonic()
        assert client.recv(100) == b"answer"
        is_reset(client)
        lasted.append(time.monotonic() - begun)

    for _ in range(5):
        converse(script, idle=PATIENCE if half_close else timeout, half_close=timeout)
    # The median: a busy machine may be late.
    assert timeout * 0.95 < sorted(lasted)[2] < timeout * 1.5


def end_of(
    story: dict[float, str], seconds: Iterable[float] = range(1, 100), pair: Pair = unix_pair
) -> tuple[Cause, float]:
    """How a relay ended, and after how many seconds.

    story: what happens at which second; the relay hears of it in the same turn as of the time.
    seconds: when the loop has a turn.
    The idle_timeout is 10 seconds, the half_close_timeout 5. The backend reads at once, the client when it is told to.
    """
    clock = FakeClock()
    began = clock.now
    ends: list[tuple[Cause, float]] = []

    async def main(loop: Loop) -> tuple[Cause, float]:
        client, near = pair()
        backend, far = pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)  # so much may wait for the client
        sides = side_of(loop, near), side_of(loop, far)

        async def relay() -> None:
            for side in sides:
                side.watch()
            relay = Relay(loop, *sides, Pipes(1), 10, 5)
            ends.append((await relay.run(), loop.now - began))
            relay.close()

        def both_end() -> None:
            client.shutdown(socket.SHUT_WR)
            backend.shutdown(socket.SHUT_WR)

        def empty_event() -> None:
            for side in sides:
                side.ready |= OUT
            task.wake()

        task = loop.spawn(relay())
        happen: dict[str, Callable[[], object]] = {
            "the client sends": lambda: client.send(b"x"),
            "the client reads": lambda: client.recv(1 << 20),
            "the client ends": lambda: client.shutdown(socket.SHUT_WR),
            "the client resets": lambda: reset(client),
            "the backend sends": lambda: backend.send(b"x"),
            "the backend sends much": lambda: backend.send(bytes(30_000)),
            "both end": both_end,
            "an event brings nothing": empty_event,
        }
        backend.setblocking(False)
        with client, backend:
            for second in seconds:
                clock.now = began + second
                if second in story:
                    happen[story[second]]()
                for _ in range(3):
                    await loop.yield_turn()
                if ends:
                    return ends[0]
                with suppress(BlockingIOError):
                    backend.recv(1)
        raise AssertionError("the relay did not end")

    return run(main, clock)


def test_a_relay_without_a_byte_ends_after_the_idle_timeout() -> None:
    assert end_of({}) == ("idle-timeout", 10)


# At 10, a byte comes together with the deadline: it counts.
@pytest.mark.parametrize("second", [3, 9, 10])
@pytest.mark.parametrize("who", ["the client", "the backend"])
def test_silence_counts_from_the_last_byte_in_either_direction(who: str, second: int) -> None:
    # The client reads before the deadline: what waits for it in the kernel is not to be taken for a sign of life.
    read = {second + 0.5: "the client reads"} if who == "the backend" else {}
    seconds = [half / 2 for half in range(2, 200)]
    assert end_of({second: f"{who} sends", **read}, seconds) == ("idle-timeout", second + 10)


def test_bytes_in_one_direction_keep_a_connection_from_being_idle() -> None:
    story: dict[float, str] = {}
    for second in range(4, 50, 8):
        story |= {second: "the backend sends", second + 4: "the client reads"}
    assert end_of(story) == ("idle-timeout", 44 + 10)


@pytest.mark.parametrize("story", [{}, {3: "the client sends"}, {3: "the backend sends much"}])
def test_a_wake_up_without_bytes_does_not_prolong_a_silence(story: dict[float, str]) -> None:
    assert end_of({**story, 7: "an event brings nothing"}) == end_of(story)


def test_silence_counts_from_when_a_reader_takes_what_was_held_back() -> None:
    # At 13 and at 17, the kernel has more for the client than at first; ten seconds later it has as much as before.
    story: dict[float, str] = {3: "the backend sends much"}
    assert end_of(story) == ("idle-timeout", 23)
    assert end_of({**story, 7: "the client reads"}) == ("idle-timeout", 27)


def test_a_silence_that_lasted_too_long_while_the_process_was_frozen_ends_the_relay_at_once() -> None:
    frozen = [1, 2, 3, *range(40, 100)]
    assert end_of({3: "the client sends"}, frozen) == ("idle-timeout", 40)
    assert end_of({3: "the client sends", 40: "the client sends"}, frozen) == ("idle-timeout", 50)


def test_what_a_peer_takes_from_the_kernel_prolongs_a_silence_when_the_deadline_has_passed() -> None:
    # At 13 the kernel has more for the client than at first, at 23 it has as much as before.
    assert end_of({3: "the backend sends"}) == ("idle-timeout", 23)
    assert end_of({3: "the backend sends", 15: "the client reads"}) == ("idle-timeout", 33)


@pytest.mark.parametrize("second", [3, 9, 10])
def test_the_half_close_timeout_counts_from_the_end_of_the_first_flow(second: int) -> None:
    assert end_of({second: "the client ends"}) == ("half-close-timeout", second + 5)


def test_after_a_half_close_silence_counts_from_the_last_byte_of_the_other_flow() -> None:
    story: dict[float, str] = {1: "the client ends", 4: "the backend sends", 5: "the client reads"}
    assert end_of(story) == ("half-close-timeout", 9)
    assert end_of({**story, 7: "an event brings nothing"}) == ("half-close-timeout", 9)


def test_streams_that_have_ended_when_the_deadline_passes_are_no_silence() -> None:
    assert end_of({10: "both end"}) == ("client-closed", 10)


def test_an_abort_that_comes_together_with_the_deadline_is_the_cause() -> None:
    assert end_of({10: "the client resets"}, pair=tcp_pair) == ("client-aborted", 10)


def test_an_end_that_cannot_be_passed_on_is_an_abort_though_no_event_tells_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(side: Side) -> None:
        side.ready |= ERR

    monkeypatch.setattr(Side, "end", fail)
    # What the backend sent before might still come: it is waited for as long as after a half-close.
    assert end_of({3: "the client ends"}) == ("backend-aborted", 8)


def test_what_comes_after_a_full_target_had_room_again_at_once_is_relayed() -> None:
    def narrow_pair() -> tuple[socket.socket, socket.socket]:
        near, far = tcp_pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4608)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        return near, far

    def script(client: socket.socket, backend: socket.socket) -> None:
        for _ in range(2):
            client.sendall(bytes(60_000))
            left = 60_000
            while left:
                left -= len(backend.recv(left))
        client.close()
        assert backend.recv(1) == b""
        backend.close()

    assert converse(script, pair=narrow_pair)[0] == "client-closed"


def test_a_reader_that_is_slow_but_reads_is_not_idle() -> None:
    size = 3_000_000

    def script(client: socket.socket, backend: socket.socket) -> None:
        # The kernel's buffers take all of it; only their draining shows that the client is there.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
        backend.sendall(b"x" * size)
        got = 0
        for _ in range(20):
            time.sleep(0.1)
            got += len(client.recv(size // 40))
        backend.close()
        got += len(receive_all(client))
        assert got == size

    # Less than it takes in all, and much more than a pause, which is longer on a busy machine.
    assert converse(script, idle=1.5)[0] == "backend-closed"


def test_a_reader_that_has_stopped_is_idle_however_much_waits_for_it() -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        fill(backend)
        eventually(lambda: backend.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    assert converse(script, idle=1.0)[0] == "idle-timeout"


# What a reset destroys


def narrow_reader() -> tuple[socket.socket, socket.socket]:
    """TCP sockets; of what the near one does not read, its kernel takes little."""
    near, far = tcp_pair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    return near, far


def unacknowledged(sock: socket.socket) -> int:
    """How many bytes the kernel has that the peer's has not (tcp(7))."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def unread(sock: socket.SocketType) -> int:
    """How many bytes the kernel has for the reader (FIONREAD, tcp(7))."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


def left_to_read(sock: socket.socket) -> int:
    """How many bytes the kernel has for a reader whose connection is over, which is waited for."""
    over = select.poll()
    over.register(sock, 0)
    assert over.poll(PATIENCE * 1000)
    got = 0
    with suppress(ConnectionResetError):
        while data := sock.recv(1 << 20):
            got += len(data)
    return got


@pytest.mark.parametrize("why", ["idle-timeout", "half-close-timeout", "backend-aborted"])
@pytest.mark.parametrize("pair", [narrow_reader, unix_pair])
@pipes_or_none
def test_what_a_reader_had_not_taken_when_it_was_reset_is_lost(why: Cause, pair: Pair, pipes: int) -> None:
    got: list[int] = []

    def script(client: socket.socket, backend: socket.socket) -> None:
        fill(backend)
        if why == "half-close-timeout":
            client.shutdown(socket.SHUT_WR)
        elif why == "backend-aborted":
            client.sendall(b"?")  # unread, it makes the end a reset
            eventually(lambda: backend.recv(1, socket.MSG_PEEK))
            backend.close()
        got.append(left_to_read(client))

    idle = 1.5 if why == "idle-timeout" else PATIENCE  # `fill` waits a while
    cause, _, received, lost = outcome_of(script, idle=idle, half_close=0.5, pipes=pipes, pair=pair)
    assert cause == why
    assert lost > 0
    # Besides what the client's socket took and did not pass on, what rspd held.
    assert 0 <= lost - (received - got[0]) <= (PIPE_SIZE if pipes else BUFFER_SIZE)


@pairs
def test_a_reader_that_was_reset_when_it_had_everything_has_lost_nothing(pair: Pair) -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        backend.sendall(b"whole")
        assert client.recv(100) == b"whole"
        assert left_to_read(client) == 0

    assert outcome_of(script, idle=0.6, pair=pair) == ("idle-timeout", 0, 5, 0)


@pipes_or_none
def test_what_a_client_does_not_take_that_aborts_is_not_lost(pipes: int) -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        client.sendall(b"request")
        assert backend.recv(100) == b"request"
        fill(backend)
        client.close()  # with bytes unread, so that the kernel sends RST
        assert is_reset(backend)

    cause, sent, received, lost = outcome_of(script, pipes=pipes, pair=narrow_reader)
    assert (cause, sent, lost) == ("client-aborted", 7, 0)
    assert received > 0


def test_what_a_client_has_not_taken_of_a_whole_answer_is_lost_if_it_is_reset_for_what_it_sends() -> None:
    """Of a socket that is closed with bytes unread the kernel makes a reset."""
    got: list[int] = []

    def script(client: socket.socket, backend: socket.socket) -> None:
        # The relay's socket takes all of the answer, the client's does not.
        backend.sendall(b"x" * 300_000)
        backend.shutdown(socket.SHUT_WR)
        fill(client)
        got.append(left_to_read(client))

    cause, _, received, lost = outcome_of(script, half_close=0.5, pair=narrow_reader)
    assert (cause, received) == ("half-close-timeout", 300_000)
    assert 0 < received - got[0] <= lost


def test_what_was_said_to_a_backend_before_the_relay_began_is_not_lost() -> None:
    async def main(loop: Loop) -> None:
        near, source = tcp_pair()
        target, far = tcp_pair()
        relay = Relay(loop, side_of(loop, source), side_of(loop, target), Pipes(0), PATIENCE, PATIENCE)
        relay.backend.watch()
        while relay.backend.write(bytes(100_000)):
            pass
        assert relay.backend.at_risk()
        assert relay.close() == 0
        near.close()
        far.close()

    run(main)


# Against a model

steps = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.sampled_from([1, 2, 1000, BUFFER_SIZE - 1, BUFFER_SIZE, 5 * BUFFER_SIZE + 1])),
        st.tuples(st.just("pause"), st.sampled_from([0, 1, 5])),
        st.tuples(st.just("read"), st.sampled_from([1, 1000, BUFFER_SIZE])),
    ),
    max_size=8,
)


@settings(max_examples=60)
@given(
    client_steps=steps,
    backend_steps=steps,
    pipes=st.sampled_from([0, 1, 4]),
    pair=st.sampled_from([tcp_pair, unix_pair]),
)
def test_each_side_gets_what_the_other_sent_and_then_its_end(
    client_steps: list[tuple[str, int]], backend_steps: list[tuple[str, int]], pipes: int, pair: Pair
) -> None:
    def script(client: socket.socket, backend: socket.socket) -> None:
        got = {client: bytearray(), backend: bytearray()}
        sent = {client: bytearray(), backend: bytearray()}

        def write(sock: socket.socket, script: list[tuple[str, int]]) -> None:
            for number, (what, size) in enumerate(script):
                if what == "send":
                    data = bytes([number + 1]) * size
                    sent[sock] += data
                    sock.sendall(data)
                elif what == "pause":
                    time.sleep(size / 1000)
            sock.shutdown(socket.SHUT_WR)

        def read(sock: socket.socket, script: list[tuple[str, int]]) -> None:
            for what, size in script:
                if what == "pause":
                    time.sleep(size / 1000)
                elif what == "read":
                    got[sock] += sock.recv(size)
            got[sock] += receive_all(sock)

        threads = [
            threading.Thread(target=action, args=(sock, script))
            for sock, script in ((client, client_steps), (backend, backend_steps))
            for action in (write, read)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert got[client] == sent[backend]
        assert got[backend] == sent[client]

    cause, _, _ = converse(script, pipes=pipes, pair=pair)
    assert cause in ("client-closed", "backend-closed")


# Around where copying and splicing meet: a buffer, a pipe, a segment of the loopback interface.
SMALL_PIPE = 2 * BUFFER_SIZE
SAMPLE = os.urandom(8 << 20)

sizes = st.builds(
    lambda edge, more: max(1, edge + more),
    st.sampled_from([1, 1448, BULK, 65483, BUFFER_SIZE, SMALL_PIPE, SMALL_PIPE + BUFFER_SIZE, 2 * SMALL_PIPE]),
    st.integers(-2, 2),
)
moves = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["send", "send", "read", "answer"]), sizes),
        st.tuples(st.just("let the relay run"), st.integers(1, 4)),
        st.tuples(st.sampled_from(["take a pipe", "give it back"]), st.just(1)),
    ),
    max_size=24,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=moves,
    last=st.sampled_from(["end", "close", "reset"]),
    who=st.sampled_from(["client", "backend"]),
    pipes=st.sampled_from([0, 1, 2]),
    room=st.sampled_from([0, 1 << 14, BUFFER_SIZE, 1 << 20]),
    pair=st.sampled_from([tcp_pair, unix_pair]),
)
def test_however_copying_and_splicing_alternate_all_bytes_arrive_in_order_before_the_end(
    moves: list[tuple[str, int]],
    last: str,
    who: str,
    pipes: int,
    room: int,
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One task plays both peers, so that the moves alone say what happens when.

    last: how the sender ends. A reset takes along what the sender's kernel had not passed on, and nothing else.
    room: in the buffers between rspd and the reader; 0 for what the kernel gives.
    """
    monkeypatch.setattr(rspd.engine.pipes, "PIPE_SIZE", SMALL_PIPE)

    async def main(loop: Loop) -> None:
        sender, source = pair()
        reader, target = pair()
        if room:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
            target.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        sender.setblocking(False)
        reader.setblocking(False)
        sides = [side_of(loop, source), side_of(loop, target)]
        client, backend = sides if who == "client" else reversed(sides)
        pool = Pipes(pipes)
        ends: list[tuple[Cause, int]] = []

        async def relay() -> None:
            client.watch()
            backend.watch()
            relay = Relay(loop, client, backend, pool, PATIENCE, PATIENCE)
            cause = await relay.run()
            ends.append((cause, relay.close()))

        loop.spawn(relay())
        taken: list[Pipe] = []
        sent, answered, got = 0, 0, bytearray()
        for number, (move, size) in enumerate(moves, 1):
            with suppress(BlockingIOError):
                if move == "send":
                    sent += sender.send(SAMPLE[sent : sent + size])
                elif move == "read":
                    got += reader.recv(size)
                elif move == "answer":
                    answered += reader.send(b"x" * size)
                elif move == "take a pipe":
                    taken += filter(None, [pool.borrow(Wanting(), loop.now + number)])
                elif move == "give it back" and taken:
                    pool.give_back(taken.pop())
            for _ in range(size if move == "let the relay run" else 0):
                await loop.yield_turn()
        tcp = sender.family != socket.AF_UNIX
        # Bytes that are unread, or come after the end, make a reset of it too.
        hows = {"reset"} if last == "reset" and tcp else {"end", "reset"} if answered and last != "end" else {"end"}
        passed = sent - unacknowledged(sender) if tcp and "reset" in hows else sent
        if last == "end":
            sender.shutdown(socket.SHUT_WR)
        elif last == "close":
            sender.close()
        else:
            reset(sender)
        how = ""
        while not how:
            await loop.yield_turn()
            try:
                data = reader.recv(1 << 20)
                got += data
                how = "" if data else "end"
            except BlockingIOError:
                pass
            except ConnectionResetError:
                how = "reset"
        reader.close()
        sender.close()
        while not ends:
            await loop.yield_turn()
        while taken:
            pool.give_back(taken.pop())
        pool.close()
        assert pool.made == pool.in_memory == 0
        assert passed <= len(got) <= sent
        assert got == SAMPLE[: len(got)]
        assert how in hows
        assert ends[0][1] == 0

    run(main)


# Want of memory in the kernel


class Kernel:
    """Has no memory for one kind of call as long as it is `short`; `failed` counts those calls.

    call: `receive`, `send`, `splice from` a socket of `sock`, or `splice to` one.
    """

    def __init__(self, call: str) -> None:
        self.call = call
        self.short = True
        self.failed = 0
        self.splice = os.splice
        self.sockets: list[int] = []

    def check(self, call: str) -> None:
        if self.short and call == self.call:
            self.failed += 1
            error = errno.ENOBUFS if call == "send" else errno.ENOMEM
            raise OSError(error, os.strerror(error))

    def sock(self, sock: socket.socket) -> socket.SocketType:
        kernel = self

        class Short(socket.SocketType):
            def recv_into(self, *arguments: Any) -> int:
                kernel.check("receive")
                return super().recv_into(*arguments)

            def send(self, *arguments: Any) -> int:
                kernel.check("send")
                return super().send(*arguments)

        short = Short(sock.family, sock.type, 0, sock.detach())
        short.setblocking(False)
        self.sockets.append(short.fileno())
        return short

    def splice_or_fail(self, source: int, target: int, size: int, flags: int) -> int:
        self.check("splice from" if source in self.sockets else "splice to")
        return self.splice(source, target, size, flags=flags)


@pytest.mark.parametrize(
    ("call", "end"),
    [
        ("receive", "close"),
        ("receive", "reset"),
        ("send", "close"),
        ("send", "reset"),
        pytest.param("splice from", "close", marks=pytest.mark.large_pipes(1)),
        pytest.param("splice to", "close", marks=pytest.mark.large_pipes(1)),
    ],
)
def test_want_of_memory_that_lasts_costs_no_time_and_no_bytes(
    call: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(call)
    monkeypatch.setattr(os, "splice", kernel.splice_or_fail)

    async def main(loop: Loop) -> None:
        sender, source = tcp_pair()
        reader, target = tcp_pair()
        sender.setblocking(False)
        reader.setblocking(False)
        client, backend = Side(loop, kernel.sock(source)), Side(loop, kernel.sock(target))
        pipes = Pipes(1)
        ends: list[tuple[Cause, int]] = []

        async def relay() -> None:
            client.watch()
            backend.watch()
            relay = Relay(loop, client, backend, pipes, inf, inf)
            cause = await relay.run()
            ends.append((cause, relay.close()))

        loop.spawn(relay())
        sent = sender.send(SAMPLE[: 4 * BUFFER_SIZE if call.startswith("splice") else 1000])
        if end == "reset":
            reset(sender)
        await loop.sleep(0.3)
        assert 0 < kernel.failed < 60
        kernel.short = False
        got = b""
        while len(got) < sent:
            with suppress(BlockingIOError):
                got += reader.recv(1 << 20)
            await loop.sleep(0.001)
        assert got == SAMPLE[:sent]
        sender.close()
        reader.close()
        while not ends:
            await loop.sleep(0.001)
        assert ends[0] == ("client-aborted" if end == "reset" else "client-closed", 0)
        pipes.close()

    run(main)


def test_a_side_without_memory_has_its_task_woken_once_a_moment_and_may_be_closed_meanwhile() -> None:
    async def main(loop: Loop) -> None:
        near, far = tcp_pair()
        kernel = Kernel("send")
        side = Side(loop, kernel.sock(far))
        side.watch()
        tasks = tasks_of(loop)
        for _ in range(2):
            while not side.ready & OUT:
                await news()
            for _ in range(3):
                assert side.write(b"x") == 0
            assert tasks_of(loop) == tasks + 1
            while tasks_of(loop) > tasks:
                await news()
        side.write(b"x")
        side.close()
        near.close()
        until = loop.now + 1
        while tasks_of(loop) > tasks:
            assert loop.now < until
            await loop.yield_turn()

    run(main)


def test_both_sides_are_closed_though_the_kernel_refuses_to_say_what_is_lost_and_to_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refusing(socket.SocketType):
        def setsockopt(self, *_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    async def main(loop: Loop) -> None:
        peers, sides = [], []
        for _ in range(2):
            near, far = tcp_pair()
            peers.append(near)
            sides.append(Side(loop, Refusing(fileno=far.detach())))
            sides[-1].watch()
        relay = Relay(loop, sides[0], sides[1], Pipes(0), inf, inf)
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "ioctl", refuse)
            assert relay.close() == 0
        assert [side.sock.fileno() for side in sides] == [-1, -1]
        for peer in peers:
            assert receive_all(peer) == b""
            peer.close()

    run(main)


# A single flow


def test_what_comes_while_the_target_is_full_wakes_nobody_and_is_not_lost() -> None:
    async def main(loop: Loop) -> None:
        near, source = unix_pair()
        target, far = unix_pair()
        with near, far:
            flow = Flow(side_of(loop, source), side_of(loop, target), Pipes(1))
            flow.source.watch()
            flow.target.watch()
            sent = 0
            while not flow.waiting:
                sent += near.send(b"x" * 4096)
                while not flow.source.ready & IN:
                    await news()
                while flow.pump():
                    pass
            flow.source.ready &= ~IN
            for _ in range(5):
                sent += near.send(b"x")
                await loop.sleep(0.01)
                assert not flow.source.ready & IN
            received = 0
            far.setblocking(False)
            while received < sent:
                with suppress(BlockingIOError):
                    received += len(far.recv(1 << 20))
                if flow.waiting or flow.source.ready & IN:
                    flow.pump()
                await loop.sleep(0.001)
            flow.source.close()
            flow.target.close()

    run(main)


def test_a_flow_stops_at_the_end_of_its_turn_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rspd.engine.pipes, "MOST", BUFFER_SIZE)
    monkeypatch.setattr(rspd.engine.pipes, "PIPE_SIZE", BUFFER_SIZE)

    async def main(loop: Loop) -> None:
        near, source = unix_pair()
        target, far = unix_pair()
        pipes = Pipes(1)
        flow = Flow(side_of(loop, source), side_of(loop, target), pipes)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * BUFFER_SIZE)
        near.sendall(b"x" * (3 * BUFFER_SIZE))
        flow.source.watch()
        flow.target.watch()
        while not flow.source.ready & IN:
            await news()
        assert flow.pump()
        assert flow.total == 2 * BUFFER_SIZE
        flow.pump()
        assert flow.total == 3 * BUFFER_SIZE
        near.close()
        far.close()
        flow.drop()
        pipes.close()
        flow.source.close()
        flow.target.close()

    run(main)


def test_flows_with_bulk_data_at_once_share_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rspd.engine.pipes, "TURN", 4 * BUFFER_SIZE)

    async def main(loop: Loop) -> None:
        pipes = Pipes(4)
        flows, ends = [], []
        for _ in range(4):
            near, source = unix_pair()
            target, far = unix_pair()
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * BUFFER_SIZE)
            target.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * BUFFER_SIZE)
            near.sendall(b"x" * (3 * BUFFER_SIZE))
            flow = Flow(side_of(loop, source), side_of(loop, target), pipes)
            flow.source.watch()
            flow.target.watch()
            flows.append(flow)
            ends += [near, far]
        while not all(flow.source.ready & IN and flow.target.ready & OUT for flow in flows):
            await news()
        for _ in flows:
            pipes.allowance(loop.turn)
        await loop.yield_turn()
        assert all(flow.pump() for flow in flows)
        assert [flow.total for flow in flows] == [2 * BUFFER_SIZE] * 4, "a buffer full that opens it, and its share"
        await loop.yield_turn()
        for flow in flows:
            flow.pump()
        assert [flow.total for flow in flows] == [3 * BUFFER_SIZE] * 4
        for end in ends:
            end.close()
        for flow in flows:
            flow.drop()
            flow.source.close()
            flow.target.close()
        pipes.close()

    run(main)


# Packets that a network card has merged bring 65,160 bytes at most, 62,636 with jumbo frames.
@pairs
@pytest.mark.large_pipes(1)
@pytest.mark.parametrize(
    ("sizes", "spliced"),
    [
        ([65_160] * 5, [False, True, True, True, True]),
        ([62_636] * 5, [False, True, True, True, True]),
        ([40_000] * 5, [False] * 5),
        # A message that comes when a stream is over may be spliced, the next one is not.
        ([65_160, 65_160, 20_000, 20_000, 65_160, 65_160], [False, True, True, False, False, True]),
        # The rest of a packet that did not fit into the pipe is no end of a stream.
        ([65_160, SMALL_PIPE + 100, 65_160], [False, True, True]),
    ],
)
def test_a_stream_that_comes_a_packet_at_a_time_is_spliced_and_messages_are_copied(
    pair: Pair, sizes: list[int], spliced: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rspd.engine.pipes, "PIPE_SIZE", SMALL_PIPE)
    splice = os.splice
    moved = [0]

    def count(source: int, target: int, size: int, flags: int) -> int:
        count = splice(source, target, size, flags=flags)
        moved[0] += count
        return count

    monkeypatch.setattr(os, "splice", count)

    async def main(loop: Loop) -> None:
        near, source = pair()
        target, far = pair()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            for sock in (near, source, target, far):
                sock.setsockopt(socket.SOL_SOCKET, option, 16 * BUFFER_SIZE)
        pipes = Pipes(1)
        flow = Flow(side_of(loop, source), side_of(loop, target), pipes)
        flow.source.watch()
        flow.target.watch()
        sent, found = 0, []
        for size in sizes:
            near.sendall(SAMPLE[sent : sent + size])
            moved[0] = 0
            while flow.total < sent + size:
                await news()
                if unread(flow.source.sock) == sent + size - flow.total:  # all of it, however many events tell of it
                    flow.pump()
            assert moved[0] in (0, 2 * size)
            found.append(moved[0] > 0)
            got = b""
            while len(got) < size:
                got += far.recv(size)
            assert got == SAMPLE[sent : sent + size]
            sent += size
        assert found == spliced
        near.close()
        far.close()
        pipes.close()
        flow.source.close()
        flow.target.close()

    run(main)


@pytest.mark.large_pipes(1)
def test_a_pipe_that_comes_free_does_not_overtake_bytes_held_back() -> None:
    data = random_bytes(20 * BUFFER_SIZE)

    async def main(loop: Loop) -> None:
        near, source = unix_pair()
        target, far = unix_pair()
        pipes = Pipes(1)
        flow = Flow(side_of(loop, source), side_of(loop, target), pipes)
        sender = threading.Thread(target=send_and_close, args=(near, data))
        sender.start()
        flow.source.watch()
        flow.target.watch()
        taken = pipes.borrow(Wanting(), loop.now)
        assert taken
        while not flow.held:
            await news()
            flow.pump()
        pipes.give_back(taken)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(receive_all(far)))
        reader.start()
        while not flow.finished:
            if not flow.pump() and not flow.finished:
                await news()
        flow.target.end()
        reader.join(PATIENCE)
        sender.join(PATIENCE)
        assert got[0] == data
        far.close()
        pipes.close()
        flow.source.close()
        flow.target.close()

    run(main)


class CountedPipes(Pipes):
    """Counts how often one was asked for."""

    asked = 0

    def borrow(self, borrower: Borrower, now: float) -> Pipe | None:
        self.asked += 1
        return super().borrow(borrower, now)


@pytest.mark.large_pipes(1)
def test_a_flow_that_lost_its_pipe_copies_until_its_reader_reads() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        near, source = unix_pair()
        target, far = unix_pair()
        for sock in (near, far):
            sock.setblocking(False)
        pipes = CountedPipes(1)
        flow = Flow(side_of(loop, source), side_of(loop, target), pipes)
        flow.source.watch()
        flow.target.watch()

        async def step(size: int) -> None:
            with suppress(BlockingIOError):
                near.send(bytes(size))
            await loop.yield_turn()
            flow.pump()

        def read() -> None:
            with suppress(BlockingIOError):
                while far.recv(BUFFER_SIZE):
                    pass

        # All that has come is in the pipe, in the end.
        while not flow.waiting or flow.held or select.select([flow.source.fd], [], [], 0)[0]:
            if flow.waiting:
                read()
            await step(2 * BUFFER_SIZE)
        taken = pipes.borrow(Wanting(), loop.now + 2 * LOOK)
        assert taken
        assert 0 < len(flow.held) == pipes.in_memory
        pipes.give_back(taken)
        asked = pipes.asked
        while flow.waiting:
            read()
            await step(0)
        assert pipes.in_memory == 0
        assert not getattr(flow.held, "obj", b""), "the bytes of the pipe are still there"
        for _ in range(20):
            clock.advance(1.0)
            read()
            await step(2 * BUFFER_SIZE)
        assert pipes.asked == asked, "a slow reader's flow has asked for a pipe"
        before = flow.total
        while flow.total < before + 2 * SLOW * LOOK:
            read()
            await step(2 * BUFFER_SIZE)
        clock.advance(1.5 * LOOK)
        for _ in range(3):
            read()
            await step(2 * BUFFER_SIZE)
        assert pipes.asked > asked
        flow.drop()
        pipes.close()
        assert pipes.made == 0
        for end in (near, far, flow.source, flow.target):
            end.close()

    run(main, clock)


@pytest.mark.large_pipes(1)
def test_bytes_in_memory_that_are_given_up_make_room_for_others() -> None:
    async def main(loop: Loop) -> None:
        near, source = unix_pair()
        target, far = unix_pair()
        near.setblocking(False)
        pipes = Pipes(1)
        flow = Flow(side_of(loop, source), side_of(loop, target), pipes)
        flow.source.watch()
        flow.target.watch()
        while not flow.waiting or flow.held:
            with suppress(BlockingIOError):
                while near.send(bytes(BUFFER_SIZE)):
                    pass
            await loop.yield_turn()
            flow.pump()
        taken = pipes.borrow(Wanting(), loop.now + 2 * LOOK)
        assert taken
        assert pipes.in_memory > 0
        flow.drop()
        assert pipes.in_memory == 0
        pipes.give_back(taken)
        pipes.close()
        for end in (near, far, flow.source, flow.target):
            end.close()

    run(main)


@pytest.mark.parametrize("refusing", ["source", "target"])
def test_a_socket_that_cannot_be_spliced_is_copied_from_then_on(refusing: str) -> None:
    """An eventfd refuses splice(2) with EINVAL, as does a file opened for appending."""
    data = random_bytes(3 * BUFFER_SIZE)
    read_fd = os.eventfd(0)
    write_fd = os.open(os.path.devnull, os.O_WRONLY | os.O_APPEND)
    file = os.memfd_create("append")
    append_fd = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_APPEND)

    async def main(loop: Loop) -> None:
        near, source = unix_pair()
        target, far = unix_pair()
        pipes = CountedPipes(1)
        flow = Flow(side_of(loop, source), side_of(loop, target), pipes)
        if refusing == "source":
            flow.source.fd = read_fd
        else:
            flow.target.fd = append_fd
        flow.source.ready = flow.target.ready = IN | OUT
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        far.setblocking(False)
        for _ in range(2):
            near.sendall(data)  # there before the first read, which fills the buffer
            got = b""
            while len(got) < len(data):
                flow.source.ready |= IN
                flow.target.ready |= OUT
                flow.pump()
                with suppress(BlockingIOError):
                    got += far.recv(1 << 20)
            assert got == data
        assert pipes.asked == 1
        near.close()
        far.close()
        pipes.close()
        assert pipes.made == 0
        flow.source.sock.close()
        flow.target.sock.close()

    run(main)
    for fd in (read_fd, write_fd, file, append_fd):
        os.close(fd)


@pytest.mark.large_pipes(1)
def test_a_socket_that_cannot_be_spliced_from_is_still_spliced_to(monkeypatch: pytest.MonkeyPatch) -> None:
    splice = os.splice

    async def main(loop: Loop) -> None:
        near, source = tcp_pair()
        target, far = tcp_pair()
        pipes = Pipes(4)
        client, backend = side_of(loop, source), side_of(loop, target)
        client.watch()
        backend.watch()
        upload, download = Flow(client, backend, pipes), Flow(backend, client, pipes)

        def refuse(fd: int, *arguments: Any, **flags: Any) -> int:
            if fd == backend.fd:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return splice(fd, *arguments, **flags)

        monkeypatch.setattr(os, "splice", refuse)
        for end in (near, far):
            end.setblocking(False)
        # The backend's socket reads nothing, and sends much: the upload waits in its pipe meanwhile.
        sent = 0
        until = loop.now + PATIENCE
        while not (upload.waiting and download.total > 2 * BUFFER_SIZE) or sent < 8 * BUFFER_SIZE:
            assert loop.now < until
            with suppress(BlockingIOError):
                near.send(SAMPLE[: 4 * BUFFER_SIZE])
            with suppress(BlockingIOError):
                sent += far.send(SAMPLE[: 4 * BUFFER_SIZE])
            with suppress(BlockingIOError):
                near.recv(1 << 20)
            await loop.sleep(0.001)
            upload.pump()
            download.pump()
        upload.pump()
        assert upload.held_back > 0
        assert not upload.held
        upload.drop()
        download.drop()
        for side in (client, backend):
            side.close()
        for end in (near, far):
            end.close()
        pipes.close()
        assert pipes.made == 0

    run(main)


@pipes_or_none
@pytest.mark.parametrize("size", [3, BUFFER_SIZE + 1])
def test_bytes_behind_a_passed_descriptor_are_relayed_without_waiting_for_more(size: int, pipes: int) -> None:
    """A read of a unix socket stops at a passed descriptor, whatever is behind (unix(7)). The descriptor is dropped."""
    data = random_bytes(3 * size)

    def pair() -> tuple[socket.socket, socket.socket]:
        """What the client sends is there before the relay looks."""
        near, far = unix_pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        if not sent:
            for begin in range(0, len(data), size):
                sent.add(begin)
                socket.send_fds(near, [data[begin : begin + size]], [near.fileno()])
        return near, far

    sent: set[int] = set()

    def script(_: socket.socket, backend: socket.socket) -> None:
        got = b""
        while len(got) < len(data):
            got += backend.recv(len(data))
        assert got == data

    converse(script, pipes=pipes, pair=pair)


def test_an_end_that_cannot_be_passed_on_any_more_shows_the_abort() -> None:
    async def main(loop: Loop) -> None:
        near, far = tcp_pair()
        side = side_of(loop, far)
        assert not side.aborted
        reset(near)
        eventually(lambda: side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        side.end()
        assert side.aborted
        side.close()

    run(main)


def test_a_side_knows_what_its_peer_has_not_acknowledged() -> None:
    async def main(loop: Loop) -> None:
        near, far = unix_pair()
        side = side_of(loop, far)
        side.write(b"x" * 1000)
        assert side.unsent() > 0
        near.recv(1000)
        eventually(lambda: side.unsent() == 0)
        near.close()
        side.close()

    run(main)
