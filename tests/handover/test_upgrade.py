"""From 0.2.0, which hands nothing over, and back to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.handover.talks import CONTROL, MANY, Talks, handovers, left_open, served, stored, talk
from tests.support import eventually, is_reset
from tests.system.machine import Machine


def version(machine: Machine) -> str:
    """Which version is installed."""
    return machine.run("dpkg-query", "-W", "-f", "${Version}", "rspd").stdout


@pytest.fixture
def old(machine: Machine, former: Path, deb: Path) -> Machine:
    """The file's machine with 0.2.0, running, with a second for connections to end."""
    install(machine, former, "--allow-downgrades")
    assert version(machine) == "0.2.0"
    machine.write("/etc/rspd.yaml", MANY)
    machine.systemctl("restart", "rspd")
    machine.mark()
    return machine


# The file is another one in 0.2.0, and the tests have changed it: dpkg would ask.
KEEP_FILE = ("-o", "Dpkg::Options::=--force-confold")


def install(machine: Machine, deb: Path, *options: str) -> None:
    """Install a package."""
    machine.install(deb, *KEEP_FILE, *options)


def begin(machine: Machine, deb: Path, *options: str) -> subprocess.Popen[bytes]:
    """Begin to install a package."""
    machine.path(f"/root/{deb.name}").write_bytes(deb.read_bytes())
    command = machine.command("apt-get", "install", "-y", *KEEP_FILE, *options, f"/root/{deb.name}")
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def done(process: subprocess.Popen[bytes]) -> None:
    """Wait until the installation is over."""
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said.decode()


def hands_over(machine: Machine) -> None:
    """The process that runs now hands its connections over."""
    with Talks(5) as talks:
        machine.systemctl("restart", "rspd")
        talks.talk()
        served()
        talks.end()
        eventually(lambda: handovers(machine).count(1) == 5)
    assert stored(machine) == CONTROL + 1


def test_an_upgrade_from_0_2_0_lets_connections_end_by_themselves(old: Machine, deb: Path) -> None:
    with Talks(2) as talks:
        before = old.pid()
        upgrade = begin(old, deb)
        eventually(lambda: old.log("^ending connections=2 drain_timeout=30"), "it drains, as before")
        talks.talk()
        assert old.pid() == before
        talks.end()
        done(upgrade)
    assert version(old) != "0.2.0"
    assert old.pid() != before
    assert handovers(old) == [0, 0]
    assert [entry["MESSAGE"] for entry in old.entries() if int(entry["PRIORITY"]) < 6] == []
    assert stored(old) == CONTROL + 1
    old.run("rspd", "status", "--check")  # it has a control socket now
    hands_over(old)


def test_an_upgrade_from_0_2_0_cuts_connections_after_drain_timeout(old: Machine, deb: Path) -> None:
    old.write("/etc/rspd.yaml", MANY + "drain_timeout: 1s\n")
    old.systemctl("restart", "rspd")
    with Talks(2) as talks:
        done(begin(old, deb))
        assert [is_reset(client) for client in talks.clients] == [True, True]
        served_after(old)
    assert len(old.log("^connection closed .* cause=drain-timeout")) == 2
    hands_over(old)


def served_after(machine: Machine) -> None:
    """The process that runs now serves, and systemd keeps its listeners alone."""
    served()
    assert stored(machine) == CONTROL + 1


def test_a_downgrade_to_0_2_0_starts_it_and_leaves_nothing_in_the_store(
    machine: Machine, deb: Path, former: Path
) -> None:
    install(machine, deb)
    machine.write("/etc/rspd.yaml", MANY + "drain_timeout: 1s\n")
    machine.systemctl("restart", "rspd")
    with Talks(2) as talks:
        machine.systemctl("restart", "rspd")
        talks.talk()
        before = machine.pid()
        done(begin(machine, former, "--allow-downgrades"))
        assert version(machine) == "0.2.0"
        assert machine.show("ActiveState") == "active"
        assert machine.pid() != before
        assert [is_reset(client) for client in talks.clients] == [True, True]
        while talks.clients:
            talks.clients.pop().close()
        served()
        assert stored(machine) == 0
        for _ in range(2):
            machine.systemctl("restart", "rspd")
            served()
    assert machine.show("NRestarts") == "0"
    eventually(lambda: left_open(machine) == [])


def test_up_and_down_and_up_again_ends_with_a_version_that_hands_over(old: Machine, deb: Path, former: Path) -> None:
    install(old, deb)
    install(old, former, "--allow-downgrades")
    install(old, deb)
    hands_over(old)
    with Talks(1) as talks:
        install(old, deb, "--reinstall")
        talk(talks.clients[0])
