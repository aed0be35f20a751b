"""The open connections as they are."""

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

from rspd.admin.query import Query
from rspd.engine.loop import Loop
from rspd.net.address import format_peer
from rspd.observing.life import Life
from rspd.observing.pace import Pace
from rspd.observing.samples import Everyone, Sampler
from rspd.serving.admission import words
from rspd.serving.connection import Connection
from rspd.snapshot import Connection as Seen

# How many connections are looked at, and how many are sorted, in one turn of the loop: less than a millisecond of work.
SLICE, SORTED = 50, 500

T = TypeVar("T")


class Measured(NamedTuple):
    """A connection, and what it is sorted by. What is shown of it costs more to make."""

    proxy: str
    connection: Connection
    age: float
    idle: float
    sent: int
    received: int
    rate: float


# What it is sorted by, where it stands among those alike, and the connection.
Ranked = tuple[float, int, Measured | Seen]


class Look:
    """A look at the open connections. matching: how many were asked for, once all have been seen."""

    def __init__(self, loop: Loop, pace: Pace, proxies: Everyone, life: Life, sampler: Sampler) -> None:
        self._pace = pace
        self._now = loop.now  # of the whole look, or the order by age would be another one
        self._proxies = proxies
        self._life = life
        self._sampler = sampler
        self.matching = 0

    async def first(self, query: Query) -> Iterator[Seen]:
        """Those that are asked for, sorted, as many as the limit says."""
        found: list[Ranked] = []  # a heap, if there is a limit
        for proxy in self._proxies.everyone():
            connections = iter(list(proxy.connections.values()))
            while part := list(islice(connections, SLICE)):
                for connection in part:
                    if not connection.task.done:
                        self._rank(found, query, proxy.config.name, connection)
                await self._pace.slice()
        # A turn in which all are sorted would be long. So they are sorted in parts, and merged as they are sent.
        parts = []
        for place in range(0, len(found), SORTED):
            parts.append(sorted(found[place : place + SORTED]))
            await self._pace.slice()
        ranked = heapq.merge(*map(from_end, parts), reverse=True)
        return (self._see(one) if isinstance(one, Measured) else one for _, _, one in ranked)

    def _rank(self, found: list[Ranked], query: Query, proxy: str, connection: Connection) -> None:
        """Add a connection to those found, if it is asked for."""
        measured = self._measure(proxy, connection)
        one: Measured | Seen = measured
        if not query.admits(measured.age, measured.idle):
            return
        if query.by_name:
            one = self._see(measured)
            if not query.matches(one):
                return
        self.matching += 1
        entry = (query.key(measured), -self.matching, one)
        if len(found) < query.limit:
            heapq.heappush(found, entry)
        elif query.limit:
            heapq.heappushpop(found, entry)

    def _measure(self, proxy: str, connection: Connection) -> Measured:
        relay, now = connection.relay, self._now
        sent, received = (relay.upload.total, relay.download.total) if relay else (0, 0)
        moved = max(relay.upload.moved_at, relay.download.moved_at, connection.began) if relay else connection.started
        age, idle = max(now - connection.started, 0.0), max(now - moved, 0.0)
        rate = self._sampler.rate_of(connection, sent + received)
        return Measured(proxy, connection, age, idle, sent, received, rate)

    def _see(self, measured: Measured) -> Seen:
        proxy, connection, age, idle, sent, received, rate = measured
        return Seen(
            id=self._life.id_of(connection),
            proxy=proxy,
            client=format_peer(connection.client_address),
            via="" if connection.peer is None else format_peer(connection.peer),
            backend=connection.backend.name if connection.backend else "",
            near=_near(connection),
            route=connection.route[0] if hasattr(connection, "route") else "",
            said=words(connection.heard).strip() if hasattr(connection, "heard") else "",
            state=_state(connection),
            age=age,
            idle=idle,
            sent=sent,
            received=received,
            rate=rate,
            handovers=connection.handovers,
        )


def _near(connection: Connection) -> str:
    """The address of rspd's end towards the backend, by which the backend's log knows the connection."""
    try:
        return format_peer(connection.relay.backend.sock.getsockname()) if connection.relay else ""
    except OSError:
        return ""  # it has ended meanwhile


def _state(connection: Connection) -> str:
    """One of `snapshot.STATES`."""
    relay = connection.relay
    if relay:
        if relay.bounds or relay.client.aborted or relay.backend.aborted:
            return "ending"
        return "half-closed" if relay.upload.finished or relay.download.finished else "open"
    if hasattr(connection, "farewell"):
        return "ending"
    if hasattr(connection, "head") and not hasattr(connection, "heard"):
        return "first bytes"
    if connection.header and not connection.header.whole:
        return "first bytes"
    return "queued" if connection.attempts and connection.attempts.queued_at else "connecting"


def from_end(entries: list[T]) -> Iterator[T]:
    """The entries from the last one on. They are given up one by one: all at once, that would take several ms."""
    while entries:
        yield entries.pop()
