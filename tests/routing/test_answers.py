"""rspd/routing/answers.py: what a client without a backend is told, and that it gets all of it."""

from __future__ import annotations

import http.client
import io
import re
import socket
import time
from email.utils import parsedate_to_datetime
from typing import get_args

import pytest

from rspd.engine.cause import Cause
from rspd.engine.loop import Loop, Task
from rspd.engine.side import Side
from rspd.protocols.first import Protocol
from rspd.routing.answers import EXPLANATIONS, PHRASES, READ_MAX, RETRY_AFTER, Farewell, answer, resume
from rspd.settings import ErrorPage
from tests.dialled import settle, until
from tests.routing.clients import Pair, pairs, unix_pair
from tests.support import FakeClock, fill, is_reset, receive_all, reset, run, tcp_pair

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

# Of the causes that are not named here, the way to the backend is at fault.
STATUSES = {
    "bad-head": 400,
    "no-route": 404,
    "first-bytes-timeout": 408,
    "backend-down": 503,
    "queue-timeout": 503,
    "connect-timeout": 504,
}
ALERTS = {"bad-head": 50, "no-route": 112}  # decode_error, unrecognized_name; else 80, internal_error

causes = pytest.mark.parametrize("cause", get_args(Cause))


class Received(io.BytesIO):
    """Bytes that http.client takes for a socket."""

    def makefile(self, *_: object) -> io.BytesIO:
        return self


def parsed(data: bytes, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    """The answer as a client of Python's understands it, and its body."""
    response = http.client.HTTPResponse(Received(data), method=method)  # type: ignore[arg-type]
    response.begin()
    return response, response.read()


# What is said


@causes
def test_each_cause_has_its_status(cause: Cause) -> None:
    response, body = parsed(answer("http", "GET", cause, ()))
    status = STATUSES.get(cause, 502)
    assert (response.status, response.reason, response.version) == (status, PHRASES[status], 11)
    assert int(response.headers["Content-Length"]) == len(body)
    assert response.headers["Connection"] == "close"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Retry-After"] == (str(RETRY_AFTER) if status == 503 else None)
    assert f"<h1>{status} {PHRASES[status]}</h1>" in body.decode()
    assert EXPLANATIONS[status] in body.decode()
    assert len(body) < 300


@causes
def test_each_cause_has_its_alert(cause: Cause) -> None:
    # RFC 8446: a record of type alert, fatal.
    assert answer("tls", "", cause, ()) == bytes((21, 3, 1, 0, 2, 2, ALERTS.get(cause, 80)))


@pytest.mark.parametrize("protocol", ["ssh", "http2", "silent", "unknown"])
def test_in_other_protocols_nothing_is_said(protocol: Protocol) -> None:
    page = ErrorPage(404, "/404", b"page")
    assert {answer(protocol, "", cause, [page]) for cause in get_args(Cause)} == {b""}


@causes
def test_the_answer_to_head_has_no_body_and_the_length_of_one(cause: Cause) -> None:
    status = STATUSES.get(cause, 502)
    for pages in ([], [ErrorPage(status, "/page", b"a page of our own")]):
        whole, data = answer("http", "GET", cause, pages), answer("http", "HEAD", cause, pages)
        assert data.endswith(b"\r\n\r\n")
        assert data.count(b"\r\n\r\n") == 1
        (length,) = re.findall(rb"Content-Length: (\d+)", data)
        assert int(length) == len(whole) - len(data) > 0
        assert parsed(data, "HEAD")[1] == b""


def test_the_date_is_that_of_now_in_english() -> None:
    date = parsed(answer("http", "GET", "no-route", ()))[0].headers["Date"]
    assert abs(parsedate_to_datetime(date).timestamp() - time.time()) < 60


@pytest.mark.parametrize("content", [b"", b"<p>busy</p>", bytes(range(256)), b"x" * (1 << 16)])
def test_a_page_of_the_operators_takes_the_place_of_ours_for_its_status_alone(content: bytes) -> None:
    pages = [ErrorPage(503, "/503", content), ErrorPage(404, "/404", b"nothing here")]
    response, body = parsed(answer("http", "GET", "queue-timeout", pages))
    assert (response.status, body) == (503, content)
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert parsed(answer("http", "GET", "no-route", pages))[1] == b"nothing here"
    assert EXPLANATIONS[502].encode() in parsed(answer("http", "GET", "backend-refused", pages))[1]


# How it is said


class Leaving:
    """A client that gets an answer, and a task that says it and closes. done: whether it has."""

    def __init__(self, loop: Loop, said: bytes, pair: Pair = tcp_pair) -> None:
        self.loop = loop
        self.peer, far = pair()
        own = socket.SocketType(far.family, far.type, 0, far.detach())
        own.setblocking(False)
        self.side = Side(loop, own)
        self.farewell = Farewell(said, "no-route", "")

    def __enter__(self) -> Leaving:
        return self

    def __exit__(self, *_: object) -> None:
        self.side.close()
        self.peer.close()

    def start(self) -> Task:
        async def leave() -> None:
            self.side.watch()
            await self.farewell.say(self.side)
            self.side.close()

        self.task = self.loop.spawn(leave())
        return self.task

    @property
    def done(self) -> bool:
        return self.task.done

    async def end(self) -> None:
        """Wait for it, without time passing on a FakeClock."""
        await until(self.loop, lambda: self.done)

    async def send(self, size: int) -> None:
        """Send so many bytes, as they are read."""
        self.peer.setblocking(False)
        while size:
            try:
                size -= self.peer.send(bytes(min(size, 1 << 14)))
            except BlockingIOError:
                pass
            await self.loop.yield_turn()
        self.peer.settimeout(20)


@pairs
def test_an_answer_is_followed_by_the_end_and_the_client_may_end_when_it_likes(pair: Pair) -> None:
    async def main(loop: Loop) -> None:
        with Leaving(loop, b"answer", pair) as client:
            client.start()
            assert receive_all(client.peer) == b"answer"
            await settle(loop)
            assert not client.done
            client.peer.close()
            await client.end()

    run(main, FakeClock())


@pairs
def test_a_client_that_had_ended_first_is_closed_as_soon_as_it_has_the_answer(pair: Pair) -> None:
    async def main(loop: Loop) -> None:
        with Leaving(loop, b"answer", pair) as client:
            client.peer.sendall(b"question")
            client.peer.shutdown(socket.SHUT_WR)
            client.start()
            await client.end()
            assert receive_all(client.peer) == b"answer"

    run(main, FakeClock())


def test_what_the_client_has_sent_and_nobody_has_read_does_not_destroy_the_answer() -> None:
    async def main(loop: Loop) -> None:
        with Leaving(loop, b"answer") as client:
            client.peer.sendall(b"x" * 40_000)
            client.start()
            client.peer.sendall(b"x" * 10_000)
            assert receive_all(client.peer) == b"answer"
            client.peer.shutdown(socket.SHUT_WR)
            await client.end()
            assert not is_reset(client.peer)

    run(main, FakeClock())


def test_a_client_that_does_not_close_is_closed_after_2_s() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with Leaving(loop, b"answer") as client:
            client.start()
            for _ in range(19):
                # However often it sends something.
                await client.send(1)
                clock.advance(0.1)
                await settle(loop)
            assert not client.done
            clock.advance(0.1)
            await client.end()

    run(main, clock)


def test_a_client_that_sends_on_and_on_is_closed_after_64_kib() -> None:
    async def main(loop: Loop) -> None:
        with Leaving(loop, b"answer") as client:
            client.start()
            await client.send(READ_MAX - 1)
            await until(loop, lambda: client.farewell._read == READ_MAX - 1)
            await settle(loop)
            assert not client.done
            assert client.peer.recv(100) == b"answer"
            await client.send(1)
            await client.end()

    run(main, FakeClock())


def test_no_more_than_64_kib_are_read_of_a_client_that_has_sent_more_already() -> None:
    async def main(loop: Loop) -> None:
        with Leaving(loop, b"answer") as client:
            assert fill(client.peer) > 2 * READ_MAX
            client.start()
            await client.end()
            assert client.farewell._read == READ_MAX
            assert receive_all(client.peer) == b"answer"
            with pytest.raises(BrokenPipeError):  # nobody reads it
                client.peer.send(b"more")

    run(main, FakeClock())


@pairs
def test_an_answer_larger_than_the_socket_has_room_for_is_sent_as_the_client_reads(pair: Pair) -> None:
    said = bytes(range(256)) * 4096 * 16  # 16 MiB

    async def main(loop: Loop) -> None:
        with Leaving(loop, said, pair) as client:
            client.start()
            await settle(loop)
            assert not client.done
            client.peer.setblocking(False)
            got = bytearray()
            while True:
                try:
                    data = client.peer.recv(1 << 20)
                except BlockingIOError:
                    await loop.yield_turn()
                    continue
                if not data:
                    break
                got += data
            assert got == said
            client.peer.close()
            await client.end()

    run(main, FakeClock())


@pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
def test_a_client_that_never_reads_is_given_up_after_10_s(pair: Pair) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with Leaving(loop, bytes(1 << 24), pair) as client:
            client.start()
            clock.advance(9.99)
            await settle(loop)
            assert not client.done
            assert not client.side.ended
            clock.advance(0.01)
            await client.end()

    run(main, clock)


def test_an_abort_ends_it_at_once() -> None:
    async def main(loop: Loop) -> None:
        with Leaving(loop, b"answer") as client:
            client.start()
            await settle(loop)
            reset(client.peer)
            await client.end()
        with Leaving(loop, b"answer") as client:
            reset(client.peer)
            client.start()
            await client.end()

    run(main, FakeClock())


# The next process


def test_the_next_process_says_the_rest_within_the_same_2_s() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with Leaving(loop, b"answer") as client:
            handed = client.farewell.hand_over()
            assert "deadline" not in handed, "its 2 s have not begun"
            client.farewell = resume(handed)
            client.start()
            await client.send(1000)
            await until(loop, lambda: client.farewell._read == 1000)
            clock.advance(1.5)
            await settle(loop)
            known = client.farewell.hand_over()
            assert (known["left"], known["read"]) == (b"", 1000)
            again = resume(known)
            assert (again.cause, again.reason) == ("no-route", "")
            client.task.interrupt()
            loop.unwatch(client.side)
            client.farewell = again
            client.start()
            clock.advance(0.4)
            await settle(loop)
            assert not client.done
            clock.advance(0.1)
            await client.end()
            assert receive_all(client.peer) == b"answer"

    run(main, clock)


def test_of_a_document_that_lacks_something_the_next_process_makes_the_best() -> None:
    farewell = resume({})
    assert (farewell.cause, farewell.reason, farewell.hand_over()["left"]) == ("error", "", b"")
