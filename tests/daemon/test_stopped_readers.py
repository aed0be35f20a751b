"""Clients that ask for much and read nothing: what they cost the others, and what they get once they read on."""

from __future__ import annotations

import hashlib
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from rspd.engine.pipes import IN_MEMORY_MAX, PIPES_MAX, PROVEN
from tests.daemon.test_transfer import BLOCK, receive_hashed
from tests.support import Backend, Daemon, can_trace, eventually, reset, rspd

STOPPED = 80

# What a stopped reader asks for, more than all buffers on the way hold: blocks that differ.
MUCH = [number.to_bytes(8, "big") + BLOCK[8:] for number in range(48)]

pytestmark = pytest.mark.large_pipes(PIPES_MAX)


def serve(sock: socket.socket) -> None:
    """A handler that answers `much` by all of it, and `step` by a pipe full for each byte that comes."""
    try:
        if sock.recv(4) == b"much":
            for block in MUCH:
                sock.sendall(block)
        else:
            while sock.recv(1):
                sock.sendall(BLOCK)
    except ConnectionError:
        pass  # a client that has seen enough


def step(clients: list[socket.socket], count: int) -> None:
    """Have each client read a pipe full, so many times, each after the one before."""
    into = memoryview(bytearray(BLOCK))
    for _ in range(count):
        for client in clients:
            client.sendall(b"?")
        for client in clients:
            got = 0
            while got < len(BLOCK):
                got += client.recv_into(into[got:])


def copies(daemon: Daemon, trace: Path) -> float:
    """How often rspd reads into its buffer, rather than splices, for each MiB that four clients read."""
    with ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(4)]
        for client in clients:
            client.sendall(b"step")
        step(clients, 2 * PROVEN // len(BLOCK))
        before = trace.read_text().count("recvfrom(")
        step(clients, 50)
        # The requests are read into the buffer too, one each.
        return (trace.read_text().count("recvfrom(") - before) / 200 - 1


def stop(daemon: Daemon, stack: ExitStack) -> list[socket.socket]:
    """Clients that have asked and read nothing, when all buffers are full on their way."""
    clients = [stack.enter_context(daemon.connect()) for _ in range(STOPPED)]
    for client in clients:
        client.sendall(b"much")
    looks: list[tuple[float, str]] = []

    def at_rest() -> bool:
        # On a busy machine, who uses no CPU time may be about to get some: only one that sleeps has nothing to do.
        state = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()[0]
        looks.append((daemon.cpu_seconds(), state))
        return state == "S" and looks[-100:].count(looks[-1]) == 100

    eventually(at_rest)
    return clients


def test_stopped_readers_leave_pipes_to_the_others_and_lose_nothing(tmp_path: Path) -> None:
    can_trace()
    digest = hashlib.sha1()
    for block in MUCH:
        digest.update(block)
    trace = tmp_path / "trace"
    launcher = ["strace", "-D", "-f", "-q", "-e", "trace=recvfrom", "-o", str(trace)]
    options = "--max-connections", "400"
    with (
        Backend(serve) as backend,
        rspd("-b", backend.address, *options, launcher=launcher) as daemon,
        ExitStack() as stack,
    ):
        alone = copies(daemon, trace)
        before = daemon.memory()
        stopped = stop(daemon, stack)
        assert copies(daemon, trace) < 2 * alone + 2
        stopped += stop(daemon, stack)
        assert copies(daemon, trace) < 2 * alone + 2, "those who came later have the pipes"
        # Besides what may be in memory of pipes, each has a buffer full at most, and its connection.
        assert daemon.memory() - before < IN_MEMORY_MAX + 2 * STOPPED * 100_000
        for client in stopped[10:]:
            reset(client)
        whole = (len(MUCH) * len(BLOCK), digest.hexdigest())
        assert {receive_hashed(client) for client in stopped[:10]} == {whole}
