"""Completion in the shells: a line is typed, a key inserts all that is offered, Enter shows what the command gets."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rspd.cli import _parser
from rspd.log import LEVELS
from rspd.snapshot import Backend, Pool, Proxy, Route, Snapshot
from tests.commands.support import answering
from tests.support import PATIENCE

PACKAGING = Path(__file__).parent.parent / "packaging"

PROMPT = b"type now: "
INSERT_ALL = b"\x1b*"  # Alt-*, what bash calls insert-completions

# In place of rspd, for both shells: what it was called with, into a file.
COMMAND = "rspd() { printf '%s\\0' \"$@\" >answer; exit; }\n"

BASH = f"""
PS1='{PROMPT.decode()}'
source '{PACKAGING}/rspd.bash'
"""

ZSH = f"""
PROMPT='{PROMPT.decode()}'
unsetopt prompt_sp
fpath=('{PACKAGING}' $fpath)
autoload -Uz compinit
compinit -u -D
zle -C all-matches complete-word _generic
bindkey '^[*' all-matches
zstyle ':completion:all-matches::::' completer _all_matches _complete
zstyle ':completion:all-matches:*' insert yes
"""

SHELLS = {
    "bash": (["bash", "--noprofile", "--rcfile", ".bashrc", "-i"], ".bashrc", BASH),
    "zsh": (["zsh", "-d", "-i"], ".zshrc", ZSH),
}

ACTIONS = [action for action in _parser()._actions if action.help != argparse.SUPPRESS]  # the help does not name those
OPTIONS = {text: action for action in ACTIONS for text in action.option_strings}
WITH_VALUE = sorted(text for text, action in OPTIONS.items() if action.nargs != 0)

Type = Callable[[str], list[str]]


def read_until(fd: int, expected: bytes) -> None:
    """Read what the shell writes to its terminal, up to something; b"" for all of it."""
    deadline = time.monotonic() + PATIENCE
    seen = b""
    while not expected or expected not in seen:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"the shell wrote only {seen!r}"
        try:
            data = os.read(fd, 4096)
        except OSError:  # what the terminal of a shell that has ended says
            data = b""
        if not data:
            assert not expected, f"the shell wrote {seen!r} and ended"
            return
        seen += data


@pytest.fixture(params=SHELLS)
def completed(request: pytest.FixtureRequest, tmp_path: Path) -> Type:
    """Types a line, inserts all that is offered at its end, and returns the words after `rspd`."""
    name = str(request.param)
    if not shutil.which(name):
        pytest.skip(f"{name} is not here: apt install {name}")
    command, file, setup = SHELLS[name]
    (tmp_path / file).write_text(setup + COMMAND)

    def completed(line: str) -> list[str]:
        near, far = pty.openpty()
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "dumb"}
        shell = subprocess.Popen(
            command,
            stdin=far,
            stdout=far,
            stderr=far,
            cwd=tmp_path,
            env={**environment, "INPUTRC": os.devnull, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
        os.close(far)
        try:
            read_until(near, PROMPT)
            os.write(near, line.encode() + INSERT_ALL + b"\r")
            read_until(near, b"")
            shell.wait(PATIENCE)
        finally:
            shell.kill()
            shell.wait()
            os.close(near)
        return (tmp_path / "answer").read_text().split("\0")[:-1]

    return completed


def test_every_option_is_offered_and_nothing_else(completed: Type) -> None:
    assert {word.removesuffix("=") for word in completed("rspd -")} == OPTIONS.keys()


def test_a_beginning_is_completed_to_the_options_that_begin_so(completed: Type) -> None:
    expected = {text for text in OPTIONS if text.startswith("--l")}
    assert {word.removesuffix("=") for word in completed("rspd --check --l")[1:]} == expected


@pytest.mark.parametrize("option", WITH_VALUE)
def test_no_option_is_offered_as_the_value_of_another(completed: Type, option: str) -> None:
    assert completed(f"rspd {option} -") == [option, "-"]


@pytest.mark.parametrize("option", [*(text for text in WITH_VALUE if OPTIONS[text].metavar == "FILE"), "-l", "-b"])
def test_files_are_offered_where_a_file_is_expected(completed: Type, tmp_path: Path, option: str) -> None:
    (tmp_path / "one file.yaml").touch()
    (tmp_path / "two.yaml").touch()
    assert completed(f"rspd {option} on") == [option, "one file.yaml"]
    assert completed(f"rspd {option} ./t") == [option, "./two.yaml"]


@pytest.mark.parametrize("option", ["-c", "--config"])
def test_yaml_files_and_folders_are_offered_for_the_configuration_and_no_other_files(
    completed: Type, tmp_path: Path, option: str
) -> None:
    for name in ("web one.yaml", "web.yml", "web.txt", "webyaml", "web.yaml.old"):
        (tmp_path / name).touch()
    for folder in ("web.d", "web two"):
        (tmp_path / folder).mkdir()
    offered = completed(f"rspd {option} web")[1:]
    assert sorted(word.rstrip("/") for word in offered) == ["web one.yaml", "web two", "web.d", "web.yml"]


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("-c some.d/in", "-c|some.d/in side.yml"),
        ("-c some.d/two\\ wo", "-c|some.d/two words.yaml"),
        ("-c ~/some.d/in", "-c|HOME/some.d/in side.yml"),
        ("--config=some.d/in", "--config=some.d/in side.yml"),
    ],
)
def test_a_folder_is_gone_into_for_the_configuration(completed: Type, tmp_path: Path, typed: str, found: str) -> None:
    (tmp_path / "some.d").mkdir()
    for name in ("in side.yml", "in.txt", "two words.yaml", "two wolves"):
        (tmp_path / "some.d" / name).touch()
    assert completed(f"rspd {typed}") == found.replace("HOME", str(tmp_path)).split("|")


def test_all_files_are_offered_for_the_pid_file(completed: Type, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").touch()
    (tmp_path / "one.pid").touch()
    assert sorted(completed("rspd --pid-file on")[1:]) == ["one.pid", "one.yaml"]


def test_a_unix_socket_is_offered_as_an_address_and_as_a_backend(completed: Type, tmp_path: Path) -> None:
    (tmp_path / "one.sock").touch()
    assert completed("rspd ./on") == ["./one.sock"]
    assert completed("rspd 8090 ./on") == ["8090", "./one.sock"]


@pytest.mark.parametrize("text", ["--config=tw", "--pid-file=tw"])
def test_files_are_offered_after_an_equals_sign(completed: Type, tmp_path: Path, text: str) -> None:
    (tmp_path / "two.yaml").touch()
    assert completed(f"rspd {text}") == [f"{text[:-2]}two.yaml"]


def test_the_log_levels_are_offered(completed: Type) -> None:
    assert set(completed("rspd --log-level ")[1:]) == LEVELS.keys()
    assert completed("rspd --log-level=w") == ["--log-level=warning"]


@pytest.mark.parametrize("option", ["--max-connections", "--exit-idle-time"])
def test_nothing_is_offered_for_a_number_or_a_duration(completed: Type, tmp_path: Path, option: str) -> None:
    (tmp_path / "one.yaml").touch()
    assert completed(f"rspd {option} ") == [option]


@pytest.mark.parametrize("name", ["rspd.bash", "_rspd"])
def test_the_options_stand_in_the_order_of_the_help(name: str) -> None:
    text = (PACKAGING / name).read_text()
    assert len(OPTIONS) > 10
    places = [re.search(rf"(?<![\w-]){option}(?![\w-])", text[text.index("-c --config") :]) for option in OPTIONS]
    assert None not in places
    assert [place.start() for place in places if place] == sorted(place.start() for place in places if place)


# The commands that look at a running rspd

COMMANDS = ("status", "connections", "top")

RUNNING = Snapshot(
    proxies=(Proxy("web"), Proxy("web-2", retired=True), Proxy("ssh")),
    routes=(Route("web", "www.example.org/a b"), Route("web", "ssh, silent")),
    pools=(Pool("web"),),
    backends=tuple(Backend(name=name) for name in ("10.0.0.11:80", "10.0.0.12:80", "[2001:db8::1]:80", "/run/a.sock")),
)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[str]:
    """A control socket, and an rspd among the programs that can ask there."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/rspd").write_text(
        f"#!/bin/sh\nPYTHONPATH='{PACKAGING.parent}' exec '{sys.executable}' -m rspd \"$@\""
    )
    (tmp_path / "bin/rspd").chmod(0o755)
    with answering(tmp_path / "c.sock", RUNNING):
        yield "c.sock"


def test_the_commands_are_offered_as_the_first_word_and_as_no_other(completed: Type) -> None:
    assert completed("rspd sta") == ["status"]
    assert completed("rspd up") == ["upgrade"]
    assert completed("rspd 8090 sta") == ["8090", "sta"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_offered_and_nothing_else(completed: Type, command: str) -> None:
    told = subprocess.run([sys.executable, "-m", "rspd", command, "--help"], capture_output=True, text=True, check=True)
    options = set(re.findall(r"^  (?:(-\w), )?(--[\w-]+)", told.stdout, re.MULTILINE))
    assert {word.removesuffix("=") for word in completed(f"rspd {command} -")[1:]} == {
        option for pair in options for option in pair if option
    }


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("--proxy w", ["web", "web-2"]),
        ("--backend ", ["/run/a.sock", "10.0.0.11:80", "10.0.0.12:80", "[2001:db8::1]:80"]),
        ("--backend 10.0.0.12:8", ["10.0.0.12:80"]),
        ("--route w", ["www.example.org/a b"]),
    ],
)
def test_what_a_running_rspd_has_is_offered(completed: Type, running: str, typed: str, names: list[str]) -> None:
    option = typed.split()[0]
    assert completed(f"rspd connections --socket {running} {typed}")[3:] == [option, *names]


def test_what_a_running_rspd_has_is_offered_after_an_equals_sign(completed: Type, running: str) -> None:
    assert completed(f"rspd connections --socket={running} --backend=10.0.0.11:")[2:] == ["--backend=10.0.0.11:80"]
    assert completed(f"rspd connections --socket={running} --proxy=ss")[2:] == ["--proxy=ssh"]


def test_nothing_is_offered_and_nothing_said_if_no_rspd_answers(completed: Type, running: str) -> None:
    words = ["connections", "--socket", "other.sock", "--proxy"]
    assert completed(f"rspd {' '.join(words)} ") == words


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("--sort ", ["age", "bytes", "idle", "rate"]), ("--limit a", ["all"]), ("--idle-for ", [])],
)
def test_the_words_of_an_option_are_offered(completed: Type, typed: str, offered: list[str]) -> None:
    command, option, *words = completed(f"rspd connections {typed}")
    assert (command, option, sorted(words)) == ("connections", typed.split()[0], offered)


def test_files_are_offered_for_the_control_socket(completed: Type, tmp_path: Path) -> None:
    (tmp_path / "one.sock").touch()
    assert completed("rspd status --socket on") == ["status", "--socket", "one.sock"]
