"""A program of its own: the clients and the backend of restarts.py, which count what becomes of each connection.

    python -m bench.visitors PORT BACKEND_PORT

It reads a command a line from its standard input, and answers with a line of JSON:

open N    N more long connections, of which each tenth is a slow download, and the others talk
new RATE  so many new connections a second from now on
state     what became of all so far, and the slowest since the last answer
finish    no new ones any more; ends the downloads, and says what became of all
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

QUESTION, ANSWER = b"S" * 64, b"a" * 256
THINKING = 0.05  # seconds of the backend for the answer to a new connection
TALK_EVERY, MESSAGE = 0.2, 16  # seconds, bytes
PIECE = 16 << 10  # bytes that a slow download takes each TALK_EVERY
EACH_TENTH = 10
PATIENCE = 10.0  # seconds
# No zero in it, nor a power of two long: a missing piece is seen.
PATTERN = random.Random(0).randbytes(70_000).replace(b"\0", b"") * 2
HALF = len(PATTERN) // 2
OVER = b"\0"  # what a download ends with


class Backend(asyncio.Protocol):
    """What the first byte of a connection asks for: an answer after a while, an echo, or a download."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A connection that has said nothing yet."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._kind = b""
        self._came = self._sent = 0
        self._paused = self._over = False

    def data_received(self, data: bytes) -> None:
        """Answer."""
        if not self._kind:
            self._kind, data = data[:1], data[1:] if data[:1] != b"S" else data
        self._came += len(data)
        if self._kind == b"S" and self._came == len(QUESTION):
            asyncio.get_running_loop().call_later(THINKING, self._transport.write, ANSWER)
        elif self._kind == b"T":
            self._transport.write(data)
        elif self._kind == b"D":
            self._over = bool(data)
            self._feed()

    def _feed(self) -> None:
        while not self._paused and not self._over:
            begin = self._sent % HALF
            self._sent += PIECE
            self._transport.write(PATTERN[begin : begin + PIECE])
        if self._over:
            self._transport.write(OVER)

    def pause_writing(self) -> None:
        """Enough is under way."""
        self._paused = True

    def resume_writing(self) -> None:
        """There is room."""
        self._paused = False
        if self._kind == b"D" and not self._over:
            self._feed()


class Long:
    """A long connection."""

    first: bytes

    def __init__(self, ended: Counter[str]) -> None:
        """ended: in which it counts itself, by its outcome."""
        self._ended = ended
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outcome = ""
        self.slowest = 0.0  # seconds without a byte that was due

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say which kind it is."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self.first)

    def connection_lost(self, error: Exception | None) -> None:
        """It was cut, if it had not been over."""
        self.end("reset" if error else "ended early")

    def end(self, outcome: str) -> None:
        """It is over, for whatever cause comes first."""
        if not self.outcome:
            self.outcome = outcome
            self._ended[outcome] += 1
            if not self.begun.done():
                self.begun.set_result(None)
            self._transport.abort()

    def came(self) -> None:
        """A byte has come."""
        if not self.begun.done():
            self.begun.set_result(None)


class Talk(Long, asyncio.Protocol):
    """It says something now and then, and hears it again."""

    first = b"T"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to talk."""
        super().connection_made(transport)
        self._heard = b""
        self._say()

    def _say(self) -> None:
        if not self.outcome:
            self._said, self._when = os.urandom(MESSAGE), time.monotonic()
            self._transport.write(self._said)

    def data_received(self, data: bytes) -> None:
        """The echo."""
        self.came()
        self._heard += data
        if len(self._heard) >= MESSAGE:
            if self._heard != self._said:
                self.end("wrong bytes")
            self.slowest = max(self.slowest, time.monotonic() - self._when)
            self._heard = b""
            asyncio.get_running_loop().call_later(TALK_EVERY, self._say)

    def finish(self) -> None:
        """It goes on, unless the last echo is missing."""
        self.end("silent" if time.monotonic() - self._when > PATIENCE else "whole")


class Download(Long, asyncio.BufferedProtocol):
    """It takes a piece now and then, of data without an end."""

    first = b"D"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to read."""
        super().connection_made(transport)
        self._buffer = bytearray(PIECE)
        self._received = 0
        self._hurry = False

    def get_buffer(self, sizehint: int) -> bytearray:
        """A small one."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """A piece, and a rest after it."""
        self.came()
        begin = self._received % HALF
        self._received += nbytes
        data, expected = self._buffer[:nbytes], PATTERN[begin : begin + nbytes]
        if data != expected:
            whole = self._hurry and data.endswith(OVER) and data[:-1] == expected[:-1]
            self.end("whole" if whole else "wrong bytes")
        elif not self._hurry:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(TALK_EVERY, self._go_on)

    def _go_on(self) -> None:
        if not self.outcome:
            self._transport.resume_reading()

    def finish(self) -> None:
        """Ask for the end, and read all that is before it."""
        if not self.outcome:
            self._hurry = True
            self._transport.write(b".")
            self._transport.resume_reading()


class Visitors:
    """All clients of a proxy."""

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        self._long: list[Talk | Download] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._new = Counter[str]()
        self._ended = Counter[str]()
        self._slowest = 0.0
        self._pace: asyncio.Task[None] | None = None

    async def open(self, count: int) -> None:
        """Open long connections, and wait until each has had a byte."""
        opened = [await self._open(Talk if number % EACH_TENTH else Download) for number in range(count)]
        await asyncio.wait_for(asyncio.gather(*(one.begun for one in opened)), PATIENCE)
        self._long += opened

    async def _open(self, kind: type[Talk | Download]) -> Talk | Download:
        """Open one, when somebody listens."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        while True:
            sock = socket.socket()
            sock.setblocking(False)
            if kind is Download:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * PIECE)  # so that the proxy has to hold back
            try:
                await loop.sock_connect(sock, self._address)
                return (await loop.create_connection(lambda: kind(self._ended), sock=sock))[1]
            except OSError:
                sock.close()
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(0.05)

    def begin_new(self, rate: float) -> None:
        """Let new ones come from now on."""
        self._pace = asyncio.create_task(self._keep_pace(rate))

    async def _keep_pace(self, rate: float) -> None:
        due = time.monotonic()
        while True:
            task = asyncio.create_task(self._visit())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _visit(self) -> None:
        """A new connection: a question, and its answer."""
        began = time.monotonic()
        try:
            self._new[await asyncio.wait_for(self._ask(), PATIENCE)] += 1
        except asyncio.TimeoutError:
            self._new["unanswered"] += 1
        self._slowest = max(self._slowest, time.monotonic() - began)

    async def _ask(self) -> str:
        try:
            reader, writer = await asyncio.open_connection(*self._address)
        except ConnectionRefusedError:
            return "refused"
        except OSError:
            return "cut"
        try:
            writer.write(QUESTION)
            return "whole" if await reader.readexactly(len(ANSWER)) == ANSWER else "cut"
        except (OSError, asyncio.IncompleteReadError):
            return "cut"
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def state(self) -> dict[str, Any]:
        """What became of all so far, and the slowest since this was asked last."""
        slowest = {"slowest_new": self._slowest, "slowest_long": max((one.slowest for one in self._long), default=0.0)}
        self._slowest = 0.0
        for one in self._long:
            one.slowest = 0.0
        return {
            "new": dict(self._new),
            "long": {**self._ended, "open": len(self._long) - self._ended.total()},
            **slowest,
        }

    async def finish(self) -> None:
        """No new ones any more. Those that are open have their time."""
        if self._pace:
            self._pace.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for one in self._long:
            one.finish()
        deadline = time.monotonic() + PATIENCE
        while not all(one.outcome for one in self._long) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)


async def main(port: int, backend_port: int) -> None:
    """Serve as backend, and do what is told."""
    loop = asyncio.get_running_loop()
    await loop.create_server(Backend, "127.0.0.1", backend_port, backlog=1024)
    visitors = Visitors(port)
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while words := (await commands.readline()).split():
        if words[0] == b"open":
            await visitors.open(int(words[1]))
        elif words[0] == b"new":
            visitors.begin_new(float(words[1]))
        elif words[0] == b"finish":
            await visitors.finish()
        print(json.dumps(visitors.state()), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
