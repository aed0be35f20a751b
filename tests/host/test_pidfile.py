"""The pid file, with real processes and real locks."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rspd.errors import StartError
from rspd.host.pidfile import PidFile
from tests.engine.test_pipes import unprivileged
from tests.support import PATIENCE, private_mounts

HOLD = """
import sys
from rspd.host.pidfile import PidFile
with PidFile(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a test has its pid file, in a folder that others can look into."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder / "rspd.pid"
        if folder.exists():
            folder.chmod(0o755)


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the pid file, until its stdin ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def check_refused(path: Path, reason: str, code: int = 0) -> None:
    """To write the pid file is refused for this reason, and what stands there is as it was after it."""

    def state() -> object:
        if not os.path.lexists(path):
            return None
        status = path.lstat()
        return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode

    before = state()
    with pytest.raises(StartError) as caught:
        PidFile(str(path)).__enter__()
    assert re.fullmatch(f"pid file {path}: {reason}", str(caught.value)), str(caught.value)
    assert (caught.value.exit_code, caught.value.errno) == (73, code)
    assert state() == before


def dead_pid() -> int:
    """The number of a process that has just ended."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


# While all is well


def test_it_holds_the_number_of_the_process_and_is_removed_at_the_end(path: Path) -> None:
    with PidFile(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
        assert path.stat().st_mode & 0o777 == 0o644
    assert not path.exists()


def test_everybody_may_read_it_whatever_the_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        with PidFile(str(path)):
            assert path.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_it_is_locked_meanwhile_and_no_program_started_meanwhile_keeps_the_lock(path: Path) -> None:
    with PidFile(str(path)):
        with path.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        inherited = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True).stdout
        assert str(path) not in inherited


def test_it_is_removed_also_when_an_exception_ends_the_process(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), PidFile(str(path)):
        raise ZeroDivisionError
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "\n", "DEAD\n", "DEAD", " DEAD \n\n", "OWN\n", "0\n", "999999999\n"])
def test_one_that_is_out_of_date_is_replaced(path: Path, content: str) -> None:
    path.write_text(content.replace("DEAD", str(dead_pid())).replace("OWN", str(os.getpid())))
    with PidFile(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


def test_one_of_a_process_that_was_killed_is_replaced(path: Path) -> None:
    with holder(path) as other:
        other.kill()
        other.wait(PATIENCE)
        assert path.exists()
        with PidFile(str(path)):
            assert path.read_text() == f"{os.getpid()}\n"


# What is refused


def test_one_that_another_rspd_holds_is_refused_with_its_number_and_stays(path: Path) -> None:
    with holder(path) as other:
        check_refused(path, f"rspd runs already, as process {other.pid}")
        assert path.read_text() == f"{other.pid}\n"


def test_one_that_is_locked_and_not_written_yet_is_refused_without_a_number(path: Path) -> None:
    path.touch()
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        check_refused(path, "rspd runs already")


def test_one_that_names_a_process_of_another_program_is_refused_with_its_name(path: Path) -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        path.write_text(f"{process.pid}\n")
        advice = "stop that first, or remove the file if it is out of date"
        check_refused(path, rf"names process {process.pid}, which runs \(\S+\); {advice}")
        process.kill()
    assert path.exists()


def test_one_that_names_another_users_process_is_refused(path: Path) -> None:
    """Process 1 is root's, and a signal to it not for everybody."""
    path.write_text("1\n")
    path.chmod(0o666)
    with unprivileged():
        check_refused(path, r"names process 1, which runs \(.+\); stop that first, .*")


@pytest.mark.parametrize(
    "content",
    ["precious", "-1\n", "1 2\n", "12x\n", "1234567890\n", "\u00b9\n", "\0\n", "999999999" + "\n" * 64 + "text"],
)
def test_a_file_with_other_text_is_refused_and_left(path: Path, content: str) -> None:
    path.write_text(content)
    check_refused(path, "expected a process's number, found other text; left as it is")
    assert path.read_text() == content


@pytest.mark.parametrize("target", ["elsewhere", "missing"])
def test_a_symbolic_link_is_refused_and_what_it_names_is_left(path: Path, target: str) -> None:
    (path.parent / "elsewhere").write_text("1\n")
    path.symlink_to(target)
    check_refused(path, "cannot be written: a symbolic link stands there", errno.ELOOP)
    assert (path.parent / "elsewhere").read_text() == "1\n"
    assert not (path.parent / "missing").exists()


def test_a_fifo_is_refused_without_waiting_for_anybody(path: Path) -> None:
    os.mkfifo(path)
    check_refused(path, "expected a file, found something else")


def test_a_device_is_refused() -> None:
    check_refused(Path("/dev/null"), "expected a file, found something else")


def test_a_folder_is_refused(path: Path) -> None:
    path.mkdir()
    check_refused(path, "cannot be written: Is a directory", errno.EISDIR)


def test_a_folder_that_does_not_exist_is_named(path: Path) -> None:
    check_refused(path / "missing" / "pid", "cannot be written: No such file or directory", errno.ENOENT)


def test_a_folder_that_may_not_be_written_is_refused(path: Path) -> None:
    path.parent.chmod(0o555)
    with unprivileged():
        check_refused(path, "cannot be written: Permission denied", errno.EACCES)


def test_a_file_that_may_not_be_written_is_refused(path: Path) -> None:
    path.write_text(f"{dead_pid()}\n")
    path.chmod(0o444)
    with unprivileged():
        check_refused(path, "cannot be written: Permission denied", errno.EACCES)


FULL = """
import sys
from rspd.errors import StartError
from rspd.host.pidfile import PidFile
try:
    PidFile(sys.argv[1]).__enter__()
except StartError as error:
    print(error.exit_code, error.errno, error)
"""


def test_a_full_disk_is_told_and_leaves_no_empty_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=4k full "$0" && printf %4096s > "$0/filler" && "$@"; ls "$0"'
    command = [*private_mounts(), "sh", "-c", script, str(disk), sys.executable, "-c", FULL, f"{disk}/pid"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    expected = f"73 {errno.ENOSPC} pid file {disk}/pid: cannot be written: No space left on device"
    assert done.stdout.splitlines() == [expected, "filler"]


def test_a_file_of_another_user_that_may_be_written_is_taken(path: Path) -> None:
    path.write_text("")
    path.chmod(0o666)
    with unprivileged(), PidFile(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"


def test_what_stood_in_a_file_that_cannot_be_written_to_the_end_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = f"{dead_pid()}\n"
    path.write_text(old)

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rspd.host.pidfile.os.pwrite", fail)
    with pytest.raises(StartError, match="No space left on device"):
        PidFile(str(path)).__enter__()
    assert path.read_text() == old


# Races


def test_one_that_vanishes_while_it_is_opened_is_made_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another rspd that ends just then."""
    path.write_text(f"{dead_pid()}\n")
    flock = fcntl.flock
    taken: list[int] = []

    def late(fd: int, operation: int) -> Any:
        if not taken:
            path.unlink()
        taken.append(fd)
        return flock(fd, operation)

    monkeypatch.setattr("rspd.host.pidfile.fcntl.flock", late)
    with PidFile(str(path)):
        assert len(taken) == 2
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


def test_one_that_another_replaces_while_it_is_opened_is_the_others(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    with holder(path.parent / "theirs") as other:

        def late(fd: int, operation: int) -> Any:
            if (path.parent / "theirs").exists():
                (path.parent / "theirs").rename(path)
            return flock(fd, operation)

        monkeypatch.setattr("rspd.host.pidfile.fcntl.flock", late)
        with pytest.raises(StartError, match=f"rspd runs already, as process {other.pid}"):
            PidFile(str(path)).__enter__()
        assert path.read_text() == f"{other.pid}\n"


@pytest.mark.parametrize("other", ["another file", "a link to it", "nothing"])
def test_at_the_end_only_its_own_file_is_removed(path: Path, other: str) -> None:
    with PidFile(str(path)):
        path.rename(path.parent / "moved")
        if other == "another file":
            path.write_text("theirs")
        elif other == "a link to it":
            path.symlink_to("moved")
    assert os.path.lexists(path) == (other != "nothing")
    assert (path.parent / "moved").exists()


def test_a_folder_that_is_gone_at_the_end_does_no_harm(path: Path) -> None:
    with PidFile(str(path)):
        shutil.rmtree(path.parent)


def test_a_folder_that_may_not_be_written_at_the_end_does_no_harm(path: Path) -> None:
    path.parent.chmod(0o777)
    with unprivileged():
        with PidFile(str(path)):
            chmod_as_owner(path.parent, 0o555)
        assert path.exists()
    chmod_as_owner(path.parent, 0o777)
    with PidFile(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"


def chmod_as_owner(folder: Path, mode: int) -> None:
    """By the user who owns it, which the process may have been before."""
    user = os.geteuid()
    if user != folder.stat().st_uid:
        os.seteuid(0)
    folder.chmod(mode)
    if os.geteuid() != user:
        os.seteuid(user)
