"""Backends that are rspd itself, by whatever name: no connection goes round, and chains of proxies work."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.fleet import File, ask, talks, tells
from tests.namespaces import in_namespace
from tests.support import Backend, Daemon, abstract_name, answer, echo, eventually, free_port, is_reset, receive_all

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


def comes_to_rest(daemon: Daemon) -> None:
    """Nothing goes on in the process: it uses no time while others get much of it."""

    def quiet() -> bool:
        before = daemon.cpu_seconds()
        subprocess.run("true", check=True)
        return daemon.cpu_seconds() == before

    eventually(quiet)


@LIMITS
@pytest.mark.parametrize("name", ["127.1", "localhost", "2130706433"])
def test_a_proxy_whose_backend_is_itself_by_another_name_refuses_its_clients_at_once(
    tmp_path: Path, name: str, limit: int
) -> None:
    port = free_port()
    file = File(tmp_path, listen=f"127.0.0.1:{port}", backend=f"{name}:{port}", max_connections=limit)
    with file.rspd() as daemon:
        assert refused(daemon.connect)
        assert looped(daemon) == f'"127.0.0.1:{port}: it is this proxy itself"'
        comes_to_rest(daemon)
        assert len(daemon.find("connection closed")) == 1


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
        comes_to_rest(daemon)
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
            daemon.wait_for("connection closed", 3)
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


def test_the_checks_of_a_proxy_that_is_its_own_backend_go_round_once(tmp_path: Path) -> None:
    port = free_port()
    health = {"interval": "50ms"}
    file = File(tmp_path, listen=f"127.0.0.1:{port}", backend=f"127.1:{port}", health=health)
    with file.rspd() as daemon:
        ends = daemon.wait_for("connection closed", 10)
        assert all("cause=loop" in line or "cause=client-" in line for line in ends), ends


# Addresses of the host other than the loopback's


def proxy_on_all_addresses(folder: str, name: str, limit: str) -> None:
    """Run in a namespace: prints how the client ended, how many loops the log has, and how many connections."""
    file = File(Path(folder), listen="8080", backend=f"{name}:8080", max_connections=int(limit), idle_timeout="1s")
    with file.rspd() as daemon:
        print(refused(daemon.connect))
        daemon.wait_for("connection closed", 1)
        comes_to_rest(daemon)
        print(len(daemon.find("cause=loop")))
        print(len(daemon.find("connection closed")) <= 2)


@LIMITS
@pytest.mark.parametrize("name", ["192.0.2.1", "192.0.2.2", "2001:db8::1"])
def test_the_hosts_own_addresses_are_found_to_lead_back(tmp_path: Path, name: str, limit: int) -> None:
    """192.0.2.2 is a second address of its network: what the host connects to it from is the first."""
    prepare = """
        ip address add 192.0.2.1/24 dev lo
        ip address add 192.0.2.2/24 dev lo
        ip address add 2001:db8::1/64 dev lo nodad
    """
    name = f"[{name}]" if ":" in name else name
    found = in_namespace(proxy_on_all_addresses, str(tmp_path), name, str(limit), prepare=prepare)
    # Serial, the second address is found out only when the first connection has ended.
    loops = "0" if (name, limit) == ("192.0.2.2", 1) else "1"
    assert found == ["True", loops, "True"]
