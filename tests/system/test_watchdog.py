"""The watchdog: it restarts what is stuck, and only that."""

from __future__ import annotations

import socket
import threading

from tests.support import Backend, answer, eventually
from tests.system.machine import Machine
from tests.system.traffic import ask, connect

SHORT, LONGER = "[Service]\nWatchdogSec=1s", "[Service]\nWatchdogSec=3s"


def test_the_watchdog_is_on(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    assert machine.show("WatchdogUSec") == "30s"


def test_a_stopped_process_is_killed_and_started_again(machine: Machine) -> None:
    machine.drop_in("rspd.service", SHORT)
    machine.systemctl("start", "rspd")
    pid = machine.pid()
    machine.systemctl("kill", "--signal=STOP", "rspd")
    eventually(lambda: machine.show("NRestarts") == "1" and machine.show("ActiveState") == "active")
    with Backend(answer, port=8000):
        assert ask() == b"ok"
    assert machine.pid() != pid
    assert any("Watchdog timeout" in entry["MESSAGE"] for entry in machine.journal())


def test_neither_work_nor_silence_is_taken_for_being_stuck(machine: Machine) -> None:
    # rspd gives a sign each second: the host may stand still for two.
    machine.drop_in("rspd.service", LONGER)
    machine.systemctl("start", "rspd")
    pid = machine.pid()
    over = threading.Event()

    def pour(sock: socket.socket) -> None:
        sock.recv(1)
        while not over.is_set():
            sock.sendall(bytes(1 << 20))

    # Longer than the watchdog's interval each.
    over.wait(5)
    timer = threading.Timer(5, over.set)
    timer.start()
    with Backend(pour, port=8000):
        with connect() as client:
            client.sendall(b"?")
            received = 0
            while count := len(client.recv(1 << 20)):
                received += count
    assert received > 1 << 20
    assert machine.pid() == pid
    assert machine.show("NRestarts") == "0"
