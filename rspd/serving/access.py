"""Which clients may connect, and what the log says of refused clients."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf
from typing import NamedTuple

from rspd.engine.loop import Loop, Task
from rspd.log import quote
from rspd.net.networks import Network, Networks, client_key

# Seconds from one line about refused clients to the next.
INTERVAL = 1.0

log = logging.getLogger(__name__)


class Refusal(NamedTuple):
    """Why a client may not come. key: of the configuration. reason: for the log."""

    key: str
    reason: str


class Access:
    """A proxy's `allow`, `deny` and `max_connections_per_client`.

    A host, here, is a client's numeric address, empty for a client of a unix socket.

    needed: whether any of them is set; if not, nothing here has to be called for a client.
    """

    def __init__(self, allow: Sequence[Network], deny: Sequence[Network], per_client: float) -> None:
        self.apply(allow, deny, per_client, ())

    def apply(
        self, allow: Sequence[Network], deny: Sequence[Network], per_client: float, present: Iterable[str]
    ) -> None:
        """Go by other settings from now on.

        present: the host of each open connection that was not refused: these count towards a new limit too.
        """
        self._allow = Networks(allow) if allow else None
        self._deny = Networks(deny) if deny else None
        self._per_client = per_client
        # Connections by client, where there is a limit.
        self._open: dict[str, int] = Counter(map(client_key, present)) if per_client < inf else {}
        self.needed = bool(allow or deny or per_client < inf)

    def admit(self, host: str) -> Refusal | None:
        """Why a client is refused. None if it may come: then its connection counts until `leave`.

        Raises OSError if host is no address.
        """
        if self._deny and (network := self._deny.find(host)):
            return Refusal("deny", f"in deny {network}")
        if self._allow and not self._allow.find(host):
            return Refusal("allow", "not in allow")
        if self._per_client < inf:
            client = client_key(host)
            count = self._open.get(client, 0)
            if count >= self._per_client:
                whole = f"{client} " if "/" in client else ""
                connections = "connection" if count == 1 else "connections"
                text = f"{whole}has {count} {connections}, max_connections_per_client is {self._per_client:.0f}"
                return Refusal("max_connections_per_client", text)
            self._open[client] = count + 1
        return None

    def enter(self, host: str) -> str:
        """A connection that was admitted by the process before counts from now on, until `leave`. Returns the host."""
        if self._per_client < inf:
            client = client_key(host)
            self._open[client] = self._open.get(client, 0) + 1
        return host

    def leave(self, host: str) -> None:
        """A connection that was admitted, or was among those `present`, has ended."""
        if self._per_client < inf:
            client = client_key(host)
            count = self._open.pop(client, 0)
            if count > 1:
                self._open[client] = count - 1


class Refusals:
    """Logs refused clients: the first at once, then at most one line a second, with the number of the other clients.

    tag: names the proxy in a line of the log: ` proxy=NAME`, or nothing.
    count: how many clients were refused.
    """

    def __init__(self, loop: Loop, tag: str) -> None:
        self._loop = loop
        self._tag = tag
        self._task: Task | None = None  # while lines are held back
        self._last = ("", "")
        self._untold = 0
        self.count = 0

    def note(self, client: str, reason: str) -> None:
        """A client, as the log prints it, was refused."""
        self._last = client, reason
        self._untold += 1
        self.count += 1
        if not self._task:
            self._task = self._loop.spawn(self._keep_telling())

    def close(self) -> None:
        """Log what is held back, since the proxy ends. The task that would have logged it ends a turn later."""
        self._tell()
        if self._task:
            self._task.cancel()

    def _tell(self) -> None:
        if self._untold:
            client, reason = self._last
            more = f" more={self._untold - 1}" if self._untold > 1 else ""
            self._untold = 0
            log.warning("client refused client=%s%s reason=%s%s", client, self._tag, quote(reason), more)

    async def _keep_telling(self) -> None:
        try:
            while self._untold:
                self._tell()
                await self._loop.sleep(INTERVAL)
        finally:
            self._task = None
            self._tell()
