"""rspd/balancing/discovery.py: what a name stands for, as it changes, and as clients hear of it."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest

from rspd.balancing.attempts import DialError
from rspd.balancing.discovery import LOOKUP_TIMEOUT
from rspd.balancing.wording import describe
from rspd.engine.loop import Loop
from rspd.settings import HealthConfig
from tests.dialled import (
    EMPTY,
    UNANSWERED,
    UNKNOWN,
    Answer,
    Scene,
    configured,
    full_unix,
    no_descriptors,
    nobody,
    switches,
    unix_listener,
    where,
)
from tests.support import FakeClock, reset, run, tasks_of

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


# Short of descriptors


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        # EAI_SYSTEM, where the C library could not load the module of a name service: errno means nothing then.
        OSError(errno.EBUSY, os.strerror(errno.EBUSY)),
    ],
    ids=["EMFILE", "EAI_NONAME", "EBUSY"],
)
def test_a_lookup_that_fails_in_whatever_way_while_descriptors_are_short_is_tried_again(
    error: OSError, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            async with Scene(loop, "name:80", names={"name": error}, clock=clock) as scene:
                loop.spawn(scene.shortage.wait(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
                client = scene.start()
                await scene.settle()
                assert client.outcome is None
                scene.names.names["name"] = [where(live)]
                await scene.advance(0.11)
                assert client.outcome == "name:80"
                await scene.advance(1.1)

    run(main, clock)
    assert "name not found" not in caplog.text


def test_while_descriptors_are_short_a_client_waits_for_a_name_no_longer_than_its_timeout() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> tuple[str, str]:
        error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        async with Scene(loop, "name:80", names={"name": error}, clock=clock, connect_timeout=1.0) as scene:
            client = scene.start()
            await scene.advance(0.9)
            assert client.outcome is None
            await scene.advance(0.2)
            failure = await scene.failure(client)
            await scene.advance(1.1)
            return failure

    assert run(main, clock) == ("backend-unreachable", "name:80: Too many open files")


# What a name stands for


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of names."""
    return [record.getMessage() for record in caplog.records if record.name == "rspd.balancing.discovery"]


def test_a_lookup_in_the_background_that_is_never_answered_counts_as_failed(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        async with Scene(loop, "name:80", names={}, clock=clock) as scene:
            await scene.settle()
            await scene.advance(LOOKUP_TIMEOUT - 0.1, 1.0)
            assert not lines(caplog)
            await scene.advance(0.2)
            assert lines(caplog) == ['name not found name=name reason="no answer to the lookup of name"']

    run(main, clock)


def members(scene: Scene) -> list[str]:
    return [backend.name for backend in scene.members]


def test_with_resolve_one_a_name_is_one_backend_whatever_it_stands_for() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, one), unix_listener() as (_, two):
            async with Scene(loop, "name:80", names={"name": [where(one), where(two)]}, clock=clock) as scene:
                assert await scene.dial() == "name:80"
                assert members(scene) == ["name:80"]

    run(main, clock)


def test_with_resolve_each_every_address_is_a_backend_and_has_its_share() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, one), unix_listener() as (_, two):
            names = {"name": [where(one), where(two)]}
            async with Scene(loop, "name:80", names=names, clock=clock, resolve="each") as scene:
                assert Counter([await scene.dial() for _ in range(8)]) == {one: 4, two: 4}
                assert describe(scene.pool.members.everyone) == "2 of 2 backends up"

    run(main, clock)


def test_what_two_names_stand_for_is_one_backend_for_as_long_as_either_does() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, shared), unix_listener() as (_, other):
            names = {"one": [where(shared)], "two": [where(other), where(shared)], "three": [where(shared)]}
            settings: dict[str, Any] = {"resolve": "each", "resolve_interval": 5.0, "health": HealthConfig()}
            literal, *named = map(configured, [shared, "two:80", "three:80"])
            backends = [configured("one:80", max_connections=2), *named]
            async with Scene(loop, *backends, literal, names=names, clock=clock, **settings) as scene:
                await scene.advance(0.1)
                assert members(scene) == [shared, other]
                assert Counter([await scene.dial() for _ in range(8)]) == {shared: 4, other: 4}
                both = await scene.come("", "", "", "", "")
                assert Counter(client.outcome for client in both) == {shared: 2, other: 3}
                staying, tasks = scene[shared], tasks_of(loop)
                scene.names.names.update(one=[where(other)], two=[where(other)])
                await scene.advance(5.1)
                assert members(scene) == [other, shared]
                assert (scene[shared], staying.open, tasks_of(loop)) == (staying, 2, tasks)
                scene.names.names["three"] = [where(other)]
                scene.apply(*backends)
                await scene.advance(5.1)
                assert members(scene) == [other]
                for client in both:
                    client.close()
                assert await scene.dial() == other

    run(main, clock)


def test_addresses_that_come_and_go_are_backends_that_come_and_go_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[str]:
        with ExitStack() as stack:
            one, two, three = [stack.enter_context(unix_listener())[1] for _ in range(3)]
            names = {"name": [where(one), where(two)]}
            async with Scene(
                loop, "name:80", names=names, clock=clock, name="web", resolve="each", resolve_interval=5.0
            ) as scene:
                clients = await scene.come("", "")
                staying = scene[two]
                scene.names.names["name"] = [where(three), where(two)]
                await scene.advance(5.1)
                assert members(scene) == [two, three]
                assert (scene[two], staying.open) == (staying, 1)
                assert {await scene.dial() for _ in range(4)} == {two, three}
                # Another order is no change.
                scene.names.names["name"] = [where(two), where(three)]
                await scene.advance(5.1)
                for client in clients:
                    client.close()
                return [two, three]

    with caplog.at_level(logging.INFO, "rspd"):
        left = run(main, clock)
    assert lines(caplog) == [f"name has changed proxy=web name=name addresses={','.join(left)}"]


def test_the_address_that_answered_last_stays_first_whatever_the_order_of_the_answers() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            dead, new = nobody(), nobody()
            names = {"name": [where(dead), where(live)]}
            async with Scene(loop, "name:80", names=names, clock=clock, resolve_interval=5.0) as scene:
                assert await scene.dial() == "name:80"
                assert scene["name:80"].addresses == [where(live), where(dead)]
                scene.names.names["name"] = [where(dead), where(new), where(live)]
                await scene.advance(5.1)
                assert scene["name:80"].addresses == [where(live), where(dead), where(new)]

    run(main, clock)


# Lookups that fail


resolves = pytest.mark.parametrize("resolve", ["one", "each"])


@pytest.mark.parametrize("failure", [UNANSWERED, TimeoutError("no answer to the lookup of name")])
def test_a_lookup_without_an_answer_takes_nothing_away_and_the_log_says_so_once(
    failure: OSError, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> str:
        with unix_listener() as (_, live):
            names = {"name": [where(live)]}
            async with Scene(loop, "name:80", names=names, clock=clock, resolve_interval=5.0) as scene:
                await scene.settle()
                scene.names.names["name"] = failure
                await scene.advance(30)
                assert await scene.dial() == "name:80"
                scene.names.names["name"] = [where(live)]
                await scene.advance(5.1)
                scene.names.names["name"] = failure
                await scene.advance(30)
                return live

    with caplog.at_level(logging.INFO, "rspd"):
        live = run(main, clock)
    lost = f'name not found name=name reason="{failure.strerror or failure}" keeping={live}'
    assert lines(caplog) == [lost, "name found again name=name", lost]


@resolves
@pytest.mark.parametrize("denial", [UNKNOWN, EMPTY])
def test_the_answer_that_a_name_is_gone_takes_its_addresses_away_once_it_is_confirmed(
    denial: OSError, resolve: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> str:
        with unix_listener() as (_, live):
            settings: dict[str, Any] = {"resolve": resolve, "resolve_interval": 5.0}
            async with Scene(loop, "name:80", names={"name": [where(live)]}, clock=clock, **settings) as scene:
                client = scene.start()
                await scene.settle()
                scene.names.names["name"] = denial
                await scene.advance(5.1)
                # Asked once.
                assert await scene.dial() == client.outcome
                await scene.advance(1.1)
                assert await scene.fail() == ("backend-unknown", f"name:80: {denial.strerror}")
                assert client.backend
                assert client.backend.open == 1
                await scene.advance(30)
                scene.names.names["name"] = [where(live)]
                await scene.advance(5.1)
                assert await scene.dial() == client.outcome
                return live

    with caplog.at_level(logging.INFO, "rspd"):
        live = run(main, clock)
    assert lines(caplog) == [
        f'name not found name=name reason="{denial.strerror}" dropped={live}',
        "name found again name=name",
    ]


def test_a_backend_that_was_down_because_its_name_was_gone_gets_clients_as_soon_as_it_is_known() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live), unix_listener() as (_, other):
            names: dict[str, Answer] = {"name": [where(live)]}
            settings: dict[str, Any] = {"resolve_interval": 1.0, "fail_timeout": 3600.0}
            async with Scene(loop, "name:80", other, names=names, clock=clock, **settings) as scene:
                await scene.settle()
                scene.names.names["name"] = UNKNOWN
                await scene.advance(3)
                assert {await scene.dial() for _ in range(4)} == {other}
                assert not scene["name:80"].in_service
                scene.names.names["name"] = [where(live)]
                await scene.advance(3)
                assert {await scene.dial() for _ in range(4)} == {"name:80", other}

    run(main, clock)


def test_an_answer_that_is_not_confirmed_takes_nothing_away(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            known = [where(live)]
            async with Scene(loop, "name:80", names={"name": known}, clock=clock, resolve_interval=5.0) as scene:
                await scene.settle()
                for _ in range(3):
                    scene.names.names["name"] = UNKNOWN
                    await scene.advance(5.1)
                    scene.names.names["name"] = known
                    await scene.advance(1.1)
                assert await scene.dial() == "name:80"

    with caplog.at_level(logging.INFO, "rspd"):
        run(main, clock)
    assert lines(caplog) == []


# What is answered from second to second, and what is known then. The interval is 60 s; a failure makes it shorter.
@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([UNANSWERED, UNKNOWN, UNKNOWN], ["keeping", "dropped"]),
        ([UNKNOWN, UNANSWERED, UNKNOWN], ["keeping", "dropped"]),
        ([UNKNOWN, EMPTY, UNANSWERED], ["dropped"]),
        ([UNANSWERED, UNKNOWN, UNANSWERED], ["keeping"]),
    ],
)
def test_lookups_without_an_answer_neither_confirm_nor_deny_that_a_name_is_gone(
    answers: list[Answer], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            known = {"name": [where(live)]}
            async with Scene(loop, "name:80", names=known, clock=clock, resolve_interval=60.0) as scene:
                await scene.settle()
                scene["name:80"].source.refresh()
                for answer in answers:
                    scene.names.names["name"] = answer
                    asked = len(scene.names.asked)
                    while len(scene.names.asked) == asked:
                        await scene.advance(0.5)
                # A client that comes then has the name looked up.
                assert isinstance(await scene.dial(), DialError) == (told[-1] == "dropped")

    run(main, clock)
    assert [line.split()[-1].split("=")[0] for line in lines(caplog)] == told


def test_a_name_that_is_said_to_be_gone_is_asked_for_again_a_second_later_whatever_failed_before() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[float]:
        names: dict[str, Answer] = {"name": [where(nobody())]}
        async with Scene(loop, "name:80", names=names, clock=clock, resolve_interval=20.0) as scene:
            await scene.settle()
            scene.names.names["name"] = UNANSWERED
            before = await asked(scene, 60)
            scene.names.names["name"] = UNKNOWN
            return [when - before[-1] for when in (await asked(scene, 30))[len(before) :]]

    # Twenty seconds after a lookup that is one of many without an answer.
    assert run(main, clock) == [20, 21, 23, 27, 35]


def test_while_no_descriptor_is_free_no_answer_counts(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            names: dict[str, Answer] = {"name": [where(live)]}
            async with Scene(loop, "name:80", names=names, clock=clock, resolve_interval=5.0) as scene:
                await scene.settle()
                scene.names.names["name"] = UNKNOWN
                with no_descriptors():
                    await scene.advance(30)
                assert scene["name:80"].addresses == [where(live)]

    run(main, clock)
    assert lines(caplog) == []


@resolves
def test_a_reload_that_changes_only_the_port_keeps_what_is_known_of_the_name(resolve: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[str]:
        names = {"name": [where("127.0.0.1:1"), where("127.0.0.2:1")]}
        async with Scene(loop, "name:80", names=names, clock=clock, resolve=resolve) as scene:
            await scene.advance(0.1)
            scene.names.forget()
            scene.names.names["name"] = UNANSWERED
            scene.apply("name:81", "name:82")
            await scene.settle()
            return [str(address) for backend in scene.members for address in backend.addresses]

    assert run(main, clock) == [f"127.0.0.{host}:{port}" for port in (81, 82) for host in (1, 2)]


def test_backends_with_one_name_and_several_ports_are_looked_up_and_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[str]:
        names = {"name": [where("127.0.0.1:1")]}
        async with Scene(loop, "name:80", "name:81", names=names, clock=clock, resolve_interval=5.0) as scene:
            await scene.advance(0.1)
            scene.names.names["name"] = [where("127.0.0.2:1"), where("[::1]:1")]
            await scene.advance(5.1)
            assert [str(backend.addresses[0]) for backend in scene.members] == ["127.0.0.2:80", "127.0.0.2:81"]
            return scene.names.asked

    with caplog.at_level(logging.INFO, "rspd"):
        assert run(main, clock) == ["name", "name"]
    assert lines(caplog) == ["name has changed name=name addresses=127.0.0.2,::1"]


# When it is asked


def times_asked(scene: Scene, times: list[float]) -> None:
    times += [scene.loop.now - 1000] * (len(scene.names.asked) - len(times))


async def asked(scene: Scene, seconds: float) -> list[float]:
    """When names were looked up, from the beginning."""
    times: list[float] = []
    await scene.settle()
    times_asked(scene, times)
    for _ in range(round(seconds / 0.125)):
        await scene.advance(0.125, 0.125)
        times_asked(scene, times)
    return times


def test_a_name_is_looked_up_at_each_interval() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[float]:
        async with Scene(
            loop, "name:80", names={"name": [where(nobody())]}, clock=clock, resolve_interval=4.0
        ) as scene:
            return await asked(scene, 13)

    assert run(main, clock) == [0, 4, 8, 12]


def test_after_a_lookup_that_failed_the_next_comes_sooner_and_later_each_time() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[float]:
        async with Scene(loop, "name:80", names={"name": UNKNOWN}, clock=clock, resolve_interval=10.0) as scene:
            return await asked(scene, 36)

    assert run(main, clock) == [0, 1, 3, 7, 15, 25, 35]


@pytest.mark.parametrize("known", [True, False])
def test_a_backend_that_fails_is_looked_up_again_within_a_second_and_not_for_each_client(known: bool) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> int:
        with switches("-") as (dead,):
            names = {"name": [where(dead.address)]}
            async with Scene(loop, "name:80", names=names, clock=clock, resolve_interval=60.0) as scene:
                await scene.settle()
                if not known:
                    scene.names.names["name"] = UNKNOWN
                for _ in range(50):
                    await scene.fail()
                    await scene.advance(0.1)
                return len(scene.names.asked)

    assert 5 <= run(main, clock) <= 7


def test_a_reload_changes_how_often_a_name_is_looked_up_from_then_on() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[float]:
        async with Scene(
            loop, "name:80", names={"name": [where(nobody())]}, clock=clock, resolve_interval=3600.0
        ) as scene:
            await scene.advance(5)
            scene.apply("name:80", resolve_interval=2.0)
            return [when - 5 for when in (await asked(scene, 5))[1:]]

    assert run(main, clock) == [0, 2, 4]


def test_a_name_that_is_configured_no_more_is_looked_up_no_more() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[str]:
        async with Scene(
            loop, "a:1", "b:1", names={name: [where(nobody())] for name in "abc"}, clock=clock, resolve_interval=2.0
        ) as scene:
            await scene.settle()
            scene.apply("b:1", "c:1")
            await scene.advance(2.1)
            return scene.names.asked

    assert run(main, clock) == ["a", "b", "c", "b", "c"]


# Who comes before it is known


@resolves
def test_a_client_that_comes_before_the_first_answer_waits_for_it(resolve: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            async with Scene(loop, "name:80", names={}, clock=clock, resolve=resolve, connect_timeout=5.0) as scene:
                clients = await scene.come("", "")
                await scene.advance(4.9)
                scene.names.answer("name", [where(live)])
                await scene.settle()
                assert {client.outcome for client in clients} == {"name:80" if resolve == "one" else live}
                # Both have waited for one lookup, which is that of the name itself.
                assert scene.names.asked == ["name"]

    run(main, clock)


@resolves
def test_a_client_that_waits_in_vain_for_the_first_answer_ends_at_the_timeout(resolve: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> tuple[str, str]:
        async with Scene(loop, "name:80", names={}, clock=clock, resolve=resolve, connect_timeout=5.0) as scene:
            [client] = await scene.come("")
            await scene.advance(4.9)
            assert client.outcome is None
            await scene.advance(0.2)
            return await scene.failure(client)

    cause, reasons = run(main, clock)
    assert cause == ("connect-timeout" if resolve == "one" else "backend-unknown")
    assert reasons == "name:80: no answer to the lookup of name"


@resolves
def test_a_client_that_aborts_waits_for_no_name(resolve: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> str:
        async with Scene(loop, "name:80", names={}, clock=clock, resolve=resolve) as scene:
            [client] = await scene.come("")
            reset(client.peer)
            return (await scene.failure(client))[0]

    assert run(main, clock) == "client-aborted"


@resolves
def test_a_name_that_is_unknown_at_the_start_is_a_warning_and_serves_once_it_is_known(
    resolve: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            async with Scene(loop, "name:80", names={"name": UNKNOWN}, clock=clock, resolve=resolve) as scene:
                await scene.advance(0.1)
                assert await scene.fail() == ("backend-unknown", "name:80: Name or service not known")
                scene.names.names["name"] = [where(live)]
                await scene.advance(3.1)
                assert await scene.dial() == ("name:80" if resolve == "one" else live)

    with caplog.at_level(logging.INFO, "rspd"):
        run(main, clock)
    assert lines(caplog) == [
        'name not found name=name reason="Name or service not known"',
        "name found again name=name",
    ]


@resolves
def test_clients_may_wait_in_the_queue_for_a_name_to_be_known(resolve: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            async with Scene(
                loop, "name:80", names={"name": UNKNOWN}, clock=clock, resolve=resolve, queue_timeout=20.0
            ) as scene:
                clients = await scene.come("", "", "")
                await scene.advance(2)
                assert {client.outcome for client in clients} == {None}
                scene.names.names["name"] = [where(live)]
                await scene.advance(1.5)
                assert {client.outcome for client in clients} == {"name:80" if resolve == "one" else live}

    run(main, clock)


def test_the_answer_to_one_name_is_enough_while_another_is_not_answered() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            async with Scene(
                loop, "slow:80", "quick:80", names={}, clock=clock, resolve="each", connect_timeout=5.0
            ) as scene:
                [client] = await scene.come("")
                scene.names.answer("quick", [where(live)])
                await scene.settle()
                assert client.outcome == live
                assert scene.down == []

    run(main, clock)


def test_where_no_name_is_known_the_reasons_have_each() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> tuple[str, str]:
        async with Scene(loop, "a:1", "b:1", names={"a": UNKNOWN, "b": UNKNOWN}, clock=clock, resolve="each") as scene:
            return await scene.fail()

    reason = "Name or service not known"
    assert run(main, clock) == ("backend-unknown", f"a:1: {reason}; b:1: {reason}")


@resolves
@pytest.mark.parametrize("answered", [True, False])
def test_a_name_may_leave_by_a_reload_while_a_client_waits_for_its_first_answer(resolve: str, answered: bool) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> str | DialError:
        with unix_listener() as (_, old), unix_listener() as (_, new):
            async with Scene(
                loop, "name:80", "other:80", names={}, clock=clock, resolve=resolve, connect_timeout=5.0
            ) as scene:
                [client] = await scene.come("")
                scene.apply(new)
                await scene.settle()
                for host in ("name", "other"):
                    scene.names.answer(host, [where(old)] if answered else UNKNOWN)
                outcome = await scene.outcome(client)
                assert scene.down == []
                return "old" if outcome in ("name:80", "other:80") else "new" if outcome == new else outcome

    # One that is being dialled may still be reached; with `each`, none was.
    assert run(main, clock) == ("old" if resolve == "one" and answered else "new")


def test_a_name_that_changes_while_its_addresses_are_dialled_disturbs_nobody() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with full_unix() as (_, full), unix_listener() as (_, live):
            names = {"name": [where(full), where(live)]}
            async with Scene(
                loop, "name:80", names=names, clock=clock, connect_timeout=8.0, resolve_interval=2.0
            ) as scene:
                await scene.settle()
                [client] = await scene.come("")
                scene.names.names["name"] = [where(nobody())]
                await scene.advance(4.2)
                assert client.outcome == "name:80"
                assert len(scene["name:80"].addresses) == 1

    run(main, clock)
