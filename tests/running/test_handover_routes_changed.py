"""Handover of clients of routes to a process whose file, or version, is another one; or to none."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rspd.running.document import read, write
from tests.dialled import settle, until
from tests.running.handing import DB as DB_KINDS
from tests.running.handing import NAME, Half, Remade, ends, hand_over, parcel_of, take_over
from tests.running.handing import WEB as WEB_KINDS
from tests.running.routed import (
    API,
    ELSEWHERE,
    LIMITED,
    ROUTES,
    SSH,
    WEB,
    Scene,
    hello,
    leave,
    only,
    opened,
    queue,
    router,
    silent,
    talk,
)
from tests.running.test_documents import Key, extended, keys, remove
from tests.support import tcp_pair

# Routes that are gone, or new

BEFORE = """
queue_timeout: 60s
routes:
  - {host: web.example, backends: [{address: "{web}", max_connections: 1}]}
  - {host: api.example, backend: "{api}"}
"""
RENAMED = """
queue_timeout: 60s
routes:
  - {host: "*.example", backends: [{address: "{web}", max_connections: 1}]}
"""
NO_ROUTES = """
queue_timeout: 60s
backends: [{address: "{web}", max_connections: 1}]
"""


@pytest.mark.parametrize("after", [RENAMED, NO_ROUTES], ids=["renamed", "without routes"])
def test_of_routes_that_are_gone_relayed_clients_go_on_and_the_others_choose_anew(scene: Scene, after: str) -> None:
    known: list[socket.socket] = []
    awaited: list[socket.socket] = []
    plain = after == NO_ROUTES

    async def begin(half: Half) -> None:
        client, server, queued = await queue(scene, half, [WEB])
        other, far = await scene.enter(half, API, "api")
        known.extend([client, server, *queued, other, far])
        awaited.append(await scene.come(half, WEB[:5]))
        await silent(half, 1)

    async def end(half: Half) -> None:
        client, server, queued, other, far = known
        pool = router(half).pool if plain else router(half).routes[0].pool
        [member] = pool.members.everyone
        await until(half.loop, lambda: len(pool.queue.waiting) == (2 if plain else 1))
        assert member.open == 1, "what is relayed counts at its backend"
        assert not scene.accepts("web")
        await talk(half, client, server)
        await talk(half, other, far)
        awaited[0].sendall(WEB[5:])
        await until(half.loop, lambda: len(pool.queue.waiting) == 2)
        scene.clock.advance(30.0)
        await talk(half, other, far)
        await leave(half, client, server)
        await leave(half, queued, await scene.reached(half, "web", WEB))
        await leave(half, awaited[0], await scene.reached(half, "web", WEB))
        await leave(half, other, far)

    assert scene.restart(BEFORE, begin, after, end, meanwhile=3.0) == 4
    relayed, queued, head, other = scene.lines
    assert [(line["route"], line["name"]) for line in (relayed, other)] == [
        ('"web.example"', '"web.example"'),
        ('"api.example"', '"api.example"'),
    ]
    assert other["backend"] == scene.backend("api")
    for line in (queued, head):
        assert (line.get("route"), line["cause"]) == (None if plain else '"*.example"', "client-closed")


@pytest.mark.parametrize("says", [b"", WEB[:9], WEB])
def test_without_routes_a_client_has_the_whole_connect_timeout_for_its_backend(scene: Scene, says: bytes) -> None:
    scene.full("full")
    clients: list[socket.socket] = []
    text = 'first_bytes_timeout: 10s\nroutes: [{host: web.example, backend: "{full}"}]\n'

    async def begin(half: Half) -> None:
        clients.append(await scene.come(half, says))
        await settle(half.loop)

    async def end(half: Half) -> None:
        scene.clock.advance(4.9)
        await settle(half.loop)
        assert half.connections
        scene.clock.advance(0.2)
        if says == WEB:
            assert (await ends(half.loop, clients[0])).startswith(b"HTTP/1.1 504 ")
            clients[0].close()
        await half.ended()

    scene.restart(text, begin, 'backend: "{full}"', end, meanwhile=4.0)
    assert [(line["cause"], line["seconds"]) for line in scene.lines] == [("connect-timeout", "9.100")]


@pytest.mark.parametrize("says", [b"", WEB], ids=["silent", "head"])
def test_where_routes_are_new_relayed_clients_go_on_and_the_others_choose_one(scene: Scene, says: bytes) -> None:
    scene.full("full")
    known: list[socket.socket] = []
    after = """
routes:
  - {host: web.example, backend: "{web}"}
  - {protocol: silent, backend: "{ssh}"}
"""

    async def begin(half: Half) -> None:
        known.extend(await scene.enter(half, b"question", "web"))
        known.append(await scene.come(half, says))
        await settle(half.loop)

    async def end(half: Half) -> None:
        client, server, waiting = known
        [member] = router(half).routes[0].pool.members.everyone
        assert member.open == (2 if says else 1), "what is relayed counts at its backend"
        await talk(half, client, server)
        if not says:
            await silent(half, 1)
            scene.clock.advance(5.0)
        backend = "web" if says else "ssh"
        await leave(half, waiting, await scene.reached(half, backend, says))
        await leave(half, client, server)

    before = 'max_fails: off\nqueue_timeout: 60s\nbackends: [{address: "{web}", max_connections: 1}]'
    scene.restart(before, begin, after, end, meanwhile=3.0)
    new, plain = scene.lines
    assert (new["route"], new["handovers"]) == ('"web.example"' if says else '"silent"', "1")
    assert "route" not in plain


# Proxies that are gone

OTHER = """
proxies:
  other: {listen: "127.0.0.2:0", backend: "{ssh}"}
"""
SHARED = """
proxies:
  old:
    listen: 127.0.0.1:0
    queue_timeout: 60s
    routes:
      - {host: web.example, pool: web}
      - {host: api.example, backend: "{api}"}
  other: {listen: "127.0.0.2:0", backend: "{ssh}"}
pools:
  web: {backends: [{address: "{web}", max_connections: 1}], queue_timeout: 60s}
"""
STILL = """
proxies:
  other: {listen: "127.0.0.2:0", routes: [{pool: web}]}
pools:
  web: {backends: [{address: "{web}", max_connections: 1}], queue_timeout: 60s}
"""


@pytest.mark.parametrize("after", [OTHER, STILL], ids=["pool gone", "pool still there"])
@pytest.mark.parametrize("shared", [True, False])
def test_clients_of_a_proxy_that_is_gone_go_on_by_its_routes(scene: Scene, shared: bool, after: str) -> None:
    before = SHARED
    if not shared:
        before = SHARED.replace(
            "routes:", 'pools: {web: {backends: [{address: "{web}", max_connections: 1}]}}\n    routes:'
        )
        before = before[: before.index("\npools:")]
    known: list[socket.socket] = []

    async def begin(half: Half) -> None:
        client = await scene.come(half, WEB, "old")
        server = await scene.reached(half, "web", WEB)
        queued = await scene.come(half, WEB, "old")
        found = router(half, "old").find("host=web.example")
        await until(half.loop, lambda: found and found.pool.queue.waiting)
        known.extend([client, server, queued, await scene.come(half, API[:9], "old")])
        known.append(await scene.come(half, b"", "old"))
        known.append(await scene.come(half, ELSEWHERE, "old"))
        await until(half.loop, lambda: router(half, "old").silent == 2)
        await until(half.loop, lambda: any(hasattr(one, "farewell") for one in half.connections))

    async def end(half: Half) -> None:
        client, server, queued, begun, awaited, answered = known
        [old] = half.proxies._retired
        assert (old.open, old.router.silent, old.router.refused) == (5, 2, 1)
        assert [(one.config.name, one.clients) for one in old.router.routes] == [("web.example", 2), ("api.example", 0)]
        await talk(half, client, server)
        assert not scene.accepts("web")
        assert (await ends(half.loop, answered)).startswith(b"HTTP/1.1 404 ")
        answered.close()
        begun.sendall(API[9:])
        await leave(half, begun, await scene.reached(half, "api", API))
        awaited.sendall(WEB)
        await until(half.loop, lambda: len(old.router.routes[0].pool.queue.waiting) == 2)
        await leave(half, client, server)
        await leave(half, queued, await scene.reached(half, "web", WEB))
        await leave(half, awaited, await scene.reached(half, "web", WEB))
        await half.ended()

    assert scene.restart(before, begin, after, end) == 5
    assert [(line["proxy"], line.get("route")) for line in scene.lines] == [
        ("old", None),
        ("old", '"api.example"'),
        ("old", '"web.example"'),
        ("old", '"web.example"'),
        ("old", '"web.example"'),
    ]


# Pools, and counters


@pytest.mark.parametrize("where", ["file", "proxy", "route"])
def test_pools_know_in_the_next_process_which_backends_are_down_and_since_when(scene: Scene, where: str) -> None:
    backends = 'backends: ["127.0.0.1:9", "{web}"], fail_timeout: 600s'
    route = f"{{host: web.example, {backends}}}" if where == "route" else "{host: web.example, pool: web}"
    text = f"routes: [{route}]\n" + (f"pools: {{web: {{{backends}}}}}\n" if where != "route" else "")
    if where == "proxy":
        text = "proxies:\n  p:\n    listen: 127.0.0.1:0\n    " + text.replace("\n", "\n    ")
    pair: list[socket.socket] = []
    name = "p" if where == "proxy" else ""

    async def begin(half: Half) -> None:
        client = await scene.come(half, WEB, name)
        pair.extend([client, await scene.reached(half, "web", WEB)])

    async def end(half: Half) -> None:
        found = router(half, name).find("host=web.example")
        assert found
        down, up = found.pool.members.everyone
        assert (down.state, down.why_down, down.down_since) == ("down", "Connection refused", 1000.0)
        assert (up.open, up.in_service) == (1, True)
        await leave(half, pair[0], pair[1])

    scene.restart(text, begin, text, end, meanwhile=20.0)


def test_counters_of_each_route_go_on_by_its_name(scene: Scene) -> None:
    after = ROUTES.replace("[tls.example, ", "[").replace(
        "{protocol: ssh", '{protocol: http2, backend: "{web}"}\n  - {protocol: ssh'
    )

    async def begin(half: Half) -> None:
        for says, backend in [(WEB, "web"), (SSH, "ssh"), (SSH, "ssh"), (hello("tls.example"), "tls")]:
            client, server = await scene.enter(half, says, backend)
            await leave(half, client, server)
        client = await scene.come(half, ELSEWHERE)
        assert (await ends(half.loop, client)).startswith(b"HTTP/1.1 404 ")
        client.close()
        await half.ended()

    async def end(half: Half) -> None:
        counts = {route.config.name: route.clients for route in router(half).routes}
        assert counts == {"web.example": 1, "*.tls.example": 0, "http2": 0, "ssh": 2}
        assert router(half).refused == 1
        assert only(half).served == 5

    scene.restart(ROUTES, begin, after, end)


# What is left here


def test_clients_of_routes_go_on_here_if_nothing_can_be_written(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("rspd.host.store.Parcel.write", full)
    known: list[socket.socket] = []

    async def begin(half: Half) -> None:
        client, server, queued = await queue(scene, half, [API])
        known.extend([client, server, *queued, await scene.come(half, b""), await scene.come(half, API[:9])])
        known.append(await scene.come(half, ELSEWHERE))
        await silent(half, 2)

    async def go_on(half: Half) -> None:
        client, server, queued, awaited, begun, answered = known
        assert (only(half).open, router(half).silent) == (5, 2)
        assert (await ends(half.loop, answered)).startswith(b"HTTP/1.1 404 ")
        answered.close()
        await talk(half, client, server)
        begun.sendall(API[9:])
        awaited.sendall(hello("tls.example"))
        tls = await scene.reached(half, "tls", b"\x16")
        awaited.close()
        await ends(half.loop, tls)
        tls.close()
        await leave(half, client, server)
        await leave(half, queued, await scene.reached(half, "web", API))
        await leave(half, begun, await scene.reached(half, "web", API))
        await half.ended()

    assert not hand_over(scene.config(LIMITED), begin, scene.clock, go_on)
    assert [line["route"] for line in scene.lines if "route" in line] == [
        '"tls.example"',
        '"web.example"',
        '"api.example"',
        '"api.example"',
    ]
    assert all("handovers" not in line for line in scene.lines)
    [warning] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning == 'cannot hand over, connections drain reason="File too large"'


# Documents of other versions

FIRST = 100  # the number of a descriptor


def document() -> dict[str, dict[str, Any]]:
    """What a document says of clients of routes: one whose head is awaited, who waits, is relayed, gets an answer."""

    def client(number: int, route: str, heard: Mapping[str, object], **more: object) -> dict[str, Any]:
        side = {"fd": number, "family": 2, "ended": False, "aborted": False}
        known = {"client": ["127.0.0.1", number], "started": 1000.0, "began": 1000.0, "handovers": 1}
        known |= {"route": route, "heard": heard} if heard else {"first_bytes_until": 1005.0}
        return {**known, "descriptors": [number], "side": side, "admitted": True, **more}

    said = {"protocol": "http", "name": "web.example", "method": "GET"}
    attempts = {"deadline": 1010.0, "give_up": 1600.0, "tried": [], "used": 1, "reasons": ["x"], "cause": "error"}
    farewell = {"left": b"answer", "read": 5, "cause": "no-route", "reason": "", "deadline": 1003.0}
    relayed = client(FIRST + 3, "web.example", said)
    del relayed["side"]
    sides = {"client": {"fd": FIRST + 3, "family": 2}, "backend": {"fd": FIRST + 4, "family": 2}}
    relayed |= {"descriptors": [FIRST + 3, FIRST + 4], "backend": "BACKEND", "relay": sides}
    return {
        "awaited": client(FIRST, "", {}),
        "queued": client(FIRST + 1, "web.example", said, attempts=attempts),
        "answered": client(FIRST + 2, "", said, farewell=farewell),
        "relayed": relayed,
    }


def take_over_document(scene: Scene, handed: dict[str, dict[str, Any]]) -> None:
    """Each goes on to its end."""
    scene.clock.advance(2.0)
    with ExitStack() as stack:
        pairs = {name: tcp_pair() for name in (*handed, "backend")}
        for near, _ in pairs.values():
            stack.enter_context(near)
        fds = {FIRST + number: far.fileno() for number, (_, far) in enumerate(pairs.values())}
        proxies = [{"name": "", "connections": list(handed.values())}]
        content = b"".join(map(bytes, write({"token": "token", "proxies": proxies})))
        with parcel_of(content, b"token", fds) as found:
            for name, (near, far) in pairs.items():
                far.close()
                near.sendall({"awaited": WEB, "queued": WEB, "answered": ELSEWHERE}.get(name, b""))

            async def end(half: Half, taken: int) -> None:
                assert taken == len(handed)
                near, server = pairs["relayed"][0], pairs["backend"][0]
                await talk(half, near, server)
                near.close()
                assert await ends(half.loop, server) == b""
                server.close()
                answer = await ends(half.loop, pairs["answered"][0])
                assert answer in (b"answer", b"") or answer.startswith(b"HTTP/1.1 404 ")
                pairs["answered"][0].close()
                for name in ("queued", "awaited"):
                    server = await scene.reached(half, "web", WEB)
                    pairs[name][0].close()
                    server.close()
                await half.ended()

            text = 'queue_timeout: 60s\nroutes: [{host: web.example, backend: "{web}"}]'
            take_over(found, scene.config(text), end, scene.clock)


OF_ROUTES = {"heard", "route", "first_bytes_until", "attempts", "admitted", "farewell"}


@pytest.mark.parametrize(
    "key",
    [(), *(key for key in keys(document()) if len(key) > 1 and key[1] in OF_ROUTES)],
    ids=lambda key: ".".join(map(str, key)) or "none",
)
def test_a_key_that_is_missing_costs_no_client_of_a_route(scene: Scene, key: Key) -> None:
    handed = document()
    handed["relayed"]["backend"] = scene.backend("web")
    if key:
        remove(handed, key)
    take_over_document(scene, handed)
    causes = sorted(line["cause"] for line in scene.lines)
    assert causes == ["client-closed"] * 3 + ["error" if key == ("answered", "farewell", "cause") else "no-route"]
    assert {line["route"] for line in scene.lines if "route" in line} == {'"web.example"'}


def test_unknown_keys_of_clients_of_routes_are_ignored(scene: Scene) -> None:
    handed = {name: extended(one) for name, one in document().items()}
    handed["relayed"]["backend"] = scene.backend("web")
    take_over_document(scene, handed)
    assert [line.get("route") for line in scene.lines].count('"web.example"') == 3


@pytest.mark.large_pipes(2)
def test_connections_of_an_older_version_go_on_where_their_proxy_has_routes_now(scene: Scene, stack: ExitStack) -> None:
    content = (Path(__file__).parent / "documents" / "version-1").read_bytes()
    known = read(content)
    remade = Remade(known, stack)
    scene.clock.advance(5.0)
    web = known["proxies"][0]["connections"][0]["backend"].partition(":")[2]
    text = f"""
proxies:
  web: {{listen: "127.0.0.1:0", routes: [{{host: x.example, backend: "{{web}}"}}, {{backend: "{NAME}:{web}"}}]}}
  db: {{listen: "127.0.0.2:0", accept_proxy: 127.0.0.0/8, routes: [{{protocol: ssh, backend: "{{ssh}}"}}]}}
"""
    with parcel_of(content, known["token"].encode(), remade.fds) as found:
        remade.close_ours()

        async def end(half: Half, taken: int) -> None:
            assert taken == len(remade.handed)
            assert opened(half, "default", "web") in ([6], [7]), "one may have ended at once"
            for name in WEB_KINDS + DB_KINDS:
                await remade.goes_on(half.loop, scene.clock, name)
            await half.ended()

        take_over(found, scene.config(text), end, scene.clock)
    assert {line["handovers"] for line in scene.lines} == {"1"}
    assert not [line for line in scene.lines if "route" in line]
