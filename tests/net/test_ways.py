"""Which connections are this process itself, and what they have passed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from rspd.config.addresses import parse_address
from rspd.engine.loop import Loop
from rspd.net.address import SocketAddress
from rspd.net.listener import Listener, adopt_listener
from rspd.net.ways import GONE_FOR, LoopError, Way, Ways
from tests.manager import tcp_listener
from tests.support import FakeClock, run

V4 = socket.AF_INET


@pytest.fixture
def listener() -> Iterator[Listener]:
    with tcp_listener() as sock:
        listener = adopt_listener("web", sock.dup())
        yield listener
        listener.close()


def test_a_connection_is_known_by_both_ends_until_it_is_accepted(listener: Listener) -> None:
    async def main(loop: Loop) -> None:
        ways = Ways(loop)
        ways.listen({"web": [listener]}, ())
        (here,) = listener.reached_at
        near, elsewhere = ("127.0.0.1", 4000), ("192.0.2.1", here[1])
        mail, other = Way(ways, ("mail",)), Way(ways, ("imap",))
        assert mail.check(SocketAddress(V4, here))
        assert other.check(SocketAddress(V4, elsewhere)), "it has the port, and the host may be this one"
        mail.begin(near)
        other.begin(near)
        assert ways.knows(near)
        assert ways.take(near, ("127.0.0.2", here[1])) == ()
        assert ways.take(near, here) == ("mail",)
        assert ways.take(near, here) == (), "a client that has the port later is another"
        mail.end()
        other.end()

    run(main)


def test_a_connection_that_is_closed_before_it_is_accepted_is_known_for_a_moment(listener: Listener) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        ways = Ways(loop)
        ways.listen({"web": [listener]}, ())
        (here,) = listener.reached_at
        for number in range(1000):
            way = Way(ways, ("mail",))
            way.check(SocketAddress(V4, here))
            way.begin(("127.0.0.1", 10_000 + number))
            way.end()
            way.end()
        assert ways.take(("127.0.0.1", 10_999), here) is None
        assert ways.take(("127.0.0.1", 10_999), here) == () if ways.knows(("127.0.0.1", 10_999)) else True
        clock.advance(GONE_FOR)
        await loop.yield_turn()
        way.begin(("127.0.0.1", 9_000))
        way.end()
        assert [port for port in range(9_000, 11_000) if ways.knows(("127.0.0.1", port))] == [9_000]

    run(main, clock)


@pytest.mark.parametrize(
    ("host", "target", "there"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.2", True),
        ("0.0.0.0", "192.0.2.1", False),
        ("::", "127.0.0.2", True),
        ("::", "::1", True),
        ("::", "::", True),
        ("::1", "::", True),
        ("::1", "127.0.0.1", False),
    ],
)
def test_what_leads_to_a_listener_for_sure_is_refused_before_connecting(host: str, target: str, there: bool) -> None:
    async def main(loop: Loop) -> None:
        with ExitStack() as stack:
            try:
                sock = stack.enter_context(tcp_listener(host))
            except OSError:
                pytest.skip("kernel: no IPv6")
            listener = adopt_listener("web", sock.dup())
            stack.callback(listener.close)
            ways = Ways(loop)
            ways.listen({"web": [listener]}, ())
            family = socket.AF_INET6 if ":" in target else V4
            where = SocketAddress(family, (target, sock.getsockname()[1]))
            if there:
                with pytest.raises(LoopError, match="it is this proxy itself"):
                    Way(ways, ("web",)).check(where)
                with pytest.raises(LoopError, match=r"it leads back to proxy web \(web, mail, web\)"):
                    Way(ways, ("web", "mail")).check(where)
            else:
                Way(ways, ("web",)).check(where)
            Way(ways, ("mail",)).check(where)

    run(main)


def test_only_ports_and_paths_that_are_listened_on_may_lead_back(listener: Listener) -> None:
    async def main(loop: Loop) -> None:
        ways = Ways(loop)
        port = listener.reached_at[0][1]
        own, name = parse_address(listener.name), parse_address(f"example.org:{port}")
        others = [parse_address(f"192.0.2.1:{port - 1}"), parse_address("/run/none"), parse_address("@none")]
        assert not ways.may_return(own)
        ways.listen({"web": [listener]}, others)
        assert not ways.needed
        assert [ways.may_return(address) for address in (own, name, *others)] == [True, True, False, False, False]
        ways.listen({"web": [listener]}, [*others, name])
        assert ways.needed

    run(main)
