"""One run of rspd: start, signals, reload, drain."""

from __future__ import annotations

import errno
import logging
import resource
import signal
from collections.abc import Callable, Mapping, Sequence

from rspd import log as log_setup
from rspd.address import Address, SocketAddress, resolve
from rspd.config import Config, ProxyConfig
from rspd.listener import ListenError, replace_listeners
from rspd.loop import Loop, news
from rspd.pipes import PIPES_MAX
from rspd.proxy import Proxy
from rspd.yamlfile import ConfigError

# sysexits(3)
EX_USAGE, EX_UNAVAILABLE, EX_OSERR, EX_NOPERM, EX_CONFIG = 64, 69, 71, 77, 78

EXIT_CODES = {
    errno.EACCES: EX_NOPERM,
    errno.EPERM: EX_NOPERM,
    errno.EMFILE: EX_OSERR,
    errno.ENFILE: EX_OSERR,
}

# Descriptors besides the connections': standard ones, loop, log, name lookups, the file at a reload, some to spare.
OWN_DESCRIPTORS = 24

log = logging.getLogger(__name__)


class StartError(Exception):
    """rspd cannot run; the text says why, `exit_code` is from sysexits(3)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(config: Config, load: Callable[[], Config] | None) -> None:
    """Serve until a signal to end, and drain. Raises StartError, with nothing bound.

    load: reads the configuration again at a reload; raises ConfigError or OSError. None where there is no file.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop has it: end without a traceback
    try:
        where = {address: _resolve(address) for address in config.proxy.listen}
        pipes = reserve_descriptors(config.proxy, where)
        listeners = replace_listeners([], where, config.proxy.backlog)
    except ListenError as error:
        raise StartError(str(error), EXIT_CODES.get(error.errno or 0, EX_UNAVAILABLE)) from None
    with Loop() as loop:
        loop.run(Service(loop, config, Proxy(loop, config.proxy, listeners, pipes), load).run())


def reserve_descriptors(config: ProxyConfig, where: Mapping[Address, Sequence[SocketAddress]]) -> int:
    """Make room for the connections, if need be by raising the soft limit to the hard one.

    where: what the addresses to listen on stand for.
    Returns how many pipes there is room for. Raises StartError if there is none for the connections.
    """
    own = OWN_DESCRIPTORS + sum(map(len, where.values()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * config.max_connections + own
    if needed > hard:
        fitting = (hard - own) // 2
        advice = f"lower it to {fitting} or raise" if fitting > 0 else "raise"
        raise StartError(
            f"max_connections {config.max_connections} needs {needed} descriptors, and the limit is {hard}: "
            f"{advice} the limit (LimitNOFILE= in the unit, ulimit -Hn in a shell)",
            EX_OSERR,
        )
    if needed + 2 * PIPES_MAX > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(PIPES_MAX, (soft - needed) // 2)


class Service:
    """The daemon at work: one proxy, and what signals ask of it."""

    def __init__(self, loop: Loop, config: Config, proxy: Proxy, load: Callable[[], Config] | None) -> None:
        self._loop = loop
        self._config = config
        self._load = load
        self._proxy = proxy
        self._ends = 0  # signals to end so far
        self._reload_asked = False

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, and drain."""
        loop, proxy = self._loop, self._proxy
        task = loop.current

        def end() -> None:
            self._ends += 1
            task.wake()

        def ask_reload() -> None:
            self._reload_asked = True
            task.wake()

        loop.on_signal(signal.SIGTERM, end)
        loop.on_signal(signal.SIGINT, end)
        loop.on_signal(signal.SIGHUP, ask_reload)
        for listener in proxy.listeners:
            log.info("listening address=%s", listener.name)
        while not self._ends:
            if self._reload_asked:
                self._reload_asked = False
                await self._reload()
            else:
                await news()
        proxy.stop_listening()
        log.info("ending connections=%d drain_timeout=%g", proxy.open, self._config.proxy.drain_timeout)
        await proxy.drain(lambda: self._ends > 1)
        log.info("ended served=%d", proxy.served)
        # One more would find the default action restored, and the exit code would be its number.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))

    async def _reload(self) -> None:
        """Read the configuration again and change what it changes; if that fails, change nothing and say why."""
        if self._load is None:
            log.warning("nothing to reload, the configuration is on the command line")
            return
        try:
            config = self._load()
            where = {address: await self._look_up(address, config.proxy) for address in config.proxy.listen}
            pipes = reserve_descriptors(config.proxy, where)
            self._proxy.apply(config.proxy, where, pipes)
        except (ConfigError, ListenError, StartError, OSError) as error:
            if self._ends:
                return
            what = f"{error.filename}: cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            for line in what.splitlines():
                log.error("reload failed, nothing has changed: %s", line)
            return
        log_setup.set_up(config.log_level)
        self._config = config
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
