"""A restart of the service: connections go on in the next process, and nobody is refused."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.daemon.test_transfer import receive_hashed, send_hashed
from tests.fleet import File, Load, talks
from tests.keeper import managed
from tests.manager import Service, unix_listener
from tests.support import (
    PATIENCE,
    Backend,
    answer,
    echo,
    eventually,
    fill,
    free_port,
    is_reset,
    receive_all,
    reset,
)

# What a slow reader is sent: more than all buffers on the way hold.
MUCH = 64 << 20


class UnixBackend(Backend):
    """A backend at a path."""

    def __init__(self, handler: Callable[[socket.socket], object], path: str) -> None:
        super().__init__(handler)
        self.close()
        self.path = path
        self.listener = unix_listener(path)
        self._acceptor = self._start(self._accept)

    @property
    def address(self) -> str:
        return self.path


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend(echo) as backend:
        yield backend


def fixed() -> str:
    """Where to listen: the same for each process."""
    return f"127.0.0.1:{free_port()}"


def several(backend: str) -> list[str]:
    """The arguments for an rspd that is not serial."""
    return ["-l", fixed(), "-b", backend, "--max-connections", "100"]


def pipes(daemon: Service) -> int:
    """How many ends of pipes a process has."""
    return sum("pipe:" in what for what in daemon.descriptors())


def unacknowledged(sock: socket.socket) -> int:
    """How many bytes the peer's kernel has yet to take."""
    answer: tuple[int] = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    return answer[0]


# What goes on


def test_a_connection_goes_on_in_the_next_process(backend: Backend) -> None:
    with managed("-l", fixed(), "-b", backend.address) as service:
        with service.daemon.connect() as client:
            assert talks(client)
            for _ in range(3):
                before = service.restart()
                assert before.find("handed over connections=1 ")
                assert service.daemon.find("took over connections=1$")
                assert talks(client)
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b""
            (end,) = service.daemon.wait_for_ends(1)
        assert end["handovers"] == "3"
        assert end["sent"] == end["received"] == "20"
        assert end["cause"] == "client-closed"
        assert [daemon.find("connection closed") for daemon in service.daemons[:-1]] == [[], [], []]
        assert backend.accepted == 1


def test_a_serial_rspd_goes_on_with_its_connection_and_then_serves_who_has_waited_since_before(
    backend: Backend,
) -> None:
    with managed("-l", fixed(), "-b", backend.address) as service:
        with service.daemon.connect() as client, service.daemon.connect() as second:
            second.sendall(b"waits")
            assert talks(client)
            service.restart()
            with service.daemon.connect() as third:
                third.sendall(b"later")
                assert talks(client)
                service.store.wait_for_status(r"serving 1 of 1, 2 waiting, 1 served, .*")
                assert backend.accepted == 1
                client.close()
                assert second.recv(5, socket.MSG_WAITALL) == b"waits"
                assert backend.accepted == 2
                second.close()
                assert third.recv(5, socket.MSG_WAITALL) == b"later"
        ends = service.daemon.wait_for_ends(3)
        assert [end.get("handovers") for end in ends] == ["1", None, None]


def test_who_comes_during_restarts_is_served() -> None:
    with Backend(answer) as backend, managed(*several(backend.address)) as service:
        with Load(service.daemon.port, 200) as load:
            eventually(lambda: backend.accepted)
            for _ in range(5):
                served = backend.accepted
                service.restart()
                eventually(lambda served=served: backend.accepted > served + 20)  # type: ignore[misc]
            outcomes = [outcome for _, _, _, outcome in load.end()]
        assert len(outcomes) >= 100
        assert set(outcomes) == {"ok"}


@pytest.mark.parametrize("first", ["client", "backend"])
def test_the_half_that_is_open_goes_on(first: str) -> None:
    ended, go_on = threading.Event(), threading.Event()
    received = []

    def answers_late(sock: socket.socket) -> None:
        received.append(receive_all(sock))
        ended.set()
        assert go_on.wait(PATIENCE)
        sock.sendall(b"answer")

    def ends_first(sock: socket.socket) -> None:
        sock.sendall(b"answer")
        sock.shutdown(socket.SHUT_WR)
        received.append(receive_all(sock))
        ended.set()

    with (
        Backend(answers_late if first == "client" else ends_first) as backend,
        managed(*several(backend.address)) as service,
        service.daemon.connect() as client,
    ):
        if first == "client":
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert ended.wait(PATIENCE)
            service.restart()
            service.restart()
            go_on.set()
            assert receive_all(client) == b"answer"
        else:
            assert receive_all(client) == b"answer"
            service.restart()
            service.restart()
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert ended.wait(PATIENCE)
        (end,) = service.daemon.wait_for_ends(1)
        assert received == [b"question"]
        assert not backend.errors
        assert (end["sent"], end["received"], end["cause"]) == ("8", "6", f"{first}-closed")
        assert end["handovers"] == "2"


def test_an_end_that_comes_while_no_process_runs_is_passed_on(backend: Backend) -> None:
    with managed(*several(backend.address)) as service, service.daemon.connect() as client:
        assert talks(client)
        service.stop()
        client.sendall(b"last")
        client.shutdown(socket.SHUT_WR)
        service.start()
        assert receive_all(client) == b"last"
        assert service.daemon.wait_for_ends(1)[0]["cause"] == "client-closed"


def test_an_answer_that_ends_while_no_process_runs_after_the_client_has_ended_is_whole() -> None:
    ended, go_on = threading.Event(), threading.Event()

    def answer_late(sock: socket.socket) -> None:
        receive_all(sock)
        ended.set()
        assert go_on.wait(PATIENCE)
        sock.sendall(b"answer")

    with (
        Backend(answer_late) as backend,
        managed(*several(backend.address)) as service,
        service.daemon.connect() as client,
    ):
        client.shutdown(socket.SHUT_WR)
        assert ended.wait(PATIENCE)
        service.stop()
        go_on.set()
        eventually(lambda: not backend._sockets)
        service.start()
        assert receive_all(client) == b"answer"
        assert service.daemon.wait_for_ends(1)[0]["cause"] == "client-closed"


@pytest.mark.large_pipes(2)
def test_a_slow_reader_gets_all_of_it_also_what_was_in_a_pipe() -> None:
    hashes: list[str] = []
    with (
        Backend(lambda sock: hashes.append(send_hashed(sock, MUCH))) as backend,
        managed(*several(backend.address)) as service,
    ):
        without = pipes(service.daemon)
        with service.daemon.connect() as client:
            in_pipe = 0
            head = b""
            for _ in range(5):
                head += client.recv(3 << 20, socket.MSG_WAITALL)
                eventually(lambda: pipes(service.daemon) >= without, patience=PATIENCE)
                in_pipe += pipes(service.daemon) > without
                service.restart()
            whole = head + receive_all(client)
        (end,) = service.daemon.wait_for_ends(1)
        assert in_pipe
        assert len(whole) == MUCH
        assert hashlib.sha1(whole).hexdigest() == hashes[0]
        assert (end["received"], end["handovers"], end["cause"]) == (str(MUCH), "5", "backend-closed")


def test_a_slow_reader_gets_what_was_held_in_memory() -> None:
    block, blocks = os.urandom(16_000), 40  # too small for a pipe; more than a unix socket holds
    at_backend: list[socket.socket] = []
    done = threading.Event()

    def handle(sock: socket.socket) -> None:
        if sock.recv(1, socket.MSG_PEEK) == b"h":
            echo(sock)
        else:
            sock.recv(1)
            at_backend.append(sock)
            assert done.wait(PATIENCE)

    with TemporaryDirectory() as folder, Backend(handle) as backend, socket.socket(socket.AF_UNIX) as client:
        path = f"{folder}/s"
        with managed("-l", fixed(), "-l", path, "-b", backend.address, "--max-connections", "9") as service:
            client.settimeout(PATIENCE)
            client.connect(path)
            client.sendall(b"?")
            with service.daemon.connect() as other:
                eventually(lambda: at_backend)
                for _ in range(blocks):
                    at_backend[0].sendall(block)
                    assert talks(other)  # so rspd has passed the block on, as far as there is room
            service.restart()
            service.restart()
            done.set()
            assert receive_all(client) == block * blocks
            client.close()
            service.daemon.wait_for(rf"connection closed .* received={len(block) * blocks} .*handovers=2")


@pytest.mark.parametrize("unix", ["", "client", "backend", "both"])
def test_both_directions_arrive_whole_through_restarts_while_they_run(unix: str) -> None:
    at_backend: list[tuple[str, tuple[int, str]]] = []

    def exchange(sock: socket.socket) -> tuple[str, tuple[int, str]]:
        sent: list[str] = []

        def send() -> None:
            sent.append(send_hashed(sock, 2 * MUCH))
            sock.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        received = receive_hashed(sock)
        thread.join(PATIENCE)
        return sent[0], received

    def handle(sock: socket.socket) -> None:
        at_backend.append(exchange(sock))

    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())  # a short name, which a path needs
        to_unix = unix in ("backend", "both")
        backend = stack.enter_context(UnixBackend(handle, f"{folder}/b") if to_unix else Backend(handle))
        where = f"{folder}/l" if unix in ("client", "both") else fixed()
        service = stack.enter_context(managed("-l", where, "-b", backend.address))
        if unix in ("client", "both"):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(PATIENCE)
            client.connect(where)
        else:
            client = stack.enter_context(service.daemon.connect())
        results: list[tuple[str, tuple[int, str]]] = []
        thread = threading.Thread(target=lambda: results.append(exchange(client)))
        thread.start()
        restarts = 0
        while thread.is_alive() and restarts < 8:
            service.restart()
            restarts += 1
        thread.join(PATIENCE)
        eventually(lambda: at_backend or backend.errors)
        assert not backend.errors
        assert results[0][1] == (2 * MUCH, at_backend[0][0])
        assert at_backend[0][1] == (2 * MUCH, results[0][0])
        assert restarts > 1


# Aborts


def test_an_abort_by_the_client_after_a_restart_reaches_the_backend() -> None:
    aborted: list[bool] = []

    def handle(sock: socket.socket) -> None:
        sock.sendall(sock.recv(5))
        aborted.append(is_reset(sock))

    with Backend(handle) as backend, managed(*several(backend.address)) as service:
        client = service.daemon.connect()
        assert talks(client)
        service.restart()
        reset(client)
        eventually(lambda: aborted == [True])
        assert service.daemon.wait_for_ends(1)[0]["cause"] == "client-aborted"


@pytest.mark.parametrize("when", ["after", "while no process runs"])
def test_an_abort_by_the_backend_reaches_the_client(when: str) -> None:
    now = threading.Event()

    def handle(sock: socket.socket) -> None:
        sock.sendall(sock.recv(5))
        assert now.wait(PATIENCE)
        reset(sock)

    with (
        Backend(handle) as backend,
        managed(*several(backend.address)) as service,
        service.daemon.connect() as client,
    ):
        assert talks(client)
        service.stop()
        if when == "while no process runs":
            now.set()
            eventually(lambda: not backend._sockets)
        service.start()
        now.set()
        assert is_reset(client)
        assert service.daemon.wait_for_ends(1)[0]["cause"] == "backend-aborted"


@pytest.mark.parametrize("aborts", ["client", "backend"])
def test_an_abort_that_was_read_before_is_an_abort_once_the_slow_other_side_has_taken_the_rest(aborts: str) -> None:
    resets: list[tuple[int, bool]] = []
    sent: list[int] = []
    read_on = threading.Event()

    def read_to_abort(sock: socket.socket) -> None:
        got = 0
        try:
            while data := sock.recv(1 << 20):
                got += len(data)
            resets.append((got, False))
        except ConnectionResetError:
            resets.append((got, True))

    def send_and_abort(sock: socket.socket) -> None:
        sent.append(fill(sock, 1.2))
        reset(sock)

    def handle(sock: socket.socket) -> None:
        if sock.recv(1, socket.MSG_PEEK) == b"h":
            echo(sock)
        elif aborts == "backend":
            sock.recv(1)
            send_and_abort(sock)
        else:
            assert read_on.wait(PATIENCE)
            read_to_abort(sock)

    with Backend(handle) as backend, managed(*several(backend.address)) as service, service.daemon.connect() as client:
        if aborts == "backend":
            client.sendall(b"?")
        else:
            send_and_abort(client)
        eventually(lambda: sent)
        eventually(lambda: aborts == "client" or len(backend._sockets) == 0)
        with service.daemon.connect() as other:
            assert talks(other)  # so rspd has seen the abort too
            assert not service.daemon.find("connection closed")
            service.restart()
            service.restart()
            assert talks(other)
            assert not service.daemon.find("connection closed")
        if aborts == "backend":
            read_to_abort(client)
        read_on.set()
        eventually(lambda: resets)
        ends = service.daemon.wait_for_ends(2)
        assert [end["cause"] for end in ends if end["handovers"] == "2"][-1] == f"{aborts}-aborted"
        got, aborted = resets[0]
        assert aborted
        assert 0 < got <= sent[0]


@pytest.mark.parametrize("aborts", ["client", "backend"])
def test_an_abort_whose_error_was_read_before_is_an_abort_once_the_kernel_has_delivered_the_rest(aborts: str) -> None:
    """The kernel tells an error once: then the socket of who has aborted looks as if it had ended in order."""
    size, small = 200_000, 4096  # of what comes first; of the other side's buffer
    received: list[tuple[int, bool]] = []
    read_on, has_sent = threading.Event(), threading.Event()

    def send_and_abort(sock: socket.socket) -> None:
        sock.sendall(bytes(size))
        eventually(lambda: not unacknowledged(sock))
        reset(sock)
        has_sent.set()

    def read_to_abort(sock: socket.socket) -> None:
        assert read_on.wait(PATIENCE)
        got = 0
        try:
            while data := sock.recv(1 << 20):
                got += len(data)
            received.append((got, False))
        except ConnectionResetError:
            received.append((got, True))

    def handle(sock: socket.socket) -> None:
        if sock.recv(1, socket.MSG_PEEK) == b"h":
            echo(sock)
        elif aborts == "backend":
            sock.recv(1)
            send_and_abort(sock)
        else:
            read_to_abort(sock)

    with Backend(handle) as backend, managed(*several(backend.address)) as service, socket.socket() as client:
        slow = client if aborts == "backend" else backend.listener
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, small)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", service.daemon.port))
        if aborts == "backend":
            client.sendall(b"?")
        else:
            send_and_abort(client)
        assert has_sent.wait(PATIENCE)
        with service.daemon.connect() as other:
            assert talks(other)  # so rspd has seen the abort too
            service.restart()
            service.restart()
            assert talks(other)
            assert not service.daemon.find("connection closed")
        read_on.set()
        if aborts == "backend":
            read_to_abort(client)
        eventually(lambda: received)
        assert received == [(size, True)]
        service.daemon.wait_for(f"connection closed .* cause={aborts}-aborted handovers=2")


# What is left behind


def test_restarts_leave_no_descriptor_behind(backend: Backend) -> None:
    with managed(*several(backend.address)) as service:
        with ExitStack() as stack:
            clients = [stack.enter_context(service.daemon.connect()) for _ in range(20)]
            assert all(talks(client) for client in clients)
            counts = [len(service.daemon.descriptors())]
            for _ in range(6):
                service.restart()
                assert all(talks(client) for client in clients)
                counts.append(len(service.daemon.descriptors()))
                eventually(lambda: service.names == ["rspd+listener-"])
            assert len(set(counts)) == 1, counts
        service.daemon.wait_for_ends(20)
        assert [name.rstrip("0123456789") for name, _ in service.store.kept] == ["rspd+listener-"]
        eventually(lambda: len(service.daemon.descriptors()) == counts[0] - 40)


def test_a_connection_for_which_the_next_process_has_no_descriptor_ends_and_the_others_go_on(
    tmp_path: Path, backend: Backend
) -> None:
    file = File(tmp_path, listen=fixed(), backend=backend.address, max_connections=100)
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        clients = [stack.enter_context(service.daemon.connect()) for _ in range(80)]
        assert all(talks(client) for client in clients)
        file.write(max_connections=5)
        service.restart(limit=(120, 120))
        lost = service.daemon.wait_for_ends(1)
        taken = int(service.daemon.find("took over")[0].partition("connections=")[2])
        assert taken + len(lost) == 80
        assert 30 < taken < 80
        assert {end["cause"] for end in lost} == {"handover-failed"}
        assert {end["reason"] for end in lost} == {'"too few descriptors; raise LimitNOFILE="'}
        gone = {end["client"] for end in lost}
        for client in clients:
            if "{}:{}".format(*client.getsockname()) in gone:
                # The kernel closed what was not received, so the end may be an orderly one.
                with pytest.raises((ConnectionError, IndexError)):
                    client.sendall(b"hello")
                    _ = client.recv(1)[0]
            else:
                assert talks(client)
