"""The tables of `rspd top`, as lines of text: proxies with their backends, and connections."""

from collections.abc import Sequence
from math import ceil, inf
from typing import NamedTuple

from rspd.admin.rates import Rates
from rspd.commands.troubles import is_there
from rspd.commands.words import CUT, NONE, connect_time, cut, number, share, size, title_of
from rspd.snapshot import Backend, Connection, Proxy, Rate, Snapshot

# How a line is shown. Colour adds to it, and says nothing that the words do not say.
PLAIN, BOLD, BAD, WARN, BAR, ALARM, FAINT = "plain", "bold", "bad", "warn", "bar", "alarm", "faint"

STYLES = {"down": BAD, "trial": WARN, "full": WARN}

# What a sparkline is made of, the least first, on a terminal with UTF-8 and on others.
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", " .:-=+*#"


class Line(NamedTuple):
    """A line of the screen."""

    text: str = ""
    style: str = PLAIN


class Column(NamedTuple):
    """A column. least, most: its width. rank: where there is no room, the highest one goes first.

    yields: whether it leaves what it does not need of `least` to others.
    """

    title: str
    least: int
    rank: int
    most: int = 0
    right: bool = True
    yields: bool = False


class Row(NamedTuple):
    """A line about a proxy, a backend, or a pool by its name.

    begun: new connections of the last minute, of all backends of the pool together.
    why: if it is about a backend that is out of service: the reason, and nothing else is shown.
    """

    name: str
    thing: Proxy | Backend | None = None
    begun: int = 0
    why: str = ""


BACKENDS = (
    Column("PROXY, BACKEND", 14, 0, 50, right=False),
    Column("OPEN", 7, 1, 13),
    Column("STATE", 9, 2, right=False),
    Column("SHARE", 6, 8),
    Column("CONN/S", 6, 3),
    Column("BYTES/S", 7, 5),
    Column("P50", 7, 7),
    Column("P99", 7, 6),
    Column("MINUTE", 6, 4, 60, right=False),
)

CONNECTIONS = (
    Column("CLIENT", 21, 0, 47, right=False, yields=True),
    Column("BACKEND", 21, 4, 47, right=False, yields=True),
    Column("STATE", 11, 7, right=False, yields=True),
    Column("AGE", 4, 2),
    Column("IDLE", 4, 1),
    Column("SENT", 6, 5),
    Column("RECV", 6, 3),
    Column("BYTES/S", 7, 6),
    Column("PROXY", 5, 8, 20, right=False),
    Column("ROUTE", 5, 9, 20, right=False),
    Column("SAID", 5, 10, 40, right=False),
    Column("VIA", 15, 11, 47, right=False),
    Column("ID", 8, 12, 24, right=False),
)


def rows_of(snapshot: Snapshot, rates: Rates) -> list[Row]:
    """A row of each proxy, each followed by its backends; at the end, those of pools that several proxies share."""
    pools: dict[tuple[bool, str, str], list[Backend]] = {}
    for backend in snapshot.backends:
        pools.setdefault((backend.shared, backend.proxy, backend.pool), []).append(backend)
    processes = snapshot.process.processes
    rows: list[Row] = []
    for proxy in filter(is_there, snapshot.proxies):
        where = ", ".join(listener.address for listener in proxy.listeners)
        rows.append(Row(proxy.name or where or "proxy", proxy))
        for (shared, owner, name), members in pools.items():
            if not shared and owner == proxy.name:
                title = title_of(name, members[0].route)
                rows += _pool(f"  {title}" if title else "", members, rates, processes)
    for (shared, _, name), members in pools.items():
        if shared:
            rows += _pool(f"{title_of(name, members[0].route)}, shared", members, rates, processes)
    return rows


def _pool(title: str, members: Sequence[Backend], rates: Rates, processes: int) -> list[Row]:
    """Those out of service come first, the latest one before the others."""
    begun = sum(rates.of(backend).begun for backend in members)
    rows = [Row(title)] if title else []
    for backend in sorted(members, key=lambda one: (one.in_service, 0.0 if one.in_service else one.state_age)):
        rows.append(Row(f"  {backend.name}{' (backup)' if backend.backup else ''}", backend, begun))
        if not backend.in_service:
            down = processes - backend.in_service_in
            some = f"down in {down} of {processes} processes" if 0 < down < processes else ""
            why = ": ".join(part for part in (some, backend.why) if part)
            rows += [Row("", why=f"    {why}")] if why else []
    return rows


def backend_lines(rows: Sequence[Row], heading: str, rates: Rates, bars: str, width: int) -> list[Line]:
    """The table of proxies and backends."""
    titles = [heading or BACKENDS[0].title, *(column.title for column in BACKENDS[1:])]
    cells = [_thing(row, rates) for row in rows]
    fitted = _fit(BACKENDS, [titles, *cells], width)
    minute = fitted[-1].width if fitted[-1].column is BACKENDS[-1] else 0
    lines = [Line(_join(fitted, titles), BOLD)]
    for row, texts in zip(rows, cells, strict=True):
        if row.why:
            lines.append(Line(row.why, BAD))
            continue
        texts[-1] = spark(rates.of(row.thing).connections(minute), bars) if row.thing else ""
        style = STYLES.get(row.thing.state, PLAIN) if isinstance(row.thing, Backend) else BOLD
        lines.append(Line(_join(fitted, texts), style))
    return lines


def _thing(row: Row, rates: Rates) -> list[str]:
    """The cells of a row, with room for the sparkline."""
    thing = row.thing
    if thing is None:
        return [row.name, *[""] * (len(BACKENDS) - 1)]
    series = rates.of(thing)
    rate = rate_of(thing, rates)
    if isinstance(thing, Proxy):
        limit: float = thing.most
        state, part, times = "retired" if thing.retired else "full" if thing.open >= thing.most else "", "", ["", ""]
    else:
        limit = thing.limit
        state = "full" if thing.state == "full" else f"{thing.state} {age(thing.state_age)}"
        part = share(series.begun, row.begun)
        times = [connect_time(series.connect(), each) for each in (0.5, 0.99)]
    return [
        row.name,
        f"{thing.open:,}" if limit == inf else f"{thing.open:,}/{limit:,.0f}",
        state,
        part,
        number(rate.connections) if rate else NONE,
        size(rate.sent + rate.received) if rate else NONE,
        *times,
        " " * 60,
    ]


def rate_of(thing: Proxy | Backend, rates: Rates) -> Rate | None:
    """What goes on now; of a proxy, as it says itself, as long as there are not two looks."""
    return rates.of(thing).rate() or (thing.last_10s if isinstance(thing, Proxy) else None)


def connection_lines(connections: Sequence[Connection], width: int) -> list[Line]:
    """The table of connections."""
    titles = [column.title for column in CONNECTIONS]
    cells = [_connection(one) for one in connections]
    fitted = _fit(CONNECTIONS, [titles, *cells], width)
    return [Line(_join(fitted, titles), BOLD), *(Line(_join(fitted, texts)) for texts in cells)]


def _connection(one: Connection) -> list[str]:
    return [
        one.client,
        one.backend or NONE,
        one.state,
        age(one.age),
        age(one.idle),
        size(one.sent),
        size(one.received),
        size(one.rate),
        one.proxy,
        one.route,
        one.said,
        one.via,
        one.id,
    ]


class Fitted(NamedTuple):
    """A column that is shown. place: where its cells are in a row."""

    place: int
    column: Column
    width: int


def _fit(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[Fitted]:
    """Which columns are shown, and how wide each is. Those without a word below the title are left out."""
    kept = [index for index, _ in enumerate(columns) if not index or any(row[index] for row in rows[1:])]
    longest = {index: max(len(row[index]) for row in rows) for index in kept}
    least = {index: columns[index].least for index in kept}
    least |= {index: min(least[index], longest[index]) for index in kept if columns[index].yields}
    while len(kept) > 1 and sum(least[index] + 1 for index in kept) > width + 1:
        kept.remove(max(kept, key=lambda index: columns[index].rank))
    spare = width + 1 - sum(least[index] + 1 for index in kept)
    widths = {index: least[index] for index in kept}
    for index in sorted(kept, key=lambda index: not columns[index].right):  # numbers first: half of one misleads
        more = max(min(spare, min(longest[index], columns[index].most) - widths[index]), 0)
        widths[index] += more
        spare -= more
    return [Fitted(index, columns[index], widths[index]) for index in kept]


def _join(fitted: Sequence[Fitted], cells: Sequence[str]) -> str:
    """A row of cells as a line."""
    texts = []
    for place, column, width in fitted:
        text = shorten(cells[place], width)
        texts.append(text.rjust(width) if column.right else text.ljust(width))
    return " ".join(texts).rstrip()


def shorten(text: str, columns: int) -> str:
    """A text in so many columns; what is missing is in the middle, for addresses differ at both ends."""
    if len(text) <= columns:
        return text
    end = (columns - 1) // 2
    return cut(text, columns) if columns < 4 else f"{text[: columns - 1 - end]}{CUT}{text[-end:]}"


def spark(rates: Sequence[float | None], bars: str) -> str:
    """A sparkline: the highest bar is the highest rate, the lowest one is none; a space is where nobody looked."""
    most = max((rate for rate in rates if rate), default=0.0)
    high = len(bars) - 1
    return "".join(" " if rate is None else bars[ceil(high * (rate / most)) if most else 0] for rate in rates)


def age(seconds: float) -> str:
    """A duration in at most four characters, if it is below 1,000 days: `9s`, `59m`, `23h`, `99d`."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if length <= seconds < inf:
            return f"{int(seconds / length)}{unit}"
    return f"{int(seconds)}s" if seconds < inf else NONE
