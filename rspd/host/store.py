"""The service's descriptor store: what systemd keeps from one process of the service to the next (sd_notify(3)).

The listening sockets are in the store while the service runs. At a restart, rspd adds a parcel: a queue, which is a
pair of sockets, and a file in memory (memfd_create(2)). The descriptors of the connections are in the queue
(SCM_RIGHTS, unix(7)), and the file says what they are. To store each descriptor by itself takes systemd minutes, and
it cannot start the next process then.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Protocol

from rspd.host.systemd import StoredDescriptor

# The names in the store, all below STORED.
LISTENER, PARCEL = "listener-", "parcel"

# FileDescriptorStoreMax= in the units, and how many listening sockets are kept: a parcel needs room too.
STORE_MAX = 512
LISTENERS_MAX = STORE_MAX - 8

# The most descriptors that one message takes (SCM_MAX_FD, unix(7)).
MESSAGE_MAX = 253

# Bytes of the kernel's memory for the queue, and for one message of it. 65,536 descriptors take 350 kB; the kernel
# gives less than this if net.core.wmem_max is lower, but that much.
QUEUE_SIZE = 1 << 20
MESSAGE_SIZE = 1 << 12

# Bytes of a descriptor's number.
NUMBER = struct.calcsize("i")

# recvmsg(2) had no memory for this one call: how often to try.
NO_MEMORY, ATTEMPTS = frozenset({errno.ENOBUFS, errno.ENOMEM}), 100

FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

# close(2) sends RST (socket(7)).
LINGER_0 = struct.pack("ii", 1, 0)


class Keeper(Protocol):
    """Who keeps descriptors for the next process: `Notifier`, or what is executed next."""

    def store(self, name: str, fds: Sequence[int], poll: bool = True) -> bool:
        """As for `Notifier`."""

    def remove(self, name: str) -> bool:
        """As for `Notifier`."""

    def barrier(self, fd: int) -> bool:
        """As for `Notifier`."""


class Listening(Protocol):
    """A listening socket. file: which file a unix socket has, by device and inode; None for one that needs none."""

    fd: int
    file: tuple[int, int] | None


class Store:
    """What this process keeps in the store."""

    def __init__(self, keeper: Keeper, found: Iterable[StoredDescriptor]) -> None:
        """found: what the process before has left there."""
        self._keeper = keeper
        self._kept = {name for name, _ in found}
        self._wanted: dict[str, int] = {}

    def keep(self, listeners: Iterable[Listening]) -> None:
        """Keep these listening sockets from now on, and nothing else."""
        self._wanted = {self._name(one): one.fd for one in list(listeners)[:LISTENERS_MAX]}
        self.keep_all()

    def keep_all(self) -> None:
        """Tell systemd what it has not heard yet, if it had no room for a message."""
        for name in self._kept - self._wanted.keys():
            self.remove(name)
        for name in self._wanted.keys() - self._kept:
            if self._keeper.store(name, [self._wanted[name]], poll=False):
                self._kept.add(name)

    def keeps(self, name: str) -> bool:
        """Whether something with this name is in the store."""
        return name in self._kept

    def _name(self, listener: Listening) -> str:
        """The name of a listening socket. That of a unix socket says which file is its own."""
        name = f"{LISTENER}{os.fstat(listener.fd).st_ino}"
        known = (kept for kept in self._kept if f"{kept}-".startswith(f"{name}-"))
        return next(known, None) or "-".join([name, *map(str, listener.file or ())])

    def remove(self, name: str) -> None:
        """Keep nothing that has this name."""
        if self._keeper.remove(name):
            self._kept.discard(name)

    def keep_parcel(self, parcel: Parcel) -> None:
        """Keep a parcel. Whether systemd took it is known after `barrier`, see `Parcel.kept`. Raises OSError."""
        if not self._keeper.store(PARCEL, parcel.left):
            raise OSError(errno.EAGAIN, "systemd takes no message")
        self._kept.add(PARCEL)
        parcel.leave()

    def barrier(self) -> int:
        """A descriptor that has news once systemd has read all that it was told; the caller's. Raises OSError."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not self._keeper.barrier(writer):
                os.close(reader)
                raise OSError(errno.EAGAIN, "systemd takes no message")
        finally:
            os.close(writer)
        return reader


class Parcel:
    """What this process leaves to the next one. First it is left in the store, then it is filled.

    left: its descriptors, for the store.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        with ExitStack() as stack:
            self._state = os.memfd_create("rspd-state", os.MFD_CLOEXEC)
            stack.callback(os.close, self._state)
            self._queue, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(self._queue)
            stack.enter_context(far)
            self._queue.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE_SIZE)
            # One end is the last to be stored. If systemd has that, it has all: else the other end has nobody.
            self._probe, last = socket.socketpair()
            stack.enter_context(self._probe)
            stack.enter_context(last)
            self.left = [self._state, self._queue.fileno(), far.fileno(), last.fileno()]
            self._for_store = far, last
            self._open = stack.pop_all()

    def leave(self) -> None:
        """The store has been told of it: close what is not needed to fill it."""
        for sock in self._for_store:
            sock.close()

    @property
    def kept(self) -> bool:
        """Whether systemd has it. To be asked after a barrier."""
        poll = select.poll()
        poll.register(self._probe, 0)
        return not poll.poll(0)

    def send(self, fds: Sequence[int], token: bytes) -> int:
        """Put descriptors into the queue, each with its number. Returns how many went in, up to one that does not fit.

        token: the state has the same one.
        """
        sent = 0
        while sent < len(fds):
            batch = fds[sent : sent + MESSAGE_MAX]
            numbers = struct.pack(f"{len(batch)}i", *batch)
            try:
                self._queue.sendmsg([token + numbers], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)], FLAGS)
            except OSError:
                # Too many are in flight for this user (ETOOMANYREFS), or there is no memory.
                break
            sent += len(batch)
        return sent

    def write(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write the state. Raises OSError."""
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[os.write(self._state, left) :]

    def close(self) -> None:
        """Close what this process has of it."""
        self._open.close()


class Inheritance:
    """What the process before has left in the store; of this process from now on.

    listeners: the listening sockets. lost: those whose file is gone, or another one is in its place; each with its own
    file, as of `Listening`, or None if that is not known.
    """

    def __init__(self, found: Iterable[StoredDescriptor]) -> None:
        self.listeners: list[socket.SocketType] = []
        self.lost: list[tuple[socket.SocketType, tuple[int, int] | None]] = []
        self._states: list[int] = []
        self._queues: list[socket.SocketType] = []
        for name, fd in found:
            try:
                mode = os.fstat(fd).st_mode
            except OSError:
                continue  # it is not there
            if name == PARCEL and stat.S_ISREG(mode):
                self._states.append(fd)
            elif name == PARCEL and stat.S_ISSOCK(mode):
                queue = socket.SocketType(fileno=fd)
                queue.setblocking(False)
                self._queues.append(queue)
            elif stat.S_ISSOCK(mode) and (listener := _listener(fd)):
                own = _file_named(name)
                if own == _file_at(listener.getsockname()):
                    self.listeners.append(listener)
                else:
                    self.lost.append((listener, own))
            else:
                os.close(fd)

    def states(self) -> list[bytes]:
        """What was written into each parcel; one, or none. Raises OSError."""
        return [_content(fd) for fd in self._states]

    def receive(self, token: bytes) -> dict[int, int]:
        """The descriptors in the queues that were sent with this token, by their numbers in the process before.

        The caller owns them. Others are closed. If there are too few descriptors here, the rest is lost.
        """
        received: dict[int, int] = {}
        strange: list[int] = []
        for queue in self._queues:
            for message, fds in _messages(queue):
                if message.startswith(token):
                    numbers = struct.unpack_from(f"{len(fds)}i", message, len(token))
                    received.update(zip(numbers, fds, strict=True))
                else:
                    strange += fds
        # After an attempt that failed, a socket may come with both tokens: it is not to be reset.
        known = {os.fstat(fd).st_ino for fd in received.values()} if strange else set()
        for fd in strange:
            if os.fstat(fd).st_ino in known:
                os.close(fd)
            else:
                abort([fd])
        return received

    def close(self) -> None:
        """Close all that has not been taken but the listeners."""
        for queue in self._queues:
            for _, fds in _messages(queue):
                abort(fds)
            queue.close()
        for fd in self._states:
            os.close(fd)
        self._queues.clear()
        self._states.clear()


def abort(fds: Iterable[int]) -> None:
    """Close descriptors that nobody knows. A peer gets RST: what was cut short must not look complete."""
    for fd in fds:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=fd) as sock, suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        else:
            os.close(fd)


def _file_named(name: str) -> tuple[int, int] | None:
    """Which file is a unix socket's own, by the name that `Store` gave it; None if the name does not say it."""
    _, *numbers = name.removeprefix(LISTENER).split("-")
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and all(map(str.isdecimal, numbers)) else None


def _file_at(where: object) -> tuple[int, ...] | None:
    """Which file is where a socket is bound: empty for none, None where a socket needs none."""
    try:
        status = os.lstat(where) if isinstance(where, str) and where.startswith("/") else None
    except OSError:
        return ()
    return status and (status.st_dev, status.st_ino)


def _listener(fd: int) -> socket.SocketType | None:
    """A listening socket; None if it listens no more."""
    sock = socket.SocketType(fileno=fd)
    with suppress(OSError):
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.setblocking(False)
            return sock
    sock.detach()
    return None


def _content(fd: int) -> bytes:
    parts: list[bytes] = []
    while part := os.pread(fd, 1 << 30, sum(map(len, parts))):
        parts.append(part)
    return b"".join(parts)


def _messages(queue: socket.SocketType) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """The messages in a queue, each with its descriptors."""
    room = socket.CMSG_SPACE(MESSAGE_MAX * NUMBER)
    attempts = 0
    while True:
        try:
            message, ancillary, _, _ = queue.recvmsg(MESSAGE_SIZE, room, FLAGS | socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            attempts += 1
            if error.errno in NO_MEMORY and attempts < ATTEMPTS:
                continue
            return  # EAGAIN: no more
        if not message:
            return  # the end of the stream
        for _, _, data in ancillary:
            yield message, struct.unpack(f"{len(data) // NUMBER}i", data)
