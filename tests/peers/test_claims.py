"""What README.md claims about others, held against the real programs: how what is cut ends for its client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers.programs import haproxy, nginx
from tests.support import PATIENCE, Backend, is_reset, reset, rspd

PART = b"x" * 1000  # of an answer that has more
TIMEOUT = 2  # seconds of silence

BACKEND_RESETS, TIMEOUT_ENDS_IT = "the backend resets", "a timeout ends it"
cut = pytest.mark.parametrize("how", [BACKEND_RESETS, TIMEOUT_ENDS_IT])


@cut
def test_what_is_cut_looks_cut_to_the_client_of_rspd(how: str, tmp_path: Path) -> None:
    path = tmp_path / "rspd.yaml"
    path.write_text(f"idle_timeout: {TIMEOUT}s\n" if how == TIMEOUT_ENDS_IT else "")
    with cutting(how) as (backend, arrived), rspd("-c", str(path), "-b", f"127.0.0.1:{backend}") as daemon:
        assert looks_cut(daemon.port, arrived)
        (end,) = daemon.wait_for_ends(1)
    assert end["cause"] == ("idle-timeout" if how == TIMEOUT_ENDS_IT else "backend-aborted")
    assert end["received"] == str(len(PART))


@cut
def test_what_is_cut_looks_complete_to_the_client_of_haproxy(how: str) -> None:
    timeouts = f" timeout client {TIMEOUT}s\n timeout server {TIMEOUT}s\n" if how == TIMEOUT_ENDS_IT else ""
    with cutting(how) as (backend, arrived):
        server = f" server backend 127.0.0.1:{backend}\n"
        with haproxy(f"listen test\n mode tcp\n bind 127.0.0.1:@PORT@\n{timeouts}{server}") as port:
            assert not looks_cut(port, arrived)


@cut
def test_what_is_cut_looks_complete_to_the_client_of_nginx(how: str) -> None:
    timeout = f"proxy_timeout {TIMEOUT}s;" if how == TIMEOUT_ENDS_IT else ""
    with cutting(how) as (backend, arrived):
        server = f"listen 127.0.0.1:@PORT@; {timeout} proxy_pass 127.0.0.1:{backend};"
        with nginx(f"stream {{ server {{ {server} }} }}") as port:
            assert not looks_cut(port, arrived)


@contextmanager
def cutting(how: str) -> Iterator[tuple[int, threading.Event]]:
    """A backend that sends a part of its answer, once; yields its port, and what to set when the part has arrived.

    It then resets, or is silent until the connection ends: it never ends the stream itself.
    """
    arrived = threading.Event()

    def handler(sock: socket.socket) -> None:
        sock.recv(64)
        sock.sendall(PART)
        assert arrived.wait(PATIENCE)
        if how == BACKEND_RESETS:
            reset(sock)
        else:
            is_reset(sock)

    with Backend(handler) as backend:
        yield backend.port, arrived
    assert backend.accepted == 1
    assert not backend.errors


def looks_cut(port: int, arrived: threading.Event) -> bool:
    """Whether a client that has got the part sees a reset after it, rather than the normal end."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall(b"question")
        got = b""
        while len(got) < len(PART):
            data = client.recv(len(PART))
            assert data, f"ended after {len(got)} bytes"
            got += data
        assert got == PART
        arrived.set()
        return is_reset(client)
