"""What is wrong with a file that is no YAML: the line at fault, and what belongs there."""

from __future__ import annotations

import codecs
import re

import yaml

# What YAML takes for the end of a line.
_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")

KINDS = {"]": "list", "}": "mapping"}

TOGETHER = "what belongs together begins in the same column"


def describe_fault(content: bytes, error: yaml.YAMLError) -> tuple[int, str]:
    """The line at fault, from 1 on, and what is wrong with it."""
    if isinstance(error, yaml.reader.ReaderError):
        # Its position counts bytes where they could not be decoded, characters where one is not allowed.
        undecodable = error.encoding != "unicode"
        before = content[: error.position] if undecodable else content
        line = before.decode(errors="replace")[: error.position].count("\n")
        reason = f"not {error.encoding.upper()} text, " if undecodable else ""
        return line + 1, f"{reason}{str(error).splitlines()[0]}"
    assert isinstance(error, yaml.MarkedYAMLError)
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    line, what = _Fault(_BREAK.split(content.decode("utf-16" if utf_16 else "utf-8", "replace")), error).describe()
    return line + 1, what


class _Fault:
    """An error of the YAML reader, and the lines of the file. Lines count from 0 here, as the reader has them."""

    def __init__(self, lines: list[str], error: yaml.MarkedYAMLError) -> None:
        assert error.problem_mark
        self.lines = lines
        self.line: int = error.problem_mark.line
        self.column: int = error.problem_mark.column
        self.begin = error.context_mark.line if error.context_mark else self.line
        self.context = error.context or ""
        self.problem = error.problem or ""
        if isinstance(error, yaml.composer.ComposerError) and error.context:
            self.problem = f"{error.context}, {error.problem}"

    def describe(self) -> tuple[int, str]:
        """The line at fault, and what is wrong: of a mistake that people make, else what the reader says."""
        if self.problem.startswith(r"found character '\t'"):
            return self.line, "found a tab, expected spaces; YAML indents by spaces"
        if self.problem == "could not find expected ':'":
            return self.begin, self._no_pair(self.begin)
        if self.problem == "found unexpected end of stream" and "quoted" in self.context:
            return self.begin, "the quote that begins here has no end"
        unclosed = re.fullmatch(r"expected ',' or '([]}])', but got '(?:(:)|<stream end>)'", self.problem)
        # Where the end was expected, the next line has a key.
        if unclosed and (not unclosed[2] or self.line > self.begin):
            return self.begin, f"the {KINDS[unclosed[1]]} that begins here has no {unclosed[1]}"
        if port := re.search(r"\*:(\w+)", self._text(self.line)) if "alias" in self.context else None:
            return self.line, f"{port[0]!r} is no address; a port alone is every address: {port[1]}"
        if self.problem == "mapping values are not allowed here":
            return self._second_colon()
        if self.problem == "sequence entries are not allowed here":
            return self.line, "a list in lines of its own begins in the line after its key"
        if self.problem.startswith("expected <block end>, but found") and "]:" not in self._text(self.line):
            if "<scalar>" in self.problem:
                return self.line, "found text after a closed quote or bracket"
            return self._misplaced(self.line, self._above(self.line))
        if "<document start>" in self.problem and "<block mapping start>" in self.problem:
            return self._misplaced(self._above(self.line), self.line)
        if re.search(r"[:-]\s+[\[@]|[\[,]\s*:", self._text(self.line)):
            # The forms of an address that mean something else to YAML.
            return self.line, f"{self.problem}; an address that starts with [, @ or : needs quotes"
        return self.line, self.problem

    def _second_colon(self) -> tuple[int, str]:
        """A key where there cannot be one."""
        above = self._above(self.line)
        if re.search(r":\s", self._text(self.line)[: self.column]):
            told = "in a value, a colon has no space after it, unless the value is in quotes"
            return self.line, f"expected one KEY: VALUE, found {self._text(self.line).strip()!r}; {told}"
        if re.search(r"^ *- |:(\s|$)", self._text(above)):
            return self._misplaced(self.line, above)
        return above, self._no_pair(above)

    def _no_pair(self, line: int) -> str:
        """What is said of a line without key and value."""
        text = self._text(line).strip()
        item = ", or - ITEM as above" if self._text(self._above(line)).lstrip().startswith("- ") else ""
        space = "; a space belongs after the colon" if not item and re.match(r"\w+:\S", text) else ""
        return f"expected KEY: VALUE{item}, found {text!r}{space}"

    def _misplaced(self, line: int, other: int) -> tuple[int, str]:
        """A line that begins in another column than those beside it."""
        dashed = self._text(line).lstrip().startswith("- ")
        column, beside = self._column(line, dashed), self._column(other, dashed)
        if column == beside:
            return line, self._no_pair(line)
        where = f"this line begins in column {column + 1}, line {other + 1} in column {beside + 1}"
        return line, f"wrong indentation: {where}; {TOGETHER}"

    def _above(self, line: int) -> int:
        """The next line above that is neither blank nor a comment; the first of all if there is none."""
        while line > 0:
            line -= 1
            if self._text(line).strip() and not self._text(line).lstrip().startswith("#"):
                break
        return line

    def _column(self, line: int, dashed: bool = False) -> int:
        """Where a line begins: with its dash, or with what comes after it."""
        match = re.match(r" *" if dashed else r" *(?:- +)*", self._text(line))
        return match.end() if match else 0

    def _text(self, line: int) -> str:
        return self.lines[line] if line < len(self.lines) else ""
