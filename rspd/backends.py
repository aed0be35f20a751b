"""Which backend is next, and dialling it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from itertools import cycle
from math import inf

from rspd.address import Address, SocketAddress, literal
from rspd.cause import Cause
from rspd.loop import ERR, HUP, OUT, Loop, news
from rspd.resolver import Resolver
from rspd.shortage import SHORT, Shortage
from rspd.side import Side

# Seconds between two attempts at a unix socket whose backlog is full, doubled each time up to the second figure:
# connect(2) says EAGAIN, and no event tells when there is room.
FIRST_RETRY, LAST_RETRY = 0.01, 0.1

# From here on, by the kernel's rules, a port may be picked for the near end of an outgoing connection.
UNPRIVILEGED_PORTS = 1024

STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

REFUSED = frozenset({errno.ECONNREFUSED, errno.ENOENT})


class DialError(Exception):
    """No backend was reached. `cause` is the last attempt's; the text has the reason of each."""

    def __init__(self, cause: Cause, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.cause = cause


class Backend:
    """A configured backend. `fixed` is what its address stands for if no lookup is needed, else empty."""

    __slots__ = ("address", "fixed", "name")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.name = str(address)
        known = literal(address)
        self.fixed = [known] if known else []


class Backends:
    """The backends of a proxy, dialled in turn."""

    def __init__(self, loop: Loop, addresses: Sequence[Address], resolver: Resolver, shortage: Shortage) -> None:
        self._loop = loop
        backends = [Backend(address) for address in addresses]
        self._orders = cycle([backends[first:] + backends[:first] for first in range(len(backends))])
        self._resolver = resolver
        self._shortage = shortage

    async def dial(self, client: Side, timeout: float) -> tuple[Backend, Side]:
        """Connect to the next backend that can be reached: which it is, and its side, watched by the running task.

        client: when it aborts, dialling ends.
        timeout: seconds for all attempts together; each gets an even share of what is left.
        Raises DialError.
        """
        loop = self._loop
        order = next(self._orders)
        deadline = loop.now + timeout
        reasons: list[str] = []
        cause: Cause = "backend-unreachable"
        left = len(order)
        for backend in order:
            share = _share(loop.now, deadline, left)
            left -= 1
            try:
                found = backend.fixed or await self._look_up(backend.address, client, share)
            except OSError as error:
                cause = _cause(error)
                reasons.append(f"{backend.address}: {error.strerror or error}")
                if client.aborted:
                    raise DialError("client-aborted", reasons) from None
                continue
            addresses_left = len(found)
            for where in found:
                until = _share(loop.now, share, addresses_left)
                addresses_left -= 1
                try:
                    return backend, await self._connect(where, client, until)
                except OSError as error:
                    cause = _cause(error)
                    reasons.append(f"{where}: {error.strerror or error}")
                if client.aborted:
                    raise DialError("client-aborted", reasons)
        raise DialError(cause, reasons)

    async def _look_up(self, address: Address, client: Side, deadline: float) -> list[SocketAddress]:
        while True:
            try:
                return await self._resolver.look_up(address, deadline, lambda: client.aborted)
            except OSError as error:
                # Without descriptors the resolver finds no files, servers or modules, and may say anything: that a name
                # is unknown, or an errno left over from something else (EBUSY).
                short = error.errno in SHORT or self._shortage.active
                if not short or self._loop.now >= deadline or client.aborted:
                    raise
                await self._shortage.wait(error)

    async def _connect(self, where: SocketAddress, client: Side, deadline: float) -> Side:
        """One attempt at one socket address. Raises TimeoutError at the deadline, or OSError (connect(2))."""
        loop = self._loop
        family, address = where
        while True:
            try:
                sock = socket.SocketType(family, STREAM, 0)
                break
            except OSError as error:
                if error.errno not in SHORT or loop.now >= deadline or client.aborted:
                    raise
                await self._shortage.wait(error)
        side = Side(loop, sock)
        try:
            retry = FIRST_RETRY
            while (code := sock.connect_ex(address)) == errno.EAGAIN:
                _check_time(loop, client, deadline)
                await loop.sleep(min(retry, deadline - loop.now))
                retry = min(2 * retry, LAST_RETRY)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
            side.watch()
            loop.current.wake_at(deadline)
            await news()
            while not side.ready & (OUT | ERR | HUP):
                _check_time(loop, client, deadline)
                await news()
            if side.ready & ERR:
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                # After these it was connected, and has aborted since: what it sent before is for the relay to pass on.
                if code not in (errno.ECONNRESET, errno.EPIPE):
                    raise OSError(code, os.strerror(code))
            elif family != socket.AF_UNIX:
                _configure(sock, address)
            return side
        except BaseException:
            side.close()
            raise


def _configure(sock: socket.SocketType, address: tuple[str, int]) -> None:
    # The kernel lets a socket connect to itself when it picks the very port it dials and nobody listens there.
    if address[1] >= UNPRIVILEGED_PORTS:
        near = sock.getsockname()
        if near[1] == address[1] and near == sock.getpeername():
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    # A relayed message is not to wait for the acknowledgement of the last (Nagle's algorithm, tcp(7)).
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _share(now: float, deadline: float, attempts: int) -> float:
    return deadline if attempts == 1 or deadline == inf else now + (deadline - now) / attempts


def _check_time(loop: Loop, client: Side, deadline: float) -> None:
    if loop.now >= deadline:
        raise TimeoutError("no answer within the connect timeout")
    if client.aborted:
        raise ConnectionAbortedError(errno.ECONNABORTED, "the client is gone")


def _cause(error: OSError) -> Cause:
    if isinstance(error, TimeoutError) and error.errno is None:
        return "connect-timeout"
    if isinstance(error, socket.gaierror):
        return "backend-unknown"
    return "backend-refused" if error.errno in REFUSED else "backend-unreachable"
