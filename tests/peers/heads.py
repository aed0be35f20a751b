"""Heads of HTTP requests: as clients send them, and as those who want two programs to read them differently do.

The techniques have been published: "Host of Troubles" (Chen and others, CCS 2016: several hosts, blanks before and
after the name, absolute targets); "HTTP Desync Attacks" and "HTTP/1.1 Must Die" (Kettle, 2019 and 2025: lengths, line
ends, folding, names in disguise); "HTTP Request Smuggling in 2020" (Klein: CR in names, versions); T-Reqs (Jabiyev and
others, CCS 2021: first lines); the lists of defparam/smuggler.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

A, B = b"a.example", b"b.example"  # the host that is asked for, and another
HOST = b"Host: " + A
GET = b"GET / HTTP/1.1"


def head(*lines: bytes) -> bytes:
    return b"\r\n".join((*lines, b"", b""))


def valid() -> dict[str, tuple[bytes, str]]:
    """Heads that all programs understand, with the host that they see."""
    found: dict[str, tuple[bytes, str]] = {}
    for client, lines in CLIENTS.items():
        found[client] = head(*lines), "a.example"
    found["HAProxy's health check"] = head(b"OPTIONS / HTTP/1.0"), ""
    for value, name in VALUES.items():
        for line in (GET, b"HEAD /x HTTP/1.1", b"GET /a/b?c=d HTTP/1.0"):
            found[f"Host: {value.decode()} after {line.decode()}"] = head(line, b"Host: " + value), name
    for method in METHODS:
        data = head(method + b" / HTTP/1.1", HOST, b"Content-Length: 0")
        found[f"{method.decode()} as the method"] = data, "a.example"
    for field in FIELDS:
        found[f"{field[:40]!r} after Host"] = head(GET, HOST, field), "a.example"
        found[f"{field[:40]!r} before Host"] = head(GET, field, HOST), "a.example"
    for target in TARGETS:
        found[f"{target[:40]!r} as the target"] = head(b"GET " + target + b" HTTP/1.1", HOST), "a.example"
    return found


CLIENTS = {
    "curl": [GET, HOST, b"User-Agent: curl/7.88.1", b"Accept: */*"],
    "wget": [
        *(GET, HOST, b"User-Agent: Wget/1.21.3", b"Accept: */*", b"Accept-Encoding: identity"),
        b"Connection: Keep-Alive",
    ],
    "Python's requests": [
        *(GET, HOST, b"User-Agent: python-requests/2.31.0", b"Accept-Encoding: gzip, deflate", b"Accept: */*"),
    ],
    "http.client": [GET, HOST, b"Accept-Encoding: identity"],
    "Go": [GET, HOST, b"User-Agent: Go-http-client/1.1", b"Accept-Encoding: gzip"],
    "ab": [b"GET / HTTP/1.0", HOST, b"User-Agent: ApacheBench/2.3", b"Accept: */*"],
    "Firefox": [
        *(b"GET /a?b HTTP/1.1", HOST),
        b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
        *(b"Accept: text/html,*/*;q=0.8", b"Accept-Language: de,en;q=0.5", b"Accept-Encoding: gzip, deflate, br"),
        *(b"DNT: 1", b"Connection: keep-alive", b'Cookie: a=b; c="d"', b"Upgrade-Insecure-Requests: 1"),
        b"Priority: u=0, i",
    ],
    "Chrome": [
        *(GET, HOST, b"Connection: keep-alive", b'sec-ch-ua: "Chromium";v="129", "Not=A?Brand";v="8"'),
        *(b"sec-ch-ua-mobile: ?0", b"User-Agent: Mozilla/5.0 (X11; Linux x86_64) Chrome/129.0"),
        *(b"Sec-Fetch-Site: none", b'If-None-Match: W/"x"'),
    ],
    "a WebSocket": [
        *(b"GET /chat HTTP/1.1", HOST, b"Upgrade: websocket", b"Connection: Upgrade", b"Origin: http://a.example"),
        *(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13"),
    ],
    "an upgrade to HTTP/2": [
        *(GET, HOST, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
    ],
    "curl with a chunked body": [b"POST / HTTP/1.1", HOST, b"Transfer-Encoding: chunked", b"", b"0"],
    "a client of a proxy": [b"GET http://a.example/x HTTP/1.1", HOST, b"Proxy-Connection: keep-alive"],
}

VALUES = {
    A: "a.example",
    b"A.Example": "a.example",
    b"a.example.": "a.example",
    b"a.example:80": "a.example",
    b"a.example:8443": "a.example",
    b"A.EXAMPLE.:65535": "a.example",
    b"localhost": "localhost",
    b"192.0.2.1": "192.0.2.1",
    b"192.0.2.1:8080": "192.0.2.1",
    b"[2001:db8::1]": "[2001:db8::1]",
    b"[2001:DB8::1]:443": "[2001:db8::1]",
    b"[::]": "[::]",
    b"[::ffff:192.0.2.1]:80": "[::ffff:192.0.2.1]",
    b"xn--bcher-kva.example": "xn--bcher-kva.example",
    b"a_b.example": "a_b.example",
    b"-a-.1.example": "-a-.1.example",
    b"x" * 63 + b".example": "x" * 63 + ".example",
    b"1": "1",
}
METHODS = [
    *(b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"PROPFIND", b"MKCOL", b"REPORT", b"PURGE"),
]
FIELDS = [
    *(b"X-Forwarded-Host: b.example", b"X-Host: b.example", b"X-HTTP-Host-Override: b.example"),
    *(b"Forwarded: host=b.example", b"_host: b.example", b"Hosts: b.example", b"Hos: b.example", b"host-: b.example"),
    *(b"x-host:Host: b.example", b"A:", b"A: ", b"A: \t", b"A:b", b"A:\tb", b"A: b \t", b"A: :", b"A: \xe9"),
    *(b"A: \x80\xff", b"!#$%&'*+-.^`|~: b", b"Cookie: " + b"x" * 9000, b"A: Host: b.example", b"A: http://b.example/"),
    *(b"A: b, Host: b.example", b"1: 2", b"Content-Length: 0", b"Connection: close", b"Range: bytes=0-1"),
    b"Authorization: Basic YTpi",
]
TARGETS = [
    *(b"/", b"//", b"/a//b", b"//b.example/", b"/?", b"/?a", b"/?http://b.example/", b"/http://b.example/", b"/a;b=c"),
    *(b"/%61", b"/%2f", b"/@b.example", b"/:80", b"/~a/-._!$&'()*+,;=:@", b"/a?b=c&d=/../e", b"/" + b"x" * 9000),
    *(b"http://a.example", b"http://a.example/", b"http://a.example/?b", b"HTTP://A.Example/"),
]


def doubtful() -> dict[str, list[bytes]]:
    """Heads by technique: each is to be refused, or read as all other programs read it."""
    found: dict[str, list[bytes]] = {}
    for technique, blocks in BLOCKS.items():
        found[technique] = [head(line, block) for line in FIRST for block in blocks]
        found[technique] += [head(GET, b"A: b", block, b"C: d") for block in blocks]
    for technique, lines in LINES.items():
        found[technique] = [head(line, *more) for line in lines for more in ((HOST,), (b"Host: " + B,), ())]
        found[technique] += [line + b"\r\n" for line in lines]
    return {**found, **WHOLE}


def mutated(chance: random.Random, corpus: Sequence[bytes]) -> bytes:
    """A head of the corpus with lines of others in it, and a few bytes changed."""
    data = chance.choice(corpus)
    if chance.random() < 0.5:
        first, _, lines = data.partition(b"\r\n")
        fields = [HOST, *lines.split(b"\r\n"), *chance.choice(corpus).split(b"\r\n")[1:]]
        data = head(first, *chance.sample(fields, chance.randrange(1, len(fields) + 1)))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        start = chance.randrange(len(data) + 1)
        end = start + chance.choice((0, 0, 0, 1, 1, 2, 5, 20))
        new = chance.choice((b"", chance.choice(BITS), bytes((chance.randrange(256),)), data[start:end].swapcase() * 2))
        data = data[:start] + new + data[end:]
    return data or b"G"


BITS = [
    *(
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\r\n ",
        b"\r\n\t",
        b"\0",
        b" ",
        b"\t",
        b"\x0b",
        b"\x0c",
        b"\x85",
        b"\xa0",
        b"\xff",
    ),
    *(
        b":",
        b"/",
        b"//",
        b"@",
        b",",
        b";",
        b"#",
        b"?",
        b"%",
        b".",
        b"[",
        b"]",
        b"*",
        b"-",
        b"_",
        b"\\",
        b"1",
        b"a",
        b"HTTP/",
    ),
    *(
        b"Host: b.example\r\n",
        b"Host: a.example\r\n",
        b"\nHost:b",
        b"\rHost: b",
        b"Host:",
        b"host",
        b"http://b.example/",
    ),
    *(
        b"http://",
        b"://",
        b"GET ",
        b"POST ",
        b"CONNECT ",
        b"OPTIONS ",
        b"a.example",
        b"b.example",
        b":80",
        b" HTTP/1.1",
    ),
    *(b" HTTP/1.0", b"[::1]", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n"),
]

FIRST = [GET, b"GET / HTTP/1.0", b"GET http://a.example/ HTTP/1.1", b"POST / HTTP/1.1\r\nContent-Length: 3"]

# Where Host stands in a head: what stands there instead.
BLOCKS = {
    "obs-fold": [
        *(b"Host:\r\n a.example", b"Host:\r\n\ta.example", b"Host: a.example\r\n b.example"),
        *(b"Host: a.example\r\n\t.b", b"Host: a.example\r\n ", b"Host: a.example\r\n Host: b.example"),
        *(b"A: b\r\n Host: b.example", b" Host: a.example", b"A: b\r\n\tHost: b.example\r\nHost: a.example"),
        *(b"\tHost: a.example", b" A: b\r\nHost: a.example", b"\x0bHost: a", b"Host: a.example\r\n\x0bA: b"),
        *(b"Host: a.example\r\n\x0cA: b", b"Host: a.example\r\n\x85A: b", b" \r\nHost: b"),
    ],
    "blank around the colon": [
        *(b"Host : a.example", b"Host\t: a.example", b"Host  :a.example", b"Host \t: a", b"Host\x0b: a.example"),
        *(b"Host\x0c:a", b"Host : b.example\r\nHost: a.example", b"Host: a.example\r\nHost : b.example"),
        *(b"Host\x00: a.example", b"Host\r: a", b"Host\xa0: a.example", b"Host\x85: b.example\r\nHost: a.example"),
        *(b"Host \r\n: a.example", b"Host:\r\n: a.example"),
    ],
    "blank in the value": [
        *(b"Host:a.example", b"Host:  a.example", b"Host:\ta.example", b"Host: a.example ", b"Host: a.example\t \t"),
        *(b"Host: a b", b"Host: a.example b.example", b"Host: a.example\tb.example", b"Host: a.example\x0b"),
        *(b"Host:\x0ba.example", b"Host:\x0ca", b"Host:\xa0a.example", b"Host:\x85a.example", b"Host:\xc2\xa0a"),
        *(b"Host: a.example\xa0", b"Host: a.example\x85b", b"Host: a.example :80", b"Host: a.example: 80"),
        *(b"Host: a .example", b"Host: a.example\x1fb", b"Host: \x1ca.example"),
    ],
    "several hosts": [
        *(b"Host: a.example\r\nHost: b.example", b"Host: a.example\r\nHost: a.example"),
        *(b"Host: a.example\r\nhost: b.example", b"Host: a.example\r\nHost:", b"Host:\r\nHost: a.example"),
        *(b"Host: a.example\r\nA: b\r\nHOST:b.example", b"Host:\r\nHost:", b"Host: a.example,b.example"),
        *(b"Host: a.example, b.example", b"Host: a.example,", b"Host: ,a.example", b"Host: a;b"),
        *(b"Host: a.example:80\r\nHost: a.example", b"Host: a.example\r\nHost: a.example."),
        b"Host: a.example\r\nHost: A.Example",
    ],
    "no host": [
        *(b"Host:", b"Host: ", b"Host", b"Hos", b"Host=a.example", b"Host; a.example", b"Host a.example"),
        *(b": a.example", b":", b"A: b", b"X-Forwarded-Host: a.example", b"_host: a.example", b"-Host: a.example"),
        *(b"host_: a.example", b"Host.: a", b"H\xc3\xb6st: a.example", b"\xef\xbb\xbfHost: a.example"),
        *(b"Ho\xc5\xbft: a.example", b'"Host": a.example', b"(Host): a", b"Host:Host: a.example"),
        *(b"Host: Host: a.example", b"Ho st: a.example", b"Host\\: a.example", b"[Host]: a", b"H\0ost: a"),
    ],
    "line ends": [
        *(b"Host: a.example\nA: b", b"A: b\nHost: a.example", b"Host: a.example\rA: b", b"A: b\rHost: b.example"),
        *(b"\nHost: a", b"A: b\rHost: b.example\r\nHost: a.example", b"A: b\nHost: b.example\r\nHost: a.example"),
        *(b"Host: a.example\r\r\nA: b", b"Host: a.example\n\r\nA: b", b"Host: a.example\n\nA: b", b"Host: a.example\r"),
        *(b"Host: a.example\n", b"Host:\ra.example", b"Host: a.example\x00", b"Host: a.example\x00b.example"),
        *(b"A: b\x00\r\nHost: a.example", b"\x00\r\nHost: a.example", b"Host:\na.example", b"Host: \na.example"),
        *(b"A: b\x0bHost: b.example", b"A: b\x85Host: b.example", b"A: \r\rHost: b"),
        *(b"A: b\xe2\x80\xa8Host: b.example\r\nHost: a.example", b"Host: a.example\n\rB: c", b"A: b\\r\\nHost: b"),
        b"\r\r\nHost: a",
    ],
    "ports": [
        *(b"Host: a.example:", b"Host: a.example:0", b"Host: a.example:00080", b"Host: a.example:65536"),
        *(b"Host: a.example:99999", b"Host: a.example:100000", b"Host: a.example:x", b"Host: a.example:80x"),
        *(b"Host: a.example:-1", b"Host: a.example:+80", b"Host: a.example:80:81", b"Host: a.example::80"),
        *(b"Host: a.example:b.example", b"Host: :80", b"Host: :", b"Host: 80", b"Host: a.example:80@b.example"),
        *(b"Host: a.example:80/b", b"Host: a.example:80.", b"Host: a.example:\xb2", b"Host: ::"),
    ],
    "userinfo and paths": [
        *(b"Host: a@b.example", b"Host: a.example@b.example", b"Host: @a.example", b"Host: a.example@"),
        *(b"Host: a:b@b.example", b"Host: a.example/", b"Host: a.example/b", b"Host: /a.example", b"Host: //a.example"),
        *(b"Host: http://a.example", b"Host: http://a.example/", b"Host: a.example?b", b"Host: a.example#b.example"),
        *(b"Host: a.example\\b", b"Host: \\a", b"Host: a.example#@b.example", b"Host: a.example/../b", b"Host: ../a"),
        *(b"Host: a.example;b", b"Host: a.example&b"),
    ],
    "escapes and other letters": [
        *(b"Host: %61.example", b"Host: a.example%00", b"Host: a%2eexample", b"Host: a.example%20"),
        *(b"Host: a.example%0d%0aA:b", b"Host: b\xc3\xbccher.example", b"Host: \xff", b"Host: a\xe3\x80\x82example"),
        *(b"Host: a.example\xc2\xad", b"Host: \xe2\x84\xa8", b"Host: a.example\x7f", b"Host: a\x01.example"),
        *(b"Host: a.example\x80", b"Host: a'b", b'Host: "a.example"', b"Host: <a>", b"Host: a.example|b", b"Host: a$b"),
        *(b"Host: a!b", b"Host: a~b", b"Host: a(b)", b"Host: *", b"Host: *.example", b"Host: {}"),
    ],
    "dots": [
        *(b"Host: a.example.", b"Host: a.example..", b"Host: a..example", b"Host: .a.example", b"Host: .", b"Host: .."),
        *(b"Host: a.", b"Host: a.example.:80", b"Host: a.example..:80", b"Host: ...a", b"Host: 1."),
        *(b"Host: a.example.b.", b"Host: -", b"Host: _"),
    ],
    "addresses": [
        *(b"Host: [::1]", b"Host: [::1", b"Host: ::1", b"Host: [::1]]", b"Host: [[::1]]", b"Host: []"),
        *(b"Host: [a.example]", b"Host: [::1]a", b"Host: a[::1]", b"Host: [::1]:", b"Host: [::1]:x"),
        *(b"Host: [::1%25lo]", b"Host: [::1%lo]", b"Host: [::g]", b"Host: [v1.a]", b"Host: [1.2.3.4]", b"Host: [:]"),
        *(b"Host: [::1].", b"Host: [::1].:80", b"Host: [ABCD::]", b"Host: [.:.]", b"Host: 0x7f.1", b"Host: 127.1"),
        *(b"Host: 017700000001", b"Host: 2130706433", b"Host: 1.2.3.4.", b"Host: [::FFFF:1.2.3.4]."),
    ],
    "lengths": [
        *(b"Host: " + b"x" * 64, b"Host: " + b"a." * 127 + b"a", b"Host: " + b"a." * 127),
        *(b"Host: " + b"a." * 126 + b"aa", b"Host: a.example\r\nA: " + b"x" * 16000),
        *(b"Host: a.example\r\nA: " + b"x" * 17000, b"Host:" + b" " * 9000 + A),
        *(b"A: " + b"x" * 16200 + b"\r\nHost: a.example", b"A: b\r\n" * 90 + HOST),
        b"x" * 9000 + b": b\r\nHost: a.example",
    ],
    "body lengths": [
        HOST + b"\r\nContent-Length: 3\r\nTransfer-Encoding: chunked",
        HOST + b"\r\nTransfer-Encoding: chunked\r\nContent-Length: 3",
        *(HOST + b"\r\nContent-Length: 3\r\nContent-Length: 4", HOST + b"\r\nContent-Length: 3, 3"),
        *(HOST + b"\r\nContent-Length: +3", HOST + b"\r\nContent-Length: 0x3", HOST + b"\r\nContent-Length: -1"),
        *(HOST + b"\r\nContent-Length:", HOST + b"\r\nContent-Length: 3 ", HOST + b"\r\nTransfer-Encoding: xchunked"),
        HOST + b"\r\nTransfer-Encoding: chunked, identity",
        HOST + b"\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x",
        *(HOST + b"\r\nTransfer-Encoding:\x0bchunked", HOST + b"\r\nTransfer-Encoding : chunked"),
        *(HOST + b'\r\nTransfer-Encoding: "chunked"', HOST + b"\r\nX: X\nTransfer-Encoding: chunked"),
        *(HOST + b"\r\nExpect: 100-continue\r\nContent-Length: 3", HOST + b"\r\nConnection: Host"),
        *(HOST + b"\r\nConnection: close, Host", HOST + b"\r\nUpgrade: h2c\r\nConnection: upgrade"),
    ],
}

# First lines, before one Host or another or none.
LINES = {
    "absolute targets": [
        *(b"GET http://a.example/ HTTP/1.1", b"GET http://b.example/ HTTP/1.1", b"GET http://a.example/ HTTP/1.0"),
        *(b"GET http://a.example HTTP/1.1", b"GET https://a.example/ HTTP/1.1", b"GET ftp://a.example/ HTTP/1.1"),
        *(b"GET ws://a.example/ HTTP/1.1", b"GET x://a.example/ HTTP/1.1", b"GET HTTP://A.EXAMPLE/ HTTP/1.1"),
        *(b"GET http://a.example:80/ HTTP/1.1", b"GET http://a.example:81/ HTTP/1.1"),
        *(b"GET http://a.example./ HTTP/1.1", b"GET http://a@a.example/ HTTP/1.1"),
        *(b"GET http://a.example@b.example/ HTTP/1.1", b"GET http://b.example@a.example/ HTTP/1.1"),
        *(b"GET http:///a HTTP/1.1", b"GET http:// HTTP/1.1", b"GET http:/a.example/ HTTP/1.1"),
        *(b"GET http:a.example HTTP/1.1", b"GET http:\\\\a HTTP/1.1", b"GET http://a.example?b HTTP/1.1"),
        *(b"GET http://a.example#b HTTP/1.1", b"GET http://a.example\\@b.example/ HTTP/1.1"),
        *(b"GET a.example/ HTTP/1.1", b"GET //a.example/ HTTP/1.1", b"GET http://[::1]/ HTTP/1.1"),
        *(b"GET http://a.example%2f@b/ HTTP/1.1", b"GET http://a.example;b/ HTTP/1.1"),
        *(b"GET x-y+z.1://a.example/ HTTP/1.1", b"GET 1x://a.example/ HTTP/1.1", b"GET ://a.example/ HTTP/1.1"),
        *(b"GET http://a.example/http://b.example/ HTTP/1.1", b"GET http://a.example:/ HTTP/1.1"),
        *(b"GET http://a.example:99999/ HTTP/1.1", b"GET http://a.example:x/ HTTP/1.1", b"GET http://a_b/ HTTP/1.0"),
        *(b"OPTIONS http://a.example HTTP/1.1", b"GET *://a.example HTTP/1.1"),
        b"GET http://a.example/ http://b.example/ HTTP/1.1",
    ],
    "CONNECT and *": [
        *(b"CONNECT a.example:443 HTTP/1.1", b"CONNECT b.example:443 HTTP/1.1", b"CONNECT a.example HTTP/1.1"),
        *(b"CONNECT / HTTP/1.1", b"CONNECT a.example:443 HTTP/1.0", b"CONNECT http://a.example/ HTTP/1.1"),
        *(b"CONNECT a@a.example:443 HTTP/1.1", b"CONNECT * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"OPTIONS * HTTP/1.0"),
        *(b"GET * HTTP/1.1", b"options * HTTP/1.1", b"OPTIONS *a HTTP/1.1", b"GET ? HTTP/1.1"),
    ],
    "versions": [
        *(b"GET / HTTP/0.9", b"GET / HTTP/1.2", b"GET / HTTP/1.9", b"GET / HTTP/2.0", b"GET / HTTP/2"),
        *(b"GET / HTTP/3.0", b"GET / HTTP/1", b"GET / HTTP/1.", b"GET / HTTP/.1", b"GET / HTTP/1.10"),
        *(b"GET / HTTP/01.1", b"GET / HTTP/11.1", b"GET / HTTP/1.1.1", b"GET / HTTP/1,1", b"GET / http/1.1"),
        *(b"GET / Http/1.1", b"POST / http/1.1", b"GET / HTTP/ 1.1", b"GET / HTTP /1.1", b"GET / HTTP/-1.1"),
        *(b"GET / HTTPS/1.1", b"GET / RTSP/1.0", b"GET / XTTP/1.1", b"POST / XHTTP/1.1", b"GET / HTTP/1.1HTTP/1.1"),
        *(b"GET / HTTP/1.\xb1", b"GET / HTTP\\1.1", b"POST / HTTP/1.9"),
    ],
    "HTTP/0.9": [
        *(b"GET /", b"GET / ", b"GET", b"GET ", b"POST /", b"HEAD /", b"get /", b"GET http://a.example/"),
        *(b"GET a.example", b"GET /\t", b"GET /  ", b"", b"/", b"GET\t/", b"CONNECT a.example:443", b"GET /#HTTP/1.1"),
        *(b"GET /\rHTTP/1.1", b"DELETE / ", b"GET /?HTTP/1.1"),
    ],
    "blanks in the first line": [
        *(b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET / HTTP/1.1 ", b" GET / HTTP/1.1", b"GET\t/ HTTP/1.1"),
        *(b"GET /\tHTTP/1.1", b"GET / HTTP/1.1\t", b"\tGET / HTTP/1.1", b"GET /a b HTTP/1.1"),
        *(b"GET / HTTP/1.1 HTTP/1.1", b"GET / HTTP/1.1 x", b"GET\x0b/ HTTP/1.1", b"GET /\x0cHTTP/1.1"),
        *(b"POST\t/ HTTP/1.1", b"GET\xa0/ HTTP/1.1", b"GET / \tHTTP/1.1", b"GET HTTP/1.1", b"GET  HTTP/1.1"),
        *(b"GET /\x00 HTTP/1.1", b"GET /\xa0HTTP/1.1", b"GET / HTTP/1.1\x0b", b"POST  / HTTP/1.1"),
    ],
    "line ends in the first line": [
        *(b"GET / HTTP/1.1\r", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\nHost: b.example"),
        *(b"GET / HTTP/1.1\rHost: b.example", b"GET /\r HTTP/1.1", b"GET /\n HTTP/1.1", b"GET\r/ HTTP/1.1"),
        *(b"GET /\r\n HTTP/1.1", b"POST /\nGET / HTTP/1.1", b"POST /\r\nGET / HTTP/1.1", b"POST / HTTP/1.1\n"),
        *(b"GET /\n", b"GET /\nHost: b.example", b"\r\nGET / HTTP/1.1", b"\nGET / HTTP/1.1", b"\rGET / HTTP/1.1"),
        *(b"\r\n\r\nGET / HTTP/1.1", b"\r\nPOST /\r\nGET / HTTP/1.1", b"X\r\nGET / HTTP/1.1", b"X\nGET / HTTP/1.1"),
        *(b"\x00GET / HTTP/1.1", b"GET\x00 / HTTP/1.1", b"\xef\xbb\xbfGET / HTTP/1.1", b"POST \x00\r\nGET / HTTP/1.1"),
        *(b"A\rGET / HTTP/1.1", b"A \rGET / HTTP/1.1", b"A B\rGET / HTTP/1.1"),
    ],
    "methods": [
        *(b"get / HTTP/1.1", b"Get / HTTP/1.1", b"GETS / HTTP/1.1", b"G / HTTP/1.1", b"X-Y / HTTP/1.1"),
        *(b"GET! / HTTP/1.1", b"G_T / HTTP/1.1", b"TRACE / HTTP/1.1", b"GET: / HTTP/1.1", b"G(T / HTTP/1.1"),
        *(b"G\xc3\x89T / HTTP/1.1", b"GET, / HTTP/1.1", b"HTTP/1.1 200 OK", b"PRI * HTTP/2.0", b"1 / HTTP/1.1"),
        *(b"X" * 300 + b" / HTTP/1.1", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2", b"NICK a", b"EHLO a.example", b"PING"),
        *(b"*1", b"Host: a.example", b"A: b", b"[GET] / HTTP/1.1", b'"GET" / HTTP/1.1'),
    ],
    "targets": [
        *(b"GET a HTTP/1.1", b"GET ?a HTTP/1.1", b"GET #a HTTP/1.1", b"GET /#a HTTP/1.1", b"GET /\xff HTTP/1.1"),
        *(b"GET /\x7f HTTP/1.1", b"GET \\ HTTP/1.1", b"GET %2f HTTP/1.1", b"GET /%zz HTTP/1.1", b"GET /%00 HTTP/1.1"),
        *(b"GET /../.. HTTP/1.1", b'GET /<>"{}|\\^` HTTP/1.1', b"GET /[] HTTP/1.1", b"GET /\x01 HTTP/1.1"),
        *(b"GET @b.example/ HTTP/1.1", b"GET /" + b"x" * 15000 + b" HTTP/1.1", b"GET /" + b"x" * 17000 + b" HTTP/1.1"),
        *(b"GET mailto:a HTTP/1.1", b"GET .a HTTP/1.1", b"GET ;a HTTP/1.1", b"GET :80 HTTP/1.1"),
    ],
}

CURL = head(*CLIENTS["curl"])
ENDS = (b"\n", b"\r", b"\r\r\n", b"\n\r", b"\0\r\n", b" \r\n")

# Each byte that may not be in a name.
OTHERS = sorted({*range(256)} - {*(string.ascii_letters + string.digits).encode()})
IN_HOST = (b"Host: a%cexample", b"Host%c: a", b"%cHost: a", b"Host: a.example%c")
IN_FIRST = (
    *(b"GET%c/ HTTP/1.1", b"GET /%cHTTP/1.1", b"GET / HTTP/1.1%c", b"%cGET / HTTP/1.1"),
    *(b"POST%c/ HTTP/1.1", b"POST /%c HTTP/1.1"),
)

WHOLE = {
    "line ends of the whole head": [
        *[CURL.replace(b"\r\n", end, count) for end in ENDS for count in (-1, 1, 2)],
        *[CURL[:-2] + end for end in (b"", *ENDS)],
    ],
    "each byte in Host": [head(GET, field % byte) for byte in OTHERS for field in IN_HOST],
    "each byte in the first line": [head(line % byte, HOST) for byte in OTHERS for line in IN_FIRST],
}
