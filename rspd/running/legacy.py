"""Legacy: what the process before has left to this one."""

from __future__ import annotations

import logging
import select
from collections.abc import Mapping, Sequence

from rspd.config.keys import load_config
from rspd.engine.cause import Cause
from rspd.engine.loop import Loop
from rspd.engine.side import Handed
from rspd.errors import ConfigError
from rspd.host.store import Inheritance, abort
from rspd.host.systemd import StoredDescriptor
from rspd.log import quote
from rspd.net.descriptors import allow_all
from rspd.observing.desk import Desk
from rspd.running.document import DocumentError, read
from rspd.running.proxies import Proxies
from rspd.serving.proxy import Proxy
from rspd.serving.resuming import describe, without_odd_counts
from rspd.settings import Config

# How many connections are taken over in a turn of the loop: about 5 ms of work.
SLICE = 200

LOST: Cause = "handover-failed"
TOO_FEW = "too few descriptors; raise LimitNOFILE="
TAKEN = "a process that was taking over has ended, and all descriptors with it"

log = logging.getLogger(__name__)


class Legacy:
    """What the process before has left: `found` is in the store, with `listeners` and `lost`; see `Inheritance`."""

    def __init__(self, found: Sequence[StoredDescriptor]) -> None:
        self.found = found
        self._inheritance = inheritance = Inheritance(found)
        self.listeners, self.lost = inheritance.listeners, inheritance.lost
        self._document: Handed = {}
        try:
            states = [content for content in inheritance.states() if content]
        except OSError as error:
            states = []
            log.error("connections of the process before end: %s", error)
        for content in states:
            try:
                self._document = read(content)
            except DocumentError as error:
                log.error("connections of the process before end: %s", error)

    def config(self) -> Config | None:
        """The configuration that was in force; None if it is not known."""
        settings = self._document.get("settings")
        try:
            return load_config("settings", {}, sockets=True, content=settings.encode()) if settings else None
        except (ConfigError, ValueError, AttributeError) as error:
            log.error("the settings of the process before cannot be read: %s", error)
            return None

    async def take_over(self, loop: Loop, proxies: Proxies, desk: Desk) -> int:
        """Go on with all that it has left. Returns how many connections go on.

        Those on which something happens come first, and go on while the others are taken over.
        """
        allow_all()
        token = str(self._document.get("token", "")).encode()
        descriptors: dict[int, int] = {}
        taken = 0
        try:
            if token:
                descriptors = self._inheritance.receive(token)
            if self._document:
                self._resume(desk)
            connections = proxies.resume(self._document, self.config)
            without_odd_counts(handed for _, handed in connections)
            ready = _ready(descriptors)
            lost = TOO_FEW if descriptors else TAKEN
            # Those who wait for a backend come last, in their order: the others take their places at the backends.
            connections.sort(key=lambda one: _turn(one[1], ready))
            for count, (proxy, handed) in enumerate(connections, 1):
                try:
                    taken += _take_over(proxy, handed, descriptors, lost)
                except Exception:
                    log.exception("unexpected error, a connection of the process before ends; please report it")
                if not count % SLICE:
                    await loop.yield_turn()
            proxies.resumed()
        except Exception:
            log.exception("what the process before knew cannot be read; please report it")
        abort(descriptors.values())
        self._inheritance.close()
        self._document = {}  # it may be large
        return taken

    def _resume(self, desk: Desk) -> None:
        try:
            desk.resume(self._document)
        except Exception:
            log.exception("counts begin anew: those of the process before cannot be read; please report it")


def _ready(descriptors: Mapping[int, int]) -> set[int]:
    """Those from which there is something to read, by their numbers in the process before."""
    poll = select.poll()
    numbers = {fd: number for number, fd in descriptors.items()}
    for fd in numbers:
        poll.register(fd, select.POLLIN)
    try:
        return {numbers[fd] for fd, _ in poll.poll(0)}
    except OSError:
        return set()  # then they go on in the order in which they came


def _turn(handed: Handed, ready: set[int]) -> tuple[bool, float]:
    """When it is a connection's turn to be taken over."""
    if "relay" in handed:
        return False, ready.isdisjoint(handed.get("descriptors", ()))
    return True, handed.get("began", 0.0)


def _take_over(proxy: Proxy, handed: Handed, descriptors: dict[int, int], lost: str) -> bool:
    """Serve on one connection. Its descriptors leave the given ones. Returns whether it goes on.

    lost: the reason if some are missing.
    """
    numbers = handed.get("descriptors", ())
    own = {number: descriptors.pop(number) for number in numbers if number in descriptors}
    reason = "" if len(own) == len(numbers) else lost
    if not reason:
        try:
            proxy.take_over(handed, own)
            abort(own.values())  # another version may have sent more than this one knows
            return True
        except LookupError as error:
            reason = f"what is handed over lacks {error}"
        except Exception as error:
            log.exception("unexpected error, a connection of the process before ends; please report it")
            reason = str(error)
    abort(own.values())
    backend, _, seconds, *moved = proxy.tally.note_lost(handed, LOST, reason, proxy.loop.now)
    text = "connection closed %s backend=%s sent=%d received=%d seconds=%.3f cause=%s reason=%s"
    log.warning(text, describe(handed, proxy.tag), backend, *moved, seconds, LOST, quote(reason))
    return False
