"""What is known of one backend."""

from __future__ import annotations

from collections import deque

from rspd.address import SocketAddress
from rspd.balance import Policy
from rspd.config import BackendConfig, HealthConfig
from rspd.health import Checker


class Backend:
    """A backend of a proxy, and its state; changed by `Backends` only.

    address, weight, backup, limit: as configured; `limit` is of connections at once.
    name: its address, for people. Of a name whose addresses count each, the one of them.
    addresses: what it stands for, the one to be tried first at the front; empty as long as the name is unknown.
    open: connections to it, those that are being dialled among them.
    healthy: as far as checks say; True without any.
    out_until: until when it is out of service because connecting failed, by the loop's time; 0 if it is not.
    failures: when connecting failed, within fail_timeout.
    member: whether it is configured; one that is not goes on until its connections have ended.
    policy: what chooses among the backends of its kind; eligible: whether it may choose this one.
    """

    __slots__ = (
        "address",
        "addresses",
        "backup",
        "checked_by",
        "checker",
        "config",
        "down_since",
        "eligible",
        "failures",
        "healthy",
        "limit",
        "member",
        "name",
        "open",
        "out_until",
        "policy",
        "weight",
        "why_down",
    )

    policy: Policy[Backend]

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
