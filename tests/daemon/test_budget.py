"""What a connection and a request cost, in counts that a busy machine does not change.

These are system calls, calls within Python, and instructions of Python.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from tests.peers.programs import receive_header
from tests.support import Backend, can_trace, client_hello, echo, eventually, free_port, rspd

# What one more of each may take, the line in the log included. A change that needs more says in its commit what that
# buys. Python 3.11 executes the most instructions, the others up to a tenth less.
SYSTEM_CALLS = {"serial connection": 24, "connection": 24, "connection, might return": 25, "request": 6}
INSTRUCTIONS = {"serial connection": 2645, "connection": 2600, "request": 545}

# Calls of functions in Python, and of coroutines and generators that go on: the same from Python 3.10 to 3.13.
CALLS = {
    "serial connection": 67,
    "connection": 63,
    "request": 10,
    "connection, send_proxy": 71,
    "connection, who may come": 71,
    "connection, by server name": 81,
    "connection, by host": 79,
    "connection, metrics": 67,
}

# The keys that this work has in the file.
KEYS = {
    "connection, metrics": "metrics: 127.0.0.1:{port}",
    "connection, send_proxy": "send_proxy: v2",
    "connection, who may come": "{deny: 192.0.2.0/24, max_connections_per_client: 9, balance: source}",
}

# What a client says first; else MESSAGE.
SAID = {
    "connection, by server name": client_hello("www.example.org", ("h2", "http/1.1")),
    "connection, by host": b"GET / HTTP/1.1\r\nHost: www.example.org\r\nAccept: */*\r\n\r\n",
}
ROUTES = {"connection, by server name": "server_name", "connection, by host": "host"}

# Modules that some configurations need, or some messages. Others are not to pay for them at each start.
SLOW = {
    *("yaml", "datetime", "base64", "random", "hashlib", "daemon", "difflib", "locale"),
    *("asyncio", "ipaddress", "pathlib", "shutil", "subprocess", "tempfile"),
}

CONNECTIONS = 100
MESSAGE = b"x" * 100


def cost(work: str, counter: Sequence[str], counts: Callable[[], Sequence[int]], file: Path) -> float:
    """What one more of it costs.

    counter: a command that runs rspd and counts.
    counts: the counts at each line of the log, once rspd has ended.
    file: where its configuration goes.
    """

    def connection(requests: int) -> int:
        serve_connections(work, counter, requests, file)
        each = sorted(after - before for before, after in pairwise(counts()))
        assert len(each) >= CONNECTIONS
        # Nearly all take the same. On a busy machine what comes together elsewhere takes several turns.
        return each[len(each) // 4]

    return (connection(3) - connection(1)) / 2 if work == "request" else connection(1)


def echo_after_header(sock: socket.socket) -> None:
    receive_header(sock)
    echo(sock)


def serve_connections(work: str, launcher: Sequence[str], requests: int, file: Path) -> None:
    """Connections with some requests each, one after the other; each has a line in the log."""
    serial = work == "serial connection"
    # So the backend might be rspd itself by another name.
    same_port = work == "connection, might return"
    with Backend(echo_after_header if "send_proxy" in work else echo, host="127.0.0.2", port=free_port()) as backend:
        listen = f"127.0.0.1:{backend.port if same_port else 0}"
        options: tuple[str, ...] = "-c", str(file), "-b", backend.address, "--max-connections", "1" if serial else "64"
        file.write_text(KEYS.get(work, "").replace("{port}", str(free_port())))
        if key := ROUTES.get(work):
            others = f"{{{key}: [a.example, '*.example.net'], backend: 127.0.0.1:1}}"
            file.write_text(f"routes: [{others}, {{{key}: www.example.org, backend: {backend.address}}}]")
            options = "-c", str(file), "--max-connections", "64"
        said = SAID.get(work, MESSAGE)
        with rspd(*options, listen=[listen], launcher=launcher) as daemon:
            for number in range(CONNECTIONS):
                with daemon.connect() as client:
                    for _ in range(requests):
                        client.sendall(said)
                        assert client.recv(len(said), socket.MSG_WAITALL) == said
                daemon.wait_for_ends(number + 1)


@pytest.mark.parametrize("work", SYSTEM_CALLS)
def test_it_makes_no_more_system_calls_than_its_budget(work: str, tmp_path: Path) -> None:
    can_trace()
    trace = tmp_path / "trace"

    def counts() -> list[int]:
        calls = eventually(lambda: text if "+++ exited" in (text := trace.read_text()) else "").splitlines()
        return [number for number, call in enumerate(calls) if " write(2, " in call]

    spent = cost(work, ["strace", "-D", "-f", "-q", "-o", str(trace)], counts, tmp_path / "rspd.yaml")
    assert spent <= SYSTEM_CALLS[work], f"one more {work} takes {spent} system calls"


@pytest.mark.parametrize("work", INSTRUCTIONS)
def test_it_executes_no_more_instructions_than_its_budget(work: str, tmp_path: Path) -> None:
    spent = counted("instructions", work, tmp_path / "counts")
    assert spent <= INSTRUCTIONS[work], f"one more {work} takes {spent} instructions"


@pytest.mark.parametrize("work", CALLS)
def test_it_makes_no_more_calls_in_python_than_its_budget(work: str, tmp_path: Path) -> None:
    spent = counted("calls", work, tmp_path / "counts")
    assert spent <= CALLS[work], f"one more {work} takes {spent} calls"


def counted(what: str, work: str, file: Path) -> float:
    """What one more of it costs, in instructions or in calls."""

    def counts() -> list[int]:
        return [int(count) for count in file.read_text().split()]

    return cost(work, [sys.executable, "-m", "tests.counts", what, str(file)], counts, file.with_suffix(".yaml"))


def test_a_start_imports_nothing_that_few_need_and_then_nothing_at_all() -> None:
    # Each import is a line on stderr, as each line of the log is.
    traced = ["env", "-u", "COVERAGE_PROCESS_START", "-u", "COVERAGE_PROCESS_CONFIG", "PYTHONPROFILEIMPORTTIME=1"]
    with Backend(echo) as backend, rspd("-b", backend.address, launcher=traced) as daemon:
        with daemon.connect() as client:
            client.sendall(MESSAGE)
            assert client.recv(1000) == MESSAGE
        daemon.wait_for_ends(1)
        assert daemon.stop() == 0
        start, at_work = daemon.log.split("listening address=")
    names = re.findall(r"^import time: .* (\S+)$", start, re.MULTILINE)
    ours = set(names[names.index("rspd") :])
    assert {"logging", "rspd.cli"} <= ours
    assert ours & SLOW == set()
    # Later, the files may be gone, or of another version, or no descriptor be free.
    assert "import time" not in at_work


def test_garbage_is_not_looked_for_until_it_is_at_work() -> None:
    code = """
import gc
from rspd.__main__ import main
disabled = not gc.isenabled()
code = main(["--foreground", "--exit-idle-time", "10ms", "127.0.0.1:0", "127.0.0.1:1"])
print(code, disabled, gc.isenabled(), gc.get_threshold()[0])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "0 True True 20000\n"
