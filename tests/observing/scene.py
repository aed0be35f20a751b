"""Proxies at work on a loop, on real sockets, and who looks at them."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from rspd.config.keys import load_config
from rspd.engine.loop import Loop, Task
from rspd.engine.pipes import Pipes
from rspd.net.address import resolve
from rspd.net.descriptors import Shortage
from rspd.net.listener import open_listeners
from rspd.net.resolver import Resolver
from rspd.net.ways import Ways
from rspd.observing.life import Life
from rspd.observing.pace import Pace
from rspd.observing.samples import Sampler
from rspd.routing.pools import PoolMaker
from rspd.running.proxies import Proxies
from rspd.settings import Config
from tests.dialled import settle, until
from tests.support import PATIENCE, FakeClock, run

T = TypeVar("T")


def config(text: str) -> Config:
    """The configuration of a file."""
    return load_config("file", {}, sockets=True, content=text.encode())


class Scene:
    """The proxies of one process, by the text of a file. What is said of time is said by a clock that stands still."""

    def __init__(self, loop: Loop, clock: FakeClock, text: str) -> None:
        self.loop, self.clock = loop, clock
        self.watchers: set[Task] = set()
        self.shortage = Shortage(loop)
        self.ways = ways = Ways(loop)
        maker = PoolMaker(loop, self.shortage, Resolver(loop), ways)
        self.proxies = Proxies(loop, self.shortage, Pipes(0), maker, ways, self.watchers)
        self.reload(text)
        self.life = Life(loop, "0.0", "")
        self.pace = Pace(loop)
        self.sampler = Sampler(loop, self.pace, self.proxies, self.watchers)

    def reload(self, text: str) -> None:
        """Go by another file. All listeners are new."""
        read = config(text)
        for proxy in self.proxies.configured.values():
            proxy.pause()
            for listener in proxy.listeners:
                listener.close()
        opened = {
            one.name: [listener for address in one.listen for listener in open_listeners(address, resolve(address), 99)]
            for one in read.proxies
        }
        self.proxies.apply(read, opened)

    async def until(self, condition: Callable[[], T | None]) -> T:
        """Let the proxies work until something is so, and return it. No time of the clock passes."""
        return await until(self.loop, condition)

    async def pass_time(self, seconds: float, step: float = 1.0) -> None:
        """Let time pass, a step at a time, and those work whose time has come."""
        while seconds > 0:
            self.clock.advance(min(step, seconds))
            seconds -= step
            await settle(self.loop)

    def connect(self, name: str = "") -> socket.socket:
        """A client of a proxy."""
        client = socket.create_connection(self.proxies.configured[name].listeners[0].reached_at[0], PATIENCE)
        client.settimeout(PATIENCE)
        return client

    async def end(self) -> None:
        """Stop listening, and let the last clients go."""
        self.sampler.stop()
        for proxy in self.proxies.everyone():
            proxy.stop_listening()
        await self.until(lambda: not self.proxies.open)
        self.shortage.give_up_spare()
        await settle(self.loop)


async def talk(scene: Scene, client: socket.socket, said: int | bytes) -> None:
    """A client sends this, or so many bytes, and gets them back."""
    client.sendall(bytes(said))
    size = len(bytes(said))
    client.setblocking(False)
    got = 0

    def receive() -> bool:
        nonlocal got
        try:
            got += len(client.recv(size))
        except BlockingIOError:
            pass
        return got == size

    await scene.until(receive)
    client.settimeout(PATIENCE)


def play(text: str, script: Callable[[Scene], Awaitable[T]]) -> T:
    """Play a script on proxies that go by a file."""
    clock = FakeClock()

    async def main(loop: Loop) -> T:
        scene = Scene(loop, clock, text)
        result = await script(scene)
        await scene.end()
        return result

    made: Callable[[Loop], Coroutine[Any, Any, T]] = main
    return run(made, clock)
