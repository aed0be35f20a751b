"""Accepting clients, no more at once than allowed, and draining."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf

from rspd.balancing.backend import Backend
from rspd.balancing.pool import Pool
from rspd.engine.loop import EXCLUSIVE, IN, Loop, Task, news
from rspd.engine.pipes import Pipes
from rspd.engine.side import Handed
from rspd.net.descriptors import Shortage
from rspd.net.listener import CLIENT_GONE, Listener
from rspd.net.ways import Ways
from rspd.routing.pools import PoolMaker, Pools
from rspd.routing.router import Router
from rspd.serving.access import Access, Refusals
from rspd.serving.admission import steps
from rspd.serving.connection import Connection, Terms
from rspd.serving.places import Places
from rspd.serving.resuming import hand_over, resume
from rspd.serving.tally import Tally
from rspd.settings import ProxyConfig

AFTER_ERROR = 1.0  # seconds without accepting after an error that nobody expected

# Seconds between two looks for clients at a listener that other processes share. The kernel wakes one of the processes
# for a client (EPOLLEXCLUSIVE, epoll_ctl(2)). If that process ends, or has no descriptor left, no other hears of it.
LOOK_AGAIN = 1.0

# How many clients of one listener are accepted in one turn of the loop: about 5 ms of work. Fewer if other processes
# share the listener: the process that accepts a client serves it, even while the others have nothing to do.
BATCH, SHARED_BATCH = 64, 4

log = logging.getLogger(__name__)


class Proxy:
    """A proxy at work. Owns its listeners, its connections and its backends.

    connections: those that are open, in the order in which they were accepted.
    accepted: how many clients so far, those that may not come too.
    """

    def __init__(
        self,
        loop: Loop,
        shortage: Shortage,
        pipes: Pipes,
        pool_maker: PoolMaker,
        ways: Ways,
        watchers: set[Task],
        shared: Mapping[str, Pool],
        tally: Tally,
        config: ProxyConfig,
        listeners: Sequence[Listener],
    ) -> None:
        """watchers: tasks to wake whenever a connection begins or ends, or a backend goes down or comes up.

        shared: the pools of the whole file, by name. All proxies share what stands before `config`.
        The proxy owns the listeners from now on.
        """
        self.loop = loop
        self.shortage = shortage
        self.pipes = pipes
        self.watchers = watchers
        self.tally = tally
        self.tag = f" proxy={config.name}" if config.name else ""
        self._ways = ways
        self.router = Router(Pools(partial(pool_maker.make, self.cut_backend, self._changed)), shared, self.tag)
        self.accepted = 0
        self._access = Access((), (), inf)
        self._refusals = Refusals(loop, self.tag)
        self.connections: dict[Task, Connection] = {}
        self.places = Places(loop, self.tag, self.connections, self._newest, self._changed)
        self._accepting = False
        self._leaving = False
        self._watched: list[Listener] = []
        self._rush = -1  # the last turn in which each call to accept found a client
        self._look_again = inf  # when to look for waiting clients, while accepting
        self._last_end = loop.now
        self._set(config, listeners)
        self._acceptor = loop.spawn(self._serve())

    def _set(self, config: ProxyConfig, listeners: Sequence[Listener]) -> None:
        self.config = config
        self.listeners = list(listeners)
        self._rotation = deque(self.listeners)
        hosts = (connection.counts_as(self._access) for connection in self.connections.values())
        present = [host for host in hosts if host is not None]
        self._shared = any(listener.passed is not None for listener in self.listeners)
        self.router.apply(config)
        self.places.apply(config.max_connections, self.listeners)
        self._access.apply(config.allow, config.deny, config.max_connections_per_client, present)
        self._terms = Terms(
            config=config,
            pool=self.router.pool,
            pipes=self.pipes,
            shortage=self.shortage,
            steps=steps(config, self._ways, self._access, self._refusals, self.router),
            guarded=self._access.needed or bool(config.accept_proxy),
            keep_alive=inf in (config.idle_timeout, config.half_close_timeout),
            tag=self.tag,
            log_start=logging.INFO if config.log_start else logging.DEBUG,
            tally=self.tally,
        )

    @property
    def served(self) -> int:
        """How many clients have been accepted so far, without those that may not come."""
        return self.accepted - self._refusals.count

    @property
    def open(self) -> int:
        """How many clients are being served."""
        return len(self.connections)

    @property
    def idle(self) -> float:
        """For how many seconds there has been no connection."""
        return 0.0 if self.connections else self.loop.now - self._last_end

    def pause(self) -> None:
        """Accept nobody, and watch no listener, in this turn of the loop: the listeners are about to be replaced."""
        self._pause()
        self._acceptor.wake()

    def apply(self, config: ProxyConfig, listeners: Sequence[Listener]) -> None:
        """Serve by a new configuration, after `pause` or `stop_accepting`. Open connections keep the one they have."""
        self._set(config, listeners)
        if self._acceptor.done:
            self._acceptor = self.loop.spawn(self._serve())

    def stop_listening(self) -> None:
        """Accept no client any more, and close the listeners. The kernel resets who waits there, not at systemd's."""
        self.stop_accepting()
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        self._rotation.clear()
        self._leaving = True
        if not self.connections:
            self.router.stop()

    # Handover

    def stop_accepting(self) -> None:
        """Accept no client any more. Who comes waits in the backlog, for the next process."""
        self._acceptor.cancel()
        self._pause()
        self.places.close()
        self._refusals.close()

    def hand_over(self) -> dict[str, object]:
        """What `resume` takes, in the next process, and its connections, for `take_over`."""
        self._refusals.close()  # who had yet to say who it is may have been refused since `stop_accepting`
        counts = {"accepted": self.accepted, "refused": self._refusals.count, "last_end": self._last_end}
        return counts | {
            "name": self.config.name,
            "drain_timeout": self.config.drain_timeout,
            "places": self.places.hand_over(),
            **self.router.hand_over(),
            "connections": [hand_over(connection) for connection in self.connections.values()],
        }

    def resume(self, handed: Handed) -> None:
        """Go on with what the proxy of this name knew in the process before, its connections left out."""
        self.accepted += handed.get("accepted", 0)
        self._refusals.count += handed.get("refused", 0)
        self._last_end = handed.get("last_end", self._last_end)
        self.places.resume(handed.get("places", {}))
        self.router.resume(handed)

    def take_over(self, handed: Handed, descriptors: dict[int, int]) -> None:
        """Serve on a connection of the process before. As for `resuming.resume`."""
        connection = resume(self.loop, self._ways, self._terms, self._access, self.router, handed, descriptors)
        connection.task = task = self.loop.spawn(connection.go_on(), self._connection_ended)
        if not task.done:
            self.connections[task] = connection

    async def drain(self, hurry: Callable[[], bool]) -> None:
        """Wait for the open connections to end; abort those still open after `drain_timeout`, or when in a hurry.

        hurry: called whenever the running task is woken.
        """
        task = self.loop.current
        self.watchers.add(task)
        deadline = self.loop.now + self.config.drain_timeout
        task.wake_at(deadline)
        while self.connections and self.loop.now < deadline and not hurry():
            await news()
        for connection in self.connections.values():
            connection.cut("drain-timeout")
        while self.connections:
            await news()
        self.watchers.discard(task)
        self._refusals.close()
        await self.loop.yield_turn()  # to let the acceptor end

    async def _serve(self) -> None:
        while True:
            try:
                if self._accept_ready():
                    await self._wait_for_place()
                else:
                    if not self._accepting or self.loop.now >= self._look_again:
                        self._pause()
                        self._resume()
                    await news()
            except OSError as error:
                self._pause()
                self.pipes.close()
                await self.shortage.wait(error)
            except Exception:
                log.exception("unexpected error while accepting; please report it")
                self._pause()
                await self.loop.sleep(AFTER_ERROR)

    async def _wait_for_place(self) -> None:
        """All places are taken. A client that comes now waits in the backlog, in order."""
        if not self.places.looking:
            self.places.look()
        if self._shared:
            self._pause()  # else the kernel would wake this process for clients that another one has places for
        while len(self.connections) >= self.config.max_connections:
            if any(listener.ready for listener in self.listeners):
                self._pause()  # the client that waits stays ready: epoll would wake this task in each turn
            await news()
        if not self._accepting:
            # Often a client waits at a listener: accept at once, and save asking epoll first.
            for waited_for in self.listeners:
                waited_for.ready = IN

    def _accept_ready(self) -> bool:
        """Accept at each listener where a client waits. Returns whether all places are taken. Raises OSError.

        Usually this accepts one client. If clients waited in the turn before too, it accepts as many as wait, up to a
        bound. So only the end of such a rush costs a call that finds nobody.
        """
        limit, connections, rotation = self.config.max_connections, self.connections, self._rotation
        for _ in self.listeners:
            free = limit - len(connections)
            if free <= 0:
                return True
            # From now on this listener comes last: where places are few, a busy listener does not starve the others.
            listener = rotation[0]
            rotation.rotate(-1)
            if listener.ready:
                # Its events are not edge-triggered: it is ready again in the next turn if another client waits.
                listener.ready = 0
                most = 1
                if free > 1 and (self._rush == self.loop.turn - 1 or not self._accepting):
                    most = min(free, BATCH if listener.passed is None else SHARED_BATCH)
                try:
                    for _ in range(most):
                        self._accept(listener)
                    self._rush = self.loop.turn
                except OSError as error:
                    if error.errno not in CLIENT_GONE:
                        raise
        return len(connections) >= limit

    def _accept(self, listener: Listener) -> None:
        if self.shortage.spare < 0:
            self.shortage.keep_spare()
        sock, address = listener.accept()
        self.accepted += 1
        connection = Connection(self._terms, listener.side(self.loop, sock), address)
        connection.task = task = self.loop.spawn(connection.handle(), self._connection_ended)
        if not task.done:
            self.connections[task] = connection
        if self.watchers:
            self._changed()

    def _connection_ended(self, task: Task) -> None:
        self.connections.pop(task, None)
        if self.shortage.waiting:
            self.shortage.relieve()
        if not self._accepting:
            self._acceptor.wake()
        self._last_end = self.loop.now
        if self._leaving and not self.connections:
            self.router.stop()  # not before: clients may have waited for a backend
        if self.watchers:
            self._changed()

    def _changed(self) -> None:
        for watcher in self.watchers:
            watcher.wake()

    def _newest(self) -> float:
        """When the newest of the served clients was accepted."""
        return next(reversed(self.connections.values())).started

    def cut_backend(self, backend: Backend) -> None:
        """Abort the connections of a backend that has gone down."""
        for connection in self.connections.values():
            if connection.backend is backend:
                connection.cut("backend-down")

    def _pause(self) -> None:
        self._accepting = False
        while self._watched:
            self.loop.unwatch(self._watched.pop())

    def _resume(self) -> None:
        for listener in self.listeners:
            # The kernel looks at once whether a client waits. It puts this process last among those that it may wake.
            self.loop.watch(listener, IN | EXCLUSIVE)
            self._watched.append(listener)
        self._accepting = True
        self._look_again = inf
        if self._shared:
            self._look_again = self.loop.now + LOOK_AGAIN
            self.loop.current.wake_at(self._look_again)
