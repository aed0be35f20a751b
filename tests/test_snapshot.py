"""What is, as JSON: read as it was written, and by other versions."""

from __future__ import annotations

import json
from math import inf, nan
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.snapshot import (
    CONNECT_BOUNDS,
    CONNECTION_BOUNDS,
    NUMBER_MAX,
    QUEUE_BOUNDS,
    TURN_BOUNDS,
    Backend,
    Checks,
    Connection,
    Connections,
    Distribution,
    Listener,
    Proxy,
    Snapshot,
    as_json,
    plain,
    read,
)
from tests.admin.samples import SAMPLE


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field of this type."""
    if kind is float:
        return st.just(inf) | st.floats(-NUMBER_MAX, NUMBER_MAX, exclude_min=True, exclude_max=True)
    if kind is int:
        return st.integers(1 - NUMBER_MAX, NUMBER_MAX - 1)
    if kind is str:
        return st.text(max_size=3)
    if hasattr(kind, "_fields"):
        return st.builds(kind, **{name: values_of(field) for name, field in get_type_hints(kind).items()})
    if getattr(kind, "__origin__", None) is tuple:
        return st.lists(values_of(kind.__args__[0]), max_size=2).map(tuple)
    if args := getattr(kind, "__args__", None):
        return st.none() | values_of(args[0])
    return st.from_type(kind)


@settings(max_examples=25)
@given(values_of(Snapshot))
def test_a_snapshot_is_read_as_it_was_written(snapshot: Snapshot) -> None:
    assert read(Snapshot, json.loads(as_json(snapshot))) == snapshot


@settings(max_examples=25)
@given(values_of(Connections))
def test_connections_are_read_as_they_were_written(connections: Connections) -> None:
    assert read(Connections, json.loads(as_json(connections))) == connections


def test_json_is_one_line_and_has_no_infinity() -> None:
    text = as_json(SAMPLE._replace(backends=(Backend(limit=inf, checks=Checks(ago=inf)),)))
    assert "\n" not in text
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["backends"][0]["limit"] is found["backends"][0]["checks"]["ago"] is None
    assert read(Snapshot, found).backends[0].checks == Checks(ago=inf)


def test_what_is_not_known_stays_so() -> None:
    assert plain(Listener("x", None)) == {"address": "x", "waiting": None, "passed": ""}
    assert read(Listener, {"waiting": None}).waiting is None
    assert read(Backend, {"checks": None}).checks is None
    assert read(Distribution, {"counts": []}) == Distribution()


def test_a_reader_takes_defaults_and_ignores_what_it_does_not_know() -> None:
    assert read(Snapshot, {}) == Snapshot()
    assert read(Proxy, {"name": "web", "new": {"a": 1}, "last_10s": {"other": 1}}) == Proxy("web")
    newer = json.loads(as_json(SAMPLE))
    newer["more"] = 1
    for proxy in newer["proxies"]:
        proxy["more"] = [1]
        del proxy["open"]
    assert read(Snapshot, newer) == SAMPLE._replace(proxies=tuple(one._replace(open=0) for one in SAMPLE.proxies))


def test_a_whole_number_of_seconds_is_one() -> None:
    seen = read(Connection, {"age": 3, "sent": 5})
    assert (seen.age, type(seen.age), seen.sent) == (3.0, float, 5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([], "expected an object for Snapshot, found []"),
        (None, "expected an object for Snapshot, found None"),
        ({"process": 1}, "expected an object for Process, found 1"),
        ({"process": {"pid": "1"}}, "expected int, found '1'"),
        ({"process": {"pid": 1.5}}, "expected int, found 1.5"),
        ({"process": {"pid": True}}, "expected int, found True"),
        ({"process": {"pid": None}}, "expected int, found None"),
        ({"process": {"age": True}}, "expected float, found True"),
        ({"process": {"age": "1"}}, "expected float, found '1'"),
        ({"process": {"ending": 1}}, "expected bool, found 1"),
        ({"process": {"unanswered": "worker-1.sock"}}, "expected a list, found 'worker-1.sock'"),
        ({"process": {"unanswered": [1]}}, "expected str, found 1"),
        ({"process": {"age": 10**400}}, f"expected a number below 9e+18, found {str(10**400)[:80]}"),
        ({"process": {"pid": 10**400}}, f"expected a number below 9e+18, found {str(10**400)[:80]}"),
        ({"process": {"age": inf}}, "expected a number below 9e+18, found inf"),
        ({"process": {"age": nan}}, "expected a number below 9e+18, found nan"),
        ({"process": {"age": -1e300}}, "expected a number below 9e+18, found -1e+300"),
        ({"proxies": {}}, "expected a list, found {}"),
        ({"proxies": [{"listeners": [{"waiting": "3"}]}]}, "expected int, found '3'"),
        ({"proxies": 100 * [1]}, "expected an object for Proxy, found 1"),
        ({"process": 100 * [1]}, f"expected an object for Process, found {str(100 * [1])[:80]}"),
    ],
)
def test_what_does_not_fit_is_told(value: Any, text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is looked at
        read(Snapshot, value)
    assert str(caught.value) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*Snapshot._fields, *Proxy._fields, "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60)
@given(JSON)
def test_any_json_is_read_or_refused(value: Any) -> None:
    try:
        assert isinstance(read(Snapshot, value), Snapshot)
    except ValueError:
        pass


@pytest.mark.parametrize("bounds", [CONNECT_BOUNDS, CONNECTION_BOUNDS, QUEUE_BOUNDS, TURN_BOUNDS])
def test_the_bounds_of_each_distribution_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))
    assert bounds[0] > 0


def test_a_distribution_knows_its_number() -> None:
    assert (Distribution().number, Distribution((1, 0, 2), 5.0).number) == (0, 3)
