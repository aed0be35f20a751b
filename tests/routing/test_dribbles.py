"""rspd/routing/heads.py: clients that say what they want byte by byte cost no more than their bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from rspd.engine.loop import Loop
from rspd.protocols.first import HEAD_MAX
from tests.dialled import settle
from tests.routing.clients import Listener, hello, records
from tests.support import FakeClock, run


def request(size: int) -> bytes:
    fields = b"".join(b"X-%d: value\r\n" % number for number in range(size // 15))
    return b"GET / HTTP/1.1\r\nHost: a.org\r\n" + fields


def one_field(size: int) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: a.org\r\nX: " + b"x" * size


def first_line(size: int) -> bytes:
    return b"GET /" + b"x" * size


def whole_hello(size: int) -> bytes:
    return hello(size=size)[:-1]


def hello_in_records(size: int) -> bytes:
    return records(hello(size=size)[5:], size // 100)[:-1]


def executed(data: bytes) -> int:
    """How many lines of Python hearing these bytes takes, which come byte by byte."""
    count = 0

    def trace(_: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    async def main(loop: Loop) -> None:
        with Listener(loop) as client:
            client.start()
            for place in range(len(data)):
                client.peer.send(data[place : place + 1])
                await settle(loop)
            assert client.outcome is None, client.outcome
            client.peer.close()
            await client.result()

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run(main, FakeClock())
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("begun", [request, one_field, first_line, whole_hello, hello_in_records])
def test_the_work_grows_with_the_bytes_and_not_with_their_square(begun: Callable[[int], bytes]) -> None:
    few, many = begun(1000), begun(4000)
    assert len(many) > 3 * len(few)
    assert executed(many) / len(many) < 1.5 * executed(few) / len(few)
    assert len(many) < HEAD_MAX
