"""Sites behind rspd: backends that tell their names, and clients that ask for them in the words of their protocols."""

from __future__ import annotations

import http.client
import io
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tests.fleet import stays
from tests.support import PATIENCE, Backend, Daemon, receive_all


@contextmanager
def sites(*names: str) -> Iterator[Mapping[str, str]]:
    """Backends that tell their names, then send everything back; their addresses by their names."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Backend(stays(f"{name}!"))).address for name in names}


def come(daemon: Daemon, data: bytes = b"", *, host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A client from this address that has said this."""
    client = socket.create_connection(("127.0.0.1", port or daemon.port), PATIENCE, source_address=(host, 0))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(data)
    return client


def site_of(client: socket.socket) -> str:
    """The name that the backend of a client tells."""
    name = b""
    while not name.endswith(b"!"):
        part = client.recv(1)
        assert part, f"ended after {name!r}"
        name += part
    return name[:-1].decode()


def lead(daemon: Daemon, data: bytes, **options: object) -> str:
    """The site to which a client is led that says this. All of it, and nothing else, has to reach the site."""
    with come(daemon, data, **options) as client:  # type: ignore[arg-type]
        name = site_of(client)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == data
    return name


def get(host: str = "", path: str = "/", method: str = "GET") -> bytes:
    """A request; without a host, one of HTTP/1.0."""
    if not host:
        return f"{method} {path} HTTP/1.0\r\n\r\n".encode()
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


class _Received(io.BytesIO):
    """Bytes that http.client takes for a socket."""

    def makefile(self, *_: object) -> io.BytesIO:
        return self


def answer_to(client: socket.socket, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    """What a client is answered, all up to the end of the stream, as Python's own client understands it."""
    data = receive_all(client)
    response = http.client.HTTPResponse(_Received(data), method=method)  # type: ignore[arg-type]
    response.begin()
    body = response.read()
    assert data.endswith(b"\r\n\r\n" + body), "something follows the answer"
    return response, body
