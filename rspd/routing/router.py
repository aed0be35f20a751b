"""The routes of a proxy at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf

from rspd.balancing.backend import Backend
from rspd.balancing.pool import Pool
from rspd.engine.loop import Task
from rspd.engine.side import Handed, Side
from rspd.log import quote
from rspd.net.address import Peer
from rspd.protocols.first import UNKNOWN, Said
from rspd.routing.heads import Head, look, readers_of
from rspd.routing.pools import Pools
from rspd.routing.table import Table
from rspd.settings import ProxyConfig, RouteConfig


class Route:
    """A route at work, until the next reload.

    names: what people call it, and its key: see `RouteConfig`.
    settings: what its connections go by. keep_alive: whether the kernel is to find out which peers are gone.
    tag: names it in the log, with a space before it.
    clients: how many have taken it so far.
    """

    __slots__ = ("clients", "config", "keep_alive", "names", "pool", "settings", "tag")

    def __init__(self, config: RouteConfig, pool: Pool, before: Route | None) -> None:
        """before: what it was until this reload."""
        self.config = config
        self.names = config.name, config.key
        self.pool = pool
        self.settings = config.settings
        self.keep_alive = inf in (config.settings.idle_timeout, config.settings.half_close_timeout)
        self.tag = f" route={quote(config.name)}"
        self.clients: int = before.clients if before else 0


class Router:
    """Where the clients of a proxy are led. Owns the pools that only this proxy has.

    pool: the one for all clients, if there are no routes.
    routes: in the order of the file; none if the proxy has none.
    refused: how many clients found no route.
    """

    def __init__(self, pools: Pools, shared: Mapping[str, Pool], tag: str) -> None:
        """pools: will be those of this proxy. shared: those of the whole file, by name. tag: names the proxy."""
        self.pools = pools
        self._shared = shared
        self._tag = tag
        self.routes: list[Route] = []
        self._listening: dict[Task, Head] = {}  # clients whose head is awaited, who has waited longest first
        self.refused = 0

    def apply(self, config: ProxyConfig) -> None:
        """Go by another configuration. Clients whose head is awaited take one of its routes."""
        heirs = _heirs(config.routes, self.routes)
        own = {"": (config, self._tag)}
        named = {route.pool for route in config.routes}
        own |= {name: (pool, f"{self._tag} pool={name}") for name, pool in config.pools if name in named}
        for route in config.routes:
            if not route.pool:
                own[_name(route)] = (route.settings, f"{self._tag} route={quote(route.name)}")
                before = heirs.get(route.key)
                if before and not before.config.pool and before.config.key != route.key:
                    self.pools.rename(_name(before.config), _name(route))
        self.pools.apply(own)
        self.pool = self.pools.by_name[""]
        self.timeout = config.first_bytes_timeout
        self._most = max(1, config.max_connections // 2)
        self._table = Table(config.routes)
        self._readers = readers_of(self._table.protocols) if self._table.looks else None
        for task, head in self._listening.items():
            head.readers = self._readers
            task.wake()
        self._give_up_surplus()
        self.routes = [Route(route, self._pool(route), heirs.get(route.key)) for route in config.routes]
        self._by_key = {route.config.key: route for route in self.routes}

    def _pool(self, route: RouteConfig) -> Pool:
        own = self.pools.by_name
        return own.get(route.pool or _name(route)) or self._shared[route.pool]

    @property
    def _every_pool(self) -> Iterable[Pool]:
        return dict.fromkeys([self.pool, *(route.pool for route in self.routes)])

    @property
    def backends(self) -> list[Backend]:
        """All that a client may get."""
        return [backend for pool in self._every_pool for backend in pool.members.everyone]

    def pool_of(self, backend: str) -> Pool:
        """The pool with a backend of this name, for a connection that has no route here; any if there is none."""
        return next((pool for pool in self._every_pool if backend in pool.members.by_name), self.pool)

    @property
    def silent(self) -> int:
        """How many clients have yet to say what they want."""
        return len(self._listening)

    def find(self, key: str) -> Route | None:
        """The route that says this of clients: see `RouteConfig.key`."""
        return self._by_key.get(key)

    def look(self, client: Side) -> Said | None:
        """What the client says first, or None if it has yet to say that. Raises as `look` of heads.py."""
        return UNKNOWN if self._readers is None else look(client, self._readers)

    async def hear(self, client: Side, head: Head) -> Said:
        """What the client says first, after `look`. Raises as `Head.hear`.

        At most half of `max_connections` are awaited: beyond that, the one that has waited longest is given up.
        """
        task = client.loop.current
        self._listening[task] = head
        head.readers = self._readers
        try:
            self._give_up_surplus()
            return await head.hear(client, looked=True)
        finally:
            self._listening.pop(task, None)

    def _give_up_surplus(self) -> None:
        while len(self._listening) > self._most:
            first = next(iter(self._listening))
            self._listening.pop(first).crowded = True
            first.wake()

    def choose(self, said: Said, client: Peer) -> Route | None:
        """The route of a client, which counts there; None if there is none. Raises HeadError."""
        number = self._table.find(said, client)
        if number is None:
            self.refused += 1
            return None
        route = self.routes[number]
        route.clients += 1
        return route

    def stop(self) -> None:
        """End all health checks and lookups of its own pools. Connections go on."""
        self.pools.stop()

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process."""
        counts = [(route.config.key, route.clients) for route in self.routes]
        handed = {**self.pools.hand_over(), "routes": counts, "no_route": self.refused}
        return {**handed, "pool": self.pool.members.hand_over()}

    def resume(self, handed: Handed) -> None:
        """Go on with what the process before knew."""
        self.pools.resume(handed)
        self.pool.members.resume(handed.get("pool", {}))
        self.refused += handed.get("no_route", 0)
        for key, clients in handed.get("routes", ()):
            if route := self._by_key.get(key):
                route.clients += clients


def _heirs(routes: Sequence[RouteConfig], before: Sequence[Route]) -> dict[str, Route]:
    """What each route, by its key, was before a reload: the one that said the same, or nearly, or had its backends."""
    heirs: dict[str, Route] = {}
    left = list(before)

    def pair(alike: Callable[[RouteConfig, RouteConfig], bool]) -> None:
        for route in (route for route in routes if route.key not in heirs):
            if found := next((old for old in left if alike(old.config, route)), None):
                heirs[route.key] = found
                left.remove(found)

    pair(lambda old, new: old.key == new.key)
    pair(lambda old, new: old.meets(new))
    pair(lambda old, new: bool(new.settings.backends) and old.settings.backends == new.settings.backends)
    return heirs


def _name(route: RouteConfig) -> str:
    """The name of the pool that only this route has; no pool with a name of its own has a blank in it."""
    return f"route {route.key}"
