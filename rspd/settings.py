"""What is wanted of rspd, as named tuples. Every default is here, once."""

from math import inf
from typing import Literal, NamedTuple

from rspd.net.address import Address
from rspd.net.networks import Network

DEFAULT_FILE = "/etc/rspd.yaml"

# The words for the policies in balancing/policies.py.
BALANCES = ("round-robin", "least-connections", "random", "source")


class StatusRange(NamedTuple):
    """HTTP statuses from `first` to `last`."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


class HealthConfig(NamedTuple):
    """How backends are checked: by connecting, and by an answer to `http` or `send`. Durations are in seconds."""

    interval: float = 5.0
    timeout: float = 2.0  # of one check, connecting included
    rise: int = 2  # so many good checks in a row, and a backend is up
    fall: int = 3  # so many bad checks in a row, and it is down
    port: int | None = None  # the port of the backend's host to ask; None: the backend's own
    address: Address | None = None  # what to ask in place of the backend; port 0: at `port`, or at the backend's port
    http: str = ""  # the path to GET
    host: str = ""  # the Host header; else the backend's address
    status: tuple[StatusRange, ...] = (StatusRange(200, 399),)  # the statuses that are good
    send: bytes = b""  # what to send first
    expect: bytes = b""  # what the answer has to contain

    @property
    def elsewhere(self) -> bool:
        """Whether the check asks something else than the backend's own address."""
        return bool(self.port or self.address)

    def target(self, backend: Address) -> Address:
        """The address that the check of a backend asks."""
        where = self.address or backend
        if self.port or not (where.port or where.path):
            where = where._replace(port=self.port or backend.port)
        return where


class BackendConfig(NamedTuple):
    """One backend of a proxy, and which connections it gets. None: as the proxy says."""

    address: Address
    weight: int = 1
    backup: bool = False  # gets connections only while no other is up
    max_connections: float = inf  # at once; further ones wait, or go elsewhere
    max_fails: float | None = None
    fail_timeout: float | None = None
    health: HealthConfig | Literal["off"] | None = None

    def __str__(self) -> str:
        return str(self.address)


class ErrorPage(NamedTuple):
    """The page of an answer to an HTTP client. path: the file that it is from. content: what was in it."""

    status: int
    path: str
    content: bytes


class ProxyConfig(NamedTuple):
    """One proxy. Durations are in seconds; `inf` is off, or no limit. It has backends, or routes."""

    listen: tuple[Address, ...]  # may be empty where systemd passes sockets
    backends: tuple[BackendConfig, ...]
    name: str = ""  # empty where the file has one proxy, without a name
    max_connections: int = 1
    backlog: int = 4096
    reuse_port: bool = False  # for TCP listeners, not for sockets from systemd
    connect_timeout: float = 5.0
    idle_timeout: float = 60.0
    half_close: bool = True  # whether one direction goes on when the other has ended
    half_close_timeout: float = 30.0
    drain_timeout: float = 30.0
    balance: str = "round-robin"  # one of BALANCES
    resolve: str = "one"  # one: a name is one backend; each: each address of it is one
    resolve_interval: float = 10.0  # how often names are looked up again; finite
    retries: float = inf  # further backends tried for a client; inf: all
    max_fails: float = 1  # so many failures within fail_timeout, and a backend is out; inf: failures do not count
    fail_timeout: float = 10.0  # finite
    queue_timeout: float = 0.0  # how long clients wait while no backend is up; finite, 0: not at all
    health: HealthConfig | None = None
    on_down: str = "keep"  # keep, or abort: what becomes of the connections of a backend that went down
    send_proxy: str = ""  # v1, v2, or empty for off
    accept_proxy: tuple[Network, ...] = ()  # the peers that send a PROXY header
    accept_proxy_timeout: float = 5.0  # finite
    allow: tuple[Network, ...] = ()  # empty: everybody
    deny: tuple[Network, ...] = ()
    max_connections_per_client: float = inf
    first_bytes_timeout: float = 5.0  # finite
    error_pages: tuple[ErrorPage, ...] = ()
    log_start: bool = False  # whether the log has a line when a backend has been reached
    routes: tuple["RouteConfig", ...] = ()
    pools: tuple["NamedPool", ...] = ()  # its own; further ones are in Config

    @property
    def own_pools(self) -> list["ProxyConfig"]:
        """What each pool that only this proxy has goes by."""
        named = [pool.settings for pool in self.pools]
        routes = [route.settings for route in self.routes if not route.pool]
        return [self, *named, *routes] if self.backends else [*named, *routes]

    @property
    def shared_pools(self) -> set[str]:
        """The names of the pools of the whole file that its routes lead to."""
        return {route.pool for route in self.routes if route.pool} - {pool.name for pool in self.pools}

    def max_fails_of(self, backend: BackendConfig) -> float:
        """The `max_fails` of a backend."""
        return self.max_fails if backend.max_fails is None else backend.max_fails

    def fail_timeout_of(self, backend: BackendConfig) -> float:
        """The `fail_timeout` of a backend."""
        return self.fail_timeout if backend.fail_timeout is None else backend.fail_timeout

    def health_of(self, backend: BackendConfig) -> HealthConfig | None:
        """How a backend is checked; None: not at all."""
        return self.health if backend.health is None else None if backend.health == "off" else backend.health


class NamedPool(NamedTuple):
    """A pool that routes name. settings: what it goes by; of a ProxyConfig, only what concerns a pool counts."""

    name: str
    settings: ProxyConfig


class RouteConfig(NamedTuple):
    """A route: which clients take it, and where it leads. All that it says of a client has to hold.

    name: for people; no other route of its proxy has it.
    settings: what its connections go by, and its pool if it has one of its own: the proxy's, but for what it says.
    server_name, alpn: of TLS. host, path: of HTTP. A name may be `*.example.org`. Empty: it does not matter.
    protocol: the words of protocols/first.py.
    networks: where clients come from, `from` in the file.
    pool: the name of the pool, of the proxy or of the whole file; empty: its own, with `settings.backends`.
    """

    name: str
    settings: ProxyConfig
    server_name: tuple[str, ...] = ()
    alpn: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    protocol: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    pool: str = ""

    @property
    def key(self) -> str:
        """What it says of clients, in one line. No other route of its proxy says the same."""
        said = {**self._asdict(), "from": self.networks}
        keys = ("server_name", "alpn", "host", "path", "protocol", "from")
        return " ".join(f"{key}={','.join(sorted(map(str, said[key])))}" for key in keys if said[key])

    def meets(self, other: "RouteConfig") -> bool:
        """Whether both are for one name and one path, of one protocol."""
        return (
            self.protocols == other.protocols
            and not {*(self.server_name or self.host or ("",))}.isdisjoint(other.server_name or other.host or ("",))
            and not {*(self.path or ("",))}.isdisjoint(other.path or ("",))
        )

    @property
    def protocols(self) -> frozenset[str]:
        """The protocols of which a client may be; empty: any, even an unknown one, or none."""
        if self.server_name or self.alpn:
            return frozenset({"tls"})
        return frozenset({"http"}) if self.host or self.path else frozenset(self.protocol)


class Config(NamedTuple):
    """The whole configuration."""

    proxies: tuple[ProxyConfig, ...]
    log_level: str = "info"
    exit_idle_time: float = inf
    control: Address | str | None = None  # a unix socket's path, or `off`; None: in systemd's folder, if there is one
    control_mode: int = 0o660
    control_group: str = ""  # empty: that of the process
    metrics: Address | None = None  # None: nowhere
    handover: bool = True  # whether connections go on in the next process when the service restarts
    pools: tuple[NamedPool, ...] = ()  # those that routes of all proxies may name

    def pools_of(self, proxy: ProxyConfig) -> list[ProxyConfig]:
        """What each pool goes by from which a proxy's clients may get a backend."""
        shared = proxy.shared_pools
        return proxy.own_pools + [pool.settings for pool in self.pools if pool.name in shared]

    @property
    def every_pool(self) -> list[ProxyConfig]:
        """What each pool goes by, of all proxies."""
        return [pool.settings for pool in self.pools] + [one for proxy in self.proxies for one in proxy.own_pools]
