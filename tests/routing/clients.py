"""Clients on a loop, and what they say first."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Collection
from math import inf

import pytest

from rspd.engine.loop import Loop
from rspd.engine.side import Side
from rspd.protocols.first import Protocol, Said
from rspd.protocols.http import PREFACE
from rspd.routing.heads import READERS, Head, readers_of
from tests.dialled import until
from tests.support import PATIENCE, tcp_pair

Pair = Callable[[], tuple[socket.socket, socket.socket]]

ALL = frozenset(READERS)


def hello(name: str = "a.org", size: int = 0) -> bytes:
    """A ClientHello in one record; size: of the whole message, filled up by padding."""
    raw = name.encode()
    listed = struct.pack("!BH", 0, len(raw)) + raw
    extensions = struct.pack("!HHH", 0, len(listed) + 2, len(listed)) + listed
    begin = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    if size:
        padding = size - 4 - len(begin) - 2 - len(extensions) - 4
        extensions += struct.pack("!HH", 21, padding) + bytes(padding)
    body = begin + struct.pack("!H", len(extensions)) + extensions
    message = b"\1" + len(body).to_bytes(3, "big") + body
    return records(message, len(message))


def records(message: bytes, size: int) -> bytes:
    """A handshake message in records of so many bytes."""
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\3\1" + struct.pack("!H", len(part)) + part for part in parts)


REQUEST = b"GET /x HTTP/1.1\r\nHost: a.org\r\n\r\n"
TLS, HTTP = Said("tls", "a.org"), Said("http", "a.org", (), "/x", "GET")
WHOLE: dict[Protocol, tuple[bytes, Said]] = {
    "tls": (hello(), TLS),
    "http": (REQUEST, HTTP),
    "http2": (PREFACE, Said("http2")),
    "ssh": (b"SSH-2.0-OpenSSH_9.6\r\n", Said("ssh")),
}


def unix_pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.settimeout(PATIENCE)
    return near, far


class CountingSide(Side):
    """Counts how often somebody looks at it."""

    __slots__ = ("looks",)

    def peek(self, size: int) -> bytes | None:
        self.looks = getattr(self, "looks", 0) + 1
        return super().peek(size)


class Listener:
    """A client, and a task that hears what it says first; `outcome` is what came of it."""

    def __init__(self, loop: Loop, pair: Pair = tcp_pair, protocols: Collection[str] = ALL) -> None:
        self.loop = loop
        self.peer, far = pair()
        own = socket.SocketType(far.family, far.type, 0, far.detach())
        own.setblocking(False)
        self.side = CountingSide(loop, own)
        self.protocols = protocols
        self.head = Head(inf)
        self.outcome: Said | Exception | None = None

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.side.close()
        self.peer.close()

    def start(self, deadline: float = inf) -> None:
        async def hear() -> None:
            self.side.watch()
            try:
                self.outcome = await self.head.hear(self.side)
            except Exception as error:
                self.outcome = error

        self.head.deadline = deadline
        self.head.readers = readers_of(self.protocols)
        self.task = self.loop.spawn(hear())

    async def result(self) -> Said | Exception:
        return await until(self.loop, lambda: self.outcome)

    async def arrived(self, size: int) -> None:
        """Wait until so many bytes wait to be read."""
        await until(self.loop, lambda: len(self.waiting(size)) == size)

    def waiting(self, size: int) -> bytes:
        """What waits to be read."""
        try:
            return self.side.sock.recv(size, socket.MSG_PEEK)
        except BlockingIOError:
            return b""


pairs = pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
wholes = pytest.mark.parametrize("protocol", WHOLE)
