"""This process: which one it is, and what has become of it so far."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from itertools import count

from rspd.engine.loop import Loop
from rspd.engine.side import Handed
from rspd.histogram import Histogram
from rspd.serving.connection import Connection
from rspd.snapshot import TURN_BOUNDS, Distribution, Process

# Where a process sees its descriptors. From Linux 6.2 on, the size of the folder is their number.
DESCRIPTORS = "/proc/self/fd"

# How many descriptors are counted in one turn of the loop.
SLICE = 500


class Life:
    """What is known of this process, and of those that it has taken over from.

    reloads, reloads_failed, handovers: how many so far. failure: why the file is not in force; empty if it is.
    ending: whether it drains. turns: how long the loop's turns took, once they are measured.
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
        self.turns: Histogram | None = None
        self._turns: list[float] = []  # those that have not been counted
        self._turns_before: Sequence[object] | None = None  # what the process before has counted

    def id_of(self, connection: Connection) -> str:
        """The id of a connection, which no other has in any process. It gets one when somebody asks first."""
        if not hasattr(connection, "id"):
            connection.id = f"{self._origin}-{next(self._numbers)}"
        return connection.id

    def measure_turns(self) -> None:
        """Measure how long each turn of the loop takes, from its next turn on."""
        if not self.turns:
            self.turns = Histogram(TURN_BOUNDS)
            self.turns.resume(self._turns_before)
            self._loop.measure_turns(self._turns, self._settle)

    def _settle(self) -> None:
        if self.turns:
            self.turns.note_all(sorted(self._turns))
            self._turns.clear()

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
            turns=self.turns.snapshot() if self.turns else Distribution(),
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
            "turns": self.turns.hand_over() if self.turns else self._turns_before,
        }

    def resume(self, handed: Handed) -> None:
        """Go on with what has become of the process before. Turns may be measured by now, or later."""
        self._lineage = handed.get("lineage", self._lineage)
        self._service_began = handed.get("service_began", self._service_began)
        self.reloads += handed.get("reloads", 0)
        self.reloads_failed += handed.get("reloads_failed", 0)
        self.handovers = handed.get("handovers", 1)
        self._turns_before = handed.get("turns")
        if self.turns:
            self.turns.resume(self._turns_before)
