"""A look at the open connections: what it shows, in which order, and that it takes no turn of the loop for long."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rspd.admin.client import ask
from rspd.admin.query import SORTS, Query
from rspd.engine.loop import Loop, news
from rspd.net.address import Address, resolve
from rspd.net.listener import open_listeners
from rspd.observing.connections import Look
from rspd.observing.desk import Desk
from rspd.snapshot import Connection
from tests.dialled import settle
from tests.observing.crowd import crowd
from tests.observing.scene import Scene, play, talk
from tests.support import PATIENCE, Backend, FakeClock, echo, run

NOBODY = json.dumps({"listen": "127.0.0.1:0", "backends": ["127.0.0.1:1", "127.0.0.1:2"], "max_connections": 30_000})


@pytest.fixture
def backend(no_descriptor_is_left_open: None) -> Iterator[Backend]:
    with Backend(echo) as backend:
        yield backend


async def look(scene: Scene, **query: Any) -> tuple[list[Connection], int]:
    """The connections that are asked for, and how many match."""
    one = Look(scene.loop, scene.pace, scene.proxies, scene.life, scene.sampler)
    found = list(await one.first(Query(**query)))
    return found, one.matching


# What is shown


def test_a_connection_is_shown_with_all_that_is_known_of_it(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        with scene.connect() as client:
            await scene.until(lambda: scene.proxies.open)
            await scene.pass_time(3)
            await talk(scene, client, b"hello")
            await scene.pass_time(2)
            ((one,), matching) = await look(scene)
            assert (matching, one.id.partition("-")[2]) == (1, "1")
            assert re.fullmatch(r"127\.0\.0\.1:\d+", one.near)  # as the backend sees rspd
            assert one._replace(near="") == Connection(
                id=one.id,
                client="{}:{}".format(*client.getsockname()),
                backend=backend.address,
                state="open",
                age=5.0,
                idle=2.0,
                sent=5,
                received=5,
                rate=2.0,
            )

    play(json.dumps({"listen": "127.0.0.1:0", "backend": backend.address}), script)


def test_a_connection_that_has_moved_nothing_is_idle_since_its_begin(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        with scene.connect():
            await scene.until(lambda: scene.proxies.open)
            await scene.pass_time(30)
            ((one,), _) = await look(scene)
            assert (one.age, one.idle, one.sent, one.received, one.rate) == (30, 30, 0, 0, 0)

    play(json.dumps({"listen": "127.0.0.1:0", "backend": backend.address}), script)


def test_ids_stay_and_no_two_are_the_same(backend: Backend) -> None:
    async def script(scene: Scene) -> set[str]:
        with ExitStack() as stack:
            known: dict[str, str] = {}
            for count in range(1, 6):
                stack.enter_context(scene.connect())
                await scene.until(lambda count=count: scene.proxies.open == count)  # type: ignore[misc]
                found, _ = await look(scene, limit=1 if count == 2 else 99)
                known |= {one.client: one.id for one in found if known.setdefault(one.client, one.id) == one.id}
                assert [one.id for one in (await look(scene))[0]] == [known[one.client] for one in found] or count == 2
            assert len({*known.values()}) == len(known) == 5
            return {*known.values()}

    text = json.dumps({"listen": "127.0.0.1:0", "backend": backend.address, "max_connections": 9})
    assert not play(text, script) & play(text, script)  # of another process


def test_connections_of_a_proxy_that_was_taken_out_are_shown_by_its_name(backend: Backend) -> None:
    def text(*names: str) -> str:
        listen = {name: f"127.0.0.{number}:0" for number, name in enumerate(names, 1)}
        return json.dumps(
            {"proxies": {name: {"listen": at, "backend": backend.address} for name, at in listen.items()}}
        )

    async def script(scene: Scene) -> None:
        with scene.connect("a"), scene.connect("b"):
            await scene.until(lambda: scene.proxies.open == 2)
            scene.reload(text("b"))
            assert sorted(one.proxy for one in (await look(scene))[0]) == ["a", "b"]
            assert [one.proxy for one in (await look(scene, proxy="a"))[0]] == ["a"]
            assert (await look(scene, proxy="c")) == ([], 0)

    play(text("a", "b"), script)


# Which, and in which order


@pytest.mark.parametrize("sort", SORTS)
def test_the_largest_come_first_and_the_limit_cuts_the_rest(sort: str) -> None:
    async def script(scene: Scene) -> None:
        with crowd(scene, 700):
            every, matching = await look(scene, sort=sort)
            assert matching == len({one.id for one in every}) == 700
            numbers = [Query(sort=sort).key(one) for one in every]
            assert numbers == sorted(numbers, reverse=True)
            for limit in (0, 1, 7, 699, 700, 5000):
                first, matching = await look(scene, sort=sort, limit=limit)
                assert (first, matching) == (every[:limit], 700)

    play(NOBODY, script)


def test_of_equal_ones_the_earlier_come_first() -> None:
    async def script(scene: Scene) -> None:
        with crowd(scene, 120) as made:
            for one in made:
                one.started = scene.loop.now
            found, _ = await look(scene)
            assert [one.client for one in found] == ["{}:{}".format(*one.client_address) for one in made]
            assert (await look(scene, limit=5))[0] == found[:5]

    play(NOBODY, script)


def test_only_those_that_match_are_shown_and_counted() -> None:
    async def script(scene: Scene) -> None:
        with crowd(scene, 1000) as made:
            found, matching = await look(scene, backend="127.0.0.1:2", longer_than=501, limit=10)
            assert matching == 250
            assert [one.age for one in found] == list(range(1000 - 1, 1000 - 20, -2))
            host = made[0].client_address[0]
            assert isinstance(host, str)
            assert {one.client.partition(":")[0] for one in (await look(scene, client=host))[0]} == {host}
            assert (await look(scene, route="x"))[1] == 0

    play(NOBODY, script)


def test_those_that_end_during_the_look_are_left_out() -> None:
    async def script(scene: Scene) -> None:
        with crowd(scene, 500) as made:
            outcomes: list[list[Connection]] = []

            async def looking() -> None:
                outcomes.append((await look(scene))[0])

            scene.loop.spawn(looking())
            for one in made[100:]:
                one.task.done = True
                del scene.proxies.configured[""].connections[one.task]
            await scene.until(lambda: outcomes)
            assert len(outcomes[0]) == 100

    play(NOBODY, script)


# Very many


def test_an_answer_with_twenty_thousand_holds_nobody_up(tmp_path: Path, no_descriptor_is_left_open: None) -> None:
    """In CPU time of the loop's thread: who asks, and others, may keep the machine busy meanwhile."""
    turns: list[float] = []

    async def main(loop: Loop) -> Any:
        scene = Scene(loop, FakeClock(), NOBODY)
        path = f"{tmp_path}/control.sock"
        desk = Desk(loop, scene.shortage, scene.proxies, scene.life, scene.watchers)
        with crowd(scene, 20_000):
            desk.prepare(metrics=False)
            desk.apply(open_listeners(Address(path=path), resolve(Address(path=path)), 8), ())
            task, outcomes = loop.current, list[Any]()

            def take(outcome: Any) -> None:
                outcomes.append(outcome)
                task.wake()

            loop.measure_turns(turns, lambda: None)
            await settle(loop)
            turns.clear()  # the first one had the making of the crowd
            loop.wakeups.run_in_thread(lambda: ask(path, "/v1/connections?limit=19000&sort=bytes", PATIENCE), take)
            while not outcomes:
                await news()
        desk.close()
        desk.apply((), ())
        await scene.end()
        await settle(loop)
        return outcomes[0]

    answer = run(main, time.thread_time)
    assert answer["matching"] == 20_000
    assert len({one["id"] for one in answer["connections"]}) == 19_000
    assert len(turns) > 20_000 / 50 + 19_000 / 20
    # To make all of it takes 0.4 s. The machine may be taken away in a turn or two, which counts as CPU time.
    assert sorted(turns)[-3] < 0.04, sorted(turns)[-9:]
    assert max(turns) < 0.2, sorted(turns)[-9:]
