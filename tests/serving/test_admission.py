"""rspd/serving/admission.py and openings.py: what comes before a relay; none of it where nobody asks for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from rspd.engine.loop import Loop
from rspd.engine.side import Side
from rspd.net.descriptors import Shortage
from rspd.net.networks import parse_network
from rspd.net.resolver import Resolver
from rspd.net.ways import Ways
from rspd.routing.openings import ProxyHeader, openings
from rspd.routing.pools import PoolMaker, Pools
from rspd.routing.router import Router
from rspd.serving.access import Access, Refusals
from rspd.serving.admission import steps
from rspd.settings import ProxyConfig
from tests.dialled import Scene
from tests.support import FakeClock, run, tcp_pair

ONE = (parse_network("192.0.2.1"),)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, []),
        ({"idle_timeout": 1.0, "send_proxy": "v2"}, []),
        ({"deny": ONE}, ["admit"]),
        ({"allow": ONE, "max_connections_per_client": 2}, ["admit"]),
        ({"accept_proxy": ONE}, ["hear_peer", "admit"]),
        ({"accept_proxy": ONE, "deny": ONE}, ["hear_peer", "admit"]),
    ],
)
@pytest.mark.parametrize("might_return", [False, True])
def test_a_proxy_has_the_steps_that_its_keys_need_and_no_other(
    keys: dict[str, Any], names: list[str], might_return: bool
) -> None:
    config = ProxyConfig((), (), **keys)
    access = Access(config.allow, config.deny, config.max_connections_per_client)
    with Loop() as loop:
        ways = Ways(loop)
        ways.needed = might_return
        shortage = Shortage(loop)
        maker = PoolMaker(loop, shortage, Resolver(loop), ways)
        router = Router(Pools(partial(maker.make, print, print)), {}, "")
        taken = steps(config, ways, access, Refusals(loop, ""), router)
        found = [getattr(step, "func", step).__name__ for step in taken]
    assert found == ["find_way"] * might_return + names


def test_plain_tcp_has_no_opening() -> None:
    assert openings(ProxyConfig((), ())) == ()


def test_a_backend_that_does_not_take_the_header_is_given_up_at_the_deadline() -> None:
    clock = FakeClock()
    outcome: list[str] = []

    async def main(loop: Loop) -> None:
        near, far = tcp_pair()
        near.setblocking(False)
        async with Scene(loop, "127.0.0.1:1", clock=clock) as scene:
            client = scene.client("192.0.2.1")

            async def tell() -> None:
                backend = Side(loop, near)
                backend.watch()
                while backend.write(bytes(100_000)):
                    pass
                with pytest.raises(TimeoutError) as caught:
                    await ProxyHeader("v2").open(backend, client, loop.now + 4.0)
                outcome.append(str(caught.value))
                backend.close()

            loop.spawn(tell())
            await scene.advance(3.9)
            assert not outcome
            await scene.advance(0.2)
            far.close()

    run(main, clock)
    assert outcome == ["the PROXY header was not taken within the connect timeout"]
