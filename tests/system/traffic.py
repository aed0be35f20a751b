"""Clients and backends for the machines."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from collections.abc import Callable

from tests.support import PATIENCE, Backend, eventually

LISTEN = 8080  # as the installed configuration has it
BACKEND = 8000

CONFIGURATION = f"listen: 127.0.0.1:{LISTEN}\nbackend: 127.0.0.1:{BACKEND}\n"

CONTENT = random.Random(1).randbytes(16 << 20)


def connect(port: int = LISTEN) -> socket.socket:
    """A client."""
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def ask(port: int = LISTEN) -> bytes:
    """Send a request, and return the answer."""
    with connect(port) as client:
        return ask_on(client)


def ask_on(client: socket.socket) -> bytes:
    """Send a request on a connection, and return the answer."""
    client.sendall(b"?")
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def saying(text: bytes) -> Callable[[socket.socket], None]:
    """A handler that reads a request, if there is one, and sends a text."""

    def say(sock: socket.socket) -> None:
        if sock.recv(65536):
            sock.sendall(text)

    return say


class Download:
    """A client that downloads CONTENT from a backend of its own, which stops halfway until it is told to go on."""

    def __init__(self, port: int = LISTEN) -> None:
        self._go_on = threading.Event()
        self._received = bytearray()
        self._end = ""
        self._backend = Backend(self._send, port=BACKEND)
        self._client = connect(port)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()
        eventually(lambda: len(self._received) == len(CONTENT) // 2, "half of the download is there")

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        self._backend.close()
        self._thread.join(PATIENCE)

    def _send(self, sock: socket.socket) -> None:
        sock.sendall(CONTENT[: len(CONTENT) // 2])
        assert self._go_on.wait(60)
        sock.sendall(CONTENT[len(CONTENT) // 2 :])

    def _receive(self) -> None:
        try:
            with self._client:
                while part := self._client.recv(1 << 20):
                    self._received += part
            self._end = "closed"
        except OSError as error:
            self._end = type(error).__name__

    def go_on(self) -> None:
        """Let the backend send the other half."""
        self._go_on.set()

    def end(self) -> str:
        """Wait for the end: `complete`, or how it ended before."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"the download goes on after {len(self._received)} bytes"
        same = hashlib.sha256(self._received).digest() == hashlib.sha256(CONTENT).digest()
        return "complete" if self._end == "closed" and same else f"{self._end} after {len(self._received)} bytes"
