"""What the service costs: time until READY, memory at rest, disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import median

from tests.system.machine import Machine

ROUNDS = 9


def test_it_starts_nearly_as_fast_as_bare_python_and_is_small(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    # The same unit, with nothing but Python in it, is what to compare with.
    text = machine.run("systemctl", "cat", "rspd").stdout
    text = re.sub(r"(?m)^(ExecStart|Type|WatchdogSec|Restart|Exec\w+)=.*$", "", text)
    text += "\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/bin/python3 -c pass\n"
    machine.write("/etc/systemd/system/rspd-bare.service", text)
    machine.systemctl("daemon-reload")

    def seconds(unit: str, until: str) -> float:
        began, ended = (int(machine.show(name, unit)) for name in ("ExecMainStartTimestampMonotonic", until))
        return (ended - began) / 1e6

    bare, ready = [], []
    for _ in range(ROUNDS):
        machine.systemctl("restart", "rspd-bare")
        bare.append(seconds("rspd-bare", "ExecMainExitTimestampMonotonic"))
        machine.systemctl("start", "rspd")
        ready.append(seconds("rspd", "ActiveEnterTimestampMonotonic"))
        machine.systemctl("stop", "rspd")
    machine.systemctl("start", "rspd")
    status = machine.run("cat", f"/proc/{machine.pid()}/status").stdout
    memory = int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024
    size = machine.run("dpkg-query", "-W", "-f", "${Installed-Size}", "rspd").stdout
    extra = median(ready) - median(bare)
    record_property(
        f"cost on {machine.suite}",
        f"READY after {median(ready) * 1000:.0f} ms, bare Python {median(bare) * 1000:.0f} ms (medians of {ROUNDS}); "
        f"memory at rest {memory:.1f} MiB; installed size {size} KiB",
    )
    assert extra < max(0.1, 2 * median(bare)), "0.1 s is the aim; on a busy machine all takes longer"
    assert memory < 20
