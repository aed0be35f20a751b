"""Networks: as they are written in the configuration, and which clients are in them."""

from collections.abc import Iterable
from socket import AF_INET, AF_INET6, AF_UNIX, inet_ntop, inet_pton
from typing import NamedTuple

FORMS = "10.0.0.0/8, 192.0.2.7, 2001:db8::/32 or unix"

# What stands for all clients of unix sockets, in a list of networks and as a client.
UNIX_CLIENT = "unix"

BITS: dict[int, int] = {AF_INET: 32, AF_INET6: 128, AF_UNIX: 0}

# The first 96 bits of an IPv6 address that stands for an IPv4 one (RFC 4291, 2.5.5.2).
MAPPED = 0xFFFF


class Network(NamedTuple):
    """A network: the addresses of a family that begin with the same bits.

    family: AF_INET, AF_INET6, or AF_UNIX for the clients of unix sockets.
    value: its first address as a number.
    length: how many of its first bits count; 32 or 128 for one address.
    """

    family: int
    value: int
    length: int

    def __str__(self) -> str:
        if self.family == AF_UNIX:
            return UNIX_CLIENT
        bits = BITS[self.family]
        host = inet_ntop(self.family, self.value.to_bytes(bits // 8, "big"))
        return host if self.length == bits else f"{host}/{self.length}"

    def holds(self, other: "Network") -> bool:
        """Whether each address of another network is in this one."""
        shift = BITS[self.family] - self.length
        return (
            self.family == other.family and self.length <= other.length and self.value >> shift == other.value >> shift
        )


def parse_network(text: str) -> Network:
    """Read a network, or an address as a network of one. Raises ValueError, which says what was expected and found.

    A network of IPv4-mapped IPv6 addresses is read as the IPv4 network that it stands for.
    """
    if text == UNIX_CLIENT:
        return Network(AF_UNIX, 0, 0)
    host, slash, prefix = text.partition("/")
    try:
        family, value = _read(host)
    except (OSError, ValueError):
        raise ValueError(f"expected a network ({FORMS}), found {text!r}") from None
    bits = length = BITS[family]
    if slash:
        if not (prefix.isascii() and prefix.isdigit() and len(prefix) <= 3 and int(prefix) <= bits):
            raise ValueError(f"expected a prefix length from 0 to {bits} after the slash, found {text!r}")
        length = int(prefix)
    host_part = value & ((1 << bits - length) - 1)
    if host_part:
        meant = Network(family, value - host_part, length)
        raise ValueError(f"expected {meant} (the network) or {host} (this address alone), found {text!r}")
    if family == AF_INET6 and value >> 32 == MAPPED:
        return Network(AF_INET, value & 0xFFFFFFFF, length - 96)
    return Network(family, value, length)


class Networks:
    """A set of networks. To look a client up takes one look into a dict for each distinct prefix length, no more."""

    def __init__(self, networks: Iterable[Network]) -> None:
        found: dict[int, dict[int, dict[int, Network]]] = {AF_INET: {}, AF_INET6: {}, AF_UNIX: {}}
        for network in networks:
            shift = BITS[network.family] - network.length
            found[network.family].setdefault(shift, {})[network.value >> shift] = network
        # By family: how many bits of an address do not count, and the networks by the other bits; small ones first.
        self._tables = {family: sorted(tables.items()) for family, tables in found.items()}

    def find(self, host: str) -> Network | None:
        """The smallest of the networks that a client is in, None if it is in none.

        host: the client's, as `host_of` gives it. Raises OSError for a host that is no address.
        """
        family, value = _read(host) if host else (AF_UNIX, 0)
        for shift, networks in self._tables[family]:
            if network := networks.get(value >> shift):
                return network
        return None


def client_key(host: str) -> str:
    """The key of a client: its IPv4 address, the /64 network of its IPv6 address, or `unix`.

    host: as `Networks.find` takes it.
    """
    if ":" not in host:
        return host or UNIX_CLIENT
    family, value = _read(host)
    return str(Network(family, value >> 64 << 64, 64))


def _read(host: str) -> tuple[int, int]:
    """The family of a numeric address, and the address as a number. Raises OSError or ValueError."""
    family = AF_INET6 if ":" in host else AF_INET
    return family, int.from_bytes(inet_pton(family, host), "big")
