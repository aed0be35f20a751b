"""Handover: the document, what becomes of connections, and what fails on the way."""

from __future__ import annotations

import logging
import os
import re
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rspd.running.document import DocumentError, read, write
from rspd.running.legacy import Legacy
from tests.running.handing import (
    DB,
    WEB,
    Half,
    Remade,
    ends,
    parcel_of,
    plain_config,
    send_over,
    take_over,
)
from tests.support import FakeClock, is_reset, tcp_pair

VERSIONS = sorted((Path(__file__).parent / "documents").iterdir())

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


def as_handed(document: dict[str, Any]) -> dict[str, Any]:
    """What comes out of a document that was written."""
    content = b"".join(map(bytes, write(document)))
    return dict(read(content))


# The document

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda key: key != "held"), inner),
    max_leaves=20,
)


@given(st.lists(st.binary(min_size=1, max_size=300)), PLAIN)
def test_a_document_says_the_same_when_it_is_read_with_held_bytes_of_any_value(held: list[bytes], plain: Any) -> None:
    flows = [{"held": memoryview(data) if number % 2 else data, "total": 1} for number, data in enumerate(held)]
    handed = as_handed({"flows": flows, "plain": plain})
    assert handed == {"version": 1, "flows": [{"held": data, "total": 1} for data in held], "plain": plain}


@given(st.binary(max_size=200))
def test_garbage_is_no_document(content: bytes) -> None:
    with pytest.raises(DocumentError):
        read(content)


DOCUMENT = b"".join(map(bytes, write({"flow": {"held": b"\0rspd\n\xff"}, "token": "x"})))


@pytest.mark.parametrize("size", range(len(DOCUMENT)))
def test_a_document_that_was_cut_short_is_none(size: int) -> None:
    with pytest.raises(DocumentError):
        read(DOCUMENT[:size])


def framed(text: bytes, held: bytes = b"") -> bytes:
    return b"rspd %d %d\n" % (len(text), len(held)) + text + held


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (DOCUMENT + b"x", "expected .* bytes after its first line, found"),
        (framed(b"{}"), "expected version 1 of it, found None"),
        (framed(b'{"version":2}'), "expected version 1 of it, found 2"),
        (framed(b'{"version":"1"}'), "expected version 1 of it, found '1'"),
        (framed(b'[{"version":1}]'), "expected the state of rspd's connections"),
        (framed(b"1"), "expected the state of rspd's connections"),
        (framed(b'{"version":1'), "expected the state of rspd's connections"),
        (framed(b'{"version":1,"x":"\xff"}'), "expected the state of rspd's connections"),
        (framed(b"[" * 100_000 + b"]" * 100_000), "expected the state of rspd's connections"),
        (framed(b'{"version":1,"x":' + b'{"x":' * 100_000 + b"1" + b"}" * 100_001, b"y"), "expected the state"),
        (framed(b'{"version":1,"x":{"bytes":true}}', b"x"), "expected the state of rspd's connections"),
        (b"rspd -1 3\n{}", "expected"),
        (b"rspd " + b"9" * 5000 + b" 0\n", "expected the state"),
        (b"another 2 0\n{}", "expected"),
    ],
)
def test_what_is_no_document_of_this_version_is_said(content: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        read(content)


@pytest.mark.parametrize("held", [b"[0]", b'{"a":1}'])
def test_bytes_that_another_version_holds_in_another_way_make_it_unreadable_only(held: bytes) -> None:
    with pytest.raises(DocumentError):
        read(framed(b'{"version":1,"held":{"bytes":' + held + b"}}", b"x"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_backend_may_have_any_name(count: int) -> None:
    known = [(2, ("192.0.2.1", 0)), (2, ("192.0.2.2", 0))][:count]
    as_handed({"names": [("held", known)], "flow": {"held": b"x"}})


@pytest.mark.parametrize(
    "content",
    [b"rspd", framed(b"[" * 100_000), framed(b'{"version":2}'), DOCUMENT[:-1], os.urandom(50)],
    ids=["cut short", "nested", "version 2", "too few bytes", "random"],
)
def test_a_document_that_cannot_be_read_costs_the_connections_with_one_error_and_not_the_start(
    content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    near, far = tcp_pair()
    with near, parcel_of(content, b"token", {7: far.fileno()}) as found:
        far.close()

        async def script(half: Half, taken: int) -> None:
            assert taken == 0
            assert is_reset(near)

        take_over(found, plain_config(1), script)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("connections of the process before end: expected ")
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("settings", ["listen: [", "nonsense: 1", "5", 5, "", None])
def test_settings_that_cannot_be_read_are_not_known(settings: object, caplog: pytest.LogCaptureFixture) -> None:
    content = b"".join(map(bytes, write({"settings": settings})))
    with parcel_of(content, b"token", {}) as found:
        legacy = Legacy(found)
        assert legacy.config() is None
        legacy._inheritance.close()
    assert len(caplog.records) == bool(settings)


def test_unknown_keys_are_ignored_and_missing_ones_have_defaults() -> None:
    """The least that is needed of a connection: which descriptors are its own."""
    near, client = tcp_pair()
    far, backend = tcp_pair()
    fds = {100: client.fileno(), 200: backend.fileno()}
    relay = {
        "client": {"fd": 100, "later": [1]},
        "backend": {"fd": 200},
        "upload": {"later": {}},
        "later": None,
    }
    one = {"descriptors": [100, 200], "relay": relay, "later": "x"}
    document = {"token": "token", "later": {}, "proxies": [{"later": 1, "connections": [one]}]}
    content = b"".join(map(bytes, write(document)))
    with near, far, parcel_of(content, b"token", fds) as found:
        client.close()
        backend.close()

        async def script(half: Half, taken: int) -> None:
            assert taken == 1
            await send_over(half.loop, near, far, b"question")
            near.shutdown(socket.SHUT_WR)
            assert await ends(half.loop, far) == b""
            await send_over(half.loop, far, near, b"answer")
            far.close()
            assert await ends(half.loop, near) == b""
            await half.ended()

        take_over(found, plain_config(1), script)


# Of each version


@pytest.mark.large_pipes(2)
@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
def test_the_connections_of_a_document_of_each_version_go_on(
    path: Path, caplog: pytest.LogCaptureFixture, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "rspd")
    lines: list[str] = []
    monkeypatch.setattr("rspd.serving.connection.write", lambda _, line: lines.append(line))
    content = path.read_bytes()
    document = read(content)
    clock = FakeClock()  # it was written at the beginning of this clock
    clock.advance(5.0)
    remade = Remade(document, stack)
    assert [proxy["name"] for proxy in document["proxies"]] == ["web", "db"]

    with parcel_of(content, b"", {}) as found:
        legacy = Legacy(found)
        config = legacy.config()
        legacy._inheritance.close()
    with parcel_of(content, document["token"].encode(), remade.fds) as found:
        remade.close_ours()
        assert config
        assert [proxy.name for proxy in config.proxies] == ["web", "db"]

        async def script(half: Half, taken: int) -> None:
            assert taken == len(remade.handed)
            web, db = half.proxies.configured.values()
            assert [web.served, db.served] == [proxy["accepted"] for proxy in document["proxies"]]
            up, down = web.router.pool.members.everyone
            assert (up.open, up.in_service, str(up.addresses[0].address)) == (web.open, True, up_address(up.name))
            assert web.open >= len(WEB) - 1  # the aborted one may have ended at once
            assert (down.state, down.why_down) == ("down", "Connection refused")
            assert [(one.open, one.in_service) for one in db.router.pool.members.everyone] == [(1, True)]

            for name in WEB + DB:
                await remade.goes_on(half.loop, clock, name)
            await half.ended()

        take_over(found, config, script, clock)

    assert len(lines) == len(remade.handed)
    fields = [dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line)) for line in lines]
    assert {one["handovers"] for one in fields} == {"1"}
    # From before to after, by the clock that both processes share.
    assert all(5 <= float(one["seconds"]) < 30 for one in fields)
    by_client = {one["client"]: one for one in fields}
    via = by_client["203.0.113.7:1234"]
    assert (via["proxy"], via["cause"], via["via"].rpartition(":")[0]) == ("db", "client-closed", "127.0.0.1")
    # Bytes from before and after: `question` and `answer`, `SELECT 1` and `1`.
    assert (via["sent"], via["received"]) == ("16", "7")
    assert (by_client["unix"]["sent"], by_client["unix"]["received"]) == ("16", "12")
    causes = sorted(one["cause"] for one in fields)
    assert causes == ["backend-aborted", "backend-closed"] + ["client-closed"] * 6
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def up_address(name: str) -> str:
    """The address of the backend in a document, whose host only the tests know."""
    return str(("127.0.0.1", int(name.rpartition(":")[2])))
