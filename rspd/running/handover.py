"""Handover: what goes on in the next process of the service."""

from __future__ import annotations

import errno
import gc
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from rspd.engine.loop import IN, Loop, Watch, news
from rspd.host.store import PARCEL, STORE_MAX, Parcel, Store
from rspd.log import quote
from rspd.observing.desk import Desk
from rspd.running.document import write
from rspd.running.proxies import Proxies
from rspd.serving.connection import Connection
from rspd.serving.resuming import descriptors_of, reset_if_nobody_takes
from rspd.settings import Config

# Seconds that systemd has for an answer.
PATIENCE = 5.0

# Seconds for which connections wait for room, whatever drain_timeout says: systemd would soon kill the process.
LONGEST = 60.0

# Seconds until the next attempt, if descriptors of other services of this user leave no room in flight.
AGAIN = 0.1

# Bytes that mark the messages of a parcel.
TOKEN_SIZE = 16

log = logging.getLogger(__name__)


class Handover:
    """To the next process of the service."""

    def __init__(self, loop: Loop, store: Store, proxies: Proxies, desk: Desk, from_file: bool) -> None:
        """from_file: whether there is a file that may be wrong when the next process reads it."""
        self._loop = loop
        self._store = store
        self._proxies = proxies
        self._desk = desk
        self._dump: Callable[[Config], str] | None = None
        if from_file:
            # Now, since another version may be installed at the end. It needs PyYAML, as the file does.
            from rspd.explaining.dump import dump

            self._dump = dump

    async def run(self, config: Config, hurry: Callable[[], bool]) -> bool:
        """Hand over. If this returns True, no task runs any more: the process ends.

        If it returns False, all connections go on here, and no client is accepted any more: the caller drains.

        config: in force. hurry: whether to wait for nobody.
        """
        loop = self._loop
        self._begin()
        deadline = loop.now + min(LONGEST, max(one.config.drain_timeout for one in self._proxies.everyone()))
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
                return self._done()
            if not told:
                text = "too many descriptors in flight, connections drain that find no room connections=%d fitting=%d"
                count = self._proxies.open
                log.warning(text, count, count - len(left))
                told = True
            if loop.now >= deadline or hurry():
                await self._cut(left)
            else:
                await loop.sleep(AGAIN)

    async def run_or_stay(self, config: Config) -> bool:
        """`run`, for a process that can go on: if this returns False, the caller accepts clients again."""
        self._begin()
        try:
            left = await self._attempt(config)
            reason = f"too many descriptors in flight for {len(left)} connections" if left else ""
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception:
            log.exception("unexpected error while handing over; please report it")
            reason = "a bug"
        if not reason:
            return self._done()
        log.warning("cannot hand over, nothing has changed reason=%s", quote(reason))
        return False

    def _begin(self) -> None:
        for proxy in self._proxies.everyone():
            proxy.stop_accepting()
        log.info("handing over connections=%d", self._proxies.open)

    def _done(self) -> bool:
        log.info("handed over connections=%d served=%d", self._proxies.open, self._proxies.served)
        self._loop.abandon()
        return True

    async def _attempt(self, config: Config) -> Sequence[Connection]:
        """Hand all connections over. Returns those that found no room; then none is handed over. Raises OSError."""
        parcel = await self._leave_parcel()
        done = False
        try:
            await self._desk.finish()
            left = self._fill(parcel, self._open(), config)
            done = not left
        finally:
            parcel.close()
            if not done:
                self._store.remove(PARCEL)
                self._desk.go_on()
        return left

    def _open(self) -> list[Connection]:
        return [one for proxy in self._proxies.everyone() for one in proxy.connections.values()]

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
        descriptors = [descriptors_of(connection) for connection in connections]
        token = os.urandom(TOKEN_SIZE // 2).hex()
        room = parcel.send([fd for own in descriptors for fd in own], token.encode())
        fitting = bisect_right(list(accumulate(len(own) for own in descriptors)), room)
        if fitting < len(connections):
            return connections[fitting:]
        document = {"token": token, "settings": self._dump(config) if self._dump else None}
        gc.disable()  # there is no garbage
        try:
            for connection in connections:
                connection.interrupt()
            parcel.write(write({**document, **self._proxies.hand_over(), **self._desk.hand_over()}))
        except BaseException:
            gc.enable()
            for connection in sorted(connections, key=lambda one: one.began):
                connection.serve_on()
            raise
        for connection in connections:
            reset_if_nobody_takes(connection)
        return ()
