"""The configuration of routes, of the pools that they name, and of error pages: what is wrong, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rspd.config.keys import load_config
from rspd.config.routes import PAGE_MAX
from rspd.errors import ConfigError
from rspd.net.address import Address
from rspd.settings import BackendConfig

PATH = "expected a path that begins with /, as /api, without ?, #, % and dots alone, found"
ROUTE = "expected a route, as {server_name: example.org, backend: 10.0.0.1:443}, found"
NETWORK = "expected a network (10.0.0.0/8, 192.0.2.7, 2001:db8::/32 or unix), found"
NAME = "expected a name, as example.org or *.example.org, found"
PROTOCOL = "expected one of tls, http, http2, ssh, silent, found"
UNKNOWN = "unknown key, expected server_name, alpn, host, or another one of rspd.yaml(5)"
POOL_KEYS = (
    "backend, balance, resolve, resolve_interval, connect_timeout, retries, max_fails, fail_timeout, queue_timeout, "
    "health, on_down, send_proxy"
)
BESIDE_POOL = "cannot stand beside pool; write it in that pool"
ALL_OTHERS = "a route without a match is for all others: - {backend: HOST:PORT}"
MISSING = "missing, expected a backend or a pool to lead to"
NO_BACKUP = "expected one that is no backup, found none"
UNIX = (
    "backend /x is a unix socket, which has no port; write {address: /x, health: on}, "
    "or a port and an address in its health"
)
OWN = "is this proxy's own listener 80"


def errors(content: str, **options: Any) -> list[str]:
    """What is wrong with a file of this content, without its name."""
    with pytest.raises(ConfigError) as caught:
        load_config("FILE", options, content=content.encode())
    assert all(error.startswith("FILE:") for error in caught.value.errors)
    return [error.removeprefix("FILE:") for error in caught.value.errors]


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("{server_name: a.org:443, backend: a:1}", f".server_name: {NAME} 'a.org:443'; write a.org alone"),
        ("{host: '*a.org', backend: a:1}", f".host: {NAME} '*a.org'; * stands for whole labels at the beginning"),
        ("{host: straße.de, backend: a:1}", f".host: {NAME} 'straße.de'; write its xn-- form, browsers show it"),
        (
            "{server_name: 'a.org, b.org', backend: a:1}",
            ".server_name: expected a name or a list, found 'a.org, b.org'; a list is [a.org, b.org]",
        ),
        ("{server_name: {a: b}, backend: a:1}", ".server_name: expected a name or a list of them, found a mapping"),
        ("{server_name: [a, [b]], backend: a:1}", ".server_name: expected a name, found a list"),
        ("{server_name: [], backend: a:1}", ".server_name: expected at least one name, found an empty list"),
        ("{host: [a.org, A.ORG.], backend: a:1}", ".host: a.org is listed twice"),
        ("{alpn: h 2, backend: a:1}", ".alpn: expected a protocol of ALPN, as h2 or imap, found 'h 2'"),
        ("{alpn: 'h2,h3', backend: a:1}", ".alpn: expected a protocol of ALPN, as h2 or imap, found 'h2,h3'"),
        ("{alpn: '', backend: a:1}", ".alpn: expected a protocol of ALPN, as h2 or imap, found ''"),
        ("{alpn: [], backend: a:1}", ".alpn: expected at least one protocol, found an empty list"),
        *(
            (f"{{path: '{path}', backend: a:1}}", f".path: {PATH} {path!r}")
            for path in ("", "api", "/a?b", "/a#b", "/a%20b", "/a//b", "/a/../b", "/.", "/..", "/a b", "/é")
        ),
        ("{path: [/a, /b, /a], backend: a:1}", ".path: /a is listed twice"),
        ("{protocol: smtp, backend: a:1}", f".protocol: {PROTOCOL} 'smtp'"),
        ("{protocol: unknown, backend: a:1}", f".protocol: {PROTOCOL} 'unknown'"),
        ("{protocol: [tls, htp], backend: a:1}", f".protocol: {PROTOCOL} 'htp'; did you mean http?"),
        ("{from: a.org, backend: a:1}", f".from: {NETWORK} 'a.org'"),
        ("{from: off, backend: a:1}", f".from: {NETWORK} 'off'"),
        (
            "{from: 10.0.0.1/8, backend: a:1}",
            ".from: expected 10.0.0.0/8 (the network) or 10.0.0.1 (this address alone), found '10.0.0.1/8'",
        ),
        (
            "{from: 10.0.0.0/8 unix, backend: a:1}",
            ".from: expected a network or a list, found '10.0.0.0/8 unix'; a list is [10.0.0.0/8, unix]",
        ),
        ("{pool: a b}", ".pool: expected the name of a pool, found 'a b'"),
        ("{pool: [web]}", ".pool: expected one value, found a list"),
        ("{pool: wbe}", ".pool: no such pool: wbe; did you mean web?"),
        ("{pool: x}", ".pool: no such pool: x; there are web, api"),
        ("{pool: web, backend: a:1}", f".backend: {BESIDE_POOL}"),
        ("{backends: [a:1, b:1], pool: web}", f".backends: {BESIDE_POOL}"),
        ("{}", f": {MISSING}"),
        ("{server_name: a, idle_timeout: 1s}", f": {MISSING}"),
        ("{server_name: a, balance: random}", f": {MISSING}"),
        ("{host: a, server_name: b, backend: a:1}", ": can never match, server_name is of TLS and host of HTTP"),
        ("{alpn: h2, path: /, backend: a:1}", ": can never match, alpn is of TLS and path of HTTP"),
        ("{server_name: a, protocol: ssh, backend: a:1}", ".protocol: ssh can never match beside server_name"),
        ("{alpn: h2, protocol: [tls, silent], backend: a:1}", ".protocol: silent can never match beside alpn"),
        ("{path: /, protocol: tls, backend: a:1}", ".protocol: tls can never match beside path"),
        ("{host: a, protocol: http2, backend: a:1}", ".protocol: http2 can never match beside host"),
        ("{sever_name: a, backend: a:1}", ".sever_name: unknown key, did you mean server_name?"),
        ("{server_name:a, backend: a:1}", ".server_name:a: unknown key, a space belongs after the colon"),
        ("{backned: a:1}", ".backned: unknown key, did you mean backend?"),
        ("{poool: web}", ".poool: unknown key, did you mean pool?"),
        *((f"{{{key}: 5, backend: a:1}}", f".{key}: {UNKNOWN}") for key in ("colour", "listen", "max_connections")),
        (
            "{backend: a:1, backends: [b:1]}",
            ".backends: given a second time, first as backend in line 6; several values are one list",
        ),
        ("{backends: [a:1, {address: a:1}]}", ".backends: a:1 is listed twice"),
        ("{backend: {address: a:1, backup: true}}", f".backend: {NO_BACKUP}"),
        ("{backend: localhost:80}", f": backend localhost:80 {OWN}"),
        (
            "{backend: a:1, health: {address: localhost:80}}",
            f".health: a check of backend a:1 would ask this proxy: localhost:80 {OWN}",
        ),
        (
            "{backend: /x, health: {port: 1}}",
            f".health: {UNIX}",
        ),
        ("{backend: a:1, half_close: maybe}", ".half_close: expected on or off, found 'maybe'"),
        ("{backend: a:1, send_proxy: v3}", ".send_proxy: expected one of v1, v2, off, found 'v3'"),
        ("a.org", f": {ROUTE} 'a.org'"),
        ("", f": {ROUTE} ''"),
        ("[{backend: a:1}]", f": {ROUTE} a list"),
    ],
)
def test_what_is_wrong_with_a_route_is_told_with_its_line(route: str, message: str) -> None:
    pools = "pools:\n  web: {backend: w:1}\n  api: {backend: w:2}\n"
    assert errors(f"listen: 80\n{pools}routes:\n- {route}\n") == [f"6: routes{message}"]


def test_each_key_of_a_pool_beside_pool_is_told() -> None:
    route = "pool: web\n  balance: random\n  health: on\n  idle_timeout: 3s"
    content = f"listen: 80\npools: {{web: {{backend: a:1}}}}\nroutes:\n- {route}\n"
    assert errors(content) == [f"5: routes.balance: {BESIDE_POOL}", f"6: routes.health: {BESIDE_POOL}"]


def test_a_star_without_quotes_is_told_as_what_it_is_to_yaml() -> None:
    content = "listen: 80\nroutes:\n- server_name: *.a.org\n  backend: a:1\n"
    assert errors(content) == ["3: not valid YAML: a value that starts with * or & needs quotes"]


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("listen: 80\nroutes: []\n", ["2: routes: expected at least one route, found an empty list"]),
        ("listen: 80\nroutes:\n", [f"2: routes: {ROUTE} ''"]),
        ("listen: 80\nroutes: off\n", [f"2: routes: {ROUTE} 'off'"]),
        ("listen: 80\nroutes: {host: a}\nbackend: b:1\n", [f"2: routes: {MISSING}", "2: routes: cannot stand beside"]),
        (
            "listen: 80\nbackend: b:1\nroutes: {backend: a:1}\n",
            [f"3: routes: cannot stand beside backend; {ALL_OTHERS}"],
        ),
        ("routes: {backend: a:1}\n", [" listen: missing, expected an address to listen on"]),
        (
            "routes: [{backend: a:1}]\nproxies:\n  a: {listen: 80, backend: a:1}\n",
            ["1: routes: belongs to one proxy, move it into each below proxies"],
        ),
        (
            "proxies:\n  a:\n    listen: 80\n    backend: b:1\n    routes: [{backend: a:1}]\n",
            [f"5: proxies.a.routes: cannot stand beside backend; {ALL_OTHERS}"],
        ),
        (
            (
                "proxies:\n  a:\n    listen: 80\n    routes:\n    - {colour: red, backend: a:1}\n    - {pool: x}\n"
                "  b:\n    routes: {host: a, alpn: b, backend: a:1}\n"
            ),
            [
                f"5: proxies.a.routes.colour: {UNKNOWN}",
                "7: proxies.b.listen: missing, expected an address to listen on",
                "8: proxies.b.routes: can never match, alpn is of TLS and host of HTTP",
            ],
        ),
        (
            (
                "proxies:\n  a:\n    listen: 80\n    pools: {web: {backend: a:1}}\n    routes: {pool: web}\n"
                "  b:\n    listen: 81\n    routes:\n    - {pool: web}\n"
            ),
            ["9: proxies.b.routes.pool: no such pool: web; there are none"],
        ),
        (
            "proxies:\n  a:\n    listen: 80\n    routes: &r [{backend: /}]\n  b:\n    listen: 81\n    routes: *r\n",
            [
                "4: proxies.a.routes.backend: expected HOST:PORT, [IPV6]:PORT, /PATH or @NAME, found '/'",
                "7: proxies.b.routes: wrong, as it is in proxies.a.routes, by an alias",
            ],
        ),
        ("listen: 80\nroutes:\n- &r {backend: a:1}\n- *r\n", ["3: routes: says the same as the route in line 3"]),
    ],
)
def test_what_is_wrong_around_routes_is_told(content: str, messages: list[str]) -> None:
    found = errors(content)
    assert len(found) == len(messages)
    assert all(error.startswith(message) for error, message in zip(found, messages, strict=True)), found


def test_a_backend_on_the_command_line_does_not_go_with_routes() -> None:
    given = {"backends": (BackendConfig(Address("b", 1)),)}
    what = f"cannot stand beside -b on the command line; {ALL_OTHERS}"
    assert errors("listen: 80\n\nroutes: {backend: a:1}\n", **given) == [f"3: routes: {what}"]
    error, *_ = errors("proxies: {a: {listen: 80, routes: {backend: a:1}}}\n", **given)
    assert error.startswith("1: proxies: each has its addresses here; ")


# Routes that take each other's clients


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("", "", "says the same as"),
        ("protocol: ssh", "protocol: ssh", "says the same as"),
        ("protocol: [ssh, tls]", "protocol: [tls, ssh]", "says the same as"),
        ("", "protocol: ssh", "can never match, all is for"),
        ("", "from: unix", "can never match, all is for"),
        ("", "alpn: h2", "can never match, all is for"),
        ("protocol: tls", "alpn: h2", "can never match, all is for"),
        ("protocol: [tls, ssh]", "protocol: ssh", "can never match, all is for"),
        ("alpn: [h2, h3]", "alpn: h3", "can never match, all is for"),
        ("from: [10.0.0.0/8, unix]", "from: [unix, 10.1.0.0/16], protocol: ssh", "can never match, all is for"),
        ("server_name: a.org", "server_name: [b.org, A.org.]", "a.org says the same as"),
        ("server_name: a.org", "server_name: a.org, alpn: h2", "a.org can never match, all is for"),
        ("server_name: '*.a.org'", "server_name: '*.a.org', from: unix", "*.a.org can never match, all is for"),
        ("host: bücher.de", "host: xn--bcher-kva.de", "xn--bcher-kva.de says the same as"),
        ("path: [/a, /b]", "path: [/c, /b], from: unix", "/b can never match, all is for"),
        ("host: a.org, path: /x", "host: a.org, path: /x", "a.org/x says the same as"),
    ],
)
def test_a_route_that_can_never_match_is_an_error(first: str, second: str, message: str) -> None:
    def route(keys: str) -> str:
        return f"- {{{', '.join(filter(None, [keys, 'backend: a:1']))}}}\n"

    content = f"listen: 80\nroutes:\n{route(first)}{route('protocol: silent, from: 192.0.2.1')}{route(second)}"
    silent = [] if first else ["4: routes: can never match, all is for the route in line 3"]
    assert errors(content) == [*silent, f"5: routes: {message} the route in line 3"]
    if "never" in message and first:
        load_config("FILE", {}, content=f"listen: 80\nroutes:\n{route(second)}{route(first)}".encode())


@pytest.mark.parametrize(
    "routes",
    [
        ["server_name: a.org", "host: a.org"],
        ["protocol: tls", "server_name: a.org"],
        ["server_name: '*.a.org'", "server_name: b.a.org"],
        ["path: /", "path: /a", "path: /a/", "protocol: http", "host: a.org"],
        ["from: 10.0.0.0/8", "from: 11.0.0.0/8", ""],
        ["from: [10.0.0.0/9]", "from: 10.0.0.0/8"],
        ["alpn: h2", "alpn: [h2, h3]", "protocol: tls"],
    ],
)
def test_routes_that_only_take_some_of_the_clients_of_the_next_are_none(routes: list[str]) -> None:
    lines = "".join(f"- {{{', '.join(filter(None, [keys, 'backend: a:1']))}}}\n" for keys in routes)
    (proxy,) = load_config("FILE", {}, content=f"listen: 80\nroutes:\n{lines}".encode()).proxies
    assert len(proxy.routes) == len(routes)


def test_a_path_that_no_client_may_ask_for_is_an_error() -> None:
    (error,) = errors("listen: 80\nroutes: {path: /..;x/b, backend: a:1}\n")
    assert error == f"2: routes.path: {PATH} '/..;x/b'"


# Pools


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ("[]", ": expected names, each with the keys of a pool, found a list"),
        ("{}", ": expected names, each with the keys of a pool, found none"),
        ("off", ": expected names, each with the keys of a pool, found 'off'"),
        ("{a b: {backend: a:1}}", ": expected a name of up to 64 letters, digits, _, . and -, found 'a b'"),
        ("{web: a:1}", ".web: expected the keys of a pool, found 'a:1'"),
        ("{web: }", ".web: expected the keys of a pool, found ''; its keys are indented below its name"),
        ("{web: {}}", ".web.backend: missing, expected an address to relay to"),
        ("{web: {balance: random}}", ".web.backend: missing, expected an address to relay to"),
        ("{web: {backned: a:1}}", ".web.backned: unknown key, did you mean backend?"),
        ("{web: {backend: a:1, weight: 1}}", f".web.weight: unknown key, expected one of {POOL_KEYS}"),
        ("{web: {backend: a:1, listen: 80}}", f".web.listen: unknown key, expected one of {POOL_KEYS}"),
        ("{web: {backend: a:1}, web: {backend: b:1}}", ".web: given a second time, first in line 3"),
        ("{web: {backend: {address: a:1, backup: true}}}", f".web.backend: {NO_BACKUP}"),
        ("{web: {backend: localhost:80}}", f".web: backend localhost:80 {OWN}"),
        (
            "{web: {backend: a:1, health: {address: localhost:80}}}",
            f".web.health: a check of backend a:1 would ask this proxy: localhost:80 {OWN}",
        ),
        (
            "{web: {backend: a:1, health: {rise: 0}}}",
            ".web.health.rise: expected a whole number from 1 to 100, found '0'",
        ),
    ],
)
@pytest.mark.parametrize("own", [False, True], ids=["at the top", "in a proxy"])
def test_what_is_wrong_with_a_pool_is_told_with_the_way_to_it(pools: str, message: str, own: bool) -> None:
    content = f"listen: 80\nroutes: {{pool: web}}\npools: {pools}\n"
    prefix = "pools"
    if own:
        content = f"proxies: {{a: {{listen: 80, routes: {{pool: web}},\n\npools: {pools}}}}}\n"
        prefix = "proxies.a.pools"
    assert errors(content) == [f"3: {prefix}{message}"]


def test_a_pool_that_no_route_names_may_be_where_the_proxy_listens() -> None:
    config = load_config("FILE", {}, content=b"listen: 80\nbackend: b:1\npools: {web: {backend: 127.0.0.1:80}}\n")
    assert config.proxies[0].backends == (BackendConfig(Address("b", 1)),)


# Error pages, and the time for the first bytes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("error_pages: /x", "error_pages: expected a mapping, as {503: /etc/rspd/503.html}, or off, found '/x'"),
        ("error_pages: []", "error_pages: expected a mapping, as {503: /etc/rspd/503.html}, or off, found a list"),
        ("error_pages: {500: /x}", "error_pages.500: unknown key, did you mean 504?"),
        ("error_pages: {colour: /x}", "error_pages.colour: unknown key, expected one of 400, 404, 408, 502, 503, 504"),
        ("error_pages: {404: x}", "error_pages.404: expected a file that begins with /, found 'x'"),
        ("error_pages: {404: [/x]}", "error_pages.404: expected a file, found a list"),
        ("error_pages: {404: /etc}", "error_pages.404: /etc cannot be read: Is a directory"),
        ("error_pages: {404: /a/b}", "error_pages.404: /a/b cannot be read: No such file or directory"),
        ("first_bytes_timeout: 1ms", "first_bytes_timeout: expected at least 10ms, found '1ms'"),
        (
            "first_bytes_timeout: off",
            "first_bytes_timeout: expected a duration above 0, as 500ms, 5s, 2m or 1h, found 'off'",
        ),
    ],
)
def test_what_is_wrong_with_a_page_or_a_time_is_told(line: str, message: str) -> None:
    assert errors(f"listen: 80\nbackend: a:1\n{line}\n") == [f"3: {message}"]


def test_a_page_that_is_too_large_is_told(tmp_path: Path) -> None:
    page = tmp_path / "page"
    page.write_bytes(bytes(PAGE_MAX + 1))
    what = f"error_pages.404: expected a page of at most {PAGE_MAX} bytes, {page} has more"
    assert errors(f"listen: 80\nbackend: a:1\nerror_pages: {{404: {page}}}\n") == [f"3: {what}"]


def test_a_page_whose_name_no_file_has_is_told_with_what_was_expected() -> None:
    (error,) = errors('listen: 80\nbackend: a:1\nerror_pages: {404: "/a\\0"}\n')
    assert error.startswith("3: error_pages.404: ")
    assert r"/a\x00" in error
