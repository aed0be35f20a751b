"""Accepting clients, no more at once than allowed, and draining."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf

from rspd.address import Address, SocketAddress
from rspd.backends import Backends
from rspd.config import ProxyConfig
from rspd.connection import Connection
from rspd.listener import CLIENT_GONE, Listener, replace_listeners
from rspd.loop import EXCLUSIVE, IN, Loop, Task, news
from rspd.pipes import Pipes
from rspd.resolver import Resolver
from rspd.shortage import Shortage
from rspd.side import Side

# Seconds without accepting after an error that nobody expected.
AFTER_ERROR = 1.0

# Seconds between two looks at who waits at a listener that other processes share. The kernel wakes one of them for a
# client (EPOLLEXCLUSIVE, epoll_ctl(2)); if that one ends, or has no descriptor left, the others have not heard of it.
LOOK_AGAIN = 1.0

log = logging.getLogger(__name__)


class Proxy:
    """A proxy at work. Owns its listeners, its connections and its pipes.

    served: how many clients have been accepted so far.
    watchers: tasks to wake whenever a connection begins or ends.
    """

    def __init__(self, loop: Loop, config: ProxyConfig, listeners: Sequence[Listener], pipes: int) -> None:
        self.loop = loop
        self.config = config
        self.listeners = list(listeners)
        self.served = 0
        self.resolver = Resolver(loop)
        self.shortage = Shortage(loop)
        self.pipes = Pipes(pipes)
        self.backends = Backends(loop, [backend.address for backend in config.backends], self.resolver, self.shortage)
        self._connections: set[Task] = set()
        self._accepting = False
        self._watched: list[Listener] = []
        self._look_again = inf  # when to, while accepting
        self._rotation = deque(self.listeners)
        self.watchers: set[Task] = set()
        self._last_end = loop.now
        self.shortage.keep_spare()
        self._acceptor = loop.spawn(self._serve())

    @property
    def open(self) -> int:
        """How many clients are being served."""
        return len(self._connections)

    @property
    def idle(self) -> float:
        """For how many seconds there has been no connection."""
        return 0.0 if self._connections else self.loop.now - self._last_end

    def apply(self, config: ProxyConfig, listen: Mapping[Address, Sequence[SocketAddress]], pipes: int) -> None:
        """Serve by a new configuration from now on. Open connections go on by the one they began with.

        listen: what the addresses to listen on stand for; new ones are opened, those not among them closed.
        pipes: how many there may be.
        Raises ListenError, with nothing changed.
        """
        self._pause()
        self._acceptor.wake()
        self.listeners = replace_listeners(self.listeners, listen, config.backlog, config.reuse_port)
        self._rotation = deque(self.listeners)
        if config.backends != self.config.backends:
            addresses = [backend.address for backend in config.backends]
            self.backends = Backends(self.loop, addresses, self.resolver, self.shortage)
        self.config = config
        self.pipes.resize(pipes)

    def stop_listening(self) -> None:
        """Accept nobody any more. Who waits in the backlog is reset by the kernel, or waits on for systemd's next."""
        self._acceptor.cancel()
        self._pause()
        for listener in self.listeners:
            listener.close()
        self.listeners.clear()
        self._rotation.clear()

    async def drain(self, hurry: Callable[[], bool]) -> None:
        """Wait for the open connections to end; abort those still open after `drain_timeout`, or when in a hurry.

        hurry: looked at whenever the running task is woken.
        """
        task = self.loop.current
        self.watchers.add(task)
        deadline = self.loop.now + self.config.drain_timeout
        task.wake_at(deadline)
        while self._connections and self.loop.now < deadline and not hurry():
            await news()
        for connection in self._connections:
            connection.cancel()
        while self._connections:
            await news()
        await self.loop.yield_turn()  # to let the acceptor end
        self.pipes.close()
        self.shortage.give_up_spare()

    async def _serve(self) -> None:
        while True:
            if len(self._connections) >= self.config.max_connections:
                # Who comes now waits in the backlog, in order.
                self._pause()
                await news()
                # Often somebody does: then accepting saves asking epoll first.
                for waited_for in self.listeners:
                    waited_for.ready = IN
                continue
            try:
                if listener := self._next_ready():
                    self._accept(listener)
                elif self._accepting and self.loop.now < self._look_again:
                    await news()
                else:
                    self._pause()
                    self._resume()
            except OSError as error:
                if error.errno not in CLIENT_GONE:
                    self._pause()
                    self.pipes.close()
                    await self.shortage.wait(error)
            except Exception:
                log.exception("unexpected error while accepting; please report it")
                self._pause()
                await self.loop.sleep(AFTER_ERROR)

    def _accept(self, listener: Listener) -> None:
        # Its events are not edge-triggered: it is ready again at once if another client waits.
        listener.ready = 0
        if self.shortage.spare < 0:
            self.shortage.keep_spare()
        sock, address = listener.accept()
        self.served += 1
        connection = Connection(self.loop, self.config, self.backends, self.pipes, Side(self.loop, sock), address)
        task = self.loop.spawn(connection.handle(), self._connection_ended)
        if not task.done:
            self._connections.add(task)
        for watcher in self.watchers:
            watcher.wake()

    def _connection_ended(self, task: Task) -> None:
        self._connections.discard(task)
        self.shortage.relieve()
        if not self._accepting:
            self._acceptor.wake()
        self._last_end = self.loop.now
        for watcher in self.watchers:
            watcher.wake()

    def _next_ready(self) -> Listener | None:
        """A listener with a client waiting; asked last from then on, so that a busy one does not starve the others."""
        for listener in self._rotation:
            if listener.ready:
                self._rotation.remove(listener)
                self._rotation.append(listener)
                return listener
        return None

    def _pause(self) -> None:
        self._accepting = False
        while self._watched:
            self.loop.unwatch(self._watched.pop())

    def _resume(self) -> None:
        for listener in self.listeners:
            # epoll looks at once who waits, and goes to the end of the line of those that it may wake.
            self.loop.watch(listener, IN | EXCLUSIVE)
            self._watched.append(listener)
        self._accepting = True
        self._look_again = inf
        if any(listener.passed is not None for listener in self.listeners):
            self._look_again = self.loop.now + LOOK_AGAIN
            self.loop.current.wake_at(self._look_again)
