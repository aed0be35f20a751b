"""rspd/backends.py: whose turn it is, and dialling over real sockets."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspd.address import Address, SocketAddress
from rspd.backends import Backends, DialError
from rspd.config import parse_backend
from rspd.loop import Loop, Task
from rspd.resolver import Resolver
from rspd.shortage import Shortage
from rspd.side import Side
from tests.support import PATIENCE, Backend, FakeClock, full_tcp, open_descriptors, reset, run, tcp_pair

REPOSITORY = Path(__file__).resolve().parent.parent


class Dialler:
    """Some backends, and a client on whose behalf they are dialled. Abort `peer` to abort the client."""

    def __init__(self, loop: Loop, *addresses: str, names: Mapping[str, Sequence[SocketAddress]] | None = None) -> None:
        self.loop = loop
        self.shortage = Shortage(loop)
        self.failures: list[OSError] = []  # of the next lookups of `names`
        resolver = Names(loop, names, self.failures) if names else Resolver(loop)
        self.backends = Backends(loop, [parse_backend(text) for text in addresses], resolver, self.shortage)
        self.peer, self.sock = tcp_pair()
        self.sock.setblocking(False)
        self.client = Side(loop, self.sock)
        self.outcomes: list[str | DialError] = []

    def __enter__(self) -> Dialler:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()
        self.sock.close()

    async def dial(self, timeout: float = PATIENCE) -> str | DialError:
        """The backend that was reached, and closed again, or why none was."""
        self.client.watch()
        try:
            backend, side = await self.backends.dial(self.client, timeout)
        except DialError as error:
            return error
        finally:
            self.loop.unwatch(self.client)
        side.close()
        return str(backend.address)

    async def fail(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Why no backend was reached: the cause and the reasons."""
        outcome = await self.dial(timeout)
        assert isinstance(outcome, DialError), outcome
        return outcome.cause, str(outcome)

    def start(self, timeout: float) -> Task:
        """Dial in a task of its own, which adds to `outcomes`."""

        async def dial() -> None:
            self.outcomes.append(await self.dial(timeout))

        return self.loop.spawn(dial())

    async def settle(self) -> None:
        """Let happen what can happen without time passing."""
        for _ in range(10):
            await self.loop.yield_turn()

    async def outcome(self) -> str | DialError:
        """What the dialling that was started comes to, without time passing on a FakeClock."""
        deadline = time.monotonic() + PATIENCE
        while not self.outcomes:
            assert time.monotonic() < deadline, "dialling has not ended"
            await self.loop.yield_turn()
        return self.outcomes[0]


class Names(Resolver):
    """A resolver with names of its own: what has two addresses differs from machine to machine."""

    def __init__(self, loop: Loop, names: Mapping[str, Sequence[SocketAddress]], failures: list[OSError]) -> None:
        super().__init__(loop)
        self.names = names
        self.failures = failures

    async def look_up(self, address: Address, deadline: float, *_: Any, **__: Any) -> list[SocketAddress]:
        if self.failures:
            raise self.failures.pop(0)
        return list(self.names[address.host])


@contextmanager
def unix_listener(backlog: int = 16) -> Iterator[tuple[socket.socket, str]]:
    """A listener with a name that the kernel picked, and its address."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen(backlog)
        yield listener, "@" + listener.getsockname()[1:].decode()


@contextmanager
def full_unix() -> Iterator[tuple[socket.socket, str]]:
    """A unix listener that does not accept, and has no room for another client."""
    with unix_listener(0) as (listener, address), ExitStack() as stack:
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(listener.getsockname()) == errno.EAGAIN:
                break
        yield listener, address


def nobody() -> str:
    """An address where nobody listens."""
    with unix_listener() as (_, address):
        return address


def refusing_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def no_descriptors() -> Iterator[list[int]]:
    """The process can open no descriptor; those in the list may be closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    taken: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield taken
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# In a network, with name servers, of our own

UNSHARE = ["unshare", "-rnm", "sh", "-ec"]

# A name server that gets questions and never answers.
SILENT_DNS = """
folder=$(mktemp -d)
mount -t tmpfs tmpfs "$folder"
echo 'nameserver 127.0.0.1' >"$folder/resolv.conf"
echo 'hosts: files dns' >"$folder/nsswitch.conf"
mount --bind "$folder/resolv.conf" /etc/resolv.conf
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
umount -l "$folder"
rmdir "$folder"
"""


def in_namespace(function: Callable[..., None], *arguments: str, prepare: str = "") -> list[str]:
    """The lines that a function of a test module prints with a loopback of its own; skips where that cannot be had."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs unshare(1) and ip(8)")
    inside = [*UNSHARE, f'ip link set lo up\n{prepare}\nexec "$@"', "sh"]
    possible = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if possible.returncode:
        pytest.skip(f"this machine allows no namespaces of our own: {possible.stderr.strip()}")
    code = f"import sys, {function.__module__} as module; module.{function.__name__}(*sys.argv[1:])"
    command = [*inside, sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@contextmanager
def silent_name_server() -> Iterator[socket.socket]:
    """What `SILENT_DNS` makes every name be asked of."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        server.settimeout(PATIENCE)
        yield server


# Whose turn it is


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.integers(1, 8))
def test_each_dial_begins_with_the_backend_after_the_last_and_takes_the_first_that_answers(
    alive: list[bool], dials: int
) -> None:
    async def main(loop: Loop) -> None:
        with ExitStack() as stack:
            addresses = [stack.enter_context(unix_listener())[1] if up else nobody() for up in alive]
            dialler = stack.enter_context(Dialler(loop, *addresses))
            for dial in range(dials):
                first = dial % len(alive)
                turns = [*range(first, len(alive)), *range(first)]
                outcome = await dialler.dial()
                if any(alive):
                    assert outcome == next(addresses[turn] for turn in turns if alive[turn])
                else:
                    assert str(outcome) == "; ".join(f"{addresses[turn]}: Connection refused" for turn in turns)

    run(main)


def test_tcp_backends_take_turns_and_the_refusing_one_is_passed_over() -> None:
    with Backend(lambda sock: sock.recv(1)) as one, Backend(lambda sock: sock.recv(1)) as two:

        async def main(loop: Loop) -> list[str | DialError]:
            with Dialler(loop, one.address, f"127.0.0.1:{refusing_port()}", two.address) as dialler:
                return [await dialler.dial() for _ in range(6)]

        assert run(main) == [one.address, two.address, two.address] * 2


def test_a_tcp_backend_gets_small_messages_at_once() -> None:
    with Backend(lambda sock: sock.recv(1)) as backend:

        async def main(loop: Loop) -> int:
            with Dialler(loop, backend.address) as dialler:
                _, side = await dialler.backends.dial(dialler.client, PATIENCE)
                delay = side.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                side.close()
                return delay

        assert run(main) == 1


def test_a_backend_may_be_given_by_the_name_localhost() -> None:
    with Backend(lambda sock: sock.recv(1)) as backend:

        async def main(loop: Loop) -> str | DialError:
            with Dialler(loop, f"localhost:{backend.port}") as dialler:
                return await dialler.dial()

        assert run(main) == f"localhost:{backend.port}"


# Why none was reached


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
    return f"127.0.0.1:{refusing_port()}"


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
        (lambda _: "no-such-name.invalid:80", "backend-unknown", ""),
    ],
)
def test_the_cause_and_the_reason_say_why_a_backend_was_not_reached(
    tmp_path: Path, make: object, cause: str, reason: str
) -> None:
    assert callable(make)
    address = make(tmp_path)

    async def main(loop: Loop) -> tuple[str, str]:
        with Dialler(loop, address) as dialler:
            return await dialler.fail()

    before = open_descriptors()
    found, text = run(main)
    assert found == cause
    assert text.startswith(f"{address}: {reason}")
    assert len(text) > len(f"{address}: ")
    assert open_descriptors() == before


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_failures_the_cause_is_the_last_and_the_text_has_all(order: int) -> None:
    addresses = [f"127.0.0.1:{refusing_port()}", "no-such-name.invalid:80"][::order]

    async def main(loop: Loop) -> tuple[str, str]:
        with Dialler(loop, *addresses) as dialler:
            return await dialler.fail()

    cause, text = run(main)
    assert cause == ["backend-unknown", "backend-refused"][::order][0]
    reasons = text.split("; ")
    assert [reason.rpartition(": ")[0] for reason in reasons] == addresses


def test_a_name_is_reached_by_any_of_its_addresses_and_the_reasons_name_them() -> None:
    with unix_listener() as (listener, _):
        dead = SocketAddress(socket.AF_INET, ("127.0.0.1", refusing_port()))
        names = {"both": [dead, SocketAddress(socket.AF_UNIX, listener.getsockname())], "dead": [dead]}

        async def main(loop: Loop) -> tuple[str | DialError, str | DialError]:
            with (
                Dialler(loop, "both:80", names=names) as both,
                Dialler(loop, "dead:80", names=names) as none,
            ):
                return await both.dial(), await none.dial()

        both, none = run(main)
        assert both == "both:80"
        assert str(none) == f"127.0.0.1:{dead.address[1]}: Connection refused"


# The timeout


@contextmanager
def full(kind: str) -> Iterator[str]:
    if kind == "tcp":
        with full_tcp() as address:
            yield address
    else:
        with full_unix() as (_, address):
            yield address


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_backend_without_room_is_given_up_at_the_timeout_not_before_and_not_after(kind: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop, address: str) -> tuple[str, str]:
        with Dialler(loop, address) as dialler:
            dialler.start(5.0)
            await dialler.settle()
            clock.advance(4.98)
            await dialler.settle()
            assert dialler.outcomes == []
            clock.advance(0.02001)
            outcome = await dialler.outcome()
            assert isinstance(outcome, DialError)
            return outcome.cause, str(outcome)

    before = open_descriptors()
    with full(kind) as address:
        failure = run(lambda loop: main(loop, address), clock)
    assert failure == ("connect-timeout", f"{address}: no answer within the connect timeout")
    assert open_descriptors() == before


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_timeout_ends_dialling_by_the_real_clock(kind: str) -> None:
    async def main(loop: Loop, address: str) -> tuple[str, float]:
        with Dialler(loop, address) as dialler:
            start = loop.now
            cause, _ = await dialler.fail(0.15)
            return cause, loop.now - start

    with full(kind) as address:
        cause, seconds = run(lambda loop: main(loop, address))
    assert cause == "connect-timeout"
    assert 0.14 <= seconds < 0.9


def test_a_unix_backend_is_reached_as_soon_as_its_backlog_has_room() -> None:
    clock = FakeClock()

    async def main(loop: Loop, listener: socket.socket, address: str) -> None:
        with Dialler(loop, address) as dialler:
            dialler.start(5.0)
            await dialler.settle()
            listener.accept()[0].close()
            clock.advance(0.05)
            assert await dialler.outcome() == address

    with full_unix() as (listener, address):
        run(lambda loop: main(loop, listener, address), clock)


async def seconds_to_answer(dialler: Dialler, clock: FakeClock, timeout: float, step: float) -> float:
    start = clock.now
    dialler.start(timeout)
    while not dialler.outcomes:
        clock.advance(step)
        await dialler.settle()
        assert clock.now - start < 2 * timeout
    return clock.now - start


@pytest.mark.parametrize("silent", [1, 2, 3])
def test_backends_that_do_not_answer_leave_an_even_share_of_the_timeout_to_the_next(silent: int) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with ExitStack() as stack:
            addresses = [stack.enter_context(full_tcp()) for _ in range(silent)]
            addresses.append(stack.enter_context(unix_listener())[1])
            dialler = stack.enter_context(Dialler(loop, *addresses))
            seconds = await seconds_to_answer(dialler, clock, 12, 0.1)
            assert dialler.outcomes == [addresses[-1]]
            return seconds

    assert run(main, clock) == pytest.approx(12 * silent / (silent + 1), abs=0.1 * silent)


def test_all_attempts_together_take_no_longer_than_the_timeout() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with full_tcp() as one, full_unix() as (_, two), full_tcp() as three, Dialler(loop, one, two, three) as dialler:
            return await seconds_to_answer(dialler, clock, 12, 0.1)

    assert run(main, clock) == pytest.approx(12, abs=0.11)


def test_time_that_a_refusal_did_not_use_is_shared_by_those_after_it() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with full_tcp() as silent, unix_listener() as (_, live), Dialler(loop, nobody(), silent, live) as dialler:
            return await seconds_to_answer(dialler, clock, 12, 0.1)

    assert run(main, clock) == pytest.approx(6, abs=0.11)


def test_the_addresses_of_a_name_share_what_the_name_is_given() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> float:
        with full_tcp() as silent, unix_listener() as (listener, live):
            where = SocketAddress(socket.AF_INET, ("127.0.0.1", int(silent.rpartition(":")[2])))
            names = {"silent": [where, where], "half": [where, SocketAddress(socket.AF_UNIX, listener.getsockname())]}
            with Dialler(loop, "silent:80", "half:80", live, names=names) as dialler:
                seconds = await seconds_to_answer(dialler, clock, 12, 0.1)
                assert dialler.outcomes == ["half:80"]
                return seconds

    # Two addresses of 2 s each, of the 4 s of the first; then the first of two within the 4 s of the second.
    assert run(main, clock) == pytest.approx(6, abs=0.31)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_without_a_timeout_dialling_goes_on_until_it_is_cancelled_and_leaves_nothing_open(kind: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop, address: str) -> None:
        with Dialler(loop, address) as dialler:
            before = open_descriptors()
            task = dialler.start(inf)
            for _ in range(3):
                clock.advance(1e6)
                await dialler.settle()
            assert dialler.outcomes == []
            assert open_descriptors() == before + 1
            task.cancel()
            await dialler.settle()
            assert task.done
            assert open_descriptors() == before

    with full(kind) as address:
        run(lambda loop: main(loop, address), clock)


# The client meanwhile


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_when_the_client_aborts_dialling_ends_and_no_other_backend_is_tried(kind: str) -> None:
    clock = FakeClock()

    async def main(loop: Loop, address: str) -> None:
        with unix_listener() as (next_one, other), Dialler(loop, address, other) as dialler:
            next_one.setblocking(False)
            dialler.start(5.0)
            await dialler.settle()
            reset(dialler.peer)
            clock.advance(0.01001)
            outcome = await dialler.outcome()
            assert isinstance(outcome, DialError)
            assert outcome.cause == "client-aborted"
            assert str(outcome) == f"{address}: the client is gone"
            with pytest.raises(BlockingIOError):
                next_one.accept()

    before = open_descriptors()
    with full(kind) as address:
        run(lambda loop: main(loop, address), clock)
    assert open_descriptors() == before


def abort_while_the_name_is_looked_up() -> None:
    """Print the cause, and the seconds from the client's end to that of dialling."""

    async def main(loop: Loop) -> None:
        with silent_name_server() as server, Dialler(loop, "slow.example:80", "slower.example:80") as dialler:
            dialler.start(4.0)
            server.recv(1000)
            start = time.monotonic()
            reset(dialler.peer)
            outcome = await dialler.outcome()
            print(outcome.cause if isinstance(outcome, DialError) else outcome)
            print(time.monotonic() - start)

    run(main)


def test_when_the_client_aborts_nobody_waits_for_the_name_of_its_backend() -> None:
    cause, seconds = in_namespace(abort_while_the_name_is_looked_up, prepare=SILENT_DNS)
    assert cause == "client-aborted"
    assert float(seconds) < 1.5


def test_a_client_that_aborted_before_any_backend_was_reached_is_not_led_to_the_next() -> None:
    async def main(loop: Loop) -> None:
        with unix_listener() as (listener, live), Dialler(loop, nobody(), live) as dialler:
            listener.setblocking(False)
            dialler.client.watch()
            reset(dialler.peer)
            while not dialler.client.aborted:
                await loop.yield_turn()
            with pytest.raises(DialError) as caught:
                await dialler.backends.dial(dialler.client, PATIENCE)
            assert caught.value.cause == "client-aborted"
            loop.unwatch(dialler.client)
            with pytest.raises(BlockingIOError):
                listener.accept()

    run(main)


def test_a_client_that_has_only_ended_its_stream_still_gets_a_backend() -> None:
    clock = FakeClock()

    async def main(loop: Loop, listener: socket.socket, address: str) -> None:
        with Dialler(loop, address) as dialler:
            dialler.start(5.0)
            dialler.peer.sendall(b"request")
            dialler.peer.shutdown(socket.SHUT_WR)
            await dialler.settle()
            clock.advance(1)
            await dialler.settle()
            assert dialler.outcomes == []
            listener.accept()[0].close()
            clock.advance(0.05)
            assert await dialler.outcome() == address

    with full_unix() as (listener, address):
        run(lambda loop: main(loop, listener, address), clock)


# The backend's answer


@pytest.mark.parametrize("says", [b"", b"414 too long"])
def test_a_backend_that_resets_at_once_was_reached_and_what_it_said_can_be_read(says: bytes) -> None:
    async def main(loop: Loop) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            Dialler(loop, f"127.0.0.1:{listener.getsockname()[1]}") as dialler,
        ):
            sides: list[Side] = []

            async def dial() -> None:
                sides.append((await dialler.backends.dial(dialler.client, PATIENCE))[1])

            task = loop.spawn(dial())
            accepted, _ = listener.accept()
            accepted.sendall(says)
            reset(accepted)
            while not task.done:
                await loop.yield_turn()
            [side] = sides
            assert side.aborted
            buffer = bytearray(100)
            assert side.read_into(memoryview(buffer)) == len(says)
            assert buffer.startswith(says)
            side.close()

    run(main)


# A connection to itself


def dial_a_port_that_is_picked_for_the_near_end(address: str) -> None:
    """Print what a plain socket reaches that way, and then what rspd does. Changes the network namespace."""
    host, _, port = address.rpartition(":")

    async def main(loop: Loop) -> None:
        with Dialler(loop, address) as dialler:
            Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{port} {port}")
            sock = socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET)
            try:
                sock.connect((host.strip("[]"), int(port)))
                print("itself" if sock.getsockname() == sock.getpeername() else "another")
            except OSError as error:
                print(error.strerror)
            # With RST, since a port in TIME_WAIT would not be picked again.
            reset(sock)
            outcome = await dialler.dial()
            print(outcome.cause if isinstance(outcome, DialError) else "reached")

    run(main)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:40000", "[::1]:40000", "127.0.0.1:20000", "0.0.0.0:40000", "[::]:40000", "localhost:40000"]
)
def test_a_connection_that_the_kernel_made_to_itself_is_taken_for_refused(address: str) -> None:
    plain, outcome = in_namespace(dial_a_port_that_is_picked_for_the_near_end, address)
    if plain != "itself":
        pytest.skip(f"a plain socket does not reach itself there: {plain}")
    assert outcome == "backend-refused"


# Names


def look_up_where_nobody_answers() -> None:
    """Print the cause and the reason, and the seconds that it took."""

    async def main(loop: Loop) -> None:
        with silent_name_server(), Dialler(loop, "slow.example:80") as dialler:
            start = loop.now
            print(*await dialler.fail(0.3), sep="\n")
            print(loop.now - start)

    run(main)


def test_a_name_server_that_does_not_answer_ends_dialling_at_the_timeout() -> None:
    cause, reason, seconds = in_namespace(look_up_where_nobody_answers, prepare=SILENT_DNS)
    assert (cause, reason) == ("connect-timeout", "slow.example:80: no answer to the lookup of slow.example")
    assert 0.29 <= float(seconds) < 1.5


# Short of descriptors


def test_dialling_without_a_free_descriptor_waits_for_one() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, address), Dialler(loop, address) as dialler:
            with no_descriptors() as taken:
                dialler.start(5.0)
                clock.advance(0.2)
                await dialler.settle()
                assert dialler.outcomes == []
                os.close(taken.pop())
                await dialler.settle()
                assert dialler.outcomes == []
                dialler.shortage.relieve()
                assert await dialler.outcome() == address
            clock.advance(1.01)
            await dialler.settle()

    run(main, clock)


def test_dialling_looks_again_for_a_descriptor_where_nobody_tells_of_one() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, address), Dialler(loop, address) as dialler:
            with no_descriptors() as taken:
                dialler.start(inf)
                await dialler.settle()
                os.close(taken.pop())
                clock.advance(0.11)
                assert await dialler.outcome() == address
            clock.advance(1.01)
            await dialler.settle()

    run(main, clock)


def test_the_timeout_holds_where_no_descriptor_gets_free() -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (_, address), Dialler(loop, address) as dialler:
            with no_descriptors():
                seconds = await seconds_to_answer(dialler, clock, 2.0, 0.1)
            clock.advance(1.01)
            await dialler.settle()
            assert seconds == pytest.approx(2.0, abs=0.11)
            assert str(dialler.outcomes[0]) == f"{address}: Too many open files"

    run(main, clock)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        # EAI_SYSTEM, where the C library could not load the module of a name service: errno means nothing then.
        OSError(errno.EBUSY, os.strerror(errno.EBUSY)),
    ],
    ids=["EMFILE", "EAI_NONAME", "EBUSY"],
)
def test_a_lookup_that_fails_in_whatever_way_while_descriptors_are_short_is_tried_again(error: OSError) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with unix_listener() as (listener, _):
            names = {"name": [SocketAddress(socket.AF_UNIX, listener.getsockname())]}
            with Dialler(loop, "name:80", names=names) as dialler:
                loop.spawn(dialler.shortage.wait(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
                dialler.failures.append(error)
                dialler.start(5.0)
                await dialler.settle()
                assert dialler.outcomes == []
                clock.advance(0.11)
                assert await dialler.outcome() == "name:80"
            clock.advance(1.01)
            await dialler.settle()

    run(main, clock)


def test_an_error_of_socket_that_is_no_shortage_is_a_reason_at_once() -> None:
    # No kernel has this address family.
    names = {"odd": [SocketAddress(socket.AF_UNSPEC, "")]}

    async def main(loop: Loop) -> tuple[str, str]:
        with Dialler(loop, "odd:80", names=names) as dialler:
            return await dialler.fail()

    cause, text = run(main)
    assert cause == "backend-unreachable"
    assert "Address family not supported" in text
