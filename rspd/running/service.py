"""One run of rspd: start, signals, reload, drain."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf

from rspd import log as log_setup
from rspd.engine.loop import Loop, news
from rspd.engine.pipes import Pipes
from rspd.errors import ConfigError, StartError
from rspd.host.systemd import Notifier, PassedSocket
from rspd.net.address import Address, SocketAddress, resolve
from rspd.net.descriptors import Shortage
from rspd.net.listener import Listener, ListenError, adopt_listener
from rspd.net.resolver import Resolver
from rspd.net.ways import Ways
from rspd.running.proxies import Proxies
from rspd.running.room import make_room
from rspd.running.sockets import Binding, Part, assign, log_replaced, replace_listeners
from rspd.running.status import Reporter
from rspd.serving.places import who_waits
from rspd.serving.proxy import Common
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
        loop.run(Service(common, config, adopted, load, notifier).run(own, on_ready))


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
    """The daemon at work: what signals ask of it, and its proxies."""

    def __init__(
        self,
        common: Common,
        config: Config,
        adopted: Sequence[Listener],
        load: Callable[[], Config] | None,
        notifier: Notifier,
    ) -> None:
        """config: the first one."""
        self._common = common
        self._loop = common.loop
        self._config = config
        self._load = load
        self._adopted = adopted
        self._notifier = notifier
        self._proxies = Proxies(common)
        self._reporter = Reporter(self._proxies, notifier)
        self._ends = 0  # signals to end so far
        self._reload_asked = False

    async def run(self, listeners: dict[str, list[Listener]], on_ready: Callable[[], object]) -> None:
        """Serve until SIGTERM or SIGINT, or until idle for `exit_idle_time`, and drain."""
        self._heed_signals()
        self._go_by(self._config, listeners)
        self._reporter.ready()
        on_ready()
        while not self._ends and not self._idle_for_long():
            if self._reload_asked:
                self._reload_asked = False
                self._notifier.reloading()
                self._reporter.ready(await self._reload())
            else:
                await news()
        await self._drain()
        self._common.pipes.close()
        self._common.shortage.give_up_spare()
        self._reporter.ending()
        log.info("ended served=%d", self._proxies.served)
        # Closing the loop restores the default actions: one more signal would kill rspd and be its exit status.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS | {signal.SIGHUP})

    def _heed_signals(self) -> None:
        task = self._loop.current

        def end() -> None:
            self._ends += 1
            task.wake()

        def ask_reload() -> None:
            self._reload_asked = True
            task.wake()

        for number in ENDING_SIGNALS:
            self._loop.on_signal(number, end)
        self._loop.on_signal(signal.SIGHUP, ask_reload)
        # The process that started rspd may have blocked these signals (daemon(7)).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS | {signal.SIGHUP})

    def _go_by(self, config: Config, listeners: dict[str, list[Listener]]) -> None:
        """Serve by a configuration from now on, and log what it and the sockets from systemd mean for each other."""
        self._proxies.apply(config, listeners)
        self._config = config
        log_setup.set_up(config.log_level)
        log_replaced(config, assign(config, self._adopted))
        if config.exit_idle_time < SHORTEST_IDLE_TIME and self._adopted:
            log.warning("exit_idle_time is below %g s: systemd gives up what it starts so often", SHORTEST_IDLE_TIME)
        if config.exit_idle_time != inf:
            for own in listeners.values():
                for listener in own:
                    if listener.passed is None:
                        log.warning("exit_idle_time ends rspd, and nobody starts it again for %s", listener.name)

    async def _reload(self) -> str:
        """Read the configuration again and change what it changes. If that fails, change nothing, and return why."""
        if self._load is None:
            log.warning("nothing to reload, the configuration is on the command line")
            return ""
        try:
            config = self._load()
            parts = assign(config, self._adopted)
            bindings = {
                address: Binding(await self._look_up(address, proxy), proxy.backlog, proxy.reuse_port)
                for proxy in config.proxies
                for address in parts[proxy.name].addresses
            }
            pipes = make_room(config, len(self._adopted) + _count(bindings))
            before = [listener for proxy in self._proxies.configured.values() for listener in proxy.listeners]
            for proxy in self._proxies.configured.values():
                proxy.pause()
            bound = replace_listeners(before, bindings)
        except (ConfigError, ListenError, StartError, OSError) as error:
            if self._ends:
                return ""
            what = str(error)
            if isinstance(error, OSError) and error.filename:
                what = f"{error.filename}: cannot be read: {error.strerror}"
            for line in what.splitlines():
                log.error("reload failed, nothing has changed: %s", line)
            return what
        listeners = {proxy.name: _listeners_of(parts[proxy.name], bound) for proxy in config.proxies}
        self._go_by(config, listeners)
        self._common.pipes.resize(pipes)
        names = (listener.name for own in listeners.values() for listener in own)
        log.info("reloaded listen=%s", ",".join(names))
        return ""

    def _idle_for_long(self) -> bool:
        """Whether rspd was idle for `exit_idle_time`. If not, the running task is woken when to ask again."""
        limit = self._config.exit_idle_time
        if limit == inf:
            return False
        idle = self._proxies.idle
        if idle >= limit:
            log.info("idle seconds=%g", limit)
            return True
        self._loop.current.wake_at(self._loop.now + limit - idle)
        return False

    async def _drain(self) -> None:
        """Stop listening, and wait for the open connections, at most for `drain_timeout`, or until a second signal."""
        self._common.ways.listen({}, ())
        task = self._loop.current
        proxies = self._proxies.everyone()
        timeouts = {f"{proxy.config.drain_timeout:g}" for proxy in proxies}
        # The kernel resets these clients. Clients at a socket of systemd wait on for the next process.
        reset = who_waits(listener for proxy in proxies for listener in proxy.listeners if listener.passed is None)
        waiting = f" waiting={reset}" if reset else ""
        for proxy in proxies:
            proxy.stop_listening()
        self._reporter.ending()
        open_ones = self._proxies.open
        log.info("ending connections=%d%s drain_timeout=%s", open_ones, waiting, ",".join(sorted(timeouts)))
        drains = [self._loop.spawn(proxy.drain(lambda: self._ends > 1), lambda _: task.wake()) for proxy in proxies]
        while not all(drain.done for drain in drains):
            for drain in drains:
                drain.wake()  # a second signal to end concerns all proxies
            await news()

    async def _look_up(self, address: Address, proxy: ProxyConfig) -> list[SocketAddress]:
        try:
            deadline = self._loop.now + proxy.connect_timeout
            return await self._common.resolver.look_up(address, deadline, lambda: self._ends > 0)
        except OSError as error:
            raise ListenError(address, address, error) from None


def _resolve(address: Address) -> list[SocketAddress]:
    try:
        return resolve(address)
    except OSError as error:
        raise ListenError(address, address, error) from None
