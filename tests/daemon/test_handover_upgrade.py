"""`rspd upgrade`: a process executes the program anew in its place, and all connections go on."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rspd.errors import StartError
from rspd.host import upgrade
from tests.daemon.control import connections, metrics, status
from tests.daemon.test_detaching import end, host, journal, proc  # noqa: F401  # fixtures
from tests.daemon.test_handover import fixed
from tests.daemon.test_service import let_pass
from tests.fleet import REPOSITORY, File, talks
from tests.hosts import Host, Journal
from tests.keeper import managed
from tests.support import PATIENCE, Backend, Daemon, echo, eventually, free_port, is_reset, receive_all, rspd


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend(echo) as backend:
        yield backend


@pytest.fixture
def file(tmp_path: Path, backend: Backend) -> File:
    return File(tmp_path, listen=fixed(), backend=backend.address, max_connections=100)


def upgraded(*arguments: object) -> tuple[int, str]:
    """Run `rspd upgrade` with these arguments: its exit code, and what it says."""
    command = [sys.executable, "-m", "rspd", "upgrade", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert not done.stdout
    return done.returncode, done.stderr


def goes_on_as_it_is(daemon: Daemon, code: int, reason: str) -> None:
    """An upgrade is refused, for a reason that the command and the log say, and rspd has not changed."""
    pid = daemon.process.pid
    got, said = upgraded(pid)
    assert (got, re.sub(r"\S*/", "", said)) == (code, f"rspd: process {pid} goes on as it is: {reason}\n")
    assert daemon.find("upgrade refused, nothing has changed: ")
    assert not daemon.find("took over")


def test_connections_and_clients_that_wait_go_on_in_the_program_as_it_is_executed_anew(
    tmp_path: Path, backend: Backend
) -> None:
    one = {"address": backend.address, "max_connections": 2}
    file = File(tmp_path, listen=fixed(), backends=[one], max_connections=100, queue_timeout="60s")
    with rspd("-c", str(file.path), listen=()) as daemon, ExitStack() as stack:
        first, second, queued = (stack.enter_context(daemon.connect()) for _ in range(3))
        assert talks(first)
        assert talks(second)
        queued.sendall(b"hello")
        counts = set()
        for number in range(1, 5):
            assert upgraded(daemon.process.pid) == (0, "")
            daemon.wait_for("took over connections=3", number)
            assert talks(first)
            assert talks(second)
            counts.add(len(daemon.descriptors()))
        assert len(counts) == 1, "none is left behind"
        first.close()
        assert queued.recv(5, socket.MSG_WAITALL) == b"hello"
        assert backend.accepted == 3
        second.close()
        queued.close()
        assert [end["handovers"] for end in daemon.wait_for_ends(3)] == ["4"] * 3
        with daemon.connect() as another:
            assert talks(another)
        assert daemon.stop() == 0
        assert daemon.find("ended served=4")


ODD = """
from rspd.running import legacy
read = legacy.read
def change(content):
    document = read(content)
    document["life"]["turns"] = {"counts": 1}
    for _, samples in document["samples"]:
        samples[:] = [[*sample, 0] for sample in samples]
    for _, tally in document["tallies"]:
        tally["ends"] = {"client-closed": 5}
    document["metrics"] = ["other"]
    for one in document["proxies"][0]["connections"]:
        one.update(id=5, counted={}, began="now")
    return document
legacy.read = change
"""


def test_counts_of_another_version_begin_anew_if_they_cannot_be_read_and_connections_go_on(
    tmp_path: Path, file: File
) -> None:
    pytest.importorskip("prometheus_client")
    program, port = tmp_path / "program", free_port()
    text = f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\ndel sys.argv[1:4]\n{{}}"
    text += "from rspd.__main__ import main\nraise SystemExit(main())\n"
    program.write_text(text.format(""))
    file.write(control=f"{tmp_path}/sock", metrics=f"127.0.0.1:{port}")
    launcher = [sys.executable, str(program)]
    with rspd("-c", str(file.path), listen=(), launcher=launcher) as daemon, ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(3)]
        assert all(map(talks, clients))
        assert len(connections(tmp_path / "sock")) == 3
        program.write_text(text.format(ODD))
        assert upgraded(daemon.process.pid) == (0, "")
        daemon.wait_for("took over connections=3")
        assert all(map(talks, clients))
        assert status(tmp_path / "sock").process.handovers == 1
        assert len({one.id for one in connections(tmp_path / "sock")}) == 3
        assert 'rspd_accepted_total{proxy=""} 3.0' in metrics(port)
        for what in ("turns of", "samples", "ends of", "sums over workers", "id of", "counted of", "began of"):
            assert len(daemon.find(f"counts begin anew: {what}")) == 1


def test_nobody_who_comes_meanwhile_is_refused(file: File) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon:
        for _ in range(3):
            command = subprocess.Popen([sys.executable, "-m", "rspd", "upgrade", str(daemon.process.pid)])
            while command.poll() is None:
                with daemon.connect() as client:
                    assert talks(client)
            assert command.returncode == 0
        daemon.wait_for("took over", 3)


def test_the_configuration_of_now_is_in_force_after_it(file: File) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon, daemon.connect() as client, Backend(echo) as other:
        assert talks(client)
        listen = fixed()
        file.write(listen=listen, backend=other.address)
        assert upgraded(daemon.process.pid) == (0, "")
        assert talks(client)
        host, port = listen.split(":")
        with socket.create_connection((host, int(port)), PATIENCE) as another:
            assert talks(another)
        assert other.accepted == 1


def test_a_daemon_stays_one_and_keeps_its_pid_file(host: Host, journal: Journal, backend: Backend) -> None:  # noqa: F811
    pid_file, where = host.folder / "pid", f"{host.folder}/sock"
    text = f"listen: {where}\nbackend: {backend.address}\nmax_connections: 9\n"
    (host.folder / "own.yaml").write_text(text)
    arguments = ["-c", "own.yaml", "--pid-file", "pid"]
    done = host.start(*arguments, cwd=host.folder)
    assert done.returncode == 0, done.stderr
    pid = int(pid_file.read_text())
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(where)
        assert talks(client)
        for _ in range(2):
            assert upgraded("--pid-file", pid_file) == (0, "")
            assert talks(client)
    assert journal.wait_for("handovers=2")
    assert int(pid_file.read_text()) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert proc(pid, "Umask") == "0027"
    again = host.start(*arguments, cwd=host.folder)
    assert (again.returncode, f"rspd runs already, as process {pid}" in again.stderr) == (73, True)
    end(pid)
    assert not pid_file.exists()


# Refused


def test_a_wrong_file_is_refused_and_nothing_has_changed(file: File) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon, daemon.connect() as client:
        assert talks(client)
        file.write(idle_timeout="soon")
        reason = "rspd.yaml:3: idle_timeout: expected a duration such as 90s, 10m or off, found 'soon'"
        code, said = upgraded(daemon.process.pid)
        assert code == os.EX_CONFIG
        assert "goes on as it is: " in said
        assert "idle_timeout: expected a duration" in said, reason
        assert talks(client)
        with daemon.connect() as another:
            assert talks(another)
        file.write(idle_timeout="60s")
        assert upgraded(daemon.process.pid) == (0, "")
        assert talks(client)


def test_with_handover_off_it_is_refused(file: File) -> None:
    file.write(handover="off")
    with rspd("-c", str(file.path), listen=()) as daemon:
        goes_on_as_it_is(daemon, os.EX_CONFIG, "handover is off in its configuration")


def test_under_systemd_it_is_refused_and_says_what_to_do(file: File) -> None:
    with managed("-c", str(file.path)) as service, service.daemon.connect() as client:
        assert talks(client)
        goes_on_as_it_is(service.daemon, os.EX_UNAVAILABLE, "systemd starts its next process: use systemctl restart")
        assert talks(client)


def test_with_too_few_descriptors_it_is_refused_and_clients_go_on_and_come(file: File) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon, daemon.connect() as client:
        assert talks(client)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (300, 300))
        goes_on_as_it_is(daemon, os.EX_OSERR, "it cannot hand over; its log says why")
        assert daemon.find("what is open cannot be handed over: too few descriptors, raise ulimit -n")
        assert talks(client)
        for _ in range(2):
            with daemon.connect() as another:
                assert talks(another)


def test_a_check_that_hangs_holds_nobody_up_and_ends_with_rspd(file: File) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon, daemon.connect() as client:
        assert talks(client)
        file.path.unlink()
        os.mkfifo(file.path)  # nobody writes
        command = subprocess.Popen(
            [sys.executable, "-m", "rspd", "upgrade", str(daemon.process.pid)], stderr=subprocess.PIPE, text=True
        )
        children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
        eventually(lambda: children.read_text())
        assert talks(client)
        client.close()
        assert daemon.stop() == 0
        _, said = command.communicate(timeout=PATIENCE)
        assert (command.returncode, said.partition("as it is: ")[2]) == (os.EX_TEMPFAIL, "the process ends just now\n")


@pytest.mark.parametrize("after", [0, 2, 4, 6])
def test_a_signal_to_end_that_comes_meanwhile_ends_the_process(file: File, after: int) -> None:
    with (
        rspd("-c", str(file.path), listen=()) as daemon,
        subprocess.Popen(
            [sys.executable, "-m", "rspd", "upgrade", str(daemon.process.pid)], stderr=subprocess.PIPE, text=True
        ) as command,
    ):
        children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
        eventually(lambda: children.read_text())
        let_pass(0.04 * after)
        assert daemon.stop() == 0
        assert command.wait(PATIENCE) in (0, os.EX_TEMPFAIL, os.EX_SOFTWARE)


def test_a_second_command_is_told_that_another_is_at_work(file: File) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon:
        text = file.path.read_text()
        file.path.unlink()
        os.mkfifo(file.path)  # the check waits for who writes
        with subprocess.Popen([sys.executable, "-m", "rspd", "upgrade", str(daemon.process.pid)]) as command:
            children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
            eventually(lambda: children.read_text())
            code, said = upgraded(daemon.process.pid)
            assert (code, said) == (os.EX_TEMPFAIL, "rspd: another command upgrades it just now\n")
            pipe = os.open(file.path, os.O_WRONLY)
            file.path.unlink()
            file.path.write_text(text)
            os.write(pipe, text.encode())
            os.close(pipe)
            assert command.wait(PATIENCE) == 0


def test_a_process_that_ends_is_not_upgraded(file: File) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon:
        with daemon.connect() as client:
            assert talks(client)
            daemon.process.terminate()
            daemon.wait_for("ending connections=1")
            assert upgraded(daemon.process.pid) == (os.EX_TEMPFAIL, "rspd: the process ends just now\n")
        assert daemon.wait() == 0


def test_a_version_that_could_not_take_over_is_refused(tmp_path: Path, file: File) -> None:
    program = tmp_path / "program"
    text = "import sys\nfrom rspd.__main__ import main\n{}raise SystemExit(main())\n"
    program.write_text(text.format(""))
    command = [sys.executable, str(program), "-c", str(file.path), "--foreground"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr
        assert b"listening" in process.stderr.readline()
        program.write_text(text.format("sys.argv += ['--unknown'] * ('--can-take-over' in sys.argv)\n"))
        code, said = upgraded(process.pid)
        assert (code, "unknown option '--unknown'" in said) == (os.EX_USAGE, True)
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_a_program_that_is_gone_is_refused(tmp_path: Path, file: File) -> None:
    program = tmp_path / "program"
    program.write_text("from rspd.__main__ import main\nraise SystemExit(main())\n")
    command = [sys.executable, str(program), "-c", str(file.path), "--foreground"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr
        assert b"listening" in process.stderr.readline()
        program.unlink()
        code, said = upgraded(process.pid)
        assert code == 2, "of Python"
        assert "can't open file" in said
        with socket.create_connection(("127.0.0.1", int(file.keys["listen"].split(":")[1])), PATIENCE) as client:
            assert talks(client)
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], os.EX_USAGE, "expected the number of a process, or --pid-file FILE"),
        (["12", "--pid-file", "pid"], os.EX_USAGE, "expected the number of a process, or --pid-file FILE"),
        (["rspd"], os.EX_USAGE, "expected a process's number, found 'rspd'"),
        (["999999999"], os.EX_UNAVAILABLE, "process 999999999: there is none; is rspd running?"),
        (["self"], os.EX_UNAVAILABLE, "it is not rspd"),
        (["--pid-file", "/nowhere"], os.EX_UNAVAILABLE, "pid file /nowhere: cannot be read: No such file or directory"),
        (["--pid-file", os.devnull], os.EX_CANTCREAT, "pid file /dev/null: expected a process's number, found ''"),
    ],
)
def test_what_is_no_process_of_rspd_is_an_error(arguments: list[object], code: int, said: str) -> None:
    got, text = upgraded(*(os.getpid() if word == "self" else word for word in arguments))
    assert got == code
    assert said in text


def test_a_process_that_does_not_answer_is_an_error(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "PATIENCE", 0.2)
    with rspd("-c", str(file.path), listen=()) as daemon:
        daemon.signal(signal.SIGSTOP)
        with pytest.raises(StartError, match=r"has not answered for 0\.2 seconds"):
            upgrade.ask(daemon.process.pid)
        daemon.signal(signal.SIGCONT)
        with daemon.connect() as client:
            assert talks(client)


def test_of_two_commands_at_once_one_is_told_so(file: File) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon, socket.socket(socket.AF_UNIX) as other:
        other.bind(f"\0rspd-upgrade-{daemon.process.pid}")
        code, said = upgraded(daemon.process.pid)
        assert code == os.EX_TEMPFAIL
        assert "another command upgrades it just now" in said


def test_connections_are_reset_if_the_program_does_not_start(file: File, tmp_path: Path) -> None:
    program = tmp_path / "program"
    text = "import sys\nfrom rspd.__main__ import main\n{}raise SystemExit(main())\n"
    program.write_text(text.format(""))
    command = [sys.executable, str(program), "-c", str(file.path), "--foreground"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr
        assert b"listening" in process.stderr.readline()
        host, port = str(file.keys["listen"]).split(":")
        with socket.create_connection((host, int(port)), PATIENCE) as client:
            assert talks(client)
            program.write_text(text.format("if '--check' not in sys.argv: raise SystemExit(3)\n"))
            code, said = upgraded(process.pid)
            assert (code, said) == (70, f"rspd: process {process.pid} ended; its log may say why\n")
            assert is_reset(client)
        assert process.wait(PATIENCE) == 3


def test_who_only_asks_whether_it_is_there_changes_nothing(file: File) -> None:
    with rspd("-c", str(file.path), listen=()) as daemon, daemon.connect() as client:
        daemon.signal(signal.SIGURG)  # nobody listens for an answer
        daemon.signal(signal.SIGURG)
        assert talks(client)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
        assert daemon.stop() == 0
        assert not daemon.find("handing over")
