"""What a connection and a request cost, in counts that a busy machine does not change: system calls, instructions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import Backend, Daemon, can_trace, echo, eventually, free_port, rspd

# What one more of each may take, the line in the log included: in serial mode the listener is registered and
# unregistered for each client, else it stays registered. A change that needs more says in its commit what that buys.
# Python 3.11 executes the most instructions, the others up to a tenth less.
SYSTEM_CALLS = {"serial connection": 31.0, "connection": 26.4, "connection, might return": 26.4, "request": 6.1}
INSTRUCTIONS = {"serial connection": 3225.0, "connection": 2825.0, "request": 550.0}

FEW, MANY = 20, 120
MESSAGE = b"x" * 100


def connections(daemon: Daemon, count: int) -> None:
    """Short connections, one after the other."""
    for number in range(count):
        requests(daemon, 1)
        daemon.wait_for_ends(number + 1)


def requests(daemon: Daemon, count: int) -> None:
    """Requests on one connection."""
    with daemon.connect() as client:
        for _ in range(count):
            client.sendall(MESSAGE)
            assert client.recv(1000) == MESSAGE


WORKS: dict[str, tuple[Callable[[Daemon, int], None], str]] = {
    "serial connection": (connections, "1"),
    "connection": (connections, "64"),
    # The backend has the port of rspd's listener, so that it might be rspd itself by another name.
    "connection, might return": (connections, "64"),
    "request": (requests, "64"),
}


def cost(work: str, counter: Callable[[Path], Sequence[str]], counted: Callable[[Path], int], folder: Path) -> float:
    """What one more of it costs: the difference between doing few and doing many.

    counter: a command that runs rspd and writes to a file what `counted` reads there; 0 as long as that is not whole.
    """

    do, limit = WORKS[work]

    def total(number: int) -> int:
        file = folder / str(number)
        with Backend(echo, host="127.0.0.2", port=free_port()) as backend:
            listen = f"127.0.0.1:{backend.port if work.endswith('might return') else 0}"
            options = "-b", backend.address, "--max-connections", limit
            with rspd(*options, listen=[listen], launcher=counter(file)) as daemon:
                do(daemon, number)
        return eventually(lambda: counted(file))

    return (total(MANY) - total(FEW)) / (MANY - FEW)


def least(limit: float, *arguments: Any) -> float:
    """What one more costs. On a busy machine what comes together elsewhere takes several turns: the least counts."""
    spent = cost(*arguments)
    for _ in range(3):
        if spent > limit:
            spent = min(spent, cost(*arguments))
    return spent


@pytest.mark.parametrize("work", SYSTEM_CALLS)
def test_it_makes_no_more_system_calls_than_its_budget(work: str, tmp_path: Path) -> None:
    can_trace()

    def counter(file: Path) -> list[str]:
        return ["strace", "-D", "-f", "-q", "-o", str(file)]

    def counted(file: Path) -> int:
        text = file.read_text()
        return text.count("\n") if "+++ exited" in text else 0

    spent = least(SYSTEM_CALLS[work], work, counter, counted, tmp_path)
    assert spent <= SYSTEM_CALLS[work], f"one more {work} takes {spent:.1f} system calls"


@pytest.mark.parametrize("work", INSTRUCTIONS)
def test_it_executes_no_more_instructions_than_its_budget(work: str, tmp_path: Path) -> None:
    def counter(file: Path) -> list[str]:
        return [sys.executable, "-m", "tests.instructions", str(file)]

    def counted(file: Path) -> int:
        return int(file.read_text())

    spent = least(INSTRUCTIONS[work], work, counter, counted, tmp_path)
    assert spent <= INSTRUCTIONS[work], f"one more {work} takes {spent:.0f} instructions"
