from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import pytest

from rspd.commands.connections import main
from rspd.snapshot import Backend, Connection, Connections, Process, Proxy, Route, Snapshot, read
from tests.commands.support import BUFFERED, Answering, Said, answering, in_terminal, run
from tests.support import OUR_USER

OLD = Connection(
    "k3x9-1", "", "192.0.2.7:5000", "", "10.0.0.11:80", state="open", age=250.0, idle=239.0, sent=78, received=1_234_567
)
NEW = Connection("k3x9-2", "", "[2001:db8::1]:5001", "", "", state="queued", age=0.42)
ROUTED = Connection(
    "k3x9-3", "web", "192.0.2.9:1", "10.0.0.1:9", "/run/app.sock", "app", state="half-closed", age=5.0, rate=100.0
)

COMMAND = [sys.executable, "-m", "rspd", "connections", "--socket"]

Run = Callable[..., Said]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control.sock")


@pytest.fixture
def served(path: str) -> Iterator[Answering]:
    with answering(path) as server:
        yield server


@pytest.fixture
def connections(path: str, served: Answering, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: run(main, ["--socket", path, *words], capsys)


def test_connections_are_a_table_with_the_oldest_first(connections: Run, served: Answering) -> None:
    served.connections = [NEW, OLD]
    assert connections() == (
        0,
        (
            "ID      CLIENT              BACKEND            AGE      IDLE  SENT  RECEIVED  BYTES/S  STATE\n"
            "k3x9-1  192.0.2.7:5000      10.0.0.11:80  4 m 10 s  3 m 59 s  78 B    1.2 MB      0 B  open\n"
            "k3x9-2  [2001:db8::1]:5001  -               420 ms       0 s   0 B       0 B      0 B  queued\n"
            "2 connections\n"
        ),
        "",
    )


def test_proxies_and_routes_are_shown_where_there_are_any(connections: Run, served: Answering) -> None:
    served.connections = [ROUTED, NEW]
    _, out, _ = connections()
    head = ["ID", "PROXY", "CLIENT", "BACKEND", "ROUTE", "AGE", "IDLE", "SENT", "RECEIVED", "BYTES/S", "STATE"]
    assert out.splitlines()[0].split() == head
    assert "  192.0.2.9:1 via 10.0.0.1:9  /run/app.sock  app " in out.splitlines()[1]
    assert "  -     " in out.splitlines()[2]


def test_where_there_is_none_only_that_is_said(connections: Run) -> None:
    assert connections() == (0, "0 connections\n", "")


def test_what_is_asked_for_goes_to_the_process_that_has_them(connections: Run, served: Answering) -> None:
    served.connections = [OLD, NEW, ROUTED]
    filters = "--proxy web --client 192.0.2.9 --backend /run/app.sock --route app --longer-than 5s --sort rate"
    assert connections(*filters.split())[1].splitlines()[-1] == "1 connection"
    wanted = "proxy=web&client=192.0.2.9&backend=%2Frun%2Fapp.sock&route=app&longer_than=5.0&sort=rate"
    assert served.asked == [f"/v1/connections?{wanted}"]
    for words, shown in [
        ("--idle-for 2m", ["k3x9-1"]),
        ("--client 10.0.0.1:9", ["k3x9-3"]),
        ("--client 2001:db8::1", ["k3x9-2"]),
        ("--client 192.0.2.0/29", ["k3x9-1"]),
        ("--sort bytes --limit 1", ["k3x9-1"]),
        ("--longer-than 1h", []),
    ]:
        assert [line.split()[0] for line in connections(*words.split())[1].splitlines()[1:-1]] == shown


def test_the_rate_is_shown_where_it_sorts_or_fits_and_what_was_said_after_it(path: str, served: Answering) -> None:
    served.connections = [OLD._replace(rate=1e6, said="app.example.org http")]
    heads = [
        in_terminal([*COMMAND, path, *words], columns)[0].split()[7:]
        for columns, words in ((80, []), (80, ["--sort", "rate"]), (95, []), (130, []))
    ]
    assert heads == [["STATE"], ["BYTES/S", "STATE"], ["BYTES/S", "STATE"], ["BYTES/S", "STATE", "SAID"]]


def test_a_name_that_does_not_exist_is_told_with_those_that_do(connections: Run, served: Answering) -> None:
    backends = (Backend("web", name="10.0.0.11:80"), Backend("web", name="[::1]:81"))
    served.snapshot = Snapshot(proxies=(Proxy("web"), Proxy("ssh")), routes=(Route("web", "app"),), backends=backends)
    for words, said in [
        ("--proxy nix", "no proxy 'nix'; there are: web, ssh"),
        ("--backend 127.0.0.1:1", "no backend '127.0.0.1:1'; there are: 10.0.0.11:80, [::1]:81"),
        ("--route x", "no route 'x'; there is: app"),
        ("--route app --proxy ssh", "no route 'app'; there is none"),
    ]:
        assert connections(*words.split()) == (64, "", f"rspd: {said}\n")
    for words in ("--proxy web", "--backend 10.0.0.11", "--backend ::1", "--route app", "--client 192.0.2.0/24"):
        assert connections(*words.split()) == (0, "0 connections\n", "")
    served.snapshot = Snapshot(proxies=(Proxy(),))
    assert connections("--proxy", "nix")[2] == "rspd: no proxy 'nix': the only proxy has no name; leave out --proxy\n"


def test_a_rate_that_is_not_known_is_shown_as_such(connections: Run, served: Answering) -> None:
    served.connections = [OLD._replace(rate=inf)]
    assert connections()[1].splitlines()[1].endswith("  -  open")


def test_a_limit_is_told(connections: Run, served: Answering) -> None:
    served.connections = [OLD._replace(id=f"a-{number}") for number in range(4000)]
    lines = connections("--limit", "20")[1].splitlines()
    assert len(lines) == 22
    assert lines[-1] == "20 of 4,000 connections, see --limit"
    assert connections()[1].splitlines()[-1] == "4,000 connections"


def test_json_is_one_document(connections: Run, served: Answering) -> None:
    served.connections = [NEW, OLD]
    code, out, _ = connections("--json")
    assert (code, out.count("\n")) == (0, 1)
    assert read(Connections, json.loads(out)) == Connections(Process(), 2, (OLD, NEW))
    assert json.loads(connections("--json", "--limit", "1")[1])["matching"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--idle-for soon", "--idle-for: expected a duration, as 500ms, 5s, 2m or 1h, or off, found 'soon'"),
        ("--client 10.0.0.0/33", "--client: expected a network as 10.0.0.0/8, found '10.0.0.0/33'"),
        ("--sort rates", "--sort: expected one of bytes, age, idle, rate, found 'rates'; did you mean rate"),
        ("--limit none", "--limit: expected a whole number from 1 to 1000000000, or all, found 'none'"),
        ("--idle 5s", "unknown option '--idle'; did you mean --idle-for"),
        ("web", "expected options only, found 'web'"),
    ],
)
def test_mistakes_are_told(connections: Run, words: str, said: str) -> None:
    code, out, err = connections(*words.split())
    assert (code, out) == (64, "")
    assert said in err
    assert err.endswith("rspd connections --help\n")


def test_the_help_fits_a_terminal(connections: Run) -> None:
    code, out, _ = connections("--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.splitlines()) <= 30


def test_processes_that_do_not_answer_are_a_warning(tmp_path: Path, connections: Run) -> None:
    said = f"rspd: warning: no answer from {tmp_path}/worker-1.sock: its connections are missing here\n"
    with answering(tmp_path / "worker-1.sock", instead=b"nonsense"):
        assert connections() == (0, "0 connections\n", said)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_a_socket_of_another_user_is_a_warning(tmp_path: Path, connections: Run, served: Answering) -> None:
    with answering(tmp_path / "worker-1.sock", connections=[OLD]):
        os.chown(tmp_path / "worker-1.sock", OUR_USER, -1)
        code, out, err = connections()
    assert (code, out) == (0, "0 connections\n")
    assert err.startswith(f"rspd: warning: {tmp_path}/worker-1.sock is left out: another user made it")


def test_in_a_terminal_the_first_are_shown_and_names_are_cut(path: str, served: Answering) -> None:
    name = "a-backend-with-a-name-that-is-long.example.org:8000"
    served.connections = [OLD._replace(id=f"a-{number}", backend=name) for number in range(60)]
    lines = in_terminal([*COMMAND, path], columns=80)
    assert len(lines) == 52
    assert lines[-1] == "50 of 60 connections, see --limit"
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith("STATE")
    assert "…" in lines[1]
    assert lines[1].endswith("open")
    assert len(in_terminal([*COMMAND, path, "--limit", "all"], columns=80)) == 62


def test_what_a_terminal_would_obey_is_escaped(connections: Run, served: Answering) -> None:
    served.connections = [OLD._replace(client="\x1b[2J", route="\n")]
    _, out, _ = connections()
    assert "\\x1b[2J" in out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_reader_that_has_read_enough_is_no_error(path: str, served: Answering, words: list[str]) -> None:
    served.connections = [OLD] * 3000
    command = [*COMMAND, path, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(10)
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_connections_of_workers_are_in_one_table(tmp_path: Path, connections: Run, served: Answering) -> None:
    served.connections = [OLD]
    with answering(tmp_path / "worker-1.sock", Snapshot(Process(pid=2)), [NEW, OLD._replace(id="w-1", age=300.0)]):
        lines = connections()[1].splitlines()
        assert [line.split()[0] for line in lines[1:-1]] == ["w-1", "k3x9-1", "k3x9-2"]
        assert connections("--limit", "2")[1].splitlines()[-1] == "2 of 3 connections, see --limit"
