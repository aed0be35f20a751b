"""A `Server` on a loop of its own, in a thread, and clients of it: real sockets on both sides."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from rspd.admin.request import Answer, Request
from rspd.admin.server import Server
from rspd.engine.loop import Loop, news
from rspd.net.address import Address, resolve
from rspd.net.descriptors import Shortage
from rspd.net.listener import Listener, close_all, open_listeners
from tests.support import PATIENCE, receive_all, tasks_of

T = TypeVar("T")

Handler = Callable[[Loop, Request], Awaitable[Answer]]

# A whole request.
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def tell(_: Loop, request: Request) -> Answer:
    """A handler that answers what was asked."""
    return Answer(200, "text/plain", (f"{request.method} {request.path} {request.query} {request.accept}".encode(),))


class Said(NamedTuple):
    """An answer as a client has it. length: what its head says, -1 if it says nothing."""

    status: int
    fields: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, data: bytes) -> Said:
        """From all bytes of a connection."""
        head, separator, body = data.partition(b"\r\n\r\n")
        assert separator, f"no whole head: {data!r:.300}"
        first, *lines = head.decode().split("\r\n")
        protocol, status, _ = first.split(" ", 2)
        assert protocol == "HTTP/1.1"
        return cls(int(status), dict(line.split(": ", 1) for line in lines), body)


def what_comes(client: socket.socket) -> bytes:
    """All bytes up to the end of the stream, or up to a reset."""
    data = b""
    with suppress(ConnectionResetError):
        while more := client.recv(1 << 16):
            data += more
    return data


class Served:
    """A server at a unix socket, `path`, and at a TCP port."""

    loop: Loop
    server: Server
    port: int

    def __init__(self, folder: Path, handler: Handler, opened: Callable[[list[Listener]], Sequence[Listener]]) -> None:
        self.path = str(folder / "control.sock")
        self._handler, self._opened = handler, opened
        self._errors: list[BaseException] = []
        self._ready = threading.Event()
        self._ending = False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        assert self._ready.wait(PATIENCE), self._errors

    def _work(self) -> None:
        try:
            with Loop() as loop:
                loop.run(self._serve(loop))
        except BaseException as error:
            self._errors.append(error)
            self._ready.set()

    async def _serve(self, loop: Loop) -> None:
        self.loop, self.task = loop, loop.current
        before = tasks_of(loop)
        self.server = Server(loop, Shortage(loop), partial(self._handler, loop))
        places = Address(path=self.path), Address("127.0.0.1", 0)
        self.listeners = self._opened([one for place in places for one in open_listeners(place, resolve(place), 128)])
        self.port = self.listeners[-1].reached_at[0][1]
        self.server.apply(self.listeners)
        self._ready.set()
        while not self._ending:
            await news()
        self.server.stop()
        close_all(self.listeners, {})
        until = loop.now + PATIENCE
        while tasks_of(loop) > before:
            assert loop.now < until, f"{tasks_of(loop) - before} tasks left behind"
            await loop.sleep(0.005)

    def end(self) -> None:
        """Answer nobody any more, and wait until nothing is left. Fails if something is."""
        self.do(self._end)
        self.thread.join(2 * PATIENCE)
        assert not self._errors, self._errors

    def _end(self) -> None:
        self._ending = True
        self.task.wake()

    def do(self, call: Callable[[], T]) -> T:
        """What a call returns, which is made by the loop."""
        outcomes: queue.SimpleQueue[T] = queue.SimpleQueue()
        self.loop.wakeups.run_in_thread(lambda: None, lambda _: outcomes.put(call()))
        return outcomes.get(timeout=PATIENCE)

    @property
    def tasks(self) -> int:
        """How many tasks the loop has now."""
        return self.do(lambda: tasks_of(self.loop))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The loop stands still: what is done meanwhile, it finds afterwards all at once."""
        stands, go = threading.Event(), threading.Event()

        def stand() -> None:
            stands.set()
            go.wait(PATIENCE)

        self.loop.wakeups.run_in_thread(lambda: None, lambda _: stand())
        assert stands.wait(PATIENCE)
        try:
            yield
        finally:
            go.set()

    def connect(self, tcp: bool = False) -> socket.socket:
        """A client that has said nothing."""
        client = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        client.connect(("127.0.0.1", self.port) if tcp else self.path)  # not with a timeout: it may have to wait
        client.settimeout(PATIENCE)
        return client

    def say(self, data: bytes, tcp: bool = False) -> socket.socket:
        """A client that has said this."""
        client = self.connect(tcp)
        client.sendall(data)
        return client

    def ask(self, data: bytes = GET, tcp: bool = False) -> Said:
        """The whole answer to this."""
        with self.say(data, tcp) as client:
            return Said.of(receive_all(client))


@contextmanager
def serving(
    folder: Path, handler: Handler = tell, opened: Callable[[list[Listener]], Sequence[Listener]] = list
) -> Iterator[Served]:
    """A server. At the end, nothing of it is left. opened: takes the listeners, and returns those to answer at."""
    served = Served(folder, handler, opened)
    try:
        yield served
    finally:
        served.end()


class Gate:
    """A handler that answers when it is let.

    inside: how many requests are being answered. most: how many there were at once.
    """

    def __init__(self) -> None:
        self.inside = self.most = 0
        self._open = threading.Event()

    async def __call__(self, loop: Loop, request: Request) -> Answer:
        if request.path == "/free":
            return await tell(loop, request)
        self.inside += 1
        self.most = max(self.most, self.inside)
        while not self._open.is_set():
            await loop.sleep(0.005)
        self.inside -= 1
        return await tell(loop, request)

    def open(self) -> None:
        """Let all be answered."""
        self._open.set()
