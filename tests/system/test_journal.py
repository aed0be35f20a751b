"""What the journal has of rspd: the right priorities, tracebacks whole, nothing twice."""

from __future__ import annotations

from collections import Counter

from tests.support import Backend, answer, eventually, receive_all
from tests.system.machine import Machine
from tests.system.traffic import CONFIGURATION, ask, connect

INFO, WARNING, ERROR = "6", "4", "3"

# The first connection meets an error that nobody expects.
FAULT = """
import rspd.balancing.pool
dial = rspd.balancing.pool.Pool.dial
connections = []
def fail_once(*arguments):
    connections.append(arguments)
    if len(connections) == 1:
        raise RuntimeError("provoked\\nin two lines")
    return dial(*arguments)
rspd.balancing.pool.Pool.dial = fail_once
"""

# rspd fails before it has begun.
EARLY_FAULT = """
import rspd.running.service
def fail(*_, **__):
    raise RuntimeError("provoked early")
rspd.running.service.Service.run = fail
"""


def provoke(machine: Machine, fault: str) -> None:
    """Make rspd fail inside."""
    machine.write("/opt/fault/sitecustomize.py", fault)
    machine.drop_in("rspd.service", "[Service]\nEnvironment=PYTHONPATH=/opt/fault PYTHONDONTWRITEBYTECODE=1")


def priorities(machine: Machine, pattern: str) -> set[str]:
    """The priorities of what matches."""
    return {entry["PRIORITY"] for entry in machine.entries() if entry["MESSAGE"].startswith(pattern)}


def test_every_line_has_the_priority_of_what_it_says_and_stands_there_once(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION)
    machine.systemctl("start", "rspd")
    with Backend(answer, port=8000):
        for _ in range(20):
            assert ask() == b"ok"
    connect().close()  # refused by the backend
    machine.systemctl("reload", "rspd")
    eventually(lambda: machine.log("^reloaded"))
    machine.write("/etc/rspd.yaml", "nonsense")
    machine.systemctl("kill", "--signal=HUP", "rspd")
    eventually(lambda: machine.log("^reload failed"))
    machine.systemctl("stop", "rspd")

    entries = machine.entries()
    assert priorities(machine, "listening address=") == {INFO}
    assert {entry["PRIORITY"] for entry in entries if "cause=backend-closed" in entry["MESSAGE"]} == {INFO}
    assert {entry["PRIORITY"] for entry in entries if "cause=backend-refused" in entry["MESSAGE"]} == {WARNING}
    assert priorities(machine, "reloaded listen=") == {INFO}
    assert priorities(machine, "reload failed") == {ERROR}
    assert priorities(machine, "ending connections=0") == {INFO}
    assert priorities(machine, "ended served=21") == {INFO}
    assert len([entry for entry in entries if "connection closed" in entry["MESSAGE"]]) == 21

    assert max(Counter(entry["MESSAGE"] for entry in entries).values()) == 1
    assert not [entry for entry in entries if entry["MESSAGE"].startswith("<")]
    assert {entry["_SYSTEMD_UNIT"] for entry in entries} == {"rspd.service"}


def test_debug_lines_have_their_priority_too(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION + "log_level: debug\n")
    machine.systemctl("start", "rspd")
    with Backend(answer, port=8000):
        assert ask() == b"ok"
    assert eventually(lambda: priorities(machine, "connection opened")) == {"7"}


def test_a_traceback_is_whole_every_line_an_error_and_rspd_serves_on(machine: Machine) -> None:
    provoke(machine, FAULT)
    machine.systemctl("start", "rspd")
    pid = machine.pid()
    with Backend(answer, port=8000):
        with connect() as client:
            assert receive_all(client) == b""
        assert ask() == b"ok"
    errors = [entry["MESSAGE"] for entry in machine.entries() if entry["PRIORITY"] == ERROR]
    assert errors[0].startswith("unexpected error")
    assert errors[1] == "Traceback (most recent call last):"
    assert any("connection.py" in line for line in errors[2:-2])
    assert errors[-2:] == ["RuntimeError: provoked", "in two lines"]
    assert {entry["PRIORITY"] for entry in machine.entries()} == {INFO, ERROR}
    asked = machine.run("journalctl", "-t", "rspd", "-p", "err", "-o", "cat").stdout.splitlines()
    assert asked[-len(errors) :] == errors
    assert machine.pid() == pid


def test_an_error_that_ends_rspd_is_whole_in_the_journal_and_it_is_started_again(machine: Machine) -> None:
    provoke(machine, EARLY_FAULT)
    machine.drop_in("rspd.service", "[Unit]\nStartLimitBurst=2\n[Service]\nEnvironment=PYTHONPATH=/opt/fault")
    assert machine.systemctl("start", "rspd", check=False).returncode == 1
    eventually(lambda: machine.show("ActiveState") == "failed")
    assert machine.show("ExecMainStatus") == "70"
    assert machine.show("NRestarts") == "2"
    errors = machine.entries()
    assert [entry["MESSAGE"] for entry in errors].count("Traceback (most recent call last):") == 2
    assert [entry["MESSAGE"] for entry in errors].count("RuntimeError: provoked early") == 2
    assert {entry["PRIORITY"] for entry in errors} == {ERROR}
