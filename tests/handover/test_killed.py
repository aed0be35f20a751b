"""Real systemd, and a process that is killed in the middle of a handover; and systemd that starts anew itself."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.handover.talks import CONTROL, MANY, Talks, served, stored, talk
from tests.support import can_trace, eventually, is_reset
from tests.system.machine import Machine
from tests.system.traffic import connect
from tests.tracer import Call, Tracer

CLIENTS = 3

# Calls of a process that hands over CLIENTS connections and logs nothing else meanwhile. At the second setsockopt, the
# document is complete: that call says what is to happen if nobody takes the first socket.
BEFORE_IT_STORES = Call("memfd_create", 1)
STORED = Call("pipe2", 1)
SENT = Call("write", 4)  # after one for each of two signals, and one for the log
COMPLETE = Call("setsockopt", 2)
AT_THE_END = Call("exit_group", 1)

# Calls of a process that takes over. It looks at one end of the queue first, then at the other, where one message is.
BEFORE_IT_RECEIVES = Call("recvmsg", 1)
RECEIVED = Call("recvmsg", 3)
TAKEN = Call("sendmsg", 1)  # systemd is not told yet that it has all
BEFORE_IT_IS_READY = Call("sendmsg", 2)

# A start waits at its first line if this file is there.
HOLD = "/run/rspd/hold"
HELD = f"""[Service]
SyslogIdentifier=rspd
ExecStart=
ExecStart=/bin/sh -c 'if [ -e {HOLD} ]; then rm {HOLD}; kill -STOP $$$$; fi; exec /usr/bin/rspd'
"""


@pytest.fixture
def started(machine: Machine) -> Iterator[Machine]:
    """The file's machine with rspd running, for many clients at once. In the end, nothing is left in systemd."""
    can_trace()
    machine.write("/etc/rspd.yaml", MANY)
    machine.systemctl("start", "rspd")
    before = descriptors_of_systemd(machine)
    yield machine
    goes_on_as_ever(machine)
    eventually(lambda: descriptors_of_systemd(machine) <= before, "systemd has closed all", patience=5)


def descriptors_of_systemd(machine: Machine) -> int:
    """How many the machine's first process has, but for those of its clients and of what it reads now and then."""
    folder = Path(f"/proc/{machine.leader}/fd")
    count = 0
    for fd in folder.iterdir():
        with suppress(FileNotFoundError):  # systemd closes some while this looks
            count += os.readlink(fd).startswith(("socket:", "/memfd:"))
    return count


def goes_on_as_ever(machine: Machine) -> None:
    """A restart hands over, and systemd has the listener alone before and after it."""
    assert machine.show("ActiveState") == "active"
    eventually(lambda: stored(machine) == CONTROL + 1, "the listeners alone")
    with Talks(CLIENTS) as talks:
        machine.systemctl("restart", "rspd")
        talks.talk()
        served()
        talks.end()
    eventually(lambda: stored(machine) == CONTROL + 1, "the listeners alone")


def on_host(machine: Machine, pid: int) -> int:
    """The number that a process of the machine has here."""
    namespace = os.readlink(f"/proc/{machine.leader}/ns/pid")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "ns/pid") == namespace:
                status = (folder / "status").read_text()
                if int(status.partition("NSpid:")[2].partition("\n")[0].split()[-1]) == pid:
                    return int(folder.name)
        except OSError:
            pass  # it has ended
    raise AssertionError(f"no process {pid} in the machine")


def stands(pid: int) -> bool:
    """Whether a process is stopped."""
    return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()


@contextmanager
def restarting(machine: Machine) -> Iterator[int]:
    """A restart that is under way, and over when the block is left. Yields the process before."""
    before = machine.pid()
    machine.systemctl("restart", "--no-block", "rspd")
    yield before
    eventually(lambda: machine.pid() not in (0, before) and machine.show("ActiveState") == "active", "it is ready")


@contextmanager
def restarting_held(machine: Machine) -> Iterator[int]:
    """A restart, held by HELD where only systemd has the connections. Yields the number here of the next process."""
    machine.write(HOLD, "")
    machine.shell(f"chown rspd {HOLD}")
    with restarting(machine) as before:
        eventually(lambda: machine.pid() not in (0, before), "the next process begins")
        held = on_host(machine, machine.pid())
        eventually(lambda: stands(held), "it waits")
        yield held


def ends(talks: Talks, all_reset: bool) -> None:
    """All clients are cut."""
    assert [is_reset(client) for client in talks.clients] == [True] * CLIENTS or not all_reset


# The process before


@pytest.mark.parametrize(
    ("call", "goes_on"),
    [(BEFORE_IT_STORES, False), (STORED, False), (SENT, False), (COMPLETE, True), (AT_THE_END, True)],
)
def test_a_process_that_is_killed_while_it_hands_over_leaves_all_or_nothing(
    started: Machine, call: Call, goes_on: bool
) -> None:
    with Talks(CLIENTS) as talks, Tracer(on_host(started, started.pid()), *call.kill()) as tracer:
        with restarting(started), ExitStack() as stack:
            tracer.wait()
            waiting = [stack.enter_context(connect()) for _ in range(5)]
            for client in waiting:
                talk(client)
        if goes_on:
            talks.talk()
            assert started.log(f"^took over connections={CLIENTS}$")
        else:
            ends(talks, all_reset=call == SENT)
            assert started.log("^took over connections=0$")
    assert started.log("^handed over ") == (
        [] if call != AT_THE_END else [f"handed over connections={CLIENTS} served={CLIENTS}"]
    )
    assert started.show("Result") == "success"
    assert started.show("NRestarts") == "0"


# The process after


@pytest.mark.parametrize(
    ("call", "goes_on"),
    [(BEFORE_IT_RECEIVES, True), (RECEIVED, False), (TAKEN, False), (BEFORE_IT_IS_READY, False)],
)
def test_a_process_that_is_killed_while_it_takes_over_is_followed_by_one_that_takes_over_what_is_left(
    started: Machine, call: Call, goes_on: bool
) -> None:
    started.drop_in("rspd.service", HELD)
    with Talks(CLIENTS) as talks:
        with restarting_held(started) as held, connect() as waiting:
            with Tracer(held, *call.kill()) as tracer:
                os.kill(held, signal.SIGCONT)
                tracer.wait()
            # Its start has failed; systemd tries again by itself.
            talk(waiting)
        if goes_on:
            talks.talk()
            assert started.log(f"^took over connections={CLIENTS}$")
        else:
            ends(talks, all_reset=call == RECEIVED)
            assert started.log("^took over connections=0$")
    assert started.show("NRestarts") == "1"


# systemd itself


@pytest.mark.parametrize("command", ["daemon-reload", "daemon-reexec"])
def test_systemd_that_reads_its_units_or_starts_itself_anew_between_restarts_keeps_listeners(
    started: Machine, command: str
) -> None:
    with Talks(CLIENTS) as talks:
        for _ in range(2):
            started.systemctl(command)
            assert stored(started) == CONTROL + 1
            started.systemctl("restart", "rspd")
            talks.talk()
            served()
        started.systemctl(command)
        talks.end()
    assert len(started.log(f"^took over connections={CLIENTS}$")) == 2


@pytest.mark.parametrize("command", ["daemon-reload", "daemon-reexec"])
@pytest.mark.parametrize("call", [STORED, SENT, COMPLETE])
def test_systemd_that_reads_its_units_or_starts_itself_anew_while_a_process_hands_over_costs_nothing(
    started: Machine, command: str, call: Call
) -> None:
    old = on_host(started, started.pid())
    with Talks(CLIENTS) as talks:
        # The tracer comes first: a restart that is quicker than it has made the call already.
        with Tracer(old, *call.stop()) as tracer, restarting(started):
            tracer.wait_for_stop()
            started.systemctl(command)
            with connect() as waiting:
                with suppress(ProcessLookupError):  # systemd sends SIGCONT, too, after SIGTERM (systemd.kill(5))
                    os.kill(old, signal.SIGCONT)
                talk(waiting)
        talks.talk()
        assert started.log(f"^took over connections={CLIENTS}$")
    assert started.show("NRestarts") == "0"
    assert [entry["MESSAGE"] for entry in started.entries() if int(entry["PRIORITY"]) < 6] == []


@pytest.mark.parametrize("command", ["daemon-reload", "daemon-reexec"])
def test_systemd_that_reads_its_units_or_starts_itself_anew_while_nobody_else_has_the_connections_costs_nothing(
    started: Machine, command: str
) -> None:
    started.drop_in("rspd.service", HELD)
    with Talks(CLIENTS) as talks:
        with restarting_held(started) as held, connect() as waiting:
            started.systemctl(command)
            os.kill(held, signal.SIGCONT)
            talk(waiting)
        talks.talk()
        assert started.log(f"^took over connections={CLIENTS}$")
    assert started.show("NRestarts") == "0"


# At work


def test_a_process_that_is_killed_at_work_is_followed_by_one_that_serves_all_who_have_come_meanwhile(
    started: Machine,
) -> None:
    for _ in range(3):
        with Talks(CLIENTS) as talks, ExitStack() as stack:
            before = started.pid()
            killed = on_host(started, before)
            os.kill(killed, signal.SIGKILL)
            eventually(lambda killed=killed: not Path(f"/proc/{killed}").exists(), "it is gone")  # type: ignore[misc]
            for client in come(started, before, stack):
                talk(client)
            ends(talks, all_reset=False)
        assert started.show("NRestarts") == "1"
        goes_on_as_ever(started)


def come(machine: Machine, before: int, stack: ExitStack) -> list[socket.socket]:
    """Clients that come until there is another process than the one before."""
    came: list[socket.socket] = []

    def another() -> bool:
        came.append(stack.enter_context(connect()))
        return machine.pid() not in (0, before)

    eventually(another, "systemd starts the next one")
    return came
