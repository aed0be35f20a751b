"""Connections as they are handed over: what the next process is told of each, and how it goes on with them."""

from __future__ import annotations

from functools import partial
from typing import Any

from rspd.engine.loop import Loop
from rspd.engine.relay import resume as resume_relay
from rspd.engine.side import Handed
from rspd.engine.side import resume as resume_side
from rspd.net.address import host_of, peer, plain
from rspd.net.networks import Networks
from rspd.net.ways import Way, Ways
from rspd.serving.access import Access
from rspd.serving.admission import hear_peer
from rspd.serving.connection import Connection, Terms
from rspd.serving.first_bytes import resume as resume_header


def hand_over(connection: Connection) -> Handed:
    """What `resume` makes it from, in the next process. To be asked while its task waits, or after `interrupt`."""
    handed: dict[str, Any] = {
        "client": plain(connection.client_address),
        "started": connection.started,
        "handovers": connection.handovers + 1,
        "descriptors": connection.descriptors,
    }
    if connection.peer is not None:
        handed["via"] = plain(connection.peer)
    relay, way, terms = connection.relay, connection.way, connection.terms
    if relay and connection.backend:
        handed.update(backend=connection.backend.name, relay=relay.hand_over())
        if way and (known := way.hand_over()):
            handed["way"] = known
        return handed
    # Whether all steps are done: `admit` is the last one, where there is something to admit for.
    admitted = not terms.steps or bool(connection.counted if terms.guarded else way)
    handed.update(side=connection.client.hand_over(), began=connection.began, admitted=admitted)
    if way:
        handed["passed"] = way.names
    if connection.destination:
        handed["destination"] = connection.destination
    if connection.header:
        handed["header"] = connection.header.hand_over()
    if connection.attempts:
        handed["attempts"] = connection.attempts.hand_over()
    return handed


def resume(
    loop: Loop, ways: Ways, terms: Terms, access: Access, handed: Handed, descriptors: dict[int, int]
) -> Connection:
    """The connection that was handed over by the process before, to `go_on`. It counts at its backend, and in `access`.

    descriptors: its own, by their numbers in that process. It takes them; if this fails, those that it took are closed.
    """
    make = _relayed if "relay" in handed else _waiting
    connection = make(loop, ways, terms, handed, descriptors)
    connection.started = handed.get("started", connection.started)
    connection.handovers = handed.get("handovers", 1)
    if connection.backend:
        connection.backend.enter()
    if handed.get("admitted", "relay" in handed):
        connection.counted = access, access.enter(host_of(connection.client_address))
    return connection


def _relayed(loop: Loop, ways: Ways, terms: Terms, handed: Handed, descriptors: dict[int, int]) -> Connection:
    address = peer(handed.get("client", ""))
    via = peer(handed["via"]) if "via" in handed else None
    backend = terms.pool.members.find(handed.get("backend", "-"))
    relay = resume_relay(loop, terms.pipes, handed["relay"], descriptors)
    try:
        connection = Connection(terms, relay.client, address)
        connection.relay, connection.backend, connection.peer = relay, backend, via
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
        if handed.get("admitted"):
            connection.terms = terms._replace(steps=())
        elif "header" in handed:
            connection.header = resume_header(handed["header"])
            if not terms.config.accept_proxy:
                # It goes on all the same: what the process before has taken of it is not for the backend.
                step = partial(hear_peer, Networks(()), 0.0)
                connection.terms = terms._replace(
                    steps=(*terms.steps[: ways.needed], step, *terms.steps[ways.needed :])
                )
        if "attempts" in handed:
            connection.attempts = terms.pool.resume(connection, handed["attempts"])
    except BaseException:
        client.abort()
        raise
    return connection
