"""The process under systemd: what that hears of it, ready, status, reload, end, signs of life; and what the journal."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from tests.manager import OWN_PID, NotifySocket, Service, launch, notify_socket, service
from tests.support import PATIENCE, Backend, Daemon, answer, echo, eventually, receive_all

SERVING = r"serving {} of {}, {} served, {}"


def ask(daemon: Service) -> None:
    """One connection, from beginning to end."""
    with daemon.connect() as client:
        client.sendall(b"?")
        assert client.recv(2) == b"ok"
        assert client.recv(1) == b""


def let_pass(seconds: float) -> None:
    """For what is not to happen meanwhile: there is nothing to wait for."""
    time.sleep(seconds)


class File:
    """A configuration file with a backend that nobody has to reach, and what else a test wants."""

    def __init__(self, folder: Path, text: str = "", backend: str = "192.0.2.1:80") -> None:
        self.path = folder / "rspd.yaml"
        self._first = f"listen: 127.0.0.1:0\nbackend: {backend}\n"
        self.write(text)

    def write(self, text: str) -> None:
        self.path.write_text(self._first + text)


def monotonic_usec() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


# Ready, and what it is doing


def test_it_is_ready_when_clients_can_connect_and_not_before(tmp_path: Path) -> None:
    with service("-b", "192.0.2.1:80", listen=[f"{tmp_path}/s", f"{tmp_path}/t"], wait=False) as daemon:
        (ready,) = daemon.notify.wait_for("READY=1")
        for name in ("s", "t"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{tmp_path}/{name}")
        stored, other = daemon.notify.with_field("FDSTORE"), daemon.notify.messages
        assert next(message for message in other if message not in stored) == ready
        assert ready.text == "READY=1\nSTATUS=serving 0 of 1, 0 served, backend 192.0.2.1:80"
        assert daemon.process.poll() is None


def test_the_status_counts_who_is_served_and_who_was(tmp_path: Path) -> None:
    with Backend(echo) as first, Backend(echo) as second:
        words = ["-b", first.address, "-b", f"{tmp_path}/s", "-b", second.address, "--max-connections", "3"]
        with service(*words, listen=["127.0.0.1:0"]) as daemon:
            daemon.notify.wait_for_status(SERVING.format(0, 3, 0, "3 of 3 backends up"))
            up = rf"2 of 3 backends up \({tmp_path}/s down: No such file or directory\)"
            with daemon.connect() as one, daemon.connect(), daemon.connect():
                # One of them was led to the backend that is down, and then to another.
                daemon.notify.wait_for_status(SERVING.format(3, 3, 3, up))
                one.sendall(b"x")
                assert one.recv(1) == b"x"
            daemon.notify.wait_for_status(SERVING.format(0, 3, 3, up))


def test_the_status_says_when_the_only_backend_is_down(tmp_path: Path) -> None:
    with service("-b", f"{tmp_path}/s", listen=["127.0.0.1:0"]) as daemon:
        with daemon.connect() as client:
            assert client.recv(1) == b""
        daemon.notify.wait_for_status(SERVING.format(0, 1, 1, f"backend {tmp_path}/s down: No such file or directory"))


def test_the_status_changes_once_a_second_at_most_and_ends_up_right() -> None:
    with Backend(answer) as backend, service("-b", backend.address, listen=["127.0.0.1:0"]) as daemon:
        begun = time.monotonic()
        served = 0
        for _ in range(2):
            for _ in range(30):
                ask(daemon)
            served += 30
            daemon.notify.wait_for_status(SERVING.format(0, 1, served, f"backend {re.escape(backend.address)}"))
        count = len(daemon.notify.with_field("STATUS"))
        assert count <= time.monotonic() - begun + 2


@pytest.mark.parametrize("env", [{}, {"WATCHDOG_USEC": "300000", "WATCHDOG_PID": "1"}])
def test_idle_and_without_a_watchdog_it_sleeps_and_says_nothing(env: dict[str, str]) -> None:
    with service("-b", "192.0.2.1:80", listen=["127.0.0.1:0"], env=env) as daemon:
        daemon.notify.wait_for("STATUS", 2)  # the one of READY, and one a second after
        eventually(lambda: state(daemon) == "S")
        messages, turns = len(daemon.notify.messages), switches(daemon)
        let_pass(1.5)
        assert (len(daemon.notify.messages), switches(daemon)) == (messages, turns)


def state(daemon: Service) -> str:
    """As in proc(5): S is asleep."""
    return Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(") ")[2][0]


def switches(daemon: Service) -> int:
    """How often the process has gone to sleep."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)
    assert found
    return int(found[1])


# Reload


@pytest.mark.parametrize("text", ["max_connections: 7\n", "colour: red\n", "listen: [\n"])
def test_a_reload_is_announced_with_its_time_and_ends_with_ready(tmp_path: Path, text: str) -> None:
    file = File(tmp_path)
    with service("-c", str(file.path)) as daemon:
        daemon.notify.wait_for("READY=1")
        file.write(text)
        for count in (1, 2):
            before = monotonic_usec()
            daemon.signal(signal.SIGHUP)
            reloading = daemon.notify.wait_for("RELOADING=1", count)[-1]
            daemon.notify.wait_for("READY=1", count + 1)
            assert before <= int(reloading.fields["MONOTONIC_USEC"]) <= monotonic_usec()
        steps = [step for m in daemon.notify.messages for step in ("RELOADING=1", "READY=1") if step in m.text]
        assert steps == ["READY=1"] + ["RELOADING=1", "READY=1"] * 2


def test_without_a_file_a_reload_is_announced_and_ends_too() -> None:
    with service("-b", "192.0.2.1:80", listen=["127.0.0.1:0"]) as daemon:
        daemon.signal(signal.SIGHUP)
        daemon.notify.wait_for("RELOADING=1")
        ready = daemon.notify.wait_for("READY=1", 2)[-1]
        assert ready.status == "serving 0 of 1, 0 served, backend 192.0.2.1:80"
        daemon.wait_for("nothing to reload, the configuration is on the command line")


def test_the_status_says_that_the_last_reload_failed_until_one_does_not(tmp_path: Path) -> None:
    with Backend(answer) as backend:
        file = File(tmp_path, backend=backend.address)
        with service("-c", str(file.path)) as daemon:
            file.write("backlog: 0\ncolour: red\n")
            daemon.signal(signal.SIGHUP)
            failure = (
                rf"; reload failed: {re.escape(str(file.path))}:3: backlog: expected .*, found '0'; "
                rf"{re.escape(str(file.path))}:4: colour: unknown key, .*"
            )
            serving = SERVING.format(0, "{}", "{}", f"backend {re.escape(backend.address)}")
            ready = daemon.notify.wait_for("READY=1", 2)[-1]
            assert re.fullmatch(serving.format(1, 0) + failure, ready.status)
            ask(daemon)
            daemon.notify.wait_for_status(serving.format(1, 1) + failure)
            file.write("max_connections: 2\n")
            daemon.signal(signal.SIGHUP)
            ready = daemon.notify.wait_for("READY=1", 3)[-1]
            assert re.fullmatch(serving.format(2, 1), ready.status)


def test_a_file_that_has_gone_is_a_failed_reload_with_its_reason(tmp_path: Path) -> None:
    file = File(tmp_path)
    with service("-c", str(file.path)) as daemon:
        file.path.unlink()
        daemon.signal(signal.SIGHUP)
        ready = daemon.notify.wait_for("READY=1", 2)[-1]
        assert ready.status.endswith(f"; reload failed: {file.path}: cannot be read: No such file or directory")


# The end


def test_the_end_is_announced_and_systemd_asked_to_wait_while_it_takes(tmp_path: Path) -> None:
    with Backend(echo) as backend:
        file = File(tmp_path, "drain_timeout: 2500ms\n", backend.address)
        with service("-c", str(file.path)) as daemon, daemon.connect() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            daemon.signal(signal.SIGTERM)
            (stopping, *_) = daemon.notify.wait_for("STOPPING=1")
            assert stopping.status == f"ending, 1 open, 1 served, backend {backend.address}"
            assert stopping.fields["EXTEND_TIMEOUT_USEC"] == "30000000"
            assert daemon.wait() == 0
            daemon.notify.wait_for_status(f"ended, 1 served, backend {re.escape(backend.address)}")
        extended = daemon.notify.with_field("EXTEND_TIMEOUT_USEC")
        assert len(extended) >= 3  # at once, and after each of two seconds
        assert extended[0] == stopping
        assert extended[2].when - extended[0].when < 10
        assert not any("READY=1" in message.text for message in extended)


def test_systemd_is_not_asked_to_wait_where_draining_has_no_end(tmp_path: Path) -> None:
    """Its own limit is the only one then."""
    with Backend(echo) as backend:
        file = File(tmp_path, "drain_timeout: off\n", backend.address)
        with service("-c", str(file.path)) as daemon:
            with daemon.connect() as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                daemon.signal(signal.SIGTERM)
                daemon.notify.wait_for("STOPPING=1", 2)
            assert daemon.wait() == 0
            daemon.notify.wait_for_status("ended, .*")
            assert not daemon.notify.with_field("EXTEND_TIMEOUT_USEC")


def test_without_connections_the_end_is_announced_too() -> None:
    with service("-b", "192.0.2.1:80", listen=["127.0.0.1:0"]) as daemon:
        assert daemon.stop() == 0
        last = daemon.notify.wait_for_status(r"ended, 0 served, backend 192\.0\.2\.1:80")[-1]
        assert "STOPPING" in last.fields


# Signs of life


def arrived(notify: NotifySocket) -> int:
    """How many messages there are when all that was sent before has arrived: they come in order."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"SENT_BY_TEST=1", notify.path)
    notify.wait_for("SENT_BY_TEST")
    return len(notify.messages)


def test_signs_of_life_come_three_times_as_often_as_wanted_and_not_from_a_stopped_process() -> None:
    env = {"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": OWN_PID}
    with service("-b", "192.0.2.1:80", listen=["127.0.0.1:0"], env=env) as daemon:
        times = [message.when for message in daemon.notify.wait_for("WATCHDOG=1", 5)]
        # The median: a machine that stands still delays one of them.
        assert median(after - before for before, after in pairwise(times)) < 0.7
        assert times[-1] - times[0] > 1.0  # 2.0 if all arrive without delay
        daemon.signal(signal.SIGSTOP)
        eventually(lambda: state(daemon) == "T")
        count = arrived(daemon.notify)
        let_pass(1.2)
        assert len(daemon.notify.messages) == count
        alive = len(daemon.notify.with_field("WATCHDOG=1"))
        daemon.signal(signal.SIGCONT)
        daemon.notify.wait_for("WATCHDOG=1", alive + 1)


def test_signs_of_life_go_on_while_it_drains(tmp_path: Path) -> None:
    with Backend(echo) as backend:
        file = File(tmp_path, "drain_timeout: 60s\n", backend.address)
        env = {"WATCHDOG_USEC": "1000000"}
        with service("-c", str(file.path), env=env) as daemon, daemon.connect():
            daemon.notify.wait_for_status(r"serving 1 .*")
            daemon.signal(signal.SIGTERM)
            daemon.notify.wait_for("STOPPING=1")
            alive = len(daemon.notify.with_field("WATCHDOG=1"))
            times = [message.when for message in daemon.notify.wait_for("WATCHDOG=1", alive + 4)[alive:]]
            assert median(after - before for before, after in pairwise(times)) < 0.5
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0


# What does not start


def failed(notify: NotifySocket, *arguments: str, log: str, messages: int = 1) -> int:
    """Run rspd, which is not to start for the reason in its log; so many messages to systemd are left to look at."""
    done = subprocess.run(
        [sys.executable, "-m", "rspd", *arguments],
        env={**os.environ, **notify.env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert re.search(log, done.stderr)
    notify.wait_for("STATUS", messages)
    assert not notify.with_field("READY")
    assert len(notify.messages) == messages
    return done.returncode


def test_a_port_in_use_is_waited_for_and_then_told_with_its_errno() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, notify_socket() as notify:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        begun = time.monotonic()
        assert failed(notify, "-l", address, "-b", "a:1", log=f"cannot listen on {address}", messages=2) == 69
        assert time.monotonic() - begun >= 5
    waiting, message = notify.messages
    assert waiting.text == "STATUS=" + message.status
    assert message.fields["ERRNO"] == str(errno.EADDRINUSE)
    assert message.status.startswith(f"cannot listen on {address}: Address already in use; another process has ")


def test_a_port_that_becomes_free_while_it_waits_is_taken() -> None:
    with Backend(answer) as backend, ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with service("-b", backend.address, listen=[address], wait=False) as daemon:
            (line,) = daemon.wait_for("cannot listen")
            assert f"WARNING cannot listen on {address}: Address already in use; " in line
            assert line.endswith("; trying again for 5 s")
            stack.close()
            daemon.notify.wait_for("READY=1")
            daemon.wait_for("listening address=")
            ask(daemon)
            assert len(daemon.find("cannot listen")) == 1


def test_all_that_is_wrong_with_a_file_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rspd.yaml"
    path.write_text("listen: x y\nbacklog: 0\n")
    with notify_socket() as notify:
        assert failed(notify, "-c", str(path), log="backlog: expected") == 78
    (message,) = notify.messages
    parts = message.status.split("; ")
    assert parts[0].startswith(f"{path}:1: listen: expected")
    assert parts[1].startswith(f"{path}:2: backlog: expected")
    assert parts[2] == f"{path}: backend: missing, expected an address to relay to"
    assert "ERRNO" not in message.fields


def test_a_file_that_cannot_be_read_is_told_with_its_errno(tmp_path: Path) -> None:
    with notify_socket() as notify:
        assert failed(notify, "-c", f"{tmp_path}/none", log="cannot be read") == 78
    (message,) = notify.messages
    assert message.fields["ERRNO"] == str(errno.ENOENT)
    assert message.status.startswith(f"{tmp_path}/none: cannot be read: No such file or directory; ")


def test_a_wrong_argument_is_told() -> None:
    with notify_socket() as notify:
        assert failed(notify, "--colour", log="unknown option '--colour'") == 64
    (message,) = notify.messages
    assert message.text == "STATUS=unknown option '--colour'; see rspd --help"


def test_too_few_descriptors_are_told() -> None:
    with notify_socket() as notify:
        assert failed(notify, "8080", "a", "1", "--max-connections", "1000000", log="LimitNOFILE=") == 71
    assert notify.messages[0].fields["ERRNO"] == str(errno.EMFILE)


def test_a_pid_file_that_is_refused_is_told(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    pid_file.write_text("precious")
    with notify_socket() as notify:
        assert failed(notify, "8080", "a", "1", "--pid-file", str(pid_file), log="left as it is") == 73
    assert notify.status.startswith(f"pid file {pid_file}: expected a process's number")


# The pid file, and systemd that does not listen


def test_a_pid_file_is_written_in_place_also_where_it_does_not_detach(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with service("-b", "192.0.2.1:80", "--pid-file", str(path), listen=["127.0.0.1:0"]) as daemon:
        daemon.notify.wait_for("READY=1")
        assert path.read_text() == f"{daemon.pid}\n"
    assert not path.exists()


@contextmanager
def deaf_manager() -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket that is full, and its path."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler,
    ):
        deaf.bind(f"{folder}/n")
        deaf.settimeout(PATIENCE)
        filler.setblocking(False)
        filler.connect(f"{folder}/n")
        with pytest.raises(BlockingIOError):
            while True:
                filler.send(b"x")
        yield deaf, f"{folder}/n"


def hear(manager: socket.socket, beginning: bytes) -> bytes:
    """Read on until a message begins like this."""
    while not (message := manager.recv(4096)).startswith(beginning):
        pass
    return message


def test_a_service_manager_that_reads_nothing_does_not_stop_it() -> None:
    with deaf_manager() as (_, path), Backend(answer) as backend:
        with service("-b", backend.address, listen=["127.0.0.1:0"], env={"NOTIFY_SOCKET": path}) as daemon:
            for _ in range(3):
                ask(daemon)


def test_a_reload_while_the_service_manager_reads_nothing_stops_no_connection_and_is_told_later(
    tmp_path: Path,
) -> None:
    with deaf_manager() as (manager, path), Backend(echo) as backend:
        file = File(tmp_path, backend=backend.address)
        with service("-c", str(file.path), env={"NOTIFY_SOCKET": path}) as daemon, daemon.connect() as client:
            longest = [0.0] * 3  # of each reload
            for count in range(1, 4):
                daemon.signal(signal.SIGHUP)
                while len(daemon.find("reloaded")) < count:
                    begun = time.monotonic()
                    client.sendall(b"x")
                    assert client.recv(1) == b"x"
                    longest[count - 1] = max(longest[count - 1], time.monotonic() - begun)
            assert median(longest) < 0.7  # it waited for a second before and after each reload
            assert hear(manager, b"READY=1").endswith(b"1 served, backend " + backend.address.encode())
            client.close()
            hear(manager, b"WATCHDOG=1\nSTATUS=serving 0 of 1, 1 served")


# Started by systemd, in other ways than above


@pytest.mark.parametrize("name", ["SYSTEMD_EXEC_PID", "NOTIFY_SOCKET"])
def test_it_stays_where_systemd_has_started_it(tmp_path: Path, name: str) -> None:
    launcher, _ = launch([], [])
    daemon = Daemon("-l", f"{tmp_path}/s", "-b", "a:1", foreground=False, launcher=launcher, env={name: OWN_PID})
    try:
        assert daemon.find("listening address=")
        assert daemon.process.poll() is None
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_what_is_wrong_has_its_priority_on_each_line_in_the_journal(tmp_path: Path) -> None:
    (tmp_path / "rspd.yaml").write_text("listen: x y\nbackend: 80\n")
    lines = logged_to_the_journal("-m", "rspd", "-c", f"{tmp_path}/rspd.yaml", code=78)
    assert [re.sub(r"^(<\d>).*:(\d: \w+): .*", r"\1\2", line) for line in lines] == ["<3>1: listen", "<3>2: backend"]


# Both before and after the log is set up
@pytest.mark.parametrize("function", ["load_config", "run"])
def test_a_bug_at_the_start_is_70_and_its_traceback_is_one_error_in_the_journal(tmp_path: Path, function: str) -> None:
    code = f"""
import sys, rspd.cli
def fail(*arguments, **options):
    raise RuntimeError("nobody\\nexpected this")
rspd.cli.{function} = fail
sys.exit(rspd.cli.main())
"""
    lines = logged_to_the_journal("-c", code, "--foreground", "-l", f"{tmp_path}/s", "-b", "a:1", code=70)
    assert "Traceback (most recent call last):" in lines[1]
    assert lines[-2:] == ["<3>RuntimeError: nobody", "<3>expected this"]
    assert all(line.startswith("<3>") for line in lines)


def logged_to_the_journal(*arguments: str, code: int) -> list[str]:
    """Run Python to its end with the journal as stderr, as a service; what it says there."""
    near, far = socket.socketpair()
    with near, far:
        status = os.fstat(far.fileno())
        done = subprocess.run(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=far.fileno(),
            env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
            timeout=PATIENCE,
            check=False,
        )
        far.close()
        assert done.returncode == code
        return receive_all(near).decode().splitlines()
