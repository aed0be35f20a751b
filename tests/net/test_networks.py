"""Networks as people write them, and which clients are in them."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rspd.net.address import Peer, host_of
from rspd.net.networks import Network, Networks, client_key, parse_network
from tests.counts import count_instructions

ADDRESSES_4 = st.ip_addresses(v=4)
ADDRESSES_6 = st.ip_addresses(v=6)
ADDRESSES = ADDRESSES_4 | ADDRESSES_6
# Few bits of the address, so that networks and clients often meet; any prefix length.
NEAR_4 = st.integers(0, 15).map(lambda low: IPv4Address(0x0A000000 + low))
NEAR_6 = st.integers(0, 15).map(lambda low: IPv6Address((0x20010DB8 << 96) + low))
PREFIXES_4 = st.builds(lambda a, n: IPv4Network((a, n), strict=False), ADDRESSES_4 | NEAR_4, st.integers(0, 32))
PREFIXES_6 = st.builds(lambda a, n: IPv6Network((a, n), strict=False), ADDRESSES_6 | NEAR_6, st.integers(0, 128))
PREFIXES = PREFIXES_4 | PREFIXES_6


def networks(*texts: str) -> Networks:
    return Networks([parse_network(text) for text in texts])


def of(client: IPv4Address | IPv6Address) -> str:
    """The host of an accepted client with this address."""
    family = socket.AF_INET if client.version == 4 else socket.AF_INET6
    return host_of((socket.inet_ntop(family, client.packed), 1))


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.0.0/8", Network(socket.AF_INET, 10 << 24, 8)),
        ("0.0.0.0/0", Network(socket.AF_INET, 0, 0)),
        ("192.0.2.7", Network(socket.AF_INET, 0xC0000207, 32)),
        ("2001:db8::/32", Network(socket.AF_INET6, 0x20010DB8 << 96, 32)),
        ("::/0", Network(socket.AF_INET6, 0, 0)),
        ("::1", Network(socket.AF_INET6, 1, 128)),
        ("unix", Network(socket.AF_UNIX, 0, 0)),
    ],
)
def test_each_form_of_a_network_is_read_and_printed_as_it_was_written(text: str, network: Network) -> None:
    assert parse_network(text) == network
    assert str(network) == text


@given(PREFIXES)
@example(IPv6Network("::ffff:0:0/95", strict=False))
def test_each_network_that_python_knows_is_read_as_that(expected: IPv4Network | IPv6Network) -> None:
    network = parse_network(str(expected))
    mapped = expected.network_address.ipv4_mapped if isinstance(expected, IPv6Network) else None
    if mapped:
        expected = IPv4Network((mapped, expected.prefixlen - 96))
    assert network == (
        socket.AF_INET if expected.version == 4 else socket.AF_INET6,
        int(expected.network_address),
        expected.prefixlen,
    )
    assert parse_network(str(network)) == network
    assert ip_network(str(network)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "/8",
        "10",
        "10.0.0",
        "10.0.0.0.0",
        "010.0.0.1",
        "256.0.0.1",
        "10.0.0.1:80",
        " 10.0.0.1",
        "10.0.0.1\n",
        "10.0.0.1\0",
        "10.0.0.0 /8",
        "\u0661.0.0.1",
        "[::1]",
        "1:2:3",
        "::1%lo",
        "fe80::%lo/10",
        "::\udc80",
        "office.example",
        "UNIX",
        "unix/0",
        "any",
        "fd://x",
    ],
)
def test_what_is_no_network_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(ValueError, match="expected a network") as raised:
        parse_network(text)
    forms = "10.0.0.0/8, 192.0.2.7, 2001:db8::/32 or unix"
    assert str(raised.value) == f"expected a network ({forms}), found {text!r}"


@pytest.mark.parametrize(
    "prefix", ["", "33", "-1", "+8", "8.0", "255.0.0.0", "\N{SUPERSCRIPT TWO}", "0008", "9" * 5000, "8/8"]
)
def test_a_wrong_prefix_length_is_refused_with_the_range(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix length") as raised:
        parse_network(f"10.0.0.0/{prefix}")
    assert str(raised.value) == f"expected a prefix length from 0 to 32 after the slash, found {f'10.0.0.0/{prefix}'!r}"


def test_a_prefix_length_of_ipv6_is_128_at_most() -> None:
    assert parse_network("::1/128") == parse_network("::1")
    with pytest.raises(ValueError, match="expected a prefix length from 0 to 128 after the slash, found '::/129'"):
        parse_network("::/129")


@pytest.mark.parametrize(
    ("text", "network", "host"),
    [
        ("10.1.2.3/8", "10.0.0.0/8", "10.1.2.3"),
        ("192.0.2.1/0", "0.0.0.0/0", "192.0.2.1"),
        ("2001:db8::1/64", "2001:db8::/64", "2001:db8::1"),
        ("::ffff:10.0.0.1/104", "::ffff:10.0.0.0/104", "::ffff:10.0.0.1"),
        ("::ffff:10.0.0.0/64", "::/64", "::ffff:10.0.0.0"),
    ],
)
def test_bits_after_the_prefix_are_refused_with_what_was_probably_meant(text: str, network: str, host: str) -> None:
    with pytest.raises(ValueError, match="this address alone") as raised:
        parse_network(text)
    expected = f"expected {network} (the network) or {host} (this address alone), found {text!r}"
    assert str(raised.value) == expected
    parse_network(network)
    parse_network(host)


@given(st.lists(PREFIXES, max_size=8), ADDRESSES | NEAR_4 | NEAR_6)
@example([IPv6Network("::/0")], IPv4Address("127.0.0.1"))
@example([IPv4Network("0.0.0.0/0")], IPv6Address("::1"))
@example([IPv6Network("::ffff:10.0.0.0/104")], IPv4Address("10.1.2.3"))
@example([IPv4Network("10.0.0.0/8")], IPv6Address("::ffff:10.1.2.3"))
def test_a_client_is_in_a_set_when_it_is_in_one_of_its_networks(
    prefixes: list[IPv4Network | IPv6Network], client: IPv4Address | IPv6Address
) -> None:
    def unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
        return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address

    expected = []
    for prefix in prefixes:
        first = unmapped(prefix.network_address)
        # Python has no mapped networks: it takes the first 96 bits for an address's own.
        length = prefix.prefixlen - (96 if first.version != prefix.version else 0)
        if unmapped(client) in ip_network((first, length)):
            expected.append(length)
    found = networks(*map(str, prefixes)).find(of(client))
    assert (found and found.length) == (max(expected) if expected else None)


@pytest.mark.parametrize("name", [("10.1.2.3", 1), ("::ffff:10.1.2.3", 1, 0, 0)])
def test_an_ipv4_client_is_the_same_on_a_socket_for_both_families(name: Peer) -> None:
    host = host_of(name)
    assert networks("10.0.0.0/8").find(host)
    assert networks("::ffff:10.0.0.0/104").find(host)
    assert not networks("::/0").find(host)
    assert not networks("11.0.0.0/8", "unix").find(host)


def test_the_smallest_network_is_found() -> None:
    found = networks("0.0.0.0/0", "10.1.2.3", "10.0.0.0/8", "10.1.0.0/16").find
    assert [str(found(host)) for host in ("10.1.2.3", "10.1.2.4", "10.2.0.0", "8.8.8.8", "::1")] == [
        "10.1.2.3",
        "10.1.0.0/16",
        "10.0.0.0/8",
        "0.0.0.0/0",
        "None",
    ]


def test_unix_stands_for_clients_of_unix_sockets_alone() -> None:
    assert networks("unix").find("")
    assert not networks("0.0.0.0/0", "::/0").find("")
    assert not networks("unix").find("127.0.0.1")


def test_nobody_is_in_no_networks() -> None:
    assert all(not networks().find(host) for host in ("", "127.0.0.1", "::1"))


@pytest.mark.parametrize("host", ["localhost", "10.0.0.1:80", "::x", "unix"])
def test_a_client_that_has_no_numeric_address_is_an_error_of_the_caller(host: str) -> None:
    with pytest.raises(OSError, match="illegal IP address"):
        assert networks("0.0.0.0/0").find(host)


@given(ADDRESSES)
def test_clients_are_known_by_their_address_or_64(client: IPv4Address | IPv6Address) -> None:
    mapped = client.ipv4_mapped if isinstance(client, IPv6Address) else None
    if mapped or client.version == 4:
        assert client_key(of(client)) == str(mapped or client)
    else:
        assert ip_network(client_key(of(client))) == ip_network((client, 64), strict=False)


def test_clients_of_unix_sockets_are_one() -> None:
    assert client_key("") == "unix"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_client_is_recognised_by_what_accept_returns(address: str) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        with socket.create_connection((address, listener.getsockname()[1])):
            sock, peer = listener.accept()
            sock.close()
    assert networks(address).find(host_of(peer))
    assert ip_address(client_key(host_of(peer)).split("/")[0]) in ip_network(
        (address, 64 if ":" in address else 32), strict=False
    )


@pytest.mark.parametrize("lengths", [[32], [8, 16, 24, 32]])
def test_a_look_up_costs_the_same_however_many_networks_have_those_lengths(lengths: list[int]) -> None:
    def cost(count: int) -> int:
        several = Networks(
            Network(socket.AF_INET, n << 32 - length, length) for n in range(count) for length in lengths
        )
        found, executed = count_instructions(lambda: int(several.find("255.255.255.255") is not None))
        assert not found
        return executed

    assert cost(200) == cost(1)
