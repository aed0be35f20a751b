"""Which connections somebody asks for by an address."""

from __future__ import annotations

from typing import Any

import pytest

from rspd.admin.query import Query
from rspd.snapshot import Connection

ONE = Connection(client="192.0.2.7:51724", via="10.0.0.1:40000", backend="10.0.0.11:80")
SIX = Connection(client="[2001:db8::7]:51724", backend="[2001:db8::11]:80")


def query(key: str, wanted: str) -> Query:
    values: dict[str, Any] = {key: wanted}
    return Query(**values)


@pytest.mark.parametrize("key", ["client", "backend"])
@pytest.mark.parametrize("one", [ONE, SIX], ids=["IPv4", "IPv6"])
def test_an_address_matches_with_its_port_and_without(one: Connection, key: str) -> None:
    address: str = getattr(one, key)
    host = address.rpartition(":")[0]
    for wanted in (address, host, host.strip("[]")):
        assert query(key, wanted).matches(one)
    for wanted in (f"{address}1", host[:-1], address[1:], "10.0.0.99", "80"):
        assert not query(key, wanted).matches(one)


def test_the_proxy_in_front_counts_as_the_client_too() -> None:
    assert Query(client="10.0.0.1").matches(ONE)
    assert not Query(backend="10.0.0.1").matches(ONE)


def test_a_backend_that_is_a_unix_socket_matches_by_its_path() -> None:
    one = Connection(backend="/run/app.sock")
    assert Query(backend="/run/app.sock").matches(one)
    assert not Query(backend="/run/app").matches(one)
    assert not Query(backend="/run/app.sock").matches(Connection())
