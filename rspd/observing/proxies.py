"""Proxies, routes, pools and backends as they are."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rspd import snapshot
from rspd.balancing.backend import Backend
from rspd.balancing.pool import Pool
from rspd.engine.loop import Loop
from rspd.observing.samples import Everyone, Sampler
from rspd.routing.router import Route
from rspd.snapshot import Checks, Listener


def proxies(everyone: Everyone, sampler: Sampler, loop: Loop) -> Iterator[snapshot.Proxy]:
    """The proxies: those that are configured, those that were taken out, and those that have only counts left.

    The counts of a name are in its first entry.
    """
    told = set()
    for proxy in everyone.everyone():
        name = proxy.config.name
        configured = everyone.configured.get(name) is proxy
        seen = snapshot.Proxy(
            name=name,
            retired=not configured,
            listeners=tuple(
                Listener(listener.name, listener.waiting(), listener.passed or "") for listener in proxy.listeners
            ),
            open=proxy.open,
            most=proxy.config.max_connections if configured else 0,
            silent=proxy.router.silent,
            queue=0 if name in told else sampler.queued.get(name, 0),
            idle=proxy.idle,
            full_in=int(configured and proxy.open >= proxy.config.max_connections),
        )
        yield seen if name in told else _with_counts(seen, everyone, sampler, loop)
        told.add(name)
    for name in list(everyone.tallies):
        if name not in told:
            yield _with_counts(snapshot.Proxy(name=name, retired=True), everyone, sampler, loop)


def _with_counts(proxy: snapshot.Proxy, everyone: Everyone, sampler: Sampler, loop: Loop) -> snapshot.Proxy:
    tally = everyone.tallies[proxy.name]
    return proxy._replace(
        accepted=everyone.accepted(proxy.name),
        last_10s=sampler.rate(proxy.name, 10.0),
        last_minute=sampler.rate(proxy.name, 60.0),
        refused=tally.refused,
        ends=tally.ends,
        volumes=tally.volumes,
        failures=tally.failures(loop.now),
        seconds=tally.seconds.snapshot(),
        queue_seconds=tally.queue_seconds.snapshot(),
    )


class Layout(NamedTuple):
    """Which routes and pools there are, at one time. To look at all of them takes longer, and a reload may come.

    proxies: of each that is configured, its name, its routes, and its pools by name. shared: those of the whole file.
    """

    proxies: Sequence[tuple[str, Sequence[Route], Mapping[str, Pool]]]
    shared: Mapping[str, Pool]


def layout(everyone: Everyone) -> Layout:
    """As it is now."""
    routers = [(name, proxy.router) for name, proxy in everyone.configured.items()]
    own = [(name, router.routes, router.pools.by_name.copy()) for name, router in routers]
    return Layout(own, everyone.pools.by_name.copy())


def routes(layout: Layout) -> Iterator[snapshot.Route]:
    """The routes of the proxies that are configured."""
    for name, of_proxy, own in layout.proxies:
        for route in of_proxy:
            shared = bool(route.config.pool) and route.config.pool not in own
            pool = route.config.pool or _of_route(route)
            yield snapshot.Route(name, *route.names, pool, shared, route.clients)


def pools(layout: Layout) -> Iterator[tuple[snapshot.Pool, Sequence[Backend]]]:
    """The pools, each with its backends: those of each proxy, and those of the whole file."""
    for name, of_proxy, by_name in layout.proxies:
        of_routes = {f"route {route.names[1]}": route for route in of_proxy}
        for own, pool in by_name.items():
            if own in of_routes:
                route = of_routes[own]
                seen = _pool(name, _of_route(route), pool, shared=False)._replace(route=route.config.name)
                yield seen, pool.members.everyone
            elif own or pool.config.backends:
                yield _pool(name, own, pool, shared=False), pool.members.everyone
    for own, pool in layout.shared.items():
        yield _pool("", own, pool, shared=True), pool.members.everyone


def _of_route(route: Route) -> str:
    """The name, for people, of a pool that only this route has."""
    return f"route {route.config.name}"


def _pool(proxy: str, name: str, pool: Pool, shared: bool) -> snapshot.Pool:
    return snapshot.Pool(proxy, name, shared, pool.config.balance, len(pool.queue.waiting))


def backend(pool: snapshot.Pool, one: Backend, now: float) -> snapshot.Backend:
    """A backend of a pool."""
    verdicts = one.checks
    connected = one.connected.snapshot()
    return snapshot.Backend(
        proxy=pool.proxy,
        pool=pool.name,
        shared=pool.shared,
        name=one.name,
        state=one.state,
        state_age=now - one.since,
        why="" if one.in_service else one.why_down,
        backup=one.config.backup,
        weight=one.weight,
        open=one.open,
        limit=one.limit,
        chosen=connected.number,
        failed=one.failed_in_all,
        connect=connected,
        checks=Checks(verdicts.good, verdicts.bad, now - verdicts.at, not verdicts.reason, verdicts.reason)
        if one.checker and verdicts.at
        else (Checks() if one.checker else None),
        in_service_in=int(one.in_service),
        route=pool.route,
    )
