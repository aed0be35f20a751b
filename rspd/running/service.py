"""One run of rspd: start, signals, reload, drain, and what systemd hears of it."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf

from rspd import log as log_setup
from rspd.engine.loop import Loop, news
from rspd.engine.pipes import Pipes
from rspd.errors import ConfigError, StartError
from rspd.host.systemd import Notifier, PassedSocket
from rspd.log import quote
from rspd.net.address import Address, SocketAddress, resolve
from rspd.net.descriptors import Shortage
from rspd.net.listener import Listener, ListenError, adopt_listener
from rspd.net.resolver import Resolver
from rspd.net.ways import Ways
from rspd.running.room import make_room
from rspd.running.sockets import Binding, Part, assign, log_replaced, replace_listeners
from rspd.serving.places import who_waits
from rspd.serving.proxy import Common, Proxy
from rspd.settings import Config, ProxyConfig

EXIT_CODES = {
    errno.EACCES: os.EX_NOPERM,
    errno.EPERM: os.EX_NOPERM,
    errno.EMFILE: os.EX_OSERR,
    errno.ENFILE: os.EX_OSERR,
}

ENDING_SIGNALS = {signal.SIGTERM, signal.SIGINT}

# Seconds. With a shorter exit_idle_time, so many starts follow that the limits in rspd.service and rspd.socket are hit.
SHORTEST_IDLE_TIME = 1.0

# Seconds between two status lines for systemd while something changes.
STATUS_INTERVAL = 1.0

# Seconds that rspd asks systemd to wait for the end; it asks again each STATUS_INTERVAL. If drain_timeout is off, the
# unit's TimeoutStopSec= counts.
STOP_EXTENSION = 30.0

# Seconds for which a start under systemd goes on trying to listen, and seconds between two tries. The process that has
# the port may give it up. Each start that fails writes several lines to the journal, and systemd starts four a second.
LISTEN_PATIENCE = 5.0
LISTEN_AGAIN = 0.5

# Objects made and not freed before the garbage collector looks for cycles. With Python's default it would look once for
# every few dozen clients that come.
GARBAGE = 20_000

log = logging.getLogger(__name__)


def run(
    config: Config,
    load: Callable[[], Config] | None,
    sockets: Sequence[PassedSocket],
    notifier: Notifier,
    on_ready: Callable[[], object],
) -> None:
    """Serve until a signal to end, or until it was idle for long enough, and drain. Raises StartError.

    load: reads the configuration again at a reload; raises ConfigError or OSError. None where there is no file.
    sockets: what systemd passed, ours from now on.
    on_ready: called once, when clients can connect.
    """
    adopted = [adopt_listener(name, sock) for name, sock in sockets]
    try:
        parts = assign(config, adopted)
    except ConfigError as error:
        raise StartError("\n".join(error.errors), os.EX_CONFIG) from None
    listeners, pipes = _listen(config, parts, adopted, notifier)
    # The objects made so far stay. A connection leaves no cycles behind; only the lookup of a name does.
    gc.freeze()
    gc.set_threshold(GARBAGE)
    with Loop() as loop:
        common = Common(loop, Ways(loop), Resolver(loop), Shortage(loop), Pipes(pipes), set())
        common.shortage.keep_spare()
        own = {proxy.name: _listeners_of(parts[proxy.name], listeners) for proxy in config.proxies}
        common.ways.listen(own, _backends(config))
        proxies = {proxy.name: Proxy(common, proxy, own[proxy.name]) for proxy in config.proxies}
        loop.run(Service(common, config, proxies, adopted, load, notifier).run(on_ready))


def _listen(
    config: Config, parts: Mapping[str, Part], adopted: Sequence[Listener], notifier: Notifier
) -> tuple[list[Listener], int]:
    """The listeners of all proxies, and how many pipes there is room for. Raises StartError, maybe after a while."""
    until = time.monotonic() + (LISTEN_PATIENCE if notifier.active else 0.0)
    told = False
    while True:
        try:
            bindings = {
                address: Binding(_resolve(address), proxy.backlog, proxy.reuse_port)
                for proxy in config.proxies
                for address in parts[proxy.name].addresses
            }
            pipes = make_room(config, len(adopted) + _count(bindings))
            return replace_listeners(adopted, bindings), pipes
        except ListenError as error:
            code = EXIT_CODES.get(error.errno or 0, os.EX_UNAVAILABLE)
            if code != os.EX_UNAVAILABLE or time.monotonic() >= until:
                raise StartError(str(error), code, error.errno or 0) from None
            if not told:
                log.warning("%s; trying again for %g s", error, LISTEN_PATIENCE)
                notifier.starting(str(error))
                told = True
        time.sleep(LISTEN_AGAIN)


def _count(bindings: Mapping[Address, Binding]) -> int:
    return sum(len(binding.where) for binding in bindings.values())


def _listeners_of(part: Part, listeners: Sequence[Listener]) -> list[Listener]:
    bound = [listener for listener in listeners if listener.passed is None and listener.address in part.addresses]
    return part.adopted + bound


class Service:
    """The daemon at work: its proxies, what signals ask of them, and what systemd hears."""

    def __init__(
        self,
        common: Common,
        config: Config,
        proxies: dict[str, Proxy],
        adopted: Sequence[Listener],
        load: Callable[[], Config] | None,
        notifier: Notifier,
    ) -> None:
        self._common = common
        self._loop = common.loop
        self._config = config
        self._load = load
        self._proxies = proxies
        self._retired: list[Proxy] = []  # taken out of the configuration, with connections that are still open
        self._notifier = notifier
        self._adopted = adopted
        self._ends = 0  # signals to end so far
        self._reload_asked = False
        self._reload_error = ""  # of the last reload
        self._served_before = 0  # clients served by proxies that are gone
        self._last_end = -inf  # when the last connection of these proxies ended
        self._ending = False

    async def run(self, on_ready: Callable[[], object]) -> None:
        """Serve until SIGTERM or SIGINT, or until idle for `exit_idle_time`, and drain."""
        loop, notifier = self._loop, self._notifier
        task = loop.current

        def end() -> None:
            self._ends += 1
            task.wake()

        def ask_reload() -> None:
            self._reload_asked = True
            task.wake()

        for number in ENDING_SIGNALS:
            loop.on_signal(number, end)
        loop.on_signal(signal.SIGHUP, ask_reload)
        # The process that started rspd may have blocked these signals (daemon(7)).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS | {signal.SIGHUP})
        for proxy in self._proxies.values():
            _log_listening(proxy, proxy.listeners)
        self._tell_consequences()
        notifier.ready(self._status())
        on_ready()
        reporter = loop.spawn(self._keep_informed()) if notifier.active else None
        while not self._ends and not self._idle_for_long():
            if self._reload_asked:
                self._reload_asked = False
                notifier.reloading()
                await self._reload()
                notifier.ready(self._status())
                if reporter:
                    reporter.wake()  # the reporter sends again what systemd had no room for
            else:
                await news()
        self._ending = True
        self._common.ways.listen({}, ())
        proxies = self._everyone()
        timeouts = {f"{proxy.config.drain_timeout:g}" for proxy in proxies}
        # The kernel resets these clients. Clients at a socket of systemd wait on for the next process.
        reset = who_waits(listener for proxy in proxies for listener in proxy.listeners if listener.passed is None)
        waiting = f" waiting={reset}" if reset else ""
        for proxy in proxies:
            proxy.stop_listening()
        self._tell_stopping()
        if reporter:
            reporter.wake()
        log.info("ending connections=%d%s drain_timeout=%s", self._open(), waiting, ",".join(sorted(timeouts)))
        drains = [loop.spawn(proxy.drain(lambda: self._ends > 1), lambda _: task.wake()) for proxy in proxies]
        while not all(drain.done for drain in drains):
            for drain in drains:
                drain.wake()  # a second signal to end concerns all proxies
            await news()
        self._common.pipes.close()
        self._common.shortage.give_up_spare()
        self._tell_stopping()
        log.info("ended served=%d", self._served())
        # Closing the loop restores the default actions: one more signal would kill rspd and be its exit status.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS | {signal.SIGHUP})

    def _everyone(self) -> list[Proxy]:
        """All proxies, also those that were taken out and still have connections."""
        for proxy in self._retired:
            if not proxy.open:
                self._served_before += proxy.served
                self._last_end = max(self._last_end, self._loop.now - proxy.idle)
        self._retired = [proxy for proxy in self._retired if proxy.open]
        return [*self._proxies.values(), *self._retired]

    def _open(self) -> int:
        return sum(proxy.open for proxy in self._everyone())

    def _served(self) -> int:
        proxies = self._everyone()
        return self._served_before + sum(proxy.served for proxy in proxies)

    def _status(self) -> str:
        """What rspd is doing, for people."""
        failure = f"; reload failed: {self._reload_error}" if self._reload_error else ""
        served = f"{self._served()} served"
        proxies = list(self._proxies.values())
        if self._ending or len(proxies) == 1:
            doing = _doing(proxies[0])
            if self._ending:
                count = self._open()
                doing = f"ending, {count} open" if count else "ended"
            backends = "".join(f", {proxy.backends.describe()}" for proxy in proxies[:1] if len(proxies) == 1)
            return f"{doing}, {served}{backends}{failure}"
        each = (f"{name} {_doing(proxy)}, {proxy.backends.describe()}" for name, proxy in self._proxies.items())
        return f"{served}; {'; '.join(each)}{failure}"

    def _tell_consequences(self) -> None:
        """Log what the configuration and the sockets from systemd mean for each other."""
        log_replaced(self._config, assign(self._config, self._adopted))
        if self._config.exit_idle_time < SHORTEST_IDLE_TIME and self._adopted:
            log.warning("exit_idle_time is below %g s: systemd gives up what it starts so often", SHORTEST_IDLE_TIME)
        if self._config.exit_idle_time != inf:
            for proxy in self._proxies.values():
                for listener in proxy.listeners:
                    if listener.passed is None:
                        log.warning("exit_idle_time ends rspd, and nobody starts it again for %s", listener.name)

    def _tell_stopping(self) -> None:
        bounded = all(proxy.config.drain_timeout != inf for proxy in self._everyone())
        self._notifier.stopping(self._status(), STOP_EXTENSION if bounded else 0)

    async def _keep_informed(self) -> None:
        """Tell systemd what changes, at most once in STATUS_INTERVAL, and that the loop is alive."""
        loop, watchers, task = self._loop, self._common.watchers, self._loop.current
        while True:
            watchers.discard(task)
            await loop.sleep(min(STATUS_INTERVAL, self._notifier.interval))
            if self._ending:
                self._tell_stopping()
                continue
            self._notifier.alive(self._status())
            watchers.add(task)
            if not self._notifier.pending:
                task.wake_at(loop.now + self._notifier.interval - STATUS_INTERVAL)
                await news()

    def _idle_for_long(self) -> bool:
        """Whether rspd was idle for `exit_idle_time`. If not, the running task is woken when to ask again."""
        limit = self._config.exit_idle_time
        if limit == inf:
            return False
        idle = min(proxy.idle for proxy in self._everyone())
        idle = min(idle, self._loop.now - self._last_end)
        if idle >= limit:
            log.info("idle seconds=%g", limit)
            return True
        self._loop.current.wake_at(self._loop.now + limit - idle)
        return False

    async def _reload(self) -> None:
        """Read the configuration again and change what it changes; if that fails, change nothing and say why."""
        self._reload_error = ""
        if self._load is None:
            log.warning("nothing to reload, the configuration is on the command line")
            return
        try:
            config = self._load()
            parts = assign(config, self._adopted)
            bindings = {
                address: Binding(await self._look_up(address, proxy), proxy.backlog, proxy.reuse_port)
                for proxy in config.proxies
                for address in parts[proxy.name].addresses
            }
            pipes = make_room(config, len(self._adopted) + _count(bindings))
            self._apply(config, parts, bindings)
            self._common.pipes.resize(pipes)
        except (ConfigError, ListenError, StartError, OSError) as error:
            if self._ends:
                return
            what = str(error)
            if isinstance(error, OSError) and error.filename:
                what = f"{error.filename}: cannot be read: {error.strerror}"
            self._reload_error = what
            for line in what.splitlines():
                log.error("reload failed, nothing has changed: %s", line)
            return
        log_setup.set_up(config.log_level)
        self._config = config
        self._tell_consequences()
        listen = ",".join(listener.name for proxy in self._proxies.values() for listener in proxy.listeners)
        log.info("reloaded listen=%s", listen)

    def _apply(self, config: Config, parts: Mapping[str, Part], bindings: Mapping[Address, Binding]) -> None:
        """Make the proxies what a configuration says. Raises ListenError; then nothing has changed."""
        old = self._proxies
        for proxy in old.values():
            proxy.pause()
        before = [listener for proxy in old.values() for listener in proxy.listeners]
        listeners = replace_listeners(before, bindings)
        # Nothing from here on can fail.
        new: dict[str, Proxy] = {}
        own = {wanted.name: _listeners_of(parts[wanted.name], listeners) for wanted in config.proxies}
        self._common.ways.listen(own, _backends(config))
        for wanted in config.proxies:
            if wanted.name in old:
                proxy = old[wanted.name]
                proxy.apply(wanted, own[wanted.name])
            else:
                proxy = Proxy(self._common, wanted, own[wanted.name])
            new[wanted.name] = proxy
            _log_listening(proxy, [listener for listener in own[wanted.name] if listener not in before])
        for name, proxy in old.items():
            if name not in new:
                proxy.listeners.clear()  # other proxies have them now, or they are closed
                proxy.stop_listening()
                self._retired.append(proxy)
                log.info("proxy taken out%s connections=%d", proxy.tag, proxy.open)
        self._proxies = new

    async def _look_up(self, address: Address, proxy: ProxyConfig) -> list[SocketAddress]:
        try:
            deadline = self._loop.now + proxy.connect_timeout
            return await self._common.resolver.look_up(address, deadline, lambda: self._ends > 0)
        except OSError as error:
            raise ListenError(address, address, error) from None


def _backends(config: Config) -> Iterator[Address]:
    return (backend.address for proxy in config.proxies for backend in proxy.backends)


def _log_listening(proxy: Proxy, listeners: Sequence[Listener]) -> None:
    for listener in listeners:
        passed = "" if listener.passed is None else f" socket={quote(listener.passed)}"
        log.info("listening address=%s%s%s", listener.name, proxy.tag, passed)


def _doing(proxy: Proxy) -> str:
    waiting = proxy.places.waiting
    return f"serving {proxy.open} of {proxy.config.max_connections}" + (f", {waiting} waiting" if waiting else "")


def _resolve(address: Address) -> list[SocketAddress]:
    try:
        return resolve(address)
    except OSError as error:
        raise ListenError(address, address, error) from None
