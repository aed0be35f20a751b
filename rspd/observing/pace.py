"""The work of all who look, spread over the turns of the loop."""

from __future__ import annotations

from collections.abc import Callable

from rspd.engine.loop import Loop, Task


class Pace:
    """Lets one slice of work run in each turn of the loop, however many look. Connections wait for no more."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: dict[Task, None] = {}  # for their slice, in this order
        self._last = -1  # the turn that has had its slice

    async def slice(self, gone: Callable[[], bool] | None = None) -> None:
        """Wait for the turn of the next slice, in the running task. Those who look take turns.

        gone: whether nobody needs it any more. Raises ConnectionAbortedError then.
        """
        loop, task = self._loop, self._loop.current
        self._waiting[task] = None
        try:
            while True:
                await loop.yield_turn()
                if gone and gone():
                    raise ConnectionAbortedError
                if self._last != loop.turn and next(iter(self._waiting)) is task:
                    self._last = loop.turn
                    return
        finally:
            del self._waiting[task]
