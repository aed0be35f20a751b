"""The keys of routes and of pools with a name, and what is wrong between the routes of a proxy."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import product
from socket import AF_INET6, inet_ntop, inet_pton
from typing import Any

from rspd.config import values
from rspd.config.pools import POOL_KEYS
from rspd.config.schema import Draft, Many, Report, Scalar, Table, read_keys
from rspd.config.yamlfile import Value
from rspd.net.networks import parse_network
from rspd.settings import ErrorPage, NamedPool, ProxyConfig, RouteConfig

PROTOCOLS = ("tls", "http", "http2", "ssh", "silent")

# Bytes of an error page.
PAGE_MAX = 1 << 16

# Letters that older and newer rules (IDNA 2003, 2008) write in two ways.
AMBIGUOUS = frozenset("ßẞς\u200c\u200d")

NAME = r"[0-9a-z_-]{1,63}(\.[0-9a-z_-]{1,63})*|\[[0-9a-f:.]{2,45}\]"

NETWORK = Scalar(values.listed(parse_network, "a network"), "a network")


def parse_name(text: str) -> str:
    """The name of a server as names are compared; `*.` may stand before it. Raises ValueError."""
    star, name = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    expected = f"expected a name, as example.org or *.example.org, found {text!r}"
    if not AMBIGUOUS.isdisjoint(name):
        raise ValueError(f"{expected}; write its xn-- form, browsers show it")
    try:
        name = (name if name.isascii() else name.encode("idna").decode("ascii")).lower().removesuffix(".")
    except UnicodeError:
        name = ""
    if not re.fullmatch(NAME, name) or len(name) > 253:
        advice = ""
        if match := re.fullmatch(r"(?:\w+://)?([\w.*-]+\w)(?::\d+)?(?:/.*)?", text):
            advice = f"; write {match[1]} alone" if match[1] != text else ""
        if text in ("*", "*."):
            advice = "; for all names, leave this key out"
        elif "*" in text and not advice:
            advice = "; * stands for whole labels at the beginning"
        raise ValueError(f"{expected}{advice}")
    return star + (_plain_ipv6(name) if name.startswith("[") and not star else name)


def _plain_ipv6(name: str) -> str:
    """An IPv6 address in brackets in its usual form. Raises ValueError."""
    try:
        return f"[{inet_ntop(AF_INET6, inet_pton(AF_INET6, name[1:-1]))}]"
    except OSError:
        raise ValueError(f"expected an IPv6 address between the brackets, found {name!r}") from None


def _parse_path(text: str) -> str:
    if not re.fullmatch(r"/[!-~]*", text) or re.search(r"[?#%\\]|//|/\.\.?(;|/|$)", text):
        raise ValueError(f"expected a path that begins with /, as /api, without ?, #, % and dots alone, found {text!r}")
    return text


def _parse_page(text: str) -> tuple[str, bytes]:
    """A file, and what is in it."""
    if not text.startswith("/"):
        raise ValueError(f"expected a file that begins with /, found {text!r}")
    try:
        # Without blocking: it may be a pipe.
        with open(os.open(text, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read(PAGE_MAX + 1) if regular else b""
    except OSError as error:
        raise ValueError(f"{text} cannot be read: {error.strerror}") from None
    except ValueError:  # a null byte
        raise ValueError(f"expected a file, found {text!r}") from None
    if not regular:
        raise ValueError(f"expected a file, {text} is something else")
    if len(content) > PAGE_MAX:
        raise ValueError(f"expected a page of at most {PAGE_MAX} bytes, {text} has more")
    return text, content


def _pages(**pages: tuple[str, bytes]) -> tuple[ErrorPage, ...]:
    return tuple(ErrorPage(int(status), *page) for status, page in sorted(pages.items()))


_PAGES = "a mapping, as {503: /etc/rspd/503.html}, or off"


def _no_pages(text: str) -> tuple[ErrorPage, ...]:
    raise ValueError(f"expected {_PAGES}, found {text!r}")


_PAGE = Scalar(_parse_page, "a file")
ERROR_PAGES = Table(
    dict.fromkeys(("400", "404", "408", "502", "503", "504"), _PAGE),
    _pages,
    values.unless(values.OFF, (), _no_pages),
    _PAGES,
)


def _many(parse: Any, noun: str) -> Many:
    return Many(Scalar(parse, f"a {noun}"), noun)


MATCH_KEYS: Mapping[str, Scalar] = {
    "server_name": _many(values.listed(parse_name, "a name"), "name"),
    "alpn": _many(values.matching(r"[!-+\--~]+", "a protocol of ALPN, as h2 or imap"), "protocol"),
    "host": _many(values.listed(parse_name, "a name"), "name"),
    "path": _many(_parse_path, "path"),
    "protocol": _many(values.one_of(PROTOCOLS), "protocol"),
    "from": Many(NETWORK, "network"),
}

# How a connection goes on once it has its backend.
RELAY_KEYS: Mapping[str, Scalar] = {
    "idle_timeout": Scalar(values.parse_duration),
    "half_close": Scalar(lambda text: values.parse_switch(text, "on or off")),
    "half_close_timeout": Scalar(values.parse_duration),
}

ROUTE_KEYS: Mapping[str, Scalar] = {
    **MATCH_KEYS,
    "pool": Scalar(values.matching(r"[A-Za-z0-9_.-]{1,64}", "the name of a pool")),
    **POOL_KEYS,
    **RELAY_KEYS,
}

# Of which protocol each key is.
_KINDS = {"server_name": "tls", "alpn": "tls", "host": "http", "path": "http"}


_ROUTE = "a route, as {server_name: example.org, backend: 10.0.0.1:443}"


def _no_route(text: str) -> Any:
    raise ValueError(f"expected {_ROUTE}, found {text!r}")


class Route(Scalar):
    """One route. It is read as a Draft."""

    def __init__(self) -> None:
        super().__init__(_no_route, _ROUTE)

    def holds(self, key: str) -> bool:
        """Whether it is a key of a route."""
        return key in ROUTE_KEYS

    def read(self, value: Value, key: str, report: Report, expected: str = "") -> Any:
        """The same for a mapping."""
        if value.entries is None:
            return super().read(value, key, report, expected)
        draft = Draft("", value.line, read_keys(ROUTE_KEYS, value.entries, f"{key}.", report), key)
        said = draft.settings.values
        if not {"pool", "backends"} & (draft.settings.seen.keys() | draft.settings.meant):
            report.add(value.line, key, "missing, expected a backend or a pool to lead to")
        for name in POOL_KEYS if "pool" in said else ():
            if name in said:
                entry = draft.settings.seen[name]
                report.add(entry.line, f"{key}.{entry.key}", "cannot stand beside pool; write it in that pool")
        kinds = {kind: name for name, kind in _KINDS.items() if name in said}
        if len(kinds) > 1:
            what = f"can never match, {kinds['tls']} is of TLS and {kinds['http']} of HTTP"
            report.add(value.line, key, what)
        for protocol in said.get("protocol") or ():
            if kinds and protocol not in kinds:
                what = f"{protocol} can never match beside {next(iter(kinds.values()))}"
                report.add(draft.line_of("protocol"), f"{key}.protocol", what)
        return draft


def make_pools(drafts: Sequence[Draft], base: Mapping[str, Any], report: Report) -> tuple[NamedPool, ...]:
    """The pools of these names. base: what they go by if they do not say otherwise."""
    made = []
    for draft in drafts:
        if "backends" not in draft.settings.seen.keys() | draft.settings.meant:
            report.add(draft.line, f"{draft.prefix}backend", "missing, expected an address to relay to")
        said = {"backends": (), **base, **draft.settings.values}
        settings = {name: said[name] for name in POOL_KEYS if name in said}
        made.append(NamedPool(draft.name, ProxyConfig((), **settings)))
    return tuple(made)


def make_routes(
    drafts: Sequence[Draft], base: Mapping[str, Any], pools: Collection[str], report: Report
) -> tuple[RouteConfig, ...]:
    """The routes of a proxy. base: what they go by if they do not say otherwise. pools: the names that there are."""
    made: list[RouteConfig] = []
    taken: set[str] = set()
    for draft in drafts:
        said = dict(draft.settings.values)
        matches = {name: said.pop(name) for name in MATCH_KEYS if name in said}
        pool = said.pop("pool", "")
        if pool and pool not in pools:
            meant = values.closest(pool, pools)
            advice = f"; did you mean {meant}?" if meant else f"; there are {', '.join(pools) or 'none'}"
            report.add(draft.line_of("pool"), f"{draft.prefix}pool", f"no such pool: {pool}{advice}")
        name = _name(matches, taken)
        taken.add(name)
        networks = matches.pop("from", ())
        settings = ProxyConfig(**{**base, **said})
        made.append(RouteConfig(name, settings, **matches, networks=networks, pool=pool))
    before: dict[tuple[str, str], list[tuple[RouteConfig, int | None]]] = {}
    for draft, route in zip(drafts, made, strict=True):
        for what in _hidden(route, before):
            report.add(draft.line, draft.key, what)
        for place in _places(route):
            before.setdefault(place, []).append((route, draft.line))
    return tuple(made)


def _name(matches: Mapping[str, Sequence[object]], taken: Collection[str]) -> str:
    """What a route is called: what it says of a client, of each list the first one."""
    shown = {key: f"{items[0]}" + (f"+{len(items) - 1}" if len(items) > 1 else "") for key, items in matches.items()}
    path = shown.pop("path", "")
    place = shown.pop("host", "") + path
    name = ",".join(part for part in (shown.pop("server_name", ""), place, *shown.values()) if part) or "default"
    numbers = (f"{name}#{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(other for other in numbers if other not in taken)


def _places(route: RouteConfig) -> Iterable[tuple[str, str]]:
    """Each name of a route, with each path; what it does not ask for is empty."""
    return product(route.server_name or route.host or ("",), route.path or ("",))


def _hidden(
    route: RouteConfig, before: Mapping[tuple[str, str], Sequence[tuple[RouteConfig, int | None]]]
) -> Iterator[str]:
    """What of a route can never match, since routes before it take all these clients.

    before: by name and path, these routes and their lines.
    """
    for name, path in _places(route):
        for other, line in before.get((name, path), ()):
            if _covers(other, route):
                verdict = "says the same as" if _covers(route, other) else "can never match, all is for"
                yield f"{name}{path} {verdict} the route in line {line}".lstrip()
                break


def _covers(other: RouteConfig, route: RouteConfig) -> bool:
    """Whether one route takes each client of another, as far as neither names nor paths matter."""
    return (
        (not other.protocols or (bool(route.protocols) and route.protocols <= other.protocols))
        and (not other.alpn or (bool(route.alpn) and {*route.alpn} <= {*other.alpn}))
        and (
            not other.networks
            or (bool(route.networks) and all(any(a.holds(b) for a in other.networks) for b in route.networks))
        )
    )
