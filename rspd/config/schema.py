"""A file's entries read by tables: which keys there are, what each takes, and all that is wrong, each with its line."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

from rspd.config.values import closest
from rspd.config.yamlfile import Entry, Value

# SPELLINGS: the full name of a key, by its short spelling. USUAL: the short spelling, by the full name.
SPELLINGS = {"backend": "backends"}
USUAL = {full: short for short, full in SPELLINGS.items()}

# The error for an unknown key lists the known keys if they are at most so many.
FEW = 12


class Report:
    """What is wrong with a file, and what has been read of it.

    meanings: by reader and value: what the value means, the key where it was read, and whether it is right. With
        aliases, a value may stand in many places; it is read once.
    """

    def __init__(self, source: str) -> None:
        self.source = source  # the file's name, or what is in its place
        self.meanings: dict[tuple[Scalar, Value], tuple[Any, str, bool]] = {}
        self._errors: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._errors)

    def add(self, line: int | None, key: str, what: str) -> None:
        """Note an error. line: None if it has none. key: dotted, from the top; empty for the whole file."""
        place = self.source if line is None else f"{self.source}:{line}"
        self._errors.append((inf if line is None else line, ": ".join(part for part in (place, key, what) if part)))

    @property
    def errors(self) -> list[str]:
        """A line for each, in the file's order; those without a line come last."""
        return [text for _, text in sorted(self._errors, key=lambda error: error[0])]


class Scalar:
    """A key with one value. `parse` reads it or raises ValueError. `expected`: for the error if it is no scalar."""

    def __init__(self, parse: Callable[[str], Any], expected: str = "one value") -> None:
        self.parse = parse
        self.expected = expected

    def holds(self, key: str) -> bool:
        """Whether a further key may stand below this one."""
        return False

    def read(self, value: Value, key: str, report: Report, expected: str = "") -> Any:
        """What the value means; None, and an error in the report, if it is wrong. key: its dotted name."""
        if value.text is None:
            report.add(value.line, key, f"expected {expected or self.expected}, found {value.kind}")
            return None
        try:
            return self.parse(value.text)
        except ValueError as error:
            report.add(value.line, key, str(error))
            return None


class Table(Scalar):
    """A key with a mapping of further keys: `make` turns their values into one. Or a key with a scalar, as above.

    required: keys that have to be there, and what they should have.
    check: yields keys and what is wrong between their values.
    """

    def __init__(
        self,
        keys: Mapping[str, Scalar],
        make: Callable[..., Any],
        parse: Callable[[str], Any],
        expected: str,
        required: Mapping[str, str] | None = None,
        check: Callable[[Mapping[str, Any]], Iterator[tuple[str, str]]] | None = None,
    ) -> None:
        super().__init__(parse, expected)
        self.keys = keys
        self._make = make
        self._required = required or {}
        self._check = check

    def holds(self, key: str) -> bool:
        """Whether it is a key of the mapping."""
        return key in self.keys

    def read(self, value: Value, key: str, report: Report, expected: str = "") -> Any:
        """The same for a mapping."""
        entries = value.entries
        if entries is None:
            return super().read(value, key, report, expected)
        before = len(report)
        settings = read_keys(self.keys, entries, f"{key}.", report)
        for name, what in self._required.items():
            if name not in settings.seen:
                report.add(value.line, f"{key}.{name}", f"missing, expected {what}")
        if self._check and len(report) == before:
            for name, what in self._check(settings.values):
                report.add(settings.seen[name].line, f"{key}.{name}", what)
        return self._make(**settings.values) if len(report) == before else None


class Many(Scalar):
    """A key with one item or a list of items. `item` reads each; the result is a tuple.

    noun: what an item is.
    none: words that mean no items; if there are no such words, at least one item is needed.
    separator: between several items in one scalar.
    """

    def __init__(self, item: Scalar, noun: str, none: Sequence[str] = (), separator: str | None = None) -> None:
        super().__init__(self._parse, f"{item.expected} or a list of them")
        self.item = item
        self._none = none
        self._separator = separator
        self._least = f"at least one {noun}" + (f", or {none[0]}" if none else "")

    def read(self, value: Value, key: str, report: Report, expected: str = "") -> Any:
        """The same for a list."""
        if value.items is None:
            if value.entries is None:
                return super().read(value, key, report)
            return (self.item.read(value, key, report, self.expected),)
        if not value.items:
            report.add(value.line, key, f"expected {self._least}, found an empty list")
        found: dict[str, Any] = {}
        for item in value.items:
            before = len(report)
            meaning = self.item.read(item, key, report)
            if len(report) == before:
                if str(meaning) in found:
                    report.add(item.line, key, f"{meaning} is listed twice")
                found[str(meaning)] = meaning
        return tuple(found.values())

    def _parse(self, text: str) -> tuple[Any, ...]:
        if text.lower() in self._none:
            return ()
        texts = [part.strip() for part in text.split(self._separator)] if self._separator else [text]
        return tuple(map(self.item.parse, texts))


class Draft:
    """A mapping of the file as it is read: one with a name, or an item of a list.

    key: its dotted name, empty for the whole file. prefix: what goes before its keys in an error.
    """

    def __init__(self, name: str, line: int | None, settings: "Settings", key: str) -> None:
        self.name = name
        self.line = line
        self.settings = settings
        self.key = key
        self.prefix = f"{key}." if key else ""

    def line_of(self, name: str) -> int | None:
        """The line of one of its keys, or its own."""
        entry = self.settings.seen.get(name)
        return entry.line if entry else self.line


class Named(Scalar):
    """Names, each with keys. It is read as a tuple of Drafts.

    noun: what has a name.
    elsewhere: as for `read_keys`.
    """

    def __init__(self, keys: Mapping[str, Scalar], noun: str, elsewhere: Mapping[str, str] | None = None) -> None:
        super().__init__(str)
        self.keys = keys
        self._noun = noun
        self._elsewhere = elsewhere

    def holds(self, key: str) -> bool:
        """Any name."""
        return True

    def read(self, value: Value, key: str, report: Report, expected: str = "") -> Any:
        """The same for a mapping of mappings."""
        what = f"the keys of a {self._noun}"
        if value.entries is None or not value.entries:
            found = value.kind if value.entries is None else "none"
            advice = "; leave out the dashes" if value.dashed else ""
            report.add(value.line, key, f"expected names, each with {what}, found {found}{advice}")
            return None
        drafts: dict[str, Draft] = {}
        for line, name, below in value.entries:
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
                report.add(line, key, f"expected a name of up to 64 letters, digits, _, . and -, found {name!r}")
            elif name in drafts:
                report.add(line, f"{key}.{name}", f"given a second time, first in line {drafts[name].line}")
            elif below.entries is None:
                advice = "; its keys are indented below its name" if below.text == "" else ""
                report.add(below.line, f"{key}.{name}", f"expected {what}, found {below.kind}{advice}")
            else:
                settings = read_keys(self.keys, below.entries, f"{key}.{name}.", report, self._elsewhere)
                drafts[name] = Draft(name, line, settings, f"{key}.{name}")
        return tuple(drafts.values())


class Settings(NamedTuple):
    """What each key of a mapping means, None if it is wrong, and the entry of each key. Both go by its full name.

    meant: the full names of the keys that were probably meant by unknown ones.
    """

    values: dict[str, Any]
    seen: dict[str, Entry]
    meant: set[str]


def read_keys(
    keys: Mapping[str, Scalar],
    entries: Sequence[Entry],
    prefix: str,
    report: Report,
    elsewhere: Mapping[str, str] | None = None,
) -> Settings:
    """Read entries by a table of keys.

    prefix: what goes before a key in an error, with its dot.
    elsewhere: keys that belong somewhere else, and the text that says where.
    """
    settings = Settings({}, {}, set())
    seen = settings.seen
    for entry in entries:
        place = prefix + entry.key
        name = SPELLINGS.get(entry.key, entry.key)
        if elsewhere and name in elsewhere:
            report.add(entry.line, place, elsewhere[name])
        elif name not in keys:
            advice, meant = _suggest(entry.key, keys, seen)
            report.add(entry.line, place, f"unknown key, {advice}")
            settings.meant.add(SPELLINGS.get(meant, meant))
        elif name in seen:
            first = seen[name]
            advice = "; several values are one list" if isinstance(keys[name], Many) else ""
            report.add(entry.line, place, f"given a second time, first as {first.key} in line {first.line}{advice}")
        else:
            settings.values[name] = _read_once(keys[name], entry, place, report)
        seen.setdefault(name, entry)
    return settings


def _read_once(reader: Scalar, entry: Entry, key: str, report: Report) -> Any:
    """What the value of an entry means. If an alias had it read before, and it is wrong, one error says so."""
    known = report.meanings.get((reader, entry.value))
    if not known:
        before = len(report)
        meaning = reader.read(entry.value, key, report)
        report.meanings[reader, entry.value] = meaning, key, len(report) == before
        return meaning
    meaning, first, good = known
    if not good:
        report.add(entry.line, key, f"wrong, as it is in {first}, by an alias")
    return meaning


def _suggest(key: str, keys: Mapping[str, Scalar], seen: Mapping[str, Entry]) -> tuple[str, str]:
    """The advice for an unknown key: where it belongs, which was meant, or which there are. And the key that was meant.

    seen: the entries above it.
    """
    for entry in seen.values():
        above = keys.get(SPELLINGS.get(entry.key, entry.key))
        if above and above.holds(key) and entry.value.text == "":
            return f"it belongs to {entry.key} in line {entry.line}: indent it", ""
    known = [USUAL.get(name, name) for name in keys]
    name, colon, _ = key.partition(":")
    if colon and name in known:
        return "a space belongs after the colon", name
    if meant := closest(key, [*known, *(name for name in keys if name in USUAL)]):
        return f"did you mean {meant}?", meant
    if len(known) <= FEW:
        return f"expected one of {', '.join(known)}", ""
    return f"expected {', '.join(known[:3])}, or another one of rspd.yaml(5)", ""
