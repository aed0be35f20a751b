"""rspd/balancing/pool.py: a client's attempts, one after the other, and the queue."""

from __future__ import annotations

import itertools
import logging
import socket
import time
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspd.balancing.attempts import DialError
from rspd.engine.loop import Loop
from rspd.engine.side import Side
from rspd.net.address import SocketAddress
from rspd.net.connect import connect
from rspd.settings import HealthConfig
from tests.dialled import (
    UNKNOWN,
    Scene,
    configured,
    full_unix,
    nobody,
    switches,
    unix_listener,
    where,
)
from tests.namespaces import SILENT_DNS, in_namespace, silent_name_server
from tests.net.test_connect import full, kinds
from tests.support import (
    Backend,
    FakeClock,
    free_port,
    full_tcp,
    open_descriptors,
    reset,
    run,
)

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


# One attempt after the other


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.integers(1, 8))
def test_a_backend_that_fails_is_passed_over_and_out_from_then_on_and_the_others_take_turns(
    alive: list[bool], dials: int
) -> None:
    async def main(loop: Loop) -> None:
        with ExitStack() as stack:
            addresses = [stack.enter_context(unix_listener())[1] if up else nobody() for up in alive]
            async with Scene(loop, *addresses) as scene:
                outcomes = [await scene.dial() for _ in range(dials)]
                if not any(alive):
                    reasons = sorted(f"{address}: Connection refused" for address in addresses)
                    assert all(sorted(str(outcome).split("; ")) == reasons for outcome in outcomes)
                    return
                living = [address for address, up in zip(addresses, alive, strict=True) if up]
                assert set(outcomes) <= set(living)
                # All of them have had their turn once, and those that fail are known by then.
                for _ in addresses:
                    await scene.dial()
                assert {backend.name for backend in scene.members if backend.in_service} == set(living)
                assert sorted([str(await scene.dial()) for _ in range(2 * len(living))]) == sorted(2 * living)

    run(main)


def test_tcp_backends_take_turns_and_the_refusing_one_is_passed_over() -> None:
    with Backend(lambda sock: sock.recv(1)) as one, Backend(lambda sock: sock.recv(1)) as two:

        async def main(loop: Loop) -> None:
            async with Scene(loop, one.address, f"127.0.0.1:{free_port()}", two.address) as scene:
                for _ in range(3):
                    assert {await scene.dial(), await scene.dial()} == {one.address, two.address}

        run(main)


def test_a_backend_may_be_given_by_the_name_localhost() -> None:
    with Backend(lambda sock: sock.recv(1)) as backend:

        async def main(loop: Loop) -> str | DialError:
            async with Scene(loop, f"localhost:{backend.port}") as scene:
                return await scene.dial()

        assert run(main) == f"localhost:{backend.port}"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-name.invalid:80"])
def test_the_reason_begins_with_the_address(address: str) -> None:
    address = address.replace(":1", f":{free_port()}") if address.startswith("127") else address

    async def main(loop: Loop) -> tuple[str, str]:
        async with Scene(loop, address, names={"no-such-name.invalid": UNKNOWN}) as scene:
            return await scene.fail()

    cause, text = run(main)
    assert cause == ("backend-refused" if address.startswith("127") else "backend-unknown")
    assert text.startswith(f"{address}: ")
    assert len(text) > len(f"{address}: ")


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_failures_the_cause_is_the_last_and_the_text_has_all(order: int) -> None:
    addresses = [f"127.0.0.1:{free_port()}", "no-such-name.invalid:80"][::order]

    async def main(loop: Loop) -> tuple[str, str]:
        first, second = addresses
        async with Scene(
            loop, first, configured(second, backup=True), names={"no-such-name.invalid": UNKNOWN}
        ) as scene:
            return await scene.fail()

    cause, text = run(main)
    assert cause == ["backend-unknown", "backend-refused"][::order][0]
    reasons = text.split("; ")
    assert [reason.rpartition(": ")[0] for reason in reasons] == addresses


def test_a_name_is_reached_by_any_of_its_addresses_and_the_reasons_name_them() -> None:
    with unix_listener() as (_, live):
        dead = SocketAddress(socket.AF_INET, ("127.0.0.1", free_port()))
        names = {"both": [dead, where(live)], "dead": [dead]}
        port = dead.address[1]

        async def main(loop: Loop) -> tuple[str | DialError, str | DialError]:
            async with (
                Scene(loop, f"both:{port}", names=names) as both,
                Scene(loop, f"dead:{port}", names=names) as none,
            ):
                return await both.dial(), await none.dial()

        both, none = run(main)
        assert both == f"both:{port}"
        assert str(none) == f"127.0.0.1:{port}: Connection refused"


# The timeout


@kinds
def test_a_backend_without_room_is_given_up_at_the_timeout_not_before_and_not_after(kind: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop, address: str) -> tuple[str, str]:
        async with Scene(loop, address, connect_timeout=5.0) as scene:
            client = scene.start()
            await scene.settle()
            clock.advance(4.98)
            await scene.settle()
            assert client.outcome is None
            clock.advance(0.02001)
            return await scene.failure(client)

    with full(kind) as address:
        failure = run(lambda loop: main(loop, address), clock)
    assert failure == ("connect-timeout", f"{address}: no answer within the connect timeout")


async def seconds_to_answer(scene: Scene, clock: FakeClock, step: float = 0.1) -> float:
    start = clock.now
    client = scene.start()
    await scene.settle()
    while not client.outcome:
        clock.advance(step)
        await scene.settle()
        assert clock.now - start < 2 * scene.settings["connect_timeout"]
    return clock.now - start


@pytest.mark.parametrize(("silent", "seconds"), [(1, 6), (2, 8), (3, 12 * 7 / 9), (6, 12 * (1 - 16 / 243))])
def test_backends_that_do_not_answer_leave_an_even_share_of_the_timeout_to_the_next_and_get_a_third_at_least(
    silent: int, seconds: float
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with ExitStack() as stack:
            addresses = [stack.enter_context(full_tcp()) for _ in range(silent)]
            addresses.append(stack.enter_context(unix_listener())[1])
            # The spare comes last whoever else does.
            backends = [configured(address, backup=address == addresses[-1]) for address in addresses]
            async with Scene(loop, *backends, connect_timeout=12) as scene:
                taken = await seconds_to_answer(scene, clock)
                assert scene.clients[0].outcome == addresses[-1]
                return taken

    assert run(main, clock) == pytest.approx(seconds, abs=0.1 * silent + 0.01)


def test_the_next_client_is_spared_those_that_did_not_answer() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with full_tcp() as one, full_tcp() as two, unix_listener() as (_, live):
            async with Scene(loop, one, two, live, connect_timeout=12, fail_timeout=60) as scene:
                for _ in range(3):
                    await seconds_to_answer(scene, clock)
                return sum([await seconds_to_answer(scene, clock) for _ in range(6)])

    assert run(main, clock) == 0


def test_all_attempts_together_take_no_longer_than_the_timeout() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with full_tcp() as one, full_unix() as (_, two), full_tcp() as three:
            async with Scene(loop, one, two, three, connect_timeout=12) as scene:
                return await seconds_to_answer(scene, clock)

    assert run(main, clock) == pytest.approx(12, abs=0.11)


def port_of(address: str) -> str:
    return address.rpartition(":")[2]


def test_time_that_a_refusal_did_not_use_is_shared_by_those_after_it() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with full_tcp() as silent, unix_listener() as (_, live):
            names = {"half": [where(silent), where(live)]}
            backends = [configured(nobody()), configured(f"half:{port_of(silent)}", backup=True)]
            async with Scene(loop, *backends, names=names, connect_timeout=12) as scene:
                await scene.settle()
                return await seconds_to_answer(scene, clock)

    assert run(main, clock) == pytest.approx(6, abs=0.11)


def test_the_addresses_of_a_name_share_what_the_name_is_given() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with full_tcp() as silent, unix_listener() as (_, live):
            names = {"silent": [where(silent), where(silent)], "half": [where(silent), where(live)]}
            port = port_of(silent)
            backends = [configured(f"silent:{port}"), configured(f"half:{port}", backup=True)]
            async with Scene(loop, *backends, names=names, connect_timeout=12) as scene:
                await scene.settle()
                seconds = await seconds_to_answer(scene, clock)
                assert scene.clients[0].outcome == f"half:{port}"
                return seconds

    # Two addresses of 3 s each, of the 6 s of the first; then the first of two within the 6 s of the second.
    assert run(main, clock) == pytest.approx(9, abs=0.31)


@kinds
def test_without_a_timeout_dialling_goes_on_until_it_is_cancelled_and_nothing_is_open(kind: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop, address: str) -> None:
        async with Scene(loop, address, connect_timeout=inf) as scene:
            client = scene.client()
            before = open_descriptors()
            client.task = loop.spawn(client.dial())
            for _ in range(3):
                clock.advance(1e6)
                await scene.settle()
            assert client.outcome is None
            assert (open_descriptors(), scene[address].open) == (before + 1, 1)
            client.task.cancel()
            await scene.settle()
            assert client.task.done
            assert (open_descriptors(), scene[address].open) == (before, 0)
            assert scene[address].in_service

    with full(kind) as address:
        run(lambda loop: main(loop, address), clock)


# The client meanwhile


@kinds
def test_when_the_client_aborts_dialling_ends_and_no_other_backend_is_tried(kind: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop, address: str) -> None:
        with unix_listener() as (next_one, other):
            next_one.setblocking(False)
            async with Scene(loop, address, configured(other, backup=True), connect_timeout=5.0) as scene:
                client = scene.start()
                await scene.settle()
                reset(client.peer)
                clock.advance(0.01001)
                assert await scene.failure(client) == ("client-aborted", f"{address}: the client is gone")
                assert scene[address].in_service
                with pytest.raises(BlockingIOError):
                    next_one.accept()

    with full(kind) as address:
        run(lambda loop: main(loop, address), clock)


def abort_while_the_name_is_looked_up() -> None:
    """Print the cause, and the seconds from the client's end to that of dialling."""

    async def main(loop: Loop) -> None:
        with silent_name_server() as server:
            async with Scene(loop, "slow.example:80", "slower.example:80", connect_timeout=4.0) as scene:
                client = scene.start()
                server.recv(1000)
                start = time.monotonic()
                reset(client.peer)
                print((await scene.failure(client))[0])
                print(time.monotonic() - start)

    run(main)


def test_when_the_client_aborts_nobody_waits_for_the_name_of_its_backend() -> None:
    cause, seconds = in_namespace(abort_while_the_name_is_looked_up, prepare=SILENT_DNS)
    assert cause == "client-aborted"
    assert float(seconds) < 1.5


def look_up_where_nobody_answers() -> None:
    """Print the cause and the reason, and the seconds that it took."""

    async def main(loop: Loop) -> None:
        with silent_name_server():
            async with Scene(loop, "slow.example:80", connect_timeout=0.3) as scene:
                start = loop.now
                print(*await scene.fail(), sep="\n")
                print(loop.now - start)

    run(main)


def test_a_name_server_that_does_not_answer_ends_dialling_at_the_timeout() -> None:
    cause, reason, seconds = in_namespace(look_up_where_nobody_answers, prepare=SILENT_DNS)
    assert (cause, reason) == ("connect-timeout", "slow.example:80: no answer to the lookup of slow.example")
    assert 0.29 <= float(seconds) < 1.5


def test_a_client_that_aborted_before_any_backend_was_reached_is_not_led_to_the_next() -> None:
    async def main(loop: Loop) -> None:
        with unix_listener() as (listener, live):
            async with Scene(loop, nobody(), configured(live, backup=True)) as scene:
                listener.setblocking(False)
                client = scene.client()
                client.client.watch()
                reset(client.peer)
                while not client.client.aborted:
                    await loop.yield_turn()
                with pytest.raises(DialError) as caught:
                    await scene.pool.dial(client)
                assert caught.value.cause == "client-aborted"
                loop.unwatch(client.client)
                with pytest.raises(BlockingIOError):
                    listener.accept()

    run(main)


# How many are tried


@pytest.mark.parametrize(("retries", "tried"), [(0, 1), (1, 2), (2, 3), (inf, 4)])
def test_no_more_further_backends_are_tried_than_retries(retries: float, tried: int) -> None:
    async def main(loop: Loop) -> str:
        with switches("---+") as four:
            *dead, live = [switch.address for switch in four]
            backends = [*map(configured, dead), configured(live, backup=True)]
            async with Scene(loop, *backends, retries=retries) as scene:
                outcome = await scene.dial()
                assert sum(not backend.in_service for backend in scene.members) == min(tried, 3)
                if tried > 3:
                    assert outcome == live
                    return "; " * 3
                assert isinstance(outcome, DialError)
                assert outcome.cause == "backend-refused"
                return str(outcome) + "; "

    assert run(main).count("; ") == min(tried, 3)


def test_without_retries_the_trial_of_one_that_is_out_does_not_use_up_the_attempt() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-+") as (dead, live):
            async with Scene(loop, dead.address, live.address, clock=clock, retries=0, fail_timeout=10.0) as scene:
                while scene[dead.address].in_service:
                    await scene.dial()
                for _ in range(3):
                    await scene.advance(10.1)
                    assert scene.pool.members.next_trial <= clock.now
                    assert [await scene.dial() for _ in range(3)] == [live.address] * 3
                    assert scene.pool.members.next_trial > clock.now

    run(main, clock)


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_the_attempts_that_a_client_has_get_all_of_the_timeout(retries: int) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with ExitStack() as stack:
            addresses = [stack.enter_context(full_tcp()) for _ in range(4)]
            async with Scene(loop, *addresses, connect_timeout=12, retries=retries) as scene:
                taken = await seconds_to_answer(scene, clock)
                assert sum(not backend.in_service for backend in scene.members) == retries + 1
                return taken

    assert run(main, clock) == pytest.approx(12, abs=0.11 * (retries + 1))


def test_without_retries_a_client_still_waits_where_no_other_is_up() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-") as (only,):
            async with Scene(loop, only.address, clock=clock, retries=0, queue_timeout=5.0) as scene:
                client = scene.start()
                await scene.advance(1.0)
                only.on()
                await scene.advance(0.3)
                assert client.outcome == only.address

    run(main, clock)


# The queue


def test_clients_wait_for_room_and_get_it_in_their_order() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+") as (only,):
            async with Scene(loop, configured(only.address, max_connections=2), clock=clock) as scene:
                clients = await scene.come(*[""] * 10)
                for served in range(2, 11):
                    assert [client.outcome for client in clients] == [only.address] * served + [None] * (10 - served)
                    assert scene[only.address].open == 2
                    # The one that leaves is not always the one that came first.
                    [client for client in clients if client.far][served % 2].close()
                    await scene.settle()

    run(main, clock)


@pytest.mark.parametrize("how", ["aborted", "cancelled"])
def test_a_client_that_leaves_the_queue_takes_nobody_s_turn(how: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+") as (only,):
            async with Scene(loop, configured(only.address, max_connections=1), clock=clock) as scene:
                served, *others, last = await scene.come(*[""] * 5)
                for client in others:
                    if how == "aborted":
                        reset(client.peer)
                    elif client.task:
                        client.task.cancel()
                # In the same turn of the loop: the first of the queue is woken, and is gone.
                served.close()
                await scene.settle()
                assert last.outcome == only.address
                assert scene[only.address].open == 1
                assert all(client.far is None for client in others)

    run(main, clock)


def test_where_all_are_full_a_client_waits_for_connect_timeout_and_no_longer() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> tuple[str, str]:
        with switches("++") as (one, two):
            backends = [configured(switch.address, max_connections=1) for switch in (one, two)]
            async with Scene(loop, *backends, clock=clock, connect_timeout=3.0) as scene:
                *_, client = await scene.come("", "", "")
                await scene.advance(2.9)
                assert client.outcome is None
                await scene.advance(0.2)
                return await scene.failure(client)

    assert run(main, clock) == ("queue-timeout", "every backend has its max_connections")


def test_while_none_is_up_clients_wait_and_all_are_served_in_their_order_once_one_is_back() -> None:
    clock = FakeClock()
    order: list[int] = []

    async def main(loop: Loop) -> None:
        with switches("-") as (only,):
            async with Scene(loop, only.address, clock=clock, queue_timeout=10.0, fail_timeout=60.0) as scene:
                clients = await scene.come(*[""] * 20)
                await scene.advance(5)
                assert all(client.outcome is None for client in clients)
                only.on()
                while len(order) < len(clients):
                    assert clock.now < 1000 + 5.5
                    clock.advance(0.01)
                    await loop.yield_turn()
                    order.extend(number for number, one in enumerate(clients) if one.outcome and number not in order)
                assert {client.outcome for client in clients} == {only.address}

    run(main, clock)
    # But for the two that were trying it.
    assert sum(order[index] < order[index + 1] for index in range(19)) >= 17


def test_a_backend_that_does_not_answer_keeps_nobody_who_waits_from_another_that_is_back() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with full_tcp() as silent, switches("-") as (dead,):
            async with Scene(
                loop, silent, dead.address, clock=clock, connect_timeout=6.0, queue_timeout=60.0, fail_timeout=60.0
            ) as scene:
                await scene.come("")
                await scene.advance(7)
                assert not scene.pool.members.any_in_service
                dead.on()
                others = await scene.come("", "", "")
                await scene.advance(0.5)
                assert {client.outcome for client in others} == {dead.address}

    run(main, clock)


@pytest.mark.parametrize("count", [1, 5])
def test_who_waits_while_none_is_up_gets_a_spare_that_is_back_though_the_others_are_not(count: int) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("--") as (primary, spare):
            backends = [configured(primary.address), configured(spare.address, backup=True)]
            async with Scene(loop, *backends, clock=clock, queue_timeout=60.0) as scene:
                clients = await scene.come(*[""] * count)
                await scene.advance(1)
                assert {client.outcome for client in clients} == {None}
                spare.on()
                await scene.advance(1)
                assert {client.outcome for client in clients} == {spare.address}

    run(main, clock)


def test_while_clients_wait_one_attempt_is_made_each_tenth_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    times: list[float] = []

    async def counted(*arguments: Any) -> Side:
        times.append(round(clock.now - 1000, 2))
        return await connect(*arguments)

    monkeypatch.setattr("rspd.balancing.pool.connect", counted)

    async def main(loop: Loop) -> None:
        with switches("-") as (only,):
            async with Scene(loop, only.address, clock=clock, queue_timeout=60.0) as scene:
                clients = await scene.come(*[""] * 20)
                for _ in range(300):
                    clock.advance(0.01)
                    await scene.settle()
                assert all(client.outcome is None for client in clients)

    run(main, clock)
    assert 28 <= len(times) <= 32
    assert all(later - earlier >= 0.099 for earlier, later in itertools.pairwise(times[1:]))


def test_an_attempt_at_a_backend_that_is_down_lasts_no_longer_than_the_client_may_wait() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with full_unix() as (_, silent):
            async with Scene(
                loop, silent, clock=clock, connect_timeout=6.0, queue_timeout=1.0, fail_timeout=60.0
            ) as scene:
                scene[silent].failed(clock.now, "refused")
                [client] = await scene.come("")
                await scene.advance(1.1)
                assert await scene.failure(client) == (
                    "queue-timeout",
                    f"{silent}: no answer within the connect timeout",
                )

    run(main, clock)


@pytest.mark.parametrize(("before", "after", "cause"), [(0.0, 5.0, "queue-timeout"), (5.0, 0.0, "connect-timeout")])
def test_whether_a_client_waits_after_a_reload_is_as_the_new_configuration_says(
    before: float, after: float, cause: str
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with full_unix() as (_, silent):
            async with Scene(loop, silent, clock=clock, connect_timeout=4.0, queue_timeout=before) as scene:
                client = scene.start()
                scene.apply(silent, queue_timeout=after)
                await scene.advance(4.2)
                assert (client.outcome is None) == bool(after)
                await scene.advance(6.0)
                assert (await scene.failure(client))[0] == cause

    run(main, clock)


@pytest.mark.parametrize("count", [1, 3])
def test_clients_that_waited_in_vain_are_told_so_at_queue_timeout(count: int) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("--") as (one, two):
            async with Scene(loop, one.address, two.address, clock=clock, queue_timeout=3.0) as scene:
                clients = await scene.come(*[""] * count)
                await scene.advance(2.9)
                assert all(client.outcome is None for client in clients)
                await scene.advance(0.3)
                for client in clients:
                    cause, reasons = await scene.failure(client)
                    assert cause == "queue-timeout"
                    assert "Connection refused" in reasons
                # The next one waits as long, and not longer.
                late = scene.start()
                await scene.advance(3.2)
                assert (await scene.failure(late))[0] == "queue-timeout"

    run(main, clock)


def test_a_client_that_waits_for_one_that_is_full_tries_another_when_its_time_has_come() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+-") as (small, other):
            backends = [configured(small.address, max_connections=1), configured(other.address)]
            async with Scene(loop, *backends, clock=clock, fail_timeout=5.0, connect_timeout=20.0) as scene:
                while scene[other.address].in_service:
                    await scene.dial()
                other.on()
                await scene.come("")
                waiting = scene.start()
                await scene.advance(4)
                assert waiting.outcome is None
                await scene.advance(1.2)
                assert waiting.outcome == other.address

    run(main, clock)


@pytest.mark.parametrize("what", ["limit", "backend", "name"])
def test_a_reload_that_makes_room_serves_those_who_wait_at_once(what: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("++") as (one, two):
            first = configured(one.address, max_connections=1)
            async with Scene(loop, first, clock=clock, names={"name": [where(two.address)]}) as scene:
                _, *waiting = await scene.come(*[""] * 4)
                if what == "limit":
                    scene.apply(first._replace(max_connections=4))
                else:
                    scene.apply(first, two.address if what == "backend" else "name:80", resolve="each")
                await scene.settle()
                assert {client.outcome for client in waiting} == {one.address if what == "limit" else two.address}

    run(main, clock)


def test_a_client_that_comes_while_others_wait_goes_to_the_end() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("++") as (one, two):
            first = configured(one.address, max_connections=1)
            async with Scene(loop, first, clock=clock) as scene:
                _, waiting = await scene.come("", "")
                scene.apply(first, configured(two.address, max_connections=1))
                # There is room, and somebody waits who has not been told yet.
                late = scene.start()
                await scene.settle()
                assert (waiting.outcome, late.outcome) == (two.address, None)

    run(main, clock)


def test_while_none_is_well_clients_wait_for_a_check_to_say_that_one_is() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("--") as (one, two):
            health = HealthConfig(interval=1.0, timeout=0.5, rise=1, fall=1)
            async with Scene(loop, one.address, two.address, clock=clock, health=health, queue_timeout=9.0) as scene:
                await scene.advance(0.2)
                clients = await scene.come(*[""] * 5)
                assert {client.outcome for client in clients} == {None}
                two.on()
                await scene.advance(1.2)
                assert {client.outcome for client in clients} == {two.address}

    run(main, clock)


def test_a_client_that_aborts_before_its_turn_makes_no_connection() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (listener, live):
            listener.setblocking(False)
            async with Scene(loop, configured(live, max_connections=1), clock=clock) as scene:
                served, waiting = await scene.come("", "")
                listener.accept()[0].close()
                reset(waiting.peer)
                served.close()
                assert (await scene.failure(waiting))[0] == "client-aborted"
                with pytest.raises(BlockingIOError):
                    listener.accept()

    run(main, clock)


def test_the_reason_has_the_address_that_was_tried_whatever_the_name_stands_for_meanwhile() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> str:
        with full_unix() as (_, full):
            names = {"name": [where(full)]}
            async with Scene(
                loop, "name:80", names=names, clock=clock, connect_timeout=8.0, resolve_interval=5.0
            ) as scene:
                await scene.settle()
                client = scene.start()
                scene.names.names["name"] = [where(nobody())]
                await scene.advance(8.1)
                assert scene["name:80"].addresses == scene.names.names["name"]
                assert full in str(client.outcome)
                return (await scene.failure(client))[1]

    assert run(main, clock).endswith("no answer within the connect timeout")


# What is amiss on this side


def dial_without_a_port_for_the_near_end() -> None:
    """Print what clients reach while all ports of ours are taken, and whether that was held against the backend."""
    clock = FakeClock()
    ports = Path("/proc/sys/net/ipv4/ip_local_port_range")

    async def main(loop: Loop) -> None:
        with socket.socket() as listener, unix_listener() as (_, spare):
            listener.bind(("127.0.0.1", 0))
            where = listener.getsockname()
            address = f"127.0.0.1:{where[1]}"
            backends = [configured(address), configured(spare, backup=True)]
            async with (
                Scene(loop, address, clock=clock) as alone,
                Scene(loop, *backends, clock=clock, fail_timeout=10.0) as scene,
            ):
                assert await scene.dial() == spare
                listener.listen()
                # A client takes ports as well.
                first, trial, last = alone.client(), scene.client(), scene.client()
                ports.write_text("50000 50000")
                held = socket.create_connection(where)
                await first.dial()
                print(*await alone.failure(first), sep="\n")
                print(alone[address].in_service)
                checked = Scene(loop, address, clock=clock, health=HealthConfig(interval=1.0, rise=1, fall=1))
                async with checked:
                    await scene.advance(3)
                    print(checked[address].in_service)
                await scene.advance(7.1)
                await trial.dial()
                assert trial.outcome == spare
                print(scene.pool.members.next_trial <= clock.now)
                reset(held)  # a port in TIME_WAIT would not be picked again
                await last.dial()
                assert last.outcome == address

    run(main, clock)


def test_having_no_port_left_to_connect_from_says_nothing_of_the_backend_and_a_trial_is_the_next_client_s() -> None:
    cause, reason, *lasting = in_namespace(dial_without_a_port_for_the_near_end)
    assert cause == "backend-unreachable"
    assert reason.endswith(": Cannot assign requested address")
    assert lasting == ["True", "True", "True"]


# The log


def test_each_attempt_that_fails_is_a_line_for_who_asks_for_details(caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop) -> list[str]:
        with switches("--+") as (dead, other, live):
            names = {"name": [where(dead.address), where(other.address)]}
            backends = [configured("name:80"), configured(live.address, backup=True)]
            async with Scene(loop, *backends, names=names, name="web") as scene:
                assert await scene.dial("192.0.2.7") == live.address
                return [dead.address, other.address]

    with caplog.at_level(logging.DEBUG, "rspd.balancing.attempts"):
        dead = run(main)
    [line] = [record for record in caplog.records if record.name == "rspd.balancing.attempts"]
    assert line.levelno == logging.DEBUG
    reasons = "; ".join(f"{address}: Connection refused" for address in dead)
    assert line.getMessage() == f'backend not reached client=192.0.2.7:1 proxy=web backend=name:80 reason="{reasons}"'
