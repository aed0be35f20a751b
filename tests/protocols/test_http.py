"""rspd/protocols/http.py: what is read from the head of a request, and paths as they are compared."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rspd.protocols.first import HEAD_MAX, UNKNOWN, HeadError, Said
from rspd.protocols.http import PREFACE, plain_path, read, read_preface

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

ERROR = "HeadError"
PEEKED = 17408  # bytes of which a reader has to know what they are

CURL = b"GET /a?b=c HTTP/1.1\r\nHost: a.example\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\r\n"
HEADS = {
    CURL: Said("http", "a.example", (), "/a?b=c", "GET"),
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n": Said("http", "a", (), "/", "GET"),
    b"GET / HTTP/1.0\r\n\r\n": Said("http", "", (), "/", "GET"),
    b"POST /form HTTP/1.1\r\nHost: a.example:8080\r\nContent-Length: 3\r\n\r\na=b": Said(
        "http", "a.example", (), "/form", "POST"
    ),
    b"OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n": Said("http", "a.example", (), "*", "OPTIONS"),
    b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n": Said("http", "a.example", (), "", "CONNECT"),
    b"GET http://a.example/x HTTP/1.1\r\nHost: a.example\r\n\r\n": Said("http", "a.example", (), "/x", "GET"),
    b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\nCookie: a=\xe9\r\n\r\n": Said(
        "http", "[2001:db8::1]", (), "/", "GET"
    ),
}


def outcome(data: bytes) -> Said | str | None:
    """What the reader says, or ERROR."""
    try:
        return read(data)
    except HeadError as error:
        told = error
    assert told.protocol == "http"
    assert str(told).isprintable()
    assert len(str(told)) < 500
    return ERROR


def head(*fields: bytes, line: bytes = b"GET / HTTP/1.1") -> bytes:
    return b"\r\n".join((line, *fields, b"", b""))


def host(data: bytes) -> str:
    """The name that a head has."""
    said = read(data)
    assert said
    assert said.protocol == "http"
    return said.name


# Whole heads


@pytest.mark.parametrize(("data", "said"), list(HEADS.items()))
def test_a_head_says_host_method_and_target_and_each_part_of_it_asks_for_more(data: bytes, said: Said) -> None:
    assert read(data) == said
    assert read(data + b"what comes next") == said
    assert read(data + b"\0\n\r\n\r\nGET / HTTP/1.1\r\nHost: b\r\n\r\n") == said
    for size in range(1, data.index(b"\r\n\r\n") + 4):
        assert read(data[:size]) is None


def test_a_method_is_any_token_and_a_target_is_said_as_it_was_sent() -> None:
    for method in ("PROPFIND", "M-SEARCH", "get", "X!#$%&'*+.^_`|~9"):
        target = "/%7e//a/../b;c?d=%zz&e=/?!$'()*+,-.:=@[]^_`{|}~\\\""
        data = head(b"Host: a", line=f"{method} {target} HTTP/1.1".encode())
        assert read(data) == Said("http", "a", (), target, method)


# The Host field


@pytest.mark.parametrize(
    ("field", "name"),
    [
        (b"Host: a.example", "a.example"),
        (b"host:a.example", "a.example"),
        (b"HOST: \t A.EXAMPLE \t ", "a.example"),
        (b"Host: a.example.", "a.example"),
        (b"Host: a.example:80", "a.example"),
        (b"Host: a.example.:443", "a.example"),
        (b"Host: a.example:", "a.example"),
        (b"Host: a.example:99999", "a.example"),
        (b"Host: a_b.example", "a_b.example"),
        (b"Host: 192.0.2.1:8080", "192.0.2.1"),
        (b"Host: [::1]", "[::1]"),
        (b"Host: [2001:DB8::A]:443", "[2001:db8::a]"),
        (b"Host: [::ffff:192.0.2.1]", "[::ffff:192.0.2.1]"),
        (b"Host: " + b"x" * 63 + b".example", "x" * 63 + ".example"),
    ],
)
def test_a_host_is_said_in_small_letters_without_port_and_last_dot(field: bytes, name: str) -> None:
    for before, after in [((), ()), ((b"A: b",), (b"C: d",)), ((b"X-Host: b",), (b"Forwarded: host=c",))]:
        assert host(head(*before, field, *after)) == name


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b"a b",
        b"a,b",
        b"a, a",
        b"a\tb",
        b"a@b",
        b"user:pass@a",
        b"a/b",
        b"/a",
        b"//a",
        b"http://a",
        b"a:80:80",
        b"a:x",
        b"a:-1",
        b"a:123456",
        b"a: 80",
        b"a :80",
        b":80",
        b":",
        b".",
        b"a..b",
        b".a",
        b"a..",
        b"a;b",
        b"a?b",
        b"a#b",
        b"a%00",
        b"%61",
        b"a\\b",
        b"*",
        b"*.a",
        b"a'",
        b'"a"',
        b"a\xc3\xbc",
        b"\xff",
        b"[::1",
        b"::1",
        b"[::1]x",
        b"x[::1]",
        b"[]",
        b"[::1%eth0]",
        b"[g::1]",
        b"[v1.x]",
        b"[::1]:[80]",
        b"a\x7f",
        b"x" * 64,
        b"a." * 127 + b"a",
    ],
)
def test_a_host_that_is_none_is_refused(value: bytes) -> None:
    data = head(b"Host: " + value)
    assert outcome(data) == outcome(head(b"Host:" + value)) == outcome(head(b"A: b", b"hOST: " + value)) == ERROR
    assert outcome(head(b"Host: " + value, line=b"GET / HTTP/1.0")) == ERROR


def test_there_is_one_host_at_most_whatever_it_says() -> None:
    for second in (b"Host: b", b"Host: a", b"host:a", b"HOST:", b"Host: "):
        for line in (b"GET / HTTP/1.1", b"GET / HTTP/1.0", b"GET http://a/ HTTP/1.1"):
            with pytest.raises(HeadError, match=r"^expected one Host, found 2$"):
                read(head(b"Host: a", b"A: b", second, line=line))
            assert outcome(head(second, b"Host: a", line=line)) == ERROR


def test_http_1_1_needs_a_host_and_http_1_0_does_not() -> None:
    for method in (b"GET /", b"OPTIONS *", b"GET http://a/", b"CONNECT a:443"):
        with pytest.raises(HeadError, match=r"^expected one Host, found none$"):
            read(head(b"A: Host", line=method + b" HTTP/1.1"))
    assert host(head(b"A: Host", line=b"GET / HTTP/1.0")) == ""
    assert host(head(b"Host: a", line=b"GET / HTTP/1.0")) == "a"


@pytest.mark.parametrize("name", [b"_host", b"X-Host", b"Host-X", b"Hos", b"Hosts", b"X-Forwarded-Host", b"xhost"])
def test_another_field_is_no_host(name: bytes) -> None:
    assert host(head(b"Host: a", name + b": b")) == host(head(name + b": b", b"Host: a")) == "a"
    assert host(head(name + b": b", line=b"GET / HTTP/1.0")) == ""
    assert host(head(b"Host: a", b"A: Host: b", b"Host-:Host:")) == "a"


# Targets that name the host


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://a.example", "/"),
        (b"http://a.example/", "/"),
        (b"http://a.example/b?c", "/b?c"),
        (b"http://a.example?c", "/?c"),
        (b"HTTPS://A.Example.:443//b", "//b"),
        (b"ws://a.example:/x", "/x"),
        (b"x+y-z.1://a.example/http://b/", "/http://b/"),
    ],
)
def test_an_absolute_target_says_the_host_and_has_to_agree_with_the_field(target: bytes, path: str) -> None:
    said = Said("http", "a.example", (), path, "GET")
    line = b"GET " + target + b" HTTP/1."
    for field in (b"Host: a.example", b"Host: A.EXAMPLE.:99"):
        assert read(head(field, line=line + b"1")) == read(head(field, line=line + b"0")) == said
    with pytest.raises(HeadError, match=r"^expected the same host in target and Host, found no Host$"):
        read(head(line=line + b"0"))
    for other in (b"Host: b.example", b"Host: a.example.org", b"Host: [::1]"):
        with pytest.raises(HeadError, match=r"^expected the same host in target and Host, found 'a.example' and"):
            read(head(other, line=line + b"1"))


@pytest.mark.parametrize(
    "target",
    [
        b"http://",
        b"http:///",
        b"http:///a",
        b"http://?a",
        b"http://a@a/",
        b"http://b@a/",
        b"http://b:c@a/",
        b"http://a:b@a/",
        b"http://a:x/",
        b"http://a:123456/",
        b"http://a\\b/",
        b"http://a;b/",
        b"http://a%2f/",
        b"http://%61/",
        b"http://a..",
        b"http://[::1/",
        b"http:/a/",
        b"http:a/",
        b"://a/",
        b"1http://a/",
        b"ht_tp://a/",
        b"a",
        b"a/",
        b"a:80",
        b"*",
        b"**",
        b"?a",
        b"\\a",
        b"%2f",
        b"mailto:a",
    ],
)
def test_a_target_of_another_form_is_refused(target: bytes) -> None:
    for field in ((b"Host: a",), (b"Host: b",), ()):
        assert outcome(head(*field, line=b"GET " + target + b" HTTP/1.0")) == ERROR


def test_connect_has_a_host_as_its_target_and_no_path() -> None:
    assert outcome(head(line=b"CONNECT A.:443 HTTP/1.0")) == ERROR
    assert read(head(b"Host: a", line=b"CONNECT A.:443 HTTP/1.0")) == Said("http", "a", (), "", "CONNECT")
    assert read(head(b"Host: a:1", line=b"CONNECT a:443 HTTP/1.1")) == Said("http", "a", (), "", "CONNECT")
    for target in (b"b:443", b"a@b:443", b"*", b"?", b"a:443/"):
        assert outcome(head(b"Host: a", line=b"CONNECT " + target + b" HTTP/1.1")) == ERROR
    assert outcome(head(b"Host: a", line=b"connect a:443 HTTP/1.1")) == ERROR


def test_only_options_asks_for_a_star() -> None:
    for method in (b"GET", b"options", b"OPTION", b"HEAD"):
        assert outcome(head(b"Host: a", line=method + b" * HTTP/1.1")) == ERROR


# Lines


@pytest.mark.parametrize(
    "data",
    [
        CURL.replace(b"\r\n", b"\n"),
        CURL.replace(b"\r\n", b"\r"),
        CURL.replace(b"\r\n", b"\n", 1),
        CURL.replace(b"\r\n\r\n", b"\r\n\n"),
        CURL.replace(b"\r\n\r\n", b"\n\r\n"),
        CURL.replace(b"\r\n\r\n", b"\n\n\r\n\r\n"),
        CURL.replace(b"\r\n", b"\r\r\n"),
        CURL.replace(b"\r\n", b"\n\r\n"),
        CURL.replace(b"a.example", b"a.example\rX: b"),
        CURL.replace(b"a.example", b"a.example\nX: b"),
        CURL.replace(b"a.example", b"a.example\r"),
        CURL.replace(b"a.example", b"a.example\0"),
        CURL.replace(b"Accept", b"\0Accept"),
        CURL.replace(b"/a", b"/\0a"),
        CURL.replace(b"/a", b"/\ra"),
        CURL.replace(b"curl", b"\x0b"),
        CURL.replace(b"curl", b"\x01"),
        CURL.replace(b"curl", b"\x7f"),
        CURL.replace(b"Host", b" Host"),
        CURL.replace(b"Host", b"\tHost"),
        CURL.replace(b"User-Agent", b" User-Agent"),
        CURL.replace(b"a.example", b"a.example\r\n b"),
        CURL.replace(b"a.example", b"\r\n a.example"),
        CURL.replace(b"Accept: */*", b"Accept:\r\n\t*/*"),
        CURL.replace(b"Host:", b"Host :"),
        CURL.replace(b"Host:", b"Host\t:"),
        CURL.replace(b"Host:", b"Host\x0b:"),
        CURL.replace(b"Host:", b"Ho st:"),
        CURL.replace(b"Host:", b"Host"),
        CURL.replace(b"Host:", b"Host="),
        CURL.replace(b"Accept:", b"Accept :"),
        CURL.replace(b"Accept: */*", b"Accept"),
        CURL.replace(b"Accept:", b":"),
        CURL.replace(b"Accept", b"(Accept)"),
        CURL.replace(b"Accept", b"Acc\xe9pt"),
        CURL.replace(b"Accept", b"\xef\xbb\xbfAccept"),
    ],
)
def test_a_head_is_lines_that_end_with_crlf_each_of_which_is_a_field(data: bytes) -> None:
    assert outcome(data) == (ERROR if b"\n" in data else None)
    assert outcome(data + b"\r\n\r\n") == ERROR


@pytest.mark.parametrize(
    "line",
    [
        b"GET  / HTTP/1.1",
        b"GET /  HTTP/1.1",
        b"GET / HTTP/1.1 ",
        b"GET / HTTP/1.1\t",
        b"GET\t/ HTTP/1.1",
        b"GET /\tHTTP/1.1",
        b"GET /\x0bHTTP/1.1",
        b"GET / x HTTP/1.1",
        b"GET HTTP/1.1",
        b"GET / HTTP/1.2",
        b"GET / HTTP/2.0",
        b"GET / HTTP/0.9",
        b"GET / HTTP/1.10",
        b"GET / HTTP/01.1",
        b"GET / HTTP/1",
        b"GET / HTTP/1.",
        b"GET / HTTP/1,1",
        b"GET / HTTP/+1.1",
        b"GET / HTTP 1.1",
        b"GET / http/1.1",
        b"GET / Http/1.1",
        b"GET / XHTTP/1.1",
        b"GET / ICAP/1.1",
        b"GET /",
        b"GET / ",
        b"GET /#a HTTP/1.1",
        b"GET /\xc3\xa9 HTTP/1.1",
        b"GET /\x7f HTTP/1.1",
        b"PRI / HTTP/2.0",
        b"POST / HTTP/1.1 HTTP/1.1",
        b"POST / HTTP/3",
    ],
)
def test_a_first_line_of_http_in_another_form_is_refused(line: bytes) -> None:
    for fields in ((), (b"Host: a",), (b"Host: a", b"Host: b")):
        assert outcome(head(*fields, line=line)) == ERROR


def test_an_empty_line_or_a_blank_before_the_first_line_is_refused() -> None:
    for before in (b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b"\x0b"):
        with pytest.raises(HeadError, match=r"^expected `METHOD TARGET HTTP/1.1`, found an empty line or a blank$"):
            read(before)
        assert outcome(before + CURL) == ERROR


# What is no HTTP


@pytest.mark.parametrize(
    "line",
    [
        b"NICK me",
        b"USER me 0 * :Me",
        b"CAP LS 302",
        b"PASS secret",
        b"PING",
        b"*1\r\n$4\r\nPING",
        b"EHLO a.example",
        b"HELO a",
        b"a001 CAPABILITY",
        b"get key",
        b"stats",
        b"version",
        b"CONNECT {}",
        b"POST /",
        b"HEAD /",
        b"POST / ICAP/1.0",
        b"OPTIONS * http/1.1",
        b"PLAY rtsp://a/ RTSP/1.0",
        b"INVITE sip:a@b SIP/2.0",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2",
        b"<stream:stream>",
        b"{}",
        b"@a",
        b"GE(T / HTTP/1.1",
        b"G\xc3\x89T / HTTP/1.1",
        b"\0GET / HTTP/1.1",
        b"\x80GET / HTTP/1.1",
        b"GET\0/ HTTP/1.1",
    ],
)
def test_another_text_protocol_is_unknown_from_its_first_line_on(line: bytes) -> None:
    for end in (b"\r\n", b"\n"):
        for after in (b"", b"Host: a\r\n\r\n", CURL):
            assert read(line + end + after) == UNKNOWN
    assert outcome(line) in (None, UNKNOWN)


@pytest.mark.parametrize(
    "data", [b"\x16\3\1", b"\0", b"\xff", b"(", b":", b"GE\0", b"GET\0", b"\x04\1", b"[]", b"A\x80"]
)
def test_other_bytes_are_unknown_at_once(data: bytes) -> None:
    assert read(data) == read(data + CURL) == UNKNOWN


def test_the_preface_of_http_2_is_recognised_and_nothing_else_is() -> None:
    assert len(PREFACE) == 24
    for size in range(24):
        assert read_preface(PREFACE[:size]) is None
        for wrong in (b"\0", b"x", b"\r", b"\xff"):
            if not PREFACE[size:].startswith(wrong):
                assert read_preface(PREFACE[:size] + wrong) == UNKNOWN
                assert read_preface(PREFACE[:size] + wrong + PREFACE[size:]) == UNKNOWN
    assert read_preface(PREFACE) == read_preface(PREFACE + b"\0\0\0\4\0\0\0\0\0") == Said("http2")
    for data in HEADS:
        assert read_preface(data) == read_preface(data[:2]) == UNKNOWN or data.startswith(b"P")


def test_the_preface_of_http_2_is_unknown_where_nobody_asks_for_it() -> None:
    assert read(PREFACE) == read(PREFACE + b"\0") == UNKNOWN
    assert {outcome(PREFACE[:size]) for size in range(1, len(PREFACE))} == {None}
    assert outcome(PREFACE[:-3] + b"x") == ERROR


# Sizes


def of_size(size: int) -> bytes:
    data = head(b"Host: a", b"X: " + bytes(0))
    return data[:-4] + b"x" * (size - len(data)) + data[-4:]


def test_a_head_has_16_kib_at_most() -> None:
    data = of_size(HEAD_MAX)
    assert len(data) == HEAD_MAX
    assert host(data) == host(data + b"more") == "a"
    for size in range(HEAD_MAX - 10, HEAD_MAX):
        assert read(data[:size]) is None
    longer = of_size(HEAD_MAX + 1)
    for size in (HEAD_MAX, HEAD_MAX + 1):
        with pytest.raises(HeadError, match=r"^expected the end of the head within 16384 bytes, found none$"):
            read(longer[:size])
    assert read(longer[: HEAD_MAX - 1]) is None
    assert outcome(of_size(HEAD_MAX + 2)) == outcome(longer + b"more") == ERROR


@pytest.mark.parametrize("start", [b"A", b"GET /", b"GET ", b"GET / HTTP/1.1\r\nHost: ", b"GET / HTTP/1.1\r\n\r"])
def test_a_head_without_end_is_not_waited_for(start: bytes) -> None:
    for more in (b"a", b" ", b"\t", b"a b", b": ", b"\r\na:"):
        assert outcome(start + more * PEEKED) is not None


@pytest.mark.parametrize(
    "data",
    [
        head(b"Host: a" + b" " * 16300 + b"b"),
        head(b"Host:" + b" \t" * 8100 + b"b"),
        head(b"Host: a" + b" b" * 8100),
        head(b"Host: " + b"a." * 8100 + b"!"),
        head(*[b"a:"] * 4000, b"\1"),
        head(*[b"host:"] * 2000),
        head(line=b"GET " + b"/ HTTP/1.1" * 1600),
        head(line=b"A" * 16300 + b"\0"),
        head(line=b"GET " + b"a://" * 4000 + b" HTTP/1.0"),
        b"GET / HTTP/1.1\r\n" + b"\r" * 16300,
    ],
    ids=lambda data: repr(data[:12] + data[-12:]),
)
def test_a_head_takes_no_long_time_however_it_is_made(data: bytes) -> None:
    """While it is read, all other clients wait."""
    start = time.process_time()
    assert outcome(data) is not None
    assert time.process_time() - start < 0.1


# Paths


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/a?b=/../c", "/a"),
        ("/?%zz", "/"),
        ("//a///b//", "/a/b/"),
        ("/%61%2Fb", "/a/b"),
        ("/a%2f%2Fb", "/a/b"),
        ("/a%3fb", "/a?b"),
        ("/%c3%A9", "/\xc3\xa9"),
        ("/a%20b+c", "/a b+c"),
        ("/%2561", "/%61"),
        ("/.a/..b/...", "/.a/..b/..."),
        ("/a./b../;.", "/a./b../;."),
        ("/.well-known/x", "/.well-known/x"),
        ("/A;b=c/d", "/A;b=c/d"),
        ("*", "*"),
        ("", ""),
    ],
)
def test_a_path_is_without_query_escapes_and_double_slashes(target: str, path: str) -> None:
    assert plain_path(target) == path


@pytest.mark.parametrize(
    "dots",
    [
        *(".", "..", "%2e", "%2E", ".%2e", "%2e.", "%2E%2e", "..;", ".;a=b", "%2e%2e%3Bx", "..;/"),
        *("..%20", "%09..", "%252e%252e", "..%5ca", "a\\..", "..%00", "%c0%ae%C0%ae", ".%0a.", "a%252Fb", "%7f"),
    ],
)
def test_a_path_with_dots_for_segments_is_refused(dots: str) -> None:
    for form in ("/{}", "/a/{}", "/a/{}/b", "//{}/", "/a%2f{}", "/a/{}%2fb", "/{}?b", "/a//{}//b"):
        with pytest.raises(
            HeadError, match=r"^expected a path that all servers understand in one way, found "
        ) as found:
            plain_path(form.format(dots))
        assert found.value.protocol == "http"


@pytest.mark.parametrize("target", ["/%", "/%a", "/%zz", "/%2", "/%%41", "/%u0041", "/a%?b", "/%-1", "/%+f", "/% 1"])
def test_an_escape_without_its_digits_is_refused(target: str) -> None:
    with pytest.raises(HeadError, match="two hexadecimal digits"):
        plain_path(target)


@given(st.text("/.%2eEfF;?a", max_size=20))
def test_a_path_never_has_a_segment_of_dots_and_stays_plain(text: str) -> None:
    try:
        path = plain_path("/" + text)
    except HeadError:
        return
    assert path.startswith("/")
    assert "//" not in path
    assert not {".", ".."} & {part.partition(";")[0] for part in path.split("/")}
    if not set("%?") & set(path):
        assert plain_path(path) == path


# Whatever comes


def edited(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, size, new in changes:
        at = place % len(data) if data else 0
        data = data[:at] + new + data[at + size :]
    return data or b"G"


BITS = [
    *(
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"/",
        b"@",
        b",",
        b"\x0b",
        b"\x85",
        b"\xff",
        b"HTTP/",
    ),
    *(b"Host: b\r\n", b"\nHost:b", b"http://b/", b"GET ", b"\r\n ", b"%00", b"[::1]", b".", b"HTTP/1.0", b"#", b"POST"),
]


def whatever() -> st.SearchStrategy[bytes]:
    """Heads with some changes."""
    bits = st.sampled_from(BITS) | st.binary(max_size=3)
    edits = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 6), bits), max_size=4)
    return st.builds(edited, st.sampled_from(list(HEADS)), edits)


@given(whatever() | st.binary(min_size=1) | st.lists(st.sampled_from(BITS), min_size=1).map(b"".join))
def test_whatever_comes_is_read_or_refused_and_never_a_crash(data: bytes) -> None:
    found = outcome(data)
    assert found in (None, ERROR) or isinstance(found, Said)
    if found is None:
        assert outcome(data + b"a" * PEEKED) is not None
    if isinstance(found, Said) and found.protocol == "http":
        assert found.name == found.name.lower().removesuffix(".")
        assert set(found.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_[:]")
        assert found.target[:1] in ("/", "*", "")


@given(whatever(), st.integers(1, 200), st.binary(max_size=20) | st.sampled_from(BITS))
def test_what_is_said_of_the_first_bytes_stays_when_more_come(data: bytes, size: int, after: bytes) -> None:
    first = outcome(data[:size])
    if isinstance(first, Said):
        assert outcome(data) == outcome(data + after) == first


@given(whatever(), st.integers(1, 200), st.binary(max_size=20) | st.sampled_from(BITS))
@example(b"POST \0", 6, b"\n")
@example(b"NICK a\rb", 8, b"\r\n")
@example(b"NICK " + b"a" * HEAD_MAX, HEAD_MAX, b"\r\n")
def test_what_is_refused_by_its_first_bytes_is_refused_when_more_come(data: bytes, size: int, after: bytes) -> None:
    if outcome(data[:size]) == ERROR:
        assert outcome(data) == outcome(data + after) == ERROR
