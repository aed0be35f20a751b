"""Checks that ask something else than the backend, and checks of one backend in place of those of the proxy."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rspd.config.addresses import parse_backend
from rspd.engine.loop import Loop
from rspd.net.address import Address
from rspd.settings import HealthConfig
from tests.dialled import (
    UNANSWERED,
    UNKNOWN,
    Answer,
    Scene,
    configured,
    full_unix,
    switches,
    unix_listener,
    where,
)
from tests.support import FakeClock, free_port, full_tcp, run

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

HEALTH = HealthConfig(interval=1.0, timeout=0.5, rise=2, fall=2)


@contextmanager
def agent(host: str = "127.0.0.1", port: int = 0) -> Iterator[socket.socket]:
    """A TCP listener that a check asks."""
    with socket.create_server((host, port)) as listener:
        listener.settimeout(5)
        yield listener


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def downs(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why backends went down, by the log."""
    lines = [record.getMessage() for record in caplog.records if record.name == "rspd.balancing.members"]
    return [line.partition("reason=")[2] for line in lines if line.startswith("backend down")]


# Another port


def test_a_check_may_ask_another_port_than_clients_get(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> int:
        port = free_port()
        with agent() as backend, agent() as first:
            one, two = (f"127.0.0.{host}:{port_of(backend)}" for host in (1, 2))
            health = HEALTH._replace(port=port_of(first))
            async with Scene(loop, one, two, clock=clock, health=health) as scene:
                # There is nobody at 127.0.0.2, and it is only asked at the other port.
                await scene.advance(0.1)
                assert [backend.in_service for backend in scene.members] == [True, False]
                with agent("127.0.0.2", port_of(first)):
                    await scene.advance(2.1)
                    assert [backend.in_service for backend in scene.members] == [True, True]
                scene.apply(one, two, health=HEALTH._replace(port=port))
                await scene.advance(0.1)
                assert not scene.pool.members.any_in_service
                assert await scene.fail() == (
                    "backend-down",
                    (
                        f"{one} is down: 127.0.0.1:{port}: Connection refused; "
                        f"{two} is down: 127.0.0.2:{port}: Connection refused"
                    ),
                )
        return port

    port = run(main, clock)
    assert downs(caplog)[1:] == [f'"127.0.0.{host}:{port}: Connection refused"' for host in (1, 2)]


@pytest.mark.parametrize("resolve", ["one", "each"])
def test_a_check_asks_another_port_of_each_address_of_a_name(resolve: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with agent("127.0.0.2") as listener:
            names = {"name": [where("127.0.0.1:1"), where("127.0.0.2:1")]}
            settings: dict[str, Any] = {"resolve": resolve, "health": HEALTH._replace(port=port_of(listener))}
            async with Scene(loop, "name:80", names=names, clock=clock, **settings) as scene:
                await scene.advance(0.6)
                up = {backend.name: backend.in_service for backend in scene.members}
                assert up == ({"name:80": True} if resolve == "one" else {"127.0.0.1:80": False, "127.0.0.2:80": True})
                # What the check has reached says nothing of the port that clients get.
                assert [str(address) for backend in scene.members for address in backend.addresses] == [
                    "127.0.0.1:80",
                    "127.0.0.2:80",
                ]

    run(main, clock)


def test_a_check_elsewhere_names_in_its_host_header_what_it_asks() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> tuple[bytes, int]:
        with agent() as listener:
            health = HEALTH._replace(port=port_of(listener), http="/primary")
            async with Scene(loop, "127.0.0.1:1", clock=clock, health=health) as scene:
                await scene.settle()
                asked, _ = listener.accept()
                with asked:
                    return asked.recv(1000), port_of(listener)

    request, port = run(main, clock)
    assert request.startswith(b"GET /primary HTTP/1.0\r\nHost: 127.0.0.1:%d\r\n" % port)


@pytest.mark.parametrize("elsewhere", ["port", "address", "own"])
def test_only_a_check_of_the_backend_itself_sends_a_proxy_header(elsewhere: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> bytes:
        with agent() as listener:
            own = f"127.0.0.1:{port_of(listener)}"
            health = HEALTH._replace(send=b"PING")
            if elsewhere == "port":
                health = health._replace(port=port_of(listener))  # even if it is the same
            if elsewhere == "address":
                health = health._replace(address=parse_backend(own))
            async with Scene(loop, own, clock=clock, health=health, send_proxy="v1") as scene:
                await scene.settle()
                asked, _ = listener.accept()
                with asked:
                    return asked.recv(1000)

    assert run(main, clock) == (b"PROXY UNKNOWN\r\nPING" if elsewhere == "own" else b"PING")


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_check_elsewhere_that_is_not_answered_does_not_name_the_timeout_of_clients(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> str:
        with full_tcp() as one, full_unix() as (_, other):
            silent = one if kind == "tcp" else other
            health = HEALTH._replace(address=parse_backend(silent))
            async with Scene(loop, "127.0.0.1:1", clock=clock, health=health) as scene:
                await scene.advance(0.6)
            return silent

    silent = run(main, clock)
    assert downs(caplog) == [f'"{silent}: no answer in time"']


def test_an_address_that_does_not_answer_a_check_elsewhere_costs_time_once() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[float]:
        with full_tcp() as silent, agent("127.0.0.2", parse_backend(silent).port) as listener:
            names = {"name": [where(silent), where(f"127.0.0.2:{port_of(listener)}")]}
            health = HEALTH._replace(port=port_of(listener), timeout=0.9)
            async with Scene(loop, "name:80", names=names, clock=clock, health=health) as scene:
                times = []
                for _ in range(3):
                    began = clock.now
                    while not listener_has(listener):
                        await scene.advance(0.05)
                    listener.accept()[0].close()
                    times.append(clock.now - began)
                return times

    # Half of the timeout of 0.9 s, and then at each interval, of 1 s.
    assert run(main, clock) == pytest.approx([0.45, 0.55, 1.0], abs=0.1)


def listener_has(listener: socket.socket) -> bool:
    """Whether a client waits there."""
    return bool(select.select([listener], [], [], 0)[0])


# Another address


def test_a_check_may_ask_another_address() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("-") as (watcher,), unix_listener() as (_, live):
            health = HEALTH._replace(address=parse_backend(watcher.address))
            async with Scene(loop, configured(live, health=health), clock=clock) as scene:
                await scene.advance(0.1)
                assert (await scene.fail())[0] == "backend-down"
                watcher.on()
                await scene.advance(2.1)
                assert await scene.dial() == live

    run(main, clock)


@pytest.mark.parametrize("port", [True, False])
def test_a_check_may_ask_another_host_at_the_backend_s_port_or_at_another(port: bool) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with agent("127.0.0.9") as listener:
            number = port_of(listener)
            health = HEALTH._replace(address=Address("127.0.0.9"), port=number if port else None)
            own = f"127.0.0.1:{1 if port else number}"
            async with Scene(loop, own, clock=clock, health=health) as scene:
                await scene.advance(0.1)
                assert scene[own].in_service
                listener.accept()[0].close()

    run(main, clock)


def test_the_address_of_a_check_may_be_a_name_that_is_looked_up_as_others_are() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[str]:
        with agent() as one, agent("127.0.0.2", port_of(one)), unix_listener() as (_, live):
            names: dict[str, Answer] = {"agent": [where("127.0.0.1:1")]}
            health = HEALTH._replace(address=Address("agent", port_of(one)))
            backend = configured(live, health=health)
            async with Scene(loop, backend, names=names, clock=clock, resolve_interval=2.0) as scene:
                await scene.advance(0.1)
                assert [backend.name for backend in scene.members] == [live]
                # What is known is asked while nobody knows the name.
                scene.names.names["agent"] = UNANSWERED
                await scene.advance(10)
                assert scene[live].in_service
                scene.names.names["agent"] = UNKNOWN
                await scene.advance(6)
                assert not scene[live].in_service
                scene.names.names["agent"] = [where("127.0.0.2:1")]
                await scene.advance(5)
                assert scene[live].in_service
                scene.apply(live)
                asked = len(scene.names.asked)
                await scene.advance(10)
                return scene.names.asked[asked:]

    assert run(main, clock) == []


def test_a_client_that_comes_before_any_backend_is_known_does_not_wait_for_the_address_of_a_check() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> tuple[str, str]:
        health = HEALTH._replace(address=Address("agent", 1))
        async with Scene(loop, configured("name:80", health=health), names={}, clock=clock, resolve="each") as scene:
            client = scene.start()
            await scene.settle()
            scene.names.answer("name", UNKNOWN)
            return await scene.failure(client)

    assert run(main, clock) == ("backend-unknown", "name:80: Name or service not known")


# Checks of one backend


def test_the_health_of_a_backend_takes_the_place_of_the_proxy_s() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("---") as (first, second, third):
            backends = [
                configured(first.address),
                configured(second.address, health="off"),
                configured(third.address, health=HealthConfig(interval=9.0)),
            ]
            async with Scene(loop, *backends, clock=clock, health=HEALTH) as scene:
                await scene.advance(0.1)
                assert [backend.in_service for backend in scene.members] == [False, True, False]
                third.on()
                await scene.advance(8.5)
                assert not scene[third.address].in_service
                checkers = [backend.checker for backend in scene.members]
                scene.apply(*backends[::2], configured(second.address, health=HEALTH), health=HEALTH)
                await scene.advance(0.1)
                assert not scene[second.address].in_service
                assert [scene[first.address].checker, scene[third.address].checker] == checkers[::2]
                scene.apply(configured(first.address, health="off"))
                assert scene[first.address].in_service

    run(main, clock)


def test_a_failure_to_connect_cuts_connections_only_of_a_backend_without_checks() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> list[str]:
        with agent() as listener, switches("--") as (checked, unchecked):
            well = HEALTH._replace(address=parse_backend(f"127.0.0.1:{port_of(listener)}"))
            backends = [configured(checked.address, health=well), configured(unchecked.address)]
            async with Scene(loop, *backends, clock=clock) as scene:
                await scene.settle()
                await scene.fail()
                assert not scene.pool.members.any_in_service
                assert unchecked.address in scene.down
                return [name for name in scene.down if name != unchecked.address]

    assert run(main, clock) == []
