"""The steps that a client takes before a backend is dialled for it, in this order."""

from __future__ import annotations

import logging
from functools import partial

from rspd.net.address import format_peer, host_of, place_of
from rspd.net.networks import Networks
from rspd.net.ways import Way, Ways, came_back
from rspd.protocols.first import HeadError, Heard
from rspd.protocols.proxy_protocol import HeaderError, NoHeaderError
from rspd.routing.heads import Head, NothingSaidError
from rspd.routing.router import Route, Router
from rspd.serving.access import Access, Refusals
from rspd.serving.connection import Connection, RefusedError, Step, Terms
from rspd.serving.first_bytes import Awaited
from rspd.settings import ProxyConfig

log = logging.getLogger(__name__)


def steps(config: ProxyConfig, ways: Ways, access: Access, refusals: Refusals, router: Router) -> tuple[Step, ...]:
    """The steps that a configuration needs; none for plain TCP. Each may refuse the client by RefusedError."""
    needed: list[Step] = []
    if ways.needed:
        needed.append(partial(find_way, ways, config.name))
    if config.accept_proxy:
        needed.append(partial(hear_peer, Networks(config.accept_proxy), config.accept_proxy_timeout))
    # A reload may bring limits while a header is awaited.
    if config.accept_proxy or access.needed:
        needed.append(partial(admit, access, refusals))
    if config.routes:
        needed.append(partial(choose_route, router))
    return tuple(needed)


async def find_way(ways: Ways, name: str, connection: Connection) -> None:
    """Set `connection.way`: the proxies of this process that the client has passed. Refuse it if this is one."""
    if connection.way:
        return  # it is known from the process before
    near = place_of(connection.client_address)
    passed: tuple[str, ...] | None = ()
    if ways.knows(near):
        passed = ways.take(near, ways.place(connection.client.sock.getsockname()))
    if passed is None:
        log.debug("client has gone client=%s%s", format_peer(connection.client_address), connection.terms.tag)
        raise RefusedError(None, "")  # rspd was the client: the log has a line for the client of rspd
    if passed and isinstance(near, str):
        connection.client_address = ""  # the name was made by `connect`, only to be known here
    if name in passed:
        raise RefusedError("loop", came_back((*passed, name)))
    connection.way = Way(ways, (*passed, name))


async def hear_peer(trusted: Networks, timeout: float, connection: Connection) -> None:
    """Take the PROXY header of a trusted peer, and set `connection.client_address` to the client that it names.

    A header that the process before has begun to take belongs to it, whoever is trusted by now.
    """
    loop = connection.client.loop
    awaited = connection.header
    if not awaited:
        if not trusted.find(host_of(connection.client_address)):
            return
        awaited = connection.header = Awaited(loop.now + timeout)
    elif awaited.whole:
        return
    try:
        header = await awaited.take(loop, connection.client)
    except NoHeaderError:
        raise RefusedError("client-closed", "") from None  # a check whether the port is open
    except HeaderError as error:
        raise RefusedError("bad-header", str(error)) from None
    except TimeoutError as error:
        raise RefusedError("header-timeout", str(error)) from None
    except ConnectionAbortedError as error:
        raise RefusedError("client-aborted", str(error.strerror)) from None
    connection.began = loop.now
    connection.destination = header.destination
    if header.source:
        connection.peer, connection.client_address = connection.client_address, header.source


async def admit(access: Access, refusals: Refusals, connection: Connection) -> None:
    """Refuse a client that may not come. Count the others, for the limit of each client."""
    if connection.counted:
        return  # it was admitted by the process before
    host = host_of(connection.client_address)
    if refusal := access.admit(host):
        connection.terms.tally.note_refusal(*refusal, connection.client.loop.now)
        refusals.note(format_peer(connection.client_address) + connection.via, refusal.reason)
        raise RefusedError(None, refusal.reason)
    connection.counted = access, host


async def choose_route(router: Router, connection: Connection) -> None:
    """Set `connection.terms` to those of a route, by what the client says first. It goes by the routes of now."""
    client, terms = connection.client, connection.terms
    try:
        said = router.look(client)
        if not said:
            if not hasattr(connection, "head"):
                connection.head = Head(client.loop.now + router.timeout)
            said = await router.hear(client, connection.head)
        connection.heard = said.protocol, said.name, said.method[:8]
        route = router.choose(said, connection.client_address) if router.routes else None
    except HeadError as error:
        if not hasattr(connection, "heard"):
            connection.heard = error.protocol, "", ""
        connection.terms = terms._replace(tag=terms.tag + words(connection.heard))
        raise RefusedError("first-bytes-timeout" if error.late else "bad-head", str(error)) from None
    except TimeoutError as error:
        raise RefusedError("first-bytes-timeout", str(error.strerror)) from None
    except NothingSaidError:
        raise RefusedError("client-closed", "") from None  # a check whether the port is open
    except ConnectionAbortedError as error:
        raise RefusedError("client-aborted", str(error.strerror)) from None
    if not router.routes:
        connection.terms = terms._replace(steps=())  # a reload has taken them out: there is one pool for all
        connection.began = client.loop.now
        return
    if not route:
        connection.terms = terms._replace(tag=terms.tag + words(connection.heard))
        raise RefusedError("no-route", "")
    connection.began = client.loop.now
    connection.route = route.names
    connection.terms = routed(terms, route, connection.heard)


def words(heard: Heard) -> str:
    """What a client has said first, for the log, with a space before it."""
    protocol, name, _ = heard
    return f' name="{name}" protocol={protocol}' if name else f" protocol={protocol}"


def routed(terms: Terms, route: Route, heard: Heard) -> Terms:
    """The terms of a connection that has taken a route, by what its client has said first."""
    tag = f"{terms.tag}{route.tag}{words(heard)}"
    # In the order of the fields: by their names it would take twice as long, for each connection.
    return Terms(
        route.settings,
        route.pool,
        terms.pipes,
        terms.shortage,
        (),
        terms.guarded,
        route.keep_alive,
        tag,
        terms.log_start,
        terms.tally,
    )
