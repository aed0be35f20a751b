"""The log: one line an event on stderr, for the journal or for a person."""

from __future__ import annotations

import logging
import os
import select
import socket
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# sd-daemon(3): the prefix that tells the journal a line's priority.
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}

SYSLOG_DAEMON = 3 << 3  # the facility, as in syslog(3)

# Milliseconds that rspd may wait for a slow reader of the log: how many it saves up at most, and how many each second
# adds. When they are used up, lines are dropped and counted: a slow log may slow rspd down a little, never stop it.
PATIENCE = 500.0
PATIENCE_PER_SECOND = 20.0
LEAST_WAIT = 10.0

STDERR = 2

SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

LOGGER = logging.getLogger("rspd")  # its modules' loggers are below it


def quote(text: str) -> str:
    """A value for `key=value`: in double quotes, control characters and quotes escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped) + '"'


def complain(message: str) -> None:
    """Say on stderr why rspd does not start, if it can be said there; the log need not be set up."""
    if sys.stderr is None:
        return  # it is closed, and print would take stdout
    prefix = f"<{PRIORITIES[logging.ERROR]}>" if is_journal(STDERR) else "rspd: "
    try:
        print(*(prefix + line for line in message.splitlines()), sep="\n", file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = None  # or Python tries again at the end, and changes the exit code


def is_journal(fd: int) -> bool:
    """Whether a descriptor is the one that systemd connected to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up(level: str) -> None:
    """Send what the modules of rspd log to stderr, from a level of `LEVELS` on. May be called again."""
    # Do not find out for each record what no line shows (the logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    LOGGER.propagate = False
    if not LOGGER.handlers:
        LOGGER.addHandler(StderrHandler())
    LOGGER.setLevel(LEVELS[level])


def write(level: int, message: str) -> None:
    """Log a line of an enabled level without a record of `logging`: the record would cost more than all the rest.

    For the lines that each connection has. Only rspd's own handler gets them.
    """
    for handler in LOGGER.handlers:
        if isinstance(handler, StderrHandler):
            handler.write(time.time(), level, message)


class StderrHandler(logging.Handler):
    """Writes each record: as the journal wants it, as syslog does where stderr is a datagram socket, or for people."""

    def __init__(self) -> None:
        super().__init__()
        self._journal = is_journal(STDERR)
        self._traceback = logging.Formatter()
        self._output = Output(STDERR, self._note_lost)
        self._syslog = self._output.datagrams
        self._second = -1
        self._when = ""  # that second, as lines for people and for syslog have it

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self._traceback.formatException(record.exc_info)
        for part in message.split("\n") if self._syslog else [message]:
            self.write(record.created, record.levelno, part)

    def write(self, created: float, level: int, message: str) -> None:
        """Write a message of one line; or of several, unless they go to syslog."""
        self._output.write(self._lines(created, level, message))

    def close(self) -> None:
        """Called when logging is shut down."""
        self._output.close()
        super().close()

    def _lines(self, created: float, level: int, message: str) -> bytes:
        if self._journal:
            prefix = f"<{PRIORITIES[level]}>"
            text = prefix + message.replace("\n", "\n" + prefix)
        else:
            second = int(created)
            if second != self._second:
                self._second = second
                form = "%b %e %H:%M:%S" if self._syslog else "%Y-%m-%d %H:%M:%S"
                self._when = time.strftime(form, time.localtime(created))
            if self._syslog:
                text = f"<{SYSLOG_DAEMON + PRIORITIES[level]}>{self._when} rspd[{os.getpid()}]: {message}"
            else:
                text = f"{self._when}.{int(created % 1 * 1000):03} {logging.getLevelName(level):<7} {message}"
        return (text + "\n").encode(errors="backslashreplace")

    def _note_lost(self, count: int) -> bytes:
        return self._lines(time.time(), logging.WARNING, f"{count} lines of this log were lost, nobody read it")


class Output:
    """Writes to a descriptor without waiting long for its reader. It stays blocking for all processes that share it.

    datagrams: whether it is a datagram socket; each `write` makes one then.
    note_lost: makes the line that says how many were lost.
    """

    def __init__(self, fd: int, note_lost: Callable[[int], bytes]) -> None:
        self._own = -1  # the descriptor that was opened here
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            # It is closed: a client's socket may get its number.
            self._own = fd = os.open(os.devnull, os.O_WRONLY)
            mode = os.fstat(fd).st_mode
        # A pipe takes so much without blocking once poll(2) calls it writable (pipe(7)).
        self._piece = select.PIPE_BUF
        if stat.S_ISCHR(mode) and self._own < 0:
            # A terminal may take less, and a blocking write would wait for its reader. So open it again, without
            # blocking: the shell shares the descriptor that was given.
            try:
                self._own = fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:
                # The terminal is another user's, as after su(1). One byte fits whenever poll(2) says so.
                self._piece = 1 if os.isatty(fd) else self._piece
        self._fd = fd
        self._note_lost = note_lost
        self._sock = socket.SocketType(fileno=fd) if stat.S_ISSOCK(mode) else None
        self.datagrams = self._sock is not None and self._sock.type == socket.SOCK_DGRAM
        self._peer: Any = _peer(self._sock) if self._sock and self.datagrams else None
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._never_full = stat.S_ISREG(mode)
        self._patience = PATIENCE
        self._waited = time.monotonic()
        self._lost = 0
        self._cut = b""  # ends a line of which only the beginning was written

    def write(self, data: bytes) -> None:
        """Write a line or several that belong together, or count them as lost if they cannot be written."""
        if self._lost and self._put(self._note_lost(self._lost)):
            self._lost = 0
        if self._lost or not self._put(data):
            self._lost += 1

    def close(self) -> None:
        """Stop writing; the descriptor that was given stays open."""
        if self._sock:
            self._sock.detach()
        if self._own >= 0:
            os.close(self._own)

    def _put(self, data: bytes) -> bool:
        cut, rest = self._cut, self._cut + data
        try:
            while rest:
                rest = rest[self._send(rest) :]
        except OSError:
            if len(rest) < len(data):
                self._cut = b"\n"
            elif len(rest) < len(cut + data):
                self._cut = b""
            return rest == b"\n"  # only the line's end is missing: it is written before the next line
        self._cut = b""
        return True

    def _send(self, data: bytes) -> int:
        if self._sock:
            try:
                return self._sock.send(data, SEND_FLAGS)
            except BlockingIOError:
                self._wait()
            except OSError:
                if not self._peer:
                    raise
                # After a restart, the syslog daemon is a new peer with the same name.
                self._sock.connect(self._peer)
            return self._sock.send(data, SEND_FLAGS)
        if self._never_full or self._poll.poll(0) or self._wait():
            return os.write(self._fd, data[: self._piece])
        raise BlockingIOError

    def _wait(self) -> bool:
        """Wait for the reader as long as patience lasts. Returns whether the reader has made room."""
        begun = time.monotonic()
        self._patience = min(self._patience + (begun - self._waited) * PATIENCE_PER_SECOND, PATIENCE)
        self._waited = begun
        if self._patience < LEAST_WAIT:
            return False
        room = bool(self._poll.poll(self._patience))
        self._waited = time.monotonic()
        self._patience = max(0.0, self._patience - (self._waited - begun) * 1000)
        return room


def _peer(sock: socket.SocketType) -> Any:
    try:
        return sock.getpeername()
    except OSError:
        return None  # not connected: nothing will be written
