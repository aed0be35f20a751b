"""What routes, and the pools that they name, make rspd do, in words."""

from __future__ import annotations

import pytest

from rspd.config.keys import load_config
from rspd.config.routes import MATCH_KEYS, RELAY_KEYS, ROUTE_KEYS
from rspd.explaining.summary import describe

FIRST = "listening on 80; one connection at a time; routes by what a client says, waiting up to 5 s for it"


def words(content: str) -> list[str]:
    return describe(load_config("FILE", {}, content=content.encode()))


def route(keys: str) -> str:
    """The words for one route."""
    first, line, *_ = words(f"listen: 80\nroutes:\n- {{{keys}}}\n")
    assert first == FIRST
    return line.removeprefix("  ")


# What a route asks of a client

MATCHES = {
    "server_name": ("[a.org, '*.b.org']", "server name a.org or *.b.org"),
    "alpn": ("h2", "ALPN h2"),
    "host": ("bücher.example", "host xn--bcher-kva.example"),
    "path": ("[/a, /b/]", "path /a or /b/"),
    "protocol": ("[ssh, silent]", "protocol ssh or silent"),
    "from": ("[10.0.0.0/8, unix]", "from 10.0.0.0/8 or unix"),
}


@pytest.mark.parametrize("key", MATCHES)
def test_what_a_route_asks_of_a_client_is_said(key: str) -> None:
    text, said = MATCHES[key]
    assert route(f"{key}: {text}, backend: a:1") == f"{said}: a:1"
    assert MATCHES.keys() == MATCH_KEYS.keys()


def test_all_that_a_route_asks_stands_together() -> None:
    said = route("from: 10.0.0.0/8, alpn: [h2, h3], server_name: a.org, backend: a:1")
    assert said == "server name a.org, ALPN h2 or h3, from 10.0.0.0/8: a:1"
    assert route("path: /x, host: a.org, backend: a:1") == "host a.org, path /x: a:1"


def test_who_takes_no_route_is_said() -> None:
    assert words("listen: 80\nroutes:\n- {host: a.org, backend: a:1}\n- {backend: b:1}\n") == [
        FIRST,
        "  host a.org: a:1",
        "  all others: b:1",
    ]
    assert words("listen: 80\nroutes:\n- {host: a.org, backend: a:1}\n- {protocol: ssh, backend: b:1}\n") == [
        FIRST,
        "  host a.org: a:1",
        "  protocol ssh: b:1",
        "  all others: refused",
    ]


# Where it leads

OTHERS = {
    "balance": ("source", "source over one backend"),
    "resolve": ("each", "each address of a name a backend"),
    "resolve_interval": ("1m", "names looked up every 1 min"),
    "connect_timeout": ("1s", "connect_timeout 1 s"),
    "retries": ("0", "no further backend tried"),
    "max_fails": ("off", "never down by failures to connect"),
    "fail_timeout": ("3s", "down after one failure within 3 s"),
    "queue_timeout": ("7s", "clients waiting up to 7 s while no backend is up"),
    "health": ("{http: /up}", "health by GET /up every 5 s"),
    "on_down": ("abort", "connections of a backend aborted when it goes down"),
    "send_proxy": ("v2", "a PROXY v2 header to backends"),
    "idle_timeout": ("1h", "idle_timeout 1 h"),
    "half_close": ("off", "connections end when either side has ended"),
    "half_close_timeout": ("off", "half_close_timeout off"),
}


@pytest.mark.parametrize("key", OTHERS)
def test_what_a_route_has_in_place_of_the_proxy_s_is_said(key: str) -> None:
    text, said = OTHERS[key]
    assert said in route(f"backend: a:1, {key}: {text}").removeprefix("all others: a:1; ").split("; ")
    assert OTHERS.keys() == ROUTE_KEYS.keys() - MATCHES.keys() - {"pool", "backends"}
    # What the proxy says too, it says once.
    first, line, *_ = words(f"listen: 80\n{key}: {text}\nroutes: {{host: a.org, backend: a:1}}\n")
    assert said not in line
    assert (said if key != "balance" else "source") in first.split("; ")


@pytest.mark.parametrize(
    ("key", "above", "own", "said"),
    [
        ("health", "on", "off", "no health checks"),
        ("on_down", "abort", "keep", "connections of a backend kept when it goes down"),
        ("queue_timeout", "1s", "off", "clients waiting not at all while no backend is up"),
        ("send_proxy", "v1", "off", "no PROXY header to backends"),
        ("retries", "0", "all", "all further backends tried"),
        ("half_close", "off", "on", "connections end when both sides have ended"),
        ("resolve", "each", "one", "each name one backend"),
        ("max_fails", "3", "1", "down after one failure within 10 s"),
    ],
)
def test_a_default_that_a_route_sets_against_the_proxy_s_is_said(key: str, above: str, own: str, said: str) -> None:
    _, line, *_ = words(f"listen: 80\n{key}: {above}\nroutes: {{host: a.org, backend: a:1, {key}: {own}}}\n")
    assert said in line.removeprefix("  host a.org: ").split("; ")


def test_of_several_backends_each_has_a_line_below_its_route() -> None:
    route = "{host: a.org, backends: [a:1, {address: b:1, backup: true}], health: on}"
    assert words(f"listen: 80\nroutes: [{route}, {{backend: {{address: c:1, max_connections: 3}}}}]\n") == [
        FIRST,
        "  host a.org: round-robin over 2 backends; health by connecting every 5 s",
        "    a:1",
        "    b:1, backup",
        "  all others: c:1, 3 connections at a time",
    ]


def test_a_pool_is_told_once_however_many_routes_name_it() -> None:
    content = (
        "pools:\n  web: {backends: [a:1, b:1], health: {}}\n  one: {backend: c:1}\nproxies:\n"
        "  x:\n    listen: 80\n    pools: {own: {backend: d:1, balance: random}}\n"
        "    routes: [{host: a, pool: own}, {pool: web}]\n"
        "  y:\n    listen: 81\n    first_bytes_timeout: 500ms\n"
        "    routes: [{path: /, pool: one, idle_timeout: off}, {pool: web}]\n"
    )
    assert words(content) == [
        f"x: {FIRST}",
        "  host a: pool own",
        "  all others: pool web",
        f"y: {FIRST.replace('5 s', '500 ms').replace('80', '81')}",
        "  path /: pool one; idle_timeout off",
        "  all others: pool web",
        "pool web: round-robin over 2 backends; health by connecting every 5 s",
        "  a:1",
        "  b:1",
        "pool one: one backend",
        "  c:1",
        "x: pool own: random over one backend",
        "  d:1",
    ]


def test_what_is_for_all_comes_last() -> None:
    content = "listen: 80\nlog_level: debug\npools: {web: {backend: a:1}}\nroutes: {pool: web}\n"
    assert words(content) == [FIRST, "  all others: pool web", "pool web: one backend", "  a:1", "logs from debug on"]


def test_each_key_of_how_a_connection_goes_on_is_told_beside_a_pool_too() -> None:
    texts = {key: OTHERS[key] for key in RELAY_KEYS}
    keys = ", ".join(f"{key}: {text}" for key, (text, _) in texts.items())
    _, line, *_ = words(f"listen: 80\npools: {{web: {{backend: a:1}}}}\nroutes: {{pool: web, {keys}}}\n")
    assert set(line.removeprefix("  all others: pool web; ").split("; ")) == {said for _, said in texts.values()}
