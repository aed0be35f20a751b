"""rspd.socket: sockets that systemd opens, and passes."""

from __future__ import annotations

import socket
import threading

import pytest

from tests.support import Backend, answer, eventually
from tests.system.machine import Machine
from tests.system.traffic import CONFIGURATION, ask, ask_on, connect, saying


def socket_unit(machine: Machine, name: str, listen: str) -> None:
    """Another socket for rspd.service, passed by this name."""
    text = f"[Socket]\n{listen}\nService=rspd.service\nFileDescriptorName={name}\n"
    machine.write(f"/etc/systemd/system/rspd-{name}.socket", text)
    machine.systemctl("daemon-reload")
    machine.systemctl("start", f"rspd-{name}.socket")


def reason_of_failure(machine: Machine) -> str:
    """What a start that is refused says; checks that it is not tried again."""
    assert machine.systemctl("start", "rspd", check=False).returncode == 1
    assert machine.show("ExecMainStatus") == "78"
    assert machine.show("NRestarts") == "0"
    status = machine.show("StatusText")
    assert status in machine.log(), "the log says the same"
    assert status in machine.systemctl("status", "rspd", check=False).stdout
    return status


def test_the_first_connection_starts_the_service_and_is_answered(machine: Machine) -> None:
    machine.systemctl("enable", "--quiet", "--now", "rspd.socket")
    assert machine.show("ActiveState") == "inactive"
    with Backend(answer, port=8000):
        assert ask() == b"ok"
    assert machine.show("ActiveState") == "active"
    assert machine.log(r"listening address=127.0.0.1:8080 socket=\"?rspd.socket")


def test_with_the_socket_the_service_inherits_it_and_without_it_binds_its_own(machine: Machine) -> None:
    with Backend(answer, port=8000):
        machine.systemctl("start", "rspd.socket")
        machine.systemctl("start", "rspd")
        assert ask() == b"ok"
        machine.systemctl("stop", "rspd")
        connect().close()  # the socket is systemd's

        machine.systemctl("stop", "rspd.socket", "rspd")
        machine.systemctl("start", "rspd")
        assert ask() == b"ok"
        machine.systemctl("stop", "rspd")
        with pytest.raises(ConnectionRefusedError):
            connect()
    assert [("socket=" in line) for line in machine.log("^listening")][:1] == [True]
    assert [("socket=" in line) for line in machine.log("^listening")][-1:] == [False]


def test_a_restart_with_the_socket_refuses_and_loses_nobody(machine: Machine) -> None:
    ends: list[str] = []
    over = threading.Event()

    def hammer() -> None:
        while not over.is_set():
            try:
                ends.append(ask().decode())
            except OSError as error:
                ends.append(repr(error))

    machine.systemctl("start", "rspd.socket")
    machine.systemctl("start", "rspd")
    with Backend(answer, port=8000) as backend:
        threads = [threading.Thread(target=hammer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            pid, served = machine.pid(), len(ends)
            eventually(lambda served=served: len(ends) > served + 50, "there is load")  # type: ignore[misc]
            machine.systemctl("restart", "rspd")
            assert machine.pid() != pid
        over.set()
        for thread in threads:
            thread.join()
    assert set(ends) == {"ok"}
    assert backend.accepted == len(ends)


def test_two_named_sockets_are_two_listeners_beside_an_address(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION.replace("127.0.0.1:8080", "[fd://web, fd://admin, '127.0.0.1:8083']"))
    socket_unit(machine, "admin", "ListenStream=/run/rspd-admin.sock")
    socket_unit(machine, "web", "ListenStream=127.0.0.1:8081")
    with Backend(answer, port=8000):
        assert ask(8081) == b"ok"
        assert ask(8083) == b"ok"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(machine.path("/run/rspd-admin.sock")))
            assert ask_on(client) == b"ok"
    for name, address in ("web", "127.0.0.1:8081"), ("admin", "/run/rspd-admin.sock"):
        assert machine.log(rf"^listening address={address} socket=\"?{name}\"?$"), machine.log()


def test_listen_may_be_missing_where_systemd_passes_a_socket(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", "backend: 127.0.0.1:8000\n")
    machine.systemctl("start", "rspd.socket")
    with Backend(answer, port=8000):
        assert ask() == b"ok"
    machine.systemctl("stop", "rspd.socket", "rspd")
    assert "listen" in reason_of_failure(machine)


def test_an_address_that_a_passed_socket_replaces_is_named_in_the_log(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION.replace(":8080", ":8089"))
    machine.systemctl("start", "rspd.socket")
    machine.systemctl("start", "rspd")
    assert machine.log("^not listening on 127.0.0.1:8089, ")
    assert machine.log("^listening address=127.0.0.1:8080 ")


def test_a_datagram_socket_is_a_clear_error(machine: Machine) -> None:
    socket_unit(machine, "web", "ListenDatagram=127.0.0.1:8081")
    reason = reason_of_failure(machine)
    assert "'web'" in reason
    assert "descriptor 3" in reason
    assert "datagram" in reason
    assert "ListenStream=" in reason


def test_a_name_that_nobody_passes_is_a_clear_error(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION.replace("127.0.0.1:8080", "[fd://web, fd://nobody]"))
    socket_unit(machine, "web", "ListenStream=127.0.0.1:8081")
    assert "nobody" in reason_of_failure(machine)


def test_a_socket_that_no_entry_names_is_a_clear_error(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION.replace("127.0.0.1:8080", "fd://web"))
    socket_unit(machine, "web", "ListenStream=127.0.0.1:8081")
    socket_unit(machine, "extra", "ListenStream=127.0.0.1:8082")
    assert "extra" in reason_of_failure(machine)


def test_the_socket_stays_open_over_a_reload_whatever_listen_says(machine: Machine) -> None:
    machine.systemctl("start", "rspd.socket")
    machine.systemctl("start", "rspd")
    with Backend(answer, port=8000), Backend(saying(b"new"), port=8001):
        assert ask() == b"ok"
        machine.write("/etc/rspd.yaml", "listen: 127.0.0.1:8099\nbackend: 127.0.0.1:8001\n")
        machine.systemctl("reload", "rspd")
        eventually(lambda: machine.log("^reloaded"))
        assert ask() == b"new"


def test_idle_it_exits_and_the_next_connection_starts_it_again(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", CONFIGURATION + "exit_idle_time: 200ms\n")
    machine.systemctl("start", "rspd.socket")
    with Backend(answer, port=8000):
        for _ in range(2):
            assert ask() == b"ok"
            eventually(lambda: machine.show("ActiveState") == "inactive", "it exits")
            assert machine.show("Result") == "success"
    assert machine.log("^idle seconds=0.2$")


def test_an_instance_is_started_by_its_own_socket(machine: Machine) -> None:
    machine.write("/etc/rspd/one.yaml", "backend: 127.0.0.1:8000\n")
    machine.systemctl("start", "rspd@one.socket")
    with Backend(answer, port=8000), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(machine.path("/run/rspd-one.sock")))
        assert ask_on(client) == b"ok"
    assert machine.show("ActiveState", "rspd@one") == "active"


def test_an_instances_socket_may_be_a_port_by_a_drop_in(machine: Machine) -> None:
    machine.write("/etc/rspd/one.yaml", "backend: 127.0.0.1:8000\n")
    machine.drop_in("rspd@one.socket", "[Socket]\nListenStream=\nListenStream=127.0.0.1:8081")
    machine.systemctl("start", "rspd@one.socket")
    with Backend(answer, port=8000):
        assert ask(8081) == b"ok"
