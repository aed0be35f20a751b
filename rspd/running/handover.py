"""Handover: what goes on in the next process of the service, and what the process before has left."""

from __future__ import annotations

import errno
import gc
import logging
import os
import select
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from rspd.config.keys import load_config
from rspd.engine.cause import Cause
from rspd.engine.loop import IN, Loop, Watch, news
from rspd.engine.side import Handed
from rspd.errors import ConfigError
from rspd.host.store import PARCEL, STORE_MAX, Inheritance, Parcel, Store, abort
from rspd.host.systemd import StoredDescriptor
from rspd.log import quote
from rspd.net.address import format_peer, peer
from rspd.net.descriptors import allow_all
from rspd.running.document import DocumentError, read, write
from rspd.running.proxies import Proxies
from rspd.serving.connection import Connection
from rspd.serving.proxy import Proxy
from rspd.settings import Config

# Seconds for connections that are not relayed yet, or no more, and between two looks at them.
SETTLE, LOOK = 1.0, 0.01

# Seconds that systemd has for an answer.
PATIENCE = 5.0

# Seconds for which connections wait for room, whatever drain_timeout says: systemd would soon kill the process.
LONGEST = 60.0

# Seconds until the next attempt, if descriptors of other services of this user leave no room in flight.
AGAIN = 0.1

# How many connections are taken over in a turn of the loop: about 5 ms of work.
SLICE = 200

# Bytes that mark the messages of a parcel.
TOKEN_SIZE = 16

LOST: Cause = "handover-failed"

log = logging.getLogger(__name__)


class Legacy:
    """What the process before has left: `found` is in the store, with `listeners`."""

    def __init__(self, found: Sequence[StoredDescriptor]) -> None:
        self.found = found
        self._inheritance = inheritance = Inheritance(found)
        self.listeners = inheritance.listeners
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

    async def take_over(self, loop: Loop, proxies: Proxies) -> int:
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
            connections = proxies.resume(self._document)
            ready = _ready(descriptors)
            connections.sort(key=lambda one: ready.isdisjoint(one[1].get("descriptors", ())))
            for count, (proxy, handed) in enumerate(connections, 1):
                taken += _take_over(proxy, handed, descriptors)
                if not count % SLICE:
                    await loop.yield_turn()
        except Exception:
            log.exception("what the process before knew cannot be read; please report it")
        proxies.resumed()
        abort(descriptors.values())
        self._inheritance.close()
        self._document = {}  # it may be large
        return taken


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


def _take_over(proxy: Proxy, handed: Handed, descriptors: dict[int, int]) -> bool:
    """Serve on one connection. Its descriptors leave the given ones. Returns whether it goes on."""
    numbers = handed.get("descriptors", ())
    own = {number: descriptors.pop(number) for number in numbers if number in descriptors}
    reason = "" if len(own) == len(numbers) else "too few descriptors; raise LimitNOFILE="
    if not reason:
        try:
            proxy.take_over(handed, own)
            return True
        except Exception as error:
            log.exception("unexpected error, a connection of the process before ends; please report it")
            reason = str(error)
    abort(own.values())
    client, backend = format_peer(peer(handed.get("client", ""))), handed.get("backend", "-")
    text = "connection closed client=%s%s backend=%s cause=%s reason=%s"
    log.warning(text, client, proxy.tag, backend, LOST, quote(reason))
    return False


class Handover:
    """To the next process of the service."""

    def __init__(self, loop: Loop, store: Store, proxies: Proxies, from_file: bool) -> None:
        """from_file: whether there is a file that may be wrong when the next process reads it."""
        self._loop = loop
        self._store = store
        self._proxies = proxies
        self._dump: Callable[[Config], str] | None = None
        if from_file:
            # Now, since another version may be installed at the end. It needs PyYAML, as the file does.
            from rspd.config.dump import dump

            self._dump = dump

    async def run(self, config: Config, hurry: Callable[[], bool]) -> bool:
        """Hand over. If this returns True, no task runs any more: the process ends.

        If it returns False, the relayed connections go on here. No client is accepted any more: the caller drains.

        config: in force. hurry: whether to wait for nobody.
        """
        loop, everyone = self._loop, self._proxies.everyone()
        for proxy in everyone:
            proxy.stop_accepting()
        log.info("handing over connections=%d", self._proxies.open)
        await self._settle(hurry)
        deadline = loop.now + min(LONGEST, max(proxy.config.drain_timeout for proxy in everyone))
        told = False
        busy_until = 0.0
        while True:
            try:
                left = await self._attempt(config)
            except Exception as error:
                if not isinstance(error, OSError):
                    log.exception("cannot hand over, connections drain; this is a bug")
                    return False
                reason = quote(error.strerror or str(error))
                busy_until = busy_until or max(deadline, loop.now + PATIENCE)
                if error.errno != errno.EAGAIN or loop.now >= busy_until or hurry():
                    log.warning("cannot hand over, connections drain reason=%s", reason)
                    return False
                if not told:
                    log.warning("cannot hand over yet, connections drain meanwhile reason=%s", reason)
                    told = True
                await loop.sleep(AGAIN)
                continue
            busy_until = 0.0
            if not left:
                loop.abandon()
                return True
            if not told:
                text = "too many descriptors in flight, connections drain that find no room connections=%d fitting=%d"
                count = self._proxies.open
                log.warning(text, count, count - len(left))
                told = True
            if loop.now >= deadline or hurry():
                await self._cut(left)
            else:
                await loop.sleep(AGAIN)

    async def _attempt(self, config: Config) -> Sequence[Connection]:
        """Hand all connections over. Returns those that found no room; then none is handed over. Raises OSError."""
        parcel = await self._leave_parcel()
        done = False
        try:
            left = self._fill(parcel, self._open(), config)
            done = not left
        finally:
            parcel.close()
            if not done:
                self._store.remove(PARCEL)
        return left

    def _open(self) -> list[Connection]:
        return [one for proxy in self._proxies.everyone() for one in proxy.connections.values()]

    async def _settle(self, hurry: Callable[[], bool]) -> None:
        """Wait a moment for connections that are not relayed; end those that are not even then."""
        until = self._loop.now + SETTLE
        while (waiting := [one for one in self._open() if not one.relay]) and self._loop.now < until and not hurry():
            await self._loop.sleep(LOOK)
        await self._cut(waiting)

    async def _cut(self, connections: Sequence[Connection]) -> None:
        for connection in connections:
            connection.cut("drain-timeout")
        while any(not connection.task.done for connection in connections):
            await self._loop.yield_turn()

    async def _leave_parcel(self) -> Parcel:
        """A parcel that is in the store. Raises OSError if there is none."""
        self._store.keep_all()
        if self._store.keeps(PARCEL):
            raise OSError(errno.EAGAIN, "systemd takes no message")
        parcel = Parcel()
        try:
            self._store.keep_parcel(parcel)
            await self._barrier()
            if not parcel.kept:
                raise OSError(errno.ENOSPC, f"systemd keeps nothing; the unit needs FileDescriptorStoreMax={STORE_MAX}")
        except BaseException:
            self._store.remove(PARCEL)
            parcel.close()
            raise
        return parcel

    async def _barrier(self) -> None:
        """Wait until systemd has read all that it was told. Raises OSError."""
        loop = self._loop
        fd = self._store.barrier()
        watch = Watch(fd)
        try:
            loop.watch(watch, IN)
            until = loop.now + PATIENCE
            loop.current.wake_at(until)
            while not watch.ready:
                if loop.now >= until:
                    raise OSError(errno.ETIMEDOUT, "systemd does not answer")
                await news()
        finally:
            loop.forget(watch)
            os.close(fd)

    def _fill(self, parcel: Parcel, connections: Sequence[Connection], config: Config) -> Sequence[Connection]:
        """Put connections into a parcel, with all that is known. Returns those that find no room. Raises OSError."""
        descriptors = [connection.descriptors for connection in connections]
        token = os.urandom(TOKEN_SIZE // 2).hex()
        room = parcel.send([fd for own in descriptors for fd in own], token.encode())
        fitting = bisect_right(list(accumulate(len(own) for own in descriptors)), room)
        if fitting < len(connections):
            return connections[fitting:]
        document = {"token": token, "settings": self._dump(config) if self._dump else None}
        gc.disable()  # there is no garbage
        try:
            parcel.write(write({**document, **self._proxies.hand_over()}))
        except BaseException:
            gc.enable()
            raise
        for connection in connections:
            connection.reset_if_nobody_takes()
        return ()
