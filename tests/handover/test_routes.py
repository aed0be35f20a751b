"""A restart of the service, and an upgrade in its place, with clients of routes in each of their states."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_handover import fixed
from tests.daemon.test_handover_upgrade import upgraded
from tests.daemon.test_handover_waiting import come, hears, limit_file_size, waits
from tests.daemon.test_service import let_pass
from tests.fleet import File, talks
from tests.keeper import BEFORE, in_time, managed
from tests.running.routed import ELSEWHERE, SSH, WEB, hello
from tests.support import PATIENCE, Backend, Daemon, echo, is_reset, receive_all, rspd

TLS = hello("a.tls.example")


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend(echo) as backend:
        yield backend


@pytest.fixture
def other() -> Iterator[Backend]:
    with Backend(echo) as other:
        yield other


@pytest.fixture
def routes(backend: Backend, other: Backend) -> dict[str, Any]:
    """The keys of a proxy with routes; one backend has room for one client."""
    return {
        "listen": fixed(),
        "max_connections": 100,
        "queue_timeout": "60s",
        "first_bytes_timeout": "30s",
        "routes": [
            {"host": "web.example", "pool": "web"},
            {"server_name": "*.tls.example", "backend": other.address},
            {"protocol": "ssh", "backend": other.address},
        ],
        "pools": {"web": {"backends": [{"address": backend.address, "max_connections": 1}]}},
    }


@pytest.fixture
def file(tmp_path: Path, routes: dict[str, Any]) -> File:
    return File(tmp_path, **routes)


class Clients:
    """One of each kind, in front of the proxy of `routes`."""

    def __init__(self, stack: ExitStack, daemon: Daemon, wait: Callable[[int], object]) -> None:
        """wait: until so many clients are served."""
        self._stack, self._daemon = stack, daemon
        self.web, self.ssh = self._come(WEB), self._come(SSH)
        assert hears(self.web, WEB)
        assert hears(self.ssh, SSH)
        self.queued = self._come(WEB)
        self.silent, self.begun, self.hello = self._come(b""), self._come(WEB[:20]), self._come(TLS[:90])
        wait(6)

    def _come(self, says: bytes) -> socket.socket:
        client = self._stack.enter_context(self._daemon.connect())
        client.sendall(says)
        return client

    def answered(self) -> socket.socket:
        """One more, that gets an answer, and reads it later."""
        return self._come(ELSEWHERE)

    def go_on(self) -> None:
        """Those that are relayed do."""
        assert talks(self.web)
        assert talks(self.ssh)

    def end(self) -> None:
        """Each gets its backend, in order, and ends."""
        self.silent.sendall(SSH)
        self.hello.sendall(TLS[90:])
        assert hears(self.silent, SSH)
        assert hears(self.hello, TLS)
        self.web.close()
        assert hears(self.queued, WEB)
        self.begun.sendall(WEB[20:])
        self.queued.close()
        assert hears(self.begun, WEB)
        for client in (self.silent, self.hello, self.begun, self.ssh):
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b""


def by_route(ends: list[dict[str, str]]) -> list[tuple[str | None, ...]]:
    """Of each line what the route, and what is said, is; in the order of the alphabet."""
    return sorted((end["route"], end.get("name", ""), end["protocol"], end.get("handovers")) for end in ends)


def expected(handovers: str | None) -> list[tuple[str | None, ...]]:
    """The lines of `Clients`."""
    return [
        ('"*.tls.example"', '"a.tls.example"', "tls", handovers),
        ('"ssh"', "", "ssh", handovers),
        ('"ssh"', "", "ssh", handovers),
        *[('"web.example"', '"web.example"', "http", handovers)] * 3,
    ]


def test_clients_of_routes_go_on_through_restarts_in_whatever_state_they_are(file: File, backend: Backend) -> None:
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        clients = Clients(stack, service.daemon, lambda count: waits(service, count))
        for _ in range(3):
            answered = clients.answered()
            service.store.wait_for_status(r".*, none \d+")
            before = service.restart()
            assert before.find("handed over connections=7 ")
            assert service.daemon.find("took over connections=7$")
            assert receive_all(answered).startswith(b"HTTP/1.1 404 ")
            answered.close()
            (end,) = service.daemon.wait_for_ends(1)
            assert (end["cause"], end["name"], end["handovers"]) == ("no-route", '"other.example"', "1")
            clients.go_on()
        assert backend.accepted == 1
        clients.end()
        ends = service.daemon.wait_for_ends(7)[1:]
        assert by_route(ends) == expected("3")
        assert {end["cause"] for end in ends} == {"client-closed"}
        counted = r".*, by route: web\.example 3, \*\.tls\.example 1, ssh 2, none 3(;.*)?"
        service.store.wait_for_status(counted)


def test_clients_of_routes_go_on_in_the_program_as_it_is_executed_anew(file: File, backend: Backend) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon, ExitStack() as stack:
        clients = Clients(stack, daemon, lambda _: None)
        for number in range(1, 4):
            answered = clients.answered()
            assert answered.recv(9, socket.MSG_WAITALL) == b"HTTP/1.1 "
            assert upgraded(daemon.process.pid) == (0, "")
            daemon.wait_for("took over connections=7", number)
            assert receive_all(answered).startswith(b"404 ")
            answered.close()
            clients.go_on()
            daemon.wait_for_ends(number)
        assert backend.accepted == 1
        clients.end()
        ends = daemon.wait_for_ends(9)
        assert by_route(ends[3:]) == expected("3")
        assert [(end["cause"], end["handovers"]) for end in ends[:3]] == [("no-route", "1")] * 3


@pytest.mark.parametrize("says", [b"", WEB[:20]], ids=["nothing", "half a head"])
def test_the_time_for_first_bytes_before_the_restart_counts(file: File, says: bytes) -> None:
    file.write(first_bytes_timeout="5s")
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        came = time.monotonic()
        client = come(stack, service.daemon, says)
        waits(service, 1)
        waiting = time.monotonic()
        let_pass(BEFORE)
        service.restart()
        back = time.monotonic()
        if says:
            assert receive_all(client).startswith(b"HTTP/1.1 408 ")
        else:
            assert is_reset(client)
        client.close()
        (end,) = service.daemon.wait_for_ends(1)
        assert in_time(end, 5, came, waiting, back), end
        known = ("first-bytes-timeout", "http", "1") if says else ("no-route", "silent", "1")
        assert (end["cause"], end["protocol"], end["handovers"]) == known


def test_clients_go_on_by_routes_as_they_go_and_come_in_the_file(
    file: File, routes: dict[str, Any], backend: Backend, other: Backend
) -> None:
    plain = {"routes": None, "pools": None, "backends": [{"address": other.address}]}
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        clients = Clients(stack, service.daemon, lambda count: waits(service, count))
        file.write(**plain)
        service.restart()
        clients.go_on()
        assert hears(clients.queued, WEB)
        assert hears(clients.begun, WEB[:20])
        assert hears(clients.hello, TLS[:90])
        clients.silent.sendall(b"x")
        assert hears(clients.silent, b"x")
        file.write(**routes, backends=None)
        service.restart()
        clients.go_on()
        later = come(stack, service.daemon, WEB)
        waits(service, 7)
        assert talks(clients.queued)
        assert backend.accepted == 1
        clients.web.close()
        assert hears(later, WEB), "the client from before counted at its backend"
        for client in (clients.queued, clients.begun, clients.hello, clients.silent, clients.ssh, later):
            client.close()
        ends = service.daemon.wait_for_ends(7)
        assert sorted((end.get("route", ""), end["backend"], end.get("handovers", "")) for end in ends) == sorted(
            [
                ('"web.example"', backend.address, "2"),
                ('"web.example"', backend.address, ""),
                ('"ssh"', other.address, "2"),
                *[("", other.address, "2")] * 4,
            ]
        )


def test_a_client_that_waits_for_a_route_of_two_configurations_ago_is_told_so_in_its_protocol(
    tmp_path: Path, routes: dict[str, Any], other: Backend
) -> None:
    new = {"listen": fixed(), "backend": other.address}
    file = File(tmp_path, listen=None, max_connections=None, proxies={"old": routes, "new": new})
    host, port = routes["listen"].split(":")
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        first, second = (stack.enter_context(socket.create_connection((host, int(port)), PATIENCE)) for _ in range(2))
        first.sendall(WEB)
        assert hears(first, WEB)
        second.sendall(WEB)
        service.store.wait_for_status(r".*old serving 2 of .*")
        file.reload(service.daemon, proxies={"new": new})
        service.restart()
        assert talks(first)
        assert receive_all(second).startswith(b"HTTP/1.1 502 ")
        second.close()
        (end,) = service.daemon.wait_for_ends(1)
        assert (end["cause"], end["name"], end["proxy"]) == ("backend-unknown", '"web.example"', "old")


@pytest.mark.parametrize("pool", ["of the proxy", "of the file"])
def test_clients_of_a_proxy_that_is_gone_go_on_by_its_routes(
    tmp_path: Path, routes: dict[str, Any], other: Backend, pool: str
) -> None:
    new = {"listen": fixed(), "backend": other.address}
    shared = routes.pop("pools") if pool == "of the file" else None
    routes["listen"] = listen = fixed()
    file = File(tmp_path, listen=None, max_connections=None, proxies={"old": routes, "new": new}, pools=shared)
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        service.daemon.wait_for("listening", 2)
        assert f"127.0.0.1:{service.daemon.port}" == listen
        clients = Clients(stack, service.daemon, lambda _: service.store.wait_for_status(r".*old serving 6 of .*"))
        file.write(proxies={"new": new}, pools=None)
        service.restart()
        assert service.daemon.find("took over connections=6$")
        clients.go_on()
        clients.end()
        assert by_route(service.daemon.wait_for_ends(6)) == expected("1")


def test_a_process_that_cannot_write_its_state_goes_on_with_clients_of_routes(file: File) -> None:
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        clients = Clients(stack, service.daemon, lambda count: waits(service, count))
        limit_file_size(service.daemon, 0)
        answered = clients.answered()
        service.store.wait_for_status(r".*, none 1")
        before = service.begin_to_stop()
        before.wait_for("cannot hand over, connections drain reason=.File too large")
        limit_file_size(before, resource.RLIM_INFINITY)
        assert receive_all(answered).startswith(b"HTTP/1.1 404 ")
        answered.close()
        clients.go_on()
        clients.end()
        assert before.wait() == 0
        assert by_route(before.wait_for_ends(7)[1:]) == expected(None)


def test_a_process_whose_file_is_wrong_goes_on_by_the_routes_of_the_process_before(file: File, other: Backend) -> None:
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        clients = Clients(stack, service.daemon, lambda count: waits(service, count))
        file.write(routes=[{"host": "web.example", "pool": "wbe"}])
        service.restart()
        assert service.daemon.find("serving by the settings of the process before: .*no such pool: wbe")
        clients.go_on()
        another = clients.answered()
        assert receive_all(another).startswith(b"HTTP/1.1 404 ")
        another.close()
        clients.end()
        assert by_route(service.daemon.wait_for_ends(7)[1:]) == expected("1")


def test_a_pool_that_all_proxies_share_knows_in_the_next_process_which_backend_is_down(
    tmp_path: Path, backend: Backend, other: Backend
) -> None:
    other.close()
    pool = {"backends": [backend.address, other.address], "fail_timeout": "10m"}
    proxies = {name: {"listen": fixed(), "max_connections": 9, "routes": [{"pool": "both"}]} for name in ("a", "b")}
    file = File(tmp_path, listen=None, max_connections=None, proxies=proxies, pools={"both": pool})
    with managed("-c", str(file.path)) as service:
        service.daemon.wait_for("listening", 2)
        for _ in range(2):
            with service.daemon.connect() as client:
                assert talks(client)
        service.daemon.wait_for(f"backend down pool=both backend={other.address} ")
        service.store.wait_for_status(r".*1 of 2 backends up .*1 of 2 backends up .*")
        service.restart()
        service.store.wait_for_status(rf".*\({other.address} down: Connection refused\), by route: default 2; b .*")
        assert not service.daemon.find("backend down")
