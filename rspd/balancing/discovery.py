"""Sources: from configured addresses to socket addresses. A host name is looked up again and again."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from math import inf

from rspd.engine.loop import Loop, Task, news
from rspd.log import quote
from rspd.net.address import Address, SocketAddress, at_port, denies, host_of, literal
from rspd.net.descriptors import SHORT, Shortage
from rspd.net.resolver import ANSWER_LIFE, Resolver
from rspd.net.waiting import GivenUp

# Seconds until a failed lookup is tried again, doubled each time up to `resolve_interval`. Also the seconds until the
# next lookup if the known addresses have proved useless, or are said to be gone.
FIRST_RETRY = 1.0

# Seconds after which a lookup in the background counts as failed, whatever the system's resolver waits for.
LOOKUP_TIMEOUT = 30.0

log = logging.getLogger(__name__)


class Source:
    """What configured addresses with one origin stand for. This kind is for an address that stands for itself.

    asks: whether it has to ask for socket addresses.
    origin: see `origin_of`.
    """

    asks = False

    @classmethod
    def takes(cls, address: Address) -> bool:
        """Whether this kind is for an address."""
        return literal(address) is not None

    @classmethod
    def origin_of(cls, address: Address) -> Address:
        """What is asked about an address. Addresses with the same origin share a source."""
        return address

    def __init__(
        self,
        loop: Loop,
        resolver: Resolver,
        shortage: Shortage,
        origin: Address,
        part: float,
        tag: str,
        changed: Callable[[], object],
    ) -> None:
        """part: the share of the interval before it asks again, above 0, up to 1. It differs, to spread the lookups.

        tag: names the proxy in the log, with a space before it, or is empty.
        changed: called whenever the known addresses have changed.
        """
        self._loop = loop
        self._resolver = resolver
        self._shortage = shortage
        self.origin = origin
        self._part = part
        self._tag = tag
        self._changed = changed
        known = literal(origin)
        self._known = [known] if known else []

    def addresses(self, address: Address) -> list[SocketAddress]:
        """The known socket addresses of an address with this origin; a new list, empty if none is known."""
        return self._known.copy()

    def backends(self, address: Address, each: bool) -> list[tuple[str, list[SocketAddress]]]:
        """The name and the socket addresses of each backend that an address stands for.

        each: whether each socket address is a backend.
        """
        return [(str(address), self.addresses(address))]

    def resume(self, known: list[SocketAddress]) -> None:
        """Go on with the addresses that the process before knew. An address that stands for itself needs none."""

    def ask_every(self, interval: float) -> None:
        """Ask this often from now on, in seconds. The first call asks at once."""

    def refresh(self) -> None:
        """Ask soon: the known addresses have proved useless."""

    def stop(self) -> None:
        """Ask no more."""

    async def first_answer(self, address: Address, deadline: float, given_up: GivenUp) -> list[SocketAddress]:
        """The same as `addresses`, for a client or a check that comes before any is known.

        given_up: as for `Resolver.look_up`.
        Raises TimeoutError at the deadline, another OSError if there is no address, or it is given up.
        """
        return self.addresses(address)


class HostName(Source):
    """A host name, whatever the port; looked up again and again until `stop`.

    The answer that the name is gone counts if the next answer is the same. A lookup without an answer removes nothing.
    """

    asks = True
    _interval = inf
    _denied = False  # the last answer was that the name is gone
    _failure: OSError | None = None  # of the last lookup
    _failed_at = 0.0
    _failing = False  # the log says that it is not found
    _looked = 0.0  # when the last lookup ended
    _pause = inf  # seconds from then to the next lookup, if fewer than the interval
    _task: Task | None = None

    @classmethod
    def takes(cls, address: Address) -> bool:
        return bool(address.host) and literal(address) is None

    @classmethod
    def origin_of(cls, address: Address) -> Address:
        return Address(address.host)

    def addresses(self, address: Address) -> list[SocketAddress]:
        return [at_port(where, address.port) for where in self._known]

    def backends(self, address: Address, each: bool) -> list[tuple[str, list[SocketAddress]]]:
        addresses = self.addresses(address)
        return [(str(where), [where]) for where in addresses] if each else [(str(address), addresses)]

    def resume(self, known: list[SocketAddress]) -> None:
        self._known = known
        self._changed()

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

    async def first_answer(self, address: Address, deadline: float, given_up: GivenUp) -> list[SocketAddress]:
        while True:
            if self._failure and self._loop.now - self._failed_at < ANSWER_LIFE:
                raise self._failure.with_traceback(None)  # not every client is to ask the name servers again
            try:
                found = await self._ask(deadline, given_up)
            except OSError as error:
                if not self._is_short(error):
                    self._note_error(error)
                    raise
                if self._loop.now >= deadline or given_up():
                    raise
                await self._shortage.wait(error)
            else:
                self._note(found)
                return self.addresses(address)

    def _is_short(self, error: OSError) -> bool:
        """Whether a lookup may have failed for want of a descriptor.

        Then the resolver finds no files, servers or modules, and may say anything: that a name is unknown, or an errno
        left over from something else (EBUSY).
        """
        return error.errno in SHORT or self._shortage.active or self._shortage.none_free

    async def _ask(self, deadline: float, given_up: GivenUp | None = None) -> list[SocketAddress]:
        """Ask once, as `Resolver.look_up` does. Raises nothing but OSError. Another kind may ask somebody else."""
        return await self._resolver.look_up(self.origin, deadline, given_up)

    async def _keep_looking(self) -> None:
        loop = self._loop
        retry = FIRST_RETRY
        first = self._interval * self._part
        await loop.yield_turn()  # the owner must have this source before `changed` is called
        while True:
            try:
                found = await self._ask(loop.now + LOOKUP_TIMEOUT)
            except OSError as error:
                if self._note_failure(error):
                    retry = FIRST_RETRY
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
        self._denied, self._failure = False, None
        if self._failing:
            self._failing = False
            log.info("name found again%s name=%s", self._tag, self.origin.host)
        known = self._known
        if set(found) != set(known):
            self._known = in_order(known, found)
            if known:
                addresses = _hosts(self._known)
                log.info("name has changed%s name=%s addresses=%s", self._tag, self.origin.host, addresses)
            self._changed()

    def _note_error(self, error: OSError) -> None:
        if isinstance(error, socket.gaierror):
            self._failure, self._failed_at = error, self._loop.now

    def _note_failure(self, error: OSError) -> bool:
        """A lookup failed. Returns whether it was an answer that the next lookup has to confirm."""
        if self._is_short(error):
            return False
        self._note_error(error)
        known = self._known
        gone = bool(known) and denies(error)
        if gone and not self._denied:
            self._denied = True
            return True
        if gone or not self._failing:
            self._failing = True
            rest = f" {'dropped' if gone else 'keeping'}={_hosts(known)}" if known else ""
            reason = quote(error.strerror or str(error))
            log.warning("name not found%s name=%s reason=%s%s", self._tag, self.origin.host, reason, rest)
        if gone:
            self._known = []
            self._changed()
        return False


# The kinds of sources: the first whose `takes` is true is used.
KINDS: tuple[type[Source], ...] = (Source, HostName)


def kind_of(address: Address) -> type[Source]:
    """The kind of source that is for an address."""
    return next(kind for kind in KINDS if kind.takes(address))


def in_order(known: Sequence[SocketAddress], found: Sequence[SocketAddress]) -> list[SocketAddress]:
    """The addresses that were found; those that were known stay in front, in their order.

    Servers rotate the order of their answers. The address that was reached last is to stay the first.
    """
    return [where for where in known if where in found] + [where for where in found if where not in known]


def _hosts(addresses: Sequence[SocketAddress]) -> str:
    return ",".join(host_of(where.address) or str(where) for where in addresses)
