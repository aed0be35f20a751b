"""Addresses as sockets take them, and as the log shows them."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rspd.config.addresses import parse_address
from rspd.net.address import Address, Peer, SocketAddress, bound_address, format_socket_address, literal, resolve

NUMERIC = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
PORTS = st.integers(0, 65535)


@given(NUMERIC, PORTS)
@settings(max_examples=50)
def test_a_numeric_address_needs_no_lookup(host: str, port: int) -> None:
    known = literal(Address(host, port))
    assert known
    assert (ip_address(known.address[0]), known.address[1]) == (ip_address(host), port)
    assert known.family == (socket.AF_INET6 if ":" in host else socket.AF_INET)
    assert resolve(Address(host, port)) == [known]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (Address(path="/run/rspd.sock"), "/run/rspd.sock"),
        (Address(path="@rspd"), "\0rspd"),
        (Address(path="/run/@rspd"), "/run/@rspd"),
    ],
)
def test_a_unix_address_needs_no_lookup(address: Address, expected: str) -> None:
    assert literal(address) == SocketAddress(socket.AF_UNIX, expected)
    assert resolve(address) == [SocketAddress(socket.AF_UNIX, expected)]


@pytest.mark.parametrize("address", [Address("localhost", 80), Address("nosuch.invalid", 80), Address(port=80)])
def test_what_stands_for_several_addresses_needs_a_lookup(address: Address) -> None:
    assert literal(address) is None


def test_a_port_alone_stands_for_every_address_of_both_families() -> None:
    found = resolve(Address(port=8080))
    assert SocketAddress(socket.AF_INET, ("0.0.0.0", 8080)) in found
    assert {where.address[:2] for where in found} <= {("0.0.0.0", 8080), ("::", 8080)}


def test_a_name_stands_for_each_of_its_addresses_once() -> None:
    found = resolve(Address("localhost", 8080))
    assert len(found) == len(set(found)) >= 1
    assert {where.address[:2] for where in found} <= {("127.0.0.1", 8080), ("::1", 8080)}


def test_an_address_that_cannot_be_looked_up_is_an_oserror_with_its_reason() -> None:
    with pytest.raises(socket.gaierror) as caught:
        resolve(Address("::1%no-such-interface", 80))
    assert caught.value.strerror


@pytest.mark.parametrize("length", [1, 107])
def test_an_abstract_name_of_any_length_the_kernel_takes_can_be_bound(length: int) -> None:
    known = literal(parse_address("@" + "n" * length))
    assert known
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(known.address)
        assert str(SocketAddress(sock.family, sock.getsockname())) == "@" + "n" * length


def test_a_path_of_the_longest_length_the_kernel_takes_can_be_bound(tmp_path: Path) -> None:
    text = f"{tmp_path}/".ljust(107, "s")
    known = literal(parse_address(text))
    assert known
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(known.address)
        assert format_socket_address(sock.getsockname()) == text
    with pytest.raises(ValueError, match="at most 107 bytes"):
        parse_address(text + "s")


def test_a_path_need_not_be_utf_8(tmp_path: Path) -> None:
    path = f"{tmp_path}/\udcff"
    known = literal(parse_address(path))
    assert known
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(known.address)
    assert [name.name for name in tmp_path.iterdir()] == ["\udcff"]


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 80, 0, 0), "[::1]:80"),
        (("fe80::1%lo", 80, 0, 1), "[fe80::1%lo]:80"),
        (("::ffff:192.0.2.7", 80, 0, 0), "192.0.2.7:80"),
        (("::ffff:102:304:5", 80, 0, 0), "[::ffff:102:304:5]:80"),
        (("::192.0.2.7", 80, 0, 0), "[::192.0.2.7]:80"),
        ("/run/rspd.sock", "/run/rspd.sock"),
        ("", "unix"),
        (b"", "unix"),
        (b"\0rspd", "@rspd"),
        (b"\0\xff", "@\\xff"),
        ("\0rspd", "@rspd"),
    ],
)
def test_a_peers_address_is_printed_for_people(address: Peer, text: str) -> None:
    assert format_socket_address(address) == text


@pytest.mark.parametrize("name", [b"\0a\nconnection closed client=forged", "/tmp/a\nb", "/tmp/\x1b[2J"])
def test_a_peers_name_cannot_break_a_line_of_the_log(name: str | bytes) -> None:
    assert format_socket_address(name).isprintable()


@given(st.ip_addresses(), PORTS)
@example(IPv6Address("::ffff:192.0.2.7"), 80)
def test_a_printed_socket_address_can_be_read_again(ip: IPv4Address | IPv6Address, port: int) -> None:
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    host = socket.inet_ntop(family, ip.packed)
    seen_by_people = str(ip.ipv4_mapped) if isinstance(ip, IPv6Address) and ip.ipv4_mapped else host
    assert parse_address(format_socket_address((host, port))) == Address(seen_by_people, port)


# Where a socket is bound


def bound(family: int, where: object, *, v6only: bool = True) -> Address:
    with socket.socket(family) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind(where)  # type: ignore[arg-type]
        return bound_address(sock)


@pytest.mark.parametrize(
    ("family", "host", "v6only", "expected"),
    [
        (socket.AF_INET, "127.0.0.1", True, "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", True, "0.0.0.0"),
        (socket.AF_INET6, "::1", True, "::1"),
        (socket.AF_INET6, "::1", False, "::1"),
        (socket.AF_INET6, "::", True, "::"),
        (socket.AF_INET6, "::", False, ""),
    ],
)
def test_a_bound_tcp_socket_says_where_as_it_would_be_written(
    family: int, host: str, v6only: bool, expected: str
) -> None:
    address = bound(family, (host, 0), v6only=v6only)
    assert address == Address(expected, address.port)
    assert address.port > 0


def test_a_bound_unix_socket_says_where_as_it_would_be_written(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    assert bound(socket.AF_UNIX, path) == Address(path=path) == parse_address(path)
    assert bound(socket.AF_UNIX, "\0rspd test") == Address(path="@rspd test") == parse_address("@rspd test")
