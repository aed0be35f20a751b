"""Run rspd and time each turn of its loop: python bench/turns.py FILE rspd's ARGUMENT...

A turn is what happens between the return of one poll of epoll and the call of the next. CPU time is that of the loop's
thread alone. Wall time has in it what the machine did meanwhile, too. Turns in which a connection begins or ends are
left out: at a fixed rate there are none, but before and after. At SIGUSR1, FILE gets one object of JSON: how many turns
there were since the last SIGUSR1, the longest in seconds, and how many took over a millisecond, of CPU time and of wall
time.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic_ns, thread_time_ns
from typing import Any

LONG = 1_000_000  # nanoseconds
ENDS = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Turns:
    """What is known of the turns so far."""

    def __init__(self) -> None:
        self.count = 0
        self.longest_cpu = self.longest_wall = 0  # nanoseconds
        self.long_cpu = self.long_wall = 0  # how many took over LONG

    def note(self, cpu: int, wall: int) -> None:
        """One more turn, in nanoseconds."""
        self.count += 1
        self.longest_cpu = max(self.longest_cpu, cpu)
        self.longest_wall = max(self.longest_wall, wall)
        self.long_cpu += cpu > LONG
        self.long_wall += wall > LONG

    def figures(self) -> dict[str, float]:
        """In seconds."""
        return {
            "turns": self.count,
            "cpu_longest": self.longest_cpu / 1e9,
            "wall_longest": self.longest_wall / 1e9,
            "cpu_over": self.long_cpu,
            "wall_over": self.long_wall,
        }


TURNS = Turns()


class TimedEpoll:
    """select.epoll, which has no subclasses, with a look at the clocks before and after each poll."""

    make = select.epoll

    def __init__(self) -> None:
        self._epoll = self.make()
        self._began: tuple[int, int] | None = None  # None in a turn that is left out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def register(self, *arguments: Any) -> None:
        """The same: a connection begins."""
        self._began = None
        self._epoll.register(*arguments)

    def poll(self, *arguments: Any) -> list[tuple[int, int]]:
        """The same, and the end of one turn and the beginning of the next."""
        cpu, wall = thread_time_ns(), monotonic_ns()
        if self._began:
            TURNS.note(cpu - self._began[0], wall - self._began[1])
        events = self._epoll.poll(*arguments)
        ends = any(event & ENDS for _, event in events)
        self._began = None if ends else (thread_time_ns(), monotonic_ns())
        return events


def hand_out(path: Path) -> None:
    """Write down what is known, whole at once, and begin anew."""
    global TURNS
    found, TURNS = TURNS, Turns()
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found.figures()))
    os.replace(new, path)


def main(path: Path, arguments: Sequence[str]) -> int:
    """Run rspd with these arguments. Returns its exit code."""
    signal.signal(signal.SIGUSR1, lambda *_: hand_out(path))
    select.epoll = TimedEpoll  # type: ignore[assignment,misc]
    from rspd.cli import main as rspd

    return rspd(list(arguments))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
