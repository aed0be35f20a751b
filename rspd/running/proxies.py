"""The proxies of this process: those that are configured, and those that were taken out and still have connections."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from math import inf

from rspd.engine.loop import Loop
from rspd.engine.side import Handed
from rspd.log import quote
from rspd.net.listener import Listener
from rspd.net.ways import Ways
from rspd.serving.proxy import Proxy
from rspd.settings import Config, ProxyConfig

log = logging.getLogger(__name__)


class Proxies:
    """The proxies of this process.

    configured: those of the configuration in force, by their names, in the order of the configuration.
    """

    def __init__(self, loop: Loop, ways: Ways, make: Callable[[ProxyConfig, Sequence[Listener]], Proxy]) -> None:
        """make: makes a proxy, with what all proxies of this process share."""
        self._loop = loop
        self._ways = ways
        self._make = make
        self.configured: dict[str, Proxy] = {}
        self._retired: list[Proxy] = []  # taken out, with connections that are still open
        self._served_before = 0  # clients served by proxies that are gone
        self._last_end = -inf  # when the last connection of these proxies ended

    @property
    def listeners(self) -> list[Listener]:
        """The listeners of all proxies that are configured."""
        return [listener for proxy in self.configured.values() for listener in proxy.listeners]

    def apply(self, config: Config, listeners: Mapping[str, list[Listener]]) -> None:
        """Serve by a configuration from now on. The caller has paused the proxies.

        listeners: of each proxy, by its name; the proxies own them from now on.
        """
        before = self.listeners
        old, self.configured = self.configured, {}
        backends = (backend.address for wanted in config.proxies for backend in wanted.backends)
        self._ways.listen(listeners, backends)
        for wanted in config.proxies:
            own = listeners[wanted.name]
            proxy = old.pop(wanted.name, None)
            if proxy:
                proxy.apply(wanted, own)
            else:
                proxy = self._make(wanted, own)
            self.configured[wanted.name] = proxy
            for listener in own:
                if listener not in before:
                    passed = "" if listener.passed is None else f" socket={quote(listener.passed)}"
                    log.info("listening address=%s%s%s", listener.name, proxy.tag, passed)
        for proxy in old.values():
            proxy.listeners.clear()  # other proxies have them now, or they are closed
            proxy.stop_listening()
            self._retired.append(proxy)
            log.info("proxy taken out%s connections=%d", proxy.tag, proxy.open)

    def everyone(self) -> list[Proxy]:
        """All proxies, also those that were taken out and still have connections."""
        for proxy in self._retired:
            if not proxy.open:
                self._served_before += proxy.served
                self._last_end = max(self._last_end, self._loop.now - proxy.idle)
        self._retired = [proxy for proxy in self._retired if proxy.open]
        return [*self.configured.values(), *self._retired]

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process, with all connections."""
        everyone = self.everyone()
        parts = [proxy.hand_over() | {"retired": proxy in self._retired} for proxy in everyone]
        return {"served_before": self._served_before, "proxies": parts}

    def resume(self, handed: Handed) -> list[tuple[Proxy, Handed]]:
        """Go on with what the process before knew. Returns its connections, each with the proxy that is to take it.

        Where that proxy is not configured any more, it is one that was taken out. Call `resumed` at the end.
        """
        self._served_before += handed.get("served_before", 0)
        found = []
        for known in handed.get("proxies", ()):
            name, connections = known.get("name", ""), known.get("connections", ())
            if name in self.configured and not known.get("retired"):
                proxy = self.configured[name]
            elif connections:
                proxy = self._make(ProxyConfig((), (), name, drain_timeout=known.get("drain_timeout", inf)), ())
                self._retired.append(proxy)
            else:
                self._served_before += known.get("accepted", 0) - known.get("refused", 0)
                continue
            proxy.resume(known)
            found += [(proxy, connection) for connection in connections]
        return found

    def resumed(self) -> None:
        """All connections have been taken over, in whatever order."""
        for proxy in [*self.configured.values(), *self._retired]:
            in_order = sorted(proxy.connections.items(), key=lambda entry: entry[1].started)
            proxy.connections.clear()
            proxy.connections.update(in_order)
        for proxy in self._retired:
            proxy.stop_listening()

    @property
    def open(self) -> int:
        """How many clients are being served."""
        return sum(proxy.open for proxy in self.everyone())

    @property
    def served(self) -> int:
        """How many clients have been accepted so far, and not refused."""
        proxies = self.everyone()
        return self._served_before + sum(proxy.served for proxy in proxies)

    @property
    def idle(self) -> float:
        """For how many seconds there has been no connection."""
        idle = min(proxy.idle for proxy in self.everyone())
        return min(idle, self._loop.now - self._last_end)
