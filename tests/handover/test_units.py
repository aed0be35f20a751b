"""All units that the package has: each keeps its connections while it is restarted, by itself or with the others."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.handover.talks import CONTROL, MANY, Talks, fields, handovers, left_open, served, stored, talk
from tests.support import Backend, echo, eventually
from tests.system.machine import Machine

WORKERS = ["rspd-worker@1.service", "rspd-worker@2.service"]
SERVICES = ["rspd.service", *WORKERS]
SHARE = 16  # clients that each of the processes with the same socket takes
CLIENTS = 40  # so each has some


def connections_of(machine: Machine, begin: str) -> Counter[str]:
    """By the service, the connections that its lines with this beginning name."""
    found = Counter[str]()
    for entry in machine.entries():
        if entry["MESSAGE"].startswith(begin):
            found[entry["_SYSTEMD_UNIT"]] += int(fields(entry["MESSAGE"])["connections"])
    return found


def test_the_service_keeps_its_connections_through_restarts(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", MANY)
    machine.systemctl("start", "rspd")
    with Talks(20) as talks:
        for _ in range(3):
            before = machine.pid()
            machine.systemctl("restart", "rspd")
            assert machine.pid() != before
            assert "took over 20 connections" in machine.show("StatusText")
            assert machine.show("ExecMainStatus") == "0"
            assert stored(machine) == CONTROL + 1
            talks.talk()
            served()
        talks.end()
        eventually(lambda: len(handovers(machine)) == 23, "all are logged")
        assert sorted(handovers(machine)) == [0] * 3 + [3] * 20
    assert machine.log("^handing over connections=") == ["handing over connections=20"] * 3
    assert [line.split(" served=")[0] for line in machine.log("^handed over")] == ["handed over connections=20"] * 3
    assert machine.log("^took over connections=") == ["took over connections=20"] * 3
    assert [entry["MESSAGE"] for entry in machine.entries() if int(entry["PRIORITY"]) < 6] == []


def test_an_instance_keeps_its_connections_through_a_restart(machine: Machine) -> None:
    machine.write("/etc/rspd/one.yaml", MANY.replace(":8080", ":8081"))
    machine.systemctl("start", "rspd@one")
    with Talks(20, 8081) as talks:
        assert stored(machine, "rspd@one") == CONTROL + 1
        machine.systemctl("restart", "rspd@one")
        talks.talk()
        served(8081)
        assert "took over 20 connections" in machine.show("StatusText", "rspd@one")
        talks.end()
        assert stored(machine, "rspd@one") == CONTROL + 1
    eventually(lambda: sorted(handovers(machine)) == [0] + [1] * 20)


def test_with_its_socket_the_service_keeps_its_connections(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", MANY)
    machine.systemctl("start", "rspd.socket")
    with Talks(20) as talks:
        for _ in range(2):
            machine.systemctl("restart", "rspd")
            talks.talk()
            served()
        assert stored(machine) == CONTROL, "the listener is the socket unit's"
        assert len(machine.log("^listening address=127.0.0.1:8080 socket=")) == 3
        talks.end()
    eventually(lambda: sorted(handovers(machine)) == [0] * 2 + [2] * 20)


def test_an_instance_keeps_the_clients_of_its_unix_socket(machine: Machine) -> None:
    machine.write("/etc/rspd/one.yaml", "backend: 127.0.0.1:8000\nmax_connections: 100\n")
    machine.systemctl("start", "rspd@one.socket")
    with Backend(echo, port=8000), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(machine.path("/run/rspd-one.sock")))
        talk(client)
        machine.systemctl("restart", "rspd@one")
        talk(client)
        assert "; took over 1 connection" in machine.show("StatusText", "rspd@one")


def test_a_unix_socket_of_its_own_stays_and_so_do_its_clients(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", MANY.replace("127.0.0.1:8080", "/run/rspd/own.sock"))
    machine.systemctl("start", "rspd")
    path = machine.path("/run/rspd/own.sock")
    with Backend(echo, port=8000), socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for client in first, second:
            client.settimeout(20)
        first.connect(str(path))
        talk(first)
        before = path.stat().st_ino
        machine.systemctl("restart", "rspd")
        assert path.stat().st_ino == before
        talk(first)
        second.connect(str(path))
        talk(second)
    machine.systemctl("stop", "rspd")
    assert not path.exists()


@pytest.fixture
def all_units(machine: Machine) -> Iterator[Machine]:
    """The file's machine with three processes on rspd.socket, and an instance."""
    machine.write("/etc/rspd.yaml", MANY.replace("100", str(SHARE)))
    machine.write("/etc/rspd/one.yaml", MANY.replace(":8080", ":8081"))
    machine.systemctl("enable", "--quiet", *WORKERS)
    machine.systemctl("start", "rspd", "rspd@one")
    eventually(lambda: [machine.show("ActiveState", unit) for unit in SERVICES] == ["active"] * len(SERVICES))
    yield machine
    machine.systemctl("disable", "--quiet", *WORKERS)


def test_all_units_restarted_by_one_command_keep_all_connections(all_units: Machine) -> None:
    machine = all_units
    units = [*SERVICES, "rspd@one.service"]
    with Talks(CLIENTS) as talks:
        talks.add(CLIENTS, 8081)
        before = [machine.pid(unit) for unit in units]
        for _ in range(2):
            machine.systemctl("restart", "rspd", "rspd-worker@*", "rspd@one")
            talks.talk()
            served(8080)
            served(8081)
        assert not set(before) & {machine.pid(unit) for unit in units}
        talks.end()
        eventually(lambda: len(handovers(machine)) == 2 * CLIENTS + 4)
        assert sorted(handovers(machine)) == [0] * 4 + [2] * 2 * CLIENTS
    given, taken = connections_of(machine, "handed over "), connections_of(machine, "took over ")
    assert set(given) == set(units), "each has handed over some"
    assert given == taken, "each has taken its own"
    assert sum(taken.values()) == 4 * CLIENTS
    assert [stored(machine, unit) for unit in units] == [CONTROL, CONTROL, CONTROL, CONTROL + 1]
    eventually(lambda: left_open(machine) == [])


def test_after_a_handover_it_may_do_no_more_than_before(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", MANY)

    def rights() -> dict[str, str]:
        text = machine.run("cat", f"/proc/{machine.pid()}/status").stdout
        names = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
        return {
            name: value.strip() for name, _, value in (x.partition(":") for x in text.splitlines()) if name in names
        }

    machine.systemctl("start", "rspd")
    before = rights()
    with Talks(3) as talks:
        machine.systemctl("restart", "rspd")
        talks.talk()
        assert rights() == before
    assert (before["CapEff"], before["CapBnd"]) == ("0000000000000400",) * 2
    assert (before["NoNewPrivs"], before["Seccomp"]) == ("1", "2")
