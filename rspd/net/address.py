"""Addresses: as they are written in the configuration, and as the socket calls take them."""

from __future__ import annotations

import re
import socket
from typing import Any, NamedTuple

from rspd.log import quote

# What can be dialled, and what can be listened on.
DIALLED = "HOST:PORT, [IPV6]:PORT, /PATH or @NAME"
FORMS = "PORT, HOST:PORT, [IPV6]:PORT, /PATH, @NAME or fd://NAME"

# Before the name of a socket that systemd passes.
PASSED = "fd://"

# sun_path holds 108 bytes, one of them the terminating or the leading null byte (unix(7)).
UNIX_NAME_MAX = 107


class Address(NamedTuple):
    """Where to listen, or what to dial.

    One of these is set. `path`: a unix socket's path, or `@` and its name in the abstract namespace. `passed`: the name
    of a socket that systemd passes, to listen on. `port` and `host`: an empty host means every local address.
    """

    host: str = ""
    port: int = 0
    path: str = ""
    passed: str = ""

    def __str__(self) -> str:
        if self.passed:
            return PASSED + self.passed
        if self.path:
            return self.path
        if not self.host:
            return str(self.port)
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


# Where a socket is bound, in a form that compares: host and port, or a unix socket's path, empty for none.
Place = tuple[str, int] | str


class SocketAddress(NamedTuple):
    """An address as socket(2) and bind(2) or connect(2) take it."""

    family: int
    address: Any  # what the socket module takes for the family

    def __str__(self) -> str:
        return format_socket_address(self.address)


def parse_address(text: str, dialled: bool = False) -> Address:
    """Read an address to listen on, or to dial; a port is a number or a service name.

    Raises ValueError, which names the forms that are expected, and what was probably meant.
    """
    if text.startswith(("/", "@")):
        # After a blank or a comma, `/` or `@` more likely begins a second address.
        if len(text) < 2 or "\0" in text or re.search(r"[\s,][/@]", text):
            raise _no_address(text, dialled)
        try:
            length = len(text.encode(errors="surrogateescape")) - text.startswith("@")
        except UnicodeError:
            raise _no_address(text, dialled) from None
        if length > UNIX_NAME_MAX:
            raise ValueError(f"a unix socket's name holds at most {UNIX_NAME_MAX} bytes, found {text!r}")
        return Address(path=text)
    if text.startswith(PASSED):
        name = text.removeprefix(PASSED)
        # What systemd.socket(5) allows in FileDescriptorName=.
        if not 0 < len(name) < 256 or ":" in name or not (name.isascii() and name.isprintable()):
            raise _no_address(text, dialled)
        return Address(passed=name)
    host, colon, port = text.rpartition(":")
    if "://" in text:
        raise _no_address(text, dialled)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not _is_numeric(host, socket.AF_INET6):
            raise ValueError(f"expected an IPv6 address between the brackets, found {text!r}")
    elif ":" in host:
        forms = (text, host, text.removeprefix("[").removesuffix("]"))  # without brackets, or without a port after them
        if any(_is_numeric(form.partition("%")[0], socket.AF_INET6) for form in forms):
            raise ValueError(f"expected brackets around an IPv6 address, as in [::1]:8080, found {text!r}")
        raise _no_address(text, dialled)
    elif colon:
        host = _parse_host(host, text, dialled)
    return Address(host, _parse_port(port, text, dialled))


def parse_backend(text: str) -> Address:
    """An address that can be dialled. Raises ValueError."""
    address = parse_address(text, dialled=True)
    if not address.path and not (address.host and address.port):
        raise _no_address(text, dialled=True)
    return address


def _no_address(text: str, dialled: bool, reason: str = "") -> ValueError:
    """The error for a text that is no address: what was expected, and what was probably meant."""
    return ValueError(f"expected {DIALLED if dialled else FORMS}{reason}, found {text!r}{_advise(text, dialled)}")


def _advise(text: str, dialled: bool) -> str:
    """How to write what other programs write in another way; empty where that is not known."""
    if match := re.fullmatch(r"unix:(?://)?(/.+)", text):
        return f"; a unix socket is its path: {match[1]}"
    if match := re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/?#]+)(.*)", text, re.ASCII | re.IGNORECASE | re.DOTALL):
        scheme, address, path = match.groups()
        if scheme.lower() == "fd":
            return ""
        address = address.rpartition("@")[2]
        if not re.search(r":\w+$", address):
            address += {"http": ":80", "https": ":443"}.get(scheme.lower(), ":PORT")
        return f"; write {address} without {scheme}://" + (" and path" if path else "")
    if match := re.fullmatch(r"(?:\*|0)?:?([1-9]\d*)", text, re.ASCII):
        port = match[1]
        return (
            f"; port {port} of this host is 127.0.0.1:{port}" if dialled else f"; a port alone is every address: {port}"
        )
    if re.fullmatch(r"localhost|\d+(\.\d+){3}|[\w-]+(\.[\w-]+)*\.[a-z]{2,}\.?", text, re.ASCII | re.IGNORECASE):
        return f"; the port is missing, as in {text}:80"
    if dialled and re.fullmatch(r"(?![\d.]+$)\w[\w.-]*", text, re.ASCII):
        return f"; the port is missing, as in {text}:80"
    if text.startswith("-"):
        return "; a space belongs after the dash"
    host = text.rpartition(":")[0]
    return f"; {host} is no host" if host.isdigit() else ""


def _parse_host(host: str, text: str, dialled: bool) -> str:
    try:
        name = host if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    labels = name.removesuffix(".").split(".")
    # RFC 1123, 2.1, and underscores. No number alone: the C library takes it for an address, people for a port.
    good = (0 < len(label) < 64 and set(label) <= HOST_CHARACTERS and label[0] != "-" for label in labels)
    if len(name) > 253 or name.isdigit() or not all(good):
        raise _no_address(text, dialled)
    return name


HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def _parse_port(port: str, text: str, dialled: bool) -> int:
    if port.isascii() and port.isdigit():
        digits = port.lstrip("0")
        if len(digits) > 5 or int(port[-5:]) > 65535:
            raise ValueError(f"a port is at most 65535, found {text!r}")
        return int(port[-5:])
    # `null`, YAML's word for nothing, would be read as a service name.
    if not port or not set(port) <= HOST_CHARACTERS or text.lower() == "null":
        raise _no_address(text, dialled)
    try:
        return socket.getservbyname(port, "tcp")
    except OSError:
        # An address to dial needs a host: a word alone is not meant as a port.
        known = f" (services(5) has no {port!r})" if len(port) < 32 and (":" in text or not dialled) else ""
        raise _no_address(text, dialled, known) from None


def _is_numeric(host: str, family: int) -> bool:
    # The codec for a str would let the digits of other scripts pass. The C library stops at a null byte.
    if not host.isascii() or not host.isprintable():
        return False
    try:
        socket.getaddrinfo(host, None, family=family, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return True


def literal(address: Address) -> SocketAddress | None:
    """The one socket address of a numeric or unix address; None for what needs `resolve`. Never blocks."""
    if address.path:
        path = "\0" + address.path[1:] if address.path.startswith("@") else address.path
        return SocketAddress(socket.AF_UNIX, path)
    if not address.host:
        return None
    try:
        return _look_up(address, socket.AI_NUMERICHOST)[0]
    except OSError:
        return None


def resolve(address: Address) -> list[SocketAddress]:
    """All socket addresses of an address, in the order to try or bind them (RFC 6724).

    Blocks for as long as the system's resolver does. Raises OSError (socket.gaierror) with its reason.
    """
    known = literal(address)
    return [known] if known else _look_up(address, socket.AI_PASSIVE)


def _look_up(address: Address, flags: int) -> list[SocketAddress]:
    # Bytes, because a str is encoded by a codec whose tables are slow to import.
    host = address.host.encode("ascii") or None
    found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=flags)
    # The same address comes twice where /etc/hosts names it twice.
    return list(dict.fromkeys(SocketAddress(family, sockaddr) for family, _, _, _, sockaddr in found))


def bound_address(sock: socket.SocketType) -> Address:
    """Where a socket is bound, as it would be written to listen there."""
    name = sock.getsockname()
    if not isinstance(name, tuple):
        return Address(path=format_socket_address(name))
    host, port = name[:2]
    both = host == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return Address("" if both else _unmapped(host), port)


def _unmapped(host: str) -> str:
    """The host; an IPv4 address as such, if a socket for both families shows it as an IPv6 address."""
    return host[7:] if host.startswith("::ffff:") and "." in host else host


def place_of(address: object) -> Place:
    """The place that a socket address of accept(2), getsockname(2) or connect(2) stands for."""
    if isinstance(address, tuple):
        return _unmapped(address[0]), address[1]
    return address.decode(errors="surrogateescape") if isinstance(address, bytes) else str(address)


def host_of(address: object) -> str:
    """The numeric host of a peer's address as accept(2) returns it; empty for a unix socket's."""
    return str(address[0]) if isinstance(address, tuple) else ""


def format_peer(address: object) -> str:
    """A peer's address as accept(2) returns it, for the log.

    The path of a unix socket is in quotes: another program chose its bytes. A client without a path is `unix`.
    """
    if isinstance(address, tuple):
        host, port = address[:2]
        if ":" not in host:
            return f"{host}:{port}"
        host = _unmapped(host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = place_of(address)
    return quote(str(path).replace("\0", "@")) if path else "unix"


def format_socket_address(address: object) -> str:
    """The address of a socket that was bound here, or is dialled, for people."""
    if isinstance(address, tuple):
        return format_peer(address)
    if isinstance(address, bytes):
        address = address.decode(errors="backslashreplace").replace("\0", "@")
    text = str(address).replace("\0", "@")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or "unix"
