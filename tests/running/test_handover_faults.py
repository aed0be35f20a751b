"""Handing over and taking over while calls fail: what can go on goes on, and nothing goes to a wrong peer."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rspd.engine.loop import Loop
from rspd.engine.side import Side
from rspd.host.store import PARCEL, Parcel
from rspd.host.systemd import StoredDescriptor
from rspd.running.document import read, write
from rspd.settings import Config
from tests import keeper
from tests.dialled import until
from tests.engine.test_pipes import unprivileged
from tests.running.handing import (
    DB,
    WEB,
    Half,
    ends,
    everything,
    hand_over,
    live,
    parcel_of,
    plain_config,
    send_over,
    stored,
    take_over,
)
from tests.support import FakeClock, eventually, is_reset, open_descriptors, tcp_pair

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


# Both halves


@pytest.fixture
def backend(stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_server(("127.0.0.1", 0)))


class Pairs:
    """Connections that go from process to process: their peers."""

    def __init__(self, backend: socket.socket, count: int = 3) -> None:
        self.backend = backend
        self.count = count
        self.made: list[tuple[socket.socket, socket.socket]] = []
        self._own = ExitStack()

    async def make(self, half: Half) -> None:
        half.stack = self._own  # they outlive the process
        for _ in range(self.count):
            self.made.append(await half.connect(self.backend))
        await self.talk(half.loop)

    async def talk(self, loop: Loop) -> None:
        """Each has its own words, and gets its own answer."""
        for number, (client, server) in enumerate(self.made):
            await send_over(loop, client, server, b"question %d" % number)
            await send_over(loop, server, client, b"answer %d" % number)

    async def go_on(self, half: Half, taken: int) -> None:
        assert taken == len(self.made)
        await self.talk(half.loop)
        await self.end(half)

    async def end(self, half: Half) -> None:
        for client, server in self.made:
            client.close()
            assert await ends(half.loop, server) == b""
            server.close()
        await half.ended()

    def close(self) -> None:
        self._own.close()


@pytest.fixture
def pairs(stack: ExitStack, backend: socket.socket) -> Pairs:
    pairs = Pairs(backend)
    stack.callback(pairs.close)
    return pairs


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings and errors, but for those of connections."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def names(store: keeper.Store) -> list[str]:
    """What is in the store at last: listeners and parcels by their names."""
    return sorted({name.partition("-")[0] for name, _ in store.kept})


def test_connections_go_on_with_their_own_peers(
    store: keeper.Store, pairs: Pairs, caplog: pytest.LogCaptureFixture
) -> None:
    config = plain_config(pairs.backend.getsockname()[1])
    assert hand_over(config, pairs.make)
    found = stored(store)
    store.clear()
    take_over(found, config, pairs.go_on)
    assert warnings(caplog) == []


def test_what_is_everything_there_is_can_be_handed_over(
    store: keeper.Store, stack: ExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the frozen documents are made from; here nobody stays to see what becomes of it."""
    web, db = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
    config = everything(f"{tmp_path}", web.getsockname()[1], db.getsockname()[1])
    clock = FakeClock()
    assert hand_over(config, lambda half: live(half, web, db), clock)
    found = stored(store)
    store.clear()

    async def script(half: Half, taken: int) -> None:
        assert taken == len(WEB + DB)

    take_over(found, config, script, clock)


# What fails once when it hands over

Fail = Callable[..., None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Make the n-th call of something fail, of those for which `when` is true."""

    def fail(owner: object, name: str, code: int, nth: int = 1, when: Callable[..., bool] = lambda *_: True) -> None:
        real = getattr(owner, name)
        count = 0

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if when(*arguments):
                count += 1
                if count == nth:
                    raise OSError(code, os.strerror(code))
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, call, raising=False)

    return fail


def is_queue(sock: socket.socket, *_: object) -> bool:
    return sock.type == socket.SOCK_SEQPACKET


def says(text: bytes) -> Callable[..., bool]:
    return lambda sock, parts, *_: sock.type == socket.SOCK_DGRAM and text in parts[0]


@pytest.mark.parametrize(
    ("owner", "name", "code", "nth", "when"),
    [
        (os, "memfd_create", errno.EMFILE, 1, None),
        (os, "memfd_create", errno.ENOMEM, 1, None),
        (socket, "socketpair", errno.EMFILE, 1, None),
        (socket, "socketpair", errno.ENFILE, 2, None),
        (socket.socket, "setsockopt", errno.ENOMEM, 1, is_queue),
        (os, "pipe2", errno.EMFILE, 1, None),
        (os, "write", errno.ENOSPC, 1, None),
        (os, "write", errno.ENOSPC, 2, None),
        (select, "poll", errno.ENOMEM, 1, None),
    ],
)
def test_a_call_that_fails_lets_connections_drain_with_one_warning(
    store: keeper.Store,
    pairs: Pairs,
    fail: Fail,
    caplog: pytest.LogCaptureFixture,
    owner: object,
    name: str,
    code: int,
    nth: int,
    when: Callable[..., bool] | None,
) -> None:
    config = plain_config(pairs.backend.getsockname()[1])

    async def script(half: Half) -> None:
        await pairs.make(half)
        fail(owner, name, code, nth, when or (lambda *_: True))

    async def after(half: Half) -> None:
        assert len(half.connections) == len(pairs.made)
        await until(half.loop, lambda: "rspd+parcel" not in dict(store.kept))
        await pairs.talk(half.loop)
        await pairs.end(half)

    assert not hand_over(config, script, after=after)
    [warning] = warnings(caplog)
    assert warning == f'cannot hand over, connections drain reason="{os.strerror(code)}"'
    store.wait_for("FDSTOREREMOVE")
    eventually_empty(store)


def eventually_empty(store: keeper.Store) -> None:
    """Nothing is left in the store."""
    eventually(lambda: not store.kept, f"{store.kept}")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_a_barrier_that_cannot_be_watched_lets_connections_drain(
    store: keeper.Store, pairs: Pairs, fail: Fail, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    async def script(half: Half) -> None:
        await pairs.make(half)
        fail(Loop, "watch", code)

    assert not hand_over(plain_config(pairs.backend.getsockname()[1]), script, after=pairs.end)
    assert warnings(caplog) == [f'cannot hand over, connections drain reason="{os.strerror(code)}"']
    eventually_empty(store)


def test_a_store_without_room_lets_connections_drain_and_says_what_the_unit_needs(
    store: keeper.Store, pairs: Pairs, caplog: pytest.LogCaptureFixture
) -> None:
    store.room = 4  # a listener, and a part of the parcel

    assert not hand_over(plain_config(pairs.backend.getsockname()[1]), pairs.make, after=pairs.end)
    [warning] = warnings(caplog)
    assert "systemd keeps nothing; the unit needs FileDescriptorStoreMax=512" in warning
    eventually_empty(store)


def test_a_manager_that_does_not_answer_is_waited_for_a_while(
    store: keeper.Store, pairs: Pairs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rspd.running.handover.PATIENCE", 0.2)
    held: list[int] = []

    async def script(half: Half) -> None:
        await pairs.make(half)
        # It has its copy of the barrier still.
        barrier = half_barrier(held)
        monkeypatch.setattr("rspd.host.systemd.Notifier.barrier", barrier)

    assert not hand_over(plain_config(pairs.backend.getsockname()[1]), script, after=pairs.end)
    assert warnings(caplog) == ['cannot hand over, connections drain reason="systemd does not answer"']
    os.close(held.pop())
    eventually_empty(store)


def half_barrier(held: list[int]) -> Callable[..., bool]:
    def barrier(_: object, fd: int) -> bool:
        held.append(os.dup(fd))
        return True

    return barrier


@pytest.mark.parametrize("code", [errno.ETOOMANYREFS, errno.ENOBUFS, errno.EMFILE])
@pytest.mark.parametrize("nth", [1, 2])
def test_what_finds_no_room_in_flight_for_a_moment_is_tried_again_with_one_warning(
    store: keeper.Store,
    pairs: Pairs,
    fail: Fail,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    nth: int,
) -> None:
    monkeypatch.setattr("rspd.host.store.MESSAGE_MAX", 4)  # two connections a message
    pairs.count = 5
    config = plain_config(pairs.backend.getsockname()[1])

    async def script(half: Half) -> None:
        await pairs.make(half)
        fail(socket.socket, "sendmsg", code, nth, is_queue)

    assert hand_over(config, script)
    fitting = 2 * (nth - 1)
    assert warnings(caplog) == [
        f"too many descriptors in flight, connections drain that find no room connections=5 fitting={fitting}"
    ]
    # The parcel of the first attempt has left the store.
    assert [name for name, _ in store.kept].count("rspd+parcel") == 4
    found = stored(store)
    store.clear()
    take_over(found, config, pairs.go_on)


@pytest.mark.usefixtures("alone_in_flight")
def test_what_finds_no_room_in_flight_at_all_drains_and_the_rest_goes_on(
    store: keeper.Store, pairs: Pairs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really provoked. Descriptors in flight count per user: at most as many as a process of his may open."""
    pairs.count = 180
    config = plain_config(pairs.backend.getsockname()[1], drain_timeout=0.3)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits: list[int] = []

    class Low(Parcel):
        """While descriptors are sent, the limit is so low that a second message does not fit."""

        def send(self, fds: Sequence[int], token: bytes) -> int:
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
            try:
                limits.append(super().send(fds, token))
                return limits[-1]
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))

    monkeypatch.setattr("rspd.running.handover.Parcel", Low)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    try:
        with unprivileged():
            assert hand_over(config, pairs.make)
        assert limits[0] == 253
        found = stored(store)
        store.clear()
        [warning] = [line for line in warnings(caplog) if "connection closed" not in line]
        assert warning == (
            "too many descriptors in flight, connections drain that find no room connections=180 fitting=126"
        )

        async def go_on(half: Half, taken: int) -> None:
            assert taken == 126
            cut = pairs.made[126:]
            del pairs.made[126:]
            await pairs.go_on(half, taken)
            for client, server in cut:
                assert is_reset(client)
                assert is_reset(server)

        take_over(found, config, go_on)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# What fails once when it takes over


class Faulty(socket.SocketType):
    """A socket of which some call fails once."""

    fails: list[str] = []  # noqa: RUF012

    def recvmsg(self, *arguments: Any) -> Any:
        if "recvmsg" in self.fails:
            self.fails.remove("recvmsg")
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return super().recvmsg(*arguments)

    def getsockopt(self, *arguments: Any) -> Any:
        if "getsockopt" in self.fails and arguments[1] == socket.TCP_INFO:
            self.fails.remove("getsockopt")
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return super().getsockopt(*arguments)


def handed_over(store: keeper.Store, pairs: Pairs) -> tuple[Config, list[StoredDescriptor]]:
    config = plain_config(pairs.backend.getsockname()[1])
    assert hand_over(config, pairs.make)
    found = stored(store)
    store.clear()
    return config, found


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_side_that_cannot_be_watched_at_once_goes_on_when_it_can(
    store: keeper.Store, pairs: Pairs, fail: Fail, caplog: pytest.LogCaptureFixture, code: int, nth: int
) -> None:
    config, found = handed_over(store, pairs)
    fail(Loop, "watch", code, nth, lambda loop, watch, *_: isinstance(watch, Side))
    take_over(found, config, pairs.go_on)
    [warning] = warnings(caplog)
    assert os.strerror(code) in warning


def test_without_tcp_info_connections_go_on(
    store: keeper.Store, pairs: Pairs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = handed_over(store, pairs)
    monkeypatch.setattr(Faulty, "fails", ["getsockopt"])
    monkeypatch.setattr(socket, "SocketType", Faulty)
    take_over(found, config, pairs.go_on)
    assert Faulty.fails == []
    assert warnings(caplog) == []


@pytest.mark.parametrize("held", [b"", b"\0bytes"])
def test_bytes_are_bytes_in_the_document_also_if_there_are_none(held: bytes) -> None:
    assert read(b"".join(write({"held": held})))["held"] == held


def test_a_state_that_cannot_be_read_costs_the_connections_and_not_the_start(
    store: keeper.Store, pairs: Pairs, fail: Fail, caplog: pytest.LogCaptureFixture
) -> None:
    config, found = handed_over(store, pairs)
    fail(os, "pread", errno.EIO)

    async def script(half: Half, taken: int) -> None:
        assert taken == 0
        for client, server in pairs.made:
            assert is_reset(client)
            assert is_reset(server)

    take_over(found, config, script)
    [warning] = warnings(caplog)
    assert warning == "connections of the process before end: [Errno 5] Input/output error"


def test_descriptors_that_do_not_come_over_cost_their_connections_each_with_a_warning(
    store: keeper.Store, pairs: Pairs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = handed_over(store, pairs)
    monkeypatch.setattr(Faulty, "fails", ["recvmsg"] * 200)
    monkeypatch.setattr(socket, "SocketType", Faulty)

    async def script(half: Half, taken: int) -> None:
        assert taken == 0
        for client, server in pairs.made:
            assert is_reset(client)
            assert is_reset(server)

    take_over(found, config, script)
    assert len(warnings(caplog)) == len(pairs.made)
    assert all("connection closed client=127.0.0.1:" in line for line in warnings(caplog))
    assert all(" cause=handover-failed reason=" in line for line in warnings(caplog))


def test_want_of_memory_for_one_message_costs_no_connection(
    store: keeper.Store, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = handed_over(store, pairs)
    monkeypatch.setattr(Faulty, "fails", ["recvmsg", "recvmsg"])
    monkeypatch.setattr(socket, "SocketType", Faulty)

    async def script(half: Half, taken: int) -> None:
        assert taken == len(pairs.made)

    take_over(found, config, script)


@pytest.mark.parametrize(("module", "call", "number"), [(resource, "setrlimit", errno.EPERM), (os, "fstat", errno.EIO)])
def test_a_limit_that_cannot_be_raised_or_a_descriptor_that_cannot_be_looked_at_is_no_reason_not_to_start(
    store: keeper.Store, pairs: Pairs, fail: Fail, module: ModuleType, call: str, number: int
) -> None:
    config, found = handed_over(store, pairs)
    try:
        fail(module, call, number)
        take_over(found, config, pairs.go_on)
    finally:
        for _, fd in found:
            with suppress(OSError):
                os.close(fd)


def test_a_connection_of_another_token_goes_to_nobody(
    store: keeper.Store, pairs: Pairs, caplog: pytest.LogCaptureFixture
) -> None:
    """The state is that of another parcel than the queue."""
    config, found = handed_over(store, pairs)
    for name, fd in found:
        if name == PARCEL and os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
            content = os.pread(fd, 1 << 20, 0)
            token = read(content)["token"].encode()
            os.pwrite(fd, content.replace(token, token[::-1]), 0)

    async def script(half: Half, taken: int) -> None:
        assert taken == 0
        for client, server in pairs.made:
            assert is_reset(client)
            assert is_reset(server)

    take_over(found, config, script)
    assert len(warnings(caplog)) == len(pairs.made)


@pytest.mark.parametrize("fault", ["no relay", "no backend"])
def test_a_connection_that_cannot_be_understood_is_reset_and_the_others_go_on(
    store: keeper.Store, pairs: Pairs, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    config, found = handed_over(store, pairs)
    for name, fd in found:
        if name == PARCEL and os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
            document = json.loads(os.pread(fd, 1 << 20, 0).partition(b"\n")[2])
            first = document["proxies"][0]["connections"][0]
            del (first if fault == "no relay" else first["relay"])["relay" if fault == "no relay" else "backend"]
            own = first["descriptors"]
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"".join(map(bytes, write(document))), 0)
            assert len(own) == 2
    before = open_descriptors()

    async def script(half: Half, taken: int) -> None:
        assert taken == len(pairs.made) - 1
        client, server = pairs.made.pop(0)
        client.settimeout(1)
        server.settimeout(1)
        assert is_reset(client)
        assert is_reset(server)
        await pairs.go_on(half, taken)

    take_over(found, config, script)
    assert open_descriptors() < before


def test_a_socket_that_no_connection_names_is_reset() -> None:
    near, far = tcp_pair()
    content = b"".join(map(bytes, write({"token": "token", "proxies": []})))
    with near, parcel_of(content, b"token", {7: far.fileno()}) as found:
        far.close()

        async def script(half: Half, taken: int) -> None:
            assert taken == 0
            assert is_reset(near)

        take_over(found, plain_config(1), script)
