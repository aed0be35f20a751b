"""Several processes on the same listening socket: each client is served by one of them, whatever becomes of another."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.manager import Service, service, tcp_listener
from tests.support import OUR_USER, PATIENCE, Backend, Daemon, answer, echo, eventually, receive_all, rspd

# Seconds in which a process hears of a client that another was woken for: one look in each, and a busy machine.
BOUND = 5.0

# A process that waits as rspd does, first in line, and then does nothing about it, as one that is killed just then.
WOKEN = """
import select, socket, sys, time
epoll = select.epoll()
epoll.register(0, select.EPOLLIN | select.EPOLLEXCLUSIVE)
print("waits", flush=True)
while not epoll.poll():
    pass
print("woken", flush=True)
time.sleep(60)
"""

# The command that follows, as a user of these tests' own, who may not be able to read Python's files.
ANOTHER_USER = """
import os, sys
import locale, rspd.cli  # with what is imported late
user = int(sys.argv[1])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
os._exit(rspd.cli.main(sys.argv[5:]))  # what measures coverage could not write here
"""


@pytest.fixture
def shared() -> Iterator[socket.socket]:
    """A listening socket as systemd keeps it, for several processes."""
    with tcp_listener() as sock:
        yield sock


def client_of(sock: socket.socket) -> socket.socket:
    client = socket.create_connection(sock.getsockname(), timeout=PATIENCE)
    client.settimeout(PATIENCE)
    return client


def ask(client: socket.socket) -> bytes:
    client.sendall(b"?")
    return receive_all(client)


@contextmanager
def workers(count: int, sock: socket.socket, *arguments: str) -> Iterator[list[Service]]:
    """So many processes on one passed socket."""
    with ExitStack() as stack:
        yield [stack.enter_context(service(*arguments, sockets={"web": sock})) for _ in range(count)]


class Load:
    """Clients that come one after the other, four at a time; `ends` has the answer of each, or how it failed."""

    def __init__(self, where: Callable[[], socket.socket]) -> None:
        self.ends: list[str] = []
        self._where = where
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._hammer, daemon=True) for _ in range(4)]

    def _hammer(self) -> None:
        while not self._over.is_set():
            try:
                with self._where() as client:
                    self.ends.append(ask(client).decode())
            except OSError as error:
                self.ends.append(repr(error))

    def more(self, count: int = 100) -> None:
        """Wait until so many more clients are through."""
        goal = len(self.ends) + count
        eventually(lambda: len(self.ends) >= goal, "there is load")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)


def served(daemon: Daemon) -> int:
    return len(daemon.find("connection closed"))


# Who hears of a client


def test_under_load_every_process_serves(shared: socket.socket) -> None:
    with Backend(answer) as backend, workers(2, shared, "-b", backend.address, "--max-connections", "8") as daemons:
        with Load(lambda: client_of(shared)) as load:
            load.more(400)
        assert set(load.ends) == {"ok"}
        eventually(lambda: sum(map(served, daemons)) == len(load.ends))
        assert min(map(served, daemons)) > 20, [served(daemon) for daemon in daemons]


def test_a_client_wakes_one_of_the_processes(shared: socket.socket) -> None:
    with Backend(answer) as backend, workers(6, shared, "-b", backend.address) as daemons:

        def switches() -> int:
            status = "".join(Path(f"/proc/{daemon.pid}/status").read_text() for daemon in daemons)
            return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("voluntary_ctxt"))

        before, started = switches(), time.monotonic()
        for _ in range(50):
            with client_of(shared) as client:
                assert ask(client) == b"ok"
        eventually(lambda: sum(map(served, daemons)) == 50)
        # Of a client its own process sleeps for the request, the answer, the end; else each looks about once a second,
        # and tells its state.
        looks = 6 * 2 * (time.monotonic() - started + 1)
        assert switches() - before < 50 * 4 + looks


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_client_that_woke_a_process_which_then_does_nothing_is_served_by_another(
    shared: socket.socket, end: str
) -> None:
    with Backend(answer) as backend:
        lost = subprocess.Popen([sys.executable, "-IS", "-c", WOKEN], stdin=shared.fileno(), stdout=subprocess.PIPE)
        try:
            assert lost.stdout
            assert lost.stdout.readline() == b"waits\n"
            eventually(lambda: sleeps(lost.pid), "it waits")
            with service("-b", backend.address, sockets={"web": shared}):
                with client_of(shared) as client:
                    assert lost.stdout.readline() == b"woken\n"
                    lost.send_signal(signal.SIGKILL if end == "killed" else signal.SIGSTOP)
                    client.settimeout(BOUND)
                    assert ask(client) == b"ok"
        finally:
            lost.kill()
            lost.communicate()


def sleeps(pid: int) -> bool:
    """Whether a process waits for something."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_a_client_that_woke_a_process_without_descriptors_is_served_by_another(shared: socket.socket) -> None:
    with Backend(answer) as backend, workers(1, shared, "-b", backend.address, "--max-connections", "8") as (short,):
        soft, hard = resource.prlimit(short.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(short.pid, resource.RLIMIT_NOFILE, (0, hard))
        with service("-b", backend.address, sockets={"web": shared}) as other:
            for _ in range(3):
                with client_of(shared) as client:
                    client.settimeout(BOUND)
                    assert ask(client) == b"ok"
            other.wait_for_ends(3)
        resource.prlimit(short.pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_looking_again_costs_almost_no_cpu_time(shared: socket.socket) -> None:
    with Backend(answer) as backend, workers(1, shared, "-b", backend.address) as (daemon,):
        before = daemon.cpu_seconds()
        time.sleep(3)
        assert daemon.cpu_seconds() - before < 0.01


# Ends, restarts, reloads


@pytest.mark.parametrize("limit", ["1", "8"])
def test_a_shared_socket_that_somebody_makes_wait_again_stops_nobody(shared: socket.socket, limit: str) -> None:
    """systemd clears O_NONBLOCK, which all processes share, when it starts another one on the socket."""
    with Backend(echo) as backend, ExitStack() as stack:
        [process] = stack.enter_context(workers(1, shared, "-b", backend.address, "--max-connections", limit))
        process.wait_for("listening")
        shared.setblocking(True)
        for served in range(0, 60, 3):
            clients = [stack.enter_context(client_of(shared)) for _ in range(3)]
            for client in clients:
                client.sendall(b"?")
            for client in clients:
                assert client.recv(1) == b"?"
                client.close()
            process.wait_for_ends(served + 3)


def test_a_killed_process_takes_its_own_clients_along_and_no_other(shared: socket.socket) -> None:
    with Backend(answer) as backend, ExitStack() as stack:
        arguments = ["-b", backend.address, "--max-connections", "8"]
        stack.enter_context(service(*arguments, sockets={"web": shared}))
        killed = stack.enter_context(service(*arguments, sockets={"web": shared}))
        with Load(lambda: client_of(shared)) as load:
            load.more()
            killed.signal(signal.SIGKILL)
            killed.wait()
            load.more()
            restarted = stack.enter_context(service(*arguments, sockets={"web": shared}))
            restarted.wait_for("connection closed")
            load.more()
            assert restarted.stop() == 0
            load.more()
        lost = [end for end in load.ends if end != "ok"]
        assert len(lost) <= 4, "no more than there were at once"
        assert not [end for end in lost if "Refused" in end]


def test_a_reload_of_all_under_load_loses_nobody(shared: socket.socket, tmp_path: Path) -> None:
    file = tmp_path / "rspd.yaml"
    with Backend(answer) as backend:
        file.write_text(f"backend: {backend.address}\nmax_connections: 8\n")
        with workers(3, shared, "-c", str(file)) as daemons, Load(lambda: client_of(shared)) as load:
            for count in 1, 2:
                load.more()
                for daemon in daemons:
                    daemon.signal(signal.SIGHUP)
                for daemon in daemons:
                    daemon.wait_for("reloaded listen=", count)
            load.more()
        assert set(load.ends) == {"ok"}


# One port, without systemd


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rspd.yaml"


def write(file: Path, port: int, backend: Backend, reuse_port: bool) -> list[str]:
    """A configuration of this port; the arguments that name it."""
    text = f"listen: 127.0.0.1:{port}\nbackend: {backend.address}\nmax_connections: 8\n"
    file.write_text(f"{text}reuse_port: {str(reuse_port).lower()}\n")
    return ["-c", str(file)]


def reload(daemon: Daemon) -> None:
    count = len(daemon.find("reloaded listen="))
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("reloaded listen=", count + 1)


def test_with_reuse_port_processes_share_a_port_and_each_serves(file: Path) -> None:
    with Backend(answer) as backend, rspd(*write(file, 0, backend, True), listen=()) as first:
        with rspd(*write(file, first.port, backend, True), listen=()) as second:
            with Load(first.connect) as load:
                load.more(200)
            assert set(load.ends) == {"ok"}
            eventually(lambda: served(first) + served(second) == len(load.ends))
            assert min(served(first), served(second)) > 20
        with first.connect() as client:
            assert ask(client) == b"ok"


def test_a_port_that_one_of_the_two_does_not_share_is_in_use(file: Path) -> None:
    with Backend(answer) as backend, rspd(*write(file, 0, backend, False), listen=()) as first:
        second = Daemon(*write(file, first.port, backend, True), wait=False)
        try:
            assert second.wait() == 69
            (line,) = second.lines
            assert line.startswith(f"rspd: cannot listen on 127.0.0.1:{first.port}: Address already in use; ")
            assert line.endswith("; to share it, that one needs reuse_port and the same user too")
        finally:
            second.kill()


def test_a_reload_lets_others_share_a_port_that_stays_open(file: Path, tmp_path: Path) -> None:
    with Backend(answer) as backend, rspd(*write(file, 0, backend, False), listen=()) as first:
        write(file, 0, backend, True)
        with first.connect() as waiting:
            reload(first)
            assert ask(waiting) == b"ok"
        with rspd(*write(tmp_path / "second.yaml", first.port, backend, True), listen=()) as second:
            with Load(first.connect) as load:
                load.more(200)
            assert set(load.ends) == {"ok"}
            assert min(served(first), served(second)) > 20


# Limits


def test_limits_hold_for_each_process(shared: socket.socket) -> None:
    with Backend(echo) as backend, workers(3, shared, "-b", backend.address) as daemons, ExitStack() as stack:
        clients = [stack.enter_context(client_of(shared)) for _ in range(4)]
        for client in clients:
            client.sendall(b"?")
        for client in clients[:3]:
            assert client.recv(1) == b"?"
        assert select.select([clients[3]], [], [], 0.3)[0] == []
        assert backend.accepted == 3
        clients[1].close()
        assert clients[3].recv(1) == b"?"
        for client in clients:
            client.close()
        eventually(lambda: sum(map(served, daemons)) == 4)
        assert sorted(map(served, daemons)) == [1, 1, 2]


def pipes(daemon: Daemon) -> int:
    """How many pipes a process has, those of its log not counted."""
    names = [name for name in daemon.descriptors() if name.startswith("pipe:")]
    return sum(names.count(name) == 2 for name in set(names))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user with no other pipes")
def test_a_process_to_which_another_leaves_no_large_pipes_copies_and_the_bytes_are_right() -> None:
    """A user other than root has pages for 64 of them, in all his processes (pipe(7))."""
    data = os.urandom(1 << 20) * 16
    with Backend(lambda sock: sock.sendall(data)) as backend, ExitStack() as stack:
        words = ["-b", backend.address, "--max-connections", "80"]
        launcher = [sys.executable, "-c", ANOTHER_USER, str(OUR_USER)]
        first, second, third = [stack.enter_context(rspd(*words, launcher=launcher)) for _ in range(3)]
        # Each holds a pipe as long as its client does not read; a process keeps an eighth for those that do.
        stalled = [stack.enter_context(process.connect()) for process in (first, second) for _ in range(70)]
        eventually(lambda: pipes(first) + pipes(second) == 64, "they have them all")
        with third.connect() as client:
            assert receive_all(client) == data
        assert pipes(third) == 0
        for client in stalled:
            client.close()
        for process in (first, second):
            process.wait_for_ends(70)
