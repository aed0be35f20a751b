"""A restart of the service: what the next process listens on and goes by, and when nothing is handed over."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_handover import fixed
from tests.daemon.test_upgrade import Files
from tests.fleet import File, talks
from tests.keeper import Manager, managed
from tests.support import PATIENCE, Backend, echo, eventually, free_port, is_reset, receive_all

LISTENER = "rspd+listener-"


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend(echo) as backend:
        yield backend


@pytest.fixture
def file(tmp_path: Path, backend: Backend) -> File:
    return File(tmp_path, listen=fixed(), backend=backend.address)


def connect(port: int) -> socket.socket:
    """A client that comes to this port."""
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def refuses(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def listeners(service: Manager) -> set[str]:
    """The names of the listeners that are stored."""
    assert service.names in ([], [LISTENER]), service.names
    return {name for name, _ in service.store.kept}


# Listeners


def test_listeners_are_stored_as_soon_as_it_is_ready_and_as_long_as_it_runs(file: File) -> None:
    file.write(listen=[fixed(), fixed(), f"{file.path.parent}/s"])
    with managed("-c", str(file.path)) as service:
        eventually(lambda: len(listeners(service)) == 3)
        before = listeners(service)
        for _ in range(3):
            service.restart()
            eventually(lambda: service.names == [LISTENER])
            assert listeners(service) == before


def test_a_changed_listen_keeps_what_stays_and_closes_what_is_gone(file: File) -> None:
    gone, stays, new = free_port(), free_port(), free_port()
    file.write(listen=[f"127.0.0.1:{gone}", f"127.0.0.1:{stays}"])
    with managed("-c", str(file.path)) as service:
        eventually(lambda: len(listeners(service)) == 2)
        before = listeners(service)
        with connect(gone) as client:
            assert talks(client)
            file.write(listen=[f"127.0.0.1:{stays}", f"127.0.0.1:{new}"])
            service.stop()
            with connect(stays) as waiting, connect(gone) as lost:
                service.start()
                assert talks(waiting)
                assert is_reset(lost)
            assert refuses(gone)
            with connect(new) as fresh:
                assert talks(fresh)
            assert talks(client)
            eventually(lambda: len(listeners(service)) == 2)
            assert len(listeners(service) & before) == 1


@pytest.mark.parametrize("wider", [True, False])
def test_a_listen_in_the_way_of_the_one_before_is_taken_over(file: File, wider: bool) -> None:
    port = free_port()
    places = [f"127.0.0.1:{port}", f"0.0.0.0:{port}"]
    if not wider:
        places.reverse()
    file.write(listen=places[0])
    with managed("-c", str(file.path)) as service, connect(port) as client:
        assert talks(client)
        file.write(listen=places[1])
        service.restart()
        assert not service.daemon.find("ERROR")
        assert service.daemon.find(f"listening address={places[1]}$")
        with connect(port) as other:
            assert talks(other)
        assert talks(client)


def test_the_file_of_a_unix_socket_stays_and_is_removed_at_the_end(file: File) -> None:
    path = file.path.parent / "s"
    file.write(listen=str(path))
    with managed("-c", str(file.path)) as service:
        inode = path.stat().st_ino
        service.restart()
        assert path.stat().st_ino == inode
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))
            assert talks(client)
    assert not path.exists()


def test_a_reload_that_changes_listen_changes_the_store(file: File) -> None:
    gone, new = free_port(), free_port()
    file.write(listen=f"127.0.0.1:{gone}")
    with managed("-c", str(file.path)) as service:
        eventually(lambda: len(listeners(service)) == 1)
        before = listeners(service)
        file.reload(service.daemon, listen=f"127.0.0.1:{new}")
        eventually(lambda: len(listeners(service)) == 1 and listeners(service) != before)
        assert refuses(gone)
        service.stop()
        with connect(new) as client:  # while no process runs
            service.start()
            assert talks(client)


def test_a_process_that_is_killed_leaves_its_listeners_and_who_waits_there_to_the_next(file: File) -> None:
    with managed("-c", str(file.path)) as service:
        eventually(lambda: listeners(service))
        daemon = service.daemon
        port = daemon.port
        with connect(port) as cut, connect(port) as other:
            assert talks(cut)
            daemon.signal(signal.SIGSTOP)
            with connect(port) as waiting:
                waiting.sendall(b"hello")
                daemon.signal(signal.SIGKILL)
                assert daemon.wait() == -signal.SIGKILL
                assert receive_all(cut) == b""
                assert receive_all(other) == b""
                service.start()
                assert waiting.recv(5, socket.MSG_WAITALL) == b"hello"
                assert talks(waiting)
        assert service.daemon.find("took over connections=0$")


# What the process before has left

UNREADABLE = {
    "nothing": b"",
    "no document": b"nonsense\n",
    "a later version": b'rspd 13 0\n{"version":9}',
    "cut short": b'rspd 130 0\n{"version":1',
    "no mapping": b"rspd 2 0\n[]",
}


def rewrite(service: Manager, change: Callable[[bytes], bytes]) -> None:
    """Change what the process before has left."""
    (fd,) = [
        one.fileno()
        for name, one in service.store.kept
        if name == "rspd+parcel" and stat.S_ISREG(os.fstat(one.fileno()).st_mode)
    ]
    content = os.pread(fd, 1 << 20, 0)
    os.ftruncate(fd, 0)
    os.pwrite(fd, change(content), 0)


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_connections_whose_state_cannot_be_read_are_aborted_and_the_start_goes_on(file: File, content: bytes) -> None:
    with managed("-c", str(file.path)) as service:
        with service.daemon.connect() as client, service.daemon.connect() as other:
            assert talks(client)
            assert talks(other)
            service.stop()
            rewrite(service, lambda _: content)
            service.start()
            errors = service.daemon.find("^<3>|ERROR")
            assert len(errors) == (1 if content else 0), service.daemon.log
            assert all("connections of the process before end: expected " in error for error in errors)
            assert is_reset(client)
            assert is_reset(other)
        with service.daemon.connect() as client:
            assert talks(client)
        assert listeners(service)


def test_what_it_does_not_know_is_ignored(file: File) -> None:
    def extend(value: Any) -> Any:
        if isinstance(value, list):
            return [extend(one) for one in value]
        if isinstance(value, dict):
            return {**{key: extend(one) for key, one in value.items()}, "unknown to this version": {"what": 1}}
        return value

    def change(content: bytes) -> bytes:
        _, _, text = content.partition(b"\n")
        changed = json.dumps(extend(json.loads(text))).encode()
        return b"rspd %d 0\n" % len(changed) + changed

    with managed("-c", str(file.path)) as service, service.daemon.connect() as client:
        assert talks(client)
        service.stop()
        rewrite(service, change)
        service.start()
        assert talks(client)
        assert not service.daemon.find("^<[34]>|ERROR|WARNING")


# Stop


def test_a_plain_stop_drains_refuses_at_once_and_stores_nothing(file: File) -> None:
    with managed("-c", str(file.path)) as service:
        service.restart()
        eventually(lambda: listeners(service))
        daemon, port = service.daemon, service.daemon.port
        with connect(port) as client:
            assert talks(client)
            daemon.process.terminate()
            daemon.wait_for("ending connections=1 ")
            assert refuses(port)
            assert talks(client)
            eventually(lambda: not service.store.kept)
            assert daemon.process.poll() is None
        assert daemon.wait() == 0
        assert daemon.wait_for_ends(1)[0]["cause"] == "client-closed"
        assert not service.store.kept


def test_with_handover_off_a_restart_drains_and_nothing_is_stored(file: File) -> None:
    file.write(handover="off")
    with managed("-c", str(file.path)) as service:
        port = service.daemon.port
        with connect(port) as client:
            assert talks(client)
            daemon = service.begin_to_stop()
            daemon.wait_for("ending connections=1 ")
            assert refuses(port)
            assert talks(client)
        assert daemon.wait() == 0
        assert not daemon.find("hand")
        assert not service.store.with_field("FDSTORE")
        service.start()
        with connect(port) as client:
            assert talks(client)


def test_handover_can_be_turned_off_and_on_by_a_reload_and_by_a_restart(file: File) -> None:
    with managed("-c", str(file.path)) as service:
        eventually(lambda: listeners(service))
        file.reload(service.daemon, handover="off")
        eventually(lambda: not service.store.kept)
        file.reload(service.daemon, handover="on")
        eventually(lambda: listeners(service))
        with service.daemon.connect() as client:
            assert talks(client)
            file.write(handover="off")
            service.restart()
            assert talks(client)
            eventually(lambda: not service.store.kept)


# A file that is wrong


def test_a_wrong_file_at_a_restart_is_no_outage(file: File) -> None:
    with managed("-c", str(file.path)) as service, service.daemon.connect() as client:
        assert talks(client)
        right = file.path.read_text()
        file.path.write_text("listen: 99999\nlisten_too: 1\nbackends: []\n")
        for _ in range(2):
            service.restart()
            errors = service.daemon.wait_for("^<3>|ERROR", 3)
            assert len(errors) == 3
            assert all("serving by the settings of the process before: " in error for error in errors)
            assert any("listen_too" in error for error in errors)
            status = service.store.with_field("READY=1")[-1].status
            assert "; serving by the settings of the process before: " in status
            assert "listen_too" in status
            assert talks(client)
            with service.daemon.connect() as other:
                assert talks(other)
        count = len(service.store.with_field("READY=1"))
        service.daemon.signal(signal.SIGHUP)
        service.daemon.wait_for("reload failed, nothing has changed: ", 3)
        service.store.wait_for("READY=1", count + 1)
        assert "; reload failed: " in service.store.with_field("READY=1")[-1].status
        file.path.write_text(right)
        service.daemon.signal(signal.SIGHUP)
        service.daemon.wait_for("reloaded listen=")
        service.store.wait_for("READY=1", count + 2)
        assert "settings before" not in service.store.status
        assert "failed" not in service.store.status
        service.restart()
        assert not service.daemon.find("^<3>|ERROR")
        assert talks(client)


def test_a_missing_file_at_a_restart_is_no_outage(file: File) -> None:
    with managed("-c", str(file.path)) as service, service.daemon.connect() as client:
        assert talks(client)
        file.path.unlink()
        service.restart()
        (error,) = service.daemon.wait_for("^<3>|ERROR")
        assert "cannot be read: No such file or directory" in error
        assert talks(client)
        with service.daemon.connect() as other:
            assert talks(other)


def test_all_settings_in_force_go_on_if_the_file_is_wrong(file: File) -> None:
    with Backend(echo) as other:
        web = {"listen": fixed(), "backends": [{"address": other.address, "weight": 3}], "send_proxy": "v1"}
        more = {"listen": [fixed(), f"{file.path.parent}/s"], "backend": other.address, "max_connections": 7}
        proxies = {"web": web, "more": more}
        file.write(listen=None, backend=None, max_connections=None, idle_timeout="1h", proxies=proxies)
        with managed("-c", str(file.path)) as service:
            file.path.write_text("nonsense")
            service.restart()
            with service.daemon.connect() as client:
                client.sendall(b"x")
                assert client.recv(11, socket.MSG_WAITALL) == b"PROXY TCP4 "
            service.store.wait_for_status(r"1 served; web serving 0 of 1, .*; more serving 0 of 7, .*")
            assert len(service.daemon.find("listening address=")) == 3


def test_a_file_that_cannot_be_followed_at_a_restart_is_no_outage(file: File) -> None:
    right = file.keys["listen"]
    with socket.create_server(("127.0.0.1", 0)) as taken, managed("-c", str(file.path)) as service:
        with service.daemon.connect() as client:
            assert talks(client)
            file.write(listen=[right, f"127.0.0.1:{taken.getsockname()[1]}"])
            service.restart()
            (error,) = service.daemon.wait_for("^<3>|ERROR")
            assert "serving by the settings of the process before: cannot listen on " in error
            assert "Address already in use" in error
            assert (
                "; serving by the settings of the process before: cannot listen"
                in service.store.with_field("READY=1")[-1].status
            )
            assert talks(client)
            with service.daemon.connect() as other:
                assert talks(other)
            file.reload(service.daemon, listen=right)
            assert talks(client)


@pytest.mark.parametrize("key", ["listen", "metrics"])
def test_a_place_that_has_two_names_in_the_file_at_a_restart_is_no_outage(file: File, key: str) -> None:
    if key == "metrics":
        pytest.importorskip("prometheus_client")
    port = free_port()
    right, other = f"127.0.0.1:{port}", f"localhost:{port}"
    file.write(listen=right)
    with managed("-c", str(file.path)) as service, connect(port) as client:
        assert talks(client)
        file.write(**({"metrics": other} if key == "metrics" else {"listen": [right, other]}))
        service.restart()
        what = rf"serving by the settings of the process before: cannot listen on {other} \({right}\): Address already"
        service.daemon.wait_for(what)
        assert talks(client)
        with connect(port) as another:
            assert talks(another)


def test_too_few_descriptors_for_the_file_at_a_restart_is_no_outage(file: File) -> None:
    with managed("-c", str(file.path), limit=(4096, 4096)) as service, service.daemon.connect() as client:
        assert talks(client)
        file.write(max_connections=100_000)
        service.restart()
        (error,) = service.daemon.wait_for("^<3>|ERROR")
        assert "max_connections 100000 needs" in error
        assert talks(client)


def test_a_wrong_file_with_an_empty_store_is_an_error(file: File) -> None:
    with managed("-c", str(file.path)) as service:
        assert service.daemon.stop() == 0
        eventually(lambda: not service.store.kept)
        file.path.write_text("nonsense")
        assert service.start(wait=False).wait() == os.EX_CONFIG


# A manager that keeps little or nothing


@pytest.mark.parametrize("room", [0, 1, 3, 4])
def test_without_room_in_the_store_a_restart_warns_and_drains(file: File, room: int) -> None:
    with managed("-c", str(file.path), room=room) as service:
        port = service.daemon.port
        with connect(port) as client:
            assert talks(client)
            daemon = service.begin_to_stop()
            daemon.wait_for("ending connections=1 ")
            (warning,) = daemon.find("WARNING|^<4>")
            assert "cannot hand over, connections drain reason=" in warning
            assert "FileDescriptorStoreMax=512" in warning
            assert refuses(port)
            assert talks(client)
            eventually(lambda: not service.store.kept)
        assert daemon.wait() == 0
        service.start()
        with connect(port) as client:
            assert talks(client)


class InFlight:
    """Descriptors in flight, of the user who runs the tests, and rspd."""

    def __init__(self, count: int) -> None:
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for _ in range(count // 250):
            socket.send_fds(self._near, [b"x"], [self._near.fileno()] * 250)

    def close(self) -> None:
        self._near.close()
        self._far.close()


# Descriptors of a process that may have no more in flight, all of the user's counted, when it sends a message. What
# InFlight has leaves room for a message, and for other tests that hand over; after the message there is none.
FEW = 480

# So many connections are more than one message takes.
MANY = 140

# Root may have any number in flight.
LIKE_ANY_USER = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"] if os.geteuid() == 0 else []


@contextmanager
def limited(file: File) -> Iterator[tuple[Manager, list[socket.socket]]]:
    """A service that hears of the kernel's limit, and its clients."""
    file.write(max_connections=MANY, drain_timeout="1s")
    with managed("-c", str(file.path), limit=(FEW, FEW), launcher=LIKE_ANY_USER) as service, ExitStack() as stack:
        clients = [stack.enter_context(service.daemon.connect()) for _ in range(MANY)]
        assert all(talks(client) for client in clients)
        yield service, clients


@pytest.mark.usefixtures("alone_in_flight")
def test_it_waits_until_the_kernel_takes_more_descriptors(file: File) -> None:
    with limited(file) as (service, clients), closing(InFlight(FEW)) as in_flight:
        file.write(drain_timeout="30s")
        file.reload(service.daemon)
        daemon = service.begin_to_stop()
        (warning,) = daemon.wait_for("too many descriptors in flight, connections drain that find no room")
        assert f"connections={MANY} fitting=" in warning
        assert all(talks(client) for client in clients)
        in_flight.close()
        assert daemon.wait() == 0
        assert len(daemon.find("WARNING|^<4>")) == 1
        service.start()
        assert all(talks(client) for client in clients)


@pytest.mark.usefixtures("alone_in_flight")
def test_connections_that_the_kernel_does_not_take_drain_and_the_others_go_on(file: File) -> None:
    with limited(file) as (service, clients), closing(InFlight(FEW)):
        daemon = service.begin_to_stop()
        daemon.wait_for("too many descriptors in flight")
        assert daemon.wait() == 0
        assert len(daemon.find("WARNING|^<4>")) == 1
        ends = daemon.wait_for_ends(1)
        assert {end["cause"] for end in ends} == {"drain-timeout"}
        gone = {end["client"] for end in ends}
        assert 0 < len(gone) < MANY / 2
        service.start()
        for client in clients:
            if "{}:{}".format(*client.getsockname()) in gone:
                assert is_reset(client)
            else:
                assert talks(client)


@pytest.mark.usefixtures("alone_in_flight")
def test_it_waits_until_the_kernel_takes_any_descriptor(file: File) -> None:
    with limited(file) as (service, clients), closing(InFlight(2 * FEW)) as in_flight:
        file.write(drain_timeout="5s")
        file.reload(service.daemon)
        daemon = service.begin_to_stop()
        daemon.wait_for("WARNING|^<4>")
        in_flight.close()
        assert daemon.wait() == 0
        service.start()
        assert all(talks(client) for client in clients)


@pytest.mark.usefixtures("alone_in_flight")
def test_a_listener_is_stored_once_the_kernel_takes_it(file: File) -> None:
    file.write(max_connections=20)
    with closing(InFlight(2 * FEW)) as in_flight:
        with managed("-c", str(file.path), limit=(FEW, FEW), launcher=LIKE_ANY_USER) as service:
            in_flight.close()
            file.reload(service.daemon)
            eventually(lambda: listeners(service), patience=3)


def test_with_just_enough_room_it_hands_over(file: File) -> None:
    with managed("-c", str(file.path), room=5) as service, service.daemon.connect() as client:
        assert talks(client)
        service.restart()
        assert talks(client)


# An upgrade


def test_the_process_before_hands_over_though_its_files_are_replaced(tmp_path: Path, file: File) -> None:
    (tmp_path / "installed").mkdir()
    files = Files(tmp_path / "installed")
    with managed("-c", str(file.path), launcher=files.launcher) as service, service.daemon.connect() as client:
        assert talks(client)
        files.replace()
        before = service.restart(launcher=())
        assert before.find("handed over connections=1 ")
        assert talks(client)


def test_who_took_over_hands_over_though_its_files_are_replaced(tmp_path: Path, file: File) -> None:
    (tmp_path / "installed").mkdir()
    files = Files(tmp_path / "installed")
    with managed("-c", str(file.path)) as service, service.daemon.connect() as client:
        assert talks(client)
        service.restart(launcher=files.launcher)
        files.replace()
        before = service.restart()
        assert before.find("handed over connections=1 ")
        assert talks(client)
