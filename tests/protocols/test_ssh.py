"""rspd/protocols/ssh.py: the first line of SSH is recognised."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rspd.protocols.first import UNKNOWN, Said
from rspd.protocols.ssh import read

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

LINES = [
    b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n",
    b"SSH-2.0-libssh2_1.10.0\r\n",
    b"SSH-2.0-PuTTY_Release_0.78\r\n",
    b"SSH-2.0-Go\r\n",
    b"SSH-1.99-OpenSSH_3.4\n",
    b"SSH-1.5-1.2.27\n",
    b"SSH-1.3-old\n",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_client_is_ssh_from_its_version_on(line: bytes) -> None:
    known = line.index(b"-", 4) + 1
    for size in range(1, known):
        assert read(line[:size]) is None
    for size in range(known, len(line) + 1):
        assert read(line[:size]) == Said("ssh")
    assert read(line + b"\0\0\1\x14\x08\x14") == Said("ssh")


@pytest.mark.parametrize(
    "data",
    [
        b"ssh-2.0-x\r\n",
        b"SSH",
        b"SSH-",
        b"SSH-2",
        b"SSH-2.1-x\r\n",
        b"SSH-2.00-x\r\n",
        b"SSH-3.0-x\r\n",
        b"SSH-1.-x\r\n",
        b"SSH-1.x-y\r\n",
        b"SSH 2.0\r\n",
        b"S\0",
        b"SMB",
        b" SSH-2.0-x\r\n",
        b"\r\nSSH-2.0-x\r\n",  # RFC 4253, 4.2: only a server may send other lines before
        b"GET / HTTP/1.1\r\n",
        b"\x16\3\1",
        b"\0",
    ],
)
def test_another_line_is_unknown_and_a_part_of_a_line_asks_for_more(data: bytes) -> None:
    assert read(data) == (None if b"SSH-2.0-".startswith(data) else UNKNOWN)


def test_a_line_that_becomes_another_is_unknown_at_once() -> None:
    for place in range(8):
        changed = LINES[0][:place] + b"\xff"
        assert read(changed) == UNKNOWN
        assert read(changed + LINES[0]) == UNKNOWN


@given(
    st.binary(min_size=1, max_size=20) | st.text("SH-12.095\r\n", min_size=1, max_size=15).map(str.encode),
    st.binary(max_size=10) | st.text("0-", max_size=3).map(str.encode),
)
@example(b"SSH-1.9999", b"-x")
def test_what_is_said_of_the_first_bytes_stays_when_more_come(data: bytes, after: bytes) -> None:
    for start in (data, b"SSH-1." + data):
        found = read(start)
        assert found in (None, UNKNOWN, Said("ssh"))
        if found is not None:
            assert read(start + after) == found


@given(st.binary(min_size=12))
def test_a_dozen_bytes_are_enough(data: bytes) -> None:
    for start in (data, b"SSH-1." + data, b"SSH-2." + data):
        assert read(start) is not None
