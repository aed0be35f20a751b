"""The process and SIGHUP: what a new configuration changes and leaves alone, and that an invalid one does nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import (
    PATIENCE,
    Backend,
    Daemon,
    echo,
    eventually,
    free_port,
    is_reset,
    receive_all,
    rspd,
)


class File:
    """A configuration file, with keys that stay unless they are set anew (or dropped, by None)."""

    def __init__(self, folder: Path, **keys: object) -> None:
        self.path = folder / "rspd.yaml"
        self.keys: dict[str, object] = {}
        self.write(**keys)

    def write(self, **keys: object) -> None:
        self.keys = {key: value for key, value in {**self.keys, **keys}.items() if value is not None}
        # In one step, since rspd may be reading it.
        new = self.path.with_suffix(".new")
        new.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in self.keys.items()))
        os.replace(new, self.path)

    def addresses(self) -> list[object]:
        """Where it says to listen."""
        listen = self.keys["listen"]
        return listen if isinstance(listen, list) else [listen]

    def reload(self, daemon: Daemon, **keys: object) -> None:
        """Write the file, have it read, and wait until it is in force."""
        self.write(**keys)
        count = len(daemon.find("reloaded"))
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("reloaded", count + 1)

    @contextmanager
    def rspd(self, *arguments: str, limit: tuple[int, int] | None = None) -> Iterator[Daemon]:
        with rspd("-c", str(self.path), *arguments, listen=(), limit=limit) as daemon:
            yield daemon


def fail_to_reload(daemon: Daemon) -> list[str]:
    """Have the file read; the reasons for which it is not taken."""
    before = len(daemon.find("reload failed"))
    daemon.signal(signal.SIGHUP)
    lines = daemon.wait_for("reload failed, nothing has changed: ", before + 1)[before:]
    assert all(" ERROR " in line for line in lines)
    return [line.partition("nothing has changed: ")[2] for line in lines]


def says(name: bytes) -> Callable[[socket.socket], object]:
    """A handler that tells its name, and then sends everything back."""

    def handle(sock: socket.socket) -> None:
        sock.sendall(name)
        echo(sock)

    return handle


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part, f"ended after {data!r}"
        data += part
    return data


def talk(sock: socket.socket, message: bytes = b"hello") -> None:
    sock.sendall(message)
    assert receive(sock, len(message)) == message


def who_answers(daemon: Daemon) -> bytes:
    """The name that the backend of a new client tells."""
    with daemon.connect() as client:
        client.shutdown(socket.SHUT_WR)
        return receive_all(client)


def connect(address: str) -> socket.socket:
    """A client of an address as rspd writes it."""
    if address.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(address)
        return sock
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), PATIENCE)


def listens(address: str) -> bool:
    try:
        connect(address).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    return True


# What changes


def test_new_clients_get_the_new_backends_and_open_connections_keep_theirs(tmp_path: Path) -> None:
    with Backend(says(b"one")) as one, Backend(says(b"two")) as two:
        file = File(tmp_path, listen="127.0.0.1:0", backend=one.address, max_connections=4)
        with file.rspd() as daemon, daemon.connect() as client:
            assert receive(client, 3) == b"one"
            file.reload(daemon, backend=two.address)
            assert who_answers(daemon) == b"two"
            talk(client)
            file.reload(daemon, backend=None, backends=[one.address, two.address])
            assert sorted(who_answers(daemon) for _ in range(4)) == [b"one", b"one", b"two", b"two"]
            talk(client)


def test_the_turn_of_the_backends_goes_on_where_a_reload_leaves_them_as_they_are(tmp_path: Path) -> None:
    with Backend(says(b"one")) as one, Backend(says(b"two")) as two:
        file = File(tmp_path, listen="127.0.0.1:0", backends=[one.address, two.address])
        with file.rspd() as daemon:
            assert who_answers(daemon) == b"one"
            file.reload(daemon, idle_timeout="10s")
            assert who_answers(daemon) == b"two"


def test_the_command_line_still_wins_over_the_file(tmp_path: Path) -> None:
    with Backend(says(b"one")) as one, Backend(says(b"two")) as two:
        file = File(tmp_path, listen="127.0.0.1:0", backend=two.address)
        with file.rspd("-b", one.address) as daemon:
            file.reload(daemon, idle_timeout="10s", backend="127.0.0.1:1")
            assert who_answers(daemon) == b"one"


def test_a_new_idle_timeout_is_for_new_connections(tmp_path: Path) -> None:
    with Backend(echo) as backend:
        file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address, max_connections=2)
        with file.rspd() as daemon, daemon.connect() as before:
            talk(before)
            file.reload(daemon, idle_timeout="1s")
            with daemon.connect() as after:
                talk(after)
                assert is_reset(after)
            assert daemon.wait_for_ends(1)[0]["cause"] == "idle-timeout"
            talk(before)


def test_a_new_half_close_timeout_is_for_new_connections(tmp_path: Path) -> None:
    done = threading.Event()
    with Backend(lambda sock: done.wait(PATIENCE)) as backend:
        file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address)
        with file.rspd() as daemon:
            file.reload(daemon, half_close_timeout="100ms")
            with daemon.connect() as client:
                client.shutdown(socket.SHUT_WR)
                assert is_reset(client)
            assert daemon.wait_for_ends(1)[0]["cause"] == "half-close-timeout"
            done.set()


def test_half_close_off_and_on_again_is_for_new_connections(tmp_path: Path) -> None:
    """Each connection keeps the terms that it began with, over two reloads."""
    ended = threading.Event()

    def hears_the_end(sock: socket.socket) -> None:
        """Say something, and once more after the client's end and `ended`."""
        sock.sendall(b"hello")
        assert sock.recv(1) == b""
        ended.wait(PATIENCE)
        sock.sendall(b"late")

    with Backend(hears_the_end) as backend:
        file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address, max_connections=3)
        with file.rspd() as daemon, daemon.connect() as first:
            assert receive(first, 5) == b"hello"
            file.reload(daemon, half_close="off")
            with daemon.connect() as second:
                assert receive(second, 5) == b"hello"
                file.reload(daemon, half_close="on")
                with daemon.connect() as third:
                    assert receive(third, 5) == b"hello"
                    for client in (first, second, third):
                        client.shutdown(socket.SHUT_WR)
                    assert receive_all(second) == b""
                    (end,) = daemon.wait_for_ends(1)
                    assert (end["received"], end["cause"]) == ("5", "client-closed")
                    ended.set()
                    assert receive_all(first) == receive_all(third) == b"late"
            daemon.wait_for_ends(3)


def test_a_new_connect_timeout_is_in_force_for_the_next_client(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        where = listener.getsockname()
        with socket.create_connection(where):
            file = File(tmp_path, listen="127.0.0.1:0", backend=f"127.0.0.1:{where[1]}")
            with file.rspd() as daemon:
                file.reload(daemon, connect_timeout="100ms")
                start = time.monotonic()
                assert who_answers(daemon) == b""
                assert 0.1 <= time.monotonic() - start < 3
                assert daemon.wait_for_ends(1)[0]["cause"] == "connect-timeout"


def test_a_new_drain_timeout_is_for_all(tmp_path: Path) -> None:
    with Backend(echo) as backend:
        file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address)
        with file.rspd() as daemon, daemon.connect() as client:
            talk(client)
            file.reload(daemon, drain_timeout="100ms")
            daemon.signal(signal.SIGTERM)
            assert is_reset(client)
            assert daemon.wait() == 0
            assert daemon.find("ending connections=1 drain_timeout=0.1")


def test_a_larger_max_connections_lets_those_in_who_wait(tmp_path: Path) -> None:
    with Backend(says(b"!")) as backend:
        file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address)
        with file.rspd() as daemon, daemon.connect() as one, daemon.connect() as two, daemon.connect() as three:
            assert receive(one, 1) == b"!"
            file.reload(daemon, max_connections=2)
            assert receive(two, 1) == b"!"
            file.reload(daemon, max_connections=3)
            assert receive(three, 1) == b"!"
            for client in (one, two, three):
                talk(client)


def test_a_smaller_max_connections_ends_nobody_and_lets_nobody_in_until_so_many_have_left(tmp_path: Path) -> None:
    with Backend(says(b"!")) as backend:
        file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address, max_connections=3)
        with file.rspd() as daemon:
            clients = [daemon.connect() for _ in range(3)]
            for client in clients:
                assert receive(client, 1) == b"!"
            file.reload(daemon, max_connections=1)
            with daemon.connect() as waiting:
                for left, client in enumerate(clients, 1):
                    talk(client)
                    # The round trip above went through rspd's loop, so it would have been let in by now.
                    assert backend.accepted == 3
                    client.close()
                    daemon.wait_for_ends(left)
                assert receive(waiting, 1) == b"!"


def test_the_log_level_changes_both_ways(tmp_path: Path) -> None:
    with Backend(says(b"one")) as one, Backend(says(b"two")) as two:
        file = File(tmp_path, listen="127.0.0.1:0", backend=one.address)
        with file.rspd() as daemon:
            assert who_answers(daemon) == b"one"
            daemon.wait_for_ends(1)
            file.write(backend=two.address, log_level="warning")
            daemon.signal(signal.SIGHUP)
            eventually(lambda: who_answers(daemon) == b"two")
            assert who_answers(daemon) == b"two"
            file.write(backend="127.0.0.1:1")
            daemon.signal(signal.SIGHUP)
            eventually(lambda: who_answers(daemon) == b"")
            daemon.wait_for("WARNING connection closed .* cause=backend-refused")
            # What was logged of the first backend may be read late.
            assert not daemon.find(f"INFO .*backend={two.address}")
            file.reload(daemon, backend=one.address, log_level="debug")
            ends = len(daemon.find("INFO .*connection closed"))
            assert who_answers(daemon) == b"one"
            daemon.wait_for("INFO .*connection closed", ends + 1)


def test_listeners_are_opened_and_closed_and_their_connections_go_on(tmp_path: Path) -> None:
    port, path = free_port(), f"{tmp_path}/socket"
    with Backend(echo) as backend:
        first = f"127.0.0.1:{port}"
        file = File(tmp_path, listen=first, backend=backend.address, max_connections=9)
        with file.rspd() as daemon, ExitStack() as stack:
            clients: list[socket.socket] = []

            def join(address: str) -> None:
                clients.append(stack.enter_context(connect(address)))
                talk(clients[-1])  # One that waits to be accepted is lost with the listener.

            join(first)
            file.reload(daemon, listen=[first, path])
            assert daemon.find(f"reloaded listen={first},{path}$")
            join(first)
            join(path)
            file.reload(daemon, listen=[path])
            assert not listens(first)
            join(path)
            file.reload(daemon, listen=["127.0.0.1:0"])
            assert not os.path.exists(path)
            join(daemon.find("reloaded")[-1].partition("listen=")[2])
            for client in clients:
                talk(client)


def test_a_listener_that_stays_is_the_same_socket_and_keeps_its_backlog_waiting(tmp_path: Path) -> None:
    with Backend(echo) as backend:
        file = File(tmp_path, listen=["127.0.0.1:0"], backend=backend.address)
        with file.rspd() as daemon, daemon.connect() as served, daemon.connect() as waiting:
            talk(served)
            sockets = set(daemon.descriptors())
            file.reload(daemon, listen=["127.0.0.1:0", f"{tmp_path}/socket"], backlog=5)
            assert sockets <= set(daemon.descriptors())
            served.close()
            talk(waiting)


def test_a_client_that_waits_at_an_address_no_longer_listened_on_is_reset(tmp_path: Path) -> None:
    with Backend(echo) as backend:
        file = File(tmp_path, listen=["127.0.0.1:0"], backend=backend.address)
        with file.rspd() as daemon, daemon.connect() as served, daemon.connect() as waiting:
            talk(served)
            file.reload(daemon, listen=[f"{tmp_path}/socket"])
            assert is_reset(waiting)
            talk(served)


@pytest.mark.parametrize("order", [1, -1])
def test_a_port_changes_between_every_local_address_and_one(tmp_path: Path, order: int) -> None:
    port = free_port()
    before, after = [str(port), f"127.0.0.1:{port}"][::order]
    with Backend(echo) as backend:
        file = File(tmp_path, listen=before, backend=backend.address, max_connections=4)
        with file.rspd() as daemon, connect(f"127.0.0.1:{port}") as client:
            talk(client)
            elsewhere = f"127.0.0.2:{port}"
            assert listens(elsewhere) == (before == str(port))
            file.reload(daemon, listen=after)
            assert listens(elsewhere) == (after == str(port))
            with connect(f"127.0.0.1:{port}") as second:
                talk(second)
            file.reload(daemon, listen=before)
            assert listens(elsewhere) == (before == str(port))
            with connect(f"127.0.0.1:{port}") as third:
                talk(third)
            talk(client)


def fitting(path: str, stack: ExitStack) -> int:
    """How many clients a unix listener lets wait."""
    for count in range(100):
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.setblocking(False)
        if client.connect_ex(path) == errno.EAGAIN:
            return count
    raise AssertionError("no end")


def test_the_backlog_grows_and_shrinks(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    with Backend(echo) as backend:
        file = File(tmp_path, listen=path, backend=backend.address, backlog=2)
        with file.rspd() as daemon, connect(path) as served:
            talk(served)
            with ExitStack() as stack:
                # Linux lets one more in than it is told.
                assert fitting(path, stack) == 3
                file.reload(daemon, backlog=7)
                assert fitting(path, stack) == 5
                file.reload(daemon, backlog=3)
                assert fitting(path, stack) == 0
            served.close()
            daemon.wait_for_ends(9)
            with connect(path) as served_next:
                talk(served_next)
                with ExitStack() as stack:
                    assert fitting(path, stack) == 4


def test_a_download_in_progress_is_untouched_by_changes_of_everything(tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 16
    steps = [threading.Event() for _ in range(4)]

    def send(sock: socket.socket) -> None:
        for part, step in enumerate(steps):
            sock.sendall(data[part << 22 : (part + 1) << 22])
            step.wait(PATIENCE)

    with Backend(send) as backend, Backend(echo) as other:
        file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address)
        with file.rspd() as daemon, daemon.connect() as client:
            heard = receive(client, 1 << 22)
            file.reload(daemon, backend=other.address, idle_timeout="1ms", half_close_timeout="1ms")
            steps[0].set()
            heard += receive(client, 1 << 22)
            file.reload(daemon, listen=f"{tmp_path}/socket", connect_timeout="1ms", max_connections=5)
            steps[1].set()
            heard += receive(client, 1 << 22)
            file.path.unlink()
            fail_to_reload(daemon)
            steps[2].set()
            steps[3].set()
            heard += receive_all(client)
            assert heard == data
            client.close()
            assert daemon.wait_for_ends(1)[0]["cause"] == "backend-closed"


# What does not


def bad_yaml(file: File, _: int) -> str:
    file.path.write_text("listen: [\n")
    return f"{file.path}:1: not valid YAML"


def no_mapping(file: File, _: int) -> str:
    file.path.write_text("- listen\n")
    return f"{file.path}:1: expected lines of KEY: VALUE"


def empty(file: File, _: int) -> str:
    file.path.write_text("")
    return f"{file.path}: listen: missing"


def unknown_key(file: File, _: int) -> str:
    file.write(idle_timout="1s")
    return f"{file.path}:\\d: idle_timout: unknown key, did you mean idle_timeout"


def value_out_of_range(file: File, _: int) -> str:
    file.write(max_connections=0)
    return f"{file.path}:\\d: max_connections: expected a whole number"


def port_in_use(file: File, port: int) -> str:
    file.write(listen=[*file.addresses(), f"127.0.0.1:{free_port()}", f"127.0.0.1:{port}"])
    return f"cannot listen on 127.0.0.1:{port}: Address already in use"


def port_in_use_instead(file: File, port: int) -> str:
    file.write(listen=f"127.0.0.1:{port}")
    return f"cannot listen on 127.0.0.1:{port}: Address already in use"


def no_such_address(file: File, _: int) -> str:
    file.write(listen="192.0.2.1:8080")
    return "cannot listen on 192.0.2.1:8080: Cannot assign requested address"


def no_such_folder(file: File, _: int) -> str:
    file.write(listen="/no/such/folder/socket")
    return "cannot listen on /no/such/folder/socket: No such file or directory"


def path_of_a_file(file: File, _: int) -> str:
    file.write(listen=str(file.path))
    return f"cannot listen on {file.path}: a file that is not a socket stands there"


def unknown_name(file: File, _: int) -> str:
    file.write(listen=[*file.addresses(), "no-such-name.invalid:80"])
    return "cannot listen on no-such-name.invalid:80: "


def too_many_connections(file: File, _: int) -> str:
    file.write(max_connections=500)
    return "max_connections 500 needs 1025 descriptors, and the limit is 256: lower it to 115 or raise the limit"


def missing_file(file: File, _: int) -> str:
    file.path.unlink()
    return f"{file.path}: cannot be read: No such file or directory"


def a_folder(file: File, _: int) -> str:
    file.path.unlink()
    file.path.mkdir()
    return f"{file.path}: cannot be read: Is a directory"


@pytest.mark.parametrize(
    "spoil",
    [
        bad_yaml,
        no_mapping,
        empty,
        unknown_key,
        value_out_of_range,
        port_in_use,
        port_in_use_instead,
        no_such_address,
        no_such_folder,
        path_of_a_file,
        unknown_name,
        too_many_connections,
        missing_file,
        a_folder,
    ],
)
def test_a_file_that_cannot_be_taken_changes_nothing_and_the_log_says_why(
    tmp_path: Path, spoil: Callable[[File, int], str]
) -> None:
    with (
        Backend(says(b"one")) as one,
        Backend(says(b"two")) as two,
        socket.create_server(("127.0.0.1", 0)) as busy,
    ):
        file = File(tmp_path, listen="127.0.0.1:0", backend=one.address, max_connections=2)
        with file.rspd(limit=(256, 256)) as daemon, daemon.connect() as client:
            assert receive(client, 3) == b"one"
            talk(client)
            good = dict(file.keys)
            before = sorted(daemon.descriptors())
            # What else is in the file is not taken either.
            file.write(backend=two.address, backlog=1, log_level="error")
            expected = spoil(file, busy.getsockname()[1])
            [reason] = fail_to_reload(daemon)[:1]
            assert re.match(expected, reason), reason
            assert sorted(daemon.descriptors()) == before
            assert who_answers(daemon) == b"one"
            talk(client)
            daemon.wait_for_ends(1)
            if file.path.is_dir():
                file.path.rmdir()
            file.keys = good
            file.reload(daemon, backend=two.address)
            assert who_answers(daemon) == b"two"
            talk(client)


def test_all_errors_of_a_file_are_said_each_in_a_line_of_its_own(tmp_path: Path) -> None:
    file = File(tmp_path, listen="127.0.0.1:0", backend="127.0.0.1:1")
    with file.rspd() as daemon:
        file.write(backlog=0, idle_timeout="soon", colour="red")
        daemon.signal(signal.SIGHUP)
        lines = daemon.wait_for("ERROR +reload failed, nothing has changed: .*rspd.yaml:[345]: ", 3)
        assert len(lines) == 3


def test_a_failed_reload_resets_nobody_who_waits_in_the_backlog(tmp_path: Path) -> None:
    with Backend(echo) as backend, socket.create_server(("127.0.0.1", 0)) as busy:
        file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address)
        with file.rspd() as daemon, daemon.connect() as served, daemon.connect() as waiting:
            talk(served)
            waiting.sendall(b"patience")
            file.write(listen=f"127.0.0.1:{busy.getsockname()[1]}")
            fail_to_reload(daemon)
            served.close()
            assert receive(waiting, 8) == b"patience"


def test_a_port_that_is_ours_and_another_that_is_not_leave_both_as_they_were(tmp_path: Path) -> None:
    port = free_port()
    with Backend(echo) as backend, socket.create_server(("127.0.0.1", 0)) as busy:
        file = File(tmp_path, listen=str(port), backend=backend.address)
        with file.rspd() as daemon:
            before = sorted(daemon.descriptors())
            file.write(listen=[f"127.0.0.1:{port}", f"127.0.0.1:{busy.getsockname()[1]}"])
            fail_to_reload(daemon)
            assert sorted(daemon.descriptors()) == before
            for host in ("127.0.0.1", "127.0.0.2"):
                with connect(f"{host}:{port}") as client:
                    talk(client)


def test_the_backlog_of_a_failed_reload_is_not_taken(tmp_path: Path) -> None:
    """The listener that made room for another and got its place back has the backlog it had."""
    port = free_port()
    with Backend(echo) as backend, socket.create_server(("127.0.0.1", 0)) as busy:
        file = File(tmp_path, listen=f"127.0.0.1:{port}", backend=backend.address, backlog=9)
        with file.rspd() as daemon, ExitStack() as stack:
            file.write(listen=[str(port), f"127.0.0.1:{busy.getsockname()[1]}"], backlog=1)
            fail_to_reload(daemon)
            talk(stack.enter_context(daemon.connect()))
            for _ in range(5):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 0.9))


def test_clients_of_every_listener_wait_undisturbed_while_reloads_fail(tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{free_port()}", f"{tmp_path}/socket"]
    with Backend(echo) as backend:
        file = File(tmp_path, listen=addresses, backend=backend.address)
        with file.rspd() as daemon, connect(addresses[0]) as served:
            talk(served)
            with connect(addresses[0]) as waiting, connect(addresses[1]) as another:
                for spoiled in (["/no/such/folder/socket"], ["127.0.0.1:0", "192.0.2.1:80"]):
                    file.write(listen=spoiled)
                    fail_to_reload(daemon)
                file.reload(daemon, listen=addresses, max_connections=3)
                for client in (served, waiting, another):
                    talk(client)


def test_without_a_file_there_is_nothing_to_reload_and_it_says_so() -> None:
    with Backend(echo) as backend, rspd("-b", backend.address) as daemon, daemon.connect() as client:
        talk(client)
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("WARNING nothing to reload, the configuration is on the command line")
        talk(client)


# Many


def test_of_many_signals_the_last_state_of_the_file_is_what_counts(tmp_path: Path) -> None:
    with Backend(says(b"one")) as one, Backend(says(b"two")) as two:
        file = File(tmp_path, listen="127.0.0.1:0", backend=one.address)
        with file.rspd() as daemon:
            for _ in range(200):
                daemon.signal(signal.SIGHUP)
            file.write(backend=two.address)
            daemon.signal(signal.SIGHUP)
            eventually(lambda: who_answers(daemon) == b"two")


@pytest.mark.parametrize("max_connections", [1, 64])
def test_a_hundred_reloads_under_load_refuse_cut_and_misroute_nobody(tmp_path: Path, max_connections: int) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []
    answers: list[bytes] = []

    def load(daemon: Daemon, number: int) -> None:
        message = b"client %d" % number * 1000
        try:
            while not stop.is_set():
                with daemon.connect() as client:
                    client.sendall(message)
                    client.shutdown(socket.SHUT_WR)
                    heard = receive_all(client)
                assert heard[3:] == message
                answers.append(heard[:3])
        except BaseException as error:
            errors.append(error)

    with Backend(says(b"one")) as one, Backend(says(b"two")) as two:
        file = File(tmp_path, listen=["127.0.0.1:0"], backend=one.address, max_connections=max_connections)
        with file.rspd() as daemon:
            assert who_answers(daemon) == b"one"
            file.reload(daemon)
            before = sorted(name.partition(":")[0] for name in daemon.descriptors())
            threads = [threading.Thread(target=load, args=(daemon, number)) for number in range(6)]
            for thread in threads:
                thread.start()
            for turn in range(100):
                extra = [f"{tmp_path}/socket"] if turn % 2 == 0 else []
                backend = (two, one)[turn % 2]
                file.reload(daemon, listen=["127.0.0.1:0", *extra], backend=backend.address, backlog=100 + turn)
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
                assert not thread.is_alive()
            assert errors == []
            assert set(answers) == {b"one", b"two"}
            assert one.errors == two.errors == []
            ends = daemon.wait_for_ends(len(answers) + 1)
            assert {end["cause"] for end in ends} <= {"client-closed", "backend-closed"}
            assert who_answers(daemon) == b"one"
            daemon.wait_for_ends(len(answers) + 2)
            without_pipes = [name.partition(":")[0] for name in daemon.descriptors() if not name.startswith("pipe:")]
            assert sorted(without_pipes) == [name for name in before if name != "pipe"]
