"""rspd/routing/table.py: which route a client takes, whatever it has said and wherever it comes from."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.net.networks import parse_network
from rspd.protocols.first import SILENT, UNKNOWN, HeadError, Said
from rspd.routing.table import Table
from rspd.settings import ProxyConfig, RouteConfig

SETTINGS = ProxyConfig((), ())
HERE = "192.0.2.7"


def route(**matches: Any) -> RouteConfig:
    """A route with these matches, each one text or several."""
    lists: dict[str, Any] = {
        key: (value,) if isinstance(value, str) else tuple(value) for key, value in matches.items()
    }
    networks = tuple(parse_network(text) for text in lists.pop("networks", ()))
    return RouteConfig("", SETTINGS, networks=networks)._replace(**lists)


def tls(name: str = "", *alpn: str) -> Said:
    return Said("tls", name, alpn)


def http(name: str = "", target: str = "/") -> Said:
    return Said("http", name, (), target, "GET")


def found(said: Said, *routes: RouteConfig, host: str = HERE) -> int | None:
    return Table(routes).find(said, (host, 1) if host else "")


# Names

NAMED = (
    route(),
    route(server_name="*.org"),
    route(server_name="*.example.org"),
    route(server_name=["example.org", "www.example.org"]),
    route(server_name="*.eu.example.org"),
)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("example.org", 3),
        ("www.example.org", 3),
        ("mail.example.org", 2),
        ("a.b.example.org", 2),
        ("eu.example.org", 2),
        ("a.eu.example.org", 4),
        ("a.b.c.eu.example.org", 4),
        ("wwwexample.org", 1),
        ("badexample.org", 1),
        ("org", 0),
        ("example.com", 0),
        ("example.org.com", 0),
        ("[::1]", 0),
        ("", 0),
    ],
)
@pytest.mark.parametrize("order", [1, -1], ids=["in the file's order", "the other way round"])
def test_an_exact_name_comes_before_the_longest_suffix_and_that_before_no_name(
    name: str, number: int, order: int
) -> None:
    routes = NAMED[::order]
    chosen = found(tls(name), *routes)
    assert chosen is not None
    assert routes[chosen] is NAMED[number]


def test_a_star_stands_for_any_number_of_labels_and_not_for_none() -> None:
    star = route(host="*.example.org")
    assert [found(http(name), star) for name in ("a.example.org", "a.b.c.example.org")] == [0, 0]
    assert [found(http(name), star) for name in ("example.org", "aexample.org", "org", "")] == [None] * 4


def test_where_the_route_of_the_name_does_not_suit_a_less_precise_one_is_taken() -> None:
    routes = (
        route(server_name="a.example.org", alpn="imap"),
        route(server_name="*.example.org", networks="10.0.0.0/8"),
        route(server_name="*.org", alpn="h2"),
        route(protocol="tls"),
    )
    assert found(tls("a.example.org", "imap"), *routes) == 0
    assert found(tls("a.example.org", "h2"), *routes, host="10.1.2.3") == 1
    assert found(tls("a.example.org", "h2"), *routes) == 2
    assert found(tls("a.example.org"), *routes) == 3


def test_without_a_route_for_all_others_there_may_be_none() -> None:
    assert found(tls("b.org"), route(server_name="a.org")) is None
    assert found(UNKNOWN, route(server_name="a.org"), route(protocol="http")) is None
    assert found(SILENT, route(path="/"), route(protocol=["ssh", "http2"])) is None
    assert found(tls("a.org")) is None


def test_a_name_of_tls_is_none_of_http_and_the_other_way_round() -> None:
    routes = (route(server_name="a.org"), route(host="a.org"), route())
    assert [found(said, *routes) for said in (tls("a.org"), http("a.org"))] == [0, 1]
    assert [found(said, *routes[::-1]) for said in (tls("a.org"), http("a.org"))] == [2, 1]
    assert [found(said, *routes[:1]) for said in (tls("a.org"), http("a.org"))] == [0, None]


# Paths


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("/", 1),
        ("/ap", 1),
        ("/apiary", 1),
        ("/api", 2),
        ("/api/", 2),
        ("/api?x=/api/v2", 2),
        ("/api//v2", 3),
        ("/api/v2", 3),
        ("/api/v2/users", 3),
        ("/api/v20", 2),
        ("/%61pi/v2", 3),
        ("/api%2Fv2", 3),
        ("/API", 1),
        ("/files", 1),
        ("/files/", 4),
        ("/files/a", 4),
        ("/a..b", 1),
        ("*", 0),
        ("", 0),
    ],
)
def test_the_longest_path_is_taken_by_whole_segments(target: str, number: int) -> None:
    routes = (route(), route(path="/"), route(path="/api"), route(path="/api/v2"), route(path="/files/"))
    assert found(http("a.org", target), *routes) == number
    assert found(http("a.org", target), *routes[::-1]) == 4 - number


def test_a_name_counts_before_a_longer_path() -> None:
    routes = (
        route(path="/a/b/c"),
        route(host="*.example.org", path="/a/b"),
        route(host="a.example.org", path="/a"),
        route(host="a.example.org"),
    )
    assert found(http("a.example.org", "/a/b/c"), *routes) == 2
    assert found(http("a.example.org", "/b"), *routes) == 3
    assert found(http("b.example.org", "/a/b/c"), *routes) == 1
    assert found(http("b.example.org", "/a/x"), *routes) is None
    assert found(http("", "/a/b/c/d"), *routes) == 0


def test_one_route_may_have_several_names_and_paths_each_with_its_own_rank() -> None:
    routes = (route(host=["a.org", "*.b.org"], path=["/x", "/x/y/z"]), route(host="a.org", path="/x/y"))
    paths = ("/x", "/x/y", "/x/y/z", "/x/y/zz", "/")
    assert [found(http("a.org", path), *routes) for path in paths] == [0, 1, 0, 1, None]
    assert [found(http("c.b.org", path), *routes) for path in paths] == [0, 0, 0, 0, None]


@pytest.mark.parametrize("target", ["/a/../b", "/..", "/.", "/a/%2e%2E/b", "/a/..;x/b", "/%", "/a%2"])
def test_a_path_that_servers_read_in_several_ways_is_an_error_where_a_path_matters(target: str) -> None:
    with pytest.raises(HeadError, match=r"^expected "):
        found(http("a.org", target), route(host="a.org"), route(path="/b"))
    assert found(http("a.org", target), route(host="a.org"), route()) == 0


# What else matches


def test_of_several_protocols_offered_one_that_the_route_names_is_enough() -> None:
    routes = (route(alpn=["imap", "pop3"]), route(alpn="h2"), route(protocol="tls"))
    offered = [("h2", "pop3"), ("http/1.1", "h2"), ("http/1.1",), ()]
    assert [found(tls("", *alpn), *routes) for alpn in offered] == [0, 1, 2, 2]


@pytest.mark.parametrize("said", [http(), Said("http2"), Said("ssh"), SILENT, tls()], ids=lambda said: said.protocol)
def test_the_word_for_a_protocol_is_for_this_one_alone(said: Said) -> None:
    words = ("tls", "http", "http2", "ssh", "silent")
    routes = [route(protocol=word) for word in words]
    assert found(said, *routes) == words.index(said.protocol)
    assert found(said, *(one for one in routes if one.protocol != (said.protocol,))) is None
    assert found(said, route(protocol=words)) == 0


def test_networks_tell_clients_apart_those_of_unix_sockets_too() -> None:
    routes = (route(networks=["10.0.0.0/8", "2001:db8::/32"]), route(networks="unix"), route())
    hosts = ("10.255.0.1", "2001:db8::7", "11.0.0.1", "::1", "")
    assert [found(UNKNOWN, *routes, host=host) for host in hosts] == [0, 0, 2, 2, 1]


def test_of_routes_that_are_alike_the_first_one_in_the_file_that_suits_is_taken() -> None:
    routes = (
        route(host="a.org", networks="10.0.0.0/8"),
        route(host="a.org"),
        route(host="a.org", networks="192.0.2.0/24"),
    )
    assert [found(http("a.org"), *routes, host=host) for host in ("10.0.0.1", "192.0.2.1")] == [0, 1]
    assert found(http("a.org"), *routes[::-1]) == 0


def test_all_that_a_route_says_has_to_hold() -> None:
    whole = route(server_name="*.a.org", alpn="h2", networks="192.0.2.0/24")
    assert found(tls("b.a.org", "h2"), whole) == 0
    assert found(tls("a.org", "h2"), whole) is None
    assert found(tls("b.a.org", "h3"), whole) is None
    assert found(tls("b.a.org", "h2"), whole, host="10.0.0.1") is None
    page = route(host="a.org", path="/x", networks="192.0.2.0/24")
    assert found(http("a.org", "/x"), page) == 0
    assert found(http("b.org", "/x"), page) is None
    assert found(http("a.org", "/y"), page) is None
    assert found(http("a.org", "/x"), page, host="") is None


@pytest.mark.parametrize(
    ("routes", "protocols"),
    [
        ([route()], set()),
        ([route(networks="10.0.0.0/8"), route()], set()),
        ([route(server_name="a"), route(alpn="h2")], {"tls"}),
        ([route(host="a"), route(path="/")], {"http"}),
        ([route(protocol=["ssh", "silent"]), route(host="a"), route()], {"ssh", "silent", "http"}),
    ],
)
def test_only_protocols_that_some_route_asks_for_are_looked_for(routes: list[RouteConfig], protocols: set[str]) -> None:
    table = Table(routes)
    assert table.protocols == protocols
    assert table.looks is bool(protocols)


# A model: the rule as it is written, route by route

NAMES = ["org", "a.org", "b.a.org", "c.b.a.org", "*.org", "*.a.org", "*.b.a.org"]
PATHS = ["/", "/a", "/a/", "/a/b", "/ab", "/a/b/c"]
NETWORKS = ["10.0.0.0/8", "10.1.0.0/16", "192.0.2.7", "unix", "2001:db8::/32"]


def some(words: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(words), min_size=1, max_size=2, unique=True)


def matches(**kinds: list[str]) -> st.SearchStrategy[RouteConfig]:
    optional = {key: some(words) for key, words in {**kinds, "networks": NETWORKS}.items()}
    return st.fixed_dictionaries({}, optional=optional).map(lambda chosen: route(**chosen))


ROUTES = st.lists(
    matches(server_name=NAMES, alpn=["h2", "imap"])
    | matches(host=NAMES, path=PATHS)
    | matches(protocol=["tls", "http", "http2", "ssh", "silent"]),
    max_size=7,
)
SAID_NAMES = st.sampled_from(["", "com", *(name.replace("*", "x.y") for name in NAMES)])
SAID = (
    st.builds(tls, SAID_NAMES, st.sampled_from(["h2", "imap", "h3"]))
    | st.builds(http, SAID_NAMES, st.sampled_from([*PATHS, "/x", "/a?/b", "*", "/a//b/d"]))
    | st.sampled_from([UNKNOWN, SILENT, Said("ssh"), Said("http2"), tls()])
)
HOSTS = st.sampled_from(["10.0.0.1", "10.1.0.1", "192.0.2.7", "", "2001:db8::1", "::1"])


def by_the_rule(routes: list[RouteConfig], said: Said, host: str) -> int | None:
    """All routes that suit, each name and path for itself, sorted by the rule: the first one."""
    path = re.sub("/+", "/", said.target.partition("?")[0])
    suiting = [
        (-(len(name.split(".")) + (not name.startswith("*"))) if name else 0, -len(below), number)
        for number, one in enumerate(routes)
        for name in one.server_name or one.host or [""]
        for below in one.path or [""]
        if not name or said.name == name or (name[0] == "*" and said.name.endswith(name[1:]))
        if not below or path == below or path.startswith(below.rstrip("/") + "/")
        if not one.protocols or said.protocol in one.protocols
        if not one.alpn or set(one.alpn) & set(said.alpn)
        if not one.networks or host_in(host, one)
    ]
    return min(suiting)[2] if suiting else None


def host_in(host: str, one: RouteConfig) -> bool:
    return any(network.holds(parse_network(host or "unix")) for network in one.networks)


@settings(max_examples=500)
@given(ROUTES, SAID, HOSTS)
def test_the_route_that_is_taken_is_the_first_one_by_the_rule(routes: list[RouteConfig], said: Said, host: str) -> None:
    assert found(said, *routes, host=host) == by_the_rule(routes, said, host)
