"""What docs/looking.md and the other documents say of the commands that look at a running rspd is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rspd.commands.connections import _table
from rspd.commands.words import connect_time
from rspd.config.keys import load_config
from rspd.explaining.summary import describe
from rspd.snapshot import (
    CONNECT_BOUNDS,
    Backend,
    Connection,
    Connections,
    Distribution,
    Listener,
    Pool,
    Process,
    Proxy,
    Route,
    read,
)
from tests.test_documentation import COMMANDS, ROOT, RSPD_STATUS_1, section
from tests.test_readme import DOCUMENTS, PAGES, README, blocks

PAGE = PAGES["looking.md"]

# Of a backend to which each connection took less than the first bound.
FAST = Distribution((3, *[0] * len(CONNECT_BOUNDS)))

# A command in running text, in a block, or in the manual.
USE = re.compile(r"(?:`|^\$ |^|sudo |Ql |exec web |web1 )rspd (status|connections|top)\b([^`|\n]*)", re.MULTILINE)


@pytest.mark.parametrize("name", [*DOCUMENTS, "manual"])
def test_the_commands_that_are_shown_have_options_that_there_are(name: str) -> None:
    text = DOCUMENTS.get(name, RSPD_STATUS_1 + (ROOT / "packaging/rspd.8").read_text())
    for command, words in USE.findall(text):
        synopsis = section(RSPD_STATUS_1, "SYNOPSIS").split(f".Cm {command}\n")[1].split(".Nm")[0]
        known = set(re.findall(r"Fl -([\w-]+)", synopsis))
        assert set(re.findall(r"(?<!\S)--([\w-]+)", words.split(";")[0])) <= known, f"rspd {command}{words}"


def test_each_command_is_shown_and_its_picture_is_there() -> None:
    assert {command for command, _ in USE.findall(PAGE)} == set(COMMANDS)
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", PAGE)
    assert (ROOT / "docs" / picture).exists()


def test_what_a_check_says_there_is_what_it_says(tmp_path: Path) -> None:
    (shown,) = (text for text in blocks(PAGE) if text.startswith("$ rspd --check\n"))
    options = "control_group: adm\nmetrics: 127.0.0.1:9114\nmax_connections: 100"
    file = tmp_path / "rspd.yaml"
    file.write_text(f"listen: 80\nbackends: [10.0.0.11:80, 10.0.0.12:80]\n{options}\n")
    assert shown.splitlines()[2:] == describe(load_config(str(file), {}))


def test_the_columns_of_connections_are_those_of_the_code() -> None:
    text = PAGE + RSPD_STATUS_1
    shown = re.findall(r"^ID .*$", text, re.MULTILINE)
    made = [_table([one], None, by_rate=False)[0].split() for one in (Connection(proxy="web"), Connection())]
    # The rate is there where there is room.
    assert [line.split() for line in shown] == [[word for word in line if word != "BYTES/S"] for line in made]


def test_the_json_that_is_shown_has_the_fields_of_the_code() -> None:
    answers = [json.loads(line) for line in re.findall(r"^\{.*\}$", PAGE, re.MULTILINE)]
    assert len(answers) == 2  # of the command, and of curl
    for answer in answers:
        assert answer.keys() == set(Connections._fields)
        assert answer["process"].keys() == set(Process._fields)
        (connection,) = answer["connections"]
        assert connection.keys() == set(Connection._fields)
        assert read(Connection, connection).received > 10**6
        assert read(Connections, answer).matching == 1
        assert f'.near == "{connection["near"]}"' in PAGE


def test_the_fields_that_the_page_explains_are_those_of_the_code() -> None:
    shown = re.findall(
        r"^\| `([a-z_.]+)`(?: of .*?)? \| .* \|$",
        PAGE.split("\n## From a program\n")[1].split("\n## ")[0],
        re.MULTILINE,
    )
    assert shown == ["process.unanswered", "full_in", "route"]
    assert "unanswered" in Process._fields
    assert "full_in" in Proxy._fields
    assert "route" in Pool._fields
    assert "route" in Backend._fields


def test_the_status_that_is_shown_has_the_lines_of_the_code() -> None:
    shown = [text for page in (PAGE, README) for text in blocks(page) if "rspd status\n" in text and "serving" in text]
    whole = [text for text in shown if "\nrspd 0." in text]
    assert len(whole) == 2
    for text in whole:
        assert re.search(r"^rspd .*\nso far: [\d,]+ served, [\d,]+ refused, .* descriptors$", text, re.MULTILINE)
        times = re.findall(r" (\S+ ms) / (\S+ ms)", text)
        assert set(times) == {(connect_time(FAST, 0.5), connect_time(FAST, 0.99))}


LISTS = {"process": Process, "proxies": Proxy, "routes": Route, "pools": Pool, "backends": Backend}


@pytest.mark.parametrize(("name", "kind"), [*LISTS.items(), ("connections", Connection)])
def test_the_manual_names_each_field_of_the_json(name: str, kind: type) -> None:
    text = section(RSPD_STATUS_1, "JSON").split(f"\n.It Cm {name}\n")[1].split("\n.El")[0].split("\n.It ")[0]
    named = [word for line in re.findall(r"^\.Ar (.*?)(?: [.;:])?$", text, re.MULTILINE) for word in line.split(" , ")]
    inner = set(Listener._fields) if kind is Proxy else set()
    assert {word.rstrip(" ,") for word in named} == set(kind._fields) | inner  # type: ignore[attr-defined]


def test_the_manual_names_what_a_distribution_has() -> None:
    (text,) = re.findall(r"^A distribution, such as\n(?:.*\n)*?\.Pp$", section(RSPD_STATUS_1, "JSON"), re.MULTILINE)
    assert set(re.findall(r"^\.Ar (\w+)", text, re.MULTILINE)) == {"connect", *Distribution._fields}


def test_the_exit_codes_that_scripts_get_are_those_of_the_manual() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| .* \|$", PAGE, re.MULTILINE)
    codes = {code for row in rows for code in row.split(", ")}
    assert codes == set(re.findall(r"^\.It (\d+)$", section(RSPD_STATUS_1, "EXIT STATUS"), re.MULTILINE)) - {"70", "73"}
