"""Listening sockets: bound, or adopted from systemd; accepted from, closed."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from rspd.engine.loop import Watch
from rspd.engine.side import Side, UnixSide
from rspd.net.address import Address, Peer, Place, SocketAddress, bound_address, format_socket_address, place_of

# accept(2): errors that concern the one client that was to be accepted, not the listener.
UNREACHABLE = {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENONET, errno.ETIMEDOUT}
GONE = {errno.EAGAIN, errno.ECONNABORTED, errno.EINTR, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EPROTO}
CLIENT_GONE = frozenset(UNREACHABLE | GONE)

# The shortest time for SO_RCVTIMEO, as struct timeval: 0 would be for ever (socket(7)).
MOMENT = struct.pack("ll", 0, 1)

# tcpi_unacked in struct tcp_info, linux/tcp.h: of a socket that listens, how many wait to be accepted.
UNACKED = slice(24, 28)

# In place of what identifies a socket's file, where there is none. No file has this.
NO_FILE = (0, 0)

# The mode of a socket to which only our own user may connect.
PRIVATE = 0o600

# What bind(2) and socket(2) say where the host has no such family, or no such address.
NO_SUCH_ADDRESS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})

ADVICE = {
    # An outgoing connection may have that port too; `ss -l` does not show it.
    errno.EADDRINUSE: "another process has that port, `ss -tanp sport = :{port}` shows which",
    errno.EADDRNOTAVAIL: "no interface of this host has that address, `ip address` lists them",
    errno.EACCES: "a port below 1024 needs root or CAP_NET_BIND_SERVICE",
    errno.ENOENT: "the folder does not exist",
    errno.EMFILE: "raise LimitNOFILE or `ulimit -n`",
}

SHARED_ADVICE = ADVICE | {
    errno.EADDRINUSE: f"{ADVICE[errno.EADDRINUSE]}; to share it, that one needs reuse_port and the same user too",
}

UNWRITABLE = "the folder must be writable; for the service, /run/rspd is, and for rspd@NAME, /run/rspd-NAME"

PATH_ADVICE = ADVICE | {
    errno.EADDRINUSE: "another process listens there, `ss -lxp` shows which",
    errno.EACCES: UNWRITABLE,
    errno.EROFS: UNWRITABLE,
}


# Listening sockets of the process before, by family and place. Several are at one place with `reuse_port`.
Kept = Mapping[tuple[int, Place], Sequence[socket.SocketType]]


class ListenError(Exception):
    """A listener cannot be opened; `errno` says why in the system's terms."""

    def __init__(self, address: Address, where: object, error: OSError, reuse_port: bool = False) -> None:
        reason = error.strerror or str(error)
        port_advice = SHARED_ADVICE if reuse_port else ADVICE
        known = PATH_ADVICE if address.path else port_advice
        advice = known.get(error.errno or 0, "").format(port=address.port)
        place = str(address) if str(address) == str(where) else f"{address} ({where})"
        super().__init__(f"cannot listen on {place}: {reason}" + (f"; {advice}" if advice else ""))
        self.errno = error.errno


class Listener(Watch):
    """A listening socket, for a configured address or from systemd. Owns the socket.

    name: where it listens, for people.
    side: the class of a client's side.
    passed: the name of a socket that systemd passed, and will pass to the next process too; None for one of our own.
    file: which file a unix socket of our own has, as of `socket_file`; None for one that needs none.
    """

    __slots__ = ("_sock", "address", "backlog", "file", "name", "passed", "side")

    def __init__(
        self, address: Address, sock: socket.SocketType, file: tuple[int, int] | None = None, passed: str | None = None
    ) -> None:
        super().__init__(sock.fileno())
        self.address = address
        self.name = format_socket_address(sock.getsockname())
        self.passed = passed
        self.side = UnixSide if sock.family == socket.AF_UNIX else Side
        self._sock = sock
        self.file = file
        if sock.family != socket.AF_UNIX:
            # Accepted sockets inherit it: a relayed message must not wait until the one before is acknowledged.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def reached_at(self) -> list[Any]:
        """Where clients connect to, in socket addresses; both wildcards for a socket that serves both families."""
        where = self._sock.getsockname()
        bound = bound_address(self._sock)
        return [where, ("0.0.0.0", bound.port)] if not (bound.path or bound.host) else [where]

    @property
    def lost(self) -> bool:
        """Whether nobody can come any more: the file of a unix socket is gone, or another one is in its place."""
        return self.file is not None and (self.file == NO_FILE or file_at(self.address.path) != self.file)

    def accept(self) -> tuple[socket.SocketType, Peer]:
        """The next client's socket and address. The socket is non-blocking; the caller closes it. Raises OSError."""
        sock = self._sock
        # socket.accept() would do the same with a slower class around it.
        fd, address = sock._accept()  # type: ignore[attr-defined]  # typeshed lacks it; in CPython since 3.0
        client = socket.SocketType(sock.family, socket.SOCK_STREAM, 0, fd)
        client.setblocking(False)
        return client, address

    def waiting(self) -> int | None:
        """How many clients wait in the backlog; None if some do, and the kernel does not say how many."""
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, UNACKED.stop)
        except OSError:
            info = b""  # a unix socket
        if len(info) == UNACKED.stop:
            return int.from_bytes(info[UNACKED], sys.byteorder)
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return None if poll.poll(0) else 0

    def listen(self, backlog: int) -> None:
        """Go on listening with a new backlog, or listen again after `rest`."""
        self._sock.listen(backlog)
        self.backlog = backlog

    def share_port(self) -> None:
        """Let other processes of the same user bind this address too, if they say the same (SO_REUSEPORT, socket(7)).

        This cannot be undone: the kernel goes on letting them. It means nothing for a unix socket.
        """
        if self._sock.family != socket.AF_UNIX:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def rest(self) -> None:
        """Stop listening, so that another socket can take the address over; clients in the backlog are reset.

        Only for a TCP listener whose port is configured: a port that the kernel picked would be lost.
        """
        # On Linux, this returns a listening socket to the state it had after bind.
        self._sock.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close the socket, and remove the file of a unix socket if it is still ours. Nobody is accepted any more."""
        if self.file and not self.lost:
            try:
                os.unlink(self.address.path)
            except OSError:
                pass  # rspd may no longer write in the folder; the next start finds the file stale
        if self.passed is None:
            try:
                # systemd may have a copy for the next process; clients that come are to be refused at once.
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # `rest` has shut it down already
        self._sock.close()


def file_at(path: str) -> tuple[int, int]:
    """What identifies a socket's file; NO_FILE if there is none."""
    try:
        return socket_file(os.lstat(path))
    except OSError:
        return NO_FILE


def socket_file(status: os.stat_result) -> tuple[int, int]:
    """What identifies a socket's file, by its status; NO_FILE for a file that is no socket."""
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else NO_FILE


def adopt_listener(name: str, sock: socket.SocketType) -> Listener:
    """A listener on a socket that listens already and belongs to systemd too. It owns our descriptor of the socket."""
    # All processes on this socket share the flag by which accept(2) does not wait, and systemd clears the flag when it
    # starts one more of them (NonBlocking=, systemd.service(5)). With this timeout, accept(2) never waits long.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, MOMENT)
    return Listener(bound_address(sock), sock, passed=name)


def kept_listener(sock: socket.SocketType, file: tuple[int, int] | None = None) -> Listener:
    """A listener on a socket that the process before has kept. It owns our descriptor of the socket.

    file: which file is its own; None for what is at its path, if it needs one.
    """
    address = bound_address(sock)
    listener = Listener(address, sock, file or _file_of(address.path))
    listener.backlog = socket.SOMAXCONN  # not known
    return listener


def by_place(kept: Iterable[socket.SocketType]) -> Kept:
    """These listening sockets, as `open_listeners` takes them."""
    found: dict[tuple[int, Place], list[socket.SocketType]] = {}
    for sock in kept:
        found.setdefault((sock.family, place_of(sock.getsockname())), []).append(sock)
    return found


def open_listeners(
    address: Address,
    where: Iterable[SocketAddress],
    backlog: int,
    reuse_port: bool = False,
    kept: Kept | None = None,
    private: bool = False,
    taken: Container[int] = (),
) -> list[Listener]:
    """Bind and listen on all socket addresses that a configured address stands for.

    On a host without IPv6, or without IPv4, those addresses are left out. Raises ListenError; then nothing stays open.

    reuse_port: share TCP ports with other processes, see `Listener.share_port`.
    kept: sockets to take in place of new ones, where the address is the same. They stay open after an error.
    private: whether only our own user may connect to a new unix socket, until `allow` says who may.
    taken: descriptors of kept sockets that other addresses have by now. Two listeners on one socket cannot be watched.
    """
    kept = kept or {}
    listeners: list[Listener] = []
    missing: ListenError | None = None
    for socket_address in where:
        try:
            here = kept.get((socket_address.family, place_of(socket_address.address)), ())
            free = [sock for sock in here if sock.fileno() not in taken]
            if free:
                listeners.append(_reopen(address, free[0], backlog, reuse_port))
            else:
                listeners.append(_open(address, socket_address, backlog, reuse_port, private))
        except OSError as error:
            missing = ListenError(address, socket_address, error, reuse_port)
            if error.errno not in NO_SUCH_ADDRESS:
                close_all(listeners, kept)
                raise missing from error
    if missing and not listeners:
        raise missing
    return listeners


def close_all(listeners: Iterable[Listener], kept: Kept) -> None:
    """Close listeners but for those on a socket that the process before has kept."""
    stay = {sock.fileno() for here in kept.values() for sock in here}
    for listener in listeners:
        if listener.fd not in stay:
            listener.close()


def _reopen(address: Address, sock: socket.SocketType, backlog: int, reuse_port: bool) -> Listener:
    listener = Listener(address, sock, _file_of(address.path))
    listener.listen(backlog)
    if reuse_port:
        listener.share_port()
    return listener


def _open(address: Address, where: SocketAddress, backlog: int, reuse_port: bool, private: bool) -> Listener:
    sock = socket.SocketType(where.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        if where.family == socket.AF_UNIX:
            _remove_stale(where.address)
            if private:
                os.fchmod(sock.fileno(), PRIVATE)  # bind(2) gives the file the mode of the socket, less the umask
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if where.family == socket.AF_INET6:
            # Each family has its own socket, so that neither can be mistaken for the other.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where.address)
        listener = Listener(address, sock, _file_of(where.address))
        listener.listen(backlog)
        return listener
    except BaseException:
        sock.close()
        raise


def _file_of(where: object) -> tuple[int, int] | None:
    """What identifies the file of a socket that is bound there; None if it needs none."""
    return file_at(where) if isinstance(where, str) and where.startswith("/") else None


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on. Raises OSError if somebody does, or if it is another file."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, ValueError):
        return  # there is none; an abstract name, with its null byte, is no path
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "a file that is not a socket stands there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    if code != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    os.unlink(path)
