"""`rspd top`: what goes on, live, in a terminal."""

from __future__ import annotations

import curses
import locale
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from rspd.admin.query import Query
from rspd.admin.rates import Rates
from rspd.commands.asking import GRACE_OF_LOOKS, Watch, parser_of, socket_of, where
from rspd.commands.screen import Seen, View, draw, press
from rspd.commands.tables import ALARM, BAD, BAR, BOLD, FAINT, WARN
from rspd.commands.troubles import troubles
from rspd.errors import StartError
from rspd.parser import checked, show
from rspd.snapshot import Connections, Snapshot, as_json

if TYPE_CHECKING:
    import _curses

DESCRIPTION = "Shows in a terminal what a running rspd does, live. The key h tells the keys."

EPILOG = "With --json, it looks once, and needs no terminal."

# Seconds between two looks, if nothing else is said, and the least and the most that may be said.
INTERVAL, INTERVAL_MIN, INTERVAL_MAX = 1.0, 0.1, 86400.0

# Seconds: between looks as long as there is no answer; and after so many, a look is said to have none.
RETRY, LATE = 1.0, 1.0

# How the names begin of terminals that may lack the characters of sparklines, whatever the locale says.
ASCII_TERMINALS = ("vt", "ansi", "linux", "cons", "sun")

# Milliseconds in which a terminal sends the rest of a key whose first character is Escape.
ESCAPE_DELAY = 100

# Seconds after which the screen is drawn anew, whatever comes: it says how long there was no answer.
TICK = 1

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(words: Sequence[str]) -> int:
    """Show it until a key or a signal ends it, and return the exit code. Raises StartError."""
    parser = parser_of("top", DESCRIPTION, EPILOG)
    often = f"seconds between two looks, default {INTERVAL:g}"
    parser.add_argument("--interval", metavar="SECONDS", type=checked(_interval), default=INTERVAL, help=often)
    options = parser.parse_args(words)
    path = socket_of(options)
    if options.json:
        snapshot, connections = Watch(path).look(Query())
        show(f'{{"status":{as_json(snapshot)},"connections":{as_json(connections)}}}')
        return 0
    _need_terminal()
    watch = Watch(path, GRACE_OF_LOOKS)
    first, _ = watch.look(Query(limit=0))  # if nobody can be asked, it says so without a screen
    with _Wakeups() as wakeups:
        lookout = _Lookout(watch, options.interval, wakeups)
        window = curses.initscr()
        try:
            return _Top(window, lookout, wakeups, first, where(options)).run()
        finally:
            with suppress(curses.error):  # where the terminal is gone
                curses.endwin()


def _interval(text: str) -> float:
    from rspd.config.values import parse_finite_duration  # slow to import

    seconds = parse_finite_duration(text)
    if not INTERVAL_MIN <= seconds <= INTERVAL_MAX:
        raise ValueError(f"expected from {INTERVAL_MIN:g} to {INTERVAL_MAX:g} seconds, found {text!r}")
    return seconds


def _need_terminal() -> None:
    """Raise StartError where there is no terminal that can be drawn on."""
    advice = "`rspd status` and `rspd connections` need no terminal"
    if not all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        raise StartError(f"rspd top: expected a terminal at stdin and stdout, found none\n{advice}", os.EX_UNAVAILABLE)
    try:
        curses.setupterm()
        usable = curses.tigetstr("cup") is not None  # moves the cursor
    except curses.error:
        usable = False
    if not usable:
        found = f"TERM: expected the name of a terminal with a cursor, found {os.environ.get('TERM', '')!r}"
        raise StartError(f"rspd top: {found}\n{advice}", os.EX_UNAVAILABLE)


class _Wakeups:
    """What ends the wait for keys: an answer, a signal. ends: the signals that came and want the end of it all."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)

    def __enter__(self) -> _Wakeups:
        for number in ENDS:
            signal.signal(number, lambda number, _: self.ends.append(number))
        signal.signal(signal.SIGWINCH, lambda *_: None)
        signal.set_wakeup_fd(self._far.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)

    def fileno(self) -> int:
        """What becomes readable."""
        return self._near.fileno()

    def wake(self) -> None:
        """End the wait; from any thread."""
        with suppress(BlockingIOError):  # it is full, and so is readable
            self._far.send(b"\0")

    def clear(self) -> None:
        """Wait anew."""
        with suppress(BlockingIOError):
            while self._near.recv(4096):
                pass


class _Look:
    """A look: what was seen, and when, by the monotonic clock; or why there was no answer."""

    def __init__(self, watch: Watch, query: Query) -> None:
        self.snapshot, self.connections, self.fault = Snapshot(), Connections(), ""
        try:
            self.snapshot, self.connections = watch.look(query)
            self.when = time.monotonic()
        except StartError as error:
            self.fault = str(error).partition("\n")[0].removeprefix(f"{watch.path}: ")


class _Lookout:
    """Looks in a thread of its own, so that keys work while rspd takes its time. The thread ends with the process."""

    def __init__(self, watch: Watch, interval: float, wakeups: _Wakeups) -> None:
        self._watch, self.interval, self._wakeups = watch, interval, wakeups
        self._wanted: SimpleQueue[Query | None] = SimpleQueue()
        self._found: SimpleQueue[_Look | Exception] = SimpleQueue()
        Thread(target=self._run, daemon=True).start()

    def want(self, query: Query | None) -> None:
        """Look at once, and from now on for these; None: look no more."""
        self._wanted.put(query)

    def found(self) -> list[_Look]:
        """The looks since the last call. Raises what ended the thread."""
        found: list[_Look] = []
        while not self._found.empty():
            answer = self._found.get()
            if isinstance(answer, Exception):
                raise answer
            found.append(answer)
        return found

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._look_on()
        except Exception as bug:
            self._found.put(bug)
            self._wakeups.wake()

    def _look_on(self) -> None:
        query: Query | None = None
        due = None
        while True:
            try:
                query = self._wanted.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
                while True:  # the last wish counts
                    query = self._wanted.get_nowait()
            except Empty:
                pass
            due = None
            if query is not None:
                begin = time.monotonic()
                answer = _Look(self._watch, query)
                self._found.put(answer)
                self._wakeups.wake()
                due = begin + (min(self.interval, RETRY) if answer.fault else self.interval)


class _Top:
    """The screen and the keys.

    when: of the last answer, by the monotonic clock. since: when an answer was awaited at the earliest.
    where: the options that name the service.
    """

    def __init__(
        self, window: _curses.window, lookout: _Lookout, wakeups: _Wakeups, first: Snapshot, where: str
    ) -> None:
        self._window, self._lookout, self._wakeups = window, lookout, wakeups
        self._styles = _styles()
        utf_8 = locale.nl_langinfo(locale.CODESET).upper() in ("UTF-8", "UTF8")
        self._view = View(ascii=not utf_8 or os.environ.get("TERM", "").startswith(ASCII_TERMINALS))
        self._page = 0
        self._rates = Rates()
        self._where = where
        self._seen = Seen(first, Connections(), troubles(first, where=where), where)
        self._when = self._since = time.monotonic()
        self._rates.note(first, self._when)

    def run(self) -> int:
        """Show, and obey keys, until the end; the exit code."""
        curses.noecho()
        curses.cbreak()
        curses.set_escdelay(ESCAPE_DELAY)
        self._window.keypad(True)
        self._window.nodelay(True)
        with suppress(curses.error):  # there are terminals that always show it
            curses.curs_set(0)
        self._want()
        keys = select.poll()
        keys.register(sys.stdin.fileno(), select.POLLIN)
        keys.register(self._wakeups.fileno(), select.POLLIN)
        while not self._wakeups.ends:
            self._fit()
            self._draw()
            for descriptor, event in keys.poll(TICK * 1000):
                if event & ~select.POLLIN:  # the terminal is gone
                    return 0
                if descriptor == self._wakeups.fileno():
                    self._wakeups.clear()
                elif not self._obey():
                    return 0
            self._take()
        # Ctrl-C is a key as q is. Of other signals, a shell says it so.
        number = self._wakeups.ends[0]
        return 0 if number == signal.SIGINT else 128 + number

    def _obey(self) -> bool:
        """Do what the keys say that are there; whether to go on."""
        while True:
            try:
                key = self._window.getkey()
            except curses.error:
                return True
            if key == "\f":
                self._window.redrawwin()
            before = self._view
            view = press(before, key, self._page)
            if view is None:
                return False
            self._view = view
            if (view.sort, view.wanted, view.paused) != (before.sort, before.wanted, before.paused):
                self._want()

    def _want(self) -> None:
        """Say to the lookout what to look at."""
        self._lookout.want(None if self._view.paused else self._view.query(curses.LINES))
        self._since = time.monotonic()

    def _take(self) -> None:
        """Take what was seen meanwhile."""
        for found in self._lookout.found():
            if found.fault:
                self._seen = self._seen._replace(fault=found.fault)
            else:
                wrong = troubles(found.snapshot, where=self._where)
                self._seen = Seen(found.snapshot, found.connections, wrong, self._where)
                self._when = found.when
                self._rates.note(found.snapshot, found.when)

    def _fit(self) -> None:
        """Take the size that the terminal has now."""
        with suppress(OSError):
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
            if columns and lines and (lines, columns) != (curses.LINES, curses.COLS):
                curses.resizeterm(lines, columns)
                self._want()

    def _draw(self) -> None:
        now = time.monotonic()
        seen = self._seen._replace(ago=now - self._when)
        if self._view.paused:
            seen = seen._replace(fault="")
        elif not seen.fault and now - max(self._when, self._since) > self._lookout.interval + LATE:
            seen = seen._replace(fault="rspd is slow to answer")
        height, width = self._window.getmaxyx()
        drawn = draw(seen, self._rates, self._view, height, width)
        self._view, self._page = self._view._replace(first=drawn.first), drawn.page
        self._window.erase()
        for number, line in enumerate(drawn.lines):
            # The cursor cannot go past the last character of the screen, which is shown nevertheless.
            with suppress(curses.error):
                self._window.addstr(number, 0, line.text, self._styles.get(line.style, 0))
        self._window.refresh()


def _styles() -> dict[str, int]:
    """The attributes of the styles; colours only where there are some and nobody minds (no-color.org)."""
    styles = {BOLD: curses.A_BOLD, BAD: curses.A_BOLD, WARN: curses.A_BOLD, FAINT: curses.A_DIM}
    styles |= {BAR: curses.A_REVERSE, ALARM: curses.A_REVERSE | curses.A_BOLD}
    if curses.has_colors() and not os.environ.get("NO_COLOR"):
        with suppress(curses.error):
            curses.start_color()
            curses.use_default_colors()
            for number, (style, colour) in enumerate(((BAD, curses.COLOR_RED), (WARN, curses.COLOR_YELLOW)), 1):
                curses.init_pair(number, colour, -1)
                styles[style] |= curses.color_pair(number)
            styles[ALARM] |= curses.color_pair(1)
    return styles
