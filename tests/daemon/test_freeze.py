"""The process frozen for longer than its timeouts (SIGSTOP): what came meanwhile counts."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.daemon.test_reload import receive
from tests.fleet import File, connections, stays
from tests.support import PATIENCE, Backend, Daemon, echo, eventually, receive_all

CLIENTS = 150  # more sides than one look at epoll brings events
TIMEOUT = 6.0  # seconds: on a busy machine all clients are there before


def state(daemon: Daemon) -> str:
    """Of the process, as proc_pid_stat(5) has it: T is stopped, S waits."""
    return Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def frozen(daemon: Daemon) -> Iterator[None]:
    """The process stands still during the block, and for longer than its timeouts."""
    daemon.signal(signal.SIGSTOP)
    eventually(lambda: state(daemon) == "T")
    began = time.monotonic()
    try:
        yield
        eventually(lambda: time.monotonic() > began + 1.2 * TIMEOUT)
    finally:
        daemon.signal(signal.SIGCONT)


@pytest.mark.usefixtures("as_many_descriptors_as_allowed")
@pytest.mark.parametrize("spoke_last", ["client", "backend"])
def test_connections_whose_peers_spoke_during_a_freeze_go_on(tmp_path: Path, spoke_last: str) -> None:
    backend_sockets: list[socket.socket] = []

    def handler(sock: socket.socket) -> None:
        backend_sockets.append(sock)
        echo(sock)

    with Backend(handler) as backend, ExitStack() as stack:
        file = File(tmp_path, backend=backend.address, idle_timeout=f"{TIMEOUT}s")
        daemon = stack.enter_context(file.rspd())
        clients = [stack.enter_context(daemon.connect()) for _ in range(CLIENTS)]
        for client in clients:
            client.sendall(b"hello")
        for client in clients:
            assert receive(client, 5) == b"hello"
        with frozen(daemon):
            for sock in clients if spoke_last == "client" else backend_sockets:
                sock.sendall(b"still here?")
        for client in clients:
            assert receive(client, 11) == b"still here?"
        assert not daemon.find("cause=idle-timeout")


@contextmanager
def no_room() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listener whose backlog is full, and the client that fills it: once accepted, the kernel lets the next in."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        with socket.create_connection(listener.getsockname()) as in_the_way:
            yield listener, in_the_way


def accept_next(listener: socket.socket) -> socket.socket:
    """Make room, and accept who waited for it: SYN is sent again by the kernel, after a second at first."""
    listener.settimeout(PATIENCE)
    listener.accept()[0].close()
    sock, _ = listener.accept()
    sock.settimeout(PATIENCE)
    return sock


def test_a_backend_that_is_reached_during_a_freeze_is_no_connect_timeout(tmp_path: Path) -> None:
    with no_room() as (listener, _), ExitStack() as stack:
        port = listener.getsockname()[1]
        file = File(tmp_path, backend=f"127.0.0.1:{port}", connect_timeout=f"{TIMEOUT}s")
        daemon = stack.enter_context(file.rspd())
        client = stack.enter_context(daemon.connect())
        eventually(lambda: connections(daemon, port) == 1)
        with frozen(daemon):
            backend = stack.enter_context(accept_next(listener))
        backend.sendall(b"welcome")
        backend.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"welcome"


@pytest.mark.parametrize("question", [{}, {"send": "PING", "expect": "PONG"}], ids=["connects", "asks"])
def test_a_backend_that_is_reached_by_its_check_during_a_freeze_is_up(tmp_path: Path, question: dict[str, str]) -> None:
    health = {"interval": "1h", "timeout": f"{TIMEOUT}s", **question}
    with no_room() as (listener, _), ExitStack() as stack:
        port = listener.getsockname()[1]
        file = File(tmp_path, backend=f"127.0.0.1:{port}", health=health)
        daemon = stack.enter_context(file.rspd())
        eventually(lambda: connections(daemon, port) == 1)
        with frozen(daemon):
            backend = stack.enter_context(accept_next(listener))
        if question:
            assert receive(backend, 4) == b"PING"
            eventually(lambda: state(daemon) == "S")  # it has looked for the answer, and waits
            backend.sendall(b"PONG")
        assert backend.recv(1) == b""
        with daemon.connect():
            listener.accept()[0].close()
        daemon.wait_for_ends(1)
        assert not daemon.find("backend down")


def test_a_client_that_waited_in_the_backlog_during_a_freeze_is_served(tmp_path: Path) -> None:
    with Backend(stays("A")) as backend, ExitStack() as stack:
        daemon = stack.enter_context(File(tmp_path, backend=backend.address, idle_timeout=f"{TIMEOUT}s").rspd())
        with frozen(daemon):
            client = stack.enter_context(daemon.connect())
        assert client.recv(1) == b"A"
