"""Policies: which of several backends gets a connection, how evenly, and at what cost."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import tracemalloc
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rspd.balancing.policies import AWAY_MAX, POLICIES, LeastConnections, Policy, Random, RoundRobin, Source
from rspd.settings import BALANCES
from tests.counts import count_instructions


@dataclass(eq=False)
class Backend:
    """A backend as far as policies look at it."""

    name: str
    weight: int = 1
    open: int = 0

    def __repr__(self) -> str:
        return self.name


def backends(*weights: int) -> list[Backend]:
    """Backends a, b, c ..., or with numbers where letters do not suffice."""
    names = "abcdefghijklmnopqrstuvwxyz" if len(weights) <= 26 else [f"10.0.0.{n}:80" for n in range(len(weights))]
    return [Backend(name, weight) for name, weight in zip(names, weights, strict=False)]


def told(policy: Policy[Backend], those: Sequence[Backend]) -> Policy[Backend]:
    for backend in those:
        policy.add(backend)
    return policy


def begin(policy: Policy[Backend], client: str = "") -> Backend:
    """A connection, as a proxy makes it."""
    backend = policy.pick(client)
    assert backend
    backend.open += 1
    return backend


def end(policy: Policy[Backend], backend: Backend) -> None:
    backend.open -= 1
    if policy.counting:
        policy.ended(backend)


def picks(policy: Policy[Backend], count: int) -> str:
    return "".join(str(policy.pick("")) for _ in range(count))


CLIENTS = [f"10.{n >> 8}.{n & 255}.7" for n in range(5000)] + [f"2001:db8:{n:x}::/64" for n in range(5000)]

WEIGHTS = st.lists(st.integers(1, 12) | st.integers(1, 1000), min_size=1, max_size=8)

# All


def test_each_word_for_a_balance_has_its_policy() -> None:
    assert tuple(POLICIES) == BALANCES


@pytest.mark.parametrize("name", POLICIES)
def test_without_backends_there_is_none_to_pick(name: str) -> None:
    policy = POLICIES[name]()
    assert policy.pick("10.0.0.1") is None
    assert policy.pick_other("10.0.0.1", set()) is None
    (only,) = backends(3)
    policy.add(only)
    policy.remove(only)
    assert policy.pick("10.0.0.1") is None
    assert policy.pick_other("10.0.0.1", set()) is None


@pytest.mark.parametrize("name", POLICIES)
def test_one_backend_gets_all(name: str) -> None:
    (only,) = backends(7)
    policy = told(POLICIES[name](), [only])
    assert {begin(policy, client) for client in CLIENTS[:100]} == {only}
    assert policy.pick_other("", set()) is only
    assert policy.pick_other("", {only}) is None


Steps = st.lists(
    st.tuples(st.sampled_from(["flip", "begin", "begin", "end", "other"]), st.integers(0, 99)), max_size=120
)


@pytest.mark.parametrize("name", POLICIES)
@given(weights=WEIGHTS, steps=Steps)
def test_whatever_happens_only_backends_that_may_get_a_connection_are_picked(
    name: str, weights: list[int], steps: list[tuple[str, int]]
) -> None:
    policy = POLICIES[name]()
    those = backends(*weights)
    there: set[Backend] = set()
    live: list[Backend] = []
    for step, number in steps:
        if step == "flip":
            backend = those[number % len(those)]
            (policy.remove if backend in there else policy.add)(backend)
            there ^= {backend}
        elif step == "end" and live:
            end(policy, live.pop(number % len(live)))
        elif step == "begin" and there:
            live.append(begin(policy, CLIENTS[number]))
            assert live[-1] in there
        elif step == "other":
            tried = set(those[: number % len(those)])
            other = policy.pick_other(CLIENTS[number], tried)
            assert other in there - tried if there - tried else other is None
    assert (policy.pick("") in there) if there else policy.pick("") is None


@pytest.mark.parametrize("name", POLICIES)
def test_removing_one_that_is_not_there_changes_nothing(name: str) -> None:
    a, b = backends(1, 1)
    policy = told(POLICIES[name](), [a])
    policy.remove(b)
    assert policy.pick("") is a


@pytest.mark.parametrize("name", POLICIES)
def test_others_are_tried_one_after_the_other_until_none_is_left(name: str) -> None:
    those = backends(1, 2, 3, 4)
    policy = told(POLICIES[name](), those)
    tried = [begin(policy, "10.0.0.1")]
    while other := policy.pick_other("10.0.0.1", tried):
        tried.append(other)
    assert sorted(map(str, tried)) == ["a", "b", "c", "d"]


def work(policy: Policy[Backend], count: int, clients: Sequence[str] = ("10.0.0.1",), most: int = 50) -> None:
    """Connections, of which some are open at a time, and end in another order than they began."""
    live: deque[Backend] = deque()
    for number in range(count):
        live.append(begin(policy, clients[number % len(clients)]))
        if number % 3 == 0:
            live.rotate(7)
        if len(live) > most:
            end(policy, live.popleft())
    for backend in live:
        end(policy, backend)


class First(RoundRobin[Backend]):
    """No policy at all: what is left of a count is the test's own."""

    def pick(self, client: str) -> Backend | None:
        return self._turns[0][3]


# What a policy may take of a connection, in instructions; the whole takes about 2,750 (tests/daemon/test_budget.py).
INSTRUCTIONS = {"round-robin": 40, "least-connections": 190, "random": 130, "source": 60}


@pytest.mark.parametrize("name", POLICIES)
def test_a_pick_costs_no_more_among_a_hundred_than_among_two(name: str) -> None:
    def cost(policy: Policy[Backend], weights: Sequence[int]) -> float:
        told(policy, backends(*weights))
        work(policy, 300)

        def measured() -> int:
            work(policy, 1000)
            return 0

        return count_instructions(measured)[1] / 1000

    own = cost(First(), [1])
    one, two, hundred = (cost(POLICIES[name](), weights) - own for weights in ([1], [1, 3], [1, 3, 2, 5] * 25))
    assert max(one, two, hundred) <= INSTRUCTIONS[name], f"{one:.0f}, {two:.0f}, {hundred:.0f} instructions"
    # Of the whole connection a fortieth.
    assert hundred - two <= 2750 / 40, f"{hundred:.0f} instructions instead of {two:.0f}"


@pytest.mark.parametrize("name", POLICIES)
def test_memory_does_not_grow_with_connections(name: str) -> None:
    policy = told(POLICIES[name](), backends(*[1, 2, 3, 4] * 5))
    tracemalloc.start()
    try:
        work(policy, 2000, most=500)
        before = tracemalloc.get_traced_memory()[0]
        work(policy, 8000, most=500)
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


def test_neither_random_nor_hashlib_is_imported_before_it_is_needed() -> None:
    script = "import sys, rspd.balancing.policies; print(*sys.modules)"
    command = [sys.executable, "-S", "-E", "-c", script]  # -S: without what a virtual environment imports
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "rspd.balancing.policies" in loaded
    assert not {"random", "hashlib", "zlib"} & set(loaded)


# Round-robin


def test_equal_backends_are_picked_in_the_order_in_which_they_are_listed() -> None:
    assert picks(told(RoundRobin(), backends(1, 1, 1)), 9) == "abcabcabc"
    assert picks(told(RoundRobin(), backends(7, 7, 7, 7)), 8) == "abcdabcd"


@pytest.mark.parametrize(
    "weights", [(1,), (1, 2), (5, 1, 1), (1, 1, 5), (3, 2), (100, 1), (7, 11, 13), (1, 10, 100), (1000, 999)]
)
def test_a_thousand_picks_are_shared_out_by_weight(weights: tuple[int, ...]) -> None:
    those = backends(*weights)
    policy = told(RoundRobin(), those)
    got = Counter(policy.pick("") for _ in range(1000))
    # A round has each exactly by its weight; of the one that 1,000 picks end in, each backend may have had at most all.
    rounds, rest = divmod(1000, sum(weights))
    for backend in those:
        assert rounds * backend.weight <= got[backend] <= rounds * backend.weight + min(rest, backend.weight)
        # Far closer, in fact: at any time each is less than the number of backends away from its share.
        assert abs(got[backend] - 1000 * backend.weight / sum(weights)) < len(weights)


@given(WEIGHTS, st.integers(0, 3000))
def test_any_round_has_each_backend_exactly_by_its_weight(weights: list[int], skipped: int) -> None:
    those = backends(*weights)
    policy = told(RoundRobin(), those)
    for _ in range(skipped):
        policy.pick("")
    assert Counter(policy.pick("") for _ in range(sum(weights))) == {backend: backend.weight for backend in those}


@given(WEIGHTS)
@example([5, 1, 1])
def test_the_picks_of_a_backend_are_evenly_spaced(weights: list[int]) -> None:
    those = backends(*weights)
    policy = told(RoundRobin(), those)
    order = [policy.pick("") for _ in range(3 * sum(weights))]
    for backend in those:
        # Between two turns of it, another has its own as often as their weights say, rounded up or down.
        others = [other.weight for other in those if other is not backend]
        least = 1 + sum(weight // backend.weight for weight in others)
        most = 1 + sum(math.ceil(weight / backend.weight) for weight in others)
        where = [index for index, picked in enumerate(order) if picked is backend]
        assert all(least <= later - earlier <= most for earlier, later in pairwise(where))


@pytest.mark.parametrize("weights", sorted(set(permutations([5, 1, 1]))))
def test_light_backends_do_not_come_at_the_same_time(weights: tuple[int, ...]) -> None:
    those = backends(*weights)
    heavy = str(those[weights.index(5)])
    order = picks(told(RoundRobin(), those), 70)
    assert heavy * 4 not in order
    assert all(light + other not in order for light in "abc" for other in "abc" if heavy not in (light, other))


@given(WEIGHTS, st.lists(st.tuples(st.integers(0, 7), st.integers(0, 40)), max_size=40))
def test_a_backend_that_comes_and_goes_gets_no_more_than_its_share(
    weights: list[int], flaps: list[tuple[int, int]]
) -> None:
    steady, *others = backends(*weights)
    policy = told(RoundRobin(), [steady])
    away = set(others)
    got: Counter[Backend | None] = Counter()
    for number, count in flaps:
        if others:
            backend = others[number % len(others)]
            (policy.add if backend in away else policy.remove)(backend)
            away ^= {backend}
        got.update(policy.pick("") for _ in range(count))
    for backend in others:
        # In each step of the one that stayed, at most as many as their weights say.
        assert got[backend] <= (got[steady] + 1) * backend.weight / steady.weight + 1


def test_a_backend_that_comes_back_catches_nothing_up_and_the_others_keep_their_places() -> None:
    a, b, c = backends(1, 1, 1)
    policy = told(RoundRobin(), [a, b, c])
    assert picks(policy, 4) == "abca"
    policy.remove(b)
    assert picks(policy, 60) == "ca" * 30
    policy.add(b)
    assert picks(policy, 6) == "bcabca"


def test_one_that_flaps_between_any_two_picks_gets_no_more_than_its_share() -> None:
    those = a, *_ = backends(1, 1, 1, 1)
    policy = told(RoundRobin(), those)
    got: Counter[Backend | None] = Counter()
    for _ in range(400):
        policy.remove(a)
        policy.add(a)
        got[policy.pick("")] += 1
    assert got[a] <= 100


def test_a_new_backend_gets_its_share_at_once_and_no_more() -> None:
    those = backends(2, 2)
    policy = told(RoundRobin(), those)
    picks(policy, 1001)
    policy.add(Backend("n", 3))
    order = picks(policy, 70)
    assert Counter(order) == {"a": 20, "b": 20, "n": 30}
    assert "n" in order[:4]


def test_a_backend_may_come_back_with_another_weight() -> None:
    a, b = backends(1, 1)
    policy = told(RoundRobin(), [a, b])
    picks(policy, 101)
    policy.remove(b)
    picks(policy, 5)
    b.weight = 3
    policy.add(b)
    assert Counter(picks(policy, 400)) == {"a": 100, "b": 300}


def test_no_turn_is_had_twice_when_another_weight_comes_meanwhile() -> None:
    a, b, c = backends(1, 1, 7)
    policy = told(RoundRobin(), [a, b])
    assert picks(policy, 2) == "ab"
    policy.remove(b)
    policy.add(c)
    policy.add(b)
    assert picks(policy, 7) == "c" * 7
    assert Counter(picks(policy, 900)) == {"a": 100, "b": 100, "c": 700}


def test_after_a_failure_the_next_one_has_its_turn() -> None:
    a, b, c = backends(1, 1, 1)
    policy = told(RoundRobin(), [a, b, c])
    assert policy.pick("") is a
    assert policy.pick_other("", {a}) is b
    assert picks(policy, 4) == "cabc"


def test_backends_that_never_come_back_are_forgotten() -> None:
    policy = told(RoundRobin(), backends(1))

    def replace(count: int) -> None:
        for number in range(count):
            backend = Backend(f"10.0.0.{number}:80")
            policy.add(backend)
            policy.pick("")
            policy.remove(backend)

    tracemalloc.start()
    try:
        replace(2 * AWAY_MAX)
        before = tracemalloc.get_traced_memory()[0]
        replace(3 * AWAY_MAX)
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


# Least connections


def test_equal_backends_without_connections_are_picked_in_turn() -> None:
    policy = told(LeastConnections(), backends(1, 1, 1))
    order = []
    for _ in range(9):
        order.append(begin(policy))
        end(policy, order[-1])
    assert "".join(map(str, order)) == "abcabcabc"


def test_open_connections_are_shared_out_by_weight() -> None:
    those = backends(1, 2, 7)
    policy = told(LeastConnections(), those)
    for _ in range(1000):
        begin(policy)
    assert [backend.open for backend in those] == [100, 200, 700]


def test_a_slow_backend_gets_fewer_connections() -> None:
    slow, *quick = those = backends(1, 1, 1, 1)
    policy = told(LeastConnections(), those)
    got: Counter[Backend] = Counter()
    ends: dict[int, list[Backend]] = {}
    for now in range(2000):
        for backend in ends.pop(now, ()):
            end(policy, backend)
        backend = begin(policy)
        got[backend] += 1
        ends.setdefault(now + (100 if backend is slow else 5), []).append(backend)
    # It lasts 20 times as long there, and one or two are open at each.
    assert got[slow] <= 2 * 2000 / 100 + 2
    assert max(got[backend] for backend in quick) - min(got[backend] for backend in quick) <= 20


LOAD_STEPS = ["flip", *["begin"] * 20, *["end"] * 19]


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 2, 2), (3, 1, 7), (1000, 999, 1)])
def test_the_one_with_the_fewest_connections_by_weight_is_picked(weights: tuple[int, ...]) -> None:
    chance = random.Random(5)
    steps = [(chance.choice(LOAD_STEPS), chance.randrange(100)) for _ in range(5000)]
    those = backends(*weights)
    policy = told(LeastConnections(), those)
    there = set(those)
    live: list[Backend] = []
    last_picked = {backend: number - len(those) for number, backend in enumerate(those)}
    for now, (step, number) in enumerate(steps):
        if step == "flip":
            backend = those[number % len(those)]
            (policy.remove if backend in there else policy.add)(backend)
            there ^= {backend}
            last_picked[backend] = now
        elif step == "end" and live:
            end(policy, live.pop(number % len(live)))
        elif step == "begin" and there:
            # In whole numbers: load by load, and then whoever has waited longest.
            loads = {backend: (backend.open + 1) * math.lcm(*weights) // backend.weight for backend in there}
            expected = min(there, key=lambda backend: (loads[backend], last_picked[backend]))
            assert policy.pick_other("", ()) is expected
            live.append(begin(policy))
            assert live[-1] is expected
            last_picked[expected] = now


# Random


def test_without_connections_it_draws_by_weight() -> None:
    those = backends(1, 2, 7)
    policy = told(Random(random.Random(5).random), those)
    got = Counter(policy.pick("") for _ in range(10_000))
    # Five standard deviations of a binomial distribution.
    for backend in those:
        share = backend.weight / 10
        assert got[backend] == pytest.approx(10_000 * share, abs=5 * math.sqrt(10_000 * share * (1 - share)))


def test_of_two_that_are_drawn_the_one_with_fewer_connections_gets_it() -> None:
    a, b = backends(1, 1)
    policy = told(Random(), [a, b])
    a.open = 1
    assert {policy.pick("") for _ in range(100)} == {b}
    b.weight, b.open = 2, 2
    policy = told(Random(), [a, b])
    assert {policy.pick("") for _ in range(100)} == {a, b}
    b.open = 3
    assert {policy.pick("") for _ in range(100)} == {a}


@given(
    WEIGHTS.filter(lambda weights: len(weights) > 1),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
)
def test_two_are_drawn_and_never_the_same(weights: list[int], one: float, other: float) -> None:
    those = backends(*weights)
    numbers = iter([one, other] * 2)
    policy = told(Random(lambda: next(numbers)), those)
    first = policy.pick("")
    assert first
    first.open = 10**9
    second = policy.pick("")
    assert second is not first


def test_no_backend_has_many_more_connections_than_the_others() -> None:
    those = backends(*[1] * 100)
    policy = told(Random(random.Random(5).random), those)
    for _ in range(10_000):
        begin(policy)
    # With one choice the fullest of 100 would have about 130; two bring it to log(log(100)) / log(2) over the mean.
    assert max(backend.open for backend in those) <= 100 + 5


# Source


def test_a_client_gets_the_same_backend_in_another_process_and_in_another_order() -> None:
    script = (
        "from rspd.balancing.policies import Source; from tests.balancing.test_policies import *;"
        "print(picks_by_client(told(Source(), backends(1, 2, 3)[::-1])))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.strip() == picks_by_client(told(Source(), backends(1, 2, 3)))


def picks_by_client(policy: Policy[Backend]) -> str:
    return "".join(str(policy.pick(client)) for client in CLIENTS)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_backend_that_leaves_rejoins_its_own_clients_and_no_others(count: int) -> None:
    those = backends(*[1] * count)
    policy = told(Source(), those)
    before = {client: policy.pick(client) for client in CLIENTS}
    for leaving in those[:3]:
        policy.remove(leaving)
        after = {client: policy.pick(client) for client in CLIENTS}
        assert leaving not in after.values()
        moved = [client for client in CLIENTS if after[client] is not before[client]]
        assert all(before[client] is leaving for client in moved)
        # One in `count`, and what chance adds: five standard deviations, where clients of one group go together.
        assert len(moved) <= 10_000 / count + 5 * spread(1 / count)
        policy.add(leaving)
        assert {client: policy.pick(client) for client in CLIENTS} == before


def spread(share: float) -> float:
    """The standard deviation of how many of the 10,000 clients a backend gets, each client's group by chance."""
    return math.sqrt(share * (1 - share) * (10_000 + 10_000**2 / 65_536))


@pytest.mark.parametrize("weights", [(1, 1), (1, 2, 7), (3, 1, 1, 1), (1, 99), tuple([1] * 20)])
def test_clients_are_shared_out_by_weight(weights: tuple[int, ...]) -> None:
    those = backends(*weights)
    policy = told(Source(), those)
    got = Counter(policy.pick(client) for client in CLIENTS)
    for backend in those:
        share = backend.weight / sum(weights)
        assert got[backend] == pytest.approx(10_000 * share, abs=5 * spread(share))


def test_after_a_failure_a_client_gets_the_backend_that_it_would_get_without_the_one() -> None:
    those = backends(1, 2, 3)
    policy = told(Source(), those)
    for client in CLIENTS[:200]:
        first = policy.pick(client)
        assert first
        other = policy.pick_other(client, [first])
        policy.remove(first)
        assert policy.pick(client) is other
        policy.add(first)


def test_clients_that_are_not_told_apart_are_one_client() -> None:
    policy = told(Source(), backends(1, 1, 1))
    assert len({policy.pick("") for _ in range(100)}) == 1


def test_memory_is_bounded_however_many_clients_come() -> None:
    policy = told(Source(), backends(1, 1))
    tracemalloc.start()
    try:
        for number in range(100_000):
            policy.pick(f"{number:x}::/64")
        assert tracemalloc.get_traced_memory()[0] < 7_000_000
    finally:
        tracemalloc.stop()
