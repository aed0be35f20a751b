"""What is wrong with a running rspd, and what goes on there, in one screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import inf
from typing import Any, TypeVar

from rspd.admin.query import Query
from rspd.commands import words as say
from rspd.commands.asking import look_at_connections, look_at_each, merged, parser_of, socket_of, where
from rspd.commands.troubles import by_pool, full, is_there, troubles, unserved
from rspd.errors import StartError
from rspd.parser import show
from rspd.snapshot import (
    BACKEND_STATES,
    Backend,
    Connection,
    Pool,
    Process,
    Proxy,
    Rate,
    Snapshot,
    as_json,
)

T = TypeVar("T")

DESCRIPTION = "Shows what is wrong with a running rspd, and what goes on there."

EPILOG = """\
With --check, the exit code is 0 if every proxy can serve somebody and every
process answers, else 1. A proxy can serve somebody if it listens, one of its
backends is in service, and rspd is not ending. One whose places are all taken
can: whoever waits comes next.
"""

# How many are shown at most, unless all are: troubles, and lines of each; proxies, and of each its pools, the routes,
# and the backends of a pool; and failures.
TROUBLES, ROWS, PROXIES, POOLS, ENTRIES, FAILURES = 6, 4, 4, 4, 5, 5

# Lines of a terminal, but for the shell's. There are fewer failures, down to so many, where all else leaves no room.
LINES, FAILURES_MIN = 23, 2

# In a terminal, the end of a line is cut before names are: the last column counts as at most so wide.
LAST_COLUMN = 12


def main(words: Sequence[str]) -> int:
    """Show how a running rspd is, by the words of the command line; the exit code. Raises StartError."""
    parser = parser_of("status", DESCRIPTION, EPILOG)
    parser.add_argument("--all", action="store_true", help="show every proxy, route, backend and failure")
    parser.add_argument("--check", action="store_true", help="print a line for what cannot serve, and nothing else")
    options = parser.parse_args(words)
    path = socket_of(options)
    snapshots, unanswered = look_at_each(path)
    snapshot = merged(path, snapshots, unanswered)
    failed = unserved(snapshots, unanswered) if options.check else []
    if options.json:
        show(as_json(snapshot))
    elif not options.check:
        wrong = troubles(snapshot, _idlest(path, snapshot), where(options))
        show("\n".join(page(snapshot, wrong, say.terminal_columns(), options.all)))
    elif failed:
        show("\n".join(failed))
    return 1 if failed else 0


def _idlest(path: str, snapshot: Snapshot) -> dict[str, Connection]:
    """Of each proxy with all places taken, the connection that has been silent for longest."""
    found: dict[str, Connection] = {}
    others = sum(proxy.open for proxy in snapshot.proxies if proxy.name)
    with suppress(StartError):  # it answered a moment ago; what it said is worth more than why it does not now
        for name in (proxy.name for proxy in snapshot.proxies if full(proxy, snapshot.process)):
            # An empty name asks for all connections: those of proxies that a reload has taken out may be among them.
            query = Query(proxy=name, sort="idle", limit=1 if name else 1 + others)
            for connection in look_at_connections(path, query, snapshot.process.unanswered).connections:
                if connection.proxy == name:
                    found.setdefault(name, connection)
    return found


def page(
    snapshot: Snapshot,
    wrong: Sequence[str],
    columns: int | None = None,
    everything: bool = False,
) -> list[str]:
    """What is wrong, and what goes on, in lines.

    wrong: what `troubles` says. columns: of the terminal; None: no line is cut. everything: leave nothing out.
    """
    whole = _Page(snapshot, columns, everything)
    lines = list(whole.lines(wrong))
    return [*lines, *whole.failures(LINES - len(lines))]


class _Page:
    def __init__(self, snapshot: Snapshot, columns: int | None, everything: bool) -> None:
        self._snapshot = snapshot
        self._columns = columns
        self._everything = everything
        self._backends = by_pool(snapshot)

    def lines(self, wrong: Sequence[str]) -> Iterator[str]:
        """All of it but the failures."""
        snapshot = self._snapshot
        shown, left = self._few(wrong, TROUBLES, lambda _: 0)
        for trouble in shown:
            yield from say.wrap(trouble, self._columns, inf if self._everything else ROWS)
        yield from _more(left, "trouble", "") if wrong else ["All is well."]
        yield from say.wrap(_process(snapshot.process), self._columns)
        yield from say.wrap(_so_far(snapshot), self._columns)
        proxies, left = self._few(list(filter(is_there, snapshot.proxies)), PROXIES, self._rank_of_proxy)
        for proxy in proxies:
            yield ""
            yield from self._proxy(proxy)
        yield from _more(left, "proxy", "", "proxies")
        if shared := [pool for pool in snapshot.pools if pool.shared]:
            yield from ("", "pools of the whole file")
            yield from self._pools(shared)

    def _few(self, entries: Sequence[T], limit: int, rank: Callable[[T], Any]) -> tuple[list[T], int]:
        """The entries of the lowest rank, in their order, and how many are left out."""
        if self._everything or len(entries) <= limit:
            return list(entries), 0
        kept = sorted(range(len(entries)), key=lambda index: rank(entries[index]))[: limit - 1]
        return [entries[index] for index in sorted(kept)], len(entries) - len(kept)

    def _table(
        self, rows: Sequence[Sequence[str]], right: Sequence[int] = (), names: Sequence[int] = (0,)
    ) -> list[str]:
        cells = [[say.safe(cell) for cell in row] for row in rows]
        return say.table(cells, right, self._columns, names, "  ", LAST_COLUMN)

    # Which come first, if there are too many

    def _rank_of_proxy(self, proxy: Proxy) -> tuple[bool, int]:
        own = [one for one in self._snapshot.backends if one.proxy == proxy.name and not one.shared]
        return all(one.in_service for one in own) and not full(proxy, self._snapshot.process), -proxy.open

    def _rank_of_pool(self, pool: Pool) -> tuple[bool, int]:
        own = self._backends[pool[:3]]
        return bool(own) and all(one.in_service for one in own), -sum(one.chosen for one in own)

    # What is in it

    def _proxy(self, proxy: Proxy) -> Iterator[str]:
        name = f"{say.safe(proxy.name)}: " if proxy.name else ""
        if proxy.retired:
            yield f"{name}no longer in the file, {say.counted(proxy.open, 'connection')} still open"
            return
        addresses = ", ".join(say.safe(listener.address) for listener in proxy.listeners)
        listening = f"listening on {addresses}" if addresses else "listening nowhere"
        yield say.cut(f"{name}serving {proxy.open:,} of {proxy.most:,}; {listening}", self._columns)
        rows = [("waiting", _waiting(proxy)), ("last 10 s", _rate(proxy.last_10s))]
        yield from self._table([*rows, ("last minute", _rate(proxy.last_minute))], names=())
        yield from self._routes(proxy)
        yield from self._pools([pool for pool in self._snapshot.pools if not pool.shared and pool.proxy == proxy.name])

    def _routes(self, proxy: Proxy) -> Iterator[str]:
        routes = [route for route in self._snapshot.routes if route.proxy == proxy.name]
        whole = sum(route.clients for route in routes)
        own = {pool.name for pool in self._snapshot.pools if pool.route and pool.proxy == proxy.name}
        named = any(route.pool not in own for route in routes)
        rows = [["ROUTE", "CLIENTS", "SHARE", *["POOL"] * named, "FOR"]]
        shown, left = self._few(routes, ENTRIES, lambda route: -route.clients)
        for route in shown:
            counts = [f"{route.clients:,}", say.share(route.clients, whole)]
            rows.append([route.name, *counts, *[route.pool] * named, route.says])
        yield from self._table(rows, right=(1, 2), names=(0, 3) if named else (0,)) if routes else ()
        yield from _more(left, "route")

    def _pools(self, pools: Sequence[Pool]) -> Iterator[str]:
        """Pools, each with its backends, in one table; what is left out of a pool has a line of its own there."""
        shown, left = self._few(pools, POOLS, self._rank_of_pool)
        everyone = [one for pool in shown for one in self._backends[pool[:3]]]
        last = ""
        if any(one.checks for one in everyone):
            last = "LAST CHECK"
        elif not all(one.in_service for one in everyone):
            last = "WHY"
        head = ["STATE", "FOR", "OPEN", "SHARE", "CONNECT P50/P99", last]
        rows: list[list[str]] = []
        left_out: dict[int, list[str]] = {}  # by the row before it
        for pool in shown:
            backends = self._backends[pool[:3]]
            rows.append([_heading(pool, len(backends)), *head])
            head = [""] * len(head)
            whole = sum(one.chosen for one in backends)
            named, more = self._few(backends, ENTRIES, lambda one: (_badness(one), -one.open, -one.chosen))
            rows += [_backend(one, whole, self._snapshot.process) for one in named]
            left_out[len(rows) - 1] = _more(more, "backend")
        for index, line in enumerate(self._table(rows, right=(2, 3, 4, 5))):
            yield from (line, *left_out.get(index, ()))
        yield from _more(left, "pool")

    def failures(self, room: int) -> Iterator[str]:
        """The most frequent ones, in so many lines, or a few more."""
        found = [(failure, proxy.name) for proxy in self._snapshot.proxies for failure in proxy.failures]
        found.sort(key=lambda entry: -entry[0].number)
        shown, left = self._few(found, min(FAILURES, max(room - 2, FAILURES_MIN)), lambda _: 0)
        named = any(name for _, name in shown)
        rows = []
        for failure, name in shown:
            ago = f"{say.duration(failure.ago)} ago"
            row = [f"{failure.number:,}", failure.cause, *[name] * named, failure.backend, ago, failure.reason]
            rows.append(row)
        yield from ("", "failed in the last ten minutes, with the last reason") if rows else ()
        yield from self._table(rows, right=(0,), names=range(1, 3 + named))
        yield from _more(left, "cause")


def _more(left: int, noun: str, indent: str = "  ", nouns: str = "") -> list[str]:
    return (
        [f"{indent}... and {say.counted(left, f'more {noun}', nouns and f'more {nouns}')}, see --all"] if left else []
    )


def _process(process: Process) -> str:
    who = f"pid {process.pid}"
    if process.processes > 1:
        who = f"{process.processes} processes, the first with {who}"
    elif process.worker:
        who = f"worker {say.safe(process.worker)}, {who}"
    notes = [say.counted(process.handovers, "handover")] if process.handovers else []
    notes += [say.counted(process.reloads, "reload")] if process.reloads else []
    notes += [say.counted(process.reloads_failed, "failed reload")] if process.reloads_failed else []
    past = f" ({', '.join(notes)})" if notes else ""
    return f"rspd {say.safe(process.version)}, {who}, running for {say.duration(process.service_age)}{past}"


def _so_far(snapshot: Snapshot) -> str:
    """What all proxies together have done since the start of the service."""
    proxies, process = snapshot.proxies, snapshot.process
    refused = sum(one.number for proxy in proxies for one in proxy.refused)
    served = sum(proxy.accepted for proxy in proxies) - refused
    volumes = [volume for proxy in proxies for volume in proxy.volumes]
    sent, received = sum(volume.sent for volume in volumes), sum(volume.received for volume in volumes)
    text = f"so far: {served:,} served, {refused:,} refused, {say.size(sent)} sent, {say.size(received)} received"
    if process.descriptors and process.descriptors_max:
        text += f"; {process.descriptors:,} of {process.descriptors_max:,} descriptors"
    return text


def _waiting(proxy: Proxy) -> str:
    known = [listener.waiting for listener in proxy.listeners if listener.waiting is not None]
    backlog = f"{sum(known):,}" if known or not proxy.listeners else "an unknown number"
    silent = f", {proxy.silent:,} yet to say what they want" if proxy.silent else ""
    return f"{backlog} in the backlog, {proxy.queue:,} in the queue{silent}"


def _rate(rate: Rate) -> str:
    begun = f"{say.number(rate.connections)} connections/s"
    return f"{begun}, {say.speed(rate.sent)} sent, {say.speed(rate.received)} received"


def _heading(pool: Pool, backends: int) -> str:
    what = say.title_of(pool.name, pool.route) or "BACKEND"
    notes = [pool.balance] if pool.balance and backends > 1 else []
    notes += [f"{pool.queue:,} wait"] if pool.queue else []
    return ", ".join([what, *notes])


def _badness(backend: Backend) -> int:
    state = backend.state if backend.state in BACKEND_STATES else BACKEND_STATES[-1]
    return BACKEND_STATES.index(state)


def _backend(backend: Backend, chosen: int, process: Process) -> list[str]:
    state = backend.state
    if not backend.in_service and 0 < backend.in_service_in < process.processes:
        state += f" in {process.processes - backend.in_service_in} of {process.processes}"
    known = backend.connect.number
    limit = f" of {say.number(backend.limit)}" if backend.limit < inf else ""
    return [
        backend.name + (" (backup)" if backend.backup else ""),
        state,
        say.NONE if state == "full" else say.duration(backend.state_age),
        f"{backend.open:,}{limit}",
        say.share(backend.chosen, chosen),
        f"{say.connect_time(backend.connect, 0.5)} / {say.connect_time(backend.connect, 0.99)}" if known else say.NONE,
        _last_check(backend),
    ]


def _last_check(backend: Backend) -> str:
    """What the last check has found; and why the backend is out, if that is something else."""
    checks = backend.checks
    why = "" if backend.in_service else backend.why
    if not checks:
        return why
    found = "none yet"
    if checks.ago < inf:
        verdict, reason = ("good", "") if checks.last_good else ("bad", checks.reason)
        found = f"{verdict} {say.duration(checks.ago)} ago" + (f": {reason}" if reason else "")
    return f"{why}; last check: {found}" if why and why != checks.reason else found
