"""A pool in any order of events: its backends against the rules for their states, its clients against what is promised.

Only what other modules may look at is looked at.
"""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.balancing.attempts import RETRY
from rspd.balancing.backend import Backend, State
from rspd.balancing.policies import POLICIES
from rspd.engine.loop import Loop
from rspd.settings import BackendConfig
from tests.dialled import Scene, configured, switches
from tests.support import FakeClock, reset, run

ADDRESSES = [f"127.0.0.1:{port}" for port in range(1, 5)]

configurations = st.lists(
    st.tuples(
        st.sampled_from(range(4)),
        st.sampled_from([1, 1, 2, 5]),
        st.booleans(),
        st.sampled_from([inf, inf, 1, 2]),
        st.sampled_from([None, None, 1, 2, inf]),
        st.sampled_from([None, None, 1.0]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda one: one[0],
)

proxies = st.fixed_dictionaries(
    {
        "balance": st.sampled_from(sorted(POLICIES)),
        "max_fails": st.sampled_from([1, 1, 2, inf]),
        "fail_timeout": st.sampled_from([0.0, 1.0, 10.0]),
        "queue_timeout": st.sampled_from([0.0, 5.0]),
    }
)

numbers = st.integers(0, 20)

events = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), numbers),
        st.tuples(st.just("begin"), numbers),
        st.tuples(st.sampled_from(["reached", "failed", "aborted", "ended"]), numbers),
        st.tuples(st.sampled_from(["well", "unwell"]), numbers),
        st.tuples(st.just("advance"), st.sampled_from([0.0, 0.5, 1.0, 10.0])),
        st.tuples(st.just("apply"), st.tuples(configurations, proxies)),
    ),
    min_size=10,
    max_size=60,
)


Configuration = list[tuple[int, int, bool, float, float | None, float | None]]


def backends_of(configuration: Configuration, addresses: list[str]) -> list[BackendConfig]:
    keys = ("weight", "backup", "max_connections", "max_fails", "fail_timeout")
    return [configured(addresses[number], **dict(zip(keys, rest, strict=True))) for number, *rest in configuration]


class Model:
    """The rules for the state of a backend once more, in another form.

    out_until: when it is to be tried again; inf after a bad check, 0 while it is in service.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.member = True
        self.come_up()

    def come_up(self) -> None:
        self.out_until = 0.0
        self.on_trial = False
        self.failures: list[float] = []

    def go_out(self, until: float, on_trial: bool = False) -> None:
        self.out_until, self.on_trial = until, on_trial

    @property
    def state(self) -> State:
        if not self.member:
            return "gone"
        if self.out_until:
            return "trial" if self.on_trial else "down"
        return "full" if self.backend.open >= self.backend.limit else "up"


class World:
    """A pool whose clients and checks say what a test has them say, and what is to be expected of it."""

    def __init__(self, scene: Scene, clock: FakeClock) -> None:
        self.scene = scene
        self.clock = clock
        self.models: dict[Backend, Model] = {}
        self.dialled: list[tuple[Backend, float]] = []  # each with its retry_at when the attempt began
        self.connected: list[Backend] = []
        self.note_members()

    def note_members(self) -> None:
        for model in self.models.values():
            if model.member and model.backend not in self.scene.members:
                model.come_up()  # if it returns, nothing is held against it
            model.member = model.backend in self.scene.members
        for backend in self.scene.members:
            self.models.setdefault(backend, Model(backend))

    def do(self, event: str, value: Any) -> None:
        members = self.scene.members
        if event == "begin":
            self.begin(value)
        elif event == "advance":
            self.clock.advance(value)
        elif event == "apply":
            configuration, proxy = value
            self.scene.apply(*backends_of(configuration, ADDRESSES), **proxy)
            self.note_members()
            for model in self.models.values():
                if model.member and 0 < model.out_until < inf:
                    model.out_until = min(model.out_until, self.next_trial(model.backend))
                    if self.scene.pool.config.max_fails_of(model.backend.config) == inf:
                        model.come_up()
        elif event in ("well", "unwell"):
            self.check(members[value % len(members)], event == "well")
        elif event == "ended" and self.connected:
            self.scene.pool.release(self.connected.pop(value % len(self.connected)))
        elif event != "ended" and self.dialled:
            self.answer(event, *self.dialled.pop(value % len(self.dialled)))

    def next_trial(self, backend: Backend) -> float:
        """When a backend is due that fails now."""
        return self.clock.now + self.scene.pool.config.fail_timeout_of(backend.config)

    def begin(self, number: int) -> None:
        """A client has a backend chosen, as `Pool.dial` does."""
        pool, now = self.scene.pool, self.clock.now
        regular = [one for one in self.scene.members if not one.config.backup]
        spares = [one for one in self.scene.members if one.config.backup]
        serving = any(one.in_service for one in regular)
        due = [one for one in regular if one.retry_at <= now and one.has_room]
        if not due:
            due = [one for one in spares if one.retry_at <= now and one.has_room]
            if serving:
                for one in due:
                    self.models[one].go_out(self.next_trial(one))
                due = []
        usual = [one for one in (regular if serving else spares) if one.state == "up"]
        failed = [one for one in self.scene.members if one.retry_at < inf and one.has_room]
        patient = pool.members.any_in_service or pool.config.queue_timeout
        allowed = due or usual or ([] if patient else failed)
        chosen = pool.choose((f"192.0.2.{number}", 1), ())
        assert chosen in allowed if allowed else chosen is None
        if chosen:
            if chosen not in usual:
                self.models[chosen].go_out(self.next_trial(chosen), on_trial=True)
            self.dialled.append((chosen, chosen.retry_at))
            chosen.enter()

    def answer(self, outcome: str, backend: Backend, retry_at: float) -> None:
        """An attempt ends, as `Pool.dial` does it."""
        model, now, config = self.models[backend], self.clock.now, self.scene.pool.config
        if outcome == "reached":
            self.connected.append(backend)
            backend.reached()
            if 0 < model.out_until < inf:
                model.come_up()
            return
        backend.leave()
        if outcome == "aborted":
            backend.no_verdict(now, retry_at)
            if model.on_trial and model.out_until == retry_at:
                model.go_out(now)
            return
        backend.failed(now, "Connection refused")
        if config.max_fails_of(backend.config) == inf:
            return
        timeout = config.fail_timeout_of(backend.config)
        if model.state in ("up", "full"):
            model.failures = [when for when in model.failures if when >= now - timeout] + [now]
            if len(model.failures) < config.max_fails_of(backend.config):
                return
        if model.member and model.out_until < inf:
            model.go_out(now + timeout)

    def check(self, backend: Backend, well: bool) -> None:
        """The checks of a backend come to another verdict."""
        model = self.models[backend]
        if well:
            backend.found_well()
            if model.out_until:
                model.come_up()
        else:
            backend.found_unwell(self.clock.now, "status 503")
            model.go_out(inf)

    def compare(self) -> None:
        """What is so between any two events."""
        members = self.scene.pool.members
        open_ones = Counter([*self.connected, *(backend for backend, _ in self.dialled)])
        for backend, model in self.models.items():
            assert (backend.state, backend.open) == (model.state, open_ones[backend])
            assert backend.retry_at == (model.out_until or inf)
        for tier, backup in ((members.regular, False), (members.spares, True)):
            mine = [one for one in self.scene.members if one.config.backup is backup]
            known: list[Backend] = []
            while found := tier.policy.pick_other("192.0.2.1", known):
                known.append(found)
            assert set(known) == {one for one in mine if one.state == "up"}
            assert tier.in_service == sum(one.in_service for one in mine)
        assert members.trials == sorted(members.trials, key=lambda one: one.retry_at)
        assert set(members.trials) == {one for one in self.scene.members if one.retry_at < inf}
        alone = self.scene.members[0] if len(self.scene.members) == 1 else None
        assert members.only is (alone if alone and alone.state == "up" and alone.limit == inf else None)


@settings(max_examples=300)
@given(configurations, proxies, events)
def test_whatever_happens_each_backend_is_as_the_rules_say_and_the_right_ones_are_chosen(
    configuration: Configuration, proxy: dict[str, Any], sequence: list[tuple[str, Any]]
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        async with Scene(loop, *backends_of(configuration, ADDRESSES), clock=clock, **proxy) as scene:
            world = World(scene, clock)
            for event, value in sequence:
                world.do(event, value)
                await loop.yield_turn()
                world.compare()

    run(main, clock)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(1, 4)),
        st.tuples(st.sampled_from(["close", "abort", "cancel", "on", "off"]), numbers),
        st.tuples(st.just("advance"), st.sampled_from([0.05, 0.2, 1.0, 3.0])),
        st.tuples(st.just("apply"), st.tuples(configurations, proxies)),
    ),
    min_size=10,
    max_size=40,
)


def choosable(scene: Scene) -> bool:
    """Whether some backend is up whose turn it is, and nobody has just failed to connect to it."""
    regular = any(one.in_service and not one.config.backup for one in scene.members)
    allowed = [one for one in scene.members if one.state == "up" and one.config.backup is not regular]
    return any(one.failed_at + RETRY <= scene.loop.now for one in allowed)


@settings(max_examples=150)
@given(configurations, proxies, steps)
def test_whatever_happens_nobody_waits_while_there_is_room_and_everybody_is_answered(
    configuration: Configuration, proxy: dict[str, Any], sequence: list[tuple[str, Any]]
) -> None:
    clock = FakeClock()

    async def main(loop: Loop) -> None:
        with switches("+-++") as four:
            addresses = [switch.address for switch in four]
            async with Scene(
                loop, *backends_of(configuration, addresses), clock=clock, connect_timeout=2.0, **proxy
            ) as scene:
                waiting = scene.pool.queue.waiting
                for event, value in sequence:
                    if event == "come":
                        for _ in range(value):
                            scene.start()
                    elif event == "advance":
                        await scene.advance(value)
                    elif event == "apply":
                        others, settings = value
                        scene.apply(*backends_of(others, addresses), **settings)
                    elif event in ("on", "off"):
                        four[value % 4].off()
                        if event == "on":
                            four[value % 4].on()
                    elif scene.clients:
                        client = scene.clients[value % len(scene.clients)]
                        if event == "close":
                            client.close()
                        elif event == "abort" and client.peer.fileno() >= 0:
                            reset(client.peer)
                        elif client.task:
                            client.task.cancel()
                    for _ in range(10 + 4 * len(scene.clients)):
                        await loop.yield_turn()  # they are served one after the other
                    open_ones = Counter(client.backend for client in scene.clients if client.backend)
                    for backend in scene.members:
                        assert backend.open == open_ones[backend]
                    assert not (waiting and choosable(scene))
                # Each is served, or told why not, in a time that is known.
                await scene.advance(5.0 + 2.0 + 0.5, 0.1)
                assert all(client.task and client.task.done for client in scene.clients)
                assert not waiting

    run(main, clock)
