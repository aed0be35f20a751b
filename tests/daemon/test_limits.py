"""Many connections, and few descriptors: what rspd uses, and that it gives it back."""

from __future__ import annotations

import resource
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fleet import File
from tests.support import (
    PATIENCE,
    Backend,
    Daemon,
    answer,
    can_trace,
    echo,
    eventually,
    receive_all,
    reset,
    rspd,
)


def settled(daemon: Daemon, before: int) -> bool:
    """Whether no descriptor, and no pipe, is open that was not open before."""
    return len(daemon.descriptors()) <= before


def exchange(daemon: Daemon, number: int) -> None:
    with daemon.connect() as client:
        client.sendall(b"?")
        if number % 5 == 0:
            reset(client)
        else:
            assert receive_all(client) == b"ok"


def test_2000_connections_in_a_row_leave_nothing_behind() -> None:
    with Backend(answer) as backend, rspd("-b", backend.address) as daemon:
        exchange(daemon, 1)
        daemon.wait_for_ends(1)
        before = len(daemon.descriptors())
        for number in range(500):
            exchange(daemon, number)
        daemon.wait_for_ends(501)
        memory = daemon.memory()
        for number in range(1500):
            exchange(daemon, number)
        daemon.wait_for_ends(2001)
        eventually(lambda: settled(daemon, before), str(daemon.descriptors()))
        assert daemon.memory() - memory < 500_000


@pytest.mark.usefixtures("as_many_descriptors_as_allowed")
def test_1000_connections_at_once_are_all_served_and_leave_nothing_behind() -> None:
    count = 1000
    with Backend(echo) as backend, rspd("-b", backend.address, "--max-connections", "1000") as daemon:
        before = len(daemon.descriptors())
        memory: list[int] = []
        for _ in range(3):
            accepted = backend.accepted
            clients = [daemon.connect() for _ in range(count)]
            eventually(lambda accepted=accepted: backend.accepted == accepted + count)  # type: ignore[misc]
            for client in clients:
                client.sendall(b"x" * 1000)
            for client in clients:
                assert client.recv(1000, socket.MSG_WAITALL) == b"x" * 1000
            for number, client in enumerate(clients):
                if number % 7 == 0:
                    reset(client)
                else:
                    client.close()
            daemon.wait_for_ends(backend.accepted)
            eventually(lambda: settled(daemon, before), str(daemon.descriptors()))
            memory.append(daemon.memory())
        assert memory[2] - memory[1] < 1_000_000, memory


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_with_64_descriptors_200_clients_are_all_served_in_the_end(host: str) -> None:
    def slow(sock: socket.socket) -> None:
        sock.recv(1)
        time.sleep(0.2)
        sock.sendall(b"ok")

    with Backend(slow) as backend, rspd("-b", f"{host}:{backend.port}", "--max-connections", "200") as daemon:
        # It refuses to start with so few; here they become few while it runs.
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (64, 64))
        before, started = daemon.cpu_seconds(), time.monotonic()
        clients = [threading.Thread(target=exchange, args=(daemon, 1)) for _ in range(200)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(PATIENCE)
        ends = daemon.wait_for_ends(200)
        assert {end["cause"] for end in ends} <= {"backend-closed", "client-closed"}
        used, passed = daemon.cpu_seconds() - before, time.monotonic() - started
        assert used < 0.4 * passed, f"{used} s of CPU time in {passed} s"
        daemon.wait_for("accepting goes on")
        lines = daemon.find("accepting")
        assert len(lines) == 2, lines
        assert "accepting pauses" in lines[0]
        assert "Too many open files" in lines[0]
        assert backend.accepted == 200


def test_a_client_that_waits_for_descriptors_is_served_as_soon_as_another_has_ended() -> None:
    count = 100
    with Backend(answer) as backend, rspd("-b", backend.address, "--max-connections", f"{count}") as daemon:
        # Room for one connection: each of the others finds none, and hears of its end rather than of a timer.
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (len(daemon.descriptors()) + 2,) * 2)
        started = time.monotonic()
        clients = [threading.Thread(target=exchange, args=(daemon, 1)) for _ in range(count)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(PATIENCE)
        assert time.monotonic() - started < count * 0.1 / 2
        assert {end["cause"] for end in daemon.wait_for_ends(count)} <= {"backend-closed", "client-closed"}


@pytest.mark.large_pipes(2)
def test_idle_pipes_give_way_to_clients_when_descriptors_are_short() -> None:
    def handler(sock: socket.socket) -> None:
        if sock.recv(1) == b"d":
            sock.sendall(b"x" * 10_000_000)
        else:
            echo(sock)

    def pipes(daemon: Daemon) -> int:
        return len([name for name in daemon.descriptors() if name.startswith("pipe:")])

    with Backend(handler) as backend, rspd("-b", backend.address, "--max-connections", "50") as daemon:
        # Room for a connection and its pipe, and then for one more: three at once, if they need no pipe.
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (len(daemon.descriptors()) + 6,) * 2)
        few = pipes(daemon)
        with daemon.connect() as client:
            client.sendall(b"d")
            receive_all(client)
        daemon.wait_for_ends(1)
        assert pipes(daemon) == few + 2
        clients = [daemon.connect() for _ in range(3)]
        for client in clients:
            client.sendall(b"??")
            assert client.recv(1) == b"?"
        assert pipes(daemon) == few
        for client in clients:
            client.close()


def test_waiting_for_descriptors_costs_almost_no_cpu_time() -> None:
    with Backend(echo) as backend, rspd("-b", backend.address, "--max-connections", "200") as daemon:
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (24, 24))
        clients = [daemon.connect() for _ in range(20)]
        daemon.wait_for("accepting pauses")
        before = daemon.cpu_seconds()
        time.sleep(1)
        assert daemon.cpu_seconds() - before < 0.05
        for client in clients:
            client.close()
        daemon.wait_for("accepting goes on")
        assert len(daemon.find("accepting")) == 2


def test_bulk_transfers_go_on_without_descriptors_for_pipes() -> None:
    data = b"x" * 20_000_000
    with Backend(lambda sock: sock.sendall(data)) as backend, rspd("-b", backend.address) as daemon:
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (len(daemon.descriptors()) + 3,) * 2)
        with daemon.connect() as client:
            assert len(receive_all(client)) == len(data)


@pytest.mark.parametrize("soft", [64, 1024])
def test_the_soft_limit_of_descriptors_is_raised_as_far_as_needed(soft: int) -> None:
    with Backend(answer) as backend:
        with rspd("-b", backend.address, "--max-connections", "600", limit=(soft, 2000)) as daemon:
            exchange(daemon, 1)
            assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (2000, 2000)


@pytest.mark.large_pipes(40)
def test_stalled_readers_do_not_keep_others_from_bulk_transfers() -> None:
    """Each stalled flow holds a pipe; when all are held, the others copy."""
    data = b"x" * 10_000_000
    release = threading.Event()

    def handler(sock: socket.socket) -> None:
        sock.sendall(data)

    with Backend(handler) as backend, rspd("-b", backend.address, "--max-connections", "100") as daemon:
        stalled = [daemon.connect() for _ in range(70)]
        eventually(lambda: backend.accepted == 70)
        # Root gets all 64; another user has to share his pages of pipe with whatever else he runs.
        eventually(lambda: len([name for name in daemon.descriptors() if name.startswith("pipe:")]) >= 2 * 32)
        with daemon.connect() as client:
            assert len(receive_all(client)) == len(data)
        release.set()
        for client in stalled:
            client.settimeout(PATIENCE)
            assert len(receive_all(client)) == len(data)
            client.close()
        daemon.wait_for_ends(71)


# Watches of epoll (fs.epoll.max_user_watches): all of a user's processes have them together


def watches_fail(first: int, last: int) -> list[str]:
    """A command that runs rspd and has these calls of epoll_ctl(2) fail, by their number, as at the limit.

    The first two are for the loop and the listener, the third is for the first client, the fourth for its backend.
    """
    can_trace()
    return ["strace", "-D", "-qq", "-o", "/dev/null", "-e", f"inject=epoll_ctl:error=ENOSPC:when={first}..{last}"]


@pytest.mark.parametrize("first", [3, 4], ids=["client", "backend"])
def test_a_connection_waits_while_there_is_no_watch_for_one_of_its_sides(first: int) -> None:
    with Backend(answer) as backend:
        with rspd("-b", backend.address, "--max-connections", "10", launcher=watches_fail(first, first + 2)) as daemon:
            with daemon.connect() as client:
                client.sendall(b"?")
                assert receive_all(client) == b"ok"
            (line,) = daemon.wait_for("accepting pauses")
            assert "raise the sysctl fs.epoll.max_user_watches" in line
            daemon.wait_for("accepting goes on")
            (end,) = daemon.wait_for_ends(1)
            assert float(end["seconds"]) > 0.2
            assert not daemon.find("backend down")


@pytest.mark.parametrize("first", [3, 4], ids=["client", "backend"])
def test_a_connection_that_gets_no_watch_in_time_is_ended_with_its_reason(tmp_path: Path, first: int) -> None:
    with Backend(answer) as backend:
        file = File(tmp_path, backend=backend.address, connect_timeout="300ms")
        with file.rspd(launcher=watches_fail(first, first + 10)) as daemon:
            with daemon.connect() as client:
                assert receive_all(client) == b""
            (end,) = daemon.wait_for_ends(1)
            assert end["cause"] == "backend-unreachable"
            assert "No space left on device" in end["reason"]
            assert 0.3 <= float(end["seconds"]) < 5
            assert not daemon.find("backend down")
            eventually(lambda: exchanged(daemon), "there are watches again")


def exchanged(daemon: Daemon) -> bool:
    with daemon.connect() as client:
        with suppress(ConnectionResetError):
            client.sendall(b"?")
            return receive_all(client) == b"ok"
    return False
