"""The process and its routes: which backend a client gets by what it says first, and what log and status say."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rspd.protocols.first import HEAD_MAX
from rspd.protocols.http import PREFACE
from rspd.protocols.proxy_protocol import encode
from tests.daemon.sites import come, get, lead, site_of, sites
from tests.fleet import File, talks
from tests.manager import service
from tests.routing.clients import hello, records
from tests.support import PATIENCE, Backend, free_port, is_reset, receive_all

Sites = Mapping[str, str]


@pytest.fixture
def site() -> Iterator[Sites]:
    """The addresses of backends that tell these names."""
    with sites("one", "two", "three", "rest") as addresses:
        yield addresses


def of(site: Sites, *routes: tuple[str, Mapping[str, object]]) -> list[dict[str, object]]:
    """Routes, each to one of the sites."""
    return [{**keys, "backend": site[name]} for name, keys in routes]


# By what clients say


def test_one_port_is_for_many_sites_and_protocols(tmp_path: Path, site: Sites) -> None:
    routes = of(
        site,
        ("one", {"server_name": ["one.org", "*.one.org"]}),
        ("two", {"server_name": "two.org", "alpn": "imap"}),
        ("one", {"host": "one.org"}),
        ("two", {"host": "one.org", "path": ["/api", "/x/y"]}),
        ("three", {"protocol": ["ssh", "http2"]}),
        ("rest", {}),
    )
    asked = [
        (hello("one.org"), "one"),
        (hello("A.B.One.Org"), "one"),
        (hello("two.org"), "rest"),
        (hello("other.org"), "rest"),
        (get("one.org"), "one"),
        (get("ONE.org.:8080"), "one"),
        (get("one.org", "/apis"), "one"),
        (get("one.org", "/api/users?x=/"), "two"),
        (get("one.org", "http://one.org/x/y"), "two"),
        (get("two.org", "/api"), "rest"),
        (get(), "rest"),
        (PREFACE, "three"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "three"),
        (b"\0\1\2unknown", "rest"),
        (b"EHLO a.org\r\n", "rest"),
    ]
    with File(tmp_path, routes=routes).rspd() as daemon:
        assert [lead(daemon, data) for data, _ in asked] == [name for _, name in asked]


def test_who_says_nothing_in_time_is_silent(tmp_path: Path, site: Sites) -> None:
    routes = of(site, ("one", {"server_name": "a.org"}), ("two", {"protocol": "silent"}), ("rest", {}))
    file = File(tmp_path, routes=routes, first_bytes_timeout="100ms")
    with file.rspd() as daemon:
        with come(daemon) as client:
            assert site_of(client) == "two"
            assert talks(client)
        assert lead(daemon, b"\0") == "rest"
        # On a busy machine, the end of the second may be seen first.
        assert max(float(end["seconds"]) for end in daemon.wait_for_ends(2)) >= 0.1
        file.reload(daemon, routes=routes[:1] + routes[2:])
        with come(daemon) as client:
            assert site_of(client) == "rest"


def test_where_a_client_comes_from_needs_no_byte_of_it(tmp_path: Path, site: Sites) -> None:
    routes = of(site, ("one", {"from": "127.0.0.2"}), ("two", {"from": ["127.0.0.0/30", "unix"]}), ("rest", {}))
    listen = ["127.0.0.1:0", f"{tmp_path}/socket"]
    with File(tmp_path, routes=routes, listen=listen, first_bytes_timeout="1h").rspd() as daemon:
        daemon.wait_for("listening", 2)
        for host, name in ("127.0.0.2", "one"), ("127.0.0.3", "two"), ("127.0.0.9", "rest"):
            with come(daemon, host=host) as client:
                assert site_of(client) == name
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(f"{tmp_path}/socket")
            assert site_of(client) == "two"


def test_networks_count_beside_what_a_client_says(tmp_path: Path, site: Sites) -> None:
    routes = of(site, ("one", {"host": "a.org", "from": "127.0.0.2"}), ("two", {"host": "a.org"}), ("rest", {}))
    with File(tmp_path, routes=routes).rspd() as daemon:
        assert lead(daemon, get("a.org"), host="127.0.0.2") == "one"
        assert lead(daemon, get("a.org")) == "two"
        assert lead(daemon, get("b.org"), host="127.0.0.2") == "rest"


def test_http2_without_tls_is_led_to_all_others_where_no_route_asks_for_it(tmp_path: Path, site: Sites) -> None:
    with File(tmp_path, routes=of(site, ("one", {"host": "a.org"}), ("rest", {}))).rspd() as daemon:
        assert lead(daemon, PREFACE) == "rest"


# Pieces


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (hello("a.org"), "one"),
        (hello("a.org", HEAD_MAX), "one"),
        (records(hello("a.org", HEAD_MAX)[5:], 500), "one"),
        (get("a.org") + b"x" * 100_000, "two"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 16_000 + b"\r\nHost: a.org\r\n\r\n", "two"),
    ],
    ids=["hello", "hello of 16 KiB", "hello in many records", "request with a body", "request of 16 KiB"],
)
def test_the_backend_gets_exactly_what_the_client_has_sent(tmp_path: Path, site: Sites, data: bytes, name: str) -> None:
    routes = of(site, ("one", {"server_name": "a.org"}), ("two", {"host": "a.org"}))
    with File(tmp_path, routes=routes).rspd() as daemon:
        assert lead(daemon, data) == name
        (end,) = daemon.wait_for_ends(1)
        assert end["sent"] == str(len(data))


@pytest.mark.parametrize("data", [hello("a.org"), get("a.org")], ids=["tls", "http"])
def test_a_head_may_come_one_byte_at_a_time(tmp_path: Path, site: Sites, data: bytes) -> None:
    routes = of(site, ("one", {"server_name": "a.org"}), ("one", {"host": "a.org"}))
    with File(tmp_path, routes=routes).rspd() as daemon, come(daemon) as client:
        for place in range(len(data)):
            client.sendall(data[place : place + 1])
        assert site_of(client) == "one"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == data


def test_a_hello_of_16_kib_may_come_one_byte_at_a_time(tmp_path: Path, site: Sites) -> None:
    data = hello("a.org", HEAD_MAX)
    routes = of(site, ("one", {"server_name": "a.org"}))
    with File(tmp_path, routes=routes).rspd() as daemon, come(daemon) as client:
        for place in range(len(data)):
            client.send(data[place : place + 1])
        assert site_of(client) == "one"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == data


# Real TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Makes a certificate for a name, with its key; returns the file."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not here: apt install openssl")

    def make(name: str) -> str:
        path = str(tmp_path_factory.getbasetemp() / f"{name}.pem")
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", path, "-days", "9"]
        about = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        command = ["openssl", "req", "-x509", *key, *about]
        made = subprocess.run(command, capture_output=True, text=True, check=True)
        with open(path, "a") as file:
            file.write(made.stdout)
        return path

    return make


def test_each_site_keeps_its_own_certificate_and_key(
    tmp_path: Path, certificates: Callable[[str], str], site: Sites
) -> None:
    files = {name: certificates(name) for name in ("one.org", "two.org")}

    def serve(name: str, sock: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files[name])
        context.set_alpn_protocols(["imap", "h2"])
        with context.wrap_socket(sock, server_side=True) as secure:
            while data := secure.recv(65536):
                secure.sendall(name.encode() + b":" + data)
            secure.unwrap()

    with Backend(partial(serve, "one.org")) as one, Backend(partial(serve, "two.org")) as two:
        routes: list[dict[str, Any]] = [
            {"server_name": "one.org", "backend": one.address},
            {"server_name": "two.org", "alpn": ["imap", "h2"], "backend": two.address},
        ]
        with File(tmp_path, routes=routes).rspd() as daemon:
            for name in files:
                context = ssl.create_default_context(cafile=files[name])
                context.set_alpn_protocols(["h2"])
                with come(daemon) as plain, context.wrap_socket(plain, server_hostname=name) as client:
                    assert client.getpeercert(True) == ssl.PEM_cert_to_DER_cert(certificate_in(files[name]))
                    assert client.selected_alpn_protocol() == "h2"
                    client.sendall(b"hello")
                    assert client.recv(100) == name.encode() + b":hello"
                    client.unwrap()
            context = ssl.create_default_context()
            for wrong in ("three.org", "a.one.org"):
                with come(daemon) as plain, pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
                    context.wrap_socket(plain, server_hostname=wrong)
            context.set_alpn_protocols(["pop3"])
            with come(daemon) as plain, pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
                context.wrap_socket(plain, server_hostname="two.org")
        assert one.errors == two.errors == []


def certificate_in(path: str) -> str:
    """The certificate in a file that has a key too."""
    text = Path(path).read_text()
    return text[text.index("-----BEGIN CERTIFICATE") :]


# What comes before routes


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("bytewise", [False, True], ids=["at once", "one byte at a time"])
def test_a_proxy_header_comes_before_what_the_client_says(
    tmp_path: Path, site: Sites, version: str, bytewise: bool
) -> None:
    routes = of(site, ("one", {"server_name": "a.org", "from": "192.0.2.0/24"}), ("rest", {"server_name": "a.org"}))
    with File(tmp_path, routes=routes, accept_proxy="127.0.0.1").rspd() as daemon:
        for host, name in ("192.0.2.1", "one"), ("198.51.100.1", "rest"):
            data = encode(version, (host, 1), ("198.51.100.2", 443)) + hello("a.org")
            with come(daemon) as client:
                size = 1 if bytewise else len(data)
                for place in range(0, len(data), size):
                    client.sendall(data[place : place + size])
                assert site_of(client) == name
                client.shutdown(socket.SHUT_WR)
                assert receive_all(client) == hello("a.org")
        daemon.wait_for(r'closed client=192.0.2.1:1 via=127.0.0.1:\d+ route="a.org,192.0.2.0/24" name="a.org" protocol')


def test_a_route_may_tell_its_backend_who_the_client_is(tmp_path: Path, site: Sites) -> None:
    routes: list[dict[str, Any]] = of(site, ("one", {"host": "a.org"}), ("two", {"host": "b.org"}))
    routes[0]["send_proxy"] = "v1"
    with File(tmp_path, routes=routes).rspd() as daemon, come(daemon, get("a.org")) as client:
        header = encode("v1", client.getsockname(), ("127.0.0.1", daemon.port))
        assert site_of(client) == "one"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == header + get("a.org")
        assert lead(daemon, get("b.org")) == "two"


def test_who_may_not_come_is_reset_whatever_it_says(tmp_path: Path, site: Sites) -> None:
    routes = of(site, ("one", {"host": "a.org"}))
    with File(tmp_path, routes=routes, deny="127.0.0.2", first_bytes_timeout="1h").rspd() as daemon:
        assert lead(daemon, get("a.org")) == "one"
        for _ in range(2):
            with socket.socket() as client:
                client.settimeout(PATIENCE)
                client.bind(("127.0.0.2", 0))
                try:
                    client.connect(("127.0.0.1", daemon.port))
                except ConnectionResetError:
                    continue
                assert is_reset(client)
        daemon.wait_for(r'client refused client=127.0.0.2:\d+ reason="in deny 127.0.0.2"')
        assert len(daemon.wait_for_ends(1)) == 1


def test_one_client_at_a_time_is_served_by_routes_too(tmp_path: Path, site: Sites) -> None:
    routes = of(site, ("one", {"host": "a.org"}), ("two", {"server_name": "a.org"}))
    file = File(tmp_path, routes=routes, max_connections=None, first_bytes_timeout="300ms")
    with file.rspd() as daemon:
        with come(daemon) as silent, come(daemon, get("a.org")) as second, come(daemon, hello("a.org")) as third:
            assert is_reset(silent)
            assert site_of(second) == "one"
            second.close()
            assert site_of(third) == "two"
        ends = daemon.wait_for_ends(3)
        assert [end["protocol"] for end in ends] == ["silent", "http", "tls"]


# Loops


def test_a_route_that_leads_back_to_its_proxy_is_found(tmp_path: Path, site: Sites) -> None:
    port = free_port()
    routes = [{"host": "a.org", "backend": f"127.1:{port}"}, *of(site, ("one", {"host": "b.org"}))]
    with File(tmp_path, listen=f"127.0.0.1:{port}", routes=routes).rspd() as daemon:
        with come(daemon, get("a.org")) as client:
            assert receive_all(client).startswith(b"HTTP/1.1 502 ")
        daemon.wait_for(r'WARNING .* route="a.org" name="a.org" .* cause=loop reason="127.0.0.1:\d+: it is this proxy')
        assert lead(daemon, get("b.org")) == "one"
        assert len(daemon.find("cause=loop")) == 1


def test_proxies_whose_routes_lead_to_each_other_are_found_and_a_chain_works(tmp_path: Path, site: Sites) -> None:
    one, two = free_port(), free_port()
    proxies = {
        "web": {"listen": f"127.0.0.1:{one}", "routes": {"path": "/", "pool": "inner"}},
        "inner": {
            "listen": f"127.0.0.1:{two}",
            "routes": [{"host": "a.org", "backend": f"127.0.0.1:{one}"}, *of(site, ("rest", {}))],
        },
    }
    pools = {"inner": {"backend": f"127.0.0.1:{two}"}}
    with File(tmp_path, listen=None, proxies=proxies, pools=pools).rspd() as daemon:
        with come(daemon, get("a.org"), port=one) as client:
            assert receive_all(client).startswith(b"HTTP/1.1 502 ")
        daemon.wait_for(r"cause=loop .*it leads back to proxy web \(web, inner, web\)")
        assert lead(daemon, get("b.org"), port=one) == "rest"


# The log, and the status


def test_the_log_has_the_route_the_name_and_the_protocol(tmp_path: Path, site: Sites) -> None:
    routes = of(
        site,
        ("one", {"server_name": ["a.org", "b.org"], "alpn": ["h2"]}),
        ("one", {"server_name": "b.org"}),
        ("two", {"host": "bücher.example", "path": "/x"}),
        ("rest", {"protocol": ["ssh", "silent"]}),
    )
    client = r"connection closed client=127.0.0.1:\d+"
    with File(tmp_path, routes=routes, first_bytes_timeout="200ms").rspd() as daemon:
        lead(daemon, hello("b.org"))
        lead(daemon, get("xn--bcher-kva.example", "/x"))
        lead(daemon, b"SSH-2.0-x\r\n")
        come(daemon).close()
        for number, data in enumerate((hello("a_.org"), get("c.org"), b"\0"), 4):
            daemon.wait_for("connection closed", number)  # of two clients, either may end first
            with come(daemon, data) as refused:
                assert site_refused(refused)
        daemon.wait_for("connection closed", 7)
        with come(daemon) as silent:
            assert site_of(silent) == "rest"
        lines = daemon.wait_for("connection closed", 8)
    backend = {name: f"backend={re.escape(address)}" for name, address in site.items()}
    expected = [
        rf'{client} route="b.org" name="b.org" protocol=tls {backend["one"]} sent=\d+ .* cause=client-closed',
        rf'{client} route="xn--bcher-kva.example/x" name="xn--bcher-kva.example" protocol=http {backend["two"]} .*',
        rf'{client} route="ssh\+1" protocol=ssh {backend["rest"]} .*',
        rf"{client} backend=- sent=0 received=0 seconds=0.\d+ cause=client-closed",
        rf'{client} name="a_.org" protocol=tls backend=- .* cause=no-route',
        rf'{client} name="c.org" protocol=http backend=- .* cause=no-route',
        rf"{client} protocol=unknown backend=- .* cause=no-route",
        rf'{client} route="ssh\+1" protocol=silent {backend["rest"]} .*',
    ]
    assert [bool(re.search(f" INFO +{want}$", line)) for want, line in zip(expected, lines, strict=True)] == [True] * 8


def site_refused(client: socket.socket) -> bool:
    """Whether no backend has told its name."""
    try:
        return b"!" not in receive_all(client).replace(b"<!", b"")
    except ConnectionResetError:
        return True


def test_a_name_with_a_quote_cannot_forge_a_field(tmp_path: Path, site: Sites) -> None:
    with File(tmp_path, routes=of(site, ("one", {"server_name": "a.org"}), ("two", {"path": "/"}))).rspd() as daemon:
        forged = 'x" cause=none\r\n'
        with come(daemon, hello(forged)) as client:
            assert receive_all(client) == bytes((21, 3, 1, 0, 2, 2, 50))
        with come(daemon, get(forged.strip())) as client:
            assert receive_all(client).startswith(b"HTTP/1.1 400 ")
        # What a client has said stands in quotes, up to the end of the line.
        assert len(daemon.wait_for(r' cause=bad-head reason="(?:[^"\\]|\\.)*cause=none(?:[^"\\]|\\.)*"$', 2)) == 2


def test_the_status_counts_by_route_and_who_found_none(tmp_path: Path, site: Sites) -> None:
    routes = of(site, ("one", {"host": "a.org"}), ("two", {"protocol": "ssh"}))
    file = File(tmp_path, routes=routes)
    with service("-c", str(file.path)) as daemon:
        daemon.notify.wait_for_status("serving 0 of 1000, 0 served, 2 of 2 backends up, by route: a.org 0, ssh 0")
        for data in (get("a.org"), get("a.org"), b"SSH-2.0-x\r\n"):
            lead(daemon, data)
        daemon.notify.wait_for_status("serving 0 of 1000, 3 served, 2 of 2 backends up, by route: a.org 2, ssh 1")
        with come(daemon, get("b.org")) as client:
            assert receive_all(client).startswith(b"HTTP/1.1 404 ")
        with come(daemon) as silent:
            counts = "5 served, 2 of 2 backends up, by route: a.org 2, ssh 1, none 1"
            daemon.notify.wait_for_status(f"serving 1 of 1000, 1 yet to say what they want, {counts}")
            # Counts stay over a reload, for routes that are called the same.
            file.reload(daemon, routes=[*of(site, ("three", {"host": "c.org"})), routes[0]])
            silent.sendall(get("c.org"))
            assert site_of(silent) == "three"
        daemon.notify.wait_for_status(
            "serving 0 of 1000, 5 served, 2 of 2 backends up, by route: c.org 1, a.org 2, none 1"
        )
