"""Addresses: as configured, as the socket calls take them, and as people read them."""

import socket
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rspd.log import quote

# Before the name of a socket that systemd passes.
PASSED = "fd://"


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


# The address of a socket as the socket module has it. TCP: host and port, and for IPv6 also flow and scope. Unix: a
# path or an abstract name, empty for a client that has none.
Peer = tuple[str, int] | tuple[str, int, int, int] | str | bytes

# Where a socket is bound, in a form that compares: host and port, or a unix socket's path, empty for none.
Place = tuple[str, int] | str


class SocketAddress(NamedTuple):
    """An address as socket(2) and bind(2) or connect(2) take it."""

    family: int
    address: Any  # what the socket module takes for the family

    def __str__(self) -> str:
        return format_socket_address(self.address)


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

    Blocks for as long as the system's resolver does. Raises OSError (socket.gaierror) with its reason; see `denies`.
    """
    known = literal(address)
    if known:
        return [known]
    try:
        return _look_up(address, socket.AI_PASSIVE)
    except socket.gaierror as error:
        if denies(error):
            # The C library asks for IPv4 and IPv6. If one has no answer, and the other has no addresses, the library
            # says only the latter. So ask for each: the one without an answer raises another error.
            for family in (socket.AF_INET, socket.AF_INET6):
                try:
                    return _look_up(address, socket.AI_PASSIVE, family)
                except socket.gaierror as single:
                    if not denies(single):
                        raise
        raise


def denies(error: OSError) -> bool:
    """Whether the error of a lookup is an answer: the name does not exist, or has no addresses (getaddrinfo(3)).

    Each other error means that nobody has answered.
    """
    return isinstance(error, socket.gaierror) and error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)


def _look_up(address: Address, flags: int, family: int = socket.AF_UNSPEC) -> list[SocketAddress]:
    # Bytes, because a str is encoded by a codec whose tables are slow to import.
    host = address.host.encode("ascii") or None
    found = socket.getaddrinfo(host, address.port, family, socket.SOCK_STREAM, flags=flags)
    # The same address comes twice where /etc/hosts names it twice.
    return list(dict.fromkeys(SocketAddress(family, sockaddr) for family, _, _, _, sockaddr in found))


def at_port(where: SocketAddress, port: int) -> SocketAddress:
    """The same host's address with another port; a unix socket, which has none, as it is."""
    family, address = where
    return SocketAddress(family, (address[0], port, *address[2:])) if isinstance(address, tuple) else where


def covers(address: Address, other: Address) -> bool:
    """Whether a listener on an address takes the other address too."""
    if address == other:
        return True
    if not address.port or address.port != other.port:
        return False
    v4 = other.host == "localhost" or other.host.replace(".", "").isdigit()
    v6 = other.host == "localhost" or ":" in other.host
    return {"": True, "0.0.0.0": v4, "::": v6}.get(address.host, False)


def contradictions(listen: Sequence[Address]) -> Iterator[str]:
    """An error for each address in `listen` that covers another one."""
    for address in listen:
        for other in listen:
            if address != other and covers(address, other):
                yield f"listen {address} covers {other} too, which cannot be bound twice"


def own_listeners(listen: Sequence[Address], dialled: Sequence[Address]) -> Iterator[str]:
    """An error for each address to dial that is the proxy itself."""
    # A proxy that dials itself would open connections without end.
    ports = {address.port for address in listen}
    for backend in [backend for backend in dialled if backend.path or backend.port in ports]:
        here = backend.host in ("localhost", "0.0.0.0", "::1", "::") or backend.host.startswith("127.")
        for address in listen:
            if backend == address or (here and covers(address, backend)):
                yield f"{backend} is this proxy's own listener {address}"


def bound_address(sock: socket.SocketType) -> Address:
    """Where a socket is bound, as it would be written to listen there."""
    name = sock.getsockname()
    if not isinstance(name, tuple):
        return Address(path=format_socket_address(name))
    both = name[0] == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return Address("" if both else host_of(name), name[1])


def place_of(address: Peer) -> Place:
    """The place that a socket address of accept(2), getsockname(2) or connect(2) stands for."""
    if isinstance(address, tuple):
        return host_of(address), address[1]
    return address.decode(errors="surrogateescape") if isinstance(address, bytes) else address


def plain(address: Peer) -> Any:
    """A socket's address as a plain value, for the next process; `peer` makes the address of it again."""
    return address.decode("latin-1") if isinstance(address, bytes) else address


def peer(value: Any) -> Peer:
    """The address of a socket that was made a plain value by `plain`."""
    if isinstance(value, str):
        # Abstract names are bytes, and begin with a null byte. No path does.
        return value.encode("latin-1") if value.startswith("\0") else value
    return tuple(value)


def host_of(address: Peer) -> str:
    """The numeric host of a socket's address, an IPv4-mapped one (RFC 4291, 2.5.5.2) as IPv4; empty for a unix one."""
    if not isinstance(address, tuple):
        return ""
    host = address[0]
    return host[7:] if host.startswith("::ffff:") and "." in host else host


def format_peer(address: Peer) -> str:
    """A client's address for the log.

    The path of a unix socket is in quotes: another program chose its bytes. A client without a path is `unix`.
    """
    if isinstance(address, tuple):
        host, port = address[:2]
        if ":" not in host:
            return f"{host}:{port}"
        host = host_of(address)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = place_of(address)
    return quote(str(path).replace("\0", "@")) if path else "unix"


def format_socket_address(address: Peer) -> str:
    """The address of a socket that was bound here, or is dialled, for people."""
    if isinstance(address, tuple):
        return format_peer(address)
    if isinstance(address, bytes):
        address = address.decode(errors="backslashreplace")
    text = str(address).replace("\0", "@")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or "unix"
