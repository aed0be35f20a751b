"""Connecting to a backend's addresses."""

from __future__ import annotations

import errno
import os
import socket
import sys
from functools import partial
from math import inf

from rspd.engine.cause import Cause
from rspd.engine.loop import ERR, HUP, OUT, Loop, news
from rspd.engine.side import Side, UnixSide
from rspd.net.address import SocketAddress
from rspd.net.descriptors import SHORT, Shortage
from rspd.net.waiting import wait
from rspd.net.ways import LoopError, Way

# Seconds between two attempts at a unix socket whose backlog is full, doubled each time up to the second figure:
# connect(2) says EAGAIN, and no event tells when there is room.
FIRST_RETRY, LAST_RETRY = 0.01, 0.1

# The lowest port that the kernel may pick for the near end of an outgoing connection.
UNPRIVILEGED_PORTS = 1024

# The text of a timeout: for a client, and for a check.
LATE, LATE_CHECK = "no answer within the connect timeout", "no answer in time"

GONE = "the client is gone"

REFUSED = frozenset({errno.ECONNREFUSED, errno.ENOENT})

# Errors of this host, which say nothing of the backend: no descriptor, no memory, or no local port is free.
OUR_FAULT = SHORT | {errno.EADDRNOTAVAIL}

# In struct tcp_info, linux/tcp.h: tcpi_state, which may be TCP_ESTABLISHED or TCP_CLOSE; and tcpi_segs_in, how many
# segments have come. If one has come, the backend's kernel has answered. An established socket that has dialled itself
# has had more.
INFO_SIZE = 144
STATE, ESTABLISHED, CLOSED = 0, 1, 7
UNKNOWN = b"\0"
SEGMENTS, ONE = slice(140, 144), (1).to_bytes(4, sys.byteorder)

STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


async def connect(
    loop: Loop,
    shortage: Shortage,
    where: SocketAddress,
    deadline: float,
    client: Side | None = None,
    way: Way | None = None,
) -> Side:
    """Connect to an address. Returns the side: the running task watches it, and the caller closes it.

    client: when it aborts, dialling ends; None if no client waits for the connection.
    way: the client's way, if the address might lead back to this process. Call its `end` when the side is closed.
    Raises TimeoutError at the deadline, LoopError, or another OSError (connect(2)).
    """
    family, address = where
    if way and not way.check(where):
        way = None  # no proxy of this process listens there
    try:
        sock = socket.SocketType(family, STREAM, 0)
    except OSError as error:
        attempt = partial(socket.SocketType, family, STREAM, 0)
        sock = await shortage.retry(attempt, error, deadline, partial(_gone, client))
    side = UnixSide(loop, sock) if family == socket.AF_UNIX else Side(loop, sock)
    try:
        if way and family == socket.AF_UNIX:
            # The proxy there sees this name as its client's. To let the kernel choose needs Python 3.10.6 or 3.11.1.
            near = f"\0rspd-{os.urandom(8).hex()}"
            sock.bind(near)
            way.begin(near)
        retry = FIRST_RETRY
        while (code := sock.connect_ex(address)) == errno.EAGAIN:
            await wait(loop, deadline, LATE if client else LATE_CHECK, partial(_gone, client), GONE, retry)
            retry = min(2 * retry, LAST_RETRY)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        if way and not way.near:
            way.begin(sock.getsockname())  # before another task accepts the connection
        # Within a host, the connection is mostly made or refused already, though connect(2) says EINPROGRESS. To ask
        # saves a turn. A refusal is known at once too: else it would be heard of after a later success.
        info = _tcp_info(sock) if code else b""
        made = not code or info[STATE] == ESTABLISHED
        if not made:
            side.expect_connection()
            if info[STATE] == CLOSED:
                side.ready |= ERR
        try:
            side.watch()
        except OSError as error:
            await shortage.retry(side.watch, error, deadline, partial(_gone, client))
        if not made:
            await _wait_until_made(side, deadline, client)
        if family != socket.AF_UNIX:
            if not made or info[SEGMENTS] != ONE:
                _refuse_itself(sock, address, way)
            # A relayed message must not wait until the one before is acknowledged (Nagle's algorithm, tcp(7)).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return side
    except BaseException:
        if way:
            way.end()
        side.close()
        raise


async def _wait_until_made(side: Side, deadline: float, client: Side | None) -> None:
    """Wait until the connection is made. It may have been aborted since. Raises OSError, as `connect` does."""
    if not side.ready:
        # The answer may be here: whatever the deadline, epoll is asked once.
        side.loop.current.wake_at(deadline)
        await news()
    while not side.ready & (OUT | ERR | HUP):
        await wait(side.loop, deadline, LATE if client else LATE_CHECK, partial(_gone, client), GONE)
    if side.aborted:
        code = side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        # These two mean: it was connected, and has aborted since. The relay passes on what it sent before.
        if code not in (errno.ECONNRESET, errno.EPIPE):
            raise OSError(code, os.strerror(code))
    # Else the acknowledgement of an end would wake the task, though nothing more will be written.
    side.ignore(OUT)


async def send_all(side: Side, data: bytes, deadline: float, late: str = "", client: Side | None = None) -> None:
    """Send all of it, or until the connection breaks. The running task watches the side.

    late, client: as for `wait` and `connect`. Raises TimeoutError, ConnectionAbortedError if the client is gone.
    """
    left = memoryview(data)
    while left:
        left = left[side.write(left) :]
        if side.aborted:
            # What the peer said before is still to be read, and may be all that is needed.
            return
        if left:
            await wait(side.loop, deadline, late, partial(_gone, client), GONE)


class UnreachableError(OSError):
    """No address of a backend was reached. `reasons` has each address with its reason; `last` is the last error."""

    def __init__(self, reasons: list[str], last: OSError) -> None:
        super().__init__(last.errno, "; ".join(reasons))
        self.reasons = reasons
        self.last = last


async def connect_to_one_of(
    loop: Loop,
    shortage: Shortage,
    addresses: list[SocketAddress],
    deadline: float,
    client: Side | None = None,
    way: Way | None = None,
) -> Side:
    """Connect to the first of these addresses that answers, as `connect` does; each gets a share of the time.

    addresses: the address that was reached moves to the front, so that a dead address family costs time only once.
    Raises UnreachableError.
    """
    reasons: list[str] = []
    errors: list[OSError] = []
    for where in tuple(addresses):
        try:
            until = share(loop.now, deadline, len(addresses) - len(errors))
            side = await connect(loop, shortage, where, until, client, way)
        except OSError as error:
            reasons.append(f"{where}: {why(error)}")
            errors.append(error)
            if client and client.aborted:
                break
        else:
            addresses.remove(where)
            addresses.insert(0, where)
            return side
    loops = [error for error in errors if isinstance(error, LoopError)]
    raise UnreachableError(reasons, (loops or errors)[-1])


def share(now: float, deadline: float, attempts: float) -> float:
    """Until when the next of so many attempts may last, if all are to have the same time."""
    return deadline if attempts == 1 or deadline == inf else now + (deadline - now) / attempts


def cause_of(error: OSError) -> Cause:
    """Why there is no connection, after an error of this module or of a lookup."""
    if isinstance(error, UnreachableError):
        error = error.last
    if isinstance(error, LoopError):
        return "loop"
    if isinstance(error, TimeoutError) and error.errno is None:
        return "connect-timeout"
    if isinstance(error, socket.gaierror):
        return "backend-unknown"
    return "backend-refused" if error.errno in REFUSED else "backend-unreachable"


def is_own_fault(error: OSError) -> bool:
    """Whether an error says nothing of the backend: this host is short of something, or the client's way led back."""
    if isinstance(error, UnreachableError):
        error = error.last
    return error.errno in OUR_FAULT or (isinstance(error, LoopError) and not error.itself)


def why(error: OSError) -> str:
    """The reason that an error gives, for people."""
    return error.strerror or str(error)


def _tcp_info(sock: socket.SocketType) -> bytes:
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_SIZE) or UNKNOWN
    except OSError:
        return UNKNOWN  # a program in the kernel may refuse it (bpf(2))


def _refuse_itself(sock: socket.SocketType, address: tuple[str, int], way: Way | None) -> None:
    # If nobody listens on the dialled port, the kernel may pick it for the near end too: the socket dials itself.
    if address[1] >= UNPRIVILEGED_PORTS:
        near = (way and way.near) or sock.getsockname()
        if near[1] == address[1] and near == sock.getpeername():
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def _gone(client: Side | None) -> bool:
    return client is not None and client.aborted
