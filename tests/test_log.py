"""The log: its lines, and what becomes of them when nobody reads."""

from __future__ import annotations

import ast
import fcntl
import logging
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.engine.pipes import F_GETPIPE_SZ
from rspd.log import LEVELS, Output, quote, set_up
from tests.engine.test_pipes import unprivileged
from tests.support import PATIENCE, eventually

WHEN = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"

TALK = """
import logging
from rspd.log import set_up
set_up("debug")
log = logging.getLogger("rspd.test")
log.debug("one %s", 1)
log.info("two")
log.warning("three")
try:
    raise ValueError("first\\nsecond")
except ValueError:
    log.exception("four")
"""

CHATTER = """
import logging, sys
from rspd.log import set_up
set_up("info")
log = logging.getLogger("rspd.test")
for number in range(5000):
    log.info("line=%d %s", number, "x" * 100)
print("done", flush=True)
sys.stdin.readline()
log.info("line=%d %s", 5000, "x" * 100)
"""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail, out of a system call that blocks too, when it takes longer."""

    def too_late(*_: object) -> None:
        raise AssertionError(f"still not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def make_pipe() -> tuple[int, int]:
    return os.pipe()


def make_socket() -> tuple[int, int]:
    near, far = socket.socketpair()
    return near.detach(), far.detach()


def make_terminal() -> tuple[int, int]:
    reader, writer = pty.openpty()
    attributes = termios.tcgetattr(writer)
    attributes[1] &= ~termios.OPOST  # as it was written, without CR
    termios.tcsetattr(writer, termios.TCSANOW, attributes)
    return reader, writer


Ends = tuple[int, int]


@pytest.fixture(params=[make_pipe, make_socket], ids=["pipe", "socket"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """A reading and a writing end of something that fills up when nobody reads."""
    yield from opened(request.param)


@pytest.fixture(params=[make_pipe, make_socket, pty.openpty], ids=["pipe", "socket", "terminal"])
def any_ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """The same, or a terminal, of which nobody can tell how much it holds."""
    yield from opened(request.param)


@pytest.fixture
def pipe() -> Iterator[Ends]:
    yield from opened(make_pipe)


def opened(make: Callable[[], Ends]) -> Iterator[Ends]:
    numbers = make()
    yield numbers
    for number in numbers:
        try:
            os.close(number)
        except OSError:
            pass


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rspd.log.PATIENCE", 0)


made: list[Output] = []


@pytest.fixture(autouse=True)
def outputs_are_closed() -> Iterator[None]:
    yield
    while made:
        made.pop().close()


def make_output(fd: int) -> Output:
    """An output on a descriptor of its own."""
    output = Output(os.dup(fd), lambda count: b"%d lines of this log were lost\n" % count)
    made.append(output)
    return output


def drain(fd: int) -> bytes:
    """What there is to be read now."""
    os.set_blocking(fd, False)
    parts = []
    try:
        while data := os.read(fd, 1 << 20):
            parts.append(data)
    except OSError:
        pass  # nothing now, or nobody has the other end any more: EAGAIN, ECONNRESET, EIO
    return b"".join(parts)


def talk(code: str, stderr: int, **env: str) -> None:
    """Run a program that logs to this descriptor."""
    subprocess.run([sys.executable, "-c", code], stderr=stderr, env={**os.environ, **env}, check=True, timeout=PATIENCE)


def journal_stream(fd: int) -> str:
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


# Lines


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_terminal], ids=["pipe", "socket", "terminal"])
def test_a_line_begins_with_time_and_level(make: Callable[[], Ends]) -> None:
    for reader, writer in opened(make):
        talk(TALK, writer, JOURNAL_STREAM="1:2")
        lines = drain(reader).decode().splitlines()
        assert re.fullmatch(rf"{WHEN} DEBUG   one 1", lines[0])
        assert re.fullmatch(rf"{WHEN} INFO    two", lines[1])
        assert re.fullmatch(rf"{WHEN} WARNING three", lines[2])
        assert re.fullmatch(rf"{WHEN} ERROR   four", lines[3])
        assert lines[4] == "Traceback (most recent call last):"
        assert lines[-2:] == ["ValueError: first", "second"]


def test_the_time_is_the_local_one(pipe: Ends) -> None:
    reader, writer = pipe
    talk(TALK, writer, TZ="XXX-14")
    hour = time.strftime("%Y-%m-%d %H", time.gmtime(time.time() + 14 * 3600 - 60))
    later = time.strftime("%Y-%m-%d %H", time.gmtime(time.time() + 14 * 3600))
    assert drain(reader).decode().startswith((hour, later))


def test_every_line_for_the_journal_begins_with_its_priority(ends: Ends) -> None:
    reader, writer = ends
    talk(TALK, writer, JOURNAL_STREAM=journal_stream(writer))
    lines = drain(reader).decode().splitlines()
    assert lines[:5] == ["<7>one 1", "<6>two", "<4>three", "<3>four", "<3>Traceback (most recent call last):"]
    assert lines[-2:] == ["<3>ValueError: first", "<3>second"]
    assert all(line.startswith("<3>") for line in lines[3:])


def test_a_file_gets_every_line_after_what_was_in_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    with path.open("ab") as file:
        talk(TALK, file.fileno())
    lines = path.read_text().splitlines()
    assert lines[0] == "before"
    assert [line.split()[-1] for line in lines[1:5]] == ["1", "two", "three", "four"]


@pytest.mark.parametrize("closed", ["closed", "full disk"])
def test_rspd_runs_on_where_stderr_takes_nothing(closed: str) -> None:
    redirection = "2>&-" if closed == "closed" else "2>/dev/full"
    ended = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, TALK + "\nprint('went on')"],
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, b"went on\n")


@pytest.fixture
def fresh_logging() -> Iterator[None]:
    """Logging as it was, after the test."""
    logger = logging.getLogger("rspd")
    names = "logThreads", "logProcesses", "logMultiprocessing", "_srcfile"
    before = {name: getattr(logging, name) for name in names}
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    logger.handlers.clear()
    yield
    for name, value in before.items():
        setattr(logging, name, value)
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.mark.usefixtures("fresh_logging")
def test_the_level_can_be_changed_and_no_line_comes_twice(capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("rspd.test")
    for level in LEVELS:
        set_up(level)
        for number in LEVELS.values():
            log.log(number, "at %s", level)
    lines = [line.split()[2:] for line in capfd.readouterr().err.splitlines()]
    assert lines == [
        [logging.getLevelName(number), "at", level]
        for level, lowest in LEVELS.items()
        for number in LEVELS.values()
        if number >= lowest
    ]


@pytest.mark.usefixtures("fresh_logging")
@pytest.mark.parametrize(
    ("message", "expected"),
    [("gr\xfc\xdfe \u2713", "gr\xfc\xdfe \u2713"), ("\udcff.sock", r"\udcff.sock"), ("100%", "100%")],
)
def test_any_text_can_be_logged(message: str, expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    set_up("info")
    logging.getLogger("rspd.test").info(message)
    assert capfd.readouterr().err.endswith(f" INFO    {expected}\n")


COMPLAIN = """
from rspd.log import complain
complain("two\\nlines \\u2713 \\udcff")
"""


def test_a_complaint_names_rspd_on_each_line_for_people(ends: Ends) -> None:
    reader, writer = ends
    talk(COMPLAIN, writer, JOURNAL_STREAM="1:2", PYTHONIOENCODING="utf-8:backslashreplace")
    assert drain(reader).decode() == "rspd: two\nrspd: lines \u2713 \\udcff\n"


def test_a_complaint_has_its_priority_on_each_line_for_the_journal(ends: Ends) -> None:
    reader, writer = ends
    talk(COMPLAIN, writer, JOURNAL_STREAM=journal_stream(writer), PYTHONIOENCODING="utf-8:backslashreplace")
    assert drain(reader).decode() == "<3>two\n<3>lines \u2713 \\udcff\n"


# Values


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("", '""'),
        ("plain text", '"plain text"'),
        ('say "x"', r'"say \"x\""'),
        ("back\\slash", r'"back\\slash"'),
        ("two\nlines\r\t", r'"two\nlines\r\t"'),
        ("\x1b[31mred\0", r'"\x1b[31mred\x00"'),
        ("\x9b\u2028\u202e", r'"\x9b\u2028\u202e"'),
        ("\udcff", r'"\udcff"'),
        ("gr\xfc\xdfe", '"gr\xfc\xdfe"'),
    ],
)
def test_a_quoted_value_shows_what_cannot_be_printed(text: str, quoted: str) -> None:
    assert quote(text) == quoted


@given(st.text(st.characters(blacklist_categories=[])))
def test_a_quoted_value_is_one_printable_word_that_can_be_read_back(text: str) -> None:
    quoted = quote(text)
    assert quoted.isprintable()
    assert re.fullmatch(r'"(?:[^"\\]|\\.)*"', quoted)
    assert ast.literal_eval(quoted) == text


# A log that nobody reads


def account(log: str, rest: str = " x{100}") -> tuple[list[int], int]:
    """The numbers of the lines that arrived whole, and how many more were reported lost."""
    arrived = [int(number) for number in re.findall(rf"line=(\d+){rest}", log)]
    lost = sum(int(number) for number in re.findall(r"(\d+) lines of this log were lost", log))
    return arrived, lost


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "no journal"])
def test_a_log_that_nobody_reads_does_not_stop_rspd_and_what_is_lost_is_counted(any_ends: Ends, journal: bool) -> None:
    reader, writer = any_ends
    env = {**os.environ, "JOURNAL_STREAM": journal_stream(writer) if journal else ""}
    with subprocess.Popen(
        [sys.executable, "-c", CHATTER], stderr=writer, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    ) as process:
        assert process.stdout
        assert process.stdin
        with within(PATIENCE):
            assert process.stdout.readline() == b"done\n"
        log = drain(reader)
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
    log += drain(reader)
    arrived, lost = account(log.decode())
    assert arrived[-1] == 5000
    assert arrived[:-1] == list(range(len(arrived) - 1))
    assert lost > 0
    assert len(arrived) + lost == 5001
    line = "<6>" if journal else rf"{WHEN} INFO    "
    assert all(re.match(line, text) for text in log.decode().splitlines() if "line=" in text)


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "no journal"])
def test_the_report_of_lost_lines_looks_like_any_other_line(pipe: Ends, journal: bool) -> None:
    reader, writer = pipe
    env = {**os.environ, "JOURNAL_STREAM": journal_stream(writer) if journal else ""}
    with subprocess.Popen(
        [sys.executable, "-c", CHATTER], stderr=writer, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    ) as process:
        assert process.stdout
        with within(PATIENCE):
            assert process.stdout.readline() == b"done\n"
        drain(reader)
        process.communicate(b"\n", PATIENCE)
    report = drain(reader).decode().splitlines()[0]
    assert re.match(r"<[0-7]>\d+ lines" if journal else rf"{WHEN} [A-Z]+ +\d+ lines", report)


@pytest.mark.parametrize("make", [make_pipe, make_socket], ids=["pipe", "socket"])
def test_a_reader_that_has_gone_does_not_stop_rspd(make: Callable[[], Ends]) -> None:
    for reader, writer in opened(make):
        os.close(reader)
        ended = subprocess.run(
            [sys.executable, "-c", CHATTER],
            stderr=writer,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=PATIENCE,
            check=True,
        )
        assert ended.stdout == b"done\n"


def test_a_reader_that_goes_while_rspd_waits_for_it_does_not_stop_it(ends: Ends) -> None:
    reader, writer = ends
    output = make_output(writer)

    def go() -> None:
        eventually(lambda: is_full(reader, writer))
        os.close(reader)

    closer = threading.Thread(target=go)
    closer.start()
    with within(PATIENCE):
        for number in range(5000):
            output.write(b"line=%d %s\n" % (number, b"x" * 100))
        closer.join()


def is_full(reader: int, writer: int) -> bool:
    """Whether what was written and not read is about all that fits."""
    held: int = struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"\0\0\0\0"))[0]
    try:
        return held > fcntl.fcntl(writer, F_GETPIPE_SZ) - 8192
    except OSError:
        return held > 20_000  # a socket: each line takes far more of it than its bytes


def test_a_reader_that_is_slow_for_a_moment_loses_nothing(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rspd.log.PATIENCE", PATIENCE * 1000)
    reader, writer = ends
    output = make_output(writer)
    received = bytearray()
    last = b"line=4999 " + b"x" * 100

    def read_late() -> None:
        eventually(lambda: is_full(reader, writer))
        while last not in received:
            received.extend(os.read(reader, 4096))

    thread = threading.Thread(target=read_late)
    thread.start()
    with within(PATIENCE):
        for number in range(5000):
            output.write(b"line=%d %s\n" % (number, b"x" * 100))
        thread.join()
    assert account(received.decode()) == (list(range(5000)), 0)


def test_rspd_waits_for_a_reader_once_and_not_for_each_line(ends: Ends) -> None:
    output = make_output(ends[1])
    begun = time.monotonic()
    with within(PATIENCE):
        for number in range(20_000):
            output.write(b"line=%d %s\n" % (number, b"x" * 100))
    assert time.monotonic() - begun < 5  # a wait for each of the lines lost would be a quarter of an hour


@pytest.mark.usefixtures("impatient")
@settings(max_examples=30)
@given(st.lists(st.one_of(st.integers(1, 400), st.just(0)), max_size=12))
@pytest.mark.parametrize("make", [make_pipe, make_socket], ids=["pipe", "socket"])
def test_every_line_arrives_whole_and_in_order_or_is_counted(make: Callable[[], Ends], bursts: list[int]) -> None:
    """A burst is a number of lines, 0 a reader that reads what there is."""
    for reader, writer in opened(make):
        output = make_output(writer)
        log = b""
        written = 0
        for burst in [*bursts, 0, 1, 0]:
            for _ in range(burst):
                output.write(b"line=%d %s\n" % (written, b"x" * 500))
                written += 1
            if not burst:
                log += drain(reader)
        arrived, lost = account(log.decode())
        assert arrived == sorted(set(arrived))
        assert len(arrived) + lost == written
        for line in log.decode().splitlines():
            assert re.fullmatch(r"line=\d+ x{500}|.*\d+ lines of this log were lost.*", line)


@pytest.mark.large_pipes(1)
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_a_long_line_that_does_not_fit_counts_as_lost_and_the_next_begins_a_line(ends: Ends, size: int) -> None:
    reader, writer = ends
    output = make_output(writer)
    for _ in range(14):
        output.write(b"x" * 4095 + b"\n")
    output.write(b"y" * size + b"\n")
    output.write(b"y" * size + b"\n")
    log = drain(reader)
    output.write(b"next\n")
    log += drain(reader)
    whole = log.decode().splitlines().count("y" * size)
    assert whole + account(log.decode())[1] == 2
    assert not re.search(rb"[xy][^xy\n]", log.removesuffix(b"next\n"))
    assert log.endswith(b"\nnext\n")


def test_the_descriptor_that_was_inherited_is_left_as_it_was(any_ends: Ends) -> None:
    _, writer = any_ends
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    make_output(writer).write(b"x\n")
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == flags
    assert os.get_blocking(writer)


@pytest.mark.parametrize("make", [make_pipe, pty.openpty], ids=["pipe", "terminal"])
def test_what_another_user_has_opened_does_not_stop_rspd_either(make: Callable[[], Ends]) -> None:
    """`sudo -u nobody rspd | cat`, or su(1): it belongs to who opened it, and others may not open it anew."""
    for reader, writer in opened(make):
        write_as_another_user(reader, writer)


def write_as_another_user(reader: int, writer: int) -> None:
    os.fchmod(writer, 0)
    with unprivileged():
        output = make_output(writer)
    with within(5):
        for number in range(2000):
            output.write(b"line=%d %s\n" % (number, b"x" * 100))
    log = drain(reader)
    output.write(b"line=2000 %s\n" % (b"x" * 100))
    arrived, lost = account((log + drain(reader)).decode())
    assert len(arrived) + lost == 2001
