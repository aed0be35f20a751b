"""What is in force of routes, pools and error pages, as a configuration file: valid, and of the same meaning."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rspd.config.keys import load_config
from rspd.config.pools import POOL_KEYS
from rspd.config.routes import MATCH_KEYS, RELAY_KEYS, ROUTE_KEYS
from rspd.errors import ConfigError
from rspd.explaining.dump import dump
from rspd.settings import Config, NamedPool, ProxyConfig, RouteConfig
from tests.explaining.test_dump import NETWORKS, mappings


def read(content: str) -> Config:
    return load_config("FILE", {}, sockets=True, content=content.encode())


def plain(content: str) -> Any:
    """A file as YAML without meaning."""
    return yaml.load(content, yaml.BaseLoader)


def test_a_route_is_told_with_all_that_its_connections_go_by() -> None:
    told = plain(dump(read("listen: 80\nbalance: random\nroutes: {server_name: [a.org, '*.b.org'], backend: a:1}")))
    route = told["routes"]
    assert route["server_name"] == ["a.org", "*.b.org"]
    assert route["backend"]["address"] == "a:1"
    assert (route["balance"], route["idle_timeout"], route["half_close"]) == ("random", "60s", "on")
    # What it does not ask of a client has no value, and its pool is its own.
    asked = (ROUTE_KEYS.keys() - MATCH_KEYS.keys() - {"pool", "backends"}) | {"server_name", "backend"}
    assert route.keys() == asked
    assert "backend" not in told
    assert "pools" not in told


def test_a_route_with_a_pool_by_name_is_told_without_what_the_pool_goes_by() -> None:
    told = plain(dump(read("listen: 80\npools: {web: {backends: [a:1, b:1]}}\nroutes: [{pool: web, from: unix}]")))
    relaying = {"idle_timeout": "60s", "half_close": "on", "half_close_timeout": "30s"}
    assert told["routes"] == {"from": "unix", "pool": "web", **relaying}
    assert told["pools"].keys() == {"web"}
    assert told["pools"]["web"].keys() == POOL_KEYS.keys()
    assert [backend["address"] for backend in told["pools"]["web"]["backends"]] == ["a:1", "b:1"]


def test_pools_of_all_stand_at_the_top_and_those_of_a_proxy_with_it() -> None:
    told = plain(
        dump(
            read(
                "pools: {all: {backend: a:1}}\nproxies:\n"
                "  one: {listen: 80, pools: {own: {backend: b:1}}, routes: [{host: a, pool: all}, {pool: own}]}\n"
                "  two: {listen: 81, backend: c:1}\n"
            )
        )
    )
    assert told["pools"].keys() == {"all"}
    assert told["proxies"]["one"]["pools"].keys() == {"own"}
    assert "pools" not in told["proxies"]["two"]
    assert [route["pool"] for route in told["proxies"]["one"]["routes"]] == ["all", "own"]


def test_error_pages_are_told_by_their_files(tmp_path: Path) -> None:
    page = tmp_path / "a page: #1"
    page.write_bytes(b"\xff\0")
    content = json.dumps({"listen": 80, "backend": "a:1", "error_pages": {"503": str(page), "404": str(page)}})
    printed = dump(read(content))
    assert plain(printed)["error_pages"] == {"404": str(page), "503": str(page)}
    assert read(printed) == read(content)


# Whatever is configured

NAMES = st.sampled_from(["a.org", "*.a.org", "bücher.example", "off", "[::1]", "192.0.2.1", "xn--a.", "all", "null"])
WORDS = {
    "server_name": NAMES,
    "host": NAMES,
    "alpn": st.sampled_from(["h2", "off", "http/1.1", "'", "#", "~", "{}", "true", "*a", "&b"]),
    "path": st.sampled_from(["/", "/a", "/a/", "/off", "/~", "/a:b;c='d'", "/{}", "/*", '/"']),
    "protocol": st.sampled_from(["tls", "http", "http2", "ssh", "silent"]),
}
POOL_NAMES = ["web", "off", "1"]
TIMES = mappings(RELAY_KEYS)
SETTINGS = st.builds(
    lambda keys, health: {**keys, **health},
    mappings(POOL_KEYS, "backends", "health"),
    st.fixed_dictionaries({}, optional={"health": st.sampled_from(["on", "off", {"http": "/", "rise": "1"}])}),
)
BACKENDS = st.lists(st.sampled_from(["a:1", "/x", "@off", "[::1]:2"]), min_size=1, max_size=3, unique=True)
POOL = st.builds(lambda backends, keys: {"backends": backends, **keys}, BACKENDS, SETTINGS)


def matches(*keys: str) -> st.SearchStrategy[dict[str, Any]]:
    optional: dict[str, st.SearchStrategy[Any]] = {
        key: WORDS[key] | st.lists(WORDS[key], min_size=1, max_size=3, unique=True) for key in keys
    }
    return st.fixed_dictionaries({}, optional={**optional, "from": NETWORKS})


MATCHES = matches("server_name", "alpn") | matches("host", "path") | matches("protocol")
ROUTES = st.lists(
    st.builds(
        lambda match, where, times: {**match, **where, **times},
        MATCHES,
        POOL | st.sampled_from(POOL_NAMES).map(lambda name: {"pool": name}),
        TIMES,
    ),
    min_size=1,
    max_size=3,
)
OWN = st.dictionaries(st.sampled_from([*POOL_NAMES, "-", "null"]), POOL, max_size=2)
SHARED = st.fixed_dictionaries(dict.fromkeys(POOL_NAMES, POOL))


def proxies() -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda routes, pools, keys: {"routes": routes, **({"pools": pools} if pools else {}), **keys},
        ROUTES,
        OWN,
        mappings(
            dict.fromkeys(
                ["max_connections", "first_bytes_timeout", "retries", "idle_timeout", "send_proxy", "balance"]
            )
        ),
    )


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "page")
        Path(path).write_bytes(b"<p>\xff")
        yield path


def of_pools(config: Config) -> Config:
    """A configuration where the pools with a name have only what concerns a pool."""

    def reduced(pools: tuple[NamedPool, ...]) -> tuple[NamedPool, ...]:
        return tuple(
            NamedPool(name, ProxyConfig((), ())._replace(**{key: getattr(settings, key) for key in POOL_KEYS}))
            for name, settings in pools
        )

    def known(route: RouteConfig) -> RouteConfig:
        """If it names a pool, it has nothing of a pool itself."""
        return route._replace(settings=route.settings._replace(backends=())) if route.pool else route

    made = (one._replace(pools=reduced(one.pools), routes=tuple(map(known, one.routes))) for one in config.proxies)
    return config._replace(proxies=tuple(made), pools=reduced(config.pools))


@settings(max_examples=25)
@given(
    st.lists(proxies(), min_size=1, max_size=2),
    SHARED,
    st.sets(st.sampled_from(["400", "404", "408", "502", "503", "504"])),
    mappings(dict.fromkeys(["idle_timeout", "retries", "half_close", "balance", "log_level"])),
    st.booleans(),
)
def test_what_is_printed_is_a_file_that_means_the_same(
    page: str, own: list[dict[str, Any]], pools: dict[str, Any], statuses: set[str], above: dict[str, str], named: bool
) -> None:
    first: dict[str, Any] = {**own[0], **({"error_pages": dict.fromkeys(statuses, page)} if statuses else {})}
    named = named or len(own) > 1
    # At the top of a file with one proxy, there is one place for pools.
    shared = pools if named else {**pools, **first.pop("pools", {})}
    top = {"proxies": {f"p{n}": one for n, one in enumerate([first, *own[1:]])}} if named else first
    try:
        config = read(json.dumps({**above, "pools": shared, **top}))  # JSON is YAML
    except ConfigError:  # routes that take each other's clients
        assume(False)
    printed = dump(config)
    assert of_pools(read(printed)) == of_pools(config)
    if not (named and above):
        # Else what stands at the top, and does not concern a pool, is printed in the proxies alone.
        assert read(printed) == config
    assert dump(read(printed)) == printed
    assert isinstance(yaml.safe_load(printed), dict)
