"""Requests and answers, as `Server` and those who answer have them."""

import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

_ACCEPT = re.compile(rb"\naccept:[ \t]*([^\r]*)", re.IGNORECASE)


# What is asked for at the control socket, and at the metrics.
STATUS, CONNECTIONS, METRICS = "/v1/status", "/v1/connections", "/metrics"

# The control socket in a folder of systemd's, and those of workers beside it.
CONTROL, WORKER = "control.sock", "worker-{}.sock"

# Requests at once. Further clients wait in the backlog.
MOST = 16


class Request(NamedTuple):
    """A request. path: without the query. accept: the field of this name, empty if there is none.

    gone: whether the client has gone, and nobody needs the answer any more.
    """

    method: str
    path: str
    query: str
    accept: str
    gone: Callable[[], bool]

    @classmethod
    def of(cls, method: str, target: str, head: bytes, gone: Callable[[], bool]) -> "Request":
        """From its method, its target, and its whole head; what has come after that does not matter."""
        path, _, query = target.partition("?")
        accept = _ACCEPT.search(head, 0, head.index(b"\r\n\r\n"))
        return cls(method, path, query, accept[1].decode("latin-1") if accept else "", gone)


class Answer(NamedTuple):
    """An answer. parts: of its body; asked for one after another, so that an answer may be made over many turns."""

    status: int
    kind: str
    parts: Sequence[bytes] | AsyncIterator[bytes]

    @classmethod
    def error(cls, status: int, text: str) -> "Answer":
        """One that says in a line of text what is wrong."""
        return cls(status, "text/plain; charset=utf-8", (f"{text}\n".encode(errors="replace"),))

    def head(self, phrase: str) -> bytes:
        """Its first lines, with this reason phrase."""
        lines = (
            f"HTTP/1.1 {self.status} {phrase}",
            f"Content-Type: {self.kind}",
            *([] if isinstance(self.parts, AsyncIterator) else [f"Content-Length: {sum(map(len, self.parts))}"]),
            *(["Allow: GET, HEAD"] if self.status == 405 else []),
            "Cache-Control: no-store",
            "Connection: close",
            "\r\n",
        )
        return "\r\n".join(lines).encode()


def of_worker(path: str, number: str) -> str:
    """The control socket of a worker, beside that of rspd.service: `worker-N.sock`, or with that one's own name."""
    folder, name = os.path.split(path)
    prefix = "" if name == CONTROL else name.removesuffix(".sock") + "-"
    return os.path.join(folder, prefix + WORKER.format(number))
