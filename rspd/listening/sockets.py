"""What this process listens on: sockets that systemd passed, and its own. The start and a reload both use this."""

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from math import inf
from typing import NamedTuple

from rspd.admin.request import CONTROL, MOST, of_worker
from rspd.engine.loop import Loop
from rspd.errors import ConfigError, StartError
from rspd.host.systemd import PassedSocket, runtime_folder, worker
from rspd.listening.allowing import allow, allow_as_usual
from rspd.listening.replacing import Binding, replace_listeners
from rspd.net.address import Address, SocketAddress, literal, own_listeners
from rspd.net.descriptors import TooFewError, reserve
from rspd.net.listener import NO_FILE, Listener, ListenError, adopt_listener, by_place, kept_listener
from rspd.net.resolver import Resolver
from rspd.net.waiting import GivenUp
from rspd.settings import Config, ProxyConfig

_NOT_ALLOWED, _TOO_FEW = (errno.EACCES, errno.EPERM), (errno.EMFILE, errno.ENFILE)
EXIT_CODES = {**dict.fromkeys(_NOT_ALLOWED, os.EX_NOPERM), **dict.fromkeys(_TOO_FEW, os.EX_OSERR)}

# Seconds for which a start under systemd goes on trying to listen, and seconds between two tries. The process that has
# the port may give it up. Each start that fails writes several lines to the journal, and systemd starts four a second.
LISTEN_PATIENCE = 5.0
LISTEN_AGAIN = 0.5

# Who waits there to ask, at most.
CONTROL_BACKLOG = 128

# Seconds for the lookup of a name in `metrics`, at a reload.
LOOKUP = 5.0

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What a proxy listens on: the sockets from systemd that it takes, and the addresses that are left to bind."""

    adopted: list[Listener]
    addresses: list[Address]


class Plan(NamedTuple):
    """How to listen.

    parts: of each proxy, by name. bindings: how each address is bound. pipes: for how many there is room.
    control, metrics: where those who look are answered; None for nowhere. why_none: why rspd does without the control
    socket that it has by default. control_mode, control_group: of its file; see `allow`.
    """

    parts: Mapping[str, Part]
    bindings: Mapping[Address, Binding]
    pipes: int
    control: Address | None
    metrics: Address | None
    control_mode: int
    control_group: str
    why_none: str = ""


class Opened(NamedTuple):
    """What is listened on: by each proxy, by name, and for who looks."""

    proxies: dict[str, list[Listener]]
    control: list[Listener]
    metrics: list[Listener]


class Sockets:
    """Opens the listeners of this process; the proxies own them.

    adopted: those that systemd passed. They stay to the end.
    """

    def __init__(
        self,
        loop: Loop,
        resolver: Resolver,
        passed: Sequence[PassedSocket],
        kept: Sequence[socket.SocketType] = (),
        lost: Sequence[tuple[socket.SocketType, tuple[int, int] | None]] = (),
        prepare: Callable[[Plan], Awaitable[object]] | None = None,
    ) -> None:
        """kept: listening sockets of the process before. The first `open` takes or closes each.

        lost: others of that process, as of `Inheritance`.
        prepare: awaited with each plan before anything is opened; may raise StartError.
        """
        self._prepare = prepare
        self._folder, self._worker = runtime_folder(), worker()
        self._loop = loop
        self._resolver = resolver
        self._kept = by_place(kept)
        self.adopted = [adopt_listener(name, sock) for name, sock in passed]
        # What is open already, without what is in `_kept`.
        self._open = [*self.adopted, *(kept_listener(sock, file or NO_FILE) for sock, file in lost)]

    async def listen(self, config: Config, patient: bool, tell: Callable[[str], object]) -> tuple[Plan, Opened]:
        """Listen for the first time. Raises StartError.

        patient: whether to wait for a port in use; `tell` is called with what is wrong then.
        """
        until = self._loop.now + (LISTEN_PATIENCE if patient else 0.0)
        told = False
        while True:
            try:
                plan = await self.plan(config, patient=True)
                return plan, self.open(plan, self._open)
            except ConfigError as error:
                raise StartError(str(error), os.EX_CONFIG) from None
            except ListenError as error:
                code = EXIT_CODES.get(error.errno or 0, os.EX_UNAVAILABLE)
                if code != os.EX_UNAVAILABLE or self._loop.now >= until:
                    raise StartError(str(error), code, error.errno or 0) from None
                if not told:
                    log.warning("%s; trying again for %g s", error, LISTEN_PATIENCE)
                    tell(str(error))
                    told = True
            await self._loop.sleep(LISTEN_AGAIN)

    async def plan(self, config: Config, patient: bool, given_up: GivenUp | None = None) -> Plan:
        """How to listen by a configuration. Nothing is bound yet.

        patient: whether to wait for a name as long as the system's resolver takes; else for `connect_timeout` at most.
        given_up: as for `Resolver.look_up`.
        Raises ConfigError, ListenError, or StartError if there are too few descriptors, or not what `prepare` needs.
        """
        parts = assign(config, self.adopted)
        bindings: dict[Address, Binding] = {}
        for proxy in config.proxies:
            for address in parts[proxy.name].addresses:
                where = await self._look_up(address, inf if patient else proxy.connect_timeout, given_up)
                bindings[address] = Binding(where, proxy.backlog, proxy.reuse_port)
        metrics = None if self._worker else config.metrics
        control = control_address(config.control, self._folder, self._worker)
        by_default = None
        if control and config.control is None:
            by_default, control = control, None
        for address in filter(None, (control, metrics)):
            where = await self._look_up(address, inf if patient else LOOKUP, given_up)
            bindings[address] = Binding(where, CONTROL_BACKLOG, private=True)
        plan = Plan(parts, bindings, 0, control, metrics, config.control_mode, config.control_group)
        return await (self._with_control(config, plan, by_default) if by_default else self._ready(config, plan))

    async def _with_control(self, config: Config, plan: Plan, control: Address) -> Plan:
        """A plan with the control socket that rspd has by default, or without it if it is in the way of anything."""
        why = f"rspd listens on {control} for others; name another place as control"
        if control not in plan.bindings and control not in {one.address for one in self.adopted}:
            where = [SocketAddress(socket.AF_UNIX, control.path)]
            binding = Binding(where, CONTROL_BACKLOG, private=True, optional=True)
            try:
                found = plan._replace(bindings={**plan.bindings, control: binding}, control=control)
                return await self._ready(config, found)
            except StartError as error:
                why = f"{error}, or say control: off"
        return await self._ready(config, plan._replace(why_none=why))

    async def _ready(self, config: Config, plan: Plan) -> Plan:
        """A plan once there are descriptors for it, and all else that it needs. Raises StartError."""
        wanted = sum(len(binding.where) for binding in plan.bindings.values())
        # A lost one stays beside its successor while clients wait there.
        lost = [one for one in self._open if one.lost and one.address in plan.bindings and one.waiting() != 0]
        listeners = len(self.adopted) + len(lost) + wanted
        pipes = make_room(config, listeners + (2 * MOST if plan.control or plan.metrics else 0))
        if self._prepare:
            await self._prepare(plan)
        return plan._replace(pipes=pipes)

    async def _look_up(self, address: Address, patience: float, given_up: GivenUp | None) -> Sequence[SocketAddress]:
        try:
            return await self._resolver.look_up(address, self._loop.now + patience, given_up)
        except OSError as error:
            raise ListenError(address, address, error) from None

    def open(self, plan: Plan, old: Sequence[Listener]) -> Opened:
        """Listen by a plan.

        old: those that are open. Those no longer wanted are closed. None may be watched meanwhile.
        Raises ListenError; then nothing has changed.
        """
        everyone = self._open = replace_listeners(old, plan.bindings, self._kept)
        self._kept = {}
        if plan.why_none:
            log.warning("nobody can look at this process, %s", plan.why_none)
        bound = [listener for listener in everyone if listener.passed is None]
        control = [listener for listener in bound if listener.address == plan.control]
        metrics = [listener for listener in bound if listener.address == plan.metrics]
        for listener in (one for one in bound if one.file and not one.lost):
            looked = listener in control or listener in metrics
            try:
                if looked:
                    allow(listener, plan.control_mode, plan.control_group)
                else:
                    allow_as_usual(listener)
            except OSError as error:
                what = "look is not as configured" if looked else f"connect to {listener.name} is not as usual"
                log.warning("who may %s: %s", what, error.strerror)
        return Opened(
            {
                name: part.adopted + [listener for listener in bound if listener.address in part.addresses]
                for name, part in plan.parts.items()
            },
            control,
            metrics,
        )


def control_address(wanted: Address | str | None, folder: str, worker: str) -> Address | None:
    """Where the control socket is. wanted: as in `Config`. folder: of systemd's. None: there is none."""
    if isinstance(wanted, str) or not (wanted or folder):
        return None
    path = wanted.path if wanted else os.path.join(folder, CONTROL)
    return Address(path=of_worker(path, worker) if worker else path)


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
