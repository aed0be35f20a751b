"""What has been counted goes on in the next process: each connection, and each of its bytes, is counted once."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import pytest

from rspd.engine.loop import Loop
from rspd.observing.life import Life
from rspd.running.document import read
from rspd.running.handover import Handover
from tests.dialled import settle
from tests.numbers import Numbers
from tests.running.handing import DB, PROXY_HEADER, WEB, Half, Remade, hand_over, parcel_of, plain_config, take_over
from tests.running.routed import Scene, leave, resets, talk
from tests.running.test_documents import NEWEST, config, framed, parts
from tests.support import FakeClock, run

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

OLDEST = NEWEST.parent / "version-1"

FIELD = re.compile(r'(\w+)=("[^"]*"|\S+)')


def counted(half: Half) -> Numbers:
    """What the proxies have counted: ends by proxy, backend and cause, bytes by proxy, backend and direction."""
    found = Numbers()
    for name, tally in half.proxies.tallies.items():
        for backend, cause, number in tally.ends:
            found["ends", name, backend, cause] += number
        for backend, sent, received in tally.volumes:
            found["bytes", name, backend, "upload"] += sent
            found["bytes", name, backend, "download"] += received
        found["ended", name] += tally.seconds.snapshot().number
    return +found


def logged(lines: list[dict[str, str]]) -> Numbers:
    """The same, by the fields of lines."""
    found = Numbers()
    for line in lines:
        name, backend = line.get("proxy", ""), line["backend"]
        found["ends", name, backend, line["cause"]] += 1
        found["bytes", name, backend, "upload"] += int(line["sent"])
        found["bytes", name, backend, "download"] += int(line["received"])
        found["ended", name] += 1
    return +found


PLAIN = 'backend: "{web}"'


def test_bytes_that_were_looked_at_before_are_counted_once(scene: Scene) -> None:
    pairs: list[tuple[socket.socket, socket.socket]] = []

    async def begin(half: Half) -> None:
        for _ in range(4):
            pairs.append(await scene.enter(half, b"hello", "web"))
            await talk(half, *pairs[-1])
        await half.look()
        await leave(half, *pairs.pop())  # its share is given up with it
        await talk(half, *pairs[0])  # more than was looked at
        assert counted(half)["bytes", "", scene.backend("web"), "upload"] == 4 * 13

    async def go_on(half: Half) -> None:
        assert counted(half)["bytes", "", scene.backend("web"), "upload"] == 4 * 13
        await half.look()
        await half.look()
        assert counted(half)["bytes", "", scene.backend("web"), "upload"] == 4 * 13 + 8
        await talk(half, *pairs[1])
        for pair in pairs:
            await leave(half, *pair)
        assert counted(half) == logged(scene.lines)
        assert half.proxies.tallies[""].shares == {}

    assert scene.restart(PLAIN, begin, PLAIN, go_on) == 3
    assert len(scene.lines) == 4


def test_the_counts_of_a_proxy_that_is_not_configured_any_more_go_on_under_its_name(scene: Scene) -> None:
    pairs: list[tuple[socket.socket, socket.socket]] = []
    before = 'proxies: {old: {listen: "127.0.0.1:0", backend: "{web}"}, new: {listen: "127.0.0.2:0", backend: "{ssh}"}}'
    after = 'proxies: {new: {listen: "127.0.0.2:0", backend: "{ssh}"}}'

    async def begin(half: Half) -> None:
        for _ in range(2):
            client = await scene.come(half, b"hello", "old")
            pairs.append((client, await scene.reached(half, "web", b"hello")))
            await talk(half, *pairs[-1])
        await half.look()
        await leave(half, *pairs.pop())

    async def go_on(half: Half) -> None:
        assert half.proxies.accepted("old") == 2
        await leave(half, *pairs[0])
        assert half.proxies.everyone() == list(half.proxies.configured.values())
        assert half.proxies.accepted("old") == 2
        assert counted(half) == logged(scene.lines)

    assert scene.restart(before, begin, after, go_on) == 1


# Connections that cannot go on

Script = Callable[[Half], Awaitable[object]]


def take_over_document(
    content: bytes,
    damage: Callable[[dict[str, Any]], object],
    script: Callable[[Half, Remade, FakeClock], Awaitable[object]],
) -> None:
    """Be the process after one that has left a document of `everything`, damaged."""
    clock = FakeClock()  # the document was written at the beginning of this clock
    clock.advance(5.0)
    document, held = parts(content)
    damage(document)
    with ExitStack() as stack:
        remade = Remade(read(content), stack)
        with parcel_of(framed(document, held), document["token"].encode(), remade.fds) as found:
            remade.close_ours()
            take_over(found, config(), lambda half, _: script(half, remade, clock), clock)


@pytest.mark.large_pipes(2)
def test_bytes_of_a_connection_that_cannot_go_on_are_counted_as_its_line_says(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some had been counted before, and some had not."""
    lines: list[str] = []
    monkeypatch.setattr("rspd.serving.connection.write", lambda _, line: lines.append(line))

    def damage(document: dict[str, Any]) -> None:
        (_, web), (_, db) = document["tallies"]
        plain, via = document["proxies"][0]["connections"][0], document["proxies"][1]["connections"][0]
        assert plain["counted"] == [8, 6]
        plain["counted"] = [3, 0]
        web["volumes"][0][1:] = [sent - gone for sent, gone in zip(web["volumes"][0][1:], (5, 6), strict=True)]
        del plain["relay"]["backend"]["fd"]
        del via["counted"]
        db["volumes"].clear()
        via["descriptors"].append(9999)

    async def script(half: Half, remade: Remade, clock: FakeClock) -> None:
        for name in WEB[1:]:
            await remade.goes_on(half.loop, clock, name)
        await half.ended()
        lost = [one.getMessage() for one in caplog.records if "cause=handover-failed" in one.getMessage()]
        fields = [dict(FIELD.findall(line)) for line in (*lines, *lost)]
        assert [(one["sent"], one["received"], one["seconds"]) for one in fields[-2:]] == [
            ("8", "6", "5.000"),
            ("8", "1", "5.000"),
        ]
        found = counted(half)
        assert found.pop(("ends", "db", "-", "bad-header")) == 1  # by the process before, which has logged it
        found["ended", "db"] -= 1
        assert found == logged(fields)

    take_over_document(NEWEST.read_bytes(), damage, script)


@pytest.mark.large_pipes(2)
def test_connections_of_a_version_that_counted_nothing_are_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("rspd.serving.connection.write", lambda _, line: lines.append(line))

    async def script(half: Half, remade: Remade, clock: FakeClock) -> None:
        assert half.life.handovers == 1
        assert half.proxies.accepted("web") == len(WEB)
        await half.look()
        for name in WEB + DB:
            await remade.goes_on(half.loop, clock, name)
            await half.look()
        await half.ended()
        assert counted(half) == logged([dict(FIELD.findall(line)) for line in lines])

    take_over_document(OLDEST.read_bytes(), lambda _: None, script)


@pytest.mark.parametrize(
    ("known", "refused"),
    [(None, [("unknown", 5)]), ([["deny", 3]], [("deny", 3), ("unknown", 2)]), ([["deny", 9]], [("deny", 9)])],
    ids=["none", "some", "of proxies that are gone too"],
)
@pytest.mark.large_pipes(2)
def test_clients_whose_refusal_nobody_counted_by_key_are_refused_ones_all_the_same(
    known: object, refused: list[tuple[str, int]]
) -> None:
    """A version did not count by key. Its line at the end says how many were served, and so does the status."""

    def damage(document: dict[str, Any]) -> None:
        document["proxies"][0].update(accepted=9, refused=5)
        document["tallies"] = [["web", {"refused": known}]] if known else []

    async def script(half: Half, remade: Remade, _: FakeClock) -> None:
        assert [tuple(one) for one in half.proxies.tallies["web"].refused] == refused
        assert half.proxies.accepted("web") == 9
        assert half.proxies.configured["web"].served == 4
        assert not half.proxies.tallies["db"].refused

    take_over_document(NEWEST.read_bytes(), damage, script)


@pytest.mark.large_pipes(2)
def test_a_time_of_the_last_end_that_cannot_be_read_begins_anew() -> None:
    def damage(document: dict[str, Any]) -> None:
        document["proxies"][1].update(connections=[], last_end="now")

    async def script(half: Half, remade: Remade, clock: FakeClock) -> None:
        clock.advance(2.0)
        await half.loop.yield_turn()
        assert half.proxies.configured["db"].idle == 2.0

    take_over_document(NEWEST.read_bytes(), damage, script)


# Handovers


def test_a_handover_that_fails_loses_no_count_and_counts_nothing_twice(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails when all is written, and clients that wait were interrupted."""
    text = 'queue_timeout: 60s\nbackend: {address: "{web}", max_connections: 1}'
    clients: list[socket.socket] = []

    def no_room(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rspd.running.handover.write", no_room)

    async def begin(half: Half) -> None:
        clients.extend(await scene.enter(half, b"hello", "web"))
        await talk(half, clients[0], clients[1])
        await half.look()
        clients.append(await scene.come(half, b"queued"))
        await settle(half.loop)
        scene.clock.advance(3.0)

    async def go_on(half: Half) -> None:
        await half.look()
        await settle(half.loop)
        assert half.life.handovers == 0
        await leave(half, clients[0], clients[1])
        await leave(half, clients[2], await scene.reached(half, "web", b"queued"))
        assert counted(half) == logged(scene.lines)
        queued = half.proxies.tallies[""].queue_seconds.snapshot()
        assert (queued.number, queued.total) == (1, 3.0)

    assert not hand_over(scene.config(text), begin, scene.clock, go_on)


def test_all_clients_that_are_refused_until_a_process_has_handed_over_are_in_its_log(
    scene: Scene, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'accept_proxy: 127.0.0.0/8\ndeny: 203.0.113.0/24\nbackend: "{web}"'
    clients: list[socket.socket] = []
    last = Handover._begin

    def refuse(handover: Handover) -> None:
        """Nobody is accepted any more. Now they say who they are."""
        last(handover)
        for client in clients:
            client.sendall(PROXY_HEADER)

    monkeypatch.setattr(Handover, "_begin", refuse)

    async def begin(half: Half) -> None:
        clients.extend([await scene.come(half, b"") for _ in range(5)])

    async def go_on(half: Half) -> None:
        assert [await resets(half, client) for client in clients] == [True] * 5
        assert [tuple(one) for one in half.proxies.tallies[""].refused] == [("deny", 5)]

    scene.restart(text, begin, text, go_on)
    refused = [record.getMessage() for record in caplog.records if record.getMessage().startswith("client refused ")]
    assert sum(1 + int(dict(FIELD.findall(line)).get("more", 0)) for line in refused) == 5


def test_a_start_after_a_crash_is_no_handover() -> None:
    async def script(half: Half, taken: int) -> None:
        assert (taken, half.life.handovers) == (0, 0)

    take_over([], plain_config(1), script)


@pytest.mark.parametrize("measured", [[True, True, True], [True, False, True]], ids=["always", "with a gap"])
def test_turns_that_were_measured_go_on_whether_the_next_process_measures_them_or_not(measured: list[bool]) -> None:
    handed: dict[str, Any] = {}

    def measure(measures: bool) -> int:
        async def turns(loop: Loop) -> int:
            life = Life(loop, "", "")
            life.resume(handed)
            if measures:
                life.measure_turns()
            await settle(loop)
            handed.update(life.hand_over())
            return (await life.snapshot()).turns.number

        return run(turns)

    counts = [measure(measures) for measures in measured]
    assert 0 < counts[0] < counts[2]
    assert handed["handovers"] == 4
