"""rspd/serving/first_bytes.py: headers received over real sockets."""

from __future__ import annotations

import errno
import fcntl
import re
import socket
import struct
import termios
import threading
from collections.abc import Callable
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.engine.loop import ERR, IN, Loop
from rspd.engine.pipes import Pipes
from rspd.engine.relay import Relay
from rspd.engine.side import RETRY, Side
from rspd.protocols.proxy_protocol import (
    Header,
    HeaderError,
    NoHeaderError,
    encode,
    parse,
)
from rspd.serving.first_bytes import Awaited
from tests.protocols.test_proxy_protocol import (
    BLOCK4,
    CLIENT4,
    CLIENT6,
    LARGEST,
    LINE,
    SERVER4,
    SERVER6,
    WHOLE,
    v2,
    versions,
)
from tests.support import (
    PATIENCE,
    FakeClock,
    receive_all,
    reset,
    run,
    send_and_close,
    tcp_pair,
)

Pair = Callable[[], tuple[socket.socket, socket.socket]]

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


def unix_pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.settimeout(PATIENCE)
    return near, far


def small_pair() -> tuple[socket.socket, socket.socket]:
    """The receiving end has the smallest buffer there is."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        near = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        far, _ = listener.accept()
    return near, far


class CountingSide(Side):
    """Counts how often somebody looks at it."""

    __slots__ = ("looks",)

    def __init__(self, loop: Loop, sock: socket.SocketType) -> None:
        super().__init__(loop, sock)
        self.looks = 0

    def peek(self, size: int) -> bytes | None:
        self.looks += 1
        return super().peek(size)


class Receiver:
    """A client, and a task that receives its header; `outcome` is what came of it."""

    def __init__(self, loop: Loop, pair: Pair = tcp_pair) -> None:
        self.loop = loop
        self.peer, far = pair()
        own = socket.SocketType(far.family, far.type, 0, far.detach())
        own.setblocking(False)
        self.side = CountingSide(loop, own)
        self.outcome: Header | Exception | None = None

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.side.close()
        self.peer.close()

    def start(self, deadline: float = inf) -> None:
        async def receive_header() -> None:
            self.side.watch()
            try:
                self.outcome = await Awaited(deadline).take(self.loop, self.side)
            except Exception as error:
                self.outcome = error

        self.loop.spawn(receive_header())

    async def settle(self, turns: int = 10) -> None:
        for _ in range(turns):
            await self.loop.yield_turn()

    async def taken(self) -> None:
        """Wait until nothing is left to read, or something has come of it."""
        while self.unread() and self.outcome is None:
            await self.loop.yield_turn()

    async def result(self) -> Header | Exception:
        while self.outcome is None:
            await self.loop.yield_turn()
        return self.outcome

    async def arrived(self, size: int) -> None:
        while self.unread() < size:
            await self.loop.yield_turn()

    def unread(self) -> int:
        return int(struct.unpack("i", fcntl.ioctl(self.side.fd, termios.FIONREAD, bytes(4)))[0])


pairs = pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
headers = pytest.mark.parametrize("header", WHOLE)


def known(header: bytes) -> Header:
    found = parse(header)
    assert found
    return found[0]


@pairs
@headers
@pytest.mark.parametrize("early", [True, False], ids=["there before", "there later"])
def test_a_header_is_taken_and_what_follows_is_left(pair: Pair, header: bytes, early: bool) -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop, pair) as receiver:
            if not early:
                receiver.start()
                await receiver.settle()
                assert receiver.outcome is None
            receiver.peer.sendall(header + b"question")
            if early:
                await receiver.arrived(len(header) + 8)
                receiver.start()
            assert await receiver.result() == known(header)
            assert receiver.side.ready & IN
            assert receiver.side.read(100) == b"question"

    run(main)


@pairs
@headers
def test_a_header_that_comes_byte_by_byte_is_received_without_spinning(pair: Pair, header: bytes) -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop, pair) as receiver:
            receiver.start()
            for place in range(len(header)):
                receiver.peer.sendall(header[place : place + 1])
                await receiver.arrived(0)
                await receiver.taken()
            assert await receiver.result() == known(header)
            # Each byte is found, and then its absence; the first look may have been before the first byte.
            assert receiver.side.looks <= 2 * len(header) + 1

    run(main)


@headers
def test_nobody_looks_again_before_more_of_the_header_comes(header: bytes) -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop) as receiver:
            receiver.start()
            receiver.peer.sendall(header[:-1])
            await receiver.taken()
            await receiver.settle()
            looks = receiver.side.looks
            await receiver.settle(100)
            assert receiver.side.looks == looks
            receiver.peer.sendall(header[-1:])
            assert await receiver.result() == known(header)

    run(main)


@settings(max_examples=40)
@given(st.sampled_from(WHOLE), st.data())
def test_a_stream_that_is_cut_anywhere_has_the_same_header(header: bytes, data: st.DataObject) -> None:
    stream = header + b"question"
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=4).map(sorted))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    async def main(loop: Loop) -> None:
        with Receiver(loop) as receiver:
            receiver.start()
            for part in parts:
                receiver.peer.sendall(part)
                await receiver.settle(3)
            assert await receiver.result() == known(header)
            await receiver.arrived(8)
            assert receiver.side.read(100) == b"question"

    run(main)


@headers
def test_the_end_of_the_stream_within_a_header_is_an_error(header: bytes) -> None:
    async def main(loop: Loop) -> None:
        for size in {0, 1, 5, 12, 13, 15, 16, 27, len(header) // 2, len(header) - 1}:
            if size >= len(header):
                continue
            with Receiver(loop) as receiver:
                receiver.peer.sendall(header[:size])
                receiver.peer.shutdown(socket.SHUT_WR)
                receiver.start()
                error = await receiver.result()
                assert isinstance(error, HeaderError)
                assert isinstance(error, NoHeaderError) is (size == 0)
                after = f" after {header[:size][:16]!r}" if size else ""
                assert re.fullmatch(f"expected .*, found the end of the stream{re.escape(after)}", str(error))

    run(main)


@pairs
def test_the_end_of_the_stream_is_noticed_while_the_header_is_waited_for(pair: Pair) -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop, pair) as receiver:
            receiver.start()
            receiver.peer.sendall(LINE[:20])
            await receiver.taken()
            await receiver.settle()
            assert receiver.outcome is None
            receiver.peer.shutdown(socket.SHUT_WR)
            assert isinstance(await receiver.result(), HeaderError)

    run(main)


@pytest.mark.parametrize("data", [b"G", b"GET / HTTP/1.1\r\nHost: x\r\n", LINE.replace(b"443", b"77777"), b"\r\n\r\nx"])
def test_what_is_no_header_is_refused_at_once(data: bytes) -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop) as receiver:
            receiver.start()
            receiver.peer.sendall(data)
            assert isinstance(await receiver.result(), HeaderError)

    run(main)


@pytest.mark.parametrize("size", [0, 1, 20, len(LINE) - 1])
@pytest.mark.parametrize("waiting", [True, False])
def test_an_abort_within_the_header_is_told(size: int, waiting: bool) -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop) as receiver:
            if waiting:
                receiver.start()
            receiver.peer.sendall(LINE[:size])
            if waiting:
                await receiver.taken()
                await receiver.settle()
            reset(receiver.peer)
            if not waiting:
                receiver.start()
            assert isinstance(await receiver.result(), ConnectionAbortedError)
            assert receiver.side.aborted

    run(main)


def test_a_header_before_an_abort_is_received_and_so_is_what_follows() -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop) as receiver:
            receiver.peer.sendall(LINE + b"last words")
            reset(receiver.peer)
            receiver.start()
            assert await receiver.result() == Header(CLIENT4, SERVER4)
            assert receiver.side.read(10) == b"last words"
            while not receiver.side.ready & ERR:
                await loop.yield_turn()

    run(main)


@pytest.mark.parametrize("begun", [b"", b"P", LINE[:-1], v2(block=BLOCK4)[:20]])
def test_a_header_that_is_late_is_given_up_even_if_bytes_keep_coming(begun: bytes) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with Receiver(loop) as receiver:
            receiver.start(loop.now + 5)
            for place in range(len(begun)):
                receiver.peer.sendall(begun[place : place + 1])
                await receiver.taken()
                await receiver.settle(2)
                clock.advance(4.9 / len(begun))
            await receiver.settle()
            assert receiver.outcome is None
            clock.advance(5.0)
            error = await receiver.result()
            assert isinstance(error, TimeoutError)
            assert str(error) == f"expected a PROXY protocol header in time, found {begun[:16]!r}"

    run(main, clock)


def test_a_header_that_is_there_at_the_deadline_is_in_time() -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop) as receiver:
            receiver.peer.sendall(LINE)
            await receiver.arrived(len(LINE))
            receiver.start(loop.now)
            assert await receiver.result() == Header(CLIENT4, SERVER4)

    run(main)


def test_a_header_may_be_larger_than_the_buffer_of_the_socket() -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop, small_pair) as receiver:
            assert receiver.side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < len(LARGEST) // 2
            thread = threading.Thread(target=receiver.peer.sendall, args=(LARGEST + b"question",))
            thread.start()
            receiver.start()
            assert await receiver.result() == Header(CLIENT4, SERVER4)
            thread.join(PATIENCE)
            await receiver.arrived(8)
            assert receiver.side.read(100) == b"question"

    run(main)


def test_a_large_header_is_read_in_large_parts() -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop, unix_pair) as receiver:
            receiver.peer.sendall(LARGEST + b"question")
            receiver.start()
            assert receiver.outcome == Header(CLIENT4, SERVER4)
            assert receiver.side.looks == 2
            assert receiver.side.read(100) == b"question"

    run(main)


def test_urgent_data_in_a_header_is_passed_over_like_anywhere() -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop) as receiver:
            receiver.start()
            receiver.peer.sendall(LINE[:20])
            receiver.peer.send(b"!", socket.MSG_OOB)
            receiver.peer.sendall(LINE[20:] + b"question")
            assert await receiver.result() == Header(CLIENT4, SERVER4)
            await receiver.arrived(8)
            assert receiver.side.read(100) == b"question"

    run(main)


class Short(socket.SocketType):
    """For some calls of it the kernel has no memory: those with these flags, so often."""

    flags = 0
    times = 0
    failed = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        if flags == self.flags and self.failed < self.times:
            self.failed += 1
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return super().recv(size, flags)


@pytest.mark.parametrize("flags", [0, socket.MSG_PEEK], ids=["read", "peek"])
@pytest.mark.parametrize("times", [2, 1_000_000])
def test_want_of_memory_while_a_header_comes_is_waited_out_until_the_deadline(times: int, flags: int) -> None:
    async def main(loop: Loop) -> None:
        with Receiver(loop) as receiver:
            own = Short(fileno=receiver.side.sock.detach())
            own.flags, own.times = flags, times
            receiver.side.sock = own
            receiver.peer.sendall(LINE + b"question")
            await receiver.arrived(len(LINE) + 8)
            receiver.start(loop.now + (PATIENCE if times == 2 else 0.3))
            while receiver.outcome is None:
                await loop.sleep(0.01)
            assert not receiver.side.aborted
            if times == 2:
                assert receiver.outcome == Header(CLIENT4, SERVER4)
                assert own.recv(100) == b"question"
            else:
                assert isinstance(receiver.outcome, TimeoutError)
                assert own.failed < 60
        await loop.sleep(2 * RETRY)

    run(main)


@pairs
@versions
@pytest.mark.parametrize("early", [True, False], ids=["there before", "there later"])
@pytest.mark.parametrize("data", [b"", b"question", b"question" * 20_000])
def test_a_relay_finds_the_data_and_the_end_that_came_with_the_header(
    pair: Pair, version: str, early: bool, data: bytes
) -> None:
    header = encode(version, CLIENT6, SERVER6)

    async def main(loop: Loop) -> None:
        with Receiver(loop, pair) as receiver:
            backend, far = pair()
            far.setblocking(False)
            sender = threading.Thread(target=send_and_close, args=(receiver.peer, header + data))
            got: list[bytes] = []
            reader = threading.Thread(target=lambda: got.append(receive_all(backend)))
            side = Side(loop, socket.SocketType(far.family, far.type, 0, far.detach()))
            if early:
                sender.start()
                await receiver.arrived(len(header) + min(len(data), 8))
            receiver.side.watch()
            side.watch()
            if not early:
                sender.start()
            assert await Awaited(loop.now + PATIENCE).take(loop, receiver.side) == Header(CLIENT6, SERVER6)
            pool = Pipes()
            relay = Relay(loop, receiver.side, side, pool, PATIENCE, PATIENCE)
            reader.start()
            backend.shutdown(socket.SHUT_WR)
            try:
                assert await relay.run() in ("client-closed", "backend-closed")
            finally:
                relay.close()
                pool.close()
            sender.join(PATIENCE)
            reader.join(PATIENCE)
            backend.close()
            assert got == [data]

    run(main)
