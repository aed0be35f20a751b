"""All places of a proxy taken, and clients in the backlog: the log hears of it twice, and the status how many wait."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Sized
from math import inf

from rspd.listener import Listener
from rspd.loop import Loop, Task, news

# Seconds without a place for anybody until the first look at who waits, and from one look to the next.
STANDSTILL = 1.0

# Seconds after which the wait is over. A queue that moves on, but slowly, is one wait, not one for each client.
QUIET = 3.0

# Seconds from one warning to the next.
INTERVAL = 60.0

log = logging.getLogger(__name__)


class Places:
    """The state of a proxy's clients waiting because as many are served as may be.

    A task looks each second who waits. It begins when the last place is taken, and ends when a place is free and nobody
    has waited for a while. So an idle proxy has no such task, and a connection that ends soon costs no look.

    tag: what tells the proxy in a line, ` proxy=NAME`, or nothing.
    taken: the connections of the proxy.
    changed: called when `waiting` is another.
    """

    def __init__(self, loop: Loop, tag: str, taken: Sized, changed: Callable[[], object]) -> None:
        self._loop = loop
        self._tag = tag
        self._taken = taken
        self._changed = changed
        self._limit = 0
        self._listeners: Sequence[Listener] = ()
        self._shared = False
        self._task: Task | None = None
        self._since = 0.0  # when the last place was taken
        self._waiting = ""
        self._last: float | None = None  # when clients were last found to wait; None once that is over
        self._warned_at = -inf
        self._told = False  # whether the log has been told of the wait, and not of its end

    def apply(self, limit: int, listeners: Sequence[Listener], shared: bool) -> None:
        """Go by another number of places, and other listeners, from now on.

        shared: whether other processes may accept who waits there.
        """
        self._limit = limit
        self._listeners = listeners
        self._shared = shared
        if self._waiting:
            self._waiting = self._ask()

    @property
    def waiting(self) -> str:
        """How many clients wait, by the last look, for people: a number, `some`, or `3+`. Empty where nobody does."""
        return self._waiting if self._full() else ""

    def all_taken(self) -> None:
        """The last place is taken, in this turn of the loop."""
        self._since = self._loop.now
        if self._task is None:
            self._task = self._loop.spawn(self._watch())

    def close(self) -> None:
        """Look no more: nobody will be accepted any more. The task that looks is done a turn later."""
        self._waiting = ""
        if self._task:
            self._task.cancel()

    def _full(self) -> bool:
        return len(self._taken) >= self._limit

    async def _watch(self) -> None:
        loop, looking = self._loop, True
        try:
            while looking:
                due = self._since + STANDSTILL
                if due <= loop.now:
                    due = loop.now + STANDSTILL
                loop.current.wake_at(due)
                while loop.now < due:
                    await news()
                self._look()
                looking = self._full() or self._last is not None
        finally:
            self._task = None

    def _look(self) -> None:
        now = self._loop.now
        standing = self._full() and self._since + STANDSTILL <= now
        before, self._waiting = self._waiting, ""
        if standing or (self._full() and self._last is not None):
            self._waiting = self._ask()
        if self._waiting != before:
            self._changed()
        # Another process may be about to accept the client that was found at a shared listener. So it takes two looks.
        if standing and self._waiting and (before or not self._shared):
            self._last = now
            self._warn()
        elif self._last is not None and self._last + QUIET <= now:
            self._last = None
            self._tell_end()

    def _ask(self) -> str:
        counts = [listener.waiting() for listener in self._listeners]
        known = sum(count for count in counts if count)
        if None in counts:
            return f"{known}+" if known else "some"
        return str(known or "")

    def _warn(self) -> None:
        if not self._told and self._warned_at + INTERVAL <= self._loop.now:
            text = "all places taken, clients wait%s max_connections=%d waiting=%s"
            log.warning(text, self._tag, self._limit, self._waiting)
            self._warned_at = self._loop.now
            self._told = True

    def _tell_end(self) -> None:
        if self._told:
            log.info("clients no longer wait for a place%s max_connections=%d", self._tag, self._limit)
            self._told = False
