"""One run of rspd: start, signals, reload, drain."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING

from rspd import log as log_setup
from rspd.engine.loop import Loop, Task, news
from rspd.engine.pipes import Pipes
from rspd.errors import ConfigError, StartError
from rspd.host.store import Store
from rspd.host.systemd import Notifier, PassedSocket, worker
from rspd.host.upgrade import UPGRADE_OR_RESTART, Successor, who_asks
from rspd.listening.sockets import Opened, Plan, Sockets, log_replaced, make_room
from rspd.net.descriptors import Shortage
from rspd.net.listener import ListenError
from rspd.net.resolver import Resolver
from rspd.net.ways import Ways
from rspd.observing.desk import Desk
from rspd.observing.life import Life
from rspd.routing.pools import PoolMaker
from rspd.running.handover import Handover
from rspd.running.proxies import Proxies
from rspd.running.status import Reporter
from rspd.running.upgrade import Upgrade
from rspd.settings import Config

if TYPE_CHECKING:
    from rspd.running.legacy import Legacy

ENDING_SIGNALS = {signal.SIGTERM, signal.SIGINT}

# Seconds within which SIGTERM follows if the service restarts. A signal to end that comes later has another reason.
RESTART_WITHIN = 30.0

# Seconds. With a shorter exit_idle_time, so many starts follow that the limits in rspd.service and rspd.socket are hit.
SHORTEST_IDLE_TIME = 1.0

# Objects made and not freed before the garbage collector looks for cycles. Python looks once for a few dozen clients.
GARBAGE = 20_000

log = logging.getLogger(__name__)


def run(
    config: Config,
    load: Callable[[], Config] | None,
    passed: Sequence[PassedSocket],
    notifier: Notifier,
    on_ready: Callable[[], object],
    legacy: Legacy | None = None,
    fault: str = "",
    successor: Successor | None = None,
    version: str = "",
) -> bool:
    """Serve until a signal to end, or until it was idle for long enough, and drain. Raises StartError.

    Returns whether the connections were handed over: then the process has to end without touching them.
    load: reads the configuration again at a reload; raises ConfigError or OSError. None where there is no file.
    passed: the sockets that systemd passed, ours from now on.
    on_ready: called once, when clients can connect.
    successor: what may be executed in place of this process; None where systemd starts the next one.
    legacy: what the process before has left. fault: what is wrong with the file, if `config` was in force there.
    """
    try:
        loop = Loop()
    except OSError:
        make_room(config, max(len(passed), 1))  # too few descriptors even for the loop
        loop = Loop()
    with loop:
        return loop.run(Service(loop, config, load, passed, notifier, legacy, fault, successor, version).run(on_ready))


class Service:
    """The daemon at work: what signals ask of it, and its proxies."""

    def __init__(
        self,
        loop: Loop,
        config: Config,
        load: Callable[[], Config] | None,
        passed: Sequence[PassedSocket],
        notifier: Notifier,
        legacy: Legacy | None,
        fault: str,
        successor: Successor | None,
        version: str,
    ) -> None:
        """config: the configuration to start with."""
        self._loop = loop
        self._config = config
        self._load = load
        self._notifier = notifier
        resolver = Resolver(loop)
        self._shortage = Shortage(loop)
        self._pipes = Pipes(0)
        self._ways = Ways(loop)
        watchers: set[Task] = set()
        self._legacy = legacy
        self._fault = fault
        kept, lost = (legacy.listeners, legacy.lost) if legacy else ((), ())
        self._sockets = Sockets(loop, resolver, passed, kept, lost, self._prepare)
        maker = PoolMaker(loop, self._shortage, resolver, self._ways)
        self._proxies = Proxies(loop, self._shortage, self._pipes, maker, self._ways, watchers)
        self._life = Life(loop, version, worker())
        self._desk = Desk(loop, self._shortage, self._proxies, self._life, watchers)
        self._reporter = Reporter(loop, self._proxies, watchers, notifier)
        self._successor = successor
        self._store = Store(successor, ()) if successor else Store(notifier, legacy.found if legacy else ())
        self._handover = Handover(loop, self._store, self._proxies, self._desk, from_file=load is not None)
        self._upgrade = Upgrade(loop, successor, self._store, self._proxies, self._desk, self._handover)
        self._restart_until = -inf  # until when a signal to end is one to restart
        self._ends = 0  # signals to end so far
        self._reload_asked = False

    async def run(self, on_ready: Callable[[], object]) -> bool:
        """Serve until SIGTERM or SIGINT, or until idle for `exit_idle_time`, and drain. Returns as `run` does."""
        plan, opened = await self._listen_first()
        self._shortage.keep_spare()
        self._heed_signals()
        if self._legacy:
            await self._take_over(self._legacy, plan)
            self._legacy = None
        self._go_by(self._config, plan, opened)
        self._keep_listeners()
        # The objects made so far stay. A connection leaves no cycles behind; only the lookup of a name does.
        gc.freeze()
        gc.set_threshold(GARBAGE)
        gc.enable()  # it was disabled for the imports
        self._life.failure = self._fault
        for line in self._fault.splitlines():
            log.error("serving by the settings of the process before: %s", line)
        self._reporter.ready(self._fault and f"serving by the settings of the process before: {self._fault}")
        on_ready()
        handed_over = False
        while not self._ends and not self._idle_for_long():
            if self._reload_asked:
                self._reload_asked = False
                self._reporter.reloading()
                failure = self._life.failure = await self._reload()
                self._life.reloads_failed += bool(failure)
                self._reporter.ready(failure and f"reload failed: {failure}")
            elif self._upgrade.asked:
                if handed_over := await self._upgrade.run(self._config, lambda: self._ends):
                    break
            else:
                await news()
        if not handed_over:
            self._upgrade.leave()
        if not handed_over and self._loop.now < self._restart_until and self._config.handover:
            self._reporter.ending()
            handed_over = await self._handover.run(self._config, lambda: self._ends > 1)
        if not handed_over:
            await self._drain()
            self._pipes.close()
            self._shortage.give_up_spare()
            self._desk.close()
            self._reporter.ending()
            log.info("ended served=%d", self._proxies.served)
        # Closing the loop restores the default actions: one more signal would kill rspd and be its exit status.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS | {signal.SIGHUP})
        self._loop.wakeups.run_calls()
        if self._successor and handed_over and self._ends:
            os.kill(os.getpid(), signal.SIGTERM)  # it came too late for this program: it waits for the next
        return handed_over

    async def _take_over(self, legacy: Legacy, plan: Plan) -> None:
        """Go on with the connections of the process before, while nobody is accepted: they have their places first."""
        self._proxies.apply(self._config, {proxy.name: [] for proxy in self._config.proxies})
        self._pipes.resize(plan.pipes)
        taken = await legacy.take_over(self._loop, self._proxies, self._desk)
        log.info("took over connections=%d", taken)
        self._reporter.took_over(taken)
        for proxy in self._proxies.configured.values():
            proxy.pause()

    async def _listen_first(self) -> tuple[Plan, Opened]:
        """Listen, by what the process before went by if the configuration cannot be followed. Raises StartError."""
        try:
            return await self._listen()
        except StartError as error:
            before = self._legacy.config() if self._legacy and not self._fault else None
            if not before:
                raise
            self._config, self._fault = before, str(error)
            return await self._listen()

    async def _listen(self) -> tuple[Plan, Opened]:
        # Connections of the process before would stand still meanwhile.
        patient = self._notifier.active and not self._legacy
        try:
            return await self._sockets.listen(self._config, patient, self._notifier.starting)
        except StartError as error:
            if not (self._fault and self._config.metrics):
                raise
            # The process before had what metrics need. To lose its connections would be worse than to lose the metrics.
            self._config = self._config._replace(metrics=None)
            self._fault += "" if str(error) in self._fault else f"\n{error}"
            return await self._sockets.listen(self._config, patient, self._notifier.starting)

    async def _prepare(self, plan: Plan) -> None:
        """Have what answers to those who look need, if a plan has a place for them. Raises StartError."""
        metrics = plan.metrics is not None
        try:
            if plan.control or metrics:
                if self._proxies.configured:
                    await self._desk.import_parts(metrics)
                self._desk.prepare(metrics)
        except ModuleNotFoundError as error:
            what = f"metrics: expected the module prometheus_client, found {error}"
            advice = "install Debian's python3-prometheus-client, or leave the key out"
            raise StartError(f"{what}; {advice}", os.EX_CONFIG) from None
        except Exception as error:
            # At a reload, modules of another version may be installed by now.
            raise StartError(f"control, metrics: cannot be prepared: {error}; restart rspd", os.EX_SOFTWARE) from error

    def _heed_signals(self) -> None:
        task = self._loop.current

        def end() -> None:
            self._ends += 1
            task.wake()

        def ask_reload() -> None:
            self._reload_asked = True
            task.wake()

        def expect_restart() -> None:
            if command := who_asks():
                self._upgrade.ask(command)
                task.wake()
            elif not self._successor:
                self._restart_until = self._loop.now + RESTART_WITHIN

        self._loop.wakeups.on_signal(UPGRADE_OR_RESTART, expect_restart)
        for number in ENDING_SIGNALS:
            self._loop.wakeups.on_signal(number, end)
        self._loop.wakeups.on_signal(signal.SIGHUP, ask_reload)
        # The process that started rspd may have blocked these signals (daemon(7)).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS | {signal.SIGHUP, UPGRADE_OR_RESTART})

    def _go_by(self, config: Config, plan: Plan, opened: Opened) -> None:
        """Serve by a configuration from now on. Log those of its effects that may surprise."""
        self._proxies.apply(config, opened.proxies)
        self._desk.apply(opened.control, opened.metrics)
        self._pipes.resize(plan.pipes)
        self._config = config
        log_setup.set_up(config.log_level)
        log_replaced(config, plan.parts)
        if config.exit_idle_time < SHORTEST_IDLE_TIME and self._sockets.adopted:
            log.warning("exit_idle_time is below %g s: systemd gives up what it starts so often", SHORTEST_IDLE_TIME)
        if config.exit_idle_time != inf:
            for listener in self._proxies.listeners:
                if listener.passed is None:
                    log.warning("exit_idle_time ends rspd, and nobody starts it again for %s", listener.name)

    def _keep_listeners(self) -> None:
        """Let the next process have our own listeners. systemd passes the others to it anyway."""
        if not self._successor:
            everyone = [*self._proxies.listeners, *self._desk.listeners]
            own = [listener for listener in everyone if listener.passed is None]
            self._store.keep(own if self._config.handover else ())

    async def _reload(self) -> str:
        """Read the configuration again and change what it changes. If that fails, change nothing, and return why."""
        if self._load is None:
            log.warning("nothing to reload, the configuration is on the command line")
            return ""
        try:
            config = self._load()
            plan = await self._sockets.plan(config, patient=False, given_up=lambda: self._ends > 0)
            for proxy in self._proxies.configured.values():
                proxy.pause()
            self._desk.pause()
            opened = self._sockets.open(plan, [*self._proxies.listeners, *self._desk.listeners])
        except (ConfigError, ListenError, StartError, OSError) as error:
            self._desk.go_on()
            if self._ends:
                return ""
            what = str(error)
            if isinstance(error, OSError) and error.filename:
                what = f"{error.filename}: cannot be read: {error.strerror}"
            for line in what.splitlines():
                log.error("reload failed, nothing has changed: %s", line)
            return what
        self._go_by(config, plan, opened)
        self._keep_listeners()
        self._life.reloads += 1
        log.info("reloaded listen=%s", ",".join(listener.name for listener in self._proxies.listeners))
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
        timeouts = {f"{proxy.config.drain_timeout:g}" for proxy in self._proxies.everyone()}
        self._life.ending = True
        reset = self._proxies.stop_listening()
        waiting = f" waiting={reset}" if reset else ""
        self._store.keep(())
        self._reporter.ending()
        text = "ending connections=%d%s drain_timeout=%s"
        log.info(text, self._proxies.open, waiting, ",".join(sorted(timeouts)))
        await self._proxies.drain(lambda: self._ends > 1)
