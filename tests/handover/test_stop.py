"""A stop stays a stop; what happens when the next process is another one than expected, or does not come."""

from __future__ import annotations

import socket
import time

import pytest

from tests.handover.talks import CONTROL, MANY, Talks, fields, handovers, left_open, served, stored, talk
from tests.support import Backend, echo, eventually, is_reset, reset
from tests.system.machine import Machine
from tests.system.traffic import CONFIGURATION, Download, connect

WRONG = MANY + "max_connection: 3\n"
REASON = "/etc/rspd.yaml:4: max_connection: unknown key, did you mean max_connections?"
ERROR = "3"  # the priority of an error


@pytest.fixture
def started(machine: Machine) -> Machine:
    """The file's machine with rspd running, for many clients at once."""
    machine.write("/etc/rspd.yaml", MANY)
    machine.systemctl("start", "rspd")
    return machine


def test_a_stop_drains_and_refuses_at_once_who_comes_meanwhile(started: Machine) -> None:
    with Talks(2) as talks:
        started.systemctl("stop", "--no-block", "rspd")
        eventually(lambda: started.log("^ending connections=2 drain_timeout=30"), "it drains")
        for _ in range(20):
            with pytest.raises(ConnectionRefusedError):
                connect()
        talks.talk()
        assert stored(started) == 0
        talks.end()
        eventually(lambda: started.show("ActiveState") == "inactive")
    assert started.show("Result") == "success"
    assert stored(started) == 0
    assert started.log("hand(ing|ed) over") == []


def test_a_stop_after_a_handover_drains_too(started: Machine) -> None:
    with Talks(2) as talks:
        started.systemctl("restart", "rspd")
        started.systemctl("stop", "--no-block", "rspd")
        eventually(lambda: started.log("^ending connections=2 drain_timeout=30"), "it drains")
        with pytest.raises(ConnectionRefusedError):
            connect()
        talks.talk()
        talks.end()
        eventually(lambda: started.show("ActiveState") == "inactive")
    assert handovers(started) == [1, 1]
    assert stored(started) == 0
    eventually(lambda: left_open(started) == [])


def test_a_stop_cuts_what_is_open_after_drain_timeout_and_nothing_is_kept(started: Machine) -> None:
    started.write("/etc/rspd.yaml", MANY + "drain_timeout: 1s\n")
    started.systemctl("restart", "rspd")
    with Talks(2) as talks:
        started.systemctl("restart", "rspd")
        began = time.monotonic()
        started.systemctl("stop", "rspd")
        assert 0.9 < time.monotonic() - began < 5
        assert [is_reset(client) for client in talks.clients] == [True, True]
    assert stored(started) == 0
    assert started.show("Result") == "success"


def test_with_handover_off_a_restart_drains(started: Machine) -> None:
    started.write("/etc/rspd.yaml", "handover: off\n" + MANY + "drain_timeout: 1s\n")
    started.systemctl("stop", "rspd")
    started.systemctl("start", "rspd")
    with Talks(2) as talks:
        began = time.monotonic()
        started.systemctl("restart", "rspd")
        assert time.monotonic() - began > 0.9
        assert [is_reset(client) for client in talks.clients] == [True, True]
        served()
    assert len(started.log("^ending connections=2 drain_timeout=1")) == 1
    assert started.log("(handing|handed|took) over") == []
    assert stored(started) == 0


def test_handover_may_be_turned_off_and_on_by_a_reload(started: Machine) -> None:
    started.write("/etc/rspd.yaml", "handover: off\n" + MANY + "drain_timeout: 1s\n")
    started.systemctl("reload", "rspd")
    eventually(lambda: started.log("^reloaded"))
    with Talks(2) as talks:
        started.systemctl("restart", "rspd")
        assert [is_reset(client) for client in talks.clients] == [True, True]
    started.write("/etc/rspd.yaml", MANY)
    started.systemctl("reload", "rspd")
    eventually(lambda: len(started.log("^reloaded")) == 2)
    with Talks(2) as talks:
        started.systemctl("restart", "rspd")
        talks.talk()


@pytest.mark.parametrize("count", [3, 0])
def test_a_wrong_file_at_a_restart_is_no_outage(started: Machine, count: int) -> None:
    with Talks(count) as talks:
        started.write("/etc/rspd.yaml", WRONG)
        started.systemctl("restart", "rspd")
        assert started.show("ActiveState") == "active"
        assert started.show("NRestarts") == "0"
        assert REASON in started.show("StatusText")
        errors = [entry["MESSAGE"] for entry in started.entries() if entry["PRIORITY"] == ERROR]
        assert [line.endswith(REASON) for line in errors] == [True]
        talks.talk()
        served()
        started.systemctl("restart", "rspd")
        talks.talk()
        served()

        started.write("/etc/rspd.yaml", MANY)
        started.systemctl("reload", "rspd")
        eventually(lambda: REASON not in started.show("StatusText"), "the file is right again")
        started.systemctl("restart", "rspd")
        talks.talk()
        served()


def test_a_wrong_file_at_a_start_is_refused(started: Machine) -> None:
    started.systemctl("restart", "rspd")
    started.systemctl("stop", "rspd")
    started.write("/etc/rspd.yaml", WRONG)
    assert started.systemctl("start", "rspd", check=False).returncode == 1
    assert started.show("ExecMainStatus") == "78"
    assert started.show("NRestarts") == "0"


def test_a_client_that_aborts_after_a_handover_has_its_backend_aborted_at_once(started: Machine) -> None:
    accepted: list[socket.socket] = []
    ends: list[bool] = []

    def hold(sock: socket.socket) -> None:
        accepted.append(sock)
        sock.sendall(b"!")
        ends.append(is_reset(sock))

    with Backend(hold, port=8000), connect() as client:
        assert client.recv(1) == b"!"
        started.systemctl("restart", "rspd")
        reset(client)
        eventually(lambda: ends == [True], "the backend has RST")
        eventually(lambda: left_open(started) == [], "nobody keeps a copy")


@pytest.mark.parametrize("abort", [False, True])
def test_a_backend_that_ends_or_aborts_after_a_handover_has_its_client_closed_at_once(
    started: Machine, abort: bool
) -> None:
    accepted: list[socket.socket] = []

    def keep(sock: socket.socket) -> None:
        accepted.append(sock.dup())
        sock.sendall(b"!")

    with Backend(keep, port=8000), connect() as client:
        assert client.recv(1) == b"!"
        started.systemctl("restart", "rspd")
        if abort:
            reset(accepted[0])
        else:
            accepted[0].close()
        assert is_reset(client) is abort
        client.close()
        eventually(lambda: left_open(started) == [], "nobody keeps a copy")


def test_a_download_goes_on_where_it_was(started: Machine) -> None:
    with Download() as download:
        started.systemctl("restart", "rspd")
        download.go_on()
        assert download.end() == "complete"
    eventually(lambda: handovers(started) == [1])
    line = fields(started.log("^connection closed")[0])
    assert (line["sent"], line["received"]) == ("0", str(16 << 20))


def test_a_serial_rspd_hands_over_its_client_and_stays_serial(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    with Talks(1) as talks, connect() as second:
        second.sendall(b"?")
        machine.systemctl("restart", "rspd")
        talks.talk()
        assert "took over 1 connection" in machine.show("StatusText")
        assert talks.backend.accepted == 1
        talks.end()
        assert second.recv(1) == b"?"
        talk(second)
        assert talks.backend.accepted == 2


FAILS = "[Service]\nExecStart=\nExecStart=/bin/false\n"


def test_a_version_that_does_not_start_at_all_is_given_up_and_all_is_closed(started: Machine) -> None:
    with Talks(3) as talks:
        started.drop_in("rspd.service", "[Unit]\nStartLimitBurst=3\n" + FAILS)
        assert started.systemctl("restart", "rspd", check=False).returncode == 1
        eventually(lambda: started.show("ActiveState") == "failed", "it is given up")
        assert int(started.show("NRestarts")) >= 1, "it was tried again"
        assert stored(started) == 0
        for client in talks.clients:
            assert is_reset(client), "what is cut short must not look complete"
        with pytest.raises(ConnectionRefusedError):
            connect()
    eventually(lambda: left_open(started) == [])


def test_a_version_that_starts_at_the_second_try_takes_over(started: Machine) -> None:
    started.drop_in("rspd.service", "[Service]\nRestartSec=2s\n")
    with Talks(3) as talks:
        started.drop_in("rspd.service", "[Service]\nRestartSec=2s\n" + FAILS.removeprefix("[Service]\n"))
        assert started.systemctl("restart", "rspd", check=False).returncode == 1
        started.drop_in("rspd.service", "[Service]\n")
        eventually(lambda: started.show("ActiveState") == "active", "the next try succeeds")
        talks.talk()
        served()
        talks.end()
        assert stored(started) == CONTROL + 1
    eventually(lambda: handovers(started).count(1) == 3)


def test_a_process_that_is_killed_cuts_its_connections_and_the_next_one_listens(started: Machine) -> None:
    with Talks(2) as talks:
        before = started.pid()
        started.systemctl("kill", "--signal=KILL", "rspd")
        for client in talks.clients:
            is_reset(client)
        eventually(lambda: started.pid() not in (0, before) and started.show("ActiveState") == "active")
        served()
    assert stored(started) == CONTROL + 1
    assert started.log("^took over connections=[^0]") == []


def test_a_restart_of_what_is_stopped_is_a_start(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION)
    machine.systemctl("restart", "rspd")
    with Backend(echo, port=8000):
        served()
    assert machine.log("over connections=") == []
    assert stored(machine) == CONTROL + 1
