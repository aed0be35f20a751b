"""The ways that connections take through this process, so that none leads back to a proxy that it came from."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rspd.address import Address, Place, SocketAddress, literal, place_of
from rspd.listener import Listener
from rspd.loop import Loop

# Seconds for which a connection to this host is known after it was closed, if nobody had accepted it: in a serial proxy
# it is accepted when that which dialled it has ended.
GONE_FOR = 1.0

# What connect(2) makes of an address that stands for all of a family, and where a listener on all of it is.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
EVERYWHERE = {False: "0.0.0.0", True: "::"}


class LoopError(OSError):
    """What is dialled is a proxy that the connection has passed. itself: it is the one that dials."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(came_back(names))
        self.itself = names[-1] == names[-2]


def came_back(names: Sequence[str]) -> str:
    """In words, that the way through these proxies ends at one of them."""
    if names[-1] == names[-2]:
        return "it is this proxy itself"
    return f"it leads back to proxy {names[-1]} ({', '.join(names)})"


class Ways:
    """Which proxy is where, and which clients are this process itself. One serves all proxies.

    A chain of proxies is no loop. So a connection that may go to a proxy of this process is known by both of its ends,
    with the names of the proxies that it has passed, until the proxy there accepts it.

    needed: whether some proxy has a backend that may be one of them.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.needed = False
        self._proxies: dict[Place, str] = {}  # their names, by where they listen
        self._ports: set[int] = set()
        self._paths: dict[str, str] = {}  # of unix sockets: what symbolic links make of them
        # By the near end, then by the far one. The kernel gives a port to several sockets with other far ends. Empty
        # where it is closed already.
        self._coming: dict[Place, dict[Place, tuple[str, ...]]] = {}
        self._gone: deque[tuple[float, Place, Place]] = deque()  # those that are closed, by when

    def listen(self, listeners: Mapping[str, Sequence[Listener]], backends: Iterable[Address]) -> None:
        """Know where proxies, by their names, listen from now on, and the backends of all."""
        self._paths.clear()
        reached = ((name, where) for name, own in listeners.items() for one in own for where in one.reached_at)
        self._proxies = {self._real(place_of(where)): name for name, where in reached}
        self._ports = {place[1] for place in self._proxies if isinstance(place, tuple)}
        self.needed = any(map(self.may_return, backends))

    def may_return(self, backend: Address) -> bool:
        """Whether a backend may be a proxy of this process, under whatever name."""
        known = literal(backend) if backend.path else None
        return self.place(known.address) in self._proxies if known else backend.port in self._ports

    def proxy_at(self, far: Place, near: Place | None = None) -> str | None:
        """The proxy that is at an address; None if there is none, or that cannot be known.

        near: the other end of a connection there. Where both have one address, it is this host's.
        """
        if isinstance(far, tuple) and far not in self._proxies:
            host, port = far
            if host.startswith("127.") or host == "::1" or (near and near[0] == host):
                return self._proxies.get((EVERYWHERE[":" in host], port))
        return self._proxies.get(far)

    def may_be_at(self, far: Place) -> bool:
        """Whether a proxy may be there."""
        return far[1] in self._ports if isinstance(far, tuple) else far in self._proxies

    def begin(self, near: Place, far: Place, names: tuple[str, ...]) -> None:
        """A connection begins, that has passed these proxies."""
        self._coming.setdefault(near, {})[far] = names

    def end(self, near: Place, far: Place) -> None:
        """A connection that has begun is closed, or is about to be."""
        now = self._loop.now
        while self._gone and self._gone[0][0] <= now - GONE_FOR:
            _, *ends = self._gone.popleft()
            if self._coming.get(ends[0], {}).get(ends[1]) == ():
                self._forget(*ends)
        if far in self._coming.get(near, {}):
            self._coming[near][far] = ()
            self._gone.append((now, near, far))

    def take(self, near: Place, far: Place) -> tuple[str, ...] | None:
        """A client is accepted: which proxies it has passed, none if it is somebody else; None if it is closed."""
        names = self._coming[near].get(far)
        if names is None:
            return ()
        self._forget(near, far)
        return names or None

    def knows(self, near: Place) -> bool:
        """Whether a connection with this near end may be one of ours: then ask `take`."""
        return near in self._coming

    def place(self, address: object) -> Place:
        """A socket address as connect(2) has it: the same for each way to write it."""
        place = self._real(place_of(address))
        return (LOOPBACK.get(place[0], place[0]), place[1]) if isinstance(place, tuple) else place

    def _real(self, place: Place) -> Place:
        """The same with the path that symbolic links make of a unix socket's."""
        if isinstance(place, tuple) or place.startswith("\0"):
            return place
        if place not in self._paths:
            self._paths[place] = os.path.realpath(place)
        return self._paths[place]

    def _forget(self, near: Place, far: Place) -> None:
        del self._coming[near][far]
        if not self._coming[near]:
            del self._coming[near]


class Way:
    """The way of one connection.

    names: of the proxies that it has passed, that which serves it last.
    near: the near end of what was dialled (getsockname(2)), from `begin` to `end`.
    """

    __slots__ = ("_far", "_ways", "names", "near")

    def __init__(self, ways: Ways, names: tuple[str, ...]) -> None:
        self._ways = ways
        self._far: Place = ""
        self.names = names
        self.near: Any = None

    def check(self, where: SocketAddress) -> bool:
        """Whether what is dialled there may be a proxy of this process. Raises LoopError if it was passed already."""
        self._far = self._ways.place(where.address)
        self._refuse(self._ways.proxy_at(self._far))
        return self._ways.may_be_at(self._far)

    def begin(self, near: object) -> None:
        """There is a connection from this end to what was checked last. Raises LoopError, as `check` does."""
        self.near = near
        place = place_of(near)
        self._ways.begin(place, self._far, self.names)
        self._refuse(self._ways.proxy_at(self._far, place))

    def end(self) -> None:
        """That connection is closed, or about to be."""
        if self.near is not None:
            self._ways.end(place_of(self.near), self._far)
            self.near = None

    def _refuse(self, name: str | None) -> None:
        if name in self.names:
            raise LoopError((*self.names, name))
