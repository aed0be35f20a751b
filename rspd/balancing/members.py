"""Which backends a pool has. What changes with the state of each: from which to choose, and what the log says."""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from math import inf
from operator import attrgetter
from typing import Any

from rspd.balancing.backend import IN_SERVICE, Backend, State, Tier
from rspd.balancing.discovery import Source, in_order, kind_of
from rspd.balancing.health import Checker
from rspd.engine.loop import Loop, Task
from rspd.engine.side import Handed, Side
from rspd.log import quote
from rspd.net.address import Address, SocketAddress, at_port
from rspd.net.connect import connect, connect_to_one_of, why
from rspd.net.descriptors import Shortage
from rspd.net.resolver import Resolver
from rspd.net.ways import Way, Ways
from rspd.settings import HealthConfig, ProxyConfig

log = logging.getLogger(__name__)


class Members:
    """The backends of a pool: those of the configuration. Owns their sources and health checks.

    by_name: each of them by its name, in the order of the configuration.
    regular, spares: the two tiers that they are in.
    only: the one member, if it is up and has no limit: there is nothing to choose. Else None.
    trials: those with a finite `retry_at`, sorted by it.
    """

    def __init__(
        self,
        loop: Loop,
        shortage: Shortage,
        resolver: Resolver,
        ways: Ways,
        tag: str,
        on_room: Callable[[], object],
        on_down: Callable[[Backend], object],
        on_change: Callable[[], object],
    ) -> None:
        """tag: names the proxy in the log, with a space before it, or is empty.

        on_room: called when a backend may get connections, now or soon, and when none may any more.
        on_down: called after `on_room` when a backend has gone down.
        on_change: called when `describe` may say something else.
        """
        self._loop = loop
        self._shortage = shortage
        self._resolver = resolver
        self._ways = ways
        self._tag = tag
        self._on_room = on_room
        self._on_down = on_down
        self._on_change = on_change
        self._sources: dict[Address, Source] = {}  # by the addresses of the configuration; some may share one
        self.by_name: dict[str, Backend] = {}
        self._left: dict[str, Backend] = {}  # taken out; their connections count if they return
        self.only: Backend | None = None
        self.trials: list[Backend] = []
        self._balance = ""
        self._learning: set[Task] = set()  # tasks that wait until there is a member
        self._stopped = False

    def apply(self, config: ProxyConfig, preface: bytes) -> None:
        """Go by another configuration. Backends that stay keep their state; the others keep their connections.

        preface: what each check sends first.
        """
        if config.balance != self._balance:
            self._balance = config.balance
            self.regular, self.spares = Tier(config.balance), Tier(config.balance)
        self._config = config
        self._preface = preface
        checks = [health for one in config.backends if (health := config.health_of(one))]
        asked = [health.address for health in checks if health.address]
        self._set_sources([one.address for one in config.backends] + asked, config.resolve_interval)
        self._set_members()

    def stop(self) -> None:
        """End all health checks and lookups. Connections go on, and may still end."""
        self._stopped = True
        for source in self._sources.values():
            source.stop()
        for backend in self.by_name.values():
            backend.stop_checking()

    @property
    def everyone(self) -> list[Backend]:
        """The backends, in the order of the configuration."""
        return list(self.by_name.values())

    @property
    def any_in_service(self) -> bool:
        """Whether some backend is in service."""
        return bool(self.regular.in_service or self.spares.in_service)

    @property
    def next_trial(self) -> float:
        """When the next backend is due, by the loop's time; inf if none will be."""
        return self.trials[0].retry_at if self.trials else inf

    async def reach(self, backend: Backend, deadline: float, client: Side | None, way: Way | None) -> Side:
        """Connect to a backend that may have several addresses, or none yet. The caller closes the side.

        Raises OSError, as `connect` and `connect_to_one_of` do.
        """
        if len(backend.addresses) == 1:
            return await connect(self._loop, self._shortage, backend.addresses[0], deadline, client, way)
        addresses = backend.addresses
        if not addresses:
            answer = await backend.source.first_answer(
                backend.address, deadline, lambda: client is not None and client.aborted
            )
            # A reload may take the backend out meanwhile: then nobody sets `backend.addresses`.
            addresses = backend.addresses or answer
        return await connect_to_one_of(self._loop, self._shortage, addresses, deadline, client, way)

    async def learn(self, client: Side, deadline: float) -> list[str]:
        """Wait until some backend is known. Returns why each source knows none; an empty list if one is known."""
        reasons: list[str] = []
        task = self._loop.current
        self._learning.add(task)
        try:
            for address, source in [(one.address, self._sources[one.address]) for one in self._config.backends]:
                try:
                    await source.first_answer(address, deadline, lambda: client.aborted or bool(self.by_name))
                except OSError as error:
                    reasons.append(f"{address}: {why(error)}")
                if self.by_name:
                    return []
                if client.aborted:
                    break
        finally:
            self._learning.discard(task)
        return reasons

    # Handover

    def find(self, name: str) -> Backend:
        """The backend with a name. One that is no member, as a connection of the process before has it, is made."""
        if name not in self.by_name and name not in self._left:
            backend = self._left[name] = Backend(name, self._changed)
            backend.tier, backend.limit = self.regular, inf
        return self.by_name.get(name) or self._left[name]

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process: what is known of names, and of backends. No name is a key."""
        sources = [source for source in self._sources.values() if source.asks]
        names = [(source.origin.host, source.addresses(source.origin)) for source in sources]
        return {"names": names, "backends": [(name, backend.hand_over()) for name, backend in self.by_name.items()]}

    def resume(self, handed: Handed, same: bool = True) -> None:
        """Go on with what the process before knew of these names, and backends. To be called before any client comes.

        same: whether it knew it of this pool, and not of another one.
        """
        names = dict(handed.get("names", ()))
        for source in dict.fromkeys(self._sources.values()):
            if known := names.get(source.origin.host):
                source.resume([SocketAddress(family, tuple(address)) for family, address in known])
        for name, known in handed.get("backends", ()):
            if name in self.by_name:
                self.by_name[name].resume(known, same)
        self._find_only()

    # Who they are

    def _set_sources(self, addresses: Sequence[Address], interval: float) -> None:
        """Have a source for each address. Those that asked before go on, and know what they know."""
        kinds = {address: kind_of(address) for address in addresses}
        origins = {kind.origin_of(address): kind for address, kind in kinds.items()}
        asking = max(1, sum(kind.asks for kind in origins.values()))
        sources = {source.origin: source for source in self._sources.values()}
        for origin in sources.keys() - origins:
            sources.pop(origin).stop()
        for origin, kind in origins.items():
            if origin not in sources:
                part = (sum(source.asks for source in sources.values()) + 1) / asking
                sources[origin] = kind(
                    self._loop, self._resolver, self._shortage, origin, part, self._tag, self._set_members
                )
            sources[origin].ask_every(interval)
        self._sources = {address: sources[kind.origin_of(address)] for address, kind in kinds.items()}

    def _set_members(self) -> None:
        """Make the list of members from the configuration and the sources."""
        config = self._config
        members: dict[str, Backend] = {}
        self._left = {name: backend for name, backend in self._left.items() if backend.open}
        for wanted in config.backends:
            source = self._sources[wanted.address]
            tier = self.spares if wanted.backup else self.regular
            for name, addresses in source.backends(wanted.address, config.resolve == "each"):
                if name in members:
                    continue  # two names have this address
                backend = self.by_name.pop(name, None) or self._left.pop(name, None) or Backend(name, self._changed)
                backend.configure(wanted, config, tier, self._loop.now)
                if addresses and not backend.addresses:
                    backend.forgive()
                backend.source, backend.addresses = source, in_order(backend.addresses, addresses)
                members[name] = backend
        self.trials.sort(key=attrgetter("retry_at"))  # `configure` may have changed it
        leaving, self.by_name = self.by_name, members
        for backend in leaving.values():
            backend.stop_checking()
            backend.retire()
            log.info("backend taken out%s backend=%s connections=%d", self._tag, backend.name, backend.open)
        self._left.update(leaving)
        for number, backend in enumerate(members.values(), 1):
            self._check(backend, number / len(members))
        for backend in members.values():
            backend.join()
        self._find_only()
        self._on_change()
        self._on_room()
        for task in self._learning:
            task.wake()

    def _check(self, backend: Backend, part: float) -> None:
        """Have a backend checked as the configuration says.

        part: the share of the interval before the second check. It differs, so that the checks are spread.
        """
        health = self._config.health_of(backend.config)
        # Another port or address does not expect the PROXY header.
        preface = b"" if health and health.elsewhere else self._preface
        if (health, preface) == backend.checked_by or self._stopped:
            return
        backend.stop_checking()
        backend.checked_by = (health, preface)
        if health is None:
            if backend.unwell:
                backend.found_well()
            return
        target = health.target(backend.address)
        way = Way(self._ways, (self._config.name,))
        asked: list[SocketAddress] = []  # elsewhere, the one that was reached at the front

        def reach(deadline: float) -> Coroutine[Any, Any, Side]:
            way.end()  # the way of the check before
            watched = way if self._ways.may_return(target) else None
            if health.elsewhere:
                return self._reach_elsewhere(backend, health, asked, deadline, watched)
            return self.reach(backend, deadline, None, watched)

        report = partial(self._checked, backend)
        first = health.interval * part
        backend.checker = Checker(self._loop, health, reach, str(target), preface, first, backend.checks, report)

    async def _reach_elsewhere(
        self, backend: Backend, health: HealthConfig, asked: list[SocketAddress], deadline: float, way: Way | None
    ) -> Side:
        """Connect to the port or address that `health` names. Raises as `reach` does. asked: kept between checks."""
        if health.address:
            source, address = self._sources[health.address], health.address
            known = source.addresses(address)
        else:
            source, address, known = backend.source, backend.address, backend.addresses
        found = known or await source.first_answer(address, deadline, lambda: False)
        asked[:] = in_order(asked, [at_port(where, health.target(backend.address).port) for where in found])
        return await connect_to_one_of(self._loop, self._shortage, asked, deadline, None, way)

    # What follows from their states

    def _checked(self, backend: Backend, well: bool, reason: str) -> None:
        """The verdict of a backend's checks has changed."""
        if well:
            backend.found_well()
        else:
            backend.found_unwell(self._loop.now, reason)
            # With checks, one failure to connect cuts no open connection. A bad verdict does.
            self._on_down(backend)

    def _changed(self, backend: Backend, before: State) -> None:
        """The state of a backend has changed, or when it is to be tried again."""
        was, is_now = before in IN_SERVICE, backend.state in IN_SERVICE
        if was and is_now:
            if backend.state == "up":
                self._on_room()
            return
        if backend in self.trials:
            self.trials.remove(backend)
        if backend.retry_at < inf:
            insort(self.trials, backend, key=attrgetter("retry_at"))
        if was is not is_now:
            backend.since = self._loop.now
            self._find_only()
            self._on_room()
            self._on_change()
            self._tell(backend, before)

    def _tell(self, backend: Backend, before: State) -> None:
        if backend.state == "down":
            log.warning("backend down%s backend=%s reason=%s", self._tag, backend.name, quote(backend.why_down))
            if not backend.checker:
                self._on_down(backend)
        elif backend.in_service and before != "gone":
            seconds = self._loop.now - backend.down_since
            log.info("backend up%s backend=%s seconds=%.3f", self._tag, backend.name, seconds)

    def _find_only(self) -> None:
        self.only = None
        if len(self.by_name) == 1:
            (only,) = self.by_name.values()
            if only.state == "up" and only.limit == inf:
                self.only = only
