"""The server for who looks, and clients that are many, slow, silent, broken, or gone: it stays bounded, and answers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rspd.admin.request import MOST, Answer, Request
from rspd.engine.loop import Loop
from tests.admin.serving import GET, Gate, Said, Served, serving, tell, what_comes
from tests.engine.test_pipes import no_descriptors
from tests.support import PATIENCE, eventually, is_reset, open_descriptors, receive_all, reset

HELD, FREE = (b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in (b"held", b"free"))

# More than the kernel holds for a reader that has stopped, and what makes it.
MUCH = 64 << 20
PART = bytes(1 << 20)

OWN = 3  # tasks: the loop's own one, the main one, and the acceptor

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not caplog.records


async def tell_much(loop: Loop, request: Request) -> Answer:
    """A handler that answers MUCH, made over many turns, but for /free."""

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(MUCH // len(PART)):
            yield PART
            await loop.yield_turn()

    return await tell(loop, request) if request.path == "/free" else Answer(200, "text/plain", parts())


# Many


@pytest.mark.parametrize("alone", [0, 1])
def test_sixteen_are_answered_at_once_and_the_others_wait(tmp_path: Path, alone: int) -> None:
    """alone: how many come before all the others, of whom one waits at each listener in each turn."""
    gate = Gate()
    with serving(tmp_path, gate) as served, ExitStack() as stack:
        clients = [stack.enter_context(served.say(HELD)) for _ in range(alone)]
        eventually(lambda: gate.inside == alone)
        with served.frozen():
            clients.extend(stack.enter_context(served.say(HELD, tcp=bool(n % 2))) for n in range(2 * MOST))
        eventually(lambda: gate.inside == MOST)
        assert served.tasks == OWN + MOST
        gate.open()
        assert [Said.of(receive_all(client)).status for client in clients] == [200] * len(clients)
    assert gate.most == MOST


@pytest.mark.parametrize("at_once", [True, False])
def test_who_is_being_answered_is_not_given_up_however_many_come(tmp_path: Path, at_once: bool) -> None:
    """at_once: whether the request has come when the client is accepted."""
    gate = Gate()
    with serving(tmp_path, gate) as served, ExitStack() as stack:
        early = stack.enter_context(served.connect())
        if at_once:
            with served.frozen():
                stack.enter_context(asked := served.say(HELD))
        else:
            stack.enter_context(asked := served.connect())
            served.do(lambda: None)
            asked.sendall(HELD)
        eventually(lambda: gate.inside == 1)
        for _ in range(3 * MOST):
            stack.enter_context(served.connect())
        assert early.recv(1) == b""  # it was given up: there were too many
        assert served.ask(FREE).status == 200
        gate.open()
        assert Said.of(receive_all(asked)).status == 200


def test_clients_of_one_socket_do_not_keep_those_of_another_out(tmp_path: Path) -> None:
    order: list[str] = []

    async def handler(loop: Loop, request: Request) -> Answer:
        order.append(request.path)
        return await tell(loop, request)

    with serving(tmp_path, handler) as served, ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(served.say(HELD))
        eventually(lambda: len(order) == MOST)
        with served.frozen():
            for _ in range(50):
                stack.enter_context(served.say(HELD))
            stack.enter_context(client := served.say(FREE, tcp=True))
        assert Said.of(receive_all(client)).status == 200
    assert order.index("/free") < MOST + 3


def silent(served: Served) -> socket.socket:
    return served.connect()


def half(served: Served) -> socket.socket:
    return served.say(GET[:20])


def lingering(served: Served) -> socket.socket:
    return served.say(GET)


def wrong(served: Served) -> socket.socket:
    return served.say(b"status\n")


@pytest.mark.parametrize("client", [silent, half, lingering, wrong])
def test_two_hundred_clients_that_hang_keep_nobody_out(
    tmp_path: Path, client: Callable[[Served], socket.socket]
) -> None:
    with serving(tmp_path) as served, ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(client(served))
        begun = time.monotonic()
        assert served.ask().status == 200
        assert time.monotonic() - begun < 5.0  # 8 s or more if nobody was given up: a second for each 16
        assert served.tasks <= OWN + MOST + 1  # one may be about to end


def test_an_answer_over_many_turns_holds_nobody_up(tmp_path: Path) -> None:
    made = threading.Event()
    parts_at_other: list[int] = []
    count = 0

    async def handler(loop: Loop, request: Request) -> Answer:
        async def parts() -> AsyncIterator[bytes]:
            nonlocal count
            for count in range(1, 2001):  # noqa: B007
                yield b"x"
                await loop.yield_turn()
            made.set()

        if request.path == "/held":
            return Answer(200, "text/plain", parts())
        parts_at_other.append(count)
        return await tell(loop, request)

    with serving(tmp_path, handler) as served:
        with served.frozen():
            long, short = served.say(HELD), served.say(FREE)
        with long, short:
            assert Said.of(receive_all(short)).status == 200
            assert Said.of(receive_all(long)).body == 2000 * b"x"
    assert made.is_set()
    assert parts_at_other[0] < 10


# Slow and silent


@pytest.mark.parametrize("data", [b"", b"G", GET[:-1]])
def test_who_falls_silent_before_the_end_of_the_request_is_gone_soon(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rspd.admin.server.PATIENCE", 0.2)
    begun = time.monotonic()
    with serving(tmp_path) as served:
        with served.frozen():  # it might be gone before it has said this
            client = served.say(data)
        with client:
            assert receive_all(client) == b""
        assert 0.1 < time.monotonic() - begun < 4.5


def test_single_bytes_do_not_lengthen_the_time_of_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rspd.admin.server.PATIENCE", 0.2)
    begun = time.monotonic()
    with serving(tmp_path) as served:
        with served.frozen():
            client = served.say(b"GET /")
        with client, suppress(BrokenPipeError, ConnectionResetError):
            client.settimeout(0.02)
            while True:
                with suppress(TimeoutError):
                    if not client.recv(1):
                        break
                client.sendall(b"x")
        assert 0.1 < time.monotonic() - begun < 4.5


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("limit", ["PATIENCE", "LONGEST"])
def test_a_reader_that_stops_is_given_up_and_others_are_served_meanwhile(
    tmp_path: Path, tcp: bool, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"rspd.admin.server.{limit}", 0.2)
    with serving(tmp_path, tell_much) as served:
        others = served.tasks
        with served.frozen():
            client = served.say(GET, tcp)
        with client:
            assert served.ask(FREE).status == 200
            eventually(lambda: served.tasks == others, patience=4.5)
            if tcp:
                assert is_reset(client)
            else:
                assert len(receive_all(client)) < MUCH  # a unix socket has no RST


def test_a_reader_that_goes_on_gets_all_however_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = 2.0
    monkeypatch.setattr("rspd.admin.server.PATIENCE", patience)
    with serving(tmp_path, tell_much) as served, served.say(GET) as client:
        begun, length = time.monotonic(), 0
        while more := client.recv(1 << 20):
            length += len(more)
            if time.monotonic() < begun + 1.5 * patience:
                time.sleep(patience / 8)
        assert length > MUCH


def test_a_client_that_says_more_and_more_gets_its_answer_and_an_end(tmp_path: Path) -> None:
    with serving(tmp_path) as served, served.say(GET) as client:
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                client.sendall(PART)
        assert Said.of(what_comes(client)).status == 200


@pytest.mark.parametrize("tcp", [False, True])
def test_a_head_of_a_megabyte_is_refused(tmp_path: Path, tcp: bool) -> None:
    with serving(tmp_path) as served:
        with served.say(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", tcp) as client:
            with suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(1 << 10):
                    client.sendall(b"x" * (1 << 10))
            said = what_comes(client)
            assert (tcp and not said) or Said.of(
                said
            ).body == b"expected the end of the head within 16384 bytes, found none\n"
        assert served.ask().status == 200


# Gone


def test_clients_may_go_at_any_time(tmp_path: Path) -> None:
    with serving(tmp_path, tell_much) as served:
        tasks, descriptors = served.tasks, open_descriptors()
        for tcp in (False, True):
            for data in (b"", GET[:10], GET, FREE):
                for read in (0, 1, 1 << 20):
                    client = served.say(data, tcp)
                    if data in (GET, FREE) and read:
                        client.recv(read)
                    (reset if tcp and read else socket.socket.close)(client)
        eventually(lambda: served.tasks == tasks)
        assert open_descriptors() == descriptors
        assert served.ask(FREE).status == 200


def test_without_descriptors_clients_wait_until_there_are_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rspd.net.descriptors.QUIET", 3.0)
    caplog.set_level("INFO")
    with serving(tmp_path) as served, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        with no_descriptors():
            client.connect(served.path)
            client.sendall(GET)
            eventually(lambda: caplog.messages)
        assert Said.of(receive_all(client)).status == 200
    pauses = 'accepting pauses; raise LimitNOFILE or ulimit -n reason="Too many open files"'
    assert caplog.messages == [pauses, "accepting goes on"]
    caplog.clear()


# Anything

WORDS = [
    *(b"GET", b"HEAD", b" ", b"/", b"/v1/status", b"?", b"%", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"Host: x\r\n"),
    *(b"\r\n", b"\r", b"\n", b"\0", b"\xff\xfe", b":", b"Content-Length: 99\r\n", b"Accept:", b"A" * 8_500),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0", b"SSH-2.0-", GET),
]
PLACES = st.integers(0, len(GET))
TEXTS = st.one_of(
    st.lists(st.one_of(st.sampled_from(WORDS), st.binary(max_size=9)), max_size=5).map(b"".join),
    st.builds(lambda end, new, begin: GET[:end] + new + GET[begin:], PLACES, st.binary(max_size=3), PLACES),
)


@settings(max_examples=200)
@given(pieces=st.lists(TEXTS, max_size=2), how=st.sampled_from(["end", "close", "tcp"]))
@example(pieces=[GET], how="end")
@example(pieces=[b"PRI * HTTP/2.0\r\n", b"\r\nSM\r\n\r\n"], how="end")
@example(pieces=[bytes(range(256))], how="tcp")
def test_whatever_comes_harms_nothing(served_to_all: Served, pieces: list[bytes], how: str) -> None:
    served = served_to_all
    with served.connect(how == "tcp") as client, suppress(BrokenPipeError, ConnectionResetError):
        for piece in pieces:
            client.sendall(piece)
        if how != "close":
            client.shutdown(socket.SHUT_WR)
            data = receive_all(client)
            assert not data or Said.of(data).status in (200, 400, 405)
    assert served.ask().status == 200


@pytest.fixture
def served_to_all(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as served:
        tasks, descriptors = served.tasks, open_descriptors()
        yield served
        eventually(lambda: served.tasks == tasks)
        assert open_descriptors() == descriptors


def test_readers_that_stop_give_way_to_others_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rspd.admin.server.STALLED", 0.2)
    with serving(tmp_path, tell_much) as served, ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(served.say(GET))
        eventually(lambda: len(served.server._idle) == MOST)
        begun = time.monotonic()
        assert served.ask(FREE).status == 200
        assert time.monotonic() - begun < 4.5  # below PATIENCE
        assert len(served.server._idle) >= MOST - 1  # one was enough
