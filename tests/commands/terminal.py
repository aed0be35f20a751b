"""A program in a terminal, and what is to be seen on its screen."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.support import PATIENCE

# What a terminal gets: a character that is shown, one that is not, or a sequence that begins with Escape.
TOKENS = re.compile(
    r"\x1b\[(?P<private>[?>]?)(?P<numbers>[\d;]*)(?P<final>[@-~])"
    r"|\x1b(?P<escape>[()][AB0]|[=>M78])"
    r"|(?P<control>[\x00-\x1a\x1c-\x1f\x7f])"
    r"|(?P<text>[^\x00-\x1f\x7f]+)"
    r"|(?P<begun>\x1b.*)",
    re.DOTALL,
)

LONGEST = 40  # characters of a sequence


class Screen:
    """The characters of a screen, as xterm and a VT100 show them. Fails at what it does not know."""

    def __init__(self, lines: int, columns: int) -> None:
        self.size = lines, columns
        self.clear()

    def clear(self) -> None:
        lines, columns = self.size
        self.cells = [[" "] * columns for _ in range(lines)]
        self.at = [0, 0]
        self.region = 0, lines  # what scrolls, from one line to before another
        self.shown = ""  # the last character

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.cells)

    def feed(self, data: str) -> str:
        """Take what the program wrote; the rest of it that is a sequence without its end."""
        for token in TOKENS.finditer(data):
            if token["begun"]:
                return token["begun"]
            if token["text"]:
                self._write(token["text"])
            elif token["control"]:
                self._control(token["control"])
            elif token["final"] and not token["private"]:
                self._sequence(token["final"], [int(number or 0) for number in token["numbers"].split(";")])
            elif token["private"] and token["final"] not in "hlc":
                raise AssertionError(f"unknown: {token[0]!r}")
            elif token["escape"] == "M":
                self._up()
        return ""

    def _up(self) -> None:
        if self.at[0] == self.region[0]:
            self._insert(self.at[0], 1)
        else:
            self.at[0] = max(0, self.at[0] - 1)

    def _down(self) -> None:
        if self.at[0] == self.region[1] - 1:
            self._delete(self.region[0], 1)
        else:
            self.at[0] = min(self.at[0] + 1, self.size[0] - 1)

    def _insert(self, line: int, count: int) -> None:
        """Empty lines, in place of the last ones of what scrolls."""
        end = self.region[1]
        fresh = [[" "] * self.size[1] for _ in range(count)]
        self.cells[line:end] = (fresh + self.cells[line:end])[: end - line]

    def _delete(self, line: int, count: int) -> None:
        end = self.region[1]
        fresh = [[" "] * self.size[1] for _ in range(count)]
        self.cells[line:end] = (self.cells[line:end] + fresh)[-(end - line) :]

    def _write(self, text: str) -> None:
        for one in text:
            if self.at[1] >= self.size[1]:
                self.at[1] = 0
                self._down()
            self.cells[self.at[0]][self.at[1]] = self.shown = one
            self.at[1] += 1

    def _control(self, control: str) -> None:
        column = min(self.at[1], self.size[1] - 1)
        if control == "\n":
            self._down()
        elif control in "\r\b":
            self.at[1] = 0 if control == "\r" else max(0, column - 1)
        else:
            assert control in "\x0e\x0f\x07\x00", f"unknown: {control!r}"

    def _sequence(self, final: str, numbers: Sequence[int]) -> None:
        lines, columns = self.size
        first = numbers[0]
        count = first or 1
        line, column = self.at[0], min(self.at[1], columns - 1)
        row = self.cells[line]
        if final in "HGdABCD":
            to = {
                "H": (count - 1, (numbers[1] or 1) - 1 if len(numbers) > 1 else 0),
                "G": (line, count - 1),
                "d": (count - 1, column),
                "A": (line - count, column),
                "B": (line + count, column),
                "C": (line, column + count),
                "D": (line, column - count),
            }[final]
            self.at = [max(0, min(to[0], lines - 1)), max(0, min(to[1], columns - 1))]
        elif final in "JK":
            start, end = ((column, columns), (0, column + 1), (0, columns))[first]
            row[start:end] = [" "] * (end - start)
            for other in range(lines) if final == "J" else ():
                if first == 2 or (other > line if first == 0 else other < line):
                    self.cells[other] = [" "] * columns
        elif final == "X":
            row[column : column + count] = [" "] * min(count, columns - column)
        elif final == "b":
            self._write(self.shown * count)
        elif final == "P":
            self.cells[line] = (row[:column] + row[column + count :] + [" "] * count)[:columns]
        elif final == "@":
            self.cells[line] = (row[:column] + [" "] * count + row[column:])[:columns]
        elif final == "L":
            self._insert(line, count)
        elif final == "M":
            self._delete(line, count)
        elif final == "S":
            self._delete(self.region[0], count)
        elif final == "T":
            self._insert(self.region[0], count)
        elif final == "r":
            self.region = count - 1, numbers[1] if len(numbers) > 1 else lines
            self.at = [0, 0]
        else:
            assert final in "mhlt", f"unknown: {numbers} {final}"


class Terminal:
    """A program in a terminal of its own, with its screen. written: all that it wrote."""

    def __init__(self, command: Sequence[str], lines: int, columns: int, env: Mapping[str, str]) -> None:
        self.screen = Screen(lines, columns)
        self.written = ""
        self._rest = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ours, theirs = pty.openpty()
        self._set_size()
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],  # so that the terminal's keys send it signals
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PYTHONFAULTHANDLER": "1", **env},
        )

    def _set_size(self) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", *self.screen.size, 0, 0))

    def resize(self, lines: int, columns: int) -> None:
        """As if somebody pulled at the window; the kernel sends SIGWINCH."""
        self.see(lambda _: True)
        self.screen.size = lines, columns
        self.screen.clear()
        self._set_size()

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def see(self, condition: Callable[[str], object], what: str = "") -> str:
        """Wait until what is on the screen is so, and return it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self._read()
            if condition(text := self.screen.text):
                return text
            assert time.monotonic() < deadline, f"still not to be seen: {what}\n{text}"
            select.select([self._ours], [], [], 0.1)

    def wait_for(self, *words: str) -> str:
        """Wait until all these words are on the screen, and return it."""
        return self.see(lambda text: all(word in text for word in words), " ".join(words))

    def end(self) -> int:
        """Wait for the end of the program; its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            self._read()
            assert time.monotonic() < deadline, f"still running\n{self.screen.text}"
            select.select([self._ours], [], [], 0.01)
        self._read()
        code = self.process.returncode
        assert code >= 0, f"killed by signal {-code}\n{self.written[-4000:]}"
        return code

    def hang_up(self) -> None:
        """As if the connection to the terminal broke."""
        os.close(self.theirs)
        os.close(self._ours)
        self._ours = self.theirs = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        if self._ours >= 0:
            self.hang_up()

    def _read(self) -> None:
        while select.select([self._ours], [], [], 0)[0]:
            text = self._decoder.decode(os.read(self._ours, 1 << 16))
            self.written += text
            self._rest = self.screen.feed(self._rest + text)
            assert len(self._rest) < LONGEST, f"unknown: {self._rest!r}"


@contextmanager
def terminal(
    command: Sequence[str], lines: int = 24, columns: int = 80, env: Mapping[str, str] | None = None
) -> Iterator[Terminal]:
    """A program in a terminal; xterm with 256 colours and UTF-8, if nothing else is said."""
    there = Terminal(command, lines, columns, {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **(env or {})})
    try:
        yield there
    finally:
        there.close()
