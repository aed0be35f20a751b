"""rspd/protocols/http.py: the host that is read from a head is the one that h11, nginx and HAProxy see there.

A head that is refused, by rspd or by them, harms nobody. FUZZ_SECONDS says for how long heads are made at random, for
each program.
"""

from __future__ import annotations

import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import h11
import pytest

from rspd.protocols.first import HeadError
from rspd.protocols.http import read
from tests.peers import heads
from tests.peers.programs import haproxy, nginx
from tests.support import PATIENCE

VALID, DOUBTFUL = heads.valid(), heads.doubtful()
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", 7))

# A second request, which some may take for more of the first. Only the first one is answered.
FOLLOWING = b"GET /2 HTTP/1.1\r\nHost: following.example\r\n\r\n"

REFUSED, NONE = "refused", ""  # a head, and no host in it

Sees = Callable[[bytes], str]


@pytest.fixture(scope="module", params=["h11", "nginx", "haproxy"])
def sees(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sees]:
    """What a program sees in a head: a host, NONE, or REFUSED if it answers with an error or not at all."""
    if request.param == "h11":
        yield h11_sees
        return
    # Many thousand connections: over TCP there would be no ports left.
    path = str(tmp_path_factory.mktemp("heads") / "socket")
    with ExitStack() as stack:
        if request.param == "nginx":
            listen = f'listen 127.0.0.1:@PORT@; listen unix:{path}; server_name "";'
            kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            folders = " ".join(f"{kind}_temp_path @FOLDER@/{kind};" for kind in kinds)
            large = "large_client_header_buffers 8 64k; keepalive_timeout 0; access_log off; error_log /dev/null;"
            seen = '"seen=($host)($http_host)"'
            answer = f"add_header Seen {seen}; return 200 {seen};"
            stack.enter_context(nginx(f"http {{ {folders} {large} server {{ {listen} {answer} }} }}"))
        else:
            seen = "seen=(%[req.hdr(host)])()"
            answer = f'return status 200 content-type text/plain lf-string "{seen}" hdr Seen "{seen}"'
            binds = f" bind 127.0.0.1:@PORT@\n bind unix@{path}\n"
            text = f"listen test\n mode http\n option httpclose\n{binds} http-request {answer}\n"
            stack.enter_context(haproxy(f"{text}global\n tune.bufsize 65536\n"))
        yield lambda data: host_in(answer_of(path, data))


def h11_sees(data: bytes) -> str:
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 17)
    try:
        server.receive_data(data)
        event = server.next_event()
    except h11.RemoteProtocolError:
        return REFUSED
    if not isinstance(event, h11.Request):
        return REFUSED  # it waits for more
    hosts = [value for name, value in event.headers if name == b"host"]
    return plain(b",".join(hosts))


def answer_of(path: str, data: bytes) -> bytes:
    """What a server answers to data after which nothing comes."""
    parts = []
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(path)
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while part := client.recv(1 << 16):
                parts.append(part)
    return b"".join(parts)


def host_in(answer: bytes) -> str:
    """The host that a server says it sees, in each of two ways if it knows two."""
    said = re.search(rb"seen=\((.*?)\)\((.*?)\)", answer, re.DOTALL)
    if not said:
        return REFUSED
    names = {plain(name) for name in said.groups() if name}
    return " and ".join(sorted(names))


def plain(name: bytes) -> str:
    """A host as hosts are compared, by other means than rspd's."""
    text = re.sub(r"\.?(:[0-9]*)?\Z", "", name.decode("latin-1").lower())
    if text.startswith("["):
        with suppress(OSError):
            return f"[{socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text[1:-1]))}]"
    return text


def ours(data: bytes) -> str | None:
    """The host that rspd reads; NONE also if it is another protocol, or if it waits for more; None if it refuses."""
    try:
        said = read(data)
    except HeadError:
        return None
    return said.name if said else NONE


def disagreement(data: bytes, sees: Sees) -> str:
    """What is said of a head that rspd and another program read differently; nothing if they do not."""
    name = ours(data)
    if name is None:
        return ""
    seen = sees(data)
    if seen in (name, REFUSED):
        return ""
    return f"rspd says {name!r}, the other {seen!r}: {data[:300]!r}"


def test_there_are_many_heads_each_once() -> None:
    found = [data for group in DOUBTFUL.values() for data in group]
    assert len({*found, *(data for data, _ in VALID.values())}) > 2000


@pytest.mark.parametrize("title", VALID)
def test_a_valid_head_is_read_as_all_read_it(title: str) -> None:
    data, name = VALID[title]
    assert ours(data) == ours(data + FOLLOWING) == name


def test_what_rspd_reads_from_a_valid_head_is_what_the_program_sees(sees: Sees) -> None:
    wrong = {title: seen for title, (data, name) in VALID.items() if (seen := sees(data)) != name}
    assert not wrong


@pytest.mark.parametrize("technique", DOUBTFUL)
def test_a_doubtful_head_is_refused_or_read_as_the_program_reads_it(technique: str, sees: Sees) -> None:
    found = [disagreement(data, sees) for data in DOUBTFUL[technique]]
    found += [disagreement(data + FOLLOWING, sees) for data in DOUBTFUL[technique]]
    assert not [text for text in found if text]


def test_a_head_made_at_random_is_refused_or_read_as_the_program_reads_it(sees: Sees) -> None:
    chance = random.Random()
    corpus = [data for data, _ in VALID.values()] + [data for group in DOUBTFUL.values() for data in group]
    corpus = [data for data in corpus if len(data) < 1000]
    # Few of them are not refused; and only what is not refused can be read differently.
    read_by_us = [data for data in corpus if ours(data)]
    made, asked = 0, 0
    found: dict[str, str] = {}  # by their form, in which all words are the same
    end = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < end and len(found) < 40:
        data = heads.mutated(chance, chance.choice((corpus, read_by_us, read_by_us)))
        if chance.random() < 0.3:
            data += FOLLOWING
        made += 1
        if (name := ours(data)) is None:
            continue
        # Many are of no protocol, since their first line is broken. Some of them are enough.
        if name == NONE and chance.random() < 0.8:
            continue
        asked += 1
        if disagreement(data, sees):
            text = disagreement(smallest(data, sees), sees)
            found[re.sub(r"\w+", "x", text.partition(": ")[2])] = text
    print(f"{made} heads made, {asked} of them compared")
    assert not found, "\n".join(found.values())


def smallest(data: bytes, sees: Sees) -> bytes:
    """What is left of a head if each part goes without which the programs still disagree."""
    for size in (64, 16, 6, 4, 2, 1):
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + size :]
            if shorter and disagreement(shorter, sees):
                data = shorter
            else:
                at += size if size > 6 else 1
    return data
