"""Clients that wait because all places are taken: the log has their wait's begin and end, the status their number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence, Sized
from math import inf

from rspd.engine.loop import Loop, Task
from rspd.engine.side import Handed
from rspd.net.listener import Listener

# Seconds from when the last place is taken to the first look at who waits, and from one look to the next.
STANDSTILL = 1.0

# Seconds without a standstill after which the wait is over. A queue that moves on, but slowly, is one wait, not one for
# each client.
QUIET = 3.0

# Seconds from one warning to the next.
INTERVAL = 60.0

log = logging.getLogger(__name__)


class Places:
    """Whether clients wait because all places of a proxy are taken.

    A task looks each second who waits. It begins when the last place is taken, and ends when a place is free and nobody
    has waited for a while. So an idle proxy has no such task, and a lone connection that ends soon costs no look.

    A standstill: two looks in a row find a client that waits, and nobody has been accepted in between. One look is not
    enough: the client may have come just now, or another process may be about to accept it.

    tag: names the proxy in a line of the log: ` proxy=NAME`, or nothing.
    taken: the connections of the proxy.
    newest: says when the newest of them was accepted; called only while all places are taken.
    looking: the task, while it is at work.
    changed: called when `waiting` has changed.
    """

    def __init__(
        self, loop: Loop, tag: str, taken: Sized, newest: Callable[[], float], changed: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._tag = tag
        self._taken = taken
        self._newest = newest
        self._changed = changed
        self._limit = 0
        self._listeners: Sequence[Listener] = ()
        self.looking: Task | None = None
        self._looked_at = -inf
        self._waiting = ""
        self._found = False  # whether the last look found somebody at these listeners
        self._stands_from = 0.0  # when a standstill began, if the next look finds one
        self._began = 0.0  # when the wait began
        self._last: float | None = None  # when a standstill was last found; None once the wait is over
        self._warned_at = -inf
        self._told_limit = 0  # the limit that the log has been told of; 0 once it has been told of the end

    def apply(self, limit: int, listeners: Sequence[Listener]) -> None:
        """Go by another number of places, and other listeners, from now on."""
        self._limit = limit
        self._listeners = listeners
        self._found = False
        if self._waiting:
            self._waiting = who_waits(listeners)

    @property
    def waiting(self) -> str:
        """How many clients wait, by the last look, for people: a number, `some`, or `3+`. Empty where nobody does."""
        return self._waiting if self._full() else ""

    def look(self) -> None:
        """Look each second, since the last place is taken. Not to be called while `looking`."""
        self.looking = self._loop.spawn(self._watch())

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process: what the log has been told."""
        return {"began": self._began, "last": self._last, "warned_at": self._warned_at, "told": self._told_limit}

    def resume(self, handed: Handed) -> None:
        """Go on where the places of the process before were: a wait that goes on is told once."""
        self._began, self._last = handed.get("began", 0.0), handed.get("last")
        self._warned_at, self._told_limit = handed.get("warned_at", -inf), handed.get("told", 0)
        if self._last is not None and not self.looking:
            self.look()

    def close(self) -> None:
        """Look no more: nobody will be accepted any more. The task that looks is done a turn later."""
        self._waiting = ""
        if self.looking:
            self.looking.cancel()

    def _full(self) -> bool:
        return len(self._taken) >= self._limit

    async def _watch(self) -> None:
        try:
            while True:
                await self._loop.sleep(STANDSTILL)
                self._look()
                if not self._full() and self._last is None:
                    break
        finally:
            self.looking = None

    def _look(self) -> None:
        now = self._loop.now
        before, self._waiting = self._waiting, who_waits(self._listeners) if self._full() else ""
        taken_at = self._newest() if self._waiting else -inf
        accepted = taken_at >= self._looked_at
        if self._waiting and self._found and not accepted:
            if self._last is None:
                self._began = self._stands_from
            self._last = now
            self._warn()
        else:
            self._stands_from = taken_at if accepted else now
        self._looked_at, self._found = now, bool(self._waiting)
        if self._last is not None and self._last + QUIET <= now:
            self._tell_end(self._last - self._began)
            self._last = None
        if self._waiting != before:
            self._changed()

    def _warn(self) -> None:
        if not self._told_limit and self._warned_at + INTERVAL <= self._loop.now:
            text = "all places taken, clients wait%s max_connections=%d waiting=%s"
            log.warning(text, self._tag, self._limit, self._waiting)
            self._warned_at = self._loop.now
            self._told_limit = self._limit

    def _tell_end(self, seconds: float) -> None:
        if self._told_limit:
            text = "clients no longer wait for a place%s max_connections=%d seconds=%.3f"
            log.info(text, self._tag, self._told_limit, seconds)
            self._told_limit = 0


def who_waits(listeners: Iterable[Listener]) -> str:
    """How many clients are in the backlogs, for people: a number, `some`, or `3+`. Empty where nobody is."""
    counts = [listener.waiting() for listener in listeners]
    known = sum(count for count in counts if count)
    if None in counts:
        return f"{known}+" if known else "some"
    return str(known or "")
