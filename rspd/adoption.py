"""Which of the sockets that systemd passed goes with which address in `listen`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rspd.address import Address
from rspd.config import ProxyConfig, own_listeners
from rspd.listener import Listener
from rspd.yamlfile import ConfigError

log = logging.getLogger(__name__)


def addresses_to_bind(config: ProxyConfig, adopted: Sequence[Listener]) -> list[Address]:
    """The addresses of `listen` that are left to bind besides the adopted listeners.

    Where `listen` names some of those (`fd://NAME`), it has to name all; where it names none, they take its place.
    Raises ConfigError if they do not fit.
    """
    passed = _names(adopted)
    named = [address.passed for address in config.listen if address.passed]
    what = f"passed are {', '.join(passed)}" if passed else "none was passed; is its socket unit active?"
    errors = [f"listen fd://{name}: no such socket from systemd, {what}" for name in named if name not in passed]
    if named:
        unnamed = [name for name in passed if name not in named]
        errors += [f"socket {name!r} from systemd: not in listen; add fd://{name}, or stop it" for name in unnamed]
    backends = [backend.address for backend in config.backends]
    errors += own_listeners([listener.address for listener in adopted], backends)
    if errors:
        raise ConfigError(errors)
    return [address for address in config.listen if not address.passed] if named or not passed else []


def log_replaced(config: ProxyConfig, adopted: Sequence[Listener]) -> None:
    """Log which addresses of `listen` the adopted listeners took the place of, and do not listen on."""
    if not adopted or any(address.passed for address in config.listen):
        return
    covered = {listener.address for listener in adopted}
    for address in config.listen:
        if address not in covered:
            names = ", ".join(_names(adopted))
            log.info("not listening on %s, systemd passed sockets in place of listen: %s", address, names)


def _names(adopted: Sequence[Listener]) -> list[str]:
    return list(dict.fromkeys(listener.passed or "" for listener in adopted))
