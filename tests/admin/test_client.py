"""Asking by a control socket: what comes of each answer, and of none."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rspd.admin.client import TRIES, AnswerError, ask, sockets_of, strangers_of
from rspd.admin.request import Answer, Request
from rspd.engine.loop import Loop
from tests.admin.serving import serving
from tests.commands.support import answering
from tests.support import OUR_USER, PATIENCE, eventually

LARGE = b"x" * 3_000_000

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control.sock")


def said(path: str, instead: bytes) -> str:
    """What is wrong with an answer."""
    with answering(path, instead=instead), pytest.raises(AnswerError) as caught:
        ask(path, "/v1/status")
    return str(caught.value)


def ok(body: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", *fields, b"", body])


def test_it_asks_the_server_and_reads_json(tmp_path: Path) -> None:
    async def handler(_: Loop, request: Request) -> Answer:
        if request.path == "/none":
            return Answer.error(404, "expected /some, found /none")
        return Answer(200, "application/json", (b'{"path":"%s",' % request.path.encode(), b'"large":"', LARGE, b'"}'))

    with serving(tmp_path, handler) as served:
        assert ask(served.path, "/some?a=b") == {"path": "/some", "large": LARGE.decode()}
        with pytest.raises(AnswerError, match=r"^expected /some, found /none$"):
            ask(served.path, "/none")


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"", "expected an answer in HTTP, found Remote end closed connection without response"),
        (b"220 mail.example.org ESMTP\r\n", "expected an answer in HTTP, found 220 mail.example.org ESMTP"),
        (ok(b"{", b"Content-Length: 100"), "expected an answer in HTTP, found IncompleteRead"),
        (ok(b""), "expected JSON, found Expecting value"),
        (ok(b'{"process":{"version"\n'), "expected JSON, found Expecting ':' delimiter"),
        (ok(b'{"x": -Infinity}'), "expected JSON, found -Infinity"),
        (ok(b"\xff"), "expected JSON, found 'utf-8' codec can't decode"),
        (ok(100_000 * b"["), "expected JSON, found maximum recursion depth exceeded"),
        (b"HTTP/1.1 500 x\r\n\r\na bug\n", "a bug"),
        (b"HTTP/1.1 503 x\r\n\r\n", "status 503"),
        (b"HTTP/1.1 400 x\r\n\r\n" + 1000 * b"x", 500 * "x"),
    ],
)
def test_an_answer_that_is_none_is_told(path: str, answer: bytes, what: str) -> None:
    text = said(path, answer)
    assert text.startswith(what)
    assert len(text) <= 500


def test_where_nobody_listens_it_says_why(path: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ask(path, "/v1/status")
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(path)
    with pytest.raises(ConnectionRefusedError):
        ask(path, "/v1/status")
    with pytest.raises(OSError, match="path too long"):
        ask(f"{tmp_path}/{200 * 'x'}", "/v1/status")


def test_who_says_nothing_is_waited_for_no_longer_than_told(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            ask(path, "/v1/status", 0.1)
        assert 0.1 <= time.monotonic() - begun < 4.5


def test_where_many_wait_it_waits_too(path: str) -> None:
    """connect(2) fails at once where the backlog is full, unless it may wait."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        begun = time.monotonic()
        with pytest.raises(BlockingIOError):
            ask(path, "/v1/status", 0.1)
        assert 0.1 <= time.monotonic() - begun < 4.5

        outcomes: list[Any] = []
        asking = threading.Thread(target=lambda: outcomes.append(ask(path, "/v1/status")))
        asking.start()
        eventually(lambda: waits_to_connect(asking))
        listener.settimeout(PATIENCE)
        listener.accept()[0].close()
        client = stack.enter_context(listener.accept()[0])
        assert client.recv(1 << 16).startswith(b"GET /v1/status HTTP/1.1\r\n")
        client.sendall(ok(b"[1]"))
        client.close()
        asking.join(PATIENCE)
        assert outcomes == [[1]]


def waits_to_connect(thread: threading.Thread) -> bool:
    """Whether a thread of ours sleeps in the kernel (proc(5))."""
    return Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(") ")[2][0] == "S"


def test_the_sockets_of_a_service_are_its_own_and_those_of_its_workers(tmp_path: Path) -> None:
    folder = tmp_path / "a[b]*"
    folder.mkdir()
    for name in ("worker-2.sock", "worker-10.sock", "worker-1.sock", "other.sock", "control.sock"):
        (folder / name).touch()
    own = f"{folder}/control.sock"
    assert sockets_of(own) == [own, *(f"{folder}/worker-{name}.sock" for name in ("1", "10", "2"))]
    assert sockets_of(f"{folder}/worker-2.sock") == [f"{folder}/worker-2.sock"]
    assert sockets_of(f"{tmp_path}/none/control.sock") == [f"{tmp_path}/none/control.sock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_what_another_user_made_is_no_socket_of_the_service(tmp_path: Path) -> None:
    """Metrics do not count it as a silent worker."""
    own, *workers = (f"{tmp_path}/{name}.sock" for name in ("control", "worker-1", "worker-2", "worker-3"))
    for place, user in zip([own, *workers], [OUR_USER, OUR_USER, 0, OUR_USER + 1], strict=True):
        Path(place).touch()
        os.chown(place, user, -1)
    assert (sockets_of(own), strangers_of(own)) == ([own, *workers[:2]], workers[2:])
    assert (sockets_of(workers[2]), strangers_of(workers[2])) == ([workers[2]], [])


def test_an_answer_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rspd.admin.client.MOST_BYTES", 1 << 20)

    def endless(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, suppress(OSError):
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                client.sendall(b" " * 65536)

    path = f"{tmp_path}/endless.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=endless, args=(listener,), daemon=True)
        thread.start()
        with pytest.raises(AnswerError, match="expected at most 1,048,576 bytes, found more"):
            ask(path, "/v1/status")
        thread.join(PATIENCE)


@contextmanager
def talking(path: str, *talks: Callable[[socket.socket], None]) -> Iterator[list[bytes]]:
    """Something that talks to each client in its own way, one after another. Yields the requests that it has read."""
    read: list[bytes] = []

    def run(listener: socket.socket) -> None:
        for talk in talks:
            with listener.accept()[0] as client, suppress(OSError):
                if talk is not reset:
                    read.append(client.recv(1 << 16))
                talk(client)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=run, args=(listener,), daemon=True)
        thread.start()
        yield read
        thread.join(PATIENCE)


def reset(client: socket.socket) -> None:
    """What rspd does with those that have not asked yet when it restarts."""


def answer(client: socket.socket) -> None:
    client.sendall(ok(b"[1]"))


def break_off(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[1")


def test_a_connection_that_ends_before_the_answer_begins_is_tried_again(path: str) -> None:
    with talking(path, reset, lambda _: None, reset, answer) as read:
        assert ask(path, "/v1/status") == [1]
    assert len(read) == 2
    os.unlink(path)
    with talking(path, *[lambda _: None] * TRIES) as read, pytest.raises(AnswerError, match="without response"):
        ask(path, "/v1/status")
    assert len(read) == TRIES


def test_an_answer_that_has_begun_is_not_asked_for_again(path: str) -> None:
    with talking(path, break_off) as read, pytest.raises(AnswerError, match="IncompleteRead"):
        ask(path, "/v1/status")
    assert len(read) == 1


@pytest.mark.parametrize("begun", [ok(b""), b"HTTP/1.1 200 OK\r\nX: "], ids=["in the content", "in the head"])
def test_an_answer_that_comes_too_slowly_is_given_up(path: str, begun: bytes) -> None:
    """Its bytes come so often that no step of it takes long."""

    def dribble(client: socket.socket) -> None:
        client.sendall(begun)
        while True:
            client.sendall(b" ")
            time.sleep(0.02)

    with talking(path, dribble):
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            ask(path, "/v1/status", 0.5)
        assert 1.8 <= time.monotonic() - started < PATIENCE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_process_of_another_user_is_not_asked_for_sums(tmp_path: Path) -> None:
    path = f"{tmp_path}/stranger.sock"
    os.chmod(tmp_path, 0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.seteuid(OUR_USER)  # whose process listens counts (unix(7))
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        with pytest.raises(PermissionError, match="another user listens there"):
            ask(path, "/v1/status", ours=True)
