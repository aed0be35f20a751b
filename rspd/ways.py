"""The ways that connections take through this process, so that none leads back to a proxy that it came from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any

from rspd.address import Address, Place, SocketAddress, literal, place_of
from rspd.listener import Listener
from rspd.loop import Loop

# Seconds for which the near end of a connection that was closed before anybody accepted it is known: the client that
# it is to a proxy may be accepted next. Short, since the kernel gives its port to others.
GONE_FOR = 1.0

# Where a connection to any address of this host may end.
EVERYWHERE = {False: "0.0.0.0", True: "::"}


class LoopError(OSError):
    """A backend leads back to a proxy from which the connection came."""


class Ways:
    """Which proxy is where, and which clients are this process itself. One serves all proxies.

    A chain of proxies is no loop: each connection that rspd makes to one of its own listeners is known by its near
    end, which the proxy there has for a client, with the names of the proxies that it has passed.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._at: dict[Place, str] = {}  # proxies by where they listen
        self._ports: set[int] = set()
        self._paths: dict[str, str] = {}  # of unix sockets: what symbolic links make of them
        self._coming: dict[Place, tuple[str, ...]] = {}  # near ends that nobody has accepted yet, and what was passed
        self._gone: dict[Place, float] = {}  # those that were closed meanwhile, and when

    def listen(self, listeners: Mapping[str, Sequence[Listener]]) -> None:
        """Know where proxies, by their names, listen from now on."""
        self._paths.clear()
        self._at = {
            self.place(where): name for name, own in listeners.items() for one in own for where in one.reached_at
        }
        self._ports = {place[1] for place in self._at if isinstance(place, tuple)}

    def may_return(self, backends: Iterable[Address]) -> bool:
        """Whether one of these backends may be a proxy of this process, under whatever name."""
        for address in backends:
            known = literal(address) if address.path else None
            if self.place(known.address) in self._at if known else address.port in self._ports:
                return True
        return False

    def passed(self, client: object) -> tuple[str, ...] | None:
        """The proxies that a client, by its address, has passed in this process; None if it has gone already."""
        near = place_of(client)
        if self._loop.now - self._gone.pop(near, -inf) < GONE_FOR:
            return None
        return self._coming.pop(near, ())

    def forget(self, near: Place) -> None:
        """The connection with this near end is closed, or about to be."""
        if not self._coming.pop(near, ()):
            return  # a proxy has accepted it
        now = self._loop.now
        for other, when in list(self._gone.items()):
            if now - when < GONE_FOR:
                break
            del self._gone[other]
        self._gone[near] = now

    def place(self, address: object) -> Place:
        """A socket address, the same for each way to write a path."""
        place = place_of(address)
        if isinstance(place, tuple) or place.startswith("\0"):
            return place
        if place not in self._paths:
            self._paths[place] = os.path.realpath(place)
        return self._paths[place]


class Way:
    """The way of one connection.

    names: of the proxies it has passed, that which serves it last.
    near: the near end of what was dialled (getsockname(2)), from `enter` to `leave`.
    """

    __slots__ = ("_ways", "names", "near")

    def __init__(self, ways: Ways, names: tuple[str, ...]) -> None:
        self._ways = ways
        self.names = names
        self.near: Any = None

    def check(self, where: SocketAddress) -> bool:
        """Whether what is dialled there may be a proxy of this process. Raises LoopError if it was passed already."""
        ways = self._ways
        place = ways.place(where.address)
        self._refuse(place)
        if isinstance(place, str):
            return place in ways._at
        host, port = place
        if host.startswith("127.") or host in ("::1", "0.0.0.0", "::"):
            self._refuse((EVERYWHERE[":" in host], port))
        return port in ways._ports

    def enter(self, near: object, where: SocketAddress) -> None:
        """A connection goes there from this near end, until `leave`. Raises LoopError, as `check` does."""
        ways = self._ways
        self.near = near
        place, far = place_of(near), place_of(where.address)
        ways._coming[place] = self.names
        if isinstance(far, tuple) and far[0] == place[0]:
            # Both ends have one address: it is this host's.
            self._refuse((EVERYWHERE[":" in far[0]], far[1]))

    def leave(self) -> None:
        """What `enter` was told of is closed, or about to be."""
        if self.near is None:
            return
        near, self.near = place_of(self.near), None
        self._ways.forget(near)

    def _refuse(self, place: Place) -> None:
        name = self._ways._at.get(place)
        if name in self.names:
            raise LoopError(came_back((*self.names, name)))


def came_back(names: Sequence[str]) -> str:
    """In words, that a way ends at a proxy that it has passed."""
    return "it is this proxy itself" if len(names) < 3 else f"it leads back to proxy {names[-1]} ({', '.join(names)})"
