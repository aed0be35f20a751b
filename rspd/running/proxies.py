"""The proxies of this process: those that are configured, and those that were taken out and still have connections."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from math import inf

from rspd.balancing.backend import Backend
from rspd.engine.loop import Loop, Task, news
from rspd.engine.pipes import Pipes
from rspd.engine.side import Handed
from rspd.histogram import Counts
from rspd.log import quote
from rspd.net.descriptors import Shortage
from rspd.net.listener import Listener
from rspd.net.ways import Ways
from rspd.routing.pools import PoolMaker, Pools
from rspd.serving.places import who_waits
from rspd.serving.proxy import Proxy
from rspd.serving.tally import Tally
from rspd.settings import Config, ProxyConfig

log = logging.getLogger(__name__)


class Proxies:
    """The proxies of this process.

    configured: those of the configuration in force, by their names, in the order of the configuration.
    pools: those of the whole file. tallies: the counts of all proxies that there have been, by their names.
    """

    def __init__(
        self,
        loop: Loop,
        shortage: Shortage,
        pipes: Pipes,
        pool_maker: PoolMaker,
        ways: Ways,
        watchers: set[Task],
    ) -> None:
        """What all proxies of this process share. watchers: as for `Proxy`."""
        self._loop = loop
        self._ways = ways
        self._watchers = watchers
        self.pools = Pools(partial(pool_maker.make, self._cut_backend, self._changed))  # those of the whole file
        self._maker = partial(Proxy, loop, shortage, pipes, pool_maker, ways, watchers, self.pools.by_name)
        self.configured: dict[str, Proxy] = {}
        self._retired: list[Proxy] = []  # taken out, with connections that are still open
        self.tallies: dict[str, Tally] = {}
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
        backends = (backend.address for pool in config.every_pool for backend in pool.backends)
        named = {name for wanted in config.proxies for name in wanted.shared_pools}
        self._ways.listen(listeners, backends)
        self.pools.apply({name: (pool, f" pool={name}") for name, pool in config.pools if name in named})
        for wanted in config.proxies:
            own = listeners[wanted.name]
            proxy = old.pop(wanted.name, None)
            if proxy:
                proxy.apply(wanted, own)
            else:
                proxy = self._make(wanted, own)
            self.configured[wanted.name] = proxy
            proxy.tally.go_by(partial(_names, proxy))
            for listener in own:
                if listener not in before:
                    passed = "" if listener.passed is None else f" socket={quote(listener.passed)}"
                    log.info("listening address=%s%s%s", listener.name, proxy.tag, passed)
        for proxy in old.values():
            proxy.listeners.clear()  # other proxies have them now, or they are closed
            proxy.stop_listening()
            proxy.tally.go_by(tuple)
            self._retired.append(proxy)
            log.info("proxy taken out%s connections=%d", proxy.tag, proxy.open)

    def _make(self, config: ProxyConfig, listeners: Sequence[Listener]) -> Proxy:
        return self._maker(self.tallies.setdefault(config.name, Tally()), config, listeners)

    def everyone(self) -> list[Proxy]:
        """All proxies, also those that were taken out and still have connections."""
        for proxy in self._retired:
            if not proxy.open:
                self._served_before += proxy.served
                self.tallies[proxy.config.name].accepted += proxy.accepted
                self._last_end = max(self._last_end, self._loop.now - proxy.idle)
        self._retired = [proxy for proxy in self._retired if proxy.open]
        return [*self.configured.values(), *self._retired]

    def accepted(self, name: str) -> int:
        """How many clients the proxies of this name have accepted so far, those included that are gone."""
        own = [self.configured[name]] if name in self.configured else []
        there = own + [proxy for proxy in self._retired if proxy.config.name == name]
        return self.tallies[name].accepted + sum(proxy.accepted for proxy in there)

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process, with all connections."""
        everyone = self.everyone()
        parts = [proxy.hand_over() | {"retired": proxy in self._retired} for proxy in everyone]
        tallies = [(name, tally.hand_over()) for name, tally in self.tallies.items()]
        return {"served_before": self._served_before, "proxies": parts, "tallies": tallies, **self.pools.hand_over()}

    def resume(self, handed: Handed, before: Callable[[], Config | None]) -> list[tuple[Proxy, Handed]]:
        """Go on with what the process before knew. Returns its connections, each with the proxy that is to take it.

        Where that proxy is not configured any more, it is one that was taken out. Call `resumed` at the end.
        before: returns the configuration of the process before.
        """
        before_all = Counts(handed, "the process")
        self._served_before += before_all.one("served_before", int, 0)
        _try(self.pools.resume, handed)
        for name, known in before_all.table("tallies", str, object):
            self.tallies.setdefault(name, Tally()).resume(known, name)
        found = []
        refused: Counter[str] = Counter()
        for known in handed.get("proxies", ()):
            name, connections = known.get("name", ""), known.get("connections", ())
            counts = Counts(known, "a proxy")
            known["accepted"], known["refused"] = (counts.one(key, int, 0) for key in ("accepted", "refused"))
            known["last_end"] = counts.one("last_end", float, self._loop.now)
            refused[name] += known["refused"]
            if name in self.configured and not known.get("retired"):
                proxy = self.configured[name]
            elif connections:
                proxy = self._make(_taken_out(known, before, self.pools.by_name), ())
                self._retired.append(proxy)
            else:
                self._served_before += known["accepted"] - known["refused"]
                self.tallies.setdefault(name, Tally()).accepted += known["accepted"]
                continue
            _try(proxy.resume, known)
            found += [(proxy, connection) for connection in connections]
        for name, number in refused.items():
            self.tallies.setdefault(name, Tally()).refused_at_least(number)
        return found

    def resumed(self) -> None:
        """All connections have been taken over, in whatever order."""
        for proxy in [*self.configured.values(), *self._retired]:
            in_order = sorted(proxy.connections.items(), key=lambda entry: entry[1].started)
            proxy.connections.clear()
            proxy.connections.update(in_order)
        for proxy in self._retired:
            proxy.stop_listening()

    def stop_listening(self) -> str:
        """Accept nobody any more. Returns how many clients the kernel resets, for people; empty for none.

        Clients at a socket of systemd wait on, for the next process.
        """
        self._ways.listen({}, ())
        everyone = self.everyone()
        waiting = who_waits(one for proxy in everyone for one in proxy.listeners if one.passed is None)
        for proxy in everyone:
            proxy.stop_listening()
        return waiting

    async def drain(self, hurry: Callable[[], bool]) -> None:
        """Wait for the open connections to end, at most for `drain_timeout`, or until in a hurry.

        hurry: called whenever the running task is woken.
        """
        task, spawn = self._loop.current, self._loop.spawn
        drains = [spawn(proxy.drain(hurry), lambda _: task.wake()) for proxy in self.everyone()]
        while not all(drain.done for drain in drains):
            for drain in drains:
                drain.wake()  # what hurries concerns all proxies
            await news()

    def _cut_backend(self, backend: Backend) -> None:
        for proxy in self.everyone():
            proxy.cut_backend(backend)

    def _changed(self) -> None:
        for watcher in self._watchers:
            watcher.wake()

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


def _names(proxy: Proxy) -> list[str]:
    return [backend.name for backend in proxy.router.backends]


def _try(resume: Callable[[Handed], object], handed: Handed) -> None:
    """Go on with what does not decide whether a connection goes on."""
    try:
        resume(handed)
    except Exception:
        log.exception("what the process before knew cannot be read, its connections go on; please report it")


def _taken_out(known: Handed, before: Callable[[], Config | None], pools: Container[str]) -> ProxyConfig:
    """The configuration of a proxy that the process before knew, and that is not configured here.

    pools: the names of those of the whole file, as it is here. Others that its routes lead to become its own.
    """
    drain_timeout = known.get("drain_timeout", inf)
    if any("relay" not in connection for connection in known["connections"]) and (config := before()):
        # A client waits for one of its backends.
        for proxy in config.proxies if not known.get("retired") else ():
            if proxy.name == known.get("name", ""):
                shared = proxy.shared_pools
                gone = [one for one in config.pools if one.name in shared and one.name not in pools]
                return proxy._replace(listen=(), drain_timeout=drain_timeout, pools=(*gone, *proxy.pools))
    return ProxyConfig((), (), known.get("name", ""), drain_timeout=drain_timeout)
