"""Where the control socket and the metrics are, by a configuration: opened, kept, moved, and left out."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rspd.config.keys import load_config
from rspd.engine.loop import Loop
from rspd.host.systemd import PassedSocket
from rspd.listening.sockets import CONTROL_BACKLOG, Opened, Sockets, control_address
from rspd.net.address import Address
from rspd.net.listener import Listener, ListenError
from rspd.net.resolver import Resolver
from tests.manager import unix_listener
from tests.net.test_listener import keep, serves
from tests.support import free_port, run

# Opens what a file says, in place of what was open; closed at the end.
Apply = Callable[..., Opened]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that systemd has made for the service."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}/run:{tmp_path}/other")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def apply(no_descriptor_is_left_open: None) -> Iterator[Apply]:
    there: list[Listener] = []
    made: list[Sockets] = []

    def apply(text: str = "", kept: list[socket.socket] | None = None, fresh: bool = False) -> Opened:
        """fresh: as another process would."""
        listen = "" if "listen:" in text else "listen: '127.0.0.1:0', "
        config = load_config("file", {}, content=f"{{{listen}backend: '192.0.2.1:80', {text}}}".encode())

        async def main(loop: Loop) -> Opened:
            if fresh or not made:
                made.append(Sockets(loop, Resolver(loop), (), kept or ()))
            sockets = made[-1]
            sockets._resolver = Resolver(loop)
            plan = await sockets.plan(config, patient=True)
            return sockets.open(plan, () if fresh else list(there))

        opened = run(main)
        there[:] = [*opened.proxies[""], *opened.control, *opened.metrics]
        return opened

    yield apply
    for listener in there:
        listener.close()


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# The address


@pytest.mark.parametrize(
    ("wanted", "folder", "worker", "path"),
    [
        (None, "", "", None),
        (None, "", "3", None),
        (None, "/run/rspd", "", "/run/rspd/control.sock"),
        (None, "/run/rspd", "3", "/run/rspd/worker-3.sock"),
        ("off", "/run/rspd", "", None),
        ("off", "", "3", None),
        (Address(path="/srv/c"), "/run/rspd", "", "/srv/c"),
        (Address(path="/srv/c"), "", "", "/srv/c"),
        (Address(path="/srv/c"), "/run/rspd", "3", "/srv/c-worker-3.sock"),
    ],
)
def test_the_place_is_that_of_the_file_or_of_the_folder(
    wanted: Address | str | None, folder: str, worker: str, path: str | None
) -> None:
    assert control_address(wanted, folder, worker) == (path and Address(path=path))


# Opening


def test_it_is_open_with_its_mode_and_backlog(apply: Apply, folder: Path) -> None:
    umask = os.umask(0)
    try:
        (control,) = apply().control
    finally:
        os.umask(umask)
    assert control.name == f"{folder}/control.sock"
    assert control.backlog == CONTROL_BACKLOG
    assert stat.S_IMODE((folder / "control.sock").lstat().st_mode) == 0o660
    assert serves(control)


@pytest.mark.parametrize("again", [{}, {"text": "control: {path}"}])
def test_the_same_place_stays_open_however_it_is_said(apply: Apply, folder: Path, again: dict[str, str]) -> None:
    first = apply()
    inode = (folder / "control.sock").lstat().st_ino
    text = again.get("text", "").replace("{path}", f"{folder}/control.sock")
    for more in (text, text and f"{text}, control_mode: '0600'", ""):
        second = apply(more)
        assert second.control == first.control
        assert second.proxies[""] == first.proxies[""]
        assert (folder / "control.sock").lstat().st_ino == inode
    assert stat.S_IMODE((folder / "control.sock").lstat().st_mode) == 0o660
    assert serves(first.control[0])


def test_it_moves_and_goes_and_leaves_no_file(apply: Apply, folder: Path) -> None:
    apply()
    assert apply(f"control: {folder}/other.sock").control[0].name == f"{folder}/other.sock"
    assert files(folder) == ["other.sock"]
    assert apply("control: off").control == []
    assert files(folder) == []
    assert serves(apply().control[0])


def test_a_worker_has_a_place_of_its_own_and_no_metrics(
    apply: Apply, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"metrics: '127.0.0.1:{free_port()}'"
    monkeypatch.setenv("RSPD_WORKER", "7")
    opened = apply(text)
    assert ([one.name for one in opened.control], opened.metrics) == ([f"{folder}/worker-7.sock"], [])


# In use


def test_where_another_listens_at_the_usual_place_there_is_none_until_it_is_free(
    apply: Apply, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with unix_listener(f"{folder}/control.sock"):
        for _ in range(2):
            opened = apply()
            assert (opened.control, len(opened.proxies[""])) == ([], 1)
            (message,) = caplog.messages
            assert message.startswith(f"nobody can look at this process, cannot listen on {folder}/control.sock")
            caplog.clear()
    assert serves(apply().control[0])  # the file of who has gone is in nobody's way


def test_what_cannot_be_opened_at_a_place_of_the_file_changes_nothing(apply: Apply, folder: Path) -> None:
    before = apply()
    with unix_listener(f"{folder}/taken.sock"):
        with pytest.raises(ListenError, match="Address already in use"):
            apply(f"control: {folder}/taken.sock")
    with pytest.raises(ListenError, match="No such file or directory"):
        apply(f"control: {folder}/none/control.sock")
    assert serves(before.control[0])
    assert serves(before.proxies[""][0])
    assert apply().control == before.control


@pytest.mark.parametrize("where", ["a folder that is gone", "a path that is too long"])
def test_whatever_is_wrong_with_the_folder_rspd_serves_on(
    apply: Apply, folder: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{folder}/none" if "gone" in where else f"{folder}/{100 * 'x'}")
    opened = apply()
    assert (opened.control, len(opened.proxies[""])) == ([], 1)
    assert [(record.levelno, "nobody can look" in record.message) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


@pytest.mark.parametrize("text", ["", "control: {path}"])
def test_a_link_in_place_of_it_changes_nothing_of_the_file_that_it_leads_to(
    apply: Apply, folder: Path, text: str
) -> None:
    path = folder / "control.sock"
    text = text.replace("{path}", str(path))
    apply(text)
    victim = folder / "victim"
    victim.touch(0o600)
    path.unlink()
    path.symlink_to(victim)
    apply(text)
    assert stat.S_IMODE(victim.lstat().st_mode) == 0o600
    assert path.is_symlink()


@pytest.mark.parametrize("what", ["listen", "metrics"])
def test_what_the_file_wants_at_the_usual_place_wins_at_the_start_and_at_each_reload(
    apply: Apply, folder: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = f"{folder}/control.sock"
    for text in ("", *3 * [f"{what}: {path}, max_connections: 2"], ""):
        caplog.clear()
        opened = apply(text)
        assert [one.name for one in opened.control] == ([] if text else [path])
        assert path in [one.name for one in (*opened.proxies[""], *opened.control, *opened.metrics)]
        assert caplog.messages == text.count(path) * [
            f"nobody can look at this process, rspd listens on {path} for others; name another place as control"
        ]
        assert files(folder) == ["control.sock"]


def test_a_socket_of_systemd_at_the_usual_place_is_for_clients(folder: Path) -> None:
    config = load_config("file", {}, sockets=True, content=b"backend: 192.0.2.1:80")
    with unix_listener(f"{folder}/control.sock") as passed:

        async def main(loop: Loop) -> None:
            sockets = Sockets(loop, Resolver(loop), [PassedSocket("web", passed)])
            old = sockets.adopted
            for _ in range(2):
                opened = sockets.open(await sockets.plan(config, patient=True), old)
                assert (opened.control, opened.proxies) == ([], {"": sockets.adopted})
                old = opened.proxies[""]

        run(main)


# From the process before


@pytest.mark.parametrize("text", ["", "control: {path}"])
def test_the_socket_of_the_process_before_is_taken(apply: Apply, folder: Path, text: str) -> None:
    path = f"{folder}/control.sock"
    before = apply()
    inode = os.lstat(path).st_ino
    kept = [keep(one) for one in (*before.control, *before.proxies[""])]
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(path)
        for one in (*before.control, *before.proxies[""]):
            one._sock.close()  # as the end of a process does
        (control,) = apply(text.replace("{path}", path), kept, fresh=True).control
        assert os.lstat(path).st_ino == inode
        control.accept()[0].close()
        assert waiting.recv(1) == b""
    for sock in kept:
        sock.close()


@pytest.mark.parametrize("fresh", [False, True], ids=["a reload", "another process"])
def test_a_place_that_clients_take_over_is_open_to_them_and_one_of_theirs_is_only_for_those_who_look(
    apply: Apply, folder: Path, fresh: bool
) -> None:
    def modes() -> tuple[int, ...]:
        return tuple(stat.S_IMODE(os.lstat(path).st_mode) for path in (one, two))

    one, two = f"{folder}/one", f"{folder}/two"
    kept: list[Any] = []
    umask = os.umask(0o027)
    try:
        before = apply(f"control: {one}, listen: {two}, control_mode: '0606'")
        assert modes() == (0o606, 0o750)
        inodes = os.lstat(one).st_ino, os.lstat(two).st_ino
        for listener in (*before.control, *before.proxies[""]) if fresh else ():
            kept.append(keep(listener))
            listener._sock.close()
        after = apply(f"control: {two}, listen: {one}, control_mode: '0606'", kept, fresh)
        assert modes() == (0o750, 0o606)
        assert (os.lstat(one).st_ino, os.lstat(two).st_ino) == inodes
        assert serves(after.control[0])
        assert serves(after.proxies[""][0])
        os.chmod(one, 0o722)
        apply(f"control: {two}, listen: {one}, control_mode: '0606'")
        assert modes() == (0o722, 0o606)  # what its owner has said of a place for clients stays
    finally:
        os.umask(umask)


def test_what_is_kept_of_the_process_before_and_not_wanted_is_closed(apply: Apply, folder: Path) -> None:
    before = apply()
    kept = [keep(one) for one in before.control]
    for one in (*before.control, *before.proxies[""]):
        one._sock.close()
    assert apply("control: off", kept, fresh=True).control == []
    assert files(folder) == []
    for sock in kept:
        sock.close()
