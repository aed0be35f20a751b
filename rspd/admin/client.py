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
from contextlib import closing
from math import inf
from typing import Any, NoReturn

from rspd.admin.request import WORKER, of_worker

# Seconds for each step of a request. A process that is at work answers within milliseconds.
PATIENCE = 5.0

# The whole takes at most so many times that, however slowly an answer comes.
WHOLE = 4

# How often a process is asked if the connection ends before the answer begins. A process that restarts closes the
# connections of those that have not said yet what they want.
TRIES = 5

# Bytes of an answer that are read: 100,000 connections take a third. And bytes that are read at once.
MOST_BYTES, PIECE = 1 << 27, 1 << 16


class AnswerError(Exception):
    """Who listens at the socket gives no answer that can be used; the text says why.

    status: that of HTTP, if it says that it cannot answer; else 0.
    """

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


# What a `Question` raises that nobody answers, or not as rspd does.
UNANSWERED = OSError, http.client.HTTPException, AnswerError, ValueError, RecursionError


class _Socket(socket.socket):
    """A unix socket that is read until a time of the monotonic clock. heard: whether anything has come."""

    until = inf
    heard = False

    def recv_into(self, *into: Any) -> int:
        """Read what comes. Raises OSError, TimeoutError if it comes too late."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer takes too long")
        self.settimeout(min(left, self.gettimeout() or PATIENCE))
        count = super().recv_into(*into)
        self.heard |= count > 0
        return count


def _connect(path: str, patience: float, until: float, ours: bool) -> _Socket:
    """A socket connected to a path; see `ask`. Raises OSError."""
    sock = _Socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # With a timeout of Python's, connect(2) would fail at once where too many wait to be accepted.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(patience))
        sock.connect(path)
        sock.settimeout(patience)
        sock.until = until
        if ours and _user_of(sock) not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, "another user listens there")
    except BaseException:
        sock.close()
        raise
    return sock


def _user_of(sock: socket.socket) -> int:
    """The user of the process that listens at the other end (SO_PEERCRED, unix(7))."""
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])


def _timeval(seconds: float) -> bytes:
    """A time as setsockopt(2) takes it, where 0 is for ever."""
    micros = max(int(seconds * 1e6), 1)
    return struct.pack("ll", *divmod(micros, 1_000_000))


class Question:
    """A question to the process at a control socket. There is something to read once an answer begins."""

    def __init__(self, path: str, patience: float, until: float, ours: bool = False) -> None:
        """Connect; see `ask`. until: when all of it takes too long, by time.monotonic. Raises OSError."""
        self._sock = _connect(path, patience, until, ours)
        self._connection = http.client.HTTPConnection("localhost")
        self._connection.sock = self._sock

    @property
    def heard(self) -> bool:
        """Whether an answer has begun."""
        return self._sock.heard

    def fileno(self) -> int:
        """Its socket, before `answer`."""
        return self._sock.fileno()

    def put(self, target: str) -> None:
        """Ask for this. Raises one of UNANSWERED."""
        self._connection.request("GET", target)

    def answer(self, patience: float) -> Any:
        """The answer, as `ask` returns it. patience: seconds for each step. Raises one of UNANSWERED."""
        self._sock.settimeout(patience)
        with self._connection.getresponse() as answer:
            content = bytearray()
            while part := answer.read(PIECE):
                content += part
                if len(content) > MOST_BYTES:
                    raise AnswerError(f"expected at most {MOST_BYTES:,} bytes, found more")
            left = int(answer.getheader("Content-Length") or len(content)) - len(content)
            if left > 0:
                raise http.client.IncompleteRead(bytes(content), left)
            if answer.status != 200:
                text = content.decode(errors="replace").strip()[:500]
                raise AnswerError(text or f"status {answer.status}", answer.status)
        try:
            return json.loads(content, parse_constant=_no_number)
        except json.JSONDecodeError:
            if content[:1] == b"{" and content[-1:] != b"\n":  # rspd's JSON ends so
                raise ConnectionResetError("the answer broke off") from None
            raise

    def close(self) -> None:
        """Wait for no answer any more."""
        self._connection.close()
        self._sock.close()


def ask(path: str, target: str, patience: float = PATIENCE, ours: bool = False) -> Any:
    """What the process at a control socket answers: JSON, as Python's values.

    target: `/v1/status`, or `/v1/connections?` and a query. patience: seconds for each step, and for the whole WHOLE
    times that. ours: whether only a process of this user is asked, or one of root's.
    Raises OSError if nobody can be asked there, or is too slow; AnswerError if the answer is none.
    """
    until = time.monotonic() + WHOLE * patience
    try:
        for left in reversed(range(TRIES)):
            with closing(Question(path, patience, until, ours)) as question:
                try:
                    question.put(target)
                    return question.answer(patience)
                except (BrokenPipeError, ConnectionResetError):
                    if question.heard or not left:
                        raise
    except http.client.HTTPException as error:
        raise AnswerError(f"expected an answer in HTTP, found {str(error).strip() or type(error).__name__}") from None
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"expected JSON, found {error}") from None


def _no_number(word: str) -> NoReturn:
    """For NaN and Infinity, which Python's JSON has beyond the standard."""
    raise ValueError(word)


def sockets_of(path: str) -> list[str]:
    """The control sockets of a service: this one, and those of its workers, in the same folder. No strangers."""
    trusted = _trusted(path)
    return [path, *(one for one in _beside(path) if _owner(one) in trusted)]


def strangers_of(path: str) -> list[str]:
    """What looks like the socket of a worker, but another user has made it.

    Where everybody may write to the folder, anybody can put a socket there that lies. Believed are root, the user who
    asks, and the owners of the service's own socket and of its folder, who may do there what they like.
    """
    trusted = _trusted(path)
    return [one for one in _beside(path) if _owner(one) not in trusted]


def _beside(path: str) -> list[str]:
    if os.path.basename(path).startswith(WORKER.partition("{")[0]):
        return []
    return sorted(glob.glob(of_worker(glob.escape(path), "*")))


def _trusted(path: str) -> set[int]:
    """The users who are believed; and -1, see `_owner`."""
    return {-1, 0, os.geteuid(), _owner(path), _owner(os.path.dirname(path) or ".")}


def _owner(path: str) -> int:
    """Who has made it; -1 if nothing is there. The owner of a link is who has made the link."""
    try:
        return os.lstat(path).st_uid
    except OSError:
        return -1
