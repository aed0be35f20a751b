"""The pool: the one door to the backends of a proxy. Clients are connected through it, and configurations applied."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Protocol

from rspd.balancing.backend import Backend
from rspd.balancing.members import Members
from rspd.balancing.queue import Queue
from rspd.balancing.wording import situation
from rspd.engine.cause import Cause
from rspd.engine.loop import Loop
from rspd.engine.side import Side
from rspd.log import quote
from rspd.net.address import Peer, format_peer, host_of
from rspd.net.connect import UnreachableError, cause_of, connect, is_own_fault, share, why
from rspd.net.descriptors import Shortage
from rspd.net.networks import client_key
from rspd.net.resolver import Resolver
from rspd.net.ways import Way, Ways
from rspd.settings import ProxyConfig

# Seconds between two attempts at backends that are down while clients wait for one of them.
RETRY = 0.1

# A client's time is divided among this number of attempts at most, whatever the number of backends.
SHARES_MAX = 3

# How many backends that are down are tried for one client.
LAST_RESORTS = 10

log = logging.getLogger(__name__)


class DialError(Exception):
    """A client gets no backend. The text has the reasons, of each attempt if there were any."""

    def __init__(self, cause: Cause, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.cause = cause


class Caller(Protocol):
    """The client for whom a backend is dialled. way: see `connect`.

    destination: where the client connected to, if the peer told that.
    """

    client: Side
    client_address: Peer
    destination: tuple[str, int] | None
    way: Way | None


class Opening(ABC):
    """What is said to a backend, and awaited from it, after connecting and before the relay begins."""

    preface = b""  # what a check of the backend says first

    @abstractmethod
    async def open(self, backend: Side, caller: Caller, deadline: float) -> None:
        """Say it. The running task watches both sides; if this fails, the pool closes the backend's.

        Raises TimeoutError at the deadline, another OSError if this backend will not do. Then the attempt has failed.
        """


class Pool:
    """The backends that a proxy chooses from, and the clients that wait for one.

    config: the proxy's configuration in force.
    members: the backends. queue: the clients that wait. tag: names the proxy in the log, or is empty.
    """

    def __init__(
        self,
        loop: Loop,
        shortage: Shortage,
        resolver: Resolver,
        ways: Ways,
        config: ProxyConfig,
        openings: tuple[Opening, ...],
        on_down: Callable[[Backend], object],
        on_change: Callable[[], object],
    ) -> None:
        """on_down, on_change: as for `Members`."""
        self.tag = f" proxy={config.name}" if config.name else ""
        self._loop, self._shortage = loop, shortage
        self.queue = Queue(loop)
        self.members = Members(loop, shortage, resolver, ways, self.tag, self.queue.wake, on_down, on_change)
        self._next_last_resort = 0.0
        self.apply(config, openings)

    def apply(self, config: ProxyConfig, openings: tuple[Opening, ...]) -> None:
        """Go by another configuration. Backends that stay keep their state; the others keep their connections."""
        self.config = config
        self._openings = openings
        self.members.apply(config, b"".join(opening.preface for opening in openings))

    def stop(self) -> None:
        """End all health checks and lookups. Connections go on, and are still to be released."""
        self.members.stop()

    async def dial(self, caller: Caller) -> tuple[Backend, Side]:
        """Connect to the next backend that can be reached. Returns it and its side, watched by the running task.

        The caller closes the side, and calls `release` once. Raises DialError; then nothing is open, or counts.
        """
        loop, members, config = self._loop, self.members, self.config
        began = loop.now
        deadline = began + config.connect_timeout
        attempts: Attempts | None = None
        must_wait = self.queue.waiting and members.any_in_service
        backend = members.only or (None if must_wait else self.choose(caller.client_address, ()))
        while True:
            if backend is None:
                attempts = attempts or Attempts(self, config, caller, began)
                backend = await attempts.wait_for_backend()
                deadline = attempts.deadline
            # All as it is now: a reload meanwhile is not for this attempt.
            addresses, retry_at, openings = backend.addresses, backend.retry_at, self._openings
            backend.enter()
            try:
                until = deadline if members.only else self._share(deadline, attempts)
                if len(addresses) == 1:
                    side = await connect(loop, self._shortage, addresses[0], until, caller.client, caller.way)
                else:
                    side = await members.reach(backend, until, caller.client, caller.way)
                if openings:
                    await self._open(openings, side, caller, until)
            except OSError as error:
                backend.leave()
                attempts = attempts or Attempts(self, config, caller, began)
                backend = attempts.failed(backend, retry_at, addresses[0] if addresses else backend.address, error)
            except BaseException:
                backend.leave()
                backend.no_verdict(loop.now, retry_at)
                raise
            else:
                if backend.retry_at < inf:
                    backend.reached()
                return backend, side

    # A connection that `dial` returned has ended. A method of its own would be one more call a connection.
    release = staticmethod(Backend.leave)

    async def _open(self, openings: tuple[Opening, ...], backend: Side, caller: Caller, deadline: float) -> None:
        try:
            for opening in openings:
                await opening.open(backend, caller, deadline)
        except BaseException:
            if caller.way:
                caller.way.end()
            backend.abort()
            raise

    def _share(self, deadline: float, attempts: Attempts | None) -> float:
        """The deadline of an attempt. It leaves time for other attempts."""
        tried, used = (len(attempts.tried), attempts.used) if attempts else (0, 0)
        left = min(len(self.members.by_name) - tried, self.config.retries + 1 - used, SHARES_MAX)
        return share(self._loop.now, deadline, max(1, left))

    # Choosing

    def choose(self, address: Peer, tried: Collection[Backend]) -> Backend | None:
        """A backend that may get a connection now, and was not tried for this client; None if there is none."""
        members = self.members
        if members.trials and members.trials[0].retry_at <= self._loop.now and (backend := self._due(tried)):
            return backend
        if not tried and members.any_in_service:
            policy = (members.regular if members.regular.in_service else members.spares).policy
            return policy.pick(client_key(host_of(address)) if policy.by_client else "")
        return self._choose_in_trouble(client_key(host_of(address)), tried)

    def _due(self, tried: Collection[Backend]) -> Backend | None:
        """A backend that is due, for this client to try. A spare only if no regular one is in service."""
        members, now = self.members, self._loop.now
        # If this client's attempt came to no verdict, the backend stays due: the next client tries it.
        due = [one for one in members.trials if one.retry_at <= now and one.has_room and one not in tried]
        for backend in sorted(due, key=lambda one: one.tier is members.spares):
            if backend.tier is members.regular or not members.regular.in_service:
                backend.try_out(now)
                return backend
            backend.put_off(now)
        return None

    def _choose_in_trouble(self, who: str, tried: Collection[Backend]) -> Backend | None:
        members = self.members
        for tier in (members.regular, members.spares):
            if found := tier.policy.pick_other(who, tried):
                return found
            if any(one.in_service and one.tier is tier and one not in tried for one in members.by_name.values()):
                break  # these are only full: clients wait for them, and the spares are not used
        if members.any_in_service or (self.config.queue_timeout and not tried) or len(tried) >= LAST_RESORTS:
            return None  # this client waits, or the next client tries other backends
        return self._last_resort(tried)

    def _last_resort(self, tried: Collection[Backend]) -> Backend | None:
        """Of the backends that failed, the one that is due first; spares last."""
        members = self.members
        left = [backend for backend in members.trials if backend.has_room and backend not in tried]
        backend = min(left, key=lambda one: one.tier is members.spares, default=None)
        if backend:
            backend.try_out(self._loop.now)  # the next client tries another: this one may be silent for long
        return backend

    def ask(self, address: Peer) -> tuple[Backend | None, float]:
        """A backend for the first client in the queue, or None; and when to ask again."""
        members, now = self.members, self._loop.now
        backend = self.choose(address, ())
        look_again = members.next_trial
        if backend and backend.in_service and now < backend.failed_at + RETRY:
            # It is up all the same (max_fails). One of the clients that wait tries it, not each of them.
            failed = [one for one in members.by_name.values() if now < one.failed_at + RETRY]
            return self.choose(address, failed), min(one.failed_at for one in failed) + RETRY
        if not backend and not members.any_in_service:
            if now >= self._next_last_resort and (backend := self._last_resort(())):
                self._next_last_resort = now + RETRY
            look_again = self._next_last_resort
        return backend, max(look_again, now + RETRY)


class Attempts:
    """The account of one client's attempts at backends. Made when the first one has failed, or found no backend.

    deadline: until when the client may dial.
    tried: the backends that failed since the client last waited.
    used: attempts that count for `retries`: those at backends that were in service.
    """

    def __init__(self, pool: Pool, config: ProxyConfig, caller: Caller, began: float) -> None:
        self._pool, self._config, self._caller = pool, config, caller
        self._loop, self._began = caller.client.loop, began
        self._give_up = 0.0  # until when it waits in the queue; 0 before
        self._reasons: list[str] = []
        self._cause: Cause = "backend-unreachable"
        self.deadline = began + config.connect_timeout
        self.tried: list[Backend] = []
        self.used = 0

    def failed(self, backend: Backend, retry_at: float, where: object, error: OSError) -> Backend | None:
        """An attempt failed: the backend to dial next, or None if there is none now, or no attempt is left.

        retry_at: the backend's when the attempt began. where: the address that was dialled.
        Raises DialError if the client has gone.
        """
        now, aborted = self._loop.now, self._caller.client.aborted
        reasons = error.reasons if isinstance(error, UnreachableError) else [f"{where}: {why(error)}"]
        self._reasons += reasons
        if aborted or is_own_fault(error):
            backend.no_verdict(now, retry_at)
        else:
            backend.failed(now, why(error))
        if aborted:
            raise DialError("client-aborted", self._reasons) from None
        client, reason = format_peer(self._caller.client_address), quote("; ".join(reasons))
        log.debug("backend not reached client=%s%s backend=%s reason=%s", client, self._pool.tag, backend.name, reason)
        self._cause = cause_of(error)
        self.tried.append(backend)
        self.used += retry_at == inf
        over = self.used > self._config.retries or now >= self.deadline
        return None if over else self._pool.choose(self._caller.client_address, self.tried)

    async def wait_for_backend(self) -> Backend:
        """Wait until the client gets a backend. No backend counts as tried then. Raises DialError."""
        loop, pool, members, client = self._loop, self._pool, self._pool.members, self._caller.client
        address = self._caller.client_address
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
        try:
            backend = await pool.queue.wait(self._began, self._give_up, client, lambda: pool.ask(address))
        except ConnectionAbortedError:
            raise DialError("client-aborted", []) from None
        except TimeoutError:
            reasons = self._reasons if members.any_in_service and self._reasons else [situation(members.everyone)]
            raise DialError("queue-timeout", reasons) from None
        patience = inf if members.any_in_service else self._give_up
        self.deadline = min(loop.now + self._config.connect_timeout, patience)
        self._reasons.clear()
        self.tried, self.used = [], 0
        return backend

    def _patience(self) -> float:
        """How many seconds the client may wait for a backend."""
        config = self._pool.config
        others = [backend for backend in self._pool.members.by_name.values() if backend not in self.tried]
        # Each backend in service is full. A backend that is down may be full of attempts to reach it.
        full = any(one.in_service or not (one.has_room or one.unwell) for one in others)
        return config.queue_timeout or (config.connect_timeout if full else 0.0)
