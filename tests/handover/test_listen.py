"""A `listen` that has changed at a restart."""

from __future__ import annotations

import pytest

from tests.handover.talks import CONTROL, Talks, served, stored, talk
from tests.support import eventually, is_reset
from tests.system.machine import Machine
from tests.system.traffic import connect

SERIAL = "listen: [{}]\nbackend: 127.0.0.1:8000\n"


def listening(machine: Machine) -> set[str]:
    """Where TCP is listened on near these ports, but for the backend's."""
    lines = machine.run("ss", "-Hltn").stdout.splitlines()
    return {line.split()[3] for line in lines} & {f"127.0.0.1:{port}" for port in range(8080, 8090)}


def test_who_waits_in_a_backlog_stays_in_it_where_the_address_stays(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", SERIAL.format("'127.0.0.1:8080', '127.0.0.1:8081'"))
    machine.systemctl("start", "rspd")
    assert stored(machine) == CONTROL + 2
    with Talks(1) as talks, connect(8080) as waits, connect(8081) as waits_in_vain:
        waits.sendall(b"waiting")
        machine.write("/etc/rspd.yaml", SERIAL.format("'127.0.0.1:8082', '127.0.0.1:8080'"))
        machine.systemctl("restart", "rspd")
        talks.talk()
        assert is_reset(waits_in_vain)
        with pytest.raises(ConnectionRefusedError):
            connect(8081)
        assert listening(machine) == {"127.0.0.1:8080", "127.0.0.1:8082"}
        eventually(lambda: stored(machine) == CONTROL + 2, "the store has the listeners alone")

        talks.end()
        assert waits.recv(100) == b"waiting"
        talk(waits)
    served_by_all(machine, 8080, 8082)


def served_by_all(machine: Machine, *ports: int) -> None:
    """Each of these is served, one after the other, in the next process too."""
    with Talks(0):
        for port in ports:
            served(port)
        machine.systemctl("restart", "rspd")
        for port in ports:
            served(port)


def test_a_reload_and_then_a_restart_listen_where_the_file_says(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", SERIAL.format("'127.0.0.1:8080'"))
    machine.systemctl("start", "rspd")
    machine.write("/etc/rspd.yaml", SERIAL.format("'127.0.0.1:8080', '127.0.0.1:8083'"))
    machine.systemctl("reload", "rspd")
    eventually(lambda: stored(machine) == CONTROL + 2, "the new listener is kept")
    machine.write("/etc/rspd.yaml", SERIAL.format("'127.0.0.1:8083'"))
    machine.systemctl("reload", "rspd")
    eventually(lambda: stored(machine) == CONTROL + 1, "the one that is given up is not kept")
    with pytest.raises(ConnectionRefusedError):
        connect(8080)
    served_by_all(machine, 8083)
    assert listening(machine) == {"127.0.0.1:8083"}


def test_from_its_own_listener_to_a_socket_unit_and_back(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", SERIAL.format("'127.0.0.1:8080'"))
    machine.systemctl("start", "rspd")
    assert stored(machine) == CONTROL + 1
    machine.systemctl("stop", "rspd")
    assert stored(machine) == 0
    machine.systemctl("start", "rspd.socket", "rspd")
    served_by_all(machine, 8080)
    assert stored(machine) == CONTROL
    machine.systemctl("stop", "rspd.socket", "rspd")
    machine.systemctl("start", "rspd")
    served_by_all(machine, 8080)
    assert stored(machine) == CONTROL + 1
