"""One side of a connection: the client's socket, or the backend's.

This is all that a relay asks of a socket. Calls never block; BlockingIOError is turned into readiness here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Mapping
from typing import Any

from rspd.engine.loop import EDGE, ERR, HUP, IN, OUT, PRI, RDHUP, Loop, Watch
from rspd.engine.pipes import Pipe

# Not `OUT`: a new socket has room. It is added at the first write that does not fit.
EVENTS = IN | PRI | RDHUP | EDGE

# If an event has none of these, a read that gets less than it asked for has emptied the socket. An end of the stream
# or an error is still to be read. Urgent data (tcp(7)) cuts a read short though more bytes follow.
MORE_TO_READ = PRI | RDHUP | HUP | ERR

SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

# close(2) of a TCP socket that lingers for 0 seconds sends RST and drops what was not sent (socket(7)).
LINGER_0, NO_LINGER = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)

# The kernel had no memory for this one call (send(2)); the connection has not changed.
NO_MEMORY = frozenset({errno.ENOBUFS, errno.ENOMEM})

# Bytes that a side throws away at once.
DISCARDED = 1 << 16

# Seconds after which to make such a call again: no event tells when there is memory.
RETRY = 0.01

# What the next process has to know: plain values and bytes; descriptors by their numbers here. A reader takes a default
# for what is missing, and ignores what it does not know: another version may have written it.
Handed = Mapping[str, Any]

# tcpi_state in struct tcp_info, linux/tcp.h: both ends have ended, or one has aborted.
TCP_CLOSE = b"\7"


class Side(Watch):
    """A connected, non-blocking stream socket, and what epoll says of it. Owns the socket.

    can_splice: whether splice_into and splice_from are to be tried.
    ended: whether `end` was called.
    """

    __slots__ = ("ended", "events", "loop", "sock")

    can_splice = True

    more_to_read = MORE_TO_READ

    def __init__(self, loop: Loop, sock: socket.SocketType) -> None:
        self.fd = sock.fileno()
        self.ready = OUT
        self.loop = loop
        self.sock = sock
        self.events = EVENTS  # the events that resume the task
        self.ended = False

    def expect_connection(self) -> None:
        """To be called before `watch` if the socket is not connected yet. `OUT` in `ready` will mean that it is."""
        self.ready = 0
        self.events |= OUT

    def watch(self) -> None:
        """Let the running task be resumed by this side. Raises OSError, for want of memory or watches."""
        self.loop.watch(self, self.events)

    def ignore(self, events: int) -> None:
        """Stop resuming the task by these events, since they would tell it nothing."""
        self.events &= ~events
        self.loop.rewatch(self, self.events)

    def heed(self, events: int) -> None:
        """Resume the task by these events too. What has happened meanwhile is told then."""
        self.events |= events
        self.loop.rewatch(self, self.events)

    @property
    def aborted(self) -> bool:
        """Whether the connection to this peer broke: it sent RST, or cannot be reached any more.

        `ERR` stays in `ready` from then on, whether epoll or a failed call told first.
        """
        return bool(self.ready & ERR)

    def read_into(self, buffer: memoryview) -> int | None:
        """Read what there is: the number of bytes, 0 when nothing more comes, None for not now."""
        try:
            count = self.sock.recv_into(buffer)
        except BlockingIOError:
            self.ready &= ~IN
            return None
        except OSError as error:
            return 0 if self.note_failure(error) else None
        if not count or (count < len(buffer) and not self.ready & self.more_to_read):
            self.ready &= ~IN
        return count

    def peek(self, size: int) -> bytes | None:
        """What there is, which stays to be read: `size` bytes at most, none when nothing more comes, None for not now.

        `IN` is in `ready` after bytes or an end, whether epoll has told of them or not.
        """
        return self._receive(size, socket.MSG_PEEK)

    def read(self, size: int) -> bytes | None:
        """Read what there is: `size` bytes at most, none when nothing more comes, None for not now."""
        data = self._receive(size, 0)
        if data is not None and (not data or (len(data) < size and not self.ready & self.more_to_read)):
            self.ready &= ~IN
        return data

    def _receive(self, size: int, flags: int) -> bytes | None:
        try:
            data = self.sock.recv(size, flags)
        except BlockingIOError:
            self.ready &= ~IN
            return None
        except OSError as error:
            return b"" if self.note_failure(error) else None
        self.ready |= IN
        return data

    def write(self, data: memoryview | bytes) -> int:
        """Write as much as fits: the number of bytes, 0 also where the connection broke."""
        try:
            count = self.sock.send(data)
        except BlockingIOError:
            count = 0
        except OSError as error:
            self.note_failure(error)
            return 0
        if count < len(data):
            self._note_full()
        return count

    def splice_into(self, pipe: Pipe, size: int) -> int | None:
        """Fill an empty pipe with `size` bytes at most: the number of bytes, 0 where the connection broke.

        None for not now. Below 0 where only a read can tell: at the end of the stream, and at urgent data.
        Raises OSError if the kernel refuses to splice from this kind of socket.
        """
        # A pipe with bytes in it may have no free slot: many small segments use up the slots long before the bytes.
        # EAGAIN would not tell such a pipe from an empty socket.
        try:
            pipe.held = os.splice(self.fd, pipe.write_fd, min(pipe.size, size), flags=SPLICE)
        except BlockingIOError:
            if self.ready & PRI:
                return -1
            self.ready &= ~IN
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise
            return 0 if self.note_failure(error) else None
        return pipe.held or -1

    def splice_from(self, pipe: Pipe) -> int:
        """Write what the pipe holds: the number of bytes, 0 also where the connection broke.

        Raises OSError if the kernel refuses to splice to this kind of socket.
        """
        try:
            count = os.splice(pipe.read_fd, self.fd, pipe.held, flags=SPLICE)
        except BlockingIOError:
            self._note_full()
            return 0
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise
            self.note_failure(error)
            return 0
        pipe.held -= count
        return count

    def _note_full(self) -> None:
        """The socket takes no more for now. Epoll will tell when there is room."""
        self.ready &= ~OUT
        if not self.events & OUT:
            self.heed(OUT)

    def note_failure(self, error: OSError) -> bool:
        """Note that a call failed. Returns True if the connection broke, False if there was no memory for the call.

        If there was no memory, `ready` does not change, and the task is woken a moment later, to try again.
        """
        if error.errno in NO_MEMORY:
            self.loop.wake_later(self.task, RETRY)
            return False
        self.ready |= ERR
        return True

    def end(self) -> None:
        """Tell the peer that nothing more comes; it may go on sending."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.ready |= ERR
        else:
            self.ended = True

    def unsent(self) -> int:
        """How many bytes in the kernel the peer has not acknowledged; an end counts as one (SIOCOUTQ, tcp(7))."""
        answer = fcntl.ioctl(self.fd, termios.TIOCOUTQ, b"\0\0\0\0")
        return int(struct.unpack("i", answer)[0])

    def at_risk(self) -> int:
        """How many bytes an abort now would destroy: those unsent; 0 where the kernel does not say."""
        try:
            return self.unsent()
        except OSError:
            return 0

    def unread(self) -> int:
        """How many bytes of the peer wait in the kernel, or more if they cannot be counted (FIONREAD, tcp(7)).

        `IN`, and `PRI` for urgent data, are in `ready` then: epoll may have yet to tell.
        """
        self.ready |= IN
        urgent = select.poll()
        urgent.register(self.fd, PRI)  # `ready` may not tell: while a flow holds back, PRI is ignored
        if urgent.poll(0):
            self.ready |= PRI
            # The kernel counts up to the urgent byte only. It has no more than the size of its buffer.
            return self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        return int(struct.unpack("i", fcntl.ioctl(self.fd, termios.FIONREAD, b"\0\0\0\0"))[0])

    def discard(self) -> None:
        """Take nothing more from the peer, which has been told the end; the close comes next.

        Here, there is nothing to do: a TCP peer gets FIN first, and then RST for what nobody has read.
        """

    def hand_over(self) -> Handed:
        """What `resume` makes this side from, in the next process; its socket goes there too."""
        handed: dict[str, Any] = {"fd": self.fd, "family": int(self.sock.family)}
        if self.ended or self.aborted:
            handed.update(ended=self.ended, aborted=self.aborted)
        return handed

    def reset_if_nobody_takes(self) -> None:
        """Have the kernel send RST if the next process does not take the socket. Raises OSError."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)

    def _has_aborted(self) -> bool:
        """Whether the connection broke, though no error is left to read: then the kernel reports an end only."""
        try:
            return not self.ended and self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == TCP_CLOSE
        except OSError:
            return False  # a program in the kernel may refuse it (bpf(2))

    def keep_alive(self) -> None:
        """Have the kernel ask a silent peer whether it is still there, and abort when it is not (tcp(7))."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def close(self) -> None:
        """Close the socket; the kernel goes on sending what was written to it, then FIN."""
        self.loop.forget(self)
        self.sock.close()

    def abort(self) -> None:
        """Close the socket so that the peer gets RST, at once."""
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        except OSError:
            pass  # a program in the kernel may refuse it (bpf(2)): the peer gets FIN, which is better than to stay open
        self.close()


class UnixSide(Side):
    """A side with a unix socket. A unix socket has no RST: `abort` only closes it."""

    __slots__ = ()

    # A passed descriptor cuts a read short too, and no event tells of it (unix(7)): so the socket is read to EAGAIN.
    more_to_read = MORE_TO_READ | IN

    def at_risk(self) -> int:
        """How many bytes an abort now would destroy: none, the peer has them."""
        return 0

    def discard(self) -> None:
        """Take nothing more from the peer. If bytes were left, the peer would read ECONNRESET before its end."""
        self.sock.shutdown(socket.SHUT_RD)
        while self.read(DISCARDED):
            pass


def resume(loop: Loop, handed: Handed, descriptors: dict[int, int]) -> Side:
    """The side that was handed over by the process before. It takes its own descriptor, by its number there."""
    family = handed.get("family", socket.AF_INET)
    sock = socket.SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0, descriptors.pop(handed["fd"]))
    side = UnixSide(loop, sock) if family == socket.AF_UNIX else Side(loop, sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)  # undo it
    side.ended = bool(handed.get("ended"))
    if handed.get("aborted") or (family != socket.AF_UNIX and side._has_aborted()):
        side.ready |= ERR
    return side
