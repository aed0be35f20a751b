"""`rspd` from a shell: it goes on as a daemon, and the shell hears how that went."""

from __future__ import annotations

import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, Journal, new_host, wait_for_end
from tests.manager import launch, listen_variables, tcp_listener
from tests.support import PATIENCE, Backend, Daemon, answer, eventually, receive_all

# rspd with something in its way: `run` is what serves, and comes after it has become a daemon.
HINDERED = """
import os, signal, sys, time
import rspd.cli, rspd.host.detach
run, flag = rspd.cli.run, sys.argv.pop(1)

def wait(*arguments):
    os.close(os.open(flag, os.O_RDONLY))  # a FIFO, until somebody opens it to write
    run(*arguments)

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def fail(*arguments):
    raise RuntimeError("nobody\\nexpected this")

rspd.cli.run = {action}
{more}
sys.exit(rspd.cli.main())
"""


def hindered(action: str, more: str = "") -> str:
    return HINDERED.replace("{action}", action).replace("{more}", more)


@pytest.fixture
def host() -> Iterator[Host]:
    with new_host() as host:
        yield host


@pytest.fixture
def journal(host: Host) -> Journal:
    return host.with_journal()


@pytest.fixture
def where(host: Host) -> str:
    """An address to listen on."""
    return f"{host.folder}/sock"


@pytest.fixture
def fifo(host: Host) -> Path:
    path = host.folder / "fifo"
    os.mkfifo(path)
    return path


def ask(where: str) -> bytes:
    """Connect at once, without another try, and return the answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(where)
        client.sendall(b"?")
        return receive_all(client)


def accepts(where: str) -> bool:
    """Connect at once, without another try; whether somebody accepts, and closes for want of a backend."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(where)
        return client.recv(1) == b""


def end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    wait_for_end(pid)


def proc(pid: int, name: str) -> str:
    """A field of /proc/PID/status."""
    found = re.search(rf"^{name}:\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return found[1]


# All is well


def test_it_returns_0_and_silently_when_the_daemon_serves_and_its_pid_file_is_there(
    host: Host, journal: Journal, where: str
) -> None:
    pid_file = host.folder / "pid"
    with Backend(answer) as backend:
        done = host.start("-l", where, "-b", backend.address, "--pid-file", str(pid_file))
        number = pid_file.read_text()
        assert ask(where) == b"ok"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert number == f"{host.daemon()}\n"
    assert len(journal.streams) == 1


def test_its_log_is_a_stream_to_the_journal_with_a_priority_on_each_line(
    host: Host, journal: Journal, where: str
) -> None:
    syslog = host.with_syslog()
    assert host.start("-l", where, "-b", "/nonexistent").returncode == 0
    assert accepts(where)
    journal.wait_for("connection closed")
    end(host.daemon())
    eventually(lambda: journal.ended)
    # identifier, unit, priority, level_prefix, syslog, kmsg, console
    assert journal.header == b"rspd\n\n6\n1\n0\n0\n0\n"
    assert journal.lines[0] == f"<6>listening address={where}"
    assert journal.lines[1] == '<4>backend down backend=/nonexistent reason="No such file or directory"'
    assert journal.lines[2].startswith("<4>connection closed client=unix backend=- ")
    assert journal.lines[3:] == ["<6>ending connections=0 drain_timeout=30", "<6>ended served=1"]
    assert syslog.datagrams == []


def test_where_there_is_no_journal_its_log_goes_to_syslog(host: Host, where: str) -> None:
    syslog = host.with_syslog()
    done = host.start("-l", where, "-b", "/nonexistent")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = host.daemon()
    assert accepts(where)
    syslog.wait_for("connection closed")
    end(pid)
    syslog.wait_for("ended served=1")
    prefix = rf"[A-Z][a-z][a-z] [ \d]\d \d\d:\d\d:\d\d rspd\[{pid}\]: "
    assert re.fullmatch(rf"<30>{prefix}listening address={where}\n", syslog.datagrams[0])
    assert re.fullmatch(rf"<28>{prefix}backend down .*\n", syslog.datagrams[1])
    assert re.fullmatch(rf"<28>{prefix}connection closed .*\n", syslog.datagrams[2])
    assert len(syslog.datagrams) == 5


def test_a_signal_ends_the_daemon_and_removes_its_pid_file(host: Host, journal: Journal, where: str) -> None:
    pid_file = host.folder / "pid"
    assert host.start("-l", where, "-b", "a:1", "--pid-file", str(pid_file)).returncode == 0
    end(int(pid_file.read_text()))
    assert not pid_file.exists()
    assert not os.path.exists(where)
    journal.wait_for("ended served=0")


def test_it_serves_on_when_the_journal_has_gone(host: Host, journal: Journal, where: str) -> None:
    with Backend(answer) as backend:
        assert host.start("-l", where, "-b", backend.address).returncode == 0
        journal.connections[0].shutdown(socket.SHUT_RDWR)
        eventually(lambda: journal.ended)
        for _ in range(3):
            assert ask(where) == b"ok"


# A daemon


def test_it_has_a_session_of_its_own_and_no_terminal(host: Host, journal: Journal, where: str) -> None:
    mine, its = pty.openpty()
    try:
        # setsid -c: the pseudo-terminal is this shell's, as it says first.
        script = 'cut -d" " -f7 /proc/self/stat; exec "$@"'
        command = ["setsid", "-cw", "sh", "-c", script, "sh", *host.command("-l", where, "-b", "a:1")]
        with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=host.env) as shell:
            assert shell.wait(PATIENCE) == 0
        assert int(os.read(mine, 100).split()[0]) != 0
    finally:
        os.close(mine)
        os.close(its)
    pid = host.daemon()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    parent, group, session, terminal = map(int, fields[1:5])
    assert terminal == 0
    assert session not in (os.getsid(0), shell.pid)
    assert pid not in (group, session)  # one that leads no session never gets a terminal
    assert parent not in (os.getpid(), shell.pid)


def test_it_holds_no_folder_and_what_it_creates_is_not_for_others(host: Host, journal: Journal, where: str) -> None:
    pid_file = host.folder / "pid"
    assert host.start("-l", where, "-b", "a:1", "--pid-file", str(pid_file), cwd=host.folder).returncode == 0
    pid = host.daemon()
    assert os.path.samefile(f"/proc/{pid}/cwd", f"/proc/{pid}/root")  # "/", of whatever mounts the process sees
    assert proc(pid, "Umask") == "0027"
    assert pid_file.stat().st_mode & 0o777 == 0o644


def test_it_has_no_descriptor_but_its_own(host: Host, journal: Journal, where: str) -> None:
    with tcp_listener() as other:
        done = host.start("-l", where, "-b", "a:1", "--pid-file", f"{host.folder}/a", pass_fds=[other.fileno()])
        assert done.returncode == 0
        strange = f"socket:[{os.fstat(other.fileno()).st_ino}]"
    folder = Path(f"/proc/{host.daemon()}/fd")
    in_foreground = Daemon("-l", f"{where}2", "-b", "a:1", "--pid-file", f"{host.folder}/b")
    try:
        # The one to the process that waited for it is closed a moment later.
        eventually(lambda: len(list(folder.iterdir())) == len(in_foreground.descriptors()))
        assert in_foreground.stop() == 0
    finally:
        in_foreground.kill()
    names = {int(path.name): os.readlink(path) for path in folder.iterdir()}
    assert (folder / "0").stat().st_rdev == os.stat("/dev/null").st_rdev
    assert names[1] == names[2] == f"socket:[{(folder / '2').stat().st_ino}]"
    assert strange not in names.values()


BLOCKING = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize(
    "launcher",
    [["sh", "-c", 'trap "" HUP INT TERM; exec "$@"', "sh"], [sys.executable, "-IS", "-c", BLOCKING]],
    ids=["ignored", "blocked"],
)
def test_it_hears_signals_that_whoever_started_it_did_not(
    host: Host, journal: Journal, where: str, launcher: list[str]
) -> None:
    """`nohup` and `&` in a script ignore some."""
    assert host.start("-l", where, "-b", "a:1", launcher=launcher).returncode == 0
    os.kill(host.daemon(), signal.SIGHUP)
    journal.wait_for("nothing to reload")
    end(host.daemon())
    journal.wait_for("ended served=0")


def test_a_daemon_is_left_no_more_descriptors_than_it_may_need(host: Host, journal: Journal, where: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 19_000:
        pytest.skip(f"{hard} descriptors are too few: ulimit -Hn 19000")
    # With another number, since few hosts allow more than the real one.
    code = "import sys, rspd.cli, rspd.host.detach; rspd.host.detach.DESCRIPTORS = 16_384; sys.exit(rspd.cli.main())"
    for connections, limit in ((1, 16_384), (8500, 18_024)):
        words = ["-l", f"{where}{connections}", "-b", "a:1", "--max-connections", str(connections)]
        assert host.start(*words, "--pid-file", f"{host.folder}/pid{connections}", code=code).returncode == 0
        pid = int((host.folder / f"pid{connections}").read_text())
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[1] == limit


def test_relative_paths_are_those_of_the_folder_it_was_started_in(host: Host, journal: Journal, where: str) -> None:
    (host.folder / "etc").mkdir()
    file = host.folder / "etc" / "rspd.yaml"
    file.write_text(f"listen: {where}\nbackend: a:1\n")
    done = host.start("-c", "rspd.yaml", "--pid-file", "../pid", cwd=host.folder / "etc")
    assert (done.returncode, done.stderr) == (0, "")
    pid = int((host.folder / "pid").read_text())
    file.write_text(f"listen: {where}2\nbackend: a:1\n")
    os.kill(pid, signal.SIGHUP)
    journal.wait_for(f"<6>reloaded listen={where}2$")
    end(pid)
    assert not (host.folder / "pid").exists()


def test_sockets_that_were_passed_to_it_are_served_by_the_daemon(host: Host, journal: Journal) -> None:
    with tcp_listener() as web, Backend(answer) as backend:
        launcher, inherited = launch([], [web])
        env = listen_variables(["web"])
        assert host.start("-b", backend.address, launcher=launcher, pass_fds=inherited, env=env).returncode == 0
        with socket.create_connection(web.getsockname(), PATIENCE) as client:
            client.sendall(b"?")
            assert receive_all(client) == b"ok"
    journal.wait_for('^<6>listening address=.* socket="web"$')


def test_it_ends_when_idle_as_it_would_in_the_foreground(host: Host, journal: Journal, where: str) -> None:
    assert host.start("-l", where, "-b", "a:1", "--exit-idle-time", "100ms").returncode == 0
    journal.wait_for("<6>ended served=0")
    for pid in host.processes():
        wait_for_end(pid)
    assert journal.lines[1] == f"<4>exit_idle_time ends rspd, and nobody starts it again for {where}"


# What does not start


def test_without_journal_and_syslog_it_refuses_and_says_what_to_do(host: Host, where: str) -> None:
    done = host.start("-l", where, "-b", "a:1", "--pid-file", f"{host.folder}/pid")
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == (
        "rspd: a daemon's log goes to the journal or to syslog, and there is neither "
        "(/run/systemd/journal/stdout: No such file or directory, /dev/log: No such file or directory); "
        "use --foreground, where it goes to stderr\n"
    )
    assert not os.path.exists(where)
    assert not (host.folder / "pid").exists()
    assert host.processes() == []


def test_in_the_foreground_it_needs_neither(host: Host, where: str) -> None:
    daemon = Daemon("-l", where, "-b", "a:1", launcher=host.inside, env=host.env)
    try:
        assert accepts(where)
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_an_address_in_use_is_69_with_the_reason_once(host: Host, journal: Journal) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = host.start("-l", address, "-b", "a:1", "--pid-file", f"{host.folder}/pid")
    assert (done.returncode, done.stdout) == (69, "")
    advice = f"another process has that port, `ss -tanp sport = :{address.rpartition(':')[2]}` shows which"
    assert done.stderr == f"rspd: cannot listen on {address}: Address already in use; {advice}\n"
    eventually(lambda: journal.ended)
    assert journal.lines == []
    assert not (host.folder / "pid").exists()


def test_a_wrong_configuration_is_78_with_all_reasons(host: Host, journal: Journal) -> None:
    file = host.folder / "rspd.yaml"
    file.write_text("listen: 8080\nbackend: 8000\ncolour: red\n")
    done = host.start("-c", str(file))
    assert (done.returncode, done.stdout) == (78, "")
    assert [line[: len(f"rspd: {file}:0")] for line in done.stderr.splitlines()] == [
        f"rspd: {file}:2",
        f"rspd: {file}:3",
    ]
    assert journal.streams == []


def test_several_reasons_of_the_daemon_are_a_line_each(host: Host, journal: Journal) -> None:
    done = host.start("-l", "fd://a", "-l", "fd://b", "-b", "a:1")
    reason = "no such socket from systemd, none was passed; is its socket unit active?"
    assert done.returncode == 78
    assert done.stderr == f"rspd: listen fd://a: {reason}\nrspd: listen fd://b: {reason}\n"


def test_a_reason_with_any_file_name_is_said_whole(host: Host, journal: Journal) -> None:
    where = f"{host.folder}/\udcff\u2713"
    Path(where).write_text("precious")
    done = subprocess.run(
        host.command("-l", where, "-b", "a:1"),
        env={**host.env, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 69
    assert done.stderr.startswith(b"rspd: cannot listen on ")
    assert done.stderr.endswith(b": a file that is not a socket stands there\n")
    assert rb"\udcff" in done.stderr


def test_a_pid_file_that_another_daemon_holds_is_73_and_that_one_goes_on(
    host: Host, journal: Journal, where: str
) -> None:
    words = ["-b", "a:1", "--pid-file", f"{host.folder}/pid"]
    assert host.start("-l", where, *words).returncode == 0
    first = host.daemon()
    done = host.start("-l", f"{where}2", *words)
    assert done.returncode == 73
    assert done.stderr == f"rspd: pid file {host.folder}/pid: rspd runs already, as process {first}\n"
    eventually(lambda: host.processes() == [first])
    assert (host.folder / "pid").read_text() == f"{first}\n"
    assert not os.path.exists(f"{where}2")
    assert accepts(where)


def test_a_daemon_that_dies_before_it_is_ready_is_an_error(host: Host, journal: Journal, where: str) -> None:
    done = host.start("", "-l", where, "-b", "a:1", code=hindered("die"))
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr == "rspd: ended before it was ready; the log may say why: journalctl -t rspd\n"


def test_a_daemon_with_a_bug_is_an_error_and_its_traceback_is_in_the_log(
    host: Host, journal: Journal, where: str
) -> None:
    pid_file = host.folder / "pid"
    done = host.start("", "-l", where, "-b", "a:1", "--pid-file", str(pid_file), code=hindered("fail"))
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr == "rspd: ended before it was ready; the log may say why: journalctl -t rspd\n"
    eventually(lambda: journal.ended)
    assert journal.lines[0].startswith("<3>unexpected error")
    assert journal.lines[1] == "<3>Traceback (most recent call last):"
    assert journal.lines[-2:] == ["<3>RuntimeError: nobody", "<3>expected this"]
    assert all(line.startswith("<3>") for line in journal.lines)
    assert not pid_file.exists()


# The one who waits


def test_it_returns_when_the_daemon_serves_and_not_before(host: Host, journal: Journal, where: str, fifo: Path) -> None:
    with subprocess.Popen(
        host.command(str(fifo), "-l", where, "-b", "a:1", code=hindered("wait")), env=host.env
    ) as shell:
        let_the_daemon_come(fifo, shell)
        assert shell.wait(PATIENCE) == 0
    assert accepts(where)


def let_the_daemon_come(fifo: Path, shell: subprocess.Popen[bytes] | None = None) -> None:
    """Open the FIFO that the daemon waits at, as soon as it does."""

    def opened() -> int:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return 0  # nobody reads yet

    fd = eventually(opened)
    if shell:
        assert shell.poll() is None
    os.close(fd)


def test_who_was_killed_while_he_waited_does_not_take_the_daemon_with_him(
    host: Host, journal: Journal, where: str, fifo: Path
) -> None:
    with subprocess.Popen(
        host.command(str(fifo), "-l", where, "-b", "a:1", code=hindered("wait")), env=host.env
    ) as shell:
        eventually(lambda: journal.streams and len(host.processes()) == 2)
        shell.kill()
        shell.wait(PATIENCE)
    let_the_daemon_come(fifo)
    journal.wait_for("listening address=")
    assert accepts(where)
    end(host.daemon())
    journal.wait_for("<6>ended served=1")


def test_an_interrupt_while_it_waits_is_no_traceback(host: Host, journal: Journal, where: str, fifo: Path) -> None:
    command = host.command(str(fifo), "-l", where, "-b", "a:1", code=hindered("wait"))
    with subprocess.Popen(command, env=host.env, stderr=subprocess.PIPE, text=True) as shell:
        eventually(lambda: journal.streams and len(host.processes()) == 2)
        shell.send_signal(signal.SIGINT)
        _, said = shell.communicate(timeout=PATIENCE)
    assert shell.returncode != 0
    assert "Traceback" not in said


def test_a_daemon_that_takes_too_long_is_an_error_and_goes_on_trying(
    host: Host, journal: Journal, where: str, fifo: Path
) -> None:
    code = hindered("wait", "rspd.host.detach.START_TIMEOUT = 0.5")
    done = host.start(str(fifo), "-l", where, "-b", "a:1", code=code)
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr == "rspd: not ready after 0.5 seconds, and still trying; journalctl -t rspd says more\n"
    let_the_daemon_come(fifo)
    journal.wait_for("listening address=")
    assert accepts(where)
