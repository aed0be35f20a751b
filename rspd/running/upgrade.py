"""`rspd upgrade`: all goes on in the program, once its check has found nothing wrong; see host/upgrade.py."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable

from rspd.engine.loop import IN, Loop, Watch, news
from rspd.host.detach import Starter
from rspd.host.store import Store
from rspd.host.upgrade import Program, Successor
from rspd.net.descriptors import allow_all
from rspd.observing.desk import Desk
from rspd.running.handover import Handover
from rspd.running.proxies import Proxies
from rspd.settings import Config

# Seconds for the check, and bytes of what it says that the command is told.
CHECK_TIME = 30.0
REASON_MAX = 3000

ENDS = "the process ends just now"

log = logging.getLogger(__name__)


class Upgrade:
    """What this process does when it is to be upgraded.

    asked: the command that waits for the answer; None if there is none.
    """

    def __init__(
        self, loop: Loop, successor: Successor | None, store: Store, proxies: Proxies, desk: Desk, handover: Handover
    ) -> None:
        """successor: the program; None if systemd starts the next process. store, handover: to it."""
        self._loop = loop
        self._successor = successor
        self._store = store
        self._proxies = proxies
        self._desk = desk
        self._handover = handover
        self.asked: Starter | None = None
        self._leaves = False

    def ask(self, command: Starter) -> None:
        """A command asks for it. It is told at once if that cannot be."""
        if self._leaves or self.asked:
            command.release(os.EX_TEMPFAIL, ENDS if self._leaves else "another command upgrades it just now")
        else:
            self.asked = command

    def leave(self) -> None:
        """The process accepts clients no more: it cannot be upgraded."""
        self._leaves = True
        if self.asked:
            self.asked.release(os.EX_TEMPFAIL, ENDS)

    async def run(self, config: Config, ends: Callable[[], object]) -> bool:
        """Check the program, and hand over to it. If this returns True, no task runs any more: it is to be executed.

        If it returns False, nothing has changed, and the command has been told why. config: in force.
        ends: whether the process has been told to end; called whenever the running task is woken.
        """
        command = self.asked
        assert command
        code, reason = os.EX_UNAVAILABLE, "systemd starts its next process: use systemctl restart"
        if self._successor:
            code, reason = await refusal(self._loop, self._successor.program, config, ends)
        if not reason and ends():
            code, reason = os.EX_TEMPFAIL, ENDS
        if self._successor and not reason:
            if await self._hand_over(self._successor, command, config):
                return True
            code, reason = os.EX_OSERR, "it cannot hand over; its log says why"
        lines = reason.splitlines()
        for line in lines:
            log.error("upgrade refused, nothing has changed: %s", line)
        self.asked = None
        command.release(code, "\n".join(f"process {os.getpid()} goes on as it is: {line}" for line in lines))
        return False

    async def _hand_over(self, successor: Successor, command: Starter, config: Config) -> bool:
        allow_all()
        try:
            successor.prepare(command)
            listeners = [*self._proxies.listeners, *self._desk.listeners]
            self._store.keep([one for one in listeners if one.passed is None])
            if await self._handover.run_or_stay(config):
                return True
        except OSError as error:
            # EINVAL: a number for the copy is above the limit (fcntl(2)).
            few = error.errno in (errno.EMFILE, errno.EINVAL)
            why = "too few descriptors, raise ulimit -n" if few else error.strerror
            log.error("what is open cannot be handed over: %s", why)
        self._store.keep(())
        successor.clear()
        await self._loop.yield_turn()  # what was cancelled has ended then
        for proxy in self._proxies.configured.values():
            proxy.pause()
        self._proxies.apply(config, {name: one.listeners for name, one in self._proxies.configured.items()})
        return False


async def refusal(loop: Loop, program: Program, config: Config, given_up: Callable[[], object]) -> tuple[int, str]:
    """Why the program is not to be executed: an exit code, and the reason; the reason is empty if it may be.

    config: in force here. given_up: called whenever the running task is woken.
    """
    if not config.handover:
        return os.EX_CONFIG, "handover is off in its configuration"
    try:
        report = os.memfd_create("rspd-check", os.MFD_CLOEXEC)
    except OSError as error:
        return os.EX_OSERR, f"the check of the configuration cannot be started: {error.strerror}"
    try:
        code = await _run(loop, program.check(report), given_up)
        if not code:
            return 0, ""
        said = os.pread(report, REASON_MAX, 0).decode(errors="replace").replace("rspd: ", "").strip()
        return (code, said) if said and code > 0 else (os.EX_SOFTWARE, said or f"the check ended with {code}")
    except TimeoutError:
        return os.EX_TEMPFAIL, f"the check of the configuration took more than {CHECK_TIME:g} seconds"
    except InterruptedError:
        return os.EX_TEMPFAIL, ENDS
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return os.EX_OSERR, f"the check of the configuration cannot be started: {where}{error.strerror}"
    finally:
        os.close(report)


async def _run(loop: Loop, pid: int, given_up: Callable[[], object]) -> int:
    """Wait for a child to end. Returns its exit code. Raises TimeoutError, or InterruptedError if it is given up."""
    try:
        ended = os.pidfd_open(pid)
        watch = Watch(ended)
        try:
            loop.watch(watch, IN)
            until = loop.now + CHECK_TIME
            loop.current.wake_at(until)
            while not watch.ready:
                if given_up():
                    raise InterruptedError
                if loop.now >= until:
                    raise TimeoutError
                await news()
        finally:
            loop.forget(watch)
            os.close(ended)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
