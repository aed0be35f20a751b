"""`rspd top` in a real terminal, beside something that answers as rspd does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rspd.commands.top import main
from rspd.snapshot import Backend, Connection, Connections, Pool, Process, Proxy, Snapshot, read
from tests.commands import picture
from tests.commands.support import Answering, answering, run
from tests.commands.terminal import Terminal, terminal
from tests.support import PATIENCE, eventually

NAMES = ("10.0.0.11:80", "10.0.0.12:80")

HEALTHY = Snapshot(
    Process("0.3.0", 4711, lineage="k1", service_age=3600.0),
    (Proxy("web", open=2, most=100),),
    pools=(Pool("web"),),
    backends=tuple(Backend("web", name=name, state_age=3600.0, open=1) for name in NAMES),
)

CONNECTIONS = tuple(
    Connection(f"k1-{number}", "web", client, "", NAMES[number % 2], age=60.0 - number, idle=float(number), sent=number)
    for number, client in enumerate(["192.0.2.7:4000", "192.0.2.8:4001", "192.0.2.9:4002"])
)


def dead(snapshot: Snapshot = HEALTHY) -> Snapshot:
    first, second = snapshot.backends
    return snapshot._replace(backends=(first, second._replace(state="down", why="No route to host", state_age=0.3)))


def top(path: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "rspd", "top", "--socket", str(path), *words]


@contextmanager
def shown(
    path: Path, *words: str, lines: int = 24, columns: int = 80, env: dict[str, str] | None = None
) -> Iterator[tuple[Terminal, Answering]]:
    """rspd top in a terminal, beside a service that is well."""
    with answering(path, HEALTHY, CONNECTIONS) as server:
        with terminal(top(path, "--interval", "0.1", *words), lines, columns, env) as there:
            yield there, server


def is_restored(there: Terminal) -> bool:
    """Whether the terminal is as it was: its settings, its cursor, and what was on its screen."""
    _, _, rest = there.written.rpartition("\x1b[?1049l")
    return termios.tcgetattr(there.theirs) == there.before and "\x1b[?25h" in there.written and "\x1b[?25l" not in rest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def test_it_shows_a_backend_that_dies_within_a_second_and_why(path: Path) -> None:
    with answering(path, HEALTHY, CONNECTIONS) as server, terminal(top(path)) as there:
        screen = there.wait_for("rspd 0.3.0", "up 1 h", "10.0.0.12:80", "192.0.2.9:4002")
        assert "trouble" not in screen
        # A look later, so that the interval is that of the default.
        eventually(lambda: server.asked.count("/v1/status") > 2)
        server.snapshot = dead()
        begin = time.monotonic()
        there.wait_for("1 trouble", "down 0s", "    No route to host")
        assert time.monotonic() - begin < 10  # a second, and what a host that is busy takes
        assert "\x1b[31m" in there.written  # red


def test_keys_sort_connections_and_filter_them(path: Path) -> None:
    with shown(path) as (there, _):
        there.wait_for("oldest first")
        there.press("i")
        there.wait_for("3 connections, longest idle first")
        there.see(lambda text: -1 < text.find("192.0.2.9") < text.find("192.0.2.7"), "the longest idle one first")
        there.press("f192.0.2.8")
        there.wait_for("192.0.2.8_")
        there.press("\r")
        text = there.see(lambda text: "1 connection of 192.0.2.8" in text)
        assert "192.0.2.9" not in text
        there.press("f\x15")
        there.wait_for("cancel): _")
        there.press("\x1b")  # Escape: as before
        there.wait_for("1 connection of 192.0.2.8", "h: help")
        there.press("h")
        there.wait_for("Ctrl-C  quit")
        there.press("hp")
        there.wait_for("PAUSED")
        there.press("q")
        assert there.end() == 0


def test_arrows_and_page_keys_scroll(path: Path) -> None:
    with answering(path, HEALTHY._replace(backends=tuple(Backend("web", name=f"b{n}") for n in range(60)))):
        with terminal(top(path)) as there:
            there.wait_for("1-20 of 61")
            there.press("\x1bOB")  # down
            there.wait_for("2-21 of 61")
            there.press("\x1b[6~")  # PageDown
            there.wait_for("21-40 of 61")


def test_while_there_is_no_answer_it_says_so_and_goes_on_after_it(path: Path) -> None:
    with shown(path) as (there, server):
        there.wait_for("192.0.2.9:4002")
        os.rename(path, path.with_name("gone"))
        there.wait_for("NO ANSWER for", "no such socket", "192.0.2.9:4002", "10.0.0.12:80")
        os.rename(path.with_name("gone"), path)
        there.see(lambda text: text.startswith("rspd 0.3.0"))
        server.instead = b"HTTP/1.1 200 OK\r\n\r\n" + b'{"proxies": [{"open": "many"}]}'
        there.wait_for("NO ANSWER for", "expected int, found 'many'")
        server.instead = None
        there.see(lambda text: text.startswith("rspd 0.3.0"))


def test_keys_work_while_rspd_takes_its_time(path: Path) -> None:
    class Slow(Answering):
        free = threading.Event()

        def answer(self, target: str) -> tuple[int, str]:
            if len(self.asked) > 1:
                self.free.wait(PATIENCE)
            return super().answer(target)

    with Slow(str(path), HEALTHY, CONNECTIONS, None, "") as server:
        threading.Thread(target=server.serve_forever, args=(0.005,)).start()
        try:
            with terminal(top(path, "--interval", "0.1")) as there:
                there.wait_for("10.0.0.12:80")
                there.press("h")
                there.wait_for("Ctrl-C  quit")
                there.press("h")
                there.wait_for("NO ANSWER for", "10.0.0.12:80")
                Slow.free.set()
                there.wait_for("192.0.2.9:4002")
                there.press("q")
                assert there.end() == 0
        finally:
            Slow.free.set()
            server.shutdown()


@pytest.mark.parametrize(
    ("how", "code"),
    [("q", 0), ("\x03", 0), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)],
    ids=["q", "Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_the_terminal_is_restored_at_the_end(path: Path, how: str | signal.Signals, code: int) -> None:
    with shown(path) as (there, _):
        there.wait_for("192.0.2.9:4002")
        assert termios.tcgetattr(there.theirs) != there.before
        if isinstance(how, str):
            there.press(how)
        else:
            there.process.send_signal(how)
        assert there.end() == code
        assert is_restored(there)
        assert "Traceback" not in there.written


def test_python_does_not_take_itself_apart_while_a_look_waits(path: Path, tmp_path: Path) -> None:
    # A thread that wakes meanwhile may crash it.
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'taken apart')\n")
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))}
    with shown(path, env=env) as (there, _):
        there.wait_for("192.0.2.9:4002")
        there.press("q")
        assert there.end() == 0
        assert "taken apart" not in there.written


def test_it_ends_when_its_terminal_does(path: Path) -> None:
    with shown(path) as (there, _):
        there.wait_for("192.0.2.9:4002")
        there.hang_up()
        there.process.wait(PATIENCE)


def test_it_follows_the_size_of_the_window(path: Path) -> None:
    with shown(path) as (there, _):
        there.wait_for("192.0.2.9:4002")
        there.resize(5, 20)
        there.wait_for("h: help  q: quit")
        there.resize(1, 1)
        there.see(lambda text: len(text) == 1)
        there.resize(40, 140)
        there.wait_for("192.0.2.9:4002", "k1-2")


def test_it_starts_on_the_smallest_terminal(path: Path) -> None:
    with shown(path, lines=1, columns=1) as (there, server):
        eventually(lambda: len(server.asked) > 4)
        there.see(lambda text: text.strip())
        there.press("q")
        assert there.end() == 0


@pytest.mark.parametrize("env", [{"TERM": "vt100"}, {"NO_COLOR": "1", "LC_ALL": "POSIX"}])
def test_without_colours_and_utf_8_all_is_said(path: Path, env: dict[str, str]) -> None:
    with shown(path, env=env) as (there, server):
        there.wait_for("192.0.2.9:4002")
        server.snapshot = dead()
        there.wait_for("1 trouble", "down 0s", "    No route to host")
        assert not re.search(r"\x1b\[[\d;]*[34]\dm", there.written)
        assert there.written.isascii()


@pytest.mark.parametrize("term", ["none-such", "dumb"])
def test_a_terminal_that_is_not_known_is_told_what_else_there_is(path: Path, term: str) -> None:
    with shown(path, env={"TERM": term}) as (there, _):
        assert there.end() == os.EX_UNAVAILABLE
        assert f"found {term!r}" in there.written
        assert "`rspd status` and `rspd connections` need no terminal" in there.written


def test_without_a_terminal_it_says_what_to_use(path: Path) -> None:
    with answering(path, HEALTHY):
        done = subprocess.run(top(path), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE)
    assert done.returncode == os.EX_UNAVAILABLE
    assert done.stdout == ""
    assert "expected a terminal at stdin and stdout, found none" in done.stderr
    assert "`rspd status`" in done.stderr


def test_without_a_running_rspd_it_says_so_and_draws_nothing(path: Path) -> None:
    with terminal(top(path)) as there:
        assert there.end() == os.EX_UNAVAILABLE
        assert "no such socket" in there.written
        assert "\x1b[" not in there.written


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_a_closed_stdin_or_stdout_is_no_terminal(path: Path, closed: str) -> None:
    command = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *top(path)]
    with answering(path, HEALTHY), terminal(command) as there:
        assert there.end() == os.EX_UNAVAILABLE
        expected = "" if "2>" in closed else "rspd: rspd top: expected a terminal at stdin and stdout, found none"
        assert there.screen.text.partition("\n")[0] == expected


@pytest.mark.parametrize("said", ["0.01", "never", "-1", "99999999h", "86401"])
def test_an_interval_is_a_time(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, complained = run(main, [f"--interval={said}"], capsys)
    assert code == os.EX_USAGE
    assert "--interval" in complained
    assert said in complained


def test_a_program_gets_one_look_without_a_terminal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(path, HEALTHY, CONNECTIONS):
        code, out, _ = run(main, ["--socket", str(path), "--json"], capsys)
    assert (code, out.count("\n")) == (0, 1)
    found = json.loads(out)
    assert read(Snapshot, found.pop("status")) == HEALTHY
    assert read(Connections, found.pop("connections")) == Connections(HEALTHY.process, 3, CONNECTIONS)
    assert found == {}


def test_a_frozen_worker_does_not_keep_others_from_the_screen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as frozen, shown(path) as (there, server):
        frozen.bind(str(path.with_name("worker-1.sock")))
        frozen.listen()
        there.wait_for("1 trouble", "no answer from", "192.0.2.9:4002")
        server.snapshot = dead()
        screen = there.wait_for("2 troubles", "No route to host")
        assert "NO ANSWER" not in screen


def test_the_picture_in_the_documentation_is_that_of_this_version() -> None:
    drawn = picture.svg(picture.lines())
    file = Path(__file__).parents[2] / "docs" / "top.svg"
    assert file.read_text() == drawn, "python -m tests.commands.picture > docs/top.svg"
    assert len(drawn.encode()) < 30_000
