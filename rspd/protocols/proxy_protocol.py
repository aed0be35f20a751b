"""The PROXY protocol, versions 1 and 2: one proxy tells the next who the client is, ahead of what the client sends.

Defined by HAProxy's proxy-protocol.txt, whose words are used here.
"""

import struct
from functools import cache
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import NamedTuple

from rspd.protocols.first import pattern

# A numeric address and a port. An IPv4-mapped IPv6 address is written as the IPv4 one.
HostPort = tuple[str, int]

# Bytes of a version 1 line, its CRLF included.
V1_MAX = 107

# The longest version 2 header that is accepted, in bytes; its length field could say four times as many.
# HAProxy takes a header only if it fits into one of its buffers, which have this size by default (tune.bufsize).
V2_MAX = 16384

V1_UNKNOWN = b"PROXY UNKNOWN\r\n"
V1_STARTS = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN ", V1_UNKNOWN)
V1_BEGUN = rb"PROXY (TCP[46] [\dA-Fa-f:. ]*|UNKNOWN( [^\r\n]*)?)"
V1_TCP = rb"PROXY TCP([46]) ([\dA-Fa-f:.]+) ([\dA-Fa-f:.]+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4})"
V1_FORM = "`PROXY TCP4 SOURCE DESTINATION PORT PORT`, TCP6, or `PROXY UNKNOWN`"

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
STARTS = (*V1_STARTS, SIGNATURE)
LOCAL, PROXY = 0x20, 0x21  # version 2 in the upper half of the byte, the command in the lower
TCP4, TCP6 = 0x11, 0x21  # the address family in the upper half, the transport protocol in the lower
V2_START = struct.Struct("!12sBBH")
V2_MIN = V2_START.size
V2_LOCAL = V2_START.pack(SIGNATURE, LOCAL, 0, 0)
V2_TCP4 = V2_START.pack(SIGNATURE, PROXY, TCP4, 12)
V2_TCP6 = V2_START.pack(SIGNATURE, PROXY, TCP6, 36)
PORTS = struct.Struct("!HH")

# Bytes of both addresses with their ports, for TCP and UDP over IPv4 and IPv6, and for unix streams and datagrams.
# Any other pair of a known family and a known protocol has an UNSPEC in it: it does not tell where its addresses end.
ADDRESS_SIZES = {0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216}

TLV = struct.Struct("!BH")  # type and length
CRC32C = 0x03  # the TLV that has the checksum of the header, as AWS sends it

MAPPED = b"\0" * 10 + b"\xff\xff"  # before an IPv4 address in an IPv6 one (RFC 4291)


class HeaderError(Exception):
    """What came is no PROXY protocol header; the text has what was expected, and what was found."""


class NoHeaderError(HeaderError):
    """The stream ended before its first byte."""


class Header(NamedTuple):
    """Who connected to the first proxy, and to which address of it.

    Both are None if the header does not say, or says it of something other than TCP: LOCAL (a health check of the
    proxy itself), UNKNOWN, UNSPEC, UDP, unix sockets. Then use the connection's own addresses.
    """

    source: HostPort | None
    destination: HostPort | None


NO_ADDRESSES = Header(None, None)


def encode(version: str, source: HostPort | None, destination: HostPort | None) -> bytes:
    """The header to send ahead of what a client sends.

    version: `v1` or `v2`.
    source, destination: the client's address, and the one it connected to. If one is IPv4 and the other IPv6, the IPv4
    one is sent IPv4-mapped. If there are none: v1 says UNKNOWN, and v2 says LOCAL. Each receiver has to accept LOCAL,
    but need not accept PROXY with UNSPEC.
    """
    if source is None or destination is None:
        return V1_UNKNOWN if version == "v1" else V2_LOCAL
    near, far = _pack(source[0]), _pack(destination[0])
    if len(near) != len(far):
        near, far = (MAPPED + host if len(host) == 4 else host for host in (near, far))
    if version == "v2":
        return (V2_TCP4 if len(near) == 4 else V2_TCP6) + near + far + PORTS.pack(source[1], destination[1])
    name, family = ("TCP4", AF_INET) if len(near) == 4 else ("TCP6", AF_INET6)
    hosts = f"{inet_ntop(family, near)} {inet_ntop(family, far)}"
    return f"PROXY {name} {hosts} {source[1]} {destination[1]}\r\n".encode("ascii")


def parse(data: bytes) -> tuple[Header, int] | None:
    """The header that `data` begins with, and its length; None as long as the header is good so far, but not complete.

    In version 2, a checksum (CRC32C) is verified, and all other TLVs are skipped.
    Raises HeaderError as soon as no header can begin with `data`.
    """
    if data.startswith(SIGNATURE):
        return _parse_v2(data)
    if data.startswith(V1_STARTS):
        return _parse_v1(data)
    if any(start.startswith(data) for start in STARTS):
        return None
    raise HeaderError(f"expected a PROXY protocol header, found {data[:16]!r}")


def _parse_v1(data: bytes) -> tuple[Header, int] | None:
    line, crlf, _ = data[:V1_MAX].partition(b"\r\n")
    if not crlf:
        # A CR may only be the last byte: its LF is still to come.
        if len(data) < V1_MAX and pattern(V1_BEGUN).fullmatch(line.removesuffix(b"\r")):
            return None
        raise HeaderError(f"expected {V1_FORM}, CRLF within {V1_MAX} bytes, found {line!r}")
    size = len(line) + len(crlf)
    if line.startswith(b"PROXY UNKNOWN") and pattern(V1_BEGUN).fullmatch(line):
        return NO_ADDRESSES, size
    if match := pattern(V1_TCP).fullmatch(line):
        version, source, destination, *ports = match[0].decode()[9:].split(" ")
        family = AF_INET if version == "4" else AF_INET6
        try:
            hosts = inet_pton(family, source), inet_pton(family, destination)
            return _header(*hosts, PORTS.pack(int(ports[0]), int(ports[1]))), size
        except (OSError, struct.error):
            pass
    raise HeaderError(f"expected {V1_FORM}, found {line!r}")


def _parse_v2(data: bytes) -> tuple[Header, int] | None:
    # Fill up the bytes that have not come yet from a LOCAL header, which is good.
    _, command, kind, length = V2_START.unpack(data[:V2_MIN] + V2_LOCAL[len(data) :])
    if command not in (LOCAL, PROXY):
        raise HeaderError(f"expected version 2 and LOCAL or PROXY (0x20, 0x21), found {command:#04x}")
    local = command == LOCAL  # all that follows is to be ignored
    if not local and (kind >> 4 > 3 or kind & 15 > 2):
        raise HeaderError(f"expected an address family and a transport protocol (0x11 is TCP4), found {kind:#04x}")
    size = V2_MIN + length
    if size > V2_MAX:
        raise HeaderError(f"expected a PROXY protocol header of at most {V2_MAX} bytes, found one of {size}")
    addresses = 0 if local else ADDRESS_SIZES.get(kind, 0)
    if length < addresses and len(data) >= V2_MIN:
        raise HeaderError(f"expected {addresses} bytes of addresses, found {length}")
    if len(data) < max(size, V2_MIN + addresses):
        return None
    if addresses:
        _check_tlvs(data[:size], V2_MIN + addresses)
    if kind not in (TCP4, TCP6) or local:
        return NO_ADDRESSES, size
    middle, ports = V2_MIN + addresses // 2 - 2, V2_MIN + addresses - 4
    return _header(data[V2_MIN:middle], data[middle:ports], data[ports : ports + 4]), size


def _check_tlvs(header: bytes, place: int) -> None:
    checksum = 0  # its place in the header
    while place < len(header):
        value = place + TLV.size
        kind, length = TLV.unpack_from(header, place) if value <= len(header) else (0, 0)
        place = value + length
        if place > len(header):
            raise HeaderError(
                f"expected TLVs within the PROXY protocol header, found one {place - len(header)} bytes longer"
            )
        if kind == CRC32C:
            if length != 4:
                raise HeaderError(f"expected a CRC32C of 4 bytes, found {length}")
            checksum = value
    if checksum:
        found = int.from_bytes(header[checksum : checksum + 4], "big")
        expected = _crc32c(header[:checksum] + bytes(4) + header[checksum + 4 :])
        if found != expected:
            raise HeaderError(f"expected CRC32C {expected:#010x} of the PROXY protocol header, found {found:#010x}")


def _crc32c(data: bytes) -> int:
    """The checksum of RFC 4960, appendix B."""
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


@cache
def _crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (crc & 1) * 0x82F63B78 for crc in table]
    return table


def _pack(host: str) -> bytes:
    return inet_pton(AF_INET6 if ":" in host else AF_INET, host).removeprefix(MAPPED)


def _header(source: bytes, destination: bytes, ports: bytes) -> Header:
    source_port, destination_port = PORTS.unpack(ports)
    return Header((_unpack(source), source_port), (_unpack(destination), destination_port))


def _unpack(packed: bytes) -> str:
    packed = packed.removeprefix(MAPPED)
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)
