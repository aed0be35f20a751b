"""The ClientHello of TLS: which server a client wants, and which protocols it offers to speak there.

Only looked at: rspd has no certificates, and takes part in no handshake. With Encrypted ClientHello, the outer server
name counts. Sources: RFC 8446 (TLS 1.3), 4.1.2, 4.2 and 5.1, which describe the hellos of TLS 1.0 to 1.2 too; RFC
6066, 3 (server name); RFC 7301, 3.1 (ALPN).
"""

import struct
from functools import lru_cache

from rspd.protocols.first import HEAD_MAX, UNKNOWN, HeadError, Said, plain_name

HANDSHAKE = 22  # the type of a record
CLIENT_HELLO = 1  # the type of a handshake message
RECORD_MAX = 1 << 14  # RFC 8446, 5.1: bytes in one record, its header left out

# Records that a hello may come in. Clients need one or two; some cut it into a few, to be read by nobody on the way.
RECORDS_MAX = 200

# The types of two extensions.
SERVER_NAME, ALPN = 0, 16

HOST_NAME = 0  # RFC 6066, 3: the only type of server name there is

PAIR = struct.Struct("!HH")
SHORT = struct.Struct("!H")

# What a server answers to a hello that it cannot use: RFC 8446, 6.2.
DECODE_ERROR, INTERNAL_ERROR, UNRECOGNIZED_NAME = 50, 80, 112


def alert(description: int) -> bytes:
    """The record of a fatal alert, as each version of TLS understands it (RFC 8446, 6 and D.1)."""
    return bytes((21, 3, 1, 0, 2, 2, description))


def read(data: bytes, _seen: int = 0) -> Said | None:
    """What a ClientHello says; as for a reader."""
    if data[0] != HANDSHAKE or data[1:2] not in (b"\3", b""):
        return UNKNOWN
    if len(data) > 9:
        # The usual case: one record has it all.
        size = int.from_bytes(data[5:9], "big") - (CLIENT_HELLO << 24)
        if 0 <= size <= int.from_bytes(data[3:5], "big") - 4 <= RECORD_MAX - 4 and len(data) >= 9 + size:
            return _parse(data, 9, 9 + size)
    message, _ = _joined(data)
    if message and message[0] != CLIENT_HELLO:
        raise HeadError("tls", f"expected a ClientHello, found a handshake message of type {message[0]}")
    if len(message) < 4:
        return None
    size = int.from_bytes(message[1:4], "big")
    if size + 4 > HEAD_MAX:
        raise HeadError("tls", f"expected a ClientHello of at most {HEAD_MAX} bytes, found one of {size + 4}")
    return _parse(message, 4, 4 + size) if len(message) >= 4 + size else None


def awaited(data: bytes) -> int:
    """How many bytes there have to be before `read` can say more than None of what begins so: up to a record's end."""
    return max(_joined(data)[1], len(data) + 1)


def _joined(data: bytes) -> tuple[bytes, int]:
    """The first handshake message as far as it has come, and where its last record ends."""
    parts = []
    at = size = records = 0
    wanted = 4
    while at < len(data) and size < wanted:
        header = data[at : at + 5]
        length = int.from_bytes(header[3:5].ljust(2, b"\1" if header[3:4] == b"\0" else b"\0"), "big")
        if not b"\x16\3".startswith(header[:2]) or (len(header) > 3 and not 0 < length <= RECORD_MAX):
            raise HeadError("tls", f"expected a record with a handshake, found {header.hex(' ')}")
        records += 1
        if records > RECORDS_MAX:
            raise HeadError("tls", f"expected a ClientHello in at most {RECORDS_MAX} records, found more")
        parts.append(data[at + 5 : at + 5 + length])
        size += len(parts[-1])
        at += 5 + length
        if wanted == 4 and size >= 4:
            parts = [b"".join(parts)]
            wanted += int.from_bytes(parts[0][1:4], "big")
    return b"".join(parts), at


def _parse(data: bytes, at: int, end: int) -> Said:
    """What the body of a hello says, which stands in `data`."""
    name = ""
    alpn: tuple[str, ...] = ()
    try:
        at += 34  # legacy_version, random
        if data[at] > 32:
            raise HeadError("tls", f"expected a session id of at most 32 bytes, found {data[at]}")
        at += 1 + data[at]
        suites = SHORT.unpack_from(data, at)[0]
        at += 2 + suites
        methods = data[at]
        at += 1 + methods
        if suites < 2 or suites % 2 or not methods:
            raise HeadError("tls", "expected cipher suites and compression methods, found a wrong number of them")
        if at == end:
            return Said("tls")  # TLS 1.2 and older: no extensions
        if at + 2 + SHORT.unpack_from(data, at)[0] != end:
            raise HeadError("tls", "expected extensions up to the end of the ClientHello, found another length")
        at += 2
        unpack = PAIR.unpack_from
        places = {}
        count = 0
        while at < end:
            kind, length = unpack(data, at)
            places[kind] = at
            count += 1
            at += 4 + length
        if len(places) < count:
            raise HeadError("tls", "expected each extension once, found one twice")
        if SERVER_NAME in places:
            name = _server_name(_extension(data, places[SERVER_NAME]))
        if ALPN in places:
            alpn = _protocols(_extension(data, places[ALPN]))
    except (IndexError, struct.error):
        at = -1
    if at != end:
        raise HeadError("tls", "expected a whole ClientHello, found parts that are longer than it")
    return Said("tls", name, alpn)


def _extension(data: bytes, at: int) -> bytes:
    return data[at + 4 : at + 4 + SHORT.unpack_from(data, at + 2)[0]]


@lru_cache(1024)  # clients ask for the same few again and again
def _server_name(data: bytes) -> str:
    """The name in the extension; there is one, of the one type."""
    length = SHORT.unpack_from(data, 0)[0]
    if length + 2 != len(data) or length < 4 or data[2] != HOST_NAME or SHORT.unpack_from(data, 3)[0] + 3 != length:
        raise HeadError("tls", f"expected one server name, found {data[:80]!r}")
    try:
        return plain_name(data[5:])
    except ValueError as error:
        raise HeadError("tls", f"server name: {error}") from None


def _protocols(data: bytes) -> tuple[str, ...]:
    """The protocols in the extension."""
    return _usual_protocols(data) if len(data) <= 64 else _read_protocols(data)


def _read_protocols(data: bytes) -> tuple[str, ...]:
    found = []
    at = 2
    while at < len(data):
        found.append(data[at + 1 : at + 1 + data[at]].decode("latin-1"))
        at += 1 + data[at]
    if at != len(data) or SHORT.unpack_from(data, 0)[0] + 2 != at or not all(found) or not found:
        raise HeadError("tls", f"expected a list of protocols (ALPN), found {data[:80]!r}")
    return tuple(found)


_usual_protocols = lru_cache(64)(_read_protocols)  # clients offer the same few again and again
