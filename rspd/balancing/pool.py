"""The pool: the one door to the backends of a proxy, for who dials, and for who says which they are."""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable, Collection, Sequence
from math import inf

from rspd.balancing.backend import Backend
from rspd.balancing.members import Members
from rspd.engine.cause import Cause
from rspd.engine.loop import Loop, Task, news
from rspd.engine.side import Side
from rspd.log import quote
from rspd.net.address import Peer, host_of
from rspd.net.connect import UnreachableError, cause_of, connect, is_own_fault, share, why
from rspd.net.descriptors import Shortage
from rspd.net.networks import client_key
from rspd.net.resolver import Resolver
from rspd.net.ways import Way, Ways
from rspd.settings import ProxyConfig

# Seconds between two attempts at backends that are down while clients wait for one of them.
RETRY = 0.1

# The time that is left for a client is divided among so many attempts at most, however many backends there are.
SHARES_MAX = 3

# How many backends that are down are tried for one client.
LAST_RESORTS = 10

log = logging.getLogger(__name__)


class DialError(Exception):
    """No backend was reached. `cause` is that of the last attempt; the text has the reason of each attempt."""

    def __init__(self, cause: Cause, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.cause = cause


class Pool:
    """The backends that a proxy chooses from, and the clients that wait for one.

    config: the proxy's configuration in force.
    members: the backends.
    """

    def __init__(
        self,
        loop: Loop,
        shortage: Shortage,
        resolver: Resolver,
        ways: Ways,
        config: ProxyConfig,
        preface: bytes,
        on_down: Callable[[Backend], object],
        on_change: Callable[[], object],
    ) -> None:
        """on_down, on_change: as for `Members`."""
        tag = f" proxy={config.name}" if config.name else ""
        self._loop = loop
        self._shortage = shortage
        self._waiting: list[tuple[float, Task]] = []  # sorted by when dialling began
        self.members = Members(loop, shortage, resolver, ways, tag, self._wake_first, on_down, on_change)
        self._next_last_resort = 0.0
        self.apply(config, preface)

    def apply(self, config: ProxyConfig, preface: bytes) -> None:
        """Go by another configuration. Backends that stay keep their state; the others keep their connections.

        preface: what a check of a backend says first.
        """
        self.config = config
        self.members.apply(config, preface)

    def describe(self) -> str:
        """Which backends there are, and which are down, for people."""
        return self.members.describe()

    def stop(self) -> None:
        """End all health checks and lookups. Connections go on, and are still to be released."""
        self.members.stop()

    async def dial(self, client: Side, address: Peer, way: Way | None = None) -> tuple[Backend, Side]:
        """Connect to the next backend that can be reached. Returns it and its side, watched by the running task.

        client: when it aborts, dialling ends.
        address: the client's, as accept(2) returns it.
        way: see `connect`.
        The connection counts as open until `release`. Raises DialError.
        """
        loop, members, config = self._loop, self.members, self.config
        began = loop.now
        deadline = began + config.connect_timeout
        give_up = 0.0  # when to leave the queue, once in it
        tried: list[Backend] = []
        used = 0  # attempts that count towards `retries`; those at a backend that is out do not
        reasons: list[str] = []
        cause: Cause = "backend-unreachable"
        must_wait = self._waiting and members.any_serving
        backend = members.only or (None if must_wait else self.choose(address, tried))
        while True:
            if backend is None:
                if not members.by_name and not reasons:
                    cause = "backend-unknown"
                    reasons += await members.learn(client, deadline)
                    backend = self.choose(address, tried)
                    continue
                if client.aborted:
                    raise DialError("client-aborted", reasons)
                if give_up and loop.now >= give_up:
                    raise DialError("queue-timeout", reasons)
                give_up = give_up or loop.now + self._patience(tried)
                if loop.now >= give_up or (used > config.retries and members.any_serving):
                    raise self._nobody(cause, reasons)
                if tried:
                    await loop.sleep(RETRY)
                backend = await self._wait(client, address, began, give_up)
                deadline = loop.now + config.connect_timeout
                if not members.any_serving:
                    deadline = min(deadline, give_up)
                tried.clear()
                used = 0
                reasons.clear()
            addresses, retry_at = backend.addresses, backend.retry_at
            backend.enter()
            try:
                until = deadline if members.only else self._share(deadline, tried, used)
                if len(addresses) == 1:
                    side = await connect(loop, self._shortage, addresses[0], until, client, way)
                else:
                    side = await members.reach(backend, until, client, way)
            except OSError as error:
                backend.leave()
                reasons += _reasons(addresses[0] if addresses else backend.address, error)
                if client.aborted or is_own_fault(error):
                    backend.no_verdict(loop.now, retry_at)
                else:
                    backend.failed(loop.now, why(error))
                if client.aborted:
                    raise DialError("client-aborted", reasons) from None
                log.debug("backend not reached backend=%s reason=%s", backend.name, quote(reasons[-1]))
                cause = cause_of(error)
                tried.append(backend)
                used += retry_at == inf
                another = used <= config.retries and loop.now < deadline
                backend = self.choose(address, tried) if another else None
            except BaseException:
                backend.leave()
                backend.no_verdict(loop.now, retry_at)
                raise
            else:
                if backend.retry_at < inf:
                    backend.reached()
                return backend, side

    # A connection that was dialled has ended. Not a method of its own, which would be one more call a connection.
    release = staticmethod(Backend.leave)

    def _share(self, deadline: float, tried: Collection[Backend], used: int) -> float:
        """Until when an attempt may last, so that time is left for other attempts."""
        attempts = min(len(self.members.by_name) - len(tried), self.config.retries + 1 - used, SHARES_MAX)
        return share(self._loop.now, deadline, max(1, attempts))

    def _patience(self, tried: Collection[Backend]) -> float:
        """How many seconds a client may wait for a backend."""
        others = [backend for backend in self.members.by_name.values() if backend not in tried]
        # Every backend that is in service is full. One that is down may be full of attempts to reach it.
        full = any(one.serving or not (one.has_room or one.unwell) for one in others)
        return self.config.queue_timeout or (self.config.connect_timeout if full else 0.0)

    # Choosing

    def choose(self, address: Peer, tried: Collection[Backend]) -> Backend | None:
        """A backend that may get a connection now, and was not tried for this client; None if there is none."""
        members = self.members
        if members.trials and members.trials[0].retry_at <= self._loop.now and (backend := self._due(tried)):
            return backend
        if not tried and members.any_serving:
            policy = (members.regular if members.regular.serving else members.spares).policy
            return policy.pick(client_key(host_of(address)) if policy.by_client else "")
        return self._choose_in_trouble(client_key(host_of(address)), tried)

    def _due(self, tried: Collection[Backend]) -> Backend | None:
        """A backend whose time out of service is over: this client tries it. A spare only while no other is up."""
        members, now = self.members, self._loop.now
        # If this client's attempt came to no verdict, the backend stays due: the next client tries it.
        due = [one for one in members.trials if one.retry_at <= now and one.has_room and one not in tried]
        for backend in sorted(due, key=lambda one: one.tier is members.spares):
            if backend.tier is members.regular or not members.regular.serving:
                backend.try_out(now)
                return backend
            backend.put_off(now)
        return None

    def _choose_in_trouble(self, who: str, tried: Collection[Backend]) -> Backend | None:
        members = self.members
        for tier in (members.regular, members.spares):
            if found := tier.policy.pick_other(who, tried):
                return found
            if any(one.serving and one.tier is tier and one not in tried for one in members.by_name.values()):
                break  # these are only full: clients wait for them, and the spares are not used
        if members.any_serving or (self.config.queue_timeout and not tried) or len(tried) >= LAST_RESORTS:
            return None  # this client waits, or the next client tries other backends
        return self._last_resort(tried)

    def _last_resort(self, tried: Collection[Backend]) -> Backend | None:
        """Of the backends that failed, the one that was tried longest ago; spares last."""
        members = self.members
        left = [backend for backend in members.trials if backend.has_room and backend not in tried]
        backend = min(left, key=lambda one: one.tier is members.spares, default=None)
        if backend:
            backend.try_out(self._loop.now)  # the next client tries another: this one may be silent for long
        return backend

    async def _wait(self, client: Side, address: Peer, began: float, until: float) -> Backend:
        """Wait in the queue until there is a backend to dial; clients that began earlier go first. Raises DialError."""
        loop, members = self._loop, self.members
        task = loop.current
        place = (began, task)
        insort(self._waiting, place, key=lambda other: other[0])
        try:
            while True:
                if client.aborted:
                    raise DialError("client-aborted", [])
                task.wake_at(until)
                if self._waiting[0] is place:
                    if backend := self.choose(address, ()):
                        return backend
                    look_again = members.next_trial
                    if not members.any_serving:
                        if loop.now >= self._next_last_resort and (backend := self._last_resort(())):
                            self._next_last_resort = loop.now + RETRY
                            return backend
                        look_again = self._next_last_resort
                    task.wake_at(min(until, max(look_again, loop.now + RETRY)))
                if loop.now >= until:
                    raise DialError("queue-timeout", [members.situation()])
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
        return DialError("backend-down", [self.members.situation()])


def _reasons(where: object, error: OSError) -> list[str]:
    return error.reasons if isinstance(error, UnreachableError) else [f"{where}: {why(error)}"]
