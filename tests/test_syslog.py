"""The log where stderr is a datagram socket, as a daemon's is on a host without journald."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rspd.log import Output
from tests.support import PATIENCE
from tests.test_log import TALK, account, make_output, outputs_are_closed, talk, within

__all__ = ["outputs_are_closed"]  # a fixture

PREFIX = r"<(\d+)>([A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d) rspd\[(\d+)\]: "


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the syslog daemon has its socket."""
    return tmp_path / "log"


@contextmanager
def syslog(path: Path) -> Iterator[socket.socket]:
    """A syslog daemon; its socket's file is gone after it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(path))
        server.setblocking(False)
        yield server
    path.unlink()


@contextmanager
def stderr_to(path: Path) -> Iterator[int]:
    """A descriptor that leads to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(str(path))
        yield sock.fileno()


def received(server: socket.socket) -> list[str]:
    """What has arrived, a datagram each."""
    datagrams = []
    try:
        while True:
            datagrams.append(server.recv(65536).decode())
    except BlockingIOError:
        return datagrams


def test_each_line_is_a_datagram_with_priority_time_and_process(path: Path) -> None:
    with syslog(path) as server, stderr_to(path) as stderr:
        talk(TALK, stderr)
        found = [re.fullmatch(PREFIX + r"(.*)\n", datagram) for datagram in received(server)]
    lines = [match.groups() for match in found if match]
    assert len(lines) == len(found)
    # 3 is the facility daemon, times 8; then debug, info, warning, error.
    assert [(number, text) for number, _, _, text in lines[:5]] == [
        ("31", "one 1"),
        ("30", "two"),
        ("28", "three"),
        ("27", "four"),
        ("27", "Traceback (most recent call last):"),
    ]
    assert [(number, text) for number, _, _, text in lines[-2:]] == [("27", "ValueError: first"), ("27", "second")]
    assert {number for number, *_ in lines[3:]} == {"27"}
    assert len({pid for _, _, pid, _ in lines}) == 1


def test_the_time_is_the_local_one(path: Path) -> None:
    with syslog(path) as server, stderr_to(path) as stderr:
        before = time.time()
        talk(TALK, stderr, TZ="XXX-14", LC_ALL="de_DE.UTF-8")
        first = re.match(PREFIX, received(server)[0])
    assert first
    expected = [time.strftime("%b %e %H:%M:%S", time.gmtime(when + 14 * 3600)) for when in (before, time.time())]
    assert min(expected) <= first[2] <= max(expected)


def test_journal_stream_wins_where_it_names_the_datagram_socket(path: Path) -> None:
    with syslog(path) as server, stderr_to(path) as stderr:
        status = os.fstat(stderr)
        talk(TALK, stderr, JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")
        assert received(server)[:2] == ["<7>one 1\n", "<6>two\n"]


def test_a_restarted_syslog_daemon_gets_what_follows_and_what_was_lost_is_counted(path: Path) -> None:
    with syslog(path) as server, stderr_to(path) as stderr:
        output = make_output(stderr)
        output.write(b"line=0\n")
        assert received(server) == ["line=0\n"]
        server.close()
        output.write(b"line=1\n")
        os.rename(path, path.parent / "aside")
        output.write(b"line=2\n")
        (path.parent / "aside").unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as successor:
            successor.bind(str(path))
            successor.setblocking(False)
            output.write(b"line=3\n")
            output.write(b"line=4\n")
            assert received(successor) == ["2 lines of this log were lost\n", "line=3\n", "line=4\n"]


def test_a_syslog_daemon_that_is_restarted_between_two_lines_misses_none(path: Path) -> None:
    with syslog(path):
        pass
    output: Output | None = None
    for number in range(3):
        with syslog(path) as server:
            if output is None:
                with stderr_to(path) as stderr:
                    output = make_output(stderr)
            output.write(b"line=%d\n" % number)
            assert received(server) == [f"line={number}\n"]


def test_a_syslog_daemon_that_reads_nothing_does_not_stop_rspd_and_what_is_lost_is_counted(path: Path) -> None:
    with syslog(path) as server, stderr_to(path) as stderr:
        output = make_output(stderr)
        begun = time.monotonic()
        with within(PATIENCE):
            for number in range(5000):
                output.write(b"line=%d\n" % number)
        assert time.monotonic() - begun < 5
        log = received(server)
        output.write(b"line=5000\n")
        log += received(server)
    arrived, lost = account("".join(log), rest="")
    assert lost > 0
    assert len(arrived) + lost == 5001
    assert arrived == [*range(len(arrived) - 1), 5000]


@pytest.mark.usefixtures("outputs_are_closed")
def test_a_line_too_long_for_a_datagram_is_lost_and_the_next_is_not(path: Path) -> None:
    with syslog(path) as server, stderr_to(path) as stderr:
        output = make_output(stderr)
        output.write(b"x" * 10_000_000 + b"\n")
        output.write(b"next\n")
        assert received(server) == ["1 lines of this log were lost\n", "next\n"]


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_rspd_runs_on_where_stderr_is_a_datagram_socket_to_nowhere(family: int) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        ended = subprocess.run(
            [sys.executable, "-c", TALK + "\nprint('went on')"],
            stdout=subprocess.PIPE,
            stderr=sock.fileno(),
            timeout=PATIENCE,
            check=False,
        )
    assert (ended.returncode, ended.stdout) == (0, b"went on\n")
