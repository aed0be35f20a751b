"""Ending when idle, and the next process on the same socket: nobody is lost between the two."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon.test_activation import ask, client_of, reload
from tests.manager import launch, service, tcp_listener
from tests.support import PATIENCE, Backend, answer, echo, eventually, receive_all


@pytest.fixture
def web() -> Iterator[socket.socket]:
    """A listening socket as systemd keeps it. At its address is nobody else: other tests' clients may come late."""
    with tcp_listener("127.0.0.43") as sock:
        yield sock


def test_it_ends_with_0_when_nobody_has_come_for_so_long(web: socket.socket) -> None:
    begun = time.monotonic()
    with service("-b", "192.0.2.1:80", "--exit-idle-time", "1s", sockets={"web": web}) as daemon:
        assert daemon.wait() == 0
        assert time.monotonic() - begun >= 1
        assert daemon.find("idle seconds=1$")
        assert daemon.find("ending connections=0")
        assert daemon.find("ended served=0$"), daemon.log
        daemon.notify.wait_for("STOPPING=1")


def test_it_does_not_end_while_a_connection_is_open_and_the_time_begins_anew_after_it(web: socket.socket) -> None:
    with Backend(echo) as backend, client_of(web) as client:  # it is there before rspd
        with service("-b", backend.address, "--exit-idle-time", "500ms", sockets={"web": web}) as daemon:
            client.sendall(b"a")
            assert client.recv(1) == b"a"
            with pytest.raises(subprocess.TimeoutExpired):
                daemon.process.wait(1.2)
            client.sendall(b"b")
            assert client.recv(1) == b"b"
            closed = time.monotonic()
            client.close()
            assert daemon.wait() == 0
            assert time.monotonic() - closed >= 0.5
            assert daemon.find("ended served=1$")


def test_each_connection_begins_the_time_anew(web: socket.socket) -> None:
    with Backend(answer) as backend:
        with service("-b", backend.address, "--exit-idle-time", "2s", sockets={"web": web}) as daemon:
            for _ in range(3):
                last = time.monotonic()
                ask(web)
                with pytest.raises(subprocess.TimeoutExpired):
                    daemon.process.wait(0.4)
            assert daemon.wait() == 0
            assert time.monotonic() - last >= 2
            assert daemon.find("ended served=3$")


def test_the_time_is_a_key_of_the_file_which_a_reload_sets_and_clears(web: socket.socket, tmp_path: Path) -> None:
    file = tmp_path / "rspd.yaml"
    with Backend(echo) as backend:
        file.write_text(f"backend: {backend.address}\nexit_idle_time: 500ms\n")
        with client_of(web) as client, service("-c", str(file), sockets={"web": web}) as daemon:
            client.sendall(b"a")
            assert client.recv(1) == b"a"
            reload(daemon, file, f"backend: {backend.address}\n")
            client.close()
            with pytest.raises(subprocess.TimeoutExpired):
                daemon.process.wait(1.0)
            reload(daemon, file, f"backend: {backend.address}\nexit_idle_time: 100ms\n")
            assert daemon.wait() == 0
            assert daemon.find("idle seconds=0.1$")


def test_it_warns_of_a_socket_of_its_own_that_nobody_starts_it_again_for(web: socket.socket, tmp_path: Path) -> None:
    words = ["-b", "192.0.2.1:80", "--exit-idle-time", "1s"]
    warning = f"exit_idle_time ends rspd, and nobody starts it again for {tmp_path}/s$"
    with service(*words, listen=[f"{tmp_path}/s"]) as daemon:
        assert daemon.wait() == 0
        assert len(daemon.find(warning)) == 1
    with service(*words, listen=["fd://web", f"{tmp_path}/s"], sockets={"web": web}) as daemon:
        assert daemon.wait() == 0
        assert daemon.find("exit_idle_time") == daemon.find(warning) != []


def test_it_warns_of_a_time_so_short_that_systemd_gives_up(web: socket.socket) -> None:
    with service("-b", "192.0.2.1:80", "--exit-idle-time", "999ms", sockets={"web": web}) as daemon:
        daemon.wait_for("WARNING exit_idle_time is below 1 s: systemd gives up what it starts so often")


def test_with_a_passed_socket_there_is_nothing_to_warn_of(web: socket.socket) -> None:
    with service("-b", "192.0.2.1:80", "--exit-idle-time", "1s", sockets={"web": web}, wait=False) as daemon:
        assert daemon.wait() == 0
        assert not daemon.find("exit_idle_time")


def test_a_signal_ends_it_before_the_time(web: socket.socket) -> None:
    with service("-b", "192.0.2.1:80", "--exit-idle-time", "1h", sockets={"web": web}) as daemon:
        assert daemon.stop() == 0
        assert not daemon.find("idle seconds")


# As a socket unit does it: whenever a client waits and no service runs, the next is started. Forked, to be quick.
ACTIVATE = """
import os, select, sys
from rspd.cli import main
waiting = select.poll()
waiting.register(3, select.POLLIN)
while True:
    waiting.poll()
    pid = os.fork()
    if not pid:
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="web")
        sys.exit(main(sys.argv[1:]))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Activator:
    """A socket unit and its service. `log` and `codes` are what was said and how each service ended."""

    def __init__(self, sock: socket.socket, *arguments: str) -> None:
        command, inherited = launch([sys.executable, "-c", ACTIVATE, *arguments], [sock])
        self.process = subprocess.Popen(
            command, pass_fds=inherited, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        self.codes: list[str] = []
        assert self.process.stdout
        assert self.process.stderr
        readers = ((self.process.stdout, self.codes), (self.process.stderr, self.log))
        self._threads = [threading.Thread(target=lines.extend, args=(stream,)) for stream, lines in readers]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)  # a service that still runs ends soon, and its log with it
        assert self.process.stdout
        assert self.process.stderr
        self.process.stdout.close()
        self.process.stderr.close()


@contextmanager
def activated(sock: socket.socket, *arguments: str) -> Iterator[Activator]:
    activator = Activator(sock, *arguments)
    try:
        yield activator
    finally:
        activator.close()


def test_nobody_who_comes_when_it_ends_idle_is_lost(web: socket.socket) -> None:
    """Clients from 5 ms before the moment of the exit to 10 ms after it, each in its turn."""
    idle, clients = 0.05, 60
    words = ["--foreground", "--exit-idle-time", f"{idle * 1000:g}ms"]
    with Backend(answer) as backend, activated(web, *words, "-b", backend.address) as activator:
        for number in range(clients):
            with client_of(web) as client:
                client.sendall(b"?")
                assert receive_all(client) == b"ok"
                ended = time.monotonic()
            comes = ended + idle + (number % 16 - 5) / 1000
            while time.monotonic() < comes:
                time.sleep(0.0005)

        def all_is_told() -> bool:
            log = "".join(activator.log)
            return log.count("connection closed") == clients and log.count("ended served=") == len(activator.codes)

        eventually(all_is_told, "all connections in the log, and the code of each process that has ended")
    log = "".join(activator.log)
    assert log.count("cause=backend-closed") == clients
    assert "Traceback" not in log
    assert set(activator.codes) == {"0\n"}
    # That some came before the exit and some after it is what makes this a test of the moment between.
    assert clients / 10 < len(activator.codes) < clients


def test_whoever_comes_at_the_very_moment_it_decides_to_end_is_served_by_it_or_the_next(web: socket.socket) -> None:
    with Backend(answer) as backend:
        with service("-b", backend.address, "--exit-idle-time", "2s", sockets={"web": web}) as first:
            first.signal(signal.SIGSTOP)
            client = client_of(web)
            client.sendall(b"?")
            client.shutdown(socket.SHUT_WR)
            assert select.select([web], [], [], PATIENCE)[0] == [web]
            time.sleep(2.1)  # it is to wake up with its time over and a client waiting
            first.signal(signal.SIGCONT)
            assert first.wait() == 0
        with client, service("-b", backend.address, sockets={"web": web}):
            assert receive_all(client) == b"ok"
