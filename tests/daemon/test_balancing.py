"""The process with several backends: which of them clients get, and that limits of theirs hold."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import ExitStack
from math import sqrt
from pathlib import Path
from select import select

from tests.fleet import ESTABLISHED, File, ask, backends, connections, enter, stays, talks, tells
from tests.support import PATIENCE, Backend, eventually, receive_all, send_and_close


def mappings(servers: list[Backend], **keys: list[object]) -> list[dict[str, object]]:
    """Backends as the file has them, each with its part of the lists."""
    return [
        {"address": server.address, **{key: values[number] for key, values in keys.items()}}
        for number, server in enumerate(servers)
    ]


# Which one


def test_round_robin_gives_each_backend_exactly_what_its_weight_says(tmp_path: Path) -> None:
    with backends(tells("A"), tells("B"), tells("C")) as servers:
        file = File(tmp_path, backends=mappings(servers, weight=[5, 3, 2]))
        with file.rspd() as daemon:
            got = Counter(ask(daemon) for _ in range(1000))
            assert got == {"A": 500, "B": 300, "C": 200}
            assert [server.accepted for server in servers] == [500, 300, 200]


def test_least_connections_passes_by_a_backend_whose_clients_stay(tmp_path: Path) -> None:
    with backends(stays("A"), tells("B")) as servers:
        file = File(tmp_path, backends=[server.address for server in servers], balance="least-connections")
        with file.rspd() as daemon, ExitStack() as stack:
            for number in range(20):
                name, client = enter(daemon)
                stack.enter_context(client)
                if name == "B":
                    receive_all(client)
                    client.close()
                    daemon.wait_for_ends(number)
            assert [server.accepted for server in servers] == [1, 19]


def test_least_connections_keeps_as_many_open_as_weights_say(tmp_path: Path) -> None:
    with backends(stays("A"), stays("B")) as servers:
        file = File(tmp_path, backends=mappings(servers, weight=[1, 3]), balance="least-connections")
        with file.rspd() as daemon, ExitStack() as stack:
            clients: dict[str, list[socket.socket]] = {"A": [], "B": []}

            def come(count: int) -> None:
                for _ in range(count):
                    name, client = enter(daemon)
                    clients[name].append(stack.enter_context(client))

            come(40)
            assert [len(clients["A"]), len(clients["B"])] == [10, 30]
            for client in clients["B"][6:]:
                client.close()
            daemon.wait_for_ends(24)
            come(8)  # to the one that lost its clients
            assert [server.accepted for server in servers] == [10, 38]


def test_random_reaches_all_backends(tmp_path: Path) -> None:
    # That one of four gets none of 200 has a probability of 4 * (3/4)**200 < 1e-24.
    with backends(*map(tells, "ABCD")) as servers:
        file = File(tmp_path, backends=[server.address for server in servers], balance="random")
        with file.rspd() as daemon:
            assert {ask(daemon) for _ in range(200)} == set("ABCD")


def test_source_gives_a_client_the_same_backend_and_a_leaving_backend_moves_only_its_own(tmp_path: Path) -> None:
    clients = [f"127.0.{number // 100}.{1 + number % 100}" for number in range(200)]
    with backends(*map(tells, "ABCD")) as servers:
        addresses = [server.address for server in servers]
        file = File(tmp_path, backends=addresses, balance="source")
        with file.rspd() as daemon:
            first = {client: ask(daemon, client) for client in clients}
            assert {client: ask(daemon, client) for client in reversed(clients)} == first
            # A quarter, and no more than five standard deviations above: fails once in 3 million runs.
            most = 200 / 4 + 5 * sqrt(200 * 1 / 4 * 3 / 4)
            assert max(Counter(first.values()).values()) <= most

            for number, gone in enumerate("ABCD"):
                file.reload(daemon, backends=addresses[:number] + addresses[number + 1 :])
                now = {client: ask(daemon, client) for client in clients}
                assert gone not in now.values()
                assert {client for client in clients if now[client] != first[client]} == {
                    client for client in clients if first[client] == gone
                }
            file.reload(daemon, backends=addresses)
            assert {client: ask(daemon, client) for client in clients} == first


def test_a_backup_gets_clients_only_while_no_other_backend_is_up(tmp_path: Path) -> None:
    with backends(tells("A"), tells("B"), tells("C")) as servers:
        file = File(tmp_path, backends=mappings(servers, backup=[False, False, True]), fail_timeout="100ms")
        with file.rspd() as daemon:
            assert {ask(daemon) for _ in range(10)} == {"A", "B"}
            servers[0].close()
            assert {ask(daemon) for _ in range(10)} == {"B"}
            servers[1].close()
            assert {ask(daemon) for _ in range(10)} == {"C"}
            with Backend(tells("A"), port=servers[0].port):
                eventually(lambda: ask(daemon) == "A")
                assert {ask(daemon) for _ in range(10)} == {"A"}
            assert ask(daemon) == "C"


# How many


class Counting:
    """A backend's handler that keeps its clients until they send a byte, and knows how many there were at once."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0
        self._lock = threading.Lock()

    def __call__(self, sock: socket.socket) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        sock.sendall(b"x")
        sock.recv(1)
        with self._lock:
            self.now -= 1
        sock.sendall(b"y")


def waiting(client: socket.socket) -> bool:
    """Whether the client has got nothing."""
    client.setblocking(False)
    try:
        client.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        client.settimeout(PATIENCE)


def test_clients_beyond_the_backends_limits_wait_and_are_served_in_order(tmp_path: Path) -> None:
    handlers = [Counting(), Counting()]
    with backends(*handlers) as servers:
        file = File(tmp_path, backends=mappings(servers, max_connections=[1, 2]), queue_timeout="20s")
        with file.rspd() as daemon, ExitStack() as stack:
            clients = [stack.enter_context(daemon.connect()) for _ in range(30)]
            for client in clients[:3]:
                assert client.recv(1) == b"x"
            for number, client in enumerate(clients):
                assert all(waiting(other) for other in clients[number + 3 :])
                client.sendall(b"?")
                assert client.recv(1) == b"y"
                client.close()
                for other in clients[number + 3 : number + 4]:
                    assert other.recv(1) == b"x"
            assert [handler.most for handler in handlers] == [1, 2]
            assert all(end["cause"].endswith("-closed") for end in daemon.wait_for_ends(30))


def test_who_waits_too_long_for_a_full_backend_is_closed_and_the_others_go_on(tmp_path: Path) -> None:
    with backends(stays("A")) as servers:
        file = File(tmp_path, backends=mappings(servers, max_connections=[1]), queue_timeout="300ms")
        with file.rspd() as daemon:
            _, first = enter(daemon)
            with first, daemon.connect() as second, daemon.connect() as third:
                assert receive_all(second) == receive_all(third) == b""
                ends = daemon.wait_for_ends(2)
                assert [end["cause"] for end in ends] == ["queue-timeout"] * 2
                assert {end["reason"] for end in ends} == {'"every backend has its max_connections"'}
                assert all(0.3 <= float(end["seconds"]) < 4 for end in ends)  # connect_timeout is 5 s
                assert talks(first)
            assert servers[0].accepted == 1


def test_clients_that_leave_the_queue_do_not_hold_up_those_behind(tmp_path: Path) -> None:
    with backends(stays("A")) as servers:
        file = File(tmp_path, backends=mappings(servers, max_connections=[1]), queue_timeout="20s")
        with file.rspd() as daemon:
            _, first = enter(daemon)
            gone = [daemon.connect() for _ in range(10)]
            with daemon.connect() as last:
                for client in gone:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7))
                    client.close()
                assert {end["cause"] for end in daemon.wait_for_ends(10)} == {"client-aborted"}
                first.close()
                assert last.recv(1) == b"A"
                assert talks(last)
            assert servers[0].accepted == 2


def test_a_backend_that_comes_back_gets_no_more_at_once_than_its_limit(tmp_path: Path) -> None:
    with Backend(tells("A")) as server:
        port = server.port
        file = File(tmp_path, backends={"address": server.address, "max_connections": 2}, connect_timeout="20s")
        with file.rspd() as daemon, ExitStack() as stack:
            server.close()
            with daemon.connect() as first:
                assert receive_all(first) == b""
            before = len(daemon.descriptors())
            listener = stack.enter_context(socket.create_server(("127.0.0.1", port), backlog=0))
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))  # there is no room for another
            clients = [stack.enter_context(daemon.connect()) for _ in range(10)]
            eventually(lambda: len(daemon.descriptors()) >= before + 10 and connections(daemon, port) >= 2)
            listener.listen(100)
            listener.accept()[0].close()
            eventually(lambda: not connections(daemon, port))
            while clients:
                sock, _ = listener.accept()
                assert connections(daemon, port, ESTABLISHED) <= 2
                send_and_close(sock, b"A")
                served = select(clients, [], [], PATIENCE)[0][0]
                assert receive_all(served) == b"A"
                served.close()
                clients.remove(served)
