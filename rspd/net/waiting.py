"""A task waits for an answer from outside, until it is woken, the deadline passes, or its caller gives up."""

from __future__ import annotations

import errno
import types
from collections.abc import Callable, Generator

from rspd.engine.loop import Loop


@types.coroutine
def wait(
    loop: Loop, deadline: float, late: str = "", given_up: Callable[[], bool] | None = None, gone: str = ""
) -> Generator[None, None, None]:
    """Suspend the running task until it has news. The caller looks for the answer, and waits again if there is none.

    Raises what `check` raises, before it suspends the task.
    """
    check(loop, deadline, late, given_up, gone)
    loop.current.wake_at(deadline)
    yield


def check(
    loop: Loop, deadline: float, late: str = "", given_up: Callable[[], bool] | None = None, gone: str = ""
) -> None:
    """Return if the task may wait on. Raises TimeoutError at the deadline, ConnectionAbortedError if it is given up.

    late, gone: the texts of these errors.
    given_up: whether nobody needs the answer any more.
    """
    if loop.now >= deadline:
        raise TimeoutError(late)
    if given_up and given_up():
        raise ConnectionAbortedError(errno.ECONNABORTED, gone)
