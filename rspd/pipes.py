"""Pipes for splice(2): the kernel's buffers between two sockets, shared by the flows that need one now."""

from __future__ import annotations

import fcntl
import os

# Bytes per pipe. Measured per GB: 256 KiB cost a third more CPU time than 1 MiB, larger ones gained nothing.
PIPE_SIZE = 1 << 20

# A pipe smaller than this relays no better than a copy through a buffer. The kernel gives 8 KiB pipes to an
# unprivileged user who has used up fs.pipe-user-pages-soft, with 64 pipes of 1 MiB at its default (pipe(7)).
USEFUL_SIZE = 1 << 16

PIPES_MAX = 64

# Bytes that all flows together may move in a turn of the loop, about 5 ms of work; and what one of them may at least,
# a buffer full, and at most.
TURN = 1 << 24
LEAST, MOST = 1 << 16, 1 << 20

# How often to do without before asking for a pipe again, after one was too small or there was no descriptor.
REFRAIN = 256


class Pipe:
    """A pipe: `size` bytes of room; `held` of them are taken. Owns its two descriptors."""

    __slots__ = ("held", "read_fd", "size", "write_fd")

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held = 0
        try:
            self.size = fcntl.fcntl(self.write_fd, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            self.size = fcntl.fcntl(self.write_fd, F_GETPIPE_SZ)

    def close(self) -> None:
        """Give back its descriptors; bytes in it are lost."""
        os.close(self.read_fd)
        os.close(self.write_fd)


# fcntl(2); the module names them from Python 3.10 on, except where it was built on an old system.
F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)
F_GETPIPE_SZ = getattr(fcntl, "F_GETPIPE_SZ", 1032)


class Pipes:
    """Up to `limit` pipes, made when first needed, empty while they are here.

    A flow holds one only while there are bytes in it, so few pipes serve many flows.
    """

    def __init__(self, limit: int = PIPES_MAX) -> None:
        self.limit = limit
        self.made = 0
        self._refrain = 0
        self._idle: list[Pipe] = []
        self._turn: object = None
        self._flows = self._flows_before = 0  # that have had an allowance in this turn, in the one before

    def allowance(self, turn: object) -> int:
        """How many bytes a flow may move in this turn of the loop: less, the more flows there are that have many.

        turn: what is another object in another turn.
        """
        if turn is not self._turn:
            self._turn = turn
            self._flows_before, self._flows = self._flows, 0
        self._flows += 1
        share = TURN // max(self._flows, self._flows_before)
        return MOST if share > MOST else max(share, LEAST)

    def borrow(self) -> Pipe | None:
        """An empty pipe, to be given back; None where there is none to be had: do without."""
        if self._idle:
            return self._idle.pop()
        if self.made >= self.limit:
            return None
        if self._refrain:
            self._refrain -= 1
            return None
        try:
            pipe = Pipe()
        except OSError:
            self._refrain = REFRAIN
            return None
        if pipe.size < USEFUL_SIZE:
            pipe.close()
            self._refrain = REFRAIN
            return None
        self.made += 1
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        """Take a pipe back. One with bytes in it is closed: they must not reach another flow."""
        if pipe.held or self.made > self.limit:
            pipe.close()
            self.made -= 1
        else:
            self._idle.append(pipe)

    def resize(self, limit: int) -> None:
        """Change how many there may be; those in use beyond it are closed when they come back."""
        self.close()
        self.limit = limit

    def close(self) -> None:
        """Close the pipes that are not in use, to free their descriptors."""
        for pipe in self._idle:
            pipe.close()
        self.made -= len(self._idle)
        self._idle.clear()
