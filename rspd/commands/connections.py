"""The open connections, as a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import inf

from rspd.admin.query import SORTS, Query, is_at, network_of
from rspd.commands import words as say
from rspd.commands.asking import look, look_at_connections, parser_of, socket_of
from rspd.errors import StartError
from rspd.parser import checked, show
from rspd.snapshot import Connection, Connections, Snapshot, as_json

DESCRIPTION = "Shows the open connections of a running rspd, the oldest first."

EPILOG = """\
A DURATION is 500ms, 5s, 2m or 1h. A STATE is first bytes, queued, connecting,
open, half-closed or ending. SENT is what the client has sent, RECEIVED what it
has got, BYTES/S both lately, SAID the name and the protocol that it has said.
"""

# How many names are told where one is wrong.
NAMES = 20

# How many are shown in a terminal, unless --limit says something else.
FEW = 50


def main(words: Sequence[str]) -> int:
    """Show the open connections that the words of the command line ask for; the exit code. Raises StartError."""
    parser = parser_of("connections", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--proxy", metavar="NAME", default="", help="only those of this proxy")
    client = "only those of this client, with its port or without; or of a network, as 10.0.0.0/8"
    add("--client", metavar="ADDRESS", type=checked(_client), default="", help=client)
    add("--backend", metavar="ADDRESS", default="", help="only those to this backend, with its port or without")
    add("--route", metavar="NAME", default="", help="only those that took this route")
    old, idle = "only those that are at least so old", "only those without a byte for at least so long"
    add("--longer-than", metavar="DURATION", type=checked(_duration), default=0.0, help=old)
    add("--idle-for", metavar="DURATION", type=checked(_duration), default=0.0, help=idle)
    sorts = f"sort by {', '.join(SORTS[:-1])} or {SORTS[-1]}, the largest first; default age"
    add("--sort", metavar="WORD", type=checked(_sort), default="age", help=sorts)
    limit = f"how many at most, or all; default {FEW} in a terminal, else all"
    add("--limit", metavar="N", type=checked(_limit), help=limit)
    options = parser.parse_args(words)
    columns = say.terminal_columns()
    most = options.limit
    if most is None:
        most = inf if options.json or columns is None else FEW
    values = {name: value for name, value in vars(options).items() if name in Query._fields and name != "limit"}
    path, query = socket_of(options), Query(**values, limit=most)
    found = look_at_connections(path, query)
    if not found.matching and (query.proxy or query.backend or query.route):
        _need_names(query, look(path))
    for path in found.process.unanswered:
        from rspd.log import complain  # slow to import, and seldom needed

        complain(f"warning: no answer from {say.safe(path)}: its connections are missing here")
    if found.process.strangers:
        from rspd.commands.troubles import left_out
        from rspd.log import complain

        complain(f"warning: {left_out(found.process.strangers)}")
    if options.json:
        show(as_json(found))
    else:
        show("\n".join([*_table(found.connections, columns, query.sort == "rate"), _summary(found)]))
    return 0


def _need_names(query: Query, snapshot: Snapshot) -> None:
    """Raise StartError if what is asked for does not exist."""
    proxies = [proxy.name for proxy in snapshot.proxies]
    if query.proxy and query.proxy not in proxies:
        if proxies == [""]:
            raise StartError(f"no proxy {query.proxy!r}: the only proxy has no name; leave out --proxy", os.EX_USAGE)
        raise StartError(_unknown("proxy", query.proxy, proxies), os.EX_USAGE)
    routes = [route.name for route in snapshot.routes if query.proxy in ("", route.proxy)]
    if query.route and query.route not in routes:
        raise StartError(_unknown("route", query.route, routes), os.EX_USAGE)
    backends = [backend.name for backend in snapshot.backends]
    if query.backend and not any(is_at(query.backend, name) for name in backends):
        raise StartError(_unknown("backend", query.backend, backends), os.EX_USAGE)


def _unknown(noun: str, name: str, names: Sequence[str]) -> str:
    known = [say.safe(one) for one in dict.fromkeys(names)]
    more = [f"and {len(known) - NAMES:,} more, see rspd status --all"] if len(known) > NAMES else []
    if not known:
        return f"no {noun} {name!r}; there is none"
    return f"no {noun} {name!r}; there {'are' if len(known) > 1 else 'is'}: {', '.join([*known[:NAMES], *more])}"


def _table(connections: Sequence[Connection], columns: int | None, by_rate: bool) -> list[str]:
    """by_rate: whether the rate has to be shown; else it is where there is room, as what the clients said is."""
    said = any(one.said for one in connections)
    for more in ((True, said), (True, False), (by_rate, False)):
        rows, right, names = _rows(connections, *more)
        if columns is None or say.columns_of(rows) <= columns:
            break
    return say.table(rows, right, columns, names=names) if connections else []


def _rows(connections: Sequence[Connection], rate: bool, said: bool) -> tuple[list[list[str]], range, range]:
    """The cells; which columns have numbers, and which have names."""
    proxies = any(one.proxy for one in connections)
    routes = any(one.route for one in connections)
    head = ["ID", *["PROXY"] * proxies, "CLIENT", "BACKEND", *["ROUTE"] * routes]
    numbers = ["AGE", "IDLE", "SENT", "RECEIVED", *["BYTES/S"] * rate]
    rows = [[*head, *numbers, "STATE", *["SAID"] * said]]
    for one in connections:
        client = f"{one.client} via {one.via}" if one.via else one.client
        row = [one.id, *[one.proxy] * proxies, client, one.backend or say.NONE, *[one.route or say.NONE] * routes]
        row += [say.duration(one.age), say.duration(one.idle), say.size(one.sent), say.size(one.received)]
        row += [*[say.size(one.rate)] * rate, one.state, *[one.said or say.NONE] * said]
        rows.append([say.safe(cell) for cell in row])
    return rows, range(len(head), len(head) + len(numbers)), range(1, len(head))


def _summary(found: Connections) -> str:
    shown = len(found.connections)
    if shown < found.matching:
        return f"{shown:,} of {say.counted(found.matching, 'connection')}, see --limit"
    return say.counted(shown, "connection")


# What the file is read with is slow to import, and few calls need it.


def _duration(text: str) -> float:
    from rspd.config.values import parse_wait

    return parse_wait(text)


def _client(text: str) -> str:
    network_of(text)
    return text


def _sort(text: str) -> str:
    from rspd.config.values import one_of

    return one_of(SORTS)(text)


def _limit(text: str) -> float:
    from rspd.config.values import unless, whole_number

    return unless(["all"], inf, whole_number(1, 10**9, "all"))(text)
