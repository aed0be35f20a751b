"""rspd/balancing/health.py: single checks over real sockets, and what a checker makes of one after another."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rspd.balancing.health import ANSWER_MAX, Checker, CheckError, Verdicts, check
from rspd.engine.loop import ERR, HUP, IN, OUT, Loop, news
from rspd.engine.side import Side
from rspd.settings import HealthConfig, StatusRange
from tests.engine.test_loop import advance, rounds
from tests.engine.test_pipes import no_descriptors
from tests.support import (
    PATIENCE,
    Backend,
    FakeClock,
    full_tcp,
    is_reset,
    open_descriptors,
    receive_all,
    reset,
    run,
    send_and_close,
    tasks_of,
)

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

Connect = Callable[[float], Awaitable[Side]]

TCP = HealthConfig(timeout=PATIENCE)
HTTP = TCP._replace(http="/health")
PING = TCP._replace(send=b"PING\r\n", expect=b"PONG")
BANNER = TCP._replace(expect=b"SSH-2.0-")
SEND = TCP._replace(send=b"QUIT\r\n")


def connecting(loop: Loop, where: Any, until: int = OUT) -> Connect:
    """What `check` connects with: to a TCP or unix socket address, until one of these events has come."""

    async def connect(deadline: float) -> Side:
        family = socket.AF_INET if isinstance(where, tuple) else socket.AF_UNIX
        side = Side(loop, socket.SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
        try:
            code = side.sock.connect_ex(where)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
            side.expect_connection()
            side.watch()
            loop.current.wake_at(deadline)
            while not side.ready & (until | ERR | HUP):
                if loop.now >= deadline:
                    raise TimeoutError
                await news()
            if side.ready & ERR:
                code = side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                # After these it was connected.
                if code not in (errno.ECONNRESET, errno.EPIPE):
                    raise OSError(code, os.strerror(code))
            return side
        except BaseException:
            side.close()
            raise

    return connect


def verdict(
    config: HealthConfig,
    where: Any,
    host: str = "127.0.0.1:80",
    preface: bytes = b"",
    until: int = OUT,
) -> str:
    """Why one check is bad, or an empty string."""

    async def main(loop: Loop) -> str:
        try:
            await check(loop, config, connecting(loop, where, until), host, preface)
        except CheckError as error:
            return str(error) or "a reason is missing"
        return ""

    return run(main)


def verdict_of(
    handler: Callable[[socket.socket], object],
    config: HealthConfig,
    host: str = "127.0.0.1:80",
    preface: bytes = b"",
    until: int = OUT,
) -> str:
    """The verdict on a backend with this handler, which has to come to its end without an error."""
    done = threading.Event()

    def handle(sock: socket.socket) -> None:
        try:
            handler(sock)
        finally:
            done.set()

    with Backend(handle) as backend:
        found = verdict(config, ("127.0.0.1", backend.port), host, preface, until)
        assert done.wait(PATIENCE)
    assert not backend.errors, backend.errors
    return found


def answering(*parts: bytes) -> Callable[[socket.socket], None]:
    """A handler that reads a request, sends an answer in parts as long as somebody reads, and waits for the end."""

    def handler(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.recv(65536)
        # The checker goes as soon as it knows.
        with suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                sock.sendall(part)
            with suppress(OSError):  # ENOTCONN, where the checker was faster
                sock.shutdown(socket.SHUT_WR)
            receive_all(sock)

    return handler


def hang(sock: socket.socket) -> None:
    """A handler that says nothing, and waits for the checker to go."""
    receive_all(sock)


def each_byte(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


class Peer:
    """A check in a task of its own on a pair of sockets, told what to do step by step; no time passes by itself."""

    def __init__(self, loop: Loop, config: HealthConfig) -> None:
        self.loop = loop
        self.far, self.near = socket.socketpair()
        self.near.setblocking(False)
        self.outcome: str | None = None
        self.read = 0
        self.task = loop.spawn(self._check(config))

    async def _check(self, config: HealthConfig) -> None:
        try:
            await check(self.loop, config, self._connect, "host", b"")
            self.outcome = ""
        except CheckError as error:
            self.outcome = str(error)

    async def _connect(self, _: float) -> Side:
        side = CountingSide(self)
        side.watch()
        return side

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            try:
                self.far.sendall(part)
            except BrokenPipeError:
                assert self.outcome is not None
            await rounds(self.loop)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.task.cancel()
        self.far.close()


class CountingSide(Side):
    """A side that tells its peer how much it has read."""

    __slots__ = ("peer",)

    def __init__(self, peer: Peer) -> None:
        sock = peer.near
        super().__init__(peer.loop, socket.SocketType(sock.family, sock.type, 0, sock.detach()))
        self.peer = peer

    def read_into(self, buffer: memoryview) -> int | None:
        count = super().read_into(buffer)
        self.peer.read += count or 0
        return count


# TCP


def test_a_backend_that_takes_the_connection_is_well_and_sees_it_end_with_fin() -> None:
    ends: list[bool] = []
    assert verdict_of(lambda sock: ends.append(is_reset(sock)), TCP) == ""
    assert ends == [False]


def test_a_backend_whose_greeting_nobody_asked_for_sees_the_connection_end_with_fin() -> None:
    ends: list[bool] = []

    def greet(sock: socket.socket) -> None:
        sock.sendall(b"220 mail ready\r\n")
        ends.append(is_reset(sock))

    assert verdict_of(greet, TCP, until=IN) == ""
    assert ends == [False]


def test_a_backend_that_takes_the_connection_and_resets_it_is_well_if_nothing_is_sent() -> None:
    assert verdict_of(reset, TCP, until=HUP) == ""
    assert verdict_of(reset, SEND, until=HUP) == "aborted before all was sent"


def test_a_backend_that_refuses_is_not_well() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = listener.getsockname()
    assert verdict(TCP, where) == "Connection refused"


def test_a_backend_without_its_socket_is_not_well(tmp_path: Path) -> None:
    assert verdict(TCP, str(tmp_path / "socket")) == "No such file or directory"


@pytest.mark.parametrize("config", [TCP, HTTP, PING])
def test_a_backend_that_cannot_be_reached_in_time_is_not_well(config: HealthConfig) -> None:
    with full_tcp() as address:
        host, _, port = address.rpartition(":")
        assert verdict(config._replace(timeout=0.25), (host, int(port))) == "no answer within 0.25 s"


def test_the_reason_of_an_error_without_a_number_is_its_text() -> None:
    async def main(loop: Loop) -> None:
        async def connect(_: float) -> Side:
            raise OSError("the name is unknown")

        with pytest.raises(CheckError, match=r"^the name is unknown$"):
            await check(loop, TCP, connect, "host", b"")

    run(main)


def test_the_kernel_too_may_say_that_time_is_over() -> None:
    async def main(loop: Loop) -> None:
        async def connect(_: float) -> Side:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

        with pytest.raises(CheckError, match=r"^Connection timed out$"):
            await check(loop, TCP, connect, "host", b"")

    run(main)


def test_a_preface_comes_first() -> None:
    got: list[bytes] = []
    preface = b"PROXY UNKNOWN\r\n"
    for config in (TCP, SEND, HTTP):
        verdict_of(lambda sock: got.append(sock.recv(65536)), config, preface=preface)
    assert got[:2] == [preface, preface + SEND.send]
    assert got[2].startswith(preface + b"GET ")


# HTTP


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", ""),
        (b"HTTP/1.0 399 \r\n\r\n", ""),
        (b"HTTP/1.1 204\r\n\r\n", ""),
        (b"HTTP/1.1 200 OK\n\n", ""),
        (b"HTTP/1.1 200 tout \xe0 fait\r\n\r\n", ""),
        (b"HTTP/1.1 200 OK\r\n", ""),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "status 503, expected 200-399"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "status 400, expected 200-399"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "status 100, expected 200-399"),
        (b"", "ended without status line"),
        (b"HTTP/1.1 200 OK", "ended without status line"),
        (b"HTTP/1.1 200 OK\r", "ended without status line"),
        (b"\r\nHTTP/1.1 200 OK\r\n\r\n", r"expected a status line, found '\r'"),
        (b" HTTP/1.1 200 OK\r\n\r\n", r"expected a status line, found ' HTTP/1.1 200 OK\r'"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", r"expected a status line, found 'HTTP/1.1 2000 OK\r'"),
        (b"HTTP/1.1 20 OK\r\n\r\n", r"expected a status line, found 'HTTP/1.1 20 OK\r'"),
        (b"HTTP/1.1 099 OK\r\n\r\n", r"expected a status line, found 'HTTP/1.1 099 OK\r'"),
        (b"HTTP/1.1 200OK\r\n\r\n", r"expected a status line, found 'HTTP/1.1 200OK\r'"),
        (b"HTTP/2 200 OK\r\n\r\n", r"expected a status line, found 'HTTP/2 200 OK\r'"),
        (b"http/1.1 200 OK\r\n\r\n", r"expected a status line, found 'http/1.1 200 OK\r'"),
        ("HTTP/1.1 ٢٠٠ OK\r\n".encode(), r"expected a status line, found 'HTTP/1.1 \xd9\xa2\xd9\xa0\xd9\xa0 OK\r'"),
        (b"\xff\0\x1b[2J\n" * 9, r"expected a status line, found '\xff\x00\x1b[2J'"),
        (b"y" * 100 + b"\n", f"expected a status line, found '{'y' * 40}'"),
    ],
)
@pytest.mark.parametrize("split", [lambda data: [data], each_byte], ids=["whole", "bytes"])
def test_the_status_line_decides(answer: bytes, reason: str, split: Callable[[bytes], Sequence[bytes]]) -> None:
    assert verdict_of(answering(*split(answer)), HTTP) == reason


@pytest.mark.parametrize(
    ("status", "well", "unwell"),
    [
        (((200, 200),), [200], [201, 199]),
        (((200, 299), (304, 304), (404, 410)), [200, 299, 304, 404, 410], [300, 303, 305, 403, 411]),
        (((100, 599),), [100, 599], [600]),
    ],
)
def test_each_range_of_status_counts(status: tuple[tuple[int, int], ...], well: list[int], unwell: list[int]) -> None:
    config = HTTP._replace(status=tuple(StatusRange(*ends) for ends in status))
    for code in well:
        assert verdict_of(answering(b"HTTP/1.1 %d \r\n\r\n" % code), config) == ""
    for code in unwell:
        assert verdict_of(answering(b"HTTP/1.1 %d \r\n\r\n" % code), config).startswith(f"status {code}, expected ")
    if len(status) == 3:
        assert verdict_of(answering(b"HTTP/1.1 500 \r\n\r\n"), config) == "status 500, expected 200-299, 304, 404-410"


@pytest.mark.parametrize(
    ("configured", "address", "header"),
    [
        ("", "127.0.0.1:8000", "127.0.0.1:8000"),
        ("", "app.example:80", "app.example:80"),
        ("", "[2001:db8::1]:80", "[2001:db8::1]:80"),
        ("", "2001:db8::1", "[2001:db8::1]"),
        ("", "[fe80::1%eth0]:80", "[fe80::1]:80"),
        ("", "/run/app.sock", "localhost"),
        ("", "@app", "localhost"),
        ("www.example", "/run/app.sock", "www.example"),
        ("www.example:81", "127.0.0.1:80", "www.example:81"),
    ],
)
def test_the_request_is_http_1_0_and_names_the_host(configured: str, address: str, header: str) -> None:
    requests: list[bytes] = []
    verdict_of(lambda sock: requests.append(sock.recv(65536)), HTTP._replace(host=configured), host=address)
    assert requests == [
        b"GET /health HTTP/1.0\r\nHost: %b\r\nUser-Agent: rspd-health\r\nConnection: close\r\n\r\n" % header.encode()
    ]


def test_a_unix_backend_is_checked_like_any_other(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as sock:
                send_and_close(sock, b"HTTP/1.0 200 OK\r\n" if b"Host: localhost\r\n" in sock.recv(65536) else b"")

        thread = threading.Thread(target=serve)
        thread.start()
        assert verdict(HTTP, path, host=path) == ""
        thread.join(PATIENCE)


def test_an_answer_that_was_all_read_ends_with_fin() -> None:
    ends: list[bool] = []

    def handler(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 10000)
        ends.append(is_reset(sock))

    assert verdict_of(handler, HTTP) == ""
    assert ends == [False]


@pytest.mark.parametrize("until", [IN, HUP], ids=["answered", "aborted"])
def test_what_was_answered_before_an_abort_counts(until: int) -> None:
    def handler(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.0 503 Too many clients\r\n\r\n")
        reset(sock)

    assert verdict_of(handler, HTTP, until=until) == "status 503, expected 200-399"


# send and expect


def test_an_answer_that_contains_what_is_expected_is_good() -> None:
    def handler(sock: socket.socket) -> None:
        answering(b"+PONG\r\n" if sock.recv(6, socket.MSG_PEEK) == b"PING\r\n" else b"-ERR\r\n")(sock)

    assert verdict_of(handler, PING) == ""


@pytest.mark.parametrize("parts", [[b"+PO", b"NG"], each_byte(b"POPONG"), [b"x" * (ANSWER_MAX - 4) + b"PONG"]])
def test_what_is_expected_may_come_in_parts_and_late(parts: list[bytes]) -> None:
    assert verdict_of(answering(*parts), PING) == ""


def test_what_is_expected_may_be_a_greeting() -> None:
    assert verdict_of(lambda sock: send_and_close(sock, b"SSH-2.0-OpenSSH_9.2\r\n"), BANNER) == ""
    assert verdict_of(lambda sock: send_and_close(sock, b"220 mail\r\n"), BANNER) == "ended without 'SSH-2.0-'"


def test_with_nothing_expected_it_is_enough_that_all_was_sent() -> None:
    got: list[bytes] = []
    assert verdict_of(lambda sock: got.append(receive_all(sock)), SEND) == ""
    assert got == [b"QUIT\r\n"]


def test_the_reason_has_no_control_characters() -> None:
    config = PING._replace(expect=b"\xffOK\r\n'")
    assert verdict_of(answering(b"no"), config) == r"ended without '\xffOK\r\n''"


@pytest.mark.parametrize("answer", [b"PON", b"pong", b"P\0ONG", b"x" * (ANSWER_MAX - 1)])
def test_another_answer_is_bad(answer: bytes) -> None:
    assert verdict_of(answering(answer), PING) == "ended without 'PONG'"


def test_much_is_sent_in_parts_to_a_slow_backend() -> None:
    size = 1 << 24  # more than the kernel takes at once
    got: list[int] = []

    def handler(sock: socket.socket) -> None:
        left = size
        while left:
            left -= len(sock.recv(65536))
        got.append(size)
        sock.sendall(b"PONG")
        assert receive_all(sock) == b""

    assert verdict_of(handler, PING._replace(send=bytes(size))) == ""
    assert got == [size]


@pytest.mark.parametrize("expect", [b"", b"PONG"])
def test_a_backend_that_does_not_take_what_is_sent_is_not_well(expect: bytes) -> None:
    async def main(loop: Loop) -> None:
        with Peer(loop, PING._replace(send=bytes(1 << 24), expect=expect, timeout=3)) as peer:
            await advance(loop, clock, 2.5)
            assert peer.outcome is None
            await advance(loop, clock, 0.5)
            assert peer.outcome == "no answer within 3 s"

    clock = FakeClock()
    run(main, clock)


def test_a_backend_that_goes_before_all_is_sent_is_not_well() -> None:
    async def main(loop: Loop) -> None:
        with Peer(loop, SEND._replace(send=bytes(1 << 24))) as peer:
            peer.far.close()
            await rounds(loop)
            assert peer.outcome == "aborted before all was sent"

    run(main, FakeClock())


# Bad backends


@pytest.mark.parametrize(
    ("config", "reason"),
    [(HTTP, "no status line within 2.5 s"), (PING, "no 'PONG' within 2.5 s"), (BANNER, "no 'SSH-2.0-' within 2.5 s")],
)
@pytest.mark.parametrize("dribble", [b"", b"x"], ids=["hangs", "dribbles"])
def test_a_backend_that_hangs_or_dribbles_is_not_well_after_the_timeout(
    config: HealthConfig, reason: str, dribble: bytes
) -> None:
    async def main(loop: Loop) -> None:
        with Peer(loop, config._replace(timeout=2.5)) as peer:
            for _ in range(4):
                await advance(loop, clock, 0.5)
                await peer.send(dribble)
            assert peer.outcome is None
            await advance(loop, clock, 0.5)
            assert peer.outcome == reason

    clock = FakeClock()
    run(main, clock)


def test_an_answer_that_is_there_at_the_deadline_is_in_time() -> None:
    async def main(loop: Loop) -> None:
        with Peer(loop, PING._replace(timeout=2)) as peer:
            clock.advance(2)
            await peer.send(b"PONG")
            assert peer.outcome == ""

    clock = FakeClock()
    run(main, clock)


def test_a_backend_that_hangs_is_not_well_by_the_real_clock_either() -> None:
    before = time.monotonic()
    assert verdict_of(hang, HTTP._replace(timeout=0.2)) == "no status line within 0.2 s"
    assert time.monotonic() - before >= 0.2


@pytest.mark.parametrize(
    ("config", "reason"),
    [(HTTP, "aborted without status line"), (PING, "aborted without 'PONG'")],
)
def test_a_backend_that_resets_is_not_well(config: HealthConfig, reason: str) -> None:
    def handler(sock: socket.socket) -> None:
        sock.recv(65536)
        reset(sock)

    assert verdict_of(handler, config) == reason


@pytest.mark.parametrize(
    ("config", "reason"), [(HTTP, "ended without status line"), (PING, "ended without 'PONG'"), (SEND, ""), (TCP, "")]
)
def test_a_backend_that_closes_early_is_well_if_no_answer_is_asked_for(config: HealthConfig, reason: str) -> None:
    def handler(sock: socket.socket) -> None:
        if config != TCP:
            sock.recv(65536)
        sock.shutdown(socket.SHUT_WR)
        receive_all(sock)

    assert verdict_of(handler, config) == reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [(HTTP, f"no status line in the first {ANSWER_MAX} bytes"), (PING, f"no 'PONG' in the first {ANSWER_MAX} bytes")],
)
def test_no_more_than_a_bounded_part_of_an_endless_answer_is_read(config: HealthConfig, reason: str) -> None:
    def flood(sock: socket.socket) -> None:
        try:
            while True:
                sock.sendall(b"x" * 65536)
        except OSError:
            pass

    assert verdict_of(flood, config) == reason

    async def main(loop: Loop) -> None:
        with Peer(loop, config) as peer:
            await peer.send(b"x" * (ANSWER_MAX - 1))
            assert peer.outcome is None
            await peer.send(b"x" * (4 * ANSWER_MAX))
            assert peer.outcome == reason
            # As much again, where closing empties the socket.
            assert peer.read == 2 * ANSWER_MAX

    run(main)


def test_a_header_without_end_does_not_matter() -> None:
    def handler(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.0 200 OK\r\n")
        try:
            while True:
                sock.sendall(b"X-Header: x\r\n")
        except OSError:
            pass

    assert verdict_of(handler, HTTP) == ""


PIECES = st.lists(
    st.sampled_from(
        [
            b"HTTP/1.",
            b"1 ",
            b"0 ",
            b"200",
            b"503",
            b" ",
            b"OK",
            b"\r",
            b"\n",
            b"\r\n",
            b"PONG",
            b"PO",
            b"NG",
            b"\0",
            b"x" * 9000,
        ]
    ),
    max_size=12,
)


@given(
    answer=PIECES.map(b"".join) | st.binary(max_size=60),
    cuts=st.sets(st.integers(0, 40000), max_size=30),
    http=st.booleans(),
)
@example(answer=b"x" * (ANSWER_MAX - 2) + b"PONG", cuts={ANSWER_MAX - 2, ANSWER_MAX}, http=False)
@example(answer=b"x" * (ANSWER_MAX - 4) + b"PONG", cuts={ANSWER_MAX - 2, ANSWER_MAX}, http=False)
@example(answer=b"HTTP/1.1 200 " + b"x" * (ANSWER_MAX - 14) + b"\n", cuts={5}, http=True)
@example(answer=b"HTTP/1.1 200 " + b"x" * (ANSWER_MAX - 13) + b"\n", cuts={5}, http=True)
def test_how_an_answer_is_cut_does_not_change_the_verdict(answer: bytes, cuts: set[int], http: bool) -> None:
    async def judge(loop: Loop, parts: Sequence[bytes]) -> str:
        with Peer(loop, HTTP if http else PING) as peer:
            await peer.send(*parts)
            peer.far.shutdown(socket.SHUT_WR)
            await rounds(loop)
            assert peer.outcome is not None
            return peer.outcome

    async def main(loop: Loop) -> None:
        edges = [0, *sorted(cut for cut in cuts if 0 < cut < len(answer)), len(answer)]
        parts = [answer[low:high] for low, high in pairwise(edges)]
        whole = await judge(loop, [answer])
        assert await judge(loop, parts) == whole
        if not http:
            assert (whole == "") == (b"PONG" in answer[:ANSWER_MAX])

    run(main, FakeClock())


# Checkers


class Switched:
    """A unix backend to be switched on and off, and its checker on a clock that stands still.

    times: when a check began, in seconds since the first. reports: what the checker said.
    """

    def __init__(self, loop: Loop, clock: FakeClock, path: Path) -> None:
        self.loop = loop
        self.clock = clock
        self.path = path / "socket"
        self.began = clock.now
        self.times: list[float] = []
        self.reports: list[tuple[bool, str]] = []
        self.checking = 0
        self.listener: socket.socket | None = None
        self.before_connect: Callable[[], object] = lambda: None
        self.on_report: Callable[[], object] = lambda: None

    def on(self) -> None:
        if not self.listener:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(str(self.path))
            self.listener.listen(100)
            self.listener.setblocking(False)

    def off(self) -> None:
        if self.listener:
            self.listener.close()
            self.path.unlink()
            self.listener = None

    def accept(self) -> socket.socket:
        """The oldest connection."""
        assert self.listener
        sock, _ = self.listener.accept()
        sock.settimeout(PATIENCE)
        return sock

    def start(self, first: float = 5.0, config: HealthConfig = HealthConfig()) -> Checker:  # noqa: B008
        self.began = self.clock.now
        return Checker(self.loop, config, self.connect, "app.sock", b"", first, Verdicts(), self.report)

    async def connect(self, deadline: float) -> Side:
        self.times.append(self.loop.now - self.began)
        self.before_connect()
        return await connecting(self.loop, str(self.path))(deadline)

    def report(self, up: bool, reason: str) -> None:
        self.reports.append((up, reason))
        self.on_report()

    async def settle(self) -> None:
        await rounds(self.loop, 5)

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.settle()


def scene(tmp_path: Path, script: Callable[[Switched], Awaitable[None]]) -> None:
    """Run a script. Nothing is left: no task, and by the fixture no descriptor."""

    async def main(loop: Loop) -> None:
        backend = Switched(loop, clock, tmp_path)
        try:
            await script(backend)
        finally:
            backend.off()
        await backend.settle()

    clock = FakeClock()
    run(main, clock)


DOWN = (False, "No such file or directory")
UP = (True, "")


@pytest.mark.parametrize(
    ("results", "reports"),
    [
        ("+", [(0, UP)]),
        ("-", [(0, DOWN)]),
        ("-+-+", [(0, DOWN)]),
        ("-++", [(0, DOWN), (2, UP)]),
        ("+--+--+", [(0, UP)]),
        ("+---", [(0, UP), (3, DOWN)]),
        ("+---+-++", [(0, UP), (3, DOWN), (7, UP)]),
        ("+-----++--+---", [(0, UP), (3, DOWN), (7, UP), (13, DOWN)]),
    ],
)
def test_the_first_check_decides_and_later_so_many_in_a_row(
    tmp_path: Path, results: str, reports: list[tuple[int, tuple[bool, str]]]
) -> None:
    async def script(backend: Switched) -> None:
        found = await play(backend, [result == "+" for result in results], HealthConfig(rise=2, fall=3))
        assert found == reports

    scene(tmp_path, script)


@pytest.mark.parametrize(
    ("results", "reports"),
    [
        ("?+", [(0, UP)]),
        ("?-", [(0, DOWN)]),
        ("+?+", [(0, UP)]),
        ("+?++", [(0, UP), (2, UP)]),
        ("+?++++", [(0, UP), (2, UP)]),
        ("+?++?++", [(0, UP), (2, UP), (4, UP)]),
        ("+++?++", [(0, UP), (4, UP)]),  # the good ones before do not count
        ("+?+-++", [(0, UP), (4, UP)]),
        ("+?+?+?++", [(0, UP), (4, UP)]),
        ("+?---", [(0, UP), (3, DOWN)]),
        ("+--?-", [(0, UP), (3, DOWN)]),  # the bad ones do
        ("+--?+++", [(0, UP), (4, UP)]),
        ("-?++", [(0, DOWN), (2, UP)]),
        ("-?---", [(0, DOWN)]),
        ("-+?++", [(0, DOWN), (3, UP)]),
    ],
)
def test_where_it_is_in_doubt_that_a_backend_is_up_so_many_good_ones_in_a_row_are_reported_anew(
    tmp_path: Path, results: str, reports: list[tuple[int, tuple[bool, str]]]
) -> None:
    async def script(backend: Switched) -> None:
        checks = [None if result == "?" else result == "+" for result in results]
        assert await play(backend, checks, HealthConfig(rise=2, fall=3)) == reports

    scene(tmp_path, script)


async def play(
    backend: Switched, results: Sequence[bool | None], config: HealthConfig
) -> list[tuple[int, tuple[bool, str]]]:
    """Let checks find the backend on or off, and let it be doubted at None; each report, with its check's number."""
    found = []
    number = 0
    checker = backend.start(config.interval, config)
    for result in results:
        if result is None:
            checker.doubt()
            continue
        backend.on() if result else backend.off()
        if number:
            await backend.advance(config.interval)
        else:
            await backend.settle()
        number += 1
        assert len(backend.times) == number
        found += [(number - 1, report) for report in backend.reports]
        backend.reports.clear()
    checker.stop()
    await backend.settle()
    return found


@given(results=st.lists(st.booleans(), min_size=1, max_size=25), rise=st.integers(1, 4), fall=st.integers(1, 4))
def test_rise_and_fall_are_runs_without_a_gap(tmp_path: Path, results: list[bool], rise: int, fall: int) -> None:
    expected = [(0, UP if results[0] else DOWN)]
    for number in range(1, len(results)):
        up = expected[-1][1] == UP
        run_length = fall if up else rise
        # Up to here it was as long in a row what it was not said to be.
        if number >= run_length and results[number - run_length + 1 : number + 1] == [not up] * run_length:
            expected.append((number, DOWN if up else UP))

    async def script(backend: Switched) -> None:
        assert await play(backend, results, HealthConfig(rise=rise, fall=fall)) == expected

    scene(tmp_path, script)


def test_the_second_check_comes_after_first_and_from_then_on_each_interval(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        backend.on()
        checker = backend.start(first=1.5, config=HealthConfig(interval=5))
        assert backend.times == []
        await backend.settle()
        assert backend.times == [0]
        for _ in range(100):
            await backend.advance(0.25)
        assert backend.times == [0, 1.5, 6.5, 11.5, 16.5, 21.5]
        assert backend.reports == [UP]
        checker.stop()

    scene(tmp_path, script)


def test_a_loop_that_is_a_little_late_does_not_shift_the_checks(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        backend.on()
        checker = backend.start(first=5, config=HealthConfig(interval=5))
        await backend.settle()
        for seconds in (5.5, 4.5, 5.25, 4.5, 0.25):
            await backend.advance(seconds)
        assert backend.times == [0, 5.5, 10, 15.25, 20]
        checker.stop()

    scene(tmp_path, script)


def test_a_check_that_takes_longer_than_the_interval_delays_the_next(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        backend.on()
        checker = backend.start(first=1, config=BANNER._replace(interval=2, timeout=3))
        await backend.settle()
        open_ones = open_descriptors()
        for _ in range(28):
            await backend.advance(0.25)
            assert open_descriptors() == open_ones, "two checks at once"
        assert backend.times == [0, 3, 6]
        assert backend.reports == [(False, "no 'SSH-2.0-' within 3 s")]
        # The check of 6 ends at 7; the next follows when it is due.
        with ExitStack() as stack:
            peers = [stack.enter_context(backend.accept()) for _ in backend.times]
            peers[-1].sendall(b"SSH-2.0-x")
            await backend.settle()
        for _ in range(8):
            await backend.advance(0.25)
        assert backend.times == [0, 3, 6, 8]
        checker.stop()

    scene(tmp_path, script)


def test_nothing_is_reported_within_the_constructor(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        checker = backend.start()
        assert not backend.reports
        await backend.settle()
        assert backend.reports == [DOWN]
        checker.stop()

    scene(tmp_path, script)


def test_an_unexpected_error_is_logged_as_a_bug_and_checking_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("nobody expects this")

    async def script(backend: Switched) -> None:
        backend.on()
        backend.before_connect = fail
        checker = backend.start(first=2)
        await backend.settle()
        assert not backend.reports
        backend.before_connect = lambda: None
        backend.on_report = fail
        await backend.advance(2)
        assert backend.reports == [UP]
        backend.off()
        for _ in range(3):
            await backend.advance(5)
        assert backend.reports == [UP, DOWN]
        checker.stop()

    with caplog.at_level(logging.DEBUG, "rspd"):
        scene(tmp_path, script)
    assert [record.getMessage() for record in caplog.records] == [
        "a check of app.sock failed unexpectedly; this is a bug"
    ] * 3
    assert all(record.exc_info and isinstance(record.exc_info[1], ValueError) for record in caplog.records)


def test_a_check_for_which_rspd_has_no_descriptor_says_nothing_of_the_backend(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        backend.on()
        checker = backend.start(config=HealthConfig(fall=1))
        with no_descriptors():
            await backend.settle()
            await backend.advance(5)
        assert (len(backend.times), backend.reports) == (2, [])
        await backend.advance(5)
        with no_descriptors():
            for _ in range(3):
                await backend.advance(5)
        assert (len(backend.times), backend.reports) == (6, [UP])
        checker.stop()

    scene(tmp_path, script)


def test_a_checker_stopped_before_its_first_check_makes_none(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        backend.on()
        backend.start().stop()
        await backend.advance(10)
        assert (backend.times, backend.reports) == ([], [])

    scene(tmp_path, script)


def test_a_checker_stopped_between_two_checks_makes_no_other(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        checker = backend.start(first=1)
        await backend.settle()
        checker.stop()
        tasks = tasks_of(backend.loop)
        await backend.settle()
        assert tasks_of(backend.loop) == tasks - 1
        backend.on()
        for _ in range(5):
            await backend.advance(5)
        assert (backend.times, backend.reports) == ([0], [DOWN])
        checker.stop()

    scene(tmp_path, script)


@pytest.mark.parametrize("config", [HTTP, PING, BANNER])
def test_a_checker_stopped_while_it_reads_closes_what_is_open(tmp_path: Path, config: HealthConfig) -> None:
    async def script(backend: Switched) -> None:
        backend.on()
        tasks, before = tasks_of(backend.loop), open_descriptors()
        checker = backend.start(config=config._replace(timeout=2))
        await backend.settle()
        assert (tasks_of(backend.loop), open_descriptors()) == (tasks + 1, before + 1)
        with backend.accept() as sock:
            checker.stop()
            sock.sendall(b"PONG HTTP/1.0 200 OK\r\n SSH-2.0-")
            await backend.settle()
            assert (tasks_of(backend.loop), open_descriptors()) == (tasks, before + 1)
        await backend.advance(10)
        assert (backend.times, backend.reports) == ([0], [])

    scene(tmp_path, script)


def test_a_checker_stopped_while_it_connects_closes_what_is_open(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        with full_tcp() as address:
            host, _, port = address.rpartition(":")
            connect = connecting(backend.loop, (host, int(port)))
            tasks, before = tasks_of(backend.loop), open_descriptors()
            checker = Checker(backend.loop, TCP, connect, address, b"", 5, Verdicts(), backend.report)
            await backend.settle()
            assert (tasks_of(backend.loop), open_descriptors()) == (tasks + 1, before + 1)
            checker.stop()
            await backend.settle()
            assert (tasks_of(backend.loop), open_descriptors()) == (tasks, before)
            await backend.advance(2 * PATIENCE)
            assert backend.reports == []

    scene(tmp_path, script)


def test_a_checker_may_be_stopped_by_the_report_that_it_makes(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        checker = backend.start(first=5, config=BANNER._replace(timeout=6, interval=5))
        backend.on_report = checker.stop
        backend.on()
        await backend.settle()
        await backend.advance(6)  # late: the next is due at once
        assert backend.reports == [(False, "no 'SSH-2.0-' within 6 s")]
        await backend.advance(10)
        assert backend.times == [0]

    scene(tmp_path, script)


def test_a_checker_stopped_within_a_check_that_ends_at_once_reports_nothing(tmp_path: Path) -> None:
    async def script(backend: Switched) -> None:
        checker = backend.start()
        backend.before_connect = checker.stop
        await backend.settle()
        assert (backend.times, backend.reports) == ([0], [])

    scene(tmp_path, script)


def test_a_checker_follows_a_real_backend_by_the_real_clock() -> None:
    config = HTTP._replace(interval=0.02, timeout=1, rise=2, fall=2)
    ok = answering(b"HTTP/1.0 200 OK\r\n\r\n")
    wrong = answering(b"HTTP/1.0 500 Oops\r\n\r\n")
    handlers = [ok]

    async def main(loop: Loop) -> list[tuple[bool, str]]:
        reports: list[tuple[bool, str]] = []
        task = loop.current

        def report(up: bool, reason: str) -> None:
            reports.append((up, reason))
            handlers[0] = ok if not up else wrong
            task.wake()

        with Backend(lambda sock: handlers[0](sock)) as backend:
            connect = connecting(loop, ("127.0.0.1", backend.port))
            checker = Checker(loop, config, connect, backend.address, b"", 0.01, Verdicts(), report)
            while len(reports) < 4:
                await news()
            checker.stop()
            await rounds(loop)
        assert not backend.errors
        return reports

    down = (False, "status 500, expected 200-399")
    assert run(main) == [UP, down, UP, down]
