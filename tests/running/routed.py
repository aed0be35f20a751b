"""Two processes with routes, and their clients and backends: what the tests of their handover share."""

from __future__ import annotations

import re
import select
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import pytest

from rspd.config.keys import load_config
from rspd.routing.router import Route, Router
from rspd.serving.proxy import Proxy
from rspd.settings import Config
from tests import keeper
from tests.dialled import settle, until
from tests.running.handing import Half, arrives, ends, hand_over, send_over, stored, take_over
from tests.support import PATIENCE, FakeClock, is_reset

Script = Callable[[Half], Awaitable[object]]

WEB = b"GET / HTTP/1.1\r\nHost: web.example\r\n\r\n"
API = b"GET /api HTTP/1.1\r\nHost: api.example\r\n\r\n"
ELSEWHERE = b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n"
SSH = b"SSH-2.0-x\r\n"


def hello(name: str) -> bytes:
    """What a TLS client says first to a server of this name."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


class Scene:
    """Two processes, and the clients and backends that stay meanwhile.

    lines: the fields of the lines of connections that have ended, of both processes.
    """

    def __init__(self, store: keeper.Store, stack: ExitStack) -> None:
        self._store = store
        self._stack = stack
        self._backends: dict[str, socket.socket] = {}
        self.clock = FakeClock()
        self.lines: list[dict[str, str]] = []

    def write(self, _: int, line: str) -> None:
        """In place of the log."""
        self.lines.append(dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line)))

    def backend(self, name: str) -> str:
        """The address of a backend, which stays the same."""
        if name not in self._backends:
            self._backends[name] = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        return f"127.0.0.1:{self._backends[name].getsockname()[1]}"

    def full(self, name: str) -> str:
        """The address of a backend that has no room: the kernel drops each SYN."""
        if name not in self._backends:
            listener = socket.create_server(("127.0.0.1", 0), backlog=0)
            self._backends[name] = self._stack.enter_context(listener)
            self._stack.enter_context(socket.create_connection(listener.getsockname()))
        return self.backend(name)

    def config(self, text: str) -> Config:
        """The configuration of a file; in it, {NAME} stands for a backend, and the listeners are added."""
        text = re.sub(r"\{(\w+)\}", lambda match: self.backend(match[1]), text)
        text = text if "max_connections: 4" in text else f"max_connections: 100\n{text}"
        if "proxies:" not in text:
            text = "listen: 127.0.0.1:0\n" + text
        return load_config("file", {}, content=text.encode())

    def restart(self, before: str, script: Script, after: str, then: Script, meanwhile: float = 0.0) -> int:
        """Hand over from one process to the next, with what each does. Returns how many connections were taken over.

        meanwhile: seconds while no process runs.
        """
        assert hand_over(self.config(before), script, self.clock)
        found = stored(self._store)
        self._store.clear()
        self.clock.advance(meanwhile)
        counts: list[int] = []

        async def both(half: Half, taken: int) -> None:
            counts.append(taken)
            await then(half)

        take_over(found, self.config(after), both, self.clock)
        return counts[0]

    async def come(self, half: Half, says: bytes, proxy: str = "") -> socket.socket:
        """A client that says this first, and was accepted."""
        count = len(half.connections)
        [listener] = half.proxies.configured[proxy].listeners
        client = self._stack.enter_context(socket.socket())
        client.settimeout(PATIENCE)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(listener._sock.getsockname())
        client.sendall(says)
        await until(half.loop, lambda: len(half.connections) == count + 1)
        return client

    async def enter(self, half: Half, says: bytes, backend: str) -> tuple[socket.socket, socket.socket]:
        """A client that is relayed to this backend, and what was accepted there."""
        client = await self.come(half, says)
        server = await self.reached(half, backend, says)
        await until(half.loop, lambda: half.connections[-1].relay)
        return client, server

    async def reached(self, half: Half, backend: str, says: bytes) -> socket.socket:
        """What a backend has accepted for a client that has said this."""
        await until(half.loop, lambda: self.accepts(backend))
        server = self._stack.enter_context(self._backends[backend].accept()[0])
        server.settimeout(PATIENCE)
        await arrives(half.loop, server, says)
        return server

    def accepts(self, backend: str) -> bool:
        """Whether there is somebody to accept at a backend."""
        return bool(select.select([self._backends[backend]], [], [], 0)[0])


async def leave(half: Half, client: socket.socket, server: socket.socket) -> None:
    """A client ends, and its connection with it; no other one does meanwhile."""
    await settle(half.loop)
    count = len(half.connections)
    client.close()
    assert await ends(half.loop, server) == b""
    server.close()
    await until(half.loop, lambda: len(half.connections) == count - 1)


async def resets(half: Half, client: socket.socket) -> bool:
    """Whether a client that gets nothing is reset."""
    await until(half.loop, lambda: select.select([client], [], [], 0)[0])
    return is_reset(client)


async def talk(half: Half, client: socket.socket, server: socket.socket) -> None:
    """Both ends hear each other."""
    await send_over(half.loop, client, server, b"question")
    await send_over(half.loop, server, client, b"answer")


def only(half: Half) -> Proxy:
    [proxy] = half.proxies.configured.values()
    return proxy


def router(half: Half, proxy: str = "") -> Router:
    return half.proxies.configured[proxy].router


async def silent(half: Half, count: int) -> None:
    """So many clients are awaited, and all that they said so far was looked at."""
    await until(half.loop, lambda: router(half).silent == count)
    await settle(half.loop)


def named(half: Half, route: str, proxy: str = "") -> Route:
    """The route that people call so."""
    (found,) = (one for one in router(half, proxy).routes if one.config.name == route)
    return found


def opened(half: Half, route: str, proxy: str = "") -> list[int]:
    """How many connections the backends of a route have."""
    found = named(half, route, proxy)
    return [backend.open for backend in found.pool.members.everyone]


# Configurations

ROUTES = """
routes:
  - {host: web.example, backend: "{web}"}
  - {server_name: [tls.example, "*.tls.example"], backend: "{tls}"}
  - {protocol: ssh, backend: "{ssh}"}
"""

LIMITED = """
queue_timeout: 60s
connect_timeout: 5s
routes:
  - {host: web.example, pool: web}
  - {host: api.example, pool: web}
  - {server_name: tls.example, backend: "{tls}"}
pools:
  web: {backends: [{address: "{web}", max_connections: 1}]}
"""


async def queue(
    scene: Scene, half: Half, waiting: list[bytes]
) -> tuple[socket.socket, socket.socket, list[socket.socket]]:
    """A client that has the one place, what its backend has of it, and clients that wait for the place."""
    client, server = await scene.enter(half, WEB, "web")
    found = router(half).find("host=web.example")
    assert found
    queued = []
    for number, says in enumerate(waiting, 1):
        scene.clock.advance(0.1)
        await half.loop.yield_turn()
        queued.append(await scene.come(half, says))
        await until(half.loop, lambda: len(found.pool.queue.waiting) == number)  # noqa: B023
    return client, server, queued
