"""Policies: which of several backends gets the next connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import accumulate, count
from math import lcm, log
from typing import Any, Generic, Protocol, TypeVar


class Candidate(Protocol):
    """What a policy needs to know of a backend. Backends are hashed by identity.

    name: distinct, and the same after a restart: `source` goes by it.
    weight: whole, from 1; the same from `add` to `remove`.
    open: its connections at the moment.
    """

    name: str
    weight: int
    open: int


B = TypeVar("B", bound=Candidate)


class Policy(ABC, Generic[B]):
    """Chooses among the backends it was told of: those that may get a connection now."""

    by_client = False  # whether it matters which client is passed to `pick`
    counting = False  # whether `ended` has to be called

    @abstractmethod
    def add(self, backend: B) -> None:
        """Choose this backend, too, from now on. Not for one that it chooses already."""

    @abstractmethod
    def remove(self, backend: B) -> None:
        """Choose this backend no more. Its open connections go on."""

    def ended(self, backend: B) -> None:
        """A backend's `open` has just been lowered. It may have been removed by now."""

    @abstractmethod
    def pick(self, client: str) -> B | None:
        """The backend for a connection; None if there is none.

        client: what `networks.client_key` made. Clients with the same key, or with an empty one, count as one client.
        """

    @abstractmethod
    def pick_other(self, client: str, tried: Collection[B]) -> B | None:
        """The best backend that is not among those tried; None if there is none. Looks at each of them."""


# 2**64 divided by the golden ratio: its multiples, modulo 2**64, are spread evenly however many there are
# (Knuth, The Art of Computer Programming, volume 3, 6.4).
GOLDEN = 0x9E3779B97F4A7C15

# How many backends that were removed may keep their place.
AWAY_MAX = 1000


class RoundRobin(Policy[B]):
    """Each in turn, as often as its weight says.

    On a virtual clock, each backend has `weight` turns in each round, spaced evenly; the earliest turn is next. So any
    sum(weights) picks in a row have each backend exactly `weight` times. A backend that is away loses the turns that
    pass meanwhile. It has no turn twice.
    """

    def __init__(self) -> None:
        self._round = 1  # its length is a multiple of each weight: all turns are whole numbers
        self._now = 0
        self._turns: list[tuple[int, int, int, B]] = []  # a heap: next turn, place, time between two turns, backend
        self._away: dict[B, tuple[int, int]] = {}  # the next turn and the place of backends that were removed
        self._places = count()

    def add(self, backend: B) -> None:
        factor = lcm(self._round, backend.weight) // self._round
        if factor > 1:
            self._stretch(factor)
        next_turn, place = self._away.pop(backend) if backend in self._away else (0, next(self._places))
        step = self._round // backend.weight
        heappush(self._turns, (_turn(max(next_turn, self._now), place, step), place, step, backend))

    def remove(self, backend: B) -> None:
        for entry in self._turns:
            if entry[3] is backend:
                self._away[backend] = entry[:2]
                self._turns.remove(entry)
                heapify(self._turns)
                break
        if len(self._away) > AWAY_MAX:
            del self._away[next(iter(self._away))]

    def pick(self, client: str) -> B | None:
        turns = self._turns
        if not turns:
            return None
        turn, place, step, backend = turns[0]
        self._now = turn
        heapreplace(turns, (turn + step, place, step, backend))
        return backend

    def pick_other(self, client: str, tried: Collection[B]) -> B | None:
        found = min((entry for entry in self._turns if entry[3] not in tried), default=None)
        if not found:
            return None
        turn, place, step, backend = found
        self._turns[self._turns.index(found)] = (turn + step, place, step, backend)
        heapify(self._turns)
        return backend

    def _stretch(self, factor: int) -> None:
        """Make a round `factor` times as long. Each turn keeps its place in the round."""
        self._round *= factor
        self._now *= factor
        self._away = {backend: (turn * factor, place) for backend, (turn, place) in self._away.items()}
        self._turns = [
            (_turn(turn * factor, place, step * factor), place, step * factor, backend)
            for turn, place, step, backend in self._turns
        ]
        heapify(self._turns)


def _turn(earliest: int, place: int, step: int) -> int:
    """A backend's first turn from a time on. Backends with different places have different offsets in their step."""
    offset = (place * GOLDEN % 2**64) * step >> 64
    return earliest + (offset - earliest) % step


class LeastConnections(Policy[B]):
    """The backend with the fewest connections for its weight, the next one included; among equals, each in turn.

    A backend's entry in the heap is corrected when it comes to the top. If the backend's load has sunk, the entry is
    corrected at once: else it would come to the top too late.
    """

    counting = True

    def __init__(self) -> None:
        # Load, turn, backend. The real load may be higher, never lower. A load is a quotient of small numbers: two such
        # floats are equal, or in order, exactly when the real quotients are.
        self._heap: list[tuple[float, int, B]] = []
        self._entries: dict[B, tuple[float, int, B]] = {}  # the valid entry of each backend
        self._turns = count()

    def add(self, backend: B) -> None:
        self._put(_load(backend), next(self._turns), backend)

    def remove(self, backend: B) -> None:
        if self._entries.pop(backend, None):
            self._sweep()

    def ended(self, backend: B) -> None:
        entry = self._entries.get(backend)
        if entry and entry[0] > (load := _load(backend)):
            self._put(load, entry[1], backend)
            if len(self._heap) > 2 * len(self._entries) + 64:
                self._sweep()

    def pick(self, client: str) -> B | None:
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            load, turn, backend = entry
            if entries[backend] is not entry:
                heappop(heap)
                continue
            now = (backend.open + 1) / backend.weight
            chosen = load == now
            entry = entries[backend] = (now, next(self._turns) if chosen else turn, backend)
            heapreplace(heap, entry)
            if chosen:
                return backend
        return None

    def pick_other(self, client: str, tried: Collection[B]) -> B | None:
        others = [entry for entry in self._entries.values() if entry[2] not in tried]
        return min(others, key=lambda entry: (_load(entry[2]), entry[1]))[2] if others else None

    def _put(self, load: float, turn: int, backend: B) -> None:
        entry = self._entries[backend] = (load, turn, backend)
        heappush(self._heap, entry)

    def _sweep(self) -> None:
        """Leave nothing in the heap but valid entries."""
        self._heap = list(self._entries.values())
        heapify(self._heap)


def _load(backend: Candidate) -> float:
    return (backend.open + 1) / backend.weight


class Random(Policy[B]):
    """Of two backends drawn by weight, the one with fewer connections for its weight.

    draw: returns a random number from 0 up to, not including, 1; for tests.
    """

    def __init__(self, draw: Callable[[], float] | None = None) -> None:
        if draw is None:
            from random import random  # slow to import

            draw = random
        self._draw = draw
        self._backends: list[B] = []
        self._ends: list[int] = []  # for each backend, the sum of the weights up to it

    def add(self, backend: B) -> None:
        self._backends.append(backend)
        self._ends = _sums(self._backends)

    def remove(self, backend: B) -> None:
        self._backends = [other for other in self._backends if other is not backend]
        self._ends = _sums(self._backends)

    def pick(self, client: str) -> B | None:
        return self._choose(self._backends, self._ends)

    def pick_other(self, client: str, tried: Collection[B]) -> B | None:
        others = [backend for backend in self._backends if backend not in tried]
        return self._choose(others, _sums(others))

    def _choose(self, backends: Sequence[B], ends: Sequence[int]) -> B | None:
        if len(backends) < 2:
            return backends[0] if backends else None
        total = ends[-1]
        number = bisect(ends, int(self._draw() * total))
        one = backends[number]
        weight = one.weight
        # The other backend is drawn from all but the first.
        point = int(self._draw() * (total - weight))
        if point >= ends[number] - weight:
            point += weight
        other = backends[bisect(ends, point)]
        return other if other.open * weight < one.open * other.weight else one


def _sums(backends: Sequence[Candidate]) -> list[int]:
    return list(accumulate(backend.weight for backend in backends))


class Source(Policy[B]):
    """The same backend for the same client, after a restart, too: weighted rendezvous hashing.

    Clients are hashed into 65,536 groups. Each group has one backend: the one with the best score in this group. So if
    a backend leaves, only its own clients move. They return when the backend comes back.
    """

    by_client = True

    def __init__(self) -> None:
        from hashlib import blake2b  # slow to import

        self._hash = blake2b
        self._names: dict[B, bytes] = {}
        self._chosen: dict[bytes, B] = {}  # by group

    def add(self, backend: B) -> None:
        self._names[backend] = backend.name.encode(errors="surrogateescape")
        self._chosen.clear()

    def remove(self, backend: B) -> None:
        self._names.pop(backend, None)
        self._chosen.clear()

    def pick(self, client: str) -> B | None:
        if len(self._names) < 2:
            return next(iter(self._names), None)
        group = self._group(client)
        backend = self._chosen.get(group)
        if not backend:
            backend = self._chosen[group] = self._best(group, self._names)
        return backend

    def pick_other(self, client: str, tried: Collection[B]) -> B | None:
        others = [backend for backend in self._names if backend not in tried]
        return self._best(self._group(client), others) if others else None

    def _group(self, client: str) -> bytes:
        return self._hash(client.encode(), digest_size=2).digest()

    def _best(self, group: bytes, backends: Collection[B]) -> B:
        # Each backend gets a random time, exponentially distributed with its weight as rate. So a backend is first as
        # often as its weight says.
        digest, names = self._hash, self._names

        def time(backend: B) -> float:
            number = int.from_bytes(digest(group + names[backend], digest_size=6).digest(), "big")
            return -log((number + 0.5) / 2**48) / backend.weight

        return min(backends, key=time)


POLICIES: Mapping[str, Callable[[], Policy[Any]]] = {
    "round-robin": RoundRobin,
    "least-connections": LeastConnections,
    "random": Random,
    "source": Source,
}
