"""rspd/protocols/proxy_protocol.py: headers exchanged with HAProxy and nginx."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rspd.protocols.proxy_protocol import V1_MAX, Header, HostPort, encode, parse
from tests.peers.programs import haproxy, nginx
from tests.protocols.test_proxy_protocol import CLIENT4, CLIENT6, NOBODY, SERVER4, SERVER6, versions
from tests.support import PATIENCE, loopback, receive_all

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@contextmanager
def backend() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        yield listener


def accepted(listener: socket.socket) -> tuple[Header, bytes]:
    """The header of the next connection, and all that follows it."""
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(PATIENCE)
        data = receive_all(sock)
    found = parse(data)
    assert found, data
    return found[0], data[found[1] :]


def say(host: str, port: int, data: bytes) -> HostPort:
    """Connect, send this, end the stream; the address it came from."""
    with socket.create_connection((host, port), PATIENCE) as sock:
        sock.sendall(data)
        name = sock.getsockname()
        sock.shutdown(socket.SHUT_WR)
        receive_all(sock)
        return name[0], name[1]


families = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])


def exchange(listener: socket.socket, host: str, port: int) -> None:
    """What the backend finds is who connected, to where, and what he said."""
    found: list[tuple[Header, bytes]] = []
    thread = threading.Thread(target=lambda: found.append(accepted(listener)))
    thread.start()
    client = say(host, port, b"question")
    thread.join(PATIENCE)
    assert found == [(Header(client, (host, port)), b"question")]


@families
@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"])
def test_what_haproxy_sends_is_parsed(family: int, option: str) -> None:
    host = loopback(family)
    with backend() as listener:
        config = f"""
listen test
    mode tcp
    unique-id-format %{{+X}}o\\ %ci:%cp_%Ts
    bind {host}:@PORT@
    server backend 127.0.0.1:{listener.getsockname()[1]} {option}
"""
        with haproxy(config, host) as port:
            exchange(listener, host, port)


@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2"])
def test_what_haproxy_sends_for_a_unix_client_is_parsed(tmp_path: Path, option: str) -> None:
    with backend() as listener:
        config = f"""
listen test
    mode tcp
    bind 127.0.0.1:@PORT@
    bind {tmp_path}/socket
    server backend 127.0.0.1:{listener.getsockname()[1]} {option}
"""
        with haproxy(config), socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/socket")
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert accepted(listener) == (NOBODY, b"question")


@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2"])
def test_a_health_check_of_haproxy_is_parsed(option: str) -> None:
    with backend() as listener:
        config = f"""
listen test
    mode tcp
    bind 127.0.0.1:@PORT@
    server backend 127.0.0.1:{listener.getsockname()[1]} {option} check inter 100ms
"""
        with haproxy(config):
            sock, address = listener.accept()
            with sock:
                # Not up to the end of the stream: the check ends in RST.
                found = parse(sock.recv(V1_MAX))
            assert found
            assert found[0] == (NOBODY if option == "send-proxy-v2" else Header(address, listener.getsockname()))


@families
def test_what_nginx_sends_is_parsed(family: int) -> None:
    host = loopback(family)
    where = f"[{host}]" if ":" in host else host
    with backend() as listener:
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        config = f"stream {{ server {{ listen {where}:@PORT@; proxy_pass {target}; proxy_protocol on; }} }}"
        with nginx(config, host) as port:
            exchange(listener, host, port)


@pytest.fixture(scope="module")
def accepting_haproxy() -> Iterator[int]:
    config = """
listen test
    mode http
    bind 127.0.0.1:@PORT@ accept-proxy
    http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[dst] %[dst_port]"
"""
    with haproxy(config) as port:
        yield port


@pytest.fixture(scope="module")
def accepting_nginx() -> Iterator[int]:
    names = " ".join(f"$proxy_protocol_{name}" for name in ("addr", "port", "server_addr", "server_port"))
    with nginx(f'stream {{ server {{ listen 127.0.0.1:@PORT@ proxy_protocol; return "{names}"; }} }}') as port:
        yield port


def ask(port: int, data: bytes) -> tuple[str, HostPort]:
    """What is answered to this, and the address it came from."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(data)
        name = sock.getsockname()
        return receive_all(sock).decode().rpartition("\r\n\r\n")[2], (name[0], name[1])


def told(source: HostPort, destination: HostPort) -> str:
    hosts = [
        host if ":" in host or ":" not in source[0] + destination[0] else f"::ffff:{host}"
        for host in (source[0], destination[0])
    ]
    return f"{hosts[0]} {source[1]} {hosts[1]} {destination[1]}"


relayed = pytest.mark.parametrize(
    ("source", "destination"),
    [(CLIENT4, SERVER4), (CLIENT6, SERVER6), (CLIENT4, SERVER6), (CLIENT6, SERVER4), (("0.0.0.0", 1), ("::", 65535))],
)


@versions
@relayed
def test_haproxy_accepts_what_is_encoded(
    accepting_haproxy: int, version: str, source: HostPort, destination: HostPort
) -> None:
    header = encode(version, source, destination)
    assert ask(accepting_haproxy, header + b"GET / HTTP/1.0\r\n\r\n")[0] == told(source, destination)


@versions
def test_haproxy_takes_the_addresses_of_the_connection_where_none_are_encoded(
    accepting_haproxy: int, version: str
) -> None:
    answer, own = ask(accepting_haproxy, encode(version, None, None) + b"GET / HTTP/1.0\r\n\r\n")
    assert answer == told(own, ("127.0.0.1", accepting_haproxy))


@versions
@relayed
def test_nginx_accepts_what_is_encoded(
    accepting_nginx: int, version: str, source: HostPort, destination: HostPort
) -> None:
    assert ask(accepting_nginx, encode(version, source, destination))[0] == told(source, destination)


@versions
def test_nginx_accepts_that_no_addresses_are_encoded(accepting_nginx: int, version: str) -> None:
    assert ask(accepting_nginx, encode(version, None, None))[0] == "   "
