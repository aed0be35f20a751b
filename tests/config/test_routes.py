"""The configuration of routes, of the pools that they name, and of error pages: what each key takes and means."""

from __future__ import annotations

import json
import re
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.config.keys import GENERAL_KEYS, PROXY_KEYS, load_config
from rspd.config.pools import BACKEND_KEYS, HEALTH_KEYS
from rspd.config.routes import PROTOCOLS, ROUTE_KEYS, parse_name
from rspd.errors import ConfigError
from rspd.net.address import Address
from rspd.net.networks import parse_network
from rspd.settings import BackendConfig, Config, ErrorPage, HealthConfig, NamedPool, ProxyConfig, RouteConfig

ONE, TWO = BackendConfig(Address("a", 1)), BackendConfig(Address("b", 2))
NETWORK = parse_network("10.0.0.0/8")


def read(content: str, *, sockets: bool = False, **options: object) -> Config:
    """What a file of this content means."""
    return load_config("FILE", options, sockets=sockets, content=content.encode())


def proxy_of(routes: str) -> ProxyConfig:
    """The proxy that listens on 80 and has these routes."""
    (proxy,) = read(f"listen: 80\nroutes:{routes}\n").proxies
    return proxy


def route_of(keys: str) -> RouteConfig:
    """The one route with these keys, and a backend."""
    (route,) = proxy_of(f"\n- {{{keys}, backend: a:1}}").routes
    return route


# Matches


@pytest.mark.parametrize(
    ("keys", "field", "value", "name"),
    [
        ("server_name: a.org", "server_name", ("a.org",), "a.org"),
        ("server_name: [a.org, '*.b.org']", "server_name", ("a.org", "*.b.org"), "a.org+1"),
        ("alpn: h2", "alpn", ("h2",), "h2"),
        ("alpn: [imap, http/1.1, x]", "alpn", ("imap", "http/1.1", "x"), "imap+2"),
        ("host: '*.a.org'", "host", ("*.a.org",), "*.a.org"),
        ("host: '[2001:DB8::1]'", "host", ("[2001:db8::1]",), "[2001:db8::1]"),
        ("host: 192.0.2.1", "host", ("192.0.2.1",), "192.0.2.1"),
        ("path: /", "path", ("/",), "/"),
        ("path: [/api/v2, /a..b/, /~x;y=1]", "path", ("/api/v2", "/a..b/", "/~x;y=1"), "/api/v2+2"),
        *((f"protocol: {word}", "protocol", (word,), word) for word in PROTOCOLS),
        ("protocol: [ssh, silent]", "protocol", ("ssh", "silent"), "ssh+1"),
        ("from: 10.0.0.0/8", "networks", (NETWORK,), "10.0.0.0/8"),
        ("from: [unix, 10.0.0.0/8]", "networks", (parse_network("unix"), NETWORK), "unix+1"),
    ],
)
def test_each_match_takes_one_or_a_list(keys: str, field: str, value: Any, name: str) -> None:
    settings = proxy_of("\n- {backend: a:1}").routes[0].settings
    assert route_of(keys) == RouteConfig(name, settings, **{field: value})


def test_a_route_may_have_several_matches_and_is_called_by_them() -> None:
    route = route_of("from: 10.0.0.0/8, alpn: [h2, h3], server_name: a.org, protocol: tls")
    assert (route.server_name, route.alpn, route.networks) == (("a.org",), ("h2", "h3"), (NETWORK,))
    assert route.name == "a.org,h2+1,tls,10.0.0.0/8"
    assert route.protocols == {"tls"}
    assert route_of("path: [/x, /y], host: a.org").name == "a.org/x+1"
    assert route_of("path: [/x, /y], host: a.org").protocols == {"http"}
    assert proxy_of("\n- {backend: a:1}").routes[0].name == "default"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Example.ORG", "example.org"),
        ("example.org.", "example.org"),
        ("*.Example.org.", "*.example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("*.bücher.example", "*.xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "xn--bcher-kva.example"),
        ("日本語。jp", "xn--wgv71a119e.jp"),
        ("under_score.org", "under_score.org"),
        ("localhost", "localhost"),
        ("a" * 63 + ".org", "a" * 63 + ".org"),
    ],
)
def test_a_name_is_read_as_clients_send_it(text: str, name: str) -> None:
    assert parse_name(text) == name
    assert route_of(f"server_name: {json.dumps(text)}").server_name == (name,)
    assert route_of(f"host: {json.dumps(text)}").host == (name,)


EXPECTED_NAME = "expected a name, as example.org or *.example.org, found"


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("https://a.org/", "; write a.org alone"),
        ("a.org:443", "; write a.org alone"),
        ("a.org/x", "; write a.org alone"),
        ("*a.org", "; * stands for whole labels at the beginning"),
        ("a.*.org", "; * stands for whole labels at the beginning"),
        ("*.*.org", "; * stands for whole labels at the beginning"),
        *((text, "; for all names, leave this key out") for text in ("*", "*.")),
        *((text, "") for text in ("", "a.org..", "[::1]:80", "::1", "a!b")),
        *((text, "; write its xn-- form, browsers show it") for text in ("straße.de", "ςa.gr", "a\u200db.org")),
    ],
)
def test_what_is_no_name_is_told_with_what_to_write(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{EXPECTED_NAME} {text!r}{advice}") + r"\Z"):
        parse_name(text)


@pytest.mark.parametrize("text", ["a..b", "a" * 64 + ".org", ".".join(["a" * 60] * 5), "é" * 60 + ".org"], ids=len)
def test_a_name_without_a_star_gets_no_advice_about_stars(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{EXPECTED_NAME} {text!r}") + r"(?!.*\*).*\Z"):
        parse_name(text)


def test_each_letter_that_older_and_newer_rules_write_in_two_ways_is_an_error() -> None:
    for text in ("straße.de", "STRAẞE.de"):
        with pytest.raises(ValueError, match="xn--"):
            parse_name(text)


# Where a route leads, and how its connections go on


@pytest.mark.parametrize(
    ("keys", "field", "value"),
    [
        ("backend: b:2", "backends", (TWO,)),
        ("backends: [a:1, {address: b:2, weight: 3}]", "backends", (ONE, TWO._replace(weight=3))),
        ("backend: a:1, balance: source", "balance", "source"),
        ("backend: a:1, resolve: each", "resolve", "each"),
        ("backend: a:1, resolve_interval: 1m", "resolve_interval", 60.0),
        ("backend: a:1, connect_timeout: 1s", "connect_timeout", 1.0),
        ("backend: a:1, retries: 2", "retries", 2),
        ("backend: a:1, max_fails: off", "max_fails", inf),
        ("backend: a:1, fail_timeout: 3s", "fail_timeout", 3.0),
        ("backend: a:1, queue_timeout: 4s", "queue_timeout", 4.0),
        ("backend: a:1, health: {http: /up}", "health", HealthConfig(http="/up")),
        ("backend: a:1, on_down: abort", "on_down", "abort"),
        ("backend: a:1, send_proxy: v2", "send_proxy", "v2"),
        ("backend: a:1, idle_timeout: 1h", "idle_timeout", 3600.0),
        ("backend: a:1, half_close: off", "half_close", False),
        ("backend: a:1, half_close_timeout: 9s", "half_close_timeout", 9.0),
    ],
)
def test_a_route_has_the_keys_of_a_pool_and_those_of_its_connections(keys: str, field: str, value: Any) -> None:
    usual = proxy_of("\n- {backend: a:1}").routes[0].settings
    (route,) = proxy_of(f"\n- {{{keys}}}").routes
    assert route.settings == usual._replace(**{field: value})
    assert set(ROUTE_KEYS) >= {field}


def test_what_a_route_does_not_say_the_proxy_says_or_the_top_of_the_file() -> None:
    (proxy,) = read(
        "idle_timeout: 7s\nbalance: random\nhealth: on\nproxies:\n  web:\n    listen: 80\n    retries: 1\n"
        "    balance: source\n    routes:\n    - {host: a.org, backend: a:1, retries: 2}\n"
        "    - {backend: b:2, health: off}\n"
    ).proxies
    said = [(r.settings.idle_timeout, r.settings.balance, r.settings.retries) for r in proxy.routes]
    assert said == [(7.0, "source", 2), (7.0, "source", 1)]
    assert [route.settings.health for route in proxy.routes] == [HealthConfig(), None]
    assert {route.settings.name for route in proxy.routes} == {"web"}
    assert proxy.backends == ()


def test_one_route_needs_no_list() -> None:
    assert proxy_of(" {backend: a:1}") == proxy_of("\n- backend: a:1")


def test_the_time_for_the_first_bytes_is_5_s_unless_it_is_said() -> None:
    assert proxy_of(" {backend: a:1}").first_bytes_timeout == 5.0
    (proxy,) = read("listen: 80\nfirst_bytes_timeout: 500ms\nroutes: {backend: a:1}").proxies
    assert proxy.first_bytes_timeout == 0.5


def test_a_file_of_before_means_what_it_meant() -> None:
    (proxy,) = read("listen: 80\nbackend: a:1").proxies
    assert proxy == ProxyConfig((Address(port=80),), (ONE,))
    assert (proxy.routes, proxy.pools, proxy.error_pages) == ((), (), ())


# Pools


def test_pools_stand_at_the_top_for_all_proxies_or_in_one_for_its_own_routes() -> None:
    config = read(
        "retries: 3\npools:\n  web: {backend: a:1, balance: random}\n  api: {backend: b:2}\nproxies:\n"
        "  one:\n    listen: 80\n    queue_timeout: 2s\n    pools: {own: {backend: c:3, send_proxy: v1}}\n"
        "    routes: [{host: a.org, pool: own, idle_timeout: 1s}, {pool: web}]\n"
        "  two: {listen: 81, routes: {pool: web}}\n"
    )
    one, two = config.proxies
    assert [(route.pool, route.settings.idle_timeout) for route in one.routes] == [("own", 1.0), ("web", 60.0)]
    assert [route.pool for route in two.routes] == ["web"]
    assert [(pool.name, pool.settings.backends, pool.settings.retries) for pool in config.pools] == [
        ("web", (ONE,), 3),
        ("api", (TWO,), 3),
    ]
    (own,) = one.pools
    assert (own.name, own.settings.queue_timeout, own.settings.send_proxy) == ("own", 2.0, "v1")
    assert [pool.backends for pool in config.pools_of(two)] == [(ONE,)]
    assert config.every_pool == [*(pool.settings for pool in config.pools), own.settings]


def test_at_the_top_of_a_file_with_one_proxy_pools_are_its_own_as_well() -> None:
    config = read("listen: 80\npools: {web: {backend: a:1, health: on}}\nroutes: {pool: web}")
    settings = config.proxies[0]._replace(listen=(), routes=(), backends=(ONE,), health=HealthConfig())
    assert config.pools == (NamedPool("web", settings),)
    assert config.pools_of(config.proxies[0]) == [settings]


def test_a_pool_of_a_proxy_comes_before_one_of_the_same_name_at_the_top() -> None:
    config = read(
        "pools: {web: {backend: a:1}}\nproxies:\n"
        "  one: {listen: 80, pools: {web: {backend: b:2}}, routes: {pool: web}}\n"
        "  two: {listen: 81, routes: {pool: web}}"
    )
    assert [pool.settings.backends for pool in config.proxies[0].pools] == [(TWO,)]
    assert [pool.settings.backends for pool in config.pools] == [(ONE,)]


def test_of_a_pool_that_is_hidden_nothing_is_held_against_the_proxy_that_hides_it() -> None:
    read(
        "pools: {web: {backend: 127.0.0.1:80}}\nproxies:\n"
        "  one: {listen: 80, pools: {web: {backend: b:2}}, routes: {pool: web}}\n"
        "  two: {listen: 81, routes: {pool: web}}"
    )


# Names of routes


def test_routes_that_would_be_called_the_same_are_numbered() -> None:
    proxy = proxy_of(
        "\n- {alpn: [a, b], backend: a:1}\n- {alpn: [a, c], backend: a:1}\n- {alpn: a+1, backend: a:1}\n"
        "- {host: x.org, backend: a:1}\n- {server_name: x.org, backend: a:1}"
    )
    assert [route.name for route in proxy.routes] == ["a+1", "a+1#2", "a+1#3", "x.org", "x.org#2"]


def test_no_two_routes_are_called_the_same() -> None:
    proxy = proxy_of("\n- {alpn: 'a#2', backend: a:1}\n- {alpn: a, backend: b:2}")
    assert len({route.name for route in proxy.routes}) == 2


# Error pages


def test_error_pages_are_read_with_the_file(tmp_path: Path) -> None:
    pages = {status: tmp_path / f"{status}.html" for status in (503, 400, 404, 408, 502, 504)}
    for status, page in pages.items():
        page.write_bytes(b"\xffpage %d" % status)
    (proxy,) = read(
        json.dumps({"listen": 80, "backend": "a:1", "error_pages": {k: str(v) for k, v in pages.items()}})
    ).proxies
    assert proxy.error_pages == tuple(ErrorPage(s, str(pages[s]), b"\xffpage %d" % s) for s in sorted(pages))
    (tmp_path / "large").write_bytes(bytes(1 << 16))
    read(f"listen: 80\nbackend: a:1\nerror_pages: {{404: {tmp_path}/large}}")
    top = f"error_pages: {{404: {pages[404]}}}\nproxies:\n  a: {{listen: 80, backend: a:1}}\n"
    own = read(f"{top}  b: {{listen: 81, backend: a:1, error_pages: off}}").proxies
    assert [[page.status for page in proxy.error_pages] for proxy in own] == [[404], []]


# Whatever a file holds

NAMES = sorted(
    {*PROXY_KEYS, *GENERAL_KEYS, *BACKEND_KEYS, *HEALTH_KEYS, *ROUTE_KEYS, "proxies", "backend", "web", "404"}
)
TEXTS = ["80", "a:1", "off", "5s", "/x", "web", "tls", "http", "h2", "*.a.org", "bücher.example", "10.0.0.0/8", "all"]
SCALARS = st.sampled_from(TEXTS) | st.text(max_size=3)
TREES: st.SearchStrategy[object] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
ROUTES = st.lists(
    st.fixed_dictionaries(
        {"backend": st.just("a:1")}, optional={key: SCALARS | st.lists(SCALARS, max_size=2) for key in ROUTE_KEYS}
    )
    | st.fixed_dictionaries(
        {"pool": st.sampled_from(["web", "wbe", ""])},
        optional=dict.fromkeys(("host", "path", "server_name", "alpn", "from", "protocol", "idle_timeout"), SCALARS),
    )
    | st.dictionaries(st.sampled_from([*ROUTE_KEYS, "backend"]), TREES, max_size=3),
    max_size=4,
)


@settings(max_examples=300)
@given(
    ROUTES | TREES,
    st.just({"web": {"backend": "a:1"}}) | TREES,
    st.dictionaries(st.sampled_from(NAMES), TREES, max_size=2),
    st.booleans(),
)
def test_whatever_nests_it_is_a_configuration_or_gets_lines_that_name_it(
    routes: object, pools: object, others: dict[str, object], named: bool
) -> None:
    proxy = {"listen": "80", "routes": routes}
    tree = {**others, "pools": pools, **({"proxies": {"web": proxy}} if named else proxy)}
    try:
        config = read(json.dumps(tree))
    except ConfigError as error:
        assert error.errors  # noqa: PT017
        for line in error.errors:
            assert re.match(r"FILE(:1)?: \S", line)
            assert line.isprintable()
    else:
        for one in config.proxies:
            known = {pool.name for pool in (*one.pools, *config.pools)}
            assert one.backends or one.routes
            for route in one.routes:
                assert route.pool in known if route.pool else route.settings.backends
            assert len({route.name for route in one.routes}) == len(one.routes)
