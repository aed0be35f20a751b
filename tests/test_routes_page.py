"""What docs/routes.md shows is valid, and means what stands beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rspd.config.keys import load_config
from rspd.config.routes import MATCH_KEYS
from rspd.engine.cause import Cause
from rspd.explaining.dump import dump
from rspd.explaining.summary import describe
from rspd.protocols import tls
from rspd.routing.answers import answer
from rspd.settings import Config
from tests.test_documentation import ROOT

PAGE = (ROOT / "docs/routes.md").read_text()
FILES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
OURS = re.findall(r"^\| `[^|]*` \| `([^`]*)` \|$", PAGE, re.MULTILINE)
ALERTS = {"decode_error": tls.DECODE_ERROR, "internal_error": tls.INTERNAL_ERROR} | {
    "unrecognized_name": tls.UNRECOGNIZED_NAME
}

# What the table of answers says, by the causes of the ends.
WHY: dict[str, Cause] = {
    "no route for the name": "no-route",
    "the head is not valid": "bad-head",
    "only a part of the head came in time": "first-bytes-timeout",
    "the backend cannot be reached": "backend-refused",
    "all backends are down or full": "backend-down",
    "the backend did not answer in time": "connect-timeout",
}


def config_of(text: str, folder: Path) -> Config:
    file = folder / "rspd.yaml"
    file.write_text(text if "listen" in text else f"{text}\nlisten: 443\n")
    return load_config(str(file), {})


@pytest.mark.parametrize("text", FILES)
def test_each_file_on_the_page_is_valid_and_its_dump_means_the_same(text: str, tmp_path: Path) -> None:
    config = config_of(text, tmp_path)
    assert any(proxy.routes for proxy in config.proxies)
    assert config_of(dump(config), tmp_path) == config


def test_the_first_example_chooses_by_host_and_the_page_shows_what_a_check_says_of_it(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^\$ rspd --check\n/etc/rspd.yaml: valid\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    config = config_of(FILES[0], tmp_path)
    assert all(route.host for route in config.proxies[0].routes)
    assert describe(config) == shown.splitlines()


@pytest.mark.parametrize("text", OURS)
def test_what_stands_beside_the_lines_of_others_is_valid(text: str, tmp_path: Path) -> None:
    if text.startswith(("listen", "first_bytes_timeout")):
        text += "\nroutes: [{backend: 10.0.0.11:443}]\n"
    assert config_of(text, tmp_path).proxies[0].routes


def test_each_program_has_its_lines_and_each_key_of_a_match_is_shown() -> None:
    assert len(OURS) == 18
    assert {key for key in MATCH_KEYS if f"{key}: " in PAGE} == MATCH_KEYS.keys()


@pytest.mark.parametrize("why", WHY)
def test_a_client_without_a_backend_gets_what_the_table_says(why: str) -> None:
    (status, alert) = re.findall(rf"^\| {why} \| (\d+)[^|]* \| `(\w+)` \|$", PAGE, re.MULTILINE)[0]
    assert answer("http", "GET", WHY[why], ()).startswith(f"HTTP/1.1 {status} ".encode())
    assert (b"Retry-After" in answer("http", "GET", WHY[why], ())) == (status == "503")
    assert answer("tls", "", WHY[why], ()) == tls.alert(ALERTS[alert])
