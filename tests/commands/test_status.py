from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import pytest

from rspd.commands import asking
from rspd.commands.status import main, page
from rspd.commands.troubles import troubles
from rspd.snapshot import (
    Backend,
    Checks,
    Distribution,
    Failure,
    Listener,
    Pool,
    Process,
    Proxy,
    Rate,
    Route,
    Snapshot,
    read,
)
from tests.commands.support import (
    BUFFERED,
    FIRST,
    HOLDER,
    LONE,
    PROCESS,
    REFUSED,
    Answering,
    Said,
    answering,
    in_terminal,
    lone,
    process,
    run,
)
from tests.support import PATIENCE

# One client at a time: one has the place, and three wait.
SERIAL = lone(open=1, most=1, full_in=1, listeners=(Listener("80", 3),))

COMMAND = [sys.executable, "-m", "rspd", "status", "--socket"]

Run = Callable[..., Said]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control.sock")


@pytest.fixture
def served(path: str) -> Iterator[Answering]:
    with answering(path, LONE) as server:
        yield server


@pytest.fixture
def status(path: str, served: Answering, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: run(main, ["--socket", path, *words], capsys)


def shown(snapshot: Snapshot, everything: bool = False) -> list[str]:
    return page(snapshot, troubles(snapshot), None, everything)


# What goes on


def test_the_page_says_what_goes_on(status: Run) -> None:
    assert status() == (
        0,
        """\
All is well.
rspd 0.3.0, pid 123, running for 3 d 4 h (2 handovers, 1 reload)
so far: 12,345 served, 12 refused, 1.2 GB sent, 3.4 GB received; 57 of 65,536 descriptors

serving 18 of 100; listening on 127.0.0.1:8080, [::1]:8080
  waiting      0 in the backlog, 0 in the queue
  last 10 s    12 connections/s, 1.2 MB/s sent, 4.5 MB/s received
  last minute  0.2 connections/s, 999 B/s sent, 0 B/s received
  BACKEND, round-robin  STATE       FOR     OPEN  SHARE  CONNECT P50/P99  LAST CHECK
  10.0.0.11:80          up      3 d 4 h       18   75 %    78 ms / 2.4 s  good 2 s ago
  10.0.0.12:80          up     4 m 10 s  0 of 50   25 %                -  none yet
""",
        "",
    )


def test_failures_of_the_last_ten_minutes_are_listed_by_cause() -> None:
    failures = (
        Failure("idle-timeout", "10.0.0.11:80", 3, "", 9.0),
        Failure("refused: deny", "-", 1200, "in deny 192.0.2.0/24", 0.5),
    )
    snapshot = lone(failures=failures)
    assert shown(snapshot)[0] == "All is well."
    assert shown(snapshot)[-4:] == [
        "",
        "failed in the last ten minutes, with the last reason",
        "  1,200  refused: deny  -             500 ms ago  in deny 192.0.2.0/24",
        "      3  idle-timeout   10.0.0.11:80  9 s ago",
    ]


def test_routes_and_pools_of_proxies_are_shown_where_they_belong() -> None:
    snapshot = Snapshot(
        PROCESS,
        (
            Proxy("web", listeners=(Listener("80", None),), most=5, silent=2, queue=1),
            Proxy("old", retired=True, open=3),
            Proxy("gone", retired=True),
        ),
        (
            Route("web", "app", "http host app.example.org", "route app", False, 30),
            Route("web", "api", "http host api.example.org", "apps", True, 10),
        ),
        (Pool("web", "route app", False, "random", route="app"), Pool("", "apps", True, "least-connections", 4)),
        (Backend("web", "route app", False, "10.0.0.1:80"), Backend("", "apps", True, "/run/a.sock", backup=True)),
    )
    assert shown(snapshot)[3:] == [
        "",
        "web: serving 0 of 5; listening on 80",
        "  waiting      an unknown number in the backlog, 1 in the queue, 2 yet to say what they want",
        "  last 10 s    0 connections/s, 0 B/s sent, 0 B/s received",
        "  last minute  0 connections/s, 0 B/s sent, 0 B/s received",
        "  ROUTE  CLIENTS  SHARE  POOL       FOR",
        "  app         30   75 %  route app  http host app.example.org",
        "  api         10   25 %  apps       http host api.example.org",
        "  route app    STATE  FOR  OPEN  SHARE  CONNECT P50/P99",
        "  10.0.0.1:80  up     0 s     0      -                -",
        "",
        "old: no longer in the file, 3 connections still open",
        "",
        "pools of the whole file",
        "  pool apps, 4 wait     STATE  FOR  OPEN  SHARE  CONNECT P50/P99",
        "  /run/a.sock (backup)  up     0 s     0      -                -",
    ]


def test_a_backend_that_is_down_is_shown_with_why_and_its_last_check() -> None:
    bad = Checks(9, 3, 1.0, False, "status 500, expected 200-399")
    for backend, cell in [
        (REFUSED, "Connection refused"),
        (REFUSED._replace(checks=Checks(9, 0, 1.0)), "Connection refused; last check: good 1 s ago"),
        (REFUSED._replace(checks=bad, why=bad.reason), "bad 1 s ago: status 500, expected 200-399"),
    ]:
        line = shown(LONE._replace(backends=(FIRST._replace(checks=None), backend)))[-1]
        assert line.startswith("  10.0.0.12:80          down   4 m 10 s  0 of 50   25 %")
        assert line.endswith(f"-  {cell}")


def test_a_backend_that_is_full_has_no_age_there_and_the_shortest_times_are_not_divided() -> None:
    connect = Distribution((5, *[0] * 13, 5))
    line = shown(LONE._replace(backends=(FIRST._replace(state="full", limit=18.0, connect=connect),)))[-1]
    assert line.split()[:5] == ["10.0.0.11:80", "full", "-", "18", "of"]
    assert "<0.5 ms / >10 s" in line


def test_workers_are_one_service(tmp_path: Path, status: Run) -> None:
    down = REFUSED._replace(in_service_in=0)
    with answering(tmp_path / "worker-1.sock", LONE._replace(backends=(FIRST, down))):
        lines = status()[1].splitlines()
    assert lines[:2] == [
        "backend 10.0.0.12:80 is down in 1 of 2 processes, for 4 m 10 s: Connection refused",
        "rspd 0.3.0, 2 processes, the first with pid 123, running for 3 d 4 h (2 handovers, 1 reload)",
    ]
    assert lines[2] == "so far: 24,690 served, 24 refused, 2.4 GB sent, 6.8 GB received; 57 of 65,536 descriptors"
    assert lines[4].startswith("serving 36 of 200;")
    assert lines[-1].startswith("  10.0.0.12:80          down in 1 of 2  4 m 10 s  0 of 100")
    assert shown(process(worker="1"))[1].startswith("rspd 0.3.0, worker 1, pid 123, running")
    assert "(2 handovers, 1 reload, 1 failed reload)" in shown(process(reloads_failed=1))[1]


def test_who_has_the_only_place_is_said_first(path: str, status: Run, served: Answering) -> None:
    served.snapshot = SERIAL._replace(backends=(FIRST, REFUSED))
    served.connections = [HOLDER, HOLDER._replace(client="192.0.2.9:1", idle=1.0)]
    first, second, *_ = status()[1].splitlines()
    assert first == (
        "all places taken: serving 1 of 1, 3 clients wait; the client 192.0.2.7:5000 has had the place for 4 m 10 s"
        f" (idle 3 m 59 s); raise max_connections, or see rspd connections --socket {path} --sort idle"
    )
    assert second == "backend 10.0.0.12:80 has been down for 4 m 10 s: Connection refused; 1 of 2 in service"
    assert served.asked == ["/v1/status", "/v1/connections?sort=idle&limit=1"]


def test_who_has_the_place_of_a_lone_proxy_is_no_client_of_one_that_was_taken_out(
    status: Run, served: Answering
) -> None:
    served.snapshot = SERIAL._replace(proxies=(*SERIAL.proxies, Proxy("old", retired=True, open=2)))
    old = [HOLDER._replace(proxy="old", client=f"192.0.2.9:{port}", idle=900.0 + port) for port in (1, 2)]
    served.connections = [*old, HOLDER, HOLDER._replace(client="192.0.2.8:1", idle=3.0)]
    assert "; the client 192.0.2.7:5000 has had the place for 4 m 10 s (idle 3 m 59 s)" in status()[1]
    assert served.asked[1] == "/v1/connections?sort=idle&limit=3"


# What is left out, and how it fits


MANY = Snapshot(
    PROCESS,
    tuple(Proxy(f"p{index}", open=index, most=100) for index in range(8)),
    tuple(Route("p7", f"r{index}", "", f"route r{index}", False, clients=index) for index in range(30)),
    tuple(Pool("p7", f"route r{index}", route=f"r{index}") for index in range(30)),
    tuple(
        Backend("p7", f"route r{index}", False, f"b{number}:80", "down" if number == 60 else "up", open=number)
        for index in range(30)
        for number in range(100)
    ),
)


def test_of_many_those_in_trouble_and_the_busiest_are_shown() -> None:
    lines = shown(MANY)
    assert len(lines) < 80
    assert lines[5] == "... and 25 more troubles, see --all"
    assert [line.split(":")[0] for line in lines if "serving" in line] == ["p5", "p6", "p7"]
    assert lines.count("... and 5 more proxies, see --all") == 1
    routes = lines.index("  ... and 26 more routes, see --all")
    assert [line.split()[0] for line in lines[routes - 4 : routes]] == ["r26", "r27", "r28", "r29"]
    pool = lines.index("  ... and 96 more backends, see --all")
    assert [line.split()[0] for line in lines[pool - 4 : pool]] == ["b60:80", "b97:80", "b98:80", "b99:80"]
    assert lines.count("  ... and 27 more pools, see --all") == 1
    full = shown(MANY, everything=True)
    assert len(full) > 3000
    assert not any("--all" in line for line in full)


def test_an_ordinary_setup_fits_one_screen(path: str, served: Answering) -> None:
    failures = tuple(Failure(f"backend-cause-{index}", "10.0.0.11:80", 10 - index, "why", 9.0) for index in range(9))
    third = FIRST._replace(name="a-backend-with-a-long-name.example.org:8000", open=1234, limit=5000.0)
    snapshot = lone(open=100, most=100, full_in=1, listeners=(Listener("127.0.0.1:8080", 3),), failures=failures)
    served.snapshot = snapshot._replace(backends=(FIRST, REFUSED._replace(checks=Checks(1, 1, 2.0)), third, third))
    served.connections = [HOLDER]
    lines = in_terminal([*COMMAND, path], columns=80)
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert re.fullmatch("  [.]{3} and [5-8] more causes, see --all", lines[-1])
    assert any("a-backend-with…" in line for line in lines)
    everything = in_terminal([*COMMAND, path, "--all"], columns=60)
    assert len(everything) > len(lines)
    assert max(map(len, everything)) <= 60


def test_what_a_terminal_would_obey_is_escaped(status: Run, served: Answering) -> None:
    evil = "\x1b[2J\n"
    served.snapshot = Snapshot(
        Process(evil, worker=evil, failure=evil, unanswered=(evil,)),
        (
            Proxy(
                evil,
                listeners=(Listener(evil, 1),),
                open=1,
                most=1,
                full_in=1,
                failures=(Failure(evil, evil, 1, evil),),
            ),
        ),
        (Route(evil, evil, evil, evil),),
        (Pool(evil, evil, balance=evil),),
        (Backend(evil, evil, False, evil, "down", why=evil, checks=Checks(ago=1.0, last_good=False, reason=evil)),),
    )
    served.connections = [HOLDER._replace(proxy=evil, client=evil)]
    for words in ([], ["--all"], ["--check"], ["--json"]):
        _, out, _ = status(*words)
        assert "\x1b" not in out
        assert out.isascii()
    assert "\\x1b[2J\\n" in status()[1]


def test_a_number_that_is_not_known_is_shown_as_such(status: Run, served: Answering) -> None:
    """Any time and any rate may be null in JSON."""
    rate = Rate(inf, inf, inf)
    served.snapshot = lone(last_10s=rate, last_minute=rate)._replace(process=PROCESS._replace(service_age=inf))
    code, out, _ = status()
    assert code == 0
    assert "running for -" in out
    assert "last 10 s    - connections/s, -/s sent, -/s received" in out


# For scripts


def dead(**changes: object) -> Snapshot:
    """The snapshot with all backends down."""
    backends = tuple(one._replace(state="down", why="Connection refused", in_service_in=0) for one in LONE.backends)
    return LONE._replace(backends=backends, **changes)  # type: ignore[arg-type]


UNSERVED = "no backend is in service (10.0.0.11:80: Connection refused; 10.0.0.12:80: Connection refused)"


@pytest.mark.parametrize(
    ("snapshot", "lines"),
    [
        (LONE, []),
        (SERIAL, []),
        (LONE._replace(backends=(FIRST._replace(state="full"), REFUSED)), []),
        (dead(), [UNSERVED]),
        (process(ending=True), ["rspd is ending and accepts nobody"]),
        (LONE._replace(backends=()), ["no backend is known"]),
        (Snapshot(), ["no proxy is configured"]),
        (dead(proxies=(Proxy("a", listeners=(Listener(),)), Proxy("", retired=True))), ["a: no backend is known"]),
        (lone(listeners=()), ["it listens nowhere"]),
    ],
)
def test_a_check_names_proxies_that_can_serve_nobody(
    status: Run, served: Answering, snapshot: Snapshot, lines: list[str]
) -> None:
    served.snapshot = snapshot
    assert status("--check") == (1 if lines else 0, "".join(f"{line}\n" for line in lines), "")


def test_a_proxy_that_can_serve_some_is_served_by_whichever_pool(status: Run, served: Answering) -> None:
    served.snapshot = Snapshot(
        Process(),
        tuple(Proxy(name, listeners=(Listener(),)) for name in "abc"),
        (Route("a", "x", "", "apps", True), Route("b", "x", "", "apps", False)),
        (),
        (
            Backend("a", name="a:1", state="down"),
            Backend("", "apps", True, "s:1"),
            Backend("b", "apps", False, "b:1", state="trial"),
            Backend("c", name="c:1"),
        ),
    )
    assert status("--check") == (1, "b: no backend is in service (b:1: trial)\n", "")


def test_one_process_that_serves_is_enough(tmp_path: Path, status: Run, served: Answering) -> None:
    served.snapshot = dead()
    worker = tmp_path / "worker-1.sock"
    with answering(worker, LONE):
        assert status("--check") == (0, "", "")
    worker.unlink()
    with answering(worker, process(ending=True)):
        assert status("--check") == (1, f"{UNSERVED}\n", "")


def test_a_process_without_an_answer_fails_a_check_and_a_socket_that_was_left_does_not(
    tmp_path: Path, status: Run
) -> None:
    worker = tmp_path / "worker-1.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(worker))
    assert status("--check") == (0, "", "")
    assert status()[1].startswith("All is well.\n")
    worker.unlink()
    said = f"no answer from {worker}: that process is missing here; see systemctl status rspd-worker@1"
    with answering(worker, instead=b"nonsense"):
        assert status("--check") == (1, f"{said}\n", "")
        assert status()[1].startswith(f"{said}\n")


def test_a_frozen_process_is_asked_once(
    tmp_path: Path, status: Run, served: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "GRACE", 0.2)
    served.snapshot, served.connections = SERIAL, [HOLDER]
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(f"{tmp_path}/worker-1.sock")
        frozen.listen()
        first, second, *_ = status()[1].splitlines()
        assert "the client 192.0.2.7:5000 has had the place" in first
        assert second.startswith("no answer from ")
        frozen.settimeout(PATIENCE)
        with frozen.accept()[0]:
            frozen.setblocking(False)
            with pytest.raises(BlockingIOError):
                frozen.accept()


def test_json_is_the_snapshot_in_one_line(tmp_path: Path, status: Run, served: Answering) -> None:
    code, out, _ = status("--json")
    assert (code, out.count("\n")) == (0, 1)
    assert read(Snapshot, json.loads(out)) == LONE
    served.snapshot = dead()
    with answering(tmp_path / "worker-1.sock", instead=b"nonsense"):
        code, out, _ = status("--json", "--check")
    assert code == 1
    assert json.loads(out)["process"]["unanswered"] == [f"{tmp_path}/worker-1.sock"]


def test_without_a_running_rspd_the_code_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--check"], ["--json"]):
        code, out, err = run(main, ["--socket", f"{tmp_path}/none.sock", *words], capsys)
        assert (code, out) == (69, "")
        assert err.startswith(f"rspd: {tmp_path}/none.sock: no such socket")


def test_a_connection_that_cannot_be_asked_for_is_left_out(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = SERIAL
    with answering(path, snapshot, only="/v1/status"):
        code, out, _ = run(main, ["--socket", path], capsys)
    assert code == 0
    assert out.startswith("all places taken: serving 1 of 1, 3 clients wait; raise max_connections")


@pytest.mark.parametrize("more", [[], ["--help"]])
def test_a_closed_output_is_73(path: str, served: Answering, more: list[str]) -> None:
    command = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, path, *more]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (73, "rspd: cannot write to stdout: it is closed\n")


@pytest.mark.parametrize("stderr", [">&-", ">/dev/full"])
@pytest.mark.parametrize(("words", "code"), [("--socket /nowhere", 69), ("--chek", 64)])
def test_where_stderr_cannot_be_written_errors_are_not_said_elsewhere(stderr: str, words: str, code: int) -> None:
    command = ["/bin/sh", "-c", f'exec "$@" 2{stderr}', "sh", *COMMAND[:-1], *words.split(), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, env=BUFFERED)
    assert (done.returncode, done.stdout) == (code, "")


def test_output_that_cannot_be_written_is_73(path: str, served: Answering) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, path], stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, env=BUFFERED
        )
    assert (done.returncode, done.stderr) == (73, "rspd: cannot write to stdout: No space left on device\n")
