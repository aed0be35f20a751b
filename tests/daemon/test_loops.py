"""Backends that are rspd itself, by whatever name: no connection goes round, and chains of proxies work."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.fleet import File, ask, stays, talks, tells
from tests.manager import service, tcp_listener
from tests.namespaces import in_namespace
from tests.support import (
    Backend,
    Daemon,
    abstract_name,
    answer,
    echo,
    eventually,
    free_port,
    is_reset,
    receive_all,
    skip_for_kernel,
)

IP_LOCAL_PORT_RANGE = 51  # ip(7); not in the socket module

LIMITS = pytest.mark.parametrize("limit", [1, 20], ids=["serial", "many"])


@contextmanager
def short_folder() -> Iterator[str]:
    """A folder whose name leaves room for a unix socket's path."""
    with TemporaryDirectory() as folder:
        yield folder


def refused(connect: Callable[[], socket.socket]) -> bool:
    """Whether a client is reset."""
    try:
        with connect() as client:
            return is_reset(client)
    except ConnectionResetError:
        return True  # it was so before connect(2) returned


def looped(daemon: Daemon, ends: int = 1) -> str:
    """The one line that says so, of so many connections that have ended."""
    lines = daemon.wait_for("connection closed", ends)
    (line,) = [line for line in lines if "cause=loop" in line]
    assert " WARNING " in line
    return line.partition("reason=")[2]


@LIMITS
@pytest.mark.parametrize("name", ["127.1", "localhost", "0x7f000001", "0.0"])
def test_a_proxy_whose_backend_is_itself_by_another_name_refuses_its_clients_at_once(
    tmp_path: Path, name: str, limit: int
) -> None:
    port = free_port()
    file = File(tmp_path, listen=f"127.0.0.1:{port}", backend=f"{name}:{port}", max_connections=limit)
    with file.rspd() as daemon:
        assert refused(daemon.connect)
        # By the name localhost it may have been another address that was tried last.
        host = "0.0.0.0" if name == "0.0" else "127.0.0.1"
        assert f"{host}:{port}: it is this proxy itself" in looped(daemon)
        assert refused(daemon.connect)
        lines = daemon.wait_for("connection closed", 2)
        assert ["cause=loop" in line for line in lines] == [True, True], "each client makes one connection"


@LIMITS
def test_a_client_goes_to_another_backend_where_one_is_the_proxy_itself(tmp_path: Path, limit: int) -> None:
    port = free_port()
    with Backend(tells("A")) as server:
        addresses = [f"127.1:{port}", server.address]
        file = File(tmp_path, listen=f"127.0.0.1:{port}", backends=addresses, max_connections=limit)
        with file.rspd() as daemon:
            assert [ask(daemon) for _ in range(5)] == ["A"] * 5
            (line,) = daemon.find("backend down")
            assert line.endswith(f'backend=127.1:{port} reason="it is this proxy itself"')


def proxies(limit: int, **addresses: tuple[str, str]) -> dict[str, Any]:
    """Keys of proxies by their names, with an address to listen on and one to relay to."""
    each = {name: {"listen": listen, "backend": backend} for name, (listen, backend) in addresses.items()}
    return {"listen": None, "proxies": each, "max_connections": limit}


@LIMITS
def test_two_proxies_that_name_each_other_refuse_their_clients(tmp_path: Path, limit: int) -> None:
    one, two = free_port(), free_port()
    web, mail = (f"127.0.0.1:{one}", f"127.1:{two}"), (f"127.0.0.1:{two}", f"127.0.0.1:{one}")
    with File(tmp_path, **proxies(limit, web=web, mail=mail)).rspd() as daemon:
        for port, names in ((one, "web, mail, web"), (two, "mail, web, mail")):
            assert refused(partial(socket.create_connection, ("127.0.0.1", port), 10))
            line = eventually(lambda names=names: daemon.find(rf"cause=loop.*\({names}\)"))  # type: ignore[misc]
            assert f"it leads back to proxy {names.partition(',')[0]}" in line[0]
        daemon.wait_for("connection closed", 4)
        assert len(daemon.find("cause=loop")) == 2
        assert len(daemon.find("connection closed")) == 4


@LIMITS
def test_a_chain_of_proxies_is_no_loop(tmp_path: Path, limit: int) -> None:
    one, two, three = free_port(), free_port(), free_port()
    with Backend(echo) as server:
        chain = {
            "one": (f"127.0.0.1:{one}", f"127.0.0.1:{two}"),
            "two": (f"127.0.0.1:{two}", f"localhost:{three}"),
            "three": (f"127.0.0.1:{three}", server.address),
        }
        with File(tmp_path, **proxies(limit, **chain)).rspd() as daemon:
            for number in range(1, 4):
                with socket.create_connection(("127.0.0.1", one), 10) as client:
                    assert talks(client)
                daemon.wait_for("connection closed", 3 * number)
            with socket.create_connection(("127.0.0.1", three), 10) as client:
                assert talks(client)
            assert not daemon.find("WARNING")


@LIMITS
def test_unix_sockets_are_the_same_by_every_path(tmp_path: Path, limit: int) -> None:
    with short_folder() as folder:
        Path(folder, "link").symlink_to(folder)
        file = File(tmp_path, listen=f"{folder}/s", backend=f"{folder}/link/s", max_connections=limit)
        with file.rspd() as daemon, socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(f"{folder}/s")
            eventually(lambda: daemon.find("cause=loop"))
            assert looped(daemon) == f'"{folder}/link/s: it is this proxy itself"'


@LIMITS
def test_a_loop_through_unix_sockets_is_found_and_a_chain_works(tmp_path: Path, limit: int) -> None:
    port, name = free_port(), abstract_name()
    with short_folder() as folder, Backend(echo) as server:
        chain = {
            "one": (f"127.0.0.1:{port}", f"{folder}/a"),
            "two": (f"{folder}/a", f"@{name}"),
            "three": (f"@{name}", server.address),
        }
        file = File(tmp_path, **proxies(limit, **chain))
        with file.rspd() as daemon:
            with socket.create_connection(("127.0.0.1", port), 10) as client:
                assert talks(client)
            ends = daemon.wait_for_ends(3)
            assert [end["client"] for end in ends].count("unix") == 2
            assert not daemon.find("WARNING")
            file.reload(daemon, **proxies(limit, **{**chain, "three": (chain["three"][0], f"127.1:{port}")}))
            with socket.create_connection(("127.0.0.1", port), 10) as client:
                assert receive_all(client) == b""  # there is no RST on unix sockets
            assert "(one, two, three, one)" in looped(daemon, 6)


def test_a_reload_may_make_a_loop_and_end_it(tmp_path: Path) -> None:
    port = free_port()
    with Backend(answer) as server:
        file = File(tmp_path, listen=f"127.0.0.1:{port}", backend=server.address)
        with file.rspd() as daemon:
            file.reload(daemon, backend=f"127.1:{port}")
            assert refused(daemon.connect)
            file.reload(daemon, backend=server.address)
            with daemon.connect() as client:
                client.sendall(b"?")
                assert client.recv(2) == b"ok"


def test_the_checks_of_a_proxy_that_is_its_own_backend_make_no_connection_and_one_line(tmp_path: Path) -> None:
    port = free_port()
    health = {"interval": "20ms"}
    file = File(tmp_path, listen=f"127.0.0.1:{port}", backend=f"127.1:{port}", health=health)
    with file.rspd() as daemon:
        (line,) = daemon.wait_for("backend down")
        assert line.endswith(f'backend=127.1:{port} reason="it is this proxy itself"')
        for _ in range(10):
            file.reload(daemon)
        assert len(daemon.find("backend|connection")) == 1


def test_a_way_back_says_nothing_of_the_backend_to_which_it_led(tmp_path: Path) -> None:
    """web's clients go to mail, whose clients go to a server or to web: some of mail's own have no way."""
    one, two = free_port(), free_port()
    with Backend(echo) as server:
        web = {"listen": f"127.0.0.1:{one}", "backend": f"127.0.0.1:{two}", "on_down": "abort"}
        mail = {"listen": f"127.0.0.1:{two}", "backends": [server.address, f"127.0.0.1:{one}"], "on_down": "abort"}
        with File(tmp_path, listen=None, proxies={"web": web, "mail": mail}).rspd() as daemon:
            with ExitStack() as stack:
                clients = [stack.enter_context(socket.create_connection(("127.0.0.1", one), 10)) for _ in range(6)]
                assert [talks(client) for client in clients] == [True] * 6
                for _ in range(6):
                    with suppress(ConnectionResetError):  # refused, and so before connect(2) returned
                        stack.enter_context(socket.create_connection(("127.0.0.1", two), 10))
                daemon.wait_for(r"cause=loop .*\(mail, web, mail\)")
                assert [talks(client) for client in clients] == [True] * 6
            assert not daemon.find("backend down")


def test_a_client_with_the_port_of_one_of_rspds_own_connections_is_served(tmp_path: Path) -> None:
    """The kernel gives a port to several connections that go elsewhere. Here the backend has the port of the proxy."""
    port = free_port()
    with Backend(stays("A"), host="127.0.0.2", port=port) as server:
        with File(tmp_path, listen=f"127.0.0.1:{port}", backend=server.address).rspd() as daemon, ExitStack() as stack:
            first = stack.enter_context(daemon.connect())
            assert first.recv(1) == b"A"
            own = next(iter(own_ports(daemon, port)))
            second = stack.enter_context(socket.socket())
            second.settimeout(10)
            try:
                second.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=HH", own, own))
            except OSError:
                skip_for_kernel("no port can be asked for (IP_LOCAL_PORT_RANGE, Linux 6.3)")
            second.connect(("127.0.0.1", port))
            assert second.recv(1) == b"A"


def own_ports(daemon: Daemon, port: int) -> set[int]:
    """The near ports of what the process has dialled at 127.0.0.2."""
    rows = [row.split() for row in Path(f"/proc/{daemon.pid}/net/tcp").read_text().splitlines()[1:]]
    far = f"0200007F:{port:04X}"
    return {int(row[1].partition(":")[2], 16) for row in rows if row[2] == far and row[3] == "01"}


@LIMITS
def test_every_loopback_address_leads_to_who_listens_on_all(tmp_path: Path, limit: int) -> None:
    """By a socket for both families, as systemd makes them; the check of texts does not know where it listens."""
    with tcp_listener("::") as listener:
        port = listener.getsockname()[1]
        # 127.0.0.5 as one number.
        file = File(tmp_path, listen="fd://web", backend=f"{0x7F000005:#x}:{port}", max_connections=limit)
        with service("-c", str(file.path), sockets={"web": listener}) as daemon:
            assert refused(partial(socket.create_connection, ("127.0.0.1", port), 10))
            assert "it is this proxy itself" in looped(daemon)


# Addresses of the host other than the loopback's


def proxy_on_all_addresses(folder: str, name: str, limit: str) -> None:
    """Run in a namespace: prints how two clients ended, how many loops the log has, and how many connections."""
    file = File(Path(folder), listen="8080", backend=f"{name}:8080", max_connections=int(limit), idle_timeout="500ms")
    with file.rspd() as daemon:
        for number in (1, 2):
            print(refused(daemon.connect))
            daemon.wait_for("connection closed", number)
        for _ in range(3):
            file.reload(daemon)
        print(len(daemon.find("cause=loop")), len(daemon.find("connection closed")))


@LIMITS
@pytest.mark.parametrize("name", ["192.0.2.1", "192.0.2.2", "[2001:db8::1]"])
def test_the_hosts_own_addresses_are_found_to_lead_back(tmp_path: Path, name: str, limit: int) -> None:
    """192.0.2.2 is a second address of its network: what the host connects to it from is the first."""
    prepare = """
        ip address add 192.0.2.1/24 dev lo
        ip address add 192.0.2.2/24 dev lo
        ip address add 2001:db8::1/64 dev lo nodad
    """
    found = in_namespace(proxy_on_all_addresses, str(tmp_path), name, str(limit), prepare=prepare)
    # The second address is found out by who accepts, which in serial mode is nobody before the first has timed out.
    second = {1: "0 2", 20: "2 4"}[limit]
    assert found == ["True", "True", second if name == "192.0.2.2" else "2 2"]
