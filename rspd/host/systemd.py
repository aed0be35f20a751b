"""What systemd passes to a service, and what the service tells it (sd_listen_fds(3), sd_notify(3))."""

import errno
import os
import socket
import stat
import struct
import time
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from sdnotify import SystemdNotifier

from rspd.errors import StartError

FIRST_SOCKET = 3  # SD_LISTEN_FDS_START

# How the names begin that this service gives to what it stores. No socket unit has such a name.
STORED = "rspd+"

LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

FAMILIES = {socket.AF_INET: "AF_INET", socket.AF_INET6: "AF_INET6", socket.AF_UNIX: "AF_UNIX"}

# Those of a unix socket, of TCP, and of Multipath TCP.
PROTOCOLS = frozenset({0, socket.IPPROTO_TCP, 262})

FILE_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFREG: "a file", stat.S_IFCHR: "a device", stat.S_IFDIR: "a folder"}

SOCKET_KINDS: dict[int, str] = {
    socket.SOCK_DGRAM: "a datagram socket",
    socket.SOCK_SEQPACKET: "a sequential packet socket",
}

# Seconds that the reason why the service cannot start waits for room in systemd's queue.
PATIENCE = 1.0

# systemd ignores messages of more than 4096 bytes, and a status is read on a line.
STATUS_MAX = 500

# Systemd wants a sign of life within the time it says; three chances leave room for a lost one.
SIGNS_OF_LIFE = 3

# What send(2) says where a message may be sent later.
NO_ROOM = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})

USEC_INFINITY = 2**64 - 1


# By this, rspd-worker@.service tells a worker its number.
WORKER = "RSPD_WORKER"


class PassedSocket(NamedTuple):
    """A listening socket from systemd, non-blocking, and its name (`FileDescriptorName=`)."""

    name: str
    sock: socket.SocketType


class StoredDescriptor(NamedTuple):
    """A descriptor from the service's descriptor store, and its name there, without STORED."""

    name: str
    fd: int


def take_descriptors() -> tuple[list[PassedSocket], list[StoredDescriptor]]:
    """What systemd passed to this process, from now on the caller's; to be called once, before any fork.

    Raises StartError if a socket from a socket unit is no listening stream socket.
    """
    pid, count, names, _ = (os.environ.pop(name, "") for name in LISTEN_VARIABLES)
    if pid != str(os.getpid()) or not count:
        return [], []
    if not count.isascii() or not count.isdigit() or len(count) > 5:
        raise StartError(f"LISTEN_FDS: expected how many sockets systemd passes, found {count!r}", os.EX_CONFIG)
    # sd_listen_fds_with_names(3) calls them so when names are missing.
    given = names.split(":") if names else ["unknown"] * int(count)
    if len(given) != int(count):
        raise StartError(f"LISTEN_FDNAMES: expected {count} names, as LISTEN_FDS says, found {names!r}", os.EX_CONFIG)
    passed, stored = [], []
    for fd, name in enumerate(given, FIRST_SOCKET):
        if name.startswith(STORED):
            os.set_inheritable(fd, False)
            stored.append(StoredDescriptor(name[len(STORED) :], fd))
        else:
            passed.append(PassedSocket(name, _take(fd, name)))
    return passed, stored


def _take(fd: int, name: str) -> socket.SocketType:
    def wrong(found: str, advice: str) -> StartError:
        expected = f"socket {name!r} (descriptor {fd}) from systemd: expected a listening stream socket"
        return StartError(f"{expected}, found {found}; {advice} in the socket unit", os.EX_CONFIG)

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


def runtime_folder() -> str:
    """The folder that systemd has made for this service (RuntimeDirectory=); empty if there is none."""
    return os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]


def worker() -> str:
    """The number of this worker, which its unit says; empty for each other service."""
    return os.environ.get(WORKER, "")


class Notifier:
    """Tells systemd how the service does; says nothing where NOTIFY_SOCKET is not set.

    Only `failed` ever waits. If systemd's queue has no room for a change of state, the change is `pending` until a
    later call finds room. Of several reloads, only the last is pending.
    interval: seconds between two signs of life that systemd waits for (sd_watchdog_enabled(3)), or inf.
    """

    def __init__(self) -> None:
        self.active = bool(os.environ.get("NOTIFY_SOCKET"))
        self.interval = _watchdog_interval() if self.active else inf
        # Its `notify` hides errors: then a message that found no room would not be sent again. So use its socket.
        self._notifier = SystemdNotifier() if self.active else None
        self._pending: list[list[str]] = []

    @property
    def pending(self) -> bool:
        """Whether systemd has yet to hear of a change: call `alive` soon."""
        return bool(self._pending)

    def starting(self, status: str) -> None:
        """The service is not at work yet, and why."""
        self._send(_status(status))

    def ready(self, status: str) -> None:
        """The service is at work, for the first time or after a reload."""
        self._pending.append(["READY=1", _status(status)])
        self._send_pending()

    def alive(self, status: str) -> None:
        """A sign of life, and what the service is doing; to be repeated."""
        self._send_pending()
        if not self._pending:
            self._send("WATCHDOG=1", _status(status))

    def reloading(self) -> None:
        """A reload begins. Call `ready` at its end, also if it failed."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._pending = [["RELOADING=1", f"MONOTONIC_USEC={usec}"]]
        self._send_pending()

    def stopping(self, status: str, seconds: float) -> None:
        """The service is about to end; to be repeated.

        seconds: how long from now systemd is to wait at least; 0 leaves it to the unit.
        """
        extension = [f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"] if seconds else []
        self._send("STOPPING=1", "WATCHDOG=1", *extension, _status(status))

    def failed(self, reason: str, code: int) -> None:
        """The service cannot start. Waits a moment for systemd, if it must.

        code: an errno, or 0.
        """
        self._send(*([f"ERRNO={code}"] if code else []), _status(reason), patience=PATIENCE)

    # The descriptor store. These return False where systemd has no room for the message.

    def store(self, name: str, fds: Sequence[int], poll: bool = True) -> bool:
        """Have systemd keep these descriptors (FDSTORE=1); it has copies of its own.

        poll: whether systemd closes one that hangs up. A listener hangs up while it rests.
        """
        return self._send("FDSTORE=1", f"FDNAME={STORED}{name}", *([] if poll else ["FDPOLL=0"]), fds=fds)

    def remove(self, name: str) -> bool:
        """Have systemd close what it keeps with this name."""
        return self._send("FDSTOREREMOVE=1", f"FDNAME={STORED}{name}")

    def barrier(self, fd: int) -> bool:
        """Have systemd close its copy of this descriptor once it has read all that it was told before."""
        return self._send("BARRIER=1", fds=[fd])

    def _send_pending(self) -> None:
        while self._pending and self._send(*self._pending[0]):
            del self._pending[0]

    def _send(self, *assignments: str, patience: float = 0.0, fds: Sequence[int] = ()) -> bool:
        """Send a message; False if there was no room for it."""
        if not self._notifier or not self._notifier.socket:
            return True
        self._notifier.socket.settimeout(patience)
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
            self._notifier.socket.sendmsg(["\n".join(assignments).encode()], rights)
        except OSError as error:
            return error.errno not in NO_ROOM  # any other error: nobody is there
        return True


def _status(text: str) -> str:
    # One line, and ASCII: what `systemctl status` shows on any terminal.
    line = "; ".join(text.splitlines()).encode("ascii", "backslashreplace").decode()
    return "STATUS=" + (line if len(line) <= STATUS_MAX else line[: STATUS_MAX - 3] + "...")


def _watchdog_interval() -> float:
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    # sd_watchdog_enabled(3) takes a 64-bit number, but neither 0 nor the largest, which means never.
    if not usec.isascii() or not usec.isdigit() or len(usec) > 20 or pid != str(os.getpid()):
        return inf
    return int(usec) / 1e6 / SIGNS_OF_LIFE if 0 < int(usec) < USEC_INFINITY else inf
