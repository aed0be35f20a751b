"""What the flows share: pipes for splice(2), the kernel's buffers between two sockets, and the time of a turn."""

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

# Bytes that all flows together may move in a turn of the loop: about 5 ms of work. Then the least and the most bytes
# that one flow may move in a turn; the least is a buffer full. The most is about 1 ms of work: with 1 MiB, a flow whose
# source had more needed more turns, and eight downloads cost a sixth more CPU time.
TURN = 1 << 24
LEAST, MOST = 1 << 16, 1 << 22

# When a flow has passed on so many bytes, its reader has shown that it reads. If the reader reads nothing, the flow can
# pass on what the buffers of two sockets hold: by default 4 MiB to send, and little to receive (tcp(7)).
PROVEN = 1 << 23

# One in so many pipes is for proven flows only.
RESERVED = 8

# Bytes per second below which a flow is slow: what moves so little costs little, spliced or copied.
SLOW = 10_000_000

# Seconds over which the pace is measured, and between two looks for somebody slow.
LOOK = 0.1

# Bytes that may be moved from pipes into memory, all together, so that other flows get these pipes.
IN_MEMORY_MAX = 1 << 24

# How often flows do without a new pipe after one was too small, or after no descriptor was free.
REFRAIN = 256


class Pace:
    """How fast a borrower passes bytes on. `slow`: what the last look found."""

    __slots__ = ("_since", "_total", "slow")

    def __init__(self, total: int, now: float) -> None:
        self._since = now
        self._total = total
        self.slow = False

    def look(self, total: int, now: float) -> None:
        """Judge by what was passed on since the last look, if that was a while ago."""
        seconds = now - self._since
        if seconds >= LOOK:
            self.slow = total - self._total < SLOW * seconds
            self._since, self._total = now, total


class Borrower(Protocol):
    """Who borrows a pipe: a flow."""

    @property
    def total(self) -> int:
        """How many bytes it has passed on so far."""

    def empty_into_memory(self, pace: Pace) -> int:
        """Move the bytes in the pipe into memory, since another flow gets the pipe. Returns how many bytes.

        pace: the one that was found slow.
        Raises OSError or MemoryError; then nothing has changed.
        """


class Pipe:
    """A pipe: `size` bytes of room; `held` of them are taken. Owns its two descriptors."""

    __slots__ = ("held", "read_fd", "size", "write_fd")

    def __init__(self, ends: tuple[int, int] | None = None, held: int = 0) -> None:
        """ends: of a pipe that exists, to be read and to be written, with so many bytes in it; ours from now on."""
        self.read_fd, self.write_fd = ends or os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held = held
        try:
            self.size = fcntl.fcntl(self.write_fd, F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            self.size = fcntl.fcntl(self.write_fd, F_GETPIPE_SZ)

    def take(self) -> bytes:
        """Take out all that it holds. Raises OSError or MemoryError; then nothing has changed."""
        data = os.read(self.read_fd, self.held) if self.held else b""  # all at once, pipe(7)
        self.held = 0
        return data

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
        self._lent: dict[Pipe, tuple[Borrower, Pace]] = {}  # the borrower of each, and its pace
        self.in_memory = 0  # bytes that were in pipes
        self._next_look = 0.0
        self._turn = 0
        self._flows = 0  # flows that have had an allowance in this turn
        self._expected = 0  # how many flows will have one: as many as in the turn before
        self._left = 0  # bytes of TURN

    def allowance(self, turn: int) -> int:
        """How many bytes a flow may move in this turn of the loop: its share, by the number of flows that ask.

        All flows together get TURN. When TURN is used up, each further flow gets LEAST.
        """
        if turn != self._turn:
            self._turn = turn
            self._expected, self._flows, self._left = self._flows, 0, TURN
        self._flows += 1
        share = min(TURN // max(self._flows, self._expected), MOST, self._left)
        if share < LEAST:
            share = LEAST
        self._left -= share
        return share

    def borrow(self, borrower: Borrower, now: float) -> Pipe | None:
        """An empty pipe, to be given back; None if there is none: the flow does without.

        The last pipes are for borrowers that have passed on PROVEN bytes. If all pipes are lent, such a borrower gets
        the pipe of a slow one.
        now: seconds, monotonic.
        """
        proven = borrower.total >= PROVEN
        pipe = None
        if proven or len(self._idle) + self.limit - self.made > self.limit // RESERVED:
            pipe = self._idle.pop() if self._idle else self._make()
        if not pipe and proven:
            pipe = self._take(now)
        if pipe:
            self._lent[pipe] = (borrower, Pace(borrower.total, now))
        return pipe

    def adopt(self, pipe: Pipe, borrower: Borrower, now: float) -> None:
        """A borrower of the process before has bytes in this pipe. It is one of ours from now on."""
        self.made += 1
        self._lent[pipe] = (borrower, Pace(borrower.total, now))

    def _make(self) -> Pipe | None:
        if self.made >= self.limit:
            return None
        if self._refrain:
            self._refrain -= 1
            return None
        try:
            pipe = Pipe()
            if pipe.size >= USEFUL_SIZE:
                self.made += 1
                return pipe
            pipe.close()
        except OSError:
            pass
        self._refrain = REFRAIN
        return None

    def _take(self, now: float) -> Pipe | None:
        """The pipe of a slow borrower, the one with the fewest bytes. These bytes are in memory then."""
        if now < self._next_look or self.made > self.limit:
            return None
        for borrower, pace in self._lent.values():
            pace.look(borrower.total, now)
        slow = (pipe for pipe, (_, pace) in self._lent.items() if pace.slow)
        pipe = min(slow, key=lambda pipe: pipe.held, default=None)
        if pipe and self.in_memory + pipe.held <= IN_MEMORY_MAX:
            borrower, pace = self._lent[pipe]
            try:
                self.in_memory += borrower.empty_into_memory(pace)
                return pipe
            except (OSError, MemoryError):
                pass
        self._next_look = now + LOOK
        return None

    def free_memory(self, size: int) -> None:
        """So many of the bytes that `empty_into_memory` kept are no longer in memory."""
        self.in_memory -= size

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
