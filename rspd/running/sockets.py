"""Which of the sockets that systemd passed goes with which proxy, and with which address in its `listen`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from rspd.errors import ConfigError
from rspd.net.address import Address, own_listeners
from rspd.net.listener import Listener
from rspd.settings import Config

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What a proxy listens on: the sockets from systemd that it takes, and the addresses that are left to bind."""

    adopted: list[Listener]
    addresses: list[Address]


def assign(config: Config, adopted: Sequence[Listener]) -> dict[str, Part]:
    """What each proxy listens on, by the proxies' names.

    A proxy takes the sockets that its `listen` names (`fd://NAME`). If `listen` names none, the proxy takes the sockets
    that have its own name, in place of the addresses in `listen`; a lone proxy takes all sockets.
    Raises ConfigError if no proxy takes some socket, or if some proxy has nothing to listen on.
    """
    passed = _names(adopted)
    what = f"passed are {', '.join(passed)}" if passed else "none was passed; is its socket unit active?"
    errors: list[str] = []
    parts: dict[str, Part] = {}
    named_somewhere = {address.passed for proxy in config.proxies for address in proxy.listen}
    for proxy in config.proxies:
        named = [address.passed for address in proxy.listen if address.passed]
        place = f"proxies.{proxy.name}.listen" if proxy.name else "listen"
        errors += [f"{place} fd://{name}: no such socket from systemd, {what}" for name in named if name not in passed]
        taken = named or (passed if len(config.proxies) == 1 else {proxy.name} - named_somewhere)
        own = [listener for listener in adopted if listener.passed in taken]
        bound = [] if own and not named else [address for address in proxy.listen if not address.passed]
        if not own and not bound and not named:
            errors.append(f"{place}: missing, expected an address, or a socket from systemd named {proxy.name}")
        addresses = [listener.address for listener in own]
        errors += own_listeners(addresses, [backend.address for backend in proxy.backends])
        parts[proxy.name] = Part(own, bound)
    for name in passed:
        if not any(listener.passed == name for part in parts.values() for listener in part.adopted):
            several = "" if len(config.proxies) == 1 else ", or call it as a proxy (FileDescriptorName=)"
            errors.append(f"socket {name!r} from systemd: not in listen; add fd://{name}{several}, or stop it")
    if errors:
        raise ConfigError(errors)
    return parts


def log_replaced(config: Config, parts: dict[str, Part]) -> None:
    """Log the addresses in `listen` that are not listened on, because sockets from systemd took their place."""
    for proxy in config.proxies:
        part = parts[proxy.name]
        if not part.adopted or any(address.passed for address in proxy.listen):
            continue
        covered = {listener.address for listener in part.adopted}
        names = ", ".join(_names(part.adopted))
        for address in proxy.listen:
            if address not in covered:
                log.info("not listening on %s, systemd passed sockets in place of listen: %s", address, names)


def _names(adopted: Sequence[Listener]) -> list[str]:
    return list(dict.fromkeys(listener.passed or "" for listener in adopted))
