"""rspd/routing/heads.py: clients that say what is not valid, that end, abort, or are given up."""

from __future__ import annotations

import re
import socket

import pytest

from rspd.engine.loop import Loop
from rspd.protocols.first import HEAD_MAX, LOOK_MAX, HeadError, Protocol
from rspd.routing.heads import NothingSaidError
from tests.dialled import settle
from tests.routing.clients import HTTP, REQUEST, WHOLE, Listener, Pair, hello, pairs, records, unix_pair, wholes
from tests.support import FakeClock, reset, run

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@pytest.mark.parametrize(
    ("data", "protocol", "text"),
    [
        (b"\x16\3\1\0\0", "tls", "expected a record with a handshake, found 16 03 01 00 00"),
        (b"\x16\3\1\0\4\2\0\0\0", "tls", "expected a ClientHello, found a handshake message of type 2"),
        (b"\r\n", "http", "expected `METHOD TARGET HTTP/1.1`, found an empty line or a blank"),
        (b"GET / HTTP/1.1\r\n\r\n", "http", "expected one Host, found none"),
    ],
)
def test_what_is_not_valid_in_its_protocol_is_told_at_once(data: bytes, protocol: str, text: str) -> None:
    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.start()
            client.peer.sendall(data)
            error = await client.result()
            assert isinstance(error, HeadError)
            assert (str(error), error.protocol, error.late) == (text, protocol, False)

    run(main, FakeClock())


def test_a_head_is_looked_at_up_to_a_bound() -> None:
    request = b"GET / HTTP/1.1\r\nHost: a.org\r\nX: " + b"x" * LOOK_MAX
    tiny = records(hello(size=HEAD_MAX)[5:], 10)

    async def main(loop: Loop) -> None:
        for data, protocol in ((request, "http"), (tiny, "tls")):
            with Listener(loop) as client:
                client.start()
                client.peer.sendall(data)
                error = await client.result()
                assert isinstance(error, HeadError)
                assert (error.protocol, error.late) == (protocol, False)
                assert re.search(
                    "^expected (the end of the head within 16384 bytes|a ClientHello in at most 200 records)",
                    str(error),
                )

    run(main, FakeClock())


# Ends


@pairs
@pytest.mark.parametrize("early", [True, False], ids=["there before", "there later"])
def test_an_end_before_the_first_byte_is_no_silence(pair: Pair, early: bool) -> None:
    async def main(loop: Loop) -> None:
        with Listener(loop, pair) as client:
            if not early:
                client.start()
                await settle(loop)
            client.peer.shutdown(socket.SHUT_WR)
            if early:
                client.start()
            assert isinstance(await client.result(), NothingSaidError)

    run(main, FakeClock())


@pairs
@wholes
@pytest.mark.parametrize("early", [True, False], ids=["there before", "there later"])
def test_an_end_within_a_head_is_an_error(pair: Pair, protocol: Protocol, early: bool) -> None:
    data = WHOLE[protocol][0][:6]

    async def main(loop: Loop) -> None:
        with Listener(loop, pair) as client:
            if not early:
                client.start()
            client.peer.sendall(data)
            await client.arrived(len(data))
            await settle(loop)
            assert client.outcome is None
            client.peer.shutdown(socket.SHUT_WR)
            if early:
                client.start()
            error = await client.result()
            assert isinstance(error, HeadError)
            text = f"expected a whole head, found the end of the stream after {len(data)} bytes: {data!r}"
            assert (str(error), error.protocol, error.late) == (text, protocol, False)

    run(main, FakeClock())


@pairs
@wholes
def test_a_whole_head_before_an_end_is_heard(pair: Pair, protocol: Protocol) -> None:
    data, said = WHOLE[protocol]

    async def main(loop: Loop) -> None:
        with Listener(loop, pair) as client:
            client.peer.sendall(data)
            client.peer.shutdown(socket.SHUT_WR)
            await client.arrived(len(data))
            client.start()
            assert await client.result() == said
            assert client.side.read(1000) == data

    run(main)


@pytest.mark.parametrize("data", [b"", b"\x16", REQUEST[:10]])
@pytest.mark.parametrize("waiting", [True, False])
def test_an_abort_is_told(data: bytes, waiting: bool) -> None:
    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            if waiting:
                client.start()
            client.peer.sendall(data)
            await client.arrived(len(data))
            await settle(loop)
            reset(client.peer)
            if not waiting:
                client.start()
            error = await client.result()
            # Of bytes before the abort, what the kernel still gives is half a head that ended.
            assert isinstance(error, ConnectionAbortedError) or (data and isinstance(error, HeadError))

    run(main)


def test_half_a_unix_client_that_goes_is_an_error_too() -> None:
    async def main(loop: Loop) -> None:
        with Listener(loop, unix_pair) as client:
            client.start()
            client.peer.sendall(b"GET")
            await settle(loop)
            client.peer.close()
            error = await client.result()
            assert isinstance(error, HeadError)
            assert error.protocol == "http"

    run(main)


# Crowded


@pytest.mark.parametrize("data", [b"", REQUEST[:10]])
def test_a_client_that_is_given_up_for_others_hears_so_before_the_deadline(data: bytes) -> None:
    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.start(loop.now + 5)
            client.peer.sendall(data)
            await client.arrived(len(data))
            await settle(loop)
            client.head.crowded = True
            client.task.wake()
            error = await client.result()
            assert isinstance(error, TimeoutError)
            assert error.strerror == "others came, and this client had not said all for longest"

    run(main, FakeClock())


def test_a_client_whose_head_has_come_meanwhile_is_not_given_up() -> None:
    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.peer.sendall(REQUEST)
            await client.arrived(len(REQUEST))
            client.head.crowded = True
            client.start(loop.now + 5)
            assert await client.result() == HTTP

    run(main, FakeClock())
