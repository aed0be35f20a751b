"""The process with backends that die, hang and come back: who is served meanwhile, and what the log says."""

from __future__ import annotations

import itertools
import re
import socket
import time
from collections import defaultdict, deque
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path

import pytest

from tests.fleet import BackendProcess, File, Load, ask, backend_processes, backends, connections, tells
from tests.support import (
    PATIENCE,
    Backend,
    Daemon,
    eventually,
    free_port,
    full_tcp,
    receive_all,
)


def fields(line: str) -> dict[str, str]:
    return dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line))


def changes(daemon: Daemon) -> list[tuple[str, str]]:
    """The changes of state in the log: up or down, and the backend."""
    return [(line.split()[4], fields(line)["backend"]) for line in daemon.find(r" backend (up|down) ")]


# Under load


def restart_each(daemon: Daemon, processes: list[BackendProcess]) -> list[tuple[str, str]]:
    """Kill and restart backends in turn, all others being up; the changes of state that this makes."""
    expected = []
    for process in processes:
        served = len(daemon.find("connection closed"))
        daemon.wait_for("connection closed", served + 100)
        process.kill()
        expected.append(("down", process.address))
        eventually(lambda expected=expected: changes(daemon) == expected)  # type: ignore[misc]
        served = len(daemon.find("connection closed"))
        daemon.wait_for("connection closed", served + 300)  # trials that fail among them
        process.start()
        expected.append(("up", process.address))
        eventually(lambda expected=expected: changes(daemon) == expected)  # type: ignore[misc]
    return expected


def test_killing_backends_in_turn_under_load_costs_only_the_clients_they_had(tmp_path: Path) -> None:
    with backend_processes(3) as processes:
        file = File(tmp_path, backends=[process.address for process in processes], fail_timeout="200ms")
        with file.rspd() as daemon, Load(daemon.port, 500) as load:
            expected = restart_each(daemon, processes)
            clients = load.end()
            ends = daemon.wait_for_ends(len(clients))
            assert changes(daemon) == expected
    deaths = {process.address: process.deaths for process in processes}
    # Clients of one name, which is a port, came one after the other.
    ends_by_name: dict[str, deque[dict[str, str]]] = defaultdict(deque)
    for end in ends:
        ends_by_name[end["client"]].append(end)
    lost = 0
    for client, began, ended, outcome in sorted(clients, key=itemgetter(1)):
        end = ends_by_name[client].popleft()
        if outcome == "ok":
            continue
        # It was connected to a backend that was killed while it was there.
        assert end["cause"] in ("backend-aborted", "backend-closed"), (outcome, end)
        assert any(began <= gone and killed <= ended for killed, gone in deaths[end["backend"]]), (outcome, end)
        lost += 1
    assert lost < len(clients) / 10


# While all are down


def test_clients_wait_while_all_backends_are_down_and_are_served_when_one_is_back(tmp_path: Path) -> None:
    with backends(tells("A"), tells("B")) as servers:
        addresses = [server.address for server in servers]
        with File(tmp_path, backends=addresses, queue_timeout="20s").rspd() as daemon, ExitStack() as stack:
            for server in servers:
                server.close()
            clients = [stack.enter_context(daemon.connect()) for _ in range(50)]
            daemon.wait_for("backend down", 2)
            start = time.monotonic()
            with Backend(tells("B"), port=servers[1].port) as server:
                assert {receive_all(client) for client in clients} == {b"B"}
                assert time.monotonic() - start < 5  # the first tries again ten times a second; fail_timeout is 10 s
                assert server.accepted == 50
            assert [state for state, _ in changes(daemon)] == ["down", "down", "up"]


def test_clients_whose_first_attempts_failed_wait_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    numbers = itertools.count()
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        where = listener.getsockname()
        stack.enter_context(socket.create_connection(where))  # there is no room for another
        backend = {"address": f"127.0.0.1:{where[1]}", "max_connections": 30}
        file = File(tmp_path, backends=backend, queue_timeout="20s", connect_timeout="3s")
        with file.rspd() as daemon, ExitStack() as coming:
            clients = [coming.enter_context(daemon.connect()) for _ in range(30)]
            eventually(lambda: connections(daemon, where[1]) == 30)
            daemon.wait_for("backend down")
            listener.close()
            with Backend(lambda sock: sock.sendall(b"%d" % next(numbers)), port=where[1]):
                order = [int(receive_all(client)) for client in clients]
            # But those few that have just tried again, and pause.
            assert sum(one < next_one for one, next_one in itertools.pairwise(order)) >= 20, order


def test_clients_who_waited_for_queue_timeout_are_closed_and_the_log_says_why(tmp_path: Path) -> None:
    with File(tmp_path, backends=f"127.0.0.1:{free_port()}", queue_timeout="500ms").rspd() as daemon:
        clients = [daemon.connect() for _ in range(20)]
        for client in clients:
            assert receive_all(client) == b""
            client.close()
        ends = daemon.wait_for_ends(20)
        assert {end["cause"] for end in ends} == {"queue-timeout"}
        assert all("Connection refused" in end["reason"] for end in ends)
        assert all(0.5 <= float(end["seconds"]) < 4 for end in ends)  # connect_timeout is 5 s
        assert [state for state, _ in changes(daemon)] == ["down"]


def test_backends_that_do_not_answer_do_not_keep_clients_beyond_queue_timeout(tmp_path: Path) -> None:
    with full_tcp() as address:
        file = File(tmp_path, backends=address, queue_timeout="1s", connect_timeout="600ms")
        with file.rspd() as daemon, ExitStack() as stack:
            clients = [stack.enter_context(daemon.connect()) for _ in range(20)]
            assert [receive_all(client) for client in clients] == [b""] * 20
            ends = daemon.wait_for_ends(20)
            assert {end["cause"] for end in ends} == {"queue-timeout"}
            # From the first failed attempt on.
            assert all(1 <= float(end["seconds"]) < 5 for end in ends), ends


def test_a_backend_that_hangs_does_not_hide_another_that_is_back(tmp_path: Path) -> None:
    with full_tcp() as hanging, Backend(tells("B")) as server:
        server.close()
        file = File(tmp_path, backends=[hanging, server.address], queue_timeout="20s", connect_timeout="4s")
        with file.rspd() as daemon, ExitStack() as stack:
            clients = [stack.enter_context(daemon.connect()) for _ in range(10)]
            daemon.wait_for("backend down", 2)
            more = [stack.enter_context(daemon.connect()) for _ in range(10)]
            with Backend(tells("B"), port=server.port):
                daemon.wait_for("backend up", patience=3)  # less than the other hangs
                assert {receive_all(client) for client in [*clients, *more]} == {b"B"}


# How it goes out, and comes back


def test_a_backend_is_out_after_max_fails(tmp_path: Path) -> None:
    file = File(tmp_path, backends=f"127.0.0.1:{free_port()}", max_fails=3)
    with file.rspd() as daemon:
        for number in range(1, 6):
            assert ask(daemon) == ""
            assert [end["cause"] for end in daemon.wait_for_ends(number)] == ["backend-refused"] * number
            assert len(daemon.find("backend down")) == (number >= 3)


def test_failures_longer_ago_than_fail_timeout_do_not_count(tmp_path: Path) -> None:
    file = File(tmp_path, backends=f"127.0.0.1:{free_port()}", max_fails=2, fail_timeout="50ms")
    with file.rspd() as daemon:
        for _ in range(5):
            before = time.monotonic()
            assert ask(daemon) == ""
            eventually(lambda before=before: time.monotonic() > before + 0.5)  # type: ignore[misc]
        assert changes(daemon) == []


def test_a_backend_stays_out_for_fail_timeout(tmp_path: Path) -> None:
    with backends(tells("A"), tells("B")) as (gone, other):
        file = File(tmp_path, backends=[gone.address, other.address], fail_timeout="700ms")
        with file.rspd() as daemon:
            gone.close()
            assert [ask(daemon), ask(daemon)] == ["B", "B"]
            with Backend(tells("A"), port=gone.port) as back:
                eventually(lambda: ask(daemon) == "A")
                assert back.accepted == 1
            (up,) = daemon.wait_for("backend up")
            assert 0.7 <= float(fields(up)["seconds"]) < 3


def test_after_fail_timeout_exactly_one_client_tries_the_backend(tmp_path: Path) -> None:
    with Backend(tells("A")) as gone, Backend(tells("B")) as other:
        port = gone.port
        file = File(tmp_path, backends=[gone.address, other.address], fail_timeout="500ms", connect_timeout="4s")
        with file.rspd() as daemon, ExitStack() as stack:
            gone.close()
            eventually(lambda: ask(daemon) == "B" and daemon.find("backend down"))
            # Now it hangs: who tries it is seen in the kernel's list.
            stack.enter_context(socket.create_server(("127.0.0.1", port), backlog=0))
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            trial = stack.enter_context(daemon.connect())
            while not connections(daemon, port):
                assert receive_all(trial) == b"B"
                trial = stack.enter_context(daemon.connect())
                eventually(lambda trial=trial: connections(daemon, port) or has_answer(trial))  # type: ignore[misc]
            start = time.monotonic()
            for _ in range(100):
                assert ask(daemon) == "B"
            if time.monotonic() - start < 0.4:  # before the next is due
                # The one that was seen above: the list may lack it now, if it changes while it is read.
                assert connections(daemon, port) <= 1
            assert receive_all(trial) == b"B"  # when its half of the time is over


def has_answer(client: socket.socket) -> bool:
    """Whether the client can read something."""
    client.setblocking(False)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        client.settimeout(PATIENCE)


@pytest.mark.parametrize(("retries", "outcomes"), [(0, {"", "C"}), (1, {"", "C"}), (2, {"C"}), ("all", {"C"})])
def test_as_many_further_backends_are_tried_as_retries_says(
    tmp_path: Path, retries: object, outcomes: set[str]
) -> None:
    with Backend(tells("C")) as alive:
        addresses = [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", alive.address]
        with File(tmp_path, backends=addresses, retries=retries, max_fails=1000).rspd() as daemon:
            assert {ask(daemon) for _ in range(9)} == outcomes
            failed = [end for end in daemon.wait_for_ends(9) if end["backend"] == "-"]
            assert all(end["cause"] == "backend-refused" for end in failed)
            assert all(end["reason"].count("Connection refused") == int(str(retries)) + 1 for end in failed)
