"""A client's way to a backend: one attempt after the other, and the queue of clients that wait for a backend."""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Collection, Sequence

from rspd.balancing.backend import Backend
from rspd.balancing.members import Backends
from rspd.engine.cause import Cause
from rspd.engine.loop import Loop, Task, news
from rspd.engine.side import Side
from rspd.log import quote
from rspd.net.address import Peer
from rspd.net.connect import UnreachableError, cause_of, connect, is_own_fault, share, why
from rspd.net.descriptors import Shortage
from rspd.net.ways import Way

# Seconds between two attempts at backends that are down while clients wait for one of them.
RETRY = 0.1

# The time that is left for a client is divided among so many attempts at most, however many backends there are.
SHARES_MAX = 3

log = logging.getLogger(__name__)


class DialError(Exception):
    """No backend was reached. `cause` is that of the last attempt; the text has the reason of each attempt."""

    def __init__(self, cause: Cause, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.cause = cause


class Dialler:
    """Connects clients of a proxy to its backends."""

    def __init__(self, loop: Loop, backends: Backends, shortage: Shortage) -> None:
        self._loop = loop
        self._backends = backends
        self._shortage = shortage
        self._waiting: list[tuple[float, Task]] = []  # sorted by when dialling began
        self._next_retry = 0.0
        backends.on_room = self._wake_first

    async def dial(self, client: Side, address: Peer, way: Way | None = None) -> tuple[Backend, Side]:
        """Connect to the next backend that can be reached. Returns it and its side, watched by the running task.

        client: when it aborts, dialling ends.
        address: the client's, as accept(2) returns it.
        way: see `connect`.
        The connection counts as open until `Backends.release`. Raises DialError.
        """
        loop, backends = self._loop, self._backends
        config = backends.config
        began = loop.now
        deadline = began + config.connect_timeout
        give_up = 0.0  # when to leave the queue, once in it
        tried: list[Backend] = []
        used = 0  # attempts that count towards `retries`; those at a backend that is out do not
        reasons: list[str] = []
        cause: Cause = "backend-unreachable"
        backend = backends.only or (None if self._waiting and backends.any_up else backends.choose(address, tried))
        while True:
            if backend is None:
                if not backends.members and not reasons:
                    cause = "backend-unknown"
                    reasons += await backends.learn_names(client, deadline)
                    backend = backends.choose(address, tried)
                    continue
                if client.aborted:
                    raise DialError("client-aborted", reasons)
                if give_up and loop.now >= give_up:
                    raise DialError("queue-timeout", reasons)
                give_up = give_up or loop.now + self._patience(tried)
                if loop.now >= give_up or (used > config.retries and backends.any_up):
                    raise self._nobody(cause, reasons)
                if tried:
                    await loop.sleep(RETRY)
                backend = await self._wait(client, address, began, give_up)
                deadline = loop.now + config.connect_timeout
                if not backends.any_up:
                    deadline = min(deadline, give_up)
                tried.clear()
                used = 0
                reasons.clear()
            backend.open += 1
            if backend.open == backend.limit:
                backends.update(backend)
            addresses, out_until = backend.addresses, backend.out_until
            try:
                until = deadline if backends.only else self._share(deadline, tried, used)
                if len(addresses) == 1:
                    side = await connect(loop, self._shortage, addresses[0], until, client, way)
                else:
                    side = await backends.reach(backend, until, client, way)
            except OSError as error:
                backends.release(backend)
                reasons += _reasons(addresses[0] if addresses else backend.address, error)
                if client.aborted or is_own_fault(error):
                    backends.no_verdict(backend, out_until)
                else:
                    backends.failed(backend, error)
                if client.aborted:
                    raise DialError("client-aborted", reasons) from None
                log.debug("backend not reached backend=%s reason=%s", backend.name, quote(reasons[-1]))
                cause = cause_of(error)
                tried.append(backend)
                used += not out_until
                another = used <= config.retries and loop.now < deadline
                backend = backends.choose(address, tried) if another else None
            except BaseException:
                backends.release(backend)
                backends.no_verdict(backend, out_until)
                raise
            else:
                if backend.out_until:
                    backends.reached(backend)
                return backend, side

    def _share(self, deadline: float, tried: Collection[Backend], used: int) -> float:
        """Until when an attempt may last, so that time is left for other attempts."""
        backends = self._backends
        attempts = min(len(backends.members) - len(tried), backends.config.retries + 1 - used, SHARES_MAX)
        return share(self._loop.now, deadline, max(1, attempts))

    def _patience(self, tried: Collection[Backend]) -> float:
        """How many seconds a client may wait for a backend."""
        config = self._backends.config
        others = [backend for backend in self._backends.members.values() if backend not in tried]
        # Every backend that is up is full. A backend that is out of service may be full of attempts to reach it.
        full = any(backend.up or (backend.full and backend.healthy) for backend in others)
        return config.queue_timeout or (config.connect_timeout if full else 0.0)

    async def _wait(self, client: Side, address: Peer, began: float, until: float) -> Backend:
        """Wait in the queue until there is a backend to dial; clients that began earlier go first. Raises DialError."""
        loop, backends = self._loop, self._backends
        task = loop.current
        place = (began, task)
        insort(self._waiting, place, key=lambda other: other[0])
        try:
            while True:
                if client.aborted:
                    raise DialError("client-aborted", [])
                task.wake_at(until)
                if self._waiting[0] is place:
                    if backend := backends.choose(address, ()):
                        return backend
                    look_again = backends.next_trial
                    if not backends.any_up:
                        if loop.now >= self._next_retry and (backend := backends.last_resort(())):
                            self._next_retry = loop.now + RETRY
                            return backend
                        look_again = self._next_retry
                    task.wake_at(min(until, max(look_again, loop.now + RETRY)))
                if loop.now >= until:
                    raise DialError("queue-timeout", [backends.situation()])
                await news()
        finally:
            self._waiting.remove(place)
            self._wake_first()

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0][1].wake()

    def _nobody(self, cause: Cause, reasons: list[str]) -> DialError:
        if reasons:
            return DialError(cause, reasons)
        return DialError("backend-down", [self._backends.situation()])


def _reasons(where: object, error: OSError) -> list[str]:
    return error.reasons if isinstance(error, UnreachableError) else [f"{where}: {why(error)}"]
