"""A restart of the service does not have the faults for which PgBouncer gave its own handover up.

PgBouncer named seven reasons (its pull requests #894 and #1581). There is a test for each but two:
- TLS connections are lost: rspd has none of its own. Those of its clients are bytes like others.
- It does not work well with systemd: tests/handover/test_pgbouncer.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import stat
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.daemon.test_handover import MUCH, fixed, pipes
from tests.daemon.test_transfer import receive_hashed, send_hashed
from tests.fleet import File, Load, backends, stays, talks
from tests.keeper import Manager, managed
from tests.support import PATIENCE, Backend, echo, eventually, free_port, receive_all

# Lines of the log that somebody has to look at.
TROUBLE = "WARNING|ERROR|CRITICAL|Traceback|^<[0-4]>"

RESTARTS = 3


def connect(where: str, timeout: float = PATIENCE) -> socket.socket:
    """A client that comes to HOST:PORT, or to a path."""
    if where.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        sock.connect(where)
        return sock
    host, _, port = where.rpartition(":")
    return socket.create_connection((host, int(port)), timeout)


def enter(where: str, name: str, stack: ExitStack) -> socket.socket:
    """A client that is served by the backend of this name, which `stays`."""
    client = stack.enter_context(connect(where))
    assert client.recv(1) == name.encode()
    return client


# Some state is not copied


def test_all_state_is_copied(tmp_path: Path) -> None:
    web, db = fixed(), fixed()
    answer_now = threading.Event()

    def answer_late(sock: socket.socket) -> None:
        assert receive_all(sock) == b"question"
        assert answer_now.wait(4 * PATIENCE)
        sock.sendall(b"answer")

    def come(host: str, port: int) -> socket.socket:
        client = stack.enter_context(connect(web))
        client.sendall(f"PROXY TCP4 {host} 192.0.2.9 {port} 80\r\n".encode())
        return client

    with Backend(stays("a")) as one, Backend(answer_late) as late, ExitStack() as stack:
        keys = {
            "listen": web,
            "backends": [f"127.0.0.1:{free_port()}", {"address": one.address, "max_connections": 3}],
            "fail_timeout": "1h",
            "max_fails": 1,
            "accept_proxy": "127.0.0.1",
            "max_connections_per_client": 2,
            "queue_timeout": "1ms",
            "max_connections": 10,
        }
        second = {"listen": db, "backend": late.address, "max_connections": 1}
        file = File(tmp_path, listen=None, max_connections=None, proxies={"web": keys, "db": second})
        service = stack.enter_context(managed("-c", str(file.path)))
        clients = {}
        for host, port in [("192.0.2.1", 1), ("192.0.2.1", 2), ("192.0.2.7", 3)]:
            clients[f"{host}:{port}"] = client = come(host, port)
            assert client.recv(1) == b"a"
        half = stack.enter_context(connect(db))
        half.sendall(b"question")
        half.shutdown(socket.SHUT_WR)
        eventually(lambda: late.accepted)
        waiting = stack.enter_context(connect(db))
        waiting.sendall(b"question")
        waiting.shutdown(socket.SHUT_WR)
        expected = "4 served; web serving 3 of 10, 1 of 2 backends up (.*); db serving 1 of 1, 1 waiting, .*"
        (known,) = {message.status for message in service.store.wait_for_status(expected)}
        for number in range(RESTARTS):
            service.restart()
            # Who has found no backend was served, in a way.
            status = f"{4 + number}{known[1:]}; took over 4 connections"
            eventually(lambda status=status: service.store.status == status, status)  # type: ignore[misc]
            assert all(talks(client) for client in clients.values())
            assert is_turned_away(come("192.0.2.1", 4)), "the client has as many as it may"
            assert is_turned_away(come("192.0.2.8", 5)), "the backend that is up is full"
            assert not service.daemon.find("backend (up|down)"), "nothing is new"
        answer_now.set()
        assert receive_all(half) == receive_all(waiting) == b"answer"
        for client in clients.values():
            client.close()
        ends = {end["client"]: end for end in service.daemon.wait_for_ends(5) if end["cause"] == "client-closed"}
        said = str(5 * RESTARTS)
        for name in clients:
            end = ends[name]
            assert end["via"].startswith("127.0.0.1:")
            assert (end["proxy"], end["backend"], end["handovers"]) == ("web", one.address, str(RESTARTS))
            assert (end["sent"], end["received"]) == (said, str(5 * RESTARTS + 1))


def is_turned_away(client: socket.socket) -> bool:
    """Whether a client gets nothing."""
    try:
        return receive_all(client) == b""
    except ConnectionResetError:
        return True


# Data in buffers is lost


@pytest.mark.large_pipes(4)
def test_no_data_in_buffers_is_lost() -> None:
    """Bytes are in the kernel, in pipes and in the memory of rspd, in both directions, whenever it is restarted."""
    size, block, blocks, count = MUCH // 8, os.urandom(16_000), 60, 4
    go_on = threading.Event()
    at_backend: dict[bytes, tuple[str, tuple[int, str]]] = {}
    small: list[socket.socket] = []

    def handle(sock: socket.socket) -> None:
        name = sock.recv(2, socket.MSG_WAITALL)
        if name == b"ec":
            echo(sock)
        elif name == b"sm":  # what it gets is too little for a pipe
            small.append(sock)
            assert go_on.wait(4 * PATIENCE)
            at_backend[name] = "", receive_hashed(sock)
        else:
            at_backend[name] = exchange(sock, size, go_on)

    with Backend(handle) as backend, TemporaryDirectory() as folder, ExitStack() as stack:
        where, path = fixed(), f"{folder}/s"
        options = ["-l", where, "-l", path, "-b", backend.address, "--max-connections", "100"]
        service = stack.enter_context(managed(*options))
        other, held = (stack.enter_context(connect(place)) for place in (where, path))
        other.sendall(b"ec")
        held.sendall(b"sm")
        assert talks(other)
        none = pipes(service.daemon)
        results: dict[bytes, tuple[str, tuple[int, str]]] = {}
        threads = [
            threading.Thread(target=bulk, args=(connect(where), b"%02d" % number, size, go_on, results))
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: small)
        for _ in range(blocks):
            small[0].sendall(block)
            assert talks(other)  # so rspd has passed the block on, as far as there is room
        eventually(lambda: pipes(service.daemon) > none, "bytes are in pipes")
        for _ in range(RESTARTS):
            service.stop()
            assert bytes_in_document(service) > 0
            service.start()
        go_on.set()
        held.shutdown(socket.SHUT_WR)
        whole = receive_all(held)
        assert hashlib.sha1(whole).digest() == hashlib.sha1(block * blocks).digest()
        for thread in threads:
            thread.join(PATIENCE)
        eventually(lambda: len(at_backend) == count + 1)
        for name, (sent, received) in results.items():
            assert (size, sent) == at_backend[name][1]
            assert (size, at_backend[name][0]) == received
        assert len(results) == count
        assert not backend.errors


def exchange(sock: socket.socket, size: int, go_on: threading.Event) -> tuple[str, tuple[int, str]]:
    """Send so many bytes; receive nothing until `go_on`, then all. The hash of what was sent, and what came."""
    sent: list[str] = []

    def send() -> None:
        sent.append(send_hashed(sock, size))
        sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    assert go_on.wait(4 * PATIENCE)
    received = receive_hashed(sock)
    thread.join(PATIENCE)
    return sent[0], received


def bulk(
    sock: socket.socket,
    name: bytes,
    size: int,
    go_on: threading.Event,
    results: dict[bytes, tuple[str, tuple[int, str]]],
) -> None:
    """What a client does in its thread."""
    with sock:
        sock.settimeout(4 * PATIENCE)
        sock.sendall(name)
        results[name] = exchange(sock, size, go_on)


def bytes_in_document(service: Manager) -> int:
    """How many bytes of clients and backends the process that has ended has left, as the first line says."""
    for name, stored in service.store.kept:
        if name == "rspd+parcel" and stat.S_ISREG(os.fstat(stored.fileno()).st_mode):
            return int(os.pread(stored.fileno(), 100, 0).split(b"\n")[0].split()[2])
    raise AssertionError("it has left nothing")


# There are warnings afterwards


def test_there_are_no_warnings_afterwards(tmp_path: Path) -> None:
    """Python says too what it finds wrong (PYTHONWARNINGS)."""

    def handle(sock: socket.socket) -> None:
        if (first := sock.recv(100)) == b"?":
            sock.sendall(b"ok")
        else:
            sock.sendall(first)
            echo(sock)

    with Backend(handle) as one, Backend(handle) as other:
        file = File(tmp_path, listen=fixed(), backends=[one.address, other.address], log_level="debug")
        with managed("-c", str(file.path), env={"PYTHONWARNINGS": "always"}) as service, ExitStack() as stack:
            clients = [stack.enter_context(service.daemon.connect()) for _ in range(20)]
            ended = [stack.enter_context(service.daemon.connect()) for _ in range(3)]
            for client in ended:
                assert talks(client)
                client.shutdown(socket.SHUT_WR)
                assert receive_all(client) == b""
            load = stack.enter_context(Load(service.daemon.port, 100))
            for _ in range(RESTARTS):
                assert all(talks(client) for client in clients)
                served = one.accepted + other.accepted
                eventually(lambda served=served: one.accepted + other.accepted > served + 20)  # type: ignore[misc]
                service.restart()
            assert all(talks(client) for client in clients)
            assert {outcome for _, _, _, outcome in load.end()} == {"ok"}
        lines = [line for daemon in service.daemons for line in daemon.lines]
        assert len(lines) > 50
        assert [line for line in lines if not re.match(r"\S+ \S+ (INFO|DEBUG) ", line)] == []
        # Nor has the manager heard of anything.
        assert {message.fields.get("ERRNO") for message in service.store.messages} == {None}
        assert not [message for message in service.store.messages if "failed" in message.text]


# A configuration that was changed but not loaded breaks it


def test_a_configuration_that_was_changed_but_not_loaded_breaks_nothing(tmp_path: Path) -> None:
    first, second = fixed(), fixed()
    with backends(stays("a"), stays("b")) as (one, other), ExitStack() as stack:
        web = {"listen": first, "backend": one.address, "max_connections": 50}
        file = File(tmp_path, listen=None, max_connections=None, proxies={"web": web})
        service = stack.enter_context(managed("-c", str(file.path)))
        clients = [enter(first, "a", stack)]

        def restart(where: str, name: str) -> None:
            """Restart; all clients go on, and a new one is served there by the backend of this name."""
            service.restart()
            clients.append(enter(where, name, stack))
            assert all(talks(client) for client in clients)

        # What is valid is in force.
        other_timeouts = {
            "idle_timeout": "1h",
            "connect_timeout": "9s",
            "half_close_timeout": "1h",
            "half_close": "off",
        }
        file.write(proxies={"web": {**web, **other_timeouts}})
        restart(first, "a")
        file.write(proxies={"web": {**web, "backend": other.address, "balance": "source"}})
        restart(first, "b")
        file.write(proxies={"www": {**web, "backend": other.address, "send_proxy": "v1"}})
        service.restart()
        assert all(talks(client) for client in clients)
        file.write(proxies={"www": {**web, "listen": second}, "more": {**web, "backend": other.address}})
        restart(second, "a")
        restart(first, "b")
        file.write(proxies=None, listen=second, backend=one.address, max_connections=50)
        restart(second, "a")
        with pytest.raises(ConnectionRefusedError):
            connect(first)
        file.write(max_connections=2)
        service.restart()
        assert all(talks(client) for client in clients)
        file.write(max_connections=100)
        restart(second, "a")
        assert not any(daemon.find(TROUBLE) for daemon in service.daemons)

        # What is not valid is said, and the last that was valid is in force.
        valid = file.path.read_text()
        invalid = ["", "\0", "{", "listen: [", valid.replace("listen", "lisen"), valid.replace("100", "-1"), "- a\n"]
        for text in invalid:
            file.path.write_text(text)
            restart(second, "a")
            assert service.daemon.find("serving by the settings of the process before: "), text
        file.path.unlink()
        restart(second, "a")
        file.path.mkdir()
        restart(second, "a")
        file.path.rmdir()
        file.write(listen=first)
        restart(first, "a")
        assert not service.daemon.find(TROUBLE)
        for client in clients:
            client.close()
        file.write(handover="off")
        restarts = len(service.daemons)
        clients = [enter(first, "a", stack)]
        restart(first, "a")
        assert len(service.daemons) == restarts + 1
        for client in clients:
            client.close()


# New settings are not copied


@pytest.mark.parametrize("readable", [True, False])
def test_new_settings_that_were_loaded_are_in_force_in_the_next_process(tmp_path: Path, readable: bool) -> None:
    """Whether the next process reads them in the file too, or has to know them from the process before."""
    where, silent = fixed(), 1.0
    with backends(stays("a"), stays("b")) as (one, other), ExitStack() as stack:
        file = File(tmp_path, listen=where, backend=one.address, idle_timeout="1h", max_connections=20)
        service = stack.enter_context(managed("-c", str(file.path)))
        before = enter(where, "a", stack)
        new = {"backend": other.address, "idle_timeout": silent, "max_connections": 2, "log_level": "debug"}
        file.reload(service.daemon, **new)
        if not readable:
            file.path.write_text("nonsense")
        for _ in range(2):
            service.restart()
            began = time.monotonic()
            with enter(where, "b", stack) as client:
                service.daemon.wait_for("connection opened ")  # at level debug
                with connect(where) as third:
                    # Two are there, and no more may be.
                    assert is_turned_away(client)
                    assert silent <= time.monotonic() - began < silent + 4
                    assert third.recv(1) == b"b"
            assert talks(before)
        (end,) = [end for end in service.daemon.wait_for_ends(1) if end["cause"] == "idle-timeout"][:1]
        assert (end["backend"], "handovers" in end) == (other.address, False)
        service.store.wait_for_status(f"serving 1 of 2, .*backend {other.address}.*")
