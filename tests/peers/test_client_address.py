"""The process and the PROXY protocol between rspd and HAProxy, nginx and itself: all learn who the client is."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon import test_client_address as alone
from tests.daemon.test_client_address import LOCAL, Telling, client_at, exchange, name, versions
from tests.daemon.test_reload import File, receive, talk
from tests.peers.programs import haproxy, nginx
from tests.support import Backend, eventually, receive_all, rspd

# Fixtures.
backend, simple, telling = alone.backend, alone.simple, alone.telling


@versions
@pytest.mark.parametrize("peer", ["haproxy", "nginx", "rspd"])
def test_a_proxy_behind_learns_the_client(
    version: str, peer: str, tmp_path: Path, backend: Backend, telling: Telling
) -> None:
    """The client, rspd with send_proxy, the peer, which tells it on, the backend."""
    with ExitStack() as stack:
        behind = accepting(peer, stack, tmp_path, backend.port)
        file = File(tmp_path, listen=f"{LOCAL}:0", backend=f"{LOCAL}:{behind}", send_proxy=version)
        with file.rspd() as daemon:
            clients = [exchange(daemon.port, host) for host in ("127.0.0.7", "127.0.0.8")]
            # nginx tells on where its own client connected to.
            assert [told.source for told in telling.told] == clients
            assert {told.destination for told in telling.told} <= {(LOCAL, daemon.port), (LOCAL, behind)}


def accepting(peer: str, stack: ExitStack, folder: Path, port: int) -> int:
    """A peer that takes the header of rspd's, and tells its backend at this port the client too; its own port."""
    if peer == "haproxy":
        text = "listen test\n mode tcp\n bind 127.0.0.1:@PORT@ accept-proxy\n"
        return stack.enter_context(haproxy(f"{text} server backend 127.0.0.1:{port} send-proxy-v2\n"))
    if peer == "nginx":
        own = "set_real_ip_from 127.0.0.0/8; proxy_protocol on;"
        server = f"listen 127.0.0.1:@PORT@ proxy_protocol; {own} proxy_pass 127.0.0.1:{port};"
        return stack.enter_context(nginx(f"stream {{ server {{ {server} }} }}"))
    path = folder / "behind.yaml"
    path.write_text(f"listen: 127.0.0.1:0\nbackend: 127.0.0.1:{port}\naccept_proxy: 127.0.0.1\nsend_proxy: v1\n")
    return stack.enter_context(rspd("-c", str(path), listen=())).port


@pytest.mark.parametrize("accepted", ["haproxy", "nginx"])
@versions
def test_a_web_server_behind_learns_the_client(accepted: str, version: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        if accepted == "haproxy":
            answer = 'return status 200 content-type text/plain lf-string "%[src]:%[src_port]"'
            text = f"listen test\n mode http\n bind 127.0.0.1:@PORT@ accept-proxy\n http-request {answer}\n"
            behind = stack.enter_context(haproxy(text))
        else:
            answer = 'return "$proxy_protocol_addr:$proxy_protocol_port";'
            server = f"listen 127.0.0.1:@PORT@ proxy_protocol; {answer}"
            behind = stack.enter_context(nginx(f"stream {{ server {{ {server} }} }}"))
        file = File(tmp_path, listen=f"{LOCAL}:0", backend=f"{LOCAL}:{behind}", send_proxy=version)
        with file.rspd() as daemon, client_at(daemon.port, "127.0.0.7") as client:
            if accepted == "haproxy":
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answered = receive_all(client).decode().rpartition("\r\n\r\n")[2]
            assert answered == name(client.getsockname())


@pytest.mark.parametrize("front", ["haproxy send-proxy", "haproxy send-proxy-v2-ssl-cn", "nginx", "rspd"])
def test_a_proxy_in_front_names_the_client(front: str, tmp_path: Path, simple: Backend) -> None:
    """The client, the peer, rspd with accept_proxy."""
    keys = {"max_connections": 9, "accept_proxy": LOCAL, "deny": "127.0.0.9", "max_connections_per_client": 1}
    file = File(tmp_path, listen=f"{LOCAL}:0", backend=simple.address, **keys)
    with file.rspd() as daemon, ExitStack() as stack:
        port = in_front(front, stack, tmp_path, daemon.port)
        with client_at(port, "127.0.0.7") as client, client_at(port, "127.0.0.8") as other:
            assert [receive(each, 1) for each in (client, other)] == [b"!", b"!"]
            talk(client)
            for host in ("127.0.0.9", "127.0.0.7"):
                assert not serves(port, host)
            names = [name(each.getsockname()) for each in (client, other)]
        lines = daemon.wait_for("connection closed", 2)
        assert sorted(re.findall(r"client=(\S+) via=127.0.0.1:\d+ ", "\n".join(lines))) == sorted(names)
        eventually(lambda: len(daemon.find("client refused client=127.0.0.[79]:")) == 2)


def in_front(front: str, stack: ExitStack, folder: Path, port: int) -> int:
    """A peer that tells rspd at this port who its client is; its own port."""
    if front == "rspd":
        path = folder / "front.yaml"
        text = "listen: 127.0.0.1:0\nsend_proxy: v2\nmax_connections: 9\n"
        path.write_text(f"{text}backend: 127.0.0.1:{port}\n")
        return stack.enter_context(rspd("-c", str(path), listen=())).port
    if front == "nginx":
        server = f"listen 127.0.0.1:@PORT@; proxy_pass 127.0.0.1:{port}; proxy_protocol on;"
        return stack.enter_context(nginx(f"stream {{ server {{ {server} }} }}"))
    option = front.partition(" ")[2]
    text = f"listen test\n mode tcp\n bind 127.0.0.1:@PORT@\n server a 127.0.0.1:{port} {option}\n"
    return stack.enter_context(haproxy(text))


def serves(port: int, host: str) -> bool:
    """Whether a client from this address is greeted; if not, its connection ends, one way or the other."""
    try:
        with client_at(port, host) as client:
            return client.recv(1) == b"!"
    except ConnectionResetError:
        return False
