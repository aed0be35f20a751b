"""The process and its configuration: what it starts with, what it refuses, what it says and with which exit code."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fleet import File
from tests.support import (
    PATIENCE,
    Backend,
    Daemon,
    abstract_name,
    answer,
    drop_capabilities,
    eventually,
    free_port,
    receive_all,
    rspd,
    skip_for_kernel,
)

PORT_MISSING = "the port is missing, as in localhost:80"
DIAL = "expected HOST:PORT, [IPV6]:PORT, /PATH or @NAME"
ADDRESS = "expected PORT, HOST:PORT, [IPV6]:PORT, /PATH, @NAME or fd://NAME"
DURATION = "expected a duration above 0, as 500ms, 5s, 2m or 1h, or off"


def refused(
    *arguments: str,
    preexec: Callable[[], object] | None = None,
    close: tuple[int, ...] = (),
    limit: int = 0,
    env: dict[str, str] | None = None,
) -> tuple[int, list[str]]:
    """Run rspd, which is not to start; its exit code, and what it says without `rspd: `."""

    def prepare() -> None:
        if preexec:
            preexec()
        if limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        for fd in close:
            os.close(fd)

    end = subprocess.run(
        [sys.executable, "-m", "rspd", "--foreground", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        preexec_fn=prepare,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert "Traceback" not in end.stderr, end.stderr
    assert end.stdout == ""
    return end.returncode, [line.removeprefix("rspd: ") for line in end.stderr.splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test puts its configuration."""
    return tmp_path / "rspd.yaml"


@pytest.fixture
def stale(tmp_path: Path) -> Iterator[Path]:
    """A socket file that nobody listens on, and that rspd would replace; checked to be untouched at the end."""
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        # Open up to here, so that its inode number is not given to another file.
        inode = path.stat().st_ino
        yield path
        assert path.stat().st_ino == inode


def test_a_minimal_file_is_enough_to_relay(file: Path) -> None:
    with Backend(answer) as backend:
        file.write_text(f"listen: 127.0.0.1:0\nbackend: {backend.address}\n")
        daemon = Daemon("-c", str(file))
        try:
            with daemon.connect() as client:
                client.sendall(b"?")
                assert client.recv(2) == b"ok"
            daemon.wait_for_ends(1)
            assert daemon.stop() == 0
        finally:
            daemon.kill()
    assert daemon.find("ending connections=0 drain_timeout=30$")


def test_every_form_of_an_address_is_listened_on(tmp_path: Path, file: Path) -> None:
    name = abstract_name()
    file.write_text(f"listen: [0, '[::1]:0', localhost:0, {tmp_path}/s, '@{name}']\nbackend: a:1\n")
    daemon = Daemon("-c", str(file), wait=False)
    try:
        daemon.wait_for(f"listening address=@{name}$")
        assert daemon.find(r"listening address=0\.0\.0\.0:\d+$")
        assert daemon.find(r"listening address=\[::1\]:\d+$")
        assert daemon.find(r"listening address=127\.0\.0\.1:\d+$")
        for path in (f"{tmp_path}/s", f"\0{name}"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_the_log_level_of_the_command_line_wins_over_the_files(tmp_path: Path, file: Path) -> None:
    file.write_text(f"listen: {tmp_path}/s\nbackend: /nonexistent\nlog_level: debug\n")
    daemon = Daemon("-c", str(file), "--log-level", "error", wait=False)
    try:
        eventually(lambda: accepts(tmp_path / "s"))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(f"{tmp_path}/s")
            assert client.recv(1) == b""
        assert daemon.stop() == 0
        assert daemon.log == ""
    finally:
        daemon.kill()


@pytest.mark.parametrize("duration", ["600h", "999999999h", "off"])
def test_every_duration_that_is_accepted_works(file: Path, duration: str) -> None:
    keys = ("connect_timeout", "idle_timeout", "half_close_timeout", "drain_timeout")
    timeouts = "".join(f"{key}: {duration}\n" for key in keys)
    with Backend(answer) as backend:
        file.write_text(f"listen: 127.0.0.1:0\nbackend: {backend.address}\n{timeouts}")
        daemon = Daemon("-c", str(file))
        try:
            with daemon.connect() as client:
                client.sendall(b"?")
                assert client.recv(2) == b"ok"
            daemon.wait_for_ends(1)
            assert daemon.stop() == 0
            assert "Traceback" not in daemon.log
        finally:
            daemon.kill()


def test_all_that_is_wrong_with_a_file_is_said_at_once_and_nothing_is_bound(file: Path, stale: Path) -> None:
    file.write_text(
        f"""\
listen:
- {stale}
- 70000
- ::1:80
- localhost
- {stale}
backend: 8000
backends: [a:1]
max_connections: 0
max_conections: 5
backlog: 1e3
connect_timeout: 0
idle_timeout: 1:30
half_close_timeout:
drain_timeout: [5s]
log_level: off
log_level: debug
colour: red
"""
    )
    assert refused("-c", str(file)) == (
        78,
        [
            f"{file}:3: listen: a port is at most 65535, found '70000'",
            f"{file}:4: listen: expected brackets around an IPv6 address, as in [::1]:8080, found '::1:80'",
            f"{file}:5: listen: {ADDRESS} (services(5) has no 'localhost'), found 'localhost'; {PORT_MISSING}",
            f"{file}:6: listen: {stale} is listed twice",
            f"{file}:7: backend: {DIAL}, found '8000'; port 8000 of this host is 127.0.0.1:8000",
            f"{file}:8: backends: given a second time, first as backend in line 7; several values are one list",
            f"{file}:9: max_connections: expected a whole number from 1 to 1000000, found '0'",
            f"{file}:10: max_conections: unknown key, did you mean max_connections?",
            f"{file}:11: backlog: expected a whole number from 1 to 2147483647, found '1e3'",
            f"{file}:12: connect_timeout: {DURATION}, found '0'",
            f"{file}:13: idle_timeout: {DURATION}, found '1:30'",
            f"{file}:14: half_close_timeout: {DURATION}, found ''",
            f"{file}:15: drain_timeout: expected one value, found a list",
            f"{file}:16: log_level: expected one of debug, info, warning, error, found 'off'",
            f"{file}:17: log_level: given a second time, first as log_level in line 16",
            (
                f"{file}:18: colour: unknown key, expected listen, backend, max_connections, "
                "or another one of rspd.yaml(5)"
            ),
        ],
    )


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"listen: [::1]:80\n", 1, "not valid YAML: .*; an address that starts with \\[, @ or : needs quotes"),
        (b"\tbacklog: 1\n", 1, "not valid YAML: found a tab in column 1, expected spaces; YAML indents by spaces"),
        (b"backlog: 1\nbackend: caf\xe9:1\n", 2, "not valid YAML: .*"),
        (b'backlog: 1\nbackend: "\\U00110000"\n', 2, "not valid YAML: .*"),
        (b"---\nlisten: 80\n---\n", 3, "not valid YAML: .*single document.*"),
        (b"just words\n", 1, "expected lines of KEY: VALUE, found 'just words'"),
        (b"[" * 100, 1, "not valid YAML: .*"),
    ],
)
def test_a_file_that_is_no_configuration_is_78_with_its_line_and_nothing_is_bound(
    file: Path, stale: Path, content: bytes, line: int, message: str
) -> None:
    file.write_bytes(content)
    code, (error,) = refused("-c", str(file), "-l", str(stale), "-b", "a:1")
    assert code == 78
    assert re.fullmatch(f"{re.escape(str(file))}:{line}: {message}", error), error


def test_endless_nesting_is_78(file: Path) -> None:
    file.write_text("[" * 1000)
    assert refused("-c", str(file)) == (78, [f"{file}: not valid YAML: nested too deeply"])


def test_an_empty_file_is_78_and_says_what_is_missing(file: Path) -> None:
    file.touch()
    assert refused("-c", str(file)) == (
        78,
        [
            f"{file}: listen: missing, expected an address to listen on",
            f"{file}: backend: missing, expected an address to relay to",
        ],
    )


def test_a_missing_file_is_78(file: Path) -> None:
    advice = "make it, or name another with -c"
    assert refused("-c", str(file)) == (78, [f"{file}: cannot be read: No such file or directory; {advice}"])


def test_a_folder_in_place_of_the_file_is_78(tmp_path: Path) -> None:
    advice = "name another with -c, or see rspd --help"
    assert refused("-c", str(tmp_path)) == (78, [f"{tmp_path}: cannot be read: Is a directory; {advice}"])


def test_a_file_that_may_not_be_read_is_77(file: Path) -> None:
    file.touch(0)
    expected = 77, [f"{file}: cannot be read: Permission denied; let the user that rspd runs as read it"]
    assert refused("-c", str(file), preexec=drop_capabilities) == expected


def test_a_wrong_argument_is_64_and_nothing_is_bound(stale: Path) -> None:
    code, lines = refused("-l", str(stale), "-b", "8000")
    assert code == 64
    assert (
        lines[-1]
        == f"argument -b/--backend: {DIAL}, found '8000'; port 8000 of this host is 127.0.0.1:8000; see rspd --help"
    )


def test_a_file_whose_name_is_not_utf_8_can_be_checked(tmp_path: Path) -> None:
    path = f"{tmp_path}/\udcff.yaml"
    Path(path).write_text("listen: 80\nbackend: a:1\n")
    command = [sys.executable, "-m", "rspd", "--check", "-c", path]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    end = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=env, check=False)
    assert (end.returncode, end.stderr) == (0, b"")
    assert b".yaml: valid\nlistening on 80;" in end.stdout


def test_a_port_in_use_is_69() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, lines = refused("-l", address, "-b", "a:1")
    assert code == 69
    advice = f"another process has that port, `ss -tanp sport = :{address.rpartition(':')[2]}` shows which"
    assert lines == [f"cannot listen on {address}: Address already in use; {advice}"]


def test_a_port_in_use_on_one_family_is_69_and_says_on_which() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, (line,) = refused("-l", str(port), "-b", "a:1")
    assert code == 69
    assert line.startswith(f"cannot listen on {port} (0.0.0.0:{port}): Address already in use; ")


def test_a_port_that_was_just_closed_can_be_listened_on_at_once() -> None:
    with Backend(answer) as backend:
        listen = [f"127.0.0.1:{free_port()}"]
        with rspd("-b", backend.address, listen=listen) as first, first.connect() as client:
            client.sendall(b"?")
            assert client.recv(2) == b"ok"
        with rspd("-b", backend.address, listen=listen):
            pass


def test_an_address_of_another_host_is_69() -> None:
    assert refused("-l", "203.0.113.1:80", "-b", "a:1") == (
        69,
        [
            (
                "cannot listen on 203.0.113.1:80: Cannot assign requested address; "
                "no interface of this host has that address, `ip address` lists them"
            )
        ],
    )


def test_an_unknown_host_is_69() -> None:
    code, (line,) = refused("-l", "no-such.invalid:0", "-b", "a:1", env={"RES_OPTIONS": "timeout:1 attempts:1"})
    assert code == 69
    assert re.fullmatch("cannot listen on no-such.invalid:0: .*(not known|name resolution|No address).*", line)


def test_an_unknown_backend_is_no_reason_not_to_start() -> None:
    with rspd("-b", "no-such.invalid:1"):
        pass


def test_a_privileged_port_is_77() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest < 2:
        skip_for_kernel("any user may bind any port")
    address = f"127.0.0.1:{lowest - 1}"
    assert refused("-l", address, "-b", "a:1", preexec=drop_capabilities) == (
        77,
        [f"cannot listen on {address}: Permission denied; a port below 1024 needs root or CAP_NET_BIND_SERVICE"],
    )


def test_a_folder_that_may_not_be_written_is_77(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(0o555)
    code, (line,) = refused("-l", f"{folder}/s", "-b", "a:1", preexec=drop_capabilities)
    assert code == 77
    assert line.startswith(f"cannot listen on {folder}/s: Permission denied; ")


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_a_stale_socket_file_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    assert not accepts(path)
    with rspd("-b", "127.0.0.1:1", listen=[str(path)]):
        assert accepts(path)
    assert not path.exists()


def test_a_socket_file_somebody_listens_on_is_69_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        code, (line,) = refused("-l", str(path), "-b", "a:1")
        assert code == 69
        assert line.startswith(f"cannot listen on {path}: Address already in use; another process listens there, ")
        assert accepts(path)


def test_the_advice_for_a_unix_socket_in_use_is_a_command_that_lists_unix_sockets(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(f"{tmp_path}/s")
        taken.listen()
        _, (line,) = refused("-l", f"{tmp_path}/s", "-b", "a:1")
    assert re.search("`ss -[a-z]*x", line)


def test_an_abstract_name_in_use_is_69() -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind("")
        name = taken.getsockname()[1:].decode()
        code, (line,) = refused("-l", f"@{name}", "-b", "a:1")
    assert code == 69
    assert line.startswith(f"cannot listen on @{name}: Address already in use; ")


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_69_and_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    before = path.lstat()
    expected = 69, [f"cannot listen on {path}: a file that is not a socket stands there"]
    assert refused("-l", str(path), "-b", "a:1") == expected
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_missing_folder_is_69(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "s"
    expected = 69, [f"cannot listen on {path}: No such file or directory; the folder does not exist"]
    assert refused("-l", str(path), "-b", "a:1") == expected


def test_a_file_in_place_of_the_folder_is_69(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    expected = 69, [f"cannot listen on {tmp_path}/file/s: Not a directory"]
    assert refused("-l", f"{tmp_path}/file/s", "-b", "a:1") == expected


def test_when_the_second_address_fails_the_first_is_given_back(tmp_path: Path) -> None:
    code, (line,) = refused("-l", f"{tmp_path}/a", "-l", f"{tmp_path}//a", "-b", "a:1")
    assert code == 69
    assert line.startswith(f"cannot listen on {tmp_path}//a: Address already in use; ")
    assert list(tmp_path.iterdir()) == []


def test_too_many_connections_for_the_descriptors_is_71_with_the_number_that_works(stale: Path) -> None:
    code, (line,) = refused("-l", str(stale), "-b", "a:1", "--max-connections", "100", limit=64)
    assert code == 71
    advice = re.fullmatch(
        r"max_connections 100 needs \d+ descriptors, and the limit is 64: lower it to (\d+) or raise the limit "
        r"\(LimitNOFILE= in the unit, ulimit -Hn in a shell\)",
        line,
    )
    assert advice, line
    fitting = int(advice[1])
    with rspd("-b", "127.0.0.1:1", "--max-connections", str(fitting), limit=(64, 64)):
        pass
    assert refused("-l", str(stale), "-b", "a:1", "--max-connections", str(fitting + 1), limit=64)[0] == 71


def test_a_limit_too_low_for_any_connection_is_71_and_only_the_limit_is_to_change(stale: Path) -> None:
    code, (line,) = refused("-l", str(stale), "-b", "a:1", limit=20)
    assert code == 71
    assert re.fullmatch(
        r"max_connections 1 needs \d+ descriptors, and the limit is 20: raise the limit "
        r"\(LimitNOFILE= in the unit, ulimit -Hn in a shell\)",
        line,
    )


def test_room_is_made_for_the_checks_of_each_backend_and_the_names_that_they_ask(tmp_path: Path) -> None:
    def needed(**keys: object) -> int:
        file = File(tmp_path, max_connections=1000, **keys)
        code, (line,) = refused("-c", str(file.path), limit=64)
        assert code == 71
        return int(line.partition(" needs ")[2].split()[0])

    plain = needed(backends=["127.0.0.1:1", "127.0.0.1:2"])
    checked = {"address": "127.0.0.1:1", "health": {"address": "a.example:1"}}
    unchecked = {"address": "127.0.0.1:2", "health": "off"}
    assert needed(backends=[checked, "127.0.0.1:2"]) == plain + 2  # the check, and the lookup
    assert needed(backends=["127.0.0.1:1", unchecked], health="on") == plain + 1


@pytest.mark.parametrize("limit", [5, 6, 7])
def test_a_limit_too_low_for_rspd_itself_is_71_too(stale: Path, limit: int) -> None:
    code, (line,) = refused("-l", str(stale), "-b", "127.0.0.1:1", limit=limit)
    assert code == 71
    assert line.startswith(f"max_connections 1 needs 27 descriptors, and the limit is {limit}: raise the limit ")


@pytest.mark.parametrize("soft", [5, 6, 7])
def test_a_soft_limit_too_low_for_rspd_itself_is_raised(soft: int) -> None:
    with Backend(answer) as backend, rspd("-b", backend.address, limit=(soft, 100)) as daemon:
        with daemon.connect() as client:
            client.sendall(b"?")
            assert receive_all(client) == b"ok"


def test_the_soft_limit_is_raised_as_far_as_needed() -> None:
    with rspd("-b", "127.0.0.1:1", "--max-connections", "100", limit=(64, 400)) as daemon:
        limits = Path(f"/proc/{daemon.pid}/limits").read_text()
    assert re.search(r"Max open files +400 +400 ", limits)


def test_a_soft_limit_that_is_high_enough_stays() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = hard - 1
    with rspd("-b", "127.0.0.1:1", limit=(soft, hard)) as daemon:
        limits = Path(f"/proc/{daemon.pid}/limits").read_text()
    assert re.search(rf"Max open files +{soft} +{hard} ", limits)


@pytest.mark.parametrize("count", [21, 22, 30])
def test_more_listeners_than_descriptors_is_71_and_no_traceback(tmp_path: Path, count: int) -> None:
    listeners = [word for number in range(count) for word in ("-l", f"{tmp_path}/{number}")]
    code, (line,) = refused(*listeners, "-b", "a:1", limit=26)
    assert code == 71
    assert "LimitNOFILE" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("close", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_descriptors_are_no_clients(tmp_path: Path, close: tuple[int, ...]) -> None:
    path = tmp_path / "s"

    def close_all() -> None:
        for fd in close:
            os.close(fd)

    with Backend(answer) as backend:
        process = subprocess.Popen(
            [sys.executable, "-m", "rspd", "--foreground", "-l", str(path), "-b", backend.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=close_all,
        )
        try:
            eventually(lambda: accepts(path))
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                client.connect(str(path))
                client.sendall(b"?")
                assert client.recv(2) == b"ok"
                kinds = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in close]
            assert kinds == ["/dev/null"] * len(close)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.wait(PATIENCE)
            assert process.stdin
            process.stdin.close()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["-l", "x y"], 64), (["-c", "/nonexistent"], 78), (["-l", "203.0.113.1:1", "-b", "a:1"], 69)],
)
def test_a_refusal_keeps_its_exit_code_where_nobody_can_hear_it(arguments: list[str], code: int) -> None:
    assert refused(*arguments, close=(0, 1, 2))[0] == code
