"""Which connections somebody asks for: as the words after `?`, and as a test of each connection."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rspd.admin.query import SORTS, Query, read_query
from rspd.snapshot import Connection

ONE = Connection(
    "a-1",
    "web",
    client="10.0.0.1:40000",
    via="192.0.2.7:50000",
    backend="10.0.0.11:80",
    route="docs",
    age=60.0,
    idle=5.0,
    sent=100,
    received=20,
    rate=3.0,
)

NUMBERS = st.one_of(st.floats(0, allow_nan=False), st.integers(0, 1 << 40))


@settings(max_examples=40)
@given(
    st.builds(
        Query,
        proxy=st.text(max_size=8),
        client=st.one_of(st.text(max_size=8).filter(lambda text: "/" not in text), st.just("10.0.0.0/8")),
        backend=st.text(max_size=8),
        route=st.text(max_size=8),
        text=st.text(max_size=8),
        longer_than=NUMBERS,
        idle_for=NUMBERS,
        sort=st.sampled_from(SORTS),
        limit=NUMBERS,
    )
)
def test_a_query_is_read_as_it_was_written(query: Query) -> None:
    text = str(query)
    assert text.isascii()
    assert not {*text} & {*" #\r\n"}
    assert read_query(text) == query


def test_without_words_it_asks_for_all_the_oldest_first() -> None:
    assert str(Query()) == ""
    assert read_query("") == Query(sort="age", limit=inf)
    assert Query().matches(ONE)
    assert Query().matches(Connection())


@pytest.mark.parametrize(
    ("words", "matches"),
    [
        ("proxy=web", True),
        ("proxy=we", False),
        ("backend=10.0.0.11:80", True),
        ("backend=10.0.0.11", True),
        ("route=docs", True),
        ("route=other", False),
        ("client=10.0.0.1", True),
        ("client=10.0.0.1:40000", True),
        ("client=10.0.0.1:40001", False),
        ("client=10.0.0.", False),
        ("client=10.0.0.11", False),
        ("client=192.0.2.7", True),
        ("client=192.0.2.7:50000", True),
        ("client=10.0.0.0/8", True),
        ("client=10.0.0.7/24", True),
        ("client=192.0.2.0/24", True),
        ("client=10.0.1.0/24", False),
        ("client=::/0", False),
        ("text=0.0.1:4", True),
        ("text=EB", True),
        ("text=doc", True),
        ("text=192.0.2", True),
        ("text=a-1", False),
        ("longer_than=60", True),
        ("longer_than=60.1", False),
        ("idle_for=5", True),
        ("idle_for=6&longer_than=1", False),
        ("idle_for=inf", False),
        ("proxy=web&client=10.0.0.1&route=docs&idle_for=1", True),
        ("proxy=web&client=10.0.0.1&route=docs&idle_for=9", False),
    ],
)
def test_each_word_must_match(words: str, matches: bool) -> None:
    assert read_query(words).matches(ONE) is matches


@pytest.mark.parametrize("wanted", ["::1", "[::1]", "[::1]:4000"])
def test_a_client_is_found_by_its_ipv6_address(wanted: str) -> None:
    assert Query(client=wanted).matches(Connection(client="[::1]:4000"))
    assert not Query(client=wanted).matches(Connection(client="[::11]:4000"))


def test_a_client_is_found_by_its_ipv6_network() -> None:
    assert Query(client="2001:db8::/32").matches(Connection(client="[2001:db8::1]:4000"))
    assert not Query(client="2001:db9::/32").matches(Connection(client="[2001:db8::1]:4000"))
    assert not Query(client="0.0.0.0/0").matches(Connection(client="unix"))


def test_a_client_without_an_address_is_found_by_none() -> None:
    assert not Query(client="10.0.0.1").matches(Connection(client="unix"))
    assert Query(client="unix").matches(Connection(client="unix"))


def test_the_largest_come_first_by_what_is_asked_for() -> None:
    found = {sort: Query(sort=sort).key(ONE) for sort in SORTS}
    assert found == {"bytes": 120, "age": 60.0, "idle": 5.0, "rate": 3.0}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("x=1", "expected one of proxy, client, backend, route, text, longer_than, idle_for, sort, limit, found 'x'"),
        ("sort=size", "sort: expected one of bytes, age, idle, rate, found 'size'"),
        ("limit=-1", "limit: expected a number from 0, found '-1'"),
        ("limit=nan", "limit: expected a number from 0, found 'nan'"),
        ("limit=", "limit: expected a number from 0, found ''"),
        ("longer_than=1h", "longer_than: expected a number from 0, found '1h'"),
        ("idle_for=" + 200 * "9" + "x", f"idle_for: expected a number from 0, found '{79 * '9'}"),
        ("client=10.0.0.0/33", "client: expected a network as 10.0.0.0/8, found '10.0.0.0/33'"),
        ("client=a/b", "client: expected a network as 10.0.0.0/8, found 'a/b'"),
        ("proxy", "bad query field: 'proxy'"),
        ("&", "bad query field: ''"),
    ],
)
def test_what_is_no_query_is_told_so(words: str, text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is looked at
        read_query(words)
    assert str(caught.value) == text


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        query = read_query(text)
    except ValueError:
        return
    query.matches(ONE)
