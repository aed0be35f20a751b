"""The process and the PROXY protocol: backends hear who the client is, from rspd and through HAProxy and nginx."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rspd.protocols.proxy_protocol import SIGNATURE, Header, HostPort, encode
from tests.daemon.test_reload import File, connect, receive, says, talk
from tests.daemon.test_who_may_come import told
from tests.namespaces import in_namespace
from tests.peers.programs import receive_header
from tests.support import (
    PATIENCE,
    Backend,
    Daemon,
    eventually,
    is_reset,
    loopback,
    receive_all,
    reset,
    rspd,
)

versions = pytest.mark.parametrize("version", ["v1", "v2"])

LOCAL = "127.0.0.1"
SERVER = ("198.51.100.2", 443)


class Telling:
    """A backend that expects a PROXY header, answers with its source and destination, and then sends all back."""

    def __init__(self) -> None:
        self.told: list[Header] = []

    def __call__(self, sock: socket.socket) -> None:
        self.told.append(receive_header(sock))
        while data := sock.recv(65536):
            sock.sendall(data)


@pytest.fixture
def telling() -> Telling:
    """The handler of `backend`."""
    return Telling()


@pytest.fixture
def backend(telling: Telling) -> Iterator[Backend]:
    with Backend(telling) as backend:
        yield backend
        assert backend.errors == []


@pytest.fixture
def simple() -> Iterator[Backend]:
    with Backend(says(b"!")) as backend:
        yield backend


def client_at(port: int, host: str = LOCAL) -> socket.socket:
    """A client from this address."""
    return socket.create_connection((LOCAL, port), PATIENCE, source_address=(host, 0))


def exchange(port: int, host: str = LOCAL) -> HostPort:
    """A client comes from this address, and is sent back what it says; its address."""
    with client_at(port, host) as client:
        talk(client)
        name = client.getsockname()
        return name[0], name[1]


def name(where: HostPort) -> str:
    return f"[{where[0]}]:{where[1]}" if ":" in where[0] else f"{where[0]}:{where[1]}"


# Told to backends


@versions
def test_the_backend_hears_who_the_client_is_and_where_it_connected_to(
    version: str, tmp_path: Path, backend: Backend, telling: Telling
) -> None:
    listen = [f"{LOCAL}:0", "127.0.0.9:0", f"{tmp_path}/socket"]
    file = File(tmp_path, listen=listen, backend=backend.address, send_proxy=version)
    with file.rspd() as daemon:
        daemon.wait_for("listening", 3)
        client = exchange(daemon.port, "127.0.0.7")
        (port,) = re.findall(r"127.0.0.9:(\d+)", daemon.log)
        with socket.create_connection(("127.0.0.9", int(port)), PATIENCE) as second:
            talk(second)
            other = second.getsockname()
        with connect(f"{tmp_path}/socket") as third:
            talk(third)
        assert telling.told == [
            Header(client, (LOCAL, daemon.port)),
            Header(other, ("127.0.0.9", int(port))),
            Header(None, None),
        ]
        # What rspd says of itself is no byte of the client's.
        assert [(end["sent"], end["received"]) for end in daemon.wait_for_ends(3)] == [("5", "5")] * 3


def test_an_ipv6_client_is_told_as_such(tmp_path: Path, backend: Backend, telling: Telling) -> None:
    host = loopback(socket.AF_INET6)
    file = File(tmp_path, listen=f"[{host}]:0", backend=backend.address, send_proxy="v2")
    with file.rspd() as daemon, socket.create_connection((host, daemon.port), PATIENCE) as client:
        talk(client)
        assert telling.told == [Header(client.getsockname()[:2], (host, daemon.port))]


@versions
def test_a_link_local_client_is_told_without_its_interface(version: str, tmp_path: Path) -> None:
    """The interface's name means nothing on another host."""
    told = in_namespace(come_link_local, str(tmp_path), version, prepare="ip addr add fe80::7/64 dev lo")
    assert told == ["[fe80::7]", "fe80::7", "fe80::7"]


def come_link_local(folder: str, version: str) -> None:
    """A client connects to its own link-local address. Prints its host as the log has it, then both ends as told."""
    telling = Telling()
    with Backend(telling) as backend:
        file = File(Path(folder), listen="[::]:0", backend=backend.address, send_proxy=version)
        with file.rspd() as daemon:
            with socket.create_connection(("fe80::7%lo", daemon.port), PATIENCE) as client:
                talk(client)
            print(*re.findall(r"client=(\S+):\d+ ", daemon.wait_for("connection closed")[0]))
    for end in telling.told[0]:
        print(end and end[0])


@versions
def test_a_client_that_says_nothing_is_told_too_and_each_backend_that_is_tried_hears_it_once(
    version: str, tmp_path: Path
) -> None:
    def greet(sock: socket.socket) -> None:
        sock.sendall(receive(sock, len(encode(version, (LOCAL, 10000), (LOCAL, 10000)))))

    with Backend(greet) as gone:
        pass
    with Backend(greet) as backend:
        backends = [gone.address, backend.address]
        file = File(tmp_path, listen=f"{LOCAL}:0", backends=backends, send_proxy=version)
        with file.rspd() as daemon, client_at(daemon.port) as client:
            where = client.getsockname()
            header = encode(version, where, (LOCAL, daemon.port))
            data = receive(client, len(encode(version, (LOCAL, 10000), (LOCAL, 10000))))
            assert data == header


def test_a_reload_begins_and_ends_telling_for_new_connections(tmp_path: Path) -> None:
    def first(sock: socket.socket) -> None:
        data = b""
        while not data.endswith(b"hello"):  # what is unread at the end would be an RST
            data += sock.recv(100)
        sock.sendall(data[:5])

    with Backend(first) as backend:
        file = File(tmp_path, listen=f"{LOCAL}:0", backend=backend.address)
        with file.rspd() as daemon:

            def said() -> bytes:
                with client_at(daemon.port) as client:
                    client.sendall(b"hello")
                    return receive_all(client)

            assert said() == b"hello"
            file.reload(daemon, send_proxy="v1")
            assert said() == b"PROXY"
            file.reload(daemon, send_proxy="v2")
            assert said() == SIGNATURE[:5]
            file.reload(daemon, send_proxy="off")
            assert said() == b"hello"


# Told by clients


def told_by(version: str, source: HostPort, data: bytes = b"", destination: HostPort = SERVER) -> bytes:
    """What a proxy in front sends."""
    return encode(version, source, destination) + data


def from_proxy(daemon: Daemon, *parts: bytes, host: str = LOCAL) -> socket.socket:
    """A proxy in front, which has sent this in so many parts."""
    client = client_at(daemon.port, host)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for part in parts:
        client.sendall(part)
    return client


@versions
@pytest.mark.parametrize("source", [("192.0.2.1", 51724), ("2001:db8::1", 51724)], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("bytewise", [False, True], ids=["at once", "one byte at a time"])
def test_whom_a_proxy_in_front_names_is_the_client(
    version: str, source: HostPort, bytewise: bool, tmp_path: Path, simple: Backend
) -> None:
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, accept_proxy=LOCAL)
    data = told_by(version, source, b"hello", ("2001:db8::2", 443) if ":" in source[0] else SERVER)
    with file.rspd() as daemon:
        parts = [data[place : place + 1] for place in range(len(data))] if bytewise else [data]
        with from_proxy(daemon, *parts) as client:
            via = name(client.getsockname())
            assert receive(client, 6) == b"!hello"
            talk(client)
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b""
        daemon.wait_for(f"connection closed client={re.escape(name(source))} via={via} backend={simple.address} ")
        assert daemon.wait_for_ends(1)[0]["sent"] == "10", "the header is no byte of the client's"


@pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", encode("v2", None, None)], ids=["unknown", "local"])
def test_where_the_header_names_nobody_the_one_who_connected_is_the_client(
    header: bytes, tmp_path: Path, simple: Backend
) -> None:
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, accept_proxy="127.0.0.0/8", allow="127.0.0.5")
    with file.rspd() as daemon:
        with from_proxy(daemon, header, host="127.0.0.5") as client:
            assert receive(client, 1) == b"!"
            where = name(client.getsockname())
        daemon.wait_for(f"connection closed client={where} backend=")


def test_from_an_address_that_is_not_to_name_others_a_header_is_relayed_as_it_is(
    tmp_path: Path, simple: Backend
) -> None:
    data = told_by("v1", ("192.0.2.1", 1))
    file = File(tmp_path, listen=[f"{LOCAL}:0", f"{tmp_path}/socket"], backend=simple.address, accept_proxy="127.0.0.2")
    with file.rspd() as daemon, from_proxy(daemon, data) as client, connect(f"{tmp_path}/socket") as unix:
        assert receive(client, 1 + len(data)) == b"!" + data
        where = name(client.getsockname())
        client.close()
        daemon.wait_for(f"connection closed client={where} backend=")
        unix.sendall(data)
        assert receive(unix, 1 + len(data)) == b"!" + data


def test_a_proxy_in_front_may_come_by_a_unix_socket(tmp_path: Path, simple: Backend) -> None:
    path = f"{tmp_path}/socket"
    file = File(tmp_path, listen=path, backend=simple.address, accept_proxy="unix")
    with file.rspd() as daemon:
        with connect(path) as client:
            client.sendall(told_by("v2", ("192.0.2.1", 1)))
            assert receive(client, 1) == b"!"
        daemon.wait_for("connection closed client=192.0.2.1:1 via=unix backend=")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 51724 70000\r\n",
        b"PROXY TCP4 192.0.2.1\r\n",
        SIGNATURE + b"\x31\x11\0\x0c" + bytes(12),
        SIGNATURE + b"\x21\x11\xff\xff" + bytes(100),
    ],
)
def test_a_client_without_a_valid_header_is_reset_and_reaches_no_backend(
    data: bytes, tmp_path: Path, simple: Backend
) -> None:
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, accept_proxy=LOCAL)
    with file.rspd() as daemon, from_proxy(daemon, data) as client:
        assert is_reset(client)
        where = name(client.getsockname())
        lines = daemon.wait_for(rf'WARNING connection closed client={where} backend=- sent=0 received=0 .*reason="exp')
        assert " cause=bad-header " in lines[0]
        with from_proxy(daemon, told_by("v2", ("192.0.2.1", 1))) as good:
            assert receive(good, 1) == b"!"
        daemon.wait_for_ends(2)
        assert simple.accepted == 1


@pytest.mark.parametrize("data", [b"", b"PROXY TCP4 192.0.2.1 ", SIGNATURE + b"\x21"])
def test_a_header_that_is_late_ends_the_connection(data: bytes, tmp_path: Path, simple: Backend) -> None:
    keys = {"accept_proxy": LOCAL, "accept_proxy_timeout": "300ms", "max_connections": 2}
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, **keys)
    with file.rspd() as daemon:
        started = time.monotonic()
        with from_proxy(daemon, data) as client, from_proxy(daemon, told_by("v1", ("192.0.2.1", 1))) as good:
            assert receive(good, 1) == b"!"
            assert is_reset(client)
            assert 0.3 <= time.monotonic() - started < 10
            (end,) = daemon.wait_for_ends(1)
            assert (end["cause"], end["backend"]) == ("header-timeout", "-")
            talk(good)
        assert simple.accepted == 1


def test_the_time_for_the_header_is_for_all_of_it(tmp_path: Path, simple: Backend) -> None:
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, accept_proxy=LOCAL, accept_proxy_timeout="300ms")
    with file.rspd() as daemon, from_proxy(daemon) as client:
        started = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for place in range(100):
                client.sendall(told_by("v1", ("192.0.2.1", 1))[place : place + 1])
                time.sleep(0.05)
        assert time.monotonic() - started >= 0.3
        assert daemon.wait_for_ends(1)[0]["cause"] == "header-timeout"


def test_who_only_looks_whether_the_port_is_open_makes_no_warning(tmp_path: Path, simple: Backend) -> None:
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, accept_proxy=LOCAL)
    with file.rspd() as daemon:
        from_proxy(daemon).close()
        assert daemon.wait_for_ends(1)[0]["cause"] == "client-closed"
        reset(from_proxy(daemon))
        assert daemon.wait_for_ends(2)[1]["cause"] == "client-aborted"
        assert not daemon.find("WARNING")
        assert simple.accepted == 0


def test_allow_and_deny_are_about_the_client_that_is_named(tmp_path: Path, simple: Backend) -> None:
    keys = {"accept_proxy": LOCAL, "allow": "192.0.2.0/24", "deny": "192.0.2.9"}
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, **keys)
    with file.rspd() as daemon:
        for host, welcome in ("192.0.2.1", True), ("192.0.2.9", False), ("198.51.100.1", False), (LOCAL, False):
            with from_proxy(daemon, told_by("v2", (host, 1))) as client:
                if welcome:
                    assert receive(client, 1) == b"!"
                else:
                    assert is_reset(client)
        # Who names nobody is its own client, and from elsewhere it is one in any case.
        with from_proxy(daemon, encode("v2", None, None)) as client:
            assert is_reset(client)
        daemon.wait_for(r'client refused client=192.0.2.9:1 via=127.0.0.1:\d+ reason="in deny 192.0.2.9"')
        eventually(lambda: told(daemon) == 4)
        daemon.wait_for_ends(1)
        assert simple.accepted == 1


def test_the_limit_for_each_client_counts_those_that_are_named_and_ipv6_by_their_network(
    tmp_path: Path, simple: Backend
) -> None:
    keys = {"accept_proxy": LOCAL, "max_connections_per_client": 1, "max_connections": 9}
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, **keys)
    six = ("2001:db8::2", 443)

    def come(stack: ExitStack, host: str) -> socket.socket | None:
        """The next client of this address; None if it is reset."""
        header = told_by("v2", (host, 1), destination=six if ":" in host else SERVER)
        client = stack.enter_context(from_proxy(daemon, header))
        try:
            assert receive(client, 1) == b"!"
        except ConnectionResetError:
            return None
        return client

    with file.rspd() as daemon, ExitStack() as stack:
        first = come(stack, "192.0.2.1")
        assert first
        assert not come(stack, "192.0.2.1")
        assert come(stack, "192.0.2.2")
        assert come(stack, "2001:db8::1")
        assert not come(stack, "2001:db8::ffff:1")
        assert come(stack, "2001:db8:0:1::1")
        first.close()
        daemon.wait_for_ends(1)
        assert come(stack, "192.0.2.1")
        file.reload(daemon, max_connections_per_client=2)
        assert come(stack, "192.0.2.1")
        assert not come(stack, "192.0.2.1")
        reasons = [line.partition("reason=")[2] for line in daemon.find("client refused")]
        assert reasons[0].startswith('"has 1 connection, max_connections_per_client is 1"')


def test_source_goes_by_the_client_that_is_named(tmp_path: Path) -> None:
    with ExitStack() as stack:
        names = [b"%d" % number for number in range(5)]
        backends = [stack.enter_context(Backend(says(each))).address for each in names]
        keys = {"accept_proxy": "127.0.0.0/8", "balance": "source"}
        file = File(tmp_path, listen=f"{LOCAL}:0", backends=backends, **keys)
        with file.rspd() as daemon:

            def backend_of(number: int, via: str) -> bytes:
                with from_proxy(daemon, told_by("v1", (f"192.0.2.{number}", number + 1)), host=via) as client:
                    return receive(client, 1)

            first = [backend_of(number, "127.0.0.1") for number in range(40)]
            assert len(set(first)) > 2, "one proxy in front, many clients"
            assert [backend_of(number, "127.0.0.2") for number in range(40)] == first


def test_reloads_while_a_header_is_awaited_cost_nobody_anything(tmp_path: Path, simple: Backend) -> None:
    keys = {"accept_proxy": LOCAL, "max_connections_per_client": 1, "max_connections": 9}
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, **keys)
    header = told_by("v1", ("192.0.2.1", 1))
    with file.rspd() as daemon, ExitStack() as stack, from_proxy(daemon, header) as first:
        assert receive(first, 1) == b"!"
        first.close()
        daemon.wait_for_ends(1)
        before = len(daemon.descriptors())
        slow = stack.enter_context(from_proxy(daemon, header[:20]))
        eventually(lambda: len(daemon.descriptors()) > before, "it is accepted")
        file.reload(daemon, max_connections_per_client="off", accept_proxy="off")
        file.reload(daemon, max_connections_per_client=1, accept_proxy=LOCAL)
        slow.sendall(header[20:])
        assert receive(slow, 1) == b"!"
        with from_proxy(daemon, header) as second:
            assert is_reset(second), "the slow one counts"
        slow.close()
        daemon.wait_for_ends(2)
        with from_proxy(daemon, header) as third:
            assert receive(third, 1) == b"!"


@versions
def test_through_three_of_us_the_backend_hears_of_the_first_client_and_where_it_went(
    version: str, tmp_path: Path, backend: Backend, telling: Telling
) -> None:
    other = "v2" if version == "v1" else "v1"
    with ExitStack() as stack:
        port = backend.port
        for number, sent in enumerate([version, other, version]):
            accept = "accept_proxy: 127.0.0.0/8\n" if number < 2 else ""
            path = tmp_path / f"{number}.yaml"
            path.write_text(f"listen: 127.0.0.1:0\nbackend: 127.0.0.1:{port}\nsend_proxy: {sent}\n{accept}")
            port = stack.enter_context(rspd("-c", str(path), listen=())).port
        client = exchange(port, "127.0.0.7")
        assert telling.told == [Header(client, (LOCAL, port))]


def test_health_checks_name_nobody(tmp_path: Path, telling: Telling) -> None:
    keys = {"send_proxy": "v2", "health": {"interval": "100ms", "send": "ping", "expect": "ping"}}
    with Backend(telling) as backend:  # its errors may be those of a check that the end of rspd cuts short
        file = File(tmp_path, listen=f"{LOCAL}:0", backend=backend.address, **keys)
        with file.rspd() as daemon:
            eventually(lambda: len(telling.told) > 2)
            exchange(daemon.port)
            assert Header(None, None) in telling.told
            assert not daemon.find("backend down")
