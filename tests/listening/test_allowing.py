"""Who may connect to a unix socket: from the moment that its file is there."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from rspd.config.addresses import parse_address
from rspd.listening.allowing import allow
from rspd.net.address import resolve
from rspd.net.listener import open_listeners
from tests.net.test_listener import serves

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@pytest.fixture
def no_umask() -> Iterator[None]:
    """A new file has the mode that its program asks for, as in a daemon that sets no umask."""
    umask = os.umask(0)
    yield
    os.umask(umask)


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.mark.parametrize(("private", "mode"), [(True, 0o600), (False, 0o777)])
def test_a_new_socket_is_for_others_only_once_it_is_said_who_may(
    private: bool, mode: int, no_umask: None, tmp_path: Path
) -> None:
    path = f"{tmp_path}/sock"
    [listener] = open_listeners(parse_address(path), resolve(parse_address(path)), 8, private=private)
    assert mode_of(path) == mode
    allow(listener, 0o606, "")
    assert mode_of(path) == 0o606
    assert serves(listener)
    listener.close()


@pytest.mark.parametrize("replacement", ["a link", "a file", "another socket"])
def test_who_may_connect_is_said_of_the_own_file_only(replacement: str, no_umask: None, tmp_path: Path) -> None:
    path, victim = f"{tmp_path}/sock", tmp_path / "victim"
    [listener] = open_listeners(parse_address(path), resolve(parse_address(path)), 8)
    os.rename(path, f"{tmp_path}/aside")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(victim))
        if replacement != "another socket":
            victim.unlink()
            victim.write_text("precious")
        victim.chmod(0o640)
        if replacement == "a link":
            os.symlink(victim, path)
        else:
            os.rename(victim, path)
        allow(listener, 0o666, "")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    assert mode_of(f"{tmp_path}/aside") == 0o777
    listener.close()
