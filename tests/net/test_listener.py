"""Listening sockets: bound, accepted from, taken over, closed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rspd.config.addresses import parse_address
from rspd.net.address import Address, SocketAddress, resolve
from rspd.net.listener import Kept, Listener, ListenError, by_place, close_all, kept_listener, open_listeners
from tests.engine.test_pipes import no_descriptors, unprivileged
from tests.support import (
    PATIENCE,
    abstract_name,
    eventually,
    free_port,
    loopback,
    open_descriptors,
    skip_for_kernel,
)

LOOPBACK = SocketAddress(socket.AF_INET, ("127.0.0.1", 0))
LOOPBACK_6 = SocketAddress(socket.AF_INET6, ("::1", 0))
# Addresses for documentation (RFC 5737, RFC 3849): no interface has them, and nothing is ever sent there.
ELSEWHERE = SocketAddress(socket.AF_INET, ("192.0.2.1", 0))
ELSEWHERE_6 = SocketAddress(socket.AF_INET6, ("2001:db8::1", 0))
NO_FAMILY = SocketAddress(socket.AF_APPLETALK, None)

Open = Callable[..., list[Listener]]


pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@pytest.fixture
def open_all(no_descriptor_is_left_open: None) -> Iterator[Open]:
    """open_listeners with a backlog of 8, for an address in text or for given socket addresses; closed at the end."""
    opened: list[Listener] = []

    def listen(text: str, *where: SocketAddress, backlog: int = 8, reuse_port: bool = False) -> list[Listener]:
        address = parse_address(text)
        listeners = open_listeners(address, where or resolve(address), backlog, reuse_port)
        opened.extend(listeners)
        return listeners

    yield listen
    for listener in opened:
        listener.close()


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can look into."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


def port_of(listener: Listener) -> int:
    return int(listener.name.rpartition(":")[2])


def connect(listener: Listener) -> socket.socket:
    """A client of it, connected or refused at once."""
    path = listener.address.path
    if path:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        try:
            client.connect("\0" + path[1:] if path.startswith("@") else path)
        except BaseException:
            client.close()
            raise
        return client
    host = listener.name.rpartition(":")[0].strip("[]")
    return socket.create_connection((host, port_of(listener)), timeout=PATIENCE)


def accept(listener: Listener) -> tuple[socket.SocketType, object]:
    """The next client, as soon as it is there."""

    def one() -> tuple[socket.SocketType, object] | None:
        try:
            return listener.accept()
        except BlockingIOError:
            return None

    accepted = eventually(one)
    assert accepted is not None
    return accepted


def serves(listener: Listener) -> bool:
    """Whether a client gets through."""
    try:
        client = connect(listener)
    except OSError:
        return False
    with client:
        sock, _ = accept(listener)
        sock.send(b"x")
        sock.close()
        return client.recv(1) == b"x"


def backlog_of(listener: Listener) -> int:
    """The kernel's limit for it (tcpi_sacked of a listening socket, tcp(7))."""
    with socket.socket(fileno=os.dup(listener.fd)) as sock:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("I", info, 28)[0])


# Accepting


def test_an_accepted_client_is_ready_for_use_in_the_loop(open_all: Open) -> None:
    [listener] = open_all("127.0.0.1:0")
    with pytest.raises(BlockingIOError):
        listener.accept()
    with connect(listener) as client:
        sock, address = accept(listener)
        assert address == client.getsockname()
        assert sock.gettimeout() == 0
        assert not os.get_inheritable(sock.fileno())
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        sock.send(b"hello")
        assert client.recv(9) == b"hello"
        sock.close()


def test_clients_are_accepted_in_the_order_in_which_they_came(open_all: Open) -> None:
    [listener] = open_all("127.0.0.1:0")
    clients = [connect(listener) for _ in range(5)]
    for client in clients:
        sock, address = accept(listener)
        assert address == client.getsockname()
        sock.close()
        client.close()


def test_a_tcp_listener_knows_how_many_clients_wait(open_all: Open) -> None:
    [listener] = open_all("127.0.0.1:0")
    assert listener.waiting() == 0
    with connect(listener), connect(listener), connect(listener):
        eventually(lambda: listener.waiting() == 3)
        accept(listener)[0].close()
        assert listener.waiting() == 2


def test_a_unix_listener_knows_only_that_clients_wait(open_all: Open, tmp_path: Path) -> None:
    [listener] = open_all(f"{tmp_path}/s")
    assert listener.waiting() == 0
    with connect(listener), connect(listener):
        assert listener.waiting() is None
        accept(listener)[0].close()
        accept(listener)[0].close()
        assert listener.waiting() == 0


def test_where_the_kernel_does_not_say_how_many_wait_it_says_that_they_do() -> None:
    class Short(socket.SocketType):
        """On a kernel whose struct tcp_info ends before the number."""

        def getsockopt(self, level: int, name: int, size: int = 0) -> Any:
            return super().getsockopt(level, name, size)[:-4] if size else super().getsockopt(level, name)

    with socket.create_server(("127.0.0.1", 0)) as server:
        listener = Listener(parse_address("127.0.0.1:1"), Short(server.family, server.type, 0, os.dup(server.fileno())))
        assert listener.waiting() == 0
        with socket.create_connection(server.getsockname()):
            eventually(lambda: listener.waiting() is None)
        listener.close()


def test_accepting_without_descriptors_is_an_error_and_the_client_goes_on_waiting(open_all: Open) -> None:
    [listener] = open_all("127.0.0.1:0")
    with connect(listener) as client:
        with no_descriptors(), pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
            listener.accept()
        assert caught.value.errno == errno.EMFILE
        sock, address = accept(listener)
        assert address == client.getsockname()
        sock.close()


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:0", "localhost:0", "@{name}", "{folder}/sock"])
def test_each_kind_of_address_is_listened_on_and_named(text: str, open_all: Open, tmp_path: Path) -> None:
    text = text.format(name=abstract_name(), folder=tmp_path)
    listeners = open_all(text)
    for listener in listeners:
        assert serves(listener)
        assert listener.address == parse_address(text)
        if text.startswith(("@", "/")):
            assert listener.name == text
        else:
            assert port_of(listener) > 0


def test_a_bare_port_is_listened_on_in_both_families_each_by_a_socket_of_its_own(open_all: Open) -> None:
    port = free_port()
    listeners = {listener.name: listener for listener in open_all(str(port))}
    assert listeners.keys() == {f"0.0.0.0:{port}", f"[::]:{port}"}
    assert all(serves(listener) for listener in listeners.values())
    listeners[f"0.0.0.0:{port}"].close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    again = SocketAddress(socket.AF_INET, ("0.0.0.0", port))
    assert serves(open_all(str(port), again)[0])


def test_the_backlog_is_the_one_asked_for_and_can_be_changed(open_all: Open) -> None:
    [listener] = open_all("127.0.0.1:0", backlog=5)
    assert backlog_of(listener) == 5
    listener.listen(7)
    assert backlog_of(listener) == 7


def test_a_port_can_be_listened_on_again_at_once_after_connections_were_closed_here(open_all: Open) -> None:
    port = free_port()
    address = Address("127.0.0.1", port)
    [listener] = open_listeners(address, resolve(address), 8)
    with connect(listener) as client:
        sock, _ = accept(listener)
        sock.close()
        assert client.recv(1) == b""
    listener.close()
    assert serves(open_all(f"127.0.0.1:{port}")[0])


# What cannot be listened on


def refuse(text: str, *where: SocketAddress) -> ListenError:
    address = parse_address(text)
    with pytest.raises(ListenError) as caught:
        open_listeners(address, where or resolve(address), 8)
    return caught.value


def test_a_port_that_is_taken_is_an_error_that_tells_how_to_find_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        error = refuse(f"127.0.0.1:{port}")
    assert str(error) == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use; "
        f"another process has that port, `ss -tanp sport = :{port}` shows which"
    )
    assert error.errno == errno.EADDRINUSE


@pytest.mark.skipif(not shutil.which("ss"), reason="ss is not here: apt install iproute2")
def test_the_command_of_that_error_also_shows_a_connection_that_goes_out_from_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as outgoing:
        port = outgoing.getsockname()[1]
        (command,) = re.findall("`(ss .*)` shows which", str(refuse(f"127.0.0.1:{port}")))
        shown = subprocess.run(command.split(), capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        assert f"127.0.0.1:{port}" in shown
        assert f"pid={os.getpid()}," in shown


def test_a_port_is_shared_by_those_of_one_user_who_all_say_so(open_all: Open) -> None:
    [first] = open_all("127.0.0.1:0", reuse_port=True)
    address, where = Address("127.0.0.1", port_of(first)), resolve(Address("127.0.0.1", port_of(first)))
    [second] = open_all(str(address), reuse_port=True)
    assert port_of(second) == port_of(first)
    with pytest.raises(ListenError, match=r"`ss -tanp sport = :\d+` shows which$"):
        open_listeners(address, where, 8)
    if os.geteuid() == 0:
        with unprivileged(), pytest.raises(ListenError, match=r"needs reuse_port and the same user too$"):
            open_listeners(address, where, 8, reuse_port=True)


def test_sharing_means_nothing_for_a_unix_socket(open_all: Open, tmp_path: Path) -> None:
    [listener] = open_all(f"{tmp_path}/s", reuse_port=True)
    listener.share_port()
    assert serves(listener)


def test_an_error_names_the_address_as_configured_and_the_one_it_stands_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        error = refuse(f"localhost:{port}", SocketAddress(socket.AF_INET, ("127.0.0.1", port)))
    assert str(error).startswith(f"cannot listen on localhost:{port} (127.0.0.1:{port}): Address already in use; ")


@pytest.mark.parametrize("missing", [ELSEWHERE, ELSEWHERE_6, NO_FAMILY], ids=["IPv4", "IPv6", "family"])
def test_an_address_that_the_host_does_not_have_is_done_without_if_there_is_another(
    missing: SocketAddress, open_all: Open
) -> None:
    for where in ([missing, LOOPBACK], [LOOPBACK, missing]):
        [listener] = open_all("somewhere:0", *where)
        assert serves(listener)


@pytest.mark.parametrize(
    ("where", "code"),
    [([ELSEWHERE], errno.EADDRNOTAVAIL), ([ELSEWHERE_6, ELSEWHERE], errno.EADDRNOTAVAIL)],
    ids=["the only one", "all"],
)
def test_an_address_that_the_host_does_not_have_at_all_is_an_error(where: list[SocketAddress], code: int) -> None:
    error = refuse("somewhere:0", *where)
    assert error.errno == code
    assert "somewhere:0 (192.0.2.1:0): Cannot assign requested address; no interface of this host has" in str(error)


def test_a_failure_closes_what_was_opened_before_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        refuse("localhost:0", LOOPBACK_6, LOOPBACK, SocketAddress(socket.AF_INET, other.getsockname()))


def test_without_descriptors_listening_is_an_error_that_names_the_limit() -> None:
    with no_descriptors(1):
        error = refuse("localhost:0", LOOPBACK, LOOPBACK)
    assert error.errno == errno.EMFILE
    assert str(error).endswith("Too many open files; raise LimitNOFILE or `ulimit -n`")


def test_a_low_port_without_privileges_is_an_error_that_tells_what_is_needed() -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1:
        skip_for_kernel("any user may bind any port")
    with unprivileged():
        error = refuse("127.0.0.1:1")
    assert error.errno == errno.EACCES
    assert "Permission denied; a port below 1024 needs root or CAP_NET_BIND_SERVICE" in str(error)


# Sockets with a file


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing/sock", "No such file or directory; the folder does not exist"),
        ("file/sock", "Not a directory"),
        ("file", "a file that is not a socket stands there"),
        ("folder", "a file that is not a socket stands there"),
        ("link", "a file that is not a socket stands there"),
    ],
)
def test_a_path_that_cannot_be_a_socket_is_an_error_and_is_left_alone(path: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    assert str(refuse(f"{tmp_path}/{path}")) == f"cannot listen on {tmp_path}/{path}: {reason}"
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]


def test_a_folder_without_permission_is_an_error_that_says_so(shared_folder: Path) -> None:
    shared_folder.chmod(0o555)
    with unprivileged():
        error = refuse(f"{shared_folder}/sock")
    assert error.errno == errno.EACCES
    assert "Permission denied; " in str(error)
    assert "the folder must be writable" in str(error)


def test_a_stale_socket_file_is_replaced(open_all: Open, tmp_path: Path) -> None:
    path = f"{tmp_path}/sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    assert serves(open_all(path)[0])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_socket_file_that_somebody_listens_on_is_left_to_them(kind: int, full: bool, tmp_path: Path) -> None:
    path = f"{tmp_path}/sock"
    with socket.socket(socket.AF_UNIX, kind) as other, socket.socket(socket.AF_UNIX, kind) as client:
        other.bind(path)
        other.listen(0)
        if full:
            client.connect(path)
        error = refuse(path)
        assert error.errno == errno.EADDRINUSE
        assert str(error).startswith(f"cannot listen on {path}: Address already in use; another process listens there")
        assert os.path.exists(path)


def test_a_socket_that_is_bound_and_not_yet_listening_counts_as_stale(open_all: Open, tmp_path: Path) -> None:
    path = f"{tmp_path}/sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        assert serves(open_all(path)[0])


def test_an_abstract_name_that_is_taken_is_an_error() -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("")
        other.listen()
        name = "@" + other.getsockname()[1:].decode()
        assert refuse(name).errno == errno.EADDRINUSE


def test_closing_removes_the_socket_file(tmp_path: Path) -> None:
    path = f"{tmp_path}/sock"
    [listener] = open_listeners(parse_address(path), resolve(parse_address(path)), 8)
    listener.close()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("replacement", ["a file", "another socket", "nothing"])
def test_closing_removes_no_file_of_somebody_else_s(replacement: str, tmp_path: Path) -> None:
    path = f"{tmp_path}/sock"
    [listener] = open_listeners(parse_address(path), resolve(parse_address(path)), 8)
    os.rename(path, f"{tmp_path}/aside")
    if replacement == "a file":
        Path(path).write_text("precious")
    with socket.socket(socket.AF_UNIX) as other:
        if replacement == "another socket":
            other.bind(path)
        listener.close()
        assert os.path.lexists(path) == (replacement != "nothing")


def test_closing_a_socket_whose_file_may_not_be_removed_closes_it(shared_folder: Path) -> None:
    path = f"{shared_folder}/sock"
    [listener] = open_listeners(parse_address(path), resolve(parse_address(path)), 8)
    before = open_descriptors()
    shared_folder.chmod(0o555)
    try:
        with unprivileged():
            listener.close()
        assert open_descriptors() == before - 1
    finally:
        shared_folder.chmod(0o755)
        listener.close()
    with pytest.raises(OSError, match=r"No such file|refused"), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


# Resting


def test_a_listener_at_rest_refuses_and_resets_clients_until_it_listens_again(open_all: Open) -> None:
    [listener] = open_all(f"127.0.0.1:{free_port()}")
    with connect(listener) as waiting:
        listener.rest()
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(listener)
    listener.listen(3)
    assert serves(listener)
    assert backlog_of(listener) == 3


def test_a_listener_at_rest_lets_another_socket_take_its_address(open_all: Open) -> None:
    where = f"127.0.0.1:{free_port()}"
    [listener] = open_all(where)
    listener.rest()
    [other] = open_all(where)
    assert serves(other)


# Sockets that the process before has kept


def keep(listener: Listener) -> socket.SocketType:
    """The same socket, as the next process finds it in the store."""
    return socket.SocketType(fileno=os.dup(listener.fd))


def held(kept: Kept) -> list[socket.SocketType]:
    """All of them."""
    return [sock for here in kept.values() for sock in here]


def let_go(listener: Listener) -> None:
    """The process ends, and closes its own copy."""
    listener._sock.close()


@pytest.mark.parametrize("text", ["127.0.0.1:{port}", "{port}", "[::1]:{port}", "@{name}", "{folder}/sock"])
def test_a_kept_socket_is_taken_where_the_address_is_the_same(text: str, open_all: Open, tmp_path: Path) -> None:
    if "::1" in text:
        loopback(socket.AF_INET6)
    address = parse_address(text.format(port=free_port(), name=abstract_name(), folder=tmp_path))
    before = open_listeners(address, resolve(address), 8)
    waiting = connect(before[0])
    kept = by_place([keep(listener) for listener in before])
    for listener in before:
        let_go(listener)
    after = open_listeners(address, resolve(address), 11, kept=kept)
    try:
        assert [listener._sock for listener in after] == held(kept)
        assert [listener.name for listener in after] == [listener.name for listener in before]
        # Who waited in the backlog is served, and so is who comes.
        sock, _ = accept(after[0])
        sock.send(b"x")
        assert waiting.recv(1) == b"x"
        sock.close()
        assert all(serves(listener) for listener in after)
        if not address.path:
            assert [backlog_of(listener) for listener in after] == [11] * len(after)
    finally:
        waiting.close()
        for listener in after:
            listener.close()
    assert os.listdir(tmp_path) == []


def test_where_one_family_was_kept_the_other_one_is_opened(open_all: Open) -> None:
    loopback(socket.AF_INET6)
    port = free_port()
    [before] = open_all(f"{port}", SocketAddress(socket.AF_INET, ("0.0.0.0", port)))
    kept = by_place([keep(before)])
    address = Address(port=port)
    after = open_listeners(address, resolve(address), 8, kept=kept)
    assert sorted(listener.name for listener in after) == [f"0.0.0.0:{port}", f"[::]:{port}"]
    assert [listener._sock in held(kept) for listener in after] == [listener.name.startswith("0") for listener in after]
    assert all(serves(listener) for listener in after)
    for listener in after:
        listener.close()


def test_a_socket_of_the_other_family_is_not_taken_for_the_same(open_all: Open) -> None:
    loopback(socket.AF_INET6)
    port = free_port()
    [v6] = open_all(f"[::]:{port}")
    kept = by_place([keep(v6)])
    address = parse_address(f"0.0.0.0:{port}")
    [v4] = open_listeners(address, resolve(address), 8, kept=kept)
    assert v4._sock not in held(kept)
    assert serves(v4)
    v4.close()
    for sock in held(kept):
        sock.close()


def test_a_kept_socket_can_be_shared_from_now_on(open_all: Open) -> None:
    [before] = open_all(f"127.0.0.1:{free_port()}")
    [after] = open_listeners(before.address, resolve(before.address), 8, reuse_port=True, kept=by_place([keep(before)]))
    let_go(before)
    [second] = open_all(str(before.address), reuse_port=True)
    assert port_of(second) == port_of(after)
    after.close()


@pytest.mark.parametrize("text", ["127.0.0.1:{port}", "@{name}", "{folder}/sock"])
def test_a_failure_leaves_kept_sockets_listening_and_closes_what_is_new(
    text: str, open_all: Open, tmp_path: Path
) -> None:
    [before] = open_all(text.format(port=free_port(), name=abstract_name(), folder=tmp_path))
    [own] = resolve(before.address)
    kept = by_place([keep(before)])
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = SocketAddress(socket.AF_INET, other.getsockname())
        count = open_descriptors()
        with pytest.raises(ListenError, match="Address already in use"):
            open_listeners(before.address, [own, LOOPBACK, taken], 8, kept=kept)
        assert open_descriptors() == count
    assert serves(before)
    assert not before.address.path.startswith("/") or os.path.exists(before.address.path)
    for sock in held(kept):
        sock.close()


def test_closing_all_but_kept_ones_closes_the_others_only(open_all: Open) -> None:
    [mine], [before] = open_all("127.0.0.1:0"), open_all("127.0.0.1:0")
    kept = keep(before)
    again = kept_listener(kept)
    close_all([mine, again], by_place([kept]))
    assert not serves(mine)
    assert serves(again)
    again.close()


@pytest.mark.parametrize("text", ["127.0.0.1:{port}", "@{name}", "{folder}/sock"])
def test_a_kept_socket_that_is_given_up_refuses_clients_at_once_though_another_copy_lives(
    text: str, open_all: Open, tmp_path: Path
) -> None:
    [before] = open_all(text.format(port=free_port(), name=abstract_name(), folder=tmp_path))
    with connect(before) as waiting:
        after = kept_listener(keep(before))
        assert after.address == before.address
        after.close()
        with pytest.raises(OSError, match=r"refused|No such file"):
            connect(before)
        if before.address.path:
            let_go(before)  # a unix socket lets them wait until the last copy is closed
        with suppress(ConnectionResetError):
            assert waiting.recv(1) == b""
    assert os.listdir(tmp_path) == []


def test_the_file_of_a_kept_socket_stays_until_it_is_given_up(open_all: Open, tmp_path: Path) -> None:
    [before] = open_all(f"{tmp_path}/sock")
    file = os.lstat(f"{tmp_path}/sock")
    kept = keep(before)
    let_go(before)
    [after] = open_listeners(before.address, resolve(before.address), 8, kept=by_place([kept]))
    assert os.path.samestat(os.lstat(f"{tmp_path}/sock"), file)
    after.close()
    assert os.listdir(tmp_path) == []
