"""rspd, nginx and HAProxy as the same router by server name: over real ClientHellos, cut ones and broken ones."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from rspd.protocols.tls import RECORDS_MAX, alert
from tests.peers import hellos
from tests.peers.programs import haproxy, nginx
from tests.support import PATIENCE, Backend, receive_all, rspd

# How long a router waits for a whole hello. All that is sent ends with the end of the stream, so that nobody does.
TIMEOUT = 5

RSPD = """
max_connections: 100
first_bytes_timeout: {timeout}
routes:
  - {{server_name: one.example, backend: "{one}"}}
  - {{server_name: [two.example, "*.two.example"], backend: "{two}"}}
  - {{backend: "{rest}"}}
"""

NGINX = """stream {{
    map $ssl_preread_server_name $chosen {{
        hostnames;
        one.example {one};
        two.example {two};
        *.two.example {two};
        default {rest};
    }}
    server {{
        listen 127.0.0.1:@PORT@;
        ssl_preread on;
        preread_timeout {timeout}s;
        proxy_pass $chosen;
        proxy_half_close on;
    }}
}}
"""

HAPROXY = """frontend test
    mode tcp
    bind 127.0.0.1:@PORT@
    tcp-request inspect-delay {timeout}s
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    use_backend one if {{ req.ssl_sni -i one.example }}
    use_backend two if {{ req.ssl_sni -i two.example }} or {{ req.ssl_sni -i -m end .two.example }}
    default_backend rest
backend one
    mode tcp
    server one {one}
backend two
    mode tcp
    server two {two}
backend rest
    mode tcp
    server rest {rest}
"""

SITES = ("one", "two", "rest")
REFUSED = "refused"


def tell(name: str) -> Backend:
    """A server that says its name, and ends after the client."""

    def handler(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(name.encode())
        receive_all(sock)

    return Backend(handler)


def ask(port: int, parts: Sequence[bytes]) -> str:
    """To whom these bytes lead, each part sent alone: one of SITES, or REFUSED."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for part in parts:
                client.sendall(part)
            client.shutdown(socket.SHUT_WR)
            told = receive_all(client)
        except ConnectionError:
            return REFUSED
    return told.decode() if told in (b"one", b"two", b"rest") else REFUSED


@dataclass
class Routers:
    """The ports of the three."""

    rspd: int
    nginx: int
    haproxy: int


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routers]:
    """All three with the same routes to the same servers."""
    with ExitStack() as stack:
        addresses = {name: stack.enter_context(tell(name)).address for name in SITES}

        def filled(text: str) -> str:
            return text.format(**addresses, timeout=TIMEOUT)

        file = tmp_path_factory.mktemp("hellos") / "rspd.yaml"
        file.write_text(filled(RSPD))
        ports = stack.enter_context(nginx(filled(NGINX))), stack.enter_context(haproxy(filled(HAPROXY)))
        daemon = stack.enter_context(rspd("-c", str(file)))
        yield Routers(daemon.port, *ports)


@pytest.fixture(scope="module")
def real() -> Mapping[str, bytes]:
    """At least a hundred of Python alone, and those of the programs that are here."""
    found = hellos.real()
    assert len(found) >= 100
    return found


def wanted(called: str) -> str:
    """Where a real hello is to lead, by what it is called."""
    words = called.lower().split()
    if "one.example" in words:
        return "one"
    return "two" if called == hellos.CHROMIUM or any(word.endswith("two.example") for word in words) else "rest"


def test_a_real_hello_leads_to_the_same_server_with_all_three(real: Mapping[str, bytes], routers: Routers) -> None:
    chosen = {}
    for called, hello in real.items():
        here = ask(routers.rspd, [hello])
        assert (here, here) == (ask(routers.nginx, [hello]), ask(routers.haproxy, [hello])), called
        chosen[called] = here
    assert chosen == {called: wanted(called) for called in real}


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_hello_in_segments_leads_to_the_same_server_with_all_three(
    size: int, real: Mapping[str, bytes], routers: Routers
) -> None:
    for called, hello in sample(real):
        parts = hellos.segments(hello, size)
        assert ask(routers.rspd, parts) == wanted(called), called
        assert ask(routers.nginx, parts) == ask(routers.haproxy, parts) == wanted(called), called


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("segment", [1 << 16, 50])
def test_a_hello_in_records_leads_to_the_same_server_as_with_nginx(
    size: int, segment: int, real: Mapping[str, bytes], routers: Routers
) -> None:
    for called, hello in sample(real):
        parts = hellos.segments(hellos.records(hello, size), segment)
        many = (len(hello) - 5) / size > RECORDS_MAX
        assert ask(routers.nginx, parts) == wanted(called), called
        assert ask(routers.rspd, parts) == ("refused" if many else wanted(called)), called


def test_haproxy_reads_no_hello_in_two_records(real: Mapping[str, bytes], routers: Routers) -> None:
    """So it is left out where there are several. If this fails, it can take part."""
    parts = [hellos.records(real["python usual one.example h2"], 100)]
    assert (ask(routers.rspd, parts), ask(routers.haproxy, parts)) == ("one", "rest")


def sample(real: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    """Some of each program."""
    return [*list(real.items())[::9], *((called, hello) for called, hello in real.items() if called == hellos.CHROMIUM)]


def test_another_hello_is_refused_or_leads_where_others_lead_it_too(
    real: Mapping[str, bytes], routers: Routers
) -> None:
    refused = 0
    for called, hello in hellos.broken(real["python usual one.example h2"]).items():
        chosen = ask(routers.rspd, [hello])
        if chosen == REFUSED:
            refused += 1
            continue
        assert chosen in (ask(routers.nginx, [hello]), ask(routers.haproxy, [hello])), called
        # The server that rspd leads to sees the same name, or refuses it.
        assert seen(hello) in (chosen, REFUSED), called
    assert refused > 100


def seen(hello: bytes) -> str:
    """Where the name leads that OpenSSL sees as a server; REFUSED if it sees a fault before it asks for the name."""
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda sock, name, context: asked.append(name)
    given = ssl.MemoryBIO()
    given.write(hello)
    given.write_eof()
    with pytest.raises(ssl.SSLError):  # it has no certificate, or does not understand the hello
        context.wrap_bio(given, ssl.MemoryBIO(), server_side=True).do_handshake()
    if not asked:
        return REFUSED
    name = (asked[0] or "").lower()
    return "one" if name == "one.example" else "two" if f".{name}".endswith(".two.example") else "rest"


def test_a_broken_hello_is_answered_by_an_alert(routers: Routers) -> None:
    with socket.create_connection(("127.0.0.1", routers.rspd), timeout=PATIENCE) as client:
        client.sendall(hellos.made((0, hellos.server_name(b"one.example")), (0, hellos.server_name(b"two.example"))))
        assert receive_all(client) == alert(50)
