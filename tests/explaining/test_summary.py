"""What a configuration makes rspd do, in words."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspd.config.addresses import parse_address
from rspd.explaining.summary import describe
from rspd.net.address import Address
from rspd.net.networks import parse_network
from rspd.settings import BackendConfig, Config, ErrorPage, HealthConfig, ProxyConfig, StatusRange

BACKEND = BackendConfig(Address("10.0.0.1", 80))
PROXY = ProxyConfig((Address(port=80),), (BACKEND,))
NETWORK = parse_network("10.0.0.0/8")

# Each field of a proxy that is not said by itself, with a value that is not the default.
OTHERS: dict[str, tuple[Any, str]] = {
    "name": ("web", "web: listening on 80; one connection at a time"),
    "max_connections": (100, "100 connections at a time"),
    "backlog": (5, "backlog 5"),
    "reuse_port": (True, "listening on 80 (ports shared, reuse_port)"),
    "connect_timeout": (0.5, "connect_timeout 500 ms"),
    "idle_timeout": (inf, "idle_timeout off"),
    "half_close": (False, "connections end when either side has ended"),
    "half_close_timeout": (120.0, "half_close_timeout 2 min"),
    "drain_timeout": (3600.0, "drain_timeout 1 h"),
    "balance": ("source", "source over one backend"),
    "resolve": ("each", "each address of a name a backend"),
    "resolve_interval": (90.0, "names looked up every 90 s"),
    "retries": (2, "at most 2 further backends tried"),
    "max_fails": (3, "down after 3 failures within 10 s"),
    "fail_timeout": (1.5, "down after one failure within 1.5 s"),
    "queue_timeout": (7.0, "clients waiting up to 7 s while no backend is up"),
    "health": (HealthConfig(), "health by connecting every 5 s"),
    "on_down": ("abort", "connections of a backend aborted when it goes down"),
    "send_proxy": ("v2", "a PROXY v2 header to backends"),
    "accept_proxy": ((NETWORK,), "a PROXY header within 5 s from 10.0.0.0/8"),
    "allow": ((NETWORK, parse_network("unix")), "only for 10.0.0.0/8, unix"),
    "deny": ((NETWORK,), "not for 10.0.0.0/8"),
    "max_connections_per_client": (5, "5 of one client"),
    "first_bytes_timeout": (0.5, "first_bytes_timeout 500 ms, without routes"),
    "error_pages": (
        (ErrorPage(404, "/404", b""), ErrorPage(503, "/503", b"")),
        "pages of its own for 404, 503",
    ),
    "log_start": (True, "a line in the log also when a connection begins"),
}

# The same of what is for all proxies.
GENERAL: dict[str, tuple[Any, str]] = {
    "log_level": ("debug", "logs from debug on"),
    "exit_idle_time": (300.0, "ends after 5 min without a connection"),
    "control": (Address(path="/run/web/control.sock"), "control socket /run/web/control.sock"),
    "control_mode": (0o666, "all users of this host may look at it"),
    "control_group": ("adm", "the group adm may look at it"),
    "metrics": (Address("127.0.0.1", 9114), "metrics at 127.0.0.1:9114"),
    "handover": (False, "hands no connection over at a restart"),
}


def test_what_is_default_goes_unsaid() -> None:
    assert describe(Config((PROXY,))) == ["listening on 80; one connection at a time", "  10.0.0.1:80"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_default_is_said(name: str) -> None:
    value, words = OTHERS[name]
    line, _ = describe(Config((PROXY._replace(**{name: value}),)))
    assert words in line.split("; ") or line == words


def test_nothing_that_is_not_default_goes_unsaid() -> None:
    elsewhere = {"listen", "backends", "accept_proxy_timeout", "routes", "pools"}
    assert OTHERS.keys() == set(ProxyConfig._fields) - elsewhere
    line, _ = describe(Config((PROXY._replace(accept_proxy=(NETWORK,), accept_proxy_timeout=9.0),)))
    assert line.endswith("; a PROXY header within 9 s from 10.0.0.0/8")
    assert GENERAL.keys() == set(Config._fields) - {"proxies", "pools"}


@pytest.mark.parametrize("name", GENERAL)
def test_what_is_not_default_for_all_proxies_is_said(name: str) -> None:
    value, words = GENERAL[name]
    assert describe(Config((PROXY,), **{name: value}))[2:] == [words]


@pytest.mark.parametrize(
    ("mode", "group", "words"),
    [
        (0o600, "", "only root and its own user may look at it"),
        (0o644, "adm", "only root and its own user may look at it"),
        (0o666, "adm", "all users of this host may look at it"),
        (0o602, "", "all users but those of the group of its process may look at it"),
        (0o602, "adm", "all users but those of the group adm may look at it"),
    ],
)
def test_who_may_look_at_it_is_said_in_words(mode: int, group: str, words: str) -> None:
    """To connect to a unix socket, one has to be allowed to write to it."""
    assert describe(Config((PROXY,), control_mode=mode, control_group=group))[2:] == [words]


def test_that_nobody_can_look_at_it_is_said_and_nothing_else_of_it() -> None:
    config = Config((PROXY,), control="off", control_mode=0o666, control_group="adm", metrics=Address(path="/run/m"))
    assert describe(config)[2:] == ["no control socket, nobody can look at it; metrics at /run/m"]


@pytest.mark.parametrize(
    ("health", "words"),
    [
        (HealthConfig(interval=0.25, timeout=1.0), "by connecting every 250 ms, within 1 s"),
        (HealthConfig(http="/health"), "by GET /health every 5 s"),
        (HealthConfig(http="/", host="a.example"), "by GET / of a.example every 5 s"),
        (
            HealthConfig(http="/", status=(StatusRange(200, 299), StatusRange(304, 304))),
            "by GET / every 5 s, good status 200-299, 304",
        ),
        (HealthConfig(send=b"PING\r\n", expect=b"+PONG"), r"by sending 'PING\r\n' and expecting '+PONG' every 5 s"),
        (HealthConfig(expect=b"SSH-"), "by expecting 'SSH-' every 5 s"),
        (HealthConfig(send=b"\xff\0"), r"by sending '\xff\x00' every 5 s"),
        (HealthConfig(port=8008), "by connecting to port 8008 every 5 s"),
        (HealthConfig(http="/primary", host="a", port=8008), "by GET /primary of a at port 8008 every 5 s"),
        (HealthConfig(address=Address("a", 1)), "by connecting to a:1 every 5 s"),
        (HealthConfig(address=Address("::1"), port=1), "by connecting to [::1]:1 every 5 s"),
        (HealthConfig(address=Address("a")), "by connecting to the backend's port of a every 5 s"),
        (HealthConfig(send=b"x", address=Address(path="/run/x")), "by sending 'x' at /run/x every 5 s"),
        (HealthConfig(rise=1, fall=9), "by connecting every 5 s, up after 1 good, down after 9 bad"),
    ],
)
def test_how_backends_are_checked_is_said(health: HealthConfig, words: str) -> None:
    line, _ = describe(Config((PROXY._replace(health=health),)))
    assert line == f"listening on 80; one connection at a time; health {words}"


def test_that_failures_take_no_backend_down_is_said() -> None:
    line, _ = describe(Config((PROXY._replace(max_fails=inf),)))
    assert line.endswith("; never down by failures to connect")


def test_that_no_further_backend_is_tried_is_said() -> None:
    line, _ = describe(Config((PROXY._replace(retries=0),)))
    assert line.endswith("; no further backend tried")


def test_each_backend_has_a_line_with_what_it_gets() -> None:
    first = BACKEND._replace(weight=3, max_connections=1)
    second = BackendConfig(parse_address("[::1]:80"), backup=True, max_connections=20)
    assert describe(Config((PROXY._replace(backends=(first, second)),))) == [
        "listening on 80; one connection at a time; round-robin over 2 backends",
        "  10.0.0.1:80, weight 3, one connection at a time",
        "  [::1]:80, backup, 20 connections at a time",
    ]


def test_what_one_backend_has_in_place_of_the_proxy_s_is_in_its_line() -> None:
    proxy = PROXY._replace(max_fails=3, fail_timeout=20.0, health=HealthConfig(http="/"))
    backends = [
        BACKEND._replace(max_fails=1),
        BACKEND._replace(fail_timeout=60.0, health=HealthConfig(port=81, rise=1)),
        BACKEND._replace(max_fails=inf, health="off"),
    ]
    line, *own = describe(Config((proxy._replace(backends=tuple(backends)),)))
    assert line.endswith("; health by GET / every 5 s; down after 3 failures within 20 s")
    assert own == [
        "  10.0.0.1:80, down after one failure within 20 s",
        "  10.0.0.1:80, down after 3 failures within 1 min, health by connecting to port 81 every 5 s, up after 1 good",
        "  10.0.0.1:80, never down by failures to connect, no health checks",
    ]


def test_several_proxies_come_in_the_files_order_and_then_what_is_for_all() -> None:
    proxies = (PROXY._replace(name="web"), PROXY._replace(name="mail", listen=()))
    assert describe(Config(proxies, "debug", 300.0, handover=False)) == [
        "web: listening on 80; one connection at a time",
        "  10.0.0.1:80",
        "mail: listening on what a socket unit passes (there is no listen); one connection at a time",
        "  10.0.0.1:80",
        "ends after 5 min without a connection; hands no connection over at a restart; logs from debug on",
    ]


@given(st.floats(0.001, 1e13, allow_nan=False), st.binary(max_size=9))
def test_words_are_printable_whatever_is_configured(seconds: float, data: bytes) -> None:
    proxy = PROXY._replace(connect_timeout=seconds, health=HealthConfig(send=data, expect=data))
    assert all(line.isprintable() for line in describe(Config((proxy,))))
