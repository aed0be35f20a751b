"""The process with backends behind names: what they stand for changes, is wrong in part, or is not known."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.fleet import File, ask, enter, stays, talks, tells
from tests.support import PATIENCE, Backend, Daemon, eventually, private_mounts, receive_all, rspd

# What a process needs of /etc to look at the hosts file, and to know users.
COPIED = ("passwd", "group", "ld.so.cache")


class Hosts:
    """A folder in place of /etc, with a hosts file that may change at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in COPIED:
            shutil.copy(f"/etc/{name}", folder)
        (folder / "host.conf").write_text("multi on\n")
        self.say()

    def say(self, *addresses: str) -> None:
        """Have `web.test` stand for these addresses, or be unknown."""
        self._write("hosts", "".join(f"{address} web.test\n" for address in addresses))
        self._write("nsswitch.conf", "hosts: files\n")

    def hide(self) -> None:
        """Have no question answered: DNS takes the place of the file, and this host has no name server."""
        self._write("nsswitch.conf", "hosts: dns\n")

    def _write(self, name: str, text: str) -> None:
        new = self.folder / f"{name}.new"
        new.write_text(text)
        os.replace(new, self.folder / name)

    @contextmanager
    def rspd(self, file: File) -> Iterator[Daemon]:
        """rspd where they are in force."""
        launcher = [*private_mounts(), "sh", "-ec", 'mount --bind "$0" /etc; exec "$@"', str(self.folder)]
        with rspd("-c", str(file.path), listen=(), launcher=launcher) as daemon:
            yield daemon


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path / "etc")


@contextmanager
def servers(
    *names: str, handler: Callable[[str], Callable[[socket.socket], object]] = tells
) -> Iterator[list[Backend]]:
    """Backends with one port, on 127.0.0.11 and so on."""
    with ExitStack() as stack:
        found: list[Backend] = []
        for number, name in enumerate(names, 11):
            port = found[0].port if found else 0
            found.append(stack.enter_context(Backend(handler(name), port=port, host=f"127.0.0.{number}")))
        yield found


def name_of(server: Backend) -> str:
    return f"web.test:{server.port}"


# A family that is dead


@contextmanager
def hanging(port: int) -> Iterator[None]:
    """A listener on ::1 that has no room: the kernel drops each SYN."""
    with socket.create_server(("::1", port), family=socket.AF_INET6, backlog=0) as listener:
        with socket.create_connection(listener.getsockname()[:2]):
            yield


@pytest.mark.parametrize("resolve", ["one", "each"])
def test_a_family_that_does_not_answer_costs_time_once(tmp_path: Path, hosts: Hosts, resolve: str) -> None:
    hosts.say("::1", "127.0.0.11")
    with servers("A") as (server,), hanging(server.port):
        file = File(tmp_path, backends=name_of(server), resolve=resolve, connect_timeout="3s", fail_timeout="1h")
        with hosts.rspd(file) as daemon:
            for _ in range(50):
                assert ask(daemon) == "A"
            seconds = [float(end["seconds"]) for end in daemon.wait_for_ends(50)]
            slow = [value for value in seconds if value >= 1.4]
            assert len(slow) <= 1, seconds  # half of the time that there is
            assert sum(seconds) - sum(slow) < 5, seconds


@pytest.mark.parametrize("resolve", ["one", "each"])
def test_a_family_that_refuses_costs_no_client_its_connection(tmp_path: Path, hosts: Hosts, resolve: str) -> None:
    hosts.say("::1", "127.0.0.11")
    with servers("A") as (server,), hosts.rspd(File(tmp_path, backends=name_of(server), resolve=resolve)) as daemon:
        assert {ask(daemon) for _ in range(50)} == {"A"}
        assert {end["cause"] for end in daemon.wait_for_ends(50)} == {"backend-closed"}
        assert len(daemon.find("backend down")) == (resolve == "each")


# Answers that change


class Clients:
    """Clients that come one after the other: when each began, and by whom it was served."""

    def __init__(self, daemon: Daemon) -> None:
        self.served: list[tuple[float, str]] = []
        self.errors: list[OSError] = []
        self._daemon = daemon
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._come) for _ in range(2)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _come(self) -> None:
        while not self._end.is_set():
            began = time.monotonic()
            try:
                self.served.append((began, ask(self._daemon)))
            except OSError as error:
                self.errors.append(error)

    def since(self, when: float, count: int) -> set[str]:
        """By whom those were served who came after a time; there are so many at least."""
        eventually(lambda: len([name for began, name in list(self.served) if began > when]) >= count)
        return {name for began, name in list(self.served) if began > when}


def test_while_answers_change_clients_get_what_the_name_stands_for_and_connections_go_on(
    tmp_path: Path, hosts: Hosts
) -> None:
    hosts.say("127.0.0.11", "127.0.0.12")
    with servers(*"ABC") as found:
        file = File(tmp_path, backends=name_of(found[0]), resolve="each", resolve_interval="50ms")
        with hosts.rspd(file) as daemon, Clients(daemon) as clients:
            assert clients.since(0, 20) == {"A", "B"}
            for number, names in enumerate(["B", "BC", "C", "AC", "ABC", "A"], 1):
                hosts.say(*(found["ABC".index(name)].host for name in names))
                (*_, line) = daemon.wait_for("name has changed", number)
                assert line.count("127.0.0.1") == len(names)
                assert clients.since(time.monotonic(), 20) == set(names)
        assert clients.errors == []
        assert not daemon.find("connection closed .* cause=(?!client-closed|backend-closed)")


def test_connections_to_an_address_that_is_gone_go_on_and_when_it_dies_clients_go_elsewhere(
    tmp_path: Path, hosts: Hosts
) -> None:
    hosts.say("127.0.0.11")
    with servers(*"AB", handler=stays) as found:
        file = File(tmp_path, backends=name_of(found[0]), resolve="each", resolve_interval="50ms")
        with hosts.rspd(file) as daemon:
            name, client = enter(daemon)
            with client:
                assert name == "A"
                hosts.say("127.0.0.12")
                daemon.wait_for("name has changed")
                found[0].listener.shutdown(socket.SHUT_RDWR)
                for _ in range(5):
                    name, other = enter(daemon)
                    other.close()
                    assert name == "B"
                assert talks(client)
                assert daemon.find("backend down") == []


def test_an_address_that_goes_and_comes_back_still_has_its_connections(tmp_path: Path, hosts: Hosts) -> None:
    hosts.say("127.0.0.11")
    with servers(*"AB", handler=stays) as found:
        backend = {"address": name_of(found[0]), "max_connections": 1}
        file = File(tmp_path, backends=backend, resolve="each", resolve_interval="50ms", queue_timeout="300ms")
        with hosts.rspd(file) as daemon:
            _, client = enter(daemon)
            with client:
                hosts.say("127.0.0.12")
                daemon.wait_for("name has changed")
                hosts.say("127.0.0.11")
                daemon.wait_for("name has changed", 2)
                with daemon.connect() as further:
                    assert receive_all(further) == b""
                assert [end["cause"] for end in daemon.wait_for_ends(1)] == ["queue-timeout"]
            daemon.wait_for_ends(2)
            name, client = enter(daemon)
            with client:
                assert name == "A"


def test_an_address_that_is_dead_before_the_name_says_so_costs_no_client_its_connection(
    tmp_path: Path, hosts: Hosts
) -> None:
    hosts.say("127.0.0.11", "127.0.0.12")
    with servers(*"AB") as found:
        file = File(tmp_path, backends=name_of(found[0]), resolve="each", resolve_interval="50ms", fail_timeout="100ms")
        with hosts.rspd(file) as daemon, Clients(daemon) as clients:
            assert clients.since(0, 20) == {"A", "B"}
            found[0].close()
            daemon.wait_for("backend down")
            hosts.say("127.0.0.12")
            daemon.wait_for("name has changed")
            assert clients.since(time.monotonic(), 20) == {"B"}
        # Who got nothing was there when it died: no more than come at once.
        lost = len(clients.errors) + sum(not name for _, name in clients.served)
        daemon.wait_for_ends(len(clients.errors) + len(clients.served))
        assert lost == len(daemon.find(f"backend={found[0].address} sent=0 received=0 ")) <= 2


# Lookups that fail


@pytest.mark.parametrize("resolve", ["one", "each"])
def test_a_name_that_is_unknown_at_the_start_is_a_warning_and_serves_when_it_is_known(
    tmp_path: Path, hosts: Hosts, resolve: str
) -> None:
    with servers("A") as (server,):
        file = File(tmp_path, backends=name_of(server), resolve=resolve, resolve_interval="50ms")
        with hosts.rspd(file) as daemon:
            (line,) = daemon.wait_for("name not found")
            assert " WARNING " in line
            assert "name=web.test" in line
            assert ask(daemon) == ""
            assert [end["cause"] for end in daemon.wait_for_ends(1)] == ["backend-unknown"]
            hosts.say("127.0.0.11")
            daemon.wait_for("name found again")
            assert ask(daemon) == "A"
            assert len(daemon.find("name not found")) == 1


@pytest.mark.parametrize("resolve", ["one", "each"])
def test_clients_wait_for_a_name_as_they_wait_for_a_backend(tmp_path: Path, hosts: Hosts, resolve: str) -> None:
    with servers("A") as (server,):
        settings = {"resolve": resolve, "resolve_interval": "50ms", "queue_timeout": "20s"}
        with hosts.rspd(File(tmp_path, backends=name_of(server), **settings)) as daemon, ExitStack() as stack:
            clients = [stack.enter_context(daemon.connect()) for _ in range(10)]
            daemon.wait_for("name not found")
            hosts.say("127.0.0.11")
            assert [receive_all(client) for client in clients] == [b"A"] * 10


@pytest.mark.parametrize("resolve", ["one", "each"])
def test_a_lookup_without_an_answer_takes_nothing_away(tmp_path: Path, hosts: Hosts, resolve: str) -> None:
    hosts.say("127.0.0.11", "127.0.0.12")
    with servers(*"AB") as found:
        file = File(tmp_path, backends=name_of(found[0]), resolve=resolve, resolve_interval="50ms")
        with hosts.rspd(file) as daemon:
            assert ask(daemon)
            hosts.hide()
            (line,) = daemon.wait_for("name not found")
            assert line.endswith("keeping=127.0.0.11,127.0.0.12")
            for _ in range(20):
                assert ask(daemon)
            hosts.say("127.0.0.12")
            daemon.wait_for("name found again")
            assert {ask(daemon) for _ in range(5)} == {"B"}


@pytest.mark.parametrize("resolve", ["one", "each"])
def test_a_name_that_is_gone_is_dialled_no_more_while_open_connections_go_on(
    tmp_path: Path, hosts: Hosts, resolve: str
) -> None:
    hosts.say("127.0.0.11")
    with servers("A", handler=stays) as found:
        file = File(tmp_path, backends=name_of(found[0]), resolve=resolve, resolve_interval="50ms", max_connections=9)
        with hosts.rspd(file) as daemon:
            _, client = enter(daemon)
            with client:
                hosts.say()
                (line,) = daemon.wait_for("name not found")
                assert line.endswith(
                    'WARNING name not found name=web.test reason="Name or service not known" dropped=127.0.0.11'
                )
                assert ask(daemon) == ""
                assert [end["cause"] for end in daemon.wait_for_ends(1)] == ["backend-unknown"]
                assert talks(client)
                hosts.say("127.0.0.11")
                daemon.wait_for("name found again")
                name, other = enter(daemon)
                other.close()
                assert name == "A"
