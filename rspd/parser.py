"""The words of a command line: argparse, with the exit code of sysexits(3) and kind messages; and what is answered."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, NoReturn

from rspd.errors import StartError

# argparse looks for translations of its words. rspd has none, but the look imports locale: 3 % of a start, and 230 kB.
argparse._ = str  # type: ignore[attr-defined]


# Words that mean something else than an argument of the daemon, where they are the first.
COMMANDS = "status", "connections", "top", "upgrade"


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of sysexits(3).

    keys: those of the configuration file, where an unknown option may be one.
    """

    keys: Collection[str] = ()

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments. Raises StartError."""
        if sys.stderr:  # or argparse would take stdout
            with suppress(OSError):  # newer versions of argparse do so
                self.print_usage(sys.stderr)
        raise StartError(f"{message}{' See' if message.endswith('?') else '; see'} {self.prog} --help", os.EX_USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write the help or the version to stdout, or the usage to stderr. Raises StartError."""
        if file is sys.stdout:  # None if it is closed
            show(message.removesuffix("\n"))
        else:
            super()._print_message(message, file)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Say of an unknown option which one was meant."""
        for word in sys.argv[1:] if args is None else args:
            if re.match("-[a-z]", word) and f"-{word}" in self._option_string_actions:
                self.error(f"unknown option {word!r}; did you mean -{word}?")  # not -c with a value
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            from rspd.config.values import closest  # slow to import, and for messages only

            word = unknown[0].partition("=")[0]
            if command := next((one for one in getattr(options, "addresses", ()) if one in COMMANDS), ""):
                self.error(f"unknown option {word!r}; the command comes first: {self.prog} {command} {word}")
            if not word.startswith("-"):
                self.error(f"expected options only, found {word!r}")
            dashed = word.replace("_", "-")
            key, meant = dashed.lstrip("-").replace("-", "_"), closest(dashed, self._option_string_actions)
            advice = f"; did you mean {meant}?" if meant else ""
            if key in self.keys and meant != dashed:
                advice = f"; {key} is a key of the configuration file"
            self.error(f"unknown option {word!r}{advice}")
        return options, unknown


def show(text: str) -> None:
    """Write a text, or lines, to stdout. A reader that has read enough, as `head`, is no error. Raises StartError."""
    if sys.stdout is None:
        raise StartError("cannot write to stdout: it is closed", os.EX_CANTCREAT)
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # for an encoding that lacks what a name has
        print(text, flush=True)
    except OSError as error:
        sys.stdout = None  # or Python tries again at the end
        if not isinstance(error, BrokenPipeError):
            raise StartError(f"cannot write to stdout: {error.strerror}", os.EX_CANTCREAT) from None


def checked(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A parser of a value whose ValueError argparse repeats to the user."""

    def check(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check
