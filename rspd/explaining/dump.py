"""All values in force, defaults included, as a configuration file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

import yaml

from rspd.config.keys import GENERAL_KEYS, PROXY_KEYS
from rspd.config.pools import BACKEND_KEYS, HEALTH_KEYS, POOL_KEYS
from rspd.config.routes import ROUTE_KEYS
from rspd.config.schema import USUAL, Many, Scalar
from rspd.config.values import OFF, ON, accepts, format_duration, parse_mode, parse_switch
from rspd.net.address import Address
from rspd.settings import BackendConfig, Config, ErrorPage, HealthConfig, NamedPool, RouteConfig

TEXT, LIST, MAPPING = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))


def dump(config: Config) -> str:
    """A YAML file that means this configuration. A key without a value, as `http` in `health`, is left out."""
    general = _mapping(GENERAL_KEYS, config._asdict()).value
    proxies = [_mapping(PROXY_KEYS, proxy._asdict()) for proxy in config.proxies]
    pools = [(_scalar("pools"), node)] if (node := _structured(config.pools)) else []
    entries = [*proxies[0].value, *general, *pools]
    if config.proxies[0].name:
        named = [(_scalar(proxy.name), node) for proxy, node in zip(config.proxies, proxies, strict=True)]
        entries = [*general, *pools, (_scalar("proxies"), yaml.MappingNode(MAPPING, named))]
    # The base class reads each scalar as text, so 8080 needs no quotes.
    return str(yaml.serialize(yaml.MappingNode(MAPPING, entries), Dumper=yaml.BaseDumper, width=inf))


def _mapping(keys: Mapping[str, Scalar], values: Mapping[str, Any]) -> yaml.MappingNode:
    """Each key in its usual spelling: `backend` if there is only one."""
    entries = []
    for name, reader in keys.items():
        if name in values and (node := _node(reader, values[name])):
            usual = USUAL[name] if name in USUAL and len(values[name]) == 1 else name
            entries.append((_scalar(usual), node))
    return yaml.MappingNode(MAPPING, entries)


def _node(reader: Scalar, value: Any) -> yaml.Node | None:
    """A value in the words from which `reader` reads it; None if there are none."""
    if node := _structured(value):
        return node
    if isinstance(value, bytes):
        return _scalar(value.decode("latin-1"), style='"') if value else None
    if isinstance(reader, Many) and value:
        items = [_node(reader.item, item) for item in value]
        return items[0] if len(items) == 1 else yaml.SequenceNode(LIST, items)
    meant = (
        _scalar(text) for text in _texts(reader, value) if accepts(reader.parse, text) and reader.parse(text) == value
    )
    node = next(meant, None)
    assert node or value in ("", (), None), f"nothing means {value!r}"
    return node


def _structured(value: Any) -> yaml.Node | None:
    """A value that is a mapping in the file, or a tuple of those with a name each; None for any other value."""
    if isinstance(value, RouteConfig):
        # Where it has a pool, the settings say only how its connections go on.
        keys = {key: reader for key, reader in ROUTE_KEYS.items() if not (value.pool and key in POOL_KEYS)}
        return _mapping(keys, {**value.settings._asdict(), **value._asdict(), "from": value.networks})
    if isinstance(value, BackendConfig):
        return _mapping(BACKEND_KEYS, value._asdict())
    if isinstance(value, HealthConfig):
        of_http = ("host", "status")
        return _mapping(HEALTH_KEYS, {k: v for k, v in value._asdict().items() if value.http or k not in of_http})
    items = value if isinstance(value, tuple) else ()
    pools = [(pool.name, _mapping(POOL_KEYS, pool.settings._asdict())) for pool in items if isinstance(pool, NamedPool)]
    pages = [(f"{page.status}", _scalar(page.path)) for page in items if isinstance(page, ErrorPage)]
    named = [(_scalar(name), node) for name, node in [*pools, *pages]]
    return yaml.MappingNode(MAPPING, named) if named else None


def _texts(reader: Scalar, value: Any) -> Iterator[str]:
    """Texts that may mean this value, the usual one first."""
    if reader.parse is parse_switch:
        yield str(value).lower()
    elif isinstance(value, bool):
        yield ON[0] if value else OFF[0]
    yield from (OFF[0], "all")
    if reader.parse is parse_mode:
        yield f"{value:04o}"
    if isinstance(value, Address):
        yield value.host  # where the port stands elsewhere
    if isinstance(value, float):
        yield format_duration(value)
    yield str(value)


def _scalar(text: str, style: str | None = None) -> yaml.ScalarNode:
    return yaml.ScalarNode(TEXT, text, style=style)
