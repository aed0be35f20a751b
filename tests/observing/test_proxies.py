"""Proxies, routes, pools and backends as they are shown, with all that becomes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import pytest

from rspd import snapshot
from rspd.balancing import backend as balancing
from rspd.observing.proxies import backend as seen_backend
from rspd.observing.proxies import layout, pools, proxies, routes
from rspd.serving.tally import End
from rspd.snapshot import Checks, Ends, Failure, Listener, Pool, Refusals, Route, Volume
from tests.observing.scene import Scene, play, talk
from tests.support import Backend, echo


@pytest.fixture
def backend(no_descriptor_is_left_open: None) -> Iterator[Backend]:
    with Backend(echo) as backend:
        yield backend


def file(**keys: Any) -> str:
    return json.dumps({"listen": "127.0.0.1:0", "max_connections": 9, **keys})


def several(backend: Backend, *names: str) -> str:
    """A file with these proxies."""
    listen = {name: f"127.0.0.{number}:0" for number, name in enumerate(names, 1)}
    return json.dumps({"proxies": {one: {"listen": at, "backend": backend.address} for one, at in listen.items()}})


def look(scene: Scene) -> list[snapshot.Proxy]:
    return list(proxies(scene.proxies, scene.sampler, scene.loop))


def balanced(scene: Scene) -> list[tuple[Pool, Sequence[balancing.Backend]]]:
    return list(pools(layout(scene.proxies)))


def backends(scene: Scene) -> list[snapshot.Backend]:
    return [seen_backend(pool, one, scene.loop.now) for pool, them in balanced(scene) for one in them]


async def come_and_go(scene: Scene, name: str = "", size: int = 10) -> None:
    with scene.connect(name) as client:
        await talk(scene, client, size)
    await scene.until(lambda: not scene.proxies.open)


# Proxies


def test_a_proxy_is_shown_with_its_listeners_and_counts(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        await scene.pass_time(7)
        (one,) = look(scene)
        where = scene.proxies.configured[""].listeners[0].name
        assert one == snapshot.Proxy(
            listeners=(Listener(where, 0),),
            most=9,
            idle=7.0,
            seconds=one.seconds,
            queue_seconds=one.queue_seconds,
        )
        assert (one.seconds.number, one.queue_seconds.number) == (0, 0)
        with scene.connect() as client:
            await talk(scene, client, 10)
            await scene.pass_time(3)
            (one,) = look(scene)
            assert (one.open, one.accepted, one.idle, one.ends, one.volumes) == (1, 1, 0.0, (), ())
            await scene.sampler.count_bytes()
            assert look(scene)[0].volumes == (Volume(backend.address, 10, 10),)
        await scene.until(lambda: not scene.proxies.open)
        (one,) = look(scene)
        assert (one.open, one.accepted, one.ends) == (0, 1, (Ends(backend.address, "client-closed", 1),))
        assert one.volumes == (Volume(backend.address, 10, 10),)
        assert one.seconds.counts[3] == 1  # from 1 to 10 s

    play(file(backend=backend.address), script)


def test_who_waits_in_the_backlog_is_counted(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        with scene.connect() as client:
            await talk(scene, client, 1)
            with scene.connect(), scene.connect():
                await scene.until(lambda: look(scene)[0].listeners[0].waiting == 2)
                assert look(scene)[0].open == look(scene)[0].most == 1

    play(file(backend=backend.address, max_connections=1), script)


def test_refused_clients_and_failures_are_shown(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        with scene.connect():
            await scene.until(lambda: look(scene)[0].refused)
        scene.reload(file(backend="127.0.0.1:1"))
        with scene.connect():
            await scene.until(lambda: look(scene)[0].ends)
        await scene.pass_time(2)
        (one,) = look(scene)
        assert (one.accepted, one.refused) == (2, (Refusals("deny", 1),))
        assert one.failures == (
            Failure("refused: deny", "-", 1, "in deny 127.0.0.0/8", 2.0),
            Failure("backend-refused", "-", 1, "127.0.0.1:1: Connection refused", 2.0),
        )
        await scene.pass_time(700, step=100)
        assert look(scene)[0].failures == ()

    play(file(backend=backend.address, deny="127.0.0.0/8"), script)


def test_a_proxy_that_was_taken_out_is_shown_as_long_as_anything_is_known_of_it(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        await come_and_go(scene, "a")
        await come_and_go(scene, "b")
        with scene.connect("a") as client:
            await talk(scene, client, 5)
            scene.reload(several(backend, "b"))
            b, a = look(scene)
            assert (a.name, a.retired, a.open, a.most, a.listeners, a.accepted) == ("a", True, 1, 0, (), 2)
            assert (b.name, b.retired, b.open, b.accepted) == ("b", False, 0, 1)
        await scene.until(lambda: not scene.proxies.open)
        b, a = look(scene)
        assert (a.name, a.retired, a.open, a.accepted) == ("a", True, 0, 2)
        assert a.ends == (Ends(backend.address, "client-closed", 2),)

    play(several(backend, "a", "b"), script)


def test_counts_never_go_back_whatever_becomes_of_a_proxy(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        for turn in range(1, 4):
            with scene.connect("a") as client:
                await talk(scene, client, 5)
                scene.reload(several(backend, "b"))
                scene.reload(several(backend, "a", "b"))
                # There are two of this name now: one has the connection, and the counts are in one of them.
                entries = [one for one in look(scene) if one.name == "a"]
                assert sorted((one.retired, one.open) for one in entries) == [(False, 0), (True, 1)]
                assert sum(one.accepted for one in entries) == turn
                assert sum(end.number for one in entries for end in one.ends) == turn - 1
            await scene.until(lambda: not scene.proxies.open)
            (one,) = [one for one in look(scene) if one.name == "a"]
            assert (one.accepted, one.ends[0].number, one.volumes[0].sent) == (turn, turn, 5 * turn)

    play(several(backend, "a", "b"), script)


def test_backends_in_a_pool_keep_their_own_counts_and_those_that_are_long_gone_do_not(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        await come_and_go(scene)
        assert look(scene)[0].ends == (Ends(backend.address, "client-closed", 1),)

        def counted(hosts: range) -> dict[str, int]:
            """After connections to further backends, of which no file knows any more."""
            new: list[End] = [(f"10.1.0.{host}:80", "client-closed", 1.0, 5, 5) for host in hosts]
            scene.proxies.tallies[""].new += new
            return {one.backend: one.number for one in look(scene)[0].ends}

        found = counted(range(200))
        assert (found[backend.address], found["other"]) == (1, 100)
        scene.reload(file(backend="127.0.0.1:1"))
        found = counted(range(200, 220))
        assert backend.address not in found
        assert sum(found.values()) == 221

    play(file(routes=[{"from": "127.0.0.0/8", "backend": backend.address}]), script)


# Backends


def test_a_backend_is_shown_with_its_state_and_since_when(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        (up, spare) = backends(scene)
        assert (up.name, up.state, up.why, up.weight, up.limit, up.backup) == (backend.address, "up", "", 3, 2, False)
        assert (spare.name, spare.backup, spare.limit, spare.in_service_in) == ("127.0.0.1:1", True, inf, 1)
        await scene.pass_time(4)
        with scene.connect() as one, scene.connect() as other:
            await talk(scene, one, 1)
            await talk(scene, other, 1)
            up = backends(scene)[0]
            assert (up.state, up.open, up.chosen, up.state_age, up.connect.number) == ("full", 2, 2, 4.0, 2)
        await scene.until(lambda: not scene.proxies.open)
        assert backends(scene)[0].state == "up"
        backend.close()
        await scene.pass_time(1)
        with scene.connect():
            await scene.until(lambda: backends(scene)[1].failed)
        await scene.pass_time(3)
        down, spare = backends(scene)
        assert (down.state, down.why, down.chosen) == ("down", "Connection refused", 2)
        assert (down.state_age, down.in_service, down.in_service_in) == (3.0, False, 0)
        assert down.failed >= 1 <= spare.failed  # the client had further attempts

    own = {"address": backend.address, "weight": 3, "max_connections": 2}
    play(file(backends=[own, {"address": "127.0.0.1:1", "backup": True}], queue_timeout="1s"), script)


def test_checks_are_shown_if_there_are_any(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        assert [one.checks is None for one in backends(scene)] == [False, False, True]
        await scene.until(lambda: all(one.checks and one.checks.ago < inf for one in backends(scene)[:2]))
        await scene.pass_time(2)
        good, bad, _ = (one.checks for one in backends(scene))
        assert good
        assert bad
        assert good == Checks(good.good, 0, good.ago, True, "")
        assert bad == Checks(0, bad.bad, bad.ago, False, "Connection refused")
        assert good.good >= 1 <= bad.bad
        assert 0 <= good.ago <= 2 >= bad.ago >= 0

    them = [backend.address, "127.0.0.1:1", {"address": "127.0.0.1:2", "health": "off"}]
    play(file(backends=them, health="on"), script)


# Routes and pools


def test_routes_and_pools_say_where_they_belong(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        for host in ("a", "a", "b"):
            with scene.connect("web") as client:
                await talk(scene, client, f"GET / HTTP/1.1\r\nHost: {host}.example\r\n\r\n".encode())
        await scene.until(lambda: not scene.proxies.open)
        assert list(routes(layout(scene.proxies))) == [
            Route("web", "a.example", "host=a.example", "route a.example", False, 2),
            Route("web", "b.example", "host=b.example", "own", False, 1),
            Route("web", "c.example", "host=c.example", "shared", True, 0),
        ]
        found = [(pool, [one.name for one in them]) for pool, them in balanced(scene)]
        assert found == [
            (Pool("web", "own", False, "random"), ["127.0.0.1:1", backend.address]),
            (Pool("web", "route a.example", False, "round-robin", route="a.example"), [backend.address]),
            (Pool("ssh", "", False, "round-robin"), ["127.0.0.1:22"]),
            (Pool("", "shared", True, "round-robin"), [backend.address]),
        ]
        places = {(one.proxy, one.pool, one.shared) for one in backends(scene)}
        assert places == {(pool.proxy, pool.name, pool.shared) for pool, _ in found}

    there = [
        {"host": "a.example", "backend": backend.address},
        {"host": "b.example", "pool": "own"},
        {"host": "c.example", "pool": "shared"},
    ]
    named = {"own": {"backends": ["127.0.0.1:1", backend.address], "balance": "random"}}
    web = {"listen": "127.0.0.1:0", "routes": there, "pools": named}
    ssh = {"listen": "127.0.0.2:0", "backend": "127.0.0.1:22"}
    shared = {"shared": {"backend": backend.address}}
    play(json.dumps({"proxies": {"web": web, "ssh": ssh}, "pools": shared}), script)


def test_a_lone_proxy_has_a_pool_without_a_name_and_who_waits_there_is_counted(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        with scene.connect() as client:
            await talk(scene, client, 1)
            with scene.connect(), scene.connect():
                ((pool, _),) = await scene.until(
                    lambda: [one for one in pools(layout(scene.proxies)) if one[0].queue == 2]
                )
                assert pool == Pool("", "", False, "round-robin", 2)
                await scene.sampler.count_bytes()  # who waits is counted with the bytes
                assert (look(scene)[0].open, look(scene)[0].queue) == (3, 2)
                await scene.pass_time(3)
        await scene.until(lambda: not scene.proxies.open)
        assert look(scene)[0].queue_seconds.counts[5] == 2  # from 1 to 5 s

    own = {"address": backend.address, "max_connections": 1}
    play(file(backends=[own], queue_timeout="30s"), script)
