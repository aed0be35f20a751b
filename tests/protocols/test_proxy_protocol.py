"""rspd/protocols/proxy_protocol.py: headers encoded and parsed."""

from __future__ import annotations

import ipaddress
import re
import socket
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rspd.protocols.proxy_protocol import (
    SIGNATURE,
    V1_MAX,
    Header,
    HeaderError,
    HostPort,
    _crc32c,
    encode,
    parse,
)

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

NOBODY = Header(None, None)
STARTS = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN ", b"PROXY UNKNOWN\r\n", SIGNATURE)
CLIENT4, SERVER4 = ("192.0.2.1", 51724), ("198.51.100.2", 443)
CLIENT6, SERVER6 = ("2001:db8::1", 51724), ("2001:db8::2", 443)
LINE = b"PROXY TCP4 192.0.2.1 198.51.100.2 51724 443\r\n"

versions = pytest.mark.parametrize("version", ["v1", "v2"])


def v2(command: int = 0x21, kind: int = 0x11, block: bytes = b"", length: int | None = None) -> bytes:
    """A version 2 header with these fields; `length` where it is not that of the block."""
    return SIGNATURE + struct.pack("!BBH", command, kind, len(block) if length is None else length) + block


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


BLOCK4 = bytes((192, 0, 2, 1, 198, 51, 100, 2)) + struct.pack("!HH", 51724, 443)
BLOCK6 = bytes.fromhex("20010db800000000000000000000000120010db8000000000000000000000002") + BLOCK4[8:]
LARGEST = v2(block=BLOCK4 + tlv(4, bytes(16384 - 16 - 12 - 3)))
WHOLE = [
    LINE,
    b"PROXY TCP6 2001:db8::1 2001:db8::2 51724 443\r\n",
    b"PROXY UNKNOWN\r\n",
    b"PROXY UNKNOWN ffff::1 what it may be\r\n",
    v2(block=BLOCK4),
    v2(kind=0x21, block=BLOCK6),
    v2(block=BLOCK4 + tlv(4, b"x" * 300)),
    v2(0x20, 0),
    v2(0x20, 0x77, b"ignored"),
    v2(kind=0x31, block=bytes(216)),
]


def ports() -> st.SearchStrategy[int]:
    return st.integers(0, 65535)


def addresses() -> st.SearchStrategy[HostPort]:
    mapped = st.ip_addresses(v=4).map(lambda host: ipaddress.IPv6Address(f"::ffff:{host}"))
    return st.tuples((st.ip_addresses() | mapped).map(str), ports())


def plain(address: HostPort) -> HostPort:
    """IPv4-mapped IPv6 as IPv4, the rest in its canonical form, by other means than rspd's."""
    host = ipaddress.ip_address(address[0])
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped:
        host = host.ipv4_mapped
    # The C library writes the IPv4-compatible addresses (RFC 4291) with dots.
    return socket.inet_ntop(socket.AF_INET if host.version == 4 else socket.AF_INET6, host.packed), address[1]


# Encoded, parsed


@versions
@given(source=addresses(), destination=addresses(), rest=st.binary(max_size=40))
def test_what_is_encoded_is_parsed_and_what_follows_is_no_part_of_it(
    version: str, source: HostPort, destination: HostPort, rest: bytes
) -> None:
    header = encode(version, source, destination)
    assert len(header) <= (V1_MAX if version == "v1" else 52)
    assert parse(header + rest) == (Header(plain(source), plain(destination)), len(header))


@pytest.mark.parametrize(
    ("source", "destination", "line", "block"),
    [
        (CLIENT4, SERVER4, LINE, v2(block=BLOCK4)),
        (CLIENT6, SERVER6, b"PROXY TCP6 2001:db8::1 2001:db8::2 51724 443\r\n", v2(kind=0x21, block=BLOCK6)),
        (None, None, b"PROXY UNKNOWN\r\n", v2(0x20, 0)),
        (None, SERVER4, b"PROXY UNKNOWN\r\n", v2(0x20, 0)),
        (CLIENT4, None, b"PROXY UNKNOWN\r\n", v2(0x20, 0)),
        (("::ffff:192.0.2.1", 51724), SERVER4, LINE, v2(block=BLOCK4)),
        (
            CLIENT4,
            SERVER6,
            b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 51724 443\r\n",
            v2(kind=0x21, block=bytes.fromhex("00000000000000000000ffffc0000201") + BLOCK6[16:]),
        ),
    ],
)
def test_headers_are_as_the_specification_has_them(
    source: HostPort | None, destination: HostPort | None, line: bytes, block: bytes
) -> None:
    assert encode("v1", source, destination) == line
    assert encode("v2", source, destination) == block


@pytest.mark.parametrize("header", WHOLE)
def test_each_part_of_a_header_asks_for_more(header: bytes) -> None:
    found = parse(header)
    assert found
    assert found[1] == len(header)
    for size in range(len(header)):
        assert parse(header[:size]) is None


@pytest.mark.parametrize("header", [header for header in WHOLE if b"UNKNOWN " not in header])
def test_a_header_that_begins_with_a_wrong_byte_is_refused(header: bytes) -> None:
    for place in range(12 if header.startswith(SIGNATURE) else 11):
        for wrong in {0, 10, 32, 255, header[place] ^ 1, header[place] ^ 32} - {header[place]}:
            changed = header[:place] + bytes((wrong,)) + header[place + 1 :]
            with pytest.raises(HeaderError):
                parse(changed)
            # A U for a T may still become UNKNOWN, and a 4 for a 6 has to wait for the addresses.
            if not any(start.startswith(changed[: place + 1]) for start in STARTS):
                with pytest.raises(HeaderError):
                    parse(changed[: place + 1])


@given(st.binary(max_size=200))
@example(b"\r\n")
@example(b"P")
def test_bytes_that_are_no_header_are_refused_at_once(data: bytes) -> None:
    if any(start.startswith(data[: len(start)]) for start in STARTS):
        return
    with pytest.raises(HeaderError, match=r"^expected a PROXY protocol header, found b"):
        parse(data)


@given(st.sampled_from([SIGNATURE, SIGNATURE + b"!", SIGNATURE + b"!\x11\x00", b"PROXY TCP4 ", LINE[:-8]]), st.binary())
def test_whatever_follows_a_good_start_is_parsed_or_refused_but_never_a_crash(start: bytes, rest: bytes) -> None:
    found, text = None, ""
    try:
        found = parse(start + rest)
    except HeaderError as error:
        text = str(error)
    assert text.isprintable()
    assert not text or re.match("expected .*, found ", text)
    if found:
        header, size = found
        assert 15 <= size <= len(start + rest)
        for version in ("v1", "v2"):
            again = parse(encode(version, *header))
            assert again
            assert again[0] == header


HOSTS = {
    "TCP4": ["0.0.0.0", "255.255.255.255", "10.0.0.1"],
    "TCP6": ["::", "::1", "1::", "0001:DB8::00ff", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "::ffff:1.2.3.4"],
    "": [
        *("256.0.0.1", "01.2.3.4", "1.2.3", "1.2.3.4.5", "1.2.3.", ".1.2.3", "00001::", "1:2:3:4:5:6:7", ":1", "1:"),
        *("1:2:3:4:5:6:7:8:9", "1::2::3", ":::", "::1.2.3", "1.2.3.4::", "::g", "fe80::1%lo", "localhost"),
    ],
}
NUMBERS = {
    True: ["0", "1", "443", "65535"],
    False: ["65536", "99999", "100000", "00", "01", "", "-1", "+1", "1.0", "0x1", "\u0661"],
}


def lines(family: str) -> st.SearchStrategy[tuple[str, list[str], list[str], str]]:
    """The parts of a line of this family, each of which is good more often than not."""
    good, other = st.sampled_from(HOSTS[family]), st.sampled_from([*HOSTS["TCP4"], *HOSTS["TCP6"], *HOSTS[""]])
    host = st.one_of(good, good, good, other, st.text("01:.af", max_size=8))
    number = st.one_of(*[st.sampled_from(NUMBERS[True])] * 3, st.sampled_from(NUMBERS[False]))
    pairs = st.lists(host, min_size=2, max_size=2), st.lists(number, min_size=2, max_size=2)
    return st.tuples(st.just(family), *pairs, st.sampled_from(["", "", "", " ", " x", "\r", "\0"]))


@given(lines("TCP4") | lines("TCP6"))
def test_a_line_is_parsed_if_its_addresses_and_ports_are_strictly_such(
    parts: tuple[str, list[str], list[str], str],
) -> None:
    family, hosts, numbers, extra = parts
    line = f"PROXY {family} {' '.join(hosts)} {' '.join(numbers)}{extra}\r\n".encode()
    kind = ipaddress.IPv4Address if family == "TCP4" else ipaddress.IPv6Address
    try:
        expected = [str(kind(host)) for host in hosts if "%" not in host]
    except ValueError:
        expected = []
    if len(expected) == 2 and set(numbers) <= set(NUMBERS[True]) and not extra:
        source, destination = zip(expected, map(int, numbers), strict=True)
        assert parse(line) == (Header(plain(source), plain(destination)), len(line))
    else:
        with pytest.raises(HeaderError):
            parse(line)


@pytest.mark.parametrize(
    "data",
    [
        b"PROXY  TCP4 192.0.2.1 198.51.100.2 51724 443\r\n",
        b"PROXY TCP4  192.0.2.1 198.51.100.2 51724 443\r\n",
        b"PROXY TCP4 192.0.2.1  198.51.100.2 51724 443\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 51724 443 \r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 51724\r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 \r\n",
        b"PROXY TCP5 ",
        b"PROXY UDP4 ",
        b"PROXY UNKNOWNS\r\n",
        b"PROXY UNKNOWN\n",
        b"PROXY UNKNOWN \n",
        b"PROXY UNKNOWN \r\r\n",
        b"PROXY UNKNOWN a\nb\r\n",
        b"proxy tcp4 ",
        LINE.replace(b"443", b"0443"),
        LINE.replace(b"443", b"65536"),
        LINE.replace(b"51724", b"051724"),
        LINE.replace(b"192.0", b"192.00"),
        LINE[:-2] + b"\r\r",
        LINE[:-2] + b"\n",
        LINE[:-2] + b"\r\r\n",
        LINE[:-2] + b"\rG",
        b"PROXY TCP4 192.0.2.1\tx",
        b"PROXY TCP4 \xff",
    ],
)
def test_a_malformed_line_is_refused(data: bytes) -> None:
    with pytest.raises(HeaderError, match=r"^expected .*, found b"):
        parse(data)


def test_a_line_ends_within_107_bytes() -> None:
    full = b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    longest = b"PROXY UNKNOWN %b %b 65535 65535\r\n" % (full, full)
    assert len(longest) == V1_MAX
    assert parse(longest + b"more") == (NOBODY, V1_MAX)
    assert parse(longest[:-1]) is None
    for line in (longest[:-2] + b"x\r\n", b"PROXY TCP6 " + b" " * 96, b"PROXY TCP4 " + b"1" * 500):
        assert parse(line[: V1_MAX - 1]) is None
        for size in (V1_MAX, len(line)):
            with pytest.raises(HeaderError, match="CRLF within 107 bytes"):
                parse(line[:size])


def test_only_local_and_proxy_of_version_2_are_commands() -> None:
    for command in range(256):
        data = v2(command, block=BLOCK4)
        if command in (0x20, 0x21):
            assert parse(data) == (NOBODY if command == 0x20 else Header(CLIENT4, SERVER4), len(data))
        else:
            with pytest.raises(HeaderError, match=f"found {command:#04x}"):
                parse(data[:13])


def test_families_and_transports_that_are_not_assigned_are_refused_except_of_local() -> None:
    blocks = {0x11: BLOCK4, 0x12: BLOCK4, 0x21: BLOCK6, 0x22: BLOCK6, 0x31: bytes(216), 0x32: bytes(216)}
    found = {0x11: Header(CLIENT4, SERVER4), 0x21: Header(CLIENT6, SERVER6)}
    for kind in range(256):
        local = v2(0x20, kind, b"x")
        assert parse(local) == (NOBODY, len(local))
        data = v2(kind=kind, block=blocks.get(kind, b"x"))
        if kind >> 4 > 3 or kind & 15 > 2:
            with pytest.raises(HeaderError, match=f"found {kind:#04x}"):
                parse(data[:14])
        else:
            assert parse(data) == (found.get(kind, NOBODY), len(data))


@pytest.mark.parametrize(("kind", "size"), [(0x11, 12), (0x12, 12), (0x21, 36), (0x22, 36), (0x31, 216), (0x32, 216)])
def test_addresses_that_do_not_fit_into_the_header_are_refused(kind: int, size: int) -> None:
    assert parse(v2(kind=kind, block=bytes(size)))
    with pytest.raises(HeaderError, match=f"expected {size} bytes of addresses, found {size - 1}"):
        parse(v2(kind=kind, length=size - 1))


@pytest.mark.parametrize("kind", [0x00, 0x01, 0x10, 0x20, 0x30])
def test_nothing_is_read_into_the_bytes_of_an_unspecified_connection(kind: int) -> None:
    data = v2(kind=kind, block=b"\xff" * 5)
    assert parse(data + b"more") == (NOBODY, len(data))


@given(st.lists(st.tuples(st.integers(0, 255).filter(lambda kind: kind != 3), st.binary(max_size=30)), max_size=5))
def test_tlvs_are_passed_over(tlvs: list[tuple[int, bytes]]) -> None:
    block = BLOCK4 + b"".join(tlv(*one) for one in tlvs)
    assert parse(v2(block=block) + b"more") == (Header(CLIENT4, SERVER4), 16 + len(block))


@pytest.mark.parametrize("kind", [0x11, 0x12, 0x31])
@pytest.mark.parametrize("cut", [b"\x04", b"\x04\x00", b"\x04\x00\x01", b"\x04\xff\xff" + bytes(60)])
def test_a_tlv_that_overruns_the_header_is_refused(kind: int, cut: bytes) -> None:
    block = bytes(216) if kind == 0x31 else BLOCK4
    whole = v2(kind=kind, block=block + tlv(5, b"id") + cut)
    with pytest.raises(HeaderError, match="expected TLVs within the PROXY protocol header"):
        parse(whole + bytes(100))


def checked(before: bytes = b"", after: bytes = b"") -> bytes:
    """A header with a right checksum, and where that is."""
    block = BLOCK4 + before + tlv(3, bytes(4)) + after
    value = 16 + 12 + len(before) + 3
    header = v2(block=block)
    return header[:value] + _crc32c(header).to_bytes(4, "big") + header[value + 4 :]


def test_the_checksum_is_that_of_the_rfc() -> None:
    assert _crc32c(b"123456789") == 0xE3069283
    assert _crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


@pytest.mark.parametrize("before", [b"", tlv(4, b"padding")])
@pytest.mark.parametrize("after", [b"", tlv(0xEA, b"\x01vpce")])
def test_a_checksum_is_verified(before: bytes, after: bytes) -> None:
    header = checked(before, after)
    assert parse(header + b"more") == (Header(CLIENT4, SERVER4), len(header))
    for place in range(16, 28):
        wrong = header[:place] + bytes((header[place] ^ 4,)) + header[place + 1 :]
        with pytest.raises(HeaderError, match=r"expected CRC32C 0x[0-9a-f]{8} of .*, found 0x[0-9a-f]{8}"):
            parse(wrong)


def test_a_checksum_of_another_length_is_refused() -> None:
    with pytest.raises(HeaderError, match="expected a CRC32C of 4 bytes, found 3"):
        parse(v2(block=BLOCK4 + tlv(3, b"abc")))


def test_a_header_that_is_too_large_is_refused_once_its_length_is_known() -> None:
    assert parse(LARGEST) == (Header(CLIENT4, SERVER4), 16384)
    for command in (0x20, 0x21):
        with pytest.raises(HeaderError, match="at most 16384 bytes, found one of 16385"):
            parse(v2(command, length=16384 - 15))
        with pytest.raises(HeaderError, match="found one of 65551"):
            parse(v2(command, length=65535))
