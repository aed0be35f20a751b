"""The pool of pipes: borrowed, given back, done without."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspd.engine.pipes import (
    LEAST,
    LOOK,
    MOST,
    PIPE_SIZE,
    PROVEN,
    REFRAIN,
    SLOW,
    TURN,
    USEFUL_SIZE,
    Pace,
    Pipe,
    Pipes,
)
from tests.support import OUR_USER, eventually, open_descriptors

pytestmark = [pytest.mark.large_pipes(4), pytest.mark.usefixtures("no_descriptor_is_left_open")]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be a user without privileges: root becomes one of his own, anybody else already is one."""
    if os.geteuid() != 0:
        yield
        return
    os.setresgid(OUR_USER, OUR_USER, 0)
    os.setresuid(OUR_USER, OUR_USER, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@contextmanager
def no_descriptors(spare: int = 0) -> Iterator[None]:
    """So many more descriptors can be had, and then no other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(spare + 1)]
    for number in free:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def pipe_quota_used_up() -> Iterator[None]:
    """All pages for pipes that an unprivileged user may have are taken (fs.pipe-user-pages-soft)."""
    taken: list[Pipe] = []
    try:
        while not taken or taken[-1].size >= USEFUL_SIZE:
            taken.append(Pipe())
            assert len(taken) < 2000, "the quota of pipe pages has no end"
        yield
    finally:
        for pipe in taken:
            pipe.close()


@pytest.fixture
def pipes(no_descriptor_is_left_open: None) -> Iterator[Pipes]:
    """Three at most; what the test does not give back is given back."""
    pool = Pipes(3)
    yield pool
    for pipe in list(pool._lent):
        pool.give_back(pipe)
    pool.close()


class Holder:
    """Who borrows pipes and has passed on so many bytes; what it held in the last one that was taken away."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self.in_memory: bytes | None = None
        self.pipe: Pipe | None = None
        self.fails = False

    def empty_into_memory(self, pace: Pace) -> int:
        assert pace.slow
        assert self.pipe
        if self.fails:
            raise MemoryError
        self.in_memory = os.read(self.pipe.read_fd, self.pipe.held) if self.pipe.held else b""
        self.pipe.held = 0
        self.pipe = None
        return len(self.in_memory)


def ask(pool: Pipes, borrower: Holder | None = None, now: float = 0.0) -> Pipe | None:
    """A pipe for somebody, if there is one."""
    borrower = borrower or Holder()
    borrower.pipe = pool.borrow(borrower, now)
    return borrower.pipe


def borrow(pool: Pipes) -> Pipe:
    pipe = ask(pool)
    assert pipe is not None
    return pipe


def put(holder: Holder, size: int) -> None:
    """Have bytes in the pipe that was borrowed."""
    assert holder.pipe
    holder.pipe.held += os.write(holder.pipe.write_fd, b"x" * size)


def test_a_borrowed_pipe_is_empty_large_and_never_blocks(pipes: Pipes) -> None:
    pipe = borrow(pipes)
    assert pipe.held == 0
    assert USEFUL_SIZE <= pipe.size <= PIPE_SIZE
    with pytest.raises(BlockingIOError):
        os.read(pipe.read_fd, 1)
    written = 0
    with pytest.raises(BlockingIOError):
        while True:
            written += os.write(pipe.write_fd, bytes(1 << 16))
    assert written == pipe.size
    assert not os.get_inheritable(pipe.read_fd)
    assert not os.get_inheritable(pipe.write_fd)
    pipe.held = written
    pipes.give_back(pipe)


def test_no_more_pipes_are_lent_than_the_limit(pipes: Pipes) -> None:
    lent = [borrow(pipes) for _ in range(3)]
    assert len({pipe.read_fd for pipe in lent}) == 3
    assert ask(pipes) is None
    pipes.give_back(lent[1])
    assert ask(pipes) is lent[1]
    assert ask(pipes) is None
    for pipe in lent:
        pipes.give_back(pipe)


def test_a_pool_without_room_for_pipes_lends_none() -> None:
    assert ask(Pipes(0)) is None


def test_a_pipe_that_was_given_back_is_lent_again_before_another_is_made(pipes: Pipes) -> None:
    first = borrow(pipes)
    pipes.give_back(first)
    before = open_descriptors()
    assert borrow(pipes) is first
    assert open_descriptors() == before
    pipes.give_back(first)


def test_a_pipe_with_bytes_in_it_is_closed_and_its_place_is_free_again() -> None:
    pool = Pipes(1)
    before = open_descriptors()
    pipe = borrow(pool)
    pipe.held = os.write(pipe.write_fd, b"of another connection")
    pool.give_back(pipe)
    assert open_descriptors() == before
    fresh = borrow(pool)
    assert fresh is not pipe
    with pytest.raises(BlockingIOError):
        os.read(fresh.read_fd, 1)
    pool.give_back(fresh)
    pool.close()


def test_pipes_above_a_lowered_limit_are_closed_when_they_come_back(pipes: Pipes) -> None:
    before = open_descriptors()
    lent = [borrow(pipes) for _ in range(3)]
    pipes.limit = 1
    for pipe in lent:
        pipes.give_back(pipe)
    assert open_descriptors() == before + 2
    assert pipes.made == 1
    last = borrow(pipes)
    assert ask(pipes) is None
    pipes.give_back(last)


def test_closing_the_pool_frees_what_is_not_in_use_and_it_serves_on(pipes: Pipes) -> None:
    before = open_descriptors()
    kept, idle = borrow(pipes), borrow(pipes)
    pipes.give_back(idle)
    pipes.close()
    assert open_descriptors() == before + 2
    assert pipes.made == 1
    lent = [borrow(pipes), borrow(pipes)]
    assert ask(pipes) is None
    for pipe in [kept, *lent]:
        pipes.give_back(pipe)
    pipes.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("spare", [0, 1])
def test_without_descriptors_the_pool_does_without_for_a_while_and_then_asks_again(pipes: Pipes, spare: int) -> None:
    with no_descriptors(spare):
        assert ask(pipes) is None
    assert [ask(pipes) for _ in range(REFRAIN)] == [None] * REFRAIN
    pipes.give_back(borrow(pipes))


def test_a_pipe_at_hand_is_lent_where_there_are_no_descriptors(pipes: Pipes) -> None:
    first, second = borrow(pipes), borrow(pipes)
    with no_descriptors():
        assert ask(pipes) is None
        pipes.give_back(first)
        assert ask(pipes) is first
    for pipe in (first, second):
        pipes.give_back(pipe)


def test_with_the_quota_of_pipe_pages_used_up_small_pipes_are_not_lent_and_not_kept(pipes: Pipes) -> None:
    def none_is_lent() -> bool:
        with unprivileged(), pipe_quota_used_up():
            before = open_descriptors()
            if pipe := ask(pipes):  # another program of this user has given pages back in this moment
                pipes.give_back(pipe)
                pipes.close()
                return False
            assert open_descriptors() == before
            assert pipes.made == 0
            return True

    eventually(none_is_lent)
    assert [ask(pipes) for _ in range(REFRAIN)] == [None] * REFRAIN
    with unprivileged():
        pipes.give_back(borrow(pipes))


def test_a_pipe_is_taken_from_who_hardly_moves_for_who_moves(pipes: Pipes) -> None:
    most, least, fast = Holder(), Holder(), Holder()
    for holder, size in ((most, 3000), (least, 2000), (fast, 1000)):
        ask(pipes, holder, now=1.0)
        put(holder, size)
    wanted = least.pipe
    fast.total += int(SLOW)
    who = Holder(PROVEN)
    assert ask(pipes, who, now=2.0) is wanted
    assert wanted
    assert wanted.held == 0
    assert least.in_memory == b"x" * 2000
    assert most.in_memory is None
    assert fast.in_memory is None


def test_no_pipe_is_taken_before_its_borrower_had_time_to_move(pipes: Pipes) -> None:
    holders = [Holder() for _ in range(3)]
    for holder in holders:
        ask(pipes, holder, now=1.0)
        put(holder, 1000)
    assert ask(pipes, Holder(PROVEN), now=1.0 + LOOK / 2) is None
    assert ask(pipes, Holder(PROVEN), now=1.0 + 2 * LOOK) is not None


def test_no_pipe_is_taken_for_who_has_not_moved_much_himself(pipes: Pipes) -> None:
    for _ in range(3):
        ask(pipes, holder := Holder(), now=1.0)
        put(holder, 1000)
    assert ask(pipes, Holder(PROVEN - 1), now=10.0) is None
    assert ask(pipes, Holder(PROVEN), now=10.0) is not None


def test_the_last_pipes_are_for_those_who_have_moved_much() -> None:
    pool = Pipes(16)
    newcomers = [Holder() for _ in range(16)]
    assert sum(ask(pool, holder) is not None for holder in newcomers) == 14
    fast = [Holder(PROVEN) for _ in range(2)]
    assert all(ask(pool, holder) for holder in fast)
    for holder in fast:
        assert holder.pipe
        pool.give_back(holder.pipe)
        assert ask(pool, Holder()) is None, "one that comes back is not for newcomers either"
    for holder in newcomers[:14]:
        assert holder.pipe
        pool.give_back(holder.pipe)
    pool.close()


def test_without_memory_nobody_loses_a_pipe(pipes: Pipes) -> None:
    holders = [Holder() for _ in range(3)]
    for holder in holders:
        ask(pipes, holder, now=1.0)
        put(holder, 1000)
        holder.fails = True
    assert ask(pipes, Holder(PROVEN), now=2.0) is None
    assert pipes.in_memory == 0
    assert all(holder.pipe for holder in holders)


def test_above_a_lowered_limit_no_pipe_is_taken(pipes: Pipes) -> None:
    for _ in range(3):
        ask(pipes, holder := Holder(), now=1.0)
        put(holder, 1000)
    pipes.resize(2)
    assert ask(pipes, Holder(PROVEN), now=2.0) is None
    pipes.resize(3)
    assert ask(pipes, Holder(PROVEN), now=2.0) is not None


def test_who_is_slow_is_looked_for_again_after_a_while_only(pipes: Pipes) -> None:
    holders = [Holder() for _ in range(3)]
    for holder in holders:
        ask(pipes, holder, now=1.0)
        put(holder, 1000)
        holder.total += int(SLOW * 1.0)
    assert ask(pipes, Holder(PROVEN), now=2.0) is None
    assert ask(pipes, Holder(PROVEN), now=2.0 + LOOK / 2) is None
    assert ask(pipes, Holder(PROVEN), now=2.0 + LOOK) is not None, "all have stood still since"


def test_no_more_bytes_are_in_memory_than_may_be_and_room_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rspd.engine.pipes.IN_MEMORY_MAX", 2500)
    pool = Pipes(3)
    slow = [Holder() for _ in range(3)]
    for holder in slow:
        ask(pool, holder, now=1.0)
        put(holder, 1000)
    fast = [Holder(PROVEN) for _ in range(3)]
    assert [ask(pool, holder, now=2.0) is not None for holder in fast] == [True, True, False]
    pool.free_memory(1000)
    assert ask(pool, fast[2], now=2.0 + 2 * LOOK) is not None
    for holder in slow + fast:
        if holder.pipe:
            pool.give_back(holder.pipe)
    pool.close()


@given(st.integers(0, 3), st.lists(st.tuples(st.sampled_from("bpgdlcf"), st.integers(0, 3)), max_size=40))
def test_no_bytes_and_no_descriptors_leak_whatever_the_order(limit: int, steps: list[tuple[str, int]]) -> None:
    before = open_descriptors()
    pool = Pipes(limit)
    lending: list[Holder] = []
    robbed: list[Holder] = []
    for now, (action, number) in enumerate(steps):
        if action in "bp":
            free, slow = len(lending) < pool.limit, bool(lending)
            holder = Holder(PROVEN if action == "p" else 0)
            pipe = ask(pool, holder, now)
            assert (pipe is not None) >= free
            assert (pipe is not None) <= (free or (slow and action == "p"))
            for other in [other for other in lending if not other.pipe]:
                lending.remove(other)
                robbed.append(other)
            if pipe:
                assert pipe not in [other.pipe for other in lending]
                with pytest.raises(BlockingIOError):
                    os.read(pipe.read_fd, 1)
                lending.append(holder)
                if number:
                    put(holder, number)
        elif action in "gd" and lending:
            holder = lending.pop(number % len(lending))
            assert holder.pipe
            if action == "g":
                holder.pipe.held -= len(os.read(holder.pipe.read_fd, holder.pipe.held)) if holder.pipe.held else 0
            pool.give_back(holder.pipe)
        elif action == "f" and robbed:
            pool.free_memory(len(robbed.pop().in_memory or b""))
        elif action == "l":
            pool.resize(number)
        elif action == "c":
            pool.close()
        assert len(lending) <= pool.made <= 3
        assert pool.in_memory == sum(len(holder.in_memory or b"") for holder in robbed)
    for holder in lending:
        assert holder.pipe
        pool.give_back(holder.pipe)
    pool.close()
    assert pool.made == 0
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("flows", "bytes_each"), [(1, MOST), (4, MOST), (16, TURN // 16), (64, TURN // 64), (1000, LEAST)]
)
def test_what_a_flow_may_move_in_a_turn_shrinks_with_the_number_of_flows(flows: int, bytes_each: int) -> None:
    pipes = Pipes()
    surge = [pipes.allowance(1) for _ in range(flows)]
    assert sum(surge) <= TURN + flows * LEAST
    assert min(surge) >= LEAST
    for turn in (2, 3):
        assert [pipes.allowance(turn) for _ in range(flows)] == pytest.approx([bytes_each] * flows, rel=0.1)
    pipes.allowance(4)
    assert pipes.allowance(5) == MOST, "the others have come to rest"


def test_a_turn_in_which_few_flows_move_does_not_make_the_next_one_long() -> None:
    pipes = Pipes()
    for turn in range(1, 31):
        moved = sum(pipes.allowance(turn) for _ in range(2 if turn % 3 else 300))
        assert moved <= TURN + 300 * LEAST
