"""Pools, as they are made."""

from __future__ import annotations

from collections.abc import Callable

from rspd.balancing.backend import Backend
from rspd.balancing.pool import Pool
from rspd.engine.loop import Loop
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
