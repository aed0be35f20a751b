"""What several processes of one service say, as if they were one: the workers of a socket, and rspd.service."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from math import inf
from typing import TypeVar

from rspd.admin.query import Query
from rspd.snapshot import (
    BACKEND_STATES,
    Backend,
    Checks,
    Connections,
    Distribution,
    Ends,
    Failure,
    Listener,
    Pool,
    Process,
    Proxy,
    Rate,
    Refusals,
    Route,
    Snapshot,
    Volume,
)

T = TypeVar("T")


def merge(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The snapshots of several processes as one; at least one is needed.

    Counts, rates and limits are added. What cannot be added is that of the first process that has it, if nothing else
    is said at the functions below.
    """
    if len(snapshots) == 1:
        return snapshots[0]
    return Snapshot(
        _process([one.process for one in snapshots]),
        _each((one.proxies for one in snapshots), lambda proxy: proxy.name, _proxy),
        _each((one.routes for one in snapshots), lambda route: (route.proxy, route.name), _route),
        _each((one.pools for one in snapshots), lambda pool: (pool.proxy, pool.name, pool.shared), _pool),
        _each((one.backends for one in snapshots), lambda one: (one.proxy, one.pool, one.shared, one.name), _backend),
    )


def merge_connections(parts: Sequence[Connections], query: Query) -> Connections:
    """The connections of several processes, in the order that was asked for, and no more of them than that."""
    found = sorted((one for part in parts for one in part.connections), key=query.key, reverse=True)
    return Connections(
        _process([part.process for part in parts]),
        sum(part.matching for part in parts),
        tuple(found if query.limit == inf else found[: int(query.limit)]),
    )


def _each(
    lists: Iterable[Iterable[T]], key: Callable[[T], Hashable], join: Callable[[Sequence[T]], T]
) -> tuple[T, ...]:
    """Entries with the same key as one entry, in the order in which they come first."""
    alike: dict[Hashable, list[T]] = {}
    for entries in lists:
        for entry in entries:
            alike.setdefault(key(entry), []).append(entry)
    return tuple(map(join, alike.values()))


def _process(them: Sequence[Process]) -> Process:
    """Descriptors: of the process that is nearest to its limit, for each process has a limit of its own.

    Reloads and handovers: the most of any, for one command of the administrator reaches all processes.
    """
    full = max(them, key=lambda one: one.descriptors / one.descriptors_max if one.descriptors_max else 0.0)
    return them[0]._replace(
        now=max(one.now for one in them),
        service_age=max(one.service_age for one in them),
        processes=sum(one.processes for one in them),
        unanswered=tuple(dict.fromkeys(path for one in them for path in one.unanswered)),
        failure=next((one.failure for one in them if one.failure), ""),
        reloads=max(one.reloads for one in them),
        reloads_failed=max(one.reloads_failed for one in them),
        handovers=max(one.handovers for one in them),
        ending=any(one.ending for one in them),
        descriptors=full.descriptors,
        descriptors_max=full.descriptors_max,
        turns=_sum([one.turns for one in them]),
    )


def _proxy(them: Sequence[Proxy]) -> Proxy:
    """Where one process still has the proxy, it counts as configured, and what the others may still serve does not."""
    configured = [one for one in them if not one.retired]
    return (configured or them)[0]._replace(
        listeners=_each((one.listeners for one in them), lambda listener: listener.address, _listener),
        open=sum(one.open for one in them),
        most=sum(one.most for one in configured or them),
        accepted=sum(one.accepted for one in them),
        silent=sum(one.silent for one in them),
        queue=sum(one.queue for one in them),
        last_10s=_rate([one.last_10s for one in them]),
        last_minute=_rate([one.last_minute for one in them]),
        refused=_each((one.refused for one in them), lambda refusals: refusals.reason, _refusals),
        ends=_each((one.ends for one in them), lambda ends: (ends.backend, ends.cause), _ends),
        volumes=_each((one.volumes for one in them), lambda volume: volume.backend, _volume),
        failures=_each((one.failures for one in them), lambda failure: (failure.cause, failure.backend), _failure),
        seconds=_sum([one.seconds for one in them]),
        queue_seconds=_sum([one.queue_seconds for one in them]),
        full_in=sum(one.full_in for one in configured or them),
    )


def _listener(them: Sequence[Listener]) -> Listener:
    """All see the same backlog if systemd passed the socket to all; else each has its own, by reuse_port."""
    known = [one.waiting for one in them if one.waiting is not None]
    shared = any(one.passed for one in them)
    return them[0]._replace(waiting=(max(known) if shared else sum(known)) if known else None)


def _rate(them: Sequence[Rate]) -> Rate:
    return Rate(*map(sum, zip(*them, strict=True)))


def _refusals(them: Sequence[Refusals]) -> Refusals:
    return them[0]._replace(number=sum(one.number for one in them))


def _ends(them: Sequence[Ends]) -> Ends:
    return them[0]._replace(number=sum(one.number for one in them))


def _volume(them: Sequence[Volume]) -> Volume:
    return them[0]._replace(sent=sum(one.sent for one in them), received=sum(one.received for one in them))


def _failure(them: Sequence[Failure]) -> Failure:
    """The reason is that of the last failure of all."""
    last = min(them, key=lambda one: one.ago)
    return last._replace(number=sum(one.number for one in them))


def _route(them: Sequence[Route]) -> Route:
    return them[0]._replace(clients=sum(one.clients for one in them))


def _pool(them: Sequence[Pool]) -> Pool:
    return them[0]._replace(queue=sum(one.queue for one in them))


def _backend(them: Sequence[Backend]) -> Backend:
    """State and age are those of the process for which it is worst; why it is out, those of the first where it is."""
    worst = min(them, key=_badness)
    out = (one.why for one in them if not one.in_service and one.why)
    return them[0]._replace(
        state=worst.state,
        state_age=worst.state_age,
        why=next(out, worst.why),
        open=sum(one.open for one in them),
        limit=sum(one.limit for one in them),
        chosen=sum(one.chosen for one in them),
        failed=sum(one.failed for one in them),
        connect=_sum([one.connect for one in them]),
        checks=_checks([one.checks for one in them if one.checks]),
        in_service_in=sum(one.in_service_in for one in them if one.in_service),
    )


def _badness(backend: Backend) -> int:
    """A state that is not known is that of a later version; it counts as good."""
    return BACKEND_STATES.index(backend.state) if backend.state in BACKEND_STATES else len(BACKEND_STATES)


def _checks(them: Sequence[Checks]) -> Checks | None:
    """Each process checks for itself; what the last check of all has found counts."""
    if not them:
        return None
    last = min(them, key=lambda one: one.ago)
    return last._replace(good=sum(one.good for one in them), bad=sum(one.bad for one in them))


def _sum(them: Sequence[Distribution]) -> Distribution:
    """Distributions with as many buckets as the first that is known: others have other bounds, of another version."""
    known = [one for one in them if one.counts]
    alike = [one for one in known if len(one.counts) == len(known[0].counts)]
    if not alike:
        return Distribution()
    counts = tuple(map(sum, zip(*(one.counts for one in alike), strict=True)))
    return Distribution(counts, sum(one.total for one in alike))
