"""rspd/routing/heads.py: what clients say first, over real sockets; nothing of it is taken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.engine.loop import Loop
from rspd.protocols.first import HEAD_MAX, LOOK_MAX, SILENT, UNKNOWN, HeadError, Protocol, Said
from rspd.protocols.http import PREFACE
from rspd.routing.heads import READERS, begun, read, readers_of
from tests.dialled import settle
from tests.routing.clients import ALL, HTTP, REQUEST, TLS, WHOLE, Listener, Pair, hello, pairs, records, wholes
from tests.support import FakeClock, run

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@pairs
@wholes
@pytest.mark.parametrize("early", [True, False], ids=["there before", "there later"])
def test_what_a_client_says_is_heard_and_stays_for_the_backend(pair: Pair, protocol: Protocol, early: bool) -> None:
    data, said = WHOLE[protocol]

    async def main(loop: Loop) -> None:
        with Listener(loop, pair) as client:
            if not early:
                client.start()
                await settle(loop)
                assert client.outcome is None
            client.peer.sendall(data + b"more")
            if early:
                await client.arrived(len(data) + 4)
                client.start()
            assert await client.result() == said
            await client.arrived(len(data) + 4)
            assert client.side.read(1000) == data + b"more"

    run(main)


@pairs
@wholes
def test_one_byte_at_a_time_is_heard_with_one_look_for_each(pair: Pair, protocol: Protocol) -> None:
    data, said = WHOLE[protocol]

    async def main(loop: Loop) -> None:
        with Listener(loop, pair) as client:
            client.start()
            sent = 0
            while not client.outcome:  # the line of SSH goes on where it says enough
                client.peer.sendall(data[sent : sent + 1])
                sent += 1
                await client.arrived(sent)
                await settle(loop)
            assert client.outcome == said
            assert client.side.looks <= sent + 1
            assert client.side.read(1000) == data[:sent]

    run(main)


@settings(max_examples=30)
@given(st.sampled_from(list(WHOLE)), st.data())
def test_a_head_that_is_cut_anywhere_says_the_same(protocol: Protocol, data: st.DataObject) -> None:
    stream, said = WHOLE[protocol]
    stream += b"more"
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=4).map(sorted))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.start()
            for part in parts:
                client.peer.sendall(part)
                await loop.yield_turn()
            assert await client.result() == said
            await client.arrived(len(stream))
            assert client.side.read(1000) == stream

    run(main)


@pairs
@pytest.mark.parametrize("size", [100, 1000, HEAD_MAX], ids=lambda size: f"records of {size}")
def test_a_hello_of_16_kib_is_heard_whatever_its_records_are(pair: Pair, size: int) -> None:
    data = records(hello(size=HEAD_MAX)[5:], size)
    assert len(data) <= LOOK_MAX

    async def main(loop: Loop) -> None:
        with Listener(loop, pair) as client:
            client.start()
            for place in range(0, len(data), 1000):
                client.peer.sendall(data[place : place + 1000])
                await settle(loop)
            assert await client.result() == TLS
            assert client.side.read(1 << 16) == data

    run(main)


def test_nobody_looks_again_before_more_comes() -> None:
    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.start()
            client.peer.sendall(REQUEST[:-1])
            await client.arrived(len(REQUEST) - 1)
            await settle(loop)
            looks = client.side.looks
            for _ in range(100):
                await loop.yield_turn()
            assert client.side.looks == looks
            client.peer.sendall(REQUEST[-1:])
            assert await client.result() == HTTP

    run(main)


# Deadlines


def test_who_has_said_nothing_by_the_deadline_is_silent() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.start(loop.now + 5)
            clock.advance(4.99)
            await settle(loop)
            assert client.outcome is None
            clock.advance(0.01)
            assert await client.result() == SILENT

    run(main, clock)


@pytest.mark.parametrize(
    ("data", "protocol"),
    [
        (b"\x16", "tls"),
        (hello()[:-1], "tls"),
        (REQUEST[:-1], "http"),
        (b"POST", "http"),
        (PREFACE[:-1], "http2"),
        (b"SSH-2.", "ssh"),
    ],
)
def test_half_a_head_at_the_deadline_is_late_even_if_bytes_kept_coming(data: bytes, protocol: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.start(loop.now + 5)
            for place in range(len(data)):
                client.peer.sendall(data[place : place + 1])
                await client.arrived(place + 1)
                clock.advance(4.9 / len(data))
                await settle(loop)
            assert client.outcome is None
            clock.advance(0.2)
            error = await client.result()
            assert isinstance(error, HeadError)
            assert (error.protocol, error.late) == (protocol, True)
            assert str(error) == f"expected a whole head in time, found {len(data)} bytes: {data[:16]!r}"

    run(main, clock)


def test_a_head_that_is_there_at_the_deadline_is_in_time() -> None:
    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.peer.sendall(REQUEST)
            await client.arrived(len(REQUEST))
            client.start(loop.now)
            assert await client.result() == HTTP

    run(main)


@pytest.mark.parametrize("data", [b"\0", b"\x80\x2e\1", b"EHLO a.org\r\n", b"QUIT\n", b"SSH-3.0-x\r\n", b"\xff\xfb\1"])
def test_bytes_that_nobody_knows_are_unknown_at_once(data: bytes) -> None:
    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.start()
            client.peer.sendall(data)
            assert await client.result() is UNKNOWN

    run(main, FakeClock())


@wholes
def test_bytes_of_a_protocol_that_no_route_asks_for_are_unknown_at_the_first_one(protocol: Protocol) -> None:
    data, _ = WHOLE[protocol]

    async def main(loop: Loop) -> None:
        for protocols in (ALL - {protocol, "http"}, frozenset({"silent"}), frozenset()):
            with Listener(loop, protocols=protocols) as client:
                client.start()
                # The words of SSH and of HTTP/2 begin as a request may begin.
                client.peer.sendall(data[:1])
                assert await client.result() is UNKNOWN

    run(main, FakeClock())


@wholes
def test_no_reader_runs_that_no_route_asks_for(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: bytes) -> Said | None:
        raise AssertionError("nobody asked for it")

    data, said = WHOLE[protocol]
    own = READERS[protocol]
    for other in READERS:
        monkeypatch.setitem(READERS, other, own if other == protocol else nobody)
    readers = readers_of({protocol})
    assert read(data, readers) == said
    assert read(data[:2], readers) is None
    assert read(b"\0", readers) is UNKNOWN
    assert [begun(some, readers) for some in (data[:2], b"\0")] == [protocol, "unknown"]
