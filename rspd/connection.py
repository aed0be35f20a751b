"""One client: connect to a backend, relay, close, one log line."""

from __future__ import annotations

import logging
from math import inf

from rspd.address import format_socket_address
from rspd.backends import Backend, Backends, DialError
from rspd.cause import Cause
from rspd.config import ProxyConfig
from rspd.log import quote, write
from rspd.loop import Cancelled, Loop
from rspd.pipes import Pipes
from rspd.relay import Relay
from rspd.side import Side

log = logging.getLogger(__name__)


class Connection:
    """A client being served. Owns the client's side and, once dialled, the backend's.

    config: in force when the client was accepted; a later reload does not change it.
    """

    __slots__ = ("backend", "backends", "client", "client_address", "config", "loop", "pipes", "relay", "started")

    def __init__(
        self, loop: Loop, config: ProxyConfig, backends: Backends, pipes: Pipes, client: Side, client_address: object
    ) -> None:
        self.loop = loop
        self.config = config
        self.backends = backends
        self.pipes = pipes
        self.client = client
        self.client_address = client_address
        self.backend: Backend | None = None
        self.relay: Relay | None = None
        self.started = loop.now

    async def handle(self) -> None:
        """Serve the client to its end, whatever happens."""
        cause: Cause = "error"
        reason = ""
        try:
            self.client.watch()
            # A client that says nothing is served too: the backend may be the one to speak first.
            self.backend, side = await self.backends.dial(self.client, self.config.connect_timeout)
            self.relay = self._open(side)
            cause = await self.relay.run()
        except DialError as error:
            cause, reason = error.cause, str(error)
        except Cancelled:
            cause = "drain-timeout"
        except Exception:
            log.exception("unexpected error, this connection ends; please report it")
        finally:
            self._close()
            self._log_end(cause, reason)

    def _open(self, backend: Side) -> Relay:
        config = self.config
        if inf in (config.idle_timeout, config.half_close_timeout):
            # Nothing else would ever find out that a peer is gone.
            self.client.keep_alive()
            backend.keep_alive()
        if log.isEnabledFor(logging.DEBUG):
            client, name = format_socket_address(self.client_address), self.backend and self.backend.name
            log.debug("connection opened client=%s backend=%s", client, name)
        return Relay(self.loop, self.client, backend, self.pipes, config.idle_timeout, config.half_close_timeout)

    def _close(self) -> None:
        if self.relay:
            self.relay.close()
        else:
            self.client.close()

    def _log_end(self, cause: Cause, reason: str) -> None:
        level = logging.WARNING if reason and cause != "client-aborted" else logging.INFO
        if log.isEnabledFor(level):
            sent, received = (self.relay.upload.total, self.relay.download.total) if self.relay else (0, 0)
            write(
                level,
                f"connection closed client={format_socket_address(self.client_address)} "
                f"backend={self.backend.name if self.backend else '-'} sent={sent} received={received} "
                f"seconds={self.loop.now - self.started:.3f} cause={cause}"
                + (f" reason={quote(reason)}" if reason else ""),
            )
