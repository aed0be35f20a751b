"""Which route a client takes, by what it says first and where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rspd.net.address import Peer, host_of
from rspd.net.networks import Networks
from rspd.protocols.first import Said
from rspd.protocols.http import plain_path
from rspd.settings import RouteConfig


class Entry:
    """One name and one path of a route, with what else has to hold. path, below: empty where it does not matter."""

    __slots__ = ("_alpn", "_networks", "_protocols", "below", "number", "path")

    def __init__(self, number: int, route: RouteConfig, path: str) -> None:
        self.number = number
        self.path = path
        self.below = path if path.endswith("/") else f"{path}/"  # how all paths below it begin
        self._protocols = route.protocols
        self._alpn = frozenset(route.alpn)
        self._networks = Networks(route.networks) if route.networks else None

    def suits(self, said: Said, path: str, host: str) -> bool:
        """Whether a client may take it, whose name suits."""
        return not (
            (self._protocols and said.protocol not in self._protocols)
            or (self._alpn and self._alpn.isdisjoint(said.alpn))
            or (self.path and path != self.path and not path.startswith(self.below))
            or (self._networks and not self._networks.find(host))
        )


class Table:
    """The routes of a proxy, in the order in which they take precedence.

    An exact name comes before `*.` and a suffix, a longer suffix before a shorter one, and each before no name. Of
    routes that are alike in this, the one with the longer path comes first, and then the first one in the file.

    protocols: those of which routes ask for something. looks: whether what a client says matters at all.
    """

    def __init__(self, routes: Sequence[RouteConfig]) -> None:
        self._by_name: dict[str, list[Entry]] = {}  # a suffix begins with a dot; no name is the empty one
        for number, route in enumerate(routes):
            entries = [Entry(number, route, path) for path in route.path or ("",)]
            for name in names(route):
                self._by_name.setdefault(name, []).extend(entries)
        for found in self._by_name.values():
            found.sort(key=lambda entry: -len(entry.path))  # else the order of the file stays
        self.protocols = frozenset(protocol for route in routes for protocol in route.protocols)
        self.looks = bool(self.protocols)
        self._paths = any(route.path for route in routes)
        self._networks = any(route.networks for route in routes)
        self._suffixes = any(name.startswith(".") for name in self._by_name)

    def find(self, said: Said, client: Peer) -> int | None:
        """The number of the route, from 0 on; None if there is none.

        client: where it comes from.
        Raises HeadError if a path matters, and this one means something else to each server.
        """
        path = plain_path(said.target) if self._paths and said.target else ""
        host = host_of(client) if self._networks else ""
        name = said.name
        for entry in self._by_name.get(name, ()):
            if entry.suits(said, path, host):
                return entry.number
        for shorter in self._shorter(name) if name else ():
            for entry in self._by_name.get(shorter, ()):
                if entry.suits(said, path, host):
                    return entry.number
        return None

    def _shorter(self, name: str) -> Iterator[str]:
        """What a route may have in place of a name, in the order of precedence."""
        place = name.find(".") if self._suffixes else -1
        while place >= 0:
            yield name[place:]
            place = name.find(".", place + 1)
        yield ""


def names(route: RouteConfig) -> Iterable[str]:
    """The names of a route as a table has them."""
    return [name.removeprefix("*") for name in route.server_name or route.host] or [""]
