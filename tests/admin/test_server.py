"""The server for who looks: what it answers, over real sockets. Its bounds are in test_server_bounds.py."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from rspd.admin.request import Answer, Request
from rspd.engine.loop import Loop
from rspd.net.address import Peer
from rspd.net.listener import Listener
from tests.admin.serving import GET, Gate, Said, serving
from tests.support import client_hello, eventually, receive_all

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """But for what a test has looked at, and cleared."""
    yield
    assert not caplog.records


def get(target: str, *fields: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/{version}", "Host: localhost", *fields, "\r\n"]).encode()


# One request


@pytest.mark.parametrize("tcp", [False, True])
def test_a_request_gets_its_answer_and_the_end_of_the_stream(tmp_path: Path, tcp: bool) -> None:
    with serving(tmp_path) as served:
        said = served.ask(get("/v1/status?a=b&c=%20", "Accept: text/plain;q=0.5"), tcp)
    assert said.status == 200
    assert said.body == b"GET /v1/status a=b&c=%20 text/plain;q=0.5"
    assert said.fields == {
        "Content-Type": "text/plain",
        "Content-Length": str(len(said.body)),
        "Cache-Control": "no-store",
        "Connection": "close",
    }


def test_http_1_0_will_do_and_needs_no_host(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert served.ask(b"GET /x HTTP/1.0\r\n\r\n").body == b"GET /x  "


@pytest.mark.parametrize("host", ["", " ", "[fe80::1%25eth0]:9114", "[fe80::1%eth0]"])
@pytest.mark.parametrize("tcp", [False, True])
def test_a_host_may_be_empty_or_have_a_zone(tmp_path: Path, host: str, tcp: bool) -> None:
    """RFC 9112, 3.2: empty is what a client says that knows no host, as of a unix socket."""
    with serving(tmp_path) as served:
        assert served.ask(f"GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), tcp).body == b"GET /x  "


def test_head_gets_the_head_of_the_answer_and_nothing_else(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        whole, head = served.ask(get("/x")), served.ask(get("/x", method="HEAD"))
    assert (head.status, head.body) == (200, b"")
    assert int(head.fields["Content-Length"]) == len(whole.body) + 1  # `HEAD` is in it


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "status", pytest.param("X" * 256, id="long")])
@pytest.mark.parametrize("tcp", [False, True])
def test_nothing_can_be_changed(tmp_path: Path, method: str, tcp: bool) -> None:
    body = b"x" * 50_000  # what is not read would destroy the answer
    with serving(tmp_path) as served:
        said = served.ask(get("/v1/status", f"Content-Length: {len(body)}", method=method) + body, tcp)
    assert (said.status, said.fields["Allow"]) == (405, "GET, HEAD")
    assert said.body.decode() == f"expected GET or HEAD, found {method[:20]}: nothing can be changed here\n"


def test_a_head_may_come_in_single_bytes(tmp_path: Path) -> None:
    with serving(tmp_path) as served, served.connect(tcp=True) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in get("/x?y", "Accept: */*"):
            client.sendall(bytes([byte]))
        assert Said.of(receive_all(client)).body == b"GET /x y */*"


def test_of_several_requests_at_once_the_first_is_answered(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert served.ask(get("/1") + get("/2", "Accept: text/html")).body == b"GET /1  "


def test_a_client_that_has_ended_its_stream_gets_its_answer(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        with served.connect() as client:
            with served.frozen():
                client.sendall(GET)
                client.shutdown(socket.SHUT_WR)
            assert Said.of(receive_all(client)).status == 200


# What is no request


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (client_hello("localhost"), "expected a request in HTTP/1.1, found another protocol"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "expected a request in HTTP/1.1, found another protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "expected a request in HTTP/1.1, found another protocol"),
        (b"status\n", "expected a request in HTTP/1.1, found another protocol"),
        (b"\r\n" + GET, "expected `METHOD TARGET HTTP/1.1`, found an empty line or a blank"),
        (b"GET / HTTP/1.1\r\n\r\n", "expected one Host, found none"),
        (GET.replace(b"\r\n\r\n", b"\r\nHost:\r\n\r\n"), "expected one Host, found 2"),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "expected HOST or HOST:PORT in Host, found b'a b'"),
        (GET.replace(b"\r\n", b"\n"), r"expected `METHOD TARGET HTTP/1.1` and CRLF, found b'GET / HTTP/1.1\n'"),
        (get("x"), "expected a target that begins with /, found b'x'"),
        (get("/", "\0: x"), r"expected `NAME: VALUE` and CRLF, found b'\x00: x\r'"),
    ],
    # A ClientHello is never the same, and each process that runs tests is to have the same names for them.
    ids=["tls", "http2", "ssh", "word", "empty line", "no host", "two hosts", "no name", "bare lf", "target", "field"],
)
def test_what_is_no_request_is_told_so(tmp_path: Path, data: bytes, text: str) -> None:
    with serving(tmp_path) as served:
        said = served.ask(data)
        assert (said.status, said.body.decode()) == (400, f"{text}\n")


def test_who_ends_without_a_request_gets_an_end(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        for data in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n"):
            with served.say(data) as client:
                client.shutdown(socket.SHUT_WR)
                assert receive_all(client) == b""


# Faults of the handler


async def faulty(loop: Loop, request: Request) -> Answer:
    """A handler that fails, or whose answer does, or that answers."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"begun"
        await loop.yield_turn()
        raise RuntimeError("built in")

    if request.path == "/before":
        raise RuntimeError("built in")
    return Answer(200, "text/plain", parts() if request.path == "/within" else (b"well",))


def test_a_bug_is_answered_and_logged_and_others_are_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path, faulty) as served:
        said = served.ask(get("/before"))
        assert (said.status, said.body) == (500, b"a bug in rspd; its log says more\n")
        assert "RuntimeError: built in" in caplog.text
        caplog.clear()
        assert served.ask().body == b"well"


def test_an_answer_that_breaks_off_does_not_look_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path, faulty) as served:
        with served.say(get("/within"), tcp=True) as client, pytest.raises(ConnectionResetError):
            receive_all(client)
        assert "RuntimeError: built in" in caplog.text
        caplog.clear()
        assert served.ask().body == b"well"


def test_an_unexpected_error_at_a_listener_is_logged_and_clients_are_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rspd.admin.server.PATIENCE", 0.1)
    failures = [RuntimeError("built in")]

    class Faulty(Listener):
        def accept(self) -> tuple[socket.SocketType, Peer]:
            if failures:
                raise failures.pop()
            return super().accept()

    def opened(listeners: list[Listener]) -> Sequence[Listener]:
        return [Faulty(one.address, one._sock, one.file) for one in listeners]

    with serving(tmp_path, opened=opened) as served:
        with served.frozen():
            client = served.say(GET)
        with client:
            assert Said.of(receive_all(client)).status == 200
    assert "unexpected error of a control or metrics socket" in caplog.text
    assert "RuntimeError: built in" in caplog.text
    caplog.clear()


# Other listeners


def test_who_is_being_answered_is_so_to_the_end_and_who_comes_waits(tmp_path: Path) -> None:
    """As at a reload: for a moment nobody is accepted; then there are the same listeners, or others."""
    gate = Gate()
    with serving(tmp_path, gate) as served:
        with served.say(GET) as early:
            eventually(lambda: gate.inside == 1)
            served.do(served.server.stop)
            with served.say(get("/free")) as late:
                gate.open()
                assert Said.of(receive_all(early)).status == 200
                served.do(lambda: served.server.apply(served.listeners))
                assert Said.of(receive_all(late)).status == 200
        served.do(lambda: served.server.apply(served.listeners[1:]))
        assert served.ask(get("/free"), tcp=True).status == 200
        with served.say(get("/free")) as nobody:
            served.do(lambda: served.server.apply(served.listeners))
            assert Said.of(receive_all(nobody)).status == 200


@pytest.mark.parametrize("opened", [True, False])
def test_before_a_handover_it_finishes_what_it_has_begun(
    tmp_path: Path, opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """opened: whether the answer comes in time."""
    monkeypatch.setattr("rspd.admin.server.FINISHING", 5.0 if opened else 0.1)
    gate = Gate()
    with serving(tmp_path, gate) as served, served.connect(), served.say(GET) as early:
        eventually(lambda: gate.inside == 1)
        ends: list[str] = []
        served.do(lambda: served.loop.spawn(served.server.finish(), lambda _: ends.append("end")))
        with served.say(get("/free")) as late:
            if opened:
                gate.open()
                assert Said.of(receive_all(early)).status == 200
            eventually(lambda: ends)
            served.do(lambda: served.server.apply(served.listeners))  # for the other process
            assert Said.of(receive_all(late)).status == 200
        gate.open()
