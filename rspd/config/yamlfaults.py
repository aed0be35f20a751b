"""What is wrong with a file that is no YAML: the line at fault, and what belongs there."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import yaml

# What YAML takes for the end of a line.
BREAK = r"\r\n|[\n\r\x85\u2028\u2029]"

# How many characters of a line an error shows.
SHOWN = 80

TOGETHER = "what belongs together begins in the same column"

# A line, counted from 0, and what is wrong with it; None where a rule does not know.
Told = tuple[int, str] | None


def describe_fault(content: bytes, error: yaml.YAMLError) -> tuple[int, str]:
    """The line at fault, counted from 1, and what is wrong with it."""
    import yaml  # slow to import, but who has an error of it has it

    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text = content.decode(encoding, "replace")
    if isinstance(error, yaml.reader.ReaderError):
        # The error's position counts bytes if the text cannot be decoded, and characters if one is not allowed.
        undecodable = error.encoding != "unicode"
        before = content[: error.position].decode(encoding, "replace") if undecodable else text[: error.position]
        reason = f"not {error.encoding.upper()} text, " if undecodable else ""
        return len(re.split(BREAK, before)), f"{reason}{str(error).splitlines()[0]}"
    assert isinstance(error, yaml.MarkedYAMLError)
    fault = _Fault(re.split(BREAK, text), error)
    if isinstance(error, yaml.composer.ComposerError) and error.context:
        fault.problem = f"{error.context}, {error.problem}"
    line, what = fault.describe()
    return min(line, fault.last) + 1, what


def advise_pair(text: str) -> str:
    """What to add to a text to make it KEY: VALUE; empty if that is not known."""
    if re.match(r"\w+:\S", text):
        return "; a space belongs after the colon"
    return "; a colon belongs in place of =" if re.match(r"\w+\s*=", text) else ""


class _Fault:
    """An error of the YAML reader, and the lines of the file. Lines and columns count from 0."""

    def __init__(self, lines: list[str], error: yaml.MarkedYAMLError) -> None:
        assert error.problem_mark
        self.lines = lines
        self.last = max((number for number, text in enumerate(lines) if text.strip()), default=0)
        # Where the reader found the error, and where the list, mapping or text began that it was reading.
        self.line: int = error.problem_mark.line
        self.column: int = error.problem_mark.column
        self.begin = error.context_mark.line if error.context_mark else self.line
        self.context = error.context or ""
        self.problem = error.problem or ""

    def describe(self) -> tuple[int, str]:
        """The line at fault, and what is wrong: for a mistake that people make, else what the reader says."""
        for pattern, rule in self.RULES:
            if not (match := re.fullmatch(pattern, self.problem)):
                continue
            if isinstance(rule, str):
                return self.line, match.expand(rule)
            if told := rule(self, match):
                return told
        return self.line, self.problem

    def _tab(self, _: re.Match[str]) -> Told:
        indents = not self.lines[self.line][: self.column].strip()
        advice = "; YAML indents by spaces" if indents else ""
        return self.line, f"found a tab in column {self.column + 1}, expected spaces{advice}"

    def _alias(self, _: re.Match[str]) -> Told:
        if not re.search("alias|anchor", self.context + self.problem):
            return None
        if port := re.search(r"\*:(\w+)", self.lines[self.line]):
            return self.line, f"{port[0]!r} is no address; a port alone is every address: {port[1]}"
        what = f"{self.problem}; " if "alias" in self.problem else ""
        return self.line, f"{what}a value that starts with * or & needs quotes"

    def _address(self, _: re.Match[str]) -> Told:
        """One of the forms of an address that mean something else to YAML."""
        if not re.search(r"[\[,-]\s*[:@]|:\s+@|\]:", self.lines[self.line]):
            return None
        return self.line, f"{self.problem}; an address that starts with [, @ or : needs quotes"

    def _no_colon(self, _: re.Match[str]) -> Told:
        return self.begin, self._no_pair(self.begin)

    def _no_quote(self, _: re.Match[str]) -> Told:
        return self.begin, "the quote that begins here has no end"

    def _unclosed(self, match: re.Match[str]) -> Told:
        """A list or a mapping in brackets in which a comma or the end is missing."""
        closing = match[1]
        within = self.lines[self.begin].lstrip().startswith(("[", "{"))
        if match[2] == "<stream end>" or (self.line > self.begin and not self._column(self.line) and not within):
            kind = "list" if closing == "]" else "mapping"
            return self.begin, f"the {kind} that begins here has no {closing}"
        return self.line, f"a comma or {closing} is missing here, or in the line before"

    def _second_colon(self, _: re.Match[str]) -> Told:
        """A key where there cannot be one."""
        text, above = self.lines[self.line], self._above(self.line)
        if re.search(r":\s", text[: self.column]):
            told = "in a value, a colon has no space after it, unless the value is in quotes"
            return self.line, f"expected one KEY: VALUE, found {_quote(text)}; {told}"
        upper = self.lines[above]
        if not re.search(r"^ *- |:(\s|$)", upper):
            return above, self._no_pair(above)
        if re.search(r":(\s|$)", upper) or self._column(self.line) != self._column(above):
            return self._misplaced(self.line)
        item = upper.strip()[1:].strip()
        address = re.fullmatch(r"[^:\s]+:\d+", item)
        advice = f"; with further keys, it is - address: {item}" if address else advise_pair(item)
        return above, f"expected - KEY: VALUE, found {_quote(upper)}{advice}"

    def _no_end(self, match: re.Match[str]) -> Told:
        """Something that cannot stand in the block."""
        if match[1] in ("<scalar>", ","):
            if "]:" in self.lines[self.line]:
                return self._address(match)
            above = self._above(self.line)
            if any(self.lines[above].count(quote) % 2 for quote in "\"'"):
                return above, "the quote that begins here has no end"
            return self.line, "found text after a closed quote or bracket"
        return self._misplaced(self.line)

    def _no_start(self, _: re.Match[str]) -> Told:
        """A block after the first one, with another indentation."""
        above = self._above(self.line)
        if self._column(above) == self._column(self.line):
            return above, self._no_pair(above)
        return self._indentation(above, self.line)

    # What the reader says, and what that means for the line where it says it, or the method that finds it out.
    RULES: tuple[tuple[str, str | Callable[[_Fault, re.Match[str]], Told]], ...] = (
        (r"found character '\\t' .*", _tab),
        (r"found character '@' that cannot start any token", _address),
        (r"found character '([^@])' that cannot start any token", r"a value that starts with \1 needs quotes"),
        (r"(?s)(?:expected alphabetic or numeric character, but found|found undefined alias) .*", _alias),
        (r"expected the node content, but found '<stream end>'", "the list or mapping in brackets has no end"),
        (r"expected the node content, but found .*", _address),
        (r"could not find expected ':'|expected '<document start>', but found '<scalar>'", _no_colon),
        (r"found unexpected end of stream", _no_quote),
        (r"expected ',' or '([]}])', but got '(.*)'", _unclosed),
        (r"mapping values are not allowed here", _second_colon),
        (r"sequence entries are not allowed here", "a list in lines of its own begins in the line after its key"),
        (r"expected <block end>, but found '([]}])'", r"found \1, and nothing that it closes"),
        (r"expected <block end>, but found '(.*)'", _no_end),
        (r"expected '<document start>', but found '<block mapping start>'", _no_start),
    )

    def _no_pair(self, line: int) -> str:
        """The error for a line that is no KEY: VALUE."""
        text, above = self.lines[line].strip(), self._above(line)
        beside = self.lines[above].lstrip().startswith("- ") and self._column(line) == self._column(above, dash=True)
        item = ", or - ITEM as above" if beside else ""
        return f"expected KEY: VALUE{item}, found {_quote(text)}" + ("" if item else advise_pair(text))

    def _misplaced(self, line: int) -> Told:
        """A line that begins in another column than every block above that it could continue."""
        text = self.lines[line]
        dash = text.lstrip().startswith("- ")
        column, nearest = self._column(line, dash), self._above(line)
        if re.search(r":\s+\S", self.lines[nearest]) and column > self._column(nearest):
            return self._indentation(line, nearest, "below a key that has a value, nothing is indented", dash)
        begins = r" *- " if dash else r"(?!\s*#).*:(\s|$)"
        open_blocks: list[tuple[int, int]] = []
        for above in (number for number in range(line - 1, -1, -1) if re.match(begins, self.lines[number])):
            if not open_blocks or self._column(above, dash) < open_blocks[-1][0]:
                open_blocks.append((self._column(above, dash), above))
        if not open_blocks:
            return line, self._no_pair(line)
        # Between two columns: a key without a value more likely belongs to the outer one.
        outward = 1 if text.rstrip().endswith(":") else -1
        _, beside = min(open_blocks, key=lambda block: (abs(block[0] - column), outward * block[0]))
        return self._indentation(line, beside, dash=dash)

    def _indentation(self, line: int, other: int, why: str = TOGETHER, dash: bool = False) -> Told:
        column, beside = self._column(line, dash) + 1, self._column(other, dash) + 1
        where = f"this line begins in column {column}, line {other + 1} in column {beside}"
        return line, f"wrong indentation: {where}; {why}"

    def _above(self, line: int) -> int:
        """The next line above that is neither blank nor a comment; the first of all if there is none."""
        above = range(line - 1, 0, -1)
        return next((number for number in above if re.match(r"\s*[^\s#]", self.lines[number])), 0)

    def _column(self, line: int, dash: bool = False) -> int:
        """The column where a line begins: at its dash, or at what comes after the dash."""
        match = re.match(r" *" if dash else r" *(?:- +)*", self.lines[line])
        return match.end() if match else 0


def _quote(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…")
