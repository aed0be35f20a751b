"""The control socket of a running rspd: where it is, who may connect to it, and what a reload makes of it."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rspd import __version__
from rspd.admin.client import AnswerError, ask
from rspd.admin.request import MOST
from rspd.net.descriptors import OWN
from tests.daemon.control import connections, metrics, status, unix_listeners
from tests.daemon.test_handover_upgrade import upgraded
from tests.daemon.test_upgrade import Files
from tests.fleet import REPOSITORY, File, talks
from tests.manager import unix_listener
from tests.support import (
    OUR_USER,
    PATIENCE,
    Backend,
    Daemon,
    answer,
    echo,
    eventually,
    free_port,
    private_mounts,
    receive_all,
    reset,
    rspd,
)

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@pytest.fixture
def run() -> Iterator[Path]:
    """The folder that systemd makes for a service; others may look into it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path, backend="127.0.0.1:1")


def env(run: Path, **more: str) -> dict[str, str]:
    return {"RUNTIME_DIRECTORY": str(run), **more}


def reload_badly(daemon: Daemon, file: File, **keys: Any) -> str:
    """Have a file read that cannot be followed. Returns what the log says of it."""
    before = dict(file.keys)
    file.write(**keys)
    count = len(daemon.find("reload failed"))
    daemon.signal(signal.SIGHUP)
    text = daemon.wait_for("reload failed", count + 1)[-1]
    file.keys = before
    file.write()
    return text.partition("nothing has changed: ")[2]


# Where it is


def test_in_the_folder_of_the_service_it_is_from_the_start_to_the_end(run: Path, file: File) -> None:
    path = run / "control.sock"
    with file.rspd(env=env(run)) as daemon:
        assert os.listdir(run) == unix_listeners(daemon) == ["control.sock"]
        found = path.lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o660, os.geteuid(), os.getegid())
        process = status(path).process
        assert (process.version, process.pid, process.worker) == (__version__, daemon.pid, "")
        assert (process.failure, process.reloads, process.handovers, process.ending) == ("", 0, 0, False)
        assert 0 < process.age == process.service_age < 60
        assert 0 <= process.descriptors - len(daemon.descriptors()) <= 1  # who asks, if that one is gone
        assert connections(path) == ()
        for target in ("/", "/v1", "/v1/status/", "/metrics", "/v2/status"):
            with pytest.raises(AnswerError, match=f"^expected /v1/status or /v1/connections, found {target}$"):
                ask(str(path), target)
        with pytest.raises(AnswerError, match="expected a query for connections: limit: expected a number"):
            ask(str(path), "/v1/connections?limit=x")
        assert daemon.stop() == 0
        assert os.listdir(run) == []
    assert not daemon.find("WARNING|ERROR")


def test_without_a_folder_of_the_service_there_is_none(file: File) -> None:
    with file.rspd(env={"RUNTIME_DIRECTORY": ""}) as daemon:
        assert unix_listeners(daemon) == []


def test_a_file_may_name_another_place_and_who_may_look(run: Path, file: File) -> None:
    path = run / "other.sock"
    (run / "folder").mkdir()
    file.write(control=str(path), control_mode="0606", control_group="no-such-group")
    with file.rspd(env=env(run / "folder")) as daemon:
        assert unix_listeners(daemon) == ["other.sock"]
        assert os.listdir(run / "folder") == []
        assert stat.S_IMODE(path.lstat().st_mode) == 0o606
        assert status(path).process.pid == daemon.pid
        (warning,) = daemon.find("WARNING")
        what = "expected a group of this host, found 'no-such-group'"
        assert warning.endswith(f"who may look is not as configured: {what}")
        assert daemon.stop() == 0
        assert not path.exists()


def test_a_worker_has_its_own_and_serves_no_metrics(run: Path, file: File) -> None:
    port = free_port()
    pytest.importorskip("prometheus_client")
    file.write(metrics=f"127.0.0.1:{port}")
    with file.rspd(env=env(run, RSPD_WORKER="12")) as daemon:
        assert os.listdir(run) == unix_listeners(daemon) == ["worker-12.sock"]
        assert status(run / "worker-12.sock").process.worker == "12"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        file.reload(daemon, control=f"{run}/other.sock")
        assert os.listdir(run) == ["other-worker-12.sock"]


def test_metrics_count_a_worker_once_whose_socket_a_reload_moves(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    with Backend(answer) as backend:
        file = File(tmp_path, backend=backend.address, metrics=f"127.0.0.1:{port}", control=f"{run}/one.sock")
        with file.rspd() as daemon, file.rspd(env={"RSPD_WORKER": "1"}) as worker:
            for number in range(1, 6):
                with (daemon, worker)[number % 2].connect() as client:
                    client.sendall(b"?")
                    assert receive_all(client) == b"ok"
            eventually(lambda: metric(port, "rspd_connections_total") == 5)
            for one in daemon, worker:
                file.reload(one, control=f"{run}/two.sock")
            assert metric(port, "rspd_connections_total") == 5
            assert metric(port, "rspd_processes") == 2


def test_scrapes_that_come_faster_than_silent_workers_are_given_up_share_a_text(run: Path, file: File) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    file.write(metrics=f"127.0.0.1:{port}", control=f"{run}/control.sock")
    with ExitStack() as stack:
        for number in range(3):
            stack.enter_context(unix_listener(f"{run}/worker-{number}.sock"))
        daemon = stack.enter_context(file.rspd())

        def scrape(accept: str) -> socket.socket:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            client.settimeout(PATIENCE)
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: %s\r\n\r\n" % accept.encode())
            return client

        began = time.monotonic()
        for _ in range(4):
            reset(scrape("*/*"))
        clients = [scrape(accept) for accept in ("*/*", "application/openmetrics-text") for _ in range(5)]
        threads = 0
        while not all(select.select([client], [], [], 0.01)[0] for client in clients):
            threads = max(threads, len(os.listdir(f"/proc/{daemon.pid}/task")))
            assert time.monotonic() - began < PATIENCE
        assert threads <= 3  # the loop's, one that makes a text, and the one before, which may be about to end
        texts = [receive_all(client).decode() for client in clients]
        assert ["# EOF" in text for text in texts] == [False] * 5 + [True] * 5
        assert all('rspd_processes{state="silent"} 3.0' in text for text in texts)
        assert time.monotonic() - began < 10  # as long as Prometheus waits; it is 2


def metric(port: int, name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(float(value) for value in re.findall(rf"^{name}\S* (\S+)$", metrics(port), re.MULTILINE))


# Where somebody else listens


def test_at_the_usual_place_another_process_only_costs_a_warning(run: Path, file: File) -> None:
    path = run / "control.sock"
    with unix_listener(str(path)) as other:
        with file.rspd(env=env(run)) as daemon:
            (warning,) = daemon.find("WARNING")
            assert warning.endswith(
                f"nobody can look at this process, cannot listen on {path}: "
                "Address already in use; another process listens there, `ss -lxp` shows which"
            )
            with daemon.connect() as client:
                assert client.recv(1) == b""  # it is served: its backend refuses
            assert daemon.stop() == 0
        assert path.is_socket()  # it is not ours
        other.close()
        with file.rspd(env=env(run)) as daemon:
            assert status(path).process.pid == daemon.pid
            assert not daemon.find("WARNING")


def test_at_a_place_of_the_file_it_ends_the_start(run: Path, file: File) -> None:
    path = run / "other.sock"
    file.write(control=str(path))
    with unix_listener(str(path)), file.rspd(wait=False) as daemon:
        assert daemon.wait() == os.EX_UNAVAILABLE
        assert f"cannot listen on {path}: Address already in use; another process listens there" in daemon.log
        assert not daemon.find("listening")


# Where it would be in the way

LIMIT = 1024
# So many connections fit into that limit if nobody looks, and if somebody may: two descriptors each, and a listener.
ALL, LESS = (LIMIT - OWN - 1) // 2, (LIMIT - OWN - 2 - 2 * MOST) // 2


def test_one_that_nobody_asked_for_ends_no_start_no_reload_and_no_upgrade_for_want_of_descriptors(
    run: Path, file: File
) -> None:
    file.write(max_connections=ALL, control="off")
    with file.rspd(env=env(run), limit=(LIMIT, LIMIT)) as daemon:
        file.write(control=None)
        assert upgraded(daemon.process.pid) == (0, "")
        (warning,) = daemon.wait_for("WARNING")
        assert warning.endswith(
            f"nobody can look at this process, max_connections {ALL} needs {2 * ALL + OWN + 1 + 2 * MOST + 1} "
            f"descriptors, and the limit is {LIMIT}: lower it to {LESS} or raise the limit "
            "(LimitNOFILE= in the unit, ulimit -Hn in a shell), or say control: off"
        )
        for count, there in [(LESS, ["control.sock"]), (ALL, []), (LESS, ["control.sock"])]:
            file.reload(daemon, max_connections=count)
            assert os.listdir(run) == unix_listeners(daemon) == there
        assert len(daemon.find("nobody can look at this process")) == 2
        assert status(run / "control.sock").process.failure == ""
        # Who asks for it has to make room for it.
        assert f"lower it to {LESS}" in reload_badly(daemon, file, max_connections=ALL, control=f"{run}/x.sock")


def test_one_that_nobody_asked_for_ends_no_reload_if_its_modules_are_gone(
    run: Path, file: File, tmp_path: Path
) -> None:
    (tmp_path / "installed").mkdir()
    installed = Files(tmp_path / "installed")
    file.write(control="off")
    with file.rspd(env=env(run), launcher=installed.launcher) as daemon:
        installed.replace()
        file.reload(daemon, control=None, max_connections=7)
        (warning,) = daemon.find("WARNING")
        assert warning.endswith(
            "nobody can look at this process, control, metrics: cannot be prepared: another version; restart rspd, "
            "or say control: off"
        )
        what = "control, metrics: cannot be prepared: another version; restart rspd"
        assert reload_badly(daemon, file, control=f"{run}/x.sock") == what


# Who may look


# What comes before the code that runs as a user of these tests' own, who may not be able to read Python's files.
AS_OUR_USER = f"""
import os, sys, grp, locale, {{}}
os.setgroups([])
os.setresgid({OUR_USER}, {OUR_USER}, {OUR_USER})
os.setresuid({OUR_USER}, {OUR_USER}, {OUR_USER})
"""


@NEEDS_ROOT
def test_a_group_that_rspd_is_not_in_is_told_with_the_line_for_the_unit(run: Path, file: File) -> None:
    os.chown(run, OUR_USER, OUR_USER)
    code = AS_OUR_USER.format("yaml, rspd.cli") + "os._exit(rspd.cli.main(sys.argv[4:]))"
    path = run / "rspd.yaml"  # this user can read it
    path.write_text("{listen: '127.0.0.1:0', backend: '127.0.0.1:1', control_group: daemon}\n")
    with rspd("-c", str(path), listen=(), env=env(run), launcher=[sys.executable, "-c", code]) as daemon:
        (warning,) = daemon.find("WARNING")
        needed = "SupplementaryGroups=daemon and SystemCallFilter=@chown"
        assert warning.endswith(f"rspd may not give the socket to the group daemon; its unit needs {needed}")
        assert status(run / "control.sock").process.pid == daemon.pid


@NEEDS_ROOT
def test_another_user_may_look_if_the_mode_says_so(run: Path, file: File) -> None:
    path = run / "control.sock"
    code = AS_OUR_USER.format("rspd.admin.client")
    code += "print(rspd.admin.client.ask(sys.argv[1], '/v1/status')['process']['pid'])"

    def look() -> tuple[int, str]:
        # That user may not write what coverage has measured.
        unmeasured = ["env", "-u", "COVERAGE_PROCESS_START", "-u", "COVERAGE_PROCESS_CONFIG"]
        done = subprocess.run([*unmeasured, sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]

    with file.rspd(env=env(run)) as daemon:
        assert look() == (1, "PermissionError: [Errno 13] Permission denied")
        file.reload(daemon, control_mode="0666")
        assert look() == (0, str(daemon.pid))
        file.reload(daemon, control_mode="0600", control_group="daemon")
        assert look() == (1, "PermissionError: [Errno 13] Permission denied")
        assert path.stat().st_gid == 1  # the number of this group on each Debian


# Reloads


def test_a_reload_moves_it_takes_it_away_and_brings_it_back(run: Path, file: File) -> None:
    with file.rspd(env=env(run)) as daemon:
        first = status(run / "control.sock").process
        file.reload(daemon, control=f"{run}/other.sock")
        assert os.listdir(run) == unix_listeners(daemon) == ["other.sock"]
        assert status(run / "other.sock").process.reloads == 1
        file.reload(daemon, control="off")
        assert os.listdir(run) == unix_listeners(daemon) == []
        file.reload(daemon, control=None)
        last = status(run / "control.sock").process
        assert (last.reloads, last.origin, last.pid) == (3, first.origin, first.pid)


# An import of prometheus_client waits until somebody writes into a pipe.
SLOW = """
import sys
sys.path.insert(0, {repository!r})
del sys.argv[1:4]
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "prometheus_client":
            open({pipe!r}).read()
sys.meta_path.insert(0, Slow())
from rspd.__main__ import main
raise SystemExit(main())
"""


def test_connections_go_on_while_a_reload_imports_what_metrics_need(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    pipe, program, port = tmp_path / "pipe", tmp_path / "program", free_port()
    os.mkfifo(pipe)
    program.write_text(SLOW.format(repository=str(REPOSITORY), pipe=str(pipe)))
    with Backend(echo) as backend, ExitStack() as stack:
        file = File(tmp_path, backend=backend.address)
        daemon = stack.enter_context(file.rspd(launcher=[sys.executable, str(program)]))
        client = stack.enter_context(daemon.connect())
        assert talks(client)
        file.write(metrics=f"127.0.0.1:{port}", control=f"{tmp_path}/sock")
        daemon.signal(signal.SIGHUP)
        with pipe.open("w"):  # it is open once the import waits
            assert talks(client)
            with daemon.connect() as another:
                assert talks(another)
            assert not daemon.find("reloaded")
        daemon.wait_for("reloaded")
        assert metric(port, "rspd_accepted_total") == 2


@pytest.mark.parametrize(("folder", "mode"), [(0o755, 0o606), (0o1777, 0o600)])
def test_without_proc_it_says_who_may_look_only_in_a_folder_where_nobody_else_may_write(
    tmp_path: Path, folder: int, mode: int
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(folder)
    launcher = [*private_mounts(), "sh", "-ec", 'mount -t tmpfs none /proc; exec "$@"', "sh"]
    with Backend(echo) as backend:
        file = File(tmp_path, backend=backend.address, control=f"{place}/sock", control_mode="0606")
        with file.rspd(launcher=launcher) as daemon:
            assert stat.S_IMODE((place / "sock").lstat().st_mode) == mode
            warnings = daemon.find("WARNING")
            if mode == 0o606:
                assert not warnings
            else:
                assert "who may look is not as configured: expected /proc, or a folder" in warnings[0]


# A stack of the size of the address space: no thread finds room for its own. In kB.
HUGE_STACK = 1 << 38


def test_a_reload_that_adds_what_answers_need_succeeds_where_no_thread_can_be_started(tmp_path: Path) -> None:
    with Backend(echo) as backend:
        file = File(tmp_path, backend=backend.address)
        with file.rspd(launcher=["sh", "-c", f'ulimit -s {HUGE_STACK} && exec "$@"', "sh"]) as daemon:
            file.reload(daemon, control=f"{tmp_path}/sock")
            assert status(tmp_path / "sock").process.pid == daemon.pid


def test_a_reload_that_changes_nothing_of_it_leaves_who_waits_and_its_file(run: Path, file: File) -> None:
    path = run / "control.sock"
    with file.rspd(env=env(run)) as daemon:
        before = path.lstat().st_ino
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /v1/status HTTP/1.1\r\n")
            file.reload(daemon, max_connections=7, control=str(path))  # the same place, by name
            assert path.lstat().st_ino == before
            client.sendall(b"Host: x\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        assert status(path).proxies[0].most == 7


def test_a_reload_that_fails_leaves_it_and_is_told_by_it(run: Path, file: File) -> None:
    path = run / "control.sock"
    with file.rspd(env=env(run)) as daemon, unix_listener(f"{run}/taken.sock"):
        for keys, what in [
            ({"max_connections": "x"}, "max_connections: expected a whole number"),
            ({"control": f"{run}/none/x.sock"}, f"cannot listen on {run}/none/x.sock: No such file or directory"),
            ({"control": f"{run}/taken.sock"}, f"cannot listen on {run}/taken.sock: Address already in use"),
            ({"listen": f"{run}/taken.sock", "control": "off"}, f"cannot listen on {run}/taken.sock"),
        ]:
            assert what in reload_badly(daemon, file, **keys)
            process = status(path).process
            assert what in process.failure
            assert unix_listeners(daemon) == ["control.sock"]
        assert (process.reloads, process.reloads_failed) == (0, 4)
        file.reload(daemon)
        process = status(path).process
        assert (process.failure, process.reloads, process.reloads_failed) == ("", 1, 4)
