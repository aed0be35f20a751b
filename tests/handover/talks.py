"""A few connections to a backend of the test's own process, which sends everything back."""

from __future__ import annotations

import os
import re
import socket
from types import TracebackType

from tests.support import Backend, echo
from tests.system.machine import Machine
from tests.system.traffic import BACKEND, CONFIGURATION, LISTEN, connect

# A backend that sends everything back is not done before its client is.
MANY = CONFIGURATION + "max_connections: 100\n"

# How many descriptors systemd keeps of the control socket.
CONTROL = 1


def talk(sock: socket.socket, size: int = 3000) -> None:
    """Send bytes, and have them back."""
    data = os.urandom(size)
    sock.sendall(data)
    found = b""
    while len(found) < size:
        part = sock.recv(size - len(found))
        assert part, f"an end after {len(found)} of {size} bytes"
        found += part
    assert found == data


def served(port: int = LISTEN) -> None:
    """A new client is served."""
    with connect(port) as client:
        talk(client)


class Talks:
    """Connections of clients that talk with an echo when told to."""

    def __init__(self, count: int = 1, port: int = LISTEN) -> None:
        self.backend = Backend(echo, port=BACKEND)
        self.clients: list[socket.socket] = []
        try:
            self.add(count, port)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Talks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, count: int, port: int) -> None:
        """Connect more clients."""
        for _ in range(count):
            self.clients.append(connect(port))
            talk(self.clients[-1])

    def talk(self) -> None:
        """All say something, and hear it again."""
        for client in self.clients:
            talk(client)

    def end(self) -> None:
        """All clients end in order."""
        for client in self.clients:
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
            client.close()
        self.clients.clear()

    def close(self) -> None:
        """Nothing is left open."""
        for client in self.clients:
            client.close()
        self.backend.close()


def stored(machine: Machine, unit: str = "rspd") -> int:
    """How many descriptors systemd keeps for a service."""
    return int(machine.show("NFileDescriptorStore", unit))


def fields(line: str) -> dict[str, str]:
    """What a line of the log says."""
    return dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line))


def handovers(machine: Machine) -> list[int]:
    """Of each connection that has ended since the last `mark`, how many times it was handed over."""
    return [int(fields(line).get("handovers", 0)) for line in machine.log("^connection closed")]


def left_open(machine: Machine, ports: tuple[int, ...] = (LISTEN, BACKEND)) -> list[str]:
    """TCP connections that have these ports, and that not both of their ends have closed."""
    lines = machine.run("ss", "-Htan", "exclude", "time-wait", "exclude", "listening").stdout.splitlines()
    return [line for line in lines if any(re.search(rf":{port}\s", line) for port in ports)]
