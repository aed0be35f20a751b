"""How much goes on each second, by samples; and that nobody is woken where nothing goes on."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator

import pytest

from rspd.observing.samples import KEPT, LONGEST, STEP
from rspd.serving.connection import Connection
from rspd.snapshot import Rate, Volume
from tests.dialled import settle
from tests.observing.scene import Scene, play, talk
from tests.support import Backend, echo


@pytest.fixture
def backend(no_descriptor_is_left_open: None) -> Iterator[Backend]:
    with Backend(echo) as backend:
        yield backend


def one_proxy(backend: Backend) -> str:
    keys = {"listen": "127.0.0.1:0", "backend": backend.address, "max_connections": 99, "idle_timeout": "off"}
    return json.dumps(keys)


async def come_and_go(scene: Scene, size: int = 100, name: str = "") -> None:
    """A client comes, sends so many bytes, gets them back, and goes."""
    with scene.connect(name) as client:
        await talk(scene, client, size)
    await scene.until(lambda: not scene.proxies.open)


def rates(scene: Scene, *seconds: float, name: str = "") -> list[tuple[float, ...]]:
    return [tuple(round(one, 6) for one in scene.sampler.rate(name, each)) for each in seconds]


def near(*numbers: float, rel: float = 1e-3) -> list[object]:
    return [pytest.approx(numbers, rel=rel)]


def test_rates_are_those_of_the_last_ten_seconds_and_of_the_last_minute(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        scene.sampler.start()
        assert rates(scene, 10, 60) == [(0, 0, 0)] * 2
        for _ in range(20):
            await scene.pass_time(1)
            await come_and_go(scene)
        assert rates(scene, 10) == near(1, 100, 100, rel=0.3)
        assert rates(scene, 60) == near(1, 100, 100)  # it is not older
        await scene.pass_time(5)
        assert rates(scene, 10) == near(0.5, 50, 50, rel=0.3)
        await scene.pass_time(10)
        assert rates(scene, 10) == [(0, 0, 0)]
        assert rates(scene, 60) == near(20 / 35, 2000 / 35, 2000 / 35)
        await scene.pass_time(60)
        assert rates(scene, 10, 60) == [(0, 0, 0)] * 2

    play(one_proxy(backend), script)


def test_bytes_of_open_connections_are_in_the_rates(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        scene.sampler.start()
        with scene.connect() as client:
            for _ in range(15):
                await talk(scene, client, 1000)
                await scene.pass_time(1)
            await scene.sampler.count_bytes()
            assert rates(scene, 10) == near(0, 1000, 1000)
            assert rates(scene, 60) == near(1 / 15, 1000, 1000)
            assert scene.proxies.tallies[""].volumes == (Volume(backend.address, 15_000, 15_000),)

    play(one_proxy(backend), script)


def test_an_idle_process_is_woken_by_a_client_only(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        scene.sampler.start()
        (task,) = scene.watchers  # it waits for a connection to begin or end
        for _ in range(2):
            samples = list(scene.sampler._samples[""])
            await scene.pass_time(100_000, step=50_000)
            assert list(scene.sampler._samples[""]) == samples
            await come_and_go(scene)
            assert rates(scene, 10) == [(0.1, 10, 10)]  # and not less, since there was nothing before
            await scene.pass_time(STEP)
            assert scene.watchers == {task}

    play(one_proxy(backend), script)


def test_a_client_that_has_yet_to_move_a_byte_is_no_idle_time(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        scene.sampler.start()
        with scene.connect() as client:
            await scene.until(lambda: scene.proxies.open)
            await scene.pass_time(3600, step=STEP)
            await talk(scene, client, b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n".ljust(5000))
            await scene.sampler.count_bytes()
            assert rates(scene, 10) == near(0, 500, 500)

    route = {"host": "a.example", "backend": backend.address}
    keys = {"listen": "127.0.0.1:0", "first_bytes_timeout": "9h", "idle_timeout": "off", "routes": [route]}
    play(json.dumps(keys), script)


def test_a_minute_is_a_minute_whether_clients_come_often_or_rarely(backend: Backend) -> None:
    """Each idle time costs a sample more."""

    async def script(scene: Scene) -> None:
        scene.sampler.start()
        for _ in range(40):
            await come_and_go(scene)
            await scene.pass_time(STEP + 0.1)
        assert rates(scene, LONGEST) == near(12 / 60, 1200 / 60, 1200 / 60, rel=0.1)
        assert len(scene.sampler._samples[""]) <= KEPT

    play(one_proxy(backend), script)


def test_the_rate_of_a_connection_is_that_of_its_last_seconds(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        scene.sampler.start()
        await scene.pass_time(100)
        with scene.connect() as client:
            (one,) = await scene.until(lambda: list(scene.proxies.configured[""].connections.values()))

            def rate() -> float:
                assert one.relay
                return scene.sampler.rate_of(one, one.relay.upload.total + one.relay.download.total)

            await talk(scene, client, 500)
            assert rate() == 1000  # it has lasted for less than a second
            await scene.pass_time(2)
            assert rate() == 500
            await scene.pass_time(STEP)
            await talk(scene, client, 2000)
            assert 4000 / STEP <= rate() <= 4000
            await scene.pass_time(3 * STEP)
            assert rate() == 0

    play(one_proxy(backend), script)


def test_a_connection_from_the_process_before_has_its_average_at_first(backend: Backend) -> None:
    """Not all its bytes in one second."""

    async def script(scene: Scene) -> None:
        with scene.connect() as client:
            (one,) = await scene.until(lambda: list(scene.proxies.configured[""].connections.values()))
            await talk(scene, client, 50)
            one.started -= 1000.0
            scene.sampler.start()  # as a process does that has taken over
            assert scene.sampler.rate_of(one, 10_000_000) == 10_000
            await scene.pass_time(1)
            assert scene.sampler.rate_of(one, 100) == 0

    play(one_proxy(backend), script)


def test_what_has_ended_is_not_kept(backend: Backend) -> None:
    async def script(scene: Scene) -> None:
        scene.sampler.start()
        clients = [scene.connect() for _ in range(3)]
        await scene.until(lambda: backend.accepted == 3)
        await scene.pass_time(2 * STEP)
        for client in clients:
            client.close()
        await scene.until(lambda: not scene.proxies.open)
        await scene.pass_time(STEP)
        gc.collect()
        pool = scene.proxies.configured[""].router.pool
        assert not [one for one in gc.get_objects() if type(one) is Connection and one.terms.pool is pool]

    play(one_proxy(backend), script)


def test_who_cannot_look_costs_no_samples(backend: Backend) -> None:
    """As when a reload takes the control socket out, and another brings it back."""

    async def script(scene: Scene) -> None:
        assert scene.sampler.rate("", 10) == Rate()
        for _ in range(2):
            scene.sampler.start()
            scene.sampler.start()
            assert len(scene.watchers) == 1
            await settle(scene.loop)
            scene.sampler.stop()
            await settle(scene.loop)
            assert not scene.watchers
        await come_and_go(scene)
        samples = list(scene.sampler._samples[""])
        await scene.pass_time(2 * STEP)
        assert list(scene.sampler._samples[""]) == samples

    play(one_proxy(backend), script)


def test_each_proxy_has_its_own_rates_and_one_that_is_new_too(backend: Backend) -> None:
    def text(*names: str) -> str:
        listen = {name: f"127.0.0.{number}:0" for number, name in enumerate(names, 1)}
        proxies = {name: {"listen": address, "backend": backend.address} for name, address in listen.items()}
        return json.dumps({"max_connections": 9, "proxies": proxies})

    async def script(scene: Scene) -> None:
        scene.sampler.start()
        for _ in range(10):
            await come_and_go(scene, 100, "a")
            await scene.pass_time(1)
        assert rates(scene, 10, name="a") == near(1, 100, 100, rel=0.3)
        assert rates(scene, 10, name="b") == [(0, 0, 0)]
        scene.reload(text("b", "c"))
        await scene.pass_time(STEP)
        for _ in range(10):
            await scene.pass_time(1)
            await come_and_go(scene, 100, "c")
        assert rates(scene, 10, name="c") == near(1, 100, 100, rel=0.3)
        assert rates(scene, 5, name="a") == [(0, 0, 0)]
        assert rates(scene, 60, name="a")[0][0] > 0  # though it is gone

    play(text("a", "b"), script)
