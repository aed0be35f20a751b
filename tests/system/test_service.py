"""rspd.service: start, stop, and what it may do."""

from __future__ import annotations

import signal
import socket
import time

import pytest

from tests.support import Backend, answer, eventually
from tests.system.machine import Machine
from tests.system.traffic import CONFIGURATION, Download, ask, ask_on, connect, saying

PORT_IN_USE = "127.0.0.1:8080: Address already in use"


def status(machine: Machine) -> str:
    """What `systemctl status rspd` shows."""
    return machine.systemctl("status", "rspd", check=False).stdout


def test_start_returns_when_the_port_accepts_and_not_before(machine: Machine) -> None:
    for _ in range(5):
        machine.systemctl("start", "rspd")
        connect().close()
        machine.systemctl("stop", "rspd")


def test_the_service_relays(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    with Backend(answer, port=8000):
        assert ask() == b"ok"


def test_status_says_what_it_is_doing(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    assert 'Status: "serving 0 of 1, 0 served, backend 127.0.0.1:8000"' in status(machine)
    with Download() as download:
        eventually(lambda: machine.show("StatusText").startswith("serving 1 of 1, "))
        download.go_on()
        assert download.end() == "complete"
    eventually(lambda: machine.show("StatusText").startswith("serving 0 of 1, 1 served"))


def test_it_runs_as_a_user_who_may_bind_low_ports_and_nothing_else(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    text = machine.run("cat", f"/proc/{machine.pid()}/status").stdout
    found = {name: value.split() for name, _, value in (line.partition(":") for line in text.splitlines())}
    user = machine.run("id", "-u", "rspd").stdout.strip()
    assert found["Uid"] == [user] * 4
    assert user != "0"
    assert [found[name] for name in ("CapEff", "CapPrm", "CapBnd")] == [["0000000000000400"]] * 3
    assert found["Seccomp"] == ["2"]
    assert found["NoNewPrivs"] == ["1"]


def test_port_80_is_bound_by_the_unprivileged_user(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION.replace(":8080", ":80"))
    machine.systemctl("start", "rspd")
    with Backend(answer, port=8000):
        assert ask(80) == b"ok"
    assert machine.shell(f"stat -c %U /proc/{machine.pid()}").stdout.strip() == "rspd"


def test_a_port_in_use_fails_the_start_with_the_reason_and_is_taken_when_it_becomes_free(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 8080)):
        assert machine.systemctl("start", "rspd", check=False).returncode == 1
        assert machine.log(PORT_IN_USE)
        assert [entry for entry in machine.journal() if "status=69" in entry["MESSAGE"]]
        eventually(lambda: PORT_IN_USE in status(machine), "the next start waits")
    eventually(lambda: machine.show("ActiveState") == "active", "it is started again")


@pytest.mark.parametrize("unit", ["rspd", "rspd@one"])
def test_a_port_in_use_is_waited_for_by_each_start_for_five_seconds(machine: Machine, unit: str) -> None:
    machine.write("/etc/rspd/one.yaml", CONFIGURATION)
    with socket.create_server(("127.0.0.1", 8080)):
        began = time.monotonic()
        machine.systemctl("start", "--no-block", unit)
        eventually(lambda: machine.show("NRestarts", unit) == "2", "it is tried again", patience=60)
        assert time.monotonic() - began >= 10
        name = f"{unit}.service"
        told = [entry for entry in machine.journal() if name in (entry.get("UNIT"), entry.get("_SYSTEMD_UNIT"))]
        assert len(told) <= 3 * 8
    machine.systemctl("stop", unit)


def test_while_it_waits_for_a_port_it_can_be_stopped_and_started(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 8080)):
        machine.systemctl("start", "--no-block", "rspd")
        eventually(lambda: PORT_IN_USE in machine.show("StatusText"), "it waits")
        machine.systemctl("stop", "rspd")
        assert machine.show("ActiveState") == "inactive", "for good"
        assert machine.show("NRestarts") == "0"
        machine.systemctl("start", "--no-block", "rspd")
        eventually(lambda: PORT_IN_USE in machine.show("StatusText"), "it waits")
    machine.systemctl("start", "rspd")  # joins the one that waits
    assert machine.show("NRestarts") == "0"
    with Backend(answer, port=8000):
        assert ask() == b"ok"


def test_a_start_that_fails_for_long_is_given_up(machine: Machine) -> None:
    machine.drop_in("rspd.service", "[Unit]\nStartLimitBurst=3\n[Service]\nExecStart=\nExecStart=/bin/false")
    machine.systemctl("start", "rspd", check=False)
    eventually(lambda: machine.show("ActiveState") == "failed", "it is given up")
    assert machine.show("NRestarts") == "3"


@pytest.mark.parametrize("text", ["listen: 99999\nbackend: 127.0.0.1:8000\n", "listen: [\n", ""])
def test_a_wrong_configuration_fails_the_start_with_78_and_without_another_try(machine: Machine, text: str) -> None:
    machine.write("/etc/rspd.yaml", text)
    assert machine.systemctl("start", "rspd", check=False).returncode == 1
    assert machine.show("ExecMainStatus") == "78"
    assert machine.show("ActiveState") == "failed"
    assert machine.show("NRestarts") == "0"
    assert "/etc/rspd.yaml" in status(machine)
    assert machine.log("/etc/rspd.yaml"), machine.log()


def test_stop_succeeds(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    machine.systemctl("stop", "rspd")
    assert machine.show("Result") == "success"
    assert machine.show("ExecMainStatus") == "0"
    assert machine.show("ActiveState") == "inactive"


def test_stop_lets_a_download_finish_within_drain_timeout(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    with Download() as download:
        machine.systemctl("stop", "--no-block", "rspd")
        eventually(lambda: machine.log("ending connections=1 drain_timeout=30"))
        with pytest.raises(ConnectionRefusedError):
            connect()
        download.go_on()
        assert download.end() == "complete"
        eventually(lambda: machine.show("ActiveState") == "inactive")
    assert machine.show("Result") == "success"


def test_stop_aborts_a_download_after_drain_timeout(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION + "drain_timeout: 1s\n")
    machine.systemctl("start", "rspd")
    with Download() as download:
        began = time.monotonic()
        machine.systemctl("stop", "rspd")
        assert 0.9 < time.monotonic() - began < 5
        assert download.end().startswith("ConnectionResetError")
    assert machine.show("Result") == "success"
    assert machine.log("cause=drain-timeout")


def test_a_drain_timeout_beyond_the_units_own_is_honoured(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION + "drain_timeout: 20s\n")
    machine.drop_in("rspd.service", "[Service]\nTimeoutStopSec=1s")
    machine.systemctl("start", "rspd")
    with Download() as download:
        machine.systemctl("stop", "--no-block", "rspd")
        eventually(lambda: machine.log("ending connections=1"))
        # No condition to wait for: nothing must happen, for three times the unit's own time.
        time.sleep(3)
        download.go_on()
        assert download.end() == "complete"
        eventually(lambda: machine.show("ActiveState") == "inactive")
    assert machine.show("Result") == "success"


def test_killed_it_serves_again_in_under_two_seconds(machine: Machine) -> None:
    def is_back() -> bool:
        try:
            return ask() == b"ok"
        except OSError:
            return False

    def kill() -> float:
        machine.systemctl("kill", "--signal=KILL", "rspd")
        began = time.monotonic()
        eventually(is_back)
        return time.monotonic() - began

    machine.systemctl("start", "rspd")
    with Backend(answer, port=8000):
        assert min(kill() for _ in range(3)) < 2  # the host may stand still meanwhile
    assert machine.show("NRestarts") == "3"


def test_two_instances_serve_at_once_each_by_its_own_file(machine: Machine) -> None:
    for name, port in ("one", 8081), ("two", 8082):
        text = f"listen: [127.0.0.1:{port}, /run/rspd-{name}/web]\nbackend: 127.0.0.1:{port + 1000}\n"
        machine.write(f"/etc/rspd/{name}.yaml", text)
    machine.systemctl("start", "rspd@one", "rspd@two")
    with Backend(saying(b"1"), port=9081), Backend(saying(b"2"), port=9082):
        assert [ask(8081), ask(8082)] == [b"1", b"2"]
        for name, said in ("one", b"1"), ("two", b"2"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(machine.path(f"/run/rspd-{name}/web")))
                assert ask_on(client) == said
        machine.systemctl("stop", "rspd@one")
        assert ask(8082) == b"2"


def test_a_unit_of_ones_own_is_not_left_by_its_process(machine: Machine) -> None:
    machine.run("systemd-run", "--quiet", "--unit=rspd-own", "rspd", "-l", "127.0.0.1:8083", "-b", "127.0.0.1:8000")
    with Backend(answer, port=8000):
        eventually(lambda: machine.log("listening address=127.0.0.1:8083"))
        assert ask(8083) == b"ok"
    assert machine.show("ActiveState", "rspd-own") == "active"
    assert machine.run("cat", f"/proc/{machine.pid('rspd-own')}/comm").stdout.strip() == "rspd"


def test_a_second_signal_ends_it_at_once(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    with Download() as download:
        machine.systemctl("stop", "--no-block", "rspd")
        eventually(lambda: machine.log("ending connections=1"))
        machine.systemctl("kill", f"--signal={signal.SIGTERM.name}", "rspd")
        assert download.end().startswith("ConnectionResetError")
        eventually(lambda: machine.show("ActiveState") == "inactive")
    assert machine.show("Result") == "success"
