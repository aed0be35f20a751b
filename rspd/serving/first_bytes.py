"""What a client sends first, read before the backend is dialled: the PROXY header."""

from __future__ import annotations

import errno

from rspd.engine.loop import Loop
from rspd.engine.side import Handed, Side
from rspd.net.waiting import wait
from rspd.protocols.proxy_protocol import SIGNATURE, V1_MAX, V2_MAX, Header, HeaderError, NoHeaderError, parse


class Awaited:
    """The PROXY header of a client, from when it is awaited.

    deadline: in the loop's time. taken: what has come of it, until it is whole. whole: whether it is.
    """

    def __init__(self, deadline: float, taken: bytes = b"") -> None:
        self.deadline = deadline
        self.taken = taken
        self.whole = False

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process."""
        return {"deadline": self.deadline, "taken": self.taken, "whole": self.whole}

    async def take(self, loop: Loop, client: Side) -> Header:
        """Take it from the client's side, and leave there what follows it. The running task watches the side.

        `client.ready` says then what a relay has to know of the rest: more bytes, or the end, need no further event.
        Raises HeaderError, also if the stream ends within the header (NoHeaderError: before it). Raises TimeoutError at
        the deadline, ConnectionAbortedError if the client aborted. By then, some or all of it may have been taken.
        """
        while True:
            data = self.taken
            piece = client.peek((V2_MAX if data.startswith(SIGNATURE) else V1_MAX) - len(data))
            if piece:
                # As long as the header is not complete, all that has come belongs to it, and may be taken.
                found = parse(data + piece)
                piece = client.read(found[1] - len(data) if found else len(piece))
                self.taken = data = data + (piece or b"")
                if found and len(data) == found[1]:
                    self.taken, self.whole = b"", True
                    return found[0]
            if piece:
                continue
            if client.aborted:
                raise ConnectionAbortedError(errno.ECONNABORTED, "the client is gone")
            if piece is not None and not data:
                raise NoHeaderError("expected a PROXY protocol header, found the end of the stream")
            if piece is not None:
                raise HeaderError(f"expected a PROXY protocol header, found the end of the stream after {data[:16]!r}")
            await wait(loop, self.deadline, f"expected a PROXY protocol header in time, found {data[:16]!r}")


def resume(handed: Handed) -> Awaited:
    """The header that was handed over by the process before."""
    awaited = Awaited(handed.get("deadline", 0.0), handed.get("taken", b""))
    awaited.whole = bool(handed.get("whole"))
    return awaited
