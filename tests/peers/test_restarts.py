"""bench/restarts.py: that it runs to the end, and that its load notices what a restart does to connections."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import peers, restarts
from bench.ways import ways
from tests.support import PATIENCE

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
ALL = ways(sys.executable)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.restarts", *arguments],
        capture_output=True,
        text=True,
        timeout=20 * PATIENCE,
        cwd=ROOT,
    )


@pytest.mark.parametrize("name", [way.name for way in ALL])
def test_a_quick_run_counts_who_is_refused_who_is_cut_and_what_is_left(tmp_path: Path, name: str) -> None:
    way = next(way for way in ALL if way.name == name)
    if missing := way.peer.missing():
        pytest.skip(missing)
    end = bench("--quick", "--only", name, "--output", str(tmp_path))
    assert end.returncode == 0, end.stderr
    written = json.loads((tmp_path / "restarts.json").read_text())
    assert written["failed"] == {}
    found = written["ways"][name]
    sizes = restarts.QUICK
    assert found["long"] == sizes.long + sizes.more * (sizes.restarts - 1)
    assert found["new"] > sizes.rate * sizes.after / 2
    assert f"| {found['long_cut']} of {found['long']} |" in end.stdout
    assert (tmp_path / "restarts.md").read_text().endswith(end.stdout)
    # A second upgrade of nginx is ignored while the master of before has a worker with connections.
    assert found["restarts"] == (1 if name == "nginx, upgrade" else sizes.restarts)
    before, after = found["before"]["processes"], found["after"]["processes"]
    if name == peers.RSPD:
        assert (found["refused"], found["cut"], found["long_cut"], before, after) == (0, 0, 0, 1, 1)
    elif "reload" in name or "upgrade" in name:
        assert (found["long_cut"], before, after) == (0, 2, 4)
    elif name == "socat, kept":
        assert found["long_cut"] == 0
        assert after > before
    else:
        assert found["long_cut"] == found["long"]
        assert found["refused"] + found["cut"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "nginx"], "--only: expected some of rspd; haproxy, reload; "),
        (["--publish", "--quick"], "--publish: expected a whole run, found --quick or --only; use --output"),
        (["--report-only", "--output", "/nowhere"], "--report-only: expected /nowhere/restarts.json, found none"),
    ],
)
def test_wrong_options_are_explained(arguments: list[str], complaint: str) -> None:
    end = bench(*arguments)
    assert end.returncode == 2
    assert complaint in end.stderr
