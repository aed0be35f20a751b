"""The keys of the configuration file: what each takes, and how file and command line become settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rspd.config import values
from rspd.config.addresses import parse_address, parse_path, parse_place
from rspd.config.pools import BACKENDS, CHOICE_KEYS, CONNECTIONS_MAX, POOL_KEYS, SEND_PROXY, lacks_port, parse_limit
from rspd.config.routes import ERROR_PAGES, MATCH_KEYS, NETWORK, RELAY_KEYS, Route, make_pools, make_routes
from rspd.config.schema import USUAL, Draft, Many, Named, Report, Scalar, Settings, read_keys
from rspd.config.yamlfile import read_entries
from rspd.errors import ConfigError
from rspd.log import LEVELS
from rspd.net.address import Address, contradictions, covers, own_listeners
from rspd.settings import Config, NamedPool, ProxyConfig

# In the order of rspd.yaml(5).
PROXY_KEYS: Mapping[str, Scalar] = {
    "listen": Many(Scalar(values.listed(parse_address, "an address"), "an address"), "address"),
    "backends": BACKENDS,
    "max_connections": Scalar(values.whole_number(1, CONNECTIONS_MAX)),
    # The most that listen(2) takes is an int; net.core.somaxconn lowers it.
    "backlog": Scalar(values.whole_number(1, 2**31 - 1)),
    "reuse_port": Scalar(values.parse_switch),
    **CHOICE_KEYS,
    **RELAY_KEYS,
    "drain_timeout": Scalar(values.parse_duration),
    "allow": Many(NETWORK, "network", none=("all",)),
    "deny": Many(NETWORK, "network", none=values.OFF),
    "max_connections_per_client": Scalar(parse_limit),
    "send_proxy": SEND_PROXY,
    "accept_proxy": Many(NETWORK, "network", none=values.OFF),
    "accept_proxy_timeout": Scalar(values.parse_finite_duration),
    "routes": Many(Route(), "route"),
    "pools": Named(POOL_KEYS, "pool"),
    "first_bytes_timeout": Scalar(values.parse_finite_duration),
    "error_pages": ERROR_PAGES,
    "log_start": Scalar(values.parse_switch),
}

GENERAL_KEYS: Mapping[str, Scalar] = {
    "exit_idle_time": Scalar(values.parse_duration),
    "control": Scalar(values.unless(values.OFF, values.OFF[0], parse_path)),
    "control_mode": Scalar(values.parse_mode),
    "control_group": Scalar(values.matching(r"[a-zA-Z_][\w.-]*\$?", "a group's name")),
    "metrics": Scalar(values.unless(values.OFF, None, parse_place)),
    "handover": Scalar(lambda text: values.parse_switch(text, "on or off")),
    "log_level": Scalar(values.one_of(LEVELS)),
}

# Keys that are for all proxies, at the top of the file. Then those of a route. Then those that each proxy has of its
# own, and what each is for.
_ABOVE = dict.fromkeys(GENERAL_KEYS, "belongs to the top of the file, it is for all proxies")
_BELOW = dict.fromkeys(
    (*MATCH_KEYS, "pool"), "belongs to a route: - {server_name: NAME, backend: ADDRESS} below routes"
)
_OWN = {"listen": "listen on", "backends": "relay to"}


_TOP_KEYS = {**PROXY_KEYS, **GENERAL_KEYS, "proxies": Named(PROXY_KEYS, "proxy", {**_ABOVE, **_BELOW})}


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
    top = read_keys(_TOP_KEYS, [] if path is None else read_entries(path, content), "", report, _BELOW)
    given = {name: value for name, value in options.items() if name in PROXY_KEYS}
    general = {name: value for name, value in {**top.values, **options}.items() if name in GENERAL_KEYS}
    defaults = {name: value for name, value in {"listen": (), **top.values}.items() if name in PROXY_KEYS}
    routes, pools = defaults.pop("routes", None), defaults.pop("pools", None) or ()
    drafts = _drafts(top, routes, given, report)
    for draft in drafts:
        _check_complete(draft, given, sockets, report)
    if not report:
        shared = make_pools(pools, defaults, report)
        made = [_make(draft, {**defaults, **draft.settings.values, **given}, shared, report) for draft in drafts]
    if not report:
        config = Config(tuple(made), **general, pools=shared)
        _check(config, drafts, pools, given, report)
        _check_looking(config, top, report)
    if report:
        raise ConfigError(report.errors)
    return config


def _drafts(top: Settings, routes: Sequence[Draft] | None, given: Mapping[str, Any], report: Report) -> Sequence[Draft]:
    """The proxies of the file, or the one that its top and the command line describe. routes: at the top."""
    if not (proxies := top.seen.get("proxies")):
        return [Draft("", None, Settings({"routes": routes}, top.seen, top.meant), "")]
    for entry in (top.seen[name] for name in (*_OWN, "routes") if name in top.seen):
        report.add(entry.line, entry.key, "belongs to one proxy, move it into each below proxies")
    if any(name in given for name in _OWN):
        what = "each has its addresses here; leave out those on the command line, or change the file"
        report.add(proxies.line, proxies.key, what)
    return top.values["proxies"] or ()


def _check_complete(draft: Draft, given: Mapping[str, Any], sockets: bool | None, report: Report) -> None:
    """Report what a proxy has to have, and has not. sockets: as for `load_config`."""
    said = {*draft.settings.seen, *draft.settings.meant, *given}
    if "routes" in said and "backends" in said:
        entry = draft.settings.seen.get("routes") or draft.settings.seen["backends"]
        advice = "a route without a match is for all others: - {backend: HOST:PORT}"
        what = "-b on the command line" if "backends" in given else "backend"
        report.add(entry.line, draft.prefix + entry.key, f"cannot stand beside {what}; {advice}")
    if "routes" in said:
        said.add("backends")
    if sockets or (sockets is None and "backends" in said):
        said.add("listen")
    for name in (name for name in _OWN if name not in said):
        report.add(draft.line, draft.prefix + USUAL.get(name, name), f"missing, expected an address to {_OWN[name]}")


def _make(draft: Draft, said: dict[str, Any], shared: Sequence[NamedPool], report: Report) -> ProxyConfig:
    """The proxy of a draft. said: all that it goes by, in the file or before it."""
    routes, pools = said.pop("routes", None) or (), said.pop("pools", None) or ()
    said = {"backends": (), **said, "name": draft.name}
    own = make_pools(pools, said, report)
    names = [pool.name for pool in (*own, *shared)]
    return ProxyConfig(**said, routes=make_routes(routes, {**said, "backends": ()}, names, report), pools=own)


def _check(
    config: Config, drafts: Sequence[Draft], pools: Sequence[Draft], given: Mapping[str, Any], report: Report
) -> None:
    """Report what cannot work. drafts: of the proxies. pools: the drafts of those of the whole file."""
    for draft, proxy in zip(drafts, config.proxies, strict=True):
        _check_proxy(draft, proxy, given, report)
    shared = [(proxy, proxy.shared_pools) for proxy in config.proxies]
    for draft, pool in zip(pools, config.pools, strict=True):
        users = [proxy for proxy, names in shared if pool.name in names]
        _check_pool(draft, pool.settings, [address for proxy in users for address in proxy.listen], report)
    _check_together(drafts, config.proxies, report)


def _check_looking(config: Config, top: Settings, report: Report) -> None:
    """Report a control socket, or metrics, where something else listens."""
    taken = [(address, f"{proxy.name or 'listen'} has it") for proxy in config.proxies for address in proxy.listen]
    for name, wanted in (("control", config.control), ("metrics", config.metrics)):
        if isinstance(wanted, Address):
            what = [what for other, what in taken if covers(other, wanted) or covers(wanted, other)]
            for text in what[:1]:
                report.add(top.seen[name].line, name, f"{wanted} cannot be bound twice, {text}")
            taken.append((wanted, f"{name} has it"))


def _check_proxy(draft: Draft, proxy: ProxyConfig, given: Mapping[str, Any], report: Report) -> None:
    for what in contradictions(proxy.listen):
        report.add(None if "listen" in given else draft.line_of("listen"), draft.key, what)
    if proxy.backends:
        _check_pool(draft, proxy, proxy.listen, report, "backends" in given)
    for below, pool in zip(draft.settings.values.get("pools") or (), proxy.pools, strict=True):
        _check_pool(below, pool.settings, proxy.listen, report)
    for below, route in zip(draft.settings.values.get("routes") or (), proxy.routes, strict=True):
        if not route.pool:
            _check_pool(below, route.settings, proxy.listen, report)


def _check_pool(
    draft: Draft, pool: ProxyConfig, listen: Sequence[Address], report: Report, given: bool = False
) -> None:
    """Report backends that are no use, or that are the proxy itself.

    draft: says where the pool stands in the file. listen: where those listen whose pool it is.
    given: whether its backends are on the command line.
    """
    if all(backend.backup for backend in pool.backends):
        entry = draft.settings.seen["backends"]
        report.add(entry.line, draft.prefix + entry.key, "expected one that is no backup, found none")
    _check_targets(draft, pool, listen, report)
    for what in own_listeners(listen, [backend.address for backend in pool.backends]):
        report.add(None if given else draft.line_of("backends"), draft.key, f"backend {what}")


def _check_targets(draft: Draft, pool: ProxyConfig, listen: Sequence[Address], report: Report) -> None:
    """Report health checks for which there is no port, or that would ask the proxy itself."""
    for backend in pool.backends:
        health = pool.health_of(backend)
        if not health or not health.elsewhere:
            continue
        said = draft.settings.seen.get("backends" if backend.health else "health")
        line = said.line if said else draft.line
        key = f"{draft.prefix}{said.key}.health" if said and backend.health else f"{draft.prefix}health"
        if lacks_port(health, backend.address):
            advice = f"write {{address: {backend}, health: on}}, or a port and an address in its health"
            report.add(line, key, f"backend {backend} is a unix socket, which has no port; {advice}")
        for what in own_listeners(listen, [health.target(backend.address)]):
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
