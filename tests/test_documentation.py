"""What README.md and etc/rspd.yaml say is what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import Any, get_args

from rspd.address import Address
from rspd.cause import Cause
from rspd.config import PARSERS, Config, ProxyConfig, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHIPPED = ROOT / "etc" / "rspd.yaml"


def defaults() -> dict[str, Any]:
    return {item.name: item.default for item in (*fields(ProxyConfig), *fields(Config)) if item.name != "proxy"}


def table(heading: str) -> list[list[str]]:
    """The rows of the README's table with that first column."""
    rows = README.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


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
            assert defaults()[key] != inf


def test_the_map_of_the_modules_is_complete_and_imports_point_down_it() -> None:
    package = ROOT / "rspd"
    order = re.findall(r"^(\w+) {2,}", (package / "__init__.py").read_text(), re.MULTILINE)
    assert set(order) == {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    for name in order:
        imported = set(re.findall(r"^from rspd\.(\w+) import", (package / f"{name}.py").read_text(), re.MULTILINE))
        assert imported <= set(order[order.index(name) + 1 :]), f"{name} imports from above it"
