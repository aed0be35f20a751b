"""What is, as named tuples: made when somebody looks, sent as JSON, and read by who has asked.

Durations and ages are in seconds, and end at `Process.now`; inf where there is none or no bound. All counts go up from
the start of the service, over restarts that hand over. A name that is empty is that of a lone proxy, or of a proxy's
own pool. Lists are flat: each entry says where it belongs. A reader takes the default for what is missing and ignores
what it does not know, so that a command and a daemon of other versions understand each other.
"""

import json
import types
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import inf
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

# The upper bounds of the buckets of each distribution, in seconds; above the last one there is one bucket more.
CONNECT_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CONNECTION_BOUNDS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)
QUEUE_BOUNDS = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)
TURN_BOUNDS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5)
# What a connection is doing, in the order in which that may happen.
STATES = ("first bytes", "queued", "connecting", "open", "half-closed", "ending")
# The states of a backend, those in trouble first.
BACKEND_STATES = ("down", "trial", "full", "up")
NUMBER_MAX = 1 << 63  # above all counts, times and rates that there are
TEN_MINUTES = 600.0  # for so long failures are remembered, in seconds
OTHER = "other"  # stands for backends that are long gone: see `Tally`; no backend has this name


class Distribution(NamedTuple):
    """How many values were in each bucket, and their sum. counts: one more than there are bounds; none: not known."""

    counts: tuple[int, ...] = ()
    total: float = 0.0

    @property
    def number(self) -> int:
        """How many values there were."""
        return sum(self.counts)


class Process(NamedTuple):
    """The process, or those of one service together.

    age: since its start. service_age: since the start of the first process of which this one has taken over.
    origin: is in the ids of connections that this process accepted. lineage: the origin of that first process.
    now: when somebody looked (time(2)). worker: the number of a worker (rspd-worker@N); empty for others.
    processes: how many are summed up. unanswered: the sockets of those that did not answer in time.
    failure: why the last reload, or the last start, did not go by the file; empty if it did.
    reloads_failed, handovers: since the start of the service. strangers: sockets of other users, who were not asked.
    ending: whether it drains. descriptors_max: the limit. turns: how long the loop's turns took, if they are measured.
    """

    version: str = ""
    pid: int = 0
    worker: str = ""
    origin: str = ""
    lineage: str = ""
    now: float = 0.0
    age: float = 0.0
    service_age: float = 0.0
    processes: int = 1
    unanswered: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    failure: str = ""
    reloads: int = 0
    reloads_failed: int = 0
    handovers: int = 0
    ending: bool = False
    descriptors: int = 0
    descriptors_max: int = 0
    turns: Distribution = Distribution()


class Listener(NamedTuple):
    """Where a proxy listens. waiting: how many clients are in the backlog; None where the kernel does not count them.

    passed: the name of a socket from systemd; empty for one of our own.
    """

    address: str = ""
    waiting: int | None = 0
    passed: str = ""


class Ends(NamedTuple):
    """How many connections of a proxy ended, by backend and cause. backend: `-` for those that had none, or OTHER."""

    backend: str = "-"
    cause: str = ""
    number: int = 0


class Volume(NamedTuple):
    """Bytes of a proxy's connections, open ones too, by backend. sent: from clients. received: from backends."""

    backend: str = "-"
    sent: int = 0
    received: int = 0


class Failure(NamedTuple):
    """What went wrong within ten minutes. cause: of the end, or `refused: ...`. reason: of the last one. ago: since."""

    cause: str = ""
    backend: str = "-"
    number: int = 0
    reason: str = ""
    ago: float = 0.0


class Rate(NamedTuple):
    """What went on each second, on the average: connections begun, bytes from clients, bytes from backends."""

    connections: float = 0.0
    sent: float = 0.0
    received: float = 0.0


class Refusals(NamedTuple):
    """How many clients were refused by `allow`, `deny` or `max_connections_per_client`. reason: the key's name."""

    reason: str = ""
    number: int = 0


class Proxy(NamedTuple):
    """A proxy. retired: whether it was taken out and still has connections.

    open: connections now. most: `max_connections`. accepted: so far, refused ones too. silent: who has yet to say what
    it wants. queue: who waits for a backend. full_in: in how many processes all its places are taken. seconds: how long
    connections lasted. queue_seconds: how long clients waited for a backend. last_10s, last_minute: rates.
    """

    name: str = ""
    retired: bool = False
    listeners: tuple[Listener, ...] = ()
    open: int = 0
    most: int = 0
    accepted: int = 0
    silent: int = 0
    queue: int = 0
    idle: float = 0.0
    last_10s: Rate = Rate()
    last_minute: Rate = Rate()
    refused: tuple[Refusals, ...] = ()
    ends: tuple[Ends, ...] = ()
    volumes: tuple[Volume, ...] = ()
    failures: tuple[Failure, ...] = ()
    seconds: Distribution = Distribution()
    queue_seconds: Distribution = Distribution()
    full_in: int = 0


class Route(NamedTuple):
    """A route. says: what it says of clients. pool: the name of its pool, see `Pool`. clients: who took it so far."""

    proxy: str = ""
    name: str = ""
    says: str = ""
    pool: str = ""
    pool_shared: bool = False
    clients: int = 0


class Pool(NamedTuple):
    """A pool. proxy, name: where it is; both empty for the pool of a lone proxy.

    shared: whether it is one of the whole file; then `proxy` is empty. queue: who waits for one of its backends.
    route: the name of the route whose own pool it is; empty for others.
    """

    proxy: str = ""
    name: str = ""
    shared: bool = False
    balance: str = ""
    queue: int = 0
    route: str = ""


class Checks(NamedTuple):
    """The checks of a backend. ago: since the last one. last_good: whether it was; reason: why it was not."""

    good: int = 0
    bad: int = 0
    ago: float = inf
    last_good: bool = True
    reason: str = ""


class Backend(NamedTuple):
    """A backend. proxy, pool, shared, route: as for `Pool`.

    state: up, full, down or trial. state_age: for how long it has been in service, or out of it. why: why it is out.
    open: its connections, those being dialled too. limit: of these; inf: none. chosen: connections it got so far.
    connect: how long connecting took, where it succeeded. failed: how often it did not. checks: None if it has none.
    in_service_in: of how many processes it is in service in, where several are summed up.
    """

    proxy: str = ""
    pool: str = ""
    shared: bool = False
    name: str = ""
    state: str = "up"
    state_age: float = 0.0
    why: str = ""
    backup: bool = False
    weight: int = 1
    open: int = 0
    limit: float = inf
    chosen: int = 0
    failed: int = 0
    connect: Distribution = Distribution()
    checks: Checks | None = None
    in_service_in: int = 1
    route: str = ""

    @property
    def in_service(self) -> bool:
        """Whether it may get connections, now or when it has room."""
        return self.state in ("up", "full")


class Connection(NamedTuple):
    """An open connection. id: no other one has it, over workers and handovers.

    client, via: who it is, and the peer that said so, if any. backend, near: once it has one, and rspd's end there.
    age: since it was accepted. idle: since the last byte. state: one of STATES. said: name and protocol, as in the log.
    rate: bytes a second, both ways, since the last sample. handovers: how often it went to another process.
    """

    id: str = ""
    proxy: str = ""
    client: str = ""
    via: str = ""
    backend: str = ""
    route: str = ""
    said: str = ""
    state: str = "open"
    age: float = 0.0
    idle: float = 0.0
    sent: int = 0
    received: int = 0
    rate: float = 0.0
    handovers: int = 0
    near: str = ""


class Snapshot(NamedTuple):
    """All but the connections."""

    process: Process = Process()
    proxies: tuple[Proxy, ...] = ()
    routes: tuple[Route, ...] = ()
    pools: tuple[Pool, ...] = ()
    backends: tuple[Backend, ...] = ()


class Connections(NamedTuple):
    """Those that were asked for. matching: how many there are, of which `connections` may be the first few."""

    process: Process = Process()
    matching: int = 0
    connections: tuple[Connection, ...] = ()


def plain(value: object) -> Any:
    """A named tuple as a value for JSON: an object by the names of its fields. inf becomes null there."""
    if hasattr(value, "_fields"):
        return {name: plain(field) for name, field in zip(value._fields, value, strict=True)}  # type: ignore[call-overload]
    if isinstance(value, tuple):
        return [plain(entry) for entry in value]
    return None if value == inf else value


def as_json(value: object) -> str:
    """A named tuple as JSON, in one line."""
    return json.dumps(plain(value), separators=(",", ":"))


def read(kind: type[T], value: Any) -> T:
    """The named tuple of a value that JSON had. Raises ValueError if it does not fit."""
    return _reader(kind)(value)  # type: ignore[arg-type, no-any-return]


@lru_cache(None)
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What reads values of a kind. It is made once a kind, for a daemon with 100 backends says 5,000 values."""
    if hasattr(kind, "_fields"):
        return partial(_read_tuple, kind, [(name, _reader(field)) for name, field in get_type_hints(kind).items()])
    if get_origin(kind) is tuple:
        return partial(_read_list, _reader(get_args(kind)[0]))
    if get_origin(kind) in (Union, types.UnionType):
        reader = _reader(get_args(kind)[0])
        return lambda value: None if value is None else reader(value)
    return partial(_read_value, kind)


def _read_tuple(kind: Any, readers: Sequence[tuple[str, Callable[[Any], Any]]], value: Any) -> Any:
    if type(value) is not dict:
        raise ValueError(f"expected an object for {kind.__name__}, found {value!r:.80}")
    return kind(**{name: reader(value[name]) for name, reader in readers if name in value})


def _read_list(reader: Callable[[Any], Any], value: Any) -> Any:
    if type(value) is not list:
        raise ValueError(f"expected a list, found {value!r:.80}")
    return tuple(map(reader, value))


def _read_value(kind: Any, value: Any) -> Any:
    if type(value) is kind and (kind is str or abs(value) < NUMBER_MAX):
        return value
    whole = kind is float and type(value) is int
    if (kind is float and value is None) or (whole and abs(value) < NUMBER_MAX):
        return inf if value is None else float(value)
    what = f"a number below {NUMBER_MAX:.0e}" if whole or type(value) is kind else kind.__name__
    raise ValueError(f"expected {what}, found {value!r:.80}")
