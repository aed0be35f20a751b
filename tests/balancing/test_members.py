"""rspd/balancing/members.py: who the backends are, how each is, and which is next."""

from __future__ import annotations

import logging
import re
from collections import Counter
from math import inf

import pytest

from rspd.balancing.attempts import DialError
from rspd.balancing.wording import REASONS_MAX, describe
from rspd.engine.loop import Loop
from rspd.settings import BALANCES, HealthConfig
from tests.dialled import Scene, configured, full_unix, nobody, switches, unix_listener, where
from tests.support import FakeClock, reset, run, tasks_of

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


HEALTH = HealthConfig(interval=1.0, timeout=0.5, rise=2, fall=2)

CLIENTS = [f"192.0.2.{number}" for number in range(40)]


def changes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of backends."""
    lines = [record.getMessage() for record in caplog.records if record.name == "rspd.balancing.members"]
    return [re.sub(r"@\w+", "@", line) for line in lines]


# Out of service


@pytest.mark.parametrize(("pause", "down_after"), [(0.0, 3), (4.9, 3), (5.1, None)])
def test_a_backend_is_down_when_connecting_failed_max_fails_times_within_fail_timeout(
    pause: float, down_after: int | None
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> int | None:
        with switches("-+") as (off, on):
            backends = [configured(off.address), configured(on.address, backup=True)]
            async with Scene(loop, *backends, clock=clock, max_fails=3, fail_timeout=10.0) as scene:
                for number in range(1, 7):
                    assert await scene.dial() == on.address
                    if not scene[off.address].in_service:
                        return number
                    await scene.advance(pause)
                return None

    assert run(main, clock) == down_after


def test_a_backend_that_failed_is_out_for_fail_timeout_and_then_one_connection_tries_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-+") as (first, spare):
            backends = [configured(first.address), configured(spare.address, backup=True)]
            async with Scene(loop, *backends, clock=clock, name="web", fail_timeout=10.0) as scene:
                assert await scene.dial() == spare.address
                first.on()
                await scene.advance(9.9)
                assert await scene.dial() == spare.address
                await scene.advance(0.2)
                assert [await scene.dial() for _ in range(2)] == [first.address] * 2
                # Down again, and its trial fails: out for as long again.
                first.off()
                assert await scene.dial() == spare.address
                await scene.advance(10.1)
                assert await scene.dial() == spare.address
                first.on()
                await scene.advance(9.9)
                assert await scene.dial() == spare.address
                await scene.advance(0.2)
                assert await scene.dial() == first.address

    with caplog.at_level(logging.INFO, "rspd"):
        run(main, clock)
    assert changes(caplog) == [
        'backend down proxy=web backend=@ reason="Connection refused"',
        "backend up proxy=web backend=@ seconds=10.100",
        'backend down proxy=web backend=@ reason="Connection refused"',
        "backend up proxy=web backend=@ seconds=20.200",
    ]


def test_while_one_connection_tries_a_backend_the_others_go_elsewhere() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with full_unix() as (listener, full), unix_listener() as (_, live):
            async with Scene(loop, full, live, clock=clock, connect_timeout=6.0, fail_timeout=20.0) as scene:
                for _ in range(2):
                    scene.start()
                await scene.advance(3.1)
                assert {client.outcome for client in scene.clients} == {live}
                assert not scene[full].in_service
                await scene.advance(20)
                trial, *others = [scene.start() for _ in range(5)]
                await scene.settle()
                assert [client.outcome for client in others] == [live] * 4
                assert (trial.outcome, scene[full].open) == (None, 1)
                listener.accept()[0].close()
                await scene.advance(0.2)
                assert (trial.outcome, scene[full].in_service) == (full, True)

    run(main, clock)


@pytest.mark.parametrize("how", ["aborted", "cancelled"])
def test_a_trial_that_came_to_no_verdict_is_the_next_client_s(how: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with full_unix() as (listener, full), unix_listener() as (_, live):
            backends = [configured(full), configured(live, backup=True)]
            async with Scene(loop, *backends, clock=clock, connect_timeout=6.0, fail_timeout=20.0) as scene:
                scene.start()
                await scene.advance(24)
                trial, other = await scene.come("", "")
                assert (trial.outcome, other.outcome) == (None, live)
                if how == "aborted":
                    reset(trial.peer)
                elif trial.task:
                    trial.task.cancel()
                await scene.advance(0.1)
                assert scene[full].open == 0
                listener.accept()[0].close()
                assert await scene.dial() == full
                assert scene[full].in_service

    run(main, clock)


def test_a_client_that_aborts_makes_no_trial_of_what_another_has_found_out_meanwhile() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with full_unix() as (_, full), unix_listener() as (_, live):
            backends = [configured(full), configured(live, backup=True)]
            async with Scene(loop, *backends, clock=clock, connect_timeout=6.0, fail_timeout=20.0) as scene:
                scene.start()
                await scene.advance(1)
                late = scene.start()
                await scene.advance(2.1)
                assert not scene[full].in_service
                reset(late.peer)
                await scene.advance(0.1)
                assert isinstance(late.outcome, DialError)
                assert await scene.dial() == live

    run(main, clock)


def test_a_backend_that_nobody_may_try_or_that_nobody_needs_is_not_looked_for_by_each_client() -> None:
    """While a trial is due, a client is led by way of all backends."""
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-+-") as (first, second, spare):
            backends = [configured(first.address), configured(second.address), configured(spare.address, backup=True)]
            async with Scene(loop, *backends, clock=clock, fail_timeout=10.0) as scene:
                assert {await scene.dial() for _ in range(2)} == {second.address}
                second.off()
                assert await scene.fail()
                assert not any(backend.in_service for backend in scene.members)
                second.on()
                await scene.advance(10.1)
                # The spare is due as well; it is left alone as long as another is up.
                spare.on()
                assert {await scene.dial() for _ in range(3)} == {second.address}
                assert scene.pool.members.next_trial > clock.now

    run(main, clock)


# Last resort


def test_while_none_is_up_those_that_failed_are_tried_by_each_client_the_spares_last() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("---") as (first, second, spare):
            backends = [configured(first.address), configured(second.address), configured(spare.address, backup=True)]
            async with Scene(loop, *backends, clock=clock) as scene:
                for _ in range(3):
                    cause, reasons = await scene.fail()
                    assert cause == "backend-refused"
                    tried = [reason.partition(": ")[0] for reason in reasons.split("; ")]
                    assert tried in ([first.address, second.address, spare.address],) or tried in (
                        [second.address, first.address, spare.address],
                    )
                spare.on()
                assert await scene.dial() == spare.address
                second.on()
                spare.off()
                assert await scene.dial() == second.address

    run(main, clock)


def test_with_a_single_backend_a_client_always_tries_it() -> None:
    async def main(loop: Loop) -> None:
        with switches("-") as (only,):
            async with Scene(loop, only.address) as scene:
                for _ in range(3):
                    assert await scene.fail() == ("backend-refused", f"{only.address}: Connection refused")
                assert describe(scene.pool.members.everyone) == f"backend {only.address} down: Connection refused"
                only.on()
                assert await scene.dial() == only.address
                assert describe(scene.pool.members.everyone) == f"backend {only.address}"

    run(main)


@pytest.mark.parametrize("event", ["down", "up", "comes", "goes"])
def test_who_shows_the_backends_hears_when_one_goes_down_or_comes_up_or_is_configured_or_is_not(event: str) -> None:
    async def main(loop: Loop) -> None:
        with switches("++") as (one, two):
            async with Scene(loop, one.address) as scene:
                if event == "goes":
                    scene.apply(one.address, two.address)
                if event in ("up", "goes"):
                    scene[one.address].failed(loop.now, "Connection refused")
                before, text = scene.changes, describe(scene.pool.members.everyone)
                if event == "down":
                    scene[one.address].failed(loop.now, "Connection refused")
                elif event == "up":
                    scene[one.address].found_well()
                else:
                    scene.apply(*[one.address] * (event == "comes"), two.address)
                assert scene.changes > before
                assert describe(scene.pool.members.everyone) != text

    run(main)


def test_failures_are_not_collected_while_a_backend_is_out_anyway() -> None:
    async def main(loop: Loop) -> None:
        with switches("-") as (only,):
            async with Scene(loop, only.address, max_fails=3, fail_timeout=3600.0) as scene:
                for _ in range(50):
                    await scene.fail()
                assert len(scene[only.address].failures) == 3

    run(main)


def test_of_many_that_are_down_a_client_tries_ten_and_the_next_client_the_others() -> None:
    async def main(loop: Loop) -> None:
        with switches("-" * 15) as fifteen:
            async with Scene(loop, *[switch.address for switch in fifteen]) as scene:
                await scene.fail()
                assert not scene.pool.members.any_in_service
                first, second, third = [
                    [reason.partition(": ")[0] for reason in (await scene.fail())[1].split("; ")] for _ in range(3)
                ]
                assert [len(set(tried)) for tried in (first, second, third)] == [10, 10, 10]
                assert len({*first, *second}) == 15
                assert len({*second, *third}) == 15

    run(main)


@pytest.mark.parametrize(("count", "more"), [(2, ""), (3, ""), (4, "; and 1 more"), (15, "; and 12 more")])
def test_of_many_that_are_down_three_are_named(count: int, more: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-" * count) as switched:
            addresses = [switch.address for switch in switched]
            async with Scene(loop, *addresses, clock=clock, health=HEALTH) as scene:
                await scene.advance(0.1)
                down = "; ".join(f"{address} down: Connection refused" for address in addresses[:3])
                assert describe(scene.pool.members.everyone) == f"0 of {count} backends up ({down}{more})"
                is_down = down.replace(" down: ", " is down: ")
                assert await scene.fail() == ("backend-down", f"{is_down}{more}")

    run(main, clock)


# Limits and spares


def test_a_backend_gets_no_more_connections_at_once_than_it_may_have() -> None:
    async def main(loop: Loop) -> None:
        with switches("++") as (small, large):
            async with Scene(loop, configured(small.address, max_connections=2), large.address) as scene:
                clients = await scene.come(*[""] * 9)
                assert Counter(client.outcome for client in clients) == {small.address: 2, large.address: 7}
                for client in clients:
                    if client.outcome == small.address:
                        client.close()
                clients = await scene.come(*[""] * 4)
                assert Counter(client.outcome for client in clients) == {small.address: 2, large.address: 2}

    run(main)


def test_a_full_backend_that_failed_is_not_tried_before_one_of_its_connections_ends() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+") as (only,):
            backend = configured(only.address, max_connections=2)
            async with Scene(loop, backend, clock=clock, fail_timeout=5.0, connect_timeout=1.0) as scene:
                held = scene.start()
                only.off()
                assert (await scene.fail())[0] == "backend-refused"
                scene.apply(configured(only.address, max_connections=1))
                only.on()
                waiting = scene.start()
                await scene.advance(0.5)
                assert (waiting.outcome, scene[only.address].open) == (None, 1)
                held.close()
                await scene.advance(0.2)
                assert waiting.outcome == only.address

    run(main, clock)


def test_spares_get_connections_only_while_no_other_is_up() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+++") as (one, two, spare):
            backends = [configured(one.address), configured(spare.address, backup=True), configured(two.address)]
            async with Scene(loop, *backends, clock=clock, fail_timeout=10.0) as scene:
                assert {await scene.dial() for _ in range(6)} == {one.address, two.address}
                one.off()
                assert {await scene.dial() for _ in range(6)} == {two.address}
                two.off()
                assert {await scene.dial() for _ in range(6)} == {spare.address}
                down = "; ".join(f"{switch.address} down: Connection refused" for switch in (one, two))
                assert describe(scene.pool.members.everyone) == f"1 of 3 backends up ({down})"
                one.on()
                await scene.advance(10.1)
                assert {await scene.dial() for _ in range(6)} == {one.address}

    run(main, clock)


def test_spares_get_nothing_while_the_others_are_merely_full() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("++") as (one, spare):
            backends = [configured(one.address, max_connections=1), configured(spare.address, backup=True)]
            async with Scene(loop, *backends, clock=clock, connect_timeout=2.0) as scene:
                first = scene.start()
                second = scene.start()
                await scene.settle()
                assert (first.outcome, second.outcome) == (one.address, None)
                first.close()
                assert await scene.outcome(second) == one.address

    run(main, clock)


# Another configuration


def test_backends_that_stay_over_a_reload_keep_their_state_and_take_on_the_rest() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+-+") as (one, dead, comes):
            async with Scene(loop, one.address, dead.address, clock=clock, fail_timeout=10.0) as scene:
                clients = await scene.come(*[""] * 4)
                members = scene[one.address], scene[dead.address]
                assert (members[0].open, members[1].in_service) == (4, False)
                scene.apply(configured(one.address, weight=3, max_connections=4), dead.address, comes.address)
                assert (scene[one.address], scene[dead.address]) == members
                assert (members[0].open, members[0].weight, members[1].in_service) == (4, 3, False)
                # It is full by the new limit.
                assert {await scene.dial() for _ in range(3)} == {comes.address}
                for client in clients:
                    client.close()
                found = Counter([await scene.dial() for _ in range(40)])
                assert found == {one.address: pytest.approx(30, abs=1), comes.address: pytest.approx(10, abs=1)}
                scene.apply(configured(one.address, backup=True), dead.address, comes.address)
                assert {await scene.dial() for _ in range(4)} == {comes.address}
                scene.apply(one.address, dead.address, configured(comes.address, backup=True))
                assert {await scene.dial() for _ in range(4)} == {one.address}

    run(main, clock)


@pytest.mark.parametrize("balance", BALANCES)
def test_a_backend_that_leaves_gets_nothing_more_and_its_connections_end_later(balance: str) -> None:
    async def main(loop: Loop) -> None:
        with switches("+++") as (one, two, three):
            async with Scene(loop, one.address, two.address, balance=balance) as scene:
                clients = await scene.come(*CLIENTS[:20])
                leaving = scene[one.address]
                assert leaving.open
                scene.apply(configured(two.address), three.address)
                clients += (others := await scene.come(*CLIENTS))
                assert {client.outcome for client in others} == {two.address, three.address}
                for client in clients:
                    client.close()
                assert leaving.open == 0
                # Who comes back begins anew.
                scene.apply(one.address)
                assert scene[one.address] is not leaving
                assert await scene.dial() == one.address
                assert leaving.open == 0

    run(main)


@pytest.mark.parametrize("before", BALANCES)
@pytest.mark.parametrize("after", BALANCES)
def test_the_balance_may_change_while_connections_are_open(before: str, after: str) -> None:
    async def main(loop: Loop) -> None:
        with switches("++-") as (one, two, dead):
            addresses = [one.address, two.address, dead.address]
            async with Scene(loop, *addresses, balance=before) as scene:
                clients = await scene.come(*CLIENTS[:20])
                scene.apply(*addresses, balance=after)
                clients += await scene.come(*CLIENTS[20:])
                assert {client.outcome for client in clients} == {one.address, two.address}
                if after == "least-connections":
                    assert abs(scene[one.address].open - scene[two.address].open) <= 1
                for client in clients:
                    client.close()
                assert [scene[address].open for address in addresses] == [0, 0, 0]

    run(main)


def test_the_log_says_what_is_taken_out_and_how_many_connections_it_has(caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop) -> list[str]:
        with switches("+++") as switched:
            one, two, three = [switch.address for switch in switched]
            async with Scene(loop, one, two, three, name="web") as scene:
                await scene.come(*[""] * 4)
                scene.apply(three)
                return [one, two]

    with caplog.at_level(logging.INFO, "rspd.balancing.members"):
        one, two = run(main)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, f"backend taken out proxy=web backend={one} connections=2"),
        (logging.INFO, f"backend taken out proxy=web backend={two} connections=1"),
    ]


def test_a_shorter_fail_timeout_holds_for_backends_that_are_out_already() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-+") as (first, spare):
            backends = [configured(first.address), configured(spare.address, backup=True)]
            async with Scene(loop, *backends, clock=clock, fail_timeout=3600.0) as scene:
                assert await scene.dial() == spare.address
                scene.apply(*backends, fail_timeout=2.0)
                first.on()
                assert await scene.dial() == spare.address
                await scene.advance(2.1)
                assert await scene.dial() == first.address

    run(main, clock)


def test_a_reload_that_has_nothing_to_do_with_a_backend_does_not_bring_it_back() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-+") as (first, spare):
            backends = [configured(first.address), configured(spare.address, backup=True)]
            async with Scene(loop, *backends, clock=clock) as scene:
                assert await scene.dial() == spare.address
                for send_proxy in ("v1", "v2", ""):
                    scene.apply(*backends, send_proxy=send_proxy)
                    assert not scene[first.address].in_service

    run(main, clock)


def test_a_backend_that_leaves_while_it_is_dialled_is_no_loss_whatever_comes_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with full_unix() as (one_listener, one), full_unix() as (_, two), unix_listener() as (_, live):
            async with Scene(loop, one, two, clock=clock, connect_timeout=6.0) as scene:
                clients = [scene.start() for _ in range(4)]
                old = scene[one], scene[two]
                await scene.advance(0.5)
                scene.apply(live)
                for _ in range(2):
                    one_listener.accept()[0].close()
                    await scene.advance(0.2)
                await scene.advance(6.0)
                assert Counter(client.outcome for client in clients) == {one: 2, live: 2}
                assert [backend.open for backend in old] == [2, 0]
                assert scene.pool.members.next_trial > 1e9
                for client in clients:
                    client.close()
                assert [backend.open for backend in old] == [0, 0]

    run(main, clock)
    assert changes(caplog) == []


# Going down


def test_who_wants_to_know_hears_once_that_a_backend_goes_down() -> None:
    async def main(loop: Loop) -> None:
        with switches("-+") as (first, spare):
            backends = [configured(first.address), configured(spare.address, backup=True)]
            async with Scene(loop, *backends) as scene:
                for _ in range(3):
                    await scene.dial()
                assert scene.down == [first.address]
                spare.off()
                for _ in range(3):
                    await scene.fail()
                assert scene.down == [first.address, spare.address]

    run(main)


# Health


def test_checks_take_a_backend_out_and_bring_it_back_and_each_change_is_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("++") as (one, two):
            async with Scene(loop, one.address, two.address, clock=clock, health=HEALTH) as scene:
                await scene.advance(3)
                one.off()
                await scene.advance(3)
                assert scene.down == [one.address]
                assert {await scene.dial() for _ in range(4)} == {two.address}
                one.on()
                await scene.advance(3)
                assert {await scene.dial() for _ in range(4)} == {one.address, two.address}

    with caplog.at_level(logging.INFO, "rspd"):
        run(main, clock)
    down, up = changes(caplog)
    assert down == 'backend down backend=@ reason="Connection refused"'
    assert up.startswith("backend up backend=@ seconds=3.")


def test_a_backend_that_is_not_well_is_no_last_resort_and_nobody_tries_it() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-") as (only,):
            async with Scene(loop, only.address, clock=clock, health=HEALTH, fail_timeout=1.0) as scene:
                await scene.advance(0.1)
                only.on()
                why = f"{only.address} is down: Connection refused"
                assert await scene.fail() == ("backend-down", why)
                await scene.advance(2.1)
                assert await scene.dial() == only.address
                # It fails for a client before a check has found out; then checks find out, too.
                only.off()
                assert (await scene.fail())[0] == "backend-refused"
                await scene.advance(3)
                only.on()
                assert await scene.fail() == ("backend-down", why)
                assert scene.pool.members.next_trial > clock.now
                await scene.advance(2.1)
                assert await scene.dial() == only.address

    run(main, clock)


def test_a_good_check_after_bad_ones_ends_the_time_out_too() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("++") as (one, two):
            backends = [configured(one.address), configured(two.address, backup=True)]
            async with Scene(loop, *backends, clock=clock, health=HEALTH, fail_timeout=600.0) as scene:
                await scene.advance(0.1)
                one.off()
                assert await scene.dial() == two.address
                await scene.advance(3)
                one.on()
                await scene.advance(3)
                assert await scene.dial() == one.address
                assert scene.down == [one.address]

    run(main, clock)


def test_with_checks_who_wants_to_know_hears_when_they_say_down_though_it_is_out_already() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("++") as (one, two):
            backends = [configured(one.address), configured(two.address, backup=True)]
            async with Scene(loop, *backends, clock=clock, health=HEALTH, fail_timeout=600.0) as scene:
                await scene.advance(0.1)
                one.off()
                assert await scene.dial() == two.address
                assert (scene[one.address].in_service, scene[one.address].unwell, scene.down) == (False, False, [])
                await scene.advance(3)
                assert (scene[one.address].unwell, scene.down) == (True, [one.address])
                await scene.advance(9)
                assert scene.down == [one.address]

    run(main, clock)


def test_checks_bring_back_what_a_client_put_out_though_they_never_said_down(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("++") as (one, two):
            backends = [configured(one.address), configured(two.address, backup=True)]
            health = HEALTH._replace(rise=3)
            async with Scene(loop, *backends, clock=clock, health=health, fail_timeout=600.0) as scene:
                for _ in range(2):
                    await scene.advance(5.1)
                    one.off()
                    assert await scene.dial() == two.address
                    one.on()
                    await scene.advance(1.9)
                    assert not scene[one.address].in_service
                    await scene.advance(1.2)
                    assert await scene.dial() == one.address
                assert scene.down == []

    with caplog.at_level(logging.INFO, "rspd"):
        run(main, clock)
    assert [line.partition(" backend=")[0] for line in changes(caplog)] == ["backend down", "backend up"] * 2


def test_checks_that_are_configured_or_changed_or_taken_away_by_a_reload_are_so_at_once() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+-") as (one, dead):
            async with Scene(loop, one.address, dead.address, clock=clock) as scene:
                scene.apply(one.address, dead.address, health=HEALTH)
                await scene.advance(0.1)
                assert (scene[one.address].in_service, scene[dead.address].in_service) == (True, False)
                checker = scene[one.address].checker
                scene.apply(one.address, dead.address)
                assert scene[one.address].checker is checker
                scene.apply(one.address, dead.address, health=HEALTH._replace(fall=1))
                assert scene[one.address].checker not in (checker, None)
                assert not scene[dead.address].in_service
                tasks = tasks_of(loop)
                scene.apply(one.address, dead.address, health=None)
                assert scene[dead.address].in_service
                await scene.settle()
                assert tasks_of(loop) < tasks
                assert scene[one.address].checker is None

    run(main, clock)


def test_a_backend_that_comes_by_a_reload_is_checked_at_once_and_one_that_leaves_no_more() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+-") as (one, dead):
            async with Scene(loop, one.address, clock=clock, health=HEALTH) as scene:
                await scene.advance(0.1)
                scene.apply(one.address, dead.address)
                await scene.advance(0.1)
                assert not scene[dead.address].in_service
                tasks = tasks_of(loop)
                scene.apply(one.address)
                await scene.settle()
                assert tasks_of(loop) == tasks - 1
                await scene.advance(5)
                assert scene.down == [dead.address]

    run(main, clock)


def test_once_stopped_nobody_is_checked_again_whatever_is_learned_of_a_name() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            async with Scene(loop, "name:80", names={}, clock=clock, health=HEALTH, resolve="each") as scene:
                client = scene.start()
                await scene.settle()
                scene.pool.stop()
                scene.names.answer("name", [where(live)])
                await scene.settle()
                assert client.outcome == live
                client.close()
                assert scene[live].checker is None

    run(main, clock)


def test_a_backend_that_is_not_well_stays_out_though_a_connection_got_through(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with full_unix() as (listener, full), unix_listener() as (_, spare):
            backends = [configured(full), configured(spare, backup=True)]
            async with Scene(loop, *backends, clock=clock, connect_timeout=4.0, fail_timeout=1.0) as scene:
                await scene.come("")
                await scene.advance(3.1)
                [trial] = await scene.come("")
                assert (trial.outcome, scene[full].state) == (None, "trial")
                # As a check would say.
                scene[full].found_unwell(clock.now, "status 503")
                listener.accept()[0].close()
                await scene.advance(0.2)
                assert (trial.outcome, scene[full].in_service) == (full, False)
                scene[full].found_well()
                assert scene[full].in_service

    with caplog.at_level(logging.INFO, "rspd"):
        run(main, clock)
    assert [line.partition(" backend=")[0] for line in changes(caplog)] == ["backend down", "backend up"]


def test_where_many_are_down_the_reason_tells_of_some_and_counts_the_others() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> str:
        health = HealthConfig(interval=60.0, timeout=0.5)
        async with Scene(loop, *(nobody() for _ in range(REASONS_MAX + 2)), clock=clock, health=health) as scene:
            await scene.advance(0.1)
            return (await scene.fail())[1]

    *told, rest = run(main, clock).split("; ")
    assert len(told) == REASONS_MAX
    assert all(one.endswith(" is down: Connection refused") for one in told)
    assert rest == "and 2 more"


def test_a_backend_that_leaves_while_it_is_out_is_tried_no_more() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-+") as (dead, live):
            async with Scene(loop, dead.address, live.address, clock=clock) as scene:
                while scene[dead.address].in_service:
                    await scene.dial()
                assert scene.pool.members.next_trial < inf
                scene.apply(live.address)
                assert scene.pool.members.next_trial == inf
                assert scene.pool.members.only is scene[live.address]
                dead.on()
                await scene.advance(11)
                assert {await scene.dial() for _ in range(3)} == {live.address}

    run(main, clock)


def test_a_client_whose_backend_failed_waits_for_another_that_is_full_rather_than_for_a_spare() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-++") as (dead, full, spare):
            backends = [
                configured(dead.address, weight=100),
                configured(full.address, max_connections=1),
                configured(spare.address, backup=True),
            ]
            async with Scene(loop, *backends, clock=clock, max_fails=100) as scene:
                while scene[full.address].open == 0:
                    await scene.come("")
                held = scene.clients[-1]
                [client] = await scene.come("")
                await scene.advance(0.3)
                assert client.outcome is None
                held.close()
                await scene.advance(0.3)
                assert client.outcome == full.address

    run(main, clock)


def test_the_only_backend_of_all_that_are_left_is_described_by_its_name() -> None:
    async def main(loop: Loop) -> None:
        async with Scene(loop, nobody(), nobody()) as scene:
            assert describe(scene.pool.members.everyone) == "2 of 2 backends up"

    run(main)
