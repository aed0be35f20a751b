"""rspd from a shell: it detaches; with --foreground on a terminal it does not."""

from __future__ import annotations

import re
import signal
import socket
import subprocess

import pytest

from tests.support import PATIENCE, Backend, answer, eventually
from tests.system.machine import Machine
from tests.system.traffic import ask, connect

PID_FILE = "/run/rspd-test.pid"
COMMAND = f"rspd -l 127.0.0.1:8080 -b 127.0.0.1:8000 --pid-file {PID_FILE}"


@pytest.fixture(autouse=True)
def nothing_left(machine: Machine) -> object:
    """No daemon and no pid file, when a test has failed too."""
    yield
    machine.shell("for p in /proc/[0-9]*; do read c <$p/comm && [ $c = rspd ] && kill -9 ${p#/proc/}; done; true")
    machine.path(PID_FILE).unlink(missing_ok=True)


def pid_in_file(machine: Machine) -> int:
    """What the pid file says."""
    return int(machine.path(PID_FILE).read_text())


def is_running(machine: Machine, pid: int) -> bool:
    """Whether a process of the machine runs."""
    return machine.run("test", "-d", f"/proc/{pid}", check=False).returncode == 0


def end(machine: Machine, pid: int) -> None:
    """Send SIGTERM, and wait until it is gone."""
    machine.shell(f"kill {pid}")
    eventually(lambda: not is_running(machine, pid), "it ends")


def test_it_detaches_returns_0_when_it_listens_and_logs_to_the_journal(machine: Machine) -> None:
    started = machine.shell(COMMAND)
    connect().close()
    assert (started.stdout, started.stderr) == ("", "")
    pid = pid_in_file(machine)
    status = machine.run("cat", f"/proc/{pid}/stat").stdout.rpartition(")")[2].split()
    parent, session, terminal = status[1], status[3], status[4]
    assert parent == "1"
    assert terminal == "0"
    assert session != str(pid), "a session's leader could get a terminal"
    assert machine.run("readlink", f"/proc/{pid}/cwd").stdout.strip() == "/"
    assert machine.log("^listening address=127.0.0.1:8080$")
    with Backend(answer, port=8000):
        assert ask() == b"ok"
    end(machine, pid)
    assert not machine.path(PID_FILE).exists()
    entries = machine.entries()
    assert [entry["MESSAGE"] for entry in entries][-1] == "ended served=2"
    # The first client found no backend.
    others = [entry for entry in entries if not re.search("backend-refused|backend down", entry["MESSAGE"])]
    assert {entry["PRIORITY"] for entry in others} == {"6"}
    assert {entry["PRIORITY"] for entry in entries if "backend-refused" in entry["MESSAGE"]} == {"4"}


def test_it_says_on_the_terminal_that_the_port_is_taken(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 8080)):
        started = machine.shell(COMMAND, check=False)
    assert started.returncode == 69
    assert started.stderr.startswith("rspd: cannot listen on 127.0.0.1:8080: Address already in use"), started.stderr
    assert not machine.path(PID_FILE).exists()


def test_a_wrong_configuration_is_said_on_the_terminal(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", "listen: 8080\n")
    started = machine.shell("rspd", check=False)
    assert started.returncode == 78
    assert started.stderr.startswith("rspd: /etc/rspd.yaml"), started.stderr


def test_a_pid_file_of_a_running_process_is_refused(machine: Machine) -> None:
    machine.shell(COMMAND)
    pid = pid_in_file(machine)
    second = machine.shell(COMMAND.replace(":8080", ":8081"), check=False)
    assert second.returncode == 73
    assert str(pid) in second.stderr
    assert PID_FILE in second.stderr
    assert pid_in_file(machine) == pid
    end(machine, pid)

    machine.write(PID_FILE, "1\n")
    third = machine.shell(COMMAND, check=False)
    assert third.returncode == 73
    assert "systemd" in third.stderr
    assert pid_in_file(machine) == 1


def test_a_stale_pid_file_is_replaced(machine: Machine) -> None:
    machine.shell(COMMAND)
    first = pid_in_file(machine)
    machine.shell(f"kill -9 {first}")
    eventually(lambda: not is_running(machine, first))
    assert pid_in_file(machine) == first
    machine.shell(COMMAND)
    assert pid_in_file(machine) != first
    end(machine, pid_in_file(machine))


def test_a_file_that_is_no_pid_file_is_left_alone(machine: Machine) -> None:
    machine.write(PID_FILE, "precious\n")
    started = machine.shell(COMMAND, check=False)
    assert started.returncode == 73
    assert machine.path(PID_FILE).read_text() == "precious\n"


def test_without_a_journal_and_syslog_it_refuses_to_detach(machine: Machine) -> None:
    started = machine.shell(f"unshare -m sh -c 'mount -t tmpfs tmpfs /run/systemd/journal; {COMMAND}'", check=False)
    assert started.returncode == 69
    assert "--foreground" in started.stderr


def test_in_the_foreground_it_is_readable_on_a_terminal_and_ctrl_c_exits_0(machine: Machine) -> None:
    command = "exec rspd --foreground -l 127.0.0.1:8080 -b 127.0.0.1:8000"
    # script gives it a terminal, and passes on what is typed; -e makes the exit code that of the command.
    with subprocess.Popen(
        machine.command("script", "-qefc", command, "/dev/null"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as terminal:
        assert terminal.stdin
        assert terminal.stdout
        first = terminal.stdout.readline().decode()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:.]+ INFO    listening address=127.0.0.1:8080\r\n", first), first
        with Backend(answer, port=8000):
            assert ask() == b"ok"
        terminal.stdin.write(b"\x03")
        terminal.stdin.flush()
        assert terminal.wait(PATIENCE) == 0
        rest = terminal.stdout.read().decode()
    assert "ended served=1" in rest
    assert "Traceback" not in rest
    assert "<6>" not in rest
    assert machine.log() == []


def test_a_detached_daemon_reloads_and_drains_like_the_service(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", "listen: 127.0.0.1:8080\nbackend: 127.0.0.1:8001\n")
    machine.shell(f"cd /tmp && rspd --pid-file {PID_FILE}")
    pid = pid_in_file(machine)
    machine.write("/etc/rspd.yaml", "listen: 127.0.0.1:8080\nbackend: 127.0.0.1:8000\n")
    machine.shell(f"kill -{signal.SIGHUP.name[3:]} {pid}")
    eventually(lambda: machine.log("^reloaded"))
    with Backend(answer, port=8000):
        assert ask() == b"ok"
    end(machine, pid)
