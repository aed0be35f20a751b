"""Counts of another version that cannot be read begin anew: no connection ends for them, and who looks is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rspd.admin.client import ask
from rspd.config.addresses import parse_address
from rspd.engine.loop import Loop
from rspd.net.address import resolve
from rspd.net.listener import open_listeners
from rspd.running.document import read
from rspd.running.legacy import Legacy
from tests.daemon.control import metrics
from tests.dialled import until
from tests.running.handing import DB, WEB, Half, Remade, parcel_of
from tests.running.test_documents import BYTES, DOCUMENT, NEWEST, Key, config, framed
from tests.support import FakeClock, free_port

pytest.importorskip("prometheus_client", reason="prometheus_client is not here: apt install python3-prometheus-client")

pytestmark = [pytest.mark.usefixtures("no_descriptor_is_left_open"), pytest.mark.large_pipes(2)]

SERIES = [[["web"], [7]], [["db"], [1]]]


def whole() -> Any:
    """The document, with all that observers hand over."""
    document = dict(DOCUMENT)
    document["samples"] = [["web", [[998.0, 6, 50, 4000], [999.0, 7, 56, 4042]]], ["db", [[999.0, 1, 8, 1]]]]
    worker = {"lineage": "w1", "counted": {"rspd_accepted_total": SERIES, "rspd_connection_seconds": []}}
    document["metrics"] = {"ended": {"rspd_accepted_total": SERIES}, "workers": {"/worker-1.sock": worker}}
    (_, web), db = document["tallies"]
    web = {**web, "ends": [["-", "bad-header", 2]], "refused": [["deny", 2]]}
    document["tallies"] = [["web", web], db]
    return json.loads(json.dumps(document))  # no part is there twice


WHOLE = whole()


def counts(document: Any) -> Iterator[Key]:
    """The places of all that observers hand over, and of all that is counted."""
    for part in ("life", "tallies", "samples", "metrics"):
        yield (part,)
        yield from places(document[part], (part,))
    yield ("served_before",)
    for number, proxy in enumerate(document["proxies"]):
        yield from (("proxies", number, key) for key in ("accepted", "refused", "last_end"))
        for place, one in enumerate(proxy["connections"]):
            known = ("id", "counted", "began", "started", "handovers")
            yield from (("proxies", number, "connections", place, key) for key in known if key in one)


def places(value: Any, above: Key) -> Iterator[Key]:
    """The ways to all parts of a value of JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*above, key)
        yield from places(part, (*above, key))


PLACES = list(counts(WHOLE))

ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
).filter(lambda value: not (isinstance(value, dict) and value.keys() == {"bytes"}))


def damaged(key: Key, value: object) -> bytes:
    """The document with another value at this place."""
    document = whole()
    inner = document
    for step in key[:-1]:
        inner = inner[step]
    inner[key[-1]] = value
    return framed(document, BYTES)


class Looked:
    """What those see who look at a process that takes over a document, by its control socket and its metrics."""

    def __init__(self, content: bytes, folder: Path) -> None:
        clock = FakeClock()
        clock.advance(5.0)
        with ExitStack() as stack:
            remade = Remade(read(NEWEST.read_bytes()), stack)
            with parcel_of(content, DOCUMENT["token"].encode(), remade.fds) as found, Loop(clock) as loop:
                remade.close_ours()
                loop.run(self._main(loop, Legacy(found), remade, stack, clock, folder))

    async def _main(
        self, loop: Loop, legacy: Legacy, remade: Remade, stack: ExitStack, clock: FakeClock, folder: Path
    ) -> None:
        half = Half(loop, config(), stack)
        half.listen_nowhere()
        half.desk.prepare(metrics=True)
        try:
            self.taken = await legacy.take_over(loop, half.proxies, half.desk)
            port = free_port()
            places = parse_address(f"{folder}/sock"), parse_address(f"127.0.0.1:{port}")
            half.desk.apply(*(open_listeners(one, resolve(one), 8) for one in places))
            outcomes: list[Any] = []

            def look() -> Any:
                status = ask(f"{folder}/sock", "/v1/status"), ask(f"{folder}/sock", "/v1/connections")
                return *status, metrics(port)

            async def look_from_outside() -> None:
                loop.wakeups.run_in_thread(look, outcomes.append)
                await until(loop, lambda: outcomes)
                outcome = outcomes.pop()
                if isinstance(outcome, Exception):
                    raise outcome
                self.status, self.connections, self.metrics = outcome

            for _ in range(2):
                await look_from_outside()
                clock.advance(5.0)  # the next sample is taken
            assert self.connections["connections"]
            for name in WEB + DB:
                await remade.goes_on(loop, clock, name)
            await half.ended()
            await look_from_outside()
        finally:
            await half.desk.finish()
            half.desk.close()
            await half.close()


@given(st.sampled_from(PLACES), ODD)
@example(("life", "turns"), {"counts": [1], "total": 1.0})
@example(("samples", 0, 1, 0), [998.0, 6, 50, 4000, 1])
@example(("proxies", 0, "connections", 0, "began"), None)
@example(("metrics", "ended", "rspd_accepted_total", 0, 1, 0), 10**400)
@settings(max_examples=25)
def test_any_value_in_place_of_any_count_costs_no_connection_and_no_answer(
    tmp_path_factory: pytest.TempPathFactory, key: Key, value: object
) -> None:
    looked = Looked(damaged(key, value), tmp_path_factory.mktemp("x"))
    assert looked.taken == len(WEB + DB)
    assert looked.connections["connections"] == []
    assert "rspd_accepted_total{" in looked.metrics
