"""rspd/net/connect.py: connecting to an address, or to one of several, over real sockets."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import pytest

from rspd.engine.loop import Loop, Task
from rspd.engine.side import Side
from rspd.net.address import SocketAddress
from rspd.net.connect import UnreachableError, cause_of, connect, connect_to_one_of, share, why
from rspd.net.descriptors import Shortage
from tests.dialled import full_unix, no_descriptors, nobody, settle, unix_listener, until, where
from tests.namespaces import in_namespace
from tests.support import (
    PATIENCE,
    Backend,
    FakeClock,
    free_port,
    full_tcp,
    open_descriptors,
    reset,
    run,
    skip_for_kernel,
    tcp_pair,
)

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


class Attempt:
    """Connecting in a task of its own, on behalf of a client. Abort `peer` to abort the client.

    outcome: the side, closed at the end, or the error; None before.
    """

    def __init__(self, loop: Loop, *addresses: str | SocketAddress, timeout: float = PATIENCE) -> None:
        self.loop = loop
        self.shortage = Shortage(loop)
        self.addresses = [where(one) if isinstance(one, str) else one for one in addresses]
        self.timeout = timeout
        self.peer, self.sock = tcp_pair()
        self.sock.setblocking(False)
        self.client = Side(loop, self.sock)
        self.outcome: Side | OSError | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.outcome, Side):
            self.outcome.close()
        self.peer.close()
        self.sock.close()

    def start(self) -> Task:
        return self.loop.spawn(self._connect())

    async def _connect(self) -> None:
        self.client.watch()
        deadline = self.loop.now + self.timeout
        try:
            if len(self.addresses) == 1:
                self.outcome = await connect(self.loop, self.shortage, self.addresses[0], deadline, self.client)
            else:
                self.outcome = await connect_to_one_of(self.loop, self.shortage, self.addresses, deadline, self.client)
        except OSError as error:
            self.outcome = error
        finally:
            self.loop.unwatch(self.client)

    async def end(self) -> Side | OSError:
        """The outcome, without time passing on a FakeClock."""
        return await until(self.loop, lambda: self.outcome)

    async def side(self) -> Side:
        self.start()
        outcome = await self.end()
        assert isinstance(outcome, Side), outcome
        return outcome

    async def error(self) -> OSError:
        self.start()
        outcome = await self.end()
        assert isinstance(outcome, OSError), outcome
        return outcome

    async def seconds(self, clock: FakeClock, step: float = 0.1) -> float:
        """How long it takes, to a step."""
        begun = clock.now
        self.start()
        await settle(self.loop)
        while not self.outcome:
            clock.advance(step)
            await settle(self.loop)
            assert clock.now - begun < 2 * self.timeout
        return clock.now - begun


# Connected


def test_a_tcp_backend_gets_small_messages_at_once() -> None:
    with Backend(lambda sock: sock.recv(1)) as backend:

        async def main(loop: Loop) -> int:
            with Attempt(loop, backend.address) as attempt:
                return (await attempt.side()).sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

        assert run(main) == 1


def test_a_unix_backend_is_reached_and_nobody_need_be_a_client() -> None:
    async def main(loop: Loop) -> None:
        with unix_listener() as (listener, address):
            side = await connect(loop, Shortage(loop), where(address), inf)
            accepted, _ = listener.accept()
            with accepted:
                assert side.write(b"x") == 1
                assert accepted.recv(9) == b"x"
            side.close()

    run(main)


@pytest.mark.parametrize("says", [b"", b"414 too long"])
def test_a_backend_that_resets_at_once_was_reached_and_what_it_said_can_be_read(says: bytes) -> None:
    async def main(loop: Loop) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with Attempt(loop, f"127.0.0.1:{listener.getsockname()[1]}") as attempt:
                attempt.start()
                accepted, _ = listener.accept()
                accepted.sendall(says)
                reset(accepted)
                side = await attempt.end()
                assert isinstance(side, Side)
                if not side.aborted:  # the loop has yet to tell
                    await loop.yield_turn()
                assert side.aborted
                buffer = bytearray(100)
                assert side.read_into(memoryview(buffer)) == len(says)
                assert buffer.startswith(says)

    run(main)


def test_within_a_host_success_and_refusal_are_known_at_once() -> None:
    async def outcome(loop: Loop, port: int) -> Side | OSError | None:
        with Attempt(loop, f"127.0.0.1:{port}") as attempt:
            attempt.start()
            known = attempt.outcome
            await attempt.end()
            return known

    async def main(loop: Loop) -> None:
        for listens in (True, False):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
                if not listens:
                    listener.shutdown(socket.SHUT_RD)  # the port stays ours, and nobody listens there
                # On a busy machine, ksoftirqd may pass packets on a little later.
                known = [await outcome(loop, port) for _ in range(20)]
                assert (Side if listens else ConnectionRefusedError) in map(type, known)

    run(main)


def test_an_end_wakes_nobody_when_it_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "SocketType", with_info("pending"))  # as with a backend of another host

    async def main(loop: Loop) -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with Attempt(loop, f"127.0.0.1:{listener.getsockname()[1]}") as attempt:
                side = await attempt.side()
                accepted, _ = listener.accept()
                await loop.sleep(0.01)
                before = loop.turn
                side.end()
                await loop.sleep(0.05)
                accepted.close()
                return loop.turn - before

    assert run(main) <= 1


# Why not


def missing(folder: Path) -> str:
    return f"{folder}/missing"


def stale(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/stale")
    return f"{folder}/stale"


def ordinary(folder: Path) -> str:
    (folder / "ordinary").touch()
    return f"{folder}/ordinary"


def under_a_file(folder: Path) -> str:
    return ordinary(folder) + "/socket"


def refusing(_: Path) -> str:
    return f"127.0.0.1:{free_port()}"


def of_another_kind(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{folder}/datagrams")
    return f"{folder}/datagrams"


@pytest.mark.parametrize(
    ("make", "cause", "reason"),
    [
        (missing, "backend-refused", "No such file or directory"),
        (stale, "backend-refused", "Connection refused"),
        (ordinary, "backend-refused", "Connection refused"),
        (of_another_kind, "backend-refused", "Connection refused"),
        (under_a_file, "backend-unreachable", "Not a directory"),
        (refusing, "backend-refused", "Connection refused"),
        # A link-local address without its interface: refused by connect(2) itself, and nothing is sent.
        (lambda _: "[fe80::1]:80", "backend-unreachable", ""),
    ],
)
def test_the_cause_and_the_reason_say_why_an_address_was_not_reached(
    tmp_path: Path, make: object, cause: str, reason: str
) -> None:
    assert callable(make)
    address = make(tmp_path)

    async def main(loop: Loop) -> OSError:
        with Attempt(loop, address) as attempt:
            return await attempt.error()

    error = run(main)
    assert cause_of(error) == cause
    assert why(error).startswith(reason)
    assert why(error)


def test_an_error_of_socket_that_is_no_shortage_is_a_reason_at_once() -> None:
    async def main(loop: Loop) -> OSError:
        # No kernel has this address family.
        with Attempt(loop, SocketAddress(socket.AF_UNSPEC, "")) as attempt:
            return await attempt.error()

    error = run(main)
    assert cause_of(error) == "backend-unreachable"
    assert "Address family not supported" in why(error)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (TimeoutError("late"), "connect-timeout"),
        (TimeoutError(errno.ETIMEDOUT, "the kernel gave up"), "backend-unreachable"),
        (socket.gaierror(socket.EAI_AGAIN, "later"), "backend-unknown"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "no"), "backend-refused"),
        (FileNotFoundError(errno.ENOENT, "no"), "backend-refused"),
        (OSError("something"), "backend-unreachable"),
        (UnreachableError(["a: late"], TimeoutError("late")), "connect-timeout"),
        (UnreachableError(["a: no"], ConnectionRefusedError(errno.ECONNREFUSED, "no")), "backend-refused"),
    ],
)
def test_each_error_has_its_cause(error: OSError, cause: str) -> None:
    assert cause_of(error) == cause


# The timeout


@contextmanager
def full(kind: str) -> Iterator[str]:
    if kind == "tcp":
        with full_tcp() as address:
            yield address
    else:
        with full_unix() as (_, address):
            yield address


kinds = pytest.mark.parametrize("kind", ["tcp", "unix"])


@kinds
def test_a_backend_without_room_is_given_up_at_the_timeout_not_before_and_not_after(kind: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop, address: str) -> OSError:
        with Attempt(loop, address, timeout=5.0) as attempt:
            attempt.start()
            await settle(loop)
            clock.advance(4.98)
            await settle(loop)
            assert attempt.outcome is None
            clock.advance(0.02001)
            outcome = await attempt.end()
            assert isinstance(outcome, OSError)
            return outcome

    with full(kind) as address:
        error = run(lambda loop: main(loop, address), clock)
    assert (cause_of(error), why(error)) == ("connect-timeout", "no answer within the connect timeout")


@kinds
def test_the_timeout_ends_an_attempt_by_the_real_clock(kind: str) -> None:
    async def main(loop: Loop, address: str) -> tuple[str, float]:
        with Attempt(loop, address, timeout=0.15) as attempt:
            start = loop.now
            return cause_of(await attempt.error()), loop.now - start

    with full(kind) as address:
        cause, seconds = run(lambda loop: main(loop, address))
    assert cause == "connect-timeout"
    assert 0.14 <= seconds < 0.9


def test_a_unix_backend_is_reached_as_soon_as_its_backlog_has_room() -> None:
    clock = FakeClock()

    async def main(loop: Loop, listener: socket.socket, address: str) -> None:
        with Attempt(loop, address, timeout=5.0) as attempt:
            attempt.start()
            await settle(loop)
            listener.accept()[0].close()
            clock.advance(0.05)
            assert isinstance(await attempt.end(), Side)

    with full_unix() as (listener, address):
        run(lambda loop: main(loop, listener, address), clock)


@kinds
def test_without_a_timeout_an_attempt_goes_on_until_it_is_cancelled_and_leaves_nothing_open(kind: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop, address: str) -> None:
        with Attempt(loop, address, timeout=inf) as attempt:
            before = open_descriptors()
            task = attempt.start()
            for _ in range(3):
                clock.advance(1e6)
                await settle(loop)
            assert attempt.outcome is None
            assert open_descriptors() == before + 1
            task.cancel()
            await settle(loop)
            assert task.done
            assert open_descriptors() == before

    with full(kind) as address:
        run(lambda loop: main(loop, address), clock)


# The client meanwhile


@kinds
def test_when_the_client_aborts_the_attempt_ends(kind: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop, address: str) -> OSError:
        with Attempt(loop, address, address) as attempt:
            attempt.start()
            await settle(loop)
            reset(attempt.peer)
            clock.advance(0.01001)
            outcome = await attempt.end()
            assert isinstance(outcome, OSError)
            return outcome

    with full(kind) as address:
        error = run(lambda loop: main(loop, address), clock)
    # The other address was not tried.
    assert str(error).endswith(f"{where(address)}: the client is gone")
    assert isinstance(error, UnreachableError)
    assert len(error.reasons) == 1


def test_a_client_that_has_only_ended_its_stream_is_connected() -> None:
    clock = FakeClock()

    async def main(loop: Loop, listener: socket.socket, address: str) -> None:
        with Attempt(loop, address) as attempt:
            attempt.start()
            attempt.peer.sendall(b"request")
            attempt.peer.shutdown(socket.SHUT_WR)
            await settle(loop)
            clock.advance(1)
            await settle(loop)
            assert attempt.outcome is None
            listener.accept()[0].close()
            clock.advance(0.05)
            assert isinstance(await attempt.end(), Side)

    with full_unix() as (listener, address):
        run(lambda loop: main(loop, listener, address), clock)


# Several addresses


def test_the_address_that_answered_is_tried_first_from_then_on() -> None:
    async def main(loop: Loop) -> None:
        with unix_listener() as (_, live):
            dead, other = nobody(), nobody()
            with Attempt(loop, dead, live, other) as attempt:
                await attempt.side()
                assert attempt.addresses == [where(live), where(dead), where(other)]

    run(main)


def test_where_no_address_answers_the_error_has_the_reason_of_each_and_the_order_stays() -> None:
    async def main(loop: Loop) -> tuple[OSError, list[SocketAddress]]:
        with Attempt(loop, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}") as attempt:
            return await attempt.error(), attempt.addresses

    ports = [free_port(), free_port()]
    error, addresses = run(main)
    assert isinstance(error, UnreachableError)
    assert error.reasons == [f"127.0.0.1:{port}: Connection refused" for port in ports]
    assert str(error).endswith("; ".join(error.reasons))
    assert error.errno == errno.ECONNREFUSED
    assert [address[1] for _, address in addresses] == ports


def test_the_addresses_of_a_name_share_the_time_evenly_and_a_dead_family_costs_it_once() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> tuple[float, float]:
        with full_tcp() as one, full_tcp() as two, unix_listener() as (_, live):
            with Attempt(loop, one, two, live, timeout=12) as attempt:
                first = await attempt.seconds(clock)
                assert isinstance(attempt.outcome, Side)
                attempt.outcome.close()
                attempt.outcome = None
                return first, await attempt.seconds(clock)

    first, second = run(main, clock)
    assert first == pytest.approx(8, abs=0.21)
    assert second == 0


@pytest.mark.parametrize(
    ("now", "deadline", "attempts", "until"),
    [(10, 22, 3, 14), (10, 22, 1, 22), (10, inf, 1, inf), (10, inf, 3, inf), (22, 22, 2, 22)],
)
def test_a_share_is_an_even_part_of_the_time_that_is_left(
    now: float, deadline: float, attempts: int, until: float
) -> None:
    assert share(now, deadline, attempts) == until


# A connection to itself


# What TCP_INFO may say: what it does say, nothing at all, what it says where the answer comes a little later
# (TCP_SYN_RECV, one segment), and what a kernel says that does not count segments.
INFOS: dict[str, Callable[[bytes], bytes] | None] = {
    "as it is": lambda info: info,
    "refused": None,
    "early": lambda info: b"\3" + info[1:140] + (1).to_bytes(4, sys.byteorder),
    "old": lambda info: info[:104],
    "pending": lambda info: b"\2" + info[1:],
}


def with_info(kind: str) -> type[socket.SocketType]:
    """A socket for which TCP_INFO says that."""

    class Told(socket.SocketType):
        def getsockopt(self, level: int, name: int, *size: int) -> Any:
            found: Any = super().getsockopt(level, name, *size)
            if (level, name) != (socket.IPPROTO_TCP, socket.TCP_INFO):
                return found
            if change := INFOS[kind]:
                return change(found)
            raise PermissionError(errno.EPERM, "a program in the kernel refuses it")

    return Told


def dial_a_port_that_is_picked_for_the_near_end(address: str, info: str) -> None:
    """Print what a plain socket reaches that way, and then what rspd does. Changes the network namespace."""
    host, _, port = address.rpartition(":")

    async def main(loop: Loop) -> None:
        with Attempt(loop, address) as attempt:
            Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{port} {port}")
            sock = socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET)
            try:
                sock.connect((host.strip("[]"), int(port)))
                print("itself" if sock.getsockname() == sock.getpeername() else "another")
            except OSError as error:
                print(error.strerror)
            # With RST, since a port in TIME_WAIT would not be picked again.
            reset(sock)
            socket.SocketType = with_info(info)
            attempt.start()
            outcome = await attempt.end()
            print(cause_of(outcome) if isinstance(outcome, OSError) else "reached")

    run(main)


@pytest.mark.parametrize(
    ("address", "info"),
    [
        *((address, "as it is") for address in ("127.0.0.1:40000", "[::1]:40000", "127.0.0.1:20000")),
        *((address, "as it is") for address in ("0.0.0.0:40000", "[::]:40000")),
        *(("127.0.0.1:40000", info) for info in ("refused", "early", "old")),
    ],
)
def test_a_connection_that_the_kernel_made_to_itself_is_taken_for_refused(address: str, info: str) -> None:
    plain, outcome = in_namespace(dial_a_port_that_is_picked_for_the_near_end, address, info)
    if plain != "itself":
        skip_for_kernel(f"a plain socket does not reach itself ({plain})")
    assert outcome == "backend-refused"


def dial_a_low_port() -> None:
    """Print whether a backend there is reached."""

    async def main(loop: Loop) -> None:
        with socket.create_server(("127.0.0.1", 80)), Attempt(loop, "127.0.0.1:80") as attempt:
            side = await attempt.side()
            print(side.sock.getpeername()[1])

    run(main)


def test_a_low_port_which_no_near_end_is_given_is_dialled_as_any_other() -> None:
    assert in_namespace(dial_a_low_port) == ["80"]


# Short of descriptors


def test_without_a_free_descriptor_an_attempt_waits_for_one() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, address), Attempt(loop, address, timeout=5.0) as attempt:
            with no_descriptors() as taken:
                attempt.start()
                clock.advance(0.2)
                await settle(loop)
                assert attempt.outcome is None
                os.close(taken.pop())
                await settle(loop)
                assert attempt.outcome is None
                attempt.shortage.relieve()
                assert isinstance(await attempt.end(), Side)
            clock.advance(1.01)
            await settle(loop)

    run(main, clock)


def test_an_attempt_looks_again_for_a_descriptor_where_nobody_tells_of_one() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, address), Attempt(loop, address, timeout=inf) as attempt:
            with no_descriptors() as taken:
                attempt.start()
                await settle(loop)
                os.close(taken.pop())
                clock.advance(0.11)
                assert isinstance(await attempt.end(), Side)
            clock.advance(1.01)
            await settle(loop)

    run(main, clock)


def test_the_timeout_holds_where_no_descriptor_gets_free() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, address), Attempt(loop, address, timeout=2.0) as attempt:
            with no_descriptors():
                seconds = await attempt.seconds(clock)
            clock.advance(1.01)
            await settle(loop)
            assert seconds == pytest.approx(2.0, abs=0.11)
            assert isinstance(attempt.outcome, OSError)
            assert why(attempt.outcome) == "Too many open files"

    run(main, clock)


def test_a_client_that_aborts_waits_for_no_descriptor() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, address), Attempt(loop, address) as attempt:
            with no_descriptors() as taken:
                attempt.start()
                await settle(loop)
                reset(attempt.peer)
                taken.append(os.open(os.devnull, os.O_RDONLY))  # what the client had
                await settle(loop)
                clock.advance(0.11)
                outcome = await attempt.end()
                assert isinstance(outcome, OSError)
                assert outcome.errno == errno.EMFILE
            clock.advance(1.01)
            await settle(loop)

    run(main, clock)
