"""Several proxies in one process: each with its own name, addresses, backends, limits; reloads, sockets, the end."""

from __future__ import annotations

import itertools
import os
import re
import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.daemon.test_activation import refused
from tests.daemon.test_reload import File, connect, fail_to_reload, listens, receive, says, talk
from tests.daemon.test_workers import Load
from tests.manager import Service, service, tcp_listener
from tests.support import (
    PATIENCE,
    Backend,
    Daemon,
    echo,
    eventually,
    free_port,
    is_reset,
    receive_all,
)

# Each proxy of these tests listens on an address of its own, at a port that the kernel picks.
WEB, MAIL, NEWS = "127.0.0.1", "127.0.0.2", "127.0.0.3"

Keys = dict[str, object]


def proxy(host: str, *backends: Backend, **keys: object) -> Keys:
    return {"listen": f"{host}:0", "backends": [backend.address for backend in backends], **keys}


def port_of(daemon: Daemon, host: str) -> int:
    """The port that is listened on, as the log had it last."""
    pattern = rf"(?:address=|listen=|,){re.escape(host)}:(\d+)"
    return int([match for line in daemon.wait_for(pattern) for match in re.findall(pattern, line)][-1])


def client_of(daemon: Daemon, host: str) -> socket.socket:
    return socket.create_connection((host, port_of(daemon, host)), PATIENCE)


def who(daemon: Daemon, host: str) -> bytes:
    """The name that the backend of a new client tells."""
    with client_of(daemon, host) as client:
        client.shutdown(socket.SHUT_WR)
        return receive_all(client)


@contextmanager
def served(daemon: Daemon, host: str, name: bytes) -> Iterator[socket.socket]:
    """A client that is being served by the backend of this name."""
    with client_of(daemon, host) as client:
        assert receive(client, len(name)) == name
        yield client


def waits(client: socket.socket) -> bool:
    """Whether nobody serves a client, for a while."""
    return not select.select([client], [], [], 0.2)[0]


@pytest.fixture
def one() -> Iterator[Backend]:
    with Backend(says(b"one")) as backend:
        yield backend


@pytest.fixture
def two() -> Iterator[Backend]:
    with Backend(says(b"two")) as backend:
        yield backend


# Each for itself


def test_each_proxy_has_its_own_backends_and_its_name_is_in_its_lines(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    file = File(tmp_path, proxies={"web": proxy(WEB, one), "mail.2": proxy(MAIL, two)}, log_level="debug")
    with file.rspd() as daemon:
        for host, name, backend in (WEB, "web", one), (MAIL, "mail.2", two):
            daemon.wait_for(f"INFO +listening address={host}:{port_of(daemon, host)} proxy={name}$")
            with client_of(daemon, host) as client:
                assert receive(client, 3) == (b"one" if backend is one else b"two")
                address = f"127.0.0.1:{client.getsockname()[1]}"
            daemon.wait_for(f"connection opened client={address} proxy={name} backend={backend.address}$")
            daemon.wait_for(f"connection closed client={address} proxy={name} backend={backend.address} sent=")


def test_a_lone_proxy_may_have_a_name_too(tmp_path: Path, one: Backend) -> None:
    file = File(tmp_path, proxies={"web": proxy(WEB, one)})
    with file.rspd() as daemon:
        assert who(daemon, WEB) == b"one"
        assert daemon.wait_for_ends(1)[0]["proxy"] == "web"


def test_backends_that_go_down_and_come_up_are_logged_for_their_proxy(tmp_path: Path, one: Backend) -> None:
    with Backend(echo) as gone:
        pass
    file = File(tmp_path, fail_timeout="50ms", proxies={"web": proxy(WEB, gone), "mail": proxy(MAIL, one)})
    with file.rspd() as daemon:
        assert who(daemon, WEB) == b""
        daemon.wait_for(f'WARNING backend down proxy=web backend={gone.address} reason="Connection refused"$')
        with Backend(says(b"back"), port=gone.port):
            eventually(lambda: who(daemon, WEB) == b"back")
            daemon.wait_for(f"INFO +backend up proxy=web backend={gone.address} seconds=")
        assert who(daemon, MAIL) == b"one"
        assert not daemon.find("backend (up|down) proxy=mail")


def test_the_status_tells_each_proxy_and_its_backends(tmp_path: Path, one: Backend, two: Backend) -> None:
    with Backend(echo) as gone:
        pass
    # `gone` is tried for the first client.
    mail = proxy(MAIL, gone, two, fail_timeout="1h")
    file = File(tmp_path, proxies={"web": proxy(WEB, one, max_connections=7), "mail": mail})
    with service("-c", str(file.path)) as daemon:
        daemon.notify.wait_for("READY=1")
        first = f"web serving 0 of 7, backend {one.address}"
        assert daemon.notify.status == f"0 served; {first}; mail serving 0 of 1, 2 of 2 backends up"
        up = rf"1 of 2 backends up \({gone.address} down: Connection refused\)"
        with served(daemon, MAIL, b"two"):
            daemon.notify.wait_for_status(f"1 served; {first}; mail serving 1 of 1, {up}")
        daemon.notify.wait_for_status(f"1 served; {first}; mail serving 0 of 1, {up}")
        file.write(proxies={"web": {}})
        fail_to_reload(daemon)
        pattern = f"1 served; {first}; mail .* {up}; reload failed: {file.path}:1: proxies.web.*"
        daemon.notify.wait_for_status(pattern)
        file.reload(daemon, proxies={"mail": mail})
        daemon.notify.wait_for_status(f"serving 0 of 1, 1 served, {up}")
    daemon.notify.wait_for_status(f"ended, 1 served, {up}")


def test_the_status_tells_of_a_backend_that_goes_down_and_comes_up_while_nobody_comes(
    tmp_path: Path, one: Backend
) -> None:
    with Backend(echo) as two:
        web = proxy(WEB, one, two, health={"interval": "100ms", "rise": 1})
        file = File(tmp_path, proxies={"web": web, "mail": proxy(MAIL, one)})
        with service("-c", str(file.path)) as daemon:
            daemon.notify.wait_for("READY=1")
            two.close()
            up = rf"1 of 2 backends up \({two.address} down: Connection refused\)"
            daemon.notify.wait_for_status(f"0 served; web serving 0 of 1, {up}; mail .*")
            with Backend(echo, port=two.port):
                daemon.notify.wait_for_status("0 served; web serving 0 of 1, 2 of 2 backends up; mail .*", 2)


def test_clients_that_wait_for_a_place_are_told_of_for_their_proxy(tmp_path: Path, one: Backend, two: Backend) -> None:
    file = File(tmp_path, proxies={"web": proxy(WEB, one), "mail": proxy(MAIL, two)})
    with service("-c", str(file.path)) as daemon, served(daemon, MAIL, b"two") as client, client_of(daemon, MAIL):
        daemon.wait_for("WARNING all places taken, clients wait proxy=mail max_connections=1 waiting=1$")
        web = f"web serving 0 of 1, backend {one.address}"
        mail = f"mail serving 1 of 1{{}}, backend {two.address}"
        daemon.notify.wait_for_status(f"1 served; {web}; {mail.format(', 1 waiting')}")
        client.close()
        daemon.notify.wait_for_status(f"2 served; {web}; {mail.format('')}")


def test_each_proxy_has_its_own_limits_and_the_top_of_the_file_is_for_those_without(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    file = File(
        tmp_path,
        max_connections=2,
        idle_timeout="300ms",
        proxies={"web": proxy(WEB, one), "mail": proxy(MAIL, two, max_connections=1, idle_timeout="1h")},
    )
    with file.rspd() as daemon, served(daemon, MAIL, b"two") as longest, client_of(daemon, MAIL) as third:
        started = time.monotonic()
        with served(daemon, WEB, b"one") as client, served(daemon, WEB, b"one") as other:
            assert waits(third), "mail has room for one, and web for two"
            assert is_reset(client)
            assert is_reset(other)
        assert time.monotonic() - started >= 0.3
        ends = daemon.wait_for_ends(2)
        assert {(end["proxy"], end["cause"]) for end in ends} == {("web", "idle-timeout")}
        talk(longest)
        longest.close()
        assert receive(third, 3) == b"two"


def test_max_connections_of_the_command_line_is_for_all(tmp_path: Path, one: Backend, two: Backend) -> None:
    file = File(tmp_path, proxies={"web": proxy(WEB, one, max_connections=7), "mail": proxy(MAIL, two)})
    with service("-c", str(file.path), "--max-connections", "3") as daemon:
        daemon.notify.wait_for("READY=1")
        assert re.findall(r"serving 0 of (\d+)", daemon.notify.status) == ["3", "3"]


def test_there_have_to_be_descriptors_for_all_proxies_together(tmp_path: Path, one: Backend, two: Backend) -> None:
    proxies = {"web": proxy(WEB, one, max_connections=300), "mail": proxy(MAIL, two, max_connections=300)}
    file = File(tmp_path, proxies=proxies)
    daemon = Daemon("-c", str(file.path), wait=False, limit=(1000, 1000))
    try:
        assert daemon.wait() == 71
        assert re.match(r"rspd: max_connections 600 \(of all proxies together\) needs 12\d\d descriptors", daemon.log)
    finally:
        daemon.kill()


# Reloads


def test_a_reload_adds_changes_and_removes_proxies_and_all_connections_go_on(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    web, mail = proxy(WEB, one, max_connections=9), proxy(MAIL, one, max_connections=9)
    file = File(tmp_path, proxies={"web": web, "mail": mail})
    with file.rspd() as daemon, ExitStack() as stack:
        clients = [stack.enter_context(served(daemon, host, b"one")) for host in (WEB, MAIL)]
        port = port_of(daemon, MAIL)
        file.reload(daemon, proxies={"web": {**web, "backends": [two.address]}, "news": proxy(NEWS, two)})
        assert daemon.find(rf"reloaded listen={WEB}:\d+,{NEWS}:\d+$")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((MAIL, port), PATIENCE)
        clients += [stack.enter_context(served(daemon, host, b"two")) for host in (WEB, NEWS)]
        for client in clients:
            talk(client)
        # One of the same name as one that was taken out is another.
        file.reload(daemon, proxies={"web": web, "mail": {**mail, "backends": [two.address]}})
        clients.append(stack.enter_context(served(daemon, MAIL, b"two")))
        for client in clients:
            talk(client)
        for number, (client, name) in enumerate(zip(clients, ["web", "mail", "web", "news", "mail"], strict=True), 1):
            client.close()
            end = daemon.wait_for_ends(number)[-1]
            assert (end["proxy"], end["cause"]) == (name, "client-closed")
        # What stays is not told of again.
        listening = [re.findall(r"address=([0-9.]+):\d+ proxy=(\w+)$", line) for line in daemon.find(" listening ")]
        assert listening == [[(WEB, "web")], [(MAIL, "mail")], [(NEWS, "news")], [(MAIL, "mail")]]
        taken_out = [line.partition("INFO ")[2].strip() for line in daemon.find("proxy taken out")]
        assert taken_out == ["proxy taken out proxy=mail connections=1", "proxy taken out proxy=news connections=1"]
    assert daemon.find("ended served=5$")


def test_how_many_were_served_never_goes_back_though_the_last_client_of_a_proxy_taken_out_leaves(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    web, mail = proxy(WEB, one), proxy(MAIL, two)
    file = File(tmp_path, proxies={"web": web, "mail": mail})
    with service("-c", str(file.path)) as daemon:
        with served(daemon, MAIL, b"two"):
            file.reload(daemon, proxies={"web": web})
            daemon.notify.wait_for_status("serving 0 of 1, 1 served, .*")
        daemon.wait_for_ends(1)
        with served(daemon, WEB, b"one"):
            daemon.notify.wait_for_status("serving 1 of 1, 2 served, .*")
    counts = [int(count) for message in daemon.notify.messages for count in re.findall(r"(\d+) served", message.status)]
    assert counts == sorted(counts)
    assert counts[-1] == 2


def leave_descriptors(daemon: Daemon, count: int) -> None:
    """Let the process open no more than so many. A user cannot take that back."""
    taken = {int(number) for number in os.listdir(f"/proc/{daemon.pid}/fd")}
    free = (number for number in itertools.count() if number not in taken)
    _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    limit = min(hard, next(itertools.islice(free, count, None)))
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, limit))


@pytest.mark.parametrize(("count", "done"), [(1, False), (2, True), (3, True)])
def test_a_reload_for_which_there_are_too_few_descriptors_changes_nothing(
    tmp_path: Path, one: Backend, count: int, done: bool
) -> None:
    web = proxy(WEB, one, max_connections=31)  # a place more: who is full looks for the next, and has one in reserve
    before = {"web": {**web, "max_connections": 1}}
    after = {"mail": proxy(MAIL, one), **before, "news": proxy(NEWS, one)}
    file = File(tmp_path, proxies={"web": web})
    with file.rspd() as daemon, ExitStack() as stack:
        clients = [stack.enter_context(served(daemon, WEB, b"one")) for _ in range(29)]
        # The last client gets the one that rspd keeps in reserve.
        leave_descriptors(daemon, 1)
        clients.append(stack.enter_context(served(daemon, WEB, b"one")))
        daemon.wait_for("accepting pauses")

        def leave() -> None:
            clients.pop().close()
            daemon.wait_for_ends(30 - len(clients))

        leave()
        # So few clients as this allows do not need what those that are there already have.
        file.reload(daemon, proxies=before)
        leave()
        leave_descriptors(daemon, count)
        there = sorted(daemon.descriptors())
        file.write(proxies=after)
        daemon.signal(signal.SIGHUP)
        line = daemon.wait_for("reload failed|reloaded", 2)[-1]
        if done:
            assert " reloaded listen=" in line
        else:
            assert "Too many open files" in line
            assert sorted(daemon.descriptors()) == there
            assert len(daemon.find(" listening ")) == 1
        while clients:
            talk(clients[0])
            leave()
        if done:
            for host in (MAIL, NEWS):
                assert who(daemon, host) == b"one"
        assert who(daemon, WEB) == b"one"


def test_an_address_goes_from_one_proxy_to_another_and_who_waits_there_is_served(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    web, mail = proxy(WEB, one), proxy(MAIL, two, max_connections=4)
    file = File(tmp_path, proxies={"web": web, "mail": mail})
    with file.rspd() as daemon, served(daemon, WEB, b"one") as open_one, client_of(daemon, WEB) as waiting:
        port = port_of(daemon, WEB)
        assert waits(waiting)
        both = [web["listen"], mail["listen"]]
        file.reload(daemon, proxies={"web": {**web, "listen": f"{NEWS}:0"}, "mail": {**mail, "listen": both}})
        assert port_of(daemon, WEB) == port
        assert receive(waiting, 3) == b"two"
        talk(open_one)
        open_one.close()
        assert daemon.wait_for_ends(1)[0]["proxy"] == "web"
        waiting.close()
        assert daemon.wait_for_ends(2)[1]["proxy"] == "mail"
        assert who(daemon, NEWS) == b"one"


def test_an_address_that_has_gone_to_another_proxy_is_told_of_after_those_it_had(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    a, b, c = (f"{WEB}:{free_port()}" for _ in range(3))
    proxies = {"web": {**proxy(WEB, one), "listen": a}, "mail": {**proxy(WEB, two), "listen": b}}
    file = File(tmp_path, proxies=proxies)
    with file.rspd() as daemon:
        file.reload(daemon, proxies={**proxies, "web": {**proxies["web"], "listen": [a, c]}})
        file.reload(daemon, proxies={"web": {**proxies["web"], "listen": [a, c, b]}})
        file.reload(daemon)
        told = [line.partition("listen=")[2] for line in daemon.find("reloaded")]
        assert told == [f"{a},{c},{b}"] * 3


def test_addresses_that_are_exchanged_again_and_again_refuse_nobody(tmp_path: Path) -> None:
    def answer(name: bytes) -> Backend:
        return Backend(lambda sock: sock.sendall(name) if sock.recv(100) else None)

    with answer(b"one") as one, answer(b"two") as two:
        web, mail = proxy(WEB, one, max_connections=3), proxy(MAIL, two, max_connections=3)
        exchanged = {**web, "listen": mail["listen"]}, {**mail, "listen": web["listen"]}
        file = File(tmp_path, proxies={"web": web, "mail": mail})
        with file.rspd() as daemon:
            with Load(lambda: client_of(daemon, WEB)) as load, Load(lambda: client_of(daemon, MAIL)) as other:
                for turn in range(20):
                    load.more(10)
                    first, second = exchanged if turn % 2 == 0 else (web, mail)
                    file.reload(daemon, proxies={"web": first, "mail": second})
                    # And from both to one that is new.
                    file.reload(daemon, proxies={f"only-{turn}": {**web, "listen": [f"{WEB}:0", f"{MAIL}:0"]}})
            assert set(load.ends) == set(other.ends) == {"one", "two"}


def test_from_one_proxy_to_several_and_back_nobody_is_refused_or_cut(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    file = File(tmp_path, listen=f"{WEB}:0", backend=one.address)
    with file.rspd() as daemon, served(daemon, WEB, b"one") as first, client_of(daemon, WEB) as second:
        port = port_of(daemon, WEB)
        assert waits(second)
        file.reload(daemon, listen=None, backend=None, proxies={"web": proxy(WEB, two), "mail": proxy(MAIL, one)})
        assert receive(second, 3) == b"two"
        with client_of(daemon, WEB) as third:
            assert waits(third)
            file.reload(daemon, listen=f"{WEB}:0", backend=one.address, proxies=None)
            assert port_of(daemon, WEB) == port
            assert receive(third, 3) == b"one"
            for number, (client, name) in enumerate(((first, None), (second, "web"), (third, None)), 1):
                talk(client)
                client.close()
                assert daemon.wait_for_ends(number)[-1].get("proxy") == name


@pytest.mark.parametrize("order", [1, -1])
def test_a_port_of_every_local_address_goes_to_another_proxy_as_that_of_one(
    tmp_path: Path, one: Backend, two: Backend, order: int
) -> None:
    port = free_port()
    first, second = [str(port), f"{WEB}:{port}"][::order]
    web, mail = proxy(NEWS, one, max_connections=3), proxy(MAIL, two, max_connections=3)
    file = File(tmp_path, proxies={"web": {**web, "listen": first}, "mail": mail})
    with file.rspd() as daemon, connect(f"{WEB}:{port}") as client:
        assert receive(client, 3) == b"one"
        file.reload(daemon, proxies={"web": web, "mail": {**mail, "listen": second}})
        with connect(f"{WEB}:{port}") as other:
            assert receive(other, 3) == b"two"
        assert listens(f"127.0.0.9:{port}") == (second == str(port))
        talk(client)


def test_a_unix_socket_goes_from_one_proxy_to_another_and_is_removed_with_the_last(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    path = tmp_path / "socket"
    web, mail = proxy(WEB, one, max_connections=3), proxy(MAIL, two, max_connections=3)
    file = File(tmp_path, proxies={"web": {**web, "listen": str(path)}, "mail": mail})
    with file.rspd() as daemon, connect(str(path)) as client:
        assert receive(client, 3) == b"one"
        inode = path.stat().st_ino
        file.reload(daemon, proxies={"mail": {**mail, "listen": str(path)}})
        with connect(str(path)) as other:
            assert receive(other, 3) == b"two"
        assert path.stat().st_ino == inode
        file.reload(daemon, proxies={"mail": mail})
        assert not path.exists()
        talk(client)


@pytest.mark.parametrize("health", ["off", {"interval": "100ms", "rise": 1}])
def test_who_waits_for_a_backend_of_a_proxy_that_is_taken_out_is_served_when_one_is_back(
    tmp_path: Path, one: Backend, health: object
) -> None:
    with Backend(echo) as gone:
        pass
    web = proxy(WEB, one)
    file = File(tmp_path, proxies={"web": web, "mail": proxy(MAIL, gone, queue_timeout="1h", health=health)})
    with service("-c", str(file.path)) as daemon:
        if health != "off":
            daemon.wait_for("backend down proxy=mail")
        client = client_of(daemon, MAIL)
        daemon.notify.wait_for_status(".* mail serving 1 of 1, backend .* down: .*")
        file.reload(daemon, proxies={"web": web})
        with client, Backend(says(b"back"), port=gone.port):
            assert receive(client, 4) == b"back"
            talk(client)


def test_the_order_of_the_proxies_means_nothing(tmp_path: Path, one: Backend, two: Backend) -> None:
    proxies = {"web": proxy(WEB, one, two), "mail": proxy(MAIL, two)}
    file = File(tmp_path, proxies=proxies)
    with file.rspd() as daemon:
        with served(daemon, MAIL, b"two") as client:
            assert who(daemon, WEB) == b"one"
            daemon.wait_for_ends(1)
            before = sorted(daemon.descriptors())
            file.reload(daemon, proxies=dict(reversed(proxies.items())))
            assert sorted(daemon.descriptors()) == before
            assert who(daemon, WEB) == b"two", "its turn goes on"
            talk(client)
        file.reload(daemon, proxies=dict(reversed(proxies.items())))
        assert who(daemon, MAIL) == b"two"


@pytest.mark.parametrize("place", ["web", "news", "mail"])
def test_an_address_that_one_proxy_cannot_have_changes_nothing_for_any(
    tmp_path: Path, one: Backend, two: Backend, place: str
) -> None:
    proxies = {"web": proxy(WEB, one, max_connections=3), "mail": proxy(MAIL, two, max_connections=3)}
    file = File(tmp_path, proxies=proxies)
    with file.rspd() as daemon, socket.create_server(("127.0.0.1", 0)) as busy, ExitStack() as stack:
        clients = [stack.enter_context(served(daemon, WEB, b"one")), stack.enter_context(served(daemon, MAIL, b"two"))]
        before = sorted(daemon.descriptors())
        wanted = {"news": proxy(NEWS, one), "mail": proxy(MAIL, one), "web": proxy(f"{NEWS}9", two)}
        wanted[place] = {**wanted[place], "listen": [f"127.0.0.1:{busy.getsockname()[1]}", "127.0.0.9:0"]}
        file.write(proxies=wanted)
        (reason,) = fail_to_reload(daemon)
        assert reason.startswith(f"cannot listen on 127.0.0.1:{busy.getsockname()[1]}: Address already in use")
        assert sorted(daemon.descriptors()) == before
        for client in clients:
            talk(client)
        assert who(daemon, WEB) == b"one"
        assert who(daemon, MAIL) == b"two"


def test_proxies_do_not_go_with_addresses_on_the_command_line(tmp_path: Path, one: Backend, two: Backend) -> None:
    file = File(tmp_path, backend=two.address)
    with file.rspd("-l", f"{WEB}:0", "-b", one.address) as daemon:
        file.write(backend=None, proxies={"web": proxy(WEB, two)})
        (reason,) = fail_to_reload(daemon)
        assert reason.startswith(f"{file.path}:1: proxies: ")
        assert who(daemon, WEB) == b"one"


# Sockets from systemd


def passed(sock: socket.socket) -> socket.socket:
    """A client of a passed socket."""
    return socket.create_connection(sock.getsockname(), PATIENCE)


def who_at(sock: socket.socket) -> bytes:
    with passed(sock) as client:
        client.shutdown(socket.SHUT_WR)
        return receive_all(client)


def names_of(daemon: Service) -> list[tuple[str, str]]:
    """Which proxy has which socket."""
    return re.findall(r'listening address=\S+ proxy=(\S+) socket="(.*?)"', daemon.log)


def test_a_socket_goes_to_the_proxy_of_its_name_or_to_the_one_that_names_it(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    proxies = {
        "web": {"backend": one.address},
        "mail": {"listen": ["fd://smtp", "fd://submission", f"{MAIL}:0"], "backend": two.address},
        "news": proxy(NEWS, one),
    }
    file = File(tmp_path, proxies=proxies)
    with tcp_listener() as web, tcp_listener() as smtp, tcp_listener() as submission:
        sockets = {"smtp": smtp, "web": web, "submission": submission}
        with service("-c", str(file.path), sockets=sockets, wait=False) as daemon:
            daemon.notify.wait_for("READY=1")
            daemon.wait_for("listening address=", 5)
            assert sorted(names_of(daemon)) == [("mail", "smtp"), ("mail", "submission"), ("web", "web")]
            assert [who_at(sock) for sock in (web, smtp, submission)] == [b"one", b"two", b"two"]
            assert [who(daemon, host) for host in (MAIL, NEWS)] == [b"two", b"one"]


def test_a_passed_socket_goes_from_one_proxy_to_another_with_those_who_wait_in_it(
    tmp_path: Path, one: Backend, two: Backend
) -> None:
    file = File(tmp_path, proxies={"web": {"backend": one.address}, "mail": proxy(MAIL, two)})
    with tcp_listener() as web, service("-c", str(file.path), sockets={"web": web}) as daemon:
        with passed(web) as first, passed(web) as second:
            assert receive(first, 3) == b"one"
            file.reload(daemon, proxies={"mail": {"listen": "fd://web", "backend": two.address}})
            assert receive(second, 3) == b"two"
            talk(first)
        file.reload(daemon, proxies=None, backend=one.address)
        assert who_at(web) == b"one"
        file.reload(daemon, backend=None, proxies={"web": {"backend": two.address}, "mail": proxy(MAIL, one)})
        assert who_at(web) == b"two"


def test_a_socket_for_nobody_is_an_error_at_the_start(tmp_path: Path, one: Backend, two: Backend) -> None:
    file = File(tmp_path, proxies={"web": proxy(WEB, one), "mail": {"backend": two.address}})
    with tcp_listener() as sock:
        advice = "add fd://extra, or call it as a proxy (FileDescriptorName=), or stop it"
        assert refused("-c", str(file.path), sockets={"mail": sock, "extra": sock}) == [
            f"socket 'extra' from systemd: not in listen; {advice}"
        ]
        assert refused("-c", str(file.path), sockets={"web": sock}) == [
            "proxies.mail.listen: missing, expected an address, or a socket from systemd named mail"
        ]
        file.write(proxies={"web": proxy(WEB, one), "mail": {"listen": "fd://smtp", "backend": two.address}})
        lines = refused("-c", str(file.path), sockets={"mail": sock})
        assert lines[0] == "proxies.mail.listen fd://smtp: no such socket from systemd, passed are mail"
        assert lines[1].startswith("socket 'mail' from systemd: not in listen; ")


def test_a_reload_that_leaves_a_socket_to_nobody_changes_nothing(tmp_path: Path, one: Backend, two: Backend) -> None:
    file = File(tmp_path, proxies={"web": {"backend": one.address}, "mail": proxy(MAIL, two)})
    with tcp_listener() as web, service("-c", str(file.path), sockets={"web": web}) as daemon:
        file.write(proxies={"mail": proxy(MAIL, one), "news": proxy(NEWS, one)})
        (reason,) = fail_to_reload(daemon)
        assert reason.startswith("socket 'web' from systemd: not in listen; add fd://web, or call it as a proxy")
        assert [who_at(web), who(daemon, MAIL)] == [b"one", b"two"]


# The end


def test_at_the_end_each_proxy_drains_for_its_own_time(tmp_path: Path, one: Backend, two: Backend) -> None:
    keys = {"web": proxy(WEB, one, drain_timeout="100ms"), "mail": proxy(MAIL, two, drain_timeout="1h")}
    gone = proxy(NEWS, one, drain_timeout="2s")
    file = File(tmp_path, proxies={**keys, "news": gone})
    with file.rspd() as daemon, ExitStack() as stack:
        short = stack.enter_context(served(daemon, WEB, b"one"))
        long = stack.enter_context(served(daemon, MAIL, b"two"))
        taken_out = stack.enter_context(served(daemon, NEWS, b"one"))
        file.reload(daemon, proxies=keys)
        started = time.monotonic()
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("ending connections=3 drain_timeout=0.1,2,3600$")
        assert is_reset(short)
        talk(taken_out)
        assert is_reset(taken_out)
        assert time.monotonic() - started >= 2
        talk(long)
        long.close()
        assert daemon.wait() == 0
        ends = [(end["proxy"], end["cause"]) for end in daemon.wait_for_ends(3)]
        assert ends == [("web", "drain-timeout"), ("news", "drain-timeout"), ("mail", "client-closed")]
        assert daemon.find("ended served=3$")


def test_a_second_signal_ends_the_connections_of_all(tmp_path: Path, one: Backend, two: Backend) -> None:
    file = File(tmp_path, drain_timeout="1h", proxies={"web": proxy(WEB, one), "mail": proxy(MAIL, two)})
    with file.rspd() as daemon, served(daemon, WEB, b"one") as client, served(daemon, MAIL, b"two") as other:
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("ending connections=2")
        daemon.signal(signal.SIGTERM)
        assert is_reset(client)
        assert is_reset(other)
        assert daemon.wait() == 0


def test_it_is_idle_only_when_all_are_those_taken_out_too(tmp_path: Path, one: Backend, two: Backend) -> None:
    keys = {"web": proxy(WEB, one)}
    file = File(tmp_path, exit_idle_time="1s", proxies={**keys, "mail": proxy(MAIL, two)})
    with file.rspd() as daemon:
        with served(daemon, MAIL, b"two") as client:
            file.reload(daemon, proxies=keys)
            # It looks whether it is idle each second, and just before the second look this client leaves.
            time.sleep(1.7)
            assert daemon.process.poll() is None
            talk(client)
            left = time.monotonic()
        assert daemon.wait() == 0
        assert time.monotonic() - left >= 1.0
        daemon.wait_for("idle seconds=1$")
