"""This process: which one it is, and what has become of it so far."""

from __future__ import annotations

import os
import resource
import time
from itertools import count

from rspd.engine.loop import Loop
from rspd.engine.side import Handed
from rspd.histogram import Counts, Histogram
from rspd.serving.connection import Connection
from rspd.snapshot import TURN_BOUNDS, Distribution, Process

# Where a process sees its descriptors. From Linux 6.2 on, the size of the folder is their number.
DESCRIPTORS = "/proc/self/fd"

# How many descriptors are counted in one turn of the loop.
SLICE = 500


class Life:
    """What is known of this process, and of those that it has taken over from.

    reloads, reloads_failed, handovers: how many so far. failure: why the file is not in force; empty if it is.
    ending: whether it drains.
    """

    def __init__(self, loop: Loop, version: str, worker: str) -> None:
        self._loop = loop
        self._version = version
        self._worker = worker
        self._origin = self._lineage = os.urandom(4).hex()
        self._numbers = count(1)
        self._began = self._service_began = loop.now
        self.reloads = self.reloads_failed = self.handovers = 0
        self.failure = ""
        self.ending = False
        self._turns = Histogram(TURN_BOUNDS)  # how long the loop's turns took, here and in the processes before
        self._new_turns: list[float] = []  # those that have not been counted
        self._measures_turns = False

    def id_of(self, connection: Connection) -> str:
        """The id of a connection, which no other has in any process. It gets one when somebody asks first."""
        if not hasattr(connection, "id"):
            connection.id = f"{self._origin}-{next(self._numbers)}"
        return connection.id

    def measure_turns(self) -> None:
        """Measure how long each turn of the loop takes, from its next turn on."""
        if not self._measures_turns:
            self._measures_turns = True
            self._loop.measure_turns(self._new_turns, self._settle)

    def _settle(self) -> None:
        self._turns.note_all(sorted(self._new_turns))
        self._new_turns.clear()

    async def snapshot(self) -> Process:
        """What is."""
        self._settle()
        now = self._loop.now
        return Process(
            version=self._version,
            pid=os.getpid(),
            worker=self._worker,
            origin=self._origin,
            lineage=self._lineage,
            now=time.time(),
            age=now - self._began,
            service_age=now - self._service_began,
            failure=self.failure,
            reloads=self.reloads,
            reloads_failed=self.reloads_failed,
            handovers=self.handovers,
            ending=self.ending,
            descriptors=await self._descriptors(),
            descriptors_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            turns=self._turns.snapshot() if self._measures_turns else Distribution(),
        )

    async def _descriptors(self) -> int:
        try:
            number = os.stat(DESCRIPTORS).st_size
            if number:
                return number
            with os.scandir(DESCRIPTORS) as entries:
                for number, _ in enumerate(entries):  # one of them is that of the look
                    if not number % SLICE:
                        await self._loop.yield_turn()
        except OSError:
            return 0  # not known
        return number

    # Handover

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process."""
        self._settle()
        return {
            "lineage": self._lineage,
            "service_began": self._service_began,
            "reloads": self.reloads,
            "reloads_failed": self.reloads_failed,
            "handovers": self.handovers + 1,
            "turns": self._turns.hand_over(),
        }

    def resume(self, handed: Handed) -> None:
        """Go on with what has become of the process before. Turns may be measured by now, or later."""
        counts = Counts(handed, "the process")
        self._lineage = counts.one("lineage", str, self._lineage)
        self._service_began = counts.one("service_began", float, self._service_began)
        self.reloads += counts.one("reloads", int, 0)
        self.reloads_failed += counts.one("reloads_failed", int, 0)
        self.handovers = counts.one("handovers", int, 1)
        counts.durations("turns", self._turns)
