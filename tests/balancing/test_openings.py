"""rspd/balancing/pool.py: what is said to a backend, and awaited from it, before the relay begins."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import pytest

from rspd.balancing.attempts import Caller
from rspd.balancing.pool import Opening
from rspd.engine.loop import Loop
from rspd.engine.side import Side
from rspd.net.listener import adopt_listener
from rspd.net.waiting import wait
from rspd.net.ways import Way
from tests.dialled import Scene, full_unix, unix_listener
from tests.manager import tcp_listener
from tests.support import PATIENCE, FakeClock, reset, run


class Greeting(Opening):
    """The backend has to say something first."""

    async def open(self, backend: Side, caller: Caller, deadline: float) -> None:
        while not (said := backend.read(1)):
            if said is not None:
                raise ConnectionAbortedError(errno.ECONNABORTED, "ended without a greeting")
            await wait(backend.loop, deadline, "no greeting", lambda: caller.client.aborted, "the client is gone")


def follow(count: int, script: Callable[[Scene, list[socket.socket]], Awaitable[object]]) -> None:
    """Run a script with so many backends, which are up, and listen; count the descriptors."""
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with ExitStack() as stack:
            listeners = [stack.enter_context(unix_listener()) for _ in range(count)]
            addresses = [address for _, address in listeners]
            for listener, _ in listeners:
                listener.settimeout(PATIENCE)
            async with Scene(loop, *addresses, clock=clock, openings=(Greeting(),), connect_timeout=4.0) as scene:
                await script(scene, [listener for listener, _ in listeners])

    run(main, clock)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_backend_is_reached_once_it_has_answered() -> None:
    async def script(scene: Scene, listeners: list[socket.socket]) -> None:
        client = scene.start()
        await scene.settle()
        assert client.outcome is None
        backend, _ = listeners[0].accept()
        backend.sendall(b"!")
        assert await scene.outcome(client) == scene.members[0].name
        backend.close()

    follow(1, script)


@pytest.mark.parametrize(("first", "then"), [("v1", ""), ("", "v1")])
def test_a_backend_hears_what_is_for_it_though_a_reload_comes_while_it_is_dialled(first: str, then: str) -> None:
    async def main(loop: Loop) -> None:
        with full_unix() as (listener, full), unix_listener() as (_, other):
            async with Scene(loop, full, send_proxy=first) as scene:
                client = scene.start("192.0.2.1")
                await scene.settle()
                scene.apply(other, send_proxy=then)
                listener.accept()[0].close()
                assert await scene.outcome(client) == full
                client.close()
                backend, _ = listener.accept()
                assert backend.recv(100)[:6] == (b"PROXY " if first else b"")
                backend.close()

    run(main)


def test_if_a_backend_does_not_answer_the_next_one_is_dialled_within_connect_timeout() -> None:
    async def script(scene: Scene, listeners: list[socket.socket]) -> None:
        first, second = scene.members
        client = scene.start()
        await scene.advance(2.1)
        assert (first.state, first.why_down, first.open) == ("down", "no greeting", 0)
        silent, _ = listeners[0].accept()
        silent.setblocking(False)
        assert silent.recv(1) == b"", "the side was left open"
        silent.close()
        backend, _ = listeners[1].accept()
        backend.sendall(b"!")
        assert await scene.outcome(client) == second.name
        backend.close()

    follow(2, script)


@pytest.mark.parametrize("how", ["ended", "silent"])
def test_a_client_is_told_why_a_backend_was_of_no_use(how: str) -> None:
    async def script(scene: Scene, listeners: list[socket.socket]) -> None:
        client = scene.start()
        if how == "ended":
            listeners[0].accept()[0].close()
        await scene.advance(0.1 if how == "ended" else 4.1)
        cause, reason = await scene.failure(client)
        name = scene.members[0].name
        if how == "ended":
            assert (cause, reason) == ("backend-unreachable", f"{name}: ended without a greeting")
        else:
            assert (cause, reason) == ("connect-timeout", f"{name}: no greeting")

    follow(1, script)


@pytest.mark.parametrize("how", ["aborts", "is cut"])
def test_nothing_is_left_of_an_attempt_whose_client_goes_before_the_answer(how: str) -> None:
    async def script(scene: Scene, _: list[socket.socket]) -> None:
        client = scene.client()
        before = descriptors()
        client.task = scene.loop.spawn(client.dial())
        await scene.settle()
        assert descriptors() == before + 1
        if how == "aborts":
            reset(client.peer)
            assert (await scene.failure(client))[0] == "client-aborted"
        else:
            client.task.cancel()
            while not client.task.done:
                await scene.loop.yield_turn()
        assert descriptors() == before - (how == "aborts")
        [backend] = scene.members
        assert (backend.state, backend.open) == ("up", 0)

    follow(1, script)


def test_an_attempt_that_fails_in_the_opening_is_no_way_to_another_proxy_any_more() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with tcp_listener() as sock:
            listener = adopt_listener("web", sock.dup())
            address = f"127.0.0.1:{sock.getsockname()[1]}"
            async with Scene(loop, address, clock=clock, openings=(Greeting(),), connect_timeout=4.0) as scene:
                scene.ways.listen({"web": [listener]}, ())
                client = scene.client()
                client.way = Way(scene.ways, ("mail",))
                client.task = loop.spawn(client.dial())
                await scene.settle()
                assert client.way.near
                await scene.advance(4.1)
                assert (await scene.failure(client))[1] == f"{address}: no greeting"
                assert client.way.near is None
            listener.close()

    run(main, clock)
