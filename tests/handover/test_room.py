"""Descriptors that are handed over count for the user, and there may be too many of them at a moment (unix(7))."""

from __future__ import annotations

import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.handover.talks import CONTROL, Talks, handovers, served, stored
from tests.support import eventually, is_reset
from tests.system.machine import Machine
from tests.system.traffic import CONFIGURATION

LIMIT = 1200  # of the service, and so of what may be in flight before a message of it
TAKEN = 1100
MESSAGE = 253  # descriptors that the kernel takes at once (SCM_MAX_FD)
CLIENTS = 200  # with two descriptors each: of two messages, one has room

HOLDS = f"""
import socket, struct, sys
near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
left = {TAKEN}
while left:
    count = min(left, {MESSAGE})
    left -= count
    rights = struct.pack(f"{{count}}i", *[near.fileno()] * count)
    near.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def little_room(machine: Machine) -> Iterator[None]:
    """Meanwhile another process of the user rspd has most of what may be in flight."""
    as_user = ["setpriv", "--reuid=rspd", "--regid=rspd", "--clear-groups"]
    command = machine.command(*as_user, "python3", "-c", HOLDS)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            holder.stdin.close()
            holder.wait()


def start(machine: Machine, more: str = "") -> None:
    machine.drop_in("rspd.service", f"[Service]\nLimitNOFILE={LIMIT}")
    machine.write("/etc/rspd.yaml", CONFIGURATION + "max_connections: 250\n" + more)
    machine.systemctl("start", "rspd")


def warnings(machine: Machine) -> list[str]:
    return [entry["MESSAGE"] for entry in machine.entries() if entry["PRIORITY"] == "4"]


def is_cut(client: socket.socket) -> bool:
    """Whether the connection has ended; nothing is waiting to be read."""
    poll = select.poll()
    poll.register(client, select.POLLIN)
    return bool(poll.poll(0))


def test_a_handover_waits_for_room(machine: Machine) -> None:
    start(machine)
    with Talks(CLIENTS) as talks:
        with little_room(machine):
            machine.systemctl("restart", "--no-block", "rspd")
            eventually(lambda: warnings(machine), "it finds too little room")
            talks.talk()
        eventually(lambda: machine.log(f"^took over connections={CLIENTS}$"), "all are handed over")
        talks.talk()
        served()
        assert len(warnings(machine)) == 1
        talks.end()
    eventually(lambda: sorted(handovers(machine)) == [0] + [1] * CLIENTS)
    assert stored(machine) == CONTROL + 1


def test_what_finds_no_room_until_drain_timeout_is_cut_and_the_others_go_on(machine: Machine) -> None:
    start(machine, "drain_timeout: 1s\n")
    with Talks(CLIENTS) as talks:
        with little_room(machine):
            machine.systemctl("restart", "rspd")
            served()
        closed = [line for line in machine.log("^connection closed ") if "cause=drain-timeout" in line]
        cut = [client for client in talks.clients if is_cut(client)]
        assert len(cut) == len(closed)
        assert len(cut) == CLIENTS - MESSAGE // 2
        for client in cut:
            assert is_reset(client)
            client.close()
            talks.clients.remove(client)
        talks.talk()
        assert len([line for line in warnings(machine) if "in flight" in line]) == 1
        assert machine.log(f"^took over connections={MESSAGE // 2}$")
        talks.end()
    assert stored(machine) == CONTROL + 1
