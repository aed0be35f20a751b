"""A proxy on a loop, where what it does cannot be seen from outside the process."""

from __future__ import annotations

import gc
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from rspd.address import Address, SocketAddress, resolve
from rspd.config import BackendConfig, HealthConfig, ProxyConfig, parse_backend
from rspd.listener import Listener
from rspd.loop import Loop
from rspd.pipes import Pipes
from rspd.proxy import Common, Proxy
from rspd.resolver import Resolver
from rspd.shortage import Shortage
from rspd.ways import Ways
from tests.dialled import unix_listener
from tests.support import PATIENCE, Backend, echo, reset, run
from tests.test_pipes import no_descriptors


def common(loop: Loop) -> Common:
    return Common(loop, Ways(loop), Resolver(loop), Shortage(loop), Pipes(2), set())


def test_a_client_that_another_process_has_accepted_first_is_no_error() -> None:
    """Two proxies in one process stand for it: both hear of the client, and one gets it."""
    with Backend(echo) as backend, socket.create_server(("127.0.0.1", 0)) as shared:
        shared.setblocking(False)
        listen = Address("127.0.0.1", shared.getsockname()[1])
        config = ProxyConfig((listen,), (BackendConfig(Address("127.0.0.1", backend.port)),), max_connections=4)

        async def main(loop: Loop) -> list[int]:
            proxies = [
                Proxy(common(loop), config, [Listener(listen, socket.SocketType(fileno=os.dup(shared.fileno())))])
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
    monkeypatch.setattr("rspd.proxy.AFTER_ERROR", 0.01)
    failures = [RuntimeError("built in")]

    class Faulty(Listener):
        def accept(self) -> tuple[socket.SocketType, object]:
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
            proxy = Proxy(common(loop), config, [Faulty(listen, own)])
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

    monkeypatch.setattr("rspd.resolver.resolve", late)
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
            proxy = Proxy(common(loop), config, [Listener(listen, own)])
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
        backends = (BackendConfig(Address(*backend.getsockname())),)
        server.setblocking(False)
        backend.settimeout(PATIENCE)
        if end == "refused":
            backend.close()

        async def main(loop: Loop) -> list[object]:
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = Proxy(common(loop), ProxyConfig((listen,), backends), [Listener(listen, own)])
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
            tasks = loop.tasks
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = Proxy(common(loop), config, [Listener(listen, own)])

            async def until(condition: Callable[[], bool]) -> None:
                end = loop.now + PATIENCE / 2
                while not condition():
                    assert loop.now < end, "still not so"
                    await loop.sleep(0.01)

            await until(lambda: not proxy.backends.any_up)
            with socket.create_connection((listen.host, listen.port)) as client:
                await until(lambda: proxy.open == 1)
                proxy.stop_listening()
                with Backend(echo, port=gone.port):
                    client.sendall(b"x")
                    await until(lambda: bool(select.select([client], [], [], 0)[0]))
                    assert client.recv(1) == b"x"
                await until(lambda: not proxy.backends.any_up)
            await until(lambda: proxy.open == 0)
            await until(lambda: loop.tasks == tasks)

        run(main)


def test_a_proxy_that_leaves_without_a_connection_checks_and_looks_up_no_more() -> None:
    with unix_listener() as (_, live), socket.create_server(("127.0.0.1", 0)) as server:
        listen = Address(*server.getsockname())
        server.setblocking(False)
        backends = (BackendConfig(parse_backend(live)), BackendConfig(Address("localhost", 1)))
        config = ProxyConfig((listen,), backends, health=HealthConfig())

        async def main(loop: Loop) -> None:
            tasks = loop.tasks
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = Proxy(common(loop), config, [Listener(listen, own)])
            await loop.yield_turn()
            assert loop.tasks > tasks
            proxy.stop_listening()
            while loop.tasks > tasks:
                await loop.sleep(0.01)

        run(main)
