"""A process that is killed in the middle of a handover: what is lost is only what must be.

It is killed at one call after the other. What it has left in the store by then says what becomes of the connections:

| left | the connections |
| --- | --- |
| no descriptor | are the killed process's: the kernel ends them, as those of any process that is killed |
| descriptors and no whole document | are reset by the next process |
| descriptors and the document | go on |
| the document, and descriptors that another process has received, which was killed | are that process's |
"""

from __future__ import annotations

import itertools
import re
import signal
import socket
import stat
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import fstat, pread
from pathlib import Path

import pytest

from rspd.host.store import MESSAGE_MAX
from rspd.running.document import DocumentError, read
from tests.keeper import Manager, managed
from tests.support import PATIENCE, Backend, can_trace, eventually, free_port, receive_all
from tests.tracer import Call, Trace, Tracer

# What a client says first: what it wants, and who it is.
HEAD = struct.Struct("!4sI")

# Blocks of a download: more than what is between the backend and a client that does not read.
BLOCKS = 12_000

# Of clients that do not read, so that a backend waits.
SMALL = 1 << 16

# So many connections have more descriptors than one message takes.
MANY = 140

KINDS = ["talk", "load", "half"]

LISTENER = "rspd+listener-"

# The sockets of a process without connections: its listener, a pair to wake it, and one to the manager.
IDLE = 4

# These calls change nothing that another process sees: to be killed at the next one is the same.
WITHIN = {"brk", "fcntl", "fstat", "getpid", "getrandom", "getsockname", "getsockopt", "ioctl", "lseek", "mmap"}
WITHIN |= {"munmap", "newfstatat", "poll", "prlimit64", "read", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn"}

# These are of a relay, which goes on meanwhile.
WITHIN |= {"recvfrom", "sendto", "splice"}

# strace writes calls down, with as much of their arguments as the tests look at.
RECORD = ["-e", "signal=none", "-s", "99"]

# The sweep is shared out to so many tests, for as many processors.
PARTS = 2

numbers = itertools.count(1)


def block(ident: int, number: int) -> bytes:
    """What only this connection has."""
    return struct.pack("!II", ident, number) * 128


def exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer at the end of the stream."""
    data = b""
    while len(data) < size and (part := sock.recv(size - len(data))):
        data += part
    return data


class Server(Backend):
    """A backend that serves each client what is that client's own."""

    def __init__(self) -> None:
        self.mixed: list[str] = []
        self.answer = threading.Event()
        super().__init__(self._serve)

    def _serve(self, sock: socket.socket) -> None:
        kind, ident = HEAD.unpack(exactly(sock, HEAD.size))
        try:
            if kind == b"load":
                for number in range(BLOCKS):
                    sock.sendall(block(ident, number))
            elif kind == b"half":
                sock.sendall(b"!")
                self._expect(ident, receive_all(sock), b"")
                assert self.answer.wait(4 * PATIENCE)
                sock.sendall(block(ident, 0))
            else:
                for number in itertools.count():
                    data = exactly(sock, 1024)
                    if not data:
                        break
                    self._expect(ident, data, block(ident, number))
                    sock.sendall(data)
        except ConnectionError:
            pass  # the process is killed

    def _expect(self, ident: int, found: bytes, expected: bytes) -> None:
        if found != expected:
            self.mixed.append(f"the backend of {ident} got {found[:8]!r}")


class Client:
    """A client that knows what it is to get."""

    def __init__(self, port: int, kind: str, server: Server) -> None:
        self.kind = kind
        self.ident = next(numbers)
        self._server = server
        self._said = 0
        self.sock = socket.socket()
        self.sock.settimeout(PATIENCE)
        if kind == "load":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self.sock.connect(("127.0.0.1", port))
        self.sock.sendall(HEAD.pack(kind.encode(), self.ident))

    def begin(self) -> None:
        """Be served for a moment."""
        if self.kind == "talk":
            self.talk()
        elif self.kind == "load":
            assert exactly(self.sock, 1024) == block(self.ident, 0)
        else:
            self.sock.shutdown(socket.SHUT_WR)
            assert self.sock.recv(1) == b"!"

    def talk(self) -> None:
        """Say something, and hear it."""
        data = block(self.ident, self._said)
        self._said += 1
        self.sock.sendall(data)
        assert exactly(self.sock, 1024) == data, f"of client {self.ident}"

    def go_on(self) -> None:
        """All that is left comes."""
        if self.kind == "talk":
            self.talk()
            return
        self._server.answer.set()
        assert receive_all(self.sock) == self._rest(), f"of client {self.ident}"

    def _rest(self) -> bytes:
        if self.kind == "load":
            return b"".join(block(self.ident, number) for number in range(1, BLOCKS))
        return block(self.ident, 0) if self.kind == "half" else b""

    def is_reset(self) -> bool:
        """Whether the cut connection ends with RST. What came before is its own, and not all of it."""
        parts = []
        try:
            while data := self.sock.recv(1 << 20):
                parts.append(data)
            aborted = False
        except ConnectionError:
            aborted = True
        found, whole = b"".join(parts), self._rest()
        assert whole.startswith(found), f"of client {self.ident}"
        assert not whole or len(found) < len(whole)
        return aborted


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server
        server.answer.set()
        assert server.mixed == []


@pytest.fixture
def service(server: Server) -> Iterator[Manager]:
    can_trace()
    where = f"127.0.0.1:{free_port()}"
    with managed("-l", where, "-b", server.address, "--max-connections", "300") as service:
        eventually(lambda: service.names == [LISTENER])
        yield service


@contextmanager
def clients(service: Manager, server: Server, kinds: Sequence[str] = KINDS) -> Iterator[list[Client]]:
    """Clients that are served."""
    server.answer.clear()
    port = service.daemon.port
    with ExitStack() as stack:
        found = [Client(port, kind, server) for kind in kinds]
        for client in found:
            stack.enter_context(client.sock)
        for client in found:
            client.begin()
        yield found


def left(service: Manager) -> str:
    """What is in the store beside listeners, in the words of the table above."""
    parts = [stored.fileno() for name, stored in service.store.kept if name == "rspd+parcel"]
    states = [fd for fd in parts if stat.S_ISREG(fstat(fd).st_mode)]
    if not states:
        return "nothing"
    try:
        read(pread(states[0], 1 << 20, 0))
        document = True
    except DocumentError:
        document = False
    descriptors = any(has_message(fd) for fd in parts if fd not in states)
    return {
        (False, False): "no descriptor",
        (True, False): "descriptors",
        (True, True): "all",
        (False, True): "the document",
    }[descriptors, document]


def has_message(fd: int) -> bool:
    """Whether a queue has a message at this end, which stays there."""
    with socket.socket(fileno=fd) as sock:
        try:
            return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        finally:
            sock.detach()


def own(service: Manager) -> int:
    """How many sockets and files in memory the process has. Pipes stay for whoever needs one next."""
    return sum(what.startswith(("socket:", "/memfd:")) for what in service.daemon.descriptors())


def nothing_is_left(service: Manager) -> None:
    """The store has the listener alone, and the process the sockets of one that is idle."""
    eventually(lambda: service.names == [LISTENER] and len(service.store.kept) == 1, "a listener alone is stored")
    eventually(lambda: own(service) == IDLE, f"sockets of an idle process: {service.daemon.descriptors()}")


def serves(service: Manager, server: Server) -> None:
    """A new client is served."""
    with clients(service, server, ["talk"]) as (client,):
        client.talk()


def settle(service: Manager) -> None:
    """Wait until the store has read all that a process has sent that runs no more."""
    count = len(service.store.with_field("SETTLED")) + 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"SETTLED=1", service.store.path)
    service.store.wait_for("SETTLED", count)


def parts(calls: Sequence[Call], part: int) -> list[Call]:
    """Of these, those at which the test of this part kills."""
    return [call for call in calls if call.name not in WITHIN][part::PARTS]


# The process before


def trace_old(service: Manager, server: Server, file: Path) -> list[Call]:
    """The calls of a process while it hands over, in an ordinary restart."""
    with clients(service, server) as served:
        with Tracer(service.daemon.pid, *RECORD, "-o", str(file)) as tracer:
            service.stop()
            tracer.wait()
        service.start()
        for client in served:
            client.go_on()
    trace = Trace(file)
    return trace.calls[: trace.first("handed over") + 5]


def kill_old(service: Manager, server: Server, call: Call) -> str:
    """Kill the process at a call while it hands over, and start the next one. Returns what it had left."""
    with clients(service, server) as served:
        with Tracer(service.daemon.pid, *call.kill()) as tracer:
            code = service.begin_to_stop().wait()
            tracer.wait()
        settle(service)
        found = left(service)
        with come(service, server) as waiting:
            service.start()
            waiting.begin()
        if found == "all":
            for client in served:
                client.go_on()
        else:
            resets = [client.is_reset() for client in served]
            assert all(resets) or found != "descriptors", f"killed at {call}, an end looks as if in order: {resets}"
        assert service.daemon.find(f"took over connections={len(served) if found == 'all' else 0}$")
        assert code in (-signal.SIGKILL, 0)
    nothing_is_left(service)
    return found if code else "in time"


@contextmanager
def come(service: Manager, server: Server) -> Iterator[Client]:
    """A client that is not refused, whether a process runs or not."""
    client = Client(service.daemons[0].port, "talk", server)
    with client.sock:
        yield client


@pytest.mark.parametrize("part", range(PARTS))
def test_a_process_that_is_killed_at_any_call_of_the_handover_loses_what_it_has_not_left_whole_and_no_more(
    service: Manager, server: Server, tmp_path: Path, part: int
) -> None:
    found = {call: kill_old(service, server, call) for call in parts(trace_old(service, server, tmp_path / "t"), part)}
    every = {"nothing", "no descriptor", "descriptors", "all"}
    the_next_is_like_any_other(service, server, found, every)


def the_next_is_like_any_other(service: Manager, server: Server, found: Mapping[Call, str], every: set[str]) -> None:
    """After so many kills, which have `found` all there is, a restart goes as ever."""
    said = "\n".join(f"{state}: {call}" for call, state in found.items())
    assert every <= set(found.values()), said
    # If a timer comes between, a call is another one than in the trace.
    assert list(found.values()).count("in time") < len(found) / 4, said
    with clients(service, server) as served:
        service.restart()
        for client in served:
            client.go_on()
    nothing_is_left(service)


# The process after


def traced(*options: str) -> list[str]:
    """The beginning of the command of a process that strace watches from its start."""
    return ["strace", "-D", "-qq", *options]


def trace_new(service: Manager, server: Server, file: Path) -> list[Call]:
    """The calls of a process that takes over, from the look at the document until it is ready."""
    with clients(service, server) as served:
        service.stop()
        service.start(launcher=traced(*RECORD, "-o", str(file)))
        for client in served:
            client.go_on()
        trace = Trace(file)
        begin = trace.first(r"pread64\(\d+, \"rspd ")
        end = trace.first("READY=1", begin)
    service.restart()
    return trace.calls[begin : end + 1]


def kill_new(service: Manager, server: Server, call: Call) -> str:
    """Kill a process at a call while it takes over, and start the next one. Returns what it had left."""
    with clients(service, server) as served:
        service.stop()
        ready = len(service.store.with_field("READY=1"))
        killed = service.start(wait=False, launcher=traced(*call.kill()))
        eventually(lambda: killed.process.poll() is not None or len(service.store.with_field("READY=1")) > ready)
        if killed.process.poll() is None:
            # It is another call than in the trace.
            killed.kill()
            settle(service)
            found = "in time"
        else:
            assert killed.wait() == -signal.SIGKILL
            settle(service)
            found = left(service)
        with come(service, server) as waiting:
            service.start()
            waiting.begin()
        took_over(service, served, found)
    nothing_is_left(service)
    return found


def took_over(service: Manager, served: Sequence[Client], found: str) -> None:
    """What the process has said, and what has become of the clients: all go on, or none."""
    if found == "all":
        for client in served:
            client.go_on()
    else:
        for client in served:
            client.is_reset()
    assert service.daemon.find(f"took over connections={len(served) if found == 'all' else 0}$")
    # Only who has a document knows whom it has lost.
    lost = service.daemon.find("connection closed .*cause=handover-failed")
    assert len(lost) == (len(served) if found == "the document" else 0)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_process_that_is_killed_at_any_call_while_it_takes_over_loses_what_it_has_received_and_no_more(
    service: Manager, server: Server, tmp_path: Path, part: int
) -> None:
    calls = parts(trace_new(service, server, tmp_path / "t"), part)
    found = {call: kill_new(service, server, call) for call in calls}
    the_next_is_like_any_other(service, server, found, {"all", "the document"})


def test_what_a_process_that_is_killed_while_it_takes_over_had_not_received_yet_goes_on(
    service: Manager, server: Server
) -> None:
    """There are several messages of descriptors, and it is killed before it reads the second."""
    with clients(service, server, ["talk"] * MANY) as served:
        service.stop()
        second = Call("recvmsg", 3)  # the first is at the other end of the queue
        assert service.start(wait=False, launcher=traced(*second.kill())).wait() == -signal.SIGKILL
        service.start()
        lost = [dict(re.findall(r"(\w+)=(\S+)", line))["client"] for line in service.daemon.find("connection closed ")]
        assert len(lost) == MESSAGE_MAX // 2 + 1  # one has a descriptor in each message
        for client in served:
            if "{}:{}".format(*client.sock.getsockname()) in lost:
                assert client.is_reset()
            else:
                client.go_on()
    nothing_is_left(service)
