"""A proxy on a loop, where what it does cannot be seen from outside the process."""

from __future__ import annotations

import os
import socket

import pytest

from rspd.address import Address
from rspd.config import ProxyConfig
from rspd.listener import Listener
from rspd.loop import Loop
from rspd.proxy import Proxy
from tests.support import Backend, echo, run


def test_a_client_that_another_process_has_accepted_first_is_no_error() -> None:
    """Two proxies in one process stand for it: both hear of the client, and one gets it."""
    with Backend(echo) as backend, socket.create_server(("127.0.0.1", 0)) as shared:
        shared.setblocking(False)
        listen = Address("127.0.0.1", shared.getsockname()[1])
        config = ProxyConfig((listen,), (Address("127.0.0.1", backend.port),), max_connections=4)

        async def main(loop: Loop) -> list[int]:
            proxies = [
                Proxy(loop, config, [Listener(listen, socket.SocketType(fileno=os.dup(shared.fileno())))], 2)
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
        config = ProxyConfig((listen,), (Address("127.0.0.1", backend.port),))
        server.setblocking(False)

        async def main(loop: Loop) -> None:
            own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, server.detach())
            proxy = Proxy(loop, config, [Faulty(listen, own)], 2)
            with socket.create_connection(address):
                while not proxy.served:
                    await loop.sleep(0.01)
            proxy.stop_listening()
            await proxy.drain(lambda: False)

        run(main)
    assert "unexpected error while accepting" in caplog.text
    assert "RuntimeError: built in" in caplog.text


def test_a_reload_closes_the_pipes_that_there_is_no_room_for_any_more() -> None:
    config = ProxyConfig((), (Address("127.0.0.1", 9),))

    async def main(loop: Loop) -> None:
        proxy = Proxy(loop, config, [], 2)
        for pipe in [proxy.pipes.borrow(), proxy.pipes.borrow()]:
            assert pipe
            proxy.pipes.give_back(pipe)
        proxy.apply(config, {}, 1)
        assert proxy.pipes.made == 0
        assert proxy.pipes.limit == 1
        proxy.stop_listening()
        await proxy.drain(lambda: False)

    run(main)
