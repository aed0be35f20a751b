"""The process and its signals: draining, ending at once, and what is left behind."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.namespaces import SILENT_DNS, in_namespace, silent_name_server
from tests.support import (
    PATIENCE,
    Backend,
    Daemon,
    answer,
    drop_capabilities,
    echo,
    eventually,
    free_port,
    full_tcp,
    is_reset,
    receive_all,
    reset,
    rspd,
)

ENDING = [signal.SIGTERM, signal.SIGINT]


def config(folder: Path, text: str) -> tuple[str, str]:
    """Options for a file with this text."""
    path = folder / "rspd.yaml"
    path.write_text(text)
    return "-c", str(path)


def talk(sock: socket.socket, message: bytes = b"hello") -> None:
    """Say something to an echo and hear it."""
    sock.sendall(message)
    heard = b""
    while len(heard) < len(message):
        data = sock.recv(65536)
        assert data, f"ended after {heard!r}"
        heard += data
    assert heard == message


def refused(daemon: Daemon) -> bool:
    try:
        daemon.connect().close()
    except ConnectionRefusedError:
        return True
    return False


@contextmanager
def full_unix() -> Iterator[tuple[socket.socket, str]]:
    """A unix listener without room for another client until one is accepted, and its address."""
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind("")
        listener.listen(0)
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(listener.getsockname()) == errno.EAGAIN:
                break
        listener.settimeout(PATIENCE)
        yield listener, "@" + listener.getsockname()[1:].decode()


def dialling(daemon: Daemon) -> bool:
    """Whether a client was accepted and a backend's socket opened for it (those besides loop and listener)."""
    return sum(name.startswith("socket:") for name in daemon.descriptors()) >= 5


def is_closed_to(sock: socket.socket) -> bool:
    """Whether the peer takes nothing more; sends until it is so."""

    def closed() -> bool:
        try:
            sock.sendall(b".")
        except ConnectionError:
            return True
        return False

    return eventually(closed)


# Draining


@pytest.mark.parametrize("number", ENDING)
def test_without_connections_it_ends_at_once_with_0(number: signal.Signals) -> None:
    with rspd("-b", "127.0.0.1:9") as daemon:
        start = time.monotonic()
        daemon.signal(number)
        assert daemon.wait() == 0
        assert time.monotonic() - start < 5
        assert len(daemon.find("ending connections=0 drain_timeout=30")) == 1
        assert daemon.lines[-1].endswith("ended served=0")


@pytest.mark.parametrize("number", ENDING)
def test_while_draining_open_connections_go_on_and_new_ones_are_refused(number: signal.Signals) -> None:
    with Backend(echo) as backend, rspd("-b", backend.address, "--max-connections", "4") as daemon:
        with daemon.connect() as one, daemon.connect() as two:
            talk(one)
            talk(two)
            daemon.signal(number)
            daemon.wait_for("ending connections=2")
            assert refused(daemon)
            talk(one, b"still here")
            one.shutdown(socket.SHUT_WR)
            assert receive_all(one) == b""
            daemon.wait_for_ends(1)
            talk(two, b"me too")
            assert daemon.process.poll() is None
        assert daemon.wait() == 0
        assert [end["cause"] for end in daemon.wait_for_ends(2)] == ["client-closed"] * 2
        assert daemon.lines[-1].endswith("ended served=2")


def test_a_client_that_waits_in_the_backlog_is_reset_when_draining_begins() -> None:
    with Backend(echo) as backend, rspd("-b", backend.address) as daemon:
        with daemon.connect() as served, daemon.connect() as waiting, daemon.connect() as other:
            talk(served)
            daemon.signal(signal.SIGTERM)
            assert is_reset(waiting)
            assert is_reset(other)
            daemon.wait_for("INFO +ending connections=1 waiting=2 drain_timeout=30$")
            talk(served)
        assert daemon.wait() == 0
        assert daemon.lines[-1].endswith("ended served=1")
        assert backend.accepted == 1


def test_a_download_that_is_under_way_arrives_whole() -> None:
    data = random.Random(1).randbytes(1 << 20) * 24
    go_on = threading.Event()

    def send(sock: socket.socket) -> None:
        sock.sendall(data[:100])
        go_on.wait(PATIENCE)
        sock.sendall(data[100:])

    with Backend(send) as backend, rspd("-b", backend.address) as daemon, daemon.connect() as client:
        start = client.recv(100, socket.MSG_WAITALL)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("ending connections=1")
        go_on.set()
        rest = receive_all(client)
        assert hashlib.sha256(start + rest).digest() == hashlib.sha256(data).digest()
        client.close()
        assert daemon.wait() == 0
        assert daemon.wait_for_ends(1)[0]["received"] == str(len(data))
        assert not backend.errors


def test_an_upload_that_is_under_way_arrives_whole() -> None:
    data = random.Random(2).randbytes(1 << 20) * 24
    heard = hashlib.sha256()

    def hear(sock: socket.socket) -> None:
        while part := sock.recv(1 << 20):
            heard.update(part)
        sock.sendall(heard.digest())

    with Backend(hear) as backend, rspd("-b", backend.address) as daemon, daemon.connect() as client:
        client.sendall(data[: 1 << 22])
        daemon.signal(signal.SIGINT)
        daemon.wait_for("ending connections=1")
        client.sendall(data[1 << 22 :])
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == hashlib.sha256(data).digest()
        assert daemon.wait() == 0
        assert not backend.errors


@pytest.mark.parametrize("half_closed", [False, True])
def test_what_is_open_after_the_drain_timeout_is_aborted_on_both_sides(tmp_path: Path, half_closed: bool) -> None:
    seen: list[bool] = []

    def handle(sock: socket.socket) -> None:
        sock.sendall(sock.recv(5))
        if half_closed:
            assert sock.recv(1) == b""
            sock.sendall(b"half")
            seen.append(is_closed_to(sock))
        else:
            seen.append(is_reset(sock))

    options = config(tmp_path, "drain_timeout: 200ms")
    with Backend(handle) as backend, rspd("-b", backend.address, *options) as daemon, daemon.connect() as client:
        talk(client)
        if half_closed:
            client.shutdown(socket.SHUT_WR)
            assert client.recv(4, socket.MSG_WAITALL) == b"half"
        start = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert is_reset(client)
        assert 0.2 <= time.monotonic() - start < 5
        assert daemon.wait() == 0
        assert daemon.find("ending connections=1 drain_timeout=0.2")
        assert [end["cause"] for end in daemon.wait_for_ends(1)] == ["drain-timeout"]
        eventually(lambda: seen)
        assert seen == [True]


@pytest.mark.parametrize("second", ENDING)
@pytest.mark.parametrize("first", ENDING)
def test_the_second_signal_ends_at_once_with_0(first: signal.Signals, second: signal.Signals) -> None:
    with Backend(echo) as backend, rspd("-b", backend.address, "--max-connections", "2") as daemon:
        with daemon.connect() as one, daemon.connect() as two:
            talk(one)
            talk(two)
            daemon.signal(first)
            daemon.wait_for("ending connections=2")
            start = time.monotonic()
            daemon.signal(second)
            assert is_reset(one)
            assert is_reset(two)
            assert daemon.wait() == 0
            assert time.monotonic() - start < 5
        assert [end["cause"] for end in daemon.wait_for_ends(2)] == ["drain-timeout"] * 2


def test_sighup_while_draining_changes_nothing(tmp_path: Path) -> None:
    listen = f"listen: {tmp_path}/socket"
    with Backend(echo) as backend, rspd("-b", backend.address, *config(tmp_path, listen), listen=()) as daemon:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/socket")
            talk(client)
            daemon.signal(signal.SIGTERM)
            daemon.wait_for("ending connections=1")
            daemon.signal(signal.SIGHUP)
            talk(client)
            assert not os.path.exists(f"{tmp_path}/socket")
        assert daemon.wait() == 0
        assert not daemon.find("reload")


# Many signals


def bombard(daemon: Daemon, numbers: list[signal.Signals]) -> int:
    """Send signals until the process has ended; its exit code."""
    deadline = time.monotonic() + PATIENCE
    while daemon.process.poll() is None:
        assert time.monotonic() < deadline, daemon.log
        for number in numbers:
            try:
                os.kill(daemon.pid, number)
            except ProcessLookupError:
                break
    return daemon.wait()


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]],
    ids=["SIGTERM", "SIGINT", "mixed"],
)
def test_a_storm_of_signals_to_end_ends_it_with_0_and_nothing_in_the_log_but_that(
    tmp_path: Path, numbers: list[signal.Signals]
) -> None:
    path = f"{tmp_path}/socket"
    with Backend(echo) as backend, rspd("-b", backend.address, listen=["127.0.0.1:0", path]) as daemon:
        with daemon.connect() as client:
            talk(client)
            assert bombard(daemon, numbers) == 0
            assert is_reset(client)
        assert not os.path.exists(path)
        assert [end["cause"] for end in daemon.wait_for_ends(1)] == ["drain-timeout"]
        assert daemon.lines[-1].endswith("ended served=1")


def test_a_storm_of_sighup_harms_no_connection() -> None:
    with Backend(echo) as backend, rspd("-b", backend.address) as daemon, daemon.connect() as client:
        for number in range(2000):
            daemon.signal(signal.SIGHUP)
            if number % 20 == 0:
                talk(client, b"%d" % number)
        talk(client)
        daemon.wait_for("nothing to reload")


def test_a_signal_to_end_is_heard_after_however_many_others(tmp_path: Path) -> None:
    text = "listen: 127.0.0.1:0\nbackend: 127.0.0.1:9\n"
    options = config(tmp_path, text)
    path, pipe = tmp_path / "rspd.yaml", tmp_path / "pipe"
    os.mkfifo(pipe)

    def open_for_writing() -> int | None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return None  # rspd has not opened it yet

    with rspd(*options, listen=()) as daemon:
        # A reload that takes until the pipe is written to.
        path.unlink()
        path.symlink_to(pipe)
        daemon.signal(signal.SIGHUP)
        writer = eventually(open_for_writing)
        assert writer is not None
        path.unlink()
        config(tmp_path, text)
        for _ in range(5000):
            daemon.signal(signal.SIGHUP)
        daemon.signal(signal.SIGTERM)
        os.write(writer, text.encode())
        os.close(writer)
        try:
            daemon.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"SIGTERM was not heard:\n{daemon.log}")
        assert daemon.wait() == 0


def test_signals_that_ask_nothing_of_it_do_nothing() -> None:
    with Backend(echo) as backend, rspd("-b", backend.address) as daemon, daemon.connect() as client:
        for number in (signal.SIGPIPE, signal.SIGWINCH, signal.SIGCHLD, signal.SIGURG, signal.SIGCONT):
            talk(client)
            daemon.signal(number)
            talk(client)
        assert not daemon.find("ending|reload")


def test_stopped_and_continued_it_goes_on() -> None:
    with Backend(echo) as backend, rspd("-b", backend.address) as daemon, daemon.connect() as client:
        talk(client)
        daemon.signal(signal.SIGSTOP)
        client.sendall(b"later")
        daemon.signal(signal.SIGCONT)
        assert client.recv(5, socket.MSG_WAITALL) == b"later"


# While a backend is dialled


def test_a_connection_that_is_being_dialled_is_drained_too() -> None:
    with full_unix() as (listener, address), rspd("-b", address) as daemon, daemon.connect() as client:
        client.sendall(b"request")
        eventually(lambda: dialling(daemon))
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("ending connections=1")
        listener.accept()[0].close()
        backend, _ = listener.accept()
        with backend:
            backend.settimeout(PATIENCE)
            assert backend.recv(100) == b"request"
            backend.sendall(b"answer")
        assert receive_all(client) == b"answer"
        client.close()
        assert daemon.wait() == 0
        assert daemon.wait_for_ends(1)[0]["received"] == "6"


@pytest.mark.parametrize(
    ("timeouts", "cause"),
    [("connect_timeout: 2s", "connect-timeout"), ("drain_timeout: 300ms", "drain-timeout")],
)
def test_dialling_ends_at_its_timeout_or_at_that_of_draining(tmp_path: Path, timeouts: str, cause: str) -> None:
    with full_tcp() as address, rspd("-b", address, *config(tmp_path, timeouts)) as daemon, daemon.connect() as client:
        eventually(lambda: dialling(daemon))
        daemon.signal(signal.SIGTERM)
        assert receive_all(client) == b""
        assert daemon.wait() == 0
        assert [end["cause"] for end in daemon.wait_for_ends(1)] == [cause]


def test_the_second_signal_ends_dialling_at_once() -> None:
    with full_tcp() as address, rspd("-b", address) as daemon, daemon.connect() as client:
        eventually(lambda: dialling(daemon))
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("ending connections=1")
        daemon.signal(signal.SIGTERM)
        # By itself, dialling would end for another cause, and draining later than anybody waits here.
        assert receive_all(client) == b""
        assert daemon.wait() == 0
        assert [end["cause"] for end in daemon.wait_for_ends(1)] == ["drain-timeout"]


def end_while_a_reload_waits_for_a_name(folder: str, signals: str) -> None:
    """Print the exit code, and the seconds from the first of so many signals to the end."""
    options = config(Path(folder), "backend: 127.0.0.1:9\nlisten: 127.0.0.1:0\nconnect_timeout: 5s")
    with silent_name_server() as server, rspd(*options, listen=()) as daemon:
        config(Path(folder), "backend: 127.0.0.1:9\nlisten: slow.example:80\nconnect_timeout: 5s")
        daemon.signal(signal.SIGHUP)
        server.recv(1000)
        start = time.monotonic()
        daemon.signal(signal.SIGTERM)
        if signals == "2":
            daemon.signal(signal.SIGINT)
        print(daemon.wait())
        print(time.monotonic() - start)


@pytest.mark.parametrize("signals", ["1", "2"])
def test_a_reload_that_waits_for_a_name_does_not_delay_the_end(tmp_path: Path, signals: str) -> None:
    code, seconds = in_namespace(end_while_a_reload_waits_for_a_name, str(tmp_path), signals, prepare=SILENT_DNS)
    assert code == "0"
    assert float(seconds) < 4  # the lookup would take 5


# What is left behind


@pytest.mark.parametrize("number", ENDING)
def test_its_socket_file_is_removed_when_draining_begins(tmp_path: Path, number: signal.Signals) -> None:
    path = f"{tmp_path}/socket"
    with Backend(echo) as backend, rspd("-b", backend.address, listen=[path]) as daemon:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            talk(client)
            daemon.signal(number)
            daemon.wait_for("ending connections=1")
            assert not os.path.exists(path)
            talk(client)
        assert daemon.wait() == 0


def replaced_by_a_listener(path: Path) -> socket.socket:
    path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def replaced_by_a_file(path: Path) -> None:
    path.unlink()
    path.write_text("mine")


def replaced_by_a_link_to_it(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def replaced_by_rename(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path) + ".new")
    os.replace(str(path) + ".new", path)
    return listener


@pytest.mark.parametrize(
    "replace", [replaced_by_a_listener, replaced_by_a_file, replaced_by_a_link_to_it, replaced_by_rename]
)
def test_what_somebody_else_put_in_place_of_the_socket_file_stays(
    tmp_path: Path, replace: Callable[[Path], socket.socket | None]
) -> None:
    path = tmp_path / "socket"
    with rspd("-b", "127.0.0.1:9", listen=[str(path)]) as daemon:
        theirs = replace(path)
        before = path.lstat()
        assert daemon.stop() == 0
        after = path.lstat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        if theirs:
            theirs.close()


def test_a_socket_file_that_is_gone_already_is_nothing_to_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "socket"
    path.parent.mkdir()
    with rspd("-b", "127.0.0.1:9", listen=[str(path)]) as daemon:
        path.unlink()
        path.parent.rmdir()
        assert daemon.stop() == 0


def started_without_root_rights(*arguments: str) -> Daemon:
    """rspd, which as root too may write in no folder whose mode says so."""
    started: list[Daemon] = []

    def start() -> None:
        drop_capabilities()  # of this thread only, and of what it starts
        started.append(Daemon(*arguments))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(PATIENCE)
    return started[0]


def test_it_drains_also_where_the_socket_file_cannot_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "socket"
    path.parent.mkdir()
    with Backend(echo) as backend, socket.socket(socket.AF_UNIX) as client:
        daemon = started_without_root_rights("-b", backend.address, "-l", str(path))
        try:
            client.connect(str(path))
            talk(client)
            path.parent.chmod(0o500)
            daemon.signal(signal.SIGTERM)
            daemon.wait_for("ending connections=1")
            talk(client)
            client.close()
            assert daemon.wait() == 0
            assert "Traceback" not in daemon.log
        finally:
            path.parent.chmod(0o700)
            daemon.kill()


def test_the_address_can_be_listened_on_again_at_once() -> None:
    with Backend(answer) as backend:
        listen = [f"127.0.0.1:{free_port()}"]
        with rspd("-b", backend.address, listen=listen) as daemon:
            with daemon.connect() as client:
                client.sendall(b"?")
                assert receive_all(client) == b"ok"
            assert daemon.stop() == 0
        with rspd("-b", backend.address, listen=listen) as successor:
            with successor.connect() as client:
                client.sendall(b"?")
                assert receive_all(client) == b"ok"


def test_a_successor_can_listen_while_the_predecessor_drains() -> None:
    listen = [f"127.0.0.1:{free_port()}"]
    with Backend(echo) as backend, rspd("-b", backend.address, listen=listen) as daemon:
        with daemon.connect() as client:
            talk(client)
            daemon.signal(signal.SIGTERM)
            daemon.wait_for("ending connections=1")
            with rspd("-b", backend.address, listen=listen) as successor, successor.connect() as second:
                talk(second)
                talk(client)
        assert daemon.wait() == 0


def test_a_client_that_aborts_while_draining_ends_the_draining() -> None:
    with Backend(echo) as backend, rspd("-b", backend.address) as daemon:
        client = daemon.connect()
        talk(client)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("ending connections=1")
        reset(client)
        assert daemon.wait() == 0
        assert [end["cause"] for end in daemon.wait_for_ends(1)] == ["client-aborted"]
