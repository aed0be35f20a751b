"""What a running rspd says of its connections, and of what has been: each state, each count."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rspd.snapshot import STATES, Connection, Proxy
from tests.daemon.control import connections, status
from tests.fleet import File, stays
from tests.support import PATIENCE, Backend, Daemon, answer, echo, eventually, free_port, full_tcp, receive_all, reset

HELLO = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def env(folder: Path) -> dict[str, str]:
    return {"RUNTIME_DIRECTORY": str(folder)}


def proxy(folder: Path, name: str = "") -> Proxy:
    (found,) = (one for one in status(folder / "control.sock").proxies if one.name == name)
    return found


def receive(client: socket.socket, size: int) -> bytes:
    """The next so many bytes."""
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


# States


def test_each_state_of_a_connection_is_shown(tmp_path: Path, stack: ExitStack) -> None:
    may_end = threading.Event()
    stack.callback(may_end.set)
    there = stack.enter_context(Backend(stays("!")))
    goes_on = stack.enter_context(Backend(lambda sock: (receive_all(sock), may_end.wait(PATIENCE))))
    limited = {"address": there.address, "max_connections": 1}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"backend": there.address},
        "half": {"backend": goes_on.address},
        "routed": {"routes": [{"host": "a.example", "backend": there.address}], "first_bytes_timeout": "1m"},
        "told": {"backend": there.address, "accept_proxy": "127.0.0.1", "accept_proxy_timeout": "1m"},
        "full": {"backends": [limited], "queue_timeout": "1m"},
        "slow": {"backend": stack.enter_context(full_tcp()), "connect_timeout": "1m"},
    }
    ports = {name: free_port() for name in kinds}
    proxies = {name: {"listen": f"127.0.0.1:{ports[name]}", **keys} for name, keys in kinds.items()}
    daemon = stack.enter_context(File(tmp_path, listen=None, proxies=proxies).rspd(env=env(tmp_path)))
    clients: dict[str, socket.socket] = {}
    names: dict[str, str] = {}

    def come(name: str, to: str, said: bytes = b"", got: bytes = b"") -> None:
        client = stack.enter_context(socket.create_connection(("127.0.0.1", ports[to]), PATIENCE))
        client.sendall(said)
        assert receive(client, len(got)) == got
        clients[name], names["{}:{}".format(*client.getsockname())] = client, name

    come("silent", "routed")
    come("part", "routed", HELLO[:9])
    come("header", "told")
    come("open", "plain", b"12345", b"!12345")
    come("named", "routed", HELLO, b"!" + HELLO)
    come("from afar", "told", b"PROXY TCP4 192.0.2.9 192.0.2.1 40000 80\r\nx", b"!x")
    come("half", "half")
    clients["half"].shutdown(socket.SHUT_WR)
    come("first", "full", got=b"!")
    come("queued", "full")
    come("connecting", "slow")
    come("told off", "routed", HELLO.replace(b"a.", b"b."))

    def seen() -> dict[str, Connection]:
        return {names[one.via or one.client]: one for one in connections(tmp_path / "control.sock")}

    states = {
        "silent": "first bytes",
        "part": "first bytes",
        "header": "first bytes",
        "open": "open",
        "named": "open",
        "from afar": "open",
        "half": "half-closed",
        "first": "open",
        "queued": "queued",
        "connecting": "connecting",
        "told off": "ending",  # it has its answer, and does not end
    }

    def all_seen() -> dict[str, Connection]:
        found = seen()
        if "told off" not in found:  # rspd waits 2 s for its end
            come("told off", "routed", HELLO.replace(b"a.", b"b."))
        return found if {name: one.state for name, one in found.items()} == states else {}

    found = eventually(all_seen)
    assert set(states.values()) == set(STATES)
    assert len({one.id for one in found.values()}) == len(states)

    def shown(name: str, *fields: str) -> tuple[object, ...]:
        return tuple(getattr(found[name], field) for field in fields)

    assert shown("open", "proxy", "backend", "sent", "received", "via") == ("plain", there.address, 5, 6, "")
    assert shown("named", "proxy", "route", "said") == ("routed", "a.example", 'name="a.example" protocol=http')
    assert shown("named", "backend", "sent") == (there.address, len(HELLO))
    assert shown("told off", "backend", "route", "said") == ("", "", 'name="b.example" protocol=http')
    assert shown("from afar", "client", "sent", "received") == ("192.0.2.9:40000", 1, 2)
    assert shown("queued", "backend", "sent") == ("", 0)
    assert all(one.age >= one.idle >= 0 for one in found.values())

    # They go on.
    assert (proxy(tmp_path, "routed").silent, proxy(tmp_path, "full").queue) == (2, 1)
    clients["part"].sendall(HELLO[9:])
    clients["first"].close()
    clients["told off"].close()
    may_end.set()
    states |= {"part": "open", "queued": "open"}
    del states["first"], states["told off"], states["half"]
    eventually(lambda: {name: one.state for name, one in seen().items()} == states)
    later = seen()
    assert {name: one.id for name, one in later.items()} == {name: found[name].id for name in states}
    daemon.signal(signal.SIGTERM)
    eventually(lambda: status(tmp_path / "control.sock").process.ending)
    assert seen().keys() == later.keys()
    daemon.signal(signal.SIGTERM)  # they need not end by themselves


# Counts


def read_and_reset(sock: socket.socket) -> None:
    """A handler."""
    sock.recv(3)
    reset(sock)


def test_ends_bytes_and_failures_add_up_to_the_lines_of_the_log(tmp_path: Path, stack: ExitStack) -> None:
    """While connections are open, their bytes are counted; when they end, no byte is counted twice."""
    good = stack.enter_context(Backend(echo))
    breaks = stack.enter_context(Backend(read_and_reset))
    file = File(tmp_path, backend=good.address, deny="127.0.0.9")
    daemon = stack.enter_context(file.rspd(env=env(tmp_path)))

    def look() -> Proxy:
        found = proxy(tmp_path)
        assert found.accepted == found.open + sum(one.number for one in found.ends) + sum(
            one.number for one in found.refused
        )
        return found

    for size in (1, 1000, 300_000):
        with daemon.connect() as client:
            for _ in range(2):
                before = sum(one.sent for one in look().volumes)
                client.sendall(bytes(size))
                assert len(receive(client, size)) == size
                (volume,) = look().volumes
                assert (volume.sent - before, volume.received) == (size, volume.sent)
        eventually(lambda: not look().open)
    for _ in range(300):  # more than are counted at once
        with daemon.connect() as client:
            client.sendall(b"x")
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b"x"
    for _ in range(2):
        with pytest.raises(ConnectionResetError):  # by then, or when it reads
            with socket.create_connection(("127.0.0.1", daemon.port), PATIENCE, ("127.0.0.9", 0)) as refused:
                refused.recv(1)
    reset(daemon.connect())
    file.write(backend=breaks.address)
    file.reload(daemon)
    for _ in range(2):
        with daemon.connect() as client, pytest.raises(ConnectionResetError):
            client.sendall(b"abc")
            client.recv(1)
    file.reload(daemon, backend="127.0.0.1:1")
    with daemon.connect() as client:
        assert client.recv(1) == b""
    lines = daemon.wait_for_ends(307)
    eventually(lambda: not look().open)
    found = look()
    counted = {(one.backend, one.cause): one.number for one in found.ends}
    assert counted == Counter((line["backend"], line["cause"]) for line in lines)
    assert {cause for _, cause in counted} >= {"client-closed", "client-aborted", "backend-aborted", "backend-refused"}
    for volume in found.volumes:
        own = [line for line in lines if line["backend"] == volume.backend]
        assert volume.sent == sum(int(line["sent"]) for line in own)
        assert volume.received == sum(int(line["received"]) for line in own)
    assert found.seconds.number == len(lines)
    assert found.seconds.total == pytest.approx(sum(float(line["seconds"]) for line in lines), abs=0.16)
    assert [(one.reason, one.number) for one in found.refused] == [("deny", 2)]
    failed = {(one.cause, one.backend): (one.number, one.reason) for one in found.failures}
    assert failed["refused: deny", "-"] == (2, "in deny 127.0.0.9")
    assert failed["backend-aborted", breaks.address] == (2, "")
    assert failed["backend-refused", "-"] == (1, "127.0.0.1:1: Connection refused")
    assert all(0 <= one.ago < 60 for one in found.failures)
    assert found.last_minute.connections > 0 < found.last_10s.sent


def test_what_goes_on_at_a_proxy_that_a_reload_adds_is_shown_at_once(tmp_path: Path, stack: ExitStack) -> None:
    there = stack.enter_context(Backend(echo))
    own = {name: {"listen": f"127.0.0.1:{free_port()}", "backend": there.address} for name in ("old", "new")}
    file = File(tmp_path, listen=None, max_connections=9, proxies={"old": own["old"]})
    daemon = stack.enter_context(file.rspd(env=env(tmp_path)))
    host, _, port = own["old"]["listen"].partition(":")
    stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
    eventually(lambda: proxy(tmp_path, "old").open)  # so samples are taken, one each 5 s
    file.reload(daemon, proxies=own)
    host, _, port = own["new"]["listen"].partition(":")
    client = stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
    client.sendall(b"hello")
    assert receive(client, 5) == b"hello"
    found = proxy(tmp_path, "new")
    assert min(*found.last_10s, *found.last_minute) > 0


def test_the_times_to_connect_and_in_the_queue_are_counted(tmp_path: Path, stack: ExitStack) -> None:
    there = stack.enter_context(Backend(answer))
    limited = {"address": there.address, "max_connections": 1}
    daemon = stack.enter_context(File(tmp_path, backends=[limited], queue_timeout="1m").rspd(env=env(tmp_path)))
    with daemon.connect() as first:
        waiting = [stack.enter_context(daemon.connect()) for _ in range(3)]
        eventually(lambda: proxy(tmp_path).queue == 3)
        first.sendall(b"?")
        assert receive_all(first) == b"ok"
    for client in waiting:
        client.sendall(b"?")
        assert receive_all(client) == b"ok"
        client.close()  # it has had the backend until now
    assert daemon.wait_for_ends(4)
    assert proxy(tmp_path).queue_seconds.number == 3
    (seen,) = status(tmp_path / "control.sock").backends
    assert (seen.chosen, seen.connect.number, seen.failed, seen.open, seen.state) == (4, 4, 0, 0, "up")


# It costs nothing


def test_a_process_at_which_nobody_looks_sleeps(tmp_path: Path) -> None:
    with File(tmp_path, backend="127.0.0.1:1").rspd(env=env(tmp_path)) as daemon:
        eventually(lambda: state(daemon) == "S")
        before = switches(daemon)
        time.sleep(1.2)  # nothing is to happen: there is nothing to wait for
        assert switches(daemon) == before


def state(daemon: Daemon) -> str:
    """As in proc(5): S is asleep."""
    return Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(") ")[2][0]


def switches(daemon: Daemon) -> str:
    """How often the process has gone to sleep."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return "".join(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE))
