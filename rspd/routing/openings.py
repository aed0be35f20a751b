"""Openings of a pool: what rspd says to a backend before the relay begins."""

from __future__ import annotations

from rspd.balancing.attempts import Caller
from rspd.balancing.pool import Opening
from rspd.engine.side import Side
from rspd.net.connect import send_all
from rspd.protocols.proxy_protocol import encode
from rspd.settings import ProxyConfig


def openings(config: ProxyConfig) -> tuple[Opening, ...]:
    """The openings that a configuration needs, in the order in which they are said; none for plain TCP."""
    return (ProxyHeader(config.send_proxy),) if config.send_proxy else ()


class ProxyHeader(Opening):
    """The PROXY header that tells the backend who the client is."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.preface = encode(version, None, None)

    async def open(self, backend: Side, caller: Caller, deadline: float) -> None:
        """Send it. If the backend aborts, this is no error: the relay passes on what the backend has said.

        Raises TimeoutError at the deadline, ConnectionAbortedError if the client has gone.
        """
        source, destination = caller.client_address, caller.destination or caller.client.sock.getsockname()
        header = self.preface
        if isinstance(source, tuple) and isinstance(destination, tuple):
            header = encode(self._version, source[:2], destination[:2])
        late = "the PROXY header was not taken within the connect timeout"
        await send_all(backend, header, deadline, late, caller.client)
