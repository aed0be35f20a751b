"""The descriptor store: what is put into it, over a real notify socket, and what the next process takes out."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from rspd.host.store import LISTENERS_MAX, MESSAGE_MAX, PARCEL, Inheritance, Parcel, Store, _messages, abort
from rspd.host.systemd import Notifier, StoredDescriptor
from tests.engine.test_pipes import unprivileged
from tests.manager import tcp_listener, unix_listener
from tests.support import PATIENCE, eventually, is_reset, tcp_pair

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

TOKEN, OTHER = b"0123456789abcdef", b"fedcba9876543210"


class Told(NamedTuple):
    """A message, and the descriptors that came with it."""

    text: str
    fds: list[int]


class Manager:
    """The service manager: a notify socket that is read when a test says so. It has a copy of each descriptor."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(path)
        self.sock.setblocking(False)
        self.told: list[Told] = []

    def read(self) -> list[Told]:
        """The messages that have come since the last look. Their descriptors are closed at the end of the test."""
        news = []
        with pytest.raises(BlockingIOError):
            while True:
                data, ancillary, flags, _ = self.sock.recvmsg(65536, socket.CMSG_SPACE(4 * MESSAGE_MAX))
                assert not flags & socket.MSG_CTRUNC
                fds = [fd for _, _, rights in ancillary for fd in struct.unpack(f"{len(rights) // 4}i", rights)]
                news.append(Told(data.decode(), fds))
        self.told += news
        return news

    def close_copies(self) -> None:
        """Close all that it has."""
        for _, fds in self.told:
            for fd in fds:
                os.close(fd)
        self.told.clear()

    @contextmanager
    def full(self) -> Iterator[None]:
        """Its queue has no room."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
            filler.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    filler.sendto(b"x", self.path)
            yield
        self.told = [told for told in self.told + self.read() if told.text != "x"]


@pytest.fixture
def stack(no_descriptor_is_left_open: None) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def manager(stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manager:
    manager = Manager(f"{tmp_path}/notify")
    stack.callback(manager.sock.close)
    stack.callback(manager.close_copies)
    monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
    return manager


@pytest.fixture
def make_store(manager: Manager, stack: ExitStack) -> Callable[..., Store]:
    """Makes one, which has found what has these names."""

    def make(*found: str) -> Store:
        notifier = Notifier()
        assert notifier._notifier
        stack.callback(notifier._notifier.socket.close)
        return Store(notifier, [StoredDescriptor(name, -1) for name in found])

    return make


@pytest.fixture
def parcel(stack: ExitStack) -> Parcel:
    parcel = Parcel()
    stack.callback(parcel.close)
    return parcel


def copies(parcel: Parcel) -> list[StoredDescriptor]:
    """What the next process finds, if a parcel is in the store."""
    return [StoredDescriptor(PARCEL, os.dup(fd)) for fd in parcel.left]


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def pairs(stack: ExitStack, count: int) -> list[tuple[socket.socket, socket.socket]]:
    return [(stack.enter_context(near), stack.enter_context(far)) for near, far in (tcp_pair() for _ in range(count))]


# Listeners


class Listening:
    """One that has the file at its path."""

    def __init__(self, sock: socket.socket) -> None:
        self.fd = sock.fileno()
        path = sock.getsockname() if sock.family == socket.AF_UNIX else ""
        self.file = (os.stat(path).st_dev, os.stat(path).st_ino) if path else None


def test_each_listener_is_stored_by_a_name_with_its_inode(
    manager: Manager, make_store: Callable[..., Store], stack: ExitStack, tmp_path: Path
) -> None:
    web, local = stack.enter_context(tcp_listener()), stack.enter_context(unix_listener(f"{tmp_path}/s"))
    make_store().keep([Listening(web), Listening(local)])
    told = manager.read()
    file = os.stat(f"{tmp_path}/s")
    own = [str(inode(web.fileno())), f"{inode(local.fileno())}-{file.st_dev}-{file.st_ino}"]
    names = [f"FDSTORE=1\nFDNAME=rspd+listener-{name}\nFDPOLL=0" for name in own]
    assert sorted(one.text for one in told) == sorted(names)
    assert {inode(fd) for one in told for fd in one.fds} == {inode(web.fileno()), inode(local.fileno())}


def test_a_listener_that_is_in_the_store_is_not_stored_again(
    manager: Manager, make_store: Callable[..., Store], stack: ExitStack
) -> None:
    web = stack.enter_context(tcp_listener())
    store = make_store(f"listener-{inode(web.fileno())}")
    for _ in range(2):
        store.keep([Listening(web)])
    assert manager.read() == []


def test_a_listener_that_is_given_up_leaves_the_store_and_so_does_what_was_found(
    manager: Manager, make_store: Callable[..., Store], stack: ExitStack
) -> None:
    web = stack.enter_context(tcp_listener())
    store = make_store("listener-1", PARCEL)
    store.keep([Listening(web)])
    name = f"rspd+listener-{inode(web.fileno())}"
    removed = "FDSTOREREMOVE=1\nFDNAME=rspd+"
    texts = [one.text for one in manager.read()]
    assert sorted(texts[:2]) == [f"{removed}listener-1", f"{removed}parcel"]
    assert texts[2:] == [f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0"]
    store.keep([])
    assert [one.text for one in manager.read()] == [f"FDSTOREREMOVE=1\nFDNAME={name}"]


def test_more_listeners_than_the_store_has_room_for_leave_room_for_a_parcel(
    manager: Manager, make_store: Callable[..., Store], stack: ExitStack, as_many_descriptors_as_allowed: None
) -> None:
    many = [Listening(stack.enter_context(socket.socket(socket.AF_UNIX))) for _ in range(LISTENERS_MAX + 20)]
    store = make_store()
    while len(store._kept) < LISTENERS_MAX:  # systemd reads on
        before = len(store._kept)
        store.keep(many)
        manager.read()
        assert len(store._kept) > before
    store.keep(many)
    assert manager.read() == []
    assert LISTENERS_MAX + 4 <= 512  # FileDescriptorStoreMax=


def test_a_message_that_finds_no_room_is_sent_later(
    manager: Manager, make_store: Callable[..., Store], stack: ExitStack
) -> None:
    web = stack.enter_context(tcp_listener())
    store = make_store("listener-1")
    with manager.full():
        store.keep([Listening(web)])
    assert manager.told == []
    store.keep_all()
    removed, told = manager.read()
    assert removed.text == "FDSTOREREMOVE=1\nFDNAME=rspd+listener-1"
    assert told.text == f"FDSTORE=1\nFDNAME=rspd+listener-{inode(web.fileno())}\nFDPOLL=0"


def test_a_listener_for_which_no_room_is_in_flight_is_stored_later(
    manager: Manager, make_store: Callable[..., Store], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other services of this user may hand over now: what is in flight counts for all."""
    web = stack.enter_context(tcp_listener())
    store = make_store()
    send = socket.socket.sendmsg
    failures = [errno.ETOOMANYREFS]

    def sendmsg(sock: socket.socket, *arguments: object) -> int:
        if failures:
            raise OSError(failures.pop(), "Too many references: cannot splice")
        return send(sock, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "sendmsg", sendmsg, raising=False)
    store.keep([Listening(web)])
    assert manager.read() == []
    store.keep_all()
    assert len(manager.read()) == 1


# A parcel in the store


def test_a_parcel_is_stored_in_one_message_by_one_name(
    manager: Manager, make_store: Callable[..., Store], parcel: Parcel
) -> None:
    left = [inode(fd) for fd in parcel.left]
    make_store().keep_parcel(parcel)
    [told] = manager.read()
    assert told.text == "FDSTORE=1\nFDNAME=rspd+parcel"
    assert [inode(fd) for fd in told.fds] == left


def test_a_parcel_is_kept_if_systemd_has_the_last_of_its_descriptors(
    manager: Manager, make_store: Callable[..., Store], parcel: Parcel
) -> None:
    make_store().keep_parcel(parcel)
    [told] = manager.read()
    assert parcel.kept
    # Without room for all in the store, systemd closes the last ones.
    os.close(told.fds.pop())
    assert not parcel.kept


def test_a_parcel_that_found_no_room_in_the_queue_is_an_error(
    manager: Manager, make_store: Callable[..., Store], parcel: Parcel
) -> None:
    store = make_store()
    with manager.full(), pytest.raises(OSError, match="systemd takes no message") as caught:
        store.keep_parcel(parcel)
    assert caught.value.errno == errno.EAGAIN
    store.keep_parcel(parcel)
    assert len(manager.read()) == 1


def test_the_barrier_has_news_once_systemd_has_read_and_closed_it(
    manager: Manager, make_store: Callable[..., Store]
) -> None:
    reader = make_store().barrier()
    try:
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        [told] = manager.read()
        assert told.text == "BARRIER=1"
        assert len(told.fds) == 1
        manager.close_copies()
        assert os.read(reader, 1) == b""
        assert not os.get_inheritable(reader)
    finally:
        os.close(reader)


def test_a_barrier_without_room_in_the_queue_is_an_error_and_leaves_nothing_open(
    manager: Manager, make_store: Callable[..., Store]
) -> None:
    store = make_store()
    with manager.full(), pytest.raises(OSError, match="systemd takes no message"):
        store.barrier()


def test_a_parcel_is_inherited_by_no_other_program(parcel: Parcel) -> None:
    assert [os.get_inheritable(fd) for fd in (*parcel.left, parcel._probe.fileno())] == [False] * 5


# What is in a parcel


@pytest.mark.parametrize("count", [0, 1, MESSAGE_MAX, MESSAGE_MAX + 1, 600])
def test_descriptors_come_over_whole_by_the_numbers_that_they_had(
    parcel: Parcel, stack: ExitStack, count: int, as_many_descriptors_as_allowed: None
) -> None:
    own = []
    for _ in range(count):
        own.append(os.memfd_create("x"))
        stack.callback(os.close, own[-1])
    assert parcel.send(own, TOKEN) == count
    parcel.write([b"state"])
    inheritance = Inheritance(copies(parcel))
    assert inheritance.states() == [b"state"]
    received = inheritance.receive(TOKEN)
    try:
        assert list(received) == own
        assert [inode(fd) for fd in received.values()] == [inode(fd) for fd in own]
        assert not any(os.get_inheritable(fd) for fd in received.values())
        assert inheritance.receive(TOKEN) == {}
    finally:
        inheritance.close()
        abort(received.values())


def test_thousands_of_descriptors_fit_into_a_parcel(
    parcel: Parcel, stack: ExitStack, as_many_descriptors_as_allowed: None
) -> None:
    near, far = stack.enter_context(socket.socket()), stack.enter_context(socket.socket())
    count = 10_000
    assert parcel.send([near.fileno(), far.fileno()] * (count // 2), TOKEN) == count


def test_a_state_of_many_parts_is_read_as_it_was_written(parcel: Parcel) -> None:
    parts: list[bytes | memoryview] = [os.urandom(3_000_000), b"", memoryview(bytes(range(256)))]
    parcel.write(parts)
    inheritance = Inheritance(copies(parcel))
    assert inheritance.states() == [b"".join(map(bytes, parts))]
    inheritance.close()


def test_a_socket_with_another_token_is_nobodys_and_its_peer_gets_a_reset(parcel: Parcel, stack: ExitStack) -> None:
    (near, far), (mine, theirs) = pairs(stack, 2)
    parcel.send([far.fileno()], OTHER)
    parcel.send([theirs.fileno()], TOKEN)
    inheritance = Inheritance(copies(parcel))
    numbers = [theirs.fileno()]
    far.close()
    theirs.close()
    received = inheritance.receive(TOKEN)
    assert list(received) == numbers
    assert is_reset(near)
    mine.settimeout(0)
    with pytest.raises(BlockingIOError):
        mine.recv(1)
    inheritance.close()
    abort(received.values())
    mine.settimeout(PATIENCE)
    assert is_reset(mine)


def test_what_is_not_received_is_reset_at_the_close(parcel: Parcel, stack: ExitStack) -> None:
    [(near, far)] = pairs(stack, 1)
    reader, writer = os.pipe()
    parcel.send([far.fileno(), reader, writer], TOKEN)
    for fd in reader, writer:
        os.close(fd)
    inheritance = Inheritance(copies(parcel))
    parcel.close()
    far.close()
    inheritance.close()
    assert is_reset(near)
    inheritance.close()  # once more does no harm


def test_a_connection_that_lies_in_a_parcel_that_was_given_up_too_ends_without_a_reset(
    parcel: Parcel, stack: ExitStack
) -> None:
    """A first parcel had no room for all, and systemd no room for the message that removes it."""
    [(near, far)] = pairs(stack, 1)
    first = Parcel()
    first.send([far.fileno()], OTHER)
    parcel.send([far.fileno()], TOKEN)
    inheritance = Inheritance([*copies(first), *copies(parcel)])
    first.close()
    far.close()
    [fd] = inheritance.receive(TOKEN).values()
    inheritance.close()
    os.write(fd, b"the end")
    os.close(fd)
    assert near.recv(100) == b"the end"
    assert not is_reset(near)


def test_parcels_of_two_attempts_are_told_apart_by_their_tokens(parcel: Parcel, stack: ExitStack) -> None:
    one, two = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
    first = Parcel()
    first.send([one.fileno()], OTHER)
    parcel.send([two.fileno()], TOKEN)
    parcel.write([b"state"])
    inheritance = Inheritance([*copies(first), *copies(parcel)])
    first.close()
    assert [state for state in inheritance.states() if state] == [b"state"]
    received = inheritance.receive(TOKEN)
    assert list(received) == [two.fileno()]
    assert [inode(fd) for fd in received.values()] == [inode(two.fileno())]
    inheritance.close()
    abort(received.values())


@pytest.mark.parametrize("code", [errno.ETOOMANYREFS, errno.ENOBUFS, errno.EMFILE, errno.EAGAIN])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_sending_stops_at_the_first_message_that_does_not_fit_and_says_how_many_did(
    parcel: Parcel, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, code: int, before: int
) -> None:
    sock = stack.enter_context(socket.socket())
    send = socket.socket.sendmsg
    count = 0

    def sendmsg(sock: socket.socket, *arguments: object) -> int:
        nonlocal count
        count += 1
        if count == before + 1:
            raise OSError(code, os.strerror(code))
        return send(sock, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "sendmsg", sendmsg, raising=False)
    assert parcel.send([sock.fileno()] * 3 * MESSAGE_MAX, TOKEN) == before * MESSAGE_MAX
    assert count == before + 1


@pytest.mark.usefixtures("alone_in_flight")
def test_a_user_may_have_only_so_many_in_flight_as_descriptors(parcel: Parcel, stack: ExitStack) -> None:
    """Really provoked: ETOOMANYREFS."""
    sock = stack.enter_context(socket.socket())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        with unprivileged():
            sent = parcel.send([sock.fileno()] * 2000, TOKEN)
            assert sent % MESSAGE_MAX == 0
            assert sent <= 300 + MESSAGE_MAX
            assert parcel.send([sock.fileno()], TOKEN) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # Those that fitted are there; what was in flight no longer counts once it has been received.
    received: list[int] = []
    inheritance = Inheritance(copies(parcel))
    for queue in inheritance._queues:
        for _, fds in _messages(queue):
            received += fds
    assert len(received) == sent
    for fd in received:
        os.close(fd)
    inheritance.close()


RECEIVE = """
import os, resource, socket, sys
from rspd.host.store import Inheritance, abort
from rspd.host.systemd import StoredDescriptor
from rspd.host.store import PARCEL
fds, limit = [int(word) for word in sys.argv[2].split()], int(sys.argv[3])
inheritance = Inheritance([StoredDescriptor(PARCEL, fd) for fd in fds])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
received = inheritance.receive(sys.argv[1].encode())
assert all(os.fstat(fd).st_size == number for number, fd in received.items()), "not by their numbers"
print(len(received), max(received.values()))
inheritance.close()
"""


def test_too_few_descriptors_cost_those_that_find_no_number_and_mix_up_nothing(
    parcel: Parcel, stack: ExitStack, as_many_descriptors_as_allowed: None
) -> None:
    """The kernel cuts a message short (MSG_CTRUNC). Each file here is as long as its number, so that it is known."""
    own = []
    for _ in range(600):
        own.append(os.memfd_create("x"))
        stack.callback(os.close, own[-1])
        os.ftruncate(own[-1], own[-1])
    assert parcel.send(own, TOKEN) == 600
    command = [sys.executable, "-c", RECEIVE, TOKEN.decode(), " ".join(map(str, parcel.left)), "400"]
    # Those of the parcel have the highest numbers: a limit below them is one for new ones only.
    done = subprocess.run(command, pass_fds=parcel.left, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    count, highest = map(int, done.stdout.split())
    assert 300 < count < 400
    assert highest == 399


# What else may lie in the store


def test_listening_sockets_are_found_whatever_their_names_and_do_not_block(stack: ExitStack, tmp_path: Path) -> None:
    socks = [stack.enter_context(tcp_listener()), stack.enter_context(unix_listener(f"{tmp_path}/s"))]
    file = os.stat(f"{tmp_path}/s")
    names = ["listener-1", f"listener-2-{file.st_dev}-{file.st_ino}"]
    found = [StoredDescriptor(name, os.dup(sock.fileno())) for name, sock in zip(names, socks, strict=True)]
    inheritance = Inheritance(found)
    assert [sock.getsockname() for sock in inheritance.listeners] == [sock.getsockname() for sock in socks]
    assert [sock.gettimeout() for sock in inheritance.listeners] == [0, 0]
    inheritance.close()
    # They are the caller's.
    for sock in inheritance.listeners:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        sock.close()


@pytest.mark.parametrize("other", [False, True])
def test_a_unix_socket_whose_file_is_gone_or_anothers_is_told_from_those_that_are_reached(
    manager: Manager, make_store: Callable[..., Store], stack: ExitStack, tmp_path: Path, other: bool
) -> None:
    path = f"{tmp_path}/s"
    local = stack.enter_context(unix_listener(path))
    make_store().keep([Listening(local)])
    ((told),) = manager.read()
    name = told.text.partition("FDNAME=rspd+")[2].partition("\n")[0]
    os.rename(path, f"{path}.old")
    if other:
        stack.enter_context(unix_listener(path))
    inheritance = Inheritance([StoredDescriptor(name, os.dup(local.fileno()))])
    assert inheritance.listeners == []
    ((lost, file),) = inheritance.lost
    lost.close()
    own = os.stat(f"{path}.old")
    assert file == (own.st_dev, own.st_ino)
    if other:
        os.unlink(path)
    os.rename(f"{path}.old", path)
    (found,) = Inheritance([StoredDescriptor(name, os.dup(local.fileno()))]).listeners
    found.close()


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("name", ["listener-1", "listener-1-", "listener-1-2-", "listener-1-0-0", "another-one-0x1-2"])
def test_a_unix_socket_that_does_not_say_which_file_is_its_own_may_have_lost_it(
    stack: ExitStack, tmp_path: Path, name: str, gone: bool
) -> None:
    local = stack.enter_context(unix_listener(f"{tmp_path}/s"))
    if gone:
        os.unlink(f"{tmp_path}/s")
    inheritance = Inheritance([StoredDescriptor(name, os.dup(local.fileno()))])
    assert inheritance.listeners == []
    ((lost, file),) = inheritance.lost
    lost.close()
    assert file in (None, (0, 0))


def test_a_listener_is_stored_also_where_no_descriptor_is_free(
    manager: Manager,
    make_store: Callable[..., Store],
    stack: ExitStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = stack.enter_context(unix_listener(f"{tmp_path}/s"))
    store = make_store()

    def none_is_free(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for name in ("dup", "open"):
        monkeypatch.setattr(os, name, none_is_free)
    store.keep([Listening(local)])
    monkeypatch.undo()
    ((told),) = manager.read()
    assert "FDSTORE=1" in told.text


def test_a_listener_that_was_shut_down_before_systemd_could_be_told_is_closed(stack: ExitStack) -> None:
    sock = stack.enter_context(tcp_listener())
    sock.shutdown(socket.SHUT_RDWR)
    assert Inheritance([StoredDescriptor("listener-1", os.dup(sock.fileno()))]).listeners == []


def test_descriptors_of_other_kinds_are_closed(stack: ExitStack, tmp_path: Path) -> None:
    os.mkfifo(f"{tmp_path}/fifo")
    others = [
        os.open(os.devnull, os.O_RDONLY),
        os.open(tmp_path, os.O_RDONLY),
        os.open(f"{tmp_path}/fifo", os.O_RDWR),
        os.pidfd_open(os.getpid()),
        os.memfd_create("another"),
    ]
    near, far = tcp_pair()
    stack.enter_context(near)
    others.append(far.detach())
    inheritance = Inheritance([StoredDescriptor("another-version", fd) for fd in others])
    assert (inheritance.listeners, inheritance.states(), inheritance.receive(TOKEN)) == ([], [], {})
    assert near.recv(1) == b""
    for fd in others:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    inheritance.close()


def test_a_pipe_by_the_name_of_a_parcel_is_closed_too(stack: ExitStack) -> None:
    reader, writer = os.pipe()
    inheritance = Inheritance([StoredDescriptor(PARCEL, reader), StoredDescriptor(PARCEL, writer)])
    assert inheritance.states() == []
    inheritance.close()


def test_messages_without_descriptors_and_foreign_sockets_in_a_parcel_do_no_harm(
    parcel: Parcel, stack: ExitStack
) -> None:
    parcel._queue.send(TOKEN + b"words")
    sock = stack.enter_context(socket.socket())
    parcel.send([sock.fileno()], TOKEN)
    near, far = socket.socketpair()
    stack.enter_context(near)
    near.send(b"no message of ours")
    found = [*copies(parcel), StoredDescriptor(PARCEL, far.detach())]
    inheritance = Inheritance(found)
    received = inheritance.receive(TOKEN)
    assert list(received) == [sock.fileno()]
    inheritance.close()
    abort(received.values())
    assert eventually(lambda: near.recv(1) == b"")
