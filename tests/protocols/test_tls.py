"""rspd/protocols/tls.py: what is read from a ClientHello."""

from __future__ import annotations

import ssl
import struct
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rspd.protocols.first import HEAD_MAX, UNKNOWN, HeadError, Said
from rspd.protocols.tls import (
    DECODE_ERROR,
    INTERNAL_ERROR,
    RECORDS_MAX,
    UNRECOGNIZED_NAME,
    alert,
    awaited,
    read,
)

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

ERROR = "HeadError"
PEEKED = 17408  # bytes of which a reader has to know what they are

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
SNI, PADDING, ECH = 0, 21, 0xFE0D


def outcome(data: bytes) -> Said | str | None:
    """What the reader says, or ERROR."""
    try:
        return read(data)
    except HeadError as error:
        told = error
    assert told.protocol == "tls"
    assert str(told).isprintable()
    assert str(told).startswith(("expected ", "server name: expected "))
    return ERROR


# What the hellos of the tests are made of


def real(name: str | None, alpn: Sequence[str], version: ssl.TLSVersion) -> bytes:
    """A hello that OpenSSL sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = context.maximum_version = version
    if alpn:
        context.set_alpn_protocols(list(alpn))
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def block(data: bytes, size: int = 2) -> bytes:
    """Data after its length, which has this size."""
    return len(data).to_bytes(size, "big") + data


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack("!H", kind) + block(data)


def server_name(name: bytes, kind: int = 0) -> bytes:
    return extension(SNI, block(bytes((kind,)) + block(name)))


def protocols(*names: bytes) -> bytes:
    return extension(16, block(b"".join(block(name, 1) for name in names)))


def message(
    *extensions: bytes,
    session: bytes = bytes(32),
    suites: bytes = b"\x13\x01\x13\x02",
    methods: bytes = b"\0",
    end: bytes | None = None,
    kind: int = 1,
) -> bytes:
    """A handshake message; `end` is what comes instead of the extensions."""
    body = b"\3\3" + bytes(range(32)) + block(session, 1) + block(suites) + block(methods, 1)
    return bytes((kind,)) + block(body + (block(b"".join(extensions)) if end is None else end), 3)


def record(data: bytes, kind: int = 22, version: bytes = b"\3\1") -> bytes:
    return bytes((kind,)) + version + block(data)


def hello(*extensions: bytes) -> bytes:
    return record(message(*extensions))


def in_records(data: bytes, cuts: Sequence[int]) -> bytes:
    """The message in several records, cut at these places."""
    places = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    return b"".join(record(data[start:end]) for start, end in pairwise(places))


def of_size(size: int) -> bytes:
    """A message with a name and this many bytes, its header counted."""
    name = server_name(b"a.example")
    missing = size - len(message(name, extension(PADDING, b"")))
    made = message(name, extension(PADDING, bytes(missing)))
    assert len(made) == size
    return made


NAMED = Said("tls", "a.example")
WHOLE = message(server_name(b"a.example"), protocols(b"h2", b"http/1.1"), extension(ECH, b"\1" * 200))


# Real hellos


@pytest.mark.parametrize("version", [TLS12, TLS13])
@pytest.mark.parametrize("alpn", [(), ("h2",), ("h2", "http/1.1", "acme-tls/1")])
@pytest.mark.parametrize("name", [None, "example.org", "A.Example.ORG", "xn--bcher-kva.example", "a_b.example"])
def test_a_real_hello_says_its_name_and_its_protocols(
    name: str | None, alpn: tuple[str, ...], version: ssl.TLSVersion
) -> None:
    data = real(name, alpn, version)
    said = Said("tls", (name or "").lower(), alpn)
    assert read(data) == said
    assert read(data + b"what comes next") == said
    for size in range(1, len(data)):
        assert read(data[:size]) is None


@given(st.lists(st.integers(0, 1000), max_size=40))
def test_a_real_hello_may_come_in_any_records(cuts: list[int]) -> None:
    data = in_records(real("example.org", ["h2"], TLS13)[5:], cuts)
    assert read(data) == Said("tls", "example.org", ("h2",))
    for size in range(1, len(data)):
        assert read(data[:size]) is None


@pytest.mark.parametrize("version", [b"\3\0", b"\3\1", b"\3\3", b"\3\4", b"\3\xff"])
def test_the_minor_version_of_a_record_does_not_matter(version: bytes) -> None:
    assert read(record(WHOLE, version=version)) == Said("tls", "a.example", ("h2", "http/1.1"))


def test_a_hello_may_come_in_many_records_but_not_in_any_number_of_them() -> None:
    begun = b"".join(record(WHOLE[at : at + 1]) for at in range(RECORDS_MAX - 1))
    data = begun + record(WHOLE[RECORDS_MAX - 1 :])
    assert read(data) == Said("tls", "a.example", ("h2", "http/1.1"))
    assert read(data[:-1]) is None
    with pytest.raises(HeadError, match=r"^expected a ClientHello in at most 200 records, found more$"):
        read(begun + record(WHOLE[RECORDS_MAX - 1 : -1]) + record(WHOLE[-1:]))


@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 200]])
def test_how_many_bytes_have_to_come_is_known_up_to_the_end_of_a_record(cuts: list[int]) -> None:
    data = in_records(WHOLE, cuts)
    for size in range(1, len(data)):
        more = awaited(data[:size])
        assert size < more <= len(data)
        assert read(data[: more - 1]) is None


# What comes after a hello


@pytest.mark.parametrize("cuts", [[], [100], [1, 2, 3, 200]])
@pytest.mark.parametrize(
    "after",
    [
        record(b"\1", kind=20),  # ChangeCipherSpec, of a client that has early data (RFC 8446, D.4)
        record(b"early data", kind=23),
        record(b"\2\50", kind=21),
        b"GET / HTTP/1.1\r\n",
        b"\x16\3\1\0\0",
        b"\x17",
    ],
)
def test_what_follows_a_hello_does_not_matter(cuts: list[int], after: bytes) -> None:
    data = in_records(WHOLE, cuts)
    assert read(data + after) == read(data)


def test_another_handshake_message_after_the_hello_does_not_matter() -> None:
    assert read(record(WHOLE + message(kind=2))) == read(record(WHOLE))
    assert read(record(WHOLE[:50]) + record(WHOLE[50:] + b"\2\0\0\0")) == read(record(WHOLE))


# Sizes


def test_a_hello_of_16_kib_is_read() -> None:
    data = record(of_size(HEAD_MAX))
    assert read(data) == NAMED
    assert read(record(of_size(HEAD_MAX)[:9000]) + record(of_size(HEAD_MAX)[9000:])) == NAMED
    for size in (*range(1, 4), *range(5, 300), *range(300, len(data), 100), len(data) - 1):
        assert read(data[:size]) is None


def test_a_header_of_a_record_of_16_kib_may_come_in_pieces() -> None:
    data = record(of_size(HEAD_MAX))
    assert [outcome(data[:size]) for size in range(1, 6)] == [None] * 5


def test_a_hello_of_more_than_16_kib_is_refused_once_its_length_is_known() -> None:
    data = in_records(of_size(HEAD_MAX + 1), [9000])
    assert read(data[:8]) is None
    for size in (9, 10, len(data)):
        with pytest.raises(HeadError, match=r"of at most 16384 bytes, found one of 16385$"):
            read(data[:size])


def test_a_record_of_more_than_16_kib_is_refused() -> None:
    with pytest.raises(HeadError, match=r"^expected a record with a handshake, found 16 03 01 40 01$"):
        read(b"\x16\3\1\x40\1")
    assert outcome(record(of_size(HEAD_MAX + 1))) == ERROR


def test_a_reader_does_not_wait_for_more_than_it_is_given() -> None:
    """With many small records, a hello is much longer than its message."""
    tiny = b"".join(record(bytes((byte,))) for byte in of_size(HEAD_MAX))
    assert len(tiny) > PEEKED
    assert outcome(tiny[:PEEKED]) is not None


# What is no hello


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x2e\1\3\1\0\x15\0\0\0\x10",  # SSLv2
        b"\x80",
        b"\x15\3\1\0\2\2\x28",
        b"\x17\3\3\0\1\0",
        b"\x14\3\1\0\1\1",
        b"\x16\2",
        b"\x16\4\1",
        b"\x16\x16",
        b"\x16\xfe\xff",  # DTLS
        b"\0",
        b"GET / HTTP/1.1\r\n",
        b"SSH-2.0-x\r\n",
    ],
)
def test_what_does_not_begin_as_a_handshake_is_unknown(data: bytes) -> None:
    assert read(data) == UNKNOWN


@pytest.mark.parametrize("kind", [0, 2, 4, 11, 20, 255])
def test_another_handshake_message_is_refused_once_its_type_is_known(kind: int) -> None:
    data = record(message(kind=kind))
    for size in (6, 9, 10, len(data)):
        with pytest.raises(HeadError, match=f"^expected a ClientHello, found a handshake message of type {kind}$"):
            read(data[:size])


@pytest.mark.parametrize("second", [record(b"x", kind=23), b"\x16\2", b"\x16\3\1\0\0", b"\x16\3\1\xff", b"\x15"])
def test_each_record_of_a_hello_is_one_of_a_handshake(second: bytes) -> None:
    assert outcome(record(WHOLE[:50])) is None
    with pytest.raises(HeadError, match=r"^expected a record with a handshake, found "):
        read(record(WHOLE[:50]) + second)


def test_an_empty_record_is_refused() -> None:
    assert read(b"\x16\3\1\0") is None
    assert outcome(b"\x16\3\1\0\0") == ERROR


# The parts of a hello


@pytest.mark.parametrize("size", [0, 1, 32])
def test_a_session_id_has_32_bytes_at_most(size: int) -> None:
    assert read(record(message(server_name(b"a.example"), session=bytes(size)))) == NAMED
    with pytest.raises(HeadError, match="session id of at most 32 bytes, found 33"):
        read(record(message(server_name(b"a.example"), session=bytes(33))))


def test_a_hello_without_extensions_has_no_name() -> None:
    assert read(record(message(end=b""))) == Said("tls")
    assert read(hello()) == Said("tls")


@pytest.mark.parametrize("suites", [b"", b"\x13", b"\x13\1\x13"])
def test_cipher_suites_are_pairs_of_bytes(suites: bytes) -> None:
    with pytest.raises(HeadError, match="expected cipher suites"):
        read(record(message(server_name(b"a.example"), suites=suites)))


def test_there_is_a_compression_method() -> None:
    assert read(record(message(server_name(b"a.example"), methods=b"\1\0"))) == NAMED
    with pytest.raises(HeadError, match="compression methods"):
        read(record(message(server_name(b"a.example"), methods=b"")))


@pytest.mark.parametrize(
    "end",
    [
        b"\0",
        b"\0\1",
        b"\0\0\0",
        b"\0\x05" + extension(PADDING, b""),
        b"\0\3" + extension(PADDING, b""),
        block(extension(PADDING, b"")) + b"\0",
        block(b"\0"),
        block(b"\0\x15\0"),
        block(b"\0\x15\0\1"),
        block(b"\0\x15\0\1\0\0"),
        block(b"\0\x15\xff\xff"),
        block(server_name(b"a.example")[:-1]),
    ],
)
def test_the_extensions_fill_the_hello(end: bytes) -> None:
    for after in (b"", bytes(100), b"\xff" * 70000):
        assert outcome(record(message(end=end)) + after) == ERROR


def test_a_hello_that_is_cut_is_refused() -> None:
    """Its length is less than its parts need, whether more bytes follow or not."""
    whole = message(server_name(b"a.example"))
    for size in range(4, len(whole)):
        if size != whole.index(b"\1\0", 40) + 2:  # there it has no extensions
            cut = record(b"\1" + block(whole[4:size], 3))
            assert outcome(cut) == outcome(cut + whole[size:]) == outcome(cut + bytes(99)) == ERROR


@pytest.mark.parametrize("kind", [SNI, 16, PADDING, 0xAAAA])
def test_an_extension_that_stands_twice_is_refused(kind: int) -> None:
    bodies = {SNI: server_name(b"a.example"), 16: protocols(b"h2")}
    one = bodies.get(kind, extension(kind, b""))
    assert read(hello(one))
    with pytest.raises(HeadError, match=r"^expected each extension once, found one twice$"):
        read(hello(one, extension(5, b"x"), one))


def test_extensions_that_are_not_known_are_passed_over() -> None:
    others = [extension(kind, bytes(kind % 7)) for kind in (1, 15, 17, 43, 0x0A0A, ECH, 0xFFFF)]
    assert read(hello(*others, server_name(b"a.example"), *[extension(0xFAFA, b"x")])) == NAMED


# The server name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (b"a", "a"),
        (b"A.Example", "a.example"),
        (b"a.example.", "a.example"),
        (b"a_b-c.1.example", "a_b-c.1.example"),
        (b"192.0.2.1", "192.0.2.1"),
        (b"x" * 63 + b".example", "x" * 63 + ".example"),
    ],
)
def test_a_name_is_said_in_small_letters_without_its_last_dot(name: bytes, said: str) -> None:
    assert read(hello(server_name(name))) == Said("tls", said)


@pytest.mark.parametrize(
    "name",
    [
        b".",
        b"a..b",
        b".a",
        b"a..",
        b"a b",
        b"a\0b",
        b"a.example\0",
        b"a\n",
        b"a/b",
        b"a:443",
        b"*.example",
        b"b\xc3\xbccher.example",
        b"\xff",
        b"a@b",
        b"%61",
        b"x" * 64 + b".example",
        b"a." * 127 + b"a",
        b"fe80::1",
    ],
)
def test_a_name_that_is_no_host_is_refused(name: bytes) -> None:
    with pytest.raises(HeadError, match=r"^server name: expected a host, found b"):
        read(hello(server_name(name)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\0\0",
        b"\0\3\0\0\0",
        block(b"\0" + block(b"a")) + b"x",
        block(b"\0" + block(b"a") + b"x"),
        block(b"\0" + block(b"a") + b"\0" + block(b"b")),
        block(b"\0" + block(b"a") + b"\1" + block(b"b")),
        block(b"\1" + block(b"a")),
        block(b"\xff" + block(b"a")),
        b"\0\5\0\0\1a",
        b"\0\3\0\0\1a",
        b"\0\4\0\0\2a",
        b"\0\4\0\0\0a",
        b"\0\4\0\0",
    ],
)
def test_there_is_one_server_name_of_the_one_type_and_nothing_else(data: bytes) -> None:
    assert outcome(hello(extension(SNI, data))) == ERROR
    assert outcome(hello(extension(SNI, data), extension(PADDING, bytes(9)))) == ERROR


# ALPN


def test_protocols_are_said_in_their_order() -> None:
    names = (b"h2", b"\x0a\x0a", b"http/1.1", b"x" * 255, b"\xff\0")
    assert read(hello(protocols(*names))) == Said("tls", "", tuple(name.decode("latin-1") for name in names))


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"\0\0", b"\0\1\0", b"\0\3\2h2x", b"\0\4\2h2", b"\0\2\2h2", b"\0\3\3h2", b"\0\4\2h2\0", b"\0\4\0\2h2"],
)
def test_a_list_of_protocols_that_does_not_add_up_is_refused(data: bytes) -> None:
    with pytest.raises(HeadError, match=r"^expected a list of protocols \(ALPN\), found b"):
        read(hello(extension(16, data)))


# The answer to a hello


@pytest.mark.parametrize("description", [DECODE_ERROR, INTERNAL_ERROR, UNRECOGNIZED_NAME])
def test_an_alert_ends_the_handshake_of_a_client(description: int) -> None:
    context = ssl.create_default_context()
    received = ssl.MemoryBIO()
    client = context.wrap_bio(received, ssl.MemoryBIO(), server_hostname="a.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    received.write(alert(description))
    words = {DECODE_ERROR: "DECODE_ERROR", INTERNAL_ERROR: "INTERNAL_ERROR", UNRECOGNIZED_NAME: "UNRECOGNIZED_NAME"}
    with pytest.raises(ssl.SSLError, match=words[description]):
        client.do_handshake()


# Whatever comes


def edits() -> st.SearchStrategy[list[tuple[int, int, bytes]]]:
    """Places, and what is there instead of so many bytes."""
    numbers = st.sampled_from([b"\0", b"\1", b"\2", b"\x16", b"\x17", b"\x40", b"\x80", b"\xff", b"\0\0", b"\0\1"])
    return st.lists(st.tuples(st.integers(0, 600), st.integers(0, 4), numbers | st.binary(max_size=5)), max_size=4)


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, size, new in changes:
        at = place % len(data) if data else 0
        data = data[:at] + new + data[at + size :]
    return data or b"\x16"


def whatever() -> st.SearchStrategy[bytes]:
    """Hellos in some records, with some changes."""
    cut = st.builds(in_records, st.just(WHOLE), st.lists(st.integers(0, 400), max_size=3))
    return st.builds(edited, cut | st.just(hello(server_name(b"a"))), edits())


@given(whatever() | st.binary(min_size=1).map(lambda data: b"\x16\3" + data) | st.binary(min_size=1))
def test_whatever_comes_is_read_or_refused_and_never_a_crash(data: bytes) -> None:
    found = outcome(data)
    assert found in (None, ERROR) or isinstance(found, Said)
    if found is None:
        assert outcome(data + b"\xff" * PEEKED) is not None


@given(whatever(), st.integers(1, 500), st.binary(max_size=20))
@example(in_records(WHOLE, [100]) + record(b"early", kind=23), len(WHOLE) + 10, b"")
@example(record(of_size(HEAD_MAX)), 4, b"")
def test_what_is_said_of_the_first_bytes_stays_when_more_come(data: bytes, size: int, after: bytes) -> None:
    first = outcome(data[:size])
    if first is not None:
        assert outcome(data + after) == first


@given(st.lists(st.binary(max_size=60), max_size=4), st.lists(st.integers(0, 1000), max_size=5))
def test_a_hello_says_the_same_in_one_record_and_in_several(bodies: list[bytes], cuts: list[int]) -> None:
    made = message(*[extension(kind, body) for kind, body in zip((0, 16, 0, 5), bodies, strict=False)])
    assert outcome(record(made)) == outcome(in_records(made, cuts))
