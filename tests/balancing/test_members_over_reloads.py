"""rspd/balancing/members.py: clients that are being dialled for when a reload takes out what they wait for."""

from __future__ import annotations

from rspd.balancing.members import Backends
from rspd.balancing.pool import Dialler
from rspd.config.addresses import parse_address
from rspd.engine.loop import Loop
from rspd.engine.side import Side
from rspd.net.descriptors import Shortage
from rspd.net.resolver import Resolver
from rspd.settings import BackendConfig, ProxyConfig
from tests.support import Backend, answer, eventually, run, tcp_pair


def test_who_waits_for_the_first_answer_to_a_name_is_connected_though_a_reload_takes_it_out_meanwhile() -> None:
    async def main(loop: Loop) -> None:
        with Backend(answer) as named, Backend(answer) as other:

            def config(where: str) -> ProxyConfig:
                return ProxyConfig((), (BackendConfig(parse_address(where)),))

            shortage = Shortage(loop)
            backends = Backends(loop, config(f"localhost:{named.port}"), Resolver(loop), shortage)
            dialler = Dialler(loop, backends, shortage)
            near, far = tcp_pair()
            client = Side(loop, near)

            async def dial() -> None:
                backend, side = await dialler.dial(client, ("127.0.0.1", 1))
                assert backend.name == f"localhost:{named.port}"
                side.close()
                backends.release(backend)
                dialled.append(backend.open)

            dialled: list[int] = []
            task = loop.spawn(dial())
            backends.apply(config(other.address))
            while not task.done:
                await loop.sleep(0.01)
            assert dialled == [0]
            eventually(lambda: named.accepted == 1)
            backends.stop()
            client.close()
            far.close()
            await loop.yield_turn()

    run(main)
