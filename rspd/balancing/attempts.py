"""One client's attempts at backends, and the clients of a pool that wait for one."""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Protocol

from rspd.balancing.backend import Backend
from rspd.balancing.members import Members
from rspd.balancing.wording import situation
from rspd.engine.cause import Cause
from rspd.engine.loop import Loop, Task
from rspd.engine.side import Handed, Side
from rspd.log import quote
from rspd.net.address import Peer, format_peer
from rspd.net.connect import UnreachableError, cause_of, is_own_fault, why
from rspd.net.waiting import wait
from rspd.net.ways import Way
from rspd.settings import ProxyConfig

# Seconds between two attempts at backends that are down while clients wait for one of them.
RETRY = 0.1

log = logging.getLogger(__name__)

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


class DialError(Exception):
    """A client gets no backend. The text has the reasons, of each attempt if there were any."""

    def __init__(self, cause: Cause, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.cause = cause


class Caller(Protocol):
    """The client for whom a backend is dialled. way: see `connect`.

    destination: where the client connected to, if the peer told that.
    began: when it began to dial. attempts: the pool's account of them, once it needs one; None before.
    """

    client: Side
    client_address: Peer
    destination: tuple[str, int] | None
    way: Way | None
    began: float
    attempts: Attempts | None

    def waited(self, seconds: float) -> None:
        """The client has waited in the queue for so long."""


class Chooser(Protocol):
    """The pool: who chooses the backends that are tried."""

    tag: str
    config: ProxyConfig
    members: Members
    queue: Queue

    def choose(self, address: Peer, tried: Collection[Backend]) -> Backend | None:
        """As for `Pool`."""

    def ask(self, address: Peer) -> tuple[Backend | None, float]:
        """As for `Pool`."""


class Attempts:
    """The account of one client's attempts at backends. Made when the first one has failed, or found no backend.

    deadline: until when the client may dial.
    tried: the backends that failed since the client last waited.
    used: attempts that count for `retries`: those at backends that were in service.
    queued_at: since when the client has been in the queue; 0 while it is not.
    """

    def __init__(self, pool: Chooser, caller: Caller) -> None:
        self._pool = pool
        self._config = config = pool.config
        self._loop = caller.client.loop
        self._give_up = 0.0  # until when it waits in the queue; 0 before
        self._reasons: list[str] = []
        self._cause: Cause = "backend-unreachable"
        self.deadline = caller.began + config.connect_timeout
        self.tried: list[Backend] = []
        self.used = 0
        self.queued_at = 0.0

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process."""
        return {
            "deadline": self.deadline,
            "give_up": self._give_up,
            "tried": [backend.name for backend in self.tried],
            "used": self.used,
            "queued_at": self.queued_at,
            "reasons": self._reasons,
            "cause": self._cause,
        }

    def resume(self, handed: Handed) -> None:
        """Go on with the account of the process before."""
        self.deadline = handed.get("deadline", self.deadline)
        self._give_up = handed.get("give_up", 0.0)
        tried = handed.get("tried", ())
        self.tried = [backend for name, backend in self._pool.members.by_name.items() if name in tried]
        self.used = handed.get("used", 0)
        self.queued_at = handed.get("queued_at", 0.0)
        self._reasons += handed.get("reasons", ())
        self._cause = handed.get("cause", self._cause)

    def go_on(self, caller: Caller) -> tuple[float, Backend | None]:
        """Until when the client may dial now, and the backend to dial, or None; after the task was interrupted."""
        pool = self._pool
        waits = pool.queue.waiting and pool.members.any_in_service
        over = self.used > self._config.retries or self._loop.now >= self.deadline
        backend = None if over or waits else pool.choose(caller.client_address, self.tried)
        if backend and self.queued_at:
            self._leave_queue(caller)
        return self.deadline, backend

    def failed(
        self, caller: Caller, backend: Backend, retry_at: float, where: object, error: OSError
    ) -> Backend | None:
        """An attempt failed: the backend to dial next, or None if there is none now, or no attempt is left.

        retry_at: the backend's when the attempt began. where: the address that was dialled.
        Raises DialError if the client has gone.
        """
        now, aborted = self._loop.now, caller.client.aborted
        reasons = error.reasons if isinstance(error, UnreachableError) else [f"{where}: {why(error)}"]
        self._reasons += reasons
        if aborted or is_own_fault(error):
            backend.no_verdict(now, retry_at)
        else:
            backend.failed(now, why(error))
        if aborted:
            raise DialError("client-aborted", self._reasons) from None
        client, reason = format_peer(caller.client_address), quote("; ".join(reasons))
        log.debug("backend not reached client=%s%s backend=%s reason=%s", client, self._pool.tag, backend.name, reason)
        self._cause = cause_of(error)
        self.tried.append(backend)
        self.used += retry_at == inf
        over = self.used > self._config.retries or now >= self.deadline
        return None if over else self._pool.choose(caller.client_address, self.tried)

    async def wait_for_backend(self, caller: Caller) -> Backend:
        """Wait until the client gets a backend. No backend counts as tried then. Raises DialError."""
        loop, pool, members, client = self._loop, self._pool, self._pool.members, caller.client
        if not pool.config.backends:
            raise DialError("backend-unknown", ["its proxy is not configured any more"])
        address = caller.client_address
        while not members.by_name and not self._reasons:
            self._cause = "backend-unknown"
            self._reasons += await members.learn(client, self.deadline)
            if backend := pool.choose(address, self.tried):
                return backend
        if client.aborted:
            raise DialError("client-aborted", self._reasons)
        if self._give_up and loop.now >= self._give_up:
            raise DialError("queue-timeout", self._reasons)
        self._give_up = self._give_up or loop.now + self._patience()
        if loop.now >= self._give_up or (self.used > self._config.retries and members.any_in_service):
            if self._reasons:
                raise DialError(self._cause, self._reasons)
            raise DialError("backend-down", [situation(members.everyone)])
        if self.tried:
            await loop.sleep(RETRY)
        self.queued_at = self.queued_at or loop.now  # if the task is interrupted, its time goes on
        try:
            backend = await pool.queue.wait(caller.began, self._give_up, client, lambda: pool.ask(address))
        except ConnectionAbortedError:
            self._leave_queue(caller)
            raise DialError("client-aborted", []) from None
        except TimeoutError:
            self._leave_queue(caller)
            reasons = self._reasons if members.any_in_service and self._reasons else [situation(members.everyone)]
            raise DialError("queue-timeout", reasons) from None
        self._leave_queue(caller)
        patience = inf if members.any_in_service else self._give_up
        self.deadline = min(loop.now + self._config.connect_timeout, patience)
        self._reasons.clear()
        self.tried, self.used = [], 0
        return backend

    def _leave_queue(self, caller: Caller) -> None:
        caller.waited(self._loop.now - self.queued_at)
        self.queued_at = 0.0

    def _patience(self) -> float:
        """How many seconds the client may wait for a backend."""
        config = self._pool.config
        others = [backend for backend in self._pool.members.by_name.values() if backend not in self.tried]
        # Each backend in service is full. A backend that is down may be full of attempts to reach it.
        full = any(one.in_service or not (one.has_room or one.unwell) for one in others)
        return config.queue_timeout or (config.connect_timeout if full else 0.0)
