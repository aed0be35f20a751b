"""What a client is told that gets no backend, in its own protocol, and how the connection ends then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import inf

from rspd.engine.cause import Cause
from rspd.engine.loop import news
from rspd.engine.side import Handed, Side
from rspd.protocols import tls
from rspd.protocols.first import Protocol
from rspd.settings import ErrorPage

# The status of an HTTP answer for each cause. 502 for the others: the way to the backend is at fault.
STATUSES: dict[Cause, int] = {
    "bad-head": 400,
    "no-route": 404,
    "first-bytes-timeout": 408,
    "backend-down": 503,
    "queue-timeout": 503,
    "connect-timeout": 504,
}

# RFC 9110, 15.
PHRASES = {
    400: "Bad Request",
    404: "Not Found",
    408: "Request Timeout",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}

EXPLANATIONS = {
    400: "The request cannot be understood.",
    404: "There is no such site here.",
    408: "The request did not come in time.",
    502: "The server of this site cannot be reached.",
    503: "The server of this site is down or busy. Try again in a moment.",
    504: "The server of this site does not answer.",
}

# Seconds after which a client is asked to try again (RFC 9110, 10.2.3).
RETRY_AFTER = 5

# What is still read of a client that has its answer: so many bytes, for so many seconds. To close with unread bytes
# would send RST, which destroys an answer that is on its way (RFC 9112, 9.6).
READ_MAX = 1 << 16
PATIENCE = 2.0

# Seconds for which an answer may be on its way to a client that reads slowly.
SAYING = 10.0

ALERTS: dict[Cause, int] = {"bad-head": tls.DECODE_ERROR, "no-route": tls.UNRECOGNIZED_NAME}


def answer(protocol: Protocol, method: str, cause: Cause, pages: Sequence[ErrorPage]) -> bytes:
    """What a client is told, by the cause of its end; empty if nothing can be said in its protocol.

    method: of the HTTP request; empty if it is not known.
    """
    if protocol == "tls":
        return tls.alert(ALERTS.get(cause, tls.INTERNAL_ERROR))
    return _page(STATUSES.get(cause, 502), method, pages) if protocol == "http" else b""


def _page(status: int, method: str, pages: Sequence[ErrorPage]) -> bytes:
    title = f"{status} {PHRASES[status]}"
    body = f"<!doctype html>\n<title>{title}</title>\n<h1>{title}</h1>\n<p>{EXPLANATIONS[status]}</p>\n".encode()
    body = next((page.content for page in pages if page.status == status), body)
    lines = (
        f"HTTP/1.1 {title}",
        time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime()),
        "Content-Type: text/html; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        *([f"Retry-After: {RETRY_AFTER}"] if status == 503 else []),
        "Connection: close",
        "\r\n",
    )
    return "\r\n".join(lines).encode() + (b"" if method == "HEAD" else body)


class Farewell:
    """An answer on its way to the client, which is closed then.

    cause, reason: why the connection ends.
    """

    __slots__ = ("_deadline", "_left", "_read", "cause", "reason")

    def __init__(self, said: bytes, cause: Cause, reason: str) -> None:
        self._left = said
        self._read = 0
        self._deadline = inf  # once it has begun
        self.cause: Cause = cause
        self.reason = reason

    async def say(self, client: Side) -> None:
        """Write it, end the stream, and read what still comes, up to a bound. The caller closes the side."""
        loop = client.loop
        if not loop.watches(client):
            try:
                client.watch()
            except OSError:
                return  # for want of watches
        self._deadline = min(self._deadline, loop.now + (SAYING if self._left else PATIENCE))
        loop.current.wake_at(self._deadline)
        while self._read < READ_MAX and loop.now < self._deadline and not client.aborted:
            if self._left:
                self._left = self._left[client.write(self._left) :]
            if not (self._left or client.ended):
                client.end()
                self._deadline = loop.now + PATIENCE
                loop.current.wake_at(self._deadline)
            data = client.read(READ_MAX - self._read)
            if data:
                self._read += len(data)
            elif data is not None and client.ended:
                return  # both streams have ended
            else:
                await news()

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process."""
        known = {"left": self._left, "read": self._read, "cause": self.cause, "reason": self.reason}
        return known if self._deadline == inf else {**known, "deadline": self._deadline}


def resume(handed: Handed) -> Farewell:
    """The answer that was handed over by the process before."""
    farewell = Farewell(handed.get("left", b""), handed.get("cause", "error"), handed.get("reason", ""))
    farewell._read = handed.get("read", 0)
    farewell._deadline = handed.get("deadline", inf)
    return farewell
