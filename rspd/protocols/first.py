"""What a client has said first, whatever its protocol, and what is said if it cannot be read.

A reader is a function of the bytes that have come so far, from the first one on; there is at least one. It returns what
they say; None as long as they may be the beginning of that; UNKNOWN as soon as they are not of its protocol. It raises
HeadError if they are of its protocol and not as the protocol wants them. For so many of them as a second argument says,
it has returned None before: it need not look at these again.
"""

import re
from functools import cache
from socket import AF_INET6, inet_ntop, inet_pton
from typing import AnyStr, Literal, NamedTuple

Protocol = Literal["tls", "http", "http2", "ssh", "silent", "unknown"]

# Bytes of a head at most: of a ClientHello, its headers of records left out, or of an HTTP head.
HEAD_MAX = 16384

# Bytes that are looked at, at most: a ClientHello of HEAD_MAX bytes has a few more for the headers of its records.
LOOK_MAX = HEAD_MAX + 1024

# RFC 1123, 2.1, and underscores; or an IPv6 address in brackets.
HOST = rb"[0-9A-Za-z_-]{1,63}(?:\.[0-9A-Za-z_-]{1,63})*\.?|\[[0-9A-Fa-f:.]{2,45}\]"


class HeadError(Exception):
    """What came is of this protocol, and not valid; the text has what was expected, and what was found.

    late: whether it may be valid, but is not complete in time.
    """

    def __init__(self, protocol: Protocol, text: str, late: bool = False) -> None:
        super().__init__(text)
        self.protocol: Protocol = protocol
        self.late = late


class Said(NamedTuple):
    """What a client has said first.

    name: the server name of TLS, or the host of HTTP, as `plain_name` has it; empty if there is none.
    alpn: the protocols that a TLS client offers. target: the path of an HTTP request with its query, as it was sent.
    method: of an HTTP request.
    """

    protocol: Protocol
    name: str = ""
    alpn: tuple[str, ...] = ()
    target: str = ""
    method: str = ""


# What of that is kept: the protocol, the name, and the method.
Heard = tuple[Protocol, str, str]

UNKNOWN, SILENT = Said("unknown"), Said("silent")


@cache
def pattern(text: AnyStr) -> re.Pattern[AnyStr]:
    """A regular expression, compiled when it is needed: few configurations do, and each start would pay."""
    return re.compile(text)


def plain_name(name: bytes) -> str:
    """A host's name as names are compared: in small letters, without the dot at its end.

    An IPv6 address in brackets has its usual form. Raises ValueError.
    """
    if pattern(HOST).fullmatch(name):
        plain = name.decode("ascii").lower().removesuffix(".")
        if plain[0] == "[":
            plain = _plain_ipv6(plain)
        if 0 < len(plain) <= 253:
            return plain
    raise ValueError(f"expected a host, found {name[:80]!r}")


def _plain_ipv6(host: str) -> str:
    """An IPv6 address in brackets in its usual form; empty if it is none."""
    try:
        return f"[{inet_ntop(AF_INET6, inet_pton(AF_INET6, host[1:-1]))}]"
    except OSError:
        return ""
