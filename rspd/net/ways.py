"""The ways that connections take through this process, so that none leads back to a proxy that it came from."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from rspd.engine.loop import Loop
from rspd.engine.side import Handed
from rspd.net.address import Address, Peer, Place, SocketAddress, literal, peer, place_of, plain
from rspd.net.listener import Listener

# If a connection to this host is closed before a proxy has accepted it, it stays known for so many seconds: a serial
# proxy accepts it only after the connection that dialled it has ended.
GONE_FOR = 1.0

# What connect(2) dials in place of a wildcard address.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class LoopError(OSError):
    """The dialled address is a proxy that the connection has passed. itself: that proxy is the one that dials."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(came_back(names))
        self.itself = names[-1] == names[-2]


def came_back(names: Sequence[str]) -> str:
    """The text that says that the way through these proxies comes back to one of them."""
    if names[-1] == names[-2]:
        return "it is this proxy itself"
    return f"it leads back to proxy {names[-1]} ({', '.join(names)})"


class Ways:
    """Where each proxy listens, and which clients are this process itself. All proxies share one `Ways`.

    A chain of proxies is no loop. So if a connection may go to a proxy of this process, its two ends are noted, with
    the names of the proxies that it has passed. The note lasts until the proxy there accepts the connection.

    needed: whether some backend may be a proxy of this process.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.needed = False
        self._proxies: dict[Place, str] = {}  # their names, by the places where they listen
        self._ports: set[int] = set()
        self._paths: dict[str, str] = {}  # of unix sockets: each with its symbolic links followed
        # The names, by the near end, then by the far end: sockets with different far ends may have the same near port.
        # Empty if the connection is closed already.
        self._coming: dict[Place, dict[Place, tuple[str, ...]]] = {}
        self._gone: deque[tuple[float, Place, Place]] = deque()  # closed connections: when, and both ends

    def listen(self, listeners: Mapping[str, Sequence[Listener]], backends: Iterable[Address]) -> None:
        """Note where each proxy listens from now on, and the backends of all proxies."""
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

        near: the near end of a connection to it. If both ends have the same address, it is an address of this host.
        """
        if isinstance(far, tuple) and far not in self._proxies:
            host, port = far
            if host.startswith("127.") or host == "::1" or (near and near[0] == host):
                return self._proxies.get(("::" if ":" in host else "0.0.0.0", port))
        return self._proxies.get(far)

    def may_be_at(self, far: Place) -> bool:
        """Whether a proxy may be there."""
        return far[1] in self._ports if isinstance(far, tuple) else far in self._proxies

    def begin(self, near: Place, far: Place, names: tuple[str, ...]) -> None:
        """A connection that has passed these proxies begins."""
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
        """The proxies that an accepted client has passed: none if it is not this process; None if it has closed."""
        names = self._coming[near].get(far)
        if names is None:
            return ()
        self._forget(near, far)
        return names or None

    def notes(self, near: Place, far: Place) -> bool:
        """Whether a connection is noted that no proxy has accepted yet."""
        return bool(self._coming.get(near, {}).get(far))

    def resume(self, handed: Handed) -> Way:
        """The way of a connection that the process before has handed over."""
        way = Way(self, tuple(handed.get("names", ())))
        far = handed.get("far", "")
        place: Place = far if isinstance(far, str) else (far[0], far[1])
        way.resume(peer(handed.get("near", "")), place, handed.get("noted", False))
        return way

    def knows(self, near: Place) -> bool:
        """Whether a connection with this near end may come from this process: then ask `take`."""
        return near in self._coming

    def place(self, address: Peer) -> Place:
        """The place that connect(2) goes to for a socket address: the same however the address is written."""
        place = self._real(place_of(address))
        return (LOOPBACK.get(place[0], place[0]), place[1]) if isinstance(place, tuple) else place

    def _real(self, place: Place) -> Place:
        """The place, with the symbolic links in a unix socket's path followed."""
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

    names: the proxies that it has passed; the last one serves it.
    near: the near end of the dialled connection (getsockname(2)), from `begin` to `end`.
    """

    __slots__ = ("_far", "_ways", "names", "near")

    def __init__(self, ways: Ways, names: tuple[str, ...]) -> None:
        self._ways = ways
        self._far: Place = ""
        self.names = names
        self.near: Peer | None = None

    def check(self, where: SocketAddress) -> bool:
        """Whether a proxy of this process may listen there. Raises LoopError if the connection has passed it."""
        self._far = self._ways.place(where.address)
        self._refuse(self._ways.proxy_at(self._far))
        return self._ways.may_be_at(self._far)

    def begin(self, near: Peer) -> None:
        """A connection from this near end to the address checked last begins. Raises LoopError, as `check` does."""
        self.near = near
        place = place_of(near)
        self._ways.begin(place, self._far, self.names)
        self._refuse(self._ways.proxy_at(self._far, place))

    def hand_over(self) -> Handed:
        """What `Ways.resume` takes, in the next process; nothing if no proxy of this process may be at the far end."""
        if self.near is None:
            return {}
        noted = self._ways.notes(place_of(self.near), self._far)
        return {"names": self.names, "near": plain(self.near), "far": self._far, "noted": noted}

    def resume(self, near: Peer, far: Place, noted: bool) -> None:
        """The connection with these ends goes on. noted: whether no proxy has accepted it yet."""
        self.near, self._far = near, far
        if noted:
            self._ways.begin(place_of(near), far, self.names)

    def end(self) -> None:
        """That connection is closed, or about to be."""
        if self.near is not None:
            self._ways.end(place_of(self.near), self._far)
            self.near = None

    def _refuse(self, name: str | None) -> None:
        if name in self.names:
            raise LoopError((*self.names, name))
