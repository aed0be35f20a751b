"""A process with thousands of clients, or with their backends: one loop, told what to do by lines of JSON on stdin.

Both know the bytes of each connection, in each direction: a block, read from another place for each. So a byte that is
lost, or that belongs to another connection, is seen at once. What was sent and what has come is hashed besides.

A connection begins with a header of its client's, which names it. Then each end moves bytes as its kind says, on ticks
of a clock. It ends in order: the client ends, then its backend does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import select
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

SIZE = 1 << 20
TWICE = random.Random(18).randbytes(SIZE) * 2

UP, DOWN = 0, SIZE // 2

HEADER = struct.Struct("<II")  # which connection, which kind

BULK = 1 << 18  # bytes that a bulk sender tries to send at each tick
PIECE = 24 << 10  # rspd copies it, and splices more
AT_ONCE = 1 << 20

SLOTS = 50  # into which the connections are sorted, so that not all of them move at the same time
OTHERS = 1 << 17  # from this index on, connections are no clients' of `Clients`
UNDER_WAY = 400  # connections whose backend has yet to say something

# As in a network. A reader with a small buffer seldom has room for one of the large packets of loopback.
MSS = 1400

ANSWER = 512  # bytes of a short connection's answer
PACE = 0.001  # seconds between a ping's answer and the next ping
PATIENCE = 40.0  # seconds until a short connection is given up

LINGER_0 = struct.pack("ii", 1, 0)
ABORTED = "aborted"  # the outcome, where the client was told to


class Kind(NamedTuple):
    """How both ends of a connection behave.

    up, down: how the client and the backend send: `messages`, `answers` to what has come, `bulk`, `pieces` until the
        other one stops reading, one message and the `end`, or `nothing` but a message at last.
    client_reads, backend_reads: bytes at each tick, or AT_ONCE.
    rests: the client reads nothing for so many ticks, then for one.
    """

    up: str
    down: str
    client_reads: int = AT_ONCE
    backend_reads: int = AT_ONCE
    rests: int = 0
    ticks: int = 1  # how many ticks are one of this kind
    waits: bool = False  # nobody waits for its backend, and the client sends all the same
    proxied: bool = False  # it begins with a PROXY header, of which the client sends a part until it is told to go on


KINDS = {
    "plain": Kind("messages", "answers"),
    "splice": Kind("messages", "bulk", client_reads=1 << 15),
    "held": Kind("messages", "pieces", rests=6),
    "half": Kind("end", "messages"),
    "slow": Kind("bulk", "bulk", client_reads=6000, backend_reads=6000),
    "from-unix": Kind("messages", "answers"),
    "from-unix-bulk": Kind("messages", "bulk", client_reads=1 << 15),
    "to-unix": Kind("messages", "answers"),
    "to-unix-bulk": Kind("bulk", "messages", backend_reads=1 << 15),
    "quiet": Kind("messages", "answers", ticks=20),
    "short": Kind("end", "short"),
    "idle": Kind("nothing", "nothing"),
    "half-idle": Kind("end", "nothing"),
    "aborting": Kind("bulk", "nothing", backend_reads=500),
    "queued": Kind("messages", "answers", waits=True),
    "dialling": Kind("messages", "answers", waits=True),
    "dialling-late": Kind("messages", "answers", waits=True),
    "proxied": Kind("messages", "answers", waits=True, proxied=True),
    "retired": Kind("messages", "answers"),
    "moved": Kind("messages", "answers"),
}
NAMES = list(KINDS)


def piece(start: int, offset: int, size: int) -> bytes:
    """Bytes of a stream."""
    position = (start + offset) % SIZE
    return TWICE[position : position + size]


def start_of(index: int, direction: int) -> int:
    """Where in the block the stream of a connection begins: no two have the same place."""
    return (index * 7919 + direction) % SIZE


class Stream:
    """One direction of a connection, as one of its ends knows it."""

    __slots__ = ("hash", "size", "start", "wrong")

    def __init__(self, index: int, direction: int) -> None:
        self.start = start_of(index, direction)
        self.size = 0
        self.hash = hashlib.sha256()
        self.wrong = -1  # where it was first found to be another one

    def next(self, size: int) -> bytes:
        """The bytes that come next."""
        return piece(self.start, self.size, size)

    def add(self, data: bytes) -> None:
        """Count bytes as sent, or as received."""
        self.hash.update(data)
        self.size += len(data)

    def check(self, data: bytes) -> None:
        """Count bytes as received, and compare them."""
        if self.wrong < 0 and data != self.next(len(data)):
            self.wrong = self.size
        self.add(data)


class End:
    """One end of a connection. `outcome` says how it has ended, and is empty until then."""

    __slots__ = (
        "closing",
        "ended",
        "index",
        "kind",
        "muted",
        "name",
        "outcome",
        "owed",
        "port",
        "reads",
        "received",
        "seen",
        "sends",
        "sent",
        "shut",
        "sock",
        "ticked",
    )

    def __init__(self, sock: socket.socket, index: int, name: str, *, is_client: bool) -> None:
        self.sock = sock
        self.index = index
        self.name = name
        self.kind = KINDS[name]
        self.sends = self.kind.up if is_client else self.kind.down
        self.reads = self.kind.client_reads if is_client else self.kind.backend_reads
        if is_client and self.kind.rests:
            self.reads = 0
        self.sent = Stream(index, UP if is_client else DOWN)
        self.received = Stream(index, DOWN if is_client else UP)
        self.owed = 0  # bytes to be sent
        self.muted = False  # nothing may be sent yet
        self.closing = False  # after what is owed, the end
        self.shut = False
        self.ended = False  # the other end has ended
        self.seen = 0  # what had been received at the last look
        self.port = 0
        self.ticked = index
        self.outcome = ""

    def begin(self) -> None:
        """Send the header, after what is left of the one before it, and what is owed. Raises OSError."""
        left = self.proxy_header()[1] if self.kind.proxied else b""
        self.sock.send(left + HEADER.pack(self.index, NAMES.index(self.name)))  # fits: hardly anything is there
        self.muted = False
        self.flush()

    def flush(self) -> None:
        """Send what is owed, as much of it as fits; then the end, if it is time."""
        if self.muted:
            return
        while self.owed and not self.outcome:
            data = self.sent.next(min(self.owed, 1 << 16))
            try:
                count = self.sock.send(data)
            except BlockingIOError:
                return
            except OSError as error:
                self.close(f"{type(error).__name__} while sending")
                return
            self.sent.add(data[:count])
            self.owed -= count
        if self.closing and not self.shut and not self.outcome:
            self.shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self.close(f"{type(error).__name__} while ending")
            if self.ended:
                self.close("in order")

    def receive(self, limit: int) -> int:
        """Take up to so many bytes that are there; how many there were."""
        taken = 0
        while taken < limit and not self.outcome and not self.ended:
            size = min(limit - taken, 1 << 17)
            try:
                data = self.sock.recv(size)
            except BlockingIOError:
                break
            except OSError as error:
                self.close(f"{type(error).__name__} while reading")
                break
            self.ended = not data
            self.received.check(data)
            taken += len(data)
            if len(data) < size:
                break
        return taken

    def tick(self) -> None:
        """Send as the kind says."""
        self.ticked += 1
        if self.ticked % self.kind.ticks:
            return
        if not self.closing:
            if self.sends == "bulk":
                self.owed = BULK
            elif self.sends == "pieces":
                self.owed = self.owed or PIECE
            elif self.sends == "messages":
                self.owed = self.owed or 1 + (self.index * 7919 + self.ticked * 1217) % 3000
        self.flush()

    def last(self) -> None:
        """Nothing more is sent but what is owed."""
        if not self.closing:
            self.closing = True
            if self.sends == "bulk":
                self.owed = 0
            elif self.sends == "nothing":
                self.owed += ANSWER
        self.flush()

    def proxy_header(self) -> tuple[bytes, bytes]:
        """Two parts of a PROXY header; it says of the client what is true without it."""
        header = b"PROXY TCP4 127.0.0.1 127.0.0.1 %d 80\r\n" % self.port
        cut = 1 + self.index % (len(header) - 1)
        return header[:cut], header[cut:]

    def close(self, outcome: str) -> None:
        """The connection has ended."""
        if not self.outcome:
            self.outcome = outcome
            self.sock.close()

    @property
    def speaks(self) -> bool:
        """Whether a client is to hear from its backend again and again."""
        if self.kind.waits and (self.closing or not self.received.size):
            return False
        return self.kind.down != "nothing"

    def report(self) -> list[object]:
        """What there is to compare."""
        both = [(stream.size, stream.hash.hexdigest(), stream.wrong) for stream in (self.sent, self.received)]
        return [self.index, self.name, self.port, self.outcome or "still open", *both]


class Process:
    """What is common to all. Each `do_NAME` is something that it can be told; what that returns is the reply."""

    def __init__(self, period: float = 1.5) -> None:
        self.period = period
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[], object]] = {}
        self.slots: list[list[End]] = [[] for _ in range(SLOTS)]
        self._next_slot = 0
        self._next_tick = time.monotonic()
        self._command = b""
        self.over = False
        self.watch(sys.stdin.fileno(), self._listen_to_command)

    def watch(self, fd: int, handler: Callable[[], object], events: int = select.EPOLLIN) -> None:
        """Call this whenever there is something to read, or another event."""
        self.handlers[fd] = handler
        self.epoll.register(fd, events)

    def introduce(self, end: End, handler: Callable[[], object]) -> None:
        """Once this end is connected, send its header, and watch it. If it cannot be connected, it is closed first."""
        sock = end.sock
        fd = sock.fileno()

        def connected() -> None:
            self.forget(fd)
            try:
                if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(number, os.strerror(number))
                if end.kind.proxied:
                    sock.send(end.proxy_header()[0])
                else:
                    end.begin()
                self.watch(fd, handler)
            except OSError as error:
                end.close(type(error).__name__)
            if end.outcome:
                handler()

        self.watch(fd, connected, select.EPOLLOUT)

    def forget(self, fd: int) -> None:
        """Watch a descriptor no longer; it may be closed already."""
        if self.handlers.pop(fd, None):
            try:
                self.epoll.unregister(fd)
            except OSError:
                pass

    def run(self) -> None:
        """Work until told to stop, or until nobody is left to tell it."""
        while not self.over:
            for fd, _ in self.epoll.poll(self.timeout(), 512):
                if handler := self.handlers.get(fd):  # not if another one of the batch has closed it
                    handler()
            self.turn()

    def timeout(self) -> float:
        """Seconds until there is something to do."""
        return max(0.0, self._next_tick - time.monotonic())

    def turn(self) -> None:
        """Do what it is time for."""
        now = time.monotonic()
        if now < self._next_tick:
            return
        self._next_tick = max(self._next_tick + self.period / SLOTS, now - self.period)
        slot = self._next_slot = (self._next_slot + 1) % SLOTS
        self.slots[slot] = [end for end in self.slots[slot] if not end.outcome]
        for end in self.slots[slot]:
            self.tick(end)

    def tick(self, end: End) -> None:
        """Let an end move bytes."""

    def hurry(self, end: End, handler: Callable[[], object]) -> None:
        """Let an end that reads slowly read as fast as it can."""
        if end.reads != AT_ONCE and not end.outcome:
            end.reads = AT_ONCE
            # A small buffer would let the kernel send a few bytes for each of its timers.
            end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            self.watch(end.sock.fileno(), handler)

    def _listen_to_command(self) -> None:
        data = os.read(sys.stdin.fileno(), 1 << 16)
        if not data:
            self.over = True
        *lines, self._command = (self._command + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            reply = getattr(self, "do_" + command.pop("do"))(**command)
            sys.stdout.write(json.dumps(reply) + "\n")
            sys.stdout.flush()


def address_of(place: str | int) -> tuple[socket.AddressFamily, Any]:
    """A port of this host, or a path."""
    return (socket.AF_UNIX, place) if isinstance(place, str) else (socket.AF_INET, ("127.0.0.1", place))


def dial(place: str | int, small: bool) -> socket.socket:
    """A connection that is begun. small: the kernel keeps little for this reader."""
    family, address = address_of(place)
    sock = socket.socket(family)
    sock.setblocking(False)
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 13)
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, MSS)
    result = sock.connect_ex(address)
    if result not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(result, os.strerror(result))
    return sock


class Clients(Process):
    """Opens connections, and keeps them until it is told to end them all."""

    def __init__(self, period: float = 1.5) -> None:
        super().__init__(period)
        self.ends: list[End] = []
        self.finishing = False
        self.under_way: set[End] = set()
        self.queue: deque[tuple[str, str | int]] = deque()

    def do_open(self, counts: dict[str, int], places: dict[str, str | int]) -> None:
        """Open so many more connections of each kind."""
        for name, count in counts.items():
            self.queue.extend([(name, places[name])] * count)

    def do_state(self) -> dict[str, object]:
        """How things stand."""
        alive = [end for end in self.ends if not end.outcome]
        return {
            "waiting": len(self.queue) + len(self.under_way),
            "open": len(alive),
            "lost": [f"{end.name} {end.index}: {end.outcome}" for end in self.ends if self.is_lost(end)][:20],
        }

    def is_lost(self, end: End) -> bool:
        """Whether a connection has ended that should not have."""
        return end.outcome not in ("", "in order", ABORTED)

    def do_go_on(self, name: str, count: int) -> int:
        """Send the rest of so many PROXY headers; of how many it was there to be sent."""
        ends = [end for end in self.ends if end.name == name and end.muted and not end.outcome][:count]
        for end in ends:
            try:
                end.begin()
            except OSError as error:
                end.close(type(error).__name__)
        return len(ends)

    def do_end(self, name: str, count: int) -> int:
        """End so many connections that have a backend, the oldest of this kind; how many there were."""
        ends = [end for end in self.ends if end.name == name and end.received.size and not end.closing][:count]
        for end in ends:
            end.last()
        return len(ends)

    def do_abort(self, name: str) -> None:
        """Abort all of a kind."""
        for end in self.ends:
            if end.name == name:
                self.forget(end.sock.fileno())
                end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
                end.close(ABORTED)

    def do_reached(self) -> dict[str, int]:
        """How many connections of each kind have heard of their backends, those that have ended included."""
        return Counter(end.name for end in self.ends if end.received.size)

    def do_mark(self) -> None:
        """What comes from now on is new."""
        for end in self.ends:
            end.seen = end.received.size

    def do_silent(self) -> dict[str, int]:
        """How many connections of each kind have had nothing new, but for those that rest, wait, or are to end."""
        resting = [end for end in self.ends if end.received.size == end.seen and not end.kind.rests]
        return Counter(end.name for end in resting if end.speaks and not end.outcome)

    def do_finish(self) -> None:
        """End all in order."""
        self.finishing = True

    def do_report(self) -> list[list[object]]:
        """What became of each."""
        return [end.report() for end in self.ends]

    def timeout(self) -> float:
        return 0.0 if self.queue and len(self.under_way) < UNDER_WAY else super().timeout()

    def turn(self) -> None:
        super().turn()
        for _ in range(50):
            if self.queue and len(self.under_way) < UNDER_WAY:
                self.open(*self.queue.popleft())

    def open(self, name: str, place: str | int) -> None:
        index = len(self.ends)
        sock = dial(place, KINDS[name].client_reads != AT_ONCE or KINDS[name].rests > 0)
        end = End(sock, index, name, is_client=True)
        end.port = sock.getsockname()[1] if sock.family == socket.AF_INET else 0
        if end.sends == "end":
            end.owed = 1000 + index % 5000
            end.closing = True
        self.ends.append(end)
        self.slots[index % SLOTS].append(end)
        if end.kind.waits:
            end.muted = True
        else:
            self.under_way.add(end)
        self.introduce(end, lambda: self.receive(end, AT_ONCE))

    def receive(self, end: End, limit: int) -> None:
        fd = end.sock.fileno()
        end.receive(limit)
        if end in self.under_way:
            self.under_way.remove(end)
            if end.reads != AT_ONCE:
                self.forget(fd)
        if end.ended and not end.outcome:
            whole = end.shut and (self.finishing or end.sends != "end")
            end.close("in order" if whole else f"an end after {end.received.size} bytes")
        if end.outcome:
            self.forget(fd)

    def tick(self, end: End) -> None:
        if end in self.under_way:
            return
        if self.finishing:
            end.last()
            self.hurry(end, lambda: self.receive(end, AT_ONCE))
            return
        end.tick()
        if end.reads != AT_ONCE and not end.outcome:
            resting = end.kind.rests and end.ticked % (end.kind.rests + 1)
            self.receive(end, 0 if resting else end.reads or AT_ONCE)


class Backends(Process):
    """Accepts, learns from the header which connection it is, and does its part."""

    def __init__(self, period: float = 1.5) -> None:
        super().__init__(period)
        self.ends: list[End] = []
        self.listeners: list[socket.socket] = []
        self.finishing = False
        self.short = Counter[str]()
        self.full: dict[int, tuple[socket.socket, socket.socket]] = {}
        self.accepted = 0
        self.order: list[tuple[int, str, int]] = []

    def do_fill(self, place: int) -> None:
        """Listen here, and have no room: the kernel drops each SYN, until `do_make_room`."""
        listener = socket.create_server(("127.0.0.1", place), backlog=0)
        listener.setblocking(False)
        self.full[place] = listener, socket.create_connection(("127.0.0.1", place))

    def do_make_room(self, place: int) -> None:
        """Accept where there was no room."""
        listener, filler = self.full.pop(place)
        filler.close()
        listener.listen(4096)
        self.listeners.append(listener)
        self.watch(listener.fileno(), lambda: self.accept(listener))

    def do_order(self, name: str) -> list[int]:
        """The connections of a kind in the order in which they came."""
        return [index for _, kind, index in sorted(self.order) if kind == name]

    def do_listen(self, places: list[str | int]) -> None:
        """Listen here."""
        for place in places:
            family, address = address_of(place)
            listener = socket.socket(family)
            if family == socket.AF_INET:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, MSS)
            listener.bind(address)
            if family == socket.AF_UNIX:
                os.chmod(address, 0o666)
            listener.listen(4096)
            listener.setblocking(False)
            self.listeners.append(listener)
            self.watch(listener.fileno(), lambda listener=listener: self.accept(listener))  # type: ignore[misc]

    def do_finish(self) -> None:
        """Read as fast as possible, and end what the client has ended before."""
        self.finishing = True

    def do_state(self) -> dict[str, object]:
        """How things stand."""
        return {"open": sum(not end.outcome for end in self.ends), "short": self.short}

    def do_report(self) -> list[list[object]]:
        """What became of each."""
        return [end.report() for end in self.ends]

    def accept(self, listener: socket.socket) -> None:
        for _ in range(100):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            self.accepted += 1
            number = self.accepted
            self.watch(sock.fileno(), lambda sock=sock, number=number: self.begin(sock, number))  # type: ignore[misc]

    def begin(self, sock: socket.socket, accepted: int) -> None:
        """Read the header, which comes as a whole, of the connection that was accepted as this one."""
        fd = sock.fileno()
        try:
            header = sock.recv(HEADER.size)
        except OSError as error:
            header, failure = b"", type(error).__name__
        else:
            failure = f"a header of {len(header)} bytes"
        self.forget(fd)
        if len(header) < HEADER.size:
            self.short[failure] += 1
            sock.close()
            return
        index, number = HEADER.unpack(header)
        if KINDS[NAMES[number]].waits:
            self.order.append((accepted, NAMES[number], index))
        end = End(sock, index, NAMES[number], is_client=False)
        end.owed = HEADER.size  # says that the connection is there
        if end.sends == "short":
            end.owed = ANSWER
        if index < OTHERS:
            self.ends.append(end)
            self.slots[index % SLOTS].append(end)
        if end.reads == AT_ONCE:
            self.watch(fd, lambda: self.receive(end, AT_ONCE))
        end.flush()
        if end.outcome:
            self.forget(fd)

    def receive(self, end: End, limit: int) -> None:
        fd = end.sock.fileno()
        count = end.receive(limit)
        if end.sends == "answers":
            end.owed += count
            end.flush()
        if end.ended and not end.outcome:
            # A client that has ended early gets more, until the end of all.
            if end.kind.up == "end" and end.sends != "short" and not self.finishing:
                self.forget(fd)
                return
            end.last()
        if end.outcome:
            self.forget(fd)
            if end.sends == "short":
                self.short[end.outcome] += 1

    def tick(self, end: End) -> None:
        if not self.finishing and not end.closing:
            end.tick()
        if self.finishing:
            self.hurry(end, lambda: self.receive(end, AT_ONCE))
        if end.ended or end.reads != AT_ONCE:
            self.receive(end, end.reads)
        else:
            end.flush()


class Arrivals(Process):
    """New clients, so many a second, each with a request and an answer; `ends` counts what became of them."""

    FIRST = OTHERS << 1

    def __init__(self, period: float = 0.005) -> None:
        super().__init__(period)
        self.ends = Counter[str]()
        self.place: str | int = 0
        self.count = 0
        self.slowest = 0.0
        self.open: dict[End, float] = {}
        self._next = 0.0

    def do_start(self, place: str | int) -> None:
        """Begin."""
        self.place = place
        self._next = time.monotonic()

    def do_stop(self) -> None:
        """Let nobody come any more."""
        self.place = 0

    def do_state(self) -> dict[str, object]:
        """How things stand."""
        return {"ends": self.ends, "open": len(self.open), "slowest": self.slowest}

    def timeout(self) -> float:
        return max(0.0, self._next - time.monotonic()) if self.place else 0.1

    def turn(self) -> None:
        now = time.monotonic()
        if self.place and now >= self._next:
            self._next = max(self._next + self.period, now - 1)
            self.begin(now)
        for end, began in list(self.open.items())[:1]:  # the one that is open for the longest time
            if now - began > PATIENCE:
                fd = end.sock.fileno()
                end.close("timeout")
                self.finish(end, fd)

    def begin(self, now: float) -> None:
        index = self.FIRST + self.count % self.FIRST
        self.count += 1
        try:
            sock = dial(self.place, False)
        except OSError as error:
            self.ends[type(error).__name__] += 1
            return
        fd = sock.fileno()
        end = End(sock, index, "short", is_client=True)
        end.owed = 100
        end.closing = True
        self.open[end] = now
        self.introduce(end, lambda: self.receive(end, fd))

    def receive(self, end: End, fd: int) -> None:
        end.receive(AT_ONCE)
        if end.ended and not end.outcome:
            whole = end.received.size == ANSWER and end.received.wrong < 0
            end.close("ok" if whole else f"{end.received.size} bytes, wrong from {end.received.wrong}")
        if end.outcome:
            self.finish(end, fd)

    def finish(self, end: End, fd: int) -> None:
        self.forget(fd)
        self.ends[end.outcome] += 1
        self.slowest = max(self.slowest, time.monotonic() - self.open.pop(end))


class Pings(Process):
    """Some clients that send a byte, wait for one, and so on; measures the longest time without one, for each."""

    FIRST = OTHERS

    def __init__(self, period: float = PACE) -> None:
        super().__init__(period)
        self.ends: list[End] = []
        self.heard: list[float] = []
        self.longest: list[float] = []
        self.due: deque[tuple[float, int]] = deque()

    def do_open(self, place: str | int, count: int) -> None:
        """Open connections."""
        for number in range(count):
            sock = dial(place, False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end = End(sock, self.FIRST + number, "plain", is_client=True)
            self.ends.append(end)
            self.heard.append(time.monotonic())
            self.longest.append(0.0)
            self.introduce(end, lambda number=number: self.receive(number))  # type: ignore[misc]

    def do_mark(self) -> None:
        """Measure from here."""
        self.longest = [0.0] * len(self.ends)
        self.heard = [time.monotonic()] * len(self.ends)

    def do_heard(self) -> list[int]:
        """How many answers each has had."""
        return [end.received.size for end in self.ends]

    def do_longest(self) -> list[float]:
        """The longest time in seconds that each has heard nothing, up to now."""
        now = time.monotonic()
        lost = [end.outcome for end in self.ends if end.outcome or end.received.wrong >= 0]
        if lost:
            raise ValueError(f"lost: {lost}")
        return [max(longest, now - heard) for longest, heard in zip(self.longest, self.heard, strict=True)]

    def timeout(self) -> float:
        return max(0.0, self.due[0][0] - time.monotonic()) if self.due else -1

    def turn(self) -> None:
        now = time.monotonic()
        while self.due and self.due[0][0] <= now:
            end = self.ends[self.due.popleft()[1]]
            end.owed += 1
            end.flush()

    def receive(self, number: int) -> None:
        end = self.ends[number]
        fd = end.sock.fileno()
        end.receive(AT_ONCE)
        now = time.monotonic()
        self.longest[number] = max(self.longest[number], now - self.heard[number])
        self.heard[number] = now
        if end.ended:
            end.close("an end")
        if end.outcome:
            self.forget(fd)
        else:
            self.due.append((now + PACE, number))


def main(role: str, options: Iterable[str]) -> None:
    """Be one of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    {"clients": Clients, "backends": Backends, "arrivals": Arrivals, "pings": Pings}[role](*map(float, options)).run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
