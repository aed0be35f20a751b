"""Connections as they are handed over: what the next process is told of each, and how it goes on with them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from rspd.engine.loop import Loop
from rspd.engine.relay import resume as resume_relay
from rspd.engine.side import Handed
from rspd.engine.side import resume as resume_side
from rspd.histogram import begins_anew, rows
from rspd.log import quote
from rspd.net.address import format_peer, host_of, peer, plain
from rspd.net.networks import Networks
from rspd.net.ways import Way, Ways
from rspd.protocols.first import Heard
from rspd.routing.answers import resume as resume_farewell
from rspd.routing.heads import Head
from rspd.routing.router import Router
from rspd.serving.access import Access
from rspd.serving.admission import hear_peer, routed, words
from rspd.serving.connection import Connection, Terms
from rspd.serving.first_bytes import resume as resume_header

# What a document says of a connection that it can go on without, and of what kinds that is.
COUNTED = {"id": (str,), "started": (float,), "began": (float,), "handovers": (int,), "counted": (int, int)}


def hand_over(connection: Connection) -> Handed:
    """What `resume` makes it from, in the next process. To be asked while its task waits, or after `interrupt`."""
    handed: dict[str, Any] = {
        "client": plain(connection.client_address),
        "started": connection.started,
        "handovers": connection.handovers + 1,
        "descriptors": descriptors_of(connection),
    }
    if hasattr(connection, "id"):
        handed["id"] = connection.id
    if share := connection.terms.tally.shares.get(connection):
        handed["counted"] = share
    if connection.peer is not None:
        handed["via"] = plain(connection.peer)
    if hasattr(connection, "heard"):
        handed["heard"] = dict(zip(("protocol", "name", "method"), connection.heard, strict=True))
    if hasattr(connection, "route"):
        handed["route"], handed["route_key"] = connection.route
    relay, way, terms = connection.relay, connection.way, connection.terms
    if relay and connection.backend:
        handed.update(backend=connection.backend.name, relay=relay.hand_over(), began=connection.began)
        if way and (known := way.hand_over()):
            handed["way"] = known
        return handed
    # Whether all steps are done but the choice of a route, which is the last one.
    awaited = hasattr(connection, "head")
    admitted = not terms.steps or awaited or bool(connection.counted if terms.guarded else way)
    handed.update(side=connection.client.hand_over(), began=connection.began, admitted=admitted)
    if way:
        handed["passed"] = way.names
    if connection.destination:
        handed["destination"] = connection.destination
    if connection.header:
        handed["header"] = connection.header.hand_over()
    if connection.attempts:
        handed["attempts"] = connection.attempts.hand_over()
    if awaited:
        handed["first_bytes_until"] = connection.head.deadline
    if hasattr(connection, "farewell"):
        handed["farewell"] = connection.farewell.hand_over()
    return handed


def resume(
    loop: Loop,
    ways: Ways,
    terms: Terms,
    access: Access,
    router: Router,
    handed: Handed,
    descriptors: dict[int, int],
) -> Connection:
    """The connection that was handed over by the process before, to `go_on`. It counts at its backend, and in `access`.

    descriptors: its own, by their numbers in that process. It takes them; if this fails, those that it took are closed.
    """
    name, heard = handed.get("route", ""), _heard(handed)
    key = handed.get("route_key", "")
    route = router.find(key) if name else None
    dials = "relay" not in handed and "farewell" not in handed  # whether the client has yet to get a backend
    if route and heard:
        terms = routed(terms, route, heard)
    elif "relay" in handed:
        terms = terms._replace(pool=router.pool_of(handed.get("backend", "-")))
    if heard and not route and not (dials and router.routes):
        gone = f" route={quote(name)}" if name and not dials else ""
        terms = terms._replace(tag=f"{terms.tag}{gone}{words(heard)}")
    make = _relayed if "relay" in handed else _waiting
    connection = make(loop, ways, terms, handed, descriptors)
    if heard:
        connection.heard = heard
    if name and (route or not dials):
        connection.route = name, key
    until = handed.get("first_bytes_until")
    if until is not None and router.routes:
        connection.head = Head(until)
    if dials and not (route or router.routes) and (name or until is not None):
        # It chooses no route, and begins to dial.
        connection.began, connection.attempts = loop.now, None
    _know(connection, handed)
    if connection.backend:
        connection.backend.enter()
    if handed.get("admitted", "relay" in handed):
        connection.counted = access, access.enter(host_of(connection.client_address))
    return connection


def without_odd_counts(connections: Iterable[Any]) -> None:
    """Leave out what has been counted of connections where it cannot be read. The log has one line about each key."""
    told = set()
    for handed in connections:
        for key in COUNTED.keys() & handed.keys():
            try:
                rows([handed[key] if len(COUNTED[key]) > 1 else [handed[key]]], *COUNTED[key])
            except ValueError as error:
                del handed[key]
                if key not in told:
                    told.add(key)
                    begins_anew(f"{key} of connections", error)


def _know(connection: Connection, handed: Handed) -> None:
    """What is known of it, but does not decide how it goes on."""
    connection.started = handed.get("started", connection.started)
    connection.handovers = handed.get("handovers", 1)
    if "id" in handed:
        connection.id = handed["id"]
    if counted := handed.get("counted"):
        connection.terms.tally.shares[connection] = counted[0], counted[1]


def describe(handed: Handed, tag: str) -> str:
    """The client of a connection that was handed over, as the log names it. tag: of its proxy."""
    client = f"client={format_peer(peer(handed.get('client', '')))}"
    via = f" via={format_peer(peer(handed['via']))}" if "via" in handed else ""
    route = f" route={quote(handed['route'])}" if handed.get("route") else ""
    heard = _heard(handed)
    return f"{client}{via}{tag}{route}{words(heard) if heard else ''}"


def descriptors_of(connection: Connection) -> list[int]:
    """Those that the next process needs."""
    client, relay = connection.client, connection.relay
    if not relay:
        return [client.fd]
    return [client.fd, relay.backend.fd, *relay.upload.pipe_descriptors, *relay.download.pipe_descriptors]


def reset_if_nobody_takes(connection: Connection) -> None:
    """It has been handed over: have the kernel reset both sides if the next process does not take them."""
    client, relay = connection.client, connection.relay
    for side in (client, relay.backend) if relay else (client,):
        try:
            side.reset_if_nobody_takes()
        except OSError:
            pass  # a program in the kernel may refuse it (bpf(2))


def _heard(handed: Handed) -> Heard | None:
    """What the client has said first, if that is known."""
    heard = handed.get("heard")
    return (heard.get("protocol", "unknown"), heard.get("name", ""), heard.get("method", "")) if heard else None


def _relayed(loop: Loop, ways: Ways, terms: Terms, handed: Handed, descriptors: dict[int, int]) -> Connection:
    address = peer(handed.get("client", ""))
    via = peer(handed["via"]) if "via" in handed else None
    backend = terms.pool.members.find(handed.get("backend", "-"))
    relay = resume_relay(loop, terms.pipes, handed["relay"], descriptors)
    try:
        connection = Connection(terms, relay.client, address)
        connection.relay, connection.backend, connection.peer = relay, backend, via
        connection.began = handed.get("began", handed.get("started", connection.began))
        if "way" in handed:
            connection.way = ways.resume(handed["way"])
    except BaseException:
        relay.abort()
        raise
    return connection


def _waiting(loop: Loop, ways: Ways, terms: Terms, handed: Handed, descriptors: dict[int, int]) -> Connection:
    """One that has no relay yet."""
    client = resume_side(loop, handed["side"], descriptors)
    try:
        connection = Connection(terms, client, peer(handed.get("client", "")))
        connection.began = handed.get("began", connection.began)
        connection.peer = peer(handed["via"]) if "via" in handed else None
        if "passed" in handed:
            connection.way = Way(ways, tuple(handed["passed"]))
        if destination := handed.get("destination"):
            connection.destination = destination[0], destination[1]
        if "farewell" in handed:
            connection.farewell = resume_farewell(handed["farewell"])
        if handed.get("admitted"):
            # If its route is gone, it takes another.
            connection.terms = terms._replace(steps=terms.steps[-1:] if terms.config.routes else ())
        elif "header" in handed:
            connection.header = resume_header(handed["header"])
            if not terms.config.accept_proxy:
                # It goes on all the same: what the process before has taken of it is not for the backend.
                step = partial(hear_peer, Networks(()), 0.0)
                connection.terms = terms._replace(
                    steps=(*terms.steps[: ways.needed], step, *terms.steps[ways.needed :])
                )
        if "attempts" in handed and not connection.terms.steps:
            connection.attempts = terms.pool.resume(connection, handed["attempts"])
    except BaseException:
        client.abort()
        raise
    return connection
