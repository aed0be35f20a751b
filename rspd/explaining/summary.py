"""What rspd does by a configuration, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf

from rspd.settings import BackendConfig, Config, HealthConfig, ProxyConfig

DEFAULTS = ProxyConfig((), ())

TIMEOUTS = ("connect_timeout", "idle_timeout", "half_close_timeout", "drain_timeout")


def describe(config: Config) -> list[str]:
    """A line for each proxy, followed by one for each of its backends; then what is for all. Leaves out defaults."""
    lines: list[str] = []
    for proxy in config.proxies:
        name = f"{proxy.name}: " if proxy.name else ""
        lines.append(name + "; ".join(_proxy(proxy)))
        lines += ("  " + ", ".join(_backend(backend, proxy)) for backend in proxy.backends)
    general = []
    if config.exit_idle_time != inf:
        general.append(f"ends after {_span(config.exit_idle_time)} without a connection")
    if not config.handover:
        general.append("hands no connection over at a restart")
    if config.log_level != Config._field_defaults["log_level"]:
        general.append(f"logs from {config.log_level} on")
    return [*lines, "; ".join(general)] if general else lines


def _proxy(proxy: ProxyConfig) -> Iterator[str]:
    listen = _list(proxy.listen) or "what a socket unit passes (there is no listen)"
    yield f"listening on {listen}" + (" (ports shared, reuse_port)" if proxy.reuse_port else "")
    yield _connections(proxy.max_connections)
    if proxy.max_connections_per_client != inf:
        yield f"{proxy.max_connections_per_client:.0f} of one client"
    if proxy.allow:
        yield f"only for {_list(proxy.allow)}"
    if proxy.deny:
        yield f"not for {_list(proxy.deny)}"
    if proxy.accept_proxy:
        yield f"a PROXY header within {_span(proxy.accept_proxy_timeout)} from {_list(proxy.accept_proxy)}"
    if len(proxy.backends) > 1 or proxy.balance != DEFAULTS.balance or proxy.resolve == "each":
        count = len(proxy.backends)
        yield f"{proxy.balance} over " + ("one backend" if count == 1 else f"{count} backends")
    if proxy.resolve == "each":
        yield "each address of a name a backend"
    if proxy.resolve_interval != DEFAULTS.resolve_interval:
        yield f"names looked up every {_span(proxy.resolve_interval)}"
    if proxy.health:
        yield "health " + ", ".join(_health(proxy.health))
    if (proxy.max_fails, proxy.fail_timeout) != (DEFAULTS.max_fails, DEFAULTS.fail_timeout):
        yield _down_after(proxy.max_fails, proxy.fail_timeout)
    if proxy.on_down == "abort":
        yield "connections of a backend aborted when it goes down"
    if proxy.retries != inf:
        yield f"at most {proxy.retries:.0f} further backends tried" if proxy.retries else "no further backend tried"
    if proxy.queue_timeout:
        yield f"clients waiting up to {_span(proxy.queue_timeout)} while no backend is up"
    if proxy.send_proxy:
        yield f"a PROXY {proxy.send_proxy} header to backends"
    if not proxy.half_close:
        yield "connections end when either side has ended"
    for key in TIMEOUTS:
        if getattr(proxy, key) != getattr(DEFAULTS, key):
            yield f"{key} {_span(getattr(proxy, key))}"
    if proxy.backlog != DEFAULTS.backlog:
        yield f"backlog {proxy.backlog}"


def _health(health: HealthConfig) -> Iterator[str]:
    default = HealthConfig()
    how, where = "connecting", " to "
    if health.http:
        how, where = f"GET {health.http}" + (f" of {health.host}" if health.host else ""), " at "
    elif health.send or health.expect:
        said = {"sending": health.send, "expecting": health.expect}
        how, where = " and ".join(f"{verb} {repr(data)[1:]}" for verb, data in said.items() if data), " at "
    if health.elsewhere:
        how += where + _asked(health)
    yield f"by {how} every {_span(health.interval)}"
    if health.status != default.status:
        yield "good status " + _list(health.status)
    if health.timeout != default.timeout:
        yield f"within {_span(health.timeout)}"
    if health.rise != default.rise:
        yield f"up after {health.rise} good"
    if health.fall != default.fall:
        yield f"down after {health.fall} bad"


def _asked(health: HealthConfig) -> str:
    """What is asked in place of the backend."""
    if not health.address:
        return f"port {health.port}"
    target = health.target(health.address)
    return str(target) if target.port or target.path else f"the backend's port of {target.host}"


def _down_after(failures: float, seconds: float) -> str:
    if failures == inf:
        return "never down by failures to connect"
    times = "one failure" if failures == 1 else f"{failures:.0f} failures"
    return f"down after {times} within {_span(seconds)}"


def _backend(backend: BackendConfig, proxy: ProxyConfig) -> Iterator[str]:
    yield str(backend.address)
    if backend.weight != 1:
        yield f"weight {backend.weight}"
    if backend.backup:
        yield "backup"
    if backend.max_connections != inf:
        yield _connections(backend.max_connections)
    if (backend.max_fails, backend.fail_timeout) != (None, None):
        yield _down_after(proxy.max_fails_of(backend), proxy.fail_timeout_of(backend))
    if backend.health == "off":
        yield "no health checks"
    elif backend.health:
        yield "health " + ", ".join(_health(backend.health))


def _connections(number: float) -> str:
    return "one connection at a time" if number == 1 else f"{number:.0f} connections at a time"


def _span(seconds: float) -> str:
    if seconds == inf:
        return "off"
    if seconds < 1:
        return f"{seconds * 1000:g} ms"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds % length == 0:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.15g} s"


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
