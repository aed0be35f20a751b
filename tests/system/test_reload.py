"""systemctl reload: with a good and with a bad file, while a download runs."""

from __future__ import annotations

from tests.support import Backend, answer, eventually
from tests.system.machine import Machine
from tests.system.traffic import CONFIGURATION, Download, ask, saying

TWO = CONFIGURATION + "max_connections: 2\n"


def test_a_good_file_is_taken_and_neither_process_nor_download_notice(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", TWO)
    machine.systemctl("start", "rspd")
    pid = machine.pid()
    with Download() as download, Backend(saying(b"new"), port=8001):
        machine.write("/etc/rspd.yaml", TWO.replace(":8000", ":8001"))
        machine.systemctl("reload", "rspd")
        eventually(lambda: machine.log("^reloaded listen=127.0.0.1:8080"))
        assert ask() == b"new"
        download.go_on()
        assert download.end() == "complete"
    assert machine.pid() == pid
    assert machine.show("ActiveState") == "active"


def test_the_check_of_a_reload_does_not_warn_of_an_address_that_a_socket_unit_brings(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", "backend: 127.0.0.1:8000\n")
    machine.systemctl("start", "rspd.socket", "rspd")
    machine.systemctl("reload", "rspd")
    eventually(lambda: machine.log("^reloaded listen="))
    assert not machine.log("warning")
    assert "rspd: warning: /etc/rspd.yaml: listen: missing" in machine.run("rspd", "--check").stderr


def test_a_listener_may_come_and_go_while_a_download_runs(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", TWO)
    machine.systemctl("start", "rspd")
    with Download() as download, Backend(saying(b"new"), port=8001):
        machine.write("/etc/rspd.yaml", "listen: 127.0.0.1:81\nbackend: 127.0.0.1:8001\nmax_connections: 2\n")
        machine.systemctl("reload", "rspd")
        eventually(lambda: machine.log("^reloaded listen=127.0.0.1:81"))
        assert ask(81) == b"new"
        download.go_on()
        assert download.end() == "complete"


def test_a_bad_file_is_refused_and_everything_goes_on(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", TWO)
    machine.systemctl("start", "rspd")
    pid = machine.pid()
    with Download() as download:
        machine.write("/etc/rspd.yaml", TWO + "max_connection: 3\n")
        assert machine.systemctl("reload", "rspd", check=False).returncode == 1
        assert machine.show("ActiveState") == "active"
        assert machine.log("/etc/rspd.yaml:4: max_connection: unknown key")
        download.go_on()
        assert download.end() == "complete"
    with Backend(answer, port=8000):
        assert ask() == b"ok"
    assert machine.pid() == pid


def test_a_bad_file_is_refused_by_the_process_too_and_the_status_says_so(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    pid = machine.pid()
    machine.write("/etc/rspd.yaml", "backend: nonsense\n")
    machine.systemctl("kill", "--signal=HUP", "rspd")
    eventually(lambda: machine.log("^reload failed, nothing has changed: /etc/rspd.yaml:1: backend: "))
    eventually(lambda: "reload failed: /etc/rspd.yaml:1: backend: " in machine.show("StatusText"))
    assert machine.show("ActiveState") == "active"
    with Backend(answer, port=8000):
        assert ask() == b"ok"
    machine.write("/etc/rspd.yaml", CONFIGURATION)
    machine.systemctl("reload", "rspd")
    eventually(lambda: "reload" not in machine.show("StatusText"), "it has forgotten the failure")
    assert machine.pid() == pid
