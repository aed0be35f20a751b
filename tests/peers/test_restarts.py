"""bench/restarts.py: that it runs to the end, and that its load notices what a restart does to connections."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import counters, peers, restarts
from bench.__main__ import RESULTS
from bench.ways import ways
from tests.support import PATIENCE, eventually

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


def test_processes_are_found_by_their_session_after_their_parent_has_ended() -> None:
    command = ["sh", "-c", "sleep 60 >&- & echo $!"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as shell:
        assert shell.stdout
        child = int(shell.stdout.read())
    try:
        assert counters.sessions({shell.pid}) == {child: shell.pid}
    finally:
        os.kill(child, signal.SIGKILL)
    eventually(lambda: counters.sessions({shell.pid}) == {}, "what has ended is not found")


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


def test_the_page_has_the_table_that_was_published() -> None:
    raw = json.loads((RESULTS / "restarts.json").read_text())
    assert not raw["about"]["quick"]
    assert f"\n{restarts.text(raw['about'], raw['sizes'], raw['ways'], raw['failed'])}<" in restarts.PAGE.read_text()
