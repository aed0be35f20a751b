"""The configuration: what a file and the command line make, and what is said of a broken one."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rspd.config.addresses import parse_backend
from rspd.config.keys import load_config
from rspd.config.values import one_of, parse_duration, whole_number
from rspd.errors import ConfigError
from rspd.log import LEVELS
from rspd.net.address import Address
from rspd.settings import DEFAULT_FILE, BackendConfig, Config, ProxyConfig

MINIMAL = "listen: 8080\nbackend: 127.0.0.1:8000\n"
ADDRESS = "expected PORT, HOST:PORT, [IPV6]:PORT, /PATH, @NAME or fd://NAME"
DIAL = "expected HOST:PORT, [IPV6]:PORT, /PATH or @NAME"
NUMBER = "expected a whole number from 1 to"
BALANCE = "expected one of round-robin, least-connections, random, source"
DURATION = "expected a duration above 0, as 500ms, 5s, 2m or 1h, or off"
KEYS = "listen, backend, max_connections, or another one of rspd.yaml(5)"


def relayed_to(*addresses: Address) -> tuple[BackendConfig, ...]:
    return tuple(map(BackendConfig, addresses))


Load = Callable[..., Config]
Errors = Callable[..., list[str]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a configuration file with this content."""

    def load(content: str | bytes, **options: object) -> Config:
        file = tmp_path / "rspd.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_config(str(file), options)

    return load


@pytest.fixture
def errors(tmp_path: Path, load: Load) -> Errors:
    """What is wrong with a file of this content, FILE in place of its path."""

    def errors(content: str | bytes, **options: object) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(content, **options)
        assert str(caught.value) == "\n".join(caught.value.errors)
        return [error.replace(str(tmp_path / "rspd.yaml"), "FILE") for error in caught.value.errors]

    return errors


def test_two_lines_are_a_configuration_and_the_rest_is_defaults(load: Load) -> None:
    config = load(MINIMAL)
    assert config == Config(
        (
            ProxyConfig(
                listen=(Address(port=8080),),
                backends=relayed_to(Address("127.0.0.1", 8000)),
                max_connections=1,
                backlog=4096,
                reuse_port=False,
                connect_timeout=5.0,
                idle_timeout=60.0,
                half_close_timeout=30.0,
                drain_timeout=30.0,
            ),
        ),
        log_level="info",
        exit_idle_time=inf,
    )


def test_every_key_can_be_set(load: Load) -> None:
    config = load(
        "listen: [8080, '[::1]:8081', /run/rspd.sock, '@rspd']\n"
        "backends:\n- a:1\n- '[::1]:2'\n- /run/b\n- '@c'\n"
        "max_connections: 100\nbacklog: 500\nreuse_port: true\nconnect_timeout: 500ms\nidle_timeout: off\n"
        "half_close_timeout: 2m\n"
        "drain_timeout: 1.5h\nlog_level: debug\nexit_idle_time: 5m\nhandover: off\n"
    )
    assert config == Config(
        (
            ProxyConfig(
                listen=(
                    Address(port=8080),
                    Address("::1", 8081),
                    Address(path="/run/rspd.sock"),
                    Address(path="@rspd"),
                ),
                backends=relayed_to(Address("a", 1), Address("::1", 2), Address(path="/run/b"), Address(path="@c")),
                max_connections=100,
                backlog=500,
                reuse_port=True,
                connect_timeout=0.5,
                idle_timeout=inf,
                half_close_timeout=120.0,
                drain_timeout=5400.0,
            ),
        ),
        log_level="debug",
        exit_idle_time=300.0,
        handover=False,
    )


def test_a_configuration_cannot_be_changed(load: Load) -> None:
    config = load(MINIMAL)
    with pytest.raises(AttributeError):
        config.log_level = "debug"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        config.proxies[0].backlog = 1  # type: ignore[misc]


@pytest.mark.parametrize("key", ["backend", "backends"])
def test_one_backend_or_several_go_under_either_spelling(load: Load, key: str) -> None:
    assert load(f"listen: 1\n{key}: a:1").proxies[0].backends == relayed_to(Address("a", 1))
    assert load(f"listen: 1\n{key}: [b:2, a:1]").proxies[0].backends == relayed_to(Address("b", 2), Address("a", 1))


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        ("idle_timeout: off", inf),
        ("idle_timeout: Off", inf),
        ("idle_timeout: 'off'", inf),
        ("idle_timeout: no", inf),
        ("idle_timeout: false", inf),
        ("idle_timeout: 010", 10.0),
        ("idle_timeout: 1.5", 1.5),
        ("idle_timeout: !!str 5s", 5.0),
        ("idle_timeout: 5s # comment", 5.0),
        ("idle_timeout: >-\n  5s", 5.0),
    ],
)
def test_yamls_own_ideas_of_a_duration_do_not_get_in_the_way(load: Load, line: str, seconds: float) -> None:
    assert load(MINIMAL + line).proxies[0].idle_timeout == seconds


@pytest.mark.parametrize("address", ["1_0:80", "1e3:80", "0x1f:80", "on:80", "null:80"])
def test_a_host_that_yaml_takes_for_something_else_stays_a_host(load: Load, address: str) -> None:
    host, _, port = address.rpartition(":")
    assert load(f"listen: 1\nbackend: {address}").proxies[0].backends == relayed_to(Address(host, int(port)))


@pytest.mark.parametrize(
    "content",
    [
        MINIMAL.replace("\n", "\r\n").encode(),
        MINIMAL.encode("utf-8-sig"),
        MINIMAL.encode("utf-16"),
        b"---\n" + MINIMAL.encode() + b"...\n",
        b"%YAML 1.1\n---\n" + MINIMAL.encode(),
        b"{listen: 8080, backend: '127.0.0.1:8000'}",
        b'{"listen": 8080, "backend": "127.0.0.1:8000"}',
        b"listen: &port 8080\nbackend: 127.0.0.1:8000 # *port",
        b"backend: &b 127.0.0.1:8000\nlisten: [8080]",
    ],
)
def test_the_same_in_other_ways_of_yaml_is_the_same(load: Load, content: bytes) -> None:
    assert load(content) == load(MINIMAL)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("True", True), ("yes", True), ("on", True), ("false", False), ("no", False), ("off", False)],
)
def test_a_switch_is_written_as_yaml_has_it(load: Load, text: str, value: bool) -> None:
    proxy = load(f"{MINIMAL}reuse_port: {text}\nhalf_close: {text}").proxies[0]
    assert proxy.reuse_port is value
    assert proxy.half_close is value


def test_an_alias_is_what_its_anchor_names(load: Load) -> None:
    config = load(MINIMAL + "idle_timeout: &t 7s\ndrain_timeout: *t")
    assert (config.proxies[0].idle_timeout, config.proxies[0].drain_timeout) == (7.0, 7.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_connections: 0", f"max_connections: {NUMBER} 1000000, found '0'"),
        ("max_connections: 1000001", f"max_connections: {NUMBER} 1000000, found '1000001'"),
        ("max_connections: -1", f"max_connections: {NUMBER} 1000000, found '-1'"),
        ("max_connections: 1.0", f"max_connections: {NUMBER} 1000000, found '1.0'"),
        ("max_connections: 1e3", f"max_connections: {NUMBER} 1000000, found '1e3'"),
        ("max_connections: 1_000", f"max_connections: {NUMBER} 1000000, found '1_000'"),
        ("max_connections: 0x10", f"max_connections: {NUMBER} 1000000, found '0x10'"),
        ("max_connections: 10:00", f"max_connections: {NUMBER} 1000000, found '10:00'"),
        ("max_connections: many", f"max_connections: {NUMBER} 1000000, found 'many'"),
        ("max_connections: ٣", f"max_connections: {NUMBER} 1000000, found '٣'"),
        ("max_connections: " + "9" * 30, f"max_connections: {NUMBER} 1000000, found '{'9' * 30}'"),
        ("max_connections:", f"max_connections: {NUMBER} 1000000, found ''"),
        ("max_connections: ~", f"max_connections: {NUMBER} 1000000, found '~'"),
        ("max_connections: null", f"max_connections: {NUMBER} 1000000, found 'null'"),
        ("max_connections: [1]", "max_connections: expected one value, found a list"),
        ("max_connections: []", "max_connections: expected one value, found a list"),
        ("max_connections: {a: 1}", "max_connections: expected one value, found a mapping"),
        ("backlog: 0", f"backlog: {NUMBER} 2147483647, found '0'"),
        ("backlog: 2147483648", f"backlog: {NUMBER} 2147483647, found '2147483648'"),
        ("connect_timeout: 0", f"connect_timeout: {DURATION}, found '0'"),
        ("connect_timeout: 0ms", f"connect_timeout: {DURATION}, found '0ms'"),
        ("connect_timeout: -5s", f"connect_timeout: {DURATION}, found '-5s'"),
        ("idle_timeout: 5 s", f"idle_timeout: {DURATION}, found '5 s'"),
        ("idle_timeout: 1:30", f"idle_timeout: {DURATION}, found '1:30'"),
        ("idle_timeout: 1h30m", f"idle_timeout: {DURATION}, found '1h30m'"),
        ("idle_timeout: 5d", f"idle_timeout: {DURATION}, found '5d'"),
        ("idle_timeout: on", f"idle_timeout: {DURATION}, found 'on'"),
        ("idle_timeout: never", f"idle_timeout: {DURATION}, found 'never'"),
        ("idle_timeout: .inf", f"idle_timeout: {DURATION}, found '.inf'"),
        ("idle_timeout: nan", f"idle_timeout: {DURATION}, found 'nan'"),
        ("idle_timeout: 1e3", f"idle_timeout: {DURATION}, found '1e3'"),
        ("idle_timeout: 5s, 6s", f"idle_timeout: {DURATION}, found '5s, 6s'"),
        ("half_close_timeout:", f"half_close_timeout: {DURATION}, found ''"),
        ("drain_timeout: [5s]", "drain_timeout: expected one value, found a list"),
        ("exit_idle_time: 0", f"exit_idle_time: {DURATION}, found '0'"),
        ("exit_idle_time: never", f"exit_idle_time: {DURATION}, found 'never'"),
        ("exit_idle_time: [1s]", "exit_idle_time: expected one value, found a list"),
        ("exit_idle_timeout: 1s", "exit_idle_timeout: unknown key, did you mean exit_idle_time?"),
        ("reuse_port: maybe", "reuse_port: expected true or false, found 'maybe'"),
        ("half_close: 5s", "half_close: expected on or off, found '5s'"),
        ("handover: 1", "handover: expected on or off, found '1'"),
        ("reuse_port: 1", "reuse_port: expected true or false, found '1'"),
        ("reuse_port:", "reuse_port: expected true or false, found ''"),
        ("reuse_port: [true]", "reuse_port: expected one value, found a list"),
        (
            "log_level: warn",
            "log_level: expected one of debug, info, warning, error, found 'warn'; did you mean warning?",
        ),
        ("log_level: INFO", "log_level: expected one of debug, info, warning, error, found 'INFO'; did you mean info?"),
        ("balance: roundrobin", f"balance: {BALANCE}, found 'roundrobin'; did you mean round-robin?"),
        ("balance: leastconn", f"balance: {BALANCE}, found 'leastconn'; did you mean least-connections?"),
        ("log_level: verbose", "log_level: expected one of debug, info, warning, error, found 'verbose'"),
        ("log_level: off", "log_level: expected one of debug, info, warning, error, found 'off'"),
        ("log_level: ''", "log_level: expected one of debug, info, warning, error, found ''"),
        ("max_conections: 3", "max_conections: unknown key, did you mean max_connections?"),
        ("Listen: 80", "Listen: unknown key, did you mean listen?"),
        ("timeout: 5s", "timeout: unknown key, did you mean idle_timeout?"),
        ("colour: red", f"colour: unknown key, expected {KEYS}"),
        ("<<: {backlog: 1}", f"<<: unknown key, expected {KEYS}"),
        ("1: 2", f"1: unknown key, expected {KEYS}"),
        ("listen: 81", "listen: given a second time, first as listen in line 1; several values are one list"),
        ("'listen': 81", "listen: given a second time, first as listen in line 1; several values are one list"),
        ("backend: a:1", "backend: given a second time, first as backend in line 2; several values are one list"),
        ("backends: [a:1]", "backends: given a second time, first as backend in line 2; several values are one list"),
    ],
)
def test_each_error_names_file_line_and_key_what_is_expected_and_what_was_found(
    errors: Errors, line: str, message: str
) -> None:
    assert errors(f"{MINIMAL}\n{line}\n") == [f"FILE:4: {message}"]


@pytest.mark.usefixtures("service_names")
@pytest.mark.parametrize(
    ("value", "line", "message"),
    [
        ("", 2, f"{ADDRESS}, found ''"),
        (
            "off",
            2,
            f"{ADDRESS} (services(5) has no 'off'), found 'off'",
        ),
        (
            "true",
            2,
            f"{ADDRESS} (services(5) has no 'true'), found 'true'",
        ),
        ("~", 2, f"{ADDRESS}, found '~'"),
        ("80.0", 2, f"{ADDRESS}, found '80.0'"),
        ("80,81", 2, "expected an address or a list, found '80,81'; a list is [80, 81]"),
        ("80 81", 2, "expected an address or a list, found '80 81'; a list is [80, 81]"),
        ("a:1 [::1]:80", 2, "expected an address or a list, found 'a:1 [::1]:80'; a list is [a:1, \"[::1]:80\"]"),
        ("\n  - a:1\n   - b:2", 3, "expected an address or a list, found 'a:1 - b:2'; a list is [a:1, b:2]"),
        ("\n  -a:1\n  -b:2", 3, "expected an address or a list, found '-a:1 -b:2'; a list is [a:1, b:2]"),
        ("/run/a, /run/b", 2, "expected an address or a list, found '/run/a, /run/b'; a list is [/run/a, /run/b]"),
        ('"@a @b"', 2, 'expected an address or a list, found \'@a @b\'; a list is ["@a", "@b"]'),
        ("80, x y", 2, f"{ADDRESS}, found '80, x y'"),
        ("8080:80", 2, f"{ADDRESS}, found '8080:80'; 8080 is no host"),
        (":8090", 2, f"{ADDRESS}, found ':8090'; a port alone is every address: 8090"),
        ("'*:8090'", 2, f"{ADDRESS}, found '*:8090'; a port alone is every address: 8090"),
        ("70000", 2, "a port is at most 65535, found '70000'"),
        ("::1", 2, "expected brackets around an IPv6 address, as in [::1]:8080, found '::1'"),
        ("[]", 2, "expected at least one address, found an empty list"),
        ("{a: 1}", 2, "expected an address or a list of them, found a mapping"),
        ("\n  127.0.0.1: 80", 3, "expected an address or a list of them, found a mapping"),
        ("[80, 81, 80]", 2, "80 is listed twice"),
        ("\n- 80\n- http", 4, "80 is listed twice"),
        ("\n- 80\n- x:y:z", 4, f"{ADDRESS}, found 'x:y:z'"),
        ("127.0.0.1:80:90", 2, f"{ADDRESS}, found '127.0.0.1:80:90'"),
        ("2001:db8::1:80", 2, "expected brackets around an IPv6 address, as in [::1]:8080, found '2001:db8::1:80'"),
        ("127.0.0.1", 2, f"{ADDRESS}, found '127.0.0.1'; the port is missing, as in 127.0.0.1:80"),
        ("\n-\n- 80", 3, f"{ADDRESS}, found ''"),
        ("|\n  80\n", 2, f"{ADDRESS}, found '80\\n'"),
    ],
)
def test_what_is_no_address_to_listen_on_is_named_with_its_own_line(
    errors: Errors, value: str, line: int, message: str
) -> None:
    found = errors(f"backend: a:1\nlisten: {value}")
    assert [error for error in found if re.match(rf"FILE:({line}|2): listen: ", error)] == found
    assert [error.partition("listen: ")[2] for error in found] == [message]


@pytest.mark.parametrize(
    ("value", "line", "found"),
    [
        ("\n- 80\n- 127.0.0.1: 80\n", 4, "a mapping"),
        ("\n- 80\n- [81]\n", 4, "a list"),
        ("[80, [81]]", 2, "a list"),
        ("&a [*a]", 2, "a list"),
    ],
)
def test_an_item_of_a_list_that_is_no_address_is_what_the_message_is_about(
    errors: Errors, value: str, line: int, found: str
) -> None:
    (error,) = errors(f"backend: a:1\nlisten: {value}")
    assert error.startswith(f"FILE:{line}: listen: expected ")
    assert error.endswith(f"found {found}")
    assert "or a list of them" not in error


@pytest.mark.usefixtures("service_names")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("8080", f"{DIAL}, found '8080'; port 8080 of this host is 127.0.0.1:8080"),
        (":8080", f"{DIAL}, found ':8080'; port 8080 of this host is 127.0.0.1:8080"),
        ("0", f"{DIAL}, found '0'"),
        ("8080:80", f"{DIAL}, found '8080:80'; 8080 is no host"),
        ("a:1 b:2", "expected a backend or a list, found 'a:1 b:2'; a list is [a:1, b:2]"),
        ("[c:3, 'a:1, b:2']", "expected a backend or a list, found 'a:1, b:2'; a list is [a:1, b:2]"),
        ("http://a:80", f"{DIAL}, found 'http://a:80'; write a:80 without http://"),
        ("http://10.0.0.1:80/x", f"{DIAL}, found 'http://10.0.0.1:80/x'; write 10.0.0.1:80 without http:// and path"),
        ("http://a.example/", f"{DIAL}, found 'http://a.example/'; write a.example:80 without http:// and path"),
        ("https://a.example", f"{DIAL}, found 'https://a.example'; write a.example:443 without https://"),
        ("tcp://a:1", f"{DIAL}, found 'tcp://a:1'; write a:1 without tcp://"),
        ("unix:/run/a", f"{DIAL}, found 'unix:/run/a'; a unix socket is its path: /run/a"),
        ("unix:///run/a", f"{DIAL}, found 'unix:///run/a'; a unix socket is its path: /run/a"),
        ("http", f"{DIAL}, found 'http'; the port is missing, as in http:80"),
        ("a:0", f"{DIAL}, found 'a:0'"),
        ("fd://a", f"{DIAL}, found 'fd://a'"),
        ("a", f"{DIAL}, found 'a'; the port is missing, as in a:80"),
        ("a:b", f"{DIAL} (services(5) has no 'b'), found 'a:b'"),
        ("10.0.0.11", f"{DIAL}, found '10.0.0.11'; the port is missing, as in 10.0.0.11:80"),
        ("www.example.org", f"{DIAL}, found 'www.example.org'; the port is missing, as in www.example.org:80"),
        ("", f"{DIAL}, found ''"),
        ("[a:1, a:1]", "a:1 is listed twice"),
    ],
)
def test_what_cannot_be_dialled_is_no_backend(errors: Errors, value: str, message: str) -> None:
    assert errors(f"listen: 1\nbackend: {value}") == [f"FILE:2: backend: {message}"]


def test_all_errors_of_a_file_are_reported_at_once_in_its_order(errors: Errors) -> None:
    assert errors(
        "max_connections: 0\nbacklog: x\ncolour: red\nlisten:\n- 70000\n- 80\n- 80\n- off\n"
        "idle_timeout: on\nbacklog: 1\n"
    ) == [
        f"FILE:1: max_connections: {NUMBER} 1000000, found '0'",
        f"FILE:2: backlog: {NUMBER} 2147483647, found 'x'",
        f"FILE:3: colour: unknown key, expected {KEYS}",
        "FILE:5: listen: a port is at most 65535, found '70000'",
        "FILE:7: listen: 80 is listed twice",
        f"FILE:8: listen: {ADDRESS} (services(5) has no 'off'), found 'off'",
        f"FILE:9: idle_timeout: {DURATION}, found 'on'",
        "FILE:10: backlog: given a second time, first as backlog in line 2",
        "FILE: backend: missing, expected an address to relay to",
    ]


@pytest.mark.parametrize("content", ["", "# nothing\n", "\n\n", "{}", "---\n", "---\n# backlog: 1\n...\n"])
def test_an_empty_file_lacks_both_addresses(errors: Errors, content: str) -> None:
    assert errors(content) == [
        "FILE: listen: missing, expected an address to listen on",
        "FILE: backend: missing, expected an address to relay to",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("listen 8080", "FILE:1: expected lines of KEY: VALUE, found 'listen 8080'"),
        (
            "listen = 8080",
            "FILE:1: expected lines of KEY: VALUE, found 'listen = 8080'; a colon belongs in place of =",
        ),
        (
            "\n\nlisten:8080\n",
            "FILE:3: expected lines of KEY: VALUE, found 'listen:8080'; a space belongs after the colon",
        ),
        ("- listen: 8080", "FILE:1: expected lines of KEY: VALUE, found a list; leave out the dashes"),
        ("[listen, 8080]", "FILE:1: expected lines of KEY: VALUE, found a list"),
        ("[]", "FILE:1: expected lines of KEY: VALUE, found a list"),
        ("''", "FILE:1: expected lines of KEY: VALUE, found ''"),
        ("~", "FILE:1: expected lines of KEY: VALUE, found '~'"),
    ],
)
def test_a_file_of_another_kind_is_told_what_it_should_be(errors: Errors, content: str, message: str) -> None:
    assert errors(content) == [message]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("listen: [::1]:80", 1),
        ("backend: a:1\nlisten:\n  - [::1]:80\n", 3),
        ("listen: [a]:80\nbackend: a:1", 1),
        ("listen: @rspd", 1),
        ("backend: a:1\nlisten:\n- 80\n- @rspd\n", 4),
        ("listen: [80, @rspd]", 1),
        ("listen: 80\nbackend: a:1\nallow: [::/0]", 3),
        ("listen: 80\nbackend: a:1\nallow: [10.0.0.0/8, ::1]", 3),
        ("listen: [80, [::1]:80]", 1),
        ("listen: 80\nbackend: a:1\nallow:\n  [10.0.0.0/8, ::/0]", 4),
    ],
)
def test_an_address_that_yaml_takes_for_something_else_needs_quotes_and_is_told_so(
    errors: Errors, content: str, line: int
) -> None:
    (error,) = errors(content)
    assert error.startswith(f"FILE:{line}: not valid YAML: ")
    assert error.endswith("; an address that starts with [, @ or : needs quotes")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: b\nlisten: !<%ff> 80", "FILE:2: not valid YAML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(errors: Errors, content: str, message: str) -> None:
    (error,) = errors(content)
    assert error.startswith(message)
    assert "needs quotes" not in error


def test_a_second_document_is_called_so(errors: Errors) -> None:
    (error,) = errors(f"{MINIMAL}---\n{MINIMAL}")
    assert error.startswith("FILE:3: not valid YAML: expected a single document")


def test_an_anchor_defined_twice_is_called_so(errors: Errors) -> None:
    (error,) = errors("listen: &a 80\nbackend: &a b:1\n")
    assert error.startswith("FILE:2: not valid YAML: ")
    assert "duplicate anchor 'a'" in error


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"listen: 80\nbackend: caf\xe9:80\n", "utf-8"),
        (b"listen: 80\nbackend: a\x00b\n", "#x0000"),
        (b"listen: 80\nbackend: a\x1bb\n", "#x001b"),
    ],
)
def test_bytes_that_are_no_text_are_told_with_their_line(errors: Errors, content: bytes, what: str) -> None:
    (error,) = errors(content)
    assert error.startswith("FILE:2: not valid YAML: ")
    assert what in error.lower()


def test_half_a_character_is_told(errors: Errors) -> None:
    (error,) = errors(b"\xff\xfe\x00")
    assert re.match(r"FILE(:1)?: not valid YAML: ", error)


@pytest.mark.parametrize("opening", ["[", "{", "- ", "? "])
def test_endless_nesting_is_told_and_not_fallen_into(errors: Errors, opening: str) -> None:
    assert errors(opening * 1000) == ["FILE: not valid YAML: nested too deeply"]


@pytest.mark.parametrize(
    "content", ['listen: "\\U00110000"', 'listen: "\\UFFFFFFFF"', f"%YAML {'9' * 5000}.1\n---\na: b"]
)
def test_numbers_beyond_what_yaml_knows_are_told_and_not_fallen_over(errors: Errors, content: str) -> None:
    (error,) = errors(content)
    assert error.startswith("FILE")
    assert "not valid YAML: " in error


def test_an_alias_that_grows_without_bound_is_not_followed(errors: Errors) -> None:
    layers = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 40))
    assert len(errors(f"{MINIMAL}x0: &x0 [a]\n{layers}")) == 40


@pytest.mark.parametrize("key", ['""', '"a\\nb"', '"\\e[2J"', "? |\n  a\n  b\n"])
def test_a_strange_key_does_not_break_the_line_of_its_error(errors: Errors, key: str) -> None:
    (error,) = errors(f"{MINIMAL}{key}: 1\n")
    assert error.isprintable()
    assert re.match(r"FILE:3: \S+.*: unknown key, ", error)


@pytest.mark.parametrize("key", ["? [a, b]\n: ", "? {a: b}\n: "])
def test_a_key_that_is_no_word_is_unknown(errors: Errors, key: str) -> None:
    (error,) = errors(f"{MINIMAL}{key}1\n")
    assert re.match(r"FILE:3: \(?a (list|mapping)\)?: unknown key", error)
    assert "did you mean" not in error


WORDS = """listen backend backends backlog idle_timeout log_level [ ] { } ' " \\U \\x \\u | > ! !! @ % # ? -
    80 a:1 off ~ 5s 00110000 ffffffff é \ufeff"""
SPACED = [": ", ":", "\n", "\n- ", "\n  ", "- ", ", ", "&a ", "*a", "---\n", "...\n", "%YAML ", "\t", "\x85", "\u2028"]
FRAGMENTS = st.sampled_from(WORDS.split()) | st.sampled_from(SPACED)


@given(st.lists(FRAGMENTS, max_size=30).map("".join).map(str.encode) | st.binary(max_size=40))
@settings(max_examples=200)
def test_whatever_a_file_holds_it_is_a_configuration_or_gets_lines_that_name_it(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            config = load_config(file.name, {})
        except ConfigError as error:
            assert error.errors  # noqa: PT017
            for line in error.errors:
                assert line.startswith(f"{file.name}:")
                assert line.isprintable()
        else:
            assert config.proxies[0].listen
            assert config.proxies[0].backends


@pytest.mark.parametrize(
    ("name", "kind"),
    [("missing.yaml", FileNotFoundError), ("", IsADirectoryError), ("file/rspd.yaml", NotADirectoryError)],
)
def test_a_file_that_cannot_be_read_is_an_oserror(tmp_path: Path, name: str, kind: type[OSError]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(kind):
        load_config(str(tmp_path / name), {})


def test_without_pyyaml_the_error_says_what_to_install(errors: Errors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (error,) = errors("listen: !!str 8080\nbackend: 127.0.0.1:8000\n")
    assert re.fullmatch(r"FILE: PyYAML is needed to read it: .*yaml.*; install python3-yaml", error)


def test_the_command_line_wins_over_the_file(load: Load) -> None:
    content = "listen: 80\nbackend: a:1\nmax_connections: 5\nlog_level: error\nbacklog: 7"
    options = {"listen": (Address(port=81),), "backends": relayed_to(Address("b", 2)), "max_connections": 6}
    config = load(f"{content}\nexit_idle_time: 1s", **options, log_level="debug", exit_idle_time=2.0)
    proxy = ProxyConfig((Address(port=81),), relayed_to(Address("b", 2)), max_connections=6, backlog=7)
    assert config == Config((proxy,), "debug", 2.0)


def test_the_command_line_supplies_what_the_file_lacks(load: Load) -> None:
    assert load("backend: a:1", listen=(Address(port=81),)).proxies[0].listen == (Address(port=81),)
    assert load("listen: 80", backends=relayed_to(Address("b", 2))).proxies[0].backends == relayed_to(Address("b", 2))


def test_an_error_of_the_file_is_one_even_where_the_command_line_wins(errors: Errors) -> None:
    found = errors("backend: a:1\nlisten: 70000", listen=(Address(port=81),))
    assert found == ["FILE:2: listen: a port is at most 65535, found '70000'"]


def test_an_address_of_the_command_line_has_no_line_of_the_file(errors: Errors) -> None:
    found = errors("listen: 8080\nbackend: a:1", backends=relayed_to(Address("localhost", 8080)))
    assert found == ["FILE: backend localhost:8080 is this proxy's own listener 8080"]


def test_without_a_file_the_command_line_is_the_configuration() -> None:
    proxy = ProxyConfig(listen=(Address(port=80),), backends=relayed_to(Address("a", 1)))
    assert load_config(None, {"listen": proxy.listen, "backends": proxy.backends}) == Config((proxy,))


def test_what_the_command_line_lacks_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"listen": (Address(port=80),)})
    assert caught.value.errors == ["command line: backend: missing, expected an address to relay to"]


def test_where_systemd_passes_sockets_there_need_be_no_address_to_listen_on(tmp_path: Path) -> None:
    backends = relayed_to(Address("a", 1))
    assert load_config(None, {"backends": backends}, sockets=True).proxies[0] == ProxyConfig((), backends)
    file = tmp_path / "rspd.yaml"
    file.write_text("backend: a:1\n")
    assert load_config(str(file), {}, sockets=True).proxies[0] == ProxyConfig((), backends)


def test_where_systemd_passes_sockets_a_given_address_stays_and_a_backend_is_missed(tmp_path: Path) -> None:
    file = tmp_path / "rspd.yaml"
    file.write_text("listen: 80\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), {}, sockets=True)
    assert caught.value.errors == [f"{file}: backend: missing, expected an address to relay to"]
    config = load_config(str(file), {"backends": relayed_to(Address("a", 1))}, sockets=True)
    assert config.proxies[0].listen == (Address(port=80),)


def test_a_wrong_address_to_listen_on_is_wrong_also_where_systemd_passes_sockets(tmp_path: Path) -> None:
    file = tmp_path / "rspd.yaml"
    file.write_text("listen: [70000]\nbackend: a:1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), {}, sockets=True)
    assert caught.value.errors == [f"{file}:1: listen: a port is at most 65535, found '70000'"]


def test_passed_sockets_and_ordinary_addresses_mix(load: Load) -> None:
    config = load("listen: [fd://http, 8080, 'fd://a b']\nbackend: a:1")
    assert config.proxies[0].listen == (Address(passed="http"), Address(port=8080), Address(passed="a b"))


def test_the_same_passed_socket_twice_is_told(errors: Errors) -> None:
    assert errors("listen: [fd://a, fd://a]\nbackend: a:1") == ["FILE:1: listen: fd://a is listed twice"]


@pytest.mark.parametrize(
    ("listen", "backend"),
    [
        ("8080", "localhost:8080"),
        ("8080", "127.0.0.1:8080"),
        ("8080", "'[::1]:8080'"),
        ("0.0.0.0:8080", "127.0.0.1:8080"),
        ("'[::]:8080'", "localhost:8080"),
        ("127.0.0.1:8080", "127.0.0.1:8080"),
        ("/run/rspd.sock", "/run/rspd.sock"),
        ("'@rspd'", "'@rspd'"),
    ],
)
def test_a_proxy_that_relays_to_itself_is_refused(errors: Errors, listen: str, backend: str) -> None:
    listener, dialled = listen.strip("'"), backend.strip("'")
    expected = [f"FILE:2: backend {dialled} is this proxy's own listener {listener}"]
    assert errors(f"listen: {listen}\nbackend: {backend}") == expected


@pytest.mark.parametrize(
    ("listen", "backend"),
    [
        ("8080", "localhost:8081"),
        ("8080", "example.com:8080"),
        ("127.0.0.1:8080", "127.0.0.2:8080"),
        ("0.0.0.0:8080", "'[::1]:8080'"),
        ("0.0.0.0:8080", "127.example.com:8080"),
        ("'[::]:8080'", "127.0.0.1:8080"),
        ("/run/a", "/run/b"),
        ("8080", "/run/a"),
        ("0", "/run/a"),
        ("/run/a", "localhost:8080"),
    ],
)
def test_a_proxy_that_relays_elsewhere_is_not_refused(load: Load, listen: str, backend: str) -> None:
    assert load(f"listen: {listen}\nbackend: {backend}")


def test_every_backend_is_compared_with_every_listener(errors: Errors) -> None:
    assert errors("listen: [8080, 8081]\nbackends: [a:1, 'localhost:8081', 'localhost:8080']") == [
        "FILE:2: backend localhost:8081 is this proxy's own listener 8081",
        "FILE:2: backend localhost:8080 is this proxy's own listener 8080",
    ]


@given(st.integers(1, 10**9 - 1), st.sampled_from([("ms", 0.001), ("s", 1), ("", 1), ("m", 60), ("h", 3600)]))
def test_a_duration_is_a_number_with_a_unit(number: int, unit: tuple[str, float]) -> None:
    assert parse_duration(f"{number}{unit[0]}") == pytest.approx(number * unit[1], 1e-12)


@given(st.text(max_size=12))
@example("1\n")
@example("\uff11")
def test_what_is_no_duration_is_refused_by_quoting_it(text: str) -> None:
    try:
        assert parse_duration(text) > 0
        assert re.fullmatch(r"[0-9.]+(ms|s|m|h)?|off|no|false", text.lower())
    except ValueError as error:
        assert str(error) == f"{DURATION}, found {text!r}"  # noqa: PT017


@given(st.integers(-10, 10**20), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_whole_number_is_taken_within_its_bounds(number: int, low: int, width: int) -> None:
    parse = whole_number(low, low + width)
    if low <= number <= low + width:
        assert parse(str(number)) == number
    else:
        with pytest.raises(ValueError, match=f"expected a whole number from {low} to {low + width}, found '{number}'"):
            parse(str(number))


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_a_log_level_is_one_of_four(level: str) -> None:
    parse_log_level = one_of(LEVELS)
    assert parse_log_level(level) == level
    with pytest.raises(ValueError, match=f"expected one of debug, info, warning, error, found '{level.upper()}'"):
        parse_log_level(level.upper())


@pytest.mark.parametrize("text", ["a:1", "[::1]:80", "/run/a", "@a"])
def test_a_backend_is_what_can_be_dialled(text: str) -> None:
    assert str(parse_backend(text)) == text


def test_the_default_file_is_where_the_manual_says() -> None:
    assert DEFAULT_FILE == "/etc/rspd.yaml"


@pytest.mark.parametrize("listen", ["[8080, 127.0.0.1:8080]", '["[::1]:8080", 8080]', "[localhost:8080, 8080]"])
def test_an_address_that_a_bare_port_covers_already_is_refused(tmp_path: Path, listen: str) -> None:
    file = tmp_path / "rspd.yaml"
    file.write_text(f"listen: {listen}\nbackend: 192.0.2.1:80\n")
    with pytest.raises(ConfigError, match=r"rspd.yaml:1: listen 8080 covers \S+:8080 too, which cannot be bound twice"):
        load_config(str(file), {})
