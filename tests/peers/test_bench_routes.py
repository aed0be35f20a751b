"""bench/routes.py: that it runs to the end, and that its requests are what rspd reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import peers, routes
from bench.works import Results
from rspd.protocols import http, tls
from tests.support import PATIENCE


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.routes", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=8 * PATIENCE, cwd=peers.ROOT)


@pytest.mark.skipif(not shutil.which("cc"), reason="cc is not here: apt install gcc libc6-dev")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_a_quick_run_measures_each_contestant_with_routes_and_without(tmp_path: Path) -> None:
    here = [peer for peer in routes.contestants(sys.executable, None) if not peer.missing()]
    end = run("--quick", "--output", str(tmp_path))
    assert end.returncode == 0, end.stderr
    works = [Results(**one) for one in json.loads((tmp_path / "routes.json").read_text())["works"]]
    for results in works:
        assert results.failed == {}
        assert {name: len(rounds) for name, rounds in results.rounds.items()} == {peer.name: 2 for peer in here}
    assert (tmp_path / "routes.md").read_text().endswith(end.stdout)
    assert all(f"| {peer.name} | " in end.stdout for peer in here)
    assert run("--report-only", "--output", str(tmp_path)).stdout == end.stdout


def test_what_is_asked_is_read_as_the_name_that_has_a_route() -> None:
    hello = routes.hello()
    said, asked = tls.read(hello), http.read(routes.request(len(hello)))
    assert said
    assert asked
    assert said.name == asked.name == routes.NAME
    assert len(routes.request(len(hello))) == len(hello)


def test_a_ratio_is_made_for_each_round() -> None:
    cpus = {"rspd": (1, 2, 4), "rspd, SNI route": (1.2, 2.4, 8)}
    results = Results("x", "", {name: [{"cpu": cpu * 1e-6} for cpu in row] for name, row in cpus.items()})
    assert routes.spread(routes.ratios(results, "rspd, SNI route", "rspd")) == "1.20 (1.20 to 2.00)"
    assert routes.targets(results) == ["- SNI route, x: 1.20 of 1.25 times a plain connection, reached"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more, found 0"),
        (["--rspd", "/nowhere"], "--rspd: expected a folder that has rspd/__init__.py, found /nowhere"),
        (["--report-only", "--output", "/nowhere"], "--report-only: expected /nowhere/routes.json, found none"),
    ],
)
def test_a_wrong_option_is_refused(arguments: list[str], words: str) -> None:
    end = run(*arguments)
    assert end.returncode == 2
    assert words in end.stderr
