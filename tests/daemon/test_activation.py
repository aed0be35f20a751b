"""The process on sockets that systemd passes: served, matched by name, kept over reloads, left to the next one."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.manager import HasFileno, Service, notify_socket, service, tcp_listener, unix_listener
from tests.net.test_listener import backlog_of
from tests.support import (
    PATIENCE,
    Backend,
    abstract_name,
    answer,
    echo,
    receive_all,
)

ABSTRACT = f"\0{abstract_name()}"


@pytest.fixture
def web() -> Iterator[socket.socket]:
    """A listening socket as systemd keeps it."""
    with tcp_listener() as sock:
        yield sock


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend(answer) as backend:
        yield backend


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rspd.yaml"


def address_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


def client_of(sock: socket.socket) -> socket.socket:
    client = socket.socket(sock.family)
    client.settimeout(PATIENCE)
    client.connect(sock.getsockname())
    return client


def ask(sock: socket.socket) -> None:
    """A client of a listening socket gets its answer."""
    with client_of(sock) as client:
        client.sendall(b"?")
        assert receive_all(client) == b"ok"


def reload(daemon: Service, file: Path, text: str) -> None:
    """Reload this file, which is to be taken."""
    count = len(daemon.find("reloaded listen="))
    file.write_text(text)
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("reloaded listen=", count + 1)


def refused(*arguments: str, sockets: dict[str, HasFileno], code: int = 78) -> list[str]:
    """rspd does not start on these sockets; why, as its log and its status say alike."""
    with notify_socket() as notify:
        daemon = Service(notify, *arguments, sockets=sockets, wait=False)
        try:
            assert daemon.wait() == code, daemon.log
            notify.wait_for("STATUS")
        finally:
            daemon.kill()
    assert not notify.with_field("READY")
    lines = [line.removeprefix("rspd: ") for line in daemon.lines if line.startswith("rspd: ")]
    assert notify.status == "; ".join(lines)
    return lines


# Taken


def test_a_passed_socket_is_served_and_nothing_else_is_needed_to_listen(web: socket.socket, backend: Backend) -> None:
    with service("-b", backend.address, sockets={"web": web}) as daemon:
        assert daemon.find(f'listening address={address_of(web)} socket="web"$')
        assert len(daemon.find("listening")) == 1
        ask(web)


def test_sockets_of_every_kind_are_served_at_once(backend: Backend, tmp_path: Path) -> None:
    with ExitStack() as stack:
        sockets: dict[str, socket.socket] = {
            "four": stack.enter_context(tcp_listener()),
            "both": stack.enter_context(tcp_listener("::")),
            "path": stack.enter_context(unix_listener(f"{tmp_path}/s")),
            "abstract": stack.enter_context(unix_listener(ABSTRACT)),
        }
        with service("-b", backend.address, sockets=sockets, wait=False) as daemon:
            daemon.notify.wait_for("READY=1")
            for sock in sockets.values():
                ask(sock)
            shown = [re.sub(r".*address=(\S+) .*", r"\1", line) for line in daemon.wait_for("listening", 4)]
            assert shown == [
                address_of(sockets["four"]),
                f"[::]:{sockets['both'].getsockname()[1]}",
                f"{tmp_path}/s",
                f"@{ABSTRACT[1:]}",
            ]
        assert (tmp_path / "s").is_socket()


def test_an_ipv4_client_of_a_socket_for_both_families_is_shown_as_such(backend: Backend) -> None:
    with tcp_listener("::") as both, service("-b", backend.address, sockets={"both": both}) as daemon:
        with socket.create_connection(("127.0.0.1", both.getsockname()[1]), PATIENCE) as client:
            client.sendall(b"?")
            assert receive_all(client) == b"ok"
            address = f"127.0.0.1:{client.getsockname()[1]}"
        assert daemon.wait_for_ends(1)[0]["client"] == address


def test_a_file_without_listen_is_enough(web: socket.socket, backend: Backend, file: Path) -> None:
    file.write_text(f"backend: {backend.address}\n")
    with service("-c", str(file), sockets={"web": web}) as daemon:
        ask(web)
        reload(daemon, file, f"backend: {backend.address}\nmax_connections: 2\n")
        ask(web)


def test_what_listen_says_is_not_bound_beside_a_passed_socket_and_warned_of(
    web: socket.socket, backend: Backend, tmp_path: Path
) -> None:
    listen = [f"{tmp_path}/s", address_of(web)]
    with service("-b", backend.address, listen=listen, sockets={"web": web}) as daemon:
        ask(web)
        assert not (tmp_path / "s").exists()
        assert daemon.wait_for("not listening on") == daemon.find(
            f"not listening on {tmp_path}/s, systemd passed sockets in place of listen: web$"
        )
        assert len(daemon.find("listening address=")) == 1


def test_sockets_for_another_process_are_not_taken(web: socket.socket, backend: Backend) -> None:
    env = {"LISTEN_PID": "1"}
    with service("-b", backend.address, listen=["127.0.0.1:0"], sockets={"web": web}, env=env) as daemon:
        assert daemon.port != web.getsockname()[1]
        assert not daemon.find("socket=")


# Matched by name


def test_listen_names_passed_sockets_and_others_to_bind(backend: Backend, file: Path, tmp_path: Path) -> None:
    with tcp_listener() as web, tcp_listener() as admin:
        file.write_text(f"listen: [fd://admin, {tmp_path}/s, fd://web]\nbackend: {backend.address}\n")
        with service("-c", str(file), sockets={"web": web, "admin": admin}, wait=False) as daemon:
            daemon.notify.wait_for("READY=1")
            for sock in (web, admin):
                ask(sock)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                client.connect(f"{tmp_path}/s")
                client.sendall(b"?")
                assert receive_all(client) == b"ok"
            assert not daemon.find("not listening on")
        assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("listen", "names", "lines"),
    [
        (
            ["fd://web"],
            [],
            ["listen fd://web: no such socket from systemd, none was passed; is its socket unit active?"],
        ),
        (
            ["fd://web", "fd://admin"],
            ["admin", "other"],
            [
                "listen fd://web: no such socket from systemd, passed are admin, other",
                "socket 'other' from systemd: not in listen; add fd://other, or stop it",
            ],
        ),
    ],
)
def test_a_name_without_its_counterpart_is_78(listen: list[str], names: list[str], lines: list[str]) -> None:
    words = [word for address in listen for word in ("-l", address)]
    with ExitStack() as stack:
        sockets: dict[str, HasFileno] = {name: stack.enter_context(tcp_listener()) for name in names}
        assert refused(*words, "-b", "a:1", sockets=sockets) == lines


def test_a_datagram_socket_is_78_and_says_what_to_set(web: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        (line,) = refused("-b", "a:1", sockets={"web": web, "dns": sock})
    assert line == (
        "socket 'dns' (descriptor 4) from systemd: expected a listening stream socket, found a datagram socket; "
        "use ListenStream= in the socket unit"
    )


def test_a_backend_that_is_the_passed_socket_is_78(web: socket.socket) -> None:
    where = address_of(web)
    assert refused("-b", where, sockets={"web": web}) == [f"backend {where} is this proxy's own listener {where}"]


def test_a_check_that_would_ask_the_passed_socket_is_78(web: socket.socket, tmp_path: Path) -> None:
    where = address_of(web)
    file = tmp_path / "rspd.yaml"
    file.write_text(f"backend: a:1\nhealth: {{address: '{where}'}}\n")
    assert refused("-c", str(file), sockets={"web": web}) == [
        f"a check of backend a:1 would ask this proxy: {where} is this proxy's own listener {where}"
    ]


def test_an_address_in_use_beside_a_passed_socket_is_69(web: socket.socket, tmp_path: Path) -> None:
    with unix_listener(f"{tmp_path}/s"):
        words = ["-l", "fd://web", "-l", f"{tmp_path}/s", "-b", "a:1"]
        (line,) = refused(*words, sockets={"web": web}, code=69)
    assert line.startswith(f"cannot listen on {tmp_path}/s: Address already in use; ")


# Reload


def test_a_passed_socket_is_served_over_reloads_whatever_listen_says(
    web: socket.socket, backend: Backend, file: Path, tmp_path: Path
) -> None:
    rest = f"\nbackend: {backend.address}\n"
    file.write_text(f"listen: 127.0.0.1:0{rest}")
    with service("-c", str(file), sockets={"web": web}) as daemon:
        daemon.wait_for("not listening on 127.0.0.1:0, ")
        for listen in (f"{tmp_path}/s", "fd://web", f"[fd://web, {tmp_path}/s]", f"{tmp_path}/t", "fd://web"):
            reload(daemon, file, f"listen: {listen}{rest}")
            ask(web)
            assert (tmp_path / "s").exists() == ("fd://web," in listen)
            assert not (tmp_path / "t").exists()
        replaced = [line.rpartition("not listening on ")[2] for line in daemon.find("not listening on")]
        assert [line.partition(",")[0] for line in replaced] == ["127.0.0.1:0", f"{tmp_path}/s", f"{tmp_path}/t"]


def test_a_reload_that_names_what_was_not_passed_changes_nothing(
    web: socket.socket, backend: Backend, file: Path
) -> None:
    file.write_text(f"listen: fd://web\nbackend: {backend.address}\n")
    with service("-c", str(file), sockets={"web": web}) as daemon:
        for listen, reason in (
            ("fd://other", "listen fd://other: no such socket from systemd, passed are web"),
            ("[fd://web, fd://other]", "listen fd://other: no such socket from systemd, passed are web"),
        ):
            count = len(daemon.find("reload failed"))
            file.write_text(f"listen: {listen}\nbackend: {backend.address}\n")
            daemon.signal(signal.SIGHUP)
            assert daemon.wait_for("reload failed", count + 1)[count].endswith(
                f"reload failed, nothing has changed: {reason}"
            )
            ask(web)


def test_a_reload_to_the_passed_socket_as_backend_changes_nothing(
    web: socket.socket, backend: Backend, file: Path
) -> None:
    file.write_text(f"backend: {backend.address}\n")
    with service("-c", str(file), sockets={"web": web}) as daemon:
        file.write_text(f"backend: {address_of(web)}\n")
        daemon.signal(signal.SIGHUP)
        daemon.wait_for(f"reload failed, nothing has changed: backend {address_of(web)} is this proxy's own listener")
        ask(web)


def test_who_waits_in_the_backlog_of_a_passed_socket_waits_through_reloads(web: socket.socket, file: Path) -> None:
    with Backend(echo) as backend:
        file.write_text(f"backend: {backend.address}\n")
        with service("-c", str(file), sockets={"web": web}) as daemon:
            with client_of(web) as served, client_of(web) as waiting:
                served.sendall(b"a")
                assert served.recv(1) == b"a"
                for listen in ("127.0.0.1:0", f"127.0.0.1:{web.getsockname()[1]}", str(web.getsockname()[1])):
                    reload(daemon, file, f"listen: {listen}\nbacklog: 1\nbackend: {backend.address}\n")
                served.close()
                waiting.sendall(b"b")
                assert waiting.recv(1) == b"b"


# One after the other


def test_who_connects_while_rspd_is_down_is_served_by_the_next(web: socket.socket, backend: Backend) -> None:
    with service("-b", backend.address, sockets={"web": web}):
        ask(web)
    with client_of(web) as waiting:
        waiting.sendall(b"?")
        with service("-b", backend.address, sockets={"web": web}):
            assert receive_all(waiting) == b"ok"
            waiting.close()


def test_who_waits_when_it_ends_is_served_by_the_next(web: socket.socket) -> None:
    with Backend(echo) as backend, ExitStack() as stack:
        with service("-b", backend.address, sockets={"web": web}) as first:
            with client_of(web) as served:
                served.sendall(b"a")
                assert served.recv(1) == b"a"
                waiting = stack.enter_context(client_of(web))
                waiting.sendall(b"b")
                first.signal(signal.SIGTERM)
                first.wait_for("ending connections=1 drain_timeout=30$")
                later = stack.enter_context(client_of(web))
                later.sendall(b"c")
            assert first.wait() == 0
            assert first.find("ended served=1$")
        with service("-b", backend.address, "--max-connections", "2", sockets={"web": web}):
            assert (waiting.recv(1), later.recv(1)) == (b"b", b"c")
            waiting.close()
            later.close()


def test_a_passed_socket_is_left_as_it_was(backend: Backend, tmp_path: Path) -> None:
    with tcp_listener(backlog=7) as web, unix_listener(f"{tmp_path}/s") as local:
        before = (tmp_path / "s").lstat().st_ino
        with service("-b", backend.address, sockets={"web": web, "local": local}) as daemon:
            ask(web)
            daemon.signal(signal.SIGHUP)
            daemon.wait_for("nothing to reload")
            assert backlog(web) == 7
        assert backlog(web) == 7
        assert (tmp_path / "s").lstat().st_ino == before
        assert web.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def backlog(sock: socket.socket) -> int:
    """As `backlog_of` a listener."""

    class Like:
        fd = sock.fileno()

    return backlog_of(Like())  # type: ignore[arg-type]
