"""Host names of backends, looked up again and again off the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf

from rspd.engine.loop import Loop, news
from rspd.log import quote
from rspd.net.address import Address, SocketAddress
from rspd.net.descriptors import SHORT, Shortage
from rspd.net.resolver import Resolver
from rspd.net.waiting import GivenUp

# Seconds until a failed lookup is tried again, doubled each time up to `interval`. Also the seconds until the next
# lookup if the known addresses have proved useless.
FIRST_RETRY = 1.0

# Seconds after which a lookup in the background counts as failed, whatever the system's resolver waits for.
LOOKUP_TIMEOUT = 30.0

log = logging.getLogger(__name__)


class Name:
    """A host name and what it stands for, looked up every `interval` seconds until `stop`.

    addresses: the known addresses, those known longest first; empty until a lookup succeeds. A lookup that fails
        removes none.
    """

    def __init__(
        self,
        loop: Loop,
        resolver: Resolver,
        shortage: Shortage,
        address: Address,
        interval: float,
        part: float,
        tag: str,
        changed: Callable[[], object],
    ) -> None:
        """part: of `interval`, above 0 and up to 1, until the second lookup, so that not all lookups come at once.

        tag: names the proxy in the log, with a space before it, or is empty.
        changed: called whenever `addresses` has become another list.
        """
        self.address = address
        self.addresses: list[SocketAddress] = []
        self._loop = loop
        self._resolver = resolver
        self._shortage = shortage
        self._part = part
        self._tag = tag
        self._changed = changed
        self._interval = interval
        self._failing = False
        self._looked = 0.0  # when the last lookup ended
        self._pause = inf  # seconds from then to the next lookup, if fewer than `interval`
        self._task = loop.spawn(self._keep_looking())

    def stop(self) -> None:
        """Look up no more."""
        self._task.cancel()

    def look_every(self, interval: float) -> None:
        """Look up this often from now on."""
        self._interval = interval
        self._task.wake()

    def refresh(self) -> None:
        """Look up soon: the known addresses have proved useless."""
        self._pause = min(self._pause, FIRST_RETRY)
        self._task.wake()

    async def first_answer(self, deadline: float, given_up: GivenUp) -> list[SocketAddress]:
        """The addresses of the name, for a client or a check that comes before any is known.

        given_up: as for `Resolver.look_up`.
        Raises TimeoutError at the deadline, another OSError if the name has no address, or it is given up.
        """
        while True:
            try:
                found = await self._resolver.look_up(self.address, deadline, given_up)
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

    async def _keep_looking(self) -> None:
        loop = self._loop
        retry = FIRST_RETRY
        first = self._interval * self._part
        await loop.yield_turn()  # the owner must have this `Name` before `changed` is called
        while True:
            try:
                found = await self._resolver.look_up(self.address, loop.now + LOOKUP_TIMEOUT)
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
