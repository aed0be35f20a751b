"""The pool: the one door to the backends of a proxy. Clients are connected through it, and configurations applied."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Collection
from math import inf

from rspd.balancing.attempts import RETRY, Attempts, Caller, Queue
from rspd.balancing.backend import Backend
from rspd.balancing.members import Members
from rspd.engine.loop import Loop
from rspd.engine.side import Handed, Side
from rspd.net.address import Peer, host_of
from rspd.net.connect import connect, share
from rspd.net.descriptors import Shortage
from rspd.net.networks import client_key
from rspd.net.resolver import Resolver
from rspd.net.ways import Ways
from rspd.settings import ProxyConfig
from rspd.snapshot import CONNECT_BOUNDS

# A client's time is divided among this number of attempts at most, whatever the number of backends.
SHARES_MAX = 3

# How many backends that are down are tried for one client.
LAST_RESORTS = 10

log = logging.getLogger(__name__)


class Opening(ABC):
    """What is said to a backend, and awaited from it, after connecting and before the relay begins."""

    preface = b""  # what a check of the backend says first

    @abstractmethod
    async def open(self, backend: Side, caller: Caller, deadline: float) -> None:
        """Say it. The running task watches both sides; if this fails, the pool closes the backend's.

        Raises TimeoutError at the deadline, another OSError if this backend will not do. Then the attempt has failed.
        """


class Pool:
    """The backends that a proxy or a route chooses from, and the clients that wait for one.

    config: the configuration in force.
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
        tag: str,
    ) -> None:
        """on_down: called when a backend has gone down whose connections are to be aborted.

        on_change, tag: as for `Members`.
        """
        self.tag = tag
        self._loop, self._shortage = loop, shortage
        self.queue = Queue(loop)

        def went_down(backend: Backend) -> None:
            if self.config.on_down == "abort":
                on_down(backend)

        self.members = Members(loop, shortage, resolver, ways, self.tag, self.queue.wake, went_down, on_change)
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

        If the task is interrupted, the caller may dial again: its time and its place in the queue go on.
        The caller closes the side, and calls `release` once. Raises DialError; then nothing is open, or counts.
        """
        loop, members = self._loop, self.members
        deadline = caller.began + self.config.connect_timeout
        backend: Backend | None = members.only
        if caller.attempts:
            deadline, backend = caller.attempts.go_on(caller)
        elif not backend and not (self.queue.waiting and members.any_in_service):
            backend = self.choose(caller.client_address, ())
        while True:
            if backend is None:
                attempts = self._attempts(caller)
                backend = await attempts.wait_for_backend(caller)
                deadline = attempts.deadline
            # All as it is now: a reload meanwhile is not for this attempt.
            addresses, retry_at, openings = backend.addresses, backend.retry_at, self._openings
            begun = loop.now
            backend.enter()
            try:
                until = deadline if members.only else self._share(deadline, caller.attempts)
                if len(addresses) == 1:
                    side = await connect(loop, self._shortage, addresses[0], until, caller.client, caller.way)
                else:
                    side = await members.reach(backend, until, caller.client, caller.way)
                if openings:
                    await self._open(openings, side, caller, until)
            except OSError as error:
                backend.leave()
                where = addresses[0] if addresses else backend.address
                backend = self._attempts(caller).failed(caller, backend, retry_at, where, error)
            except BaseException:
                backend.leave()
                backend.no_verdict(loop.now, retry_at)
                raise
            else:
                seconds, connected = loop.now - begun, backend.connected
                # As `note` does: a call would cost each connection more.
                connected.counts[bisect_left(CONNECT_BOUNDS, seconds)] += 1
                connected.total += seconds
                if backend.retry_at < inf:
                    backend.reached()
                return backend, side

    def _attempts(self, caller: Caller) -> Attempts:
        caller.attempts = caller.attempts or Attempts(self, caller)
        return caller.attempts

    def resume(self, caller: Caller, handed: Handed) -> Attempts:
        """A client's account that was handed over by the process before."""
        attempts = Attempts(self, caller)
        attempts.resume(handed)
        return attempts

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
