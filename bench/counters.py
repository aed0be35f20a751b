"""CPU time and memory of processes, read from the kernel."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")


def tree(process: int) -> list[int]:
    """A process and all its living descendants."""
    found = [process]
    try:
        for task in os.listdir(f"/proc/{process}/task"):
            for child in Path(f"/proc/{process}/task/{task}/children").read_text().split():
                found += tree(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended meanwhile
    return found


def sessions(leaders: Container[int]) -> dict[int, int]:
    """The living processes of sessions (setsid(2)), also those whose parent has ended; the leader of each."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, _, _, leader = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile
            if state != "Z" and int(leader) in leaders:
                found[int(entry)] = int(leader)
    return found


def cpu_seconds(processes: Iterable[int]) -> float:
    """CPU seconds of processes, their threads and their descendants, the ended and reaped ones included.

    A living process is counted to the nanosecond, its ended threads included (clock_getcpuclockid(3)); the reaped
    children of each, all together, to two ticks (proc(5), cutime and cstime). One that ends while this counts is
    counted by its parent, or not: count when it is quiet.
    """
    total = 0.0
    for process in processes:
        for one in tree(process):
            try:
                total += time.clock_gettime(~one << 3 | 2)
                fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[13]) + int(fields[14])) * TICK
            except OSError:
                pass  # it has ended meanwhile
    return total


def settled(read: Callable[[], float], patience: float = 5.0) -> float:
    """CPU seconds once they no longer grow: what is left to do after a load has ended is counted with it."""
    deadline = time.monotonic() + patience
    before = read()
    while True:
        time.sleep(0.015)
        after = read()
        if abs(after - before) < 50e-6 or time.monotonic() > deadline:
            return after
        before = after


def memory(processes: Iterable[int], kind: str = "Pss") -> int:
    """Bytes of memory of processes and their descendants (proc(5), smaps_rollup).

    Pss shares a page out among those who have it mapped; Rss counts it for each of them.
    """
    total = 0
    for one in {one for process in processes for one in tree(process)}:
        try:
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(size) * 1024 for size in re.findall(rf"^{kind}:\s+(\d+) kB", rollup, re.MULTILINE))
    return total
