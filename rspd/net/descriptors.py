"""Descriptors: room for those that are needed, and what to do where they, or epoll's watches, run out."""

from __future__ import annotations

import errno
import logging
import os
import resource
from collections.abc import Callable
from typing import TypeVar

from rspd.engine.loop import Loop, Task, news
from rspd.engine.pipes import PIPES_MAX
from rspd.log import quote

# accept(2), socket(2) and epoll_ctl(2): no descriptor in the process, in the system; no memory; no watch for this user.
SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC})

ADVICE = {
    errno.EMFILE: "; raise LimitNOFILE or ulimit -n",
    errno.ENOSPC: "; raise the sysctl fs.epoll.max_user_watches",
}

# Seconds after which to try again where no connection of ours has ended meanwhile.
RETRY = 0.1

# Seconds without a failure after which the shortage is over. While clients queue, each connection's end lets just
# one more in before the next failure; that is one shortage.
QUIET = 1.0

# Descriptors besides those that are counted: standard ones, loop, log, systemd, pid file, name lookups, the file at a
# reload, some to spare.
OWN = 24

T = TypeVar("T")

log = logging.getLogger(__name__)


class TooFewError(Exception):
    """Too few descriptors. args: how many are needed, how many are allowed, how many connections would fit."""


def reserve(connections: int, others: int) -> int:
    """Make room for connections, and for so many descriptors besides. If needed, raise the soft limit to the hard one.

    Returns how many pipes there is room for. Raises TooFewError.
    """
    own = OWN + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * connections + own
    if needed > hard:
        raise TooFewError(needed, hard, (hard - own) // 2)
    if needed + 2 * PIPES_MAX > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(PIPES_MAX, (soft - needed) // 2)


def allow_all() -> None:
    """Raise the soft limit to the hard one: the process before may have had more connections than are configured."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # then there are as many as there are


class Shortage:
    """Whether descriptors or watches are short.

    Who could not get one waits here, first come first served: a proxy, `connect`, a connection, a lookup.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.waiting: list[Task] = []
        self._last: float | None = None  # when a call failed last; None if there is no shortage
        self.spare = -1

    @property
    def active(self) -> bool:
        """Whether something has been short a moment ago."""
        return self._last is not None

    def keep_spare(self) -> None:
        """Hold a descriptor in reserve, `spare`, until somebody has to wait for one. Raises OSError if there is none.

        No client may be accepted without the spare one. Else clients could hold all descriptors and wait for each
        other: none would be left to look up or dial a backend.
        """
        if self.spare < 0:
            self.spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def give_up_spare(self) -> None:
        """Close what `keep_spare` opened."""
        if self.spare >= 0:
            os.close(self.spare)
            self.spare = -1

    @property
    def none_free(self) -> bool:
        """Whether no descriptor can be opened now, though nobody has missed one yet."""
        try:
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            return error.errno in SHORT
        return False

    async def wait(self, error: OSError) -> None:
        """After a call that failed with an error in `SHORT`: wait until trying again makes sense."""
        self.give_up_spare()
        loop = self._loop
        began = self._last is None
        self._last = loop.now
        if began:
            loop.spawn(self._report(error))
        task = loop.current
        self.waiting.append(task)
        until = loop.now + RETRY
        task.wake_at(until)
        try:
            while task in self.waiting and loop.now < until:
                await news()
        finally:
            if task in self.waiting:
                self.waiting.remove(task)

    async def retry(self, attempt: Callable[[], T], error: OSError, deadline: float, given_up: Callable[[], bool]) -> T:
        """`attempt` has failed: make it again as long as something is short, and return what it returns.

        deadline: in the loop's time. given_up: called before each attempt.
        Raises the last OSError if that is no shortage, or at the deadline, or once it is given up.
        """
        while error.errno in SHORT and self._loop.now < deadline and not given_up():
            await self.wait(error)
            try:
                return attempt()
            except OSError as another:
                error = another
        raise error

    def relieve(self) -> None:
        """A connection has ended: let those who wait try again."""
        while self.waiting:
            self.waiting.pop(0).wake()

    async def _report(self, error: OSError) -> None:
        advice = ADVICE.get(error.errno or 0, "")
        log.warning("accepting pauses%s reason=%s", advice, quote(error.strerror or str(error)))
        while (over := (self._last or 0) + QUIET) > self._loop.now:
            await self._loop.sleep(over - self._loop.now)
        self._last = None
        log.info("accepting goes on")
