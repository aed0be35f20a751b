"""What `rspd top` shows, as lines of text: no terminal is needed here."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple
from unicodedata import combining, east_asian_width

from rspd.admin.query import Query, network_of
from rspd.admin.rates import Rates
from rspd.commands.tables import (
    ALARM,
    ASCII_BARS,
    BAD,
    BAR,
    BARS,
    FAINT,
    Line,
    backend_lines,
    connection_lines,
    rate_of,
    rows_of,
)
from rspd.commands.words import CUT, counted, cut, duration, number, speed, wrap
from rspd.snapshot import Connections, Snapshot

# The keys by which connections are sorted.
SORTS = {"b": "bytes", "a": "age", "i": "idle", "r": "rate"}
FIRST = {"bytes": "most bytes first", "age": "oldest first", "idle": "longest idle first", "rate": "fastest first"}

# By how many rows a key scrolls, and by how many pages.
MOVES = {"KEY_UP": -1, "KEY_DOWN": 1, "KEY_HOME": -(1 << 30), "KEY_END": 1 << 30}
PAGES = {"KEY_PPAGE": -1, "KEY_NPAGE": 1}

# What takes back the last character of what is typed (terminals differ), all of it, and the typing.
ERASES, ERASE_ALL, ESCAPE = ("\b", "\x7f", "KEY_BACKSPACE"), "\x15", "\x1b"

TYPED_MAX = 200

# The first that fits is shown.
HINTS = (
    " b bytes  a age  i idle  r rate  f filter  p pause  s swap  arrows scroll  h help  q quit",
    " b a i r: sort  f: filter  p: pause  s: swap  arrows: scroll  h: help  q: quit",
    " h: help  q: quit",
    "h q",
)

HELP = """\

 b a i r    sort connections: by bytes, age, idle time, rate
 f          filter: part of a client, backend, proxy or route, or a
            network of clients as 10.0.0.0/8
 p          pause, and go on
 s          swap which part has the most lines
 arrows     scroll the backends; PageUp, PageDown, Home, End, too
 h          this help; any key ends it
 q, Ctrl-C  quit

 OPEN       connections now, and how many may be
 SHARE      of the new connections of the pool, in the last minute
 CONN/S     new connections a second, in the last three seconds
 BYTES/S    from and to clients, in the last three seconds
 P50, P99   half of the connections of the last minute took at
            most P50 to connect, and 99 of 100 at most P99
 MINUTE     the last minute's CONN/S; the highest bar is the most
 IDLE       since the last byte
 SENT, RECV bytes from the client, and from the backend
"""


class Seen(NamedTuple):
    """What was seen. troubles: what is wrong, in sentences. where: the options that name the service.

    fault: why the last look failed; empty if it did not. ago: how long ago the last good look was, in seconds.
    """

    snapshot: Snapshot = Snapshot()
    connections: Connections = Connections()
    troubles: Sequence[str] = ()
    where: str = ""
    fault: str = ""
    ago: float = 0.0


class View(NamedTuple):
    """What is wanted of the screen.

    wanted: the filter of connections. typed: one that is not complete yet; None if none is typed.
    swapped: whether connections have the most lines. first: the first row of the backends that is shown.
    ascii: whether the terminal has only ASCII.
    """

    sort: str = "age"
    wanted: str = ""
    typed: str | None = None
    paused: bool = False
    swapped: bool = False
    help: bool = False
    first: int = 0
    ascii: bool = False

    def query(self, limit: int) -> Query:
        """Which connections these are: those of a network, or those where the filter is part of a word."""
        found = Query(sort=self.sort, limit=limit)
        with suppress(ValueError):
            if network_of(self.wanted):
                return found._replace(client=self.wanted)
        return found._replace(text=self.wanted)


class Drawn(NamedTuple):
    """A screen. first, page: the first row of the backends that is shown, and how many rows there is room for."""

    lines: list[Line]
    first: int
    page: int


def press(view: View, key: str, page: int) -> View | None:
    """What is wanted after a key, by its name as curses says it; None: the end. page: see Drawn."""
    if view.typed is not None:
        return _type(view, view.typed, key)
    if view.help:
        return view._replace(help=False) if key != "q" else None
    if key in SORTS:
        return view._replace(sort=SORTS[key])
    if key in MOVES:
        return view._replace(first=view.first + MOVES[key])
    if key in PAGES:
        return view._replace(first=view.first + PAGES[key] * max(1, page - 1))
    if key == "f":
        return view._replace(typed=view.wanted)
    if key == "p":
        return view._replace(paused=not view.paused)
    if key == "s":
        return view._replace(swapped=not view.swapped)
    if key == "h":
        return view._replace(help=True)
    return None if key == "q" else view


def _type(view: View, typed: str, key: str) -> View:
    """The next key of a filter that is being typed."""
    if key in ("\n", "\r", "KEY_ENTER"):
        return view._replace(wanted=typed.strip(), typed=None)
    if key == ESCAPE:
        return view._replace(typed=None)
    if key in ERASES:
        return view._replace(typed=typed[:-1])
    if key == ERASE_ALL:
        return view._replace(typed="")
    if len(key) == 1 and key.isascii() and key.isprintable():
        return view._replace(typed=(typed + key)[:TYPED_MAX])
    return view


def draw(seen: Seen, rates: Rates, view: View, height: int, width: int) -> Drawn:
    """The screen: at most so many lines, each of at most so many characters, none of them a control character."""
    lines = [_first_line(seen, rates, view, width)]
    last = [_last_line(view, width)] if height > 3 or view.typed is not None else []
    first = page = 0
    if view.help:
        lines += [Line(text) for text in HELP.splitlines()]
    else:
        lines += _troubles(seen, max(1, height // 6), width)
        tables, first, page = _tables(seen, rates, view, height - len(lines) - len(last), width)
        lines += tables
    room = max(0, height - len(last))
    lines = lines[:room] + [Line()] * (room - len(lines)) + last
    return Drawn([Line(clean(line.text, view.ascii)[:width], line.style) for line in lines], first, page)


def clean(text: str, ascii_only: bool = False) -> str:
    """A text of as many columns as characters, of which a terminal obeys none."""
    if ascii_only:
        text = text.replace(CUT, "~")
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if _is_plain(one, ascii_only) else "?" for one in text)


def _is_plain(one: str, ascii_only: bool) -> bool:
    if one.isascii() or ascii_only:
        return one.isascii() and one.isprintable()
    return one.isprintable() and not combining(one) and east_asian_width(one) not in "WF"


def _first_line(seen: Seen, rates: Rates, view: View, width: int) -> Line:
    """What is wrong with the looking comes first, for what is below is old then."""
    if seen.fault:
        return Line(f"NO ANSWER for {duration(int(seen.ago))}: {seen.fault}".ljust(width), ALARM)
    process, proxies = seen.snapshot.process, seen.snapshot.proxies
    most = sum(proxy.most for proxy in proxies if not proxy.retired)
    now = [rate for rate in (rate_of(proxy, rates) for proxy in proxies) if rate]
    said = [
        (4, f"rspd {process.version}"),
        (0, "PAUSED" if view.paused else ""),
        (1, counted(len(seen.troubles), "trouble") if seen.troubles else ""),
        (0, "draining" if process.ending else ""),
        (6, counted(process.processes, "process", "processes") if process.processes > 1 else f"pid {process.pid}"),
        (5, f"up {duration(process.service_age // 1)}"),
        (
            1,
            f"{sum(proxy.open for proxy in proxies):,} of {most:,} open",
        ),
        (2, f"{number(sum(rate.connections for rate in now))} new/s"),
        (3, speed(sum(rate.sent + rate.received for rate in now))),
    ]
    said = [part for part in said if part[1]]
    while len(said) > 1 and sum(len(text) + 2 for _, text in said) > width + 2:
        said.remove(max(said))
    return Line("  ".join(text for _, text in said).ljust(width), ALARM if seen.troubles else BAR)


def _last_line(view: View, width: int) -> Line:
    if view.typed is None:
        return Line(next((hint for hint in HINTS if len(hint) < width), HINTS[-1]), FAINT)
    typed = f"{view.typed}_"
    long = f"part of a client, backend, proxy or route (Enter: apply, Esc: cancel): {typed}"
    text = next((text for text in (long, f"only: {typed}") if len(text) <= width), typed)
    return Line(text[-width:], BAR)


def _troubles(seen: Seen, most: int, width: int) -> list[Line]:
    """The sentences, as far as there is room, and how many more there are."""
    lines: list[str] = []
    for told, trouble in enumerate(seen.troubles):
        wrapped = wrap(f"! {trouble}", width, 2)
        left = len(seen.troubles) - told
        if len(lines) + len(wrapped) + (left > 1) > most and lines:
            lines.append(cut(f"! {left} more: see rspd status{seen.where}", width))
            break
        lines += wrapped
    return [Line(line, BAD) for line in lines[:most]]


def _tables(seen: Seen, rates: Rates, view: View, height: int, width: int) -> tuple[list[Line], int, int]:
    """Both tables; the numbers are those of Drawn."""
    rows, found = rows_of(seen.snapshot, rates), seen.connections.connections
    # A table takes no more lines than it has. Of the others, the large one has two thirds.
    needed, under = 1 + len(rows), 2 + len(found) if found else 1
    below = max(height - height // 3 if view.swapped else height // 3, height - needed)
    below = min(below, under, height)
    if below < min(under, 3):
        below = 0
    above = min(height - below, needed)
    page = max(0, above - 1)
    first = max(0, min(view.first, len(rows) - page))
    shown = rows[first : first + page]
    heading = f"{first + 1}-{first + len(shown)} of {len(rows)}" if len(shown) < len(rows) else ""
    lines = backend_lines(shown, heading, rates, ASCII_BARS if view.ascii else BARS, width)[: max(0, above)]
    if below:
        lines.append(Line(_title(seen.connections, view, len(found[: max(0, below - 2)])).ljust(width), BAR))
        lines += connection_lines(found[: below - 2], width) if found else []
    return lines, first, page


def _title(connections: Connections, view: View, shown: int) -> str:
    """What connections are shown, in one line."""
    only = f" of {view.wanted}" if view.wanted else ""
    some = f", {shown} shown" if shown < connections.matching else ""
    return f"{counted(connections.matching, 'connection')}{only}{some}, {FIRST[view.sort]}"
