"""One direction of a connection: bytes from one side to the other, copied or spliced."""

from __future__ import annotations

from typing import Any

from rspd.engine.loop import IN, OUT, PRI
from rspd.engine.pipes import Pace, Pipe, Pipes
from rspd.engine.side import Handed, Side

# One buffer serves all copying: nothing stays in it between two calls.
BUFFER_SIZE = 1 << 16
BUFFER = memoryview(bytearray(BUFFER_SIZE))

# From so many bytes in a call of `pump`, a pipe is cheaper than to copy. Bulk data may come a packet at a time, so that
# no read fills the buffer. A packet has 65,483 bytes at most on loopback, 65,160 from a network card that merges them
# (GRO), and 62,636 with jumbo frames. At 40 KB at a time, splicing gains nothing.
BULK = 48 << 10


class Flow:
    """Bytes from `source` to `target`. Borrows the sides, and a pipe while one holds bytes of it.

    Small reads are copied through one shared buffer; what the target does not take is kept in `held`, at most a
    buffer full. After a read that fills the buffer, or a call of `pump` that moves BULK bytes, the flow uses splice(2).
    It copies again after a call that moves less.
    """

    __slots__ = (
        "_bulk",
        "_can_splice",
        "_from_pipe",
        "_held_back",
        "_pace",
        "_pipe",
        "_pipes",
        "eof",
        "finished",
        "held",
        "moved_at",
        "source",
        "target",
        "total",
        "waiting",
    )

    def __init__(self, source: Side, target: Side, pipes: Pipes) -> None:
        self.source = source
        self.target = target
        self.total = 0  # bytes the target has taken
        self.moved_at = 0.0  # the loop's time when the target last took bytes, or was found full
        self.eof = False  # nothing more comes from the source
        self.waiting = False  # the target has yet to take something that was read
        self.finished = False  # nothing more comes, and nothing is waiting
        self.held: memoryview | bytes = b""  # what is waiting, unless it is in a pipe
        self._pipes = pipes
        self._pipe: Pipe | None = None
        self._bulk = False
        self._can_splice = source.can_splice and target.can_splice
        self._held_back = False
        self._pace: Pace | None = None  # set when another flow gets the pipe, until the reader reads again
        self._from_pipe = 0  # bytes that were in a pipe, as long as any of them are in `held`

    def pump(self) -> bool:
        """Move bytes until the source is dry or the target full. Returns True if it stops before: its turn is over.

        To be called when the source has something to read, or the flow is `waiting`.
        """
        source, target = self.source, self.target
        if not target.ready & OUT:
            return False
        if not (self.waiting or self._bulk):
            # Most often there is one small message, and nothing before it; the steps below would take twice as long.
            size = source.read_into(BUFFER)
            if not size:
                self.eof |= size == 0
                self.finished = self.eof
                return False
            count = target.write(BUFFER[:size])
            self.total += count
            self.moved_at = source.loop.now
            if count == size < BULK and not source.ready & IN:
                return False
            begin = self.total - count
            more = self._keep(count, size)
        else:
            begin = self.total
            more = True
        end = self.total + self._pipes.allowance(source.loop.turn)
        while more and self.total < end:
            # What was read before comes first: a pipe must not overtake it.
            if self.held:
                more = self._write_held()
            elif pipe := self._pipe or (self._bulk and source.ready & IN and not self.eof and self._borrow()):
                more = self._empty(pipe) if pipe.held else self._fill(pipe, end - self.total)
            else:
                more = self._copy()
        self._settle(self.total - begin)
        return more

    @property
    def held_back(self) -> int:
        """How many bytes of the source have been read, but not taken by the target."""
        return len(self.held) + (self._pipe.held if self._pipe else 0)

    def drop(self) -> None:
        """Give up what has been read and not passed on."""
        self._keep_rest(b"")
        self._give_back()

    def waste(self) -> int | None:
        """Read from the source what comes too late, and throw it away; returns what `Side.read_into` does.

        To be called after `drop`, in place of `pump`.
        """
        if self._held_back:
            self._hold_back(False)
        return self.source.read_into(BUFFER)

    @property
    def pipe_descriptors(self) -> list[int]:
        """Those of its pipe, while it has one."""
        return [self._pipe.read_fd, self._pipe.write_fd] if self._pipe else []

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process. What is held goes there too: bytes, or a pipe with them."""
        handed: dict[str, Any] = {"total": self.total, "moved_at": self.moved_at} if self.total else {}
        if self.eof:
            handed["eof"] = True
        if self.held:
            handed.update(held=self.held, from_pipe=self._from_pipe)
        if pipe := self._pipe:
            handed["pipe"] = pipe.read_fd, pipe.write_fd, pipe.held
        return handed

    def resume(self, handed: Handed, descriptors: dict[int, int]) -> None:
        """Go on where a flow of the process before was when it handed it over. Nothing has been moved yet.

        descriptors: by their numbers in that process. It takes those of its pipe.
        """
        self.total = handed.get("total", 0)
        self.moved_at = handed.get("moved_at", 0.0)
        self.eof = handed.get("eof", False)
        self.held = handed.get("held") or b""
        if pipe := handed.get("pipe"):
            self._pipe = Pipe((descriptors.pop(pipe[0]), descriptors.pop(pipe[1])), pipe[2])
            self._pipes.adopt(self._pipe, self, self.source.loop.now)
        self._from_pipe = handed.get("from_pipe", 0)
        self._pipes.in_memory += self._from_pipe
        self.waiting = bool(self.held or self._pipe)
        self.finished = self.eof and not self.waiting

    def empty_into_memory(self, pace: Pace) -> int:
        """Move the pipe's bytes to `held`; return how many. Another flow gets the pipe; this one copies while slow.

        Raises OSError or MemoryError; then nothing has changed.
        """
        assert self._pipe
        self.held = self._pipe.take()
        self._pipe = None
        self._pace = pace
        self._from_pipe = len(self.held)
        return self._from_pipe

    def _settle(self, moved: int) -> None:
        """End a call of `pump` that has moved so many bytes."""
        if moved:
            self.moved_at = self.source.loop.now
        self._bulk = moved >= BULK and self._can_splice
        if self._pipe and not self._pipe.held:
            self._give_back()
        self.waiting = bool(self.held or self._pipe)
        self.finished = self.eof and not self.waiting
        hold = self.waiting and not self.target.ready & OUT
        if hold is not self._held_back:
            self._hold_back(hold)

    def _hold_back(self, hold: bool) -> None:
        self._held_back = hold
        # More bytes from the source have to wait until the target has room: only this resumes the task.
        if hold:
            self.source.ignore(IN | PRI)
        else:
            self.source.heed(IN | PRI)

    def _keep_rest(self, rest: memoryview | bytes) -> None:
        self.held = rest or b""  # an empty view would keep the whole memory behind it
        if self._from_pipe and not rest:
            self._pipes.free_memory(self._from_pipe)
            self._from_pipe = 0

    def _give_back(self) -> None:
        if self._pipe:
            self._pipes.give_back(self._pipe)
            self._pipe = None

    # The ways to move bytes. Each makes one step, and returns whether a further one may find work.

    def _copy(self) -> bool:
        source = self.source
        if not source.ready & IN:
            return False
        size = source.read_into(BUFFER)
        if not size:
            self.eof |= size == 0
            return False
        count = self.target.write(BUFFER[:size])
        self.total += count
        return self._keep(count, size)

    def _keep(self, count: int, size: int) -> bool:
        """Note what the target did not take of the buffer, and whether the source has more than fits."""
        self.held = memoryview(bytes(BUFFER[count:size]))
        self._bulk = size == BUFFER_SIZE and self._can_splice
        return count == size

    def _write_held(self) -> bool:
        count = self.target.write(self.held)
        self.total += count
        self._keep_rest(memoryview(self.held)[count:])
        return not self.held

    def _borrow(self) -> Pipe | None:
        now = self.source.loop.now
        if self._pace:
            self._pace.look(self.total, now)
            if self._pace.slow:
                return None
            self._pace = None
        self._pipe = self._pipes.borrow(self, now)
        return self._pipe

    def _fill(self, pipe: Pipe, size: int) -> bool:
        source = self.source
        if self.eof or not source.ready & IN:
            return False
        try:
            count = source.splice_into(pipe, max(size, BUFFER_SIZE))
        except OSError:
            self._can_splice = False
            return self._leave_splice()
        if count is None:
            return False
        if count < 0:
            return self._leave_splice()
        self.eof = not count
        return not self.eof

    def _empty(self, pipe: Pipe) -> bool:
        try:
            count = self.target.splice_from(pipe)
        except OSError:
            self._can_splice = False
            self.held = pipe.take()
            return self._leave_splice()
        self.total += count
        return count > 0

    def _leave_splice(self) -> bool:
        """Go on by copying."""
        self._bulk = False
        self._give_back()
        return True


def cut(flow: Flow, other: Flow) -> int:
    """Close the target of a flow, when not all is in order. Returns how many bytes were lost by that."""
    target = flow.target
    # A flow that `_end_both` has ended has passed on all that it had to, whatever became of its source.
    whole = not flow.source.aborted if flow.finished else target.ended
    # If a socket is closed while bytes from its peer are unread, the kernel sends RST too (tcp(7)).
    resets = not whole or (not other.finished and target.peek(1))
    lost = at_risk(flow) if resets and not target.aborted else 0
    if whole:
        target.close()
    else:
        flow.drop()
        target.abort()
    return lost


def at_risk(flow: Flow) -> int:
    """How many bytes from a flow's source would be lost by RST to its target now: those in rspd and in the kernel."""
    # The kernel counts an end as one byte. It may also hold what was said before the relay: no byte of the flow.
    target = flow.target
    in_kernel = max(target.at_risk() - target.ended, 0)
    return flow.held_back + min(in_kernel, flow.total)
