"""What rspd does by a configuration, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf

from rspd.settings import BackendConfig, Config, HealthConfig, ProxyConfig, RouteConfig

# What a mode has to have for others than the owner, so that they can connect to a unix socket.
GROUP, OTHERS = 0o020, 0o002

DEFAULTS = ProxyConfig((), ())

TIMEOUTS = ("idle_timeout", "half_close_timeout", "drain_timeout")


def describe(config: Config) -> list[str]:
    """A line for each proxy, followed by one for each of its backends; then what is for all. Leaves out defaults."""
    lines: list[str] = []
    for proxy in config.proxies:
        name = f"{proxy.name}: " if proxy.name else ""
        lines.append(name + "; ".join(_proxy(proxy)))
        lines += _backends(proxy)
        lines += (f"  {line}" for line in _routes(proxy))
    lines += _pools(config)
    general = "; ".join(_general(config))
    return [*lines, general] if general else lines


def _general(config: Config) -> Iterator[str]:
    if config.exit_idle_time != inf:
        yield f"ends after {_span(config.exit_idle_time)} without a connection"
    yield from _looking(config)
    if config.metrics:
        yield f"metrics at {config.metrics}"
    if not config.handover:
        yield "hands no connection over at a restart"
    if config.log_level != Config._field_defaults["log_level"]:
        yield f"logs from {config.log_level} on"


def _looking(config: Config) -> Iterator[str]:
    """Where somebody can look at it, and who."""
    if isinstance(config.control, str):
        yield "no control socket, nobody can look at it"
        return
    if config.control:
        yield f"control socket {config.control}"
    group, others = config.control_mode & GROUP, config.control_mode & OTHERS
    if group and others:
        yield "all users of this host may look at it"
    elif others:
        yield f"all users but those of the group {config.control_group or 'of its process'} may look at it"
    elif not group:
        yield "only root and its own user may look at it"
    elif config.control_group:
        yield f"the group {config.control_group} may look at it"


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
    if proxy.routes:
        yield f"routes by what a client says, waiting up to {_span(proxy.first_bytes_timeout)} for it"
    elif proxy.first_bytes_timeout != DEFAULTS.first_bytes_timeout:
        yield f"first_bytes_timeout {_span(proxy.first_bytes_timeout)}, without routes"
    if proxy.error_pages:
        yield f"pages of its own for {_list(page.status for page in proxy.error_pages)}"
    yield from _pool(proxy, DEFAULTS)
    yield from _timing(proxy, DEFAULTS)
    if proxy.backlog != DEFAULTS.backlog:
        yield f"backlog {proxy.backlog}"
    if proxy.log_start:
        yield "a line in the log also when a connection begins"


def _pool(pool: ProxyConfig, above: ProxyConfig) -> Iterator[str]:
    """How a backend is chosen. above: what the pool goes by unless it says otherwise, which is said elsewhere."""
    count = len(pool.backends)
    if count > 1 or pool.balance != above.balance or (count and pool.resolve == "each"):
        yield pool.balance + (" over one backend" if count == 1 else f" over {count} backends" if count else "")
    if pool.connect_timeout != above.connect_timeout:
        yield f"connect_timeout {_span(pool.connect_timeout)}"
    if pool.resolve != above.resolve:
        yield "each address of a name a backend" if pool.resolve == "each" else "each name one backend"
    if pool.resolve_interval != above.resolve_interval:
        yield f"names looked up every {_span(pool.resolve_interval)}"
    if pool.health != above.health:
        yield "health " + ", ".join(_health(pool.health)) if pool.health else "no health checks"
    if (pool.max_fails, pool.fail_timeout) != (above.max_fails, above.fail_timeout):
        yield _down_after(pool.max_fails, pool.fail_timeout)
    if pool.on_down != above.on_down:
        yield f"connections of a backend {'aborted' if pool.on_down == 'abort' else 'kept'} when it goes down"
    if pool.retries != above.retries:
        yield _retries(pool.retries)
    if pool.queue_timeout != above.queue_timeout:
        long = f"up to {_span(pool.queue_timeout)}" if pool.queue_timeout else "not at all"
        yield f"clients waiting {long} while no backend is up"
    if pool.send_proxy != above.send_proxy:
        yield f"{f'a PROXY {pool.send_proxy}' if pool.send_proxy else 'no PROXY'} header to backends"


def _retries(number: float) -> str:
    if not number:
        return "no further backend tried"
    return f"{'all' if number == inf else f'at most {number:.0f}'} further backends tried"


def _timing(proxy: ProxyConfig, above: ProxyConfig) -> Iterator[str]:
    """How a connection goes on once it has its backend."""
    if proxy.half_close != above.half_close:
        yield f"connections end when {'both sides have' if proxy.half_close else 'either side has'} ended"
    for key in TIMEOUTS:
        if getattr(proxy, key) != getattr(above, key):
            yield f"{key} {_span(getattr(proxy, key))}"


def _backends(pool: ProxyConfig) -> Iterator[str]:
    return ("  " + ", ".join(_backend(backend, pool)) for backend in pool.backends)


def _routes(proxy: ProxyConfig) -> Iterator[str]:
    """A line for each route, followed by one for each of its backends if there are several."""
    for route in proxy.routes:
        settings = route.settings
        how = [f"pool {route.pool}"] if route.pool else [*_pool(settings, proxy)]
        how += _timing(settings, proxy)
        alone = len(settings.backends) == 1
        if alone:
            how.insert(0, ", ".join(_backend(settings.backends[0], settings)))
        yield f"{', '.join(_matches(route)) or 'all others'}: {'; '.join(how)}"
        if not alone:
            yield from _backends(settings)
    if proxy.routes and all([*_matches(route)] for route in proxy.routes):
        yield "all others: refused"


def _matches(route: RouteConfig) -> Iterator[str]:
    words = {"server name": route.server_name, "ALPN": route.alpn, "host": route.host, "path": route.path}
    for what, items in {**words, "protocol": route.protocol, "from": route.networks}.items():
        if items:
            yield f"{what} {' or '.join(map(str, items))}"


def _pools(config: Config) -> Iterator[str]:
    """The pools that routes name: a line for each, followed by one for each of its backends."""
    shared = {name for proxy in config.proxies for name in proxy.shared_pools}
    pools = [("", pool, pool.name in shared) for pool in config.pools]
    for proxy in config.proxies:
        named = {route.pool for route in proxy.routes}
        pools += [(f"{proxy.name}: ", pool, pool.name in named) for pool in proxy.pools]
    for owner, pool, used in pools:
        how = [*_pool(pool.settings, DEFAULTS)] or ["one backend"]
        yield f"{owner}pool {pool.name}: {'; '.join(how if used else [*how, 'not used, no route names it'])}"
        yield from _backends(pool.settings)


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
