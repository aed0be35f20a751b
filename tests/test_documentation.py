"""What README.md and etc/rspd.yaml say is what the code does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from math import inf
from pathlib import Path
from typing import Any, get_args

import pytest

from rspd.address import Address
from rspd.cause import Cause
from rspd.cli import _parser
from rspd.config import PARSERS, Config, ProxyConfig, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHIPPED = ROOT / "etc" / "rspd.yaml"
MAN_PAGES = [ROOT / "packaging" / "rspd.8", ROOT / "packaging" / "rspd.yaml.5"]
RSPD_8, RSPD_YAML_5 = (path.read_text() for path in MAN_PAGES)


def defaults() -> dict[str, Any]:
    names = (*ProxyConfig._fields, *Config._fields)
    known = {**ProxyConfig._field_defaults, **Config._field_defaults}
    return {name: known.get(name) for name in names if name != "proxy"}


def table(heading: str) -> list[list[str]]:
    """The rows of the README's table with that first column."""
    rows = README.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def section(page: str, heading: str) -> str:
    """A section of a man page."""
    return page.split(f"\n.Sh {heading}\n", 1)[1].split("\n.Sh ", 1)[0]


def options() -> set[str]:
    """All that the command line knows."""
    return {text for action in _parser()._actions for text in action.option_strings}


def exit_codes() -> set[int]:
    """Success, and each that the code names, as the os module does."""
    code = "".join(path.read_text() for path in (ROOT / "rspd").glob("*.py"))
    return {0, *(getattr(os, name) for name in re.findall(r"\bEX_[A-Z]+", code))}


def test_the_readme_lists_each_option() -> None:
    listed = {text for row in table("option") for text in re.findall(r"`(-[\w-]+)", row[0])}
    assert listed == options() - {"-h", "--help", "--version"}


def test_the_readme_lists_each_exit_code() -> None:
    assert {int(row[0]) for row in table("exit code")} == exit_codes()


def test_the_readme_lists_each_cause_of_an_end() -> None:
    assert {row[0].strip("`") for row in table("cause")} == set(get_args(Cause))


def test_the_readme_lists_each_key_with_its_default() -> None:
    listed = {re.findall(r"`(\w+)`", row[0])[-1]: row[1] for row in table("key")}
    assert listed.keys() == PARSERS.keys()
    for key, text in listed.items():
        if text != "required":
            assert PARSERS[key](text) == defaults()[key]


def test_the_shipped_configuration_is_valid_and_listens_on_the_loopback_address_only() -> None:
    config = load_config(str(SHIPPED), {})
    assert config.proxy == ProxyConfig((Address("127.0.0.1", 8080),), (Address("127.0.0.1", 8000),))


def test_the_shipped_configuration_explains_each_key_and_shows_its_default() -> None:
    shown = dict(re.findall(r"^#?(\w+): (.*)$", SHIPPED.read_text(), re.MULTILINE))
    assert {"backends" if key == "backend" else key for key in shown} == PARSERS.keys()
    for key, text in shown.items():
        if key not in ("listen", "backend"):
            assert PARSERS[key](text) == defaults()[key]
            assert text == "off" or defaults()[key] != inf


def test_the_map_of_the_modules_is_complete_and_imports_point_down_it() -> None:
    package = ROOT / "rspd"
    order = re.findall(r"^(\w+) {2,}", (package / "__init__.py").read_text(), re.MULTILINE)
    assert set(order) == {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    for name in order:
        imported = set(re.findall(r"^from rspd\.(\w+) import", (package / f"{name}.py").read_text(), re.MULTILINE))
        assert imported <= set(order[order.index(name) + 1 :]), f"{name} imports from above it"


def test_rspd_8_lists_each_option() -> None:
    items = re.findall(r"^\.It (Fl .*)$", section(RSPD_8, "OPTIONS"), re.MULTILINE)
    assert {f"-{name}" for item in items for name in re.findall(r"Fl (\S+)", item)} == options()


def test_rspd_8_lists_each_exit_code() -> None:
    listed = re.findall(r"^\.It (\d+)$", section(RSPD_8, "EXIT STATUS"), re.MULTILINE)
    assert {int(code) for code in listed} == exit_codes()


def test_rspd_8_lists_each_cause_of_an_end() -> None:
    assert set(re.findall(r"^\.It Cm (\S+)", section(RSPD_8, "LOG"), re.MULTILINE)) == set(get_args(Cause))


def test_rspd_yaml_5_lists_each_key_with_its_default() -> None:
    items = section(RSPD_YAML_5, "KEYS").split("\n.It Cm ")[1:]
    listed = {item.split(" ", 1)[0]: re.findall(r"^Default: (\S+)\.$", item, re.MULTILINE) for item in items}
    assert {"backends" if key == "backend" else key for key in listed} == PARSERS.keys()
    for key, found in listed.items():
        assert [PARSERS[key](text) for text in found] == ([] if key in ("listen", "backend") else [defaults()[key]])


@pytest.mark.parametrize("path", MAN_PAGES, ids=lambda path: path.name)
@pytest.mark.parametrize("command", ["mandoc -T lint -W warning", "man --warnings -E UTF-8 -Tutf8 -l"])
def test_the_man_pages_are_without_mistakes(path: Path, command: str) -> None:
    words = command.split()
    if not shutil.which(words[0]):
        pytest.skip(f"{words[0]} is not installed")
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    end = subprocess.run([*words, path], capture_output=True, text=True, env=environment, check=False)
    assert (end.stderr, end.returncode) == ("", 0), end.stdout
