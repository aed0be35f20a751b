"""Handover of clients of routes: of those whose first bytes are awaited, who wait, are relayed, or get an answer."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rspd.serving.connection import Connection
from tests.dialled import settle, until
from tests.running.handing import Half, ends
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
    named,
    opened,
    queue,
    resets,
    router,
    silent,
    talk,
)
from tests.support import reset

KINDS = [
    (WEB, "web", 'route="web.example"', 'name="web.example" protocol=http'),
    (hello("a.tls.example"), "tls", 'route="tls.example+1"', 'name="a.tls.example" protocol=tls'),
    (SSH, "ssh", 'route="ssh"', "protocol=ssh"),
]
IDS = ["http", "tls", "ssh"]


def fields(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


# Heads


@pytest.mark.parametrize(("says", "backend", "route", "heard"), KINDS, ids=IDS)
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_a_head_that_is_awaited_is_heard_to_its_end_by_the_next_process(
    scene: Scene, says: bytes, backend: str, route: str, heard: str, part: float
) -> None:
    place = min(int(len(says) * part), 4 if says == SSH else len(says))
    clients: list[socket.socket] = []

    async def begin(half: Half) -> None:
        clients.append(await scene.come(half, says[:place]))
        await silent(half, 1)

    async def end(half: Half) -> None:
        assert router(half).silent == 1
        clients[0].sendall(says[place:])
        server = await scene.reached(half, backend, says)
        await talk(half, clients[0], server)
        assert [one.clients for one in router(half).routes] == [one.config.name in route for one in router(half).routes]
        await leave(half, clients[0], server)

    assert scene.restart(ROUTES, begin, ROUTES, end, meanwhile=4.0) == 1
    [line] = scene.lines
    expected = {"cause": "client-closed", "handovers": "1", "seconds": "4.000"}
    assert (fields(f"{route} {heard}") | expected).items() <= line.items()


@pytest.mark.parametrize(
    ("says", "cause", "answer"),
    [
        (b"", "no-route", b""),
        (WEB[:9], "first-bytes-timeout", b"HTTP/1.1 408 "),
        (hello("a.tls.example")[:20], "first-bytes-timeout", b"\x15\3\1\0\2\2\x50"),
        (b"SSH", "first-bytes-timeout", b""),
    ],
    ids=["silent", *IDS],
)
def test_the_time_for_first_bytes_goes_on(scene: Scene, says: bytes, cause: str, answer: bytes) -> None:
    clients: list[socket.socket] = []

    async def begin(half: Half) -> None:
        clients.append(await scene.come(half, says))
        await silent(half, 1)

    async def end(half: Half) -> None:
        scene.clock.advance(0.9)
        await settle(half.loop)
        assert router(half).silent == 1
        scene.clock.advance(0.2)
        if answer:
            got = await ends(half.loop, clients[0])
            assert got.startswith(answer)
            clients[0].close()
        else:
            assert await resets(half, clients[0])
        await half.ended()

    scene.restart(ROUTES, begin, ROUTES, end, meanwhile=4.0)
    assert [(line["cause"], line["handovers"]) for line in scene.lines] == [(cause, "1")]


def test_a_client_that_was_to_speak_by_now_is_heard_if_it_spoke_while_no_process_ran(scene: Scene) -> None:
    clients: list[socket.socket] = []

    async def begin(half: Half) -> None:
        clients.extend([await scene.come(half, WEB[:9]), await scene.come(half, b"")])
        await silent(half, 2)
        clients[0].sendall(WEB[9:])
        clients[1].sendall(SSH)

    async def end(half: Half) -> None:
        await leave(half, clients[0], await scene.reached(half, "web", WEB))
        await leave(half, clients[1], await scene.reached(half, "ssh", SSH))

    scene.restart(ROUTES, begin, ROUTES, end, meanwhile=6.0)


def test_of_too_many_clients_that_say_nothing_the_first_one_is_given_up_in_the_next_process_too(scene: Scene) -> None:
    clients: list[socket.socket] = []
    few = "max_connections: 4" + ROUTES

    async def begin(half: Half) -> None:
        for _ in range(3):
            scene.clock.advance(0.1)
            await half.loop.yield_turn()
            clients.append(await scene.come(half, b""))
        await silent(half, 3)

    async def end(half: Half) -> None:
        await silent(half, 2)
        assert await resets(half, clients[0])
        for client in clients[1:]:
            client.sendall(SSH)
            await leave(half, client, await scene.reached(half, "ssh", SSH))

    assert scene.restart(ROUTES, begin, few, end) == 3
    assert scene.lines[0]["cause"] == "first-bytes-timeout"
    assert "this client had not said all for longest" in scene.lines[0]["reason"]


def test_a_client_that_aborts_within_its_head_is_said_to_have_aborted(scene: Scene) -> None:
    clients: list[socket.socket] = []

    async def begin(half: Half) -> None:
        clients.append(await scene.come(half, WEB[:9]))
        await silent(half, 1)

    async def end(half: Half) -> None:
        reset(clients[0])
        await half.ended()

    scene.restart(ROUTES, begin, ROUTES, end)
    assert [(line["cause"], line["handovers"]) for line in scene.lines] == [("client-aborted", "1")]


def test_a_client_whose_head_is_awaited_is_not_asked_for_a_proxy_header_that_was_none_of_its_terms(
    scene: Scene,
) -> None:
    clients: list[socket.socket] = []

    async def begin(half: Half) -> None:
        clients.extend([await scene.come(half, WEB[:9]), await scene.come(half, b"")])
        await silent(half, 2)

    async def end(half: Half) -> None:
        for client, rest in zip(clients, (WEB[9:], WEB), strict=True):
            client.sendall(rest)
            await leave(half, client, await scene.reached(half, "web", WEB))

    scene.restart(ROUTES, begin, "accept_proxy: 127.0.0.0/8" + ROUTES, end)
    assert [line["cause"] for line in scene.lines] == ["client-closed"] * 2


@pytest.mark.parametrize("limit", [1, 2])
def test_a_client_whose_head_is_awaited_counts_for_its_limit_in_the_next_process(scene: Scene, limit: int) -> None:
    clients: list[socket.socket] = []
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 80\r\n"
    text = "accept_proxy: 127.0.0.0/8\nmax_connections_per_client: 2" + ROUTES

    async def begin(half: Half) -> None:
        clients.append(await scene.come(half, header + WEB[:9]))
        clients.append(await scene.come(half, header[:9]))
        await silent(half, 1)

    async def end(half: Half) -> None:
        clients[1].sendall(header[9:] + SSH)
        if limit == 1:
            assert await resets(half, clients[1])
        else:
            await leave(half, clients[1], await scene.reached(half, "ssh", SSH))
        clients[0].sendall(WEB[9:])
        await leave(half, clients[0], await scene.reached(half, "web", WEB))

    scene.restart(text, begin, text.replace("client: 2", f"client: {limit}"), end)
    assert scene.lines[-1]["client"] == "192.0.2.1:1234"
    assert scene.lines[-1]["via"].startswith("127.0.0.1:")


# Relayed


@pytest.mark.parametrize(("says", "backend", "route", "heard"), KINDS, ids=IDS)
def test_a_relayed_connection_keeps_its_route_in_the_log_and_at_its_backend(
    scene: Scene, says: bytes, backend: str, route: str, heard: str
) -> None:
    pair: list[socket.socket] = []
    name = route.split('"')[1]

    async def begin(half: Half) -> None:
        pair.extend(await scene.enter(half, says, backend))
        await talk(half, pair[0], pair[1])
        assert opened(half, name) == [1]

    async def end(half: Half) -> None:
        assert opened(half, name) == [1]
        assert [one.clients for one in router(half).routes] == [one.config.name == name for one in router(half).routes]
        assert router(half).pool.members._left == {}
        await talk(half, pair[0], pair[1])
        await leave(half, pair[0], pair[1])
        assert opened(half, name) == [0]

    assert scene.restart(ROUTES, begin, ROUTES, end) == 1
    [line] = scene.lines
    expected = {"backend": scene.backend(backend), "sent": str(len(says) + 16), "received": "12", "handovers": "1"}
    assert (fields(f"{route} {heard}") | expected).items() <= line.items()


@pytest.mark.parametrize(
    ("routes", "says", "route", "heard"),
    [
        ('[{from: 127.0.0.0/8, backend: "{a}"}, {backend: "{b}"}]', WEB, "127.0.0.0/8", "unknown"),
        ('[{backend: "{a}"}]', WEB, "default", "unknown"),
        ('[{host: x.example, backend: "{b}"}, {backend: "{a}"}]', b"\0\1", "default", "unknown"),
        ('[{protocol: silent, backend: "{a}"}, {backend: "{b}"}]', b"", "silent", "silent"),
    ],
    ids=["from", "default", "unknown", "silent"],
)
def test_a_connection_whose_route_says_little_of_it_keeps_it_too(
    scene: Scene, routes: str, says: bytes, route: str, heard: str
) -> None:
    pair: list[socket.socket] = []
    queued: list[socket.socket] = []
    pool = f"routes: {routes}".replace('backend: "{a}"', 'backends: [{address: "{a}", max_connections: 1}]')
    pool = f"queue_timeout: 60s\n{pool}"

    async def begin(half: Half) -> None:
        for wanted in (pair, queued):
            wanted.append(await scene.come(half, says))
            await settle(half.loop)
            scene.clock.advance(5.0 if heard == "silent" else 0.0)
            if wanted is pair:
                pair.append(await scene.reached(half, "a", says))
        found = named(half, route)
        await until(half.loop, lambda: found and len(found.pool.queue.waiting) == 1)

    async def end(half: Half) -> None:
        found = named(half, route)
        assert found
        assert (opened(half, route), len(found.pool.queue.waiting), found.clients) == ([1], 1, 2)
        await talk(half, pair[0], pair[1])
        await leave(half, pair[0], pair[1])
        server = await scene.reached(half, "a", says)
        await leave(half, queued[0], server)

    assert scene.restart(pool, begin, pool, end) == 2
    for line in scene.lines:
        assert {"route": f'"{route}"', "protocol": heard, "backend": scene.backend("a")}.items() <= line.items()
        assert "name" not in line


# Waiting


def test_clients_of_two_routes_keep_their_places_in_the_queue_of_one_pool(scene: Scene) -> None:
    known: list[socket.socket] = []
    queued: list[socket.socket] = []
    says = [API, WEB, WEB, API]

    async def begin(half: Half) -> None:
        client, server, waiting = await queue(scene, half, says)
        known.extend([client, server])
        queued.extend(waiting)

    async def end(half: Half) -> None:
        assert opened(half, "web.example") == [1]
        assert [one.clients for one in router(half).routes] == [3, 2, 0]
        await settle(half.loop)
        assert not scene.accepts("web")
        await leave(half, known[0], known[1])
        for client, said in zip(queued, says, strict=True):
            server = await scene.reached(half, "web", said)
            await settle(half.loop)
            assert not scene.accepts("web")
            await leave(half, client, server)

    assert scene.restart(LIMITED, begin, LIMITED, end) == 5
    assert [line["route"] for line in scene.lines] == [
        f'"{one}.example"' for one in ("web", "api", "web", "web", "api")
    ]


def test_the_time_in_the_queue_of_a_route_goes_on_and_the_client_is_told_the_end_of_it(scene: Scene) -> None:
    known: list[socket.socket] = []

    async def begin(half: Half) -> None:
        client, server, waiting = await queue(scene, half, [API])
        known.extend([client, server, *waiting])

    async def end(half: Half) -> None:
        await settle(half.loop)
        scene.clock.advance(1.1)
        assert (await ends(half.loop, known[2])).startswith(b"HTTP/1.1 503 ")
        known[2].close()
        await leave(half, known[0], known[1])

    text = LIMITED + "idle_timeout: off\n"
    scene.restart(text, begin, text, end, meanwhile=59.0)
    assert [(line["cause"], line["route"]) for line in scene.lines] == [
        ("queue-timeout", '"api.example"'),
        ("client-closed", '"web.example"'),
    ]


@pytest.mark.parametrize("backend", ["full", "web"])
def test_an_attempt_of_a_route_begins_anew_at_its_backend_of_now_within_the_same_time(
    scene: Scene, backend: str
) -> None:
    scene.full("full")
    text = 'routes: [{host: web.example, backend: "{%s}"}]'
    clients: list[socket.socket] = []

    async def begin(half: Half) -> None:
        clients.append(await scene.come(half, WEB))
        await until(half.loop, lambda: opened(half, "web.example") == [1])

    async def end(half: Half) -> None:
        if backend == "web":
            await leave(half, clients[0], await scene.reached(half, "web", WEB))
            return
        scene.clock.advance(0.9)
        await settle(half.loop)
        assert opened(half, "web.example") == [1]
        scene.clock.advance(0.2)
        assert (await ends(half.loop, clients[0])).startswith(b"HTTP/1.1 504 ")
        clients[0].close()
        await half.ended()

    scene.restart(text % "full", begin, text % backend, end, meanwhile=4.0)
    [line] = scene.lines
    assert (line["route"], line["name"]) == ('"web.example"', '"web.example"')
    assert line["cause"] == ("client-closed" if backend == "web" else "connect-timeout")


# Answers

ANSWERS = [
    (ELSEWHERE, b"HTTP/1.1 404 ", {"cause": "no-route", "name": '"other.example"', "protocol": "http"}),
    (WEB.replace(b": ", b" : "), b"HTTP/1.1 400 ", {"cause": "bad-head", "protocol": "http"}),
    (
        API,
        b"HTTP/1.1 502 ",
        {"cause": "backend-refused", "name": '"api.example"', "protocol": "http", "route": '"api.example"'},
    ),
    (hello("x.example"), b"\x15\3\1\0\2\2\x70", {"cause": "no-route", "name": '"x.example"', "protocol": "tls"}),
]
ANSWERING = """
error_pages: {400: PAGE, 404: PAGE, 502: PAGE}
routes:
  - {host: web.example, backend: "{web}"}
  - {host: api.example, backend: "127.0.0.1:9"}
  - {server_name: tls.example, backend: "{web}"}
"""
GONE = 'routes: [{protocol: ssh, backend: "{ssh}"}]'


@pytest.mark.parametrize("after", ["the same", "gone", "plain"])
@pytest.mark.parametrize("read", [False, True], ids=["being written", "written"])
@pytest.mark.parametrize(("says", "answer", "known"), ANSWERS, ids=["404", "400", "502", "alert"])
def test_an_answer_goes_on_in_the_next_process_with_all_that_the_log_is_to_say(
    scene: Scene,
    tmp_path: Path,
    says: bytes,
    answer: bytes,
    known: dict[str, str],
    read: bool,
    after: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = tmp_path / "page"
    page.write_bytes(bytes(1 << 16))
    text = ANSWERING.replace("PAGE", str(page))
    next_text = {"the same": text, "gone": GONE, "plain": 'backend: "{web}"'}[after]
    clients: list[socket.socket] = []
    got: list[bytes] = []
    watch = Connection.handle

    async def with_little_room(connection: Connection) -> None:
        connection.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        await watch(connection)

    monkeypatch.setattr(Connection, "handle", with_little_room)

    async def begin(half: Half) -> None:
        clients.append(await scene.come(half, says))
        [connection] = half.connections
        await until(half.loop, lambda: hasattr(connection, "farewell"))
        if read:
            clients[0].setblocking(False)
            await until(half.loop, lambda: take(clients[0], got) and not connection.farewell._left)
        await settle(half.loop)
        assert bool(connection.farewell._left) is (not read and answer[:1] == b"H")
        assert connection.client.ended is not bool(connection.farewell._left)

    async def end(half: Half) -> None:
        [connection] = half.connections
        assert connection.farewell._deadline <= scene.clock.now + (9.0 if connection.farewell._left else 1.0)
        got.append(await ends(half.loop, clients[0]))
        assert half.connections == [connection]
        clients[0].sendall(b"more")
        clients[0].shutdown(socket.SHUT_WR)
        await half.ended()

    assert scene.restart(text, begin, next_text, end, meanwhile=1.0) == 1
    whole = b"".join(got)
    assert whole.startswith(answer)
    assert len(whole) == len(answer) if answer[:1] != b"H" else whole.endswith(bytes(1 << 16))
    [line] = scene.lines
    assert (known | {"handovers": "1"}).items() <= line.items()
    assert "route" in known or "route" not in line


def take(client: socket.socket, got: list[bytes]) -> bool:
    """Take what there is for a client that does not block."""
    try:
        while data := client.recv(1 << 16):
            got.append(data)
    except BlockingIOError:
        pass
    return True


def test_the_time_for_an_answer_goes_on(scene: Scene) -> None:
    clients: list[socket.socket] = []

    async def begin(half: Half) -> None:
        clients.append(await scene.come(half, ELSEWHERE))
        [connection] = half.connections
        await until(half.loop, lambda: hasattr(connection, "farewell"))
        await settle(half.loop)

    async def end(half: Half) -> None:
        scene.clock.advance(0.4)
        await settle(half.loop)
        assert half.connections
        scene.clock.advance(0.2)
        await half.ended()
        assert (await ends(half.loop, clients[0])).startswith(b"HTTP/1.1 404 ")

    scene.restart(ROUTES, begin, ROUTES, end, meanwhile=1.5)
    assert [(line["cause"], line["seconds"]) for line in scene.lines] == [("no-route", "2.100")]
