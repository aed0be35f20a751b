"""rspd-worker@.service: more processes beside rspd.service, on its socket."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.support import Backend, answer, echo, eventually
from tests.system.machine import Machine
from tests.system.test_package import files, newer  # noqa: F401  # a fixture
from tests.system.traffic import CONFIGURATION, ask, connect

WORKERS = ["rspd-worker@1.service", "rspd-worker@2.service"]
SERVICES = ["rspd.service", *WORKERS]


def states(machine: Machine) -> list[str]:
    return [machine.show("ActiveState", unit) for unit in SERVICES]


def pids(machine: Machine) -> list[int]:
    return [machine.pid(unit) for unit in SERVICES]


def reloads(machine: Machine) -> Counter[str]:
    """How often each service has reloaded since the last `mark`."""
    return Counter(entry["_SYSTEMD_UNIT"] for entry in machine.entries() if entry["MESSAGE"].startswith("reloaded "))


def reload(machine: Machine, units: Iterable[str] = SERVICES) -> None:
    """Reload rspd, and wait until all that run have done so.

    More than once is right too: if systemd hears of RELOADING=1 when it already takes rspd's reload for done, it passes
    that on to the workers as another reload.
    """
    before = reloads(machine)
    machine.systemctl("reload", "rspd")
    eventually(lambda: set(reloads(machine) - before) == set(units), "all have reloaded")
    # What ends during a reload ends as failed: what systemd ran for it is killed.
    eventually(lambda: not machine.systemctl("list-jobs", "--no-legend").stdout, "systemd has nothing left to do")


ALL_RUN, NONE_RUNS = ["active"] * len(SERVICES), ["inactive"] * len(SERVICES)


@pytest.fixture
def started(machine: Machine) -> Iterator[Machine]:
    """The file's machine with three processes, eight clients in each."""
    machine.write("/etc/rspd.yaml", CONFIGURATION + "max_connections: 8\n")
    machine.systemctl("enable", "--quiet", *WORKERS)
    machine.systemctl("start", "rspd")
    eventually(lambda: states(machine) == ALL_RUN)
    machine.mark()
    yield machine
    machine.systemctl("disable", "--quiet", *WORKERS)


class Load:
    """Four clients at a time; `ends` has what became of each."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._hammer) for _ in range(4)]

    def _hammer(self) -> None:
        while not self._over.is_set():
            try:
                self.ends.append(ask().decode())
            except OSError as error:
                self.ends.append(repr(error))

    def more(self) -> None:
        """Wait for so many more clients that each process has some."""
        goal = len(self.ends) + 100
        eventually(lambda: len(self.ends) >= goal, "there is load")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_of_a_service_that_listens_itself_a_restart_makes_three_on_the_socket(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    machine.systemctl("enable", "--quiet", *WORKERS)
    machine.systemctl("restart", "rspd")
    eventually(lambda: states(machine) == ALL_RUN)
    assert len(machine.log("^listening address=127.0.0.1:8080 socket=")) == 3
    with Backend(answer, port=8000):
        assert ask() == b"ok"

    machine.systemctl("disable", "--quiet", "--now", *WORKERS)
    machine.systemctl("stop", "rspd.socket", "rspd")
    machine.mark()
    machine.systemctl("start", "rspd")
    assert machine.log("^listening") == ["listening address=127.0.0.1:8080"], "back to where it began"


def test_started_at_once_beside_a_service_that_listens_itself_they_say_what_is_in_the_way(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    refused = machine.systemctl("enable", "--quiet", "--now", *WORKERS, check=False)
    assert refused.returncode == 1
    messages = [entry["MESSAGE"] for entry in machine.journal()]
    assert "rspd.socket: Socket service rspd.service already active, refusing." in messages
    with Backend(answer, port=8000):
        assert ask() == b"ok"
        machine.systemctl("restart", "rspd")
        eventually(lambda: states(machine) == ALL_RUN)
        assert ask() == b"ok"
    machine.systemctl("disable", "--quiet", *WORKERS)


def test_under_load_one_is_killed_another_restarted_and_all_reloaded_and_only_the_killed_ones_clients_are_lost(
    started: Machine,
) -> None:
    with Backend(answer, port=8000), Load() as load:
        for unit, other in (SERVICES[0], SERVICES[1]), (SERVICES[2], SERVICES[0]):
            load.more()
            before = pids(started)
            started.systemctl("kill", "--signal=KILL", unit)
            eventually(lambda: pids(started) != before, "it is gone")  # noqa: B023
            load.more()
            lost = sum(end != "ok" for end in load.ends)
            started.systemctl("restart", other)
            load.more()
            eventually(lambda: states(started) == ALL_RUN, "systemd starts it again")
            reload(started)
            load.more()
            cut = [end for end in load.ends if end != "ok"]
            assert len(cut) == lost, f"lost by the restart or the reload: {cut}, {started.log('.')[-50:]}"
            changed = [now != then for now, then in zip(pids(started), before, strict=True)]
            assert changed == [service in (unit, other) for service in SERVICES], "nobody else is restarted"
    assert sum(end != "ok" for end in load.ends) <= 2 * 4, "no more than were inside"
    assert not [end for end in load.ends if "Refused" in end]
    serving = {entry["_SYSTEMD_UNIT"] for entry in started.entries() if "connection closed" in entry["MESSAGE"]}
    assert serving == set(SERVICES)


def test_one_command_starts_all_one_reloads_them_and_one_stops_them(started: Machine) -> None:
    started.write("/etc/rspd.yaml", CONFIGURATION.replace(":8000", ":8001"))
    before = pids(started)
    reload(started)
    assert pids(started) == before
    started.systemctl("stop", "rspd.socket", "rspd")
    eventually(lambda: states(started) == NONE_RUNS)
    with pytest.raises(ConnectionRefusedError):
        connect()
    started.systemctl("start", "rspd")
    eventually(lambda: states(started) == ALL_RUN)
    before = pids(started)
    started.systemctl("restart", "rspd", "rspd-worker@*")
    eventually(lambda: states(started) == ALL_RUN)
    assert not set(pids(started)) & set(before)


@pytest.mark.parametrize("unit", SERVICES[:2])
def test_one_that_is_stopped_stays_so_while_the_others_serve(started: Machine, unit: str) -> None:
    with Backend(answer, port=8000), Load() as load:
        load.more()
        started.systemctl("stop", unit)
        load.more()
        assert [state == "active" for state in states(started)] == [service != unit for service in SERVICES]
    assert set(load.ends) == {"ok"}


def test_a_reload_of_a_wrong_file_is_refused_by_all_and_all_serve_on(started: Machine) -> None:
    before = pids(started)
    started.write("/etc/rspd.yaml", "nonsense: 1\n")
    assert started.systemctl("reload", "rspd", check=False).returncode == 1
    assert not started.log("^reload")
    assert pids(started) == before
    with Backend(answer, port=8000):
        assert ask() == b"ok"


def test_the_first_client_starts_all_and_so_does_a_boot(started: Machine) -> None:
    started.systemctl("stop", "rspd", "rspd-worker@*")
    with Backend(answer, port=8000):
        assert ask() == b"ok"
        eventually(lambda: states(started) == ALL_RUN)
        started.systemctl("stop", "rspd.socket", "rspd")
        eventually(lambda: states(started) == NONE_RUNS)
        started.systemctl("enable", "--quiet", "rspd")
        started.systemctl("stop", "multi-user.target")
        started.systemctl("start", "multi-user.target")  # as at a boot
        eventually(lambda: states(started) == ALL_RUN)
        assert ask() == b"ok"
        started.systemctl("disable", "--quiet", "rspd")


def test_one_that_cannot_start_is_tried_again_and_closes_nobodys_socket(started: Machine) -> None:
    right = started.path("/etc/rspd.yaml").read_text()
    with Backend(answer, port=8000), Load() as load:
        started.write("/etc/rspd.yaml", "nonsense: 1\n")
        started.systemctl("kill", "--signal=KILL", WORKERS[0])
        eventually(lambda: started.show("ExecMainStatus", WORKERS[0]) == "78", "it fails")
        load.more()
        assert started.show("ActiveState", "rspd.socket") == "active"
        started.write("/etc/rspd.yaml", right)
        eventually(lambda: states(started) == ALL_RUN, "it is started again")
    assert sum(end != "ok" for end in load.ends) <= 4


def test_idle_all_end_and_the_next_client_starts_all(started: Machine) -> None:
    started.write("/etc/rspd.yaml", CONFIGURATION + "exit_idle_time: 1s\n")
    started.systemctl("restart", "rspd", "rspd-worker@*")
    eventually(lambda: states(started) == NONE_RUNS, "they exit")
    with Backend(answer, port=8000):
        assert ask() == b"ok"
        eventually(lambda: len(started.log("^listening")) == 6, "all are started")


def test_three_processes_of_one_client_each_serve_three_at_once(started: Machine) -> None:
    started.write("/etc/rspd.yaml", CONFIGURATION)
    reload(started)
    with Backend(echo, port=8000) as backend:
        clients = [connect() for _ in range(4)]
        for client in clients:
            client.sendall(b"?")
        assert [client.recv(1) for client in clients[:3]] == [b"?"] * 3
        clients[3].settimeout(0.3)
        with pytest.raises(TimeoutError):
            clients[3].recv(1)
        assert backend.accepted == 3
        for client in clients:
            client.close()


def test_all_may_use_the_folder_of_one_and_its_sockets(started: Machine) -> None:
    path = started.path("/run/rspd/backend.sock")
    with socket.socket(socket.AF_UNIX) as backend:
        backend.bind(str(path))
        path.chmod(0o666)
        backend.listen()
        backend.settimeout(20)
        started.systemctl("stop", WORKERS[1])
        started.write("/etc/rspd.yaml", CONFIGURATION.replace("127.0.0.1:8000", "/run/rspd/backend.sock"))
        reload(started, SERVICES[:2])
        with connect() as client:
            backend.accept()[0].close()
            assert client.recv(1) == b""


def test_an_upgrade_restarts_all_and_refuses_nobody(started: Machine, newer: Path) -> None:  # noqa: F811
    before = pids(started)
    with Backend(answer, port=8000), Load() as load:
        started.install(newer)
        load.more()
    assert set(load.ends) == {"ok"}
    eventually(lambda: states(started) == ALL_RUN)
    assert not set(pids(started)) & set(before)


def test_removed_they_end_and_purged_they_leave_nothing(bare: Machine, deb: Path) -> None:
    bare.run("dpkg", "--purge", "rspd")
    before = files(bare)
    bare.install(deb)
    bare.systemctl("enable", "--quiet", *WORKERS)
    bare.systemctl("restart", "rspd")
    eventually(lambda: states(bare) == ALL_RUN)
    bare.run("apt-get", "remove", "-y", "rspd")
    assert [bare.show("MainPID", unit) for unit in SERVICES] == ["0"] * 3
    with pytest.raises(ConnectionRefusedError):
        connect()
    bare.run("dpkg", "--purge", "rspd")
    bare.systemctl("daemon-reload")
    assert files(bare) - before == set()
    assert bare.systemctl("list-units", "--all", "--plain", "--no-legend", "rspd*").stdout == ""
