"""Pipes for splice(2): the kernel's buffers between two sockets, shared by the flows that need one now."""

from __future__ import annotations

import fcntl
import os
from typing import Protocol

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

# Bytes of pipes that may be in memory instead, all together: so that flows which move get the pipes of others.
IN_MEMORY_MAX = 1 << 24

# Bytes per second below which a borrower is slow: where nothing moves fast, a pipe saves little.
SLOW = 10_000_000

# Bytes that a flow has passed on before others are asked for their pipes: as much as its reader would not have let
# through without reading, by the kernel's usual buffers (tcp(7)).
PROVEN = 1 << 24

# Seconds over which slowness is measured, and between two looks for somebody slow.
LOOK = 0.1

# How often to do without before asking for a pipe again, after one was too small or there was no descriptor.
REFRAIN = 256


class Borrower(Protocol):
    """Who borrows a pipe: a flow."""

    @property
    def total(self) -> int:
        """How many bytes it has passed on so far."""

    def empty_into_memory(self) -> None:
        """Keep what is in the pipe elsewhere: it goes to somebody else."""


class Pipe:
    """A pipe: `size` bytes of room; `held` of them are taken. Owns its two descriptors."""

    __slots__ = ("borrower", "held", "read_fd", "since", "size", "slow", "total", "write_fd")

    # While it is lent: to whom; when its borrower's pace was last looked at, its `total` then, and what was found.
    borrower: Borrower
    since: float
    total: int
    slow: bool

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
        self._lent: dict[Pipe, None] = {}
        self._in_memory = 0
        self._next_look = 0.0
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

    def borrow(self, borrower: Borrower, now: float) -> Pipe | None:
        """An empty pipe, to be given back; None where there is none to be had: do without.

        Where all are lent, one is taken from a borrower that hardly moves.
        now: seconds, monotonic.
        """
        pipe = self._idle.pop() if self._idle else self._make() or self._take(borrower, now)
        if pipe:
            pipe.borrower, pipe.since, pipe.total, pipe.slow = borrower, now, borrower.total, False
            self._lent[pipe] = None
        return pipe

    def _make(self) -> Pipe | None:
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

    def _take(self, borrower: Borrower, now: float) -> Pipe | None:
        """A pipe of somebody slow, whose bytes are in memory then: the one with the fewest."""
        if borrower.total < PROVEN or now < self._next_look:
            return None
        pipe = min(filter(lambda lent: _is_slow(lent, now), list(self._lent)), key=lambda lent: lent.held, default=None)
        if pipe is None or self._in_memory + pipe.held > IN_MEMORY_MAX:
            self._next_look = now + LOOK
            return None
        self._in_memory += pipe.held
        pipe.borrower.empty_into_memory()
        return pipe

    def memory_is_free(self, size: int) -> None:
        """So many bytes that `empty_into_memory` had to keep have been passed on, or given up."""
        self._in_memory -= size

    def give_back(self, pipe: Pipe) -> None:
        """Take a pipe back. One with bytes in it is closed: they must not reach another flow."""
        del self._lent[pipe]
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


def _is_slow(pipe: Pipe, now: float) -> bool:
    """Whether a pipe's borrower hardly moves, by the last look at it, which is now if that was a while ago."""
    seconds = now - pipe.since
    if seconds >= LOOK:
        pipe.slow = pipe.borrower.total - pipe.total < SLOW * seconds
        pipe.since, pipe.total = now, pipe.borrower.total
    return pipe.slow
