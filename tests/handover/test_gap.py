"""For how long a restart stops the bytes, and how long it takes."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from tests.handover.talks import CONTROL, stored
from tests.handover.traffic import Peers, Traffic, configuration, small_buffers
from tests.support import eventually
from tests.system.machine import Machine
from tests.system.traffic import CONFIGURATION

# The aim, in seconds for which no byte is relayed, by the number of connections: in the best of some restarts, since
# what else the host does only adds. More of them, as long as that is too much. A busy host gets more time.
AIMS = {100: 0.2, 9000: 0.35}
BUSY = 2.5
RESTARTS, RESTARTS_MAX = 3, 8

PINGS = 2

# What else the host does makes any of the ways slower: more rounds, as long as that is too much.
ROUNDS, ROUNDS_MAX, IN_A_ROW = 5, 20, 3
SLOWER_AT_MOST = 0.05


def gap(pings: Peers, change: Callable[[], object]) -> float:
    """The longest time in seconds for which one of the clients hears nothing meanwhile."""
    pings.tell("mark")
    change()
    count = pings.tell("heard")
    eventually(lambda: min(pings.tell("heard")) > max(count) + 10, "all hear again")
    return float(max(pings.tell("longest")))


# What is logged, in this order, while rspd is restarted.
MOMENTS = ["Stopping ", "handing over ", "handed over ", "Stopped ", "Starting ", "took over ", "Started "]


def steps(machine: Machine) -> str:
    """How many milliseconds passed in each restart from one of MOMENTS to the next."""
    found: list[str] = []
    times: list[float] = []
    for entry in machine.journal():
        if entry["MESSAGE"].startswith(MOMENTS[len(times)]):
            times.append(float(entry["__REALTIME_TIMESTAMP"]) / 1000)
        if len(times) == len(MOMENTS):
            found.append("+".join(f"{later - sooner:.0f}" for sooner, later in pairwise(times)))
            times.clear()
    return " ".join(found)


@pytest.mark.parametrize("count", AIMS)
def test_a_restart_stops_the_bytes_for_a_moment_only(
    machine: Machine, record_property: Callable[[str, object], None], count: int
) -> None:
    small_buffers(machine)
    machine.drop_in("rspd.service", "[Service]\nLogRateLimitIntervalSec=0")
    machine.write("/etc/rspd.yaml", configuration({"quiet": 9000, "plain": PINGS}))
    machine.systemctl("start", "rspd")
    with Traffic({"quiet": count}, period=1.0) as traffic, Peers("pings") as pings:
        traffic.listen(also=["plain"])
        traffic.open()
        pings.tell("open", place=8081, count=PINGS)
        without = gap(pings, lambda: machine.systemctl("is-active", "rspd"))
        gaps: list[float] = []
        restarts: list[float] = []
        while len(gaps) < RESTARTS or (min(gaps) > AIMS[count] and len(gaps) < RESTARTS_MAX):
            began = time.monotonic()
            gaps.append(gap(pings, lambda: machine.systemctl("restart", "rspd")))
            restarts.append(time.monotonic() - began)
            assert f"; took over {count + PINGS:,} connections" in machine.show("StatusText")
            eventually(lambda: stored(machine) == CONTROL + 2, "the store has the listeners alone")
        traffic.finish()
    took = steps(machine)
    record_property(
        f"no byte with {count:,} connections on {machine.suite}",
        f"for {' '.join(f'{1000 * each:.0f}' for each in gaps)} ms, without a restart {1000 * without:.0f} ms; "
        f"the restarts took {' '.join(f'{1000 * each:.0f}' for each in restarts)} ms; from one to the next of "
        f"{', '.join(moment.strip() for moment in MOMENTS)}: {took} ms",
    )
    assert min(gaps) <= AIMS[count] * BUSY


def test_a_restart_without_connections_takes_hardly_longer_than_one_that_hands_nothing_over(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    ways = {
        "handing over": ("", ""),
        "handover: off": ("handover: off\n", ""),
        "handover: off, no ExecStop": ("handover: off\n", "[Service]\nExecStop="),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}

    def medians() -> list[float]:
        return [statistics.median(found) for found in seconds.values()]

    rounds = 0
    while rounds < ROUNDS or (medians()[0] - medians()[2] > SLOWER_AT_MOST and rounds < ROUNDS_MAX):
        rounds += 1
        for way, (more, drop_in) in ways.items():
            machine.systemctl("stop", "rspd")
            machine.write("/etc/rspd.yaml", CONFIGURATION + more)
            machine.drop_in("rspd.service", "[Unit]\nStartLimitIntervalSec=0\n" + drop_in)
            machine.systemctl("start", "rspd")
            for _ in range(IN_A_ROW):
                began = time.monotonic()
                machine.systemctl("restart", "rspd")
                seconds[way].append(time.monotonic() - began)
    now, off, before = medians()
    said = [f"{way} {1000 * statistics.median(found):.0f} ms" for way, found in seconds.items()]
    record_property(
        f"a restart without connections on {machine.suite}",
        f"{', '.join(said)} (medians of {rounds * IN_A_ROW}); ExecStop costs {1000 * (off - before):.0f} ms",
    )
    assert now - before <= SLOWER_AT_MOST * BUSY


def test_what_exec_stop_runs_alone_takes_a_moment(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    machine.systemctl("start", "rspd")
    before = machine.pid()
    text = machine.show("ExecStop")
    found = re.search(r"argv\[\]=/bin/sh -c (.*?) ; ignore_errors", text)
    assert found, text
    script = found[1].replace("$$", "$")
    seconds: list[float] = []
    nothing: list[float] = []
    for _ in range(2 * ROUNDS):
        for times, command in (seconds, f"MAINPID={before}; export MAINPID; {script}"), (nothing, ":"):
            began = time.monotonic()
            machine.shell(command, check=False)
            times.append(time.monotonic() - began)
    taken = statistics.median(seconds) - statistics.median(nothing)
    record_property(f"what ExecStop runs, alone, on {machine.suite}", f"{1000 * taken:.0f} ms")
    assert machine.pid() == before, "it stops nothing where no restart is under way"
    assert machine.show("ActiveState") == "active"
    assert machine.log("handing over") == []
