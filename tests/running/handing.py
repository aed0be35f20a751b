"""Two processes of the service in one: proxies that hand over, and proxies that take over, without a daemon.

`python -m tests.running.handing FILE` writes a document as this version writes it. The one of each version is in
documents/: it is made once, and never again.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rspd.config.addresses import parse_address, parse_backend
from rspd.engine.flow import Flow
from rspd.engine.loop import Loop
from rspd.engine.pipes import Pipe, Pipes
from rspd.engine.side import Side
from rspd.host.store import Inheritance, Store
from rspd.host.systemd import STORED, Notifier, StoredDescriptor
from rspd.net.address import Address, SocketAddress, resolve
from rspd.net.descriptors import Shortage
from rspd.net.listener import Listener, open_listeners
from rspd.net.networks import parse_network
from rspd.net.ways import Ways
from rspd.observing.desk import Desk
from rspd.observing.life import Life
from rspd.observing.pace import Pace
from rspd.observing.samples import Sampler
from rspd.routing.pools import PoolMaker
from rspd.running.handover import Handover
from rspd.running.legacy import Legacy
from rspd.running.proxies import Proxies
from rspd.serving.connection import Connection
from rspd.settings import BackendConfig, Config, HealthConfig, ProxyConfig
from tests import keeper
from tests.dialled import Names, until
from tests.support import PATIENCE, FakeClock, is_reset, reset, tcp_pair

# A name that only these proxies know.
NAME = "backend.example"

Script = Callable[["Half"], Awaitable[object]]


class Half:
    """The proxies of one process.

    stack: closes the peers of the connections.
    """

    def __init__(self, loop: Loop, config: Config, stack: ExitStack) -> None:
        self.loop = loop
        self.config = config
        self.stack = stack
        self.pipes = Pipes(8)
        ways = Ways(loop)
        names = Names(loop, {NAME: [SocketAddress(socket.AF_INET, ("127.0.0.1", 0))]})
        self.shortage = Shortage(loop)
        maker = PoolMaker(loop, self.shortage, names, ways)
        self.proxies = Proxies(loop, self.shortage, self.pipes, maker, ways, set())
        self.life = Life(loop, "", "")
        self.desk = Desk(loop, self.shortage, self.proxies, self.life, set())

    def listen(self) -> None:
        """Begin to accept."""
        for proxy in self.proxies.configured.values():
            proxy.pause()
        listeners = {
            proxy.name: [one for address in proxy.listen for one in open_listeners(address, resolve(address), 8)]
            for proxy in self.config.proxies
        }
        self.proxies.apply(self.config, listeners)

    def listen_nowhere(self) -> None:
        """Be configured, and accept nobody."""
        self.proxies.apply(self.config, {proxy.name: [] for proxy in self.config.proxies})

    @property
    def connections(self) -> list[Connection]:
        return [one for proxy in self.proxies.everyone() for one in proxy.connections.values()]

    @property
    def listeners(self) -> list[Listener]:
        return self.proxies.listeners

    async def look(self) -> None:
        """Look at all connections: count their bytes, and give them ids."""
        await Sampler(self.loop, Pace(self.loop), self.proxies, set()).count_bytes()
        for connection in self.connections:
            self.life.id_of(connection)

    async def connect(
        self, backend: socket.socket, name: str = "", family: int = socket.AF_INET, says: bytes = b""
    ) -> tuple[socket.socket, socket.socket]:
        """A client of a proxy, and what was accepted for it at the backend; they are connected by a relay.

        says: what the client sends first.
        """
        [where] = [
            one._sock.getsockname() for one in self.proxies.configured[name].listeners if one._sock.family == family
        ]
        client = self.stack.enter_context(socket.socket(family))
        client.settimeout(PATIENCE)
        client.connect(where)
        client.sendall(says)
        await until(self.loop, lambda: select.select([backend], [], [], 0)[0])
        server = self.stack.enter_context(backend.accept()[0])
        server.settimeout(PATIENCE)
        await until(self.loop, lambda: all(one.relay for one in self.connections))
        return client, server

    async def ended(self) -> None:
        """Wait until no connection is left."""
        await until(self.loop, lambda: not self.proxies.open)

    async def close(self) -> None:
        """End all of it."""
        for proxy in self.proxies.everyone():
            proxy.stop_listening()
        for proxy in self.proxies.everyone():
            await proxy.drain(lambda: True)
        for proxy in self.proxies.configured.values():
            proxy.places.close()
        self.pipes.close()
        self.shortage.give_up_spare()
        for _ in range(3):
            await self.loop.yield_turn()

    def end_of_process(self) -> None:
        """Close this process's copies of everything, as its end does."""
        for connection in self.connections:
            connection.client.sock.close()
            if relay := connection.relay:
                relay.backend.sock.close()
                for fd in relay.upload.pipe_descriptors + relay.download.pipe_descriptors:
                    os.close(fd)
        for listener in self.listeners:
            listener._sock.close()
        self.pipes.close()
        self.shortage.give_up_spare()


async def send_over(loop: Loop, source: socket.socket, target: socket.socket, data: bytes) -> None:
    """Send bytes from one end of a connection, and see them come at the other."""
    source.sendall(data)
    await arrives(loop, target, data)


async def arrives(loop: Loop, sock: socket.socket, data: bytes) -> None:
    """These bytes come next."""
    got = b""
    while len(got) < len(data):
        await until(loop, lambda: select.select([sock], [], [], 0)[0])
        part = sock.recv(min(len(data) - len(got), 1 << 16))
        assert part, f"the end after {len(got)} of {len(data)} bytes"
        got += part
    assert got == data


async def ends(loop: Loop, sock: socket.socket) -> bytes:
    """What comes up to the end of the stream. Raises ConnectionResetError if that is no clean end."""
    got: list[bytes] = []
    while True:
        await until(loop, lambda: select.select([sock], [], [], 0)[0])
        if not (part := sock.recv(1 << 20)):
            return b"".join(got)
        got.append(part)


def hand_over(
    config: Config,
    script: Script,
    clock: Callable[[], float] = time.monotonic,
    after: Script | None = None,
) -> bool:
    """Serve, do what the script does, and hand over, as a process that then ends. Returns whether that was possible.

    after: what to do if it was not; else all is closed.
    """
    notifier = Notifier()
    try:
        with Loop(clock) as loop, ExitStack() as stack:

            async def main() -> bool:
                half = Half(loop, config, stack)
                half.listen()
                await script(half)
                kept = Store(notifier, ())
                kept.keep(half.listeners)
                if await Handover(loop, kept, half.proxies, half.desk, from_file=True).run(config, lambda: False):
                    half.end_of_process()
                    return True
                if after:
                    await after(half)
                await half.close()
                kept.keep(())
                return False

            return loop.run(main())
    finally:
        if notifier._notifier:
            notifier._notifier.socket.close()


def take_over(
    found: Sequence[StoredDescriptor],
    config: Config,
    script: Callable[[Half, int], Awaitable[object]],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Be the next process, and do what the script does; it gets how many connections go on."""
    with Loop(clock) as loop, ExitStack() as stack:

        async def main() -> None:
            legacy = Legacy(found)
            half = Half(loop, config, stack)
            half.listen_nowhere()
            for sock in legacy.listeners:
                sock.close()
            try:
                await script(half, await legacy.take_over(loop, half.proxies, half.desk))
            finally:
                await half.close()

        loop.run(main())


def stored(store: keeper.Store) -> list[StoredDescriptor]:
    """What the next process gets of a store, which goes on to have it."""
    return [StoredDescriptor(name[len(STORED) :], os.dup(one.fileno())) for name, one in store.kept]


def send_numbered(queue: socket.socket, token: bytes, fds: Mapping[int, int]) -> None:
    """Put descriptors into the queue of a parcel, by the numbers that they had."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds.values()))]
    queue.sendmsg([token + struct.pack(f"{len(fds)}i", *fds)], rights)


@contextmanager
def parcel_of(content: bytes, token: bytes, fds: Mapping[int, int]) -> Iterator[list[StoredDescriptor]]:
    """What a process finds that was left such a state, and such descriptors by the numbers that they had."""
    state = os.memfd_create("rspd-state")
    os.write(state, content)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if fds:
        send_numbered(near, token, fds)
    yield [StoredDescriptor("parcel", fd) for fd in (state, near.detach(), far.detach())]


# A state of everything that there is


HELD = bytes(range(256)) * 5


def everything(folder: str, web: int, db: int) -> Config:
    """Two proxies in front of backends at these ports."""
    health = HealthConfig(interval=3600.0, timeout=2.0)
    loopback = parse_network("127.0.0.0/8")
    return Config(
        (
            ProxyConfig(
                (Address("127.0.0.1", 0), parse_address(f"{folder}/web")),
                (BackendConfig(parse_backend(f"{NAME}:{web}")), BackendConfig(parse_backend("127.0.0.1:9"))),
                "web",
                max_connections=100,
                fail_timeout=600.0,
            ),
            ProxyConfig(
                (Address("127.0.0.2", 0),),
                (BackendConfig(parse_backend(f"127.0.0.1:{db}")),),
                "db",
                max_connections=10,
                health=health,
                accept_proxy=(loopback,),
                idle_timeout=3600.0,
            ),
        )
    )


# What each connection of a document is, in the order in which they are there.
WEB = ("plain", "half-closed", "held", "piped", "unix", "aborted", "ending")
DB = ("via",)

PROXY_HEADER = b"PROXY TCP4 203.0.113.7 198.51.100.1 1234 443\r\n"


async def fill(loop: Loop, flow: Flow, sock: socket.socket, data: bytes) -> None:
    """Send this again and again, until the flow's target has taken nothing for a while, and the flow holds bytes."""
    sock.setblocking(False)
    quiet = 0
    while quiet < 100:
        total = flow.total
        if not flow.waiting:
            with suppress(BlockingIOError):
                sock.send(data)
        await loop.yield_turn()
        quiet = quiet + 1 if flow.waiting and flow.total == total else 0


async def live(half: Half, web: socket.socket, db: socket.socket) -> None:
    """Have a connection of each kind. web, db: their backends."""
    loop = half.loop
    # A check of the backend comes first.
    await until(loop, lambda: select.select([db], [], [], 0)[0])
    db.accept()[0].close()
    for _ in range(10):
        await loop.yield_turn()
    made = {name: await half.connect(web, "web") for name in ("plain", "half-closed", "held", "piped")}
    made["unix"] = await half.connect(web, "web", socket.AF_UNIX)
    for name in ("aborted", "ending"):
        made[name] = await half.connect(web, "web")
    client, server = await half.connect(db, "db", says=PROXY_HEADER)
    await send_over(loop, client, server, b"SELECT 1")
    await send_over(loop, server, client, b"1")
    for client, server in made.values():
        await send_over(loop, client, server, b"question")
        await send_over(loop, server, client, b"answer")
    connections = dict(zip(WEB, half.connections, strict=False))
    client, server = made["half-closed"]
    client.shutdown(socket.SHUT_WR)
    assert await ends(loop, server) == b""
    for name in ("held", "piped", "aborted", "ending"):
        relay = connections[name].relay
        assert relay
        client, server = made[name]
        if name != "piped":
            relay.download._can_splice = False
            relay.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await fill(loop, relay.download, server, bytes(1 << 18) if name == "piped" else HELD)
        assert bool(relay.download.pipe_descriptors) is (name == "piped")
        assert bool(relay.download.held) is (name != "piped")
        if name == "aborted":
            reset(server)
            await until(loop, partial(_aborted, relay.backend))
        if name == "ending":
            server.close()
    for _ in range(10):
        await loop.yield_turn()


def _aborted(side: Side) -> bool:
    return side.aborted


def write_version(path: str) -> None:
    """Write a document of everything that there is, as this version does."""
    clock = FakeClock()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        web, db = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        store = keeper.Store(folder)
        os.environ["NOTIFY_SOCKET"] = store.path
        config = everything(folder, web.getsockname()[1], db.getsockname()[1])

        async def live_and_look(half: Half) -> None:
            half.life.measure_turns()
            with socket.create_connection(half.proxies.configured["db"].listeners[0].reached_at[0]) as client:
                await until(half.loop, lambda: half.connections)
                client.sendall(b"no header\r\n")
                await half.ended()
            await live(half, web, db)
            await half.look()

        assert hand_over(config, live_and_look, clock)
        inheritance = Inheritance(stored(store))
        [state] = [state for state in inheritance.states() if state]
        Path(path).write_bytes(state)
        inheritance.close()
        store.close()


class Remade:
    """The connections of a document of `everything`, made anew, with their peers; those of `stack` are closed by it.

    handed: what the document says of each. fds: its descriptors, by their numbers in the document.
    in_pipe: what is in the pipe of one of them.
    """

    def __init__(self, document: Mapping[str, Any], stack: ExitStack) -> None:
        self.handed = [one for proxy in document["proxies"] for one in proxy["connections"]]
        self.peers: dict[str, tuple[socket.socket, socket.socket]] = {}
        self.fds: dict[int, int] = {}
        self.in_pipe = b""
        self._ours = ExitStack()
        stack.enter_context(self._ours)
        for name, one in zip(WEB + DB, self.handed, strict=True):
            self._make(name, one["relay"], stack)
        self.peers["half-closed"][0].shutdown(socket.SHUT_WR)
        self.peers["ending"][1].shutdown(socket.SHUT_WR)

    def _make(self, name: str, relay: Mapping[str, Any], stack: ExitStack) -> None:
        near, client = socket.socketpair() if relay["client"]["family"] == socket.AF_UNIX else tcp_pair()
        far, backend = tcp_pair()
        self.peers[name] = stack.enter_context(near), stack.enter_context(far)
        self.fds |= {relay["client"]["fd"]: client.fileno(), relay["backend"]["fd"]: backend.fileno()}
        self._ours.enter_context(client)
        self._ours.enter_context(backend)
        for sock in near, client, far, backend:
            sock.setblocking(False)
        if pipe := relay["download"].get("pipe"):
            with_bytes = Pipe()
            self.in_pipe = os.urandom(pipe[2])
            os.write(with_bytes.write_fd, self.in_pipe)
            self.fds |= {pipe[0]: with_bytes.read_fd, pipe[1]: with_bytes.write_fd}
            self._ours.callback(with_bytes.close)
        if relay["backend"].get("aborted"):
            reset(far)
            select.select([backend], [], [], PATIENCE)
            assert is_reset(backend)  # the error is read, and no call tells of it again
        if relay["backend"].get("ended"):
            backend.shutdown(socket.SHUT_WR)

    def close_ours(self) -> None:
        """Close what has been put into a parcel."""
        self._ours.close()

    async def goes_on(self, loop: Loop, clock: FakeClock, name: str) -> None:
        """This connection goes on where it was, up to its end."""
        client, server = self.peers[name]
        if name == "aborted":
            await arrives(loop, client, HELD)
            while not select.select([client], [], [], 0)[0]:
                clock.advance(0.001)  # the kernel acknowledges bytes by its own clock
                await loop.yield_turn()
            assert is_reset(client)
        elif name == "ending":
            assert await ends(loop, client) == HELD
        elif name == "half-closed":
            await send_over(loop, server, client, b"answer")
            server.close()
            assert await ends(loop, client) == b""
        else:
            before = {"held": HELD, "piped": self.in_pipe}.get(name, b"")
            server.send(b"answer")
            await arrives(loop, client, before + b"answer")
            await send_over(loop, client, server, b"question")
            client.close()
            assert await ends(loop, server) == b""
            server.close()
        client.close()


def plain_config(port: int, drain_timeout: float = 30.0) -> Config:
    return Config(
        (
            ProxyConfig(
                (Address("127.0.0.1", 0),),
                (BackendConfig(parse_backend(f"127.0.0.1:{port}")),),
                max_connections=2000,
                drain_timeout=drain_timeout,
            ),
        )
    )


if __name__ == "__main__":
    write_version(sys.argv[1])
