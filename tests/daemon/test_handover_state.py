"""A restart of the service: the next process knows what the one before knew of connections, limits and backends."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon.test_handover import fixed
from tests.daemon.test_health import OFTEN, Web
from tests.daemon.test_service import let_pass
from tests.fleet import File, ask, backends, enter, stays, talks, tells
from tests.keeper import BEFORE, Manager, in_time, managed
from tests.support import PATIENCE, Backend, echo, eventually, free_port, is_reset, receive_all

TIMEOUT = 3.0  # seconds that a connection may be silent


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend(echo) as backend:
        yield backend


def is_refused(client: socket.socket) -> bool:
    """Whether a client is sent away."""
    try:
        client.sendall(b"hello")
        return not client.recv(1)
    except ConnectionError:
        return True


# Time


@pytest.mark.parametrize("half", [False, True])
def test_silence_before_the_restart_counts(tmp_path: Path, backend: Backend, half: bool) -> None:
    key = "half_close_timeout" if half else "idle_timeout"

    def end_first(sock: socket.socket) -> None:
        sock.sendall(b"hello")
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)

    with Backend(end_first) as ending:
        file = File(tmp_path, listen=fixed(), backend=(ending if half else backend).address, **{key: TIMEOUT})
        with managed("-c", str(file.path)) as service:
            came = time.monotonic()
            with service.daemon.connect() as client:
                assert client.recv(5, socket.MSG_WAITALL) == b"hello" if half else talks(client)
                silent = time.monotonic()
                let_pass(BEFORE)
                service.restart()
                back = time.monotonic()
                (end,) = service.daemon.wait_for_ends(1)
        assert end["cause"] == key.replace("_", "-")
        assert in_time(end, TIMEOUT, came, silent, back), end


def test_a_silence_that_was_too_long_while_no_process_ran_ends_the_connection(tmp_path: Path, backend: Backend) -> None:
    file = File(tmp_path, listen=fixed(), backend=backend.address, idle_timeout=TIMEOUT)
    with managed("-c", str(file.path)) as service:
        came = time.monotonic()
        with service.daemon.connect() as client:
            assert talks(client)
            silent = time.monotonic()
            service.stop()
            let_pass(TIMEOUT)
            service.start()
            back = time.monotonic()
            (end,) = service.daemon.wait_for_ends(1)
    assert end["cause"] == "idle-timeout"
    assert in_time(end, TIMEOUT, came, silent, back), end


def test_the_line_at_the_end_is_of_the_whole_life(tmp_path: Path, backend: Backend) -> None:
    file = File(tmp_path, listen=fixed(), backend=backend.address, accept_proxy="127.0.0.0/8")
    with managed("-c", str(file.path)) as service:
        with service.daemon.connect() as client:
            began = time.monotonic()
            client.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 80\r\n")
            name = "{}:{}".format(*client.getsockname())
            for _ in range(2):
                assert talks(client)
                service.restart()
            assert talks(client)
            lasted = time.monotonic() - began
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b""
            (end,) = service.daemon.wait_for_ends(1)
        assert (end["client"], end["via"], end["backend"]) == ("192.0.2.1:1234", name, backend.address)
        assert (end["sent"], end["received"], end["cause"], end["handovers"]) == ("15", "15", "client-closed", "2")
        assert lasted - 0.01 < float(end["seconds"]) < lasted + 5


# Limits


def test_max_connections_counts_those_of_the_process_before(tmp_path: Path, backend: Backend) -> None:
    file = File(tmp_path, listen=fixed(), backend=backend.address, max_connections=2)
    with managed("-c", str(file.path)) as service:
        with service.daemon.connect() as one, service.daemon.connect() as two:
            assert talks(one)
            assert talks(two)
            service.restart()
            with service.daemon.connect() as three:
                three.sendall(b"waits")
                service.store.wait_for_status(r"serving 2 of 2, 1 waiting, 2 served, .*")
                assert backend.accepted == 2
                one.close()
                assert three.recv(5, socket.MSG_WAITALL) == b"waits"
                assert talks(two)


def test_max_connections_per_client_counts_those_of_the_process_before(tmp_path: Path, backend: Backend) -> None:
    keys = {"max_connections_per_client": 2, "accept_proxy": "127.0.0.1"}
    file = File(tmp_path, listen=fixed(), backend=backend.address, **keys)

    def come(host: str, stack: ExitStack) -> socket.socket:
        client = stack.enter_context(service.daemon.connect())
        client.sendall(f"PROXY TCP4 {host} 192.0.2.2 1 2\r\n".encode())
        return client

    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        first = come("192.0.2.1", stack)
        assert talks(first)
        assert talks(come("192.0.2.1", stack))
        service.restart()
        assert is_refused(come("192.0.2.1", stack))
        assert talks(come("192.0.2.7", stack))
        first.close()
        service.daemon.wait_for(r"connection closed client=192\.0\.2\.1:1 .*handovers=1")
        assert talks(come("192.0.2.1", stack))
        assert is_refused(come("192.0.2.1", stack))


@pytest.mark.parametrize("balance", ["round-robin", "least-connections", "random", "source"])
def test_a_full_backend_is_full_in_the_next_process(tmp_path: Path, balance: str) -> None:
    with backends(stays("a"), stays("b")) as (one, other):
        addresses = {"a": one.address, "b": other.address}
        file = File(tmp_path, listen=fixed(), backends=list(addresses.values()), balance=balance)
        with managed("-c", str(file.path)) as service:
            full, client = enter(service.daemon)
            with client:
                limited = {"address": addresses.pop(full), "max_connections": 1}
                ((free, address),) = addresses.items()
                file.write(backends=[limited, address])
                for _ in range(2):
                    service.restart()
                    assert {whose(service) for _ in range(6)} == {free}
                assert talks(client)
            service.daemon.wait_for(f"connection closed .*backend={limited['address']} .*handovers=2")
            eventually(lambda: whose(service) == full)


def whose(service: Manager) -> str:
    """The name of the backend that a client gets."""
    name, client = enter(service.daemon)
    client.close()
    return name


def test_the_status_counts_on_who_was_served(tmp_path: Path, backend: Backend) -> None:
    file = File(tmp_path, listen=fixed(), backend=backend.address)
    with managed("-c", str(file.path)) as service:
        with service.daemon.connect() as client:
            for number in range(3):
                with service.daemon.connect() as other:
                    assert talks(other)
                service.daemon.wait_for_ends(number + 1)
            assert service.restart().find("handed over connections=1 served=4")
            status = service.store.with_field("READY=1")[-1].status
            assert status == f"serving 1 of 1000, 4 served, backend {backend.address}; took over 1 connection"
            assert talks(client)
        with service.daemon.connect() as other:
            assert talks(other)
        service.store.wait_for_status(r"serving 0 of 1000, 5 served, .*")


# Backends


def test_a_backend_that_was_down_stays_down_without_a_word_and_comes_up_with_its_whole_time(tmp_path: Path) -> None:
    down = free_port()
    with backends(tells("b")) as (up,):
        both = [f"127.0.0.1:{down}", up.address]
        file = File(tmp_path, listen=fixed(), backends=both, max_fails=1, fail_timeout=TIMEOUT)
        with managed("-c", str(file.path)) as service:
            began = time.monotonic()
            assert {ask(service.daemon) for _ in range(2)} == {"b"}
            service.daemon.wait_for("backend down")
            seen = time.monotonic()
            let_pass(TIMEOUT / 4)
            service.restart()
            assert "1 of 2 backends up" in service.store.with_field("READY=1")[-1].status
            with Backend(tells("a"), port=down):
                if time.monotonic() < seen + TIMEOUT - 0.5:
                    assert {ask(service.daemon) for _ in range(4)} == {"b"}, "it is not due yet"
                asked = time.monotonic()
                eventually(lambda: ask(service.daemon) == "a")
                (line,) = service.daemon.wait_for("backend up")
                seconds = float(line.partition("seconds=")[2])
                assert asked - seen < seconds < time.monotonic() - began
                assert seconds > TIMEOUT - 0.1
                assert not service.daemon.find("backend down")


def test_a_backend_with_bad_checks_stays_down_without_a_word_and_a_good_one_brings_it_back(tmp_path: Path) -> None:
    with Web() as one, Web() as other:
        file = File(tmp_path, listen=fixed(), backends=[one.address, other.address], health=OFTEN)
        with managed("-c", str(file.path)) as service:
            eventually(lambda: len(one.statuses) > 2)
            one.status = 503
            service.daemon.wait_for("backend down")
            seen = time.monotonic()
            let_pass(1.0)
            service.restart()
            assert "1 of 2 backends up" in service.store.with_field("READY=1")[-1].status
            checks = len(one.statuses)
            accepted = len(other.statuses)
            for _ in range(4):
                with service.daemon.connect() as client:
                    assert talks(client)
            assert {end["backend"] for end in service.daemon.wait_for_ends(4)} == {other.address}
            eventually(lambda: len(one.statuses) > checks + 4 and len(other.statuses) > accepted + 4)
            one.status = 200
            (line,) = service.daemon.wait_for("backend up")
            assert f"backend={one.address} " in line
            assert float(line.partition("seconds=")[2]) > 1.0
            assert float(line.partition("seconds=")[2]) < time.monotonic() - seen + 2
            assert not service.daemon.find("backend down")


@pytest.mark.parametrize("balance", ["round-robin", "least-connections", "random", "source"])
def test_a_connection_to_a_backend_that_is_no_longer_in_the_file_goes_on(tmp_path: Path, balance: str) -> None:
    with backends(stays("a"), stays("b")) as (old, new):
        file = File(tmp_path, listen=fixed(), backend=old.address, balance=balance)
        with managed("-c", str(file.path)) as service:
            name, client = enter(service.daemon)
            with client:
                assert name == "a"
                file.write(backend=new.address)
                service.restart()
                assert whose(service) == "b"
                assert talks(client)
                service.restart()
                assert talks(client)
            # The connection that asked may have been handed over too.
            (end,) = service.daemon.wait_for("connection closed .* handovers=2")
            assert f" backend={old.address} " in end
            assert whose(service) == "b"


def test_a_backend_that_returns_to_the_file_counts_the_connections_that_it_has_left(tmp_path: Path) -> None:
    with backends(stays("a"), stays("b")) as (one, other):
        file = File(tmp_path, listen=fixed(), backend=one.address)
        with managed("-c", str(file.path)) as service:
            (_, client), (_, second) = enter(service.daemon), enter(service.daemon)
            with client, second:
                file.write(backend=other.address)
                service.restart()
                both = [{"address": one.address, "max_connections": 2}, other.address]
                file.reload(service.daemon, backend=None, backends=both)
                assert {whose(service) for _ in range(4)} == {"b"}
                assert talks(client)
                assert talks(second)
            service.daemon.wait_for(f"connection closed .*backend={one.address} ", 2)
            assert {whose(service) for _ in range(4)} == {"a", "b"}


def test_a_connection_of_a_proxy_that_is_no_longer_in_the_file_goes_on_and_counts(tmp_path: Path) -> None:
    with backends(stays("a"), stays("b")) as (one, other):
        web = {"listen": fixed(), "backend": one.address, "max_connections": 10}
        more = {"listen": fixed(), "backend": other.address, "max_connections": 10}
        file = File(tmp_path, listen=None, max_connections=None, proxies={"web": web, "more": more})
        with managed("-c", str(file.path)) as service:
            name, client = enter(service.daemon)
            port = service.daemon.port
            with client:
                assert name == "a"
                file.write(proxies={"more": more})
                service.restart()
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port), PATIENCE)
                assert talks(client)
                assert whose(service) == "b"
                file.write(proxies=None, **more)
                service.restart()
                assert talks(client)
                service.store.wait_for_status(r"serving 0 of 10, 2 served, .*")
                file.write(listen=None, backend=None, max_connections=None, proxies={"web": web, "more": more})
                service.restart()
                assert service.daemon.port == port
                assert talks(client)
                service.store.wait_for_status(r"2 served; web serving 0 of 10, .*; more serving 0 of 10, .*")
            (end,) = service.daemon.wait_for("connection closed .* handovers=3")
            assert f" proxy=web backend={one.address} " in end


def test_on_down_abort_concerns_those_of_the_process_before(tmp_path: Path) -> None:
    with Web() as one, Web() as other:
        file = File(tmp_path, listen=fixed(), backends=[one.address, other.address], health=OFTEN, on_down="abort")
        with managed("-c", str(file.path)) as service, ExitStack() as stack:
            clients = [stack.enter_context(service.daemon.connect()) for _ in range(2)]
            assert all(talks(client) for client in clients)
            service.restart()
            one.status = 503
            (end,) = service.daemon.wait_for_ends(1)
            assert (end["backend"], end["cause"], end["handovers"]) == (one.address, "backend-down", "1")
            first = {"{}:{}".format(*client.getsockname()): client for client in clients}.pop(end["client"])
            assert is_reset(first)
            clients.remove(first)
            assert talks(clients[0])
