"""Restarts, an upgrade and a downgrade under load: nobody is refused, nobody is cut, and no byte is lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.handover.talks import CONTROL, stored
from tests.handover.traffic import (
    SETTLED,
    Ended,
    Peers,
    Traffic,
    configuration,
    held_back,
    log_of,
    memory_of_tcp,
    pipes,
    small_buffers,
)
from tests.support import eventually
from tests.system.machine import Machine

COUNTS = {
    "plain": 1000,
    "splice": 1000,
    "held": 1000,
    "half": 1000,
    "slow": 1000,
    "from-unix": 700,
    "from-unix-bulk": 300,
    "to-unix": 700,
    "to-unix-bulk": 300,
}
TO_KEEP = ["plain", "splice", "held", "half", "slow", "from-unix", "to-unix"]
PLACES = {**{name: sum(COUNTS.get(kind, 0) for kind in (name, f"{name}-bulk")) for name in TO_KEEP}, "short": 500}
RESTARTS = 10


def test_ten_restarts_an_upgrade_and_a_downgrade_refuse_nobody_and_lose_nothing(
    machine: Machine, deb: Path, newer: Path, record_property: Callable[[str, object], None]
) -> None:
    small_buffers(machine)
    machine.drop_in("rspd.service", "[Service]\nLogRateLimitIntervalSec=0")
    machine.write("/etc/rspd.yaml", configuration(PLACES))
    machine.systemctl("start", "rspd")
    assert stored(machine) == CONTROL + len(PLACES)
    root = f"/proc/{machine.leader}/root"
    with Traffic(COUNTS, root) as traffic, Peers("arrivals", 1 / 200) as arrivals:
        traffic.listen(also=["short"])
        traffic.mark()
        traffic.open()
        arrivals.tell("start", place=8089)
        eventually(lambda: all_are_full(machine), "readers rest, and rspd holds bytes for nearly all of them", SETTLED)
        eventually(lambda: pipes(machine) >= 8, "there are bytes in pipes")
        traffic.move()

        seconds: list[float] = []
        texts: list[str] = []

        def go_through(change: Callable[[], object]) -> None:
            """Let rspd be replaced by another process, and each connection move bytes in that one."""
            traffic.mark()
            before, began = machine.pid(), time.monotonic()
            change()
            seconds.append(time.monotonic() - began)
            assert machine.pid() != before
            texts.append(machine.show("StatusText"))
            assert traffic.lost() == []
            traffic.move()
            eventually(lambda: stored(machine) == CONTROL + len(PLACES), "the store has the listeners alone")

        for number in range(RESTARTS):
            go_through(lambda: machine.systemctl("restart", "rspd"))
            if number == RESTARTS // 2:
                machine.systemctl("reload", "rspd")
        go_through(lambda: machine.install(newer))
        assert machine.run("dpkg-query", "-W", "-f", "${Version}", "rspd").stdout.startswith("9")
        go_through(lambda: machine.install(deb, "--allow-downgrades"))

        arrivals.tell("stop")
        eventually(lambda: not arrivals.tell("state")["open"], "all short connections end")
        came = arrivals.tell("state")
        memory = memory_of_tcp()
        ended = traffic.finish()
    changes = RESTARTS + 2
    record_property(
        f"under load on {machine.suite}",
        f"restarts took {min(seconds[:RESTARTS]):.2f} to {max(seconds[:RESTARTS]):.2f} s, upgrade and downgrade "
        f"{seconds[-2]:.2f} and {seconds[-1]:.2f} s; {came['ends']} short connections, the slowest took "
        f"{came['slowest']:.2f} s; {sum(end.sent + end.received for end in ended) / 1e9:.1f} GB in the others; "
        f"TCP has {memory >> 20} MiB",
    )
    assert came["ends"].keys() == {"ok"}
    assert came["ends"]["ok"] > 100 * sum(seconds), "200 come each second, or most of them on a busy host"
    assert [text for text in texts if "; took over 7," not in text] == []
    assert stored(machine) == CONTROL + len(PLACES)
    check_log(machine, changes, 1, ended, came["ends"]["ok"])


def all_are_full(machine: Machine) -> bool:
    """Whether nearly all connections of each kind with a slow reader are full."""
    full = held_back(machine)
    return all(full[kind] > 0.9 * COUNTS[kind] for kind in ("splice", "held", "slow"))


def check_log(machine: Machine, changes: int, reloads: int, ended: list[Ended], short: int) -> None:
    """The log has one line for each connection, with all its bytes, and no warning."""
    lines, taken = log_of(machine, changes, reloads, ended, short)
    assert [count for count in taken if count < sum(COUNTS.values())] == []
    assert Counter(line.get("handovers", "0") for line in lines) == {str(changes): len(ended)}
    assert {line["cause"] for line in lines} == {"client-closed"}
