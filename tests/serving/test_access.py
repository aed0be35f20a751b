"""Which clients may come, and what the log hears of those that may not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspd.engine.loop import Loop
from rspd.net.networks import client_key, parse_network
from rspd.serving.access import INTERVAL, Access, Refusals
from tests.engine.test_loop import advance, rounds
from tests.support import FakeClock, run


def access(allow: Sequence[str] = (), deny: Sequence[str] = (), per_client: float = inf) -> Access:
    return Access([parse_network(text) for text in allow], [parse_network(text) for text in deny], per_client)


def limit(who: Access, per_client: float, present: Sequence[str] = ()) -> None:
    who.apply((), (), per_client, present)


# Allow and deny


def why(settings: Access, host: str) -> str:
    """Why a client is refused; empty if it may come. The reason names the key that refuses it."""
    refusal = settings.admit(host)
    if not refusal:
        return ""
    assert refusal.key in refusal.reason
    return refusal.reason


def test_nothing_needs_to_be_asked_where_nothing_is_set() -> None:
    assert not access().needed
    assert access(allow=["unix"]).needed
    assert access(deny=["unix"]).needed
    assert access(per_client=1).needed


@pytest.mark.parametrize("host", ["", "10.1.2.3", "::1"])
def test_everybody_may_come_where_nothing_is_set(host: str) -> None:
    assert why(access(), host) == ""


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("10.1.2.3", ""),
        ("10.9.9.9", "in deny 10.9.0.0/16"),
        ("10.9.0.1", "in deny 10.9.0.1"),
        ("11.0.0.1", "not in allow"),
        ("2001:db8::1", ""),
        ("2001:db9::1", "not in allow"),
        ("", "not in allow"),
    ],
)
def test_deny_wins_over_allow_and_allow_refuses_everybody_else(host: str, reason: str) -> None:
    settings = access(["10.0.0.0/8", "2001:db8::/32", "10.9.0.1"], ["10.9.0.0/16", "10.9.0.1", "192.0.2.0/24"])
    assert why(settings, host) == reason


def test_deny_alone_refuses_nobody_else() -> None:
    settings = access(deny=["unix", "10.0.0.0/8"])
    assert [why(settings, host) for host in ("", "10.0.0.1", "11.0.0.1", "::1")] == [
        "in deny unix",
        "in deny 10.0.0.0/8",
        "",
        "",
    ]


def test_other_networks_count_from_a_reload_on() -> None:
    settings = access(deny=["10.0.0.0/8"])
    settings.apply([parse_network("10.0.0.1")], [], inf, ())
    assert [why(settings, host) for host in ("10.0.0.1", "11.0.0.1")] == ["", "not in allow"]
    limit(settings, inf)
    assert not settings.needed
    assert why(settings, "11.0.0.1") == ""


# Connections of a client


@pytest.mark.parametrize(
    ("hosts", "other", "reason"),
    [
        (["10.0.0.1"], "10.0.0.2", "has 1 connection, max_connections_per_client is 1"),
        (["10.0.0.1", "10.0.0.1"], "10.0.0.2", "has 2 connections, max_connections_per_client is 2"),
        (
            ["2001:db8::1", "2001:db8::ffff:2"],
            "2001:db8:0:1::1",
            "2001:db8::/64 has 2 connections, max_connections_per_client is 2",
        ),
        (["", "", ""], "10.0.0.1", "has 3 connections, max_connections_per_client is 3"),
    ],
)
def test_a_client_has_no_more_connections_than_its_limit(hosts: list[str], other: str, reason: str) -> None:
    settings = access(per_client=len(hosts))
    for host in hosts:
        assert why(settings, host) == ""
    assert why(settings, hosts[0]) == reason
    assert why(settings, other) == ""
    settings.leave(hosts[-1])
    assert why(settings, hosts[0]) == ""


def test_a_network_that_is_refused_is_so_whatever_its_connections() -> None:
    settings = access(deny=["10.0.0.0/8"], per_client=1)
    for _ in range(2):
        assert why(settings, "10.0.0.1") == "in deny 10.0.0.0/8"


def test_nothing_stays_of_a_client_that_has_left() -> None:
    settings = access(per_client=10)
    for number in range(1000):
        settings.admit(f"10.0.{number % 256}.1")
    assert len(settings._open) == 256
    for number in range(1000):
        settings.leave(f"10.0.{number % 256}.1")
    assert not settings._open


def test_nobody_is_counted_without_a_limit() -> None:
    settings = access(deny=["unix"])
    why(settings, "10.0.0.1")
    assert not settings._open
    settings.leave("10.0.0.1")


def test_a_new_limit_counts_those_who_came_before_it() -> None:
    settings = access()
    for _ in range(3):
        why(settings, "10.0.0.1")
    limit(settings, 2, ["10.0.0.1"] * 3)
    assert why(settings, "10.0.0.1") == "has 3 connections, max_connections_per_client is 2"
    settings.leave("10.0.0.1")
    assert why(settings, "10.0.0.1") == "has 2 connections, max_connections_per_client is 2"
    settings.leave("10.0.0.1")
    assert why(settings, "10.0.0.1") == ""


HOSTS = ["", "10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8::2", "2001:db8:1::1"]
STEPS = st.tuples(st.sampled_from(["come", "come", "go", "limit"]), st.integers(0, 99))


@given(st.lists(STEPS, max_size=100))
def test_the_limit_holds_over_any_reloads(steps: list[tuple[str, int]]) -> None:
    settings = access()
    per_client = inf
    present: list[str] = []
    for step, number in steps:
        if step == "come":
            host = HOSTS[number % len(HOSTS)]
            count = Counter(map(client_key, present))[client_key(host)]
            refusal = why(settings, host)
            assert bool(refusal) == (count >= per_client)
            if not refusal:
                present.append(host)
        elif step == "go" and present:
            settings.leave(present.pop(number % len(present)))
        elif step == "limit":
            per_client = number % 4 or inf
            limit(settings, per_client, present)
    for host in present:
        settings.leave(host)
    assert not settings._open


# The log


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "rspd")


def test_the_first_refused_client_is_logged_at_once_and_the_others_when_the_second_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    first = 'client refused client=10.0.0.1:1 proxy=web reason="not in allow"'
    second = 'client refused client=10.0.0.1:99 proxy=web reason="in deny 10.0.0.0/8" more=97'
    third = 'client refused client=10.0.0.2:1 proxy=web reason="not in allow"'

    async def main(loop: Loop) -> None:
        refusals = Refusals(loop, " proxy=web")
        for port in range(1, 99):
            refusals.note(f"10.0.0.1:{port}", "not in allow")
        refusals.note("10.0.0.1:99", "in deny 10.0.0.0/8")
        assert caplog.messages == [first]
        await advance(loop, clock, 0.99 * INTERVAL)
        assert caplog.messages == [first]
        await advance(loop, clock, 0.02 * INTERVAL)
        assert caplog.messages == [first, second]
        refusals.note("10.0.0.2:1", "not in allow")
        assert caplog.messages == [first, second]
        await advance(loop, clock, 1.01 * INTERVAL)
        assert caplog.messages == [first, second, third]
        await advance(loop, clock, 1.01 * INTERVAL)

    run(main, clock)
    assert caplog.messages == [first, second, third]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_after_a_quiet_second_a_refused_client_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        refusals = Refusals(loop, "")
        for number in range(3):
            refusals.note("unix", "not in allow")
            assert caplog.messages == ['client refused client=unix reason="not in allow"'] * (number + 1)
            await advance(loop, clock, 1.01 * INTERVAL)

    run(main, clock)


def test_a_flood_is_a_line_each_second_that_accounts_for_all(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        refusals = Refusals(loop, "")
        for _ in range(100):
            for _ in range(7):
                refusals.note("10.0.0.1:1", "not in allow")
            await advance(loop, clock, 0.1 * INTERVAL)
        refusals.close()
        await rounds(loop)

    run(main, clock)
    assert 10 <= len(caplog.messages) <= 12
    more = [int(message.partition(" more=")[2] or 0) for message in caplog.messages]
    assert sum(more) + len(more) == 700


def test_what_is_held_back_at_the_end_is_logged_then_and_no_task_is_left(caplog: pytest.LogCaptureFixture) -> None:
    async def main(loop: Loop) -> None:
        refusals = Refusals(loop, "")
        refusals.close()
        assert caplog.messages == []
        for _ in range(3):
            refusals.note("10.0.0.1:1", "not in allow")
        refusals.close()
        assert len(caplog.messages) == 2
        assert caplog.messages[1].endswith(' reason="not in allow" more=1')
        # Whoever comes before the task has ended is not forgotten.
        refusals.note("10.0.0.2:2", "not in allow")
        await rounds(loop)
        assert caplog.messages[2:] == ['client refused client=10.0.0.2:2 reason="not in allow"']

    run(main)
