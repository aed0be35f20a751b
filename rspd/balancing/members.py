"""The backends of a proxy: which there are, the state of each, and which is next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from functools import partial
from math import inf
from typing import Any

from rspd.balancing.backend import Backend
from rspd.balancing.discovery import KINDS, Source
from rspd.balancing.health import Checker
from rspd.balancing.policies import POLICIES, Policy
from rspd.engine.loop import Loop, Task
from rspd.engine.side import Side
from rspd.log import quote
from rspd.net.address import Address, Peer, host_of
from rspd.net.connect import connect, connect_to_one_of, why
from rspd.net.descriptors import Shortage
from rspd.net.networks import client_key
from rspd.net.resolver import Resolver
from rspd.net.ways import Way, Ways
from rspd.protocols.proxy_protocol import encode
from rspd.settings import ProxyConfig

# How many backends that are down are tried for one client.
LAST_RESORTS = 10

# How many backends a line of the log names with the reason why each is down.
REASONS_MAX = 3

log = logging.getLogger(__name__)


class Backends:
    """The backends of a proxy that are configured and whose addresses are known. Owns health checks and lookups.

    config: the proxy's configuration in force.
    members: each backend by its name, in the order of the configuration.
    only: the lone member, while it is up and has no limit, so that there is nothing to choose; else None.
    on_room: called after a change by which a backend may get connections, now or soon. The dialler sets it.
    """

    def __init__(
        self,
        loop: Loop,
        config: ProxyConfig,
        resolver: Resolver,
        shortage: Shortage,
        on_down: Callable[[Backend], object] = lambda _: None,
        on_change: Callable[[], object] = lambda: None,
        ways: Ways | None = None,
    ) -> None:
        """on_down: called when a backend goes down, after the first waiting client was woken to take another.

        on_change: called when `describe` may say something else.
        """
        self._loop = loop
        self._resolver = resolver
        self._ways = ways
        self._shortage = shortage
        self._on_down = on_down
        self._on_change = on_change
        self._tag = f" proxy={config.name}" if config.name else ""
        self._sources: dict[Address, Source] = {}
        self.members: dict[str, Backend] = {}
        self._left: dict[str, Backend] = {}  # no members any more; their connections count if they return
        self.config = config
        self._policies = _policies(config)
        self._up = [0, 0]  # how many are up that are no spares, and how many spares
        self._out: list[Backend] = []  # of service after a failure; the next to be tried at the front
        self.only: Backend | None = None
        self.on_room: Callable[[], object] = lambda: None
        self._learning: set[Task] = set()  # tasks that wait until there is a member
        self._stopped = False
        self.apply(config)

    # For the proxy

    def apply(self, config: ProxyConfig) -> None:
        """Go by another configuration. Backends that stay keep their state; the others keep their connections."""
        if config.balance != self.config.balance:
            self._policies = _policies(config)
            for backend in self.members.values():
                backend.eligible = False
        self.config = config
        for backend in self._out:
            backend.out_until = min(backend.out_until, self._loop.now + config.fail_timeout)
        kinds = {one.address: next(kind for kind in KINDS if kind.takes(one.address)) for one in config.backends}
        asking = max(1, sum(kind.asks for kind in kinds.values()))
        for address in self._sources.keys() - kinds:
            self._sources.pop(address).stop()
        for address, kind in kinds.items():
            if address not in self._sources:
                part = (sum(source.asks for source in self._sources.values()) + 1) / asking
                self._sources[address] = kind(
                    self._loop, self._resolver, self._shortage, address, part, self._tag, self._set_members
                )
            self._sources[address].ask_every(config.resolve_interval)
        self._set_members()

    def stop(self) -> None:
        """End all health checks and lookups. Connections go on, and may still be released."""
        self._stopped = True
        for source in self._sources.values():
            source.stop()
        for backend in self.members.values():
            backend.stop_checking()

    def describe(self) -> str:
        """Which backends there are, and which are down, for people."""
        members = list(self.members.values())
        down = [f"{backend.name} down: {backend.why_down}" for backend in members if not backend.up]
        if not members:
            return "no backend known yet"
        if len(members) == 1:
            return f"backend {down[0] if down else members[0].name}"
        which = f" ({_first(down)})" if down else ""
        return f"{len(members) - len(down)} of {len(members)} backends up{which}"

    # For the dialler

    @property
    def next_trial(self) -> float:
        """When the next backend that is out of service is to be tried, by the loop's time; inf if none is out."""
        return self._out[0].out_until if self._out else inf

    @property
    def any_up(self) -> bool:
        """Whether some backend is in service."""
        return any(self._up)

    def choose(self, address: Peer, tried: Collection[Backend]) -> Backend | None:
        """A backend that may get a connection now, and was not tried for this client; None if there is none.

        address: the client's, as accept(2) returns it.
        """
        if self._out and self._out[0].out_until <= self._loop.now and (backend := self._due_for_trial(tried)):
            return backend
        if not tried and self.any_up:
            policy = self._policies[not self._up[0]]
            return policy.pick(client_key(host_of(address)) if policy.by_client else "")
        return self._choose_in_trouble(client_key(host_of(address)), tried)

    def _due_for_trial(self, tried: Collection[Backend]) -> Backend | None:
        """A backend whose time out of service is over: this client tries it. A spare only while no other is up."""
        due = [backend for backend in self._out if backend.out_until <= self._loop.now and not backend.full]
        # If this client's attempt came to no verdict, the backend stays due: the next client tries it.
        left = [backend for backend in due if backend not in tried]
        for backend in sorted(left, key=lambda backend: backend.backup):
            self._put_out(backend)  # no other client tries it meanwhile, or nobody does for now
            if backend.healthy and not (backend.backup and self._up[0]):
                return backend
        return None

    def _choose_in_trouble(self, who: str, tried: Collection[Backend]) -> Backend | None:
        for backup in (False, True):
            if found := self._policies[backup].pick_other(who, tried):
                return found
            kind = [backend for backend in self.members.values() if backend.backup is backup]
            if any(backend.up and backend not in tried for backend in kind):
                break  # these are only full: clients wait for them, and the spares are not used
        if self.any_up or (self.config.queue_timeout and not tried) or len(tried) >= LAST_RESORTS:
            return None  # this client waits, or the next client tries other backends
        return self.last_resort(tried)

    def last_resort(self, tried: Collection[Backend]) -> Backend | None:
        """Of the backends that failed, the one that was tried longest ago; spares last."""
        left = [backend for backend in self._out if backend.healthy and not backend.full and backend not in tried]
        backend = min(left, key=lambda backend: backend.backup, default=None)
        if backend:
            self._put_out(backend)  # the next client tries another: this one may be silent for long
        return backend

    def update(self, backend: Backend) -> None:
        """Let the policy know whether a backend may get connections."""
        eligible = backend.member and backend.up and not backend.full
        if eligible is not backend.eligible:
            backend.eligible = eligible
            if eligible:
                backend.policy.add(backend)
            else:
                backend.policy.remove(backend)
        if len(self.members) == 1:
            (only,) = self.members.values()
            self.only = only if only.eligible and only.limit == inf else None
        else:
            self.only = None
        self.on_room()

    def release(self, backend: Backend) -> None:
        """A connection to this backend has ended."""
        backend.open -= 1
        policy = backend.policy
        if policy.counting:
            policy.ended(backend)
        if backend.open + 1 == backend.limit:
            self.update(backend)

    async def reach(self, backend: Backend, deadline: float, client: Side | None, way: Way | None = None) -> Side:
        """Connect to a backend that may have several addresses, or none yet. Raises OSError (see net/connect)."""
        if len(backend.addresses) == 1:
            return await connect(self._loop, self._shortage, backend.addresses[0], deadline, client, way)
        # The wait may outlast the backend's configuration: then nobody sets `backend.addresses`. So use the answer.
        addresses = backend.addresses or await backend.source.first_answer(
            deadline, lambda: client is not None and client.aborted
        )
        return await connect_to_one_of(self._loop, self._shortage, addresses, deadline, client, way)

    def failed(self, backend: Backend, error: OSError) -> None:
        """Connecting to a backend failed."""
        if not backend.member:
            return
        backend.source.refresh()
        was_up = backend.up
        if not backend.out_until:
            now = self._loop.now
            failures = backend.failures
            failures.append(now)
            while failures[0] < now - self.config.fail_timeout:
                failures.popleft()
            if len(failures) < self.config.max_fails:
                return
        self._put_out(backend)
        if backend.checker:
            backend.checker.doubt()  # good checks bring it back, maybe sooner than `fail_timeout`
        if was_up:
            self._gone_down(backend, why(error))
            if not self.config.health:
                self._on_down(backend)

    def no_verdict(self, backend: Backend, out_until: float) -> None:
        """An attempt to reach a backend came to no verdict. If it was a trial, the next client tries the backend.

        out_until: the backend's when the attempt began. If the backend's has changed since, another client has tried.
        """
        if out_until and backend.out_until == out_until:  # so it is still a member
            self._out.remove(backend)
            self._out.insert(0, backend)
            backend.out_until = self._loop.now

    def reached(self, backend: Backend) -> None:
        """A backend that was out of service can be connected to."""
        backend.out_until = 0.0
        backend.failures.clear()
        if backend in self._out:
            self._out.remove(backend)
        if backend.healthy:
            self._come_up(backend)

    def situation(self) -> str:
        """Why there is no backend to dial."""
        if self.any_up:
            return "every backend has its max_connections"
        down = [f"{backend.name} is down: {backend.why_down}" for backend in self.members.values()]
        return _first(down) or "no backend is known"

    async def learn_names(self, client: Side, deadline: float) -> list[str]:
        """Wait until the address of some backend is known. Returns why each lookup failed; nothing if one is known."""
        reasons: list[str] = []
        task = self._loop.current
        self._learning.add(task)
        try:
            for source in list(self._sources.values()):
                try:
                    await source.first_answer(deadline, lambda: client.aborted or bool(self.members))
                except OSError as error:
                    reasons.append(f"{source.address}: {why(error)}")
                if self.members:
                    return []
                if client.aborted:
                    break
        finally:
            self._learning.discard(task)
        return reasons

    # The state of each backend

    def _put_out(self, backend: Backend) -> None:
        """Out of service for `fail_timeout` from now on."""
        backend.out_until = self._loop.now + self.config.fail_timeout
        if backend in self._out:
            self._out.remove(backend)
        self._out.append(backend)

    def _checked(self, backend: Backend, healthy: bool, reason: str) -> None:
        """The verdict of a backend's checks has changed."""
        was_up = backend.up
        backend.healthy = healthy
        if healthy and not was_up:
            self.reached(backend)
        elif not healthy:
            if was_up:
                self._gone_down(backend, reason)
            # Where there are checks, only they cut open connections: one failure to connect is not reason enough.
            self._on_down(backend)

    def _gone_down(self, backend: Backend, reason: str) -> None:
        backend.down_since = self._loop.now
        backend.why_down = reason
        self._count_up()
        self.update(backend)
        log.warning("backend down%s backend=%s reason=%s", self._tag, backend.name, quote(reason))

    def _come_up(self, backend: Backend) -> None:
        self._count_up()
        self.update(backend)
        seconds = self._loop.now - backend.down_since
        log.info("backend up%s backend=%s seconds=%.3f", self._tag, backend.name, seconds)

    def _count_up(self) -> None:
        self._up = [0, 0]
        for backend in self.members.values():
            self._up[backend.backup] += backend.up
        self._on_change()

    # Which backends there are

    def _set_members(self) -> None:
        """Make the list of members from the configuration and the names. Backends that stay keep their state."""
        members: dict[str, Backend] = {}
        self._left = {name: backend for name, backend in self._left.items() if backend.open}
        for config in self.config.backends:
            source = self._sources[config.address]
            for name, addresses in source.backends(self.config.resolve == "each"):
                if name in members:
                    continue  # two names have this address
                backend = self.members.pop(name, None) or self._left.pop(name, None) or Backend(config, name)
                backend.source, backend.addresses = source, addresses
                if backend.config != config and backend.eligible:
                    backend.policy.remove(backend)
                    backend.eligible = False
                backend.configure(config)
                backend.policy = self._policies[config.backup]
                members[name] = backend
        leaving, self.members = self.members, members
        for backend in leaving.values():
            self._leave(backend)
        self._left.update(leaving)
        for number, backend in enumerate(members.values(), 1):
            backend.member = True
            self._check(backend, number / len(members))
        self._count_up()
        for backend in members.values():
            self.update(backend)
        for task in self._learning:
            task.wake()

    def _leave(self, backend: Backend) -> None:
        backend.member = False
        backend.stop_checking()
        if backend in self._out:
            self._out.remove(backend)
            backend.out_until = 0.0
        log.info("backend taken out%s backend=%s connections=%d", self._tag, backend.name, backend.open)
        backend.failures.clear()
        backend.healthy = True  # if it returns, it is healthy until a check says otherwise
        self.update(backend)

    # Checking them

    def _check(self, backend: Backend, part: float) -> None:
        """Have a backend checked as the configuration says.

        part: of the interval, from the first check to the second, so that not all backends are checked at once.
        """
        config = self.config.health
        preface = encode(self.config.send_proxy, None, None) if self.config.send_proxy else b""
        if (config, preface) == backend.checked_by or self._stopped:
            return
        backend.stop_checking()
        backend.checked_by = (config, preface)
        if config is None:
            if not backend.healthy:
                self._checked(backend, True, "")
            return

        ways = self._ways
        way = Way(ways, (self.config.name,)) if ways else None

        def reach(deadline: float) -> Coroutine[Any, Any, Side]:
            if way:
                way.end()  # the way of the check before
            may_return = ways and ways.may_return(backend.address)
            return self.reach(backend, deadline, None, way if may_return else None)

        report = partial(self._checked, backend)
        first = config.interval * part
        backend.checker = Checker(self._loop, config, reach, str(backend.address), preface, first, report)


def _first(reasons: Sequence[str]) -> str:
    """The first reasons, and how many more there are."""
    more = [f"and {len(reasons) - REASONS_MAX} more"] if len(reasons) > REASONS_MAX else []
    return "; ".join([*reasons[:REASONS_MAX], *more])


def _policies(config: ProxyConfig) -> tuple[Policy[Backend], Policy[Backend]]:
    """The policy that chooses among the backends, and the one that chooses among the spares."""
    policy = POLICIES[config.balance]
    return policy(), policy()
