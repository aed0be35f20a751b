"""Numbers, durations, names and tables, as people read them: on paper of any width, or in a terminal that has one."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from math import inf

from rspd.snapshot import CONNECT_BOUNDS, Distribution

# Where something is not known, or there is none of it.
NONE = "-"

# What stands for the rest of a text that was cut.
CUT = "…"

# Columns of a terminal that does not say how many it has.
COLUMNS = 80

# The fewest columns that a table leaves to a name that it has to cut: an IPv4 address.
NAME_MIN = 15

BYTES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def duration(seconds: float) -> str:
    """A duration or an age in its two largest units: `0.4 ms`, `3.2 s`, `4 m 10 s`, `3 d 4 h`. `-` if it is inf."""
    if not seconds < inf:
        return NONE
    if seconds < 0.9995:
        return f"{_short(seconds * 1000)} ms" if seconds > 0 else "0 s"
    if seconds < 59.5:
        return f"{_short(seconds)} s"
    whole = round(seconds)
    for unit, below, length in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if whole >= length:
            count, rest = divmod(whole, length)
            rest //= {"h": 3600, "m": 60, "s": 1}[below]
            return f"{count:,} {unit} {rest} {below}" if rest else f"{count:,} {unit}"
    return f"{whole} s"


def size(count: float) -> str:
    """A number of bytes, in units of 1,000: `999 B`, `1.2 kB`, `12 MB`. `-` if it is inf."""
    if not count < inf:
        return NONE
    unit = 0
    while count >= 999.5 and unit < len(BYTES) - 1:
        count /= 1000
        unit += 1
    return f"{_short(count) if unit else round(count)} {BYTES[unit]}"


def speed(bytes_a_second: float) -> str:
    """Bytes a second: `1.2 MB/s`."""
    return f"{size(bytes_a_second)}/s"


def number(value: float) -> str:
    """A number, whole from ten on: `0.3`, `12`, `4,000`. `-` if it is inf."""
    return _short(value) if value < inf else NONE


def share(part: float, whole: float) -> str:
    """So much of the whole: `50 %`, `0.4 %`. `-` if there is nothing to share."""
    return f"{_short(100 * part / whole)} %" if whole else NONE


def counted(count: int, noun: str, nouns: str = "") -> str:
    """So many of something: `1 connection`, `4,000 connections`. nouns: several of them, if that is not noun and s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def title_of(pool: str, route: str) -> str:
    """What a pool is called, by its name and the route that owns it; empty for a proxy's own pool."""
    return f"route {route}" if route else f"pool {pool}" if pool else ""


def percentile(distribution: Distribution, bounds: Sequence[float], part: float) -> float | None:
    """The value below which this part of all values is, from 0 to 1; None if there is no value.

    Within a bucket, values are taken to be spread evenly. If the value is in the last bucket, which has no upper bound,
    this is its lower bound.
    """
    counts = distribution.counts
    if not distribution.number or len(counts) != len(bounds) + 1:
        return None
    rank = part * distribution.number
    for index, upper in enumerate(bounds):
        if counts[index] and rank <= counts[index]:
            lower = bounds[index - 1] if index else 0.0
            return lower + (upper - lower) * rank / counts[index]
        rank -= counts[index]
    return bounds[-1]


def connect_time(connect: Distribution, part: float) -> str:
    """The time within which this part of all attempts succeeded, see `percentile`.

    The first bucket is not divided: a turn of the loop is as long, and times are those of turns.
    """
    seconds = percentile(connect, CONNECT_BOUNDS, part)
    if seconds is None:
        return NONE
    if seconds <= CONNECT_BOUNDS[0]:
        return f"<{duration(CONNECT_BOUNDS[0])}"
    return (">" if seconds == CONNECT_BOUNDS[-1] else "") + duration(seconds)


def _short(value: float) -> str:
    """A number in about two digits: whole from ten on, with one digit behind the point below, with two below 0.1."""
    if value >= 9.95:
        return f"{round(value):,}"
    text = f"{value:.1f}" if value >= 0.095 else f"{value:.2f}"
    return text.rstrip("0").removesuffix(".")


def safe(text: str) -> str:
    """A text from outside in one line: what is no printable character is escaped, so that no terminal obeys it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width  # only for what is not ASCII

    return sum(2 if east_asian_width(c) in "WF" else not combining(c) for c in text)


def cut(text: str, columns: int | None) -> str:
    """A text that takes no more columns than there are; None: there is no limit."""
    if columns is None or width(text) <= columns:
        return text
    while text and width(text) >= columns:
        text = text[: columns - 1] if len(text) >= columns else text[:-1]
    return text + CUT if columns > 0 else ""


def wrap(text: str, columns: int | None, rows: float = inf, indent: str = "  ") -> list[str]:
    """A sentence as lines that fit, all but the first indented; at most so many rows, the last of them cut."""
    if columns is None:
        return [text]
    lines: list[str] = []
    line = ""
    rest = text.split(" ")
    while rest:
        word = rest.pop(0)
        longer = f"{line} {word}" if line else word
        if line.strip() and width(longer) > columns:
            if len(lines) + 1 == rows:
                line = " ".join([longer, *rest])
                break
            lines.append(line)
            longer = indent + word
        line = longer
    return [cut(line, columns) for line in [*lines, line]]


def table(
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    columns: int | None = None,
    names: Sequence[int] = (),
    indent: str = "",
    last: float = inf,
) -> list[str]:
    """Rows of cells as aligned lines.

    right: which columns are aligned to the right, as numbers are.
    columns: of the terminal; None: no limit. If the rows are wider, they move together; then those of `names` are cut,
    the widest first; at the end, each line is. last: so wide the last column counts at most, before it is cut.
    """
    if not rows:
        return []
    widths = [max(map(width, cells)) for cells in zip(*rows, strict=True)]
    taken = [*widths[:-1], min(widths[-1], last)]
    gap = "  "
    if columns is not None:
        room = columns - len(indent)
        gap = gap if sum(taken) + len(gap) * (len(taken) - 1) <= room else " "
        while names and sum(taken) + len(gap) * (len(taken) - 1) > room:
            widest = max(names, key=widths.__getitem__)
            if widths[widest] <= NAME_MIN:
                break
            taken[widest] = widths[widest] = widths[widest] - 1
    lines = []
    for row in rows:
        cells = []
        for index, cell in enumerate(row):
            text = cut(cell, widths[index])
            space = " " * (widths[index] - width(text))
            cells.append(space + text if index in right else text + space)
        lines.append(cut((indent + gap.join(cells)).rstrip(), columns))
    return lines


def columns_of(rows: Sequence[Sequence[str]]) -> int:
    """How many columns of a terminal the table of these rows takes if nothing is cut."""
    return sum(max(map(width, cells)) + 2 for cells in zip(*rows, strict=True)) - 2


def terminal_columns() -> int | None:
    """How many columns stdout has; None if it is no terminal, so that there is no limit."""
    if not (sys.stdout and sys.stdout.isatty()):
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or COLUMNS
    except OSError:
        return COLUMNS
