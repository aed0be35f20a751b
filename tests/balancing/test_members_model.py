"""Backends and clients' ways to them, in any order of events, against what must always be so."""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.balancing.backend import Backend
from rspd.balancing.policies import POLICIES
from rspd.engine.loop import Loop
from rspd.settings import BackendConfig
from tests.dialled import Scene, configured, switches
from tests.support import FakeClock, reset, run

ADDRESSES = [f"127.0.0.1:{port}" for port in range(1, 5)]

MAX_FAILS = 2

REFUSED = ConnectionRefusedError(111, "Connection refused")

configurations = st.lists(
    st.tuples(
        st.sampled_from(range(4)),
        st.sampled_from([1, 1, 2, 5]),
        st.booleans(),
        st.sampled_from([inf, inf, 1, 2]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda one: one[0],
)

proxies = st.fixed_dictionaries(
    {
        "balance": st.sampled_from(sorted(POLICIES)),
        "max_fails": st.sampled_from([1, 1, MAX_FAILS]),
        "fail_timeout": st.sampled_from([0.0, 1.0, 10.0]),
        "queue_timeout": st.sampled_from([0.0, 5.0]),
    }
)

numbers = st.integers(0, 20)

events = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), numbers),
        st.tuples(st.just("begin"), numbers),
        st.tuples(st.sampled_from(["reached", "failed", "aborted", "ended"]), numbers),
        st.tuples(st.sampled_from(["well", "unwell"]), numbers),
        st.tuples(st.just("advance"), st.sampled_from([0.0, 0.5, 1.0, 10.0])),
        st.tuples(st.just("apply"), st.tuples(configurations, proxies)),
    ),
    max_size=40,
)


def backends_of(configuration: list[tuple[int, int, bool, float]], addresses: list[str]) -> list[BackendConfig]:
    return [
        configured(addresses[number], weight=weight, backup=backup, max_connections=limit)
        for number, weight, backup, limit in configuration
    ]


def choosable(scene: Scene) -> list[Backend]:
    """Those that are in service with room, of the kind whose turn it is."""
    members = list(scene.backends.members.values())
    spares = not any(backend.up for backend in members if not backend.backup)
    return [one for one in members if one.up and not one.full and one.backup is spares]


def check(scene: Scene, open_ones: Counter[Backend]) -> None:
    """What is so between any two events."""
    backends = scene.backends
    members = list(backends.members.values())
    for backend in {*members, *open_ones}:
        assert backend.open == open_ones[backend]
        assert backend.member is (backend in members)
        assert backend.eligible is (backend.member and backend.up and not backend.full)
    for backup, policy in zip((False, True), backends._policies, strict=True):
        known: list[Backend] = []
        while found := policy.pick_other("192.0.2.1", known):
            known.append(found)
        assert set(known) == {one for one in members if one.eligible and one.backup is backup}
        assert backends._up[backup] == sum(one.up for one in members if one.backup is backup)
    assert set(backends._out) == {one for one in members if one.out_until}
    assert [one.out_until for one in backends._out] == sorted(one.out_until for one in backends._out)
    alone = members[0] if len(members) == 1 else None
    assert backends.only is (alone if alone and alone.up and alone.limit == inf else None)
    assert all(len(one.failures) <= MAX_FAILS for one in members)


@settings(max_examples=200)
@given(configurations, proxies, events)
def test_whatever_happens_who_may_be_chosen_is_chosen_and_who_may_not_is_not(
    configuration: list[tuple[int, int, bool, float]], proxy: dict[str, Any], sequence: list[tuple[str, Any]]
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        async with Scene(loop, *backends_of(configuration, ADDRESSES), clock=clock, **proxy) as scene:
            backends = scene.backends
            dialled: list[tuple[Backend, float]] = []
            connected: list[Backend] = []
            for event, value in sequence:
                if event == "begin":
                    begin(scene, f"192.0.2.{value}", dialled)
                elif event == "advance":
                    clock.advance(value)
                    await loop.yield_turn()
                elif event == "apply":
                    others, settings = value
                    scene.apply(*backends_of(others, ADDRESSES), **settings)
                elif event in ("well", "unwell"):
                    members = list(backends.members.values())
                    backends._checked(members[value % len(members)], event == "well", "checked")
                elif event == "ended" and connected:
                    backends.release(connected.pop(value % len(connected)))
                elif event != "ended" and dialled:
                    backend, out_until = dialled.pop(value % len(dialled))
                    if event == "reached":
                        connected.append(backend)
                        if backend.out_until:
                            backends.reached(backend)
                    else:
                        backends.release(backend)
                        if event == "failed":
                            backends.failed(backend, REFUSED)
                        else:
                            backends.no_verdict(backend, out_until)
                check(scene, Counter([*connected, *(backend for backend, _ in dialled)]))

    run(main, clock)


def begin(scene: Scene, host: str, dialled: list[tuple[Backend, float]]) -> None:
    """Have a client choose a backend, as `Dialler.dial` does."""
    backends, now = scene.backends, scene.loop.now
    members = list(backends.members.values())
    expected = choosable(scene)
    due = [one for one in members if one.out_until and one.out_until <= now and one.healthy and not one.full]
    any_up = backends.any_up
    chosen = backends.choose((host, 1), ())
    if chosen is None:
        assert not expected
        full = [one for one in members if one.full]
        assert any_up or backends.config.queue_timeout or all(one in full or not one.healthy for one in members)
        return
    assert chosen in expected or chosen in due or not any_up
    assert not (chosen.backup and any(one.up and not one.backup for one in members))
    assert chosen.healthy
    assert chosen.member
    assert not chosen.full
    chosen.open += 1
    if chosen.open == chosen.limit:
        backends.update(chosen)
    dialled.append((chosen, chosen.out_until))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(1, 4)),
        st.tuples(st.sampled_from(["close", "abort", "cancel", "on", "off"]), numbers),
        st.tuples(st.just("advance"), st.sampled_from([0.05, 0.2, 1.0, 3.0])),
        st.tuples(st.just("apply"), st.tuples(configurations, proxies)),
    ),
    max_size=25,
)


@settings(max_examples=100)
@given(configurations, proxies, steps)
def test_whatever_happens_nobody_waits_while_there_is_room_and_everybody_is_answered(
    configuration: list[tuple[int, int, bool, float]], proxy: dict[str, Any], sequence: list[tuple[str, Any]]
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+-++") as four:
            addresses = [switch.address for switch in four]
            async with Scene(
                loop, *backends_of(configuration, addresses), clock=clock, connect_timeout=2.0, **proxy
            ) as scene:
                for event, value in sequence:
                    if event == "come":
                        for _ in range(value):
                            scene.start()
                    elif event == "advance":
                        await scene.advance(value)
                    elif event == "apply":
                        others, settings = value
                        scene.apply(*backends_of(others, addresses), **settings)
                    elif event in ("on", "off"):
                        four[value % 4].off()
                        if event == "on":
                            four[value % 4].on()
                    elif scene.clients:
                        client = scene.clients[value % len(scene.clients)]
                        if event == "close":
                            client.close()
                        elif event == "abort" and client.peer.fileno() >= 0:
                            reset(client.peer)
                        elif client.task:
                            client.task.cancel()
                    for _ in range(4 * len(scene.clients)):
                        if not (scene.dialler._waiting and choosable(scene)):
                            break
                        await loop.yield_turn()  # they are served one after the other
                    await scene.settle()
                    open_ones = Counter(client.backend for client in scene.clients if client.backend)
                    for backend in scene.backends.members.values():
                        assert backend.open == open_ones[backend]
                    assert not (scene.dialler._waiting and choosable(scene))
                # Each is served, or told why not, in a time that is known.
                await scene.advance(5.0 + 2.0 + 0.5, 0.1)
                assert all(client.task and client.task.done for client in scene.clients)
                assert not scene.dialler._waiting

    run(main, clock)
