"""The event loop: tasks over edge-triggered epoll, and timers.

A task is a coroutine. It suspends in one way only: `await news()`, or a bare `yield`, which does the same. The loop
resumes a task when a descriptor it watches is ready for something new, when its deadline has passed, or when somebody
called `Task.wake`. A task may be resumed without cause, so each time it checks what it waits for. Everything runs in
one thread: a task that neither waits nor yields keeps the others waiting.
"""

from __future__ import annotations

import logging
import select
import time
import types
from collections.abc import Callable, Coroutine, Generator
from math import inf
from typing import Any, TypeVar

from rspd.engine.timers import Timers
from rspd.engine.wakeups import Wakeups

IN, OUT, PRI = select.EPOLLIN, select.EPOLLOUT, select.EPOLLPRI
ERR, HUP, RDHUP = select.EPOLLERR, select.EPOLLHUP, select.EPOLLRDHUP
EDGE, EXCLUSIVE = select.EPOLLET, select.EPOLLEXCLUSIVE

# How many turns are measured before they are counted: one by one, this would take a call more.
TURNS = 256

T = TypeVar("T")
Work = Coroutine[Any, Any, object]

log = logging.getLogger(__name__)


class Cancelled(BaseException):
    """Raised at the `await` of a task that was cancelled. Like GeneratorExit, no `except Exception` stops it."""


@types.coroutine
def news() -> Generator[None, None, None]:
    """Suspend the running task until a descriptor it watches has news, its deadline passes, or it is woken."""
    yield


class Watch:
    """A descriptor, and what it is believed to be ready for.

    `ready` collects event bits: those that epoll has told, and those that its user assumes. The user clears a bit when
    a call shows that it does not hold (EAGAIN, say). Edge-triggered epoll sets the bit again when that changes, and not
    before. The caller owns the descriptor, and calls `Loop.unwatch` before closing it, or `Loop.forget`.
    """

    __slots__ = ("fd", "ready", "task")

    task: Task  # the one to resume; known once the descriptor is watched

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.ready = 0


class Task:
    """A coroutine that the loop runs; made by `Loop.spawn`.

    deadline: when it is to be resumed at the latest. armed: see `Sleeper`.
    """

    __slots__ = ("_coroutine", "_loop", "_on_done", "_send", "armed", "deadline", "done")

    def __init__(self, loop: Loop, coroutine: Work, on_done: Callable[[Task], object] | None) -> None:
        self._loop = loop
        self._coroutine = coroutine
        self._send = coroutine.send
        self._on_done = on_done
        self.armed = inf
        self.deadline = inf
        self.done = False

    def wake(self) -> None:
        """Resume the task in the loop's next turn; of no effect once it is done."""
        self._loop._queue[self] = None

    def wake_at(self, when: float) -> None:
        """Resume the task once at the loop's time `when`, in place of an earlier deadline; `inf` for never."""
        self.deadline = when
        # When a timer is due, it sees a later deadline and is set again. The next look finds a deadline after it.
        loop = self._loop
        if when < self.armed and when < loop._timers.next_look:
            loop._timers.arm(when, self, loop.now, len(loop._tasks))

    def cancel(self) -> None:
        """Raise `Cancelled` where the task waits."""
        if not self.done:
            self._send = self._throw
            self.wake()

    def interrupt(self) -> None:
        """End the coroutine here and now, by `Cancelled`. The task has nothing to run until `go_on`."""
        loop = self._loop
        caller, loop.current = loop.current, self
        try:
            self._coroutine.throw(Cancelled())
        except (StopIteration, Cancelled):
            pass
        finally:
            loop.current = caller

    def go_on(self, coroutine: Work) -> None:
        """Run another coroutine, here and now up to its first wait, after `interrupt`."""
        self._coroutine = coroutine
        self._send = coroutine.send
        loop = self._loop
        caller, loop.current = loop.current, self
        try:
            self._send(None)
        except (Exception, Cancelled) as end:
            loop._end(self, end)
        finally:
            loop.current = caller

    def _throw(self, _: None) -> object:
        self._send = self._coroutine.send
        return self._coroutine.throw(Cancelled())


class Loop:
    """Runs tasks until the main one returns. For one thread; to be closed, as a context manager.

    clock: returns monotonic seconds; tests pass their own.
    now, turn: the time of this turn, and its number.
    current: the task that is running.
    wakeups: how signals and threads reach the loop.
    """

    current: Task

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epoll = select.epoll()
        self._poll: Callable[[float, int], list[tuple[int, int]]] = self._epoll.poll
        self._watches: dict[int, Watch] = {}
        self._queue: dict[Task, None] = {}  # to be resumed in the next turn, in this order
        self._stopped = False
        self.wakeups = Wakeups()
        self.now = clock()
        self._timers = Timers(self.now)
        self.turn = 0
        self._tasks: dict[Task, None] = {}  # those that are not done, in the order in which they began
        self._to_wake: set[Task] = set()  # by `wake_later`
        self.spawn(self._receive_wakeups())

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self._epoll.close()
        self.wakeups.close()

    # Tasks

    def spawn(self, coroutine: Work, on_done: Callable[[Task], object] | None = None) -> Task:
        """Start a task and run it, here and now, up to its first wait. `on_done` is called when it has ended."""
        task = Task(self, coroutine, on_done)
        self._tasks[task] = None
        caller = getattr(self, "current", task)
        self.current = task
        try:
            task._send(None)
        except (Exception, Cancelled) as end:
            self._end(task, end)
        finally:
            self.current = caller
        return task

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main` as a task, and the others with it, until it returns; return or raise what it does."""
        results: list[T] = []
        errors: list[BaseException] = []

        async def keep_outcome() -> None:
            try:
                results.append(await main)
            except BaseException as error:
                errors.append(error)
            self._stopped = True

        self.now = self._clock()
        self.spawn(keep_outcome())
        while not (results or errors):
            self._stopped = False
            self._run_turns()
        if errors:
            raise errors[0]
        return results[0]

    async def sleep(self, seconds: float) -> None:
        """Let the running task wait for so long."""
        until = self.now + seconds
        self.current.wake_at(until)
        while self.now < until:
            await news()

    def wake_later(self, task: Task, seconds: float) -> None:
        """Wake a task after so long, whatever its deadline. Does nothing if an earlier call has yet to wake it."""

        async def wake() -> None:
            await self.sleep(seconds)
            self._to_wake.discard(task)
            task.wake()

        if task not in self._to_wake:
            self._to_wake.add(task)
            self.spawn(wake())

    def abandon(self) -> None:
        """Resume no task any more, not even in this turn: the running task ends the loop. Nothing is closed."""
        for task in self._tasks:
            task.done = True
        self._stopped = True

    async def yield_turn(self) -> None:
        """Go to the back of the ready queue: what else is ready comes first."""
        self.current.wake()
        await news()

    # Descriptors

    def watch(self, watch: Watch, events: int) -> None:
        """Let the running task be resumed by these events of a descriptor. Raises OSError (epoll_ctl(2))."""
        self._epoll.register(watch.fd, events)
        watch.task = self.current
        self._watches[watch.fd] = watch

    def rewatch(self, watch: Watch, events: int) -> None:
        """Change which events of a watched descriptor resume its task. Raises OSError (epoll_ctl(2))."""
        self._epoll.modify(watch.fd, events)

    def watches(self, watch: Watch) -> bool:
        """Whether a descriptor is watched."""
        return self._watches.get(watch.fd) is watch

    def unwatch(self, watch: Watch) -> None:
        """End a watch whose descriptor stays open; nothing is known of its readiness from then on."""
        self._epoll.unregister(watch.fd)
        self.forget(watch)
        watch.ready = 0

    def forget(self, watch: Watch) -> None:
        """End a watch whose descriptor is closed next: the kernel unregisters it then, and a call is saved."""
        if self._watches.get(watch.fd) is watch:
            del self._watches[watch.fd]

    # Turns

    def measure_turns(self, seconds: list[float], settle: Callable[[], object]) -> None:
        """Append the seconds of each turn from the next on; call `settle` after TURNS. Before, it costs nothing."""
        poll = self._poll

        def measured(timeout: float, most: int) -> list[tuple[int, int]]:
            seconds.append(self._clock() - self.now)
            if len(seconds) >= TURNS:
                settle()
            return poll(timeout, most)

        self._poll, self._stopped = measured, True  # `run` begins again, with the other poll

    async def _receive_wakeups(self) -> None:
        self.watch(Watch(self.wakeups.fd), IN | EDGE)
        while True:
            await news()
            self.wakeups.run_calls()

    def _run_turns(self) -> None:
        """Wait for events and resume the tasks that they concern, again and again, until the main task is done."""
        poll, poll_again, clock, watches = self._poll, self._epoll.poll, self._clock, self._watches
        timers, heap = self._timers, self._timers.heap
        while not self._stopped:
            self.turn += 1
            queue = self._queue
            due = min(heap[0][0], timers.next_look) if heap else timers.next_look
            wait = 0.0 if queue else due - clock()
            # A turn has all events that are ready: else tasks that are woken in each turn would run more often.
            events = poll(wait if wait > 0.0 else 0.0, len(watches))  # below 0 is for ever
            now = self.now = clock()
            late = due <= now
            if late:
                # After a freeze (SIGSTOP, a paused virtual machine) the poll may have brought nothing. So poll again:
                # tasks hear of what came meanwhile before any timer fires. This begins no other turn to measure.
                events += poll_again(0.0, len(watches))
            # All events are noted before any task runs. A task may close a descriptor, and a new one may get its
            # number: events of the old descriptor must not reach the new one.
            for fd, mask in events:
                try:
                    watch = watches[fd]
                except KeyError:
                    # It is closed here, but another process has a copy, which epoll goes on reporting (epoll(7)).
                    # As soon as the number has a new owner, the new owner gets these events.
                    continue
                watch.ready |= mask
                queue[watch.task] = None
            if late:
                timers.fire(now, self._tasks)
            # Tasks woken from here on wait for the next turn, after a look at the descriptors.
            self._queue = {}
            for task in queue:
                if not task.done:
                    self.current = task
                    try:
                        task._send(None)
                    except (Exception, Cancelled) as end:
                        self._end(task, end)

    def _end(self, task: Task, end: BaseException) -> None:
        if not isinstance(end, (StopIteration, Cancelled)):
            log.exception("a task failed; this is a bug", exc_info=end)
        task.done = True
        self._tasks.pop(task, None)
        if task._on_done:
            task._on_done(task)
