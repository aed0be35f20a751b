"""What docs/coming-from.md tells users of other programs to write is read by rspd, and means what stands beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import NamedTuple

import pytest

from rspd.cli import _parser
from rspd.config.keys import GENERAL_KEYS, PROXY_KEYS, load_config
from rspd.explaining.dump import dump
from rspd.settings import Config, ProxyConfig
from tests.test_documentation import ROOT

PAGE = (ROOT / "docs/coming-from.md").read_text()
ON_PURPOSE, NGINX, HAPROXY, SOCKET_PROXYD, RINETD, SOCAT, CANNOT = re.findall("^## (.*)$", PAGE, re.MULTILINE)
PROGRAMS = (NGINX, HAPROXY, SOCKET_PROXYD, RINETD, SOCAT)


class Row(NamedTuple):
    """A line of theirs, or several that belong together; ours, empty if the cell has a word; the word, or the note."""

    program: str
    theirs: tuple[str, ...]
    ours: str
    word: str
    note: str

    @property
    def is_yaml(self) -> bool:
        """Whether ours is for the file; otherwise it is for a unit, or a command."""
        return re.match(r"\{|[a-z_]+: ", self.ours) is not None

    @property
    def is_unit(self) -> bool:
        """Whether ours is for a unit of systemd."""
        return re.match(r"[A-Z]\w+=", self.ours) is not None


def cells(section: str) -> list[list[str]]:
    """The cells of the table below a heading, row by row."""
    table = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def rows(program: str) -> list[Row]:
    """What the page says of a program."""
    found = []
    for theirs, ours, note in cells(program):
        texts = re.findall("`([^`]*)`", ours)
        assert [f"`{text}`" for text in texts] == [ours] * len(texts), f"neither one text nor a word: {ours}"
        found.append(Row(program, tuple(re.findall("`([^`]*)`", theirs)), "".join(texts), "" if texts else ours, note))
    return found


ROWS = [row for program in PROGRAMS for row in rows(program)]


def those(condition: Callable[[Row], bool]) -> pytest.MarkDecorator:
    """Run a test with each such row."""
    found = [row for row in ROWS if condition(row)]
    return pytest.mark.parametrize("row", found, ids=[f"{row.program}: {' '.join(row.theirs)}" for row in found])


def completed(text: str) -> str:
    """A file of what a row says, with another backend where there has to be one."""
    if "backup" in text:
        return re.sub("^backend: (.*)$", r"backend: [10.0.0.11:5432, \1]", text)
    return text if "backend" in text or "proxies" in text else f"{text}\nbackend: 10.0.0.11:5432\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_has_ten_lines_or_more_and_an_answer_for_each(program: str) -> None:
    assert len([row for row in rows(program) if row.ours or row.word == "always"]) >= 10
    for row in rows(program):
        assert row.theirs
        assert row.is_yaml + row.is_unit + row.ours.startswith(("rspd ", "systemctl ")) == bool(row.ours)
        assert row.ours or row.word in ("always", "nothing")


@pytest.mark.usefixtures("service_names")
@those(lambda row: row.is_yaml)
def test_what_is_for_the_file_is_valid_and_is_what_is_in_force(row: Row, tmp_path: Path) -> None:
    file = tmp_path / "rspd.yaml"
    file.write_text(completed(row.ours))
    config = load_config(str(file), {}, sockets=None)
    file.write_text(dump(config))
    assert load_config(str(file), {}, sockets=None) == config


@those(lambda row: re.match(r"[a-z_]+: ", row.ours) is not None)
def test_what_is_called_the_default_is_the_default_and_nothing_else_is(row: Row) -> None:
    key, text = row.ours.split(": ", 1)
    if key not in ("listen", "backend", "backends", "health", "proxies", "routes"):
        default = {**ProxyConfig._field_defaults, **Config._field_defaults}[key]
        assert row.note.startswith("the default") == ({**PROXY_KEYS, **GENERAL_KEYS}[key].parse(text) == default)


# Numbers that are not in their lines: a version, the bits of 10.0.0.*, half of 2048, any number for socat, all of IPv4,
# and no other backend.
NUMBERS = {"v1": "1", "/24": "24", ": 1024": "1024", ": 1000": "1000", "0.0.0.0:8080": "0", "retries: 0": "0"}


@those(lambda row: row.is_yaml)
def test_ours_has_their_numbers(row: Row) -> None:
    known = {number for text, number in NUMBERS.items() if row.ours.endswith(text)}
    assert set(re.findall(r"\d+", row.ours)) <= {*re.findall(r"\d+", " ".join(row.theirs)), *known}


@those(lambda row: row.is_unit)
def test_a_setting_of_a_unit_is_the_same_as_theirs(row: Row) -> None:
    assert row.theirs == (row.ours,)


def test_what_the_units_always_set_is_in_them() -> None:
    service = (ROOT / "packaging/rspd.service").read_text().splitlines()
    always = [row.theirs[0] for row in rows(SOCKET_PROXYD) if row.word == "always"]
    assert set(always) == {"PrivateTmp=yes"} <= set(service)
    assert "ListenStream=127.0.0.1:8080" in (ROOT / "packaging/rspd.socket").read_text().splitlines()


@those(lambda row: row.ours.startswith("rspd "))
def test_a_command_has_options_that_there_are(row: Row) -> None:
    assert _parser().parse_args(row.ours.split()[1:])


def test_what_it_says_of_the_defaults_is_so(tmp_path: Path) -> None:
    defaults = ProxyConfig((), ())
    told = {row[0]: row[2] for row in cells(ON_PURPOSE)}
    assert "It serves one client at a time, and the next clients wait." in told
    assert "After 60 seconds of silence it resets a connection." in told
    assert (defaults.max_connections, defaults.idle_timeout, defaults.retries) == (1, 60, inf)
    for text in told.values():
        for ours in re.findall("`(.*)`", text):
            file = tmp_path / "rspd.yaml"
            file.write_text(completed(ours))
            file_default = load_config(
                None, {"backends": load_config(str(file), {}, sockets=None).proxies[0].backends}, sockets=None
            )
            assert load_config(str(file), {}, sockets=None) != file_default
    assert all(re.fullmatch("`.*`|nothing", text) for text in told.values())
