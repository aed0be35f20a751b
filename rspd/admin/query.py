"""Which connections somebody asks for, and in which order: as the words after `?` of a request, and as a test."""

from collections.abc import Callable
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from urllib.parse import parse_qsl, urlencode

from rspd.snapshot import Connection

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

Sort = Literal["bytes", "age", "idle", "rate"]

SORTS: tuple[str, ...] = get_args(Sort)

_KEYS: dict[str, Callable[[Any], float]] = {
    "bytes": lambda one: one.sent + one.received,
    "age": lambda one: one.age,
    "idle": lambda one: one.idle,
    "rate": lambda one: one.rate,
}


class Query(NamedTuple):
    """Which connections. Empty words match all. client, backend: an address, with or without its port.

    client: may be a network too. text: is in the client, the backend, or the name of the proxy or of the route.
    longer_than, idle_for: seconds. sort: the largest come first. limit: how many; inf: all.
    """

    proxy: str = ""
    client: str = ""
    backend: str = ""
    route: str = ""
    text: str = ""
    longer_than: float = 0.0
    idle_for: float = 0.0
    sort: str = "age"
    limit: float = inf

    def matches(self, one: Connection) -> bool:
        """Whether a connection is asked for."""
        return (
            (not self.proxy or one.proxy == self.proxy)
            and (not self.client or _is_of(self.client, one.client) or _is_of(self.client, one.via))
            and (not self.backend or is_at(self.backend, one.backend))
            and (not self.route or one.route == self.route)
            and (not self.text or _has(one, self.text.lower()))
            and one.age >= self.longer_than
            and one.idle >= self.idle_for
        )

    def admits(self, age: float, idle: float) -> bool:
        """Whether a connection with these times may be asked for."""
        return age >= self.longer_than and idle >= self.idle_for

    @property
    def by_name(self) -> bool:
        """Whether names say which connections are asked for."""
        return bool(self.proxy or self.client or self.backend or self.route or self.text)

    @property
    def key(self) -> Callable[[Any], float]:
        """What connections are sorted by: takes one, or whatever else has the fields that are asked for."""
        return _KEYS[self.sort]

    def __str__(self) -> str:
        """The words after `?`."""
        said = {name: value for name, value in self._asdict().items() if value != Query._field_defaults[name]}
        return urlencode(said)


def read_query(text: str) -> Query:
    """The query of the words after `?`. Raises ValueError."""
    values: dict[str, str | float] = {}
    for name, value in parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text)):
        if name not in Query._fields:
            raise ValueError(f"expected one of {', '.join(Query._fields)}, found {name!r:.80}")
        if name in ("longer_than", "idle_for", "limit"):
            values[name] = _number(name, value)
        elif name == "sort" and value not in SORTS:
            raise ValueError(f"sort: expected one of {', '.join(SORTS)}, found {value!r:.80}")
        else:
            values[name] = value
    try:
        network_of(str(values.get("client", "")))
    except ValueError as error:
        raise ValueError(f"client: {error}") from None
    return Query(**values)  # type: ignore[arg-type]  # each has the type of its field, see above


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise ValueError(f"{name}: expected a number from 0, found {text!r:.80}")
    return number


def is_at(wanted: str, address: str) -> bool:
    """Whether an address is the one that is wanted, with its port or without."""
    host = address.rpartition(":")[0]
    return wanted in (address, host, host.strip("[]"))


@lru_cache(8)
def network_of(text: str) -> "IPv4Network | IPv6Network | None":
    """The network of a text as 10.0.0.0/8; None if it is none, but an address or a path. Raises ValueError."""
    if "/" not in text or text.startswith("/"):
        return None
    import ipaddress  # slow to import, and seldom needed

    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"expected a network as 10.0.0.0/8, found {text!r:.80}") from None


def _is_of(wanted: str, address: str) -> bool:
    """Whether a client is at an address, or in a network."""
    network = network_of(wanted)
    if network is None:
        return is_at(wanted, address)
    import ipaddress

    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")) in network
    except ValueError:
        return False


def _has(one: Connection, text: str) -> bool:
    return any(text in word.lower() for word in (one.client, one.via, one.backend, one.proxy, one.route))
