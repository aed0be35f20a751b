"""One at a time, or so many, in the order of arrival."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.manager import service
from tests.support import PATIENCE, Backend, Daemon, answer, echo, eventually, receive_all, rspd, skip_for_kernel


def ask(daemon: Daemon, got: list[float], started: float) -> socket.socket:
    """A client that has sent its request; `got` hears when the answer came."""
    client = daemon.connect()
    client.sendall(b"?")

    def wait() -> None:
        assert client.recv(2) == b"ok"
        got.append(time.monotonic() - started)
        client.close()

    threading.Thread(target=wait, daemon=True).start()
    return client


def answer_all(sock: socket.socket) -> None:
    """A handler that answers each request of a client that stays."""
    while sock.recv(1):
        sock.sendall(b"ok")


@contextmanager
def frozen(daemon: Daemon) -> Iterator[None]:
    """Whoever connects meanwhile has come at once, as rspd sees it, however long it takes."""
    daemon.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.signal(signal.SIGCONT)


@pytest.mark.parametrize(("limit", "seconds"), [(1, 4.0), (4, 1.0)])
def test_four_clients_of_a_backend_that_takes_a_second(limit: int, seconds: float) -> None:
    served, at_once = list[socket.socket](), list[int]()
    all_there = threading.Barrier(limit, timeout=PATIENCE)

    def slow(sock: socket.socket) -> None:
        served.append(sock)
        at_once.append(len(served))
        sock.recv(1)
        all_there.wait()
        time.sleep(1)
        served.remove(sock)
        sock.sendall(b"ok")

    with Backend(slow) as backend, rspd("-b", backend.address, "--max-connections", str(limit)) as daemon:
        started, got = time.monotonic(), list[float]()
        ports = [ask(daemon, got, started).getsockname()[1] for _ in range(4)]
        ends = daemon.wait_for_ends(4)
        eventually(lambda: len(got) == 4)
        assert max(got) >= seconds
        assert max(at_once) == limit
        if limit == 1:
            assert [int(end["client"].rpartition(":")[2]) for end in ends] == ports, "not in the order of arrival"


def test_no_more_than_max_connections_are_served_and_the_others_wait_in_order() -> None:
    with Backend(echo) as backend, rspd("-b", backend.address, "--max-connections", "3") as daemon:
        clients = [daemon.connect() for _ in range(8)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        for number, client in enumerate(clients):
            assert client.recv(10) == b"%d" % number
            assert backend.accepted <= number + 3
            client.close()
        assert len(daemon.wait_for_ends(8)) == 8


def test_serially_a_client_that_says_nothing_holds_the_others_until_its_idle_timeout(tmp_path: object) -> None:
    with Backend(answer) as backend:
        config = f"{tmp_path}/rspd.yaml"
        with open(config, "w") as file:
            file.write(f"backend: {backend.address}\nidle_timeout: 1s\n")
        with rspd("-c", config) as daemon:
            silent, polite = daemon.connect(), daemon.connect()
            polite.sendall(b"?")
            assert receive_all(polite) == b"ok"
            silent.close()
            polite.close()
            assert daemon.wait_for_ends(2)[0]["cause"] == "idle-timeout"


def test_clients_that_wait_for_a_client_that_stays_are_told_of_in_the_log_and_in_the_status() -> None:
    with Backend(answer_all) as backend, service("-b", backend.address, listen=["127.0.0.1:0"]) as daemon:
        status = ", {} served, backend " + re.escape(backend.address)
        with daemon.connect() as stays:
            stays.sendall(b"?")
            assert stays.recv(2) == b"ok"
            with frozen(daemon):
                waiting = [daemon.connect() for _ in range(3)]
            for client in waiting:
                client.sendall(b"?")
            (line,) = daemon.wait_for("all places taken")
            assert line.endswith("WARNING all places taken, clients wait max_connections=1 waiting=3")
            daemon.notify.wait_for_status("serving 1 of 1, 3 waiting" + status.format(1))
            waiting.append(daemon.connect())
            daemon.notify.wait_for_status("serving 1 of 1, 4 waiting" + status.format(1))
        for client in waiting[:3]:
            assert client.recv(2) == b"ok"
            client.close()
        daemon.notify.wait_for_status("serving 1 of 1" + status.format(5))
        waiting[3].close()
        daemon.notify.wait_for_status("serving 0 of 1" + status.format(5))
        (line,) = daemon.wait_for("no longer wait")
        assert re.search(r"INFO    clients no longer wait for a place max_connections=1 seconds=\d+\.\d{3}$", line)
        assert len(daemon.find("all places taken")) == 1


def test_two_listeners_take_turns_when_both_are_busy() -> None:
    with Backend(answer) as backend, rspd("-b", backend.address, listen=("127.0.0.1:0", "127.0.0.2:0")) as daemon:
        places = [line.rpartition("=")[2].split(":") for line in daemon.wait_for("listening address=", 2)]
        with daemon.connect():
            # While it is served, both backlogs fill, that of the first listener before the other's.
            eventually(lambda: backend.accepted)
            clients = [
                # From the address that it goes to: two clients of different listeners may have one port.
                socket.create_connection((host, int(port)), PATIENCE, source_address=(host, 0))
                for host, port in places
                for _ in range(5)
            ]
            for client in clients:
                client.sendall(b"?")
        arrived_at = {"{}:{}".format(*client.getsockname()): client.getpeername() for client in clients}
        for client in clients:
            threading.Thread(target=lambda client=client: (receive_all(client), client.close()), daemon=True).start()
        ends = daemon.wait_for_ends(11)[1:]
        served = [arrived_at[end["client"]] for end in ends]
        assert all(one != other for one, other in pairwise(served)), served


def test_hundreds_of_clients_that_come_at_once_have_a_place_in_the_backlog() -> None:
    limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
    if limit < 600:
        skip_for_kernel(f"net.core.somaxconn is {limit}")
    with Backend(echo) as backend, rspd("-b", backend.address) as daemon, ExitStack() as stack:
        first = stack.enter_context(daemon.connect())
        first.sendall(b"x")
        assert first.recv(1) == b"x"
        with frozen(daemon):
            for _ in range(500):
                stack.enter_context(daemon.connect())
        daemon.wait_for("all places taken, clients wait max_connections=1 waiting=500")


def test_a_queue_that_moves_on_is_in_the_status_and_not_in_the_log() -> None:
    def soon(sock: socket.socket) -> None:
        if sock.recv(1):
            time.sleep(0.2)
            sock.sendall(b"ok")

    with Backend(soon) as backend, service("-b", backend.address, listen=["127.0.0.1:0"]) as daemon:
        with frozen(daemon):
            for _ in range(20):
                ask(daemon, [], 0.0)
        daemon.notify.wait_for_status(r"serving 1 of 1, \d+ waiting, \d+ served, .*")
        daemon.wait_for_ends(20)
        assert not daemon.find("all places taken")
