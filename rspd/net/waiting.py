"""A task waits for an answer from outside, until it is woken, the deadline passes, or its caller gives up."""

from __future__ import annotations

import errno
import types
from collections.abc import Callable, Generator
from math import inf

from rspd.engine.loop import Loop

GivenUp = Callable[[], bool]  # whether nobody needs the answer any more


@types.coroutine
def wait(
    loop: Loop, deadline: float, late: str = "", given_up: GivenUp | None = None, gone: str = "", pause: float = inf
) -> Generator[None, None, None]:
    """Suspend the running task until it has news. The caller looks for the answer, and waits again if there is none.

    Raises TimeoutError at the deadline, ConnectionAbortedError if it is given up, before it suspends the task.
    late, gone: the texts of these errors.
    pause: seconds after which the task looks again, if no news is to be expected.
    """
    if loop.now >= deadline:
        raise TimeoutError(late)
    if given_up and given_up():
        raise ConnectionAbortedError(errno.ECONNABORTED, gone)
    loop.current.wake_at(min(deadline, loop.now + pause))
    yield
