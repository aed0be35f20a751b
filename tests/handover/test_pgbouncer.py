"""PgBouncer gave its handover up because it does not work well with systemd, among other reasons."""

from __future__ import annotations

from tests.handover.talks import CONTROL, MANY, Talks, served, stored
from tests.support import eventually
from tests.system.machine import Machine

RESTARTS = 3
NOTICE = 5  # the priority of what is worth a look


def processes(machine: Machine) -> list[int]:
    """The processes in the control group of the service."""
    group = machine.show("ControlGroup")
    script = f"cat /sys/fs/cgroup{group}/cgroup.procs"
    return [int(line) for line in machine.shell(script).stdout.split()]


def test_it_works_well_with_systemd(machine: Machine) -> None:
    """Seen from systemd, each restart is one: the service is a single process at any time, and systemd knows which."""
    machine.write("/etc/rspd.yaml", MANY)
    machine.drop_in("rspd.service", "[Service]\nWatchdogSec=4s\n")
    machine.systemctl("start", "rspd")
    with Talks(3) as talks:
        pids = [machine.pid()]
        for _ in range(RESTARTS):
            entered = machine.show("ActiveEnterTimestampMonotonic")
            machine.systemctl("restart", "rspd")
            # `systemctl restart` returns when the next process is at work, and nothing of the one before is there.
            pids.append(machine.pid())
            assert processes(machine) == [pids[-1]]
            assert [machine.show(name) for name in ("ActiveState", "SubState")] == ["active", "running"]
            assert [machine.show(name) for name in ("Result", "NRestarts")] == ["success", "0"]
            assert int(machine.show("ActiveEnterTimestampMonotonic")) > int(entered)
            assert machine.show("StatusText").endswith("; took over 3 connections")
            served()
            talks.talk()
            # Reloads and signs of life reach the process that has taken over.
            machine.systemctl("reload", "rspd")
            assert machine.pid() == pids[-1]
            seen = machine.show("WatchdogTimestampMonotonic")
            eventually(lambda seen=seen: machine.show("WatchdogTimestampMonotonic") != seen)  # type: ignore[misc]
            talks.talk()
        assert len(set(pids)) == RESTARTS + 1
        assert stored(machine) == CONTROL + 1
        talks.end()
    machine.systemctl("stop", "rspd")
    assert [machine.show(name) for name in ("ActiveState", "Result")] == ["inactive", "success"]
    about = [entry for entry in machine.journal() if "rspd.service" in (entry.get("UNIT"), entry.get("_SYSTEMD_UNIT"))]
    assert [entry["MESSAGE"] for entry in about if int(entry["PRIORITY"]) <= NOTICE] == []
