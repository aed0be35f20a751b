"""The process with health checks: which backends clients get, and what becomes of those that are there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fleet import File, talks
from tests.support import Backend, Daemon, eventually, is_reset, receive_all

OFTEN = {"interval": "50ms", "timeout": "10s", "rise": 2, "fall": 3, "http": "/health"}
ONCE = {**OFTEN, "interval": "1h"}


class Web(Backend):
    """A backend that is asked for its health where its clients are; to them it sends back what they say.

    statuses: of the checks so far. failing: how many checks yet get 503 in place of `status`.
    """

    def __init__(self, status: int = 200, port: int = 0) -> None:
        self.status = status
        self.failing = 0
        self.statuses: list[int] = []
        super().__init__(self._serve, port=port)

    def _serve(self, sock: socket.socket) -> None:
        data = sock.recv(1000)
        if data.startswith(b"GET /health HTTP/1.0\r\n"):
            status = 503 if self.failing > 0 else self.status
            self.failing -= 1
            self.statuses.append(status)
            sock.sendall(b"HTTP/1.0 %d Whatever\r\n\r\n" % status)
            return
        while data:
            sock.sendall(data)
            data = sock.recv(1000)


@pytest.fixture
def webs() -> Iterator[list[Web]]:
    """Two backends that are well."""
    with Web() as one, Web() as other:
        yield [one, other]


def addresses(webs: list[Web]) -> list[str]:
    return [web.address for web in webs]


def exchange(daemon: Daemon) -> str:
    """Have a client served; by whom."""
    with daemon.connect() as client:
        pattern = f"connection closed client=127.0.0.1:{client.getsockname()[1]} "
        before = len(daemon.find(pattern))  # the kernel gives a port again
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"hello"
    line = daemon.wait_for(pattern, before + 1)[-1]
    return line.partition("backend=")[2].split()[0]


def test_a_status_that_turns_bad_takes_a_backend_out_and_a_good_one_brings_it_back(
    tmp_path: Path, webs: list[Web]
) -> None:
    with File(tmp_path, backends=addresses(webs), health=OFTEN).rspd() as daemon:
        assert {exchange(daemon) for _ in range(4)} == set(addresses(webs))
        eventually(lambda: len(webs[0].statuses) > 2)
        webs[0].status = 503
        (down,) = daemon.wait_for("backend down")
        assert f'backend={webs[0].address} reason="status 503, expected 200-399"' in down
        assert webs[0].statuses.count(503) >= 3
        assert {exchange(daemon) for _ in range(10)} == {webs[1].address}
        webs[0].status = 200
        (up,) = daemon.wait_for("backend up")
        assert f"backend={webs[0].address} seconds=" in up
        assert webs[0].statuses[webs[0].statuses.index(503) :].count(200) >= 2
        assert {exchange(daemon) for _ in range(4)} == set(addresses(webs))
        checks = len(webs[0].statuses)
        eventually(lambda: len(webs[0].statuses) > checks + 5)
        assert len(daemon.find("backend (down|up)")) == 2


def test_fewer_bad_checks_in_a_row_than_fall_says_change_nothing(tmp_path: Path, webs: list[Web]) -> None:
    with File(tmp_path, backends=addresses(webs), health=OFTEN).rspd() as daemon:
        eventually(lambda: len(webs[0].statuses) > 1)  # the first check decides by itself
        for bad in (2, 4, 6):
            webs[0].failing = 2
            eventually(lambda bad=bad: webs[0].statuses.count(503) == bad and webs[0].statuses[-1] == 200)  # type: ignore[misc]
        assert webs[0].statuses.count(503) == 6
        assert daemon.find("backend (down|up)") == []


@pytest.mark.parametrize("on_down", ["abort", "keep"])
def test_on_down_says_what_becomes_of_the_connections_of_a_backend(
    tmp_path: Path, webs: list[Web], on_down: str
) -> None:
    with File(tmp_path, backends=addresses(webs), health=OFTEN, on_down=on_down).rspd() as daemon, ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(20)]
        assert all(map(talks, clients))
        webs[0].status = 503
        daemon.wait_for("backend down")
        if on_down == "keep":
            assert all(map(talks, clients))
            assert daemon.find("connection closed") == []
            return
        ends = daemon.wait_for_ends(10)
        assert {(end["backend"], end["cause"]) for end in ends} == {(webs[0].address, "backend-down")}
        gone = {end["client"] for end in ends}
        cut = [client for client in clients if "{}:{}".format(*client.getsockname()) in gone]
        assert len(cut) == 10
        assert all(map(is_reset, cut))
        assert all(talks(client) for client in clients if client not in cut)
        assert exchange(daemon) == webs[1].address


def test_a_backend_that_refuses_a_client_loses_the_others_if_on_down_says_so(tmp_path: Path) -> None:
    with Web() as web, File(tmp_path, backends=web.address, on_down="abort").rspd() as daemon:
        with daemon.connect() as client:
            assert talks(client)
            web.listener.shutdown(socket.SHUT_RDWR)
            with daemon.connect() as refused:
                assert receive_all(refused) == b""
            assert is_reset(client)
        assert [end["cause"] for end in daemon.wait_for_ends(2)] == ["backend-refused", "backend-down"]


def test_a_backend_that_a_reload_adds_is_checked_at_once(tmp_path: Path, webs: list[Web]) -> None:
    webs[1].status = 503
    file = File(tmp_path, backends=webs[0].address, health=ONCE)
    with file.rspd() as daemon:
        eventually(lambda: webs[0].statuses == [200])
        file.reload(daemon, backends=addresses(webs))
        daemon.wait_for(f"backend down backend={webs[1].address} ", patience=5)
        assert {exchange(daemon) for _ in range(5)} == {webs[0].address}
        assert (webs[0].statuses, webs[1].statuses) == ([200], [503])  # whom it knows, it does not check anew


def test_a_reload_that_turns_checks_off_takes_backends_in_again(tmp_path: Path, webs: list[Web]) -> None:
    webs[1].status = 503
    file = File(tmp_path, backends=addresses(webs), health=ONCE)
    with file.rspd() as daemon:
        daemon.wait_for("backend down")
        file.reload(daemon, health="off")
        daemon.wait_for("backend up")
        assert {exchange(daemon) for _ in range(4)} == set(addresses(webs))


def test_checks_go_on_while_clients_are_served(tmp_path: Path, webs: list[Web]) -> None:
    # One client at a time, and one that stays: checks need no place of a client.
    file = File(tmp_path, backends=addresses(webs), health=OFTEN, max_connections=1)
    with file.rspd() as daemon:
        for _ in range(200):
            exchange(daemon)
        with daemon.connect() as client:
            assert talks(client)
            before = [len(web.statuses) for web in webs]
            eventually(lambda: all(len(web.statuses) > count + 10 for web, count in zip(webs, before, strict=True)))
            assert talks(client)
        assert daemon.find("backend (down|up)") == []


@pytest.mark.parametrize("queue_timeout", ["off", "20s"])
def test_backends_that_fail_their_checks_get_nobody_even_if_all_do(
    tmp_path: Path, webs: list[Web], queue_timeout: str
) -> None:
    for web in webs:
        web.status = 503
    with File(tmp_path, backends=addresses(webs), health=OFTEN, queue_timeout=queue_timeout).rspd() as daemon:
        daemon.wait_for("backend down", 2)
        with daemon.connect() as client:
            if queue_timeout == "off":
                assert receive_all(client) == b""
                (end,) = daemon.wait_for_ends(1)
                assert (end["cause"], end["backend"]) == ("backend-down", "-")
                assert "status 503" in end["reason"]
            else:
                webs[1].status = 200
                assert talks(client)
                daemon.wait_for(f"backend up backend={webs[1].address} ")


def test_a_backend_that_refuses_clients_while_its_checks_are_good_is_out_for_fail_timeout_only(tmp_path: Path) -> None:
    with Web() as web, Backend(lambda sock: sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n")) as checked:
        file = File(tmp_path, backends=[web.address, checked.address], health=ONCE, fail_timeout="300ms")
        with file.rspd() as daemon:
            eventually(lambda: web.statuses == [200] and checked.accepted == 1)
            web.close()
            for _ in range(2):
                with daemon.connect() as client:
                    client.shutdown(socket.SHUT_WR)
                    receive_all(client)
            daemon.wait_for(f'backend down backend={web.address} reason="Connection refused"')
            with Backend(lambda sock: sock.sendall(b"back"), port=web.port) as back:

                def is_back() -> bool:
                    with daemon.connect() as client:
                        client.shutdown(socket.SHUT_WR)
                        return receive_all(client) == b"back"

                eventually(is_back)
                assert back.accepted == 1
            daemon.wait_for("backend up")


def test_a_backend_that_comes_back_gets_its_share_and_nothing_for_the_time_it_was_away(
    tmp_path: Path, webs: list[Web]
) -> None:
    health = {**OFTEN, "interval": "500ms", "fall": 1, "rise": 1}
    with File(tmp_path, backends=addresses(webs), health=health, fail_timeout="100ms").rspd() as daemon:
        eventually(lambda: webs[0].statuses)
        webs[0].close()
        for _ in range(2):
            exchange(daemon)
        daemon.wait_for("backend down")
        with Web(503, port=webs[0].port) as back:
            eventually(lambda: len(back.statuses) > 1)
            for _ in range(300):  # for longer than fail_timeout
                assert exchange(daemon) == webs[1].address
            back.status = 200
            daemon.wait_for("backend up")
            served = [exchange(daemon) for _ in range(20)]
            assert all(9 <= served.count(address) <= 11 for address in addresses(webs)), served
