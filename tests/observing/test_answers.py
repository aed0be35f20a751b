"""The status of a process with very much to show: it is whole, and making it takes no turn of the loop for long."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest

from rspd.admin.client import ask
from rspd.engine.loop import Loop
from rspd.net.address import Address, resolve
from rspd.net.listener import open_listeners
from rspd.observing.desk import Desk
from rspd.serving.tally import Tally
from rspd.snapshot import Snapshot, read
from tests.dialled import settle
from tests.observing.scene import Scene
from tests.support import PATIENCE, FakeClock, run


def status(
    folder: Path, text: str, prepare: Callable[[Scene], object], meanwhile: Callable[[Scene], object]
) -> tuple[Snapshot, list[float]]:
    """The status of a process that begins to answer, and the CPU time of each turn of its loop, of the longest last.

    meanwhile: called in each turn while the answer is made.
    """
    path, turns = f"{folder}/control.sock", list[float]()

    async def main(loop: Loop) -> Any:
        scene = Scene(loop, FakeClock(), text)
        prepare(scene)
        desk = Desk(loop, scene.shortage, scene.proxies, scene.life, scene.watchers)
        desk.prepare(metrics=False)
        outcomes = list[Any]()
        loop.measure_turns(turns, lambda: None)
        await settle(loop)
        turns.clear()  # the first one had the making of the scene
        desk.apply(open_listeners(Address(path=path), resolve(Address(path=path)), 8), ())
        await settle(loop)
        loop.wakeups.run_in_thread(lambda: ask(path, "/v1/status", PATIENCE), outcomes.append)
        while not outcomes:
            await loop.yield_turn()
            if desk._answers and desk._answers.control._answering:
                meanwhile(scene)
        desk.close()
        desk.apply((), ())
        await scene.end()
        await settle(loop)
        return outcomes[0]

    gc.disable()  # it has no bound in a process as large as that of the tests
    try:
        return read(Snapshot, run(main, time.thread_time, 3 * PATIENCE)), sorted(turns)
    finally:
        gc.enable()


def test_a_status_with_very_many_proxies_routes_and_pools_holds_nobody_up(
    tmp_path: Path, no_descriptor_is_left_open: None
) -> None:
    """While the first samples are taken, too."""
    known = {f"proxy{number}": Tally() for number in range(1000)}

    def prepare(scene: Scene) -> None:
        for name, tally in known.items():
            count = 100 if name == "proxy7" else 3
            tally.new += [(f"10.0.0.{number}:80", "client-closed", 1.0, 5, 5) for number in range(count)]
            tally.settle()
        scene.proxies.tallies.update(known)  # as of proxies that were taken out

    routes = [{"host": f"h{number}.example", "pool": f"pool{number % 500}"} for number in range(3000)]
    pools = {f"pool{number}": {"backend": f"127.0.0.1:{1000 + number}"} for number in range(500)}
    text = json.dumps({"listen": "127.0.0.1:0", "routes": routes, "pools": pools})
    found, turns = status(tmp_path, text, prepare, lambda _: None)
    assert [one.name for one in found.routes] == [f"h{number}.example" for number in range(3000)]
    assert [one.name for one in found.pools] == list(pools)
    assert len(found.backends) == 500
    assert [one.name for one in found.proxies] == ["", *known]
    for proxy in found.proxies[1:]:
        assert (proxy.ends, proxy.volumes) == (known[proxy.name].ends, known[proxy.name].volumes)
    # Each part takes less than a millisecond. The machine may be taken away in a turn or two, which counts as CPU time.
    assert turns[-5] < 0.012, turns[-9:]
    assert turns[-1] < 0.2, turns[-9:]


@pytest.mark.parametrize("at", range(1, 13))
def test_a_status_that_reloads_come_across_is_one_of_before_or_after(tmp_path: Path, at: int) -> None:
    def text(*names: str) -> str:
        proxies = {}
        for number, name in enumerate(names, 1):
            routes = [{"host": f"{name}{place}.example", "backend": "127.0.0.1:1"} for place in range(30)]
            proxies[name] = {"listen": f"127.0.0.{number}:0", "routes": routes}
        return json.dumps({"proxies": proxies})

    turn = count()

    def reload_once(scene: Scene) -> None:
        if next(turn) == at:
            scene.reload(text("b", "c"))

    found, _ = status(tmp_path, text("a", "b"), lambda _: None, reload_once)
    assert {one.name for one in found.proxies if not one.retired} == {one.proxy for one in found.routes}

    texts = cycle([text("b", "c"), text("a", "b")])

    def reload_often(scene: Scene) -> None:
        if next(turn) % 5 == 0:
            scene.reload(next(texts))

    found, _ = status(tmp_path, text("a", "b"), lambda _: None, reload_often)
    places = {(one.proxy, one.pool) for one in found.routes}
    assert places == {(one.proxy, one.name) for one in found.pools}
    assert {one.proxy for one in found.routes} in ({"a", "b"}, {"b", "c"})
