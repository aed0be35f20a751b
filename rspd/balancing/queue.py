"""The clients of a pool that wait for a backend."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from rspd.balancing.backend import Backend
from rspd.engine.loop import Loop, Task
from rspd.engine.side import Side
from rspd.net.waiting import wait

# Returns a backend for the first client, or None; and when to ask again if nothing changes before.
Ask = Callable[[], tuple["Backend | None", float]]


class Queue:
    """Who waits for a backend. Clients that began to dial earlier come first, however often they have waited.

    waiting: when each began to dial, and its task.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.waiting: list[tuple[float, Task]] = []

    async def wait(self, began: float, deadline: float, client: Side, ask: Ask) -> Backend:
        """Wait, in the running task, until there is a backend for a client.

        began: when the client began to dial. ask: called while the client is the first.
        Raises ConnectionAbortedError when the client aborts, TimeoutError at the deadline.
        """
        place = (began, self._loop.current)
        insort(self.waiting, place, key=lambda other: other[0])
        try:
            while True:
                if client.aborted:
                    raise ConnectionAbortedError
                look_again = deadline
                if self.waiting[0] is place:
                    backend, look_again = ask()
                    if backend:
                        return backend
                await wait(self._loop, deadline, pause=look_again - self._loop.now)
        finally:
            self.waiting.remove(place)
            self.wake()

    def wake(self) -> None:
        """Something has changed: let the first client ask."""
        if self.waiting:
            self.waiting[0][1].wake()
