"""The first bytes of a client, from when they are awaited. They are only looked at: the backend is to get them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Sequence

from rspd.engine.loop import HUP, RDHUP
from rspd.engine.side import Side
from rspd.net.waiting import wait
from rspd.protocols import http, ssh, tls
from rspd.protocols.first import HEAD_MAX, LOOK_MAX, SILENT, UNKNOWN, HeadError, Protocol, Said

Reader = Callable[[bytes, int], Said | None]

# Bytes that are looked at first; nearly all clients say less.
USUAL = 4096

# In this order: what may begin an HTTP request may begin the preface of HTTP/2, and the line of SSH, too.
READERS: dict[Protocol, Reader] = {
    "http2": http.read_preface,
    "ssh": ssh.read,
    "tls": tls.read,
    "http": http.read,
}


class NothingSaidError(Exception):
    """The client has ended its stream before its first byte."""


class Head:
    """The first bytes of a client that had not said all of them when it came.

    deadline: in the loop's time.
    readers: as for `look`; None if what the client says does not matter any more. Whoever changes them wakes its task.
    crowded: set by who wants the client to be given up before the deadline; its task is to be woken then.
    """

    __slots__ = ("_awaited", "_seen", "crowded", "deadline", "readers")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.crowded = False
        self.readers: Sequence[Reader] | None = ()
        # Who sends byte by byte is not to cost more than who sends all at once, byte for byte.
        self._seen: tuple[Sequence[Reader], int] = (), 0  # by which readers so many bytes have been read
        self._awaited = 0  # so many bytes have to come before there is more to say

    async def hear(self, client: Side, looked: bool = False) -> Said:
        """Wait for them and read them. The running task watches the client's side.

        looked: whether `look` was called just now, and has found too little.
        Raises as `look`; HeadError also if they are incomplete at the deadline, and TimeoutError if the client is
        given up.
        """
        while self.readers is not None:
            if not looked and (said := self._look(client, self.readers)):
                return said
            looked = False
            if self.crowded:
                raise TimeoutError(errno.ETIMEDOUT, "others came, and this client had not said all for longest")
            try:
                await wait(client.loop, self.deadline)
            except TimeoutError:
                return _at_deadline(client, self.readers)
        return UNKNOWN

    def _look(self, client: Side, readers: Sequence[Reader]) -> Said | None:
        ended = client.ready & (RDHUP | HUP)
        data = client.peek(LOOK_MAX)
        known, seen = self._seen
        if known is not readers:
            seen = self._awaited = 0
        if data and len(data) < self._awaited and not ended:
            return None
        if data and (said := read(data, readers, seen)):
            return said
        _not_yet(client, data, ended, readers)
        if data:
            self._seen = readers, len(data)
            self._awaited = tls.awaited(data) if data[0] == tls.HANDSHAKE and tls.read in readers else 0
        return None


def _at_deadline(client: Side, readers: Sequence[Reader]) -> Said:
    data = client.peek(LOOK_MAX)
    if not data:
        return SILENT
    text = f"expected a whole head in time, found {len(data)} bytes: {data[:16]!r}"
    raise HeadError(begun(data, readers), text, late=True)


def look(client: Side, readers: Sequence[Reader]) -> Said | None:
    """What the client's first bytes say; None if too few have come. They stay to be read.

    readers: those that are asked, as `readers_of` returns them. Bytes of other protocols are UNKNOWN.
    Raises HeadError if they are not valid, or incomplete at their end; NothingSaidError, ConnectionAbortedError.
    """
    ended = client.ready & (RDHUP | HUP)
    data = client.peek(USUAL)
    if data and len(data) == USUAL:
        data = client.peek(LOOK_MAX)
    said = read(data, readers) if data else None
    if not said:
        _not_yet(client, data, ended, readers)
    return said


def _not_yet(client: Side, data: bytes | None, ended: int, readers: Sequence[Reader]) -> None:
    """Too few bytes have come. ended: whether no more will come. Raises as `look` if it makes no sense to wait."""
    if client.aborted:
        raise ConnectionAbortedError(errno.ECONNABORTED, "the client is gone")
    if data:
        if ended:
            text = f"expected a whole head, found the end of the stream after {len(data)} bytes: {data[:16]!r}"
            raise HeadError(begun(data, readers), text)
        if len(data) == LOOK_MAX:
            raise HeadError(begun(data, readers), f"expected a head of at most {HEAD_MAX} bytes, found more")
    elif data is not None:
        raise NothingSaidError


def readers_of(protocols: Collection[str]) -> tuple[Reader, ...]:
    """The readers of these protocols."""
    return tuple(reader for protocol, reader in READERS.items() if protocol in protocols)


def read(data: bytes, readers: Sequence[Reader], seen: int = 0) -> Said | None:
    """What the first bytes say; as for a reader."""
    for reader in readers:
        said = reader(data, seen)
        if said is not UNKNOWN:
            return said
    return UNKNOWN


def begun(data: bytes, readers: Sequence[Reader]) -> Protocol:
    """The protocol of which a head has begun, which is not whole."""
    for protocol, reader in READERS.items():
        if reader in readers and reader(data, 0) is not UNKNOWN:
            return protocol
    return "unknown"
