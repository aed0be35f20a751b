"""Sums over workers never go back, whatever becomes of a worker."""

from __future__ import annotations

import json
from operator import gt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspd.admin.history import History, Values, counted
from rspd.snapshot import OTHER, Checks, Distribution, Ends, Process, Proxy, Snapshot
from tests.admin.samples import SAMPLE, grown, of_lineage

OWN = Snapshot(Process(lineage="own"), (Proxy("web", accepted=1000),))
ENDS = ("web", "10.0.0.11:80", "client-closed")
WORKER = of_lineage(SAMPLE, "w1")


def ended(values: Values) -> float:
    """How many connections have ended by that backend and cause."""
    (number,) = values["rspd_connections_total"][ENDS]
    return number


def nonzero(values: Values) -> Values:
    return {name: {labels: each for labels, each in series.items() if any(each)} for name, series in values.items()}


def test_a_process_alone_says_what_it_has_counted() -> None:
    history = History()
    history.take(SAMPLE, {})
    assert history.sums() == counted(SAMPLE)
    assert history.hand_over() == {}


def test_counters_and_buckets_of_workers_are_added_to_those_of_the_process_that_asks() -> None:
    history = History()
    history.take(OWN, {"1": WORKER, "2": of_lineage(grown(SAMPLE, 5), "w2")})
    sums = history.sums()
    assert ended(sums) == 30 + 35
    assert sums["rspd_accepted_total"][("web",)] == (1000 + 60 + 65,)
    assert sums["rspd_connection_seconds"][("web",)] == (2 + 5, 4, 6, 8, 10, 12, 14, 16, 22, 180_001 + 5 / 1024)


def test_a_worker_that_does_not_answer_counts_as_it_was() -> None:
    history = History()
    history.take(OWN, {"1": WORKER})
    history.take(OWN, {})
    assert ended(history.sums()) == 30


def test_a_worker_that_another_one_went_on_from_counts_once() -> None:
    history = History()
    history.take(OWN, {"1": WORKER})
    history.take(OWN, {"1": grown(WORKER, 2)._replace(process=WORKER.process._replace(origin="other"))})
    assert ended(history.sums()) == 32


def test_a_worker_that_began_anew_counts_beside_the_one_before_it_even_if_it_has_counted_more() -> None:
    history = History()
    history.take(OWN, {"1": WORKER})
    history.take(OWN, {"1": of_lineage(grown(SAMPLE, 9), "w1b")})
    assert ended(history.sums()) == 30 + 39
    history.take(OWN, {"1": of_lineage(grown(SAMPLE, 10), "w1b")})
    assert ended(history.sums()) == 30 + 40


def test_workers_that_answer_at_other_paths_count_once() -> None:
    history = History()
    second = of_lineage(SAMPLE, "w2")
    history.take(OWN, {"/one-worker-1.sock": WORKER, "/one-worker-2.sock": second})
    history.take(OWN, {"/two-worker-1.sock": grown(WORKER, 1)})
    assert ended(history.sums()) == 31 + 30
    history.take(OWN, {"/two-worker-1.sock": grown(WORKER, 2), "/two-worker-2.sock": grown(second, 5)})
    assert ended(history.sums()) == 32 + 35


def test_a_worker_that_was_handed_over_under_two_paths_counts_once_when_it_answers() -> None:
    """As a version did that knew workers by their paths alone."""
    values = {"rspd_connections_total": [[list(ENDS), [30]]]}
    workers = {path: {"lineage": "w1", "counted": values} for path in ("/one-worker-1.sock", "/two-worker-1.sock")}
    history = History()
    history.resume({"ended": {}, "workers": workers})
    history.take(OWN, {"/two-worker-1.sock": WORKER})
    assert ended(history.sums()) == 30


def test_the_next_process_goes_on_from_all_of_it() -> None:
    history = History()
    history.take(OWN, {"1": WORKER, "2": of_lineage(SAMPLE, "w2")})
    history.take(OWN, {"1": of_lineage(SAMPLE, "w1b")})
    handed = json.loads(json.dumps(history.hand_over()))
    following = History()
    following.resume(handed)
    assert nonzero(following.sums()) == nonzero(history.sums())
    following.take(OWN, {"1": of_lineage(grown(SAMPLE, 1), "w1b"), "2": of_lineage(grown(SAMPLE, 1), "w2b")})
    assert ended(following.sums()) == 30 + 31 + 30 + 31


def test_what_is_zero_is_not_handed_over() -> None:
    history = History()
    history.take(OWN, {"1": Snapshot(Process(lineage="w1"), (Proxy("web", accepted=1, ends=(Ends("-", "error"),)),))})
    counted = history.hand_over()["workers"]["1"]["counted"]
    assert {name: series for name, series in counted.items() if series} == {"rspd_accepted_total": [[["web"], [1]]]}


BACKEND = ("web", "docs", "10.0.0.11:80")
ROUTE = ("web", "docs")
GOOD, BAD = (*BACKEND, "good"), (*BACKEND, "bad")


def without_backends(snapshot: Snapshot) -> Snapshot:
    """The same after a reload that has taken all backends and routes out."""
    return snapshot._replace(routes=(), backends=())


def test_a_backend_that_one_process_has_no_more_counts_as_it_was_as_long_as_another_one_has_it() -> None:
    for own, worker in ((SAMPLE, without_backends(WORKER)), (without_backends(SAMPLE), WORKER)):
        history = History()
        history.take(SAMPLE, {"1": WORKER})
        for _ in range(2):
            history.take(own, {"1": worker})
            sums = history.sums()
            assert sums["rspd_connect_seconds"][BACKEND][1:3] == (60, 10)
            assert sums["rspd_backend_checks_total"][BAD] == (4,)
            assert sums["rspd_routed_total"][ROUTE] == (24,)
        history.take(SAMPLE, {"1": WORKER})
        assert history.sums()["rspd_connect_seconds"][BACKEND][1:3] == (90, 15)


def test_a_backend_that_counts_from_0_again_is_added_to_what_it_had() -> None:
    history = History()
    history.take(SAMPLE, {"1": WORKER})
    backend = SAMPLE.backends[0]
    anew = backend._replace(connect=Distribution((1, *backend.connect.counts[1:]), 0.125), checks=Checks(101, 0))
    history.take(SAMPLE, {"1": WORKER._replace(backends=(anew,))})
    sums = history.sums()
    assert sums["rspd_connect_seconds"][BACKEND] == (1, 90, 15, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 3.125)
    assert sums["rspd_backend_checks_total"][GOOD] == (201,)
    assert sums["rspd_backend_checks_total"][BAD] == (4,)


def test_a_backend_and_a_route_that_no_process_has_any_more_are_gone_for_good() -> None:
    history = History()
    history.take(SAMPLE, {"1": WORKER})
    history.take(without_backends(SAMPLE), {"1": without_backends(WORKER)})
    sums = history.sums()
    assert not sums["rspd_connect_seconds"]
    assert not sums["rspd_routed_total"]
    assert ended(sums) == 60
    history.take(SAMPLE, {"1": WORKER})
    assert history.sums()["rspd_connect_seconds"][BACKEND][1:3] == (60, 10)


def test_a_backend_of_a_process_alone_is_gone_with_it() -> None:
    history = History()
    history.take(SAMPLE, {})
    history.take(without_backends(SAMPLE), {})
    assert history.sums() == counted(without_backends(SAMPLE))


def test_ends_that_a_process_adds_to_those_of_other_backends_count_once() -> None:
    """They stay those of their backend as long as another process has it."""

    def has(lineage: str, **ends: int) -> Snapshot:
        them = tuple(Ends(backend, "client-closed", number) for backend, number in ends.items())
        return Snapshot(Process(lineage=lineage), (Proxy("web", ends=them),))

    def sums() -> dict[str, float]:
        return {backend: number for (_, backend, _), (number,) in history.sums()["rspd_connections_total"].items()}

    history = History()
    history.take(has("own", a=7, b=1), {"1": has("w1", a=5, c=2)})
    assert sums() == {"a": 12, "b": 1, "c": 2}
    for _ in range(2):
        history.take(has("own", b=1, other=7), {"1": has("w1", a=6, c=2)})
        assert sums() == {"a": 13, "b": 1, "c": 2, OTHER: 0}
    following = History()
    following.resume(json.loads(json.dumps(history.hand_over())))
    history = following
    history.take(has("own", a=1, b=1, other=7), {"1": has("w1", a=6, c=2)})  # it is back
    assert sums() == {"a": 14, "b": 1, "c": 2, OTHER: 0}
    history.take(has("own", b=1, other=8), {"1": has("w1", c=3, other=6)})
    assert sums() == {"b": 1, "c": 3, OTHER: 14}
    history.take(has("own", b=1, other=8), {"1": has("w1b", d=1)})  # who had c has ended
    assert sums() == {"b": 1, "d": 1, OTHER: 17}


def test_a_backend_without_a_count_is_handed_over_so_that_what_it_had_before_stays() -> None:
    history = History()
    empty = WORKER.backends[1]._replace(connect=Distribution((0,) * 15))
    history.take(OWN, {"1": WORKER})
    history.take(OWN, {"1": WORKER._replace(backends=(empty,))})
    following = History()
    following.resume(json.loads(json.dumps(history.hand_over())))
    following.take(OWN, {})
    labels = empty.proxy, empty.pool, empty.name
    assert following.sums()["rspd_connect_seconds"][labels][0] == 9


def test_reloads_are_those_of_the_process_that_had_most_even_if_it_is_gone() -> None:
    def reloaded(lineage: str, number: int, failed: int) -> Snapshot:
        return Snapshot(Process(lineage=lineage, reloads=number, reloads_failed=failed, handovers=1))

    history = History()
    history.take(reloaded("own", 4, 0), {"1": reloaded("w1", 5, 0), "2": reloaded("w2", 3, 2)})
    for _ in range(2):
        sums = history.sums()
        assert sums["rspd_reloads_total"] == {("ok",): (5,), ("failed",): (2,)}
        history.take(reloaded("own", 4, 0), {"1": reloaded("w1b", 0, 0), "2": reloaded("w2", 3, 2)})
    assert history.sums()["rspd_handovers_total"] == {(): (4,)}


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"ended": {}, "workers": []},
        {"ended": {}, "workers": {"1": {"lineage": 1, "counted": {}}}},
        {"ended": {"x": [[["a"], ["1"]]]}, "workers": {}},
        {"ended": {"x": [[[1], [1]]]}, "workers": {}},
        {"ended": {"x": [[["a"]]]}, "workers": {}},
        {"ended": {"x": [1]}, "workers": {}},
    ],
)
def test_what_is_no_such_document_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        History().resume(value)


def test_a_histogram_with_other_buckets_of_another_version_is_left_out() -> None:
    history = History()
    other = SAMPLE.proxies[0]._replace(seconds=Distribution((1, 2, 3), 1.0))
    history.take(SAMPLE, {"1": WORKER._replace(proxies=(other,))})
    sums = history.sums()
    assert sums["rspd_connection_seconds"] == counted(SAMPLE)["rspd_connection_seconds"]
    assert ended(sums) == 60


# What happens to rspd.service, which is process 0, or to one of three workers.
HAPPENINGS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(
            ["serves", "is taken over", "begins anew", "freezes", "moves", "loses backends", "gets backends"]
        ),
    )
)


@given(HAPPENINGS)
def test_sums_never_go_back_and_are_right_whenever_all_workers_answer(happenings: list[tuple[int, str]]) -> None:
    them = [of_lineage(SAMPLE, str(number)) for number in range(4)]
    history = History()
    paths = list("0123")
    history.take(them[0], dict(zip("123", them[1:], strict=True)))
    before = history.sums()
    truth = 120
    for step, (number, what) in enumerate(happenings):
        one, silent = them[number], 0
        if what == "serves":
            one = grown(one, step)
            truth += step
        elif what == "is taken over":
            one = one._replace(process=one.process._replace(origin=f"later {step}"))
        elif what == "begins anew" and number:
            one = of_lineage(SAMPLE, f"new {step}")
            truth += 30
        elif what == "freezes":
            silent = number
        elif what == "moves":
            paths[number] += "'"
        elif what == "loses backends":
            one = without_backends(one)
        elif what == "gets backends":
            one = one._replace(routes=SAMPLE.routes, backends=SAMPLE.backends)
        them[number] = one
        if what == "is taken over" and not number:
            following = History()
            following.resume(json.loads(json.dumps(history.hand_over())))
            history = following
        history.take(them[0], {paths[place]: each for place, each in enumerate(them) if place not in (0, silent)})
        now = history.sums()
        assert silent or ended(now) == truth
        assert gone_back(before, now) == []
        before = now


def gone_back(before: Values, now: Values) -> list[tuple[str, tuple[str, ...]]]:
    """What is less than it was; a series that is not there any more is not."""
    return [
        (name, labels)
        for name, series in before.items()
        for labels, values in series.items()
        if any(map(gt, values, now[name].get(labels, values)))
    ]
