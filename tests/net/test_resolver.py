"""Names looked up off the loop, by the system's own resolver."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from types import FrameType

import pytest

from rspd.config.addresses import parse_address
from rspd.engine.loop import Loop, Task
from rspd.net.address import Address, SocketAddress, denies, resolve
from rspd.net.resolver import ANSWER_LIFE, Resolver
from tests.engine.test_loop import no_threads, rounds
from tests.namespaces import OWN_DNS, in_namespace, name_server
from tests.support import FakeClock, eventually, run

LOCALHOST = Address("localhost", 80)
UNKNOWN = Address("nowhere.invalid", 80)  # RFC 6761: there is no such name, ever


@pytest.fixture
def lookups() -> Iterator[list[str]]:
    """The threads that have begun during the test."""
    begun: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is threading.Thread.run.__code__:
            begun.append(event)

    threading.setprofile(note)
    yield begun
    threading.setprofile(None)


@contextmanager
def hanging() -> Iterator[threading.Event]:
    """Threads that begin here hang before their first line until it ends; the event tells that one has."""
    begun, release = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        begun.set()
        assert release.wait(20)

    threading.setprofile(hang)
    try:
        yield begun
    finally:
        threading.setprofile(None)
        release.set()


async def settle(loop: Loop, *tasks: Task) -> None:
    """Let lookups that are under way end, whatever the clock."""
    while not all(task.done for task in tasks):
        await loop.yield_turn()


async def ask(
    resolver: Resolver, address: Address, deadline: float, outcomes: list[list[SocketAddress] | Exception]
) -> None:
    try:
        outcomes.append(await resolver.look_up(address, deadline))
    except OSError as error:
        outcomes.append(error)


@pytest.mark.parametrize("text", ["127.0.0.1:80", "[::1]:80", "/run/sock", "@name"])
def test_what_needs_no_lookup_is_answered_at_once_even_where_no_thread_can_be_started(text: str) -> None:
    address = parse_address(text)

    async def main(loop: Loop) -> None:
        with no_threads():
            task = loop.current
            outcomes: list[list[SocketAddress] | Exception] = []
            asked = loop.spawn(ask(Resolver(loop), address, -inf, outcomes))
            assert asked.done
            assert loop.current is task
            assert outcomes == [resolve(address)]

    run(main)


def test_a_name_is_looked_up() -> None:
    async def main(loop: Loop) -> list[SocketAddress]:
        return await Resolver(loop).look_up(LOCALHOST, inf)

    found = run(main)
    assert found == resolve(LOCALHOST)
    assert {where.address[0] for where in found} <= {"127.0.0.1", "::1"}
    assert {where.address[1] for where in found} == {80}


def test_an_unknown_name_is_an_error_for_each_who_asks_and_is_asked_for_again() -> None:
    async def main(loop: Loop) -> None:
        resolver = Resolver(loop)
        for _ in range(2):
            outcomes: list[list[SocketAddress] | Exception] = []
            await settle(loop, *[loop.spawn(ask(resolver, UNKNOWN, inf, outcomes)) for _ in range(3)])
            assert len(outcomes) == 3
            assert all(isinstance(outcome, socket.gaierror) for outcome in outcomes)

    run(main)


def ask_half_a_name_server(four: str, six: str) -> None:
    """Run in a namespace. four, six: what a name server says when it is asked for IPv4 or IPv6 addresses."""
    with name_server({socket.AF_INET: four, socket.AF_INET6: six}):
        try:
            found = resolve(Address("name.test", 80))
        except socket.gaierror as error:
            print(denies(error), error.errno)
        else:
            print(*found)


REFUSALS = ("SERVFAIL", "REFUSED")
ADDRESS = "127.0.0.9:80"


@pytest.mark.parametrize(
    ("four", "six", "found"),
    [
        *((four, "NODATA", "False") for four in REFUSALS),
        *(("NODATA", six, "False") for six in REFUSALS),
        ("SERVFAIL", "NXDOMAIN", "False"),
        ("NXDOMAIN", "SERVFAIL", "False"),
        ("NODATA", "", "False"),
        ("NODATA", "NODATA", f"True {socket.EAI_NODATA}"),
        ("NXDOMAIN", "NXDOMAIN", f"True {socket.EAI_NONAME}"),
        (ADDRESS, "NODATA", ADDRESS),
        (ADDRESS, "SERVFAIL", ADDRESS),
    ],
)
def test_that_a_name_is_gone_counts_only_if_both_families_say_so(four: str, six: str, found: str) -> None:
    (line,) = in_namespace(ask_half_a_name_server, four, six, prepare=OWN_DNS)
    assert line.startswith(found)


def test_one_thread_serves_all_who_ask_for_a_name_at_the_same_time(lookups: list[str]) -> None:
    outcomes: list[list[SocketAddress] | Exception] = []

    async def main(loop: Loop) -> None:
        resolver = Resolver(loop)
        tasks = [loop.spawn(ask(resolver, LOCALHOST, inf, outcomes)) for _ in range(20)]
        assert not outcomes
        await settle(loop, *tasks)

    run(main)
    assert outcomes == [resolve(LOCALHOST)] * 20
    assert len(lookups) == 1


def test_each_host_is_one_lookup_whatever_the_port(lookups: list[str]) -> None:
    async def main(loop: Loop) -> None:
        resolver = Resolver(loop)
        outcomes: list[list[SocketAddress] | Exception] = []
        addresses = [LOCALHOST, Address("localhost", 81), UNKNOWN]
        await settle(loop, *[loop.spawn(ask(resolver, address, inf, outcomes)) for address in addresses])
        found = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        assert sorted(found) == [resolve(LOCALHOST), resolve(Address("localhost", 81))]
        assert await resolver.look_up(Address("localhost", 82), inf) == resolve(Address("localhost", 82))

    run(main, FakeClock())
    assert len(lookups) == 2


def test_an_answer_is_used_again_for_a_second_and_then_no_more(lookups: list[str]) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        resolver = Resolver(loop)

        async def look_up() -> int:
            outcomes: list[list[SocketAddress] | Exception] = []
            await settle(loop, loop.spawn(ask(resolver, LOCALHOST, inf, outcomes)))
            assert outcomes == [resolve(LOCALHOST)]
            return len(lookups)

        assert await look_up() == 1
        for _ in range(3):
            clock.advance(ANSWER_LIFE * 0.3)
            await rounds(loop)
            assert await look_up() == 1
        clock.advance(ANSWER_LIFE * 0.2)
        await rounds(loop)
        assert await look_up() == 2

    assert ANSWER_LIFE == 1
    run(main, clock)


def test_an_answer_at_hand_does_without_a_thread() -> None:
    async def main(loop: Loop) -> None:
        resolver = Resolver(loop)
        found = await resolver.look_up(LOCALHOST, inf)
        with no_threads():
            assert await resolver.look_up(LOCALHOST, inf) == found

    run(main, FakeClock())


def test_without_a_thread_a_lookup_fails_and_the_next_one_tries_again() -> None:
    async def main(loop: Loop) -> None:
        resolver = Resolver(loop)
        with no_threads():
            for _ in range(2):
                with pytest.raises(OSError, match=r"^localhost cannot be looked up: can't start new thread$"):
                    await resolver.look_up(LOCALHOST, inf)
        assert await resolver.look_up(LOCALHOST, inf) == resolve(LOCALHOST)

    run(main)


def test_a_deadline_that_has_passed_ends_the_wait_and_the_lookup_serves_the_next() -> None:
    async def main(loop: Loop) -> None:
        resolver = Resolver(loop)
        with pytest.raises(TimeoutError, match=r"^no answer to the lookup of localhost$"):
            await resolver.look_up(LOCALHOST, loop.now)
        assert await resolver.look_up(LOCALHOST, inf) == resolve(LOCALHOST)

    run(main)


def test_who_is_cancelled_while_waiting_leaves_the_lookup_to_the_others(lookups: list[str]) -> None:
    outcomes: list[list[SocketAddress] | Exception] = []

    async def main(loop: Loop) -> None:
        resolver = Resolver(loop)
        first, second = (loop.spawn(ask(resolver, LOCALHOST, inf, outcomes)) for _ in range(2))
        first.cancel()
        second.wake()
        await settle(loop, first, second)

    run(main)
    assert outcomes == [resolve(LOCALHOST)]
    assert len(lookups) == 1


def test_the_loop_goes_on_and_deadlines_hold_while_a_lookup_hangs() -> None:
    clock = FakeClock()
    outcomes: list[list[SocketAddress] | Exception] = []

    async def main(loop: Loop) -> None:
        resolver = Resolver(loop)
        with hanging() as hung:
            impatient, patient = (
                loop.spawn(ask(resolver, LOCALHOST, loop.now + seconds, outcomes)) for seconds in (5, 60)
            )
            assert hung.wait(20)
            await rounds(loop)
            clock.advance(4.9)
            impatient.wake()
            await rounds(loop)
            assert not outcomes
            clock.advance(0.2)
            await rounds(loop)
            assert [str(outcome) for outcome in outcomes] == ["no answer to the lookup of localhost"]
            assert not patient.done
        await settle(loop, patient)
        assert outcomes[1:] == [resolve(LOCALHOST)]

    run(main, clock)


def test_a_lookup_that_ends_after_its_loop_disturbs_nobody() -> None:
    async def main(loop: Loop) -> None:
        with pytest.raises(TimeoutError):
            await Resolver(loop).look_up(LOCALHOST, loop.now)

    before = threading.active_count()
    with hanging():
        run(main)
    eventually(lambda: threading.active_count() == before)
