"""Which socket from systemd goes with which proxy and address, and our own listeners over reloads."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rspd.errors import ConfigError
from rspd.net.address import Address, SocketAddress, own_listeners
from rspd.net.listener import Listener, ListenError, open_listeners
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


class Binding(NamedTuple):
    """How a configured address is to be listened on: what it stands for, and the options of its proxy."""

    where: Sequence[SocketAddress]
    backlog: int
    reuse_port: bool = False


def replace_listeners(old: Sequence[Listener], wanted: Mapping[Address, Binding]) -> list[Listener]:
    """Listeners for the wanted addresses. Old listeners that are still wanted stay; the other old ones are closed.

    Listeners from systemd always stay: rspd could not get a closed one back.
    No old listener may be watched meanwhile. Raises ListenError; then the old listeners are as they were.
    """
    adopted = [listener for listener in old if listener.passed is not None]
    bound = [listener for listener in old if listener.passed is None]
    staying = [listener for listener in bound if listener.address in wanted]
    leaving = [listener for listener in bound if listener.address not in wanted]
    known = {listener.address for listener in bound}
    coming = {address: binding for address, binding in wanted.items() if address not in known}
    try:
        opened = _open_all(coming)
    except ListenError as error:
        ports = {address.port for address in coming}
        in_the_way = [listener for listener in leaving if listener.address.port in ports - {0}]
        if error.errno != errno.EADDRINUSE or not in_the_way:
            raise
        # An old listener may be in the way: 8080 is in the way of 127.0.0.1:8080. A client that comes now is refused.
        for listener in in_the_way:
            listener.rest()
        try:
            opened = _open_all(coming)
        except ListenError:
            for listener in in_the_way:
                listener.listen(listener.backlog)
            raise
    for listener in leaving:
        listener.close()
    for listener in staying:
        binding = wanted[listener.address]
        listener.listen(binding.backlog)
        if binding.reuse_port:
            listener.share_port()
    return adopted + staying + opened


def _open_all(bindings: Mapping[Address, Binding]) -> list[Listener]:
    opened: list[Listener] = []
    try:
        for address, binding in bindings.items():
            opened += open_listeners(address, binding.where, binding.backlog, binding.reuse_port)
    except ListenError:
        for listener in opened:
            listener.close()
        raise
    return opened
