"""One client: connect to a backend, relay, close, one log line."""

from __future__ import annotations

import logging
from typing import NamedTuple

from rspd.balancing.backend import Backend
from rspd.balancing.pool import DialError, Pool
from rspd.engine.cause import Cause
from rspd.engine.loop import Cancelled, Loop, Task
from rspd.engine.pipes import Pipes
from rspd.engine.relay import Relay
from rspd.engine.side import Side
from rspd.log import LOGGER, quote, write
from rspd.net.address import Peer, format_peer, host_of, place_of
from rspd.net.connect import why
from rspd.net.descriptors import SHORT, Shortage
from rspd.net.networks import Networks
from rspd.net.ways import Way, Ways, came_back
from rspd.protocols.proxy_protocol import HeaderError, HostPort, NoHeaderError, encode
from rspd.serving.access import Access, Refusals
from rspd.serving.first_bytes import take_header
from rspd.settings import ProxyConfig

log = logging.getLogger(__name__)


class Terms(NamedTuple):
    """What the connections of a proxy have in common, from one reload to the next.

    shortage: where a connection waits if epoll has no watch for it.
    keep_alive: whether the kernel is to find out which peers are gone.
    guarded: whether anything is asked of a client before it is served.
    ways: None if no backend can be a proxy of this process.
    trusted: the peers that rspd believes when they name the client (accept_proxy).
    tag: names the proxy in the log, with a space before it, or is empty.
    """

    loop: Loop
    config: ProxyConfig
    pool: Pool
    pipes: Pipes
    shortage: Shortage
    keep_alive: bool
    guarded: bool
    ways: Ways | None
    trusted: Networks
    access: Access
    refusals: Refusals
    tag: str = ""


# A client without a backend gets RST for these causes: it was refused, sent no good PROXY header, or is rspd itself.
UNSERVED = frozenset({None, "loop", "bad-header", "header-timeout"})


class RefusedError(Exception):
    """The client is not served; the text says why. The cause is None if the log has its line already."""

    def __init__(self, cause: Cause | None, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


class Connection:
    """A client being served. Owns the client's side and, once dialled, the backend's.

    terms: in force when the client was accepted; a later reload does not change them.
    """

    __slots__ = (
        "admitted",
        "backend",
        "client",
        "client_address",
        "cut_for",
        "destination",
        "peer",
        "relay",
        "started",
        "task",
        "terms",
        "way",
    )

    task: Task  # runs `handle`; set by the proxy, which spawned it
    cut_for: Cause  # set by `cut`

    def __init__(self, terms: Terms, client: Side, client_address: Peer) -> None:
        self.terms = terms
        self.client = client
        self.client_address = client_address
        self.backend: Backend | None = None
        self.relay: Relay | None = None
        self.started = terms.loop.now
        self.peer: Peer | None = None  # the peer that told the client's address, if one did
        self.destination: HostPort | None = None  # where the client connected to, if the peer told that too
        self.way: Way | None = None  # if a backend may be a proxy of this process
        self.admitted: str | None = None  # the host that the client counts as

    async def handle(self) -> None:
        """Serve the client to its end, whatever happens."""
        terms = self.terms
        cause: Cause | None = "error"
        reason = ""
        try:
            try:
                self.client.watch()
            except OSError as error:
                await self._watch_client(error)
            if terms.ways:
                self.way = self._find_way(terms.ways)
            if terms.guarded:
                await self._admit()
            # A client that says nothing is served too: the backend may be the one to speak first.
            self.backend, side = await terms.pool.dial(self.client, self.client_address, self.way)
            cause = await self._open(side).run()
        except (DialError, RefusedError) as error:
            cause, reason = error.cause, str(error)
        except Cancelled:
            cause = self.cut_for
        except Exception:
            log.exception("unexpected error, this connection ends; please report it")
        finally:
            lost = self._close(cause)
            if cause:
                self._log_end(cause, reason, lost)

    def cut(self, cause: Cause) -> None:
        """End the connection here and now, and say why in the log."""
        self.cut_for = cause
        self.task.cancel()

    def counts_as(self) -> str | None:
        """The host that the client counts as for max_connections_per_client; None while that is not known."""
        if self.admitted is None and not self.terms.guarded:
            self.admitted = host_of(self.client_address)
        return self.admitted

    async def _watch_client(self, error: OSError) -> None:
        """Watch the client as soon as that is possible, after the first attempt failed. Raises DialError."""
        terms = self.terms
        deadline = terms.loop.now + terms.config.connect_timeout
        try:
            await terms.shortage.retry(self.client.watch, error, deadline, lambda: False)
        except OSError as last:
            if last.errno not in SHORT:
                raise
            raise DialError("backend-unreachable", [f"the client cannot be watched: {why(last)}"]) from None

    def _find_way(self, ways: Ways) -> Way:
        """The proxies of this process that the client has passed. Raises RefusedError if this proxy is one of them."""
        name = self.terms.config.name
        near = place_of(self.client_address)
        if not ways.knows(near):
            return Way(ways, (name,))
        passed = ways.take(near, ways.place(self.client.sock.getsockname()))
        if passed is None:
            log.debug("client has gone client=%s%s", format_peer(self.client_address), self.terms.tag)
            raise RefusedError(None, "")  # the client was rspd; the log has a line for rspd's own client
        if passed and isinstance(near, str):
            self.client_address = ""  # `connect` made its name only for this
        if name in passed:
            raise RefusedError("loop", came_back((*passed, name)))
        return Way(ways, (*passed, name))

    async def _admit(self) -> None:
        """Find out who the client is, and whether it may come. Raises RefusedError."""
        terms = self.terms
        host = host_of(self.client_address)
        if terms.trusted.find(host):
            try:
                deadline = terms.loop.now + terms.config.accept_proxy_timeout
                header = await take_header(terms.loop, self.client, deadline)
            except NoHeaderError:
                raise RefusedError("client-closed", "") from None  # somebody only looked whether the port is open
            except HeaderError as error:
                raise RefusedError("bad-header", str(error)) from None
            except TimeoutError as error:
                raise RefusedError("header-timeout", str(error)) from None
            except ConnectionAbortedError as error:
                raise RefusedError("client-aborted", str(error.strerror)) from None
            self.destination = header.destination
            if header.source:
                self.peer, self.client_address = self.client_address, header.source
                host = header.source[0]
        if reason := terms.access.admit(host):
            terms.refusals.note(format_peer(self.client_address) + self._via(), reason)
            raise RefusedError(None, reason)
        self.admitted = host

    def _open(self, backend: Side) -> Relay:
        terms = self.terms
        config = terms.config
        relay = Relay(terms.loop, self.client, backend, terms.pipes, config.idle_timeout, config.half_close_timeout)
        self.relay = relay  # owns the backend's side from here on
        if terms.keep_alive:
            # Nothing else would ever find out that a peer is gone.
            self.client.keep_alive()
            backend.keep_alive()
        if config.send_proxy:
            relay.upload.put_first(self._header())
        if LOGGER.level <= logging.DEBUG:
            client, name = format_peer(self.client_address), self.backend and self.backend.name
            log.debug("connection opened client=%s%s backend=%s", client, terms.tag, name)
        return relay

    def _header(self) -> bytes:
        """The PROXY header that tells the backend who the client is."""
        source = self.client_address
        destination = self.destination or self.client.sock.getsockname()
        if isinstance(source, tuple) and isinstance(destination, tuple):
            return encode(self.terms.config.send_proxy, source[:2], destination[:2])
        return encode(self.terms.config.send_proxy, None, None)

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
            elif cause in UNSERVED:
                self.client.abort()
            else:
                self.client.close()
        finally:
            # Whatever happens, the client no longer counts.
            if self.admitted is not None:
                self.terms.access.leave(self.admitted)
        return lost

    def _via(self) -> str:
        return "" if self.peer is None else f" via={format_peer(self.peer)}"

    def _log_end(self, cause: Cause, reason: str, lost: int) -> None:
        level = logging.WARNING if lost or (reason and cause != "client-aborted") else logging.INFO
        if level >= LOGGER.level:
            sent, received = (self.relay.upload.total, self.relay.download.total) if self.relay else (0, 0)
            sent = sent if sent > 0 else 0  # below 0 as long as the backend has not got the header
            via = "" if self.peer is None else self._via()
            write(
                level,
                f"connection closed client={format_peer(self.client_address)}{via}{self.terms.tag} "
                f"backend={self.backend.name if self.backend else '-'} sent={sent} received={received} "
                f"seconds={self.terms.loop.now - self.started:.3f} cause={cause}"
                + (f" lost={lost}" if lost else "")
                + (f" reason={quote(reason)}" if reason else ""),
            )
