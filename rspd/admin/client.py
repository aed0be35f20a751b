"""Asking a running rspd by its control socket: HTTP/1.1 over a unix socket, answered with JSON."""

from __future__ import annotations

import errno
import glob
import http.client
import json
import os
import socket
import struct
import time
from typing import Any

from rspd.admin.request import WORKER, of_worker

# Seconds for each step of a request. A process that is at work answers within milliseconds.
PATIENCE = 5.0

# Bytes of an answer that are read: 100,000 connections take a third. And bytes that are read at once.
MOST_BYTES, PIECE = 1 << 27, 1 << 16


class AnswerError(Exception):
    """Who listens at the socket gives no answer that can be used; the text says why."""


class _Connection(http.client.HTTPConnection):
    """An HTTP connection to a unix socket."""

    def __init__(self, path: str, timeout: float, ours: bool) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._ours = ours

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # With a timeout of Python's, connect(2) would fail at once where too many wait to be accepted.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self.timeout or PATIENCE))
            self.sock.connect(self._path)
            self.sock.settimeout(self.timeout)
            if self._ours and _user_of(self.sock) not in (0, os.geteuid()):
                raise PermissionError(errno.EPERM, "another user listens there")
        except BaseException:
            self.close()
            raise


def _user_of(sock: socket.socket) -> int:
    """The user of the process that listens at the other end (SO_PEERCRED, unix(7))."""
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])


def _timeval(seconds: float) -> bytes:
    """A time as setsockopt(2) takes it, where 0 is for ever."""
    micros = max(int(seconds * 1e6), 1)
    return struct.pack("ll", *divmod(micros, 1_000_000))


def ask(path: str, target: str, patience: float = PATIENCE, ours: bool = False) -> Any:
    """What the process at a control socket answers: JSON, as Python's values.

    target: `/v1/status`, or `/v1/connections?` and a query. patience: seconds for each step, and for the whole four
    times that. ours: whether only a process of this user is asked, or one of root's.
    Raises OSError if nobody can be asked there, or is too slow; AnswerError if the answer is none.
    """
    connection = _Connection(path, patience, ours)
    until = time.monotonic() + 4 * patience
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        content = bytearray()
        while part := answer.read(PIECE):
            content += part
            if len(content) > MOST_BYTES:
                raise AnswerError(f"expected at most {MOST_BYTES:,} bytes, found more")
            if time.monotonic() > until:
                raise TimeoutError("the answer takes too long")
        left = int(answer.getheader("Content-Length") or len(content)) - len(content)
        if left > 0:
            raise http.client.IncompleteRead(bytes(content), left)
        if answer.status != 200:
            raise AnswerError(content.decode(errors="replace").strip()[:500] or f"status {answer.status}")
        return json.loads(content)
    except http.client.HTTPException as error:
        raise AnswerError(f"expected an answer in HTTP, found {error or type(error).__name__}") from None
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"expected JSON, found {error}") from None
    finally:
        connection.close()


def sockets_of(path: str) -> list[str]:
    """The control sockets of a service: this one, and those of its workers, in the same folder."""
    if os.path.basename(path).startswith(WORKER.partition("{")[0]):
        return [path]
    return [path, *sorted(glob.glob(of_worker(glob.escape(path), "*")))]
