"""What is in force, as a configuration file: valid, and of the same meaning."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from math import inf
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.config.addresses import parse_address, parse_backend, parse_target
from rspd.config.keys import GENERAL_KEYS, PROXY_KEYS, load_config
from rspd.config.pools import BACKEND_KEYS, HEALTH_KEYS
from rspd.config.values import format_duration, parse_duration
from rspd.explaining.dump import dump
from rspd.settings import BackendConfig, Config, HealthConfig, ProxyConfig

DEFAULTS = """\
listen: 8080
backend:
  address: 127.0.0.1:8000
  weight: 1
  backup: false
  max_connections: off
max_connections: 1
backlog: 4096
reuse_port: false
balance: round-robin
resolve: one
resolve_interval: 10s
connect_timeout: 5s
retries: all
max_fails: 1
fail_timeout: 10s
queue_timeout: off
health: off
on_down: keep
idle_timeout: 60s
half_close: on
half_close_timeout: 30s
drain_timeout: 30s
allow: all
deny: off
max_connections_per_client: off
send_proxy: off
accept_proxy: off
accept_proxy_timeout: 5s
first_bytes_timeout: 5s
error_pages: off
log_start: false
exit_idle_time: off
control_mode: 0660
metrics: off
handover: on
log_level: info
"""


def read(content: str) -> Config:
    """What a file of this content means, where sockets may be passed."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rspd.yaml")
        with open(path, "w") as file:
            file.write(content)
        return load_config(path, {}, sockets=True)


def test_each_value_in_force_is_told_with_its_default() -> None:
    assert dump(read("listen: 8080\nbackend: 127.0.0.1:8000")) == DEFAULTS


def test_all_of_a_check_is_told() -> None:
    file = 'listen: 80\nbackend: a:1\nhealth: {send: "PING\\r\\n\\xff\\0", expect: +PONG, interval: 1.5s}\n'
    expected = 'health:\n  interval: 1.5s\n  timeout: 2s\n  rise: 2\n  fall: 3\n  send: "PING\\r\\n\\xFF\\0"\n'
    assert expected + '  expect: "+PONG"\n' in dump(read(file))
    file = "listen: 80\nbackend: a:1\nhealth: {http: /, status: '200-299, 304'}\n"
    expected = (
        "health:\n  interval: 5s\n  timeout: 2s\n  rise: 2\n  fall: 3\n  http: /\n  status:\n  - 200-299\n  - 304\n"
    )
    assert expected in dump(read(file))


def test_each_value_has_a_line_and_several_backends_are_called_so() -> None:
    long = "word " * 50 + "end"
    told = dump(read(f"listen: 80\nbackends: [a:1, b:1]\nhealth: {{send: '{long}'}}\n"))
    assert f'\n  send: "{long}"\n' in told
    assert "\nbackends:\n- address: a:1\n" in told


def test_several_proxies_stand_under_their_names_after_what_is_for_all() -> None:
    told = dump(read("idle_timeout: 9s\nproxies: {a: {listen: 1, backend: a:1}, b: {backend: b:1}}"))
    general = "exit_idle_time: off\ncontrol_mode: 0660\nmetrics: off\nhandover: on\nlog_level: info\n"
    assert told.startswith(f"{general}proxies:\n  a:\n    listen: 1\n    backend:\n")
    assert told.count("\n    idle_timeout: 9s\n") == 2
    assert told.count("listen: ") == 1


# Texts that each key takes, beside its default.
DURATIONS = st.sampled_from(
    ["500ms", "1.25s", "90", "61m", "2h", "0.333333333h", "999999999h", "3599999996400", "10ms"]
)
NUMBERS = st.integers(1, 1000).map(str)
NETWORKS = st.lists(
    st.sampled_from(["10.0.0.0/8", "2001:db8::/32", "::1", "unix", "192.0.2.7"]), min_size=1, unique=True
)
ADDRESSES = [
    "a:1",
    "127.0.0.1:80",
    "[::1]:80",
    "/run/a b",
    "/run/#x: y",
    "@x",
    "/é\n",
    "/off",
    "@\udcff",
    "xn--a:65535",
]
LISTENERS = [*ADDRESSES, "8080", "fd://a b", "fd://#1", "0"]
WORDS = {
    "balance": ["round-robin", "least-connections", "random", "source"],
    "resolve": ["one", "each"],
    "on_down": ["keep", "abort"],
    "send_proxy": ["v1", "v2", "off"],
    "log_level": ["debug", "info", "warning", "error"],
    "reuse_port": ["true", "no"],
    "log_start": ["yes", "false"],
    "control": ["/run/rspd/control.sock", "/run/#c: d", "/off", "off", "no"],
    "control_mode": ["0660", "600", "0666"],
    "control_group": ["adm", "_a-b.c", "off", "on1"],
    "metrics": ["127.0.0.1:9114", "9114", "[::1]:9114", "/run/rspd/metrics.sock", "off", "no"],
    "half_close": ["on", "off", "true", "No"],
    "handover": ["on", "off", "True", "no"],
    "backup": ["yes", "false"],
    "http": ["/", "/a?b=c#d", "/~"],
    "address": ADDRESSES,
    "host": ["a.example", "off", "[::1]:80", "'", "~"],
    "status": ["200", "200-299, 304"],
    "send": ["PING\r\n", "\0\x04\xd2\x16/", " ", "\x85\xa0\xff", "off", "%"],
}
OFF_TOO = ("connect_timeout", "idle_timeout", "half_close_timeout", "drain_timeout", "queue_timeout", "exit_idle_time")


def texts(key: str) -> st.SearchStrategy[Any]:
    if key in WORDS:
        return st.sampled_from(WORDS[key])
    if key == "expect":
        return texts("send")
    if key in ("allow", "deny", "accept_proxy"):
        return NETWORKS | st.just("all" if key == "allow" else "off")
    if key in ("rise", "fall"):
        return st.integers(1, 100).map(str)
    if key in ("max_connections", "backlog", "weight"):
        return NUMBERS
    if key in ("retries", "max_connections_per_client", "max_fails"):
        return NUMBERS | st.just("all" if key == "retries" else "off")
    return DURATIONS | st.just("off") if key in OFF_TOO else DURATIONS


def mappings(keys: Mapping[str, Any], *without: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key: texts(key) for key in keys if key not in without})


CHECKS = (
    mappings(HEALTH_KEYS, "http", "host", "status", "port")
    | st.builds(
        lambda keys, http: {**keys, "http": http}, mappings(HEALTH_KEYS, "send", "expect", "port"), texts("http")
    )
    | st.sampled_from(["on", "off"])
)
# With health.port, or a host alone in health.address, no backend may be a unix socket.
ELSEWHERE = [{"port": "8008"}, {"address": "a.example"}, {"address": "2001:db8::9"}, {"address": "b", "port": "1"}]
PORTS = st.builds(
    lambda keys, where: {**keys, **where},
    mappings(HEALTH_KEYS, "http", "host", "status", "port", "address"),
    st.sampled_from(ELSEWHERE),
)
HOSTS = [address for address in ADDRESSES if address[0] not in "/@"]
BACKENDS = st.builds(
    lambda address, keys, own: {"address": address, **keys, **own},
    st.sampled_from(ADDRESSES),
    mappings(BACKEND_KEYS, "address", "health"),
    st.fixed_dictionaries({}, optional={"health": CHECKS}),
) | st.builds(lambda address, health: {"address": address, "health": health}, st.sampled_from(HOSTS), PORTS)
PROXIES = st.builds(
    lambda backends, keys, own: {"backends": [{"address": "first:1"}, *backends], **keys, **own},
    st.lists(BACKENDS, max_size=3, unique_by=lambda backend: backend["address"]),
    mappings(PROXY_KEYS, "listen", "backends", "health", "routes", "pools", "error_pages"),
    st.fixed_dictionaries({}, optional={"health": CHECKS}),
)


@settings(max_examples=40)
@given(
    st.lists(PROXIES, min_size=1, max_size=3),
    st.lists(st.sampled_from(LISTENERS), max_size=4, unique=True),
    mappings(GENERAL_KEYS),
    st.booleans(),
)
def test_what_is_printed_is_a_file_that_means_the_same(
    proxies: list[dict[str, Any]], listen: list[str], general: dict[str, Any], named: bool
) -> None:
    checks = [one.get("health") for one in (proxies[0], *proxies[0]["backends"])]
    asked = [health["address"] for health in checks if isinstance(health, dict) and "address" in health]
    dialled = {parse_target(text) for text in [*asked, *(backend["address"] for backend in proxies[0]["backends"])]}
    own = [text for text in listen if parse_address(text) not in dialled]
    first = {**proxies[0], **({"listen": own} if own else {})}
    places = [general.get("control"), general.get("metrics")]
    general = {key: value for key, value in general.items() if value not in own or key not in ("control", "metrics")}
    if places[0] == places[1]:
        general.pop("metrics", None)  # each of them has a place of its own
    named = named or len(proxies) > 1
    top = {"proxies": {f"p{n}": proxy for n, proxy in enumerate([first, *proxies[1:]])}} if named else first
    config = read(json.dumps({**top, **general}))  # JSON is YAML
    printed = dump(config)
    assert read(printed) == config
    assert dump(read(printed)) == printed
    assert isinstance(yaml.safe_load(printed), dict)


@given(
    st.from_regex(r"[0-9]{1,13}(\.[0-9]{1,9})?(ms|s|m|h|)", fullmatch=True).filter(
        lambda text: any(digit in text for digit in "123456789")
    )
)
def test_any_duration_is_printed_as_one_that_is_the_same(text: str) -> None:
    try:
        seconds = parse_duration(text)
    except ValueError:  # too short or too long to be one
        return
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("60", "60s"),
        ("1m", "60s"),
        ("120s", "2m"),
        ("1h", "1h"),
        ("3660", "61m"),
        ("7200", "2h"),
        ("0.5", "500ms"),
        ("1500ms", "1.5s"),
        ("0.1ms", "0.0001s"),
        ("off", "off"),
    ],
)
def test_a_duration_is_printed_in_its_usual_unit(text: str, printed: str) -> None:
    assert format_duration(parse_duration(text)) == printed


def test_a_value_of_each_field_is_printed() -> None:
    """A field that is new has its key here, or the file would not mean the same."""
    proxy = ProxyConfig((parse_address("1"),), (BackendConfig(parse_backend("a:1")),))
    told = yaml.load(dump(Config((proxy,), control="off", control_group="adm")), yaml.BaseLoader)
    fields = (set(ProxyConfig._fields) | set(Config._fields)) - {"name", "proxies", "backends", "routes", "pools"}
    assert told.keys() == fields | {"backend"}
    # What a backend does not say itself, the proxy says.
    assert told["backend"].keys() == set(BackendConfig._fields) - {"max_fails", "fail_timeout", "health"}
    health = HealthConfig(http="/", host="a", send=b"", expect=b"", address=parse_backend("b:1"))
    backend = BackendConfig(parse_backend("a:1"), max_fails=inf, fail_timeout=1.0, health=health._replace(port=1))
    told = yaml.load(dump(Config((ProxyConfig((), (backend,), health=health),))), yaml.BaseLoader)
    assert told["health"].keys() == set(HealthConfig._fields) - {"send", "expect", "port"}
    assert told["backend"].keys() == set(BackendConfig._fields)
    assert told["backend"]["health"].keys() == {*told["health"], "port"}
