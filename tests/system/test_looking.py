"""Who looks at rspd in a real systemd: by the control socket and the commands, and by the metrics."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.handover.talks import MANY, Talks, served, talk
from tests.support import PATIENCE, eventually
from tests.system.machine import Machine
from tests.system.traffic import CONFIGURATION

FOLDER = "/run/rspd"
CONTROL = f"{FOLDER}/control.sock"

METRICS = ("127.0.0.1", 9114)
WITH_METRICS = MANY + "metrics: 127.0.0.1:9114\n"
MODULE = "/usr/lib/python3/dist-packages/prometheus_client"

ENDED = 'rspd_connections_total{backend="127.0.0.1:8000",cause="client-closed",proxy=""}'
SENT = 'rspd_bytes_total{backend="127.0.0.1:8000",direction="upload",proxy=""}'

# A service that is about to start waits for this file, in the test of a restart.
GO = f"{FOLDER}/go"

WORKERS = ["rspd-worker@1.service", "rspd-worker@2.service"]
SERVICES = ["rspd.service", *WORKERS]


def start(machine: Machine, configuration: str) -> None:
    """Start rspd with this file."""
    machine.write("/etc/rspd.yaml", configuration)
    machine.systemctl("start", "rspd")


def reload(machine: Machine, configuration: str) -> None:
    """Put a file into force, or try to."""
    machine.mark()
    machine.write("/etc/rspd.yaml", configuration)
    machine.systemctl("reload", "rspd")
    eventually(lambda: machine.log("^reload"), "it has reloaded")


def answered(machine: Machine, *words: str) -> Any:
    """What a command of rspd says with --json, once no process answers too late for it (GRACE in asking.py)."""

    def all_say() -> Any:
        found = json.loads(machine.run("rspd", *words, "--json").stdout)
        return None if found["process"]["unanswered"] else found

    return eventually(all_say, "each process answers")


def status(machine: Machine, *words: str) -> Any:
    """What `rspd status --json` says."""
    return answered(machine, "status", *words)


def connections(machine: Machine) -> dict[str, Any]:
    """The open connections, by their ids."""
    them = answered(machine, "connections")["connections"]
    found = {one["id"]: one for one in them}
    assert len(found) == len(them), "each has an id of its own"
    return found


def as_user(machine: Machine, groups: str, *words: str) -> CompletedProcess[str]:
    """Run rspd as the user nobody, with these supplementary groups."""
    others = f"--groups={groups}" if groups else "--clear-groups"
    return machine.run("setpriv", "--reuid=nobody", "--regid=nogroup", others, "rspd", *words, check=False)


def rights(machine: Machine, path: str = CONTROL) -> str:
    """Who may open a file."""
    return machine.run("stat", "-c", "%a %U:%G", path).stdout.strip()


def sockets(machine: Machine, folder: str = FOLDER) -> list[str]:
    """The files in the folder of a service."""
    return sorted(path.name for path in machine.path(folder).iterdir())


def complaints(machine: Machine) -> list[str]:
    """What rspd has logged since the last `mark` that is a warning or worse."""
    return [entry["MESSAGE"] for entry in machine.entries() if int(entry["PRIORITY"]) < 6]


def begin(family: int, address: Any, target: str) -> socket.socket:
    """Send a request."""
    sock = socket.socket(family)
    try:
        sock.settimeout(PATIENCE)
        sock.connect(address)
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    except BaseException:
        sock.close()
        raise
    return sock


def finish(sock: socket.socket) -> str:
    """The content of the answer."""
    with sock:
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, content = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), data
    return content.decode()


def metrics(sock: socket.socket | None = None) -> dict[str, float]:
    """The metrics, each by its name and labels. sock: on which they were asked for."""
    text = finish(sock or begin(socket.AF_INET, METRICS, "/metrics"))
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


# The control socket, and who may use it


def test_root_looks_and_after_a_stop_there_is_no_socket(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    assert machine.run("rspd", "status").stdout.splitlines()[0] == "All is well."
    assert machine.run("rspd", "status", "--check").stdout == ""
    assert status(machine)["process"]["pid"] == machine.pid()
    assert machine.run("rspd", "connections").stdout == "0 connections\n"
    assert rights(machine) == "660 rspd:rspd"
    machine.systemctl("stop", "rspd")
    assert sockets(machine) == []
    refused = machine.run("rspd", "status", check=False)
    assert refused.returncode == 69
    assert f"{CONTROL}: no such socket" in refused.stderr
    assert "systemctl status rspd" in refused.stderr
    assert complaints(machine) == []


def test_a_user_looks_who_is_in_its_group_and_another_one_is_told_what_to_do(machine: Machine) -> None:
    machine.systemctl("start", "rspd")
    for words in ["status", "--check"], ["connections"]:
        refused = as_user(machine, "", *words)
        assert refused.returncode == 77
        assert refused.stdout == ""
        assert f"{CONTROL}: permission denied" in refused.stderr
        assert "the group rspd may look: use sudo" in refused.stderr
    assert as_user(machine, "rspd", "status", "--check").returncode == 0
    assert as_user(machine, "rspd", "connections").stdout == "0 connections\n"


def test_control_mode_lets_everybody_look_from_a_reload_on_and_off_nobody(machine: Machine) -> None:
    start(machine, CONFIGURATION)
    reload(machine, CONFIGURATION + 'control_mode: "0666"\n')
    assert rights(machine) == "666 rspd:rspd"
    assert as_user(machine, "", "status", "--check").returncode == 0
    reload(machine, CONFIGURATION)
    assert rights(machine) == "660 rspd:rspd"
    assert as_user(machine, "", "status", "--check").returncode == 77
    reload(machine, CONFIGURATION + "control: off\n")
    assert sockets(machine) == []
    machine.systemctl("restart", "rspd")
    assert sockets(machine) == []
    reload(machine, CONFIGURATION)
    machine.run("rspd", "status", "--check")
    assert complaints(machine) == []


def test_another_group_needs_what_the_log_says(machine: Machine) -> None:
    start(machine, CONFIGURATION + "control_group: adm\n")
    (complaint,) = complaints(machine)
    assert complaint.startswith("who may look is not as configured: rspd may not give the socket to the group adm; ")
    assert rights(machine) == "660 rspd:rspd"
    settings = re.findall(r"\w+=\S+", complaint)
    assert len(settings) == 2
    machine.drop_in("rspd.service", "\n".join(["[Service]", *settings]))
    machine.mark()
    machine.systemctl("restart", "rspd")
    assert rights(machine) == "660 rspd:adm"
    assert as_user(machine, "adm", "status", "--check").returncode == 0
    refused = as_user(machine, "rspd", "status")
    assert refused.returncode == 77
    assert "the group adm may look" in refused.stderr
    assert complaints(machine) == []
    reload(machine, CONFIGURATION)
    assert rights(machine) == "660 rspd:rspd"
    assert complaints(machine) == []


def test_an_instance_has_a_control_socket_in_its_own_folder(machine: Machine) -> None:
    machine.write("/etc/rspd/one.yaml", CONFIGURATION.replace(":8080", ":8081"))
    machine.systemctl("start", "rspd@one")
    assert rights(machine, "/run/rspd-one/control.sock") == "660 rspd:rspd"
    assert "listening on 127.0.0.1:8081" in machine.run("rspd", "status", "--instance", "one").stdout
    assert machine.run("rspd", "status", "--instance", "two", check=False).returncode == 69
    assert status(machine)["process"]["pid"] == machine.pid("rspd@one"), "it is the only one"
    machine.systemctl("start", "rspd")
    assert status(machine)["process"]["pid"] == machine.pid()
    assert status(machine, "--instance", "one")["process"]["pid"] == machine.pid("rspd@one")
    machine.systemctl("stop", "rspd@one")
    assert sockets(machine, "/run/rspd-one") == []
    assert complaints(machine) == []


def test_after_a_crash_the_next_process_answers_whatever_was_left_of_the_socket(machine: Machine) -> None:
    start(machine, MANY)
    first = status(machine)["process"]
    machine.systemctl("kill", "--signal=KILL", "rspd")
    eventually(lambda: machine.pid() not in (0, first["pid"]) and machine.show("ActiveState") == "active")
    second = status(machine)["process"]  # at the socket in systemd's store
    assert second["lineage"] != first["lineage"], "it counts anew"

    machine.drop_in("rspd.service", "[Service]\nRestart=no")
    machine.systemctl("kill", "--signal=KILL", "rspd")
    eventually(lambda: machine.show("ActiveState") == "failed")
    assert sockets(machine) == ["control.sock"]
    refused = machine.run("rspd", "status", check=False)
    assert refused.returncode == 69
    assert f"{CONTROL}: nobody listens there" in refused.stderr
    machine.systemctl("start", "rspd")
    assert status(machine)["process"]["pid"] == machine.pid()
    assert rights(machine) == "660 rspd:rspd"
    assert complaints(machine) == []


# Restarts and workers


def test_a_restart_keeps_connections_counts_and_who_asks_meanwhile(machine: Machine) -> None:
    start(machine, WITH_METRICS)
    with Talks(3) as talks:
        served()
        eventually(lambda: metrics().get(ENDED), "it has ended")
        machine.drop_in("rspd.service", f"[Service]\nExecStartPre=/bin/sh -c 'until [ -e {GO} ]; do sleep 0.02; done'")
        before, counted, file = connections(machine), metrics(), machine.path(CONTROL).stat().st_ino
        machine.systemctl("restart", "--no-block", "rspd")
        eventually(lambda: machine.show("SubState") == "start-pre", "one process is gone, and none has come")
        looking = begin(socket.AF_UNIX, str(machine.path(CONTROL)), "/v1/status")
        scraping = begin(socket.AF_INET, METRICS, "/metrics")
        machine.write(GO, "")
        answered = json.loads(finish(looking))
        assert answered["process"]["handovers"] == 1
        assert answered["process"]["service_age"] > answered["process"]["age"]
        assert metrics(scraping)["rspd_handovers_total"] == 1
        eventually(lambda: machine.show("ActiveState") == "active")
        assert answered["process"]["pid"] == machine.pid()
        assert machine.path(CONTROL).stat().st_ino == file
        talks.talk()
        served()
        eventually(lambda: connections(machine).keys() == before.keys(), "who was served has gone")
        after = connections(machine)
        assert {(one["sent"], one["received"], one["handovers"]) for one in before.values()} == {(3000, 3000, 0)}
        assert {(one["sent"], one["received"], one["handovers"]) for one in after.values()} == {(6000, 6000, 1)}
        eventually(lambda: metrics()[ENDED] == 2)
        grown = {name: value - counted[name] for name, value in metrics().items() if "_total" in name}
    assert {name: value for name, value in grown.items() if value} == {
        'rspd_accepted_total{proxy=""}': 1,
        ENDED: 1,
        SENT: 4 * 3000,
        SENT.replace("upload", "download"): 4 * 3000,
        "rspd_handovers_total": 1,
    }
    machine.path(GO).unlink()
    machine.systemctl("stop", "rspd")
    assert sockets(machine) == []
    assert complaints(machine) == []


@pytest.fixture
def workers(machine: Machine) -> Iterator[Machine]:
    """The file's machine with three processes, eight clients in each, and metrics."""
    machine.write("/etc/rspd.yaml", WITH_METRICS.replace("100", "8"))
    machine.systemctl("enable", "--quiet", *WORKERS)
    machine.systemctl("start", "rspd")
    eventually(lambda: [machine.show("ActiveState", unit) for unit in SERVICES] == ["active"] * len(SERVICES))
    yield machine
    machine.systemctl("disable", "--quiet", *WORKERS)


def test_three_processes_on_one_socket_are_shown_as_one_and_their_metrics_summed(workers: Machine) -> None:
    pids = {workers.pid(unit) for unit in SERVICES}
    assert sockets(workers) == ["control.sock", "worker-1.sock", "worker-2.sock"]
    assert {rights(workers, f"{FOLDER}/{name}") for name in sockets(workers)} == {"660 rspd:rspd"}
    asked = [status(workers, "--socket", f"{FOLDER}/{name}")["process"] for name in sockets(workers)[1:]]
    assert [one["worker"] for one in asked] == ["1", "2"]
    assert [one["pid"] for one in asked] == [workers.pid(unit) for unit in WORKERS]
    listening = workers.run("ss", "-Hltnp", f"sport = :{METRICS[1]}").stdout
    assert pids & set(map(int, re.findall(r"pid=(\d+)", listening))) == {workers.pid()}
    with Talks(20) as talks:
        seen = status(workers)
        assert seen["process"]["processes"] == 3
        assert (seen["proxies"][0]["open"], seen["proxies"][0]["most"]) == (20, 24)
        eventually(lambda: "3 processes" in workers.run("rspd", "status").stdout)
        assert len(connections(workers)) == 20
        assert {one["sent"] for one in connections(workers).values()} == {3000}
        found = eventually(lambda: found if (found := metrics())['rspd_processes{state="answering"}'] == 3 else {})
        assert found['rspd_open_connections{proxy=""}'] == 20
        assert found['rspd_accepted_total{proxy=""}'] == 20
        before = connections(workers)
        workers.systemctl("restart", *SERVICES)
        talks.talk()
        assert connections(workers).keys() == before.keys()
        eventually(lambda: (found := metrics())['rspd_accepted_total{proxy=""}'] == 20 and found[SENT] == 20 * 6000)
        talks.end()
        workers.systemctl("stop", "rspd")
        assert status(workers)["process"]["processes"] == 2
        eventually(lambda: workers.run("rspd", "status", "--check", check=False).returncode == 0)
    workers.systemctl("stop", "rspd.socket")
    eventually(lambda: sockets(workers) == [])
    assert complaints(workers) == []


# The module that metrics need


@pytest.fixture
def without_module(machine: Machine) -> Iterator[Machine]:
    """The file's machine without python3-prometheus-client, as the package leaves it."""
    machine.run("mv", MODULE, "/opt/")
    yield machine
    machine.shell(f"[ ! -e /opt/prometheus_client ] || mv /opt/prometheus_client {MODULE}")


REASON = "metrics: expected the module prometheus_client, "


def test_without_the_module_a_start_with_metrics_is_refused(without_module: Machine) -> None:
    machine = without_module
    machine.write("/etc/rspd.yaml", WITH_METRICS)
    assert machine.systemctl("start", "rspd", check=False).returncode == 1
    assert [machine.show(name) for name in ("ExecMainStatus", "NRestarts")] == ["78", "0"]
    assert machine.show("StatusText").startswith(REASON)
    assert "install Debian's python3-prometheus-client" in machine.show("StatusText")
    (complaint,) = complaints(machine)
    assert complaint.startswith(REASON)
    assert sockets(machine) == []


def test_without_the_module_a_reload_or_a_restart_with_metrics_changes_nothing(without_module: Machine) -> None:
    machine = without_module
    start(machine, MANY)
    with Talks(1) as talks:
        reload(machine, WITH_METRICS.replace(":8080", ":8081"))
        (complaint,) = complaints(machine)
        assert complaint.startswith(f"reload failed, nothing has changed: {REASON}")
        talks.talk()
        served()
        assert f"reload failed: {REASON}" in machine.show("StatusText")
        assert f"not in force: {REASON}" in machine.run("rspd", "status").stdout
        machine.systemctl("restart", "rspd")
        talks.talk()
        served()
        assert f"serving by the settings of the process before: {REASON}" in machine.show("StatusText")
        with pytest.raises(ConnectionRefusedError):
            metrics()

        machine.run("mv", "/opt/prometheus_client", MODULE)
        machine.write("/etc/rspd.yaml", WITH_METRICS)
        machine.systemctl("restart", "rspd")
        assert metrics()['rspd_open_connections{proxy=""}'] == 1
        machine.run("mv", MODULE, "/opt/")
        machine.systemctl("restart", "rspd")
        talk(talks.clients[0])
        assert f"serving by the settings of the process before: {REASON}" in machine.show("StatusText")
        assert {one["handovers"] for one in connections(machine).values()} == {3}
        machine.run("rspd", "status", "--check")
        with pytest.raises(ConnectionRefusedError):
            metrics()
