"""Documents of other versions: keys that are missing, keys that are not known, and documents of many connections."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import re
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from rspd.host.store import MESSAGE_MAX, QUEUE_SIZE
from rspd.host.systemd import StoredDescriptor
from rspd.net.networks import parse_network
from rspd.running.document import read, write
from rspd.running.legacy import Legacy
from rspd.settings import Config
from tests.dialled import until
from tests.running import handing
from tests.running.handing import (
    DB,
    WEB,
    Half,
    Remade,
    parcel_of,
    plain_config,
    send_numbered,
    send_over,
    take_over,
)
from tests.support import FakeClock, is_reset, tcp_pair

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

NEWEST = Path(__file__).parent / "documents" / "version-1-counts"
NAMES = WEB + DB

Key = tuple[str | int, ...]


def parts(content: bytes) -> tuple[Any, bytes]:
    """What a document says, and the bytes behind that; their places stay in it."""
    line, _, rest = content.partition(b"\n")
    size = int(line.split()[1])
    return json.loads(rest[:size]), rest[size:]


def framed(document: object, held: bytes) -> bytes:
    """A document of these."""
    text = json.dumps(document).encode()
    return b"rspd %d %d\n" % (len(text), len(held)) + text + held


DOCUMENT, BYTES = parts(NEWEST.read_bytes())


def keys(value: object, above: Key = ()) -> Iterator[Key]:
    """Each key of a document, by the way to it; not the places of bytes, which are the form."""
    if isinstance(value, dict) and value.keys() != {"bytes"}:
        for key, inner in value.items():
            yield (*above, key)
            yield from keys(inner, (*above, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from keys(inner, (*above, number))


def without(key: Key) -> bytes:
    """The document without this key."""
    document = copy.deepcopy(DOCUMENT)
    remove(document, key)
    return framed(document, BYTES)


def remove(document: Any, key: Key) -> None:
    """Leave out this key."""
    for step in key[:-1]:
        document = document[step]
    del document[key[-1]]


def name_of(key: Key) -> str:
    """The connection that has this key; empty if none does."""
    if len(key) > 4 and key[2] == "connections":
        return NAMES[int(key[3]) + (len(WEB) if key[1] else 0)]
    return ""


# What is needed: without it, nothing else says which descriptors are a connection's. Nothing goes on then.
OF_ALL = {("token",), ("proxies",), ("version",)}
OF_PROXY = {"connections"}
OF_CONNECTION = {("descriptors",), ("relay",), ("relay", "client"), ("relay", "backend")}
OF_CONNECTION |= {("relay", "client", "fd"), ("relay", "backend", "fd")}

# Without these, nothing says that there were bytes.
BYTES_ELSEWHERE = {("relay", "download", "held"), ("relay", "download", "pipe"), ("relay", "download")}

PIPED: Key = ("proxies", 0, "connections", WEB.index("piped"), "relay", "download")


def lost(key: Key) -> set[str]:
    """The connections that cannot go on without a key."""
    if key in OF_ALL:
        return set(NAMES)
    if len(key) == 3 and key[2] in OF_PROXY:
        return set(DB if key[1] else WEB)
    if key[4:] in OF_CONNECTION:
        return {name_of(key)}
    return set()


class Taken:
    """What has become of a document in the next process: its connections, and all that was logged."""

    def __init__(
        self,
        content: bytes,
        ends: set[str],
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        leaves_out: str = "",
    ) -> None:
        """ends: who is reset. All others go on, up to their ends, but for the one that has lost its bytes."""
        caplog.set_level(logging.INFO, "rspd")
        self.lines: list[str] = []
        monkeypatch.setattr("rspd.serving.connection.write", lambda _, line: self.lines.append(line))
        clock = FakeClock()  # the document was written at the beginning of this clock
        clock.advance(5.0)
        with ExitStack() as stack:
            remade = Remade(read(NEWEST.read_bytes()), stack)
            with parcel_of(content, DOCUMENT["token"].encode(), remade.fds) as found:
                remade.close_ours()

                async def script(half: Half, taken: int) -> None:
                    for name in NAMES:
                        if name in ends:
                            assert is_ended(remade.peers[name][0]), name
                        elif name != leaves_out:
                            await remade.goes_on(half.loop, clock, name)
                    self.taken = taken

                take_over(found, config(), script, clock)
        self.records = [record for record in caplog.records if record.levelno >= logging.WARNING]
        # Without the verdicts of the process before, the first check of a backend finds that it is not here.
        said = [record.getMessage() for record in self.records]
        self.said = [line for line in said if not line.startswith("backend down proxy=db ")]


def is_ended(client: socket.socket) -> bool:
    """Whether nobody has the other end any more. A unix socket has no RST."""
    if client.family != socket.AF_UNIX:
        return is_reset(client)
    while client.recv(1 << 16):
        pass
    return True


def config() -> Config:
    """The configuration of the document, as the next process has it."""
    with parcel_of(NEWEST.read_bytes(), b"", {}) as found:
        legacy = Legacy(found)
        known = legacy.config()
        legacy._inheritance.close()
    assert known
    return known


# Missing keys


@pytest.mark.large_pipes(2)
@pytest.mark.parametrize(
    "key", [key for key in keys(DOCUMENT) if key[:6] != PIPED or len(key) > 7], ids=lambda key: ".".join(map(str, key))
)
def test_a_key_that_is_missing_costs_no_other_connection(
    key: Key, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = lost(key)
    leaves_out = name_of(key) if key[4:] in BYTES_ELSEWHERE else ""
    taken = Taken(without(key), ends, caplog, monkeypatch, leaves_out)
    assert taken.taken == len(NAMES) - len(ends)
    assert len(taken.lines) == len(NAMES) - len(ends)
    if not ends:
        assert taken.said == []
    elif name_of(key):
        reason = taken.said[-1]
        assert re.fullmatch(
            r"connection closed client=\S+( via=\S+)? proxy=\S+ backend=\S+ sent=\d+ received=\d+ seconds=\d\.\d+ "
            r"cause=handover-failed reason=.+",
            reason,
        )


@pytest.mark.parametrize("key", sorted(OF_CONNECTION), ids=".".join)
def test_what_cannot_go_on_without_a_key_is_said_in_a_line(
    key: tuple[str, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Taken(without(("proxies", 0, "connections", 0, *key)), {"plain"}, caplog, monkeypatch)
    assert [record for record in taken.records if record.exc_info] == []
    assert len(taken.said) == 1


@pytest.mark.large_pipes(2)
@pytest.mark.parametrize("key", [PIPED, (*PIPED, "pipe")], ids=lambda key: ".".join(map(str, key)))
def test_descriptors_of_a_connection_that_it_does_not_need_are_closed(
    key: Key, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    Taken(without(key), set(), caplog, monkeypatch, "piped")
    left = set(os.listdir("/proc/self/fd")) - before
    for fd in left:
        with suppress(OSError):  # that of the look
            os.close(int(fd))
    assert len(left) <= 1


# Unknown keys

LATER = {"later": [1, {"inner": "x"}], "": None, "descriptor": {"fd": 1}}


def extended(value: Any) -> Any:
    """The same with unknown keys at every level."""
    if isinstance(value, dict) and value.keys() != {"bytes"}:
        return {"before": 0, **{key: extended(inner) for key, inner in value.items()}, **LATER}
    return [extended(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.large_pipes(2)
def test_unknown_keys_at_every_level_are_ignored(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Taken(framed(extended(DOCUMENT), BYTES), set(), caplog, monkeypatch)
    assert (taken.taken, len(taken.lines), taken.said) == (len(NAMES), len(NAMES), [])
    assert all("handovers=1" in line for line in taken.lines)


@pytest.mark.large_pipes(2)
def test_settings_with_unknown_keys_cost_no_connection(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for a start whose own file is wrong. Then the log says why they are of no use."""
    settings = DOCUMENT["settings"].replace("      weight: 1\n", "      weight: 1\n      later: 5\n")
    assert settings != DOCUMENT["settings"]
    content = framed({**DOCUMENT, "settings": settings}, BYTES)
    taken = Taken(content, set(), caplog, monkeypatch)
    assert (taken.taken, len(taken.lines), taken.said) == (len(NAMES), len(NAMES), [])
    with parcel_of(content, b"", {}) as found:
        legacy = Legacy(found)
        assert legacy.config() is None
        legacy._inheritance.close()
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith("the settings of the process before cannot be read: ")
    assert "later: unknown key" in record.getMessage()
    assert not record.exc_info


@pytest.mark.large_pipes(2)
@pytest.mark.parametrize("version", [0, 2, "2", None])
def test_a_document_of_another_version_ends_its_connections_and_says_so(
    version: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Taken(framed({**extended(DOCUMENT), "version": version}, BYTES), set(NAMES), caplog, monkeypatch)
    assert (taken.taken, taken.lines) == (0, [])
    assert taken.said == [
        f"connections of the process before end: expected version 1 of it, found {version!r}",
    ]
    assert not taken.records[0].exc_info


# Clients that wait: the newest part of the document, which no frozen one has yet

SAYS = "PROXY TCP4 203.0.113.7 198.51.100.1 1234 443\r\n"
CUT = 11
FIRST = 100  # the number of a descriptor


def client(number: int, **more: object) -> dict[str, Any]:
    """What a document says of a client that has no relay yet."""
    side = {"fd": number, "family": 2, "ended": False, "aborted": False}
    known = {"client": ["127.0.0.1", number], "started": 1000.0, "began": 1000.0, "handovers": 1}
    return {**known, "descriptors": [number], "side": side, "admitted": False, "passed": ["plain"], **more}


def waiting() -> dict[str, dict[str, Any]]:
    """One of each kind: in the queue, within a PROXY header, and connecting after it."""
    attempts = {"deadline": 1010.0, "give_up": 1600.0, "tried": [], "used": 1, "reasons": ["x"], "cause": "error"}
    begun = {"deadline": 1010.0, "taken": SAYS[:CUT].encode(), "whole": False}
    whole = {"deadline": 1010.0, "taken": b"", "whole": True}
    via = {"via": ["127.0.0.1", 9], "destination": ["198.51.100.1", 443]}
    return {
        "queued": client(FIRST, attempts=attempts, admitted=True),
        "begun": client(FIRST + 1, header=begun),
        "connecting": client(FIRST + 2, header=whole, admitted=True, **via),
    }


OF_CLIENT = {("descriptors",), ("side",), ("side", "fd")}

# Without these, what comes is no header; the log says what was found.
OF_HEADER = {
    ("begun", "header"),
    ("begun", "header", "taken"),
}


def take_over_clients(document: dict[str, dict[str, Any]], ends: set[str]) -> int:
    """Those who wait go on to their ends, but for some that are reset. Returns how many were taken over."""
    clock = FakeClock()  # the document was written at the beginning of this clock
    clock.advance(2.0)
    taken: list[int] = []
    with ExitStack() as stack:
        backend = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        pairs = {name: tcp_pair() for name in document}
        fds = {FIRST + number: far.fileno() for number, (_, far) in enumerate(pairs.values())}
        kinds = {"plain": ["queued"], "proxied": ["begun", "connecting"]}
        proxies = [{"name": name, "connections": [document[one] for one in own]} for name, own in kinds.items()]
        content = b"".join(map(bytes, write({"token": "token", "proxies": proxies})))
        with parcel_of(content, b"token", fds) as found:
            for name, (near, far) in pairs.items():
                stack.enter_context(near)
                far.close()
                near.sendall((SAYS[CUT:] if name == "begun" else "").encode() + name.encode())

            async def script(half: Half, count: int) -> None:
                taken.append(count)
                left = document.keys() - ends
                while left:
                    await until(half.loop, lambda: select.select([backend], [], [], 0)[0])
                    server = stack.enter_context(backend.accept()[0])
                    await until(half.loop, lambda: select.select([server], [], [], 0)[0])  # noqa: B023
                    name = server.recv(100).decode()
                    left.remove(name)
                    near = pairs[name][0]
                    await send_over(half.loop, server, near, b"answer")
                    near.close()
                    assert await handing.ends(half.loop, server) == b""
                    server.close()
                await half.ended()
                assert [name for name in ends if not is_reset(pairs[name][0])] == []

            take_over(found, two_proxies(backend.getsockname()[1]), script, clock)
    return taken[0]


def two_proxies(port: int) -> Config:
    """One that expects a PROXY header, and one that does not."""
    [plain] = plain_config(port).proxies
    trusted = (parse_network("127.0.0.0/8"),)
    return Config((plain._replace(name="plain"), plain._replace(name="proxied", accept_proxy=trusted)))


@pytest.mark.parametrize(
    "key", [key for key in [(), *keys(waiting())] if len(key) != 1], ids=lambda key: ".".join(map(str, key)) or "none"
)
def test_a_key_that_is_missing_costs_no_other_client_that_waits(
    key: Key, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("rspd.serving.connection.write", lambda _, line: lines.append(line))
    document = waiting()
    if key:
        remove(document, key)
    lost = key[1:] in OF_CLIENT
    ends = {str(key[0])} if lost or key in OF_HEADER else set()
    assert take_over_clients(document, ends) == len(document) - lost
    failed = [
        record.getMessage() for record in caplog.records if "cause=handover-failed reason=" in record.getMessage()
    ]
    assert len(failed) == lost
    assert len(lines) == len(document) - lost
    assert sum("cause=client-closed" in line for line in lines) == len(document) - len(ends)
    assert sum("cause=bad-header" in line and "reason=" in line for line in lines) == (key in OF_HEADER)


def test_unknown_keys_of_clients_that_wait_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    document = {name: extended(one) for name, one in waiting().items()}
    assert take_over_clients(document, set()) == len(document)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# Many connections

MANY = 30_000
BOUND = 15.0  # seconds of CPU time, where coverage is measured too: a restart that takes longer is an outage


def many(count: int, fds: tuple[int, int] = (10, 11)) -> dict[str, Any]:
    """A document of so many connections, a tenth of them with bytes. fds: the descriptors of the first one."""
    first = DOCUMENT["proxies"][0]["connections"][0]
    found = []
    for number in range(count):
        client, backend = fds[0] + 2 * number, fds[1] + 2 * number
        flow = {"total": number, "moved_at": 1000.0 + number}
        relay = {**first["relay"], "client": {"fd": client, "family": 2}, "backend": {"fd": backend, "family": 2}}
        relay |= {"upload": flow, "download": {**flow, "held": bytes(200)} if number % 10 == 0 else flow}
        found.append({**first, "client": ("127.0.0.1", number), "descriptors": [client, backend], "relay": relay})
    proxy = {**DOCUMENT["proxies"][0], "name": "", "accepted": count, "connections": found}
    return {"token": "token", "settings": DOCUMENT["settings"], "served_before": 0, "proxies": [proxy]}


def test_a_document_of_30000_connections_is_written_and_read_in_time(
    record_property: Callable[[str, object], None],
) -> None:
    document = many(MANY)
    gc.disable()  # as rspd does
    try:
        began = time.process_time()
        content = b"".join(map(bytes, write(document)))
        written = time.process_time()
        found = read(content)
        done = time.process_time()
    finally:
        gc.enable()
    assert len(found["proxies"][0]["connections"]) == MANY
    record_property(
        f"a document of {MANY:,} connections",
        f"{len(content) / 1e6:.1f} MB, written in {written - began:.2f} s, read in {done - written:.2f} s",
    )
    assert done - began < BOUND


@pytest.mark.usefixtures("as_many_descriptors_as_allowed")
def test_as_many_connections_as_there_are_descriptors_for_are_taken_over_and_handed_over_in_time(
    record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real descriptors, of two sockets: those of the document, the numbers of which are far above our own."""
    monkeypatch.setattr("rspd.serving.connection.write", lambda *_: None)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(MANY, (limit - len(os.listdir("/proc/self/fd")) - 200) // 2)
    content = b"".join(map(bytes, write(many(count, (1_000_000, 1_000_001)))))
    near, client = tcp_pair()
    far, backend = tcp_pair()
    with near, client, far, backend, parcel_of(content, b"token", {}) as found:
        fill_queue(found, {1_000_000 + number: (client, backend)[number % 2].fileno() for number in range(2 * count)})
        times = [time.process_time()]

        async def script(half: Half, taken: int) -> None:
            times.append(time.process_time())
            assert (taken, len(half.connections)) == (count, count)
            parts = write(half.proxies.hand_over())
            times.append(time.process_time())
            assert sum(map(len, parts)) > 100 * count

        gc.disable()  # as rspd does
        try:
            take_over(found, plain_config(1), script, FakeClock())
        finally:
            gc.enable()
    record_property(
        f"a handover of {count:,} connections",
        f"read and taken over in {times[1] - times[0]:.2f} s, asked and written in {times[2] - times[1]:.2f} s",
    )
    assert times[2] - times[0] < BOUND


def fill_queue(found: list[StoredDescriptor], fds: dict[int, int]) -> None:
    """Put descriptors into the queue of a parcel, by the numbers that they had, in as many messages as it takes."""
    with socket.socket(fileno=os.dup(found[1].fd)) as queue:
        queue.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE_SIZE)
        numbers = list(fds)
        for begin in range(0, len(numbers), MESSAGE_MAX):
            send_numbered(queue, b"token", {number: fds[number] for number in numbers[begin : begin + MESSAGE_MAX]})
