"""The control socket and the metrics: what listens there, and what of it the next process goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rspd.engine.loop import Loop, Task, news
from rspd.engine.side import Handed
from rspd.histogram import begins_anew
from rspd.net.descriptors import Shortage
from rspd.net.listener import Listener
from rspd.observing.life import Life
from rspd.observing.samples import Everyone

if TYPE_CHECKING:
    from rspd.admin.metrics import Exposition
    from rspd.observing.answers import Answers


class Desk:
    """Where those who look at this process are answered, if there is such a place. Owns the listeners.

    listeners: its own.
    """

    def __init__(self, loop: Loop, shortage: Shortage, proxies: Everyone, life: Life, watchers: set[Task]) -> None:
        """watchers: as for `Proxy`."""
        self._parts = loop, shortage, proxies, life, watchers
        self._life = life
        self._answers: Answers | None = None  # once somebody could look: others do not pay for the modules
        self._exposition: Exposition | None = None
        self._handed: Handed = {}  # of the exposition, before there is one
        self._control: Sequence[Listener] = ()
        self._metrics: Sequence[Listener] = ()

    def prepare(self, metrics: bool) -> None:
        """Import what answers need, and metrics if they are wanted. Raises ImportError, or what else an import may."""
        if not self._answers:
            from rspd.observing.answers import Answers

            self._answers = Answers(*self._parts)
        if metrics and not self._exposition:
            from rspd.admin.client import sockets_of
            from rspd.admin.metrics import Exposition

            def workers() -> list[str]:
                """The control sockets of the workers beside this process."""
                own = [listener.address.path for listener in self._control]
                return [path for path in sockets_of(own[0]) if path not in own] if own else []

            self._exposition = self._answers.exposition = Exposition(workers)
            self._resume_metrics()

    async def import_parts(self, metrics: bool) -> None:
        """Import what `prepare` needs, while connections go on; there, they would wait for 50 ms.

        If it fails, `prepare` says why.
        """
        if not self._answers or (metrics and not self._exposition):
            loop, task, outcomes = self._parts[0], self._parts[0].current, list[object]()

            def finish(outcome: object) -> None:
                outcomes.append(outcome)
                task.wake()

            # An import in a thread keeps the interpreter for 5 ms at a time (sys.setswitchinterval).
            try:
                loop.wakeups.run_in_thread(partial(Desk(*self._parts).prepare, metrics), finish)
            except RuntimeError:
                return  # no thread can be started: `prepare` imports
            while not outcomes:
                await news()

    @property
    def listeners(self) -> list[Listener]:
        """Where it answers."""
        return [*self._control, *self._metrics]

    def apply(self, control: Sequence[Listener], metrics: Sequence[Listener]) -> None:
        """Answer there from now on, after `prepare` and `pause`. Other listeners that it had are closed by now."""
        self._control, self._metrics = control, metrics
        if metrics:
            self._life.measure_turns()
        self.go_on()

    def go_on(self) -> None:
        """Answer again, after `pause`."""
        if not self._answers:
            return
        self._answers.control.apply(self._control)
        self._answers.metrics.apply(self._metrics)
        if self.listeners:
            self._answers.sampler.start()
        else:
            self._answers.sampler.stop()

    def pause(self) -> None:
        """Answer nobody new, and watch no listener: they are about to be replaced."""
        if self._answers:
            self._answers.control.stop()
            self._answers.metrics.stop()

    async def finish(self) -> None:
        """`pause`, and answer those who have come, before another process goes on. Not for long."""
        self.pause()
        if self._answers:
            await self._answers.control.finish()
            await self._answers.metrics.finish()

    def close(self) -> None:
        """Answer nobody any more, and close the listeners."""
        self.pause()
        for listener in self.listeners:
            listener.close()
        self._control = self._metrics = ()

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process."""
        known = self._exposition.hand_over() if self._exposition else None
        samples = self._answers.sampler.hand_over() if self._answers else {}
        return {"life": self._life.hand_over(), "metrics": known or self._handed, **samples}

    def resume(self, handed: Handed) -> None:
        """Go on with what the process before knew."""
        self._life.resume(handed.get("life", {}))
        if self._answers:
            self._answers.sampler.resume(handed)
        self._handed = handed.get("metrics") or {}
        self._resume_metrics()

    def _resume_metrics(self) -> None:
        try:
            if self._exposition and self._handed:
                self._exposition.resume(self._handed)
        except ValueError as error:
            self._handed = {}
            begins_anew("sums over workers", error)
