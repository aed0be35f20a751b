"""When tasks are to be resumed because time has passed."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import count
from math import inf
from typing import Protocol

# Seconds. epoll_wait takes no more than 24 days. To wake once a day for nothing costs nothing.
LONGEST_WAIT = 86400.0

# A deadline that is further away than so many seconds gets no timer yet. Most tasks are done by then: they need none.
AHEAD = 1.0


class Sleeper(Protocol):
    """Who has a deadline: a task.

    armed: when its timer is due, `inf` for none. Only `Timers` changes it.
    """

    armed: float
    deadline: float
    done: bool

    def wake(self) -> None:
        """Its deadline has passed."""

    def wake_at(self, when: float) -> None:
        """Set its deadline, with `Timers.arm` if need be."""


class Timers:
    """The near deadlines of tasks, in a heap. All times are the loop's.

    Each deadline before `next_look` has a timer. At `next_look`, the loop goes through all tasks, and sets the timers
    of the next second. So a far deadline costs nothing until then. A look takes some 0.06 ms for a thousand tasks.

    heap: the timers: when each is due, its number, its task. A timer is outdated if its task is done, or has an earlier
    one. An outdated timer stays until it is due, or until most are outdated.
    """

    def __init__(self, now: float) -> None:
        self.next_look = now + LONGEST_WAIT
        self.heap: list[tuple[float, int, Sleeper]] = []
        self._numbers = count()

    def arm(self, when: float, task: Sleeper, now: float, tasks: int) -> None:
        """Set the timer of a deadline that is near. If the deadline is far, look again in a second.

        when: before `next_look`. tasks: how many there are.
        """
        if when > now + AHEAD:
            self.next_look = now + AHEAD
            return
        heap = self.heap
        task.armed = when
        heapq.heappush(heap, (when, next(self._numbers), task))
        if len(heap) > 2 * tasks + 64:
            heap[:] = [entry for entry in heap if entry[0] == entry[2].armed and not entry[2].done]
            heapq.heapify(heap)

    def fire(self, now: float, tasks: Iterable[Sleeper]) -> None:
        """Wake the tasks whose deadline has passed, the earliest first.

        tasks: all that are not done. Of equal deadlines, that of the first of them is the earliest.
        """
        if self.next_look <= now:
            self._look(now, tasks)
        heap = self.heap
        while heap and heap[0][0] <= now:
            when, _, task = heapq.heappop(heap)
            if when == task.armed and not task.done:
                task.armed = inf
                if task.deadline <= now:
                    task.wake()
                else:
                    task.wake_at(task.deadline)

    def _look(self, now: float, tasks: Iterable[Sleeper]) -> None:
        """Set the timers of the next second. The next look comes when the first of the other deadlines does."""
        since, until = self.next_look, now + AHEAD
        self.next_look = until
        first = now + LONGEST_WAIT
        for task in tasks:
            when = task.deadline
            # Deadlines before `since` have had their timers.
            if since <= when < until:
                task.wake_at(when)
            elif until <= when < first:
                first = when
        self.next_look = first
