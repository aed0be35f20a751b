"""What a client sends first, read before the backend is dialled: the PROXY header."""

from __future__ import annotations

import errno

from rspd.engine.loop import Loop
from rspd.engine.side import Side
from rspd.net.waiting import wait
from rspd.protocols.proxy_protocol import SIGNATURE, V1_MAX, V2_MAX, Header, HeaderError, NoHeaderError, parse


async def take_header(loop: Loop, client: Side, deadline: float) -> Header:
    """Take the PROXY header from the client's side, and leave there what follows it. The running task watches the side.

    `client.ready` says then what a relay has to know of the rest: more bytes, or the end, need no further event.
    deadline: in the loop's time.
    Raises HeaderError, also if the stream ends within the header (NoHeaderError: before it). Raises TimeoutError at the
    deadline, ConnectionAbortedError if the client aborted. By then, some or all of the header may have been taken.
    """
    data = b""
    while True:
        piece = client.peek((V2_MAX if data.startswith(SIGNATURE) else V1_MAX) - len(data))
        if piece:
            # As long as the header is not complete, all that has come belongs to it, and may be taken.
            found = parse(data + piece)
            piece = client.read(found[1] - len(data) if found else len(piece))
            data += piece or b""
            if found and len(data) == found[1]:
                return found[0]
        if piece:
            continue
        if client.aborted:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the client is gone")
        if piece is not None and not data:
            raise NoHeaderError("expected a PROXY protocol header, found the end of the stream")
        if piece is not None:
            raise HeaderError(f"expected a PROXY protocol header, found the end of the stream after {data[:16]!r}")
        await wait(loop, deadline, f"expected a PROXY protocol header in time, found {data[:16]!r}")
