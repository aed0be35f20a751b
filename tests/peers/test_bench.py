"""bench/: what its counters count, what its load notices, and that it runs to the end."""

from __future__ import annotations

import json
import math
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import ab, counters, report, targets, turns
from bench.peers import (
    DIRECT,
    HAPROXY,
    NGINX,
    RSPD,
    SERIAL,
    SOCKET_PROXYD_NAME,
    AsyncioRelay,
    Nginx,
    PeerError,
    Place,
    Rinetd,
    Rspd,
    Running,
    balancing,
    contestants,
    first_answer,
    running,
)
from bench.works import (
    BESIDE,
    BESIDE_DOWN,
    FOUR_64,
    TURNS,
    WORKS,
    Figures,
    Results,
    check_spread,
    ground,
    read_turns,
    run,
    run_work,
)
from bench.works import QUICK as SIZES
from tests.daemon.test_budget import INSTRUCTIONS
from tests.support import PATIENCE

ROOT = Path(__file__).parent.parent.parent
ANSWER = b"x" * 256

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="cc is not here: apt install gcc libc6-dev")
needs_two_processors = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")

# Uses the processor for a while, a part of that in a thread that has ended then, and says how much it was.
BURN = """
import sys, threading, time
def burn():
    until = time.thread_time() + 0.15
    while time.thread_time() < until: pass
burn()
thread = threading.Thread(target=burn)
thread.start(); thread.join()
print(time.process_time(), flush=True)
"""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The load's program."""
    path = tmp_path_factory.mktemp("load") / "load"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", path, ROOT / "bench" / "load.c"], check=True)
    return path


def bench(
    *arguments: str, environment: dict[str, str] | None = None, tree: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=8 * PATIENCE,
        cwd=tree,
        env=environment,
    )


def copy_tree(to: Path) -> None:
    """What bench needs of the tree, so that it may publish there."""
    for name in ("bench", "docs", "rspd"):
        shutil.copytree(ROOT / name, to / name)


@contextmanager
def server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A backend in the load's place: what it does with its one client. Yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)

        def run() -> None:
            client, _ = listener.accept()
            with client:
                client.settimeout(PATIENCE)
                serve(client)

        thread = threading.Thread(target=run)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(PATIENCE)


@needs_compiler
@needs_two_processors
def test_a_quick_run_has_a_figure_of_each_contestant_for_each_work(tmp_path: Path) -> None:
    end = bench("--quick", "--peers", "rspd,asyncio,no proxy", "--output", str(tmp_path))
    assert end.returncode == 0, end.stderr
    works = json.loads((tmp_path / "results.json").read_text())["works"]
    expected = {"down-1", "down-8", "up-1", "up-8", "new-1", "new-64", "new-1-logs", "new-64-logs"}
    expected |= {"requests-1", "requests-16", "rate", "turns", "idle", "start"}
    expected |= {"processes-new-64", "processes-requests-64"}
    web = {} if ab.missing() else {"ab-1": ["rspd", "no proxy"], "ab-64": ["rspd", "no proxy"]}
    balancing = {"four-1": ["rspd"], "four-64": ["rspd"], "hundred-64": ["rspd", "rspd, 100 backends"]}
    beside = {"beside": ["rspd", "no proxy"], "beside-down": ["rspd", "no proxy"]}
    expected |= balancing.keys() | beside.keys() | web.keys()
    assert works.keys() == expected
    for key, work in works.items():
        second = "rspd, 4 processes" if key.startswith("processes-") else "asyncio"
        if some := {**balancing, **beside, **web, "turns": ["rspd"]}.get(key):
            assert list(work["rounds"]) == some
        else:
            assert {"rspd", second} <= work["rounds"].keys(), key
        assert work["absent"] == (["asyncio"] if key in ("four-1", "four-64") else []), key
        assert work["failed"] == {}, key
        for figures in work["rounds"]["rspd"]:
            assert figures.get("cpu", 1) > 0, key
            assert figures.get("count", 40) == (100 if key == "idle" else 40), key
    for key in ("processes-new-64", "processes-requests-64"):
        for count in (2, 4):
            for figures in works[key]["rounds"][f"rspd, {count} processes"]:
                assert 0 <= figures["least"] <= 1 / count <= figures["most"] <= 1
    text = (tmp_path / "results.md").read_text()
    for work in works.values():
        table = text.split(f"\n## {work['title']}\n")[1].split("\n## ")[0]
        assert [row for row in table.splitlines() if row.startswith("| **rspd** | ")], work["title"]
    assert text.count("| asyncio | takes no part: one backend only |") == 2
    picture = ElementTree.fromstring((tmp_path / "results.svg").read_text())
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}rect")) > 16


@needs_compiler
@needs_two_processors
@pytest.mark.skipif(
    any(peer.missing() for peer in contestants(sys.executable, None) if peer.balances),
    reason="nginx or haproxy is not here: apt install nginx libnginx-mod-stream haproxy",
)
def test_each_target_for_several_backends_is_judged_by_a_run_beside_the_peers_that_balance(tmp_path: Path) -> None:
    end = bench("--quick", "--only", "balancing", "--output", str(tmp_path), "--peers", "nginx,haproxy,no proxy")
    assert end.returncode == 0, end.stderr
    _, run = report.load(tmp_path)
    assert [work.failed for work in run.values()] == [{}, {}, {}]
    judged = [target.text for target in targets.TARGETS if target.measured(run) is not None]
    assert judged == [target.text for target in targets.TARGETS if "backends" in target.text]
    assert len(judged) == 5


def test_bench_refuses_to_run_on_one_processor() -> None:
    one = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", one, sys.executable, "-m", "bench", "--quick"]
    end = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert (end.returncode, end.stdout) == (1, "")
    assert end.stderr.startswith("bench: two processors are needed")


@needs_two_processors
@needs_compiler
def test_bench_refuses_before_it_measures_what_it_cannot_finish(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    end = bench("--quick", "--peers", "rspd", "--output", str(tmp_path / "file" / "results"))
    assert end.returncode == 1
    assert end.stderr.startswith("bench: expected a folder for the results that can be written, found ")
    command = ["sh", "-c", 'ulimit -n 9000; exec "$@"', "sh", sys.executable, "-m", "bench", "--peers", "rspd"]
    end = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert end.returncode == 1
    assert "expected a hard limit of 12,025 descriptors or more, found 9,000 (ulimit -Hn)" in end.stderr
    assert "LimitNOFILE=12025" in end.stderr


@needs_two_processors
@needs_compiler
def test_ctrl_c_ends_bench_with_nothing_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--peers", "rspd", "--only", "start", "--output", str(tmp_path)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # What a shell runs in the background ignores Ctrl-C, and so would bench.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr
        while line := process.stderr.readline():
            if line == "start\n":
                process.send_signal(signal.SIGINT)
                break
        assert process.stderr.read().endswith("bench: ended by Ctrl-C; nothing written\n")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@needs_two_processors
def test_bench_says_how_to_get_the_compiler_that_is_missing(tmp_path: Path) -> None:
    end = bench("--quick", environment={**os.environ, "PATH": str(tmp_path)})
    assert end.returncode == 1
    assert end.stderr == "bench: the load is a C program, and there is no compiler: apt install gcc libc6-dev\n"


@needs_compiler
@needs_two_processors
@pytest.mark.parametrize("known", [True, False])
def test_a_work_that_is_measured_by_itself_takes_its_old_place_in_what_is_published_or_the_last(
    tmp_path: Path, known: bool
) -> None:
    copy_tree(tmp_path)
    results = tmp_path / "bench" / "results" / "results.json"
    before = json.loads(results.read_text())
    if not known:
        del before["works"]["start"]
        results.write_text(json.dumps(before))
    end = bench("--publish", "--only", "start", "--rounds", "1", tree=tmp_path)
    assert end.returncode == 0, end.stderr
    after = json.loads(results.read_text())
    assert after["about"] == before["about"]
    assert [key for key in after["works"] if after["works"][key] != before["works"].get(key)] == ["start"]
    assert list(after["works"]) == list(before["works"]) + ["start"] * (not known)
    measured = "Measured again, in a run of its own" if known else "Measured in a run of its own"
    (note,) = after["works"]["start"]["notes"]
    assert note.startswith(f"{measured}: ")
    assert note.endswith(f", 1 round, rspd {Rspd(RSPD, tree=tmp_path).version()}.")
    date = note.removeprefix(f"{measured}: ")[:10]
    assert f"*Start* ({date})" in (tmp_path / "docs" / "speed.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--peers", "rspd,ngnix"], "--peers: expected some of rspd, nginx, "),
        (["--only", "bulky"], "--only: expected some of bulk, connections, "),
        (["--rounds", "0"], "--rounds: expected 1 or more, found 0"),
        (["--publish", "--quick"], "--publish: expected a whole run, found --quick; use --output"),
        (["--publish", "--output", "x"], "not allowed with argument --publish"),
        (["--rspd", "/nowhere"], "--rspd: expected a folder that has rspd/__init__.py, found /nowhere"),
        (["--report-only", "--output", "/nowhere"], "--report-only: expected /nowhere/results.json, found none"),
    ],
)
def test_wrong_options_of_bench_are_explained(arguments: list[str], complaint: str) -> None:
    end = bench(*arguments)
    assert end.returncode == 2
    assert complaint in end.stderr


def test_a_living_process_is_counted_with_its_ended_threads() -> None:
    program = BURN + "sys.stdin.read()\n"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        own = float(process.stdout.readline())
        counted = counters.settled(lambda: counters.cpu_seconds([process.pid]))
    assert own > 0.3
    assert own <= counted < own + 0.1


def test_children_are_counted_while_they_live_and_after_they_were_reaped() -> None:
    # The shell waits for the first child, then starts the second and waits for that.
    script = '"$1" -c "$2" </dev/null; "$1" -c "$2"; :'
    command = ["sh", "-c", script, "sh", sys.executable, BURN + "sys.stdin.read()\n"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdout
        own = float(shell.stdout.readline()) + float(shell.stdout.readline())
        assert len(counters.tree(shell.pid)) == 2
        counted = counters.settled(lambda: counters.cpu_seconds([shell.pid]))
    assert own > 0.6
    assert own - 2 * counters.TICK <= counted < own + 0.2


def test_memory_counts_the_children_too() -> None:
    program = "import sys; held = b'x' * 50_000_000; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        ["sh", "-c", '"$1" -c "$2"; :', "sh", sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as shell:
        assert shell.stdout
        shell.stdout.readline()
        used = counters.memory([shell.pid])
    assert 50_000_000 < used < 100_000_000


@needs_compiler
def test_a_stall_is_in_the_latency_of_each_request_that_was_due_meanwhile(load: Path) -> None:
    def serve(client: socket.socket) -> None:
        for number in range(101):
            client.recv(64, socket.MSG_WAITALL)
            if number == 50:
                time.sleep(0.3)
            client.sendall(ANSWER)
        client.recv(1)

    # 100 requests in a second; some 30 are due during the stall. Counted from when it was sent, one would be slow.
    with server(serve) as port:
        run = subprocess.run(
            [load, "rate", str(port), "100", "1", "100"], capture_output=True, text=True, timeout=PATIENCE, check=True
        )
    found = json.loads(run.stdout)
    assert found["p50"] < found["p99"] <= found["max"]
    assert found["p99"] > 0.2
    assert found["max"] >= 0.3


@needs_compiler
def test_new_connections_come_all_at_once_and_are_timed_beside_the_busy_ones(load: Path) -> None:
    busy, new, delay = 3, 5, 0.2
    all_here = threading.Barrier(new)

    def serve(client: socket.socket, number: int) -> None:
        with client:
            while len(client.recv(64, socket.MSG_WAITALL)) == 64:
                if number >= busy:
                    all_here.wait(PATIENCE)
                    time.sleep(delay)
                client.sendall(ANSWER)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(busy + new) as pool:
        words = ["beside", listener.getsockname()[1], new, busy]
        with subprocess.Popen([load, *map(str, words)], stdout=subprocess.PIPE, text=True) as process:
            for number in range(busy + new):
                pool.submit(serve, listener.accept()[0], number)
            output, _ = process.communicate(timeout=PATIENCE)
    found = json.loads(output)
    assert delay <= found["p50"] <= found["p99"] <= found["max"] <= found["seconds"]
    assert (found["answered"], found["again"]) == (new, 0)
    assert found["others"] >= 70 * busy
    assert 0 < found["meanwhile"] <= found["others"] / found["seconds"]


@needs_compiler
def test_a_download_without_an_end_may_not_end(load: Path) -> None:
    def serve(client: socket.socket) -> None:
        client.recv(64, socket.MSG_WAITALL)
        client.sendall(ANSWER)
        client.recv(64, socket.MSG_WAITALL)
        client.sendall(b"x" * 10)

    with server(serve) as port:
        words = ["beside-down", str(port), "1", "1"]
        run = subprocess.run([load, *words], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "load: a stream without an end ended after 10 bytes\n"


@needs_compiler
@pytest.mark.parametrize(
    ("words", "sent", "complaint"),
    [
        (["down", "1000", "1"], b"x" * 999, "expected 1000 bytes, got 999"),
        (["connections", "1", "1"], b"x" * 255, "expected an answer of 256 bytes, got 255"),
        (["up", "1000", "1"], b"", "expected an answer of 4 bytes, got 0"),
    ],
)
def test_the_load_does_not_accept_less_than_it_asked_for(
    load: Path, words: list[str], sent: bytes, complaint: str
) -> None:
    def serve(client: socket.socket) -> None:
        client.recv(64 + (1000 if words[0] == "up" else 0), socket.MSG_WAITALL)
        client.sendall(sent)

    with server(serve) as port:
        run = subprocess.run([load, words[0], str(port), *words[1:]], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", f"load: {complaint}\n")


@needs_compiler
def test_a_contestant_that_does_not_start_is_reported_with_its_last_words(load: Path, tmp_path: Path) -> None:
    class Broken(Rinetd):
        def command(self, place: object) -> list[str]:
            return ["sh", "-c", "echo no such luck >&2; exit 3"]

    cpus = os.sched_getaffinity(0)
    with ground(load, tmp_path, cpus, cpus, SIZES) as place:
        with running(Broken("broken"), place.new_folder(), place.ports[:1], False, cpus) as one:
            one.processes[0].wait(PATIENCE)
            with pytest.raises(PeerError, match="ended with 3: no such luck"):
                first_answer(one, time.monotonic())


@needs_compiler
def test_a_contestant_that_fails_at_work_is_reported_with_its_last_line(load: Path, tmp_path: Path) -> None:
    class Wordy(AsyncioRelay):
        def command(self, place: Place) -> list[str]:
            return ["sh", "-c", 'echo no such luck >&2; exec "$@"', "sh", *super().command(place)]

    def fail(one: Running, share: float) -> Figures:
        raise PeerError("expected 1, got 0")

    cpus = os.sched_getaffinity(0)
    with ground(load, tmp_path, cpus, cpus, SIZES) as place:
        results = run(Results("new"), [Wordy("wordy")], place, False, fail, 1)
    assert results.failed == {"wordy": "expected 1, got 0; its last line: no such luck"}


@needs_compiler
def test_the_backend_counts_the_connections_that_it_has_accepted_on_each_port(load: Path, tmp_path: Path) -> None:
    cpus = os.sched_getaffinity(0)
    with ground(load, tmp_path, cpus, cpus, SIZES) as place:
        ports = [place.ports[-1], place.ports[0], place.ports[7]]
        assert place.accepted(ports) == [0, 0, 0]
        place.load("connections", place.ports[0], 5, 1)
        place.load("connections", place.ports[-1], 3, 2)
        assert place.accepted(ports) == [3, 5, 0]
        assert sum(place.accepted(place.ports)) == 8


@needs_compiler
def test_a_contestant_that_does_not_give_each_backend_its_part_has_failed(load: Path, tmp_path: Path) -> None:
    class Partial(Rspd):
        def command(self, place: Place) -> list[str]:
            return super().command(replace(place, backends=place.backends[:3]))

    work = next(work for work in WORKS if work.key == FOUR_64)
    fair = Rspd(RSPD, balances=True)
    cpus = os.sched_getaffinity(0)
    with ground(load, tmp_path, cpus, cpus, SIZES) as place:
        results = run_work(work, balancing([Partial("partial", balances=True), fair], 4), place)
    assert results.rounds.keys() == {RSPD}
    # Warming up is 64 connections, over three backends in turn.
    assert results.failed["partial"] == "expected 16 connections to each of 4 backends, got from 0 to 22, 64 in all"


@pytest.mark.parametrize(
    ("amount", "found", "even"),
    [
        (6, [3, 3], True),
        (7, [4, 3], True),
        (6, [4, 2], False),
        (6, [4, 3], False),
        (6, [3, 2], False),
        (3, [1, 0], False),
    ],
)
def test_parts_are_even_to_the_connection(amount: int, found: list[int], even: bool) -> None:
    with nullcontext() if even else pytest.raises(PeerError, match="connections to each of 2 backends"):
        check_spread(amount, found)


@pytest.mark.parametrize(("built", "missing"), [("--with-stream --x", False), ("--with-stream=dynamic", True)])
def test_nginx_counts_as_missing_without_its_stream_module(tmp_path: Path, built: str, missing: bool) -> None:
    class Bare(Nginx):
        MODULE = tmp_path / "module.so"

    program = tmp_path / "nginx"
    program.write_text(f"#!/bin/sh\necho 'configure arguments: {built}' >&2\n")
    program.chmod(0o755)
    advice = "nginx has no stream module: apt install libnginx-mod-stream"
    assert Bare(NGINX, str(program)).missing() == (advice if missing else None)


ABOUT = {
    "date": "2026-01-01",
    "cpu": "a | b <c>",
    "cpus": 2,
    "virtual": True,
    "kernel": "6",
    "system": "x",
    "python": "3",
    "rounds": 3,
    "minutes": 1,
    "busy_before": 0.5,
    "quick": False,
    "versions": {RSPD: "1", NGINX: "2"},
}


def figures(**values: float) -> list[Figures]:
    return [dict(values) for _ in range(3)]


def test_the_report_shows_who_failed_and_which_targets_are_missed() -> None:
    fast, slow = figures(cpu=1e-4, rate=1, busy=1, load=1), figures(cpu=2e-4, rate=1, busy=1, load=1)
    rounds = {RSPD: slow, NGINX: fast, DIRECT: figures(rate=9, load=1)}
    results = Results("new", "connection", rounds, {"socat": "died"})
    about = ABOUT
    run = {"new-64": results}
    text = report.markdown(about, run, "x.svg")
    assert "| CPU per new connection, 64 at a time: rspd ÷ nginx | 1.3 | 2.00 (2.00 to 2.00) | **no** |" in text
    assert "| CPU per new connection, 64 at a time: rspd ÷ socat | 0.2 | not measured | - |" in text
    assert "| nginx | 100.0 | 100.0 to 100.0 | 2.00 (2.00 to 2.00) |" in text
    assert "| socat | failed: died |" in text
    assert "| no proxy | - | - | - | 9 |" in text
    assert "not quiet: 0.50 CPUs" in text
    assert "`bench/results/results.md`" in report.summary(about, run)
    assert "not quiet" in report.summary(about, run)
    assert "not quiet: 0.50 CPUs" in report.picture(about, run)
    assert ">failed<" in report.picture(about, run)
    ElementTree.fromstring(report.picture(about, run))


def test_a_target_that_is_missed_by_little_shows_so_much_of_the_figure_that_it_is_seen() -> None:
    run = {"new-64": Results("new", "connection", {RSPD: figures(cpu=1.3004), NGINX: figures(cpu=1)})}
    assert "rspd ÷ nginx | 1.3 | 1.3004 (1.3004 to 1.3004) | **no** |" in "\n".join(report.targets_table(run))


def test_an_aim_is_reached_or_not_but_never_missed() -> None:
    for cpu, verdict in ((0.5, "aim reached"), (2, "aim not reached")):
        run = {"new-1": Results("new", "connection", {RSPD: figures(cpu=cpu), HAPROXY: figures(cpu=1)})}
        row = f"1 at a time: rspd ÷ HAProxy | 1 (aim) | {cpu:.2f} ({cpu:.2f} to {cpu:.2f}) | {verdict} |"
        assert row in "\n".join(report.targets_table(run))


@pytest.mark.parametrize(
    ("floor", "verdict"),
    [(0.0025, " | yes"), (0.003, ", says nothing | not measurable: without a proxy it is 3.00 ms")],
)
def test_latency_is_not_judged_where_it_is_there_without_a_proxy(floor: float, verdict: str) -> None:
    rounds = {RSPD: figures(p99=0.005), NGINX: figures(p99=0.005), DIRECT: figures(p99=floor)}
    text = "\n".join(report.targets_table({"rate": Results("rate", "request", rounds)}))
    assert f"top rate: rspd ÷ nginx | 1.5 | 1.00 (1.00 to 1.00){verdict} |" in text


REPORT = """\
Server Port:            8080
Document Length:        256 bytes
Time taken for tests:   0.132 seconds
Complete requests:      1000
Failed requests:        0
"""


@pytest.mark.parametrize(
    ("report", "complaint"),
    [
        (REPORT, ""),
        (REPORT.replace("1000", "999"), "ab: complete requests: expected 1000, got 999"),
        (REPORT.replace("        0\n", "        3\n"), "ab: failed requests: expected 0, got 3"),
        (REPORT + "Non-2xx responses:      1000\n", "ab: non-2xx responses: expected 0, got 1000"),
    ],
)
def test_ab_has_failed_if_a_single_request_has(report: str, complaint: str) -> None:
    with pytest.raises(PeerError, match=complaint) if complaint else nullcontext():
        assert ab.read_report(report, 1000) == 0.132


@needs_compiler
def test_without_ab_its_works_are_left_out_with_a_word(
    load: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpus = os.sched_getaffinity(0)
    monkeypatch.setattr(ab, "SEARCH", str(tmp_path))
    with ground(load, tmp_path, cpus, cpus, SIZES) as place:
        assert ab.run_ab([], place) == {}
    advice = "ab is not here: apt install apache2-utils; going on without the works of ab"
    assert capsys.readouterr().err == f"bench: {advice}\n"


def test_a_turn_of_the_loop_is_timed_from_one_poll_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = turns.Turns()
    monkeypatch.setattr(turns, "TURNS", noted)
    epoll = turns.TimedEpoll()
    mine, other = socket.socketpair()
    with mine, other:
        epoll.register(mine.fileno(), select.EPOLLIN)
        assert epoll.poll(0.02, 1) == []
        until = time.thread_time() + 0.003
        while time.thread_time() < until:
            pass
        other.send(b"x")
        assert epoll.poll(0.0, 1) == [(mine.fileno(), select.EPOLLIN)]
        time.sleep(0.02)
        epoll.poll(0.0, 1)
    epoll.close()
    found = noted.figures()
    assert (found["turns"], found["wall_over"]) == (2, 2)
    assert found["cpu_over"] >= 1
    assert found["cpu_longest"] >= 0.003
    assert found["wall_longest"] >= 0.02


def test_no_turns_are_no_figures(tmp_path: Path) -> None:
    path = tmp_path / "turns.json"
    with pytest.raises(PeerError, match="expected the times of its turns, found none"):
        read_turns(path)
    path.write_text(json.dumps(turns.Turns().figures()))
    with pytest.raises(PeerError, match="expected turns of its loop, found none"):
        read_turns(path)


def test_the_longest_turn_is_judged_by_its_cpu_time_and_stands_under_the_short_table() -> None:
    found = {"turns": 324_339.0, "cpu_longest": 0.0009, "wall_longest": 0.012, "cpu_over": 0.0, "wall_over": 29.0}
    run = {TURNS: Results("turns", "", {RSPD: [found]})}
    assert ratios_of(run) == {"longest turn of rspd's loop at that rate, CPU time": [pytest.approx(0.9)]}
    assert "| **rspd** | 0.90 | 0.90 to 0.90 | 12.00 | 12.00 to 12.00 | 324,339 | 0 | 29 |" in report.markdown(
        ABOUT, run, "x.svg"
    )
    made = report.summary(ABOUT, run)
    assert "rspd's loop made 324,339 turns in a round.\nThe longest took 0.90 ms of CPU time.\n" in made
    assert "\nTurns of over a millisecond of wall time: 29; the longest took 12.00 ms.\n" in made
    assert "These are medians of 1 round.\n" in made


def ratios_of(run: targets.Run) -> dict[str, list[float]]:
    """What the rounds say of each target of which there are figures."""
    return {target.text: found for target in targets.TARGETS if (found := target.found(run))}


def test_a_ratio_is_that_of_the_rounds_in_which_both_took_part() -> None:
    ours, its = ([{"cpu": cpu} for cpu in cpus] for cpus in ((1.0, 8.0, 3.0), (2.0, 4.0, 2.0)))
    run = {"new-64": Results("new", "connection", {RSPD: ours, NGINX: its})}
    text = "CPU per new connection, 64 at a time: rspd ÷ nginx"
    assert ratios_of(run) == {text: [0.5, 2, 1.5]}
    assert f"| {text} | 1.3 | 1.50 (0.50 to 2.00) | **no** |" in report.targets_table(run)
    wanted = [report.Column("cpu", "CPU", compared=True)]
    assert report.table(wanted, run["new-64"])[-1] == "| nginx | 2.0 | 1.50 (0.50 to 2.00) |"
    # Without a pair for each round, it is that of the medians.
    its.pop()
    assert ratios_of(run) == {text: [1]}
    assert f"| {text} | 1.3 | 1.00 | yes |" in report.targets_table(run)
    assert report.table(wanted, run["new-64"])[-1] == "| nginx | 3.0 | 1.00 |"


def test_serial_mode_is_judged_beside_rspd_with_room_for_many() -> None:
    rounds = {RSPD: figures(cpu=1), "rspd, serial": figures(cpu=1.1)}
    text = "CPU per new connection, 1 at a time: rspd, serial ÷ rspd"
    assert ratios_of({"new-1": Results("new", "connection", rounds)}) == {text: pytest.approx([1.1] * 3)}


def test_the_start_is_judged_over_bare_python_in_the_same_round() -> None:
    def starts(*seconds: float) -> list[Figures]:
        return [{"seconds": one, "resident": 13e6} for one in seconds]

    rounds = {RSPD: starts(0.05, 0.09, 0.06), "python3 -c pass": starts(0.02, 0.05, 0.04)}
    over, resident = ratios_of({"start": Results("start", "", rounds)}).values()
    assert over == pytest.approx([30, 40, 20])
    assert resident == [13] * 3


def test_idle_connections_are_judged_if_there_are_5000() -> None:
    for count, judged in ((4999, 0), (5000, 2)):
        rounds = {RSPD: figures(memory=1, growth=1, count=count)}
        assert len(ratios_of({"idle": Results("idle", "connection", rounds)})) == judged


@pytest.mark.parametrize(("key", "busy"), [(BESIDE, "1,000 busy ones"), (BESIDE_DOWN, "300 downloads")])
def test_new_connections_beside_busy_ones_are_judged_by_the_better_of_nginx_and_haproxy(key: str, busy: str) -> None:
    rest = {"answered": 400.0, "again": 7.0, "meanwhile": 1.0, "cpu": 1.0, "count": 400.0}
    rounds = {
        RSPD: figures(p50=0.002, p99=0.030, all=0.04, **rest),
        NGINX: figures(p50=0.001, p99=0.060, all=0.08, **rest),
        DIRECT: figures(p50=0.001, p99=0.001, all=0.001, **rest),
    }
    run = {key: Results("beside", "answer", rounds)}
    assert not any(target.measured(run) for target in targets.TARGETS)
    rounds[HAPROXY] = figures(p50=0.004, p99=0.020, all=0.05, **rest)
    judged = [target for target in targets.TARGETS if target.measured(run) is not None]
    text = f"new connections beside {busy}, {{}}: rspd ÷ better of nginx and HAProxy"
    assert [target.text for target in judged] == [
        text.format(what) for what in ("p50", "p99", "until all have an answer")
    ]
    assert [target.measured(run) for target in judged] == pytest.approx([2, 1.5, 0.8])
    half, twice = "0.50 (0.50 to 0.50)", "2.00 (2.00 to 2.00)"
    row = f"| nginx | 60.0 | 60.0 to 60.0 | {half} | 1.0 | {twice} | 80.0 | {half} | 400 | 7 |"
    assert row in report.markdown(ABOUT, run, "x.svg")
    assert "ms, p99 of 400 | **30** | 60 (0.50) |" in report.summary(ABOUT, run)


@pytest.mark.parametrize("count", [400, 399])
def test_fewer_new_connections_beside_busy_ones_are_not_shown_under_the_names_of_400(count: int) -> None:
    rounds = {
        name: figures(p50=0.1, p99=0.1, all=0.1, meanwhile=1, cpu=1, count=count) for name in (RSPD, NGINX, HAPROXY)
    }
    run = {key: Results("beside", "answer", rounds) for key in (BESIDE, BESIDE_DOWN)}
    full = count == 400
    assert sum(target.measured(run) is not None for target in targets.TARGETS) == 6 * full
    assert report.summary(ABOUT, run).count("beside") == 5 * full
    assert report.picture(ABOUT, run).count("beside") == 2 * full


def test_what_the_busy_ones_pay_for_quick_answers_to_new_connections_stands_under_the_table() -> None:
    run = {BESIDE: Results("beside", "answer", {RSPD: figures(p99=0.01, meanwhile=30_000, cpu=1.3e-5, count=400)})}
    assert "busy ones waited" not in report.summary(ABOUT, run)
    run[BESIDE].rounds[HAPROXY] = figures(p99=0.02, meanwhile=60_000, cpu=1e-5)
    made = report.summary(ABOUT, run)
    assert "rspd gave the busy ones 0.50 times as many answers a second as HAProxy;" in made
    assert "rspd's CPU time for each answer was 1.30 times HAProxy's." in made


def test_who_has_no_answer_when_measuring_stops_has_no_figure_but_a_bound() -> None:
    rest = {"answered": 75.0, "again": 0.0, "meanwhile": 1.0, "cpu": 1.0, "count": 400.0}
    rounds = {
        RSPD: figures(p50=0.002, p99=0.030, all=0.04, **rest),
        NGINX: [{"p50": value, "p99": 10.0, "all": 10.00001, **rest} for value in (9.0, 10.0, 10.0)],
    }
    run = {BESIDE_DOWN: Results("beside", "GB", rounds)}
    row = "| nginx | over 10,000.0 | - | - | over 10,000.0 | - | over 10,000.0 | - | 75 |"
    assert row in report.markdown(ABOUT, run, "x.svg")
    about = {**ABOUT, "versions": {RSPD: "1", NGINX: "2", "socat": "3"}}
    assert "ms, p99 of 400 | **30** | over 10,000 | not measured |" in report.summary(about, run)
    assert ">over 10,000<" in report.picture(about, run)


def test_each_target_is_judged_by_figures_that_a_run_makes() -> None:
    _, run = report.load(ROOT / "bench" / "results")
    missing = [target.text for target in targets.TARGETS if target.measured(run) is None]
    # Some works may not have been published yet. Those with several backends: a run of them is judged further up.
    later = ["backends"] * (FOUR_64 not in run) + ["beside"] * (BESIDE not in run) + ["turn"] * (TURNS not in run)
    later += ["of ab"] * (ab.AB_64 not in run) + ["processes"] * ("processes-new-64" not in run)
    assert [text for text in missing if not any(word in text for word in later)] == []


def test_who_has_one_backend_only_takes_no_part_where_there_are_four() -> None:
    rounds = {RSPD: figures(cpu=1e-4, rate=1, busy=1, load=1), NGINX: figures(cpu=5e-5, rate=1, busy=1, load=1)}
    results = Results("four", "connection", rounds, absent=["socat"])
    about = {**ABOUT, "versions": {RSPD: "1", NGINX: "2", "socat": "3"}}
    run = {FOUR_64: results}
    text = report.markdown(about, run, "x.svg")
    target = "CPU per new connection, four backends, 64 at a time: rspd ÷ nginx"
    assert f"| {target} | 1.35 | 2.00 (2.00 to 2.00) | **no** |" in text
    assert "| socat | takes no part: one backend only |" in text
    row = "| New connection, four backends, CPU µs, 64 at a time | 100 | **50** (2.00) | one backend only |"
    assert row in report.summary(about, run)
    assert "four backends" not in report.picture(about, run)


def short_table(text: str) -> dict[str, dict[str, str]]:
    """The table of the page: the cells of each row by contestant."""
    head, _, *rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    return {title: dict(zip(head, cells, strict=True)) for title, *cells in rows}


def shown_figure(cell: str) -> float:
    """What is shown in a cell; infinite if it is no figure, or that it is more than one."""
    found = re.match(r"\**([\d,.]+)", cell)
    return float(found[1].replace(",", "")) if found else math.inf


def winners(cells: dict[str, str]) -> list[str]:
    """Who has the best of what is shown in a row: of the ratios, or of the figures if there are none."""
    if shown_figure(cells[RSPD]) < math.inf:
        times = {name: float(found[1]) for name, cell in cells.items() if (found := re.search(r"\(([\d.]+)\)", cell))}
        times[RSPD] = 1.0
        return [name for name in cells if times.get(name, 0) * 1.03 >= max(times.values())]
    best = min(map(shown_figure, cells.values()))
    return [name for name, cell in cells.items() if shown_figure(cell) == best < math.inf]


def bold(cells: dict[str, str]) -> list[str]:
    return [name for name, cell in cells.items() if "**" in cell]


PAGE = ROOT / "docs" / "speed.md"


def test_the_winner_of_each_published_row_is_bold_and_nobody_else() -> None:
    table = short_table(PAGE.read_text())
    assert len(table) > 1
    for title, cells in table.items():
        assert bold(cells) == winners(cells), title


# Some of these are shown alike, and some are too large to be known.
SECONDS = st.sampled_from([0.0301, 0.0304, 0.031, 9.9994, 9.9999, 10.0, 10.1])


@given(st.tuples(SECONDS, SECONDS, SECONDS))
def test_the_winners_of_a_row_are_bold_even_if_several_are_shown_alike_or_none_is_known(p99: tuple[float, ...]) -> None:
    names = (RSPD, NGINX, HAPROXY)
    rounds = {name: figures(p99=value, count=400) for name, value in zip(names, p99, strict=True)}
    made = report.summary({**ABOUT, "versions": dict.fromkeys(names, "1")}, {BESIDE: Results("b", "answer", rounds)})
    (cells,) = short_table(made).values()
    assert bold(cells) == winners(cells)


def test_who_is_not_in_the_table_wins_no_row_of_it() -> None:
    rounds = {RSPD: figures(seconds=2), NGINX: figures(seconds=3), "python3 -c pass": figures(seconds=1)}
    made = report.summary(ABOUT, {"start": Results("start", "", rounds)})
    assert "| **2,000** | 3,000 (0.67) |" in made
    assert "rspd wins *Start*." in made


def test_what_rspd_wins_and_to_whom_it_loses_is_told_as_the_table_has_it() -> None:
    text = report.summary(*report.load(ROOT / "bench" / "results"))
    won = "".join(re.findall(r"^rspd wins (.*)\.$", text, re.MULTILINE))
    level = "".join(re.findall(r"^rspd is level in (.*)\.$", text, re.MULTILINE))
    told: dict[str, tuple[set[str], dict[str, str]]] = dict.fromkeys(re.findall(r"\*(.*?)\*", won), ({RSPD}, {}))
    lost = re.findall(r"^- (\*.*\)): .+\.$", text, re.MULTILINE)
    for row in "; ".join([*lost, level]).split("; "):
        if found := re.match(r"\*(.*?)\* (to|with) (.*)", row):
            others = dict(re.findall(r"([\w-]+) (\([\d.]+\))", found[3]))
            told[found[1]] = {RSPD} if found[2] == "with" else set(), others
    for title, cells in short_table(text).items():
        work = next(panel.title for panel in report.PANELS if title == f"{panel.title}, {panel.unit}")
        ours, others = told.pop(work, (set(), {}))
        assert ours | others.keys() == set(winners(cells)), title
        assert all(ratio in cells[name] for name, ratio in others.items()), title
    assert told == {}


@pytest.mark.parametrize("panel", report.PANELS, ids=lambda panel: panel.key)
def test_each_row_that_is_lost_says_to_whom_by_how_much_and_why(panel: report.Panel) -> None:
    ours, its = ([{panel.figure: shown / panel.factor, "count": 400.0}] for shown in (3, 2))
    made = report.summary(ABOUT, {panel.key: Results("x", "", {RSPD: ours, NGINX: its})})
    assert f"rspd loses:\n\n- *{panel.title}* to nginx (1.50): {report.WHY[panel.key]}.\n" in made
    won = report.summary(ABOUT, {panel.key: Results("x", "", {RSPD: its, NGINX: ours})})
    assert f"rspd wins *{panel.title}*.\n" in won
    assert report.WHY[panel.key] not in won


def test_who_wins_a_row_is_told_by_the_ratios_of_the_rounds_and_not_by_the_medians() -> None:
    ours, its = ([{"cpu": cpu * 1e-5} for cpu in cpus] for cpus in ((1, 5, 6), (2, 4, 9)))
    made = report.summary(ABOUT, {"new-64": Results("x", "", {RSPD: ours, NGINX: its})})
    assert "| **50** | 40 (0.67) |" in made
    assert "rspd wins *New connection*.\n" in made


@pytest.mark.parametrize(("cpu", "level"), [(1.04, False), (1.03, True), (0.98, True), (0.96, False)])
def test_a_row_is_level_within_3_percent(cpu: float, level: bool) -> None:
    made = report.summary(ABOUT, {"new-64": Results("x", "", {RSPD: figures(cpu=cpu), NGINX: figures(cpu=1)})})
    assert (f"rspd is level in *New connection* with nginx ({cpu:.2f}).\n" in made) is level
    (cells,) = short_table(made).values()
    assert len(bold(cells)) == (2 if level else 1)


def test_a_reason_that_holds_against_socket_proxyd_only_is_told_of_it_only() -> None:
    about = {**ABOUT, "versions": {RSPD: "1", NGINX: "2", SOCKET_PROXYD_NAME: "3"}}
    for name, why in ((NGINX, report.WHY["down-1"]), (SOCKET_PROXYD_NAME, report.PROXYD_WHY["down-1"])):
        made = report.summary(about, {"down-1": Results("x", "", {RSPD: figures(cpu=2), name: figures(cpu=1)})})
        assert f"- *Download, 1 stream* to {name} (2.00): {why}.\n" in made


def test_turns_in_which_a_connection_begins_or_ends_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = turns.Turns()
    monkeypatch.setattr(turns, "TURNS", noted)
    epoll = turns.TimedEpoll()
    mine, other = socket.socketpair()
    with mine, other:
        epoll.poll(0.0, 1)
        epoll.register(mine.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        epoll.poll(0.0, 1)
        assert noted.count == 0
        epoll.poll(0.0, 1)
        assert noted.count == 1
        other.close()
        assert epoll.poll(0.0, 1)
        assert noted.count == 2
        epoll.poll(0.0, 1)
        assert noted.count == 2
    epoll.close()


def test_turns_are_handed_out_of_each_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURNS", turns.Turns())
    for cpu in (3, 2):
        turns.TURNS.note(cpu * 1_000_000, 5_000_000)
        turns.hand_out(tmp_path / "turns.json")
        found = read_turns(tmp_path / "turns.json")
        assert (found["turns"], found["cpu_longest"]) == (1, cpu / 1000)


@pytest.mark.parametrize(("count", "most"), [(2, 0.65), (4, 0.45)])
def test_one_of_several_processes_may_not_take_nearly_all(count: int, most: float) -> None:
    text = f"new connections, 64 at a time, {count} processes: part of the process with the most"
    for part, verdict in ((most, "yes"), (most + 0.01, "**no**")):
        run = {"processes-new-64": Results("x", "", {f"rspd, {count} processes": figures(most=part)})}
        (judged,) = (target for target in targets.TARGETS if target.measured(run) is not None)
        assert (judged.text, judged.verdict(run)) == (text, verdict)


def test_serial_mode_has_its_reason_if_it_is_dearer() -> None:
    for cpu in (0.9, 1.1):
        works = {key: Results(key, "", {RSPD: figures(cpu=1), SERIAL: figures(cpu=cpu)}) for key in ("new-1", "new-64")}
        told = f"that is 1.10 times as much as with room for many: {report.WHY_SERIAL}."
        assert (told in report.summary(ABOUT, works)) is (cpu > 1)


def test_the_reasons_tell_the_instructions_that_the_budget_allows() -> None:
    for key, work in (("new-64", "connection"), ("requests-16", "request")):
        (told,) = re.findall(r"some ([\d,]+) bytecode instructions", report.WHY[key])
        assert int(told.replace(",", "")) == pytest.approx(INSTRUCTIONS[work], rel=0.2)


def test_nothing_is_won_where_nobody_else_is() -> None:
    made = report.summary(ABOUT, {"start": Results("start", "", {RSPD: figures(seconds=2)})})
    assert "| **2,000** | not measured |" in made
    assert "wins" not in made


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page in Markdown lead."""
    return re.findall(r"\]\(([^)]*)\)", page.read_text())


def test_what_is_published_is_made_from_the_results_in_the_repository(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    (tmp_path / "docs" / "speed.svg").unlink()
    assert bench("--publish", "--report-only", tree=tmp_path).returncode == 0
    for name in ("docs/speed.md", "docs/speed.svg", "bench/results/results.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name
    made = report.summary(*report.load(ROOT / "bench" / "results"))
    assert f"{report.BEGIN}\n{made}{report.END}" in PAGE.read_text()


@pytest.mark.parametrize("publish", [True, False])
def test_the_picture_that_the_results_show_is_there(tmp_path: Path, publish: bool) -> None:
    copy_tree(tmp_path)
    (tmp_path / "docs" / "speed.svg").unlink()
    folder = tmp_path / "bench" / "results"
    if not publish:
        folder = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    end = bench("--report-only", *(["--publish"] if publish else ["--output", "elsewhere"]), tree=tmp_path)
    assert end.returncode == 0, end.stderr
    (shown,) = (link for link in links(folder / "results.md") if link.endswith(".svg"))
    assert (folder / shown).is_file()
    assert (tmp_path / "docs" / "speed.svg").exists() == publish


def test_the_page_of_the_table_links_to_what_the_package_installs_beside_it_only() -> None:
    docs = PAGE.parent.resolve()
    leads = [(docs / link).resolve() for link in links(PAGE)]
    assert docs / "speed.svg" in leads
    assert [path for path in leads if not path.is_file()] == []
    assert [path for path in leads if docs not in path.parents and path != docs.parent / "README.md"] == []
