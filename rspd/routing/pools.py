"""Pools by name: those of the routes of a proxy, or those that all proxies share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rspd.balancing.backend import Backend
from rspd.balancing.pool import Pool
from rspd.engine.loop import Loop
from rspd.engine.side import Handed
from rspd.net.descriptors import Shortage
from rspd.net.resolver import Resolver
from rspd.net.ways import Ways
from rspd.routing.openings import openings
from rspd.settings import ProxyConfig


class PoolMaker:
    """Makes pools, with what all pools of this process share."""

    def __init__(self, loop: Loop, shortage: Shortage, resolver: Resolver, ways: Ways) -> None:
        self._shared = (loop, shortage, resolver, ways)

    def make(
        self, on_down: Callable[[Backend], object], on_change: Callable[[], object], config: ProxyConfig, tag: str
    ) -> Pool:
        """A pool that goes by a configuration; the rest as for `Pool`."""
        return Pool(*self._shared, config, openings(config), on_down, on_change, tag)


class Pools:
    """Pools by name.

    make: makes one that goes by a configuration, with what names it in the log.
    by_name: those that are configured.
    """

    def __init__(self, make: Callable[[ProxyConfig, str], Pool]) -> None:
        self._make = make
        self.by_name: dict[str, Pool] = {}

    def apply(self, wanted: Mapping[str, tuple[ProxyConfig, str]]) -> None:
        """Have these pools, each with its tag for the log. Those that stay keep what they know of their backends."""
        for name in self.by_name.keys() - wanted.keys():
            # Clients that wait for one of its backends may still get it.
            self.by_name.pop(name).stop()
        for name, (config, tag) in wanted.items():
            if name in self.by_name:
                self.by_name[name].apply(config, openings(config))
            else:
                self.by_name[name] = self._make(config, tag)

    def rename(self, old: str, new: str) -> None:
        """Call a pool by another name, which no other has."""
        self.by_name[new] = self.by_name.pop(old)

    def stop(self) -> None:
        """End all health checks and lookups. Connections go on."""
        for pool in self.by_name.values():
            pool.stop()

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process; no name is a key. The pool without a name is left out."""
        return {"pools": [(name, pool.members.hand_over()) for name, pool in self.by_name.items() if name]}

    def resume(self, handed: Handed) -> None:
        """Go on with what the pools of these names knew in the process before.

        A pool whose name is new goes on with what others knew of its backends.
        """
        pools = dict(handed.get("pools", ()))
        for name, pool in self.by_name.items():
            for known in [pools[name]] if name in pools else pools.values():
                pool.members.resume(known, name in pools)
