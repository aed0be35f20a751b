"""What is wrong with a running rspd, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from rspd.commands.asking import quoted, unit_of
from rspd.commands.words import counted, duration, safe, title_of
from rspd.engine.cause import OF_BACKENDS
from rspd.snapshot import TEN_MINUTES, Backend, Connection, Failure, Pool, Process, Proxy, Snapshot

# The part of the descriptors from which on they are about to run out.
DESCRIPTORS_PART = 0.9

# Failures of one cause in ten minutes from which on they are many, if they are as large a part of all connections.
MANY, MANY_PART = 10, 0.02

ALL_FULL = "each backend that is up has as many connections as its max_connections allows; raise it, or add a backend"

# How many of the backends of a pool that are down are named.
NAMED_MAX = 3

NOBODY: Mapping[str, Connection] = MappingProxyType({})


def troubles(snapshot: Snapshot, idlest: Mapping[str, Connection] = NOBODY, where: str = "") -> list[str]:
    """What is wrong now, a sentence each, the most urgent first; empty if all is well.

    idlest: by the name of a proxy, which of its connections has been silent for longest, where `full` says so.
    where: the options that name the service, see `asking.where`.
    """
    process = snapshot.process
    configured = [proxy for proxy in snapshot.proxies if not proxy.retired]
    members = by_pool(snapshot)
    dead = [pool for pool in snapshot.pools if not any(serves(one, process) for one in members[pool[:3]])]
    return [
        *_ending(snapshot),
        *(_dead(pool, members[pool[:3]]) for pool in dead),
        *(_full(proxy, process, idlest.get(proxy.name), where) for proxy in configured if full(proxy, process)),
        *(_queue(pool) for pool in snapshot.pools if pool.queue and pool not in dead),
        *_descriptors(process),
        *([f"the configuration file is not in force: {_sentence(process.failure)}"] if process.failure else []),
        *map(_unanswered, process.unanswered),
        *([left_out(process.strangers)] if process.strangers else []),
        *_down(process, {pool: members[pool[:3]] for pool in snapshot.pools if pool not in dead}),
        *_failures(snapshot, configured),
    ]


def full(proxy: Proxy, process: Process) -> bool:
    """Whether clients wait since all places of a proxy are taken; or may wait, where the kernel does not count them.

    Where only some of several processes are full, those who wait at a socket that all share are about to be accepted by
    the others. At a port that they share by reuse_port they wait for the one to which the kernel gave them.
    """
    if proxy.retired or not proxy.full_in:
        return False
    if proxy.full_in < process.processes:
        return any(listener.waiting and not listener.passed for listener in proxy.listeners)
    return any(listener.waiting is None or listener.waiting for listener in proxy.listeners)


def is_there(proxy: Proxy) -> bool:
    """Whether a proxy is to be shown. If it was taken out and its last connection has ended, only its counts stay."""
    return not proxy.retired or proxy.open > 0


def serves(backend: Backend, process: Process) -> bool:
    """Whether a backend is in service, in one of the processes at least."""
    return backend.in_service or (process.processes > 1 and backend.in_service_in > 0)


def by_pool(snapshot: Snapshot) -> Mapping[tuple[str, str, bool], list[Backend]]:
    """The backends of each pool, by `pool[:3]`."""
    found: dict[tuple[str, str, bool], list[Backend]] = {pool[:3]: [] for pool in snapshot.pools}
    for backend in snapshot.backends:
        found.setdefault(backend[:3], []).append(backend)
    return found


def unserved(snapshots: Sequence[Snapshot], unanswered: Sequence[str]) -> list[str]:
    """A line for each proxy that can serve nobody in any process of the service, with the reason.

    And one for each process without an answer: systemd has given it its part of the clients, and they may wait in vain.
    """
    return [*_unserved(snapshots), *map(_unanswered, unanswered)]


def _unserved(snapshots: Sequence[Snapshot]) -> list[str]:
    reasons: dict[str, str] = {}
    served = set()
    for snapshot in snapshots:
        for proxy in snapshot.proxies:
            if not proxy.retired:
                reason = _why_unserved(snapshot, proxy)
                reasons.setdefault(proxy.name, reason)
                if not reason:
                    served.add(proxy.name)
    if not reasons:
        return ["no proxy is configured"]
    return [_at(safe(name), reason) for name, reason in reasons.items() if name not in served]


def _why_unserved(snapshot: Snapshot, proxy: Proxy) -> str:
    """Empty if it can serve somebody."""
    if snapshot.process.ending:
        return "rspd is ending and accepts nobody"
    if not proxy.listeners:
        return "it listens nowhere"
    shared = {route.pool for route in snapshot.routes if route.proxy == proxy.name and route.pool_shared}
    out = []
    for one in snapshot.backends:
        if (one.pool in shared) if one.shared else (one.proxy == proxy.name):
            if serves(one, snapshot.process):
                return ""
            out.append(f"{safe(one.name)}: {safe(one.why) or one.state}")
    return f"no backend is in service ({_first(out)})" if out else "no backend is known"


def _at(name: str, text: str) -> str:
    return f"{name}: {text}" if name else text


def _first(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - NAMED_MAX:,} more"] if len(texts) > NAMED_MAX else []
    return "; ".join([*texts[:NAMED_MAX], *more])


def _sentence(text: str) -> str:
    """A text of several lines in one."""
    return "; ".join(safe(line) for line in text.splitlines())


def _name_of(pool: Pool) -> str:
    """Where a pool is; empty for a lone proxy's own pool."""
    return safe(", ".join(part for part in (pool.proxy, title_of(pool.name, pool.route)) if part))


def _ending(snapshot: Snapshot) -> Iterator[str]:
    process = snapshot.process
    if process.ending:
        number = counted(sum(proxy.open for proxy in snapshot.proxies), "connection")
        which = "rspd" if process.processes == 1 else f"at least one of {process.processes} processes"
        yield f"{which} is ending and accepts nobody; {number} still open"


def _out(backend: Backend) -> str:
    """For how long it has been out of service, and why."""
    return f"{safe(backend.name)} has been down for {duration(backend.state_age)}{_why(backend)}"


def _why(backend: Backend) -> str:
    return f": {safe(backend.why)}" if backend.why else ""


def _dead(pool: Pool, backends: Sequence[Backend]) -> str:
    out = f"no backend is in service: {_first(list(map(_out, backends)))}" if backends else "no backend is known yet"
    return _at(_name_of(pool), out)


def _full(proxy: Proxy, process: Process, idlest: Connection | None, where: str) -> str:
    waiting = sum(listener.waiting or 0 for listener in proxy.listeners)
    if waiting:
        wait = "1 client waits" if waiting == 1 else f"{waiting:,} clients wait"
    else:
        wait = "clients may wait, the kernel does not count them"
    some = ""
    if proxy.full_in < process.processes:
        some = f" in {proxy.full_in} of {process.processes} processes"
    text = f"all places taken{some}: serving {proxy.open:,} of {proxy.most:,}, {wait}"
    if idlest:
        client = safe(idlest.client) or "a client"
        ages = f"{duration(idlest.age)} (idle {duration(idlest.idle)})"
        text += f"; the client {client} has had {'the' if proxy.most == 1 else 'its'} place for {ages}"
        text += ", the longest of all" if proxy.most > 1 else ""
    option = f" --proxy {safe(quoted(proxy.name))}" if proxy.name else ""
    return _at(safe(proxy.name), f"{text}; raise max_connections, or see rspd connections{where}{option} --sort idle")


def _queue(pool: Pool) -> str:
    wait = "1 client waits" if pool.queue == 1 else f"{pool.queue:,} clients wait"
    return _at(_name_of(pool), f"{wait} for a backend: {ALL_FULL}")


def _descriptors(process: Process) -> Iterator[str]:
    if process.descriptors_max and process.descriptors > DESCRIPTORS_PART * process.descriptors_max:
        number = f"{process.descriptors:,} of {process.descriptors_max:,} descriptors are open"
        yield f"{number}: raise LimitNOFILE= of the unit, or lower max_connections"


def _unanswered(path: str) -> str:
    return f"no answer from {safe(path)}: that process is missing here; see systemctl status {safe(unit_of(path))}"


def left_out(strangers: Sequence[str]) -> str:
    """What is to be said of sockets that other users made, in one line: there may be as many as somebody likes."""
    first, others = safe(strangers[0]), len(strangers) - 1
    what, them = (f"{first} and {others:,} more are", "them") if others else (f"{first} is", "it")
    return f"{what} left out: another user made {them}, and who answers there may lie; remove {them}"


def _down(process: Process, pools: Mapping[Pool, Sequence[Backend]]) -> Iterator[str]:
    """Backends that are out while others of their pool are in service; in each pool, the latest first."""
    for pool, backends in pools.items():
        down = sorted((one for one in backends if not one.in_service), key=lambda one: one.state_age)
        count = sum(serves(one, process) for one in backends)
        if len(down) > NAMED_MAX:
            where = "" if process.processes == 1 else " in one process or more"
            number = f"{len(down):,} of {len(backends):,} backends are down{where}"
            yield _at(_name_of(pool), f"{number}: {_first(list(map(_out, down)))}")
            continue
        for one in down:
            text = f"backend {_out(one)}; {count:,} of {len(backends):,} in service"
            if serves(one, process):
                some = f"down in {process.processes - one.in_service_in} of {process.processes} processes"
                text = f"backend {safe(one.name)} is {some}, for {duration(one.state_age)}{_why(one)}"
            yield _at(_name_of(pool), text)


def _failures(snapshot: Snapshot, proxies: Sequence[Proxy]) -> Iterator[str]:
    """Failures that are many, if no backend that is out explains them."""
    out = {one.name for one in snapshot.backends if not one.in_service}
    for proxy in proxies:
        least = max(MANY, MANY_PART * TEN_MINUTES * proxy.last_minute.connections)
        for failure in proxy.failures:
            many = failure.number >= least and failure.cause in OF_BACKENDS
            if (many or failure.cause == "error") and failure.backend not in out:
                yield _at(safe(proxy.name), _failure(failure))


def _failure(failure: Failure) -> str:
    where = f" at {safe(failure.backend)}" if failure.backend != "-" else ""
    reason = f": {safe(failure.reason)}" if failure.reason else ""
    times = f"{failure.number:,} times" if failure.number > 1 else "once"
    what = f"{safe(failure.cause)}{where} {times} in the last ten minutes"
    return f"{what}, the last one {duration(failure.ago)} ago{reason}"
