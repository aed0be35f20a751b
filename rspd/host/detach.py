"""Becoming a daemon (daemon(7)) with python-daemon: descriptors, umask, where stderr leads."""

from __future__ import annotations

import io
import os
import resource
import select
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from rspd.errors import StartError

JOURNAL = "/run/systemd/journal/stdout"
SYSLOG = "/dev/log"

# What journald wants to know of a stream, one line each: identifier, unit, the priority of a line that names none,
# whether lines may name one (`<N>`), and whether to pass lines on to syslog, the kernel's log and the console.
JOURNAL_HEADER = b"rspd\n\n6\n1\n0\n0\n0\n"

STDERR = 2

# Nobody but the owner may write what the daemon creates, and others may not read it.
UMASK = 0o027

# python-daemon 2.x keeps a set of all descriptors that the hard limit allows, 80 bytes each. So a daemon gets the same
# limit as the service (LimitNOFILE=), unless its connections need more.
DESCRIPTORS = 65536

# Seconds after which the process that was started stops waiting for the daemon, as systemd does by default.
START_TIMEOUT = 90.0


def started_by_systemd() -> bool:
    """Whether this process is the main one of a unit, or is to notify systemd.

    INVOCATION_ID and JOURNAL_STREAM do not tell: all processes of a unit have them, and some of these start daemons.
    """
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()) or "NOTIFY_SOCKET" in os.environ


class Starter:
    """The process that was started from a shell, and waits to be told whether the daemon runs.

    fd: where it is told so; -1 once it has been.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def release(self, code: int, reason: str = "") -> bool:
        """Let it write the reason on its stderr and exit with this code. Returns whether it was still waiting."""
        if self.fd < 0:
            return False
        try:
            os.write(self.fd, bytes([code]) + reason.encode(errors="backslashreplace")[: select.PIPE_BUF - 1])
            return True
        except OSError:
            return False  # it was killed, or has stopped waiting
        finally:
            os.close(self.fd)
            self.fd = -1


def detach(preserve: Sequence[int], descriptors: int) -> Starter:
    """Go on as a daemon: no terminal, a session of its own, in `/`, stdout and stderr leading to the journal or syslog.

    Returns in the daemon only. The process that called it waits to be released, and exits.
    preserve: descriptors to stay open; all others are closed, and standard input is /dev/null.
    descriptors: how many the daemon's connections need.
    Raises StartError, in the process that called it.
    """
    log = _open_log()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(hard, max(DESCRIPTORS, descriptors + 1024))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, limit), limit))
    # Slow to import, and for a daemon only.
    from daemon import DaemonContext

    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        wait_for_release(reader, "ended before it was ready; the log may say why: journalctl -t rspd")
    DaemonContext(
        detach_process=True,
        working_directory="/",
        umask=UMASK,
        stdout=log,
        stderr=log,
        files_preserve=[writer, *preserve],
        signal_map={},  # the loop will set handlers; python-daemon's exit with code 1
    ).open()
    log.close()  # descriptors 1 and 2 are copies of it now
    return Starter(writer)


def _open_log() -> socket.socket:
    """A socket to the journal, with JOURNAL_STREAM set to it, or to syslog. Raises StartError."""
    reasons = []
    for path, kind, first in ((JOURNAL, socket.SOCK_STREAM, JOURNAL_HEADER), (SYSLOG, socket.SOCK_DGRAM, b"")):
        log = socket.socket(socket.AF_UNIX, kind)
        try:
            log.connect(path)
            if first:
                log.shutdown(socket.SHUT_RD)
                log.sendall(first)
                status = os.fstat(log.fileno())
                os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
            return log
        except OSError as error:
            log.close()
            reasons.append(f"{path}: {error.strerror}")
    neither = f"a daemon's log goes to the journal or to syslog, and there is neither ({', '.join(reasons)})"
    raise StartError(f"{neither}; use --foreground, where it goes to stderr", os.EX_UNAVAILABLE)


def wait_for_release(reader: int, ended: str) -> NoReturn:
    """Wait for a `Starter` at the other end to release this process, and exit as it says.

    ended: what to say if it ends before that.
    """
    code, reason = os.EX_SOFTWARE, ended
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    if not poll.poll(START_TIMEOUT * 1000):
        reason = f"not ready after {START_TIMEOUT:g} seconds, and still trying; journalctl -t rspd says more"
    elif message := os.read(reader, select.PIPE_BUF):
        code, reason = message[0], message[1:].decode(errors="replace")
    if reason:
        text = "".join(f"rspd: {line}\n" for line in reason.splitlines())
        os.write(STDERR, text.encode(errors="backslashreplace"))
    os._exit(code)


def open_standard_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed. Else a client's socket could get the log's number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # Python has None for a stream that was closed; argparse, print and python-daemon want a file.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    # A file's name need not be UTF-8.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
