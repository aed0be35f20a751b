"""Listeners of our own over reloads: which stay, which come, which leave, and what becomes of clients meanwhile."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rspd.config.addresses import parse_address
from rspd.listening.replacing import Binding, replace_listeners
from rspd.net.address import Address, resolve
from rspd.net.listener import Listener, ListenError, by_place, open_listeners
from tests.net import test_listener
from tests.net.test_listener import Open, accept, backlog_of, connect, held, keep, let_go, port_of, serves
from tests.support import PATIENCE, abstract_name, free_port, loopback, open_descriptors

# A fixture.
open_all = test_listener.open_all

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


def wanted(*texts: str, backlog: int = 8, reuse_port: bool = False) -> dict[Address, Binding]:
    addresses = map(parse_address, texts)
    return {address: Binding(resolve(address), backlog, reuse_port) for address in addresses}


@pytest.fixture
def replace(no_descriptor_is_left_open: None) -> Iterator[Callable[..., list[Listener]]]:
    """replace_listeners of the last call's outcome; what is open at the end is closed."""
    now: list[Listener] = []

    def by(*texts: str, backlog: int = 8) -> list[Listener]:
        now[:] = replace_listeners(now, wanted(*texts, backlog=backlog))
        return list(now)

    yield by
    for listener in now:
        listener.close()


def test_replacing_keeps_what_stays_opens_what_comes_and_closes_what_leaves(
    replace: Callable[..., list[Listener]], tmp_path: Path
) -> None:
    stays, leaves, comes = f"{tmp_path}/stays", f"{tmp_path}/leaves", f"{tmp_path}/comes"
    old = {listener.name: listener for listener in replace(stays, leaves)}
    with connect(old[stays]) as waiting:
        new = {listener.name: listener for listener in replace(stays, comes)}
        assert set(new) == {stays, comes}
        assert new[stays] is old[stays]
        sock, _ = new[stays].accept()
        sock.close()
        assert waiting.recv(1) == b""
    assert serves(new[comes])
    assert sorted(os.listdir(tmp_path)) == ["comes", "stays"]


def test_a_unix_socket_without_its_file_gets_one_anew_and_serves_who_waits(
    replace: Callable[..., list[Listener]], tmp_path: Path
) -> None:
    path = f"{tmp_path}/sock"
    [old] = replace(path)
    with connect(old) as waiting:
        os.unlink(path)
        still, new = replace(path)
        assert (still, serves(new)) == (old, True)
        assert set(replace(path)) == {new, old}  # a client waits there
        accept(old)[0].close()
        assert waiting.recv(1) == b""
    assert replace(path) == [new]
    assert serves(new)


def test_a_unix_socket_without_its_file_stays_as_it_is_if_there_cannot_be_another(
    replace: Callable[..., list[Listener]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sock"
    old = replace(str(path), "127.0.0.1:0")
    path.unlink()
    path.write_text("precious")
    assert set(replace(str(path), "127.0.0.1:0")) == set(old)
    assert caplog.messages == [
        f"the file of a listening socket is gone, cannot listen on {path}: a file that is not a socket stands there"
    ]
    assert replace("127.0.0.1:0") == [one for one in old if not one.address.path]
    assert path.read_text() == "precious"


def test_replacing_gives_what_stays_the_new_backlog(replace: Callable[..., list[Listener]]) -> None:
    [before] = replace("127.0.0.1:0", backlog=5)
    [after] = replace("127.0.0.1:0", backlog=9)
    assert after is before
    assert backlog_of(after) == 9


def test_each_address_has_a_backlog_and_a_way_to_be_shared_of_its_own(
    open_all: Open, no_descriptor_is_left_open: None
) -> None:
    one, two = (f"127.0.0.1:{free_port()}" for _ in range(2))
    bindings = {**wanted(one, backlog=5, reuse_port=True), **wanted(two, backlog=7)}
    first, second = replace_listeners([], bindings)
    try:
        assert (str(first.address), backlog_of(first), backlog_of(second)) == (one, 5, 7)
        open_all(one, reuse_port=True)
        with pytest.raises(ListenError, match="Address already in use"):
            open_all(two, reuse_port=True)
        bindings = {**wanted(one, backlog=6), **wanted(two, backlog=8)}
        assert replace_listeners([first, second], bindings) == [first, second]
        assert (backlog_of(first), backlog_of(second)) == (6, 8)
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize(
    ("before", "after"), [("{}", "127.0.0.1:{}"), ("127.0.0.1:{}", "{}"), ("127.0.0.1:{}", "localhost:{}")]
)
def test_an_address_takes_over_from_one_of_our_own_that_stood_in_its_way(
    before: str, after: str, replace: Callable[..., list[Listener]]
) -> None:
    port = free_port()
    old = replace(before.format(port))
    new = replace(after.format(port))
    assert not set(old) & set(new)
    assert all(serves(listener) for listener in new)


def test_a_replacement_that_fails_leaves_the_old_listeners_as_they_were(
    replace: Callable[..., list[Listener]],
) -> None:
    one, two = free_port(), free_port()
    old = replace(f"127.0.0.1:{one}", f"127.0.0.1:{two}")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        before = open_descriptors()
        for texts in [
            (f"127.0.0.1:{taken}",),
            (f"127.0.0.1:{one}", f"127.0.0.1:{taken}"),
            ("[::1]:0", f"localhost:{one}", f"127.0.0.1:{taken}"),
            (f"127.0.0.1:{one}", f"127.0.0.1:{two}", f"127.0.0.1:{taken}"),
        ]:
            with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{taken}: Address already in use"):
                replace(*texts)
            assert open_descriptors() == before
            assert all(serves(listener) for listener in old)
            assert [backlog_of(listener) for listener in old] == [8, 8]


def test_a_replacement_that_fails_for_another_reason_resets_nobody(
    replace: Callable[..., list[Listener]], tmp_path: Path
) -> None:
    [old] = replace("127.0.0.1:0")
    with connect(old) as waiting:
        with pytest.raises(ListenError, match="the folder does not exist"):
            replace(f"{tmp_path}/missing/sock")
        sock, _ = accept(old)
        sock.send(b"x")
        assert waiting.recv(1) == b"x"
        sock.close()


def test_replacing_everything_by_nothing_closes_everything(replace: Callable[..., list[Listener]]) -> None:
    [old] = replace("127.0.0.1:0")
    assert replace() == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(old.name.rpartition(":")[2])), timeout=PATIENCE)


def test_a_port_can_be_shared_later_and_from_then_on(open_all: Open) -> None:
    [first] = open_all("127.0.0.1:0")
    address = Address("127.0.0.1", port_of(first))
    with pytest.raises(ListenError, match="needs reuse_port"):
        open_listeners(address, resolve(address), 8, reuse_port=True)
    for reuse_port in True, True, False:
        assert replace_listeners([first], wanted("127.0.0.1:0", reuse_port=reuse_port)) == [first]
        [second] = open_all(str(address), reuse_port=True)
        second.close()


# Sockets that the process before has kept


Kept = Callable[..., list[Listener]]


@pytest.fixture
def before(no_descriptor_is_left_open: None) -> Iterator[Kept]:
    """Listeners of the process before. At the end, its copies are closed."""
    opened: list[Listener] = []

    def listen(*texts: str, backlog: int = 8, reuse_port: bool = False) -> list[Listener]:
        listeners = replace_listeners([], wanted(*texts, backlog=backlog, reuse_port=reuse_port))
        opened.extend(listeners)
        return listeners

    yield listen
    for listener in opened:
        let_go(listener)


@pytest.fixture
def start(no_descriptor_is_left_open: None) -> Iterator[Callable[..., list[Listener]]]:
    """The start of a process that finds these sockets in the store. What it listens on is closed at the end."""
    now: list[Listener] = []

    def by(found: list[Listener], *texts: str, backlog: int = 8, reuse_port: bool = False) -> list[Listener]:
        kept = by_place([keep(listener) for listener in found])
        try:
            now[:] = replace_listeners([], wanted(*texts, backlog=backlog, reuse_port=reuse_port), kept)
        except ListenError:
            for sock in held(kept):
                sock.close()
            raise
        return list(now)

    yield by
    for listener in now:
        listener.close()


def is_same(one: Listener, other: Listener) -> bool:
    """Whether both are one socket."""
    return os.fstat(one.fd).st_ino == os.fstat(other.fd).st_ino


def test_a_start_takes_what_was_kept_and_wanted_and_gives_up_the_rest(
    before: Kept, start: Callable[..., list[Listener]], tmp_path: Path
) -> None:
    texts = [f"127.0.0.1:{free_port()}", f"@{abstract_name()}", f"{tmp_path}/stays"]
    gone = [f"127.0.0.1:{free_port()}", f"@{abstract_name()}", f"{tmp_path}/gone"]
    comes = f"127.0.0.1:{free_port()}"
    old = before(*texts, *gone)
    new = start(old, *texts, comes, backlog=13)
    assert [str(listener.address) for listener in new] == [*texts, comes]
    assert all(is_same(listener, other) for listener, other in zip(new[:3], old[:3], strict=True))
    assert all(serves(listener) for listener in new)
    assert [backlog_of(listener) for listener in (new[0], new[3])] == [13, 13]
    assert os.listdir(tmp_path) == ["stays"]
    for listener in old[3:]:
        # Although systemd has a copy still.
        with pytest.raises(OSError, match=r"refused|No such file"):
            connect(listener)


def test_a_client_in_the_backlog_of_a_kept_socket_is_served_and_in_that_of_one_given_up_reset(
    before: Kept, start: Callable[..., list[Listener]]
) -> None:
    stays, goes = before(f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    with connect(stays) as served, connect(goes) as reset:
        [now] = start([stays, goes], str(stays.address))
        sock, peer = accept(now)
        assert peer == served.getsockname()
        sock.close()
        with pytest.raises(ConnectionResetError):
            reset.recv(1)


def test_of_a_port_in_both_families_what_was_kept_stays_and_the_other_comes(
    before: Kept, start: Callable[..., list[Listener]]
) -> None:
    loopback(socket.AF_INET6)
    port = free_port()
    [v4] = before(f"0.0.0.0:{port}")
    new = {listener.name: listener for listener in start([v4], str(port))}
    assert set(new) == {f"0.0.0.0:{port}", f"[::]:{port}"}
    assert is_same(new[f"0.0.0.0:{port}"], v4)
    assert all(serves(listener) for listener in new.values())


@pytest.mark.parametrize(
    ("kept", "listen"), [("{}", "127.0.0.1:{}"), ("127.0.0.1:{}", "{}"), ("0.0.0.0:{}", "127.0.0.1:{}")]
)
def test_an_address_takes_over_from_a_kept_one_that_stood_in_its_way(
    before: Kept, start: Callable[..., list[Listener]], kept: str, listen: str
) -> None:
    port = free_port()
    old = before(kept.format(port))
    new = start(old, listen.format(port))
    assert {str(listener.address) for listener in new} == {listen.format(port)}
    assert all(serves(listener) for listener in new)


@pytest.mark.parametrize("listen", ["{other}", "127.0.0.1:{port} {other}", "{bound} {other}"])
def test_a_start_that_fails_leaves_kept_sockets_listening_for_another_attempt(
    before: Kept, start: Callable[..., list[Listener]], listen: str, tmp_path: Path
) -> None:
    port = free_port()
    bound = f"0.0.0.0:{port}"
    old = before(bound, f"{tmp_path}/sock")
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"
        texts = listen.format(port=port, other=where, bound=bound).split()
        with pytest.raises(ListenError, match=f"cannot listen on {where}: Address already in use"):
            start(old, *texts)
        assert all(serves(listener) for listener in old)
    new = start(old, bound, f"{tmp_path}/sock")
    assert all(is_same(listener, other) for listener, other in zip(new, old, strict=True))


def test_a_kept_socket_is_shared_if_the_next_process_wants_that(
    before: Kept, start: Callable[..., list[Listener]], open_all: Open
) -> None:
    old = before(f"127.0.0.1:{free_port()}")
    [new] = start(old, str(old[0].address), reuse_port=True)
    for listener in old:
        let_go(listener)
    [second] = open_all(str(new.address), reuse_port=True)
    assert port_of(second) == port_of(new)


def test_port_0_is_another_port_each_time(before: Kept, start: Callable[..., list[Listener]]) -> None:
    """A kept socket has a port of its own, and nobody has asked for it."""
    [old] = before("127.0.0.1:0")
    [new] = start([old], "127.0.0.1:0")
    assert not is_same(new, old)
    with pytest.raises(ConnectionRefusedError):
        connect(old)


def test_a_kept_socket_is_taken_once_and_another_address_that_means_its_place_finds_it_taken(
    before: Kept, start: Callable[..., list[Listener]]
) -> None:
    port = free_port()
    old = before(f"127.0.0.1:{port}")
    count = open_descriptors()
    for texts in [(f"127.0.0.1:{port}", f"localhost:{port}"), (f"localhost:{port}", f"127.0.0.1:{port}")]:
        with pytest.raises(ListenError, match=f"cannot listen on {texts[1]}.*: Address already in use"):
            start(old, *texts)
        assert serves(old[0])
        assert open_descriptors() == count
    [new] = start(old, str(old[0].address))
    assert is_same(new, old[0])


def test_two_addresses_that_share_a_place_take_a_kept_socket_each(
    before: Kept, start: Callable[..., list[Listener]]
) -> None:
    texts = [f"localhost:{(port := free_port())}", f"127.0.0.1:{port}"]
    old = before(*texts, reuse_port=True)
    new = start(old, *texts, reuse_port=True)
    assert {os.fstat(listener.fd).st_ino for listener in new} == {os.fstat(listener.fd).st_ino for listener in old}
    assert len({listener.fd for listener in new}) == len(old)


def test_of_kept_sockets_that_share_a_place_those_that_nobody_takes_get_no_client_any_more(
    before: Kept, start: Callable[..., list[Listener]]
) -> None:
    texts = [f"localhost:{(port := free_port())}", f"127.0.0.1:{port}"]
    old = before(*texts, reuse_port=True)
    [new] = start(old, texts[1], reuse_port=True)
    assert new.address == old[-1].address
    assert all(serves(new) for _ in range(16))
