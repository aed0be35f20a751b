"""rspd/balancing/members.py: clients that are being dialled for when a reload takes out what they wait for."""

from __future__ import annotations

from rspd.engine.loop import Loop
from tests.dialled import Scene
from tests.support import Backend, answer, eventually, run


def test_who_waits_for_the_first_answer_to_a_name_is_connected_though_a_reload_takes_it_out_meanwhile() -> None:
    async def main(loop: Loop) -> None:
        with Backend(answer) as named, Backend(answer) as other:
            async with Scene(loop, f"localhost:{named.port}") as scene:
                client = scene.start()
                left = scene[f"localhost:{named.port}"]
                scene.apply(other.address)
                assert await scene.outcome(client) == left.name
                client.close()
                assert (left.state, left.open) == ("gone", 0)
                eventually(lambda: named.accepted == 1)

    run(main)
