"""Idle exits under socket activation, many of them: nobody is lost, whenever they come."""

from __future__ import annotations

import threading
import time

from tests.support import Backend, answer, eventually
from tests.system.machine import Machine
from tests.system.traffic import ask

ROUNDS = 100
IDLE = 1.0  # seconds; each activation is a start, and the units allow 70 in a minute


def test_a_hundred_idle_exits_in_a_row_and_every_request_is_answered(machine: Machine) -> None:
    for name, port in ("one", 8081), ("two", 8082):
        machine.write(f"/etc/rspd/{name}.yaml", f"backend: 127.0.0.1:8000\nexit_idle_time: {IDLE}\n")
        machine.drop_in(f"rspd@{name}.socket", f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}")
        machine.systemctl("start", f"rspd@{name}.socket")
    ends = []

    def ask_as_it_is_about_to_exit() -> None:
        """Ask from before rspd's last look at the listener until after systemd has seen its exit."""
        for number in range(ROUNDS):
            ends.append(_ask(8082))
            time.sleep(IDLE + (number * 7 % 50 - 10) / 1000)

    other = threading.Thread(target=ask_as_it_is_about_to_exit)
    with Backend(answer, port=8000) as backend:
        other.start()
        processes = machine.path("/sys/fs/cgroup/system.slice/system-rspd.slice/rspd@one.service")
        for _ in range(ROUNDS):
            ends.append(_ask(8081))
            eventually(lambda: not processes.exists(), "it exits")
        other.join()
        assert set(ends) == {"ok"}
        assert backend.accepted == len(ends) == 2 * ROUNDS

    exits = [entry["_SYSTEMD_UNIT"] for entry in machine.entries() if entry["MESSAGE"] == "idle seconds=1"]
    assert exits.count("rspd@one.service") == ROUNDS
    assert exits.count("rspd@two.service") > ROUNDS / 4
    for name in "one", "two":
        assert machine.show("ActiveState", f"rspd@{name}.socket") == "active"
    assert not [entry for entry in machine.entries() if int(entry["PRIORITY"]) < 5]


def _ask(port: int) -> str:
    try:
        return ask(port).decode()
    except OSError as error:
        return repr(error)
