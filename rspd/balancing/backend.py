"""What is known of one backend."""

from __future__ import annotations

from collections import deque

from rspd.balancing.discovery import Source
from rspd.balancing.health import Checker
from rspd.balancing.policies import Policy
from rspd.net.address import SocketAddress
from rspd.settings import BackendConfig, HealthConfig


class Backend:
    """A backend of a proxy, and its state; changed by `Backends` only.

    address, weight, backup, limit: as configured; `limit` is the most connections at once.
    name: its address, for people. With `resolve: each`, the one address of the name that this backend is.
    source: where `addresses` are from.
    addresses: its socket addresses, the first to be tried at the front; empty as long as its name is unknown.
    open: how many connections it has, those that are being dialled included.
    healthy: what the health checks say; True if there are none.
    out_until: until when it is out of service because connecting failed, by the loop's time; 0 if it is not.
    failures: when connecting failed, within fail_timeout.
    member: whether it is still configured. If not, its open connections go on.
    policy: chooses among the backends, or among the spares. eligible: whether the policy may choose this backend.
    """

    policy: Policy[Backend]
    source: Source

    def __init__(self, config: BackendConfig, name: str) -> None:
        self.configure(config)
        self.address = config.address
        self.name = name
        self.addresses: list[SocketAddress] = []
        self.open = 0
        self.healthy = True
        self.out_until = 0.0
        self.failures: deque[float] = deque()
        self.down_since = 0.0
        self.why_down = ""
        self.member = False
        self.eligible = False
        self.checker: Checker | None = None
        self.checked_by: tuple[HealthConfig | None, bytes] = (None, b"")

    def configure(self, config: BackendConfig) -> None:
        """Go by another configuration of the same address."""
        self.config = config
        self.weight = config.weight
        self.backup = config.backup
        self.limit = config.max_connections

    @property
    def up(self) -> bool:
        """Whether it is in service."""
        return self.healthy and not self.out_until

    @property
    def full(self) -> bool:
        """Whether it has as many connections as it may have."""
        return self.open >= self.limit

    def stop_checking(self) -> None:
        """End its health checks. The last verdict stays."""
        if self.checker:
            self.checker.stop()
            self.checker = None
        self.checked_by = (None, b"")
