"""What this process listens on: sockets that systemd passed, and its own. The start and a reload both use this."""

import errno
import logging
import os
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import inf
from typing import NamedTuple

from rspd.engine.loop import Loop
from rspd.errors import ConfigError, StartError
from rspd.host.systemd import PassedSocket
from rspd.listening.replacing import Binding, replace_listeners
from rspd.net.address import Address, literal, own_listeners
from rspd.net.descriptors import TooFewError, reserve
from rspd.net.listener import Listener, ListenError, adopt_listener, by_place
from rspd.net.resolver import Resolver
from rspd.net.waiting import GivenUp
from rspd.settings import Config, ProxyConfig

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What a proxy listens on: the sockets from systemd that it takes, and the addresses that are left to bind."""

    adopted: list[Listener]
    addresses: list[Address]


class Plan(NamedTuple):
    """How to listen: the part of each proxy, by name; how each address is bound; for how many pipes there is room."""

    parts: Mapping[str, Part]
    bindings: Mapping[Address, Binding]
    pipes: int


class Sockets:
    """Opens the listeners of this process; the proxies own them.

    adopted: those that systemd passed. They stay to the end.
    """

    def __init__(
        self, loop: Loop, resolver: Resolver, passed: Sequence[PassedSocket], kept: Sequence[socket.SocketType] = ()
    ) -> None:
        """kept: listening sockets of the process before. The first `open` takes or closes each."""
        self._loop = loop
        self._resolver = resolver
        self._kept = by_place(kept)
        self.adopted = [adopt_listener(name, sock) for name, sock in passed]

    async def plan(self, config: Config, patient: bool, given_up: GivenUp | None = None) -> Plan:
        """How to listen by a configuration. Nothing is bound yet.

        patient: whether to wait for a name as long as the system's resolver takes; else for `connect_timeout` at most.
        given_up: as for `Resolver.look_up`.
        Raises ConfigError, ListenError, or StartError if there are too few descriptors.
        """
        parts = assign(config, self.adopted)
        bindings: dict[Address, Binding] = {}
        for proxy in config.proxies:
            for address in parts[proxy.name].addresses:
                deadline = inf if patient else self._loop.now + proxy.connect_timeout
                try:
                    where = await self._resolver.look_up(address, deadline, given_up)
                except OSError as error:
                    raise ListenError(address, address, error) from None
                bindings[address] = Binding(where, proxy.backlog, proxy.reuse_port)
        listeners = len(self.adopted) + sum(len(binding.where) for binding in bindings.values())
        return Plan(parts, bindings, make_room(config, listeners))

    def open(self, plan: Plan, old: Sequence[Listener]) -> dict[str, list[Listener]]:
        """Listen by a plan; the listeners of each proxy, by its name.

        old: those that are open. Those no longer wanted are closed. None may be watched meanwhile.
        Raises ListenError; then nothing has changed.
        """
        everyone = replace_listeners(old, plan.bindings, self._kept)
        self._kept = {}
        bound = [listener for listener in everyone if listener.passed is None]
        return {
            name: part.adopted + [listener for listener in bound if listener.address in part.addresses]
            for name, part in plan.parts.items()
        }


def make_room(config: Config, listeners: int) -> int:
    """Make room for the descriptors that a configuration needs, and for pipes: returns how many. Raises StartError."""
    connections = sum(proxy.max_connections for proxy in config.proxies)
    # Each check of a backend has a socket; each lookup has a socket or a file.
    backends = [(pool, backend) for pool in config.every_pool for backend in pool.backends]
    checks = [health for pool, backend in backends if (health := pool.health_of(backend))]
    asked = [backend.address for _, backend in backends] + [health.address for health in checks if health.address]
    names = sum(not literal(address) for address in asked)
    try:
        return reserve(connections, listeners + len(checks) + names)
    except TooFewError as error:
        needed, limit, fitting = error.args
        advice = f"lower it to {fitting} or raise" if fitting > 0 else "raise"
        several = "" if len(config.proxies) == 1 else " (of all proxies together)"
        needs = f"max_connections {connections}{several} needs {needed} descriptors, and the limit is {limit}"
        where = "(LimitNOFILE= in the unit, ulimit -Hn in a shell)"
        raise StartError(f"{needs}: {advice} the limit {where}", os.EX_OSERR, errno.EMFILE) from None


def assign(config: Config, adopted: Sequence[Listener]) -> dict[str, Part]:
    """What each proxy listens on, by the proxies' names.

    A proxy takes the sockets that its `listen` names (`fd://NAME`). If `listen` names none, the proxy takes the sockets
    that have its own name, in place of the addresses in `listen`; a lone proxy takes all sockets.
    Raises ConfigError if no proxy takes some socket, or if some proxy has nothing to listen on.
    """
    alone = len(config.proxies) == 1
    passed = dict.fromkeys(listener.passed or "" for listener in adopted)
    named = {address.passed for proxy in config.proxies for address in proxy.listen}
    parts = {proxy.name: _part(proxy, adopted, passed if alone else {proxy.name} - named) for proxy in config.proxies}
    errors = [fault for proxy in config.proxies for fault in _faults(config, proxy, parts[proxy.name], passed)]
    taken = {listener.passed for part in parts.values() for listener in part.adopted}
    several = "" if alone else ", or call it as a proxy (FileDescriptorName=)"
    nobodys = [name for name in passed if name not in taken]
    errors += [f"socket {name!r} from systemd: not in listen; add fd://{name}{several}, or stop it" for name in nobodys]
    if errors:
        raise ConfigError(errors)
    return parts


def _part(proxy: ProxyConfig, adopted: Sequence[Listener], default: Collection[str | None]) -> Part:
    """What a proxy listens on. default: the names of the sockets that it takes if its `listen` names none."""
    named = [address.passed for address in proxy.listen if address.passed]
    own = [listener for listener in adopted if listener.passed in (named or default)]
    return Part(own, [] if own and not named else [address for address in proxy.listen if not address.passed])


def _faults(config: Config, proxy: ProxyConfig, part: Part, passed: Collection[str]) -> Iterator[str]:
    """An error for each thing that is wrong with what a proxy listens on. passed: the names of all sockets."""
    place = f"proxies.{proxy.name}.listen" if proxy.name else "listen"
    what = f"passed are {', '.join(passed)}" if passed else "none was passed; is its socket unit active?"
    for address in proxy.listen:
        if address.passed and address.passed not in passed:
            yield f"{place} {address}: no such socket from systemd, {what}"
    if not proxy.listen and not part.adopted:
        yield f"{place}: missing, expected an address, or a socket from systemd named {proxy.name}"
    adopted = [one.address for one in part.adopted]
    for settings, backend in ((pool, backend) for pool in config.pools_of(proxy) for backend in pool.backends):
        health = settings.health_of(backend)
        yield from (f"backend {what}" for what in own_listeners(adopted, [backend.address]))
        if health and health.elsewhere:
            for what in own_listeners(adopted, [health.target(backend.address)]):
                yield f"a check of backend {backend} would ask this proxy: {what}"


def log_replaced(config: Config, parts: Mapping[str, Part]) -> None:
    """Log the addresses in `listen` that are not listened on, because sockets from systemd took their place."""
    for proxy in config.proxies:
        adopted, bound = parts[proxy.name]
        listening = {*bound, *(listener.address for listener in adopted)}
        names = ", ".join(dict.fromkeys(listener.passed or "" for listener in adopted))
        for address in proxy.listen:
            if not address.passed and address not in listening:
                log.info("not listening on %s, systemd passed sockets in place of listen: %s", address, names)
