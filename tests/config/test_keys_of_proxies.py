"""The configuration of several proxies, of backends with a weight, of health checks: what nests, and what is wrong."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.config.addresses import parse_address
from rspd.config.keys import GENERAL_KEYS, PROXY_KEYS, load_config
from rspd.config.pools import BACKEND_KEYS, HEALTH_KEYS
from rspd.errors import ConfigError
from rspd.net.address import Address, covers
from rspd.net.networks import parse_network
from rspd.settings import BackendConfig, Config, HealthConfig, ProxyConfig, StatusRange

MINIMAL = "listen: 8080\nbackend: 127.0.0.1:8000\n"
DIAL = "expected HOST:PORT, [IPV6]:PORT, /PATH or @NAME"
DURATION = "expected a duration above 0, as 500ms, 5s, 2m or 1h"
TARGET = "expected HOST, HOST:PORT, [IPV6]:PORT, /PATH or @NAME"
OWN_CHECK = "write {address: /x, health: on}, or a port and an address in its health"
UNIX = f"backend /x is a unix socket, which has no port; {OWN_CHECK}"
HEALTH = "expected a mapping, as {http: /health}, or on or off"

TWO = """\
proxies:
  web:
    listen: 80
    backends: [10.0.0.1:80, 10.0.0.2:80]
  mail:
    listen: 25
    backend: 10.0.0.3:25
"""

Load = Callable[..., Config]
Errors = Callable[..., list[str]]


def aliased(first: str, proxies: int = 200, backends: int = 3000) -> str:
    """Proxies that all have the same backends, `first` and so many others, by an alias."""
    addresses = [first, *(f"10.0.{number // 250}.{number % 250}:80" for number in range(1, backends))]
    own = "".join(f"  p{number}: {{listen: {10000 + number}, backends: *all}}\n" for number in range(1, proxies))
    return f"proxies:\n  p0: {{listen: 10000, backends: &all [{', '.join(addresses)}]}}\n{own}"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a configuration file with this content."""

    def load(content: str, *, sockets: bool = False, **options: object) -> Config:
        file = tmp_path / "rspd.yaml"
        file.write_text(content)
        return load_config(str(file), options, sockets=sockets)

    return load


@pytest.fixture
def errors(tmp_path: Path, load: Load) -> Errors:
    """What is wrong with a file of this content, FILE in place of its path."""

    def errors(content: str, **options: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(content, **options)
        return [error.replace(str(tmp_path / "rspd.yaml"), "FILE") for error in caught.value.errors]

    return errors


def backends(*texts: str) -> tuple[BackendConfig, ...]:
    return tuple(BackendConfig(parse_address(text)) for text in texts)


# One proxy


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        *((f"balance: {word}", "balance", word) for word in ("round-robin", "least-connections", "random", "source")),
        ("resolve: each", "resolve", "each"),
        ("resolve: one", "resolve", "one"),
        ("resolve_interval: 1m", "resolve_interval", 60.0),
        ("retries: 0", "retries", 0),
        ("retries: 3", "retries", 3),
        ("retries: all", "retries", inf),
        ("max_fails: 1000", "max_fails", 1000),
        ("max_fails: off", "max_fails", inf),
        ("fail_timeout: 500ms", "fail_timeout", 0.5),
        ("queue_timeout: 5s", "queue_timeout", 5.0),
        ("queue_timeout: 0", "queue_timeout", 0.0),
        ("queue_timeout: 0s", "queue_timeout", 0.0),
        ("queue_timeout: off", "queue_timeout", 0.0),
        ("on_down: abort", "on_down", "abort"),
        ("on_down: keep", "on_down", "keep"),
        ("send_proxy: v1", "send_proxy", "v1"),
        ("send_proxy: v2", "send_proxy", "v2"),
        ("send_proxy: off", "send_proxy", ""),
        ("accept_proxy_timeout: 1s", "accept_proxy_timeout", 1.0),
        ("accept_proxy: off", "accept_proxy", ()),
        ("accept_proxy: 10.0.0.0/8", "accept_proxy", (parse_network("10.0.0.0/8"),)),
        ("allow: all", "allow", ()),
        ("allow: [192.0.2.7, unix]", "allow", (parse_network("192.0.2.7"), parse_network("unix"))),
        ("deny: off", "deny", ()),
        ("deny:\n- 2001:db8::/32\n- 10.0.0.0/8", "deny", (parse_network("2001:db8::/32"), parse_network("10.0.0.0/8"))),
        ("max_connections_per_client: 5", "max_connections_per_client", 5),
        ("max_connections_per_client: off", "max_connections_per_client", inf),
        ("health: off", "health", None),
        *((f"health: {text}", "health", HealthConfig()) for text in ("{}", "on", "yes", "True")),
        ("health: {interval: 1s, timeout: 500ms, rise: 1, fall: 100}", "health", HealthConfig(1.0, 0.5, 1, 100)),
        (
            "health:\n  http: /health?full=1\n  host: www.example.org:8000\n  status: 200-299, 304",
            "health",
            HealthConfig(
                http="/health?full=1",
                host="www.example.org:8000",
                status=(StatusRange(200, 299), StatusRange(304, 304)),
            ),
        ),
        ("health: {http: /, status: 204}", "health", HealthConfig(http="/", status=(StatusRange(204, 204),))),
        (
            "health: {http: /, status: [200-299, 401]}",
            "health",
            HealthConfig(http="/", status=(StatusRange(200, 299), StatusRange(401, 401))),
        ),
        (
            'health: {send: "PING\\r\\n", expect: +PONG}',
            "health",
            HealthConfig(send=b"PING\r\n", expect=b"+PONG"),
        ),
        ("health: {port: 8008}", "health", HealthConfig(port=8008)),
        ("health: {address: /run/x}", "health", HealthConfig(address=Address(path="/run/x"))),
        ("health: {address: a.example}", "health", HealthConfig(address=Address("a.example"))),
        ("health: {address: 10.0.0.9, port: 1}", "health", HealthConfig(port=1, address=Address("10.0.0.9"))),
        *(
            (f'health: {{address: "{text}"}}', "health", HealthConfig(address=Address("::1")))
            for text in ("::1", "[::1]")
        ),
        ('health: {send: "\\0\\x04\\xd2\\x16/"}', "health", HealthConfig(send=b"\x00\x04\xd2\x16/")),
    ],
)
def test_a_key_of_a_proxy_can_be_set(load: Load, line: str, name: str, value: Any) -> None:
    assert load(MINIMAL + line).proxies[0] == load(MINIMAL).proxies[0]._replace(**{name: value})


@pytest.mark.parametrize("key", ["backend", "backends"])
def test_a_backend_is_an_address_or_a_mapping(load: Load, key: str) -> None:
    config = load(f"listen: 1\n{key}:\n- a:1\n- {{address: b:2, weight: 3, backup: true, max_connections: 4}}\n- /c\n")
    assert config.proxies[0].backends == (
        BackendConfig(Address("a", 1)),
        BackendConfig(Address("b", 2), 3, True, 4),
        BackendConfig(Address(path="/c")),
    )
    one = (BackendConfig(Address("a", 1), 2),)
    assert load(f"listen: 1\n{key}: {{address: a:1, weight: 2}}").proxies[0].backends == one
    assert load(f"listen: 1\n{key}:\n  address: a:1\n  max_connections: off").proxies[0].backends == backends("a:1")


def test_a_backend_may_have_its_own_rules_in_place_of_the_proxy_s(load: Load) -> None:
    (proxy,) = load(
        "listen: 1\nmax_fails: 3\nhealth: {interval: 1s}\nbackends:\n- a:1\n"
        "- {address: b:1, max_fails: off, fail_timeout: 1m}\n"
        "- {address: c:1, max_fails: 2, health: off}\n"
        "- {address: d:1, health: {port: 2}}\n"
    ).proxies
    assert [proxy.max_fails_of(backend) for backend in proxy.backends] == [3, inf, 2, 3]
    assert [proxy.fail_timeout_of(backend) for backend in proxy.backends] == [10, 60, 10, 10]
    checks = [proxy.health_of(backend) for backend in proxy.backends]
    assert checks == [HealthConfig(1.0), HealthConfig(1.0), None, HealthConfig(port=2)]


def test_a_unix_socket_has_no_port_to_check(load: Load, errors: Errors) -> None:
    (error,) = errors("listen: 1\nbackends: [a:1, /x]\nhealth: {port: 1}\n")
    assert error == f"FILE:3: health: {UNIX}"
    (error,) = errors("health: {port: 1}\nproxies: {p: {listen: 1, backend: /x}}\n")
    assert error == f"FILE:2: proxies.p.health: {UNIX}"
    load("listen: 1\nbackends: [a:1, {address: /x, health: {address: a:1}}]\nhealth: {port: 1}\n")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "backend: 127.0.0.1:2\nhealth: {port: 1}",
            "FILE:3: health: a check of backend 127.0.0.1:2 would ask this proxy: 127.0.0.1:1",
        ),
        (
            "backends:\n- {address: a:2, health: {address: localhost:1}}",
            "FILE:2: backends.health: a check of backend a:2 would ask this proxy: localhost:1",
        ),
    ],
)
def test_a_check_of_the_proxy_itself_is_an_error(errors: Errors, lines: str, message: str) -> None:
    (error,) = errors(f"listen: 1\n{lines}\n")
    assert error == f"{message} is this proxy's own listener 1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "balance: leastconn",
            (
                "balance: expected one of round-robin, least-connections, random, source, found 'leastconn'; "
                "did you mean least-connections?"
            ),
        ),
        ("resolve: all", "resolve: expected one of one, each, found 'all'"),
        ("resolve_interval: off", f"resolve_interval: {DURATION}, found 'off'"),
        ("resolve_interval: 0", f"resolve_interval: {DURATION}, found '0'"),
        ("retries: -1", "retries: expected a whole number from 0 to 1000, or all, found '-1'"),
        ("retries: off", "retries: expected a whole number from 0 to 1000, or all, found 'off'"),
        ("max_fails: 0", "max_fails: expected a whole number from 1 to 1000, or off, found '0'; did you mean off?"),
        ("max_fails: 1001", "max_fails: expected a whole number from 1 to 1000, or off, found '1001'"),
        ("fail_timeout: off", f"fail_timeout: {DURATION}, found 'off'"),
        ("queue_timeout: -1", "queue_timeout: expected a duration, as 500ms, 5s, 2m or 1h, or off, found '-1'"),
        ("on_down: kill", "on_down: expected one of keep, abort, found 'kill'"),
        ("send_proxy: true", "send_proxy: expected one of v1, v2, off, found 'true'"),
        ("accept_proxy_timeout: off", f"accept_proxy_timeout: {DURATION}, found 'off'"),
        ("accept_proxy: []", "accept_proxy: expected at least one network, or off, found an empty list"),
        ("allow: []", "allow: expected at least one network, or all, found an empty list"),
        ("allow: {a: b}", "allow: expected a network or a list of them, found a mapping"),
        ("deny: [10.0.0.0/8, [a]]", "deny: expected a network, found a list"),
        ("deny: [10.0.0.0/8, 10.0.0.0/8]", "deny: 10.0.0.0/8 is listed twice"),
        (
            "max_connections_per_client: 0",
            (
                "max_connections_per_client: expected a whole number from 1 to 1000000, or off, found '0'; "
                "did you mean off?"
            ),
        ),
        ("health: yes please", f"health: {HEALTH}, found 'yes please'"),
        ("health:", f"health: {HEALTH}, found ''"),
        ("health: []", "health: expected a mapping, on or off, found a list"),
        ("health: {intervall: 1s}", "health.intervall: unknown key, did you mean interval?"),
        (
            "health: {colour: red}",
            (
                "health.colour: unknown key, expected one of interval, timeout, rise, fall, port, address, http, host, "
                "status, send, expect"
            ),
        ),
        ("health: {rise: 1, rise: 2}", "health.rise: given a second time, first as rise in line 4"),
        ("health: {rise: 101}", "health.rise: expected a whole number from 1 to 100, found '101'"),
        ("health: {fall: 0}", "health.fall: expected a whole number from 1 to 100, found '0'"),
        ("health: {interval: off}", f"health.interval: {DURATION}, found 'off'"),
        ("health: {timeout: [1s]}", "health.timeout: expected one value, found a list"),
        ("health: {rise: {a: b}}", "health.rise: expected one value, found a mapping"),
        (
            "health: {http: health}",
            "health.http: expected a path that begins with /, without spaces, as /health, found 'health'",
        ),
        (
            'health: {http: "/a\\r\\nb"}',
            "health.http: expected a path that begins with /, without spaces, as /health, found '/a\\r\\nb'",
        ),
        ("health: {http: /, host: ''}", "health.host: expected a host, as www.example.org, found ''"),
        *(
            (
                f"health: {{http: /, status: {text}}}",
                f"health.status: expected statuses from 100 to 599, as 200 or 200-299, found {found!r}",
            )
            for text, found in [
                ("99", "99"),
                ("600", "600"),
                ("299-200", "299-200"),
                ("200-", "200-"),
                ("ok", "ok"),
                ("'200,'", ""),
                ("[200, 2xx]", "2xx"),
            ]
        ),
        ("health: {http: /, status: []}", "health.status: expected at least one status, found an empty list"),
        (
            "health: {send: ''}",
            r"""health.send: expected text or bytes, as "PING\r\n" or "\x00\xff" in double quotes, found ''""",
        ),
        (
            "health: {expect: ✓}",
            r"""health.expect: expected text or bytes, as "PING\r\n" or "\x00\xff" in double quotes, found '✓'""",
        ),
        ("health: {http: /, send: a}", "health.send: cannot stand beside http"),
        ("health: {expect: a, http: /}", "health.expect: cannot stand beside http"),
        ("health: {host: a}", "health.host: needs http beside it"),
        ("health: {status: 200, send: a}", "health.status: needs http beside it"),
        ("health: {port: 0}", "health.port: expected a whole number from 1 to 65535, found '0'"),
        ("health: {address: a:1, port: 1}", "health.port: cannot stand beside address a:1, which has a port"),
        ("health: {address: /x, port: 1}", "health.port: cannot stand beside address /x, a unix socket has no port"),
        ("health: {address: off}", f"health.address: {TARGET}, found 'off'"),
        ("health: {address: ''}", f"health.address: {TARGET}, found ''"),
        ("health: {address: 8008}", f"health.address: {TARGET}, found '8008'; a port alone is port: 8008"),
        ("log_start: info", "log_start: expected true or false, found 'info'"),
        (
            "control: control.sock",
            "control: expected the path of a unix socket, as /run/rspd/control.sock, or off, found 'control.sock'",
        ),
        ("control_mode: 660x", "control_mode: expected a mode from 0600 to 0677, as 0660 or 0666, found '660x'"),
        ("control_mode: 0444", "control_mode: expected a mode from 0600 to 0677, as 0660 or 0666, found '0444'"),
        ("control_group: 0", "control_group: expected a group's name, found '0'"),
        ("metrics: on", "metrics: expected HOST:PORT, as 127.0.0.1:9114, or /PATH, or off, found 'on'"),
        ("metrics: fd://a", "metrics: expected HOST:PORT, as 127.0.0.1:9114, or /PATH, or off, found 'fd://a'"),
        ("metrics: '@a'", "metrics: expected HOST:PORT, as 127.0.0.1:9114, or /PATH, or off, found '@a'"),
        ("metrics: a:0", "metrics: expected HOST:PORT, as 127.0.0.1:9114, or /PATH, or off, found 'a:0'"),
        ("proxy: v1", "proxy: unknown key, did you mean proxies?"),
        ("max: 3", "max: unknown key, expected listen, backend, max_connections, or another one of rspd.yaml(5)"),
        (
            "health: {colour:x}",
            (
                "health.colour:x: unknown key, expected one of interval, timeout, rise, fall, port, address, http, "
                "host, status, send, expect"
            ),
        ),
        ("log: debug", "log: unknown key, did you mean log_start or log_level?"),
        (
            "daemon: yes",
            "daemon: unknown key, expected listen, backend, max_connections, or another one of rspd.yaml(5)",
        ),
        ("health: {http:/}", "health.http:/: unknown key, a space belongs after the colon"),
        ("send_proxi: v1", "send_proxi: unknown key, did you mean send_proxy?"),
        ("weight: 2", None),
    ],
)
def test_each_error_names_line_and_key_what_is_expected_and_what_was_found(
    errors: Errors, line: str, message: str | None
) -> None:
    (error,) = errors(f"{MINIMAL}\n{line}\n")
    if message is None:
        assert error.startswith("FILE:4: weight: unknown key, ")
    else:
        assert error == f"FILE:4: {message}"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{weight: 2}", f"FILE:2: backend.address: missing, {DIAL}"),
        ("{}", f"FILE:2: backend.address: missing, {DIAL}"),
        ("{address: 80}", f"FILE:2: backend.address: {DIAL}, found '80'; port 80 of this host is 127.0.0.1:80"),
        ("{address: [a:1]}", "FILE:2: backend.address: expected one value, found a list"),
        (
            "{address: a:1, weight: 0}",
            "FILE:2: backend.weight: expected a whole number from 1 to 1000, found '0'",
        ),
        ("{address: a:1, wieght: 2}", "FILE:2: backend.wieght: unknown key, did you mean weight?"),
        (
            "{address: a:1, name: x}",
            (
                "FILE:2: backend.name: unknown key, expected one of address, weight, backup, max_connections, "
                "max_fails, fail_timeout, health"
            ),
        ),
        ("{address: a:1, health: {prot: 1}}", "FILE:2: backend.health.prot: unknown key, did you mean port?"),
        ("{address: a:1, health: 5s}", f"FILE:2: backend.health: {HEALTH}, found '5s'"),
        ("{address: a:1, fail_timeout: off}", f"FILE:2: backend.fail_timeout: {DURATION}, found 'off'"),
        (
            "{address: /x, health: {port: 1}}",
            "FILE:2: backend.health: /x is a unix socket, which has no port; write address: HOST:PORT, or health: on",
        ),
        (
            "{address: /x, health: {address: a}}",
            "FILE:2: backend.health: /x is a unix socket, which has no port; write address: HOST:PORT, or health: on",
        ),
        (
            "\n- a:1\n- address: b:1\n  max_connections: many",
            "FILE:5: backend.max_connections: expected a whole number from 1 to 1000000, or off, found 'many'",
        ),
        ("\n- a:1\n- {address: b:1, weight: 2, weight: 2}", "FILE:4: backend.weight: given a second time, first as "),
        ("\n- a:1\n- [b:1]", "FILE:4: backend: expected an address or a mapping, found a list"),
        ("[]", "FILE:2: backend: expected at least one backend, found an empty list"),
        ("\n- a:1\n- {address: a:1, weight: 2}", "FILE:4: backend: a:1 is listed twice"),
        ("{address: a:1, backup: true}", "FILE:2: backend: expected one that is no backup, found none"),
        (
            "\n- {address: a:1, backup: true}\n- {address: b:1, backup: yes}",
            "FILE:2: backend: expected one that is no backup, found none",
        ),
        ("{address: localhost:1, weight: 2}", "FILE:2: backend localhost:1 is this proxy's own listener 1"),
    ],
)
def test_what_is_wrong_with_a_backend_is_told_with_its_own_line(errors: Errors, value: str, message: str) -> None:
    (error,) = errors(f"listen: 1\nbackend: {value}\n")
    assert error.startswith(message)
    assert error == message or message.endswith(" ")


@pytest.mark.parametrize(
    "key", ["resolve_interval", "fail_timeout", "accept_proxy_timeout", "health.interval", "health.timeout"]
)
def test_what_is_done_again_and_again_is_not_done_more_often_than_each_10ms(
    load: Load, errors: Errors, key: str
) -> None:
    def line(text: str) -> str:
        outer, _, inner = key.partition(".")
        return f"{MINIMAL}{outer}: " + (f"{{{inner}: {text}}}" if inner else text)

    for text in ("9ms", "0.009999", "0.1ms", "0.000001h"):
        assert errors(line(text)) == [f"FILE:3: {key}: expected at least 10ms, found {text!r}"]
    (proxy,) = load(line("10ms")).proxies
    assert 0.01 in (*proxy, *(proxy.health or ()))


def test_how_long_something_lasts_may_be_shorter(load: Load) -> None:
    proxy = load(f"{MINIMAL}queue_timeout: 1ms\nconnect_timeout: 1ms\nidle_timeout: 1ms\n").proxies[0]
    assert (proxy.queue_timeout, proxy.connect_timeout, proxy.idle_timeout) == (0.001, 0.001, 0.001)


def test_no_list_means_everybody_only_where_a_word_says_so(load: Load) -> None:
    proxy = load(f"{MINIMAL}allow: all\ndeny: off\naccept_proxy: off\n").proxies[0]
    assert (proxy.allow, proxy.deny, proxy.accept_proxy) == ((), (), ())


# Several proxies


def test_several_proxies_stand_under_their_names(load: Load) -> None:
    assert load(TWO) == Config(
        (
            ProxyConfig((Address(port=80),), backends("10.0.0.1:80", "10.0.0.2:80"), "web"),
            ProxyConfig((Address(port=25),), backends("10.0.0.3:25"), "mail"),
        )
    )
    assert load(TWO).proxies[0].name == "web"


def test_one_proxy_may_have_a_name(load: Load) -> None:
    config = load("proxies: {a: {listen: 80, backend: a:1}}")
    assert config == Config((ProxyConfig((Address(port=80),), backends("a:1"), "a"),))


@pytest.mark.parametrize("above", [True, False])
def test_what_stands_at_the_top_is_for_all_proxies_that_do_not_say_otherwise(load: Load, above: bool) -> None:
    common = "idle_timeout: 7s\nhealth: {http: /up}\ndeny: 10.0.0.0/8\n"
    common += "log_level: debug\nexit_idle_time: 9s\nhandover: off\n"
    own = TWO + "    idle_timeout: 8s\n    health: off\n    deny: off\n"
    config = load(common + own if above else own + common)
    web, mail = config.proxies
    assert (web.idle_timeout, web.health, web.deny) == (7.0, HealthConfig(http="/up"), (parse_network("10.0.0.0/8"),))
    assert (mail.idle_timeout, mail.health, mail.deny) == (8.0, None, ())
    assert (config.log_level, config.exit_idle_time, config.handover) == ("debug", 9.0, False)


def test_a_mapping_of_a_proxy_takes_the_place_of_the_whole_one_at_the_top(load: Load) -> None:
    config = load("health: {http: /up, interval: 9s}\n" + TWO + "    health: {expect: '220'}\n")
    assert [proxy.health for proxy in config.proxies] == [
        HealthConfig(interval=9.0, http="/up"),
        HealthConfig(expect=b"220"),
    ]


def test_an_anchor_saves_writing_a_mapping_twice(load: Load) -> None:
    config = load(
        "proxies:\n  a: {listen: 1, backend: a:1, health: &h {rise: 5}}\n  b: {listen: 2, backend: a:1, health: *h}"
    )
    assert [proxy.health for proxy in config.proxies] == [HealthConfig(rise=5)] * 2


def test_a_limit_on_the_command_line_is_for_all_proxies(load: Load) -> None:
    config = load("max_connections: 2\n" + TWO + "    max_connections: 3", max_connections=9, log_level="error")
    assert [proxy.max_connections for proxy in config.proxies] == [9, 9]
    assert config.log_level == "error"


@pytest.mark.parametrize("options", [{"listen": (Address(port=1),)}, {"backends": backends("a:1")}])
def test_an_address_on_the_command_line_does_not_go_with_proxies_in_the_file(
    errors: Errors, options: dict[str, Any]
) -> None:
    what = "each has its addresses here; leave out those on the command line, or change the file"
    assert errors("log_level: debug\n" + TWO, **options) == [f"FILE:2: proxies: {what}"]


def test_where_systemd_passes_sockets_a_proxy_need_not_listen(load: Load) -> None:
    config = load("proxies:\n  a: {listen: fd://a, backend: a:1}\n  b: {backend: b:1}", sockets=True)
    assert [proxy.listen for proxy in config.proxies] == [(Address(passed="a"),), ()]


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (
            "proxies:\n  web: {}\n  mail:\n    backend: a:1\n",
            [
                "FILE:2: proxies.web.listen: missing, expected an address to listen on",
                "FILE:2: proxies.web.backend: missing, expected an address to relay to",
                "FILE:3: proxies.mail.listen: missing, expected an address to listen on",
            ],
        ),
        (
            "listen: 80\nbackends: [a:1]\nproxies:\n  web: {listen: 81, backend: a:1}\n",
            [
                "FILE:1: listen: belongs to one proxy, move it into each below proxies",
                "FILE:2: backends: belongs to one proxy, move it into each below proxies",
            ],
        ),
        (
            "proxies:\n  web:\n    listen: 80\n    backend: a:1\n    log_level: debug\n    exit_idle_time: 5s\n",
            [
                "FILE:5: proxies.web.log_level: belongs to the top of the file, it is for all proxies",
                "FILE:6: proxies.web.exit_idle_time: belongs to the top of the file, it is for all proxies",
            ],
        ),
        (
            (
                "proxies:\n  web:\n    listen: 80\n    backends:\n    - address: a:1\n      weihgt: 2\n"
                "    health:\n      risen: 2\n"
            ),
            [
                "FILE:6: proxies.web.backends.weihgt: unknown key, did you mean weight?",
                "FILE:8: proxies.web.health.risen: unknown key, did you mean rise?",
            ],
        ),
        (
            "proxies:\n  web:\n  listen: 80\n",
            [
                "FILE:2: proxies.web: expected the keys of a proxy, found ''; its keys are indented below its name",
                "FILE:3: proxies.listen: expected the keys of a proxy, found '80'",
            ],
        ),
        (
            "listen: 80\nbackend: a:1\nhealth:\ninterval: 5s\n",
            [
                "FILE:3: health: expected a mapping, as {http: /health}, or on or off, found ''",
                "FILE:4: interval: unknown key, it belongs to health in line 3: indent it",
            ],
        ),
        ("proxies:\n", ["FILE:1: proxies: expected names, each with the keys of a proxy, found ''"]),
        (
            "proxies:\nweb:\n  listen: 80\n",
            [
                "FILE:1: proxies: expected names, each with the keys of a proxy, found ''",
                "FILE:2: web: unknown key, it belongs to proxies in line 1: indent it",
            ],
        ),
        (
            "proxies:\n- web: {listen: 80}\n",
            [
                "FILE:2: proxies: expected names, each with the keys of a proxy, found a list; leave out the dashes",
            ],
        ),
        (
            "listen: 80\nbackend: a:1\nhealth: on\ninterval: 5s\n",
            ["FILE:4: interval: unknown key, did you mean resolve_interval?"],
        ),
        ("listen: 80\nbackedn: a:1\n", ["FILE:2: backedn: unknown key, did you mean backend?"]),
        (
            "Listen: 80\nbackens: a:1\nbacklog: 0\n",
            [
                "FILE:1: Listen: unknown key, did you mean listen?",
                "FILE:2: backens: unknown key, did you mean backends?",
                "FILE:3: backlog: expected a whole number from 1 to 2147483647, found '0'",
            ],
        ),
        ("proxies: {}\n", ["FILE:1: proxies: expected names, each with the keys of a proxy, found none"]),
        ("proxies: [a]\n", ["FILE:1: proxies: expected names, each with the keys of a proxy, found a list"]),
        ("proxies: {web: 80}\n", ["FILE:1: proxies.web: expected the keys of a proxy, found '80'"]),
        (
            "proxies: {web: }\n",
            ["FILE:1: proxies.web: expected the keys of a proxy, found ''; its keys are indented below its name"],
        ),
        ("proxies: {web: [80]}\n", ["FILE:1: proxies.web: expected the keys of a proxy, found a list"]),
        (
            TWO.replace("mail", "web"),
            ["FILE:5: proxies.web: given a second time, first in line 2"],
        ),
        (
            TWO + TWO,
            ["FILE:8: proxies: given a second time, first as proxies in line 1"],
        ),
        *(
            (
                TWO.replace("mail", name),
                [f"FILE:5: proxies: expected a name of up to 64 letters, digits, _, . and -, found {found!r}"],
            )
            for name, found in [("my mail", "my mail"), ("é", "é"), ("''", "''"), ("a" * 65, "a" * 65), ("a/b", "a/b")]
        ),
        (
            "proxies: {web: {listen: 80, backend: a:1, proxies: {}}}",
            [
                (
                    "FILE:1: proxies.web.proxies: unknown key, expected listen, backend, max_connections, "
                    "or another one of rspd.yaml(5)"
                )
            ],
        ),
        (
            "proxies:\n  web:\n    listen: 80\n    backend: {address: a:1, backup: true}\n",
            ["FILE:4: proxies.web.backend: expected one that is no backup, found none"],
        ),
        (
            "proxies:\n  web: {listen: 80, backend: localhost:80}\n",
            ["FILE:2: proxies.web: backend localhost:80 is this proxy's own listener 80"],
        ),
        (
            "proxies:\n  web: {listen: [80, 127.0.0.1:80], backend: a:80}\n",
            ["FILE:2: proxies.web: listen 80 covers 127.0.0.1:80 too, which cannot be bound twice"],
        ),
    ],
)
def test_what_is_wrong_with_proxies_is_told_with_the_way_to_it(
    errors: Errors, content: str, messages: list[str]
) -> None:
    found = errors(content)
    assert found == messages


def test_all_errors_are_told_at_once_in_the_files_order(errors: Errors) -> None:
    content = """\
proxies:
  web:
    listen: 70000
    backends: [{weight: 0}, {address: a}]
    colour: red
  bad name: {}
  mail:
    health: {rise: x, http: y}
    backend: a:1
idle_timeout: x
listen: 80
"""
    found = errors(content, backends=backends("a:1"))
    assert [": ".join(error.split(": ")[:2]) for error in found] == [
        "FILE:1: proxies",
        "FILE:3: proxies.web.listen",
        "FILE:4: proxies.web.backends.weight",
        "FILE:4: proxies.web.backends.address",
        "FILE:4: proxies.web.backends.address",
        "FILE:5: proxies.web.colour",
        "FILE:6: proxies",
        "FILE:7: proxies.mail.listen",
        "FILE:8: proxies.mail.health.rise",
        "FILE:8: proxies.mail.health.http",
        "FILE:10: idle_timeout",
        "FILE:11: listen",
    ]


@pytest.mark.usefixtures("service_names")
@pytest.mark.parametrize(
    ("first", "second", "taken", "address"),
    [
        ("80", "80", "80", "80"),
        ("80", "http", "80", "80"),
        ("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"),
        ("80", "127.0.0.1:80", "80", "127.0.0.1:80"),
        ("'[::1]:80'", "80", "[::1]:80", "80"),
        ("0.0.0.0:80", "[81, 192.0.2.1:80]", "0.0.0.0:80", "192.0.2.1:80"),
        ("'[::]:80'", "'[2001:db8::1]:80'", "[::]:80", "[2001:db8::1]:80"),
        ("localhost:80", "0.0.0.0:80", "localhost:80", "0.0.0.0:80"),
        ("/run/a", "[80, /run/a]", "/run/a", "/run/a"),
        ("'@a'", "'@a'", "@a", "@a"),
        ("fd://a", "[80, fd://a]", "fd://a", "fd://a"),
    ],
)
def test_two_proxies_cannot_listen_on_the_same(
    errors: Errors, first: str, second: str, taken: str, address: str
) -> None:
    content = f"proxies:\n  a:\n    listen: {first}\n    backend: a:1\n  b:\n    listen: {second}\n    backend: b:1\n"
    what = f"{address} cannot be bound twice, a listens on {taken}"
    assert errors(content) == [f"FILE:6: proxies.b.listen: {what}"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("listen: 81\nmetrics: 127.0.0.1:81", "metrics: 127.0.0.1:81 cannot be bound twice, listen has it"),
        ("listen: [80, /run/a]\ncontrol: /run/a", "control: /run/a cannot be bound twice, listen has it"),
        ("control: /run/a\nmetrics: /run/a\nlisten: 80", "metrics: /run/a cannot be bound twice, control has it"),
    ],
)
def test_who_looks_is_not_answered_where_something_else_listens(errors: Errors, text: str, error: str) -> None:
    assert errors(f"backend: a:1\n{text}\n") == [f"FILE:3: {error}"]


def test_who_looks_is_not_answered_where_one_of_several_proxies_listens(errors: Errors) -> None:
    proxies = "proxies: {a: {listen: 80, backend: a:1}, b: {listen: '[::1]:81', backend: a:1}}"
    assert errors(f"metrics: 81\n{proxies}\n") == ["FILE:1: metrics: 81 cannot be bound twice, b has it"]


def test_each_address_that_is_taken_is_one_error_though_several_proxies_have_it(errors: Errors) -> None:
    listen = {"a": "[127.0.0.1:80, 127.0.0.2:80]", "b": "[127.0.0.3:80, 81]", "c": "[80, 81, 82]", "d": "82"}
    content = "".join(f"\n  {name}: {{listen: {where}, backend: a:1}}" for name, where in listen.items())
    assert errors(f"proxies:{content}\n") == [
        "FILE:4: proxies.c.listen: 80 cannot be bound twice, a listens on 127.0.0.1:80",
        "FILE:4: proxies.c.listen: 81 cannot be bound twice, b listens on 81",
        "FILE:5: proxies.d.listen: 82 cannot be bound twice, c listens on 82",
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("80", "81"),
        ("127.0.0.1:80", "127.0.0.2:80"),
        ("0.0.0.0:80", "'[::]:80'"),
        ("0.0.0.0:80", "'[::1]:80'"),
        ("'[::]:80'", "127.0.0.1:80"),
        ("127.0.0.1:0", "'[::1]:0'"),
        ("/run/a", "/run/b"),
        ("80", "/80"),
        ("fd://a", "fd://b"),
    ],
)
def test_two_proxies_listen_side_by_side(load: Load, first: str, second: str) -> None:
    config = load(f"proxies: {{a: {{listen: {first}, backend: a:1}}, b: {{listen: {second}, backend: a:1}}}}")
    assert [proxy.name for proxy in config.proxies] == ["a", "b"]


def cpu_time(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def test_what_stands_in_many_places_by_an_alias_is_read_once(load: Load) -> None:
    text = aliased("10.0.0.0:80")
    # Two hundred times as long, if each place were read.
    assert cpu_time(lambda: load(text)) < 10 * cpu_time(lambda: load(aliased("10.0.0.0:80", proxies=1)))
    config = load(text)
    assert [len(proxy.backends) for proxy in config.proxies] == [3000] * 200
    assert len({proxy.backends for proxy in config.proxies}) == 1


def test_what_is_wrong_in_many_places_by_an_alias_is_told_in_full_once(errors: Errors) -> None:
    assert cpu_time(lambda: errors(aliased("/"))) < 10 * cpu_time(lambda: errors(aliased("/", proxies=1)))
    first, *others = errors(aliased("/"))
    assert first == f"FILE:2: proxies.p0.backends: {DIAL}, found '/'"
    wrong = "wrong, as it is in proxies.p0.backends, by an alias"
    assert others == [f"FILE:{2 + number}: proxies.p{number}.backends: {wrong}" for number in range(1, 200)]


@given(
    st.lists(
        st.sampled_from(["80", "127.0.0.1:80", "[::1]:80", "0.0.0.0:80", "[::]:80", "localhost:80"]),
        min_size=2,
        max_size=2,
    )
)
def test_a_wildcard_covers_and_is_never_covered_by_one_address(texts: list[str]) -> None:
    first, second = map(parse_address, texts)
    if covers(first, second) and covers(second, first):
        assert first == second
    if not first.host:
        assert covers(first, second)


# Whatever a file holds

WORDS = """80 a:1 off on 5s 0 1000 /x v1 200-299 10.0.0.0/8 unix all each abort"""
SCALARS = st.sampled_from(WORDS.split()) | st.text(max_size=3)
NAMES = sorted({*PROXY_KEYS, *GENERAL_KEYS, *BACKEND_KEYS, *HEALTH_KEYS, "proxies", "backend", "web"})
TREES: st.SearchStrategy[object] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(NAMES), TREES, max_size=6), st.booleans())
@settings(max_examples=150)
def test_whatever_nests_it_is_a_configuration_or_gets_lines_that_name_it(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object], sockets: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "nested.yaml"
    file.write_text(json.dumps(tree))
    try:
        config = load_config(str(file), {}, sockets=sockets)
    except ConfigError as error:
        assert error.errors  # noqa: PT017
        for line in error.errors:
            assert re.match(rf"{file}(:1)?: \S", line)
            assert line.isprintable()
    else:
        assert config.proxies
        for proxy in config.proxies:
            assert proxy.backends or proxy.routes
            assert proxy.listen or sockets


@pytest.mark.parametrize("content", ["proxies: &a {web: *a}", "proxies: {web: &a {health: *a}}", "backend: &a [*a]"])
def test_what_contains_itself_is_told_and_not_followed(errors: Errors, content: str) -> None:
    assert errors(content)
