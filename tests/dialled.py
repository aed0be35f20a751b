"""Clients on a loop, the backends that are dialled for them, and names that stand for what a test says."""

from __future__ import annotations

import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import pytest

from rspd.balancing.attempts import Attempts, DialError
from rspd.balancing.backend import Backend
from rspd.balancing.pool import Opening, Pool
from rspd.config.addresses import parse_backend
from rspd.engine.loop import Loop, Task
from rspd.engine.side import Side
from rspd.net.address import Peer, SocketAddress, literal
from rspd.net.descriptors import Shortage
from rspd.net.resolver import Lookup, Resolver
from rspd.net.ways import Way, Ways
from rspd.routing.openings import openings as find_openings
from rspd.settings import BackendConfig, ProxyConfig
from tests.support import PATIENCE, FakeClock, tcp_pair

T = TypeVar("T")

Answer = Sequence[SocketAddress] | OSError

# There is no such name; the name has no addresses; nobody answers.
UNKNOWN = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
EMPTY = socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")
UNANSWERED = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


async def settle(loop: Loop) -> None:
    """Let happen what can happen without time passing."""
    for _ in range(10):
        await loop.yield_turn()


async def until(loop: Loop, condition: Callable[[], T | None]) -> T:
    """Wait for a condition, without time passing on a FakeClock; what it said."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, "still not so"
        await loop.yield_turn()
    return result


class Names(Resolver):
    """A resolver with names of its own. What is not among them is asked for until the test calls `answer`.

    asked: each question to the system, by the host.
    """

    def __init__(self, loop: Loop, names: Mapping[str, Answer]) -> None:
        super().__init__(loop)
        self.names = dict(names)
        self.asked: list[str] = []

    def forget(self) -> None:
        """Have no answer used again."""
        self._answers.clear()

    def answer(self, host: str, answer: Answer) -> None:
        """Answer who asks for a host now."""
        self._finish(host, self._under_way.pop(host), answer)

    def _start(self, host: str) -> Lookup:
        self.asked.append(host)
        lookup = Lookup()
        if host in self.names:
            self._finish(host, lookup, self.names[host])
        else:
            self._under_way[host] = lookup
        return lookup

    def _finish(self, host: str, lookup: Lookup, answer: Answer) -> None:
        lookup.outcome = answer if isinstance(answer, OSError) else list(answer)
        if not isinstance(answer, OSError):
            self._answers[host] = (self._loop.now, list(answer))
        for task in lookup.waiting:
            task.wake()


class Client:
    """A client for whom a backend is dialled. Abort `peer` to abort it.

    outcome: the name of the backend, or why there is none; None before. A connection is open until `close`.
    """

    def __init__(self, scene: Scene, host: str) -> None:
        self.scene = scene
        self.client_address: Peer = (host, 1)
        self.destination: tuple[str, int] | None = None
        self.way: Way | None = None
        self.began = scene.loop.now
        self.attempts: Attempts | None = None
        self.peer, sock = tcp_pair()
        sock.setblocking(False)
        self.client = Side(scene.loop, sock)
        self.backend: Backend | None = None
        self.far: Side | None = None
        self.outcome: str | DialError | None = None
        self.waits: list[float] = []
        self.task: Task | None = None

    def waited(self, seconds: float) -> None:
        """The waits in the queue, in seconds."""
        self.waits.append(seconds)

    async def dial(self) -> None:
        self.began = self.scene.loop.now
        self.attempts = None
        self.client.watch()
        try:
            self.backend, self.far = await self.scene.pool.dial(self)
            self.outcome = self.backend.name
        except DialError as error:
            self.outcome = error
        finally:
            self.scene.loop.unwatch(self.client)

    def close(self) -> None:
        """Give back the connection, if there is one."""
        if self.backend and self.far:
            self.far.close()
            self.scene.pool.release(self.backend)
            self.backend = self.far = None

    def give_up(self) -> None:
        """Close all that is the client's."""
        self.close()
        self.peer.close()
        self.client.sock.close()


class Scene:
    """The backends of a proxy, and clients that come. Of an address in text, the other settings are the defaults.

    openings: in place of those that the settings ask for.
    down: the names of the backends that went down.
    changes: how often the pool said that `describe` may say something else.
    """

    def __init__(
        self,
        loop: Loop,
        *backends: str | BackendConfig,
        names: Mapping[str, Answer] | None = None,
        clock: FakeClock | None = None,
        openings: tuple[Opening, ...] = (),
        **settings: Any,
    ) -> None:
        self.loop = loop
        self.clock = clock
        self.shortage = Shortage(loop)
        self.ways = Ways(loop)
        self.names = Names(loop, names or {})
        self.down: list[str] = []
        self.changes = 0
        self.settings: dict[str, Any] = {"connect_timeout": PATIENCE, "on_down": "abort", **settings}
        config = self.config(*backends)
        self.pool = Pool(
            loop,
            self.shortage,
            Resolver(loop) if names is None else self.names,
            self.ways,
            config,
            openings or find_openings(config),
            on_down=lambda backend: self.down.append(backend.name),
            on_change=self._count_change,
            tag=f" proxy={config.name}" if config.name else "",
        )
        self.clients: list[Client] = []

    async def __aenter__(self) -> Scene:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.pool.stop()
        for client in self.clients:
            if client.task:
                client.task.cancel()
        await settle(self.loop)
        for client in self.clients:
            client.give_up()

    def _count_change(self) -> None:
        self.changes += 1

    def config(self, *backends: str | BackendConfig) -> ProxyConfig:
        configs = [backend if isinstance(backend, BackendConfig) else configured(backend) for backend in backends]
        return ProxyConfig((), tuple(configs), **self.settings)

    def apply(self, *backends: str | BackendConfig, **settings: Any) -> None:
        """Reload with these backends, and what else is to change."""
        self.settings.update(settings)
        config = self.config(*backends)
        self.pool.apply(config, find_openings(config))

    def __getitem__(self, name: str) -> Backend:
        """The member of that name."""
        return self.pool.members.by_name[name]

    @property
    def members(self) -> list[Backend]:
        """The members, in the order of the configuration."""
        return list(self.pool.members.by_name.values())

    def client(self, host: str = "127.0.0.1") -> Client:
        """A client that has not begun to dial."""
        self.clients.append(Client(self, host))
        return self.clients[-1]

    def start(self, host: str = "127.0.0.1") -> Client:
        """A client that dials in a task of its own."""
        client = self.client(host)
        client.task = self.loop.spawn(client.dial())
        return client

    async def come(self, *hosts: str) -> list[Client]:
        """Clients from these hosts, one after the other, each as far as it gets without time passing."""
        clients = []
        for host in hosts:
            clients.append(self.start(host))
            await self.settle()
        return clients

    async def dial(self, host: str = "127.0.0.1") -> str | DialError:
        """The backend that a client reached, and left again, or why it reached none."""
        client = self.client(host)
        await client.dial()
        self.clients.remove(client)
        client.give_up()
        assert client.outcome is not None
        return client.outcome

    async def fail(self) -> tuple[str, str]:
        """Why a client reached no backend: the cause and the reasons."""
        outcome = await self.dial()
        assert isinstance(outcome, DialError), outcome
        return outcome.cause, str(outcome)

    async def settle(self) -> None:
        await settle(self.loop)

    async def advance(self, seconds: float, step: float = 0.05) -> None:
        """Let time pass on the FakeClock in small steps, and all happen that follows."""
        assert self.clock
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.advance(min(step, end - self.clock.now))
            await settle(self.loop)

    async def outcome(self, client: Client) -> str | DialError:
        """What its dialling comes to, without time passing on a FakeClock."""
        return await until(self.loop, lambda: client.outcome)

    async def failure(self, client: Client) -> tuple[str, str]:
        """The cause and the reasons for which it reaches no backend."""
        outcome = await self.outcome(client)
        assert isinstance(outcome, DialError), outcome
        return outcome.cause, str(outcome)


def configured(text: str, **settings: Any) -> BackendConfig:
    """The configuration of a backend."""
    return BackendConfig(parse_backend(text), **settings)


def where(text: str) -> SocketAddress:
    """The socket address of a numeric or unix address."""
    known = literal(parse_backend(text))
    assert known
    return known


@contextmanager
def unix_listener(backlog: int = 16) -> Iterator[tuple[socket.socket, str]]:
    """A listener with a name that the kernel picked, and its address."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen(backlog)
        yield listener, "@" + listener.getsockname()[1:].decode()


@contextmanager
def full_unix() -> Iterator[tuple[socket.socket, str]]:
    """A unix listener that does not accept, and has no room for another client."""
    with unix_listener(0) as (listener, address), ExitStack() as stack:
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(listener.getsockname()) == errno.EAGAIN:
                break
        yield listener, address


class Switch:
    """A unix backend that can be switched on and off, at an address of its own. Has room for thousands."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._listener: socket.socket | None = None

    def on(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("\0" + self.address[1:])
        self._listener.listen(4096)

    def off(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None


@contextmanager
def switches(states: str) -> Iterator[list[Switch]]:
    """A switch for each sign: + on, - off."""
    made: list[Switch] = []
    with ExitStack() as stack:
        for state in states:
            switch = Switch(nobody())
            stack.callback(switch.off)
            if state == "+":
                switch.on()
            made.append(switch)
        yield made


def nobody() -> str:
    """An address where nobody listens."""
    with unix_listener() as (_, address):
        return address


@contextmanager
def no_descriptors() -> Iterator[list[int]]:
    """The process can open no descriptor; those in the list may be closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    taken: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield taken
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
