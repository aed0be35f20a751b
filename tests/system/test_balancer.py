"""Two proxies in one service, with all that balancing has: through failures, and reloads under load."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from rspd.protocols.proxy_protocol import Header
from tests.load import load
from tests.peers.programs import receive_header
from tests.support import PATIENCE, Backend, eventually
from tests.system.machine import Machine
from tests.system.test_socket import socket_unit

WEB, MAIL = 8080, 8025

# What runs at these ports: two web servers, a spare, and what mail goes to.
ONE, TWO, SPARE, MAILBOX = 8001, 8002, 8003, 8004

RELOADS = 20


def configuration(turn: int = 0) -> str:
    """Of every other turn the weights are different, there is a proxy more, and one backend less."""
    odd = turn % 2
    proxies: dict[str, Any] = {
        "web": {
            "backends": [
                {"address": f"127.0.0.1:{ONE}", "weight": 2 + odd},
                f"127.0.0.1:{TWO}",
                {"address": f"127.0.0.1:{SPARE}", "backup": True},
            ],
            "health": {"http": "/health", "interval": "200ms", "rise": 1, "fall": 2},
            "queue_timeout": "10s",
            "allow": "127.0.0.0/8",
            "deny": "127.0.0.9",
        },
        "mail": {"listen": f"127.0.0.1:{MAIL}", "backend": f"127.0.0.1:{MAILBOX}", "send_proxy": "v2"},
    }
    if odd:
        proxies["web"]["backends"].pop(1)
        proxies["news"] = {"listen": "127.0.0.1:8119", "backend": f"127.0.0.1:{TWO}"}
    return json.dumps({"max_connections": 100, "proxies": proxies})


def web_server(port: int) -> Callable[[socket.socket], None]:
    """A handler that is healthy, sends lines back, and says which one it is to who asks for it."""

    def handle(sock: socket.socket) -> None:
        with sock.makefile("rb") as lines:
            for line in lines:
                if line.startswith(b"GET /health "):
                    sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                    return
                sock.sendall(b"%d\n" % port if line == b"who\n" else line)

    return handle


class Mailbox:
    """A handler that takes a PROXY header, and then sends lines back. `told` has the headers."""

    def __init__(self) -> None:
        self.told: list[Header] = []

    def __call__(self, sock: socket.socket) -> None:
        self.told.append(receive_header(sock))
        with sock.makefile("rb") as lines:
            for line in lines:
                sock.sendall(line)


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    """A client from this address."""
    return socket.create_connection(("127.0.0.1", port), PATIENCE, source_address=(host, 0))


def say(client: socket.socket, line: bytes) -> bytes:
    client.sendall(line)
    found = b""
    while not found.endswith(b"\n"):
        part = client.recv(100)
        assert part, f"ended after {found!r}"
        found += part
    return found


def who() -> int:
    """Which web server answers a new client."""
    with connect(WEB) as client:
        return int(say(client, b"who\n"))


def status(machine: Machine) -> str:
    """What `systemctl status rspd` says of the proxies."""
    lines = machine.systemctl("status", "rspd").stdout.splitlines()
    return next(line for line in lines if "Status: " in line)


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture
def servers(machine: Machine, mailbox: Mailbox) -> Iterator[ExitStack]:
    """All that runs there; rspd is started by the first client of web."""
    machine.write("/etc/rspd.yaml", configuration())
    socket_unit(machine, "web", f"ListenStream=127.0.0.1:{WEB}")
    with ExitStack() as stack:
        for port in (ONE, TWO, SPARE):
            stack.enter_context(Backend(web_server(port), port=port))
        stack.enter_context(Backend(mailbox, port=MAILBOX))
        yield stack


def test_the_first_client_of_one_starts_both_and_each_has_its_share(
    machine: Machine, servers: ExitStack, mailbox: Mailbox
) -> None:
    assert machine.show("ActiveState") == "inactive"
    assert who() in (ONE, TWO)
    assert machine.log(rf'^listening address=127.0.0.1:{WEB} proxy=web socket="web"$')
    assert machine.log(rf"^listening address=127.0.0.1:{MAIL} proxy=mail$")
    assert Counter(who() for _ in range(30)) == {ONE: 20, TWO: 10}
    with connect(MAIL, "127.0.0.7") as client:
        assert say(client, b"hello\n") == b"hello\n"
        assert mailbox.told == [Header(client.getsockname(), ("127.0.0.1", MAIL))]
        up = "3 of 3 backends up"
        mail = f"mail serving 1 of 100, backend 127.0.0.1:{MAILBOX}"
        told = f'Status: "32 served; web serving 0 of 100, {up}; {mail}"'
        eventually(lambda: told in status(machine), told)
    with pytest.raises(ConnectionResetError), connect(WEB, "127.0.0.9") as client:
        client.recv(1)
    assert machine.log('^client refused client=127.0.0.9:.* proxy=web reason="in deny 127.0.0.9"$')


def test_reloads_under_load_refuse_cut_and_misroute_nobody(machine: Machine, servers: ExitStack) -> None:
    assert who()
    pid = machine.pid()
    with connect(WEB) as kept, load(4, {"web": f"127.0.0.1:{WEB}", "mail": f"127.0.0.1:{MAIL}"}) as clients:
        assert say(kept, b"web\n") == b"web\n"
        for turn in range(1, RELOADS + 1):
            clients.more()
            machine.write("/etc/rspd.yaml", configuration(turn))
            machine.systemctl("reload", "rspd")
            others = 3 if turn % 2 else 2
            eventually(lambda others=others: machine.show("StatusText").count("serving") == others)  # type: ignore[misc]
            assert say(kept, b"web\n") == b"web\n"
            if turn % 2:
                with connect(8119) as client:
                    assert say(client, b"news\n") == b"news\n"
    assert clients.errors == []
    assert clients.clients > 20 * RELOADS
    assert machine.pid() == pid
    assert len(machine.log(f"^reloaded listen=127.0.0.1:{WEB},127.0.0.1:{MAIL}")) == RELOADS
    machine.systemctl("stop", "rspd-web.socket", "rspd")
    assert machine.show("Result") == "success"


def test_backends_that_end_are_replaced_and_come_back(machine: Machine) -> None:
    machine.write("/etc/rspd.yaml", configuration())
    socket_unit(machine, "web", f"ListenStream=127.0.0.1:{WEB}")

    def down(number: int) -> None:
        eventually(lambda: f"{3 - number} of 3 backends up" in status(machine))

    with ExitStack() as stack:
        one, two, spare = (stack.enter_context(Backend(web_server(port), port=port)) for port in (ONE, TWO, SPARE))
        assert {who() for _ in range(3)} == {ONE, TWO}
        one.close()
        assert {who() for _ in range(5)} == {TWO}
        down(1)
        two.close()
        assert {who() for _ in range(5)} == {SPARE}
        down(2)
        spare.close()
        down(3)
        with connect(WEB) as client:
            client.sendall(b"who\n")
            stack.enter_context(Backend(web_server(TWO), port=TWO))
            assert client.recv(100) == b"%d\n" % TWO, "it has waited"
        stack.enter_context(Backend(web_server(ONE), port=ONE))
        down(1)
        shares = Counter(who() for _ in range(30))
        assert shares.keys() == {ONE, TWO}
        assert abs(shares[ONE] - 20) <= 1, "what comes back may begin with a turn more"
    for port in (ONE, TWO, SPARE):
        assert len(machine.log(f"^backend down proxy=web backend=127.0.0.1:{port} reason=")) == 1
    for port in (ONE, TWO):
        assert len(machine.log(f"^backend up proxy=web backend=127.0.0.1:{port} seconds=")) == 1
