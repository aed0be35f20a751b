"""The metrics and the status say what the lines of the log say, whatever has become of connections."""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.causes import CAUSES, DAMAGE, ERROR, HEADER, KEYS, LATER, World, causes, get, keys, world
from tests.counting import exchange, wait_for_end
from tests.support import PATIENCE, eventually

pytest.importorskip("prometheus_client", reason="prometheus_client is not here: apt install python3-prometheus-client")


@pytest.fixture
def it() -> Iterator[World]:
    with world() as it:
        yield it


def test_each_cause_and_each_key_that_refuses_is_counted_as_it_is_logged(it: World) -> None:
    it.every_cause()
    found = it.service.agrees()
    assert causes(found) == CAUSES - LATER
    assert keys(found) == KEYS


def test_reloads_are_counted_and_a_proxy_that_is_taken_out_and_comes_back_keeps_its_counts(it: World) -> None:
    service = it.service
    for _ in range(3):
        wait_for_end(service.come("guest", b"close"))
    [stays] = it.looked_at_while_open("guest")
    service.reload(guest=None)
    service.reload("reload failed", guest={"listen": "nonsense", "backend": "x:1"})
    exchange(stays, b"more")
    it.looker.again()
    service.reload()
    [comes] = it.looked_at_while_open("guest")
    for client in stays, comes:
        client.close()
    found = service.agrees()
    assert (found["reloads", "ok"], found["reloads", "failed"]) == (2, 1)
    assert found["ended", "guest"] == 5


def test_connections_that_were_looked_at_and_go_on_or_not_in_other_processes_are_counted_once(it: World) -> None:
    service = it.service
    clients = it.looked_at_while_open("web", "others", "drained")
    [guest] = it.looked_at_while_open("guest")
    service.reload(guest=None, **it.without_haste())
    begun = [service.come("told", HEADER[:9]), service.come("sites", get("a.example")[:-1])]
    eventually(lambda: service.open == 6)
    assert service.upgrade() == 0
    for client in (*clients, guest):
        exchange(client, b"again")
    guest.close()
    it.looked_at_while_open("damaged")
    service.talk("damaged", b"y" * 10)
    service.program(ERROR + DAMAGE)
    assert service.upgrade() == 0
    it.looker.again()
    service.reload()
    begun[0].sendall(HEADER[9:])
    begun[1].sendall(b"\n")
    it.every_cause()
    for client in (*clients, *begun):
        client.shutdown(socket.SHUT_WR)
        wait_for_end(client)
    service.wait_for("connection closed .* handovers=2", 5)
    found, backend = service.agrees(), it.backend.address
    assert found["handovers",] == 2
    assert found["ended", "guest"] == 2
    assert found["ends", "damaged", backend, "handover-failed"] == 2
    assert found["bytes", "damaged", backend, "upload"] == 1010
    assert found["routed", "damaged", "default"] == 2


def test_a_handover_that_fails_changes_no_count(it: World) -> None:
    clients = it.looked_at_while_open("web", "guest")
    resource.prlimit(it.service.process.pid, resource.RLIMIT_NOFILE, (300, 300))
    assert it.service.upgrade() != 0
    for client in clients:
        exchange(client, b"again")
        client.close()
    found = it.service.agrees()
    assert found["handovers",] == 0
    assert found["ended", "web"] == 1


def test_what_ends_while_the_process_drains_is_counted(it: World) -> None:
    service = it.service
    it.looked_at_while_open("drained")
    with service.come("web"):
        eventually(lambda: service.open == 2)
        service.process.send_signal(signal.SIGTERM)
        found = service.agrees(still_open=1)
        assert found["ends", "drained", it.backend.address, "drain-timeout"] == 1
    assert service.process.wait(PATIENCE) == 0
