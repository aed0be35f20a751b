"""Sources: from configured addresses to socket addresses. A host name is looked up again and again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf

from rspd.engine.loop import Loop, Task, news
from rspd.log import quote
from rspd.net.address import Address, SocketAddress, literal
from rspd.net.descriptors import SHORT, Shortage
from rspd.net.resolver import Resolver
from rspd.net.waiting import GivenUp

# Seconds until a failed lookup is tried again, doubled each time up to `resolve_interval`. Also the seconds until the
# next lookup if the known addresses have proved useless.
FIRST_RETRY = 1.0

# Seconds after which a lookup in the background counts as failed, whatever the system's resolver waits for.
LOOKUP_TIMEOUT = 30.0

log = logging.getLogger(__name__)


class Source:
    """What one configured address stands for. This kind is for an address that stands for itself.

    addresses: the known socket addresses, the first to be tried at the front.
    asks: whether it has to ask for them.
    """

    asks = False

    @classmethod
    def takes(cls, address: Address) -> bool:
        """Whether this kind is for an address."""
        return literal(address) is not None

    def __init__(
        self,
        loop: Loop,
        resolver: Resolver,
        shortage: Shortage,
        address: Address,
        part: float,
        tag: str,
        changed: Callable[[], object],
    ) -> None:
        """part: the share of the interval before it asks again, above 0, up to 1. It differs, to spread the lookups.

        tag: names the proxy in the log, with a space before it, or is empty.
        changed: called whenever `addresses` has become another list.
        """
        self._loop = loop
        self._resolver = resolver
        self._shortage = shortage
        self.address = address
        self._part = part
        self._tag = tag
        self._changed = changed
        known = literal(address)
        self.addresses = [known] if known else []

    def backends(self, each: bool) -> list[tuple[str, list[SocketAddress]]]:
        """The name and the addresses of each of its backends. each: whether each address is a backend."""
        return [(str(self.address), self.addresses)]

    def ask_every(self, interval: float) -> None:
        """Ask this often from now on, in seconds. The first call asks at once."""

    def refresh(self) -> None:
        """Ask soon: the known addresses have proved useless."""

    def stop(self) -> None:
        """Ask no more."""

    async def first_answer(self, deadline: float, given_up: GivenUp) -> list[SocketAddress]:
        """The addresses, for a client or a check that comes before any is known.

        given_up: as for `Resolver.look_up`.
        Raises TimeoutError at the deadline, another OSError if there is no address, or it is given up.
        """
        return self.addresses


class HostName(Source):
    """A host name, looked up again and again until `stop`. A lookup that fails removes no address."""

    asks = True
    _interval = inf
    _failing = False
    _looked = 0.0  # when the last lookup ended
    _pause = inf  # seconds from then to the next lookup, if fewer than the interval
    _task: Task | None = None

    @classmethod
    def takes(cls, address: Address) -> bool:
        return bool(address.host) and literal(address) is None

    def backends(self, each: bool) -> list[tuple[str, list[SocketAddress]]]:
        if each:
            return [(str(where), [where]) for where in self.addresses]
        return [(str(self.address), self.addresses)]

    def ask_every(self, interval: float) -> None:
        self._interval = interval
        if self._task:
            self._task.wake()
        else:
            self._task = self._loop.spawn(self._keep_looking())

    def refresh(self) -> None:
        self._pause = min(self._pause, FIRST_RETRY)
        if self._task:
            self._task.wake()

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    async def first_answer(self, deadline: float, given_up: GivenUp) -> list[SocketAddress]:
        while True:
            try:
                found = await self._ask(deadline, given_up)
            except OSError as error:
                # Without descriptors the resolver finds no files, servers or modules, and may say anything: that a name
                # is unknown, or an errno left over from something else (EBUSY).
                short = error.errno in SHORT or self._shortage.active
                if not short or self._loop.now >= deadline or given_up():
                    raise
                await self._shortage.wait(error)
            else:
                self._note(found)
                return self.addresses

    async def _ask(self, deadline: float, given_up: GivenUp | None = None) -> list[SocketAddress]:
        """Ask once, as `Resolver.look_up` does. Raises nothing but OSError. Another kind may ask somebody else."""
        return await self._resolver.look_up(self.address, deadline, given_up)

    async def _keep_looking(self) -> None:
        loop = self._loop
        retry = FIRST_RETRY
        first = self._interval * self._part
        await loop.yield_turn()  # the owner must have this source before `changed` is called
        while True:
            try:
                found = await self._ask(loop.now + LOOKUP_TIMEOUT)
            except OSError as error:
                self._note_failure(error)
                self._pause = retry
                retry *= 2
            else:
                self._note(found)
                self._pause, first = first, inf
                retry = FIRST_RETRY
            self._looked = loop.now
            while loop.now < (due := self._looked + min(self._pause, self._interval)):
                loop.current.wake_at(due)
                await news()

    def _note(self, found: list[SocketAddress]) -> None:
        if self._failing:
            self._failing = False
            log.info("name found again%s name=%s", self._tag, self.address.host)
        known = self.addresses
        if set(found) != set(known):
            # Servers rotate the order of their answers. The address that was reached last stays first.
            self.addresses = [a for a in known if a in found] + [a for a in found if a not in known]
            if known:
                addresses = ",".join(map(str, self.addresses))
                log.info("name has changed%s name=%s addresses=%s", self._tag, self.address.host, addresses)
            self._changed()

    def _note_failure(self, error: OSError) -> None:
        if self._failing or error.errno in SHORT or self._shortage.active:
            return
        self._failing = True
        keeping = " keeping=" + ",".join(map(str, self.addresses)) if self.addresses else ""
        reason = quote(error.strerror or str(error))
        log.warning("name not found%s name=%s reason=%s%s", self._tag, self.address.host, reason, keeping)


# The kinds of sources: the first whose `takes` is true is used.
KINDS: tuple[type[Source], ...] = (Source, HostName)
