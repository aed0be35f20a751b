"""A restart of the service while clients wait: for a backend, for an answer from it, or with a PROXY header begun."""

from __future__ import annotations

import resource
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon.test_handover import fixed
from tests.daemon.test_service import let_pass
from tests.fleet import File, talks
from tests.keeper import BEFORE, Manager, in_time, managed
from tests.manager import Service
from tests.support import PATIENCE, Backend, echo, eventually, full_tcp, is_reset, receive_all, reset

HEADER = b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 80\r\n"


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend(echo) as backend:
        yield backend


def waits(service: Manager, count: int) -> None:
    """So many clients have been accepted."""
    service.store.wait_for_status(rf".*serving {count} of .*")


def come(stack: ExitStack, daemon: Service, says: bytes) -> socket.socket:
    """A client that says this first."""
    client = stack.enter_context(daemon.connect())
    client.sendall(says)
    return client


def hears(client: socket.socket, word: bytes) -> bool:
    """Whether an echo of this comes next."""
    return client.recv(len(word), socket.MSG_WAITALL) == word


# The queue


def test_clients_in_the_queue_keep_their_places_through_restarts(tmp_path: Path, backend: Backend) -> None:
    one = {"address": backend.address, "max_connections": 1}
    file = File(tmp_path, listen=fixed(), backends=[one], queue_timeout="60s")
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        client = stack.enter_context(service.daemon.connect())
        assert talks(client)
        queued = []
        for number in range(5):
            queued.append(come(stack, service.daemon, b"%d" % number))
            waits(service, number + 2)
        for _ in range(3):
            before = service.restart()
            assert before.find("handed over connections=6 ")
            assert service.daemon.find("took over connections=6$")
            assert not before.find("connection closed")
            assert talks(client)
        queued.append(come(stack, service.daemon, b"5"))  # comes last
        client.close()
        for number, waiting in enumerate(queued):
            assert hears(waiting, b"%d" % number)
            assert backend.accepted == number + 2
            waiting.close()
        ends = service.daemon.wait_for_ends(7)
        assert [end.get("handovers") for end in ends] == ["3"] * 6 + [None]
        assert {end["cause"] for end in ends} == {"client-closed"}


def test_the_time_in_the_queue_before_the_restart_counts(tmp_path: Path, backend: Backend) -> None:
    one = {"address": backend.address, "max_connections": 1}
    file = File(tmp_path, listen=fixed(), backends=[one], queue_timeout="5s")
    with managed("-c", str(file.path)) as service, service.daemon.connect() as client:
        assert talks(client)
        came = time.monotonic()
        with service.daemon.connect() as queued:
            waits(service, 2)
            waiting = time.monotonic()
            let_pass(BEFORE)
            service.restart()
            back = time.monotonic()
            (end,) = service.daemon.wait_for_ends(1)
            assert in_time(end, 5, came, waiting, back), end
            assert (end["cause"], end["handovers"]) == ("queue-timeout", "1")
            assert receive_all(queued) == b""
        assert talks(client)


def test_a_client_that_leaves_the_queue_while_no_process_runs_takes_no_place(tmp_path: Path, backend: Backend) -> None:
    one = {"address": backend.address, "max_connections": 1}
    file = File(tmp_path, listen=fixed(), backends=[one], queue_timeout="60s")
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        client = stack.enter_context(service.daemon.connect())
        assert talks(client)
        first, second = (come(stack, service.daemon, word) for word in (b"first", b"second"))
        waits(service, 3)
        service.stop()
        reset(first)
        service.start()
        assert service.daemon.wait_for_ends(1)[0]["cause"] == "client-aborted"
        client.close()
        assert hears(second, b"second")


# Connecting


@pytest.mark.parametrize("when", ["the same", "another"])
def test_an_attempt_begins_anew_at_a_backend_of_the_next_process(tmp_path: Path, backend: Backend, when: str) -> None:
    with full_tcp() as full:
        file = File(tmp_path, listen=fixed(), backend=full, connect_timeout="5s")
        with managed("-c", str(file.path)) as service, ExitStack() as stack:
            came = time.monotonic()
            client = come(stack, service.daemon, b"hello")
            waits(service, 1)
            waiting = time.monotonic()
            if when == "another":
                file.write(backend=backend.address)
                service.restart()
                assert hears(client, b"hello")
                client.close()
                assert service.daemon.wait_for_ends(1)[0]["cause"] == "client-closed"
                return
            let_pass(BEFORE)
            service.restart()
            back = time.monotonic()
            (end,) = service.daemon.wait_for_ends(1)
            assert in_time(end, 5, came, waiting, back), f"its connect_timeout goes on: {end}"
            assert (end["cause"], end["handovers"]) == ("connect-timeout", "1")
            assert is_reset(client)


def test_a_backend_that_failed_before_the_restart_is_not_tried_again_for_the_client(tmp_path: Path) -> None:
    with full_tcp() as full, Backend(reset) as other:
        other.close()
        backends = [{"address": other.address}, {"address": full, "backup": True}]
        file = File(tmp_path, listen=fixed(), backends=backends, connect_timeout="5s")
        with managed("-c", str(file.path)) as service, service.daemon.connect():
            service.store.wait_for_status(r".*serving 1 of .*1 of 2 .*")
            let_pass(0.5)
            service.restart()
            (end,) = service.daemon.wait_for_ends(1)
            assert end["reason"].count(other.address) == 1
            assert end["reason"].count(full) == 1
            assert end["cause"] == "connect-timeout"


def test_a_backend_that_failed_does_not_take_another_attempt_of_the_client(tmp_path: Path) -> None:
    with full_tcp() as full, Backend(reset) as other:
        other.close()
        backends = [{"address": other.address}, {"address": full}]
        file = File(tmp_path, listen=fixed(), backends=backends, retries=1, max_fails="off", connect_timeout="20s")
        with managed("-c", str(file.path)) as service:
            client = service.daemon.connect()
            waits(service, 1)
            let_pass(0.3)  # the first has been refused, if it was tried first
            service.restart()
            service.restart()
            let_pass(0.3)
            assert not service.daemon.find("connection closed"), "the second is still being dialled"
            reset(client)  # else it would be dialled until connect_timeout


def test_a_client_of_a_proxy_that_is_gone_waits_on_for_its_backend(tmp_path: Path, backend: Backend) -> None:
    one = {"address": backend.address, "max_connections": 1}
    proxies: dict[str, dict[str, object]] = {
        "old": {"listen": fixed(), "backends": [one]},
        "new": {"listen": fixed(), "backend": backend.address},
    }
    file = File(tmp_path, proxies=proxies, queue_timeout="60s", listen=None)
    host, port = str(proxies["old"]["listen"]).split(":")
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        first, second = (stack.enter_context(socket.create_connection((host, int(port)), PATIENCE)) for _ in range(2))
        assert talks(first)
        second.sendall(b"later")
        service.store.wait_for_status(r".*old serving 2 of .*")
        file.write(proxies={"new": proxies["new"]})
        service.restart()
        assert service.daemon.find("took over connections=2$")
        assert talks(first)
        first.close()
        assert hears(second, b"later")
        second.close()
        assert [end["cause"] for end in service.daemon.wait_for_ends(2)] == ["client-closed"] * 2


def test_a_client_that_waits_for_a_proxy_of_two_configurations_ago_is_told_so(tmp_path: Path, backend: Backend) -> None:
    one = {"address": backend.address, "max_connections": 1}
    proxies: dict[str, dict[str, object]] = {
        "old": {"listen": fixed(), "backends": [one]},
        "new": {"listen": fixed(), "backend": backend.address},
    }
    file = File(tmp_path, proxies=proxies, queue_timeout="60s", listen=None)
    host, port = str(proxies["old"]["listen"]).split(":")
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        first, second = (stack.enter_context(socket.create_connection((host, int(port)), PATIENCE)) for _ in range(2))
        assert talks(first)
        second.sendall(b"later")
        service.store.wait_for_status(r".*old serving 2 of .*")
        file.reload(service.daemon, proxies={"new": proxies["new"]})
        service.restart()
        assert talks(first)
        (end,) = service.daemon.wait_for_ends(1)
        assert (end["cause"], end["reason"]) == ("backend-unknown", '"its proxy is not configured any more"')


# The PROXY header


def halves() -> list[tuple[bytes, int, bool]]:
    """A header of each version, where it is cut, and whether its sender is trusted afterwards too."""
    v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + socket.inet_aton("192.0.2.1") + socket.inet_aton("192.0.2.2")
    v2 += struct.pack("!HH", 1234, 80)
    return [(HEADER, 0, True), (HEADER, 9, False), (HEADER, len(HEADER) - 1, True), (v2, 7, True), (v2, 20, False)]


@pytest.mark.parametrize(("header", "cut", "trusted"), halves())
def test_a_header_that_has_come_in_part_goes_on(
    tmp_path: Path, backend: Backend, header: bytes, cut: int, trusted: bool
) -> None:
    file = File(tmp_path, listen=fixed(), backend=backend.address, accept_proxy="127.0.0.0/8")
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        client = come(stack, service.daemon, header[:cut])
        name = "{}:{}".format(*client.getsockname())
        waits(service, 1)
        if cut:
            eventually(lambda: not unread(service.daemon, client))
        if not trusted:
            file.write(accept_proxy="off")  # what has been begun goes on
        service.restart()
        service.restart()
        client.sendall(header[cut:] + b"hello")
        assert hears(client, b"hello")
        client.close()
        (end,) = service.daemon.wait_for_ends(1)
        assert (end["client"], end["via"], end["sent"]) == ("192.0.2.1:1234", name, "5")


def test_the_time_for_a_header_goes_on(tmp_path: Path, backend: Backend) -> None:
    file = File(
        tmp_path, listen=fixed(), backend=backend.address, accept_proxy="127.0.0.0/8", accept_proxy_timeout="5s"
    )
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        came = time.monotonic()
        client = come(stack, service.daemon, HEADER[:9])
        waits(service, 1)
        waiting = time.monotonic()
        let_pass(BEFORE)
        assert not service.restart().find("connection closed")
        back = time.monotonic()
        (end,) = service.daemon.wait_for_ends(1)
        assert in_time(end, 5, came, waiting, back), end
        assert end["cause"] == "header-timeout"
        assert "found b'PROXY TCP'" in end["reason"]
        assert is_reset(client)


def test_a_client_whose_header_has_come_counts_for_its_limit_in_the_next_process(
    tmp_path: Path, backend: Backend
) -> None:
    one = {"address": backend.address, "max_connections": 1}
    keys = {"accept_proxy": "127.0.0.0/8", "max_connections_per_client": 2, "queue_timeout": "60s"}
    file = File(tmp_path, listen=fixed(), backends=[one], **keys)
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        first = come(stack, service.daemon, HEADER + b"hello")
        assert hears(first, b"hello")
        second = come(stack, service.daemon, HEADER + b"later")
        begun = come(stack, service.daemon, HEADER[:20])
        waits(service, 3)
        service.restart()
        begun.sendall(HEADER[20:])
        assert is_reset(begun)
        service.daemon.wait_for(r"client refused client=192\.0\.2\.1:1234 .*has 2 connections")
        first.close()
        assert hears(second, b"later")
        second.close()
        third = come(stack, service.daemon, HEADER + b"again")
        assert hears(third, b"again")


# What is left here


def test_clients_that_wait_go_on_here_if_nothing_can_be_handed_over(tmp_path: Path, backend: Backend) -> None:
    one = {"address": backend.address, "max_connections": 1}
    file = File(tmp_path, listen=fixed(), backends=[one], queue_timeout="60s")
    with managed("-c", str(file.path), room=0) as service, ExitStack() as stack:
        client = come(stack, service.daemon, b"hello")
        assert hears(client, b"hello")
        queued = come(stack, service.daemon, b"later")
        waits(service, 2)
        before = service.begin_to_stop()
        before.wait_for("cannot hand over, connections drain")
        client.close()
        assert hears(queued, b"later")
        queued.close()
        assert before.wait() == 0
        assert [end["cause"] for end in before.wait_for_ends(2)] == ["client-closed"] * 2


def test_a_process_that_cannot_write_its_state_goes_on_with_those_who_wait(tmp_path: Path, backend: Backend) -> None:
    one = {"address": backend.address, "max_connections": 1}
    keys = {"accept_proxy": "127.0.0.0/8", "queue_timeout": "60s"}
    file = File(tmp_path, listen=fixed(), backends=[one], **keys)
    with managed("-c", str(file.path)) as service, ExitStack() as stack:
        client = come(stack, service.daemon, HEADER + b"hello")
        assert hears(client, b"hello")
        queued = come(stack, service.daemon, HEADER + b"later")
        begun = come(stack, service.daemon, HEADER[:9])
        waits(service, 3)
        eventually(lambda: not unread(service.daemon, begun))
        limit_file_size(service.daemon, 0)
        before = service.begin_to_stop()
        before.wait_for("cannot hand over, connections drain reason=.File too large")
        limit_file_size(before, resource.RLIM_INFINITY)
        client.close()
        assert hears(queued, b"later")
        queued.close()
        begun.sendall(HEADER[9:] + b"last")
        assert hears(begun, b"last")
        begun.close()
        assert before.wait() == 0
        assert [end.get("handovers") for end in before.wait_for_ends(3)] == [None] * 3


def limit_file_size(daemon: Service, limit: int) -> None:
    """With 0, each write to a file fails (EFBIG), also to one in memory."""
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def unread(daemon: Service, client: socket.socket) -> int:
    """How many bytes of a client rspd has not read yet (proc(5): /proc/net/tcp)."""
    near, far = (f"{port:04X}" for port in (client.getpeername()[1], client.getsockname()[1]))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues = line.split()[:5]
        if local.endswith(":" + near) and remote.endswith(":" + far):
            return int(queues.partition(":")[2], 16)
    return 0
