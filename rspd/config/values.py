"""Single values of the configuration: durations, numbers, switches, words, ranges. All raise ValueError kindly."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from math import inf
from typing import TypeVar

from rspd.settings import StatusRange

T = TypeVar("T")

DURATION = "expected a duration above 0, as 500ms, 5s, 2m or 1h"

# Seconds. With a shorter interval, rspd would do nothing but the repeated work.
SHORTEST = 0.01

# Hours, so that any duration can be written as seconds again.
LONGEST = 999_999_999

# YAML's ways to write them.
OFF = ("off", "no", "false")
ON = ("on", "yes", "true")

# Seconds, by what stands after a number of them.
UNITS = {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600}


def _seconds(text: str, expected: str = DURATION) -> float:
    """Seconds of `500ms`, `5s`, `2m`, `1h` or a bare number of seconds, to the nanosecond. 0 is an error."""
    match = re.fullmatch(r"(\d{1,13}(?:\.\d{1,9})?)(ms|s|m|h|)", text, re.ASCII)
    seconds = round(float(match[1]) * UNITS[match[2]], 9) if match else 0
    if not seconds:
        raise ValueError(f"{expected}, found {text!r}")
    if seconds > LONGEST * UNITS["h"]:
        raise ValueError(f"expected at most {LONGEST}h, found {text!r}")
    return seconds


def format_duration(seconds: float) -> str:
    """A duration as it is written in the configuration. To read this text gives the same duration."""
    if seconds == inf:
        return OFF[0]
    units = ["ms"] if seconds < 1 else ["s"]
    if seconds > 60:  # up to there, write seconds, as the defaults do
        units = ["h", "m", "s"]
    for unit in units:
        count = round(seconds / UNITS[unit])
        if round(count * UNITS[unit], 9) == seconds:
            return f"{count}{unit}"
    return f"{seconds:.9f}".rstrip("0") + "s"


def parse_duration(text: str) -> float:
    """Seconds, `inf` for `off`."""
    return inf if text.lower() in OFF else _seconds(text, f"{DURATION}, or off")


def parse_finite_duration(text: str) -> float:
    """Seconds, no fewer than SHORTEST; there is no `off`."""
    seconds = _seconds(text)
    if seconds < SHORTEST:
        raise ValueError(f"expected at least {1000 * SHORTEST:g}ms, found {text!r}")
    return seconds


def parse_wait(text: str) -> float:
    """Seconds, 0 for `off`."""
    if text.lower() in OFF or re.fullmatch(r"0+(\.0+)?(ms|s|m|h|)", text, re.ASCII):
        return 0.0
    return _seconds(text, "expected a duration, as 500ms, 5s, 2m or 1h, or off")


def parse_switch(text: str, expected: str = "true or false") -> bool:
    """True or False."""
    if text.lower() not in ON + OFF:
        raise ValueError(f"expected {expected}, found {text!r}")
    return text.lower() in ON


def unless(words: Sequence[str], meaning: T, parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser where some words, small or capital, have a meaning of their own."""
    return lambda text: meaning if text.lower() in words else parse(text)


def whole_number(low: int, high: int, beside: str = "") -> Callable[[str], int]:
    """A parser of whole numbers within bounds. beside: a word that is valid too, for the error."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
            also = f", or {beside}" if beside else ""
            advice = f"; did you mean {beside}?" if beside and text == "0" else ""
            raise ValueError(f"expected a whole number from {low} to {high}{also}, found {text!r}{advice}")
        return int(text)

    return parse


def one_of(words: Collection[str]) -> Callable[[str], str]:
    """A parser of certain words."""

    def parse(text: str) -> str:
        if text not in words:
            meant = closest(text, words)
            advice = f"; did you mean {meant}?" if meant else ""
            raise ValueError(f"expected one of {', '.join(words)}, found {text!r}{advice}")
        return text

    return parse


def closest(word: str, words: Iterable[str]) -> str:
    """Which of the known words was probably meant by an unknown word, or which two; empty if none is near."""
    import difflib  # slow to import, and for messages only

    word, by_lower = word.lower(), {other.lower(): other for other in words}
    begun = [other for other in by_lower if other.startswith(word)] if len(word) > 2 else []
    if len(begun) == 1:
        return by_lower[begun[0]]
    # Of the words that are near, prefer one with the same beginning: `proxy` more likely means proxies than send_proxy.
    near = difflib.get_close_matches(word, by_lower, 3, cutoff=0.65)
    alike = [other for other in near if other[:3] == word[:3]]
    if near:
        return by_lower[(alike or near)[0]]
    return " or ".join(by_lower[other] for other in begun) if len(begun) == 2 else ""


def listed(parse: Callable[[str], T], noun: str, option: str = "") -> Callable[[str], T]:
    """A parser of one item, a `noun`. If it finds several items in one text, its error says how to write a list.

    option: what goes before each item on the command line; empty for the file.
    """

    def parse_item(text: str) -> T:
        try:
            return parse(text)
        except ValueError:
            parts = [part.lstrip("-") for part in re.split(r"[\s,]+", text) if part.strip("-")]
            if len(parts) < 2 or not all(accepts(parse, part) for part in parts):
                raise
        if option:
            raise ValueError(f"expected {noun}, found {text!r}; several are {' '.join(f'{option} {p}' for p in parts)}")
        # In YAML, a value that begins with [ or @ means something else.
        quoted = (f'"{part}"' if part[0] in "[@" else part for part in parts)
        raise ValueError(f"expected {noun} or a list, found {text!r}; a list is [{', '.join(quoted)}]")

    return parse_item


def accepts(parse: Callable[[str], object], text: str) -> bool:
    """Whether a parser takes a text."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def parse_status(text: str) -> StatusRange:
    """HTTP statuses, as `200` or `200-299`."""
    match = re.fullmatch(r"([1-5]\d\d)(?:-([1-5]\d\d))?", text, re.ASCII)
    found = StatusRange(int(match[1]), int(match[2] or match[1])) if match else None
    if not found or found.first > found.last:
        raise ValueError(f"expected statuses from 100 to 599, as 200 or 200-299, found {text!r}")
    return found


def parse_bytes(text: str) -> bytes:
    r"""Bytes, each a character of the same number, as `"PING\r\n"` or `"\x00"` in double quotes."""
    try:
        data = text.encode("latin-1")
    except UnicodeError:
        data = b""
    if not data:
        raise ValueError(f'expected text or bytes, as "PING\\r\\n" or "\\x00\\xff" in double quotes, found {text!r}')
    return data


def parse_mode(text: str) -> int:
    """The mode of a socket's file, in octal: what its owner may, and what others may. Raises ValueError."""
    if not re.fullmatch("0?6[0-7][0-7]", text):
        raise ValueError(f"expected a mode from 0600 to 0677, as 0660 or 0666, found {text!r}")
    return int(text, 8)


def matching(pattern: str, expected: str) -> Callable[[str], str]:
    """A parser of texts that a regular expression matches."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"expected {expected}, found {text!r}")
        return text

    return parse
