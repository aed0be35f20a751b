"""Bytes through rspd as a process."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import (
    PATIENCE,
    Backend,
    abstract_name,
    answer,
    echo,
    eventually,
    free_port,
    receive_all,
    rspd,
    send_and_close,
)

BLOCK = os.urandom(1 << 20)


def send_hashed(sock: socket.socket, size: int) -> str:
    """Send so many bytes, each block different; their hash."""
    digest = hashlib.sha1()
    for number in range(-(-size // len(BLOCK))):
        block = number.to_bytes(8, "big") + BLOCK[8 : min(len(BLOCK), size - number * len(BLOCK))]
        digest.update(block)
        sock.sendall(block)
    return digest.hexdigest()


def receive_hashed(sock: socket.socket) -> tuple[int, str]:
    """Receive up to the end; how many bytes, and their hash."""
    digest, size, buffer = hashlib.sha1(), 0, bytearray(1 << 20)
    while count := sock.recv_into(buffer):
        size += count
        digest.update(memoryview(buffer)[:count])
    return size, digest.hexdigest()


def test_a_response_of_2_gb_arrives_whole_and_costs_no_memory() -> None:
    size = 2_000_000_000
    hashes: list[str] = []
    with Backend(lambda sock: hashes.append(send_hashed(sock, size))) as backend, rspd("-b", backend.address) as daemon:
        before = daemon.memory()
        with daemon.connect() as client:
            received = receive_hashed(client)
        assert received == (size, hashes[0])
        daemon.wait_for_ends(1)
        assert daemon.memory() - before < 4_000_000


def test_an_upload_of_200_mb_arrives_whole() -> None:
    size = 200_000_000
    received: list[tuple[int, str]] = []

    def handler(sock: socket.socket) -> None:
        received.append(receive_hashed(sock))
        sock.sendall(b"thanks")

    with Backend(handler) as backend, rspd("-b", backend.address) as daemon, daemon.connect() as client:
        sent = send_hashed(client, size)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"thanks"
        assert received == [(size, sent)]
        (end,) = daemon.wait_for_ends(1)
        assert (end["sent"], end["received"], end["cause"]) == (str(size), "6", "client-closed")


def test_both_directions_run_at_once() -> None:
    size = 100_000_000
    at_backend: list[tuple[str, tuple[int, str]]] = []

    def exchange(sock: socket.socket) -> tuple[str, tuple[int, str]]:
        sent: list[str] = []

        def send() -> None:
            sent.append(send_hashed(sock, size))
            sock.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        received = receive_hashed(sock)
        thread.join(PATIENCE)
        return sent[0], received

    with (
        Backend(lambda sock: at_backend.append(exchange(sock))) as backend,
        rspd("-b", backend.address) as daemon,
        daemon.connect() as client,
    ):
        sent, received = exchange(client)
        daemon.wait_for_ends(1)
        eventually(lambda: at_backend or backend.errors)  # it may have to read on
    assert at_backend == [(received[1], (size, sent))], backend.errors
    assert received[0] == size


def test_single_bytes_pass_one_by_one_without_delay() -> None:
    """Without TCP_NODELAY at both ends of each hop, a byte would wait 40 ms for the acknowledgement of the last."""
    count = 300
    with Backend(echo) as backend, rspd("-b", backend.address) as daemon, daemon.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.monotonic()
        for _ in range(count):
            # Two writes, one answer: the pattern that Nagle's algorithm delays.
            client.send(b"a")
            client.send(b"b")
            got = b""
            while len(got) < 2:
                got += client.recv(2)
            assert got == b"ab"
        assert time.monotonic() - started < count * 0.04 / 2


def test_a_small_exchange_goes_on_while_another_client_downloads() -> None:
    stop = threading.Event()

    def handler(sock: socket.socket) -> None:
        if sock.recv(1) == b"d":
            try:
                while not stop.is_set():
                    sock.sendall(BLOCK)
            except OSError:
                pass
        else:
            echo(sock)

    with (
        Backend(handler) as backend,
        rspd("-b", backend.address, "--max-connections", "2") as daemon,
        daemon.connect() as greedy,
        daemon.connect() as modest,
    ):
        greedy.sendall(b"d")
        reader = threading.Thread(target=receive_hashed, args=(greedy,))
        reader.start()
        modest.sendall(b"e")
        waits = []
        for _ in range(100):
            started = time.monotonic()
            modest.sendall(b"ping")
            assert modest.recv(4) == b"ping"
            waits.append(time.monotonic() - started)
        stop.set()
        reader.join(PATIENCE)
        assert sorted(waits)[50] < 0.1


def test_unix_sockets_at_both_ends(tmp_path: object) -> None:
    front, back = f"{tmp_path}/front.sock", f"{tmp_path}/back.sock"
    data = BLOCK * 20
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(back)
        listener.listen()
        with rspd("-b", back, listen=(front,)) as daemon, socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(front)
            backend, _ = listener.accept()
            sender = threading.Thread(target=send_and_close, args=(backend, data))
            sender.start()
            assert receive_all(client) == data
            sender.join(PATIENCE)
            client.close()
            (end,) = daemon.wait_for_ends(1)
            assert (end["client"], end["backend"]) == ("unix", back)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("{}/x backend=10.0.0.1:80 cause=client-closed", '"{}/x backend=10.0.0.1:80 cause=client-closed"'),
        ('{}/"\n', '"{}/\\"\\n"'),
        ("\0{}", '"@{}"'),
    ],
    ids=["keys", "quotes", "abstract"],
)
def test_the_path_of_a_unix_client_forges_nothing_in_the_log(path: str, shown: str) -> None:
    with tempfile.TemporaryDirectory() as folder, Backend(answer) as backend:  # a short name, which a path needs
        with rspd("-b", backend.address, listen=(f"{folder}/s",)) as daemon, socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.bind(path.format(folder))
            client.connect(f"{folder}/s")
            client.sendall(b"?")
            assert receive_all(client) == b"ok"
            client.close()
            (line,) = daemon.wait_for("connection closed")
        assert f"INFO    connection closed client={shown.format(folder)} backend={backend.address} sent=1 " in line


def without_half_close(folder: Path) -> tuple[str, str]:
    file = folder / "rspd.yaml"
    file.write_text("half_close: off\n")
    return "-c", str(file)


def test_without_half_close_a_long_answer_that_the_backend_ends_arrives_whole_while_the_client_sends(
    tmp_path: Path,
) -> None:
    size = 20_000_000
    hashes: list[str] = []

    def respond(sock: socket.socket) -> None:
        hashes.append(send_hashed(sock, size))
        sock.shutdown(socket.SHUT_WR)
        receive_hashed(sock)

    def flood(sock: socket.socket) -> None:
        with suppress(OSError):
            while True:
                sock.sendall(BLOCK)

    options = *without_half_close(tmp_path), "--max-connections", "1"
    with Backend(respond) as backend, rspd("-b", backend.address, *options) as daemon, daemon.connect() as client:
        sender = threading.Thread(target=flood, args=(client,))
        sender.start()
        received = receive_hashed(client)
        assert received == (size, hashes[0])
        (end,) = daemon.wait_for_ends(1)
        assert (end["received"], end["cause"], end.get("lost")) == (str(size), "backend-closed", None)
        sender.join(PATIENCE)
        assert not sender.is_alive()


def test_without_half_close_a_client_that_keeps_its_connection_open_is_let_go_when_the_backend_ends(
    tmp_path: Path,
) -> None:
    """As with HTTP and `Connection: close`: the only place is free again, and no descriptor is left."""
    with Backend(answer) as backend, rspd("-b", backend.address, *without_half_close(tmp_path)) as daemon:
        for number in range(20):
            with daemon.connect() as client:
                client.sendall(b"?")
                assert receive_all(client) == b"ok"
                ends = daemon.wait_for_ends(number + 1)
                assert [end["cause"] for end in ends] == ["backend-closed"] * (number + 1)
            if not number:
                before = daemon.descriptors()
        assert daemon.descriptors() == before


def test_an_abstract_name_and_a_host_name_work_as_addresses() -> None:
    name = abstract_name()
    with Backend(echo) as backend, rspd("-b", f"localhost:{backend.port}", listen=(f"@{name}",)):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(f"\0{name}")
            client.sendall(b"hello")
            assert client.recv(10) == b"hello"


def test_a_bare_port_listens_on_every_address_of_both_families() -> None:
    port = free_port()
    with Backend(echo) as backend, rspd("-b", backend.address, listen=(str(port),)) as daemon:
        daemon.wait_for("listening address=", 2)
        for host in ("127.0.0.1", "127.0.0.2", "::1"):
            with socket.create_connection((host, port), PATIENCE) as client:
                client.sendall(b"hello")
                assert client.recv(10) == b"hello"
