"""One client: connect to a backend, relay, close, one log line."""

import logging
from collections.abc import Awaitable, Callable
from logging import INFO, WARNING
from math import inf
from typing import NamedTuple

from rspd.balancing.attempts import Attempts, DialError
from rspd.balancing.backend import Backend
from rspd.balancing.pool import Pool
from rspd.engine.cause import OF_CLIENT, UNSERVED, WELL, Cause
from rspd.engine.loop import ERR, IN, OUT, Cancelled, Task
from rspd.engine.pipes import Pipes
from rspd.engine.relay import Relay
from rspd.engine.side import Side
from rspd.log import LOGGER, quote, write
from rspd.net.address import Peer, format_peer, host_of
from rspd.net.connect import why
from rspd.net.descriptors import SHORT, Shortage
from rspd.net.ways import Way
from rspd.protocols.first import Heard
from rspd.routing.answers import Farewell, answer
from rspd.routing.heads import Head
from rspd.serving.access import Access
from rspd.serving.first_bytes import Awaited
from rspd.serving.tally import BATCH, Tally
from rspd.settings import ProxyConfig

UNEXPECTED = "unexpected error, this connection ends; please report it"

log = logging.getLogger(__name__)


# A step runs between accepting and dialling. It may wait. It may look at first bytes, but takes none that are for the
# backend. It raises RefusedError to refuse the client.
Step = Callable[["Connection"], Awaitable[object]]


class Terms(NamedTuple):
    """What the connections of a proxy have in common, from one reload to the next.

    shortage: where a connection waits if epoll has no watch for it.
    steps: what is done before dialling, in order. guarded: whether one of them sets `Connection.counted`.
    keep_alive: whether the kernel is to find out which peers are gone.
    tag: names the proxy in the log, with a space before it, or is empty.
    log_start: the level of the line that the log has for the begin. tally: the proxy's counts.
    """

    config: ProxyConfig
    pool: Pool
    pipes: Pipes
    shortage: Shortage
    steps: tuple[Step, ...]
    guarded: bool
    keep_alive: bool
    tag: str
    log_start: int
    tally: Tally


class RefusedError(Exception):
    """The client is not served; the text says why. cause: None if the log has its line already."""

    def __init__(self, cause: Cause | None, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


class Connection:
    """A client being served. Owns the client's side. Once there is a relay, it closes both sides for the connection.

    began: when a backend was dialled first, or will be: the time of the client's PROXY header does not count.
    header, attempts: what is known of its header, and of its attempts at backends, once there is something to know.
    terms: in force when the client was accepted, or those of its route; a later reload does not change them. A
        connection that was handed over has those of the next process, with the timeouts that its relay began with.
    handovers: how often it went from one process to the next.
    """

    __slots__ = (
        "attempts",
        "backend",
        "began",
        "client",
        "client_address",
        "counted",
        "cut_for",
        "destination",
        "farewell",
        "handovers",
        "head",
        "header",
        "heard",
        "id",
        "peer",
        "relay",
        "route",
        "started",
        "task",
        "terms",
        "way",
    )

    task: Task  # runs `handle`; set by the proxy, which spawned it
    id: str  # no other connection has it, in no process; known once somebody has looked
    cut_for: Cause | None  # set by `cut`, and by `interrupt`
    head: Head  # what the client says first, if it had to be awaited
    heard: Heard  # what that says, once there is a route, or a fault in it
    route: tuple[str, str]  # the name of the route that the client has taken, and its key
    farewell: Farewell  # the answer to a client that gets no backend, once there is one

    def __init__(self, terms: Terms, client: Side, client_address: Peer) -> None:
        self.terms = terms
        self.client = client
        self.client_address = client_address
        self.backend: Backend | None = None
        self.relay: Relay | None = None
        self.started = self.began = client.loop.now
        self.header: Awaited | None = None
        self.attempts: Attempts | None = None
        self.peer: Peer | None = None  # the trusted peer that told the client's address
        self.destination: tuple[str, int] | None = None  # where the client connected to, if the peer told that
        self.way: Way | None = None  # if a backend may be a proxy of this process
        self.counted: tuple[Access, str] | None = None  # where the client counts, and as which host
        self.handovers = 0

    async def handle(self) -> None:
        """Serve the client to its end, whatever happens. After `interrupt`, it goes on where the client was."""
        terms = self.terms
        cause: Cause | None
        try:
            try:
                self.client.watch()
            except OSError as error:
                await self._watch_client(error)
            for step in terms.steps:
                await step(self)
                terms = self.terms
            # A client that says nothing is served too: the backend may be the one to speak first.
            self.backend, side = await terms.pool.dial(self)
            # Most clients have spoken by now. If the relay looks at once, that saves a turn of the loop.
            self.client.ready |= IN
            cause = await self._relay_to(side).run()
        except (DialError, RefusedError) as error:
            await self._refuse(error.cause, str(error))
            return
        except Cancelled:
            cause = self.cut_for
            if not cause:
                return  # it goes on, here or in the next process
        except Exception:
            cause = "error"
            log.exception(UNEXPECTED)
        # Not in a `finally`: a connection that was handed over is not closed when its coroutine is dropped.
        lost = self._close(cause)
        if cause:
            self._log_end(cause, "", lost)

    # Handover

    async def go_on(self) -> None:
        """`handle`, for a connection that `resume` has made."""
        if not self.relay:
            await (self._say_farewell() if hasattr(self, "farewell") else self.handle())
            return
        cause: Cause | None = "error"
        try:
            for side in (self.relay.client, self.relay.backend):
                try:
                    side.watch()
                except OSError as error:
                    await self.terms.shortage.retry(side.watch, error, inf, lambda: False)
            cause = await self.relay.go_on()
        except Cancelled:
            cause = self.cut_for
        except Exception:
            log.exception(UNEXPECTED)
        self._log_end(cause or "error", "", self._close(cause))

    def interrupt(self) -> None:
        """Stop, here and now, what is done for a client that has no relay yet, or do nothing if it has one.

        The client stays open, and has lost nothing but an attempt at a backend. `hand_over` comes next, or `serve_on`.
        """
        if not self.relay:
            self.cut_for = None
            self.task.interrupt()

    def serve_on(self) -> None:
        """Go on in this process, after `interrupt`."""
        if not self.relay:
            client = self.client
            broken = client.ready & ERR
            if client.loop.watches(client):
                client.loop.unwatch(client)
            client.ready = OUT | broken
            self.task.go_on(self.go_on())

    def cut(self, cause: Cause) -> None:
        """End the connection in the next turn of the loop, with this cause in the log."""
        self.cut_for = cause
        self.task.cancel()

    def counts_as(self, access: Access) -> str | None:
        """Have the client count, if it does not yet, and is known. Returns the host that it counts as, or None."""
        if not (self.counted or self.terms.guarded):
            self.counted = access, host_of(self.client_address)
        return self.counted and self.counted[1]

    async def _watch_client(self, error: OSError) -> None:
        """Watch the client as soon as that is possible, after the first attempt failed. Raises DialError, OSError."""
        deadline = self.client.loop.now + self.terms.config.connect_timeout
        try:
            await self.terms.shortage.retry(self.client.watch, error, deadline, lambda: False)
        except OSError as last:
            if last.errno not in SHORT:
                raise
            raise DialError("backend-unreachable", [f"the client cannot be watched: {why(last)}"]) from None

    async def _refuse(self, cause: Cause | None, reason: str) -> None:
        """End a client that gets no backend. If its protocol is known, it gets an answer."""
        text = b""
        if cause and hasattr(self, "heard") and not self.client.aborted:
            text = answer(self.heard[0], self.heard[2], cause, self.terms.config.error_pages)
        if cause and text:
            self.farewell = Farewell(text, cause, reason)
            await self._say_farewell()
            return
        self._close(cause)
        if cause:
            self._log_end(cause, reason, 0)

    async def _say_farewell(self) -> None:
        farewell = self.farewell
        try:
            await farewell.say(self.client)
        except Cancelled:
            if not self.cut_for:
                return  # it goes on, here or in the next process
        except Exception:
            log.exception(UNEXPECTED)
        self._close("client-closed")
        self._log_end(farewell.cause, farewell.reason, 0)

    def _relay_to(self, backend: Side) -> Relay:
        terms, client = self.terms, self.client
        config = terms.config
        relay = Relay(
            client.loop, client, backend, terms.pipes, config.idle_timeout, config.half_close_timeout, config.half_close
        )
        self.relay = relay  # owns the backend's side from here on
        if terms.keep_alive:
            client.keep_alive()
            backend.keep_alive()
        if LOGGER.level <= terms.log_start:
            text, name = "connection opened client=%s%s%s backend=%s", self.backend and self.backend.name
            log.log(terms.log_start, text, format_peer(self.client_address), self.via, terms.tag, name)
        return relay

    def _close(self, cause: Cause | None) -> int:
        """Close what is open. Returns how many bytes were lost by that."""
        lost = 0
        try:
            if self.way:
                self.way.end()
            if self.relay and self.backend:
                try:
                    lost = self.relay.close()
                finally:
                    self.terms.pool.release(self.backend)
            elif cause is None or cause in UNSERVED:
                self.client.abort()
            else:
                self.client.close()
        finally:
            # Whatever happens, the client no longer counts.
            if self.counted:
                access, host = self.counted
                access.leave(host)
        return lost

    @property
    def via(self) -> str:
        """The peer that told the client's address, for the log, with a space before it; empty if none did."""
        return "" if self.peer is None else f" via={format_peer(self.peer)}"

    def waited(self, seconds: float) -> None:
        """The client has waited for a backend: for so long."""
        self.terms.tally.queue_seconds.note(seconds)

    def _log_end(self, cause: Cause, reason: str, lost: int) -> None:
        """Count the end, and log it."""
        relay, tally, now = self.relay, self.terms.tally, self.client.loop.now
        backend = self.backend.name if self.backend else "-"
        seconds = now - self.started
        sent, received = (relay.upload.total, relay.download.total) if relay else (0, 0)
        new = tally.new
        if self in tally.shares:
            new.append(tally.less_share(self, (backend, cause, seconds, sent, received)))
        else:
            new.append((backend, cause, seconds, sent, received))
        if len(new) >= BATCH:
            tally.settle()
        level, more = INFO, ""
        if lost or cause not in WELL:
            if cause not in WELL:
                tally.note_failure(cause, backend, reason, now)
            if lost or (reason and cause not in OF_CLIENT):
                level = WARNING
            more = (f" lost={lost}" if lost else "") + (f" reason={quote(reason)}" if reason else "")
        if level >= LOGGER.level:
            if self.handovers:
                more = f" handovers={self.handovers}{more}"
            write(
                level,
                f"connection closed client={format_peer(self.client_address)}{'' if self.peer is None else self.via}"
                f"{self.terms.tag} backend={backend} sent={sent} received={received} seconds={seconds:.3f} "
                f"cause={cause}{more}",
            )
