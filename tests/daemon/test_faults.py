"""Peers that fail, and rspd that goes on serving."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time

import pytest

from rspd.engine.pipes import PIPE_SIZE
from tests.support import (
    PATIENCE,
    Backend,
    Daemon,
    answer,
    can_trace,
    echo,
    eventually,
    fill,
    free_port,
    full_tcp,
    receive_all,
    reset,
    rspd,
)


def configured(tmp_path: object, **settings: object) -> tuple[str, str]:
    """Options for a configuration file with these settings."""
    path = f"{tmp_path}/rspd.yaml"
    with open(path, "w") as file:
        file.writelines(f"{key}: {value}\n" for key, value in settings.items())
    return "-c", path


def served(daemon: Daemon) -> bool:
    """Whether a client gets its answer."""
    with daemon.connect() as client:
        client.sendall(b"?")
        try:
            return receive_all(client) == b"ok"
        except ConnectionResetError:
            return False


def test_a_client_that_vanishes_in_the_middle_of_an_answer_frees_the_place_for_the_next() -> None:
    size = 11_000_000

    def handler(sock: socket.socket) -> None:
        if sock.recv(1) == b"d":
            sock.sendall(os.urandom(size))
        else:
            sock.sendall(b"ok")

    with Backend(handler) as backend, rspd("-b", backend.address) as daemon:
        client = daemon.connect()
        client.sendall(b"d")
        assert len(client.recv(100_000)) > 0
        started = time.monotonic()
        client.close()  # with bytes unread, so that the kernel sends RST
        assert served(daemon)
        assert time.monotonic() - started < 10  # half_close_timeout is 30 s
        first, second = daemon.wait_for_ends(2)
        assert first["cause"] == "client-aborted"
        assert 0 < int(first["received"]) < size
        assert second["cause"] in ("client-closed", "backend-closed")


def test_a_backend_that_is_down_costs_its_clients_and_nobody_later() -> None:
    port = free_port()
    with rspd("-b", f"127.0.0.1:{port}") as daemon:
        for _ in range(3):
            assert not served(daemon)
        warnings = daemon.wait_for("WARNING.*connection closed", 3)
        assert all('cause=backend-refused reason="127.0.0.1:' in line for line in warnings)
        assert "Connection refused" in warnings[0]
        [down] = daemon.find("backend down")
        assert down.endswith(f'backend=127.0.0.1:{port} reason="Connection refused"')
        with Backend(answer, port=port):
            assert served(daemon)
            daemon.wait_for(rf"backend up backend=127.0.0.1:{port} seconds=\d+\.\d{{3}}$")
        assert not served(daemon)
        daemon.wait_for("backend down", 2)


def test_a_backend_that_never_accepts_ends_in_the_connect_timeout_and_not_later(tmp_path: object) -> None:
    with full_tcp() as address, rspd(*configured(tmp_path, backend=address, connect_timeout="500ms")) as daemon:
        with daemon.connect() as client:
            assert receive_all(client) == b""
        (end,) = daemon.wait_for_ends(1)
        assert end["cause"] == "connect-timeout"
        assert 0.5 <= float(end["seconds"]) < 4  # by default, 5 s


def test_an_unknown_backend_name_is_a_warning_and_not_the_end() -> None:
    with rspd("-b", "nowhere.invalid:80") as daemon:
        for _ in range(2):
            with daemon.connect() as client:
                assert receive_all(client) == b""
        for end in daemon.wait_for_ends(2):
            assert end["cause"] == "backend-unknown"
            assert end["backend"] == "-"


def test_a_client_that_resets_while_its_backend_is_dialled_is_given_up(tmp_path: object) -> None:
    with full_tcp() as address, rspd(*configured(tmp_path, backend=address, connect_timeout="20s")) as daemon:
        reset(daemon.connect())
        (end,) = daemon.wait_for_ends(1)
        assert end["cause"] == "client-aborted"
        assert float(end["seconds"]) < 5


def test_a_backend_that_resets_at_once_resets_the_client() -> None:
    with Backend(reset) as backend, rspd("-b", backend.address) as daemon:
        with pytest.raises(ConnectionResetError):
            with daemon.connect() as client:
                receive_all(client)
        assert daemon.wait_for_ends(1)[0]["cause"] == "backend-aborted"


def test_a_backend_that_speaks_first_is_heard_by_a_silent_client() -> None:
    with Backend(lambda sock: sock.sendall(b"220 ready")) as backend, rspd("-b", backend.address) as daemon:
        with daemon.connect() as client:
            assert receive_all(client) == b"220 ready"


def test_a_connection_without_a_byte_leaves_the_next_one_served() -> None:
    with Backend(answer) as backend, rspd("-b", backend.address) as daemon:
        daemon.connect().close()
        assert served(daemon)
        first, _ = daemon.wait_for_ends(2)
        assert (first["sent"], first["received"]) == ("0", "0")


def test_an_answer_that_takes_two_seconds_reaches_a_client_that_has_half_closed() -> None:
    def handler(sock: socket.socket) -> None:
        request = receive_all(sock)
        time.sleep(2)
        sock.sendall(request.upper())

    with Backend(handler) as backend, rspd("-b", backend.address) as daemon, daemon.connect() as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"QUESTION"
        (end,) = daemon.wait_for_ends(1)
        assert end["cause"] == "client-closed"
        assert 2 <= float(end["seconds"]) < 5


@pytest.mark.parametrize("reader", ["client", "backend"])
def test_a_peer_that_reads_nothing_is_ended_and_the_next_one_served(tmp_path: object, reader: str) -> None:
    ended = threading.Event()

    def handler(sock: socket.socket) -> None:
        what = sock.recv(1)
        if what == b"d":
            fill(sock)
            sock.recv(1)
        elif what == b"u":
            ended.wait(PATIENCE)
        else:
            sock.sendall(b"ok")

    with (
        Backend(handler) as backend,
        rspd(*configured(tmp_path, backend=backend.address, idle_timeout="1s")) as daemon,
    ):
        with daemon.connect() as client:
            if reader == "client":
                client.sendall(b"d")
                daemon.wait_for_ends(1)
            else:
                client.sendall(b"u")
                fill(client)
                daemon.wait_for_ends(1)
        ended.set()
        assert served(daemon)
        assert daemon.wait_for_ends(2)[0]["cause"] == "idle-timeout"


@pytest.mark.parametrize("cause", ["idle-timeout", "half-close-timeout", "backend-aborted", "drain-timeout"])
def test_bytes_that_a_reset_destroys_are_a_warning_and_counted(tmp_path: object, cause: str) -> None:
    idle = "500ms" if cause == "idle-timeout" else "10m"
    options = configured(tmp_path, idle_timeout=idle, half_close_timeout="500ms", drain_timeout="1ms")
    over = threading.Event()

    def handler(sock: socket.socket) -> None:
        fill(sock)
        if cause == "backend-aborted":
            reset(sock)
        elif cause == "drain-timeout":
            daemon.signal(signal.SIGTERM)
        elif cause == "half-close-timeout":
            client.shutdown(socket.SHUT_WR)
        over.wait(PATIENCE)

    with Backend(handler) as backend, rspd(*options, "-b", backend.address) as daemon, daemon.connect() as client:
        (line,) = daemon.wait_for("connection closed")
        over.set()
        got = 0
        with pytest.raises(ConnectionResetError):
            while data := client.recv(1 << 20):
                got += len(data)
        (end,) = daemon.wait_for_ends(1)
    assert " WARNING connection closed " in line
    assert re.search(rf" cause={cause} lost=\d+$", line), line
    # What rspd held, a pipe at most, had not come to the client's socket yet.
    assert 0 <= int(end["lost"]) - (int(end["received"]) - got) <= PIPE_SIZE


def test_a_client_that_aborts_its_own_download_is_no_warning() -> None:
    with Backend(fill) as backend, rspd("-b", backend.address) as daemon:
        client = daemon.connect()
        assert client.recv(1)
        reset(client)
        (line,) = daemon.wait_for("connection closed")
    assert " INFO " in line
    assert line.endswith("cause=client-aborted")


# What strace(1) makes fail. What is not to be spliced is copied.
COPY = "splice:error=EINVAL"


@pytest.mark.parametrize(
    "faults",
    [
        ["splice:error=ENOMEM:when=2+3"],
        [COPY, "sendto:error=ENOBUFS:when=2+3"],
        [COPY, "recvfrom:error=ENOMEM:when=3"],
    ],
    ids=["splice", "send", "receive"],
)
def test_want_of_memory_in_the_kernel_costs_no_bytes(faults: list[str]) -> None:
    can_trace()
    data = os.urandom(10_000_000)
    tracer = ["strace", "-D", "-f", "-q", "-o", os.devnull]
    for fault in faults:
        tracer += ["-e", f"inject={fault}"]
    with Backend(lambda sock: sock.sendall(data)) as backend, rspd("-b", backend.address, launcher=tracer) as daemon:
        with daemon.connect() as client:
            assert receive_all(client) == data
        assert daemon.wait_for_ends(1)[0]["cause"] == "backend-closed"


def test_want_of_memory_in_the_kernel_does_not_make_rspd_deaf_to_signals() -> None:
    can_trace()
    # With no client, the first socket that is read is the one through which signals wake the loop.
    tracer = ["strace", "-D", "-f", "-q", "-o", os.devnull, "-e", "inject=recvfrom:error=ENOMEM:when=1"]
    with rspd("-b", "127.0.0.1:1", launcher=tracer) as daemon:
        assert daemon.stop() == 0
    assert not daemon.find("ERROR")


def test_requests_that_come_while_the_backend_restarts_are_served_once_it_is_back() -> None:
    port = free_port()
    with rspd("-b", f"127.0.0.1:{port}") as daemon:
        results: list[bool] = []
        with Backend(answer, port=port):
            results.append(served(daemon))
        results.append(served(daemon))
        with Backend(answer, port=port):
            results.append(served(daemon))
        assert results == [True, False, True]


def test_garbage_and_floods_harm_nobody_else() -> None:
    def flood(daemon: Daemon) -> None:
        for number in range(100):
            client = daemon.connect()
            client.sendall(os.urandom(1000))
            if number % 3 == 0:
                reset(client)
            else:
                client.close()

    with Backend(echo) as backend, rspd("-b", backend.address, "--max-connections", "4") as daemon:
        threads = [threading.Thread(target=flood, args=(daemon,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            with daemon.connect() as client:
                client.sendall(b"hello")
                assert client.recv(10) == b"hello"
        for thread in threads:
            thread.join(PATIENCE)
        daemon.wait_for_ends(320)


def test_an_unexpected_error_ends_that_connection_and_is_logged_with_its_traceback(tmp_path: object) -> None:
    """rspd cannot be made to fail from outside, so this one is started with a fault built in."""
    fault = f"{tmp_path}/sitecustomize.py"
    with open(fault, "w") as file:
        file.write(
            "from rspd.engine import relay\n"
            "run = relay.Relay.run\n"
            "def faulty(self):\n"
            "    relay.Relay.run = run\n"
            "    raise RuntimeError('built in')\n"
            "relay.Relay.run = faulty\n"
        )
    with Backend(answer) as backend:
        daemon = Daemon("-l", "127.0.0.1:0", "-b", backend.address, env={"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"})
        try:
            with pytest.raises(ConnectionResetError):  # perhaps while it connects
                with daemon.connect() as client:
                    receive_all(client)
            daemon.wait_for("RuntimeError: built in")
            assert daemon.wait_for_ends(1)[0]["cause"] == "error"
            with daemon.connect() as client:
                client.sendall(b"?")
                assert receive_all(client) == b"ok"
            assert daemon.stop() == 0
        finally:
            daemon.kill()


def test_idle_connections_cost_no_cpu_time() -> None:
    with Backend(echo) as backend, rspd("-b", backend.address, "--max-connections", "100") as daemon:
        clients = [daemon.connect() for _ in range(100)]
        eventually(lambda: backend.accepted == 100)
        before = daemon.cpu_seconds()
        time.sleep(1)
        assert daemon.cpu_seconds() - before < 0.05
        for client in clients:
            client.close()
        daemon.wait_for_ends(100)


def test_timeouts_of_months_or_off_work_like_any_other(tmp_path: object) -> None:
    settings = {"idle_timeout": "9000h", "half_close_timeout": "off", "connect_timeout": "100000h"}
    with Backend(answer) as backend, rspd(*configured(tmp_path, backend=backend.address, **settings)) as daemon:
        assert served(daemon)
        assert served(daemon)


def test_without_an_idle_timeout_keepalive_finds_lost_peers(tmp_path: object) -> None:
    def has_timer(near: int, far: int) -> bool:
        """Whether the socket between these two ports has a keepalive timer running (proc(5))."""
        with open("/proc/net/tcp") as file:
            rows = [line.split() for line in file]
        ends = f":{near:04X}", f":{far:04X}"
        return any((row[1][-5:], row[2][-5:]) == ends and row[5].startswith("02:") for row in rows)

    ports: list[int] = []

    def handler(sock: socket.socket) -> None:
        ports.append(sock.getpeername()[1])
        echo(sock)

    with Backend(handler) as backend:
        with rspd(*configured(tmp_path, backend=backend.address, idle_timeout="off")) as daemon:
            with daemon.connect() as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                eventually(lambda: has_timer(ports[0], backend.port), "no keepalive for the backend")
                eventually(lambda: has_timer(daemon.port, client.getsockname()[1]), "no keepalive for the client")
