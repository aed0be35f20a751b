"""One run of rspd: start, signals, reload, drain, and what systemd hears of it."""

from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import signal
from collections.abc import Callable, Sequence
from math import inf

from rspd import log as log_setup
from rspd.address import Address, SocketAddress, resolve
from rspd.adoption import addresses_to_bind, log_replaced
from rspd.config import Config, ProxyConfig
from rspd.errors import StartError
from rspd.listener import ListenError, adopt_listener, replace_listeners
from rspd.log import quote
from rspd.loop import Loop, news
from rspd.pipes import PIPES_MAX
from rspd.proxy import Proxy
from rspd.systemd import Notifier, PassedSocket
from rspd.yamlfile import ConfigError

EXIT_CODES = {
    errno.EACCES: os.EX_NOPERM,
    errno.EPERM: os.EX_NOPERM,
    errno.EMFILE: os.EX_OSERR,
    errno.ENFILE: os.EX_OSERR,
}

# Descriptors besides the connections': standard ones, loop, log, systemd, pid file, name lookups, the file at a
# reload, some to spare.
OWN_DESCRIPTORS = 24

ENDING_SIGNALS = {signal.SIGTERM, signal.SIGINT}

# Seconds: more starts than that makes hit the limits in rspd.service and rspd.socket.
SHORTEST_IDLE_TIME = 1.0

# Seconds between two status lines for systemd while something changes.
STATUS_INTERVAL = 1.0

# Seconds that systemd is asked to go on waiting for the end, each STATUS_INTERVAL anew. Where nothing bounds the
# draining, the unit's TimeoutStopSec= does.
STOP_EXTENSION = 30.0

# Objects made and not freed before the garbage collector looks for cycles. By Python's own figure it would do so
# while clients come, for each few dozen of them.
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
        where = {address: _resolve(address) for address in addresses_to_bind(config.proxy, adopted)}
        pipes = reserve_descriptors(config.proxy, len(adopted) + sum(map(len, where.values())))
        listeners = replace_listeners(adopted, where, config.proxy.backlog, config.proxy.reuse_port)
    except ListenError as error:
        code = error.errno or 0
        raise StartError(str(error), EXIT_CODES.get(code, os.EX_UNAVAILABLE), code) from None
    except ConfigError as error:
        raise StartError("\n".join(error.errors), os.EX_CONFIG) from None
    # What is there by now stays, and a connection leaves no cycles behind, only the lookup of a name does.
    gc.freeze()
    gc.set_threshold(GARBAGE)
    with Loop() as loop:
        proxy = Proxy(loop, config.proxy, listeners, pipes)
        loop.run(Service(loop, config, proxy, load, notifier).run(on_ready))


def reserve_descriptors(config: ProxyConfig, listeners: int) -> int:
    """Make room for the connections, if need be by raising the soft limit to the hard one.

    Returns how many pipes there is room for. Raises StartError if there is none for the connections.
    """
    own = OWN_DESCRIPTORS + listeners
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * config.max_connections + own
    if needed > hard:
        fitting = (hard - own) // 2
        advice = f"lower it to {fitting} or raise" if fitting > 0 else "raise"
        raise StartError(
            f"max_connections {config.max_connections} needs {needed} descriptors, and the limit is {hard}: "
            f"{advice} the limit (LimitNOFILE= in the unit, ulimit -Hn in a shell)",
            os.EX_OSERR,
            errno.EMFILE,
        )
    if needed + 2 * PIPES_MAX > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(PIPES_MAX, (soft - needed) // 2)


class Service:
    """The daemon at work: one proxy, what signals ask of it, and what systemd hears."""

    def __init__(
        self, loop: Loop, config: Config, proxy: Proxy, load: Callable[[], Config] | None, notifier: Notifier
    ) -> None:
        self._loop = loop
        self._config = config
        self._load = load
        self._proxy = proxy
        self._notifier = notifier
        self._adopted = [listener for listener in proxy.listeners if listener.passed is not None]
        self._ends = 0  # signals to end so far
        self._reload_asked = False
        self._reload_error = ""  # of the last reload
        self._ending = False

    async def run(self, on_ready: Callable[[], object]) -> None:
        """Serve until SIGTERM or SIGINT, or until idle for `exit_idle_time`, and drain."""
        loop, proxy, notifier = self._loop, self._proxy, self._notifier
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
        # Whoever started rspd may have blocked them (daemon(7)).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS | {signal.SIGHUP})
        for listener in proxy.listeners:
            passed = "" if listener.passed is None else f" socket={quote(listener.passed)}"
            log.info("listening address=%s%s", listener.name, passed)
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
            else:
                await news()
        self._ending = True
        proxy.stop_listening()
        self._tell_stopping()
        if reporter:
            reporter.wake()
        log.info("ending connections=%d drain_timeout=%g", proxy.open, self._config.proxy.drain_timeout)
        await proxy.drain(lambda: self._ends > 1)
        self._tell_stopping()
        log.info("ended served=%d", proxy.served)
        # One more would find the default action restored, and the exit code would be its number.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS | {signal.SIGHUP})

    def _status(self) -> str:
        """What rspd is doing, for people."""
        proxy = self._proxy
        limit = proxy.config.max_connections
        doing = f"serving {proxy.open} of {limit}"
        if self._ending:
            doing = f"ending, {proxy.open} open" if proxy.open else "ended"
        backends = proxy.config.backends
        others = f" and {len(backends) - 1} more" if len(backends) > 1 else ""
        failure = f"; reload failed: {self._reload_error}" if self._reload_error else ""
        return f"{doing}, {proxy.served} served, backend {backends[0]}{others}{failure}"

    def _tell_consequences(self) -> None:
        """Log what the configuration and the sockets from systemd mean for each other."""
        log_replaced(self._config.proxy, self._adopted)
        if self._config.exit_idle_time < SHORTEST_IDLE_TIME and self._adopted:
            log.warning("exit_idle_time is below %g s: systemd gives up what it starts so often", SHORTEST_IDLE_TIME)
        if self._config.exit_idle_time != inf:
            for listener in self._proxy.listeners:
                if listener.passed is None:
                    log.warning("exit_idle_time ends rspd, and nobody starts it again for %s", listener.name)

    def _tell_stopping(self) -> None:
        self._notifier.stopping(self._status(), STOP_EXTENSION if self._config.proxy.drain_timeout != inf else 0)

    async def _keep_informed(self) -> None:
        """Tell systemd what changes, at most once in STATUS_INTERVAL, and that the loop is alive."""
        loop, watchers, task = self._loop, self._proxy.watchers, self._loop.current
        while True:
            watchers.discard(task)
            await loop.sleep(min(STATUS_INTERVAL, self._notifier.interval))
            if self._ending:
                self._tell_stopping()
                continue
            self._notifier.alive(self._status())
            watchers.add(task)
            task.wake_at(loop.now + self._notifier.interval - STATUS_INTERVAL)
            await news()

    def _idle_for_long(self) -> bool:
        """Whether there was no connection for `exit_idle_time`; if not, the running task is woken when to ask again."""
        limit = self._config.exit_idle_time
        if limit == inf:
            return False
        idle = self._proxy.idle
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
            addresses = addresses_to_bind(config.proxy, self._adopted)
            where = {address: await self._look_up(address, config.proxy) for address in addresses}
            pipes = reserve_descriptors(config.proxy, len(self._adopted) + sum(map(len, where.values())))
            self._proxy.apply(config.proxy, where, pipes)
        except (ConfigError, ListenError, StartError, OSError) as error:
            if self._ends:
                return
            what = f"{error.filename}: cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            self._reload_error = what
            for line in what.splitlines():
                log.error("reload failed, nothing has changed: %s", line)
            return
        log_setup.set_up(config.log_level)
        self._config = config
        self._tell_consequences()
        log.info("reloaded listen=%s", ",".join(listener.name for listener in self._proxy.listeners))

    async def _look_up(self, address: Address, config: ProxyConfig) -> list[SocketAddress]:
        try:
            deadline = self._loop.now + config.connect_timeout
            return await self._proxy.resolver.look_up(address, deadline, lambda: self._ends > 0)
        except OSError as error:
            raise ListenError(address, address, error) from None


def _resolve(address: Address) -> list[SocketAddress]:
    try:
        return resolve(address)
    except OSError as error:
        raise ListenError(address, address, error) from None
