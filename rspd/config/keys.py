"""The keys of the configuration file: what each takes, and how file and command line become settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rspd.config import values
from rspd.config.addresses import parse_address
from rspd.config.pools import BACKENDS, CHOICE_KEYS, CONNECTIONS_MAX, SEND_PROXY, lacks_port, parse_limit
from rspd.config.schema import USUAL, Draft, Many, Named, Report, Scalar, Settings, read_keys
from rspd.config.yamlfile import read_entries
from rspd.errors import ConfigError
from rspd.log import LEVELS
from rspd.net.address import contradictions, covers, own_listeners
from rspd.net.networks import parse_network
from rspd.settings import Config, ProxyConfig

_NETWORK = Scalar(values.listed(parse_network, "a network"), "a network")

# In the order of rspd.yaml(5).
PROXY_KEYS: Mapping[str, Scalar] = {
    "listen": Many(Scalar(values.listed(parse_address, "an address"), "an address"), "address"),
    "backends": BACKENDS,
    "max_connections": Scalar(values.whole_number(1, CONNECTIONS_MAX)),
    # The most that listen(2) takes is an int; net.core.somaxconn lowers it.
    "backlog": Scalar(values.whole_number(1, 2**31 - 1)),
    "reuse_port": Scalar(values.parse_switch),
    **CHOICE_KEYS,
    "idle_timeout": Scalar(values.parse_duration),
    "half_close": Scalar(lambda text: values.parse_switch(text, "on or off")),
    "half_close_timeout": Scalar(values.parse_duration),
    "drain_timeout": Scalar(values.parse_duration),
    "allow": Many(_NETWORK, "network", none=("all",)),
    "deny": Many(_NETWORK, "network", none=values.OFF),
    "max_connections_per_client": Scalar(parse_limit),
    "send_proxy": SEND_PROXY,
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


_TOP_KEYS = {**PROXY_KEYS, **GENERAL_KEYS, "proxies": Named(PROXY_KEYS, "proxy", _ABOVE)}


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


def _drafts(top: Settings, given: Mapping[str, Any], report: Report) -> Sequence[Draft]:
    """The proxies of the file, or the one that its top and the command line describe."""
    if not (proxies := top.seen.get("proxies")):
        return [Draft("", None, Settings({}, top.seen, top.meant), "")]
    for entry in (top.seen[name] for name in _OWN if name in top.seen):
        report.add(entry.line, entry.key, "belongs to one proxy, move it into each below proxies")
    if any(name in given for name in _OWN):
        what = "each has its addresses here; leave out those on the command line, or change the file"
        report.add(proxies.line, proxies.key, what)
    return top.values["proxies"] or ()


def _check_complete(draft: Draft, given: Mapping[str, Any], sockets: bool | None, report: Report) -> None:
    """Report what a proxy has to have, and has not. sockets: as for `load_config`."""
    said = {*draft.settings.seen, *draft.settings.meant, *given}
    if sockets or (sockets is None and "backends" in said):
        said.add("listen")
    for name in (name for name in _OWN if name not in said):
        report.add(draft.line, draft.prefix + USUAL.get(name, name), f"missing, expected an address to {_OWN[name]}")


def _check_proxy(draft: Draft, proxy: ProxyConfig, given: Mapping[str, Any], report: Report) -> None:
    if all(backend.backup for backend in proxy.backends):
        entry = draft.settings.seen["backends"]
        report.add(entry.line, draft.prefix + entry.key, "expected one that is no backup, found none")
    lines = {name: draft.settings.seen[name].line for name in _OWN if name in draft.settings.seen and name not in given}
    _check_targets(draft, proxy, report)
    for what in contradictions(proxy.listen):
        report.add(lines.get("listen", draft.line), draft.key, what)
    for what in own_listeners(proxy.listen, [backend.address for backend in proxy.backends]):
        report.add(lines.get("backends", draft.line), draft.key, f"backend {what}")


def _check_targets(draft: Draft, proxy: ProxyConfig, report: Report) -> None:
    """Report health checks for which there is no port, or that would ask the proxy itself."""
    for backend in proxy.backends:
        health = proxy.health_of(backend)
        if not health or not health.elsewhere:
            continue
        said = draft.settings.seen.get("backends" if backend.health else "health")
        line = said.line if said else draft.line
        key = f"{draft.prefix}{said.key}.health" if said and backend.health else f"{draft.prefix}health"
        if lacks_port(health, backend.address):
            advice = f"write {{address: {backend}, health: on}}, or a port and an address in its health"
            report.add(line, key, f"backend {backend} is a unix socket, which has no port; {advice}")
        for what in own_listeners(proxy.listen, [health.target(backend.address)]):
            report.add(line, key, f"a check of backend {backend} would ask this proxy: {what}")


def _check_together(drafts: Sequence[Draft], proxies: Sequence[ProxyConfig], report: Report) -> None:
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
