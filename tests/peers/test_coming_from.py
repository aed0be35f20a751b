"""What docs/coming-from.md says of other programs: they take these lines, and clients see the same of rspd."""

from __future__ import annotations

import re
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from bench.peers import PASS_SOCKET, SEARCH
from bench.peers import SOCKET_PROXYD as PROXYD
from tests.peers.programs import haproxy, listening, nginx
from tests.support import PATIENCE, Backend, echo, eventually, free_port, receive_all, rspd
from tests.test_coming_from import HAPROXY, NGINX, RINETD, SOCAT, SOCKET_PROXYD, Row, completed, rows, those

LISTEN = "127.0.0.1:@PORT@"


def run_nginx(lines: list[str], backend: int) -> AbstractContextManager[int]:
    """nginx with these lines of the page, each where it belongs, and what a configuration needs besides."""
    main = [line for line in lines if line.startswith(("worker_processes", "worker_shutdown"))]
    events = [line for line in lines if line.startswith("worker_connections")]
    group = [line for line in lines if re.match("server |least_conn|hash|random", line)]
    rest = [line for line in lines if line not in (*main, *events, *group)]
    if not [line for line in group if line.startswith("server ") and not re.search("backup|down", line)]:
        group.append(f"server 127.0.0.1:{backend};")
    rest = [re.sub(r"^listen (\S+:)?\d+", f"listen {LISTEN}", line) for line in rest]
    if not any(line.startswith("listen") for line in rest):
        rest.append(f"listen {LISTEN};")
    if not any(line.startswith("proxy_pass") for line in rest):
        rest.append("proxy_pass group;")
    zone = "limit_conn_zone $binary_remote_addr zone=per_ip:1m;"
    stream = f"stream {{ {zone} upstream group {{ {' '.join(group)} }} server {{ {' '.join(rest)} }} }}"
    return nginx(f"events {{ {' '.join(events)} }} {' '.join(main)} {stream}")


def run_haproxy(lines: list[str], backend: int) -> AbstractContextManager[int]:
    """The same for HAProxy."""
    whole = [line for line in lines if re.match("nbthread|hard-stop-after|stats socket", line)]
    rest = [re.sub(r"^bind \S+", f"bind {LISTEN}", line) for line in lines if line not in whole]
    if not any(line.startswith("bind") for line in rest):
        rest.append(f"bind {LISTEN}")
    if not [line for line in rest if line.startswith("server") and "backup" not in line and "disabled" not in line]:
        rest.append(f"server other 127.0.0.1:{backend}")
    resolvers = "resolvers dns\n nameserver one 127.0.0.1:53\n"
    text = "\n ".join(["global", *whole]) + "\n" + resolvers + "\n ".join(["listen test", "mode tcp", *rest])
    return haproxy(text.replace("/run/haproxy", "@FOLDER@") + "\n")


@contextmanager
def run(*command: str, port: int, stdin: int = subprocess.DEVNULL) -> Iterator[int]:
    """A program that listens on this port. Skips the test if it is not installed."""
    if not shutil.which(command[0], path=SEARCH):
        pytest.skip(f"{command[0]} is not here: apt install {Path(command[0]).name}")
    process = subprocess.Popen([shutil.which(command[0], path=SEARCH) or "", *command[1:]], stdin=stdin)
    try:
        eventually(lambda: process.poll() is not None or listening(port), f"{command} listens")
        assert process.poll() is None, command
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextmanager
def run_socket_proxyd(lines: list[str], backend: int) -> Iterator[int]:
    """systemd-socket-proxyd on a socket as systemd passes it, by the one line of a unit."""
    (line,) = lines or [f"ExecStart={PROXYD} 127.0.0.1:{backend}"]
    if not Path(PROXYD).exists():
        pytest.skip("systemd-socket-proxyd is not here: apt install systemd")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = line.removeprefix("ExecStart=").split()
        port = listener.getsockname()[1]
        with run("sh", "-c", PASS_SOCKET, "sh", *words, port=port, stdin=listener.fileno()):
            yield port


@contextmanager
def run_rinetd(lines: list[str], backend: int) -> Iterator[int]:
    """rinetd with these lines, and with a rule if there is none."""
    port = free_port()
    rules = [re.sub(r"^\S+ \w+ ", f"127.0.0.1 {port} ", line) for line in lines if re.match(r"\S+ \w+ \S+ \w+", line)]
    rules = [re.sub(r" 10\.\S+ \w+", f" 127.0.0.1 {backend}", rule) for rule in rules]
    others = [line for line in lines if not re.match(r"\S+ \w+ \S+ \w+", line)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rinetd.conf")
        path.write_text(
            "\n".join([f"pidlogfile {folder}/pid", *(rules or [f"127.0.0.1 {port} 127.0.0.1 {backend}"]), *others, ""])
        )
        with run("rinetd", "-f", "-c", str(path), port=port):
            yield port


@contextmanager
def run_socat(lines: list[str], backend: int) -> Iterator[int]:
    """socat with these options and addresses, and with others where they are missing."""
    port = free_port()
    listen = next((line for line in lines if "LISTEN" in line), "TCP-LISTEN:8080,fork")
    listen = listen.replace("8080", str(port)) + ("" if "bind=" in listen else ",bind=127.0.0.1") + ",reuseaddr"
    connect = next((line for line in lines if re.match("TCP:|UNIX-C", line)), f"TCP:127.0.0.1:{backend}")
    options = [word for line in lines if line.startswith("-") for word in line.split()]
    with run("socat", *options, listen, connect, port=port):
        yield port


RUN = {NGINX: run_nginx, HAPROXY: run_haproxy, SOCKET_PROXYD: run_socket_proxyd, RINETD: run_rinetd, SOCAT: run_socat}

# What needs another host, another backend, or a client that speaks first; or is no part of a relay that listens on TCP.
ELSEWHERE = "health|backup|log_level|accept_proxy|resolve: each|proxies|@app|listen: /|fd://|--foreground"


@those(lambda row: row.program in (NGINX, HAPROXY) and not row.theirs[0].startswith(("nginx ", "haproxy ")))
def test_nginx_and_haproxy_take_their_lines(row: Row) -> None:
    with RUN[row.program](list(row.theirs), free_port()):
        pass


@those(lambda row: row.is_yaml and not re.search(ELSEWHERE, row.ours))
def test_a_client_sees_the_same_of_theirs_and_of_ours(row: Row, tmp_path: Path) -> None:
    """Whether it is served or turned away; it comes from 127.0.0.1."""
    path = str(tmp_path / "app.sock")
    with Backend(echo) as backend, unix_echo(path):
        lines, ours = [
            re.sub(r"\b10\.0\.0\.1\d:\w+", backend.address, text.replace("/run/app.sock", path))
            for text in ("\n".join(row.theirs), completed(row.ours))
        ]
        file = tmp_path / "rspd.yaml"
        file.write_text(ours)
        with RUN[row.program](lines.split("\n"), backend.port) as port:
            theirs_serves = serves(port)
        with rspd("-c", str(file)) as daemon:
            assert serves(daemon.port) == theirs_serves
    assert theirs_serves != ours.startswith("allow")


@contextmanager
def unix_echo(path: str) -> Iterator[None]:
    """A unix socket whose server sends back what it gets."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            echo(self.request)

    with socketserver.ThreadingUnixStreamServer(path, Echo) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield
        server.shutdown()


def serves(port: int) -> bool:
    """Whether a client gets an answer."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
            client.sendall(b"question")
            return client.recv(100) != b""
    except ConnectionError:
        return False


SECTIONS = {"Socket": "Listen|Socket|Accept|Backlog|FileD", "Unit": "Requires|After|Joins", "Service": "Exec|Private"}


def test_the_settings_of_units_are_such(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not here: apt install systemd")
    lines = {text for row in rows(SOCKET_PROXYD) for text in (*row.theirs, row.ours) if re.match(r"[A-Z]\w+=", text)}
    own = {name: sorted(line for line in lines if re.match(starts, line)) for name, starts in SECTIONS.items()}
    assert sum(map(len, own.values())) == len(lines)
    own["Service"].append("Type=oneshot")  # may have several ExecStart=
    files = [tmp_path / "test.service", tmp_path / "test.socket"]
    for file, name in zip(files, ("Service", "Socket"), strict=True):
        file.write_text("\n".join(["[Unit]", *own["Unit"], f"[{name}]", *own[name], ""]))
    end = subprocess.run(["systemd-analyze", "verify", "--man=no", *files], capture_output=True, text=True)
    assert [line for line in end.stderr.splitlines() if line.startswith(str(tmp_path))] == []


# What is said to be otherwise on purpose


class Late(Backend):
    """A backend that reads all that the client sends, and answers when it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        super().__init__(self._answer)

    def _answer(self, sock: socket.socket) -> None:
        receive_all(sock)
        assert self.may.wait(PATIENCE)
        with suppress(ConnectionError):
            sock.sendall(b"late")


def ask_and_end(port: int, backend: Late, waits: bool) -> bytes:
    """What a client gets that ends its stream after its question. waits: the backend answers only after that."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        if not waits:
            backend.may.set()
        with suppress(ConnectionError):
            return receive_all(client)
    return b""


@pytest.mark.parametrize("program", RUN)
def test_of_the_others_only_haproxy_serves_a_client_that_has_ended_its_stream(program: str) -> None:
    with Late() as backend, RUN[program]([], backend.port) as port:
        assert ask_and_end(port, backend, program != HAPROXY) == (b"late" if program == HAPROXY else b"")
        backend.may.set()


@pytest.mark.parametrize("half_close", ["on", "off"])
def test_rspd_serves_a_client_that_has_ended_its_stream_unless_half_close_is_off(
    half_close: str, tmp_path: Path
) -> None:
    file = tmp_path / "rspd.yaml"
    file.write_text(f"half_close: {half_close}\n")
    with Late() as backend, rspd("-c", str(file), "-b", backend.address) as daemon:
        assert ask_and_end(daemon.port, backend, half_close == "off") == (b"late" if half_close == "on" else b"")
        backend.may.set()


@pytest.mark.parametrize("program", [NGINX, HAPROXY, "rspd"])
def test_only_nginx_uses_a_spare_when_the_others_are_full(program: str, tmp_path: Path) -> None:
    file = tmp_path / "rspd.yaml"
    with ExitStack() as stack:
        first, spare = (stack.enter_context(Backend(partial(greet, text))) for text in (b"first", b"spare"))
        if program == "rspd":
            backends = f"{{address: {first.address}, max_connections: 1}}, {{address: {spare.address}, backup: true}}"
            file.write_text(f"max_connections: 9\nbackends: [{backends}]\n")
            port = stack.enter_context(rspd("-c", str(file))).port
        elif program == NGINX:
            lines = [f"server {first.address} max_conns=1;", f"server {spare.address} backup;"]
            port = stack.enter_context(run_nginx(lines, 0))
        else:
            lines = [f"server a {first.address} maxconn 1", f"server b {spare.address} backup"]
            port = stack.enter_context(run_haproxy(lines, 0))
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as one:
            assert one.recv(100) == b"first"
            two = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
            if program == NGINX:
                assert two.recv(100) == b"spare"
        if program != NGINX:
            assert two.recv(100) == b"first"


def greet(text: bytes, sock: socket.socket) -> None:
    """A handler that says a text, and waits until the client has ended."""
    sock.sendall(text)
    receive_all(sock)


NOBODY = "nobody.invalid"


@pytest.mark.parametrize(
    ("program", "lines", "said"),
    [
        (NGINX, [f"server {NOBODY}:80;"], "host not found in upstream"),
        (HAPROXY, [f"server a {NOBODY}:80"], "could not resolve address"),
        (RINETD, [f"0.0.0.0 80 {NOBODY} 80"], "rinetd"),
    ],
)
def test_a_name_that_does_not_resolve_keeps_others_from_starting(program: str, lines: list[str], said: str) -> None:
    with pytest.raises(AssertionError, match=said), RUN[program](lines, 0):
        pass


def test_a_name_that_does_not_resolve_keeps_neither_rspd_nor_haproxy_by_init_addr_from_starting() -> None:
    with rspd("-b", f"{NOBODY}:80"), run_haproxy([f"server a {NOBODY}:80 init-addr none"], 0):
        pass
