"""The command line: what it means, what it says of mistakes, and its exit codes."""

from __future__ import annotations

import grp
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rspd import __version__
from rspd.cli import main
from rspd.config.addresses import FORMS
from tests.support import PATIENCE

MINIMAL = "listen: 8080\nbackend: 127.0.0.1:8000\n"
USAGE = (
    "usage: rspd [-c FILE] [-l ADDRESS]... [-b ADDRESS]... [OPTION]...\n"
    "       rspd PORT BACKEND_HOST:BACKEND_PORT, or PORT BACKEND_HOST BACKEND_PORT\n"
    "       rspd status|connections|top, to look at one that runs, or upgrade PID\n"
)

# Without what hides that Python writes again at its end what it could not write.
BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rspd(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs main in this process; returns exit code, stdout, stderr."""

    def rspd(*arguments: str) -> tuple[int, str, str]:
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else -1
        finally:
            signal.signal(signal.SIGINT, interrupt)
        return code, *capsys.readouterr()

    return rspd


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A valid configuration file."""
    path = tmp_path / "rspd.yaml"
    path.write_text(MINIMAL)
    return path


@contextmanager
def without_privilege() -> Iterator[None]:
    """Whoever runs the tests may not read everything meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("columns", [80, 90, 100])
def test_the_help_fits_a_terminal(rspd: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = rspd("--help")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert [line for line in lines if len(line) > columns] == []
    assert len(lines) <= 24


def test_the_help_names_every_option_form_and_exit_code(rspd: Run) -> None:
    _, out, _ = rspd("-h")
    assert out.startswith(USAGE)
    for word in ("-c FILE", "-l ADDRESS", "-b ADDRESS", "--max-connections N", "--log-level LEVEL", "--foreground"):
        assert word in out
    for word in ("--exit-idle-time DURATION", "--pid-file FILE"):
        assert word in out
    for word in (
        "--check",
        "--all",
        "--version",
        "HOST:PORT",
        "[IPV6]:PORT",
        "/PATH",
        "@NAME",
        "fd://NAME",
        "/etc/rspd.yaml",
    ):
        assert word in out
    for word in ("64", "69", "70", "71", "73", "77", "78", "SIGTERM", "SIGINT", "SIGHUP"):
        assert word in out


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version_is_told(rspd: Run, option: str) -> None:
    assert rspd(option) == (0, f"rspd {__version__}\n", "")


def test_a_valid_file_is_described_and_nothing_else_happens(rspd: Run, file: Path) -> None:
    expected = f"{file}: valid\nlistening on 8080; one connection at a time\n  127.0.0.1:8000\n"
    assert rspd("-c", str(file), "--check") == (0, expected, "")


def test_a_valid_command_line_is_described(rspd: Run) -> None:
    arguments = "-l [::1]:80 -l /run/a -b a:1 -b @b --max-connections 20 --foreground"
    assert rspd("--check", *arguments.split()) == (
        0,
        (
            "command line: valid\n"
            "listening on [::1]:80, /run/a; 20 connections at a time; round-robin over 2 backends\n  a:1\n  @b\n"
        ),
        "",
    )


def test_several_proxies_are_described_one_after_the_other(rspd: Run, file: Path) -> None:
    file.write_text("proxies:\n  a: {listen: 1, backend: a:1}\n  b: {listen: 2, backends: [b:1, b:2]}\n")
    assert rspd("-c", str(file), "--check", "--max-connections", "5") == (
        0,
        (
            f"{file}: valid\na: listening on 1; 5 connections at a time\n  a:1\n"
            "b: listening on 2; 5 connections at a time; round-robin over 2 backends\n  b:1\n  b:2\n"
        ),
        "",
    )


@pytest.mark.parametrize("arguments", ["-l 3", "-b c:1", "3 c 1"])
def test_an_address_on_the_command_line_does_not_go_with_several_proxies(rspd: Run, file: Path, arguments: str) -> None:
    file.write_text("proxies:\n  a: {listen: 1, backend: a:1}\n")
    what = "each has its addresses here; leave out those on the command line, or change the file"
    assert rspd("-c", str(file), "--check", *arguments.split()) == (78, "", f"rspd: {file}:1: proxies: {what}\n")


def test_ports_that_others_may_share_are_described_as_such(rspd: Run, file: Path) -> None:
    file.write_text("listen: 8080\nbackend: a:1\nreuse_port: true\n")
    expected = "listening on 8080 (ports shared, reuse_port); one connection at a time\n  a:1"
    assert rspd("-c", str(file), "--check") == (0, f"{file}: valid\n{expected}\n", "")


def test_without_an_address_to_listen_on_it_would_be_what_systemd_passes(rspd: Run, file: Path) -> None:
    """Which cannot be known here; the unit calls this before a reload."""
    rest = "one connection at a time\n  a:1\n"
    listen = "what a socket unit passes (there is no listen)"
    _, said, _ = rspd("--check", "-b", "a:1")
    assert said == f"command line: valid\nlistening on {listen}; {rest}"
    file.write_text("listen: [fd://web, 8080]\nbackend: a:1\n")
    assert rspd("--check", "-c", str(file)) == (0, f"{file}: valid\nlistening on fd://web, 8080; {rest}", "")


def test_a_check_warns_where_there_is_no_address_to_listen_on(rspd: Run, file: Path) -> None:
    said = "missing, rspd can start only where systemd passes a socket"
    assert rspd("--check", "-b", "a:1")[::2] == (0, f"rspd: warning: command line: listen: {said}\n")
    file.write_text("backend: a:1\n")
    assert rspd("--check", "-c", str(file))[::2] == (0, f"rspd: warning: {file}: listen: {said}\n")
    assert rspd("--check", "--all", "-c", str(file))[::2] == (0, f"rspd: warning: {file}: listen: {said}\n")
    file.write_text("proxies:\n  a: {listen: 1, backend: a:1}\n  b: {backend: a:1}\n")
    assert rspd("--check", "-c", str(file))[::2] == (0, f"rspd: warning: {file}: proxies.b.listen: {said}\n")


def test_a_check_warns_of_a_group_that_this_host_does_not_have(rspd: Run, file: Path) -> None:
    """It is no error: the file may be for another host."""
    rest = "control_group: expected a group of this host, found 'no-such-group'; rspd starts without it"
    file.write_text("listen: 1\nbackend: a:1\ncontrol_group: no-such-group\n")
    for more in ([], ["--all"]):
        assert rspd("--check", *more, "-c", str(file))[::2] == (0, f"rspd: warning: {file}: {rest}\n")
    file.write_text(f"listen: 1\nbackend: a:1\ncontrol_group: {grp.getgrall()[0].gr_name}\n")
    assert rspd("--check", "-c", str(file))[::2] == (0, "")


def test_a_check_that_systemd_runs_does_not_warn_of_an_address_that_a_socket_unit_may_bring(
    rspd: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("backend: a:1\n")
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    assert rspd("--check", "-c", str(file))[::2] == (0, "")


@pytest.mark.parametrize("by_systemd", [False, True])
def test_a_check_of_an_empty_file_misses_both_addresses(
    rspd: Run, file: Path, monkeypatch: pytest.MonkeyPatch, by_systemd: bool
) -> None:
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()) if by_systemd else "1")
    file.write_text("# nothing\n")
    assert rspd("--check", "-c", str(file)) == (
        78,
        "",
        (
            f"rspd: {file}: listen: missing, expected an address to listen on\n"
            f"rspd: {file}: backend: missing, expected an address to relay to\n"
        ),
    )


def test_a_check_of_all_prints_each_value_in_force_as_a_file_and_nothing_else(rspd: Run, file: Path) -> None:
    code, out, err = rspd("--check", "--all", "-c", str(file), "--max-connections", "7")
    assert (code, err) == (0, "")
    assert out.startswith("listen: 8080\nbackend:\n  address: 127.0.0.1:8000\n")
    assert "\nmax_connections: 7\n" in out
    assert "\nidle_timeout: 60s\n" in out
    file.write_text(out)
    assert rspd("--check", "--all", "-c", str(file)) == (0, out, "")


def test_a_check_whose_reader_has_gone_ends_in_silence(file: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "rspd", "--check", "--all", "-c", str(file)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, env=BUFFERED)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("more", [[], ["--all"]])
def test_a_check_whose_output_cannot_be_written_is_73(file: Path, more: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rspd", "--check", *more, "-c", str(file)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, env=BUFFERED)
    assert (done.returncode, done.stderr) == (73, "rspd: cannot write to stdout: No space left on device\n")


@pytest.mark.parametrize("words", ["--help", "--version", "status --help", "upgrade --help"])
def test_help_that_cannot_be_written_is_73(words: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rspd", *words.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, env=BUFFERED)
    assert (done.returncode, done.stderr) == (73, "rspd: cannot write to stdout: No space left on device\n")


@pytest.mark.parametrize(("said", "meant"), [("staus", "status"), ("conections", "connections"), ("stat", "status")])
def test_a_word_that_is_nearly_a_command_is_answered_with_the_command(rspd: Run, said: str, meant: str) -> None:
    code, out, err = rspd(said)
    assert (code, out) == (64, "")
    assert err.endswith(f"found {said!r}; did you mean rspd {meant}? See rspd --help\n")


@pytest.mark.parametrize(("said", "meant"), [("stopp", "stop"), ("restarts", "restart")])
def test_a_word_that_is_nearly_an_action_of_systemctl_is_answered_with_it(rspd: Run, said: str, meant: str) -> None:
    code, out, err = rspd(said)
    assert (code, out) == (64, "")
    assert f"found {said!r}; the service is for systemctl: systemctl {meant} rspd" in err


def test_all_goes_with_a_check_only(rspd: Run) -> None:
    assert rspd("--all") == (64, "", f"{USAGE}rspd: --all goes with --check; see rspd --help\n")


def test_a_check_takes_no_sockets_and_writes_no_pid_file(
    rspd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "junk")
    code, _, err = rspd("--check", "-l1", "-b", "a:1", "--pid-file", f"{tmp_path}/pid", "--exit-idle-time", "1s")
    assert (code, err) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "listen", "backend"),
    [
        ("8090 127.0.0.1:8000", "8090", "127.0.0.1:8000"),
        ("8090 [::1]:8000", "8090", "[::1]:8000"),
        ("127.0.0.1:8090 /run/app.sock", "127.0.0.1:8090", "/run/app.sock"),
    ],
)
def test_two_arguments_are_enough(rspd: Run, words: str, listen: str, backend: str) -> None:
    said = f"command line: valid\nlistening on {listen}; one connection at a time\n  {backend}\n"
    assert rspd(*words.split(), "--check") == (0, said, "")


def test_the_originals_three_arguments_are_enough(rspd: Run) -> None:
    assert rspd("8080", "localhost", "80", "--check") == (
        0,
        "command line: valid\nlistening on 8080; one connection at a time\n  localhost:80\n",
        "",
    )


@pytest.mark.usefixtures("service_names")
@pytest.mark.parametrize(
    ("arguments", "listen", "backend"),
    [
        ("8080 ::1 http", "8080", "[::1]:80"),
        ("http 127.0.0.1 8000", "80", "127.0.0.1:8000"),
        ("8080 a.example 80 --max-connections 2", "8080", "a.example:80"),
        ("--log-level debug 8080 a 80", "8080", "a:80"),
    ],
)
def test_the_originals_form_takes_names_numbers_ipv6_and_options(
    rspd: Run, arguments: str, listen: str, backend: str
) -> None:
    code, out, _ = rspd(*arguments.split(), "--check")
    assert code == 0
    assert re.search(rf"^listening on {re.escape(listen)}; .*\n  {re.escape(backend)}$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["8080"], "expected PORT BACKEND_HOST:BACKEND_PORT, found '8080'"),
        (
            ["8080", "80"],
            "expected HOST:PORT, [IPV6]:PORT, /PATH or @NAME, found '80'; port 80 of this host is 127.0.0.1:80; see",
        ),
        (["8080", "host", "80", "81"], "expected PORT BACKEND_HOST:BACKEND_PORT, found '8080 host 80 81'"),
        (
            ["8080", "host", "80", "-l", "8081"],
            "expected either PORT BACKEND_HOST:BACKEND_PORT or -l and -b, found both",
        ),
        (
            ["8080", "host", "80", "-b", "a:1"],
            "expected either PORT BACKEND_HOST:BACKEND_PORT or -l and -b, found both",
        ),
        (["70000", "host", "80"], "a port is at most 65535, found '70000'"),
        (["8080", "host", "0"], "expected HOST:PORT, [IPV6]:PORT, /PATH or @NAME, found 'host:0'"),
        (["8080", "ho st", "80"], "expected HOST:PORT, [IPV6]:PORT, /PATH or @NAME, found 'ho st:80'"),
        (["8080", "", "80"], "expected HOST:PORT, [IPV6]:PORT, /PATH or @NAME, found ':80'"),
        (["8080", "::x", "80"], "expected an IPv6 address between the brackets, found '[::x]:80'"),
        (["--idle-timeout", "4"], "unknown option '--idle-timeout'; idle_timeout is a key of the configuration file"),
        (["--resolve=each"], "unknown option '--resolve'; resolve is a key of the configuration file"),
        (["-l", "x y", "-b", "a:1"], f"argument -l/--listen: expected {FORMS}, found 'x y'"),
        (["-l", "%s", "-b", "a:1"], f"argument -l/--listen: expected {FORMS}, found '%s'"),
        (["-l", "1", "-b", "80"], "argument -b/--backend: expected HOST:PORT, [IPV6]:PORT, /PATH or @NAME"),
        (["-b", "a:1,b:2"], "argument -b/--backend: expected an address, found 'a:1,b:2'; several are -b a:1 -b b:2"),
        (["-l", "80,81"], "argument -l/--listen: expected an address, found '80,81'; several are -l 80 -l 81"),
        (["80", "a:1", "b:2"], "expected a host without a port, found 'a:1'; several backends are -b a:1 -b ..."),
        (
            ["reload"],
            "expected PORT BACKEND_HOST:BACKEND_PORT, found 'reload'; the service is for systemctl: systemctl r",
        ),
        (
            ["-c", "a.yaml", "status"],
            "expected PORT BACKEND_HOST:BACKEND_PORT, found 'status'; the command comes first: rspd status; see",
        ),
        (
            ["-c", "a.yaml", "connections", "--all"],
            "expected PORT BACKEND_HOST:BACKEND_PORT, found 'connections'; the command comes first: rspd connections",
        ),
        (["--json", "top"], "unknown option '--json'; the command comes first: rspd top --json; see"),
        (["-l", "::1:80"], "argument -l/--listen: expected brackets around an IPv6 address, as in [::1]:8080, found "),
        (["-l"], "argument -l/--listen: expected one argument"),
        (["--max-connections", "0"], "argument --max-connections: expected a whole number from 1 to 1000000, found '0"),
        (["--max-connections", "x"], "argument --max-connections: expected a whole number from 1 to 1000000, found 'x"),
        (["--exit-idle-time", "0"], "argument --exit-idle-time: expected a duration above 0, as 500ms, 5s, 2m or 1h,"),
        (["--exit-idle-time", "soon"], "argument --exit-idle-time: expected a duration above 0, as 500ms, 5s, 2m or"),
        (["--pid-file"], "argument --pid-file: expected one argument"),
        (["--log-level", "loud"], "argument --log-level: expected one of debug, info, warning, error, found 'loud'"),
        (["-l", "8080:80"], f"argument -l/--listen: expected {FORMS}, found '8080:80'; 8080 is no host"),
        (
            ["-l", "*:8090"],
            f"argument -l/--listen: expected {FORMS}, found '*:8090'; a port alone is every address: 8090",
        ),
        (["--colour"], "unknown option '--colour'"),
        (["--colour=red", "--check"], "unknown option '--colour'; see rspd --help"),
    ],
)
def test_a_wrong_argument_is_a_usage_error_with_its_reason(rspd: Run, arguments: list[str], reason: str) -> None:
    code, out, err = rspd(*arguments)
    assert (code, out) == (64, "")
    assert err.startswith(f"{USAGE}rspd: {reason}")
    assert err.endswith("; see rspd --help\n")


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--chekc", "--check"),
        ("--chekc=1", "--check"),
        ("--max-connection=5", "--max-connections"),
        ("--max", "--max-connections"),
        ("--max_connections", "--max-connections"),
        ("--log_level=info", "--log-level"),
        ("--Check", "--check"),
        ("-check", "--check"),
        ("-config", "--config"),
    ],
)
def test_an_unknown_option_is_told_with_the_one_that_was_meant(rspd: Run, option: str, meant: str) -> None:
    said = f"{USAGE}rspd: unknown option '{option.partition('=')[0]}'; did you mean {meant}? See rspd --help\n"
    assert rspd("-l", "1", "-b", "a:1", option) == (64, "", said)


def test_a_file_without_its_option_is_told_so(rspd: Run, file: Path) -> None:
    advice = f"a configuration file needs -c: rspd -c {file}"
    said = f"{USAGE}rspd: expected PORT BACKEND_HOST:BACKEND_PORT, found '{file}'; {advice}; see rspd --help\n"
    assert rspd(str(file)) == (64, "", said)


@pytest.mark.parametrize("host", ["/run/backend", "@backend"])
def test_the_originals_host_and_port_cannot_be_a_unix_socket(rspd: Run, host: str) -> None:
    code, out, err = rspd("8080", host, "80", "--check")
    assert (code, out) == (64, "")
    assert f"found '{host}" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-l 8080", "command line: backend: missing, expected an address to relay to"),
        ("-b a:1", "command line: listen: missing, expected an address to listen on"),
        ("8080 localhost 8080", "command line: backend localhost:8080 is this proxy's own listener 8080"),
        ("-l /run/a -b /run/a", "command line: backend /run/a is this proxy's own listener /run/a"),
    ],
)
def test_a_command_line_that_makes_no_proxy_is_a_usage_error(rspd: Run, arguments: str, message: str) -> None:
    assert rspd(*arguments.split()) == (64, "", f"rspd: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-l 81", "listening on 81; one connection at a time\n  127.0.0.1:8000"),
        ("-b a:1", "listening on 8080; one connection at a time\n  a:1"),
        (
            "-b a:1 -b b:2 -l 82 -l 81",
            "listening on 82, 81; one connection at a time; round-robin over 2 backends\n  a:1\n  b:2",
        ),
        ("--max-connections 7", "listening on 8080; 7 connections at a time\n  127.0.0.1:8000"),
        ("81 host 82", "listening on 81; one connection at a time\n  host:82"),
        ("-l 81 -l 81", "listening on 81; one connection at a time\n  127.0.0.1:8000"),
    ],
)
def test_the_command_line_wins_over_the_file(rspd: Run, file: Path, arguments: str, expected: str) -> None:
    assert rspd("-c", str(file), "--check", *arguments.split()) == (0, f"{file}: valid\n{expected}\n", "")


def test_the_last_of_a_repeated_option_counts(rspd: Run, file: Path) -> None:
    _, out, _ = rspd("-c", "/nonexistent", "-c", str(file), "--check", *(f"--max-connections={n}" for n in (3, 4)))
    assert "; 4 connections at a time\n" in out


def test_without_arguments_the_default_file_is_read(rspd: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rspd.cli.DEFAULT_FILE", str(file))
    expected = f"{file}: valid\nlistening on 8080; 3 connections at a time\n  127.0.0.1:8000\n"
    assert rspd("--check", "--max-connections", "3") == (0, expected, "")


@pytest.mark.parametrize("arguments", ["-l 1 -b a:1", "1 a 1"])
def test_with_an_address_the_default_file_is_not_read(
    rspd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.setattr("rspd.cli.DEFAULT_FILE", str(tmp_path / "missing"))
    code, out, err = rspd("--check", *arguments.split())
    assert (code, err) == (0, "")
    assert out.startswith("command line: valid\n")


def test_a_broken_file_gets_all_its_errors_and_78(rspd: Run, file: Path) -> None:
    file.write_text("listen: off\ncolour: red\nbacklog: 0\n")
    code, out, err = rspd("-c", str(file))
    assert (code, out) == (78, "")
    assert [line.partition(f"rspd: {file}:")[2].split(": ")[:2] for line in err.splitlines()] == [
        ["1", "listen"],
        ["2", "colour"],
        ["3", "backlog"],
        [" backend", "missing, expected an address to relay to"],
    ]


def test_check_finds_what_a_run_would_find(rspd: Run, file: Path) -> None:
    file.write_text("listen: [8080\n")
    assert rspd("-c", str(file), "--check") == rspd("-c", str(file))
    assert rspd("-c", str(file), "--check")[0] == 78


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.yaml", "No such file or directory"),
        (".", "Is a directory"),
        ("rspd.yaml/x", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("socket", "No such device or address"),
        ("n" * 300, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(rspd: Run, file: Path, name: str, reason: str) -> None:
    (file.parent / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(file.parent / "socket"))
    path = f"{file.parent}/{name}"
    advice = "make it, or name another with -c" if "missing" in name else "name another with -c, or see rspd --help"
    assert rspd("-c", path) == (78, "", f"rspd: {path}: cannot be read: {reason}; {advice}\n")


def test_a_file_that_may_not_be_read_is_77(rspd: Run, file: Path) -> None:
    file.chmod(0)
    with without_privilege():
        code, _, err = rspd("-c", str(file))
    advice = "let the user that rspd runs as read it"
    assert (code, err) == (77, f"rspd: {file}: cannot be read: Permission denied; {advice}\n")


def test_check_neither_binds_nor_looks_up(rspd: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = rspd(*f"-l 127.0.0.1:{port} -l /no/such/folder/s -l 203.0.113.1:1 -b no.such:1 --check".split())
    assert (code, err) == (0, "")


def test_check_leaves_the_descriptors_as_they_were(rspd: Run, file: Path) -> None:
    before = os.listdir("/proc/self/fd")
    rspd("-c", str(file), "--check")
    assert os.listdir("/proc/self/fd") == before
