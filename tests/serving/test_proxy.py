"""A proxy on a loop, where what it does cannot be seen from outside the process."""

from __future__ import annotations

import gc
import os
import re
import select
import socket
import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import Any

import pytest

from rspd.config.addresses import parse_backend
from rspd.engine.loop import Loop
from rspd.engine.pipes import Pipes
from rspd.engine.relay import Relay
from rspd.net.address import Address, Peer, SocketAddress, resolve
from rspd.net.descriptors import Shortage
from rspd.net.listener import Listener
from rspd.net.resolver import Resolver
from rspd.net.ways import Ways
from rspd.routing.pools import PoolMaker
from rspd.serving.proxy import Proxy
from rspd.serving.tally import Tally
from rspd.settings import BackendConfig, HealthConfig, ProxyConfig
from tests.dialled import unix_listener
from tests.engine.test_loop import advance, rounds
from tests.engine.test_pipes import no_descriptors
from tests.support import PATIENCE, Backend, FakeClock, echo, eventually, free_port, reset, run, tasks_of


def serve(loop: Loop, config: ProxyConfig, *listeners: Listener) -> Proxy:
    shortage, ways = Shortage(loop), Ways(loop)
    maker = PoolMaker(loop, shortage, Resolver(loop), ways)
    return Proxy(loop, shortage, Pipes(2), maker, ways, set(), {}, Tally(), config, listeners)


def test_a_client_that_another_process_has_accepted_first_is_no_error() -> None:
    """Two proxies in one process stand for it: both hear of the client, and one gets it."""
    with Backend(echo) as backend, socket.create_server(("127.0.0.1", 0)) as shared:
        shared.setblocking(False)
        listen = Address("127.0.0.1", shared.getsockname()[1])
        config = ProxyConfig((listen,), (BackendConfig(Address("127.0.0.1", backend.port)),), max_connections=4)

        async def main(loop: Loop) -> list[int]:
            proxies = [
                serve(
                    loop, config, Listener(listen, socket.SocketType(fileno=os.dup(shared.fileno())), passed="shared")
                )
                for _ in range(2)
            ]
            clients = []
            for number in range(5):
                client = socket.create_connection(shared.getsockname())
                clients.append(client)
                while sum(proxy.served for proxy in proxies) <= number:
                    await loop.sleep(0.01)
            for client in clients:
                client.close()
            for proxy in proxies:
                proxy.stop_listening()
                await proxy.drain(lambda: False)
            return [proxy.served for proxy in proxies]

        assert sum(run(main)) == 5


def test_an_unexpected_error_while_accepting_is_logged_and_accepting_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rspd.serving.proxy.AFTER_ERROR", 0.01)
    failures = [RuntimeError("built in")]

    class Faulty(Listener):
        def accept(self) -> tuple[socket.SocketType, Peer]:
            if failures:
                raise failures.pop()
            return super().accept()

    with Backend(echo) as backend, socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        listen = Address("127.0.0.1", address[1])
        config = ProxyConfig((listen,), (BackendConfig(Address("127.0.0.1", backend.port)),))
        server.setblocking(False)

        async def main(loop: Loop) -> None:
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = serve(loop, config, Faulty(listen, own))
            with socket.create_connection(address):
                while not proxy.served:
                    await loop.sleep(0.01)
            proxy.stop_listening()
            await proxy.drain(lambda: False)

        run(main)
    assert "unexpected error while accepting" in caplog.text
    assert "RuntimeError: built in" in caplog.text


def test_clients_accepted_while_a_name_is_looked_up_leave_a_descriptor_for_its_lookup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = threading.Event()

    def late(address: Address) -> list[SocketAddress]:
        assert full.wait(PATIENCE)
        return resolve(address)

    monkeypatch.setattr("rspd.net.resolver.resolve", late)
    with ExitStack() as stack:
        backend, server = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        address = server.getsockname()
        listen = Address("127.0.0.1", address[1])
        backends = (BackendConfig(Address("localhost", backend.getsockname()[1])),)
        config = ProxyConfig((listen,), backends, max_connections=10, connect_timeout=PATIENCE)
        server.setblocking(False)
        for _ in range(10):
            stack.enter_context(socket.create_connection(address))

        async def main(loop: Loop) -> None:
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = serve(loop, config, Listener(listen, own))
            with no_descriptors(5):
                while not proxy.shortage.active:
                    await loop.sleep(0.01)
                full.set()
                until = loop.now + PATIENCE / 4
                while not select.select([backend], [], [], 0)[0]:
                    assert loop.now < until, f"{proxy.open} clients hold all descriptors, and none has a backend"
                    await loop.sleep(0.01)
            proxy.stop_listening()
            await proxy.drain(lambda: True)
            while proxy.shortage.active:
                await loop.sleep(0.01)

        run(main)


@pytest.mark.parametrize("end", ["closed", "aborted", "refused"])
def test_a_connection_leaves_nothing_to_the_garbage_collector(end: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as backend:
        listen = Address(*server.getsockname())
        port = free_port() if end == "refused" else backend.getsockname()[1]
        backends = (BackendConfig(Address("127.0.0.1", port)),)
        server.setblocking(False)
        backend.settimeout(PATIENCE)

        async def main(loop: Loop) -> list[object]:
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = serve(loop, ProxyConfig((listen,), backends), Listener(listen, own))
            gc.collect()
            gc.disable()
            try:
                for served in range(1, 4):
                    client = socket.create_connection((listen.host, listen.port))
                    while proxy.served < served:
                        await loop.sleep(0.001)
                    if end == "refused":
                        client.close()
                    else:
                        peer, _ = backend.accept()
                        client.sendall(b"request")
                        while not select.select([peer], [], [], 0)[0]:
                            await loop.sleep(0.001)
                        reset(client) if end == "aborted" else client.close()
                        peer.close()
                    while proxy.open:
                        await loop.sleep(0.001)
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                # Connections, relays and sides know their loop; other tests have left some too.
                return [left for left in gc.garbage if getattr(left, "loop", None) is loop]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()
                proxy.stop_listening()
                await proxy.drain(lambda: False)

        assert run(main) == []


def test_a_relay_that_fails_to_close_gives_its_places_back(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Relay.close

    def close_and_fail(relay: Relay) -> int:
        close(relay)
        raise RuntimeError("closed, and failed")

    monkeypatch.setattr(Relay, "close", close_and_fail)
    with Backend(echo) as backend, socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = server.getsockname()
        listen = Address(*address)
        backends = (BackendConfig(Address("127.0.0.1", backend.port), max_connections=1),)
        config = ProxyConfig((listen,), backends, max_connections=4, max_connections_per_client=1)

        async def main(loop: Loop) -> None:
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = serve(loop, config, Listener(listen, own))
            for accepted in (1, 2):
                with socket.create_connection(address):
                    until = loop.now + PATIENCE / 4
                    while backend.accepted < accepted:
                        assert loop.now < until, "a place was not given back"
                        await loop.sleep(0.01)
                while proxy.open:
                    await loop.sleep(0.01)
            proxy.stop_listening()
            await proxy.drain(lambda: False)

        run(main)


def test_a_proxy_that_leaves_goes_on_checking_and_looking_up_until_its_last_connection_ends() -> None:
    health = HealthConfig(interval=0.02, timeout=1.0, rise=1, fall=1)
    with Backend(echo) as gone, socket.create_server(("127.0.0.1", 0)) as server:
        gone.close()
        listen = Address(*server.getsockname())
        server.setblocking(False)
        config = ProxyConfig(
            (listen,),
            (BackendConfig(Address("localhost", gone.port)),),
            health=health,
            queue_timeout=PATIENCE,
            resolve_interval=0.02,
        )

        async def main(loop: Loop) -> None:
            tasks = tasks_of(loop)
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = serve(loop, config, Listener(listen, own))

            async def until(condition: Callable[[], bool]) -> None:
                end = loop.now + PATIENCE / 2
                while not condition():
                    assert loop.now < end, "still not so"
                    await loop.sleep(0.01)

            await until(lambda: not proxy.router.pool.members.any_in_service)
            with socket.create_connection((listen.host, listen.port)) as client:
                await until(lambda: proxy.open == 1)
                proxy.stop_listening()
                with Backend(echo, port=gone.port):
                    client.sendall(b"x")
                    await until(lambda: bool(select.select([client], [], [], 0)[0]))
                    assert client.recv(1) == b"x"
                await until(lambda: not proxy.router.pool.members.any_in_service)
            await until(lambda: proxy.open == 0)
            await until(lambda: tasks_of(loop) == tasks)

        run(main)


def test_a_proxy_that_leaves_without_a_connection_checks_and_looks_up_no_more() -> None:
    with unix_listener() as (_, live), socket.create_server(("127.0.0.1", 0)) as server:
        listen = Address(*server.getsockname())
        server.setblocking(False)
        backends = (BackendConfig(parse_backend(live)), BackendConfig(Address("localhost", 1)))
        config = ProxyConfig((listen,), backends, health=HealthConfig())

        async def main(loop: Loop) -> None:
            tasks = tasks_of(loop)
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = serve(loop, config, Listener(listen, own))
            await loop.yield_turn()
            assert tasks_of(loop) > tasks
            proxy.stop_listening()
            while tasks_of(loop) > tasks:
                await loop.sleep(0.01)

        run(main)


class CountedListener(Listener):
    """Counts how often somebody is asked for, and found."""

    asked = found = 0

    def accept(self) -> tuple[socket.SocketType, Peer]:
        self.asked += 1
        accepted = super().accept()
        self.found += 1
        return accepted


@pytest.mark.parametrize(
    ("passed", "limit", "turns"),
    [
        pytest.param(None, 1000, range(3, 5), id="64 in a turn, after the first one"),
        pytest.param("web", 1000, range(26, 28), id="4 in a turn where others may share the socket"),
        pytest.param(None, 40, range(2, 4), id="no more than there are places"),
    ],
)
def test_clients_that_come_at_once_are_accepted_in_few_turns(passed: str | None, limit: int, turns: range) -> None:
    with ExitStack() as stack:
        backend = stack.enter_context(Backend(echo))
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=200))
        server.setblocking(False)
        listen = Address(*server.getsockname())
        for _ in range(100):
            stack.enter_context(socket.create_connection(server.getsockname()))

        async def main(loop: Loop) -> int:
            own = socket.SocketType(fileno=os.dup(server.fileno()))
            backends = (BackendConfig(Address("127.0.0.1", backend.port)),)
            config = ProxyConfig((listen,), backends, max_connections=limit)
            proxy = serve(loop, config, CountedListener(listen, own, passed=passed))
            turns = 0
            while proxy.served < min(limit, 100):
                await loop.yield_turn()
                turns += 1
            assert proxy.open == min(limit, 100)
            proxy.stop_listening()
            await proxy.drain(lambda: True)
            return turns

        assert run(main) in turns


@pytest.mark.parametrize("limit", [4, 1])
def test_nobody_is_asked_for_in_vain_where_clients_come_one_by_one(limit: int) -> None:
    with ExitStack() as stack:
        backend = stack.enter_context(Backend(echo))
        server, other = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        server.setblocking(False)
        other.setblocking(False)
        listen = Address(*server.getsockname())
        config = ProxyConfig((listen,), (BackendConfig(Address("127.0.0.1", backend.port)),), max_connections=limit)

        async def main(loop: Loop) -> None:
            listener, quiet = (
                CountedListener(listen, socket.SocketType(fileno=os.dup(one.fileno()))) for one in (server, other)
            )
            proxy = serve(loop, config, listener, quiet)
            for number in range(1, 11):
                with socket.create_connection(server.getsockname()):
                    while proxy.served < number:
                        await loop.sleep(0.001)
                while proxy.open:
                    await loop.sleep(0.001)
            assert (listener.asked, listener.found, quiet.asked) == (10, 10, 0)
            proxy.stop_listening()
            await proxy.drain(lambda: False)

        run(main)


def is_watched(fd: int) -> bool:
    """Whether a descriptor is in an epoll of this process (proc_pid_fdinfo(5))."""
    folder = Path("/proc/self/fdinfo")
    texts = (file.read_text() for file in folder.iterdir() if file.exists())
    return any(re.search(rf"^tfd: +{fd} ", text, re.MULTILINE) for text in texts)


@pytest.mark.parametrize("passed", [None, "web"])
def test_a_proxy_without_a_place_is_woken_by_one_client_at_most_and_by_none_that_another_could_serve(
    passed: str | None,
) -> None:
    with Backend(echo) as backend, socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        listen = Address(*server.getsockname())
        config = ProxyConfig((listen,), (BackendConfig(Address("127.0.0.1", backend.port)),), idle_timeout=inf)

        async def main(loop: Loop) -> None:
            listener = Listener(listen, socket.SocketType(fileno=os.dup(server.fileno())), passed=passed)
            proxy = serve(loop, config, listener)
            with socket.create_connection(server.getsockname()):
                while not proxy.open:
                    await loop.sleep(0.001)
                await loop.sleep(0.01)
                assert is_watched(listener.fd) == (passed is None)
                with socket.create_connection(server.getsockname()):
                    while is_watched(listener.fd):
                        await loop.sleep(0.001)
                    before = loop.turn
                    await loop.sleep(0.2)
                    assert loop.turn - before < 5
            while proxy.served < 2 or proxy.open:
                await loop.sleep(0.001)
            while not is_watched(listener.fd):
                await loop.sleep(0.001)
            proxy.stop_listening()
            await proxy.drain(lambda: False)

        run(main)


class Crowd:
    """A serial proxy, one client that is served, and two that wait. Time passes when the test says so.

    kept: the listener once more, as systemd keeps it.
    """

    def __init__(self, loop: Loop, clock: FakeClock, stack: ExitStack) -> None:
        self.loop, self.clock = loop, clock
        backend = stack.enter_context(Backend(echo))
        self.kept = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.kept.setblocking(False)
        self.listen = Address(*self.kept.getsockname())
        backends = (BackendConfig(Address("127.0.0.1", backend.port)),)
        self.config = ProxyConfig((self.listen,), backends, idle_timeout=inf)
        self.proxy = serve(loop, self.config, self.listener())
        self.clients = [stack.enter_context(socket.create_connection(self.kept.getsockname())) for _ in range(3)]

    def listener(self) -> Listener:
        return Listener(self.listen, socket.SocketType(fileno=os.dup(self.kept.fileno())), passed="kept")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Without time passing."""
        while not condition():
            await self.loop.yield_turn()

    async def pass_seconds(self, count: int) -> None:
        for _ in range(count):
            await advance(self.loop, self.clock, 1.0)

    async def wait(self) -> None:
        """Until it has told of those who wait."""
        await self.until(lambda: self.proxy.open == 1)
        listener = self.proxy.listeners[0]
        eventually(lambda: listener.waiting() == 2)
        await self.pass_seconds(2)
        assert self.proxy.places.waiting == "2"

    async def end(self) -> None:
        self.proxy.stop_listening()
        await self.proxy.drain(lambda: True)


def crowded(script: Callable[[Crowd], Coroutine[Any, Any, None]]) -> None:
    """Run a script with a crowd."""
    clock = FakeClock()
    with ExitStack() as stack:
        run(lambda loop: script(Crowd(loop, clock, stack)), clock)


FULL = "all places taken, clients wait max_connections=1 waiting=2"


def test_clients_that_wait_for_a_place_are_told_until_a_reload_makes_room(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rspd")

    async def script(crowd: Crowd) -> None:
        proxy = crowd.proxy
        await crowd.wait()
        assert caplog.messages == [FULL]
        proxy.pause()
        proxy.apply(crowd.config._replace(max_connections=4), proxy.listeners)
        assert proxy.places.waiting == ""
        await crowd.until(lambda: proxy.open == 3)
        await crowd.pass_seconds(3)
        assert caplog.messages == [FULL, "clients no longer wait for a place max_connections=1 seconds=2.000"]
        await crowd.end()

    crowded(script)


def test_a_reload_that_takes_places_away_lets_clients_wait_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async def script(crowd: Crowd) -> None:
        proxy = crowd.proxy
        await crowd.wait()
        proxy.pause()
        proxy.apply(crowd.config._replace(max_connections=4), proxy.listeners)
        await crowd.until(lambda: proxy.open == 3)
        await crowd.pass_seconds(61)
        proxy.pause()
        proxy.apply(crowd.config, proxy.listeners)
        with socket.create_connection(crowd.kept.getsockname()):
            listener = proxy.listeners[0]
            eventually(lambda: listener.waiting() == 1)
            await rounds(crowd.loop)
            await advance(crowd.loop, crowd.clock, 0.5)
            # One goes, and there are still more than may be: nobody is accepted.
            crowd.clients[0].close()
            await crowd.until(lambda: proxy.open == 2)
            await advance(crowd.loop, crowd.clock, 0.5)
            assert (proxy.open, proxy.places.waiting) == (2, "1")
            await crowd.pass_seconds(1)
        assert caplog.messages == [FULL, FULL.replace("=2", "=1")]
        await crowd.end()

    crowded(script)


def test_listeners_that_are_replaced_take_their_clients_along() -> None:
    async def script(crowd: Crowd) -> None:
        proxy = crowd.proxy
        await crowd.wait()
        with socket.create_server(("127.0.0.1", 0)) as other:
            listener = Listener(Address(*other.getsockname()), socket.SocketType(fileno=os.dup(other.fileno())))
            proxy.pause()
            proxy.listeners[0].close()
            proxy.apply(crowd.config, [listener])
            assert proxy.places.waiting == ""
            await crowd.pass_seconds(4)
            await crowd.end()

    crowded(script)


def test_a_proxy_that_stops_tells_of_nobody_who_waits_and_they_wait_on_for_systemd_s_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "rspd.serving.places")

    async def script(crowd: Crowd) -> None:
        proxy = crowd.proxy
        await crowd.wait()
        proxy.stop_listening()
        assert proxy.places.waiting == ""
        await rounds(crowd.loop)
        await crowd.pass_seconds(4)
        assert proxy.places.waiting == ""
        await proxy.drain(lambda: True)
        for client in crowd.clients[1:]:
            waiting, address = crowd.kept.accept()
            waiting.close()
            assert address == client.getsockname()

    crowded(script)
    assert [record.getMessage() for record in caplog.records if record.name == "rspd.serving.places"] == [FULL]


def test_clients_that_wait_for_descriptors_do_not_wait_for_a_place(caplog: pytest.LogCaptureFixture) -> None:
    async def script(crowd: Crowd) -> None:
        proxy = crowd.proxy
        await crowd.wait()
        with no_descriptors():
            proxy.pause()
            proxy.apply(crowd.config._replace(max_connections=2), proxy.listeners)
            await crowd.until(lambda: proxy.shortage.active)
            assert proxy.places.waiting == ""
            await advance(crowd.loop, crowd.clock, 60)
            await crowd.pass_seconds(5)
            assert proxy.open == 1
        assert all(message.startswith("accepting pauses") for message in caplog.messages[1:])
        await crowd.until(lambda: proxy.open == 2)
        await crowd.pass_seconds(2)
        assert caplog.messages[-1] == "all places taken, clients wait max_connections=2 waiting=1"
        await crowd.end()
        await crowd.pass_seconds(2)

    crowded(script)
