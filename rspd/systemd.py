"""What systemd passes to a service, and what the service tells it (sd_listen_fds(3), sd_notify(3))."""

from __future__ import annotations

import os
import socket
import stat
import time
from math import inf
from typing import NamedTuple

from sdnotify import SystemdNotifier

from rspd.errors import StartError

FIRST_SOCKET = 3  # SD_LISTEN_FDS_START

LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

FAMILIES = {socket.AF_INET: "AF_INET", socket.AF_INET6: "AF_INET6", socket.AF_UNIX: "AF_UNIX"}

# TCP, TCP in several paths, and what a unix socket has.
PROTOCOLS = frozenset({0, socket.IPPROTO_TCP, 262})

FILE_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFREG: "a file",
    stat.S_IFCHR: "a device",
    stat.S_IFDIR: "a folder",
}

SOCKET_KINDS: dict[int, str] = {
    socket.SOCK_DGRAM: "a datagram socket",
    socket.SOCK_SEQPACKET: "a sequential packet socket",
}

# Seconds that a message which is sent only once waits for room in systemd's queue before it is dropped.
PATIENCE = 1.0

# systemd ignores messages of more than 4096 bytes, and a status is read on a line.
STATUS_MAX = 500

# Systemd wants a sign of life within the time it says; three chances leave room for a lost one.
SIGNS_OF_LIFE = 3


class PassedSocket(NamedTuple):
    """A listening socket from systemd, non-blocking, and its name (`FileDescriptorName=`)."""

    name: str
    sock: socket.SocketType


def take_sockets() -> list[PassedSocket]:
    """The sockets that systemd passed to this process, from now on the caller's; to be called once, before any fork.

    Raises StartError if one of them is no listening stream socket.
    """
    pid, count, names, _ = (os.environ.pop(name, "") for name in LISTEN_VARIABLES)
    if pid != str(os.getpid()) or not count:
        return []
    if not count.isascii() or not count.isdigit() or len(count) > 5:
        raise StartError(f"LISTEN_FDS: expected how many sockets systemd passes, found {count!r}", os.EX_CONFIG)
    # sd_listen_fds_with_names(3) calls them so when names are missing.
    given = names.split(":") if names else ["unknown"] * int(count)
    if len(given) != int(count):
        raise StartError(f"LISTEN_FDNAMES: expected {count} names, as LISTEN_FDS says, found {names!r}", os.EX_CONFIG)
    return [PassedSocket(name, _take(FIRST_SOCKET + index, name)) for index, name in enumerate(given)]


def _take(fd: int, name: str) -> socket.SocketType:
    def wrong(found: str, advice: str) -> StartError:
        return StartError(
            f"socket {name!r} (descriptor {fd}) from systemd: expected a listening stream socket, "
            f"found {found}; {advice} in the socket unit",
            os.EX_CONFIG,
        )

    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise wrong(f"none ({error.strerror})", "look at what is set") from None
    if not stat.S_ISSOCK(mode):
        raise wrong(FILE_KINDS.get(stat.S_IFMT(mode), "something else"), "use ListenStream=")
    sock = socket.SocketType(fileno=fd)
    os.set_inheritable(fd, False)
    if sock.family not in FAMILIES:
        raise wrong(f"one of family {sock.family}", f"use ListenStream= ({', '.join(FAMILIES.values())})")
    if sock.type != socket.SOCK_STREAM:
        raise wrong(SOCKET_KINDS.get(sock.type, f"one of type {sock.type}"), "use ListenStream=")
    if sock.proto not in PROTOCOLS:
        raise wrong(f"one of protocol {sock.proto}", "use TCP")
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise wrong("one that does not listen", "set Accept=no")
    sock.setblocking(False)
    return sock


class Notifier:
    """Tells systemd how the service does; says nothing where NOTIFY_SOCKET is not set.

    interval: seconds between two signs of life that systemd waits for (sd_watchdog_enabled(3)), or inf.
    """

    def __init__(self) -> None:
        self.active = bool(os.environ.get("NOTIFY_SOCKET"))
        self.interval = _watchdog_interval() if self.active else inf
        self._notifier = SystemdNotifier() if self.active else None

    def ready(self, status: str) -> None:
        """The service is at work, for the first time or after a reload."""
        self._send(PATIENCE, "READY=1", _status(status))

    def alive(self, status: str) -> None:
        """A sign of life, and what the service is doing; to be repeated, and never waits."""
        self._send(0, "WATCHDOG=1", _status(status))

    def reloading(self) -> None:
        """A reload begins; it ends with `ready`, however it went."""
        self._send(PATIENCE, "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str, seconds: float) -> None:
        """The service is about to end; to be repeated, and never waits.

        seconds: how long from now systemd is to wait at least; 0 leaves it to the unit.
        """
        extension = [f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"] if seconds else []
        self._send(0, "STOPPING=1", "WATCHDOG=1", *extension, _status(status))

    def failed(self, reason: str, code: int) -> None:
        """The service cannot start.

        code: an errno, or 0.
        """
        self._send(PATIENCE, *([f"ERRNO={code}"] if code else []), _status(reason))

    def _send(self, patience: float, *assignments: str) -> None:
        if self._notifier and self._notifier.socket:
            self._notifier.socket.settimeout(patience)
            self._notifier.notify("\n".join(assignments))


def _status(text: str) -> str:
    # One line, and ASCII: sdnotify encodes latin-1, and drops a message that it cannot encode.
    line = "; ".join(text.splitlines()).encode("ascii", "backslashreplace").decode()
    return "STATUS=" + (line if len(line) <= STATUS_MAX else line[: STATUS_MAX - 3] + "...")


def _watchdog_interval() -> float:
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not usec.isascii() or not usec.isdigit() or pid != str(os.getpid()):
        return inf
    return int(usec) / 1e6 / SIGNS_OF_LIFE or inf
