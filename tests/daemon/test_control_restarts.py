"""Who looks at rspd while it restarts, and what is known after that."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon.control import connections, status
from tests.daemon.test_control_states import env, proxy
from tests.fleet import File, stays
from tests.keeper import Manager, managed
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
