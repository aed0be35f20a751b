"""What systemd passes, and what it is told."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import Any

import pytest

from rspd.host.systemd import Notifier
from tests.manager import OWN_PID, HasFileno, launch, listen_variables, tcp_listener, unix_listener
from tests.support import PATIENCE, abstract_name, skip_for_kernel, tcp_pair

TAKE = """
import json, os
from rspd.errors import StartError
from rspd.host.systemd import take_descriptors
found = []
try:
    for name, sock in take_descriptors()[0]:
        fd = sock.fileno()
        found.append([name, fd, sock.getsockname(), os.get_inheritable(fd), os.get_blocking(fd)])
    error = None
except StartError as reason:
    error = [reason.exit_code, str(reason)]
left = sorted(name for name in os.environ if name.startswith("LISTEN_"))
print(json.dumps({"found": found, "error": error, "left": left}))
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def take(*passed: HasFileno, **env: str) -> dict[str, Any]:
    """What take_descriptors makes of this in a process of its own."""
    command, inherited = launch([sys.executable, "-c", TAKE], passed)
    done = subprocess.run(
        command, env={**os.environ, **env}, pass_fds=inherited, capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def refusal(*passed: HasFileno, **env: str) -> str:
    """Why it takes none of it, which is an error of configuration."""
    answer = take(*passed, **env)
    assert answer["found"] == []
    assert answer["error"]
    code, reason = answer["error"]
    assert code == 78
    return str(reason)


# Taking


def test_sockets_are_taken_in_their_order_with_their_names(stack: ExitStack, tmp_path: Path) -> None:
    web = stack.enter_context(tcp_listener())
    local = stack.enter_context(unix_listener(f"{tmp_path}/s"))
    both = stack.enter_context(tcp_listener("::"))
    answer = take(web, local, both, web, **listen_variables(["web", "local", "both", "web"]))
    assert answer["error"] is None
    assert [(name, fd, where) for name, fd, where, _, _ in answer["found"]] == [
        ("web", 3, list(web.getsockname())),
        ("local", 4, f"{tmp_path}/s"),
        ("both", 5, list(both.getsockname())),
        ("web", 6, list(web.getsockname())),
    ]


def test_what_was_passed_is_inherited_by_no_other_program_and_never_blocks(stack: ExitStack) -> None:
    socks = [stack.enter_context(tcp_listener()) for _ in range(2)]
    found = take(*socks, **listen_variables(["a", "b"]))["found"]
    assert [flags for _, _, _, *flags in found] == [[False, False]] * 2


def test_without_names_sockets_are_called_unknown(stack: ExitStack) -> None:
    socks = [stack.enter_context(tcp_listener()) for _ in range(2)]
    assert [name for name, *_ in take(*socks, LISTEN_PID=OWN_PID, LISTEN_FDS="2")["found"]] == ["unknown"] * 2


@pytest.mark.parametrize(
    "env",
    [
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"},
        {"LISTEN_PID": "", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "junk", "LISTEN_FDS": "junk"},
        {"LISTEN_PID": OWN_PID, "LISTEN_FDNAMES": "a"},
        {"LISTEN_PID": OWN_PID, "LISTEN_FDS": "0"},
        {"LISTEN_PID": OWN_PID, "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""},
        {},
    ],
)
def test_what_is_for_another_process_or_nothing_is_not_taken(stack: ExitStack, env: dict[str, str]) -> None:
    assert take(stack.enter_context(tcp_listener()), **env) == {"found": [], "error": None, "left": []}


def test_nobody_who_is_started_later_takes_them_for_his(stack: ExitStack) -> None:
    mine = listen_variables(["a"])
    assert take(stack.enter_context(tcp_listener()), **mine, LISTEN_PIDFDID="1")["left"] == []


@pytest.mark.parametrize("count", ["x", "-1", "1.5", "1x", "\u00b2", "\u0661", "+1", "1000000000000", "9" * 5000])
def test_a_count_that_is_no_number_is_refused(stack: ExitStack, count: str) -> None:
    reason = refusal(stack.enter_context(tcp_listener()), LISTEN_PID=OWN_PID, LISTEN_FDS=count)
    assert reason == f"LISTEN_FDS: expected how many sockets systemd passes, found {count!r}"


@pytest.mark.parametrize(("count", "names"), [("2", "a"), ("1", "a:b"), ("1", "a:")])
def test_as_many_names_as_sockets_are_expected(stack: ExitStack, count: str, names: str) -> None:
    sock = stack.enter_context(tcp_listener())
    reason = refusal(sock, LISTEN_PID=OWN_PID, LISTEN_FDS=count, LISTEN_FDNAMES=names)
    assert reason == f"LISTEN_FDNAMES: expected {count} names, as LISTEN_FDS says, found {names!r}"


# What is no listening stream socket

Make = Callable[[ExitStack, Path], HasFileno]


def bound(family: int, kind: int, where: object) -> Make:
    def make(stack: ExitStack, _: Path) -> HasFileno:
        sock = stack.enter_context(socket.socket(family, kind))
        sock.bind(where)  # type: ignore[arg-type]
        if kind == socket.SOCK_SEQPACKET:
            sock.listen()
        return sock

    return make


def connected(stack: ExitStack, _: Path) -> HasFileno:
    near, far = tcp_pair()
    stack.enter_context(near)
    return stack.enter_context(far)


def one_of_a_pair(stack: ExitStack, _: Path) -> HasFileno:
    near, far = socket.socketpair()
    stack.enter_context(near)
    return stack.enter_context(far)


def fifo(stack: ExitStack, folder: Path) -> HasFileno:
    os.mkfifo(folder / "fifo")
    return stack.enter_context(open(folder / "fifo", "r+b", buffering=0))


def file(stack: ExitStack, folder: Path) -> HasFileno:
    return stack.enter_context(open(folder / "file", "wb"))


def device(stack: ExitStack, _: Path) -> HasFileno:
    return stack.enter_context(open(os.devnull, "rb"))


class Number:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


def folder(stack: ExitStack, path: Path) -> HasFileno:
    fd = os.open(path, os.O_RDONLY)
    stack.callback(os.close, fd)
    return Number(fd)


def of_no_kind(stack: ExitStack, _: Path) -> HasFileno:
    fd = os.pidfd_open(os.getpid())
    stack.callback(os.close, fd)
    return Number(fd)


def vsock(stack: ExitStack, _: Path) -> HasFileno:
    return stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))


def sctp(stack: ExitStack, _: Path) -> HasFileno:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132))
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


LISTEN_STREAM = "use ListenStream="
FAMILIES = "use ListenStream= (AF_INET, AF_INET6, AF_UNIX)"


@pytest.mark.parametrize(
    ("make", "found", "advice"),
    [
        (bound(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)), "a datagram socket", LISTEN_STREAM),
        (bound(socket.AF_UNIX, socket.SOCK_DGRAM, ""), "a datagram socket", LISTEN_STREAM),
        (bound(socket.AF_UNIX, socket.SOCK_SEQPACKET, ""), "a sequential packet socket", LISTEN_STREAM),
        (bound(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)), "one that does not listen", "set Accept=no"),
        (connected, "one that does not listen", "set Accept=no"),
        (one_of_a_pair, "one that does not listen", "set Accept=no"),
        (bound(socket.AF_NETLINK, socket.SOCK_RAW, (0, 0)), "one of family 16", FAMILIES),
        (vsock, "one of family 40", FAMILIES),
        (sctp, "one of protocol 132", "use TCP"),
        (fifo, "a FIFO", LISTEN_STREAM),
        (file, "a file", LISTEN_STREAM),
        (device, "a device", LISTEN_STREAM),
        (folder, "a folder", LISTEN_STREAM),
        (of_no_kind, "something else", LISTEN_STREAM),
    ],
)
def test_what_is_no_listening_stream_socket_is_named_with_what_to_set(
    stack: ExitStack, tmp_path: Path, make: Make, found: str, advice: str
) -> None:
    good = stack.enter_context(tcp_listener())
    try:
        wrong = make(stack, tmp_path)
    except OSError as error:
        skip_for_kernel(f"no such socket ({error.strerror})")
    assert refusal(good, wrong, **listen_variables(["good", "wrong"])) == (
        f"socket 'wrong' (descriptor 4) from systemd: expected a listening stream socket, found {found}; "
        f"{advice} in the socket unit"
    )


def test_a_descriptor_that_is_not_open_is_named() -> None:
    reason = refusal(LISTEN_PID=OWN_PID, LISTEN_FDS="1", LISTEN_FDNAMES="a")
    expected = "socket 'a' (descriptor 3) from systemd: expected a listening stream socket, found none (Bad file descr"
    assert reason.startswith(expected)


# Telling


class Receiver:
    """A notify socket that is read when a test says so."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(name)
        self.sock.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))

    def receive(self) -> list[bytes]:
        """All there is; at least one."""
        messages = [self.sock.recv(65536)]
        self.sock.setblocking(False)
        try:
            while True:
                messages.append(self.sock.recv(65536))
        except BlockingIOError:
            self.sock.settimeout(PATIENCE)
        return messages


@pytest.fixture(params=["path", "abstract"])
def receiver(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    name = f"\0{abstract_name()}" if request.param == "abstract" else f"{tmp_path}/n"
    receiver = Receiver(name, monkeypatch)
    yield receiver
    receiver.sock.close()


@pytest.fixture
def make_notifier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Notifier]]:
    """Makes one, and sees to its socket at the end."""
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    made: list[Notifier] = []

    def make() -> Notifier:
        made.append(Notifier())
        return made[-1]

    yield make
    for notifier in made:
        if notifier._notifier and notifier._notifier.socket:
            notifier._notifier.socket.close()


MakeNotifier = Callable[[], Notifier]


def test_each_message_is_one_datagram_of_just_its_assignments(receiver: Receiver, make_notifier: MakeNotifier) -> None:
    notifier = make_notifier()
    assert notifier.active
    notifier.ready("serving")
    notifier.alive("serving 1 of 1")
    notifier.stopping("ending", 30.0)
    notifier.stopping("ending", 0)
    notifier.failed("cannot listen", 98)
    notifier.failed("cannot read", 0)
    assert receiver.receive() == [
        b"READY=1\nSTATUS=serving",
        b"WATCHDOG=1\nSTATUS=serving 1 of 1",
        b"STOPPING=1\nWATCHDOG=1\nEXTEND_TIMEOUT_USEC=30000000\nSTATUS=ending",
        b"STOPPING=1\nWATCHDOG=1\nSTATUS=ending",
        b"ERRNO=98\nSTATUS=cannot listen",
        b"STATUS=cannot read",
    ]


def test_a_reload_begins_with_the_time_of_the_monotonic_clock(receiver: Receiver, make_notifier: MakeNotifier) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    make_notifier().reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    (message,) = receiver.receive()
    fields = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", message)
    assert fields
    assert before <= int(fields[1]) <= after


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        ("gr\xfc\xdfe \u2192 \U0001f600", rb"STATUS=gr\xfc\xdfe \u2192 \U0001f600"),
        ("/run/\udcff.sock", rb"STATUS=/run/\udcff.sock"),
        ("two\nREADY=1", b"STATUS=two; READY=1"),
        ("a\r\nb\x0bc\u2028d", b"STATUS=a; b; c; d"),
        ("", b"STATUS="),
    ],
)
@pytest.mark.parametrize("receiver", ["path"], indirect=True)
def test_a_status_is_one_line_of_ascii_whatever_is_in_it(
    receiver: Receiver, make_notifier: MakeNotifier, status: str, sent: bytes
) -> None:
    make_notifier().failed(status, 0)
    assert receiver.receive() == [sent]


@pytest.mark.parametrize("receiver", ["path"], indirect=True)
def test_a_status_that_is_too_long_for_systemd_is_cut(receiver: Receiver, make_notifier: MakeNotifier) -> None:
    notifier = make_notifier()
    notifier.failed("x" * 100_000, 1)
    (message,) = receiver.receive()
    assert re.fullmatch(rb"ERRNO=1\nSTATUS=x+\.\.\.", message)
    assert 500 < len(message) < 4096  # what systemd takes (NOTIFY_BUFFER_MAX)


@pytest.mark.parametrize("value", [None, ""])
def test_where_nobody_listens_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, make_notifier: MakeNotifier, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    notifier = make_notifier()
    assert (notifier.active, notifier.interval) == (False, inf)
    notifier.ready("serving")


@pytest.mark.parametrize("where", ["/nonexistent/notify", "junk", "@rspd-nobody", "vsock:2:1234", "/" + "n" * 200])
def test_a_notify_socket_that_cannot_be_reached_does_no_harm(where: str) -> None:
    code = "from rspd.host.systemd import Notifier; n = Notifier(); n.ready('a'); n.alive('b'); print('went on')"
    env = {**os.environ, "NOTIFY_SOCKET": where}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"went on\n", b"")


@pytest.mark.parametrize("receiver", ["path"], indirect=True)
def test_a_receiver_that_has_gone_does_no_harm(receiver: Receiver, make_notifier: MakeNotifier) -> None:
    notifier = make_notifier()
    receiver.sock.close()
    notifier.alive("serving")
    notifier.stopping("ending", 1.0)


@pytest.mark.parametrize("receiver", ["path"], indirect=True)
def test_a_full_queue_is_waited_for_at_the_end_only_and_a_change_of_state_is_told_when_there_is_room(
    receiver: Receiver, make_notifier: MakeNotifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rspd.host.systemd.PATIENCE", 0.2)
    notifier = make_notifier()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
        filler.setblocking(False)
        filler.connect(receiver.sock.getsockname())
        with pytest.raises(BlockingIOError):
            while True:
                filler.send(b"x")

    def seconds(tell: Callable[..., None], *arguments: object) -> float:
        begun = time.monotonic()
        tell(*arguments)
        return time.monotonic() - begun

    assert 0.2 <= seconds(notifier.failed, "lost", 0) < 5
    assert seconds(notifier.stopping, "lost", 1.0) < 0.2
    assert not notifier.pending
    assert seconds(notifier.reloading) < 0.2
    assert notifier.pending
    assert seconds(notifier.ready, "late") < 0.2
    assert seconds(notifier.alive, "lost") < 0.2
    assert notifier.pending
    assert set(receiver.receive()) == {b"x"}
    notifier.alive("heard")
    reloading, *others = receiver.receive()
    assert reloading.startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert others == [b"READY=1\nSTATUS=late", b"WATCHDOG=1\nSTATUS=heard"]
    assert not notifier.pending


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        ("30000000", None, 10.0),
        ("30000000", "mine", 10.0),
        ("1500", "mine", 0.0005),
        ("30000000", "1", inf),
        ("30000000", "", inf),
        ("30000000", "junk", inf),
        ("0", "mine", inf),
        ("", "mine", inf),
        ("-5", "mine", inf),
        ("1e6", "mine", inf),
        ("\u0663", "mine", inf),
        (str(2**64 - 1), "mine", inf),
        ("9" * 25, "mine", inf),
        ("9" * 400, "mine", inf),
        ("9" * 5000, "mine", inf),
        (None, "mine", inf),
    ],
)
@pytest.mark.parametrize("receiver", ["path"], indirect=True)
@pytest.mark.usefixtures("receiver")
def test_a_watchdog_is_told_three_times_as_often_as_it_wants_to_be(
    make_notifier: MakeNotifier, monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, interval: float
) -> None:
    if usec is not None:
        monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "mine" else pid)
    assert make_notifier().interval == pytest.approx(interval)
