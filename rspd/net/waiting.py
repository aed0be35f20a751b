"""Waiting for what comes from outside: until woken, at the latest until a deadline, and not once it is given up."""

from __future__ import annotations

import errno
import types
from collections.abc import Callable, Generator

from rspd.engine.loop import Loop


@types.coroutine
def wait(
    loop: Loop, deadline: float, late: str = "", given_up: Callable[[], bool] | None = None, gone: str = ""
) -> Generator[None, None, None]:
    """Suspend the running task until it has news. To be called again until there is what is waited for.

    Raises as `check` does, before it suspends the task.
    """
    check(loop, deadline, late, given_up, gone)
    loop.current.wake_at(deadline)
    yield


def check(
    loop: Loop, deadline: float, late: str = "", given_up: Callable[[], bool] | None = None, gone: str = ""
) -> None:
    """Whether to wait on. Raises TimeoutError with the text `late` if the deadline has passed.

    Raises ConnectionAbortedError with the text `gone` if `given_up` returns True.
    """
    if loop.now >= deadline:
        raise TimeoutError(late)
    if given_up and given_up():
        raise ConnectionAbortedError(errno.ECONNABORTED, gone)
