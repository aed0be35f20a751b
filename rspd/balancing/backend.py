"""The state of a backend, its connections, and all that changes them.

    up     in service: it gets connections
    full   in service, with as many connections as it may have
    down   out of service; it is due at `retry_at`: the next client tries it
    trial  out of service, and a client tries it
    gone   no longer configured; its connections go on

    event           from         to          rule
    join            gone         up, full    nothing is held against it
                    up, full     up, full    another max_connections may make it the other
    enter           up           full        with this connection it has its max_connections
    leave           full         up          it has room again
    failed          up, full     down        if it has failed max_fails times within fail_timeout
                    down, trial  down        not after a bad check
    forgive         down, trial  up, full    max_fails is off now, or its name is known again; not after a bad check
    try_out         down, trial  trial       it is due; or, as a last resort, no backend is in service
    put_off         down, trial  down        it is due, but a spare, and a regular backend is in service
    no_verdict      trial        down        due at once; no change if another client has tried it since
    reached         down, trial  up, full    not after a bad check
    found_well      down, trial  up, full
    found_unwell    all others   down        until a good check: `retry_at` is inf
    retire          all others   gone

After `failed`, `try_out` and `put_off`, a backend that is out of service is due `fail_timeout` later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from typing import Literal

from rspd.balancing.discovery import Source
from rspd.balancing.health import Checker, Verdicts
from rspd.balancing.policies import POLICIES, Policy
from rspd.engine.side import Handed
from rspd.histogram import Histogram
from rspd.net.address import Address, SocketAddress
from rspd.settings import BackendConfig, HealthConfig, ProxyConfig
from rspd.snapshot import CONNECT_BOUNDS

State = Literal["up", "full", "down", "trial", "gone"]

IN_SERVICE = frozenset({"up", "full"})


class Tier:
    """The regular backends of a pool, or its spares.

    policy: chooses among those that are up.
    in_service: how many are in service.
    """

    def __init__(self, balance: str) -> None:
        self.policy: Policy[Backend] = POLICIES[balance]()
        self.in_service = 0

    def note(self, backend: Backend, before: State, after: State) -> None:
        """The state of a backend has changed. For a tier, a backend that it does not have is `gone`."""
        self.in_service += (after in IN_SERVICE) - (before in IN_SERVICE)
        if "up" in (before, after) and before != after:
            (self.policy.add if after == "up" else self.policy.remove)(backend)


class Backend:
    """One backend of a pool. All times are the loop's.

    name: its address, for people. With `resolve: each`, the one address of the name that this backend is.
    address, weight, limit: as configured; `limit` is the most connections at once.
    source: where `addresses` are from.
    addresses: its socket addresses, the first to be tried at the front; empty as long as its name is unknown.
    open: how many connections it has, those that are being dialled included.
    retry_at: when it is due for a client to try it; inf if it is in service, or its last check was bad.
    failed_at: when connecting to it failed last; 0 before.
    down_since, why_down: of the last time that it went down.
    since: for how long it has been in service, or out of it. Set by `Members`.
    connected: how long connecting to it took, where it succeeded. failed_in_all: how often it did not.
    checks: what its checks have said so far.
    checker: makes its health checks, if it has any. checked_by: its settings and preface.
    """

    tier: Tier
    source: Source
    config: BackendConfig
    address: Address
    weight: int
    limit: float

    def __init__(self, name: str, changed: Callable[[Backend, State], object]) -> None:
        """changed: called with the state before, after each change of state, or of `retry_at` but by `configure`."""
        self.name = name
        self.state: State = "gone"
        self.addresses: list[SocketAddress] = []
        self.open = 0
        self.retry_at = inf
        self.failed_at = 0.0
        self.down_since = 0.0
        self.why_down = ""
        self.since = 0.0
        self.connected = Histogram(CONNECT_BOUNDS)
        self.failed_in_all = 0
        self.checks = Verdicts()
        self.checker: Checker | None = None
        self.checked_by: tuple[HealthConfig | None, bytes] = (None, b"")
        self._changed = changed
        self._rejoins = False  # its place in the tiers changes: no tier has it until `join`
        self.failures: deque[float] = deque()  # when connecting failed, within fail_timeout

    @property
    def in_service(self) -> bool:
        """Whether it is in service."""
        return self.state in IN_SERVICE

    @property
    def unwell(self) -> bool:
        """Whether its last check was bad: only a good one brings it back."""
        return self.state == "down" and self.retry_at == inf

    @property
    def has_room(self) -> bool:
        """Whether it may have one more connection."""
        return self.open < self.limit

    # Whether it is configured, and how

    def configure(self, config: BackendConfig, proxy: ProxyConfig, tier: Tier, now: float) -> None:
        """It is configured so from now on. Call `join` when all backends of the pool have been configured."""
        self._max_fails, self._fail_timeout = proxy.max_fails_of(config), proxy.fail_timeout_of(config)
        if self._max_fails == inf:
            self.forgive()
        if self.retry_at < inf:
            # Who is due first stays so.
            self.retry_at = min(self.retry_at, now + self._fail_timeout)
        self._rejoins = self.state != "gone" and (tier is not self.tier or config != self.config)
        if self._rejoins:
            # Before the weight changes: see `Candidate`.
            self.tier.note(self, self.state, "gone")
        self.config = config
        self.address, self.weight, _, self.limit = config[:4]
        self.tier = tier

    def join(self) -> None:
        """Take its place among the others, in the order of the configuration."""
        if self._rejoins or self.state == "gone":
            self._go(self.state if self.state in ("down", "trial") else self._by_room(), self.retry_at)

    def retire(self) -> None:
        """It is configured no longer."""
        self.failures.clear()
        self._go("gone")

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process, but for its connections: these say where they go."""
        return {
            "down": not self.in_service,
            "retry_at": self.retry_at,
            "failed_at": self.failed_at,
            "down_since": self.down_since,
            "why_down": self.why_down,
            "failures": list(self.failures),
            "since": self.since,
            "connected": self.connected.hand_over(),
            "failed_in_all": self.failed_in_all,
            "verdicts": self.checks.hand_over(),
            "checks": self.checker.hand_over() if self.checker else None,
        }

    def resume(self, handed: Handed, same: bool) -> None:
        """Go on as the backend of the process before. This is no news, so nothing is logged.

        same: whether it was in the same pool there; else it has none of the counts.
        """
        self.failed_at = handed.get("failed_at", 0.0)
        self.down_since, self.why_down = handed.get("down_since", 0.0), handed.get("why_down", "")
        self.failures.extend(handed.get("failures", ()))
        self.since = handed.get("since", self.since)
        if same:
            self.connected.resume(handed.get("connected"))
            self.failed_in_all += handed.get("failed_in_all", 0)
            self.checks.resume(handed.get("verdicts", {}))
        if self.checker and handed.get("checks"):
            self.checker.resume(handed["checks"])
        retry_at = handed.get("retry_at", inf)
        # A bad check counts only as long as there are checks: nothing else would bring the backend back.
        if handed.get("down") and self.in_service and (self.checker or retry_at < inf):
            self.tier.note(self, self.state, "gone")
            self.state, self._rejoins = "down", True
            self._go("down", retry_at)

    def stop_checking(self) -> None:
        """End its health checks. The last verdict stays."""
        if self.checker:
            self.checker.stop()
            self.checker = None
        self.checked_by = (None, b"")

    # Its connections

    def enter(self) -> None:
        """A connection to it is dialled: count it, until `leave`, which is called once for each `enter`."""
        self.open += 1
        if self.open == self.limit and self.state == "up":
            self._go("full")

    def leave(self) -> None:
        """A connection to it has ended, or was not made."""
        self.open -= 1
        policy = self.tier.policy
        if policy.counting:
            policy.ended(self)
        if self.state == "full" and self.open < self.limit:
            self._go("up")

    # Whether it is in service

    def failed(self, now: float, reason: str) -> None:
        """Connecting to it failed."""
        self.failed_in_all += 1
        if self.state == "gone":
            return
        self.failed_at = now
        self.source.refresh()
        if self._max_fails == inf:
            return
        if self.in_service:
            self.failures.append(now)
            while self.failures[0] < now - self._fail_timeout:
                self.failures.popleft()
            if len(self.failures) < self._max_fails:
                return
        if self.checker:
            self.checker.doubt()  # good checks bring it back, maybe sooner than `fail_timeout`
        if not self.unwell:
            self._go_down(now, now + self._fail_timeout, reason)

    def try_out(self, now: float) -> None:
        """A client tries it next, though it is out of service."""
        self._go("trial", now + self._fail_timeout)

    def put_off(self, now: float) -> None:
        """It is due, but no client tries it now."""
        self._go("down", now + self._fail_timeout)

    def no_verdict(self, now: float, retry_at: float) -> None:
        """An attempt says nothing of it. retry_at: its value when the attempt began, so that a later trial goes on."""
        if self.state == "trial" and self.retry_at == retry_at:
            self._go("down", now)

    def reached(self) -> None:
        """Connecting to it succeeded."""
        self.forgive()

    def forgive(self) -> None:
        """Failures to connect no longer count."""
        if self.retry_at < inf:
            self.found_well()

    def found_well(self) -> None:
        """A check was good."""
        if self.state in ("down", "trial"):
            self.failures.clear()
            self._go(self._by_room())

    def found_unwell(self, now: float, reason: str) -> None:
        """The checks were bad."""
        if self.state != "gone":
            self._go_down(now, inf, reason)

    def _go_down(self, now: float, retry_at: float, reason: str) -> None:
        if self.in_service:
            self.down_since, self.why_down = now, reason
        self._go("down", retry_at)

    def _by_room(self) -> State:
        return "up" if self.has_room else "full"

    def _go(self, state: State, retry_at: float = inf) -> None:
        before, self.state = self.state, state
        self.retry_at = retry_at
        self.tier.note(self, "gone" if self._rejoins else before, state)
        self._rejoins = False
        self._changed(self, before)
