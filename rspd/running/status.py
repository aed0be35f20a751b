"""What systemd hears of this process: what it is doing, that it is alive, that it reloads, and that it ends."""

from __future__ import annotations

from math import inf

from rspd.balancing.wording import describe
from rspd.engine.loop import Loop, Task, news
from rspd.host.systemd import Notifier
from rspd.running.proxies import Proxies
from rspd.serving.proxy import Proxy

# Seconds between two status lines for systemd while something changes.
INTERVAL = 1.0

# How many routes of a proxy the status names: those with the most clients.
ROUTES_MAX = 5

# Seconds for which the status says what was taken over.
MINUTE = 60.0

# Seconds that rspd asks systemd to wait for the end; it asks again each INTERVAL. If drain_timeout is off, the unit's
# TimeoutStopSec= counts.
STOP_EXTENSION = 30.0


class Reporter:
    """Tells systemd what this process is doing."""

    def __init__(self, loop: Loop, proxies: Proxies, watchers: set[Task], notifier: Notifier) -> None:
        """watchers: as for `Proxy`."""
        self._loop = loop
        self._proxies = proxies
        self._watchers = watchers
        self._notifier = notifier
        self._task: Task | None = None
        self._failure = ""
        self._taken = ""
        self._told_until = 0.0
        self._ending = False

    def took_over(self, count: int) -> None:
        """So many connections of the process before go on; said for a minute."""
        self._taken = f"; took over {count:,} connection{'' if count == 1 else 's'}"
        self._told_until = self._loop.now + MINUTE

    def ready(self, failure: str = "") -> None:
        """The process is at work, for the first time or after a reload. failure: what failed, and why."""
        self._failure = failure
        self._notifier.ready(self._status())
        if not self._notifier.active:
            return
        if self._task:
            self._task.wake()  # it sends again what systemd had no room for
        else:
            self._task = self._loop.spawn(self._keep_informed())

    def reloading(self) -> None:
        """A reload begins: what the last one said is over. Call `ready` at its end."""
        self._failure = ""
        self._notifier.reloading()

    def ending(self) -> None:
        """The process ends. To be called when draining begins, and again when it is over."""
        self._ending = True
        self._tell_ending()
        if self._task:
            self._task.wake()

    def _tell_ending(self) -> None:
        bounded = all(proxy.config.drain_timeout != inf for proxy in self._proxies.everyone())
        self._notifier.stopping(self._status(), STOP_EXTENSION if bounded else 0)

    async def _keep_informed(self) -> None:
        """Tell systemd what changes, at most once in INTERVAL, and that the loop is alive."""
        loop, notifier, task = self._loop, self._notifier, self._loop.current
        while True:
            self._watchers.discard(task)
            await loop.sleep(min(INTERVAL, notifier.interval))
            if self._ending:
                self._tell_ending()
                continue
            notifier.alive(self._status())
            self._watchers.add(task)
            if not notifier.pending:
                task.wake_at(loop.now + notifier.interval - INTERVAL)
                await news()

    def _status(self) -> str:
        """What the process is doing, for people."""
        failure = f"; {self._failure}" if self._failure else ""
        if self._loop.now < self._told_until:
            failure = self._taken + failure
        served = f"{self._proxies.served} served"
        proxies = list(self._proxies.configured.values())
        if self._ending or len(proxies) == 1:
            doing = _doing(proxies[0])
            if self._ending:
                count = self._proxies.open
                doing = f"ending, {count} open" if count else "ended"
            backends = f", {_backends(proxies[0])}" if len(proxies) == 1 else ""
            return f"{doing}, {served}{backends}{failure}"
        each = (f"{proxy.config.name} {_doing(proxy)}, {_backends(proxy)}" for proxy in proxies)
        return f"{served}; {'; '.join(each)}{failure}"


def _doing(proxy: Proxy) -> str:
    waiting = proxy.places.waiting
    silent = proxy.router.silent
    return (
        f"serving {proxy.open} of {proxy.config.max_connections}"
        + (f", {waiting} waiting" if waiting else "")
        + (f", {silent} yet to say what they want" if silent else "")
    )


def _backends(proxy: Proxy) -> str:
    """Its backends, and how many clients have taken each of its routes."""
    routes = proxy.router.routes
    busiest = sorted(routes, key=lambda route: -route.clients)[:ROUTES_MAX]
    counts = [f"{route.config.name} {route.clients}" for route in routes if route in busiest]
    if len(routes) > ROUTES_MAX:
        others = sum(route.clients for route in routes if route not in busiest)
        counts.append(f"{others} for {len(routes) - ROUTES_MAX} more")
    if counts and proxy.router.refused:
        counts.append(f"none {proxy.router.refused}")
    return describe(proxy.router.backends) + (f", by route: {', '.join(counts)}" if counts else "")
