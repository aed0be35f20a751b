"""The keys of the configuration file: what each takes, and how file and command line become settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any

from rspd.config import values
from rspd.config.addresses import DIALLED, parse_address, parse_backend, parse_target
from rspd.config.schema import USUAL, Many, Report, Scalar, Settings, Table, read_keys
from rspd.config.yamlfile import Value, read_entries
from rspd.errors import ConfigError
from rspd.log import LEVELS
from rspd.net.address import Address, contradictions, covers, own_listeners
from rspd.net.networks import parse_network
from rspd.settings import BALANCES, BackendConfig, Config, HealthConfig, ProxyConfig

CONNECTIONS_MAX = 1_000_000

_parse_limit = values.unless(values.OFF, inf, values.whole_number(1, CONNECTIONS_MAX, "off"))


def _parse_health(text: str) -> HealthConfig | None:
    """What `health` means if its value is no mapping."""
    on = values.parse_switch(text, "a mapping, as {http: /health}, or on or off")
    return HealthConfig() if on else None


def _parse_backend_health(text: str) -> HealthConfig | str:
    """The same in a backend. If there is no `health` at all, the proxy's counts; `off` is a word of its own then."""
    return _parse_health(text) or values.OFF[0]


def _check_health(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("send", "expect") if "http" in settings else ("host", "status"):
        if key in settings:
            yield key, "cannot stand beside http" if "http" in settings else "needs http beside it"
    address = settings.get("address")
    if "port" in settings and address and (address.port or address.path):
        advice = "which has a port" if address.port else "a unix socket has no port"
        yield "port", f"cannot stand beside address {address}, {advice}"


def _check_backend(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    health, address = settings.get("health"), settings.get("address")
    if isinstance(health, HealthConfig) and address and _lacks_port(health, address):
        yield "health", f"{address} is a unix socket, which has no port; write address: HOST:PORT, or health: on"


def _lacks_port(health: HealthConfig, backend: Address) -> bool:
    """Whether a check would ask a port of a unix socket, or a host at the port of one."""
    if health.address:
        return not (health.target(backend).port or health.address.path)
    return bool(health.port and backend.path)


HEALTH_KEYS: Mapping[str, Scalar] = {
    "interval": Scalar(values.parse_finite_duration),
    "timeout": Scalar(values.parse_finite_duration),
    "rise": Scalar(values.whole_number(1, 100)),
    "fall": Scalar(values.whole_number(1, 100)),
    "port": Scalar(values.whole_number(1, 65535)),
    "address": Scalar(parse_target),
    "http": Scalar(values.matching(r"/[!-~]*", "a path that begins with /, without spaces, as /health")),
    "host": Scalar(values.matching(r"[!-~]+", "a host, as www.example.org")),
    "status": Many(Scalar(values.parse_status, "a status"), "status", separator=","),
    "send": Scalar(values.parse_bytes),
    "expect": Scalar(values.parse_bytes),
}

_MAX_FAILS = Scalar(values.unless(values.OFF, inf, values.whole_number(1, 1000, "off")))
_FAIL_TIMEOUT = Scalar(values.parse_finite_duration)

BACKEND_KEYS: Mapping[str, Scalar] = {
    "address": Scalar(parse_backend),
    "weight": Scalar(values.whole_number(1, 1000)),
    "backup": Scalar(values.parse_switch),
    "max_connections": Scalar(_parse_limit),
    "max_fails": _MAX_FAILS,
    "fail_timeout": _FAIL_TIMEOUT,
    "health": Table(HEALTH_KEYS, HealthConfig, _parse_backend_health, "a mapping, on or off", check=_check_health),
}

_BACKEND = Table(
    BACKEND_KEYS,
    BackendConfig,
    values.listed(lambda text: BackendConfig(parse_backend(text)), "a backend"),
    "an address or a mapping",
    required={"address": DIALLED},
    check=_check_backend,
)
_NETWORK = Scalar(values.listed(parse_network, "a network"), "a network")

# In the order of rspd.yaml(5).
PROXY_KEYS: Mapping[str, Scalar] = {
    "listen": Many(Scalar(values.listed(parse_address, "an address"), "an address"), "address"),
    "backends": Many(_BACKEND, "backend"),
    "max_connections": Scalar(values.whole_number(1, CONNECTIONS_MAX)),
    # The most that listen(2) takes is an int; net.core.somaxconn lowers it.
    "backlog": Scalar(values.whole_number(1, 2**31 - 1)),
    "reuse_port": Scalar(values.parse_switch),
    "balance": Scalar(values.one_of(BALANCES)),
    "resolve": Scalar(values.one_of(("one", "each"))),
    "resolve_interval": Scalar(values.parse_finite_duration),
    "connect_timeout": Scalar(values.parse_duration),
    "retries": Scalar(values.unless(("all",), inf, values.whole_number(0, 1000, "all"))),
    "max_fails": _MAX_FAILS,
    "fail_timeout": _FAIL_TIMEOUT,
    "queue_timeout": Scalar(values.parse_wait),
    "health": Table(HEALTH_KEYS, HealthConfig, _parse_health, "a mapping, on or off", check=_check_health),
    "on_down": Scalar(values.one_of(("keep", "abort"))),
    "idle_timeout": Scalar(values.parse_duration),
    "half_close": Scalar(lambda text: values.parse_switch(text, "on or off")),
    "half_close_timeout": Scalar(values.parse_duration),
    "drain_timeout": Scalar(values.parse_duration),
    "allow": Many(_NETWORK, "network", none=("all",)),
    "deny": Many(_NETWORK, "network", none=values.OFF),
    "max_connections_per_client": Scalar(_parse_limit),
    "send_proxy": Scalar(values.unless(values.OFF, "", values.one_of(("v1", "v2", "off")))),
    "accept_proxy": Many(_NETWORK, "network", none=values.OFF),
    "accept_proxy_timeout": Scalar(values.parse_finite_duration),
}

GENERAL_KEYS: Mapping[str, Scalar] = {
    "exit_idle_time": Scalar(values.parse_duration),
    "handover": Scalar(lambda text: values.parse_switch(text, "on or off")),
    "log_level": Scalar(values.one_of(LEVELS)),
}

# Keys that are for all proxies, at the top of the file. Then keys that each proxy has of its own, and what each is for.
_ABOVE = dict.fromkeys(GENERAL_KEYS, "belongs to the top of the file, it is for all proxies")
_OWN = {"listen": "listen on", "backends": "relay to"}


class _Draft:
    """A proxy of the file as it is read."""

    def __init__(self, name: str, line: int | None, settings: Settings) -> None:
        self.name = name
        self.line = line
        self.settings = settings
        self.key = f"proxies.{name}" if name else ""
        self.prefix = f"proxies.{name}." if name else ""


class _Proxies(Scalar):
    """Names, each with the keys of a proxy."""

    def holds(self, key: str) -> bool:
        return True

    def read(self, value: Value, key: str, report: Report, expected: str = "") -> list[_Draft] | None:
        if value.entries is None or not value.entries:
            found = value.kind if value.entries is None else "none"
            advice = "; leave out the dashes" if value.dashed else ""
            report.add(value.line, key, f"expected names, each with the keys of a proxy, found {found}{advice}")
            return None
        drafts: dict[str, _Draft] = {}
        for line, name, proxy in value.entries:
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
                report.add(line, key, f"expected a name of up to 64 letters, digits, _, . and -, found {name!r}")
            elif name in drafts:
                report.add(line, f"{key}.{name}", f"given a second time, first in line {drafts[name].line}")
            elif proxy.entries is None:
                advice = "; its keys are indented below its name" if proxy.text == "" else ""
                report.add(proxy.line, f"{key}.{name}", f"expected the keys of a proxy, found {proxy.kind}{advice}")
            else:
                settings = read_keys(PROXY_KEYS, proxy.entries, f"{key}.{name}.", report, _ABOVE)
                drafts[name] = _Draft(name, line, settings)
        return list(drafts.values())


_TOP_KEYS = {**PROXY_KEYS, **GENERAL_KEYS, "proxies": _Proxies(str)}


def load_config(
    path: str | None, options: Mapping[str, Any], *, sockets: bool | None = False, content: bytes | None = None
) -> Config:
    """The configuration that a file and the command line make; the command line wins.

    path: None for no file. content: what to read in place of the file.
    sockets: whether systemd passes sockets. If it does, no address to listen on is needed. None if that is not known:
        then none is needed where there is a backend.
    options: parsed values by the names of the fields of Config and ProxyConfig.
    Raises ConfigError with all that is wrong, or OSError if the file cannot be read.
    """
    report = Report(path or "command line")
    top = read_keys(_TOP_KEYS, [] if path is None else read_entries(path, content), "", report)
    given = {name: value for name, value in options.items() if name in PROXY_KEYS}
    general = {name: value for name, value in {**top.values, **options}.items() if name in GENERAL_KEYS}
    defaults = {name: value for name, value in {"listen": (), **top.values}.items() if name in PROXY_KEYS}
    drafts = _drafts(top, given, report)
    for draft in drafts:
        _check_complete(draft, given, sockets, report)
    if not report:
        made = [ProxyConfig(**{**defaults, **draft.settings.values, **given, "name": draft.name}) for draft in drafts]
        for draft, proxy in zip(drafts, made, strict=True):
            _check_proxy(draft, proxy, given, report)
        _check_together(drafts, made, report)
    if report:
        raise ConfigError(report.errors)
    return Config(tuple(made), **general)


def _drafts(top: Settings, given: Mapping[str, Any], report: Report) -> list[_Draft]:
    """The proxies of the file, or the one that its top and the command line describe."""
    if not (proxies := top.seen.get("proxies")):
        return [_Draft("", None, Settings({}, top.seen, top.meant))]
    for entry in (top.seen[name] for name in _OWN if name in top.seen):
        report.add(entry.line, entry.key, "belongs to one proxy, move it into each below proxies")
    if any(name in given for name in _OWN):
        what = "each has its addresses here; leave out those on the command line, or change the file"
        report.add(proxies.line, proxies.key, what)
    return top.values["proxies"] or []


def _check_complete(draft: _Draft, given: Mapping[str, Any], sockets: bool | None, report: Report) -> None:
    """Report what a proxy has to have, and has not. sockets: as for `load_config`."""
    said = {*draft.settings.seen, *draft.settings.meant, *given}
    if sockets or (sockets is None and "backends" in said):
        said.add("listen")
    for name in (name for name in _OWN if name not in said):
        report.add(draft.line, draft.prefix + USUAL.get(name, name), f"missing, expected an address to {_OWN[name]}")


def _check_proxy(draft: _Draft, proxy: ProxyConfig, given: Mapping[str, Any], report: Report) -> None:
    if all(backend.backup for backend in proxy.backends):
        entry = draft.settings.seen["backends"]
        report.add(entry.line, draft.prefix + entry.key, "expected one that is no backup, found none")
    lines = {name: draft.settings.seen[name].line for name in _OWN if name in draft.settings.seen and name not in given}
    _check_targets(draft, proxy, report)
    for what in contradictions(proxy.listen):
        report.add(lines.get("listen", draft.line), draft.key, what)
    for what in own_listeners(proxy.listen, [backend.address for backend in proxy.backends]):
        report.add(lines.get("backends", draft.line), draft.key, f"backend {what}")


def _check_targets(draft: _Draft, proxy: ProxyConfig, report: Report) -> None:
    """Report health checks for which there is no port, or that would ask the proxy itself."""
    for backend in proxy.backends:
        health = proxy.health_of(backend)
        if not health or not health.elsewhere:
            continue
        said = draft.settings.seen.get("backends" if backend.health else "health")
        line = said.line if said else draft.line
        key = f"{draft.prefix}{said.key}.health" if said and backend.health else f"{draft.prefix}health"
        if _lacks_port(health, backend.address):
            advice = f"write {{address: {backend}, health: on}}, or a port and an address in its health"
            report.add(line, key, f"backend {backend} is a unix socket, which has no port; {advice}")
        for what in own_listeners(proxy.listen, [health.target(backend.address)]):
            report.add(line, key, f"a check of backend {backend} would ask this proxy: {what}")


def _check_together(drafts: Sequence[_Draft], proxies: Sequence[ProxyConfig], report: Report) -> None:
    """Report addresses that two proxies listen on."""
    for index, (draft, proxy) in enumerate(zip(drafts, proxies, strict=True)):
        for address in proxy.listen:
            others = ((other, taken) for other in proxies[:index] for taken in other.listen)
            for other, taken in others:
                if covers(taken, address) or covers(address, taken):
                    entry = draft.settings.seen["listen"]
                    what = f"{address} cannot be bound twice, {other.name} listens on {taken}"
                    report.add(entry.line, draft.prefix + entry.key, what)
                    break
