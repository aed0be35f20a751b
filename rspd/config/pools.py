"""The keys of what chooses a backend: of backends, of their health checks, of pools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

from rspd.config import values
from rspd.config.addresses import DIALLED, parse_backend, parse_target
from rspd.config.schema import Many, Scalar, Table
from rspd.net.address import Address
from rspd.settings import BALANCES, BackendConfig, HealthConfig

CONNECTIONS_MAX = 1_000_000

parse_limit = values.unless(values.OFF, inf, values.whole_number(1, CONNECTIONS_MAX, "off"))


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
    if isinstance(health, HealthConfig) and address and lacks_port(health, address):
        yield "health", f"{address} is a unix socket, which has no port; write address: HOST:PORT, or health: on"


def lacks_port(health: HealthConfig, backend: Address) -> bool:
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
    "max_connections": Scalar(parse_limit),
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

BACKENDS = Many(_BACKEND, "backend")
SEND_PROXY = Scalar(values.unless(values.OFF, "", values.one_of(("v1", "v2", "off"))))

# In the order of rspd.yaml(5).
CHOICE_KEYS: Mapping[str, Scalar] = {
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
}
POOL_KEYS: Mapping[str, Scalar] = {"backends": BACKENDS, **CHOICE_KEYS, "send_proxy": SEND_PROXY}
