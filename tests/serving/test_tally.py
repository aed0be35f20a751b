"""What a proxy counts: each end once, each byte once, and what went wrong of late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.engine.cause import Cause
from rspd.engine.side import Handed
from rspd.running.document import read, write
from rspd.serving.tally import End, Tally
from rspd.snapshot import OTHER, Ends, Failure, Refusals, Volume

A, B = "10.0.0.11:80", "10.0.0.12:80"


def end(
    backend: str = A, cause: Cause = "client-closed", seconds: float = 0.5, sent: int = 1, received: int = 2
) -> End:
    return backend, cause, seconds, sent, received


def counts(tally: Tally) -> tuple[dict[tuple[str, str], int], dict[str, tuple[int, int]], int]:
    """Ends, volumes, and how many connections have lasted for some time."""
    ends = {(one.backend, one.cause): one.number for one in tally.ends}
    return ends, {one.backend: (one.sent, one.received) for one in tally.volumes}, tally.seconds.snapshot().number


def over(tally: Tally) -> Tally:
    """The tally of the next process, by way of the document of a handover."""
    handed = read(b"".join(write({"tally": tally.hand_over()})))["tally"]
    after = Tally()
    after.resume(handed)
    return after


# Ends and bytes


def test_ends_are_counted_by_backend_and_cause_with_their_bytes() -> None:
    tally = Tally()
    tally.new += [
        end(),
        end(B, "backend-aborted", 70.0, 10, 0),
        end(seconds=0.001),
        end("-", "queue-timeout", 5.0, 0, 0),
    ]
    assert set(tally.ends) == {
        Ends(A, "client-closed", 2),
        Ends(B, "backend-aborted", 1),
        Ends("-", "queue-timeout", 1),
    }
    assert set(tally.volumes) == {Volume(A, 2, 4), Volume(B, 10, 0)}  # who had no backend has moved nothing
    assert tally.seconds.snapshot().counts == (1, 0, 1, 1, 0, 1, 0, 0, 0)
    assert tally.seconds.snapshot().total == pytest.approx(75.501)


def test_an_end_is_counted_once_however_often_somebody_looks() -> None:
    tally = Tally()
    for number in range(1, 4):
        tally.new.append(end())
        for _ in range(3):
            assert counts(tally) == ({(A, "client-closed"): number}, {A: (number, 2 * number)}, number)
    assert tally.new == []


def test_bytes_of_an_open_connection_are_counted_as_they_come_and_never_twice() -> None:
    tally, one = Tally(), object()
    for sent, received, volume in ((0, 0, ()), (5, 0, (Volume(A, 5, 0),)), (5, 7, (Volume(A, 5, 7),))):
        for _ in range(2):
            tally.count_bytes(one, A, sent, received)
            assert tally.volumes == volume
    assert tally.ends == ()
    tally.new.append(tally.less_share(one, end(sent=6, received=9)))
    assert tally.shares == {}
    assert counts(tally) == ({(A, "client-closed"): 1}, {A: (6, 9)}, 1)


# What may happen to a few connections: bytes move, somebody looks, one ends, the service restarts.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("move"), st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)),
        st.tuples(st.just("look")),
        st.tuples(st.just("end"), st.integers(0, 3)),
        st.tuples(st.just("hand over")),
    ),
    max_size=25,
)


@settings(max_examples=150)
@given(STEPS)
def test_whenever_somebody_looks_the_sums_are_those_of_all_bytes_and_ends(steps: list[tuple[Any, ...]]) -> None:
    tally = Tally()
    open_ones = [[0, 0, number] for number in range(4)]  # bytes of each, and what stands for it
    moved, ended = {A: [0, 0], B: [0, 0]}, 0
    for kind, *rest in [*steps, ("look",)]:
        if kind == "move":
            place, sent, received = rest
            open_ones[place][0] += sent
            open_ones[place][1] += received
            moved[(A, B)[place % 2]][0] += sent
            moved[(A, B)[place % 2]][1] += received
        elif kind == "end":
            (place,) = rest
            sent, received, one = open_ones[place]
            whole = end((A, B)[place % 2], sent=sent, received=received)
            tally.new.append(tally.less_share(one, whole) if one in tally.shares else whole)
            open_ones[place] = [0, 0, one + 4]
            ended += 1
        elif kind == "hand over":
            shares = tally.shares
            tally = over(tally)
            tally.shares = shares  # their connections take them along
        else:
            for place, (sent, received, one) in enumerate(open_ones):
                tally.count_bytes(one, (A, B)[place % 2], sent, received)
            assert counts(tally)[1] == {name: tuple(sums) for name, sums in moved.items() if any(sums)}
            assert sum(counts(tally)[0].values()) == counts(tally)[2] == ended


# Backends that are gone


def come_and_go(tally: Tally, names: Sequence[str]) -> None:
    """One after the other, each with an end of each of two causes."""
    for name in names:
        tally.new += [end(name), end(name, "backend-closed")]
        tally.settle()


def test_counts_of_backends_that_are_long_gone_are_added_up() -> None:
    tally = Tally()
    tally.go_by(lambda: [A])
    gone = [f"10.1.0.{number}:80" for number in range(1000)]
    come_and_go(tally, [A, "-"])
    for number in range(0, 1000, 50):
        come_and_go(tally, gone[number : number + 50])
        tally = over(tally)  # the bound holds over handovers, too
        tally.go_by(lambda: [A])
    come_and_go(tally, gone[-1:])
    ends, volumes, number = counts(tally)
    assert {A, "-", OTHER, *gone[-100:]} <= volumes.keys()
    assert len(volumes) < 130
    assert len(ends) == 2 * len(volumes)
    assert sum(ends.values()) == number == 2 * 1003
    assert ends[A, "client-closed"] == 1
    assert ends[OTHER, "client-closed"] == ends[OTHER, "backend-closed"] >= 870
    assert [sum(each) for each in zip(*volumes.values(), strict=True)] == [2 * 1003, 4 * 1003]


def test_a_connection_that_outlives_the_counts_of_its_backend_is_counted_once() -> None:
    tally, one = Tally(), object()
    tally.count_bytes(one, B, 5, 7)
    come_and_go(tally, [f"10.1.0.{number}:80" for number in range(200)])
    assert B not in counts(tally)[1]
    tally.count_bytes(one, B, 6, 9)
    assert counts(tally)[1][B] == (1, 2)
    tally.new.append(tally.less_share(one, end(B, sent=10, received=10)))
    ends, volumes, _ = counts(tally)
    assert (ends[B, "client-closed"], volumes[B]) == (1, (5, 3))
    assert [sum(each) for each in zip(*volumes.values(), strict=True)] == [400 + 10, 800 + 10]


# Failures and refusals


def test_failures_are_summed_with_the_last_reason_the_most_frequent_first() -> None:
    tally = Tally()
    tally.note_failure("backend-refused", A, "Connection refused", 1000.0)
    tally.note_failure("backend-aborted", B, "", 1010.0)
    tally.note_failure("backend-refused", A, "No route to host", 1100.0)
    tally.note_failure("backend-refused", A, "", 1200.0)
    tally.note_failure("backend-refused", B, "Connection refused", 1205.0)
    assert tally.failures(1210.0) == (
        Failure("backend-refused", A, 3, "No route to host", 10.0),
        Failure("backend-aborted", B, 1, "", 200.0),
        Failure("backend-refused", B, 1, "Connection refused", 5.0),
    )


def test_failures_are_forgotten_after_ten_minutes() -> None:
    tally = Tally()
    tally.note_failure("connect-timeout", A, "no answer", 1000.0)
    tally.note_failure("connect-timeout", A, "no answer in time", 1300.0)
    assert tally.failures(1599.0) == (Failure("connect-timeout", A, 2, "no answer in time", 299.0),)
    assert tally.failures(1660.0) == (Failure("connect-timeout", A, 1, "no answer in time", 360.0),)
    assert tally.failures(1960.0) == ()


def test_what_is_kept_of_failures_is_bounded() -> None:
    tally = Tally()
    for minute in range(100):
        for second in range(3):
            tally.note_failure("connect-timeout", A, "no answer", minute * 60.0 + second)
    assert len(tally.hand_over()["failures"]) == 11
    assert tally.failures(100 * 60.0)[0].number == 30


def test_refused_clients_are_counted_by_key_and_are_failures() -> None:
    tally = Tally()
    tally.note_refusal("deny", "in deny 10.0.0.0/8", 1000.0)
    tally.note_refusal("deny", "in deny 192.0.2.0/24", 1001.0)
    tally.note_refusal("max_connections_per_client", "has 1 connection", 1002.0)
    assert tally.refused == (Refusals("deny", 2), Refusals("max_connections_per_client", 1))
    assert tally.failures(1002.0)[0] == Failure("refused: deny", "-", 2, "in deny 192.0.2.0/24", 1.0)
    assert tally.ends == ()


# Handover


def full() -> Tally:
    tally = Tally()
    tally.accepted = 9
    tally.new += [end(), end(B, "backend-closed", 3.0, 0, 5)]
    tally.queue_seconds.note(0.7)
    tally.note_refusal("allow", "not in allow", 1000.0)
    tally.note_failure("connect-timeout", A, "no answer", 1100.0)
    return tally


def known(tally: Tally) -> object:
    return tally.accepted, counts(tally), tally.queue_seconds.snapshot(), tally.refused, tally.failures(1200.0)


def test_the_next_process_goes_on_with_all_counts() -> None:
    tally = over(full())
    assert known(tally) == known(full())
    assert known(over(tally)) == known(full())
    tally.new.append(end())
    tally.note_failure("connect-timeout", A, "", 1150.0)
    assert counts(tally)[0] == {(A, "client-closed"): 2, (B, "backend-closed"): 1}
    assert tally.failures(1200.0)[0] == Failure("connect-timeout", A, 2, "no answer", 50.0)


@pytest.mark.parametrize("handed", [{}, {"new": 1}, {"seconds": None, "queue_seconds": [[1], 1.0]}])
def test_what_another_version_has_not_said_is_none(handed: Handed) -> None:
    tally = Tally()
    tally.resume(handed)
    assert known(tally) == known(Tally())


def test_a_lost_connection_has_an_end_and_the_bytes_that_have_not_been_counted() -> None:
    tally = over(full())
    relay = {"upload": {"total": 3}, "download": {"total": 4}}
    handed = {"backend": A, "started": 990.0, "counted": (1, 1), "relay": relay}
    assert tally.note_lost(handed, "handover-failed", "too few", 1000.0) == (A, "handover-failed", 10.0, 3, 4)
    tally.note_lost({}, "handover-failed", "lacks 'fd'", 1010.0)
    ends, volumes, _ = counts(tally)
    assert (ends[A, "handover-failed"], ends["-", "handover-failed"]) == (1, 1)
    before = counts(full())[1]
    assert volumes == {**before, A: (before[A][0] + 2, before[A][1] + 3)}
    assert tally.seconds.snapshot().total == pytest.approx(13.5)
