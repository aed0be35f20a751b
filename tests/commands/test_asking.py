from __future__ import annotations

import grp
import os
import pwd
import socket
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

import pytest

from rspd.admin.client import PATIENCE, TRIES
from rspd.admin.query import Query
from rspd.commands import asking
from rspd.commands.asking import Watch, instances, look, look_at_connections, look_at_each, parser_of, socket_of, where
from rspd.errors import StartError
from rspd.snapshot import Connection, Process, Proxy, Snapshot
from tests.commands.support import answering
from tests.support import OUR_USER, eventually

OTHERS = "name another one with --instance NAME or --socket PATH"


SHELL = "an rspd that was started in a shell has a control socket only if its file has the key control"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "rspd" / "control.sock")


def options(*words: str) -> Namespace:
    parsed: Namespace = parser_of("status", "").parse_args(words)
    return parsed


def refused(path: str, patience: float = PATIENCE) -> tuple[int, str]:
    """The exit code, and why nobody can be asked there."""
    with pytest.raises(StartError) as caught:
        look(path, patience)
    return caught.value.exit_code, str(caught.value)


def chosen(run: Path, *words: str) -> str:
    return os.path.relpath(socket_of(options(*words), str(run)), run)


def not_chosen(run: Path, *words: str) -> tuple[int, str]:
    with pytest.raises(StartError) as caught:
        socket_of(options(*words), str(run))
    return caught.value.exit_code, str(caught.value)


def touch(run: Path, *folders: str) -> None:
    for folder in folders:
        (run / folder).mkdir()
        (run / folder / "control.sock").touch()


def test_the_socket_is_that_of_the_service_if_nothing_else_is_said(tmp_path: Path) -> None:
    assert chosen(tmp_path) == "rspd/control.sock"
    touch(tmp_path, "rspd", "rspd-web", "rspd-mail")
    assert chosen(tmp_path) == "rspd/control.sock"
    assert socket_of(options()) in ("/run/rspd/control.sock", *(f"/run/rspd-{one}/control.sock" for one in instances()))


def test_a_lone_instance_needs_no_name(tmp_path: Path) -> None:
    touch(tmp_path, "rspd-web")
    (tmp_path / "rspd").mkdir()
    assert chosen(tmp_path) == "rspd-web/control.sock"


def test_of_several_instances_one_has_to_be_named(tmp_path: Path) -> None:
    touch(tmp_path, "rspd-web", "rspd-mail")
    code, said = not_chosen(tmp_path)
    assert code == 64
    assert said == (
        f"{tmp_path}/rspd/control.sock: no such socket; several instances of rspd are running, name one:\n"
        "  --instance mail\n  --instance web"
    )


@pytest.mark.parametrize("said", ["web", "rspd@web", "rspd@web.service"])
def test_an_instance_is_named_as_in_its_unit(tmp_path: Path, said: str) -> None:
    touch(tmp_path, "rspd", "rspd-web")
    assert chosen(tmp_path, "--instance", said) == "rspd-web/control.sock"


def test_an_instance_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    touch(tmp_path, "rspd-web")
    said = f"{tmp_path}/rspd-wep/control.sock: no such socket; instances with one are: web"
    assert not_chosen(tmp_path, "--instance", "wep") == (69, said)


def test_an_instance_is_no_path(tmp_path: Path) -> None:
    said = "--instance: expected the NAME of a service rspd@NAME, found '../web'"
    assert not_chosen(tmp_path, "--instance", "../web") == (64, said)


def test_a_path_is_taken_as_it_is_but_not_together_with_an_instance(tmp_path: Path) -> None:
    assert socket_of(options("--socket", "a.sock")) == "a.sock"
    said = "expected either --socket PATH or --instance NAME, found both"
    assert not_chosen(tmp_path, "--socket", "/a", "--instance", "web") == (64, said)


def test_the_options_that_name_a_service_are_repeated_in_advice() -> None:
    found = [where(options(*words)) for words in ([], ["--instance", "web"], ["--socket", "/a b"])]
    assert found == ["", " --instance web", " --socket '/a b'"]


def test_mistakes_in_options_are_told_kindly(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in [
        (["--scoket", "/a"], "unknown option '--scoket'; did you mean --socket? See rspd status --help"),
        (["-json"], "unknown option '-json'; did you mean --json? See rspd status --help"),
        (["web"], "expected options only, found 'web'; see rspd status --help"),
    ]:
        with pytest.raises(StartError) as caught:
            options(*words)
        assert (caught.value.exit_code, str(caught.value)) == (64, said)
        assert capsys.readouterr().err.startswith("usage: rspd status ")


def test_a_lone_process_is_asked_once(path: str) -> None:
    snapshot = Snapshot(Process("0.3.0", 7), (Proxy("web", open=3),))
    with answering(path, snapshot) as server:
        assert look(path) == snapshot
        assert server.asked == ["/v1/status"]


def test_the_processes_of_a_service_are_summed(path: str) -> None:
    worker = f"{os.path.dirname(path)}/worker-1.sock"
    with (
        answering(path, Snapshot(Process(pid=1), (Proxy(open=3),)), [Connection("a", age=1.0)]),
        answering(worker, Snapshot(Process(pid=2), (Proxy(open=4),)), [Connection("b", age=3.0, proxy="x")]),
    ):
        found = look(path)
        assert (found.process.pid, found.process.processes, found.proxies[0].open) == (1, 2, 7)
        assert [one.process.pid for one in look_at_each(path)[0]] == [1, 2]
        connections = look_at_connections(path, Query(sort="age"))
        assert [one.id for one in connections.connections] == ["b", "a"]
        assert [one.id for one in look_at_connections(path, Query(proxy="x", limit=1)).connections] == ["b"]
        assert look(worker).process == Process(pid=2)


def test_a_process_that_does_not_answer_is_named_if_another_does(path: str) -> None:
    worker = f"{os.path.dirname(path)}/worker-2.sock"
    with answering(path, Snapshot(Process(pid=1))), answering(worker, instead=b"nonsense"):
        assert look(path).process == Process(pid=1, unanswered=(worker,))
        assert look_at_connections(path, Query()).process.unanswered == (worker,)


def test_a_socket_that_a_process_left_is_no_process(path: str) -> None:
    folder = os.path.dirname(path)
    with answering(f"{folder}/worker-2.sock", Snapshot(Process(pid=2, worker="2"))), left(f"{folder}/worker-1.sock"):
        assert look(path).process == Process(pid=2, worker="2")
        with left(path):
            assert look(path).process == Process(pid=2, worker="2")


@contextmanager
def left(path: str) -> Iterator[None]:
    """A socket at which nobody listens."""
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
        yield
    os.unlink(path)


@contextmanager
def frozen(path: str) -> Iterator[socket.socket]:
    """A process that does not answer."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        yield listener
    os.unlink(path)


def test_a_frozen_process_is_not_waited_for_at_each_look_and_is_there_again_when_it_answers(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "AGAIN", 0.1)
    worker = f"{os.path.dirname(path)}/worker-1.sock"
    watch = Watch(path, grace=0.3)
    with answering(path, Snapshot(Process(pid=1)), [Connection("a")]):
        with frozen(worker):
            begin = time.monotonic()
            snapshot, connections = watch.look(Query())
            assert 0.3 <= time.monotonic() - begin < PATIENCE
            for _ in range(20):
                assert watch.look(Query())[0] == snapshot
            assert time.monotonic() - begin < PATIENCE
        assert snapshot.process == Process(pid=1, unanswered=(worker,))
        assert connections.process.unanswered == (worker,)
        assert [one.id for one in connections.connections] == ["a"]
        with answering(worker, Snapshot(Process(pid=2)), [Connection("b")]):
            eventually(lambda: watch.look(Query())[0].process == Process(pid=1, processes=2))
            eventually(lambda: watch.look(Query())[1].matching == 2)


def test_a_service_all_of_whose_processes_are_frozen_is_waited_for(path: str) -> None:
    folder = os.path.dirname(path)
    os.mkdir(folder)
    with frozen(path), frozen(f"{folder}/worker-1.sock"):
        assert refused(path, 0.05)[0] == 75


def test_where_no_socket_is_the_error_says_what_to_do() -> None:
    path = "/nowhere/control.sock"
    what = f"{path}: no such socket: no rspd can be asked there"
    assert refused(path) == (69, f"{what}\ndoes it run? See systemctl status rspd; {OTHERS}\n{SHELL}")


def test_where_nobody_listens_the_error_names_the_unit_of_an_instance(tmp_path: Path) -> None:
    path = tmp_path / "rspd-web" / "control.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
        code, said = refused(str(path))
    assert code == 69
    assert said.startswith(f"{path}: nobody listens there: no rspd can be asked there\n")
    assert "See systemctl status rspd@web;" in said


def test_a_path_that_is_too_long_is_an_error_as_the_others_are() -> None:
    code, said = refused("/" + 200 * "a")
    assert code == 69
    assert "AF_UNIX path too long: no rspd can be asked there" in said


@contextmanager
def nobody() -> Iterator[None]:
    """Whoever runs the tests is a user without rights meanwhile. Python's own files may be closed to that user."""
    assert grp
    assert pwd
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to open a socket that its own user may not use")
@pytest.mark.parametrize(
    ("group", "who"),
    [
        (0, "root and the user rspd may look: use sudo"),
        (1, "root and the group daemon may look: use sudo; to join: sudo usermod -aG daemon nobody, and log in again"),
    ],
)
def test_who_may_not_look_is_told_who_may(group: int, who: str) -> None:
    with tempfile.TemporaryDirectory() as folder, answering(f"{folder}/control.sock") as server:
        os.chmod(folder, 0o755)
        os.chmod(f"{folder}/control.sock", 0o600)
        os.chown(f"{folder}/control.sock", 0, group)
        with nobody():
            code, said = refused(f"{folder}/control.sock")
        assert not server.asked
    assert code == 77
    assert said == (
        f'{folder}/control.sock: permission denied\n{who}\ncontrol_mode: "0666" in the file of rspd lets everybody look'
    )


def test_who_may_not_see_the_socket_is_told_of_the_usual_group(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    with answering(folder / "control.sock"):
        folder.chmod(0)
        try:
            with nobody():
                code, said = refused(f"{folder}/control.sock")
        finally:
            folder.chmod(0o700)
    assert code == 77
    assert "root and the group rspd may look" in said


def test_a_process_that_is_stopped_is_not_waited_for(path: str) -> None:
    os.mkdir(os.path.dirname(path))
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen(0)
        advice = "it may be very busy, or stopped; try again, or see systemctl status rspd"
        assert refused(path, 0.05) == (75, f"{path}: no answer within 0.05 s\n{advice}")
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            for other in (first, second):
                other.setblocking(False)
                other.connect_ex(path)
            assert refused(path, 0.05)[0] == 75


@pytest.mark.parametrize(
    ("instead", "found"),
    [
        (b"220 mail.example.org ESMTP\r\n", "expected an answer in HTTP"),
        (b"", "expected an answer in HTTP, found Remote end closed connection without response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3", "expected an answer in HTTP"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}",
            "expected an answer in HTTP, found IncompleteRead(2 bytes read, 1 more expected)",
        ),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
        (b"HTTP/1.1 200 OK\r\n\r\n\xff", "expected JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + 100_000 * b"[", "expected JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\n[", "expected JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\n[]", "expected an object for Snapshot, found []"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"process": {"pid": "x"}}', "expected int, found 'x'"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"process": {"age": 1%s}}' % (400 * b"0"), "expected a number below 9e+18, found 10"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"process": {"age": NaN}}', "expected JSON, found NaN"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"process": {"age": 1e999}}', "expected a number below 9e+18, found inf"),
        (b"HTTP/1.1 503 Busy\r\n\r\nsixteen others look\n", "sixteen others look"),
    ],
)
def test_what_is_no_answer_of_rspd_is_shown(path: str, instead: bytes, found: str) -> None:
    with answering(path, instead=instead):
        code, said = refused(path)
    assert code == 76
    assert said.startswith(f"{path}: {found}")
    assert said.endswith("Another one is named with --instance NAME or --socket PATH")


def test_what_a_terminal_would_obey_is_escaped_in_what_is_no_answer_and_it_is_cut(path: str) -> None:
    evil = b"\x1b]0;owned\x07"
    for instead, found in [
        (b"HTTP/1.1 500 x\r\n\r\n" + evil, ": \\x1b]0;owned\\x07\n"),
        (evil + b"\r\n", ": expected an answer in HTTP, found \\x1b]0;owned\\x07\n"),
        (1000 * b"\x1b" + b"\r\n", "\\x1b\\x1b\\…\n"),
    ]:
        with answering(path, instead=instead):
            _, said = refused(path)
        os.unlink(path)
        assert found in said
        assert all(len(line) < 450 and line.isprintable() for line in said.splitlines())


def test_a_bug_in_rspd_is_told_with_where_its_log_is(path: str) -> None:
    with answering(path, instead=b"HTTP/1.1 500 x\r\n\r\na bug in rspd; its log says more\n"):
        code, said = refused(path)
    assert code == 76
    advice = "please report what the log says: journalctl -u rspd"
    assert said == f"{path}: a bug in rspd; its log says more\n{advice}"


def test_json_that_breaks_off_may_be_asked_for_again(path: str) -> None:
    begin = b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"process":{"pid":'
    with answering(path, instead=begin):
        code, said = refused(path)
    assert (code, "broke off" in said) == (75, True)


def test_an_answer_that_breaks_off_may_be_asked_for_again(path: str) -> None:
    os.mkdir(os.path.dirname(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def reset() -> None:
            for _ in range(TRIES):
                listener.accept()[0].close()  # with the request unread

        thread = Thread(target=reset)
        thread.start()
        code, said = refused(path)
        thread.join()
    assert code in (75, 76)  # the request may come before the end, or after it
    assert "broke off" in said or "expected an answer in HTTP" in said


NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder where everybody may make files, as /tmp."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@NEEDS_ROOT
@pytest.mark.parametrize("how", ["answers", "is silent", "is a link"])
def test_a_socket_of_another_user_beside_those_of_the_service_is_not_asked(
    shared: Path, tmp_path: Path, how: str
) -> None:
    path, worker, stranger = f"{shared}/c.sock", f"{shared}/c-worker-2.sock", f"{shared}/c-worker-1.sock"
    lie, elsewhere = Snapshot(Process(pid=3), (Proxy("PAY ME"),)), f"{tmp_path}/c.sock"
    with ExitStack() as stack:
        stack.enter_context(answering(path, Snapshot(Process(pid=1))))
        os.chown(path, OUR_USER, -1)  # the user of the service
        stack.enter_context(answering(worker, Snapshot(Process(pid=2))))
        os.chown(worker, OUR_USER, -1)
        if how == "is silent":
            stack.enter_context(frozen(stranger))
        else:
            server = stack.enter_context(answering(elsewhere if how == "is a link" else stranger, lie))
        if how == "is a link":
            os.symlink(elsewhere, stranger)
        os.chown(stranger, OUR_USER + 1, -1, follow_symlinks=False)

        found = look(path)
        assert (found.process.processes, found.proxies) == (2, ())
        assert (found.process.unanswered, found.process.strangers) == ((), (stranger,))
        assert Watch(path).look(Query())[0] == found
        assert look_at_connections(path, Query()).process.strangers == (stranger,)
        if how != "is silent":
            assert not server.asked
            assert look(stranger) == lie  # who names it believes it


@NEEDS_ROOT
def test_the_owner_of_the_folder_is_believed_where_the_first_socket_is_gone(tmp_path: Path) -> None:
    with answering(tmp_path / "worker-1.sock", Snapshot(Process(pid=2))):
        for path in (tmp_path, tmp_path / "worker-1.sock"):
            os.chown(path, OUR_USER, -1)
        assert look(f"{tmp_path}/control.sock").process == Process(pid=2)


def test_an_absurd_number_of_one_process_does_not_keep_the_others_waiting(path: str) -> None:
    """As `status` with workers, and `top`, which asks one process for two things at once."""
    absurd = b'HTTP/1.1 200 OK\r\n\r\n{"process": {"age": 1%s}}' % (400 * b"0")
    worker = f"{os.path.dirname(path)}/worker-1.sock"
    with answering(path, Snapshot(Process(pid=1))), answering(worker, instead=absurd):
        assert look(path).process == Process(pid=1, unanswered=(worker,))
    os.unlink(worker)
    with answering(worker, instead=absurd), pytest.raises(StartError, match="expected a number below 9e"):
        Watch(worker).look(Query())


def test_a_bug_in_a_thread_that_asks_ends_the_command(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(asking, "_ask_one", broken)
    with pytest.raises(ZeroDivisionError):
        Watch(path).look(Query())


def test_what_a_later_version_says_beyond_it_does_no_harm(path: str) -> None:
    answer = b'HTTP/1.1 200 OK\r\n\r\n{"process": {"pid": 7, "mood": "fine"}, "weather": []}'
    with answering(path, instead=answer):
        assert look(path) == Snapshot(Process(pid=7))
