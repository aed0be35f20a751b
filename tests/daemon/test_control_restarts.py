"""Who looks at rspd while it restarts, and what is known after that."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rspd.net.descriptors import OWN
from tests.daemon.control import connections, status
from tests.daemon.test_control_states import env, proxy
from tests.daemon.test_handover_upgrade import upgraded
from tests.fleet import File, stays
from tests.keeper import Manager, managed
from tests.manager import unix_listener
from tests.support import PATIENCE, Backend, eventually


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Manager]:
    with Backend(stays("!")) as there:
        file = File(tmp_path, backend=there.address)
        with managed("-c", str(file.path), env=env(tmp_path)) as service:
            yield service
    assert not (tmp_path / "control.sock").exists()


def test_a_restart_keeps_ids_and_counts(service: Manager, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    clients = [service.daemon.connect() for _ in range(3)]
    assert [client.recv(1) for client in clients] == [b"!"] * 3
    clients.pop().close()
    eventually(lambda: proxy(tmp_path).open == 2)
    eventually(lambda: all(one.idle > 0.2 for one in connections(path)))
    before = {one.client: one.id for one in connections(path)}
    idle = min(one.idle for one in connections(path))
    first = status(path).process
    service.restart()
    process = status(path).process
    assert (process.handovers, process.lineage, process.pid) == (1, first.lineage, service.daemon.pid)
    assert process.origin != first.origin
    assert process.service_age > process.age
    clients.append(service.daemon.connect())
    assert clients[-1].recv(1) == b"!"
    after = {one.client: one for one in connections(path)}
    assert all(after[client].idle > idle for client in before)  # who hangs is still found
    assert proxy(tmp_path).last_minute.connections > 0  # the samples go on
    assert {client: after[client].id for client in before} == before
    assert sorted(one.handovers for one in after.values()) == [0, 1, 1]
    assert len({one.id for one in after.values()}) == 3
    found = proxy(tmp_path)
    assert (found.open, found.accepted, [one.number for one in found.ends]) == (3, 4, [1])
    assert (found.volumes[0].received, status(path).backends[0].chosen) == (4, 4)
    for client in clients:
        client.close()
    eventually(lambda: proxy(tmp_path).ends[0].number == 4)
    assert proxy(tmp_path).volumes[0].received == 4


def test_who_looks_during_a_restart_gets_an_answer(service: Manager, tmp_path: Path) -> None:
    ended, failures = threading.Event(), list[Exception]()
    pids: set[int] = set()

    def look() -> None:
        while not ended.is_set():
            try:
                pids.add(status(tmp_path / "control.sock").process.pid)
            except BrokenPipeError:
                pass  # rspd waits ASKING seconds for the request of who has come; this thread may sleep for longer
            except Exception as error:
                failures.append(error)

    with ExitStack() as stack:
        clients = [stack.enter_context(service.daemon.connect()) for _ in range(50)]
        assert all(client.recv(1) == b"!" for client in clients)
        looking = [threading.Thread(target=look) for _ in range(2)]
        for thread in looking:
            thread.start()
        try:
            eventually(lambda: service.daemon.pid in pids)
            for _ in range(2):
                service.restart()
                eventually(lambda: service.daemon.pid in pids)
        finally:
            ended.set()
            for thread in looking:
                thread.join(PATIENCE)
    assert not failures
    assert pids == {daemon.pid for daemon in service.daemons}


# Files of sockets that are removed, or replaced by another process


@pytest.fixture
def sockets(tmp_path: Path) -> list[Path]:
    """Where clients come, and where rspd is looked at."""
    return [tmp_path / "listen.sock", tmp_path / "control.sock"]


@pytest.fixture
def file(tmp_path: Path, sockets: list[Path]) -> Iterator[File]:
    with Backend(stays("!")) as there:
        listen, control = map(str, sockets)
        yield File(tmp_path, backend=there.address, listen=listen, control=control)


def client_of(path: Path) -> socket.socket:
    """A client that is being served."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE)
    client.connect(str(path))
    assert client.recv(1) == b"!"
    return client


def still_served(client: socket.socket) -> bool:
    client.sendall(b"x")
    return client.recv(1) == b"x"


def test_sockets_whose_files_were_removed_are_back_after_a_reload_and_after_an_upgrade(
    file: File, sockets: list[Path]
) -> None:
    listen, control = sockets
    with file.rspd() as daemon, client_of(listen) as first, ExitStack() as stack:
        for number in range(2):
            for path in sockets:
                path.unlink()
            if number:
                assert upgraded(daemon.process.pid) == (0, "")
            else:
                file.reload(daemon)
            assert status(control).process.pid == daemon.pid
            assert still_served(stack.enter_context(client_of(listen)))
            assert still_served(first)
        assert not daemon.find("WARNING|ERROR")
        daemon.signal(signal.SIGTERM)
        eventually(lambda: not listen.exists())
    assert not control.exists()


def test_another_process_has_its_sockets_at_these_paths_and_keeps_them_whatever_rspd_does(
    file: File, sockets: list[Path]
) -> None:
    listen, _ = sockets
    with file.rspd() as daemon, client_of(listen) as client, ExitStack() as stack:
        for path in sockets:
            path.unlink()
            stack.enter_context(unix_listener(str(path)))
        inodes = [path.lstat().st_ino for path in sockets]
        file.reload(daemon, max_connections=7)
        for number in range(2):
            assert upgraded(daemon.process.pid) == (0, "")
            assert still_served(client)
            for path in sockets:
                what = f"the file of a listening socket is gone, cannot listen on {path}: Address already in use"
                daemon.wait_for(what, number + 2)
        client.close()
        assert daemon.stop() == 0
        assert [path.lstat().st_ino for path in sockets] == inodes


def test_a_service_restarts_though_another_process_has_its_sockets_at_these_paths(
    file: File, sockets: list[Path]
) -> None:
    listen, _ = sockets
    with managed("-c", str(file.path)) as service, client_of(listen) as client, ExitStack() as stack:
        for path in sockets:
            path.unlink()
            stack.enter_context(unix_listener(str(path)))
        service.restart()
        assert still_served(client)
        service.daemon.wait_for("the file of a listening socket is gone", 2)
        for path in sockets:
            os.unlink(path)
        service.restart()
        assert still_served(client)
        with client_of(listen) as another:
            assert still_served(another)
        assert status(sockets[1]).process.pid == service.daemon.pid


def test_sockets_whose_files_nobody_can_see_at_an_upgrade_are_reached_again_when_the_files_are_back(
    file: File, sockets: list[Path]
) -> None:
    listen, control = sockets
    with file.rspd() as daemon, client_of(listen) as client:
        inodes = [path.lstat().st_ino for path in sockets]
        for path in sockets:
            path.rename(f"{path}.aside")
            path.write_text("precious")
        assert upgraded(daemon.process.pid) == (0, "")
        daemon.wait_for("the file of a listening socket is gone", 2)
        for path in sockets:
            os.rename(f"{path}.aside", path)
        file.reload(daemon, max_connections=7)
        assert [path.lstat().st_ino for path in sockets] == inodes
        assert status(control).process.pid == daemon.pid
        with client_of(listen) as another:
            assert still_served(another)
        assert still_served(client)
        client.close()
        assert daemon.stop() == 0
        assert [path.exists() for path in sockets] == [False, False]


def test_a_socket_without_its_file_counts_for_the_descriptors_needed_while_clients_wait_there(
    file: File, sockets: list[Path]
) -> None:
    path, limit = sockets[0], OWN + 2 + 2  # a connection, and two listeners
    file.write(control="off", max_connections=1)
    with file.rspd(limit=(limit, limit)) as daemon, client_of(path) as served, ExitStack() as stack:
        waiting = []
        for _ in range(2):
            file.reload(daemon)
            waiting.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            waiting[-1].settimeout(PATIENCE)
            waiting[-1].connect(str(path))
            path.unlink()
        daemon.signal(signal.SIGHUP)
        daemon.wait_for(f"reload failed, .*max_connections 1 needs {limit + 1} descriptors, and the limit is {limit}")
        served.close()
        assert waiting[0].recv(1) == b"!"
        file.reload(daemon)
        waiting[0].close()
        assert waiting[1].recv(1) == b"!"
