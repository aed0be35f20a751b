"""Clients that do anything at any moment of ten processes: at the end, the log is what they did."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.daemon.test_handover import fixed, unacknowledged
from tests.fleet import File
from tests.keeper import Manager, managed
from tests.manager import unix_listener
from tests.support import PATIENCE, abstract_name, eventually, reset

PROCESSES = 10
CONTENT = random.Random(1).randbytes(8 << 20)
APART = 10_007  # bytes between the beginnings of two streams in CONTENT
ID = 8  # bytes that say whose stream it is
HEAD = b"SSH-2.0-"  # what a client of a route says first; as long as that
MOST = 1_200_000  # bytes of a stream
BUFFER = 1 << 14  # bytes, so that rspd soon feels that somebody does not read
LONG = "10m"  # of what is not to happen here


class Action(NamedTuple):
    """who: which of those who can, or where to cut a header. size: in bytes.

    reads: of who comes, and of the backend, how many bytes they take until they are told to go on.
    """

    what: str
    who: int = 0
    size: int = 1
    reads: tuple[float, float] = (inf, inf)


# What is done before a handover, while the process hands over, while none runs, and while the next one starts.
Round = tuple[list[Action], list[Action], list[Action], list[Action]]


class End:
    """One end of a client's connection, its own or the backend's, with a stream that nobody else has.

    wants: how many bytes it is to send in all. asked: how it is to end then: finish or close; or abort, at once.
    reads: how many bytes it still takes. first, later: of a PROXY header, or of the head that a route asks for, what it
    says now, and what it keeps back.
    """

    def __init__(self, number: int) -> None:
        self._at = number * APART
        self.sock: socket.socket | None = None
        self.first = self.later = b""
        self.said = 0  # bytes of the header
        self.wants = self.sent = self.received = 0
        self.reads = inf
        self.asked = ""
        self.finished = self.closed = self.aborted = False
        self.saw = ""  # how the other stream ended: end, reset, or not yet
        self.knew = False  # it had seen the other's end when it finished
        self.arrived = 0  # bytes that rspd's kernel had when it aborted
        self.broken = False

    @property
    def identity(self) -> bytes:
        return CONTENT[self._at : self._at + ID]

    @property
    def open(self) -> bool:
        return bool(self.sock) and not (self.closed or self.aborted)

    def turn(self, other: End) -> bool:
        """Do what can be done now. Returns whether anything was. Raises AssertionError for bytes that are not ours."""
        before = (self.said, self.sent, self.received, self.saw, self.finished, self.closed, self.aborted)
        if self.sock and self.open and self.asked != "abort":
            self._send(self.sock)
            self._receive(self.sock, other)
        if self.sock and self.open and self.asked:
            self._end(self.sock, other)
        return before != (self.said, self.sent, self.received, self.saw, self.finished, self.closed, self.aborted)

    def _send(self, sock: socket.socket) -> None:
        try:
            while self.first and not self.finished:
                count = sock.send(self.first)
                self.said += count
                self.first = self.first[count:]
            while self.sent < self.wants and not (self.finished or self.later or self.broken):
                start = self._at + self.sent
                self.sent += sock.send(CONTENT[start : min(start + 65536, self._at + self.wants)])
        except BlockingIOError:
            pass
        except ConnectionError:
            self.broken = True  # what came before the reset is still to be read
            self.first = b""

    def _receive(self, sock: socket.socket, other: End) -> None:
        try:
            while self.reads > 0 and not self.saw:
                data = sock.recv(int(min(self.reads, 65536)))
                place = other._at + self.received
                assert data == CONTENT[place : place + len(data)], "bytes that the other end has not sent here"
                self.received += len(data)
                self.reads -= len(data)
                assert self.received <= other.sent
                if not data:
                    self.saw = "reset" if self.broken else "end"  # the kernel tells of a reset once
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self.saw = "reset"

    def _end(self, sock: socket.socket, other: End) -> None:
        if self.asked == "abort":
            self.arrived = max(self.sent - unacknowledged(sock), 0)
            self.aborted = True
            reset(sock)
            return
        if self.first or not (self.later or self.broken or self.sent == self.wants):
            return
        if not self.finished:
            self.finished = True
            self.knew = self.saw == "end"
            if self.asked == "finish":
                try:
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it was reset
        if self.asked == "close":
            self.closed = True
            sock.close()

    def may_reset(self, other: End) -> bool:
        """Whether its kernel sends RST: it does so too for what comes after the close, and for what is not read."""
        return self.aborted or (self.closed and self.received < other.sent)


class Client:
    """A client, with what its backend is to do.

    accepted, over: the first and the last process that may have accepted it, and that may have written its line.
    """

    def __init__(self, number: int, kind: str, process: int) -> None:
        self.number = number
        self.kind = kind
        self.host = f"127.0.1.{number + 1}"
        self.near, self.far = End(2 * number), End(2 * number + 1)
        self.accepted = self.over = (process, inf)
        self.relayed_at_abort = False

    def end(self, who: str) -> End:
        return self.near if who == "client" else self.far

    @property
    def orderly(self) -> bool:
        """Whether nobody resets anything."""
        return not (self.near.may_reset(self.far) or self.far.may_reset(self.near) or self.unfinished_header)

    @property
    def unfinished_header(self) -> bool:
        return bool(self.near.later)

    @property
    def causes(self) -> set[str]:
        """Those that the line may have."""
        near, far = self.near, self.far
        aborted = {"client-aborted"} if near.may_reset(far) else set()
        if self.unfinished_header:
            refused = "client-closed" if not near.said else "bad-head" if self.kind == "routed" else "bad-header"
            return aborted | ({refused} if near.finished else set())
        if far.may_reset(near):
            aborted.add("backend-aborted")
        if not (near.finished and (far.finished or not far.sock)):
            return aborted
        if aborted or not (near.knew or far.knew):
            return aborted | {"client-closed", "backend-closed"}
        return {"backend-closed" if near.knew else "client-closed"}

    def __repr__(self) -> str:
        near, far = ({k: v for k, v in vars(end).items() if v and k != "sock"} for end in (self.near, self.far))
        return f"{self.kind} {self.host} accepted={self.accepted} over={self.over}\n  client {near}\n  backend {far}"


def header(number: int) -> bytes:
    """A PROXY header, of either version."""
    host, port = f"192.0.2.{number + 1}", 1000 + number
    if number % 2:
        return f"PROXY TCP4 {host} 192.0.2.254 {port} 80\r\n".encode()
    both = socket.inet_aton(host) + socket.inet_aton("192.0.2.254")
    return b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + both + struct.pack("!HH", port, 80)


class Scene:
    """The clients, and the backends. A thread moves their bytes, whatever rspd does meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self.clients: list[Client] = []
        self.queued: list[int] = []  # the clients of the backend that serves one, as they reached it
        self.faults: list[str] = []
        self._listeners = [socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(2)]
        name = abstract_name()
        self._listeners.append(unix_listener(f"\0{name}", 1024))
        self._strangers: list[tuple[socket.socket, socket.socket]] = []  # a listener, and who has not said its name
        for listener in self._listeners:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            listener.setblocking(False)
        many, one = (f"127.0.0.1:{listener.getsockname()[1]}" for listener in self._listeners[:2])
        self._backends = {
            "plain": many,
            "serial": many,
            "front": many,
            "routed": many,
            "queue": one,
            "local": f"@{name}",
        }
        self.addresses = {kind: fixed() for kind in self._backends}
        own: dict[str, dict[str, Any]] = {
            "serial": {"max_connections": 1},
            "front": {"accept_proxy": "127.0.0.0/8"},
            "routed": {
                "backend": None,
                "routes": [{"protocol": "ssh", "backend": many}],
                "first_bytes_timeout": LONG,
            },
            "queue": {"backend": None, "backends": [{"address": one, "max_connections": 1}]},
        }
        times = ("queue_timeout", "idle_timeout", "half_close_timeout", "connect_timeout", "accept_proxy_timeout")
        proxies = {}
        for kind, backend in self._backends.items():
            keys = {"listen": self.addresses[kind], "backend": backend, "max_connections": 100}
            keys |= dict.fromkeys(times, LONG) | own.get(kind, {})
            proxies[kind] = {key: value for key, value in keys.items() if value is not None}
        self.file = File(folder, listen=None, max_connections=None, proxies=proxies)
        self._ended = False
        self._thread = threading.Thread(target=self._move, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended = True
        self._thread.join(PATIENCE)
        for sock in [*self._listeners, *(sock for _, sock in self._strangers)]:
            sock.close()
        for end in self._ends():
            if end.sock:
                end.sock.close()

    def _ends(self) -> list[End]:
        return [end for client in self.clients for end in (client.near, client.far)]

    def _move(self) -> None:
        while not self._ended:
            with self._lock:
                busy = self._turn()
            if not busy:
                time.sleep(0.001)

    def _turn(self) -> bool:
        self._accept()
        self._strangers = [stranger for stranger in self._strangers if not self._meet(*stranger)]
        busy = False
        for client in self.clients:
            try:
                busy |= client.near.turn(client.far)
                busy |= client.far.turn(client.near)
            except AssertionError as error:
                self.faults.append(f"{error}: {client}")
                client.near.reads = client.far.reads = 0
        return busy

    def _accept(self) -> None:
        for listener in self._listeners:
            try:
                while True:
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    self._strangers.append((listener, sock))
            except BlockingIOError:
                pass

    def _meet(self, listener: socket.socket, sock: socket.socket) -> bool:
        """Learn whom rspd has connected. Returns whether that is known, or nobody: an attempt that was given up."""
        try:
            name = sock.recv(ID, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            name = b""
        if not name:
            sock.close()
            return True
        if name == HEAD:
            sock.recv(ID)
        if len(name) < ID or name == HEAD:
            return False
        client = next((client for client in self.clients if client.near.identity == name), None)
        if not client or client.far.sock:
            self.faults.append(f"a second connection, or a stranger's: {client}")
            sock.close()
            return True
        client.far.sock = sock
        if listener is self._listeners[1]:
            self.queued.append(client.number)
        return True

    # Actions

    def act(self, action: Action, process: int) -> None:
        """process: the one that runs, or the next."""
        who, _, what = action.what.partition(" ")
        if who == "come":
            self._come(what, action, process)
            return
        able = [client for client in self.clients if able_to(client.end(who), what)]
        if (who, what) == ("backend", "abort"):
            able = [client for client in able if client.kind != "local"]
        if not able:
            return
        client = able[action.who % len(able)]
        end = client.end(who)
        with self._lock:
            if what == "send":
                end.wants = max(ID, min(end.wants + action.size, MOST))
            elif what == "header":
                end.first, end.later = end.first + end.later, b""
            elif what in ("hold", "read", "release"):
                end.reads = {"hold": 0, "read": end.reads + action.size, "release": inf}[what]
            else:
                client.relayed_at_abort |= what == "abort" and bool(client.far.sock)
                if not (client.near.asked or client.far.asked):
                    client.over = (process, inf)
                end.asked = what
            self._turn()

    def _come(self, kind: str, action: Action, process: int) -> None:
        silent, kind = kind == "silent", "plain" if kind == "silent" else kind
        client = Client(len(self.clients), kind, process)
        client.near.wants = 0 if silent else max(ID, action.size)
        client.near.reads, client.far.reads = action.reads
        if kind in ("front", "routed"):
            whole = header(client.number) if kind == "front" else HEAD
            cut = action.who % (len(whole) + 1)
            client.near.first, client.near.later = whole[:cut], whole[cut:]
        sock = socket.socket()
        client.near.sock = sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        sock.settimeout(PATIENCE)
        sock.bind((client.host, 0))
        host, _, port = self.addresses[kind].partition(":")
        sock.connect((host, int(port)))
        sock.setblocking(False)
        with self._lock:
            self.clients.append(client)
            self._turn()

    # What is to be seen

    def wait(self, condition: Callable[[], bool], service: Manager, what: str) -> None:
        try:
            eventually(lambda: self.faults or condition(), what)
        except AssertionError as error:
            clients = "\n".join(map(repr, self.clients))
            raise AssertionError(f"{error}\n{clients}\n{logs(service)}") from None
        assert not self.faults, "\n".join([*self.faults, logs(service)])

    def settle(self, service: Manager) -> None:
        """Wait until all that can happen has happened."""
        process = len(service.daemons) - 1
        moving = [client for client in self.clients if self._is_served(client)]
        over = [client for client in moving if is_over(client)]

        def settled() -> bool:
            ends = lines(service)
            return all(client.host in ends for client in over) and all(arrived(client) for client in moving)

        self.wait(settled, service, "all is done")
        for client in over:
            client.over = (client.over[0], min(client.over[1], process))
        self.note_accepted(process)

    def _is_served(self, client: Client) -> bool:
        """Whether its turn has come."""
        return bool(client.far.sock) or (client.kind == "plain" and bool(client.near.wants or client.near.asked))

    def note_accepted(self, process: int) -> None:
        """Those whose bytes are at a backend have been accepted by now."""
        with self._lock:
            for client in self.clients:
                if client.far.sock:
                    client.accepted = (client.accepted[0], min(client.accepted[1], process))

    def finish(self, service: Manager) -> None:
        """Let everybody read everything, and end what has not ended."""
        with self._lock:
            for client in self.clients:
                near, far = client.near, client.far
                near.reads = far.reads = inf
                if not near.asked:
                    near.first, near.later = near.first + near.later, b""
                if not (near.asked or far.asked):
                    client.over = (len(service.daemons) - 1, inf)
                near.asked, far.asked = near.asked or "finish", far.asked or "finish"

        def ended() -> bool:
            return len(lines(service)) == len(self.clients) and all(end.saw for end in self._ends() if end.open)

        self.wait(ended, service, "everybody has ended")

    def check(self, service: Manager) -> None:
        """Compare the lines of the log with what the clients did."""
        ends = lines(service)
        for client in self.clients:
            process, end = ends[client.host]
            try:
                self._check_ends(client)
                self._check_line(client, process, end)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{client}\n{end}\n{logs(service)}") from None
        assert self.queued == sorted(self.queued), "the queue has kept its order"
        check_counts(service, ends, len(self.clients))
        by_kind: dict[str, list[int]] = {}
        for client in self.clients:
            process, end = ends[client.host]
            by_kind.setdefault(client.kind, []).append(process - int(end.get("handovers", 0)))
        for kind, accepted in by_kind.items():
            assert accepted == sorted(accepted), f"{kind}: clients are accepted in order\n{logs(service)}"

    def _check_ends(self, client: Client) -> None:
        near, far = client.near, client.far
        for end, other in ((near, far), (far, near)):
            if end.saw == "end" and (client.unfinished_header or not far.sock):
                assert (end.received, near.finished) == (0, True)
            elif end.saw == "end" and not (client.kind == "local" and near.aborted):  # a unix socket knows no reset
                assert other.finished, "what was cut short must not look complete"
                assert end.received == other.sent
            elif end.saw == "reset":
                assert not client.orderly, "nobody has reset anything"
            if far.sock and not (end.closed or end.aborted):
                if other.aborted and not other.finished and client.kind != "local":
                    assert end.saw == "reset", "an abort stays an abort"
                if other.aborted and client.relayed_at_abort:
                    assert end.received >= other.arrived, "what came before an abort is passed on"

    def _check_line(self, client: Client, process: int, end: dict[str, str]) -> None:
        near, far = client.near, client.far
        assert end["proxy"] == client.kind
        assert end["cause"] in client.causes, client.causes
        head = near.said if client.kind == "routed" else 0
        sent, received = max(int(end["sent"]) - head, 0), int(end["received"])
        assert far.received <= sent <= near.sent
        assert near.received <= received <= far.sent
        if client.orderly:
            assert (sent, received) == (near.sent, far.sent) == (far.received, near.received)
            assert "lost" not in end
            assert "reason" not in end
        if far.sock or client.orderly:
            assert end["backend"] == self._backends[client.kind]
        if client.unfinished_header:
            assert end["backend"] == "-"
        if far.sock or client.unfinished_header or client.kind != "routed":
            assert end.get("route") == ('"ssh"' if client.kind == "routed" and far.sock else None)
        if client.kind == "front" and not client.unfinished_header and (far.sock or client.orderly):
            assert end["client"] == f"192.0.2.{client.number + 1}:{1000 + client.number}"
        if client.unfinished_header or client.kind != "front":
            assert "via" not in end
        handovers = int(end.get("handovers", 0))
        assert end.get("handovers") != "0"
        assert client.over[0] <= process <= client.over[1]
        assert client.accepted[0] <= process - handovers <= client.accepted[1]


def able_to(end: End, what: str) -> bool:
    """Whether it makes sense to ask this of an end: by what was asked before, not by what has come of it."""
    if what == "header":
        return bool(end.later) and not end.asked
    if what == "send":
        return not end.asked
    if what in ("finish", "close", "abort"):
        return not end.asked or (end.asked == "finish" != what)
    return end.asked not in ("close", "abort")


def is_over(client: Client) -> bool:
    """Whether a client that is served has its line soon, whatever the others do."""
    near, far = client.near, client.far
    asked = near.asked, far.asked
    if near.reads < inf or far.reads < inf:
        return False
    return "abort" in asked or ("" not in asked or (not near.wants and bool(near.asked)))


def arrived(client: Client) -> bool:
    """Whether what both ends send to each other has come, unless one of them hinders it."""
    near, far = client.near, client.far
    if not near.wants or {near.asked, far.asked} & {"close", "abort"} or not client.orderly:
        return True
    return all(
        bool(other.sock) and end.received == other.sent == other.wants
        for end, other in ((near, far), (far, near))
        if end.reads == inf
    )


def lines(service: Manager) -> dict[str, tuple[int, dict[str, str]]]:
    """By hosts of clients: the process that has written the line, and its fields."""
    found: dict[str, tuple[int, dict[str, str]]] = {}
    for process, daemon in enumerate(service.daemons):
        for line in daemon.find("connection closed"):
            end = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line))
            host = (end.get("via") or end["client"]).partition(":")[0]
            assert host not in found, f"a second line: {line}\n{logs(service)}"
            found[host] = process, end
    return found


def logs(service: Manager) -> str:
    return "\n".join(f"process {process}:\n{daemon.log}" for process, daemon in enumerate(service.daemons))


def told(service: Manager, process: int, pattern: str) -> int:
    """The number in the one line of a process that matches."""
    (line,) = service.daemons[process].find(pattern)
    return int(re.findall(pattern, line)[0])


def check_counts(service: Manager, ends: dict[str, tuple[int, dict[str, str]]], clients: int) -> None:
    """What the processes say of their numbers agrees with the lines."""
    written = Counter(process for process, _ in ends.values())
    accepted = Counter(process - int(end.get("handovers", 0)) for process, end in ends.values())
    served = over = 0
    for process in range(len(service.daemons) - 1):
        served += accepted[process]
        over += written[process]
        assert told(service, process, r"handed over connections=\d+ served=(\d+)$") == served, logs(service)
        assert told(service, process, r"handed over connections=(\d+) ") == served - over, logs(service)
        assert told(service, process + 1, r"took over connections=(\d+)$") == served - over, logs(service)
    last = len(service.daemons) - 1
    assert told(service, last, r"ended served=(\d+)$") == clients
    for daemon in service.daemons:
        usual = r"connection closed|all places taken|clients no longer wait"
        assert not [line for line in daemon.find("WARNING|ERROR") if not re.search(usual, line)], logs(service)


@contextmanager
def scene_in(folder: Path) -> Iterator[Scene]:
    scene = Scene(folder)
    try:
        yield scene
    finally:
        scene.close()


def play(scene: Scene, service: Manager, rounds: list[Round]) -> None:
    """A handover in each round."""
    for process, (before, stopping, between, starting) in enumerate(rounds):
        for action in before:
            if action.what == "settle":
                scene.settle(service)
            else:
                scene.act(action, process)
        scene.note_accepted(process)
        daemon = service.begin_to_stop()
        for action in stopping:
            scene.act(action, process)
        assert daemon.wait() == 0, daemon.log
        for action in between:
            scene.act(action, process + 1)
        ready = len(service.store.with_field("READY=1"))
        service.start(wait=False)
        for action in starting:
            scene.act(action, process + 1)
        service.store.wait_for("READY=1", ready + 1)
    scene.finish(service)


COME = ["come plain", "come local", "come queue", "come front", "come serial", "come silent", "come routed"]
DO = ["send", "hold", "read", "release", "finish", "close", "abort"]
WHAT = [*COME, *COME, *(f"{who} {what}" for who in ("client", "backend") for what in DO), *["client header"] * 3]
WHAT += ["client send", "backend send"] * 2
SIZES = st.one_of(st.sampled_from([1, 999, 40_000, 66_000, 300_000]), st.integers(1, 300_000))
READS = st.sampled_from([inf, inf, 0, 50_000])


def actions(*more: str, least: int = 0, most: int) -> st.SearchStrategy[list[Action]]:
    """A list of them."""
    what = st.sampled_from([*WHAT, *more])
    one = st.builds(Action, what, st.integers(0, 59), SIZES, st.tuples(READS, READS))
    return st.lists(one, min_size=least, max_size=most)


ROUND = st.tuples(actions(*["settle"] * 4, least=2, most=16), actions(most=6), actions(most=8), actions(most=6))
ROUNDS = st.lists(ROUND, min_size=PROCESSES - 1, max_size=PROCESSES - 1)


@given(ROUNDS)
@settings(max_examples=5)
def test_the_log_of_ten_processes_adds_up_to_what_their_clients_did(tmp_path: Path, rounds: list[Round]) -> None:
    with scene_in(tmp_path) as scene:
        with managed("-c", str(scene.file.path)) as service:
            play(scene, service, rounds)
        scene.check(service)
