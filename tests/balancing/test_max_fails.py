"""`max_fails` and `fail_timeout`: of the proxy or of one backend, and off."""

from __future__ import annotations

import logging
from math import inf

import pytest

from rspd.engine.loop import Loop
from tests.dialled import Scene, configured, nobody, switches
from tests.support import FakeClock, run

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


def test_max_fails_and_fail_timeout_of_a_backend_take_the_place_of_the_proxy_s() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("---+") as (first, second, third, spare):
            backends = [
                configured(first.address),
                configured(second.address, max_fails=3, fail_timeout=30.0),
                configured(third.address, max_fails=inf),
                configured(spare.address, backup=True),
            ]
            async with Scene(loop, *backends, clock=clock, fail_timeout=5.0) as scene:
                for down in (1, 1, 2, 2, 2, 2):
                    # Each client tries all that are in service.
                    assert await scene.dial() == spare.address
                    assert sum(not backend.in_service for backend in scene.members) == down
                assert [backend.retry_at - clock.now for backend in scene.members] == [5.0, 30.0, inf, inf]
                assert not scene[third.address].failures

    run(main, clock)


def test_a_reload_to_max_fails_off_brings_back_who_is_down_by_failures_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        unwell, dead = nobody(), nobody()
        backends = [configured(unwell), configured(dead, max_connections=5)]
        async with Scene(loop, *backends, clock=clock) as scene:
            scene[unwell].found_unwell(clock.now, "status 503")  # as a check would say
            await scene.fail()
            assert not scene.pool.members.any_in_service
            scene.apply(*backends, max_fails=inf)
            assert [backend.state for backend in scene.members] == ["down", "up"]
            assert (await scene.fail())[0] == "backend-refused"
            assert [backend.state for backend in scene.members] == ["down", "up"]

    with caplog.at_level(logging.INFO, "rspd"):
        run(main, clock)
    assert len([record for record in caplog.records if record.getMessage().startswith("backend up")]) == 1


def test_clients_that_wait_for_a_backend_which_refuses_do_not_all_try_it_all_the_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("--") as (dead, other):
            backends = [configured(switch.address, max_fails=inf) for switch in (dead, other)]
            async with Scene(loop, *backends, clock=clock, queue_timeout=20.0) as scene:
                clients = await scene.come(*[""] * 20)
                caplog.clear()
                await scene.advance(5)
                assert 50 <= len([line for line in caplog.messages if line.startswith("backend not reached")]) <= 120
                other.on()
                await scene.advance(0.3)
                assert {client.outcome for client in clients} == {other.address}

    with caplog.at_level(logging.DEBUG, "rspd"):
        run(main, clock)


def test_clients_that_waited_in_vain_are_told_how_their_attempts_failed() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> set[tuple[str, str]]:
        dead = nobody()
        async with Scene(loop, configured(dead, max_fails=inf), clock=clock, queue_timeout=2.0) as scene:
            clients = await scene.come(*[""] * 9)
            await scene.advance(2.1)
            failures = [await scene.failure(client) for client in clients]
            return {(cause, reason.replace(dead, "dead")) for cause, reason in failures}

    assert run(main, clock) == {("queue-timeout", "dead: Connection refused")}


def test_after_a_reload_the_backend_that_is_due_first_is_tried_first() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("--+") as (slow, quick, spare):
            backends = [
                configured(slow.address, fail_timeout=100.0),
                configured(quick.address),
                configured(spare.address, backup=True),
            ]
            async with Scene(loop, *backends, clock=clock, fail_timeout=1000.0) as scene:
                assert await scene.dial() == spare.address
                scene.apply(*backends, fail_timeout=1.0)
                quick.on()
                await scene.advance(1.1)
                assert await scene.dial() == quick.address

    run(main, clock)
