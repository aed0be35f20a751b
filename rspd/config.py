"""The configuration: YAML and the command line's values -> named tuples. Every default lives here, once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

from rspd.address import Address, parse_address
from rspd.log import LEVELS
from rspd.yamlfile import ConfigError, Entry, Item, read_entries

DEFAULT_FILE = "/etc/rspd.yaml"


class ProxyConfig(NamedTuple):
    """One proxy. Durations are in seconds, `inf` for off."""

    listen: tuple[Address, ...]  # may be empty where systemd passes sockets
    backends: tuple[Address, ...]
    max_connections: int = 1
    backlog: int = 128
    reuse_port: bool = False  # of TCP listeners of our own
    connect_timeout: float = 5.0
    idle_timeout: float = 60.0
    half_close_timeout: float = 30.0
    drain_timeout: float = 30.0


class Config(NamedTuple):
    """All of it."""

    proxy: ProxyConfig
    log_level: str = "info"
    exit_idle_time: float = inf


# Values


def parse_duration(text: str) -> float:
    """Seconds of `500ms`, `5s`, `2m`, `1h`, a bare number of seconds, or `off`. Raises ValueError."""
    if text.lower() in ("off", "no", "false"):  # YAML's ways to write it
        return inf
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|)", text, re.ASCII)
    seconds = float(match[1]) * {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600}[match[2]] if match else 0
    if not seconds:
        raise ValueError(f"expected a duration above 0, as 500ms, 5s, 2m or 1h, or off, found {text!r}")
    return seconds


def parse_switch(text: str) -> bool:
    """True or False, in YAML's ways to write it. Raises ValueError."""
    word = text.lower()
    if word in ("true", "yes", "on"):
        return True
    if word in ("false", "no", "off"):
        return False
    raise ValueError(f"expected true or false, found {text!r}")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers within bounds, which raises ValueError for anything else."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}, found {text!r}")
        return int(text)

    return parse


def parse_log_level(text: str) -> str:
    """A key of LEVELS. Raises ValueError."""
    if text not in LEVELS:
        raise ValueError(f"expected one of {', '.join(LEVELS)}, found {text!r}")
    return text


def parse_backend(text: str) -> Address:
    """An address that can be dialled. Raises ValueError."""
    forms = "HOST:PORT, [IPV6]:PORT, /PATH or @NAME"
    address = parse_address(text, forms)
    if not address.path and not (address.host and address.port):
        raise ValueError(f"expected {forms}, found {text!r}")
    return address


PARSERS: Mapping[str, Callable[[str], Any]] = {
    "listen": parse_address,
    "backends": parse_backend,
    "max_connections": whole_number(1, 1_000_000),
    # listen(2) takes what net.core.somaxconn allows; an int is what it takes at all.
    "backlog": whole_number(1, 2**31 - 1),
    "reuse_port": parse_switch,
    "connect_timeout": parse_duration,
    "idle_timeout": parse_duration,
    "half_close_timeout": parse_duration,
    "drain_timeout": parse_duration,
    "log_level": parse_log_level,
    "exit_idle_time": parse_duration,
}

LISTS = ("listen", "backends")

SPELLINGS = {"backend": "backends"}


def load_config(path: str | None, options: Mapping[str, Any], *, sockets: bool = False) -> Config:
    """The configuration that a file and the command line make; the command line wins.

    path: None for no file.
    sockets: whether systemd passes sockets, so that there need be no address to listen on.
    options: parsed values by the names of the fields of Config and ProxyConfig.
    Raises ConfigError with all that is wrong, or OSError if the file cannot be read.
    """
    errors: list[str] = []
    settings: dict[str, Any] = {}
    given = set(options)
    if path is not None:
        entries = read_entries(path)
        given.update(SPELLINGS.get(entry.key, entry.key) for entry in entries)
        settings = parse_entries(path, entries, errors)
    settings.update(options)
    source = path or "command line"
    for key, name, what in (("listen", "listen", "listen on"), ("backends", "backend", "relay to")):
        if key == "listen" and sockets:
            settings.setdefault(key, ())
        elif key not in given:
            errors.append(f"{source}: {name}: missing, expected an address to {what}")
    if not errors:
        errors += (f"{source}: {what}" for what in contradictions(settings["listen"], settings["backends"]))
    if errors:
        raise ConfigError(errors)
    general = {name: settings.pop(name) for name in ("log_level", "exit_idle_time") if name in settings}
    return Config(ProxyConfig(**settings), **general)


def parse_entries(path: str, entries: Sequence[Entry], errors: list[str]) -> dict[str, Any]:
    """The settings that a file's keys make, by the names of the fields; adds what is wrong with them to `errors`."""
    settings: dict[str, Any] = {}
    seen: dict[str, Entry] = {}
    for entry in entries:
        place = f"{path}:{entry.line}: {entry.key}"
        name = SPELLINGS.get(entry.key, entry.key)
        if name not in PARSERS:
            errors.append(f"{place}: unknown key, {_suggest(entry.key)}")
        elif name in seen:
            errors.append(f"{place}: given a second time, first as {seen[name].key} in line {seen[name].line}")
        elif entry.is_list and name not in LISTS:
            errors.append(f"{place}: expected one value, found a list")
        elif isinstance(entry.value, str):
            expected = (
                ("an address" if entry.is_list else "an address or a list of them") if name in LISTS else "one value"
            )
            errors.append(f"{place}: expected {expected}, found {entry.value}")
        elif not entry.value:
            errors.append(f"{place}: expected at least one address, found an empty list")
        else:
            values = _parse_items(path, entry, PARSERS[name], errors)
            settings[name] = tuple(values) if name in LISTS else values[0] if values else None
        seen.setdefault(name, entry)
    return settings


def _parse_items(path: str, entry: Entry, parse: Callable[[str], Any], errors: list[str]) -> list[Any]:
    values: list[Any] = []
    for item in entry.value:
        assert isinstance(item, Item)
        place = f"{path}:{item.line}: {entry.key}"
        try:
            value = parse(item.text)
        except ValueError as error:
            errors.append(f"{place}: {error}")
            continue
        if value in values:
            errors.append(f"{place}: {value} is listed twice")
        values.append(value)
    return values


def _suggest(key: str) -> str:
    import difflib  # slow to import, and for this message only

    keys = sorted({*PARSERS, *SPELLINGS} - set(SPELLINGS.values()))
    close = difflib.get_close_matches(key, keys, 1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(keys)}"


def contradictions(listen: Sequence[Address], backends: Sequence[Address]) -> Iterator[str]:
    """What is wrong between addresses: one that another covers, or a backend that is the proxy itself."""
    for address in listen:
        if address.port and not address.path and address != Address(port=address.port) in listen:
            yield f"listen {address.port} covers {address} too, which cannot be bound twice"
    yield from own_listeners(listen, backends)


def own_listeners(listen: Sequence[Address], backends: Sequence[Address]) -> Iterator[str]:
    """Which backends are the proxy itself."""
    # To dial oneself would open connections without end.
    for backend in backends:
        v4 = backend.host in ("localhost", "0.0.0.0") or backend.host.startswith("127.")
        v6 = backend.host in ("localhost", "::1", "::")
        for address in listen:
            everywhere = {"": v4 or v6, "0.0.0.0": v4, "::": v6}.get(address.host, False)
            if backend == address or (everywhere and backend.port == address.port):
                yield f"backend {backend} is this proxy's own listener {address}"
