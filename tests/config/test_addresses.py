"""Addresses as people write them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rspd.config.addresses import DIALLED, FORMS, parse_address, parse_backend
from rspd.net.address import Address, literal
from tests.support import PATIENCE, private_mounts

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
LABELS = st.text(LETTERS, min_size=1, max_size=63).filter(lambda label: label[0] != "-")
NAMES = st.lists(LABELS, min_size=1, max_size=3).map(".".join).filter(lambda name: not name.isdigit())
NUMERIC = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
PORTS = st.integers(0, 65535)
PASSED_NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126, blacklist_characters=":"), min_size=1)
PATHS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=26).filter(
    lambda path: not re.search(r"[\s,][/@]", path)
)


@pytest.mark.usefixtures("service_names")
@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8080", Address(port=8080)),
        ("0", Address(port=0)),
        ("65535", Address(port=65535)),
        ("http", Address(port=80)),
        ("127.0.0.1:https", Address("127.0.0.1", 443)),
        ("127.0.0.1:8080", Address("127.0.0.1", 8080)),
        ("backend:80", Address("backend", 80)),
        ("a-b_c.example.:80", Address("a-b_c.example.", 80)),
        ("münchen.example:80", Address("xn--mnchen-3ya.example", 80)),
        ("[::1]:8080", Address("::1", 8080)),
        ("[::ffff:127.0.0.1]:80", Address("::ffff:127.0.0.1", 80)),
        ("[fe80::1%lo]:80", Address("fe80::1%lo", 80)),
        ("/run/rspd.sock", Address(path="/run/rspd.sock")),
        ("/run/with:colon", Address(path="/run/with:colon")),
        ("@rspd", Address(path="@rspd")),
        ("fd://http", Address(passed="http")),
        ("fd://rspd.socket", Address(passed="rspd.socket")),
        ("fd://two words /and @more", Address(passed="two words /and @more")),
        ("fd://" + "n" * 255, Address(passed="n" * 255)),
    ],
)
def test_each_form_of_an_address_is_read(text: str, address: Address) -> None:
    assert parse_address(text) == address


def test_the_name_of_a_port_is_that_of_a_service_of_this_host(tmp_path: Path) -> None:
    (tmp_path / "nsswitch.conf").write_text("services: files\n")
    (tmp_path / "services").write_text("of-this-test 4321/udp\nof-this-test 1234/tcp\n")
    code = "from rspd.config.addresses import parse_address; print(parse_address('of-this-test').port)"
    command = [*private_mounts(), "sh", "-ec", 'mount --bind "$0" /etc; exec "$@"', str(tmp_path)]
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("1234\n", "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected PORT, HOST:PORT"),
        (":", "expected PORT, HOST:PORT"),
        (":80", "expected PORT, HOST:PORT"),
        ("*:80", "expected PORT, HOST:PORT"),
        ("0:80", "expected PORT, HOST:PORT"),
        ("8080:80", "expected PORT, HOST:PORT"),
        ("host:", "expected PORT, HOST:PORT"),
        (".:80", "expected PORT, HOST:PORT"),
        ("a..b:80", "expected PORT, HOST:PORT"),
        ("a b:80", "expected PORT, HOST:PORT"),
        ("a\0b:80", "expected PORT, HOST:PORT"),
        ("127.0.0.1", "expected PORT, HOST:PORT"),
        ("http://host:80", "expected PORT, HOST:PORT"),
        ("http://host", "expected PORT, HOST:PORT"),
        ("a" * 64 + ":80", "expected PORT, HOST:PORT"),
        ("ü" * 64 + ":80", "expected PORT, HOST:PORT"),
        (".".join(["a" * 63] * 4) + ":80", "expected PORT, HOST:PORT"),
        ("-80", f"expected {FORMS} (services(5) has no '-80'), found '-80'; a space belongs after the dash"),
        ("80 ", "expected PORT, HOST:PORT"),
        ("\uff18\uff10", "expected PORT, HOST:PORT"),
        ("host:8080/path", "expected PORT, HOST:PORT"),
        ("65536", "a port is at most 65535"),
        ("host:99999999", "a port is at most 65535"),
        ("localhost", f"expected {FORMS} (services(5) has no 'localhost')"),
        ("host:no-such-service", f"expected {FORMS} (services(5) has no 'no-such-service')"),
        ("::1", "expected brackets around an IPv6 address, as in [::1]:8080"),
        ("::1:8080", "expected brackets around an IPv6 address, as in [::1]:8080"),
        ("[]:80", "expected an IPv6 address between the brackets"),
        ("[host]:80", "expected an IPv6 address between the brackets"),
        ("[127.0.0.1]:80", "expected an IPv6 address between the brackets"),
        ("[::1%no-such-interface]:80", "expected an IPv6 address between the brackets"),
        ("[" + "ü" * 64 + "]:80", "expected an IPv6 address between the brackets"),
        ("[::1]", "expected brackets around an IPv6 address, as in [::1]:8080"),
        ("[::1]:", "expected PORT, HOST:PORT"),
        ("/", "expected PORT, HOST:PORT"),
        ("@", "expected PORT, HOST:PORT"),
        ("/run/\0", "expected PORT, HOST:PORT"),
        ("fd://", "expected PORT, HOST:PORT"),
        ("fd://a:b", "expected PORT, HOST:PORT"),
        ("fd://ü", "expected PORT, HOST:PORT"),
        ("fd://a\x7f", "expected PORT, HOST:PORT"),
        ("fd://a\n", "expected PORT, HOST:PORT"),
        ("fd://" + "n" * 256, "expected PORT, HOST:PORT"),
        ("FD://a", "expected PORT, HOST:PORT"),
        ("fd:/a", "expected PORT, HOST:PORT"),
        ("/" + "ü" * 54, "a unix socket's name holds at most 107 bytes"),
    ],
)
def test_what_is_no_address_is_refused_with_the_reason_and_the_text(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="found ") as caught:
        parse_address(text)
    assert str(caught.value).startswith(reason)
    assert f", found {text!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "dialled", "advice"),
    [
        ("*:8090", False, "a port alone is every address: 8090"),
        (":8090", False, "a port alone is every address: 8090"),
        ("0:8090", False, "a port alone is every address: 8090"),
        ("*:8090", True, "port 8090 of this host is 127.0.0.1:8090"),
        (":8090", True, "port 8090 of this host is 127.0.0.1:8090"),
        ("8090", True, "port 8090 of this host is 127.0.0.1:8090"),
        ("8080:80", False, "8080 is no host"),
        ("8080:80", True, "8080 is no host"),
        ("http://a:80", True, "write a:80 without http://"),
        ("http://127.0.0.1:8000/", True, "write 127.0.0.1:8000 without http:// and path"),
        ("HTTP://a?b", True, "write a:80 without HTTP:// and path"),
        ("https://a.example/x\ny", True, "write a.example:443 without https:// and path"),
        ("http://user:word@a/", True, "write a:80 without http:// and path"),
        ("http://[::1]/", True, "write [::1]:80 without http:// and path"),
        ("tcp://a", True, "write a:PORT without tcp://"),
        ("tcp://0.0.0.0:80", False, "write 0.0.0.0:80 without tcp://"),
        ("unix:/run/a", True, "a unix socket is its path: /run/a"),
        ("unix:///run/a", False, "a unix socket is its path: /run/a"),
        ("10.0.0.1", True, "the port is missing, as in 10.0.0.1:80"),
        ("www.example.org", False, "the port is missing, as in www.example.org:80"),
        ("web2", True, "the port is missing, as in web2:80"),
        ("a_b.c", True, "the port is missing, as in a_b.c:80"),
        ("localhost", True, "the port is missing, as in localhost:80"),
        ("-a:80", True, "a space belongs after the dash"),
        ("a.-b:80", True, ""),
        ("fd://a", True, ""),
        ("FD://a:b", False, ""),
        ("http://", True, ""),
        ("127.0.0.1:8080:80", False, ""),
        ("[a:80, b:80]", True, ""),
        ("0", True, ""),
        ("80.0", False, ""),
        ("null", False, ""),
        ("~", True, ""),
        ("/run/a /run/b", False, ""),
        ("/run/a, @b", True, ""),
        ("a" * 99, False, ""),
    ],
)
def test_what_is_written_in_another_way_is_told_how_it_is_written_here(text: str, dialled: bool, advice: str) -> None:
    with pytest.raises(ValueError, match="expected ") as caught:
        parse_backend(text) if dialled else parse_address(text)
    expected = f"expected {DIALLED if dialled else FORMS}, found {text!r}"
    assert str(caught.value) == (f"{expected}; {advice}" if advice else expected)


def test_an_endless_port_number_is_refused_as_too_high() -> None:
    with pytest.raises(ValueError, match="a port is at most 65535"):
        parse_address("9" * 5000)


@pytest.mark.parametrize("host", ["::\uff11", "::1\0", "::1%lo\0"])
def test_an_ipv6_address_is_taken_in_ascii_only(host: str) -> None:
    with pytest.raises(ValueError, match="expected an IPv6 address between the brackets"):
        parse_address(f"[{host}]:80")


@given(st.text(st.characters() | st.sampled_from("/@[]:.%0aé\0"), max_size=40))
@example("/\ud800")
@example("@\ud800")
@settings(max_examples=50)
def test_any_text_is_an_address_or_is_refused_by_quoting_it(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError as error:
        assert repr(text) in str(error)  # noqa: PT017
    else:
        literal(address)


@given(
    PORTS.map(lambda port: Address(port=port))
    | st.tuples(NAMES | NUMERIC, PORTS).map(lambda parts: Address(*parts))
    | st.builds(str.__add__, st.sampled_from("/@"), PATHS).map(lambda path: Address(path=path))
    | PASSED_NAMES.map(lambda name: Address(passed=name))
)
@settings(max_examples=50)
def test_an_address_that_is_printed_and_read_again_is_the_same(address: Address) -> None:
    assert parse_address(str(address)) == address


def test_a_name_one_byte_longer_than_the_kernel_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 107 bytes"):
        parse_address("@" + "n" * 108)
