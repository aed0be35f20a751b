"""The head of an HTTP/1 request: which host a client wants, and what it asks for there. And the preface of HTTP/2.

Only looked at, and read strictly: a head that two programs might understand in two ways is an error, so that the
backend sees the same host. Sources: RFC 9112 (HTTP/1.1), 2.2, 3, 5; RFC 9110, 5.5 and 5.6.2 (fields, tokens); RFC 3986;
RFC 9113, 3.4 (the preface).
"""

import re
from functools import lru_cache

from rspd.protocols.first import HEAD_MAX, HOST, UNKNOWN, HeadError, Said, pattern, plain_name

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"

# A first line of HTTP as far as it has come: a method, and what some server takes for a blank after it. Or what some
# servers skip before it, as empty lines (RFC 9112, 2.2).
METHOD_MAX = 256
_BEGUN = rb"[\t-\r ]|" + _TOKEN[:-1] + rb"{1,256}(?:[\t\v\f ]|\Z)"
_LONG = _TOKEN[:-1] + rb"{257}"
_REQUEST = rb"(" + _TOKEN[:-1] + rb"{1,256}) ([!\"$-~]+) HTTP/1\.([01])\r\n"  # no #: a fragment is not sent
_FIELDS = rb"(?:" + _TOKEN + rb":[\t -~\x80-\xff]*\r\n)*\r\n"
_FIELD = _TOKEN + rb":[\t -~\x80-\xff]*\r"
_HOST_FIELD = b"\nhost:"  # in small letters
_AUTHORITY = rb"(" + HOST + rb")(?::[0-9]{0,5})?"
# RFC 9112, 3.2, and a zone as in RFC 6874, of a link-local address.
_NAMELESS = rb"(?:\[[0-9A-Fa-f:.]{2,45}%[0-9A-Za-z._~%-]{1,64}\](?::[0-9]{0,5})?)?"
_ABSOLUTE = rb"(?i)[a-z][a-z0-9+.-]*://([^/?]*)(.*)"

# A line end that is none, or a null byte, as far as the head has come. Some servers take a bare LF for a line end.
_BARE = rb"(?<!\r)\n|\r(?![\n])(?!\Z)|\0"

# In a decoded path: control characters, backslashes, escapes in escapes, and longer forms of UTF-8 than there are.
_DOUBTFUL = r"[\0-\x1f\x7f\\\xc0\xc1]|%(?:2[EeFf]|5[Cc])"

_ESCAPE = "%([0-9A-Fa-f]{2})?"


def read_preface(data: bytes, _: int = 0) -> Said | None:
    """Whether a client speaks HTTP/2 without TLS; as for a reader."""
    if data.startswith(PREFACE):
        return Said("http2")
    return None if PREFACE.startswith(data) else UNKNOWN


def read(data: bytes, seen: int = 0, relayed: bool = True) -> Said | None:
    """What the head of a request says; as for a reader.

    relayed: whether a backend gets the request too. If not, Host may also be empty or have a zone, which count as no
    name: nobody can take it for another one.

    A text that is no head, as of another protocol, is UNKNOWN: its first line does not begin with GET, and has no
    `HTTP/`. Neither nginx nor HAProxy takes it for a request with a host.
    """
    if not seen and data[0] in b"\t\n\v\f\r ":
        raise HeadError("http", "expected `METHOD TARGET HTTP/1.1`, found an empty line or a blank")
    line_end = data.find(b"\n", 0, HEAD_MAX) + 1
    if not line_end:
        return _begun(data)
    fresh = line_end > seen or data.startswith(b"PRI ")
    request = pattern(_REQUEST).match(data) if fresh else None
    if fresh and not request:
        return _other(data, line_end)
    end = data.find(b"\r\n\r\n", max(line_end - 2, seen - 3), HEAD_MAX)
    if end < 0:
        if bare := pattern(_BARE).search(data, max(line_end, seen - 1)):
            raise HeadError("http", f"expected CRLF at the end of each line, found {_around(data, bare.start())}")
        return _incomplete(data)
    head = data[: end + 4]
    if not pattern(_FIELDS).fullmatch(head, line_end):
        raise _wrong_field(head[line_end:])
    request = request or pattern(_REQUEST).match(data)
    assert request
    method, target, minor = request.groups()
    return _said(method.decode(), target, _host(head, minor == b"1", relayed))


def _begun(data: bytes) -> Said | None:
    """The verdict of a first line that has not ended."""
    if not pattern(_BEGUN).match(data):
        if pattern(_LONG).match(data):
            raise HeadError("http", f"expected a method, found more than {METHOD_MAX} letters")
        return UNKNOWN
    return _incomplete(data)


def _other(data: bytes, line_end: int) -> Said | None:
    """The verdict of a first line that is no request."""
    if data.startswith(PREFACE):
        return UNKNOWN  # nobody has asked for it
    if PREFACE.startswith(data):
        return None
    looks = pattern(_BEGUN).match(data) or pattern(_LONG).match(data)
    if looks and (b"HTTP/" in data[:line_end] or data.startswith(b"GET")):
        raise HeadError("http", f"expected `METHOD TARGET HTTP/1.1` and CRLF, found {_shown(data[:line_end])}")
    return UNKNOWN


def _incomplete(data: bytes) -> Said | None:
    if len(data) >= HEAD_MAX:
        raise HeadError("http", f"expected the end of the head within {HEAD_MAX} bytes, found none")
    return None


def _host(head: bytes, needed: bool, relayed: bool) -> str:
    """The name in the Host field; empty if there is no such field. needed: whether there has to be one. See `read`."""
    small = head.lower()
    place = small.find(_HOST_FIELD)
    if place < 0:
        if needed:
            raise HeadError("http", "expected one Host, found none")
        return ""
    if small.find(_HOST_FIELD, place + 1) >= 0:
        raise HeadError("http", f"expected one Host, found {small.count(_HOST_FIELD)}")
    authority = head[place + len(_HOST_FIELD) : head.index(b"\r", place)].strip(b" \t")
    return "" if not relayed and pattern(_NAMELESS).fullmatch(authority) else _name(authority, "Host")


@lru_cache(1024)  # clients ask for the same few again and again
def _name(authority: bytes, where: str) -> str:
    match = pattern(_AUTHORITY).fullmatch(authority)
    if not match:
        raise HeadError("http", f"expected HOST or HOST:PORT in {where}, found {_shown(authority)}")
    try:
        return plain_name(match[1])
    except ValueError as error:
        raise HeadError("http", f"{where}: {error}") from None


def _said(method: str, target: bytes, host: str) -> Said:
    """RFC 9112, 3.2: the four forms of a target. Two of them name the host again."""
    path = target.decode("ascii")
    if path[0] == "/" or (path == "*" and method == "OPTIONS"):
        return Said("http", host, (), path, method)
    absolute = pattern(_ABSOLUTE).fullmatch(target)
    if absolute:
        name = _name(absolute[1], "the target")
        path = absolute[2].decode("ascii")
        path = path if path.startswith("/") else f"/{path}"
    elif method == "CONNECT":
        name, path = _name(target, "the target"), ""
    else:
        raise HeadError("http", f"expected a target that begins with /, found {_shown(target)}")
    if host != name:
        # HTTP/1.0 may have no Host, and then not each server looks at the target.
        found = f"{name!r} and {host!r}" if host else "no Host"
        raise HeadError("http", f"expected the same host in target and Host, found {found}")
    return Said("http", name, (), path, method)


def plain_path(target: str) -> str:
    """The path of a target as paths are compared: without query, escapes decoded, several slashes as one.

    Raises HeadError if it has segments `.` or `..`, in whatever way some server may read them: some resolve them, and
    others do not. Clients resolve them before they ask (RFC 3986, 5.2.4).
    """
    path = target.partition("?")[0]
    if "%" in path or "//" in path:
        path = re.sub("/+", "/", pattern(_ESCAPE).sub(_decoded, path))
    dots = "/." in path and any(part.partition(";")[0].strip() in (".", "..") for part in path.split("/"))
    if dots or pattern(_DOUBTFUL).search(path):
        raise HeadError("http", f"expected a path that all servers understand in one way, found {target[:80]!r}")
    return path


def _decoded(escape: re.Match[str]) -> str:
    if not escape[1]:
        raise HeadError("http", "expected two hexadecimal digits after each %, found others")
    return chr(int(escape[1], 16))


def _wrong_field(fields: bytes) -> HeadError:
    line = next((line for line in fields.split(b"\n") if not pattern(_FIELD).fullmatch(line)), b"")
    return HeadError("http", f"expected `NAME: VALUE` and CRLF, found {_shown(line)}")


def _around(data: bytes, place: int) -> str:
    return _shown(data[max(0, place - 20) : place + 20])


def _shown(data: bytes) -> str:
    return f"{data[:80]!r}"
