"""The contestants: what is started, with which settings, and where to get what is missing."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import counters

ROOT = Path(__file__).parent.parent
SETTINGS = Path(__file__).parent / "settings"
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
SOCKET_PROXYD = "/lib/systemd/systemd-socket-proxyd"
CONNECTIONS = 6000  # at once, where a contestant has a limit
PATIENCE = 10.0
QUESTION = b"ask".ljust(64)  # what load.c answers
FEW_BACKENDS, MANY_BACKENDS = 2, 100  # that rspd is compared with itself with
MANY_SUFFIX = f", {MANY_BACKENDS} backends"

# What systemd does for a service that has a socket unit (sd_listen_fds(3)).
PASS_SOCKET = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 </dev/null'


class PeerError(Exception):
    """A contestant did not do its work; the message says what happened."""


@dataclass(frozen=True)
class Place:
    """Where a contestant runs: a folder for its files, its port, the backends', the log's file if it writes one."""

    folder: Path
    port: int
    backends: Sequence[int]
    log: Path | None

    @property
    def backend(self) -> int:
        """The port of the only backend."""
        (only,) = self.backends
        return only

    def settings(self, template: str, **values: object) -> str:
        """Fill a file of settings/ in, and return its path."""
        text = (SETTINGS / template).read_text()
        known = {"FOLDER": self.folder, "PORT": self.port, **values}
        for name, value in known.items():
            text = text.replace(f"@{name}@", str(value))
        path = self.folder / template
        path.write_text(text)
        return str(path)


@dataclass(frozen=True)
class Peer:
    """A contestant."""

    name: str
    program: str = ""
    package: str = ""
    version_option: str = "-v"
    logs: bool = True  # it can write a line for each connection
    processes: int = 1
    passed: bool = False  # it does not listen itself, but takes a listening socket
    own_backends: bool = False  # each process has a backend of its own, which counts what the process has accepted
    work: float = 1.0  # the share of the full work that it is given, for the slow
    idle_max: int = 5000
    descriptors: int = 2  # that a connection takes
    least: int = 0  # the hard limit of descriptors that it must have
    balances: bool = False  # it can have several backends
    backends: int = 1
    question: bytes = b""  # what its clients ask; empty: what the backend of the works answers

    @property
    def path(self) -> str | None:
        """Where its program is, None if it is missing."""
        return shutil.which(self.program, path=SEARCH)

    def missing(self) -> str | None:
        """What is missing and how to get it, None if nothing is."""
        return None if self.path else f"{self.name} is not here: apt install {self.package}"

    def version(self) -> str:
        """Its version as its program tells it."""
        assert self.path
        run = subprocess.run([self.path, self.version_option], capture_output=True, text=True, check=False)
        found = re.search(r"\d+(\.\d+)+", run.stdout + run.stderr)
        return found[0] if found else "unknown"

    def command(self, place: Place) -> list[str]:
        """What to run."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rspd(Peer):
    """rspd, of this tree or another one."""

    tree: Path = ROOT
    python: str = sys.executable
    connections: int = CONNECTIONS
    least: int = 2 * CONNECTIONS + 25

    def missing(self) -> str | None:
        """The interpreter may lack rspd's libraries."""
        if not shutil.which(self.python):
            return f"expected an interpreter, found none: {self.python}"
        run = subprocess.run([self.python, "-c", "import daemon, sdnotify, yaml"], capture_output=True, check=False)
        advice = "apt install python3-daemon python3-sdnotify python3-yaml, or use make bench, which has an environment"
        return f"{self.python} cannot run rspd: {advice}" if run.returncode else None

    def version(self) -> str:
        """Its version, and the commit if it is in a clone."""
        text = (self.tree / "rspd" / "__init__.py").read_text()
        version = text.partition('__version__ = "')[2].partition('"')[0]
        git = ["git", "-C", str(self.tree), "describe", "--always", "--dirty", "--abbrev=8"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return version
        return f"{version} ({commit})"

    def command(self, place: Place) -> list[str]:
        """In the foreground; the log is its stderr."""
        level = "info" if place.log else "warning"
        backends = "".join(f"\n  - 127.0.0.1:{backend}" for backend in place.backends)
        config = place.settings("rspd.yaml", BACKENDS=backends, CONNECTIONS=self.connections, LEVEL=level)
        return [self.python, "-m", "rspd", "--foreground", "-c", config]


class TimedRspd(Rspd):
    """rspd under turns.py, which times each turn of its loop."""

    TURNS = "turns.json"  # in its folder, after a SIGUSR1

    def command(self, place: Place) -> list[str]:
        """The same arguments after another beginning."""
        python, _, _, *arguments = super().command(place)
        return [python, str(Path(__file__).with_name("turns.py")), str(place.folder / self.TURNS), *arguments]


class Nginx(Peer):
    """nginx with its stream module."""

    MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

    def missing(self) -> str | None:
        """nginx, or its stream module, which may be built in."""
        if not self.path or self.MODULE.exists():
            return super().missing()
        built = subprocess.run([self.path, "-V"], capture_output=True, text=True, check=False).stderr
        return (
            None if "--with-stream" in built.split() else "nginx has no stream module: apt install libnginx-mod-stream"
        )

    def command(self, place: Place) -> list[str]:
        """Not a daemon; a master and its workers."""
        module = f"load_module {self.MODULE};" if self.MODULE.exists() else ""
        log = f"{place.log} line" if place.log else "off"
        servers = "\n        ".join(f"server 127.0.0.1:{backend};" for backend in place.backends)
        config = place.settings("nginx.conf", MODULE=module, PROCESSES=self.processes, LOG=log, SERVERS=servers)
        return [self.path or "", "-c", config, "-e", "stderr"]


class HAProxy(Peer):
    """HAProxy in TCP mode."""

    def command(self, place: Place) -> list[str]:
        """Not a daemon, no master; the log is its standard output."""
        on = place.log is not None
        log, connections = ("log stdout format raw local0", "log global\n    option tcplog") if on else ("", "")
        servers = "\n    ".join(f"server {backend} 127.0.0.1:{backend}" for backend in place.backends)
        config = place.settings("haproxy.cfg", LOG=log, LOG_CONNECTIONS=connections, SERVERS=servers)
        return [self.path or "", "-db", "-f", config]


class SocketProxyd(Peer):
    """systemd-socket-proxyd."""

    def command(self, place: Place) -> list[str]:
        """It logs nothing of connections, and has no settings but this."""
        return [self.program, f"--connections-max={CONNECTIONS}", f"127.0.0.1:{place.backend}"]


class Socat(Peer):
    """socat, which forks a process for each connection."""

    def command(self, place: Place) -> list[str]:
        """Logs at notice: some ten lines for each connection, fewer say nothing of it."""
        listen = f"TCP-LISTEN:{place.port},bind=127.0.0.1,reuseaddr,fork,backlog=128"
        log = ["-d", "-d", "-lf", str(place.log)] if place.log else []
        return [self.path or "", *log, listen, f"TCP:127.0.0.1:{place.backend}"]


class Rinetd(Peer):
    """rinetd."""

    def command(self, place: Place) -> list[str]:
        """In the foreground."""
        log = f"logfile {place.log}" if place.log else ""
        return [self.path or "", "-f", "-c", place.settings("rinetd.conf", LOG=log, BACKEND=place.backend)]


@dataclass(frozen=True)
class AsyncioRelay(Peer):
    """asyncio_relay.py: what rspd would be without its own loop."""

    python: str = sys.executable

    def missing(self) -> str | None:
        """Nothing: the interpreter is enough."""
        return None

    def version(self) -> str:
        """That of the interpreter."""
        return "of the same Python"

    def command(self, place: Place) -> list[str]:
        """The same interpreter as rspd's."""
        log = [str(place.log)] if place.log else []
        script = str(Path(__file__).with_name("asyncio_relay.py"))
        return [self.python, script, str(place.port), str(place.backend), *log]


class Direct(Peer):
    """No proxy: load and backend alone, the floor of what the others can reach."""

    def missing(self) -> str | None:
        """Nothing."""
        return None

    def version(self) -> str:
        """It has none."""
        return "-"


RSPD, SERIAL, OTHER, NGINX, HAPROXY, SOCKET_PROXYD_NAME, SOCAT, DIRECT = (
    *("rspd", "rspd, serial", "rspd, other tree", "nginx", "haproxy", "socket-proxyd", "socat", "no proxy"),
)


def contestants(python: str, other: Path | None) -> list[Peer]:
    """All that this bench knows, whether they are here or not."""
    found: list[Peer] = [Rspd(RSPD, python=python, balances=True)]
    if other:
        found.append(Rspd(OTHER, tree=other, python=python, balances=True))
    return [
        *found,
        Nginx(NGINX, "nginx", "nginx libnginx-mod-stream", balances=True),
        HAProxy(HAPROXY, "haproxy", "haproxy", least=15_014, balances=True),
        SocketProxyd(SOCKET_PROXYD_NAME, SOCKET_PROXYD, "systemd", "--version", logs=False, passed=True, descriptors=6),
        Rinetd("rinetd", "rinetd", "rinetd"),
        Socat(SOCAT, "socat", "socat", "-V", work=0.5, idle_max=500),
        AsyncioRelay("asyncio", python=python, work=0.5),
        Direct(DIRECT),
    ]


def serial(python: str) -> Peer:
    """rspd with `max_connections: 1`, its default."""
    return Rspd(SERIAL, python=python, connections=1)


def timed(here: Sequence[Peer]) -> list[TimedRspd]:
    """Whoever is rspd, of this tree or another one, with a look at each turn of its loop."""
    return [TimedRspd(peer.name, tree=peer.tree, python=peer.python) for peer in here if isinstance(peer, Rspd)]


def in_processes(here: Sequence[Peer], counts: Sequence[int]) -> list[Peer]:
    """rspd and nginx, each alone, then in so many processes on one listening socket; for nginx its own workers."""
    those = [peer for peer in here if isinstance(peer, (Rspd, Nginx))]
    more: list[Peer] = []
    for count in counts:
        for peer in those:
            if isinstance(peer, Rspd):
                several = replace(peer, processes=count, backends=count, passed=True, own_backends=True)
                more.append(replace(several, name=f"{peer.name}, {count} processes"))
            else:
                more.append(replace(peer, name=f"{peer.name}, {count} workers", processes=count))
    return [*those, *more]


def balancing(here: Sequence[Peer], backends: int) -> list[Peer]:
    """Those who can, with so many backends each."""
    return [replace(peer, backends=backends) for peer in here if peer.balances]


def few_and_many(here: Sequence[Peer]) -> list[Peer]:
    """rspd with few backends, and with many: whoever is rspd, of this tree or another one."""
    ours = [peer for peer in here if isinstance(peer, Rspd)]
    many = [replace(peer, name=f"{peer.name}{MANY_SUFFIX}", backends=MANY_BACKENDS) for peer in ours]
    return [*balancing(ours, FEW_BACKENDS), *many]


@dataclass
class Running:
    """A contestant that runs."""

    peer: Peer
    port: int
    backends: Sequence[int]  # ports
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)
    output: Path = Path()

    def pids(self) -> list[int]:
        """What was started; the descendants not among it."""
        return [process.pid for process in self.processes]

    def cpu(self) -> float:
        """CPU seconds since it was started."""
        return counters.cpu_seconds(self.pids())

    def check(self) -> None:
        """Raises PeerError if it has ended."""
        for process in self.processes:
            if process.poll() is not None:
                raise PeerError(f"ended with {process.returncode}: {self.last_words()}")

    def last_line(self) -> str | None:
        """The end of what it wrote on stderr, None if it wrote nothing."""
        with suppress(OSError):
            lines = self.output.read_text(errors="replace").strip().splitlines()
            return lines[-1][:200] if lines else None
        return None

    def last_words(self) -> str:
        """The same as a part of a message."""
        return self.last_line() or "it wrote nothing"


def environment(tree: Path = ROOT) -> dict[str, str]:
    """Without what systemd or a coverage run has put there: what is started is to behave as from a shell."""
    hidden = {"NOTIFY_SOCKET", "INVOCATION_ID", "JOURNAL_STREAM", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("COV")}
    return kept | {"PYTHONPATH": str(tree)}


@contextmanager
def running(peer: Peer, folder: Path, backends: Sequence[int], logs: bool, cpus: set[int]) -> Iterator[Running]:
    """Start a contestant on these processors, and end it. It need not accept yet when this returns.

    `backends` are the ports of its backends.
    Its files go into `folder`, which is made. Raises PeerError if it cannot be started.
    """
    if isinstance(peer, Direct):
        yield Running(peer, backends[0], backends)
        return
    folder.mkdir(parents=True)
    # Nobody else gets the port while the socket is bound; a contestant may bind it too (SO_REUSEADDR, socket(7)).
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        if peer.passed:
            held.listen(4096)
        port = held.getsockname()[1]
        log = folder / "log" if logs and peer.logs else None
        # rspd and HAProxy log on these; the others put errors there.
        output = log if log and not isinstance(peer, (Nginx, Socat, Rinetd, AsyncioRelay)) else folder / "output"
        places = [Place(folder, port, backends, log)]
        if peer.passed:
            places = [replace(places[0], folder=folder / str(number)) for number in range(peer.processes)]
        if peer.own_backends:
            places = [replace(place, backends=[backend]) for place, backend in zip(places, backends, strict=True)]
        one = Running(peer, port, backends, output=output)
        try:
            with open(output, "ab") as file:
                for place in places:
                    place.folder.mkdir(exist_ok=True)
                    command, stdin = peer.command(place), subprocess.DEVNULL
                    if peer.passed:
                        command, stdin = ["sh", "-c", PASS_SOCKET, "sh", *command], held.fileno()
                    one.processes.append(start(command, stdin, file.fileno(), peer, cpus))
            yield one
        finally:
            stop(one.processes)


def start(command: Sequence[str], stdin: int, output: int, peer: Peer, cpus: set[int]) -> subprocess.Popen[bytes]:
    """A process in a group of its own, with as many descriptors as allowed."""

    def prepare() -> None:
        os.sched_setaffinity(0, cpus)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=output,
        stderr=output,
        cwd="/",
        env=environment(peer.tree if isinstance(peer, Rspd) else ROOT),
        start_new_session=True,
        preexec_fn=prepare,
    )


def stop(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """End processes and their descendants."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def first_answer(one: Running, began: float, patience: float = PATIENCE, question: bytes = QUESTION) -> float:
    """Seconds from `began` (time.monotonic) until a request through it is answered. Raises PeerError if it is not."""
    while True:
        one.check()
        try:
            with socket.create_connection(("127.0.0.1", one.port), timeout=patience) as sock:
                sock.sendall(question)
                if sock.recv(256, socket.MSG_WAITALL):
                    return time.monotonic() - began
                raise PeerError(f"closed the first connection: {one.last_words()}")
        except ConnectionError:
            if time.monotonic() > began + patience:
                raise PeerError(f"did not accept within {patience:.0f} s: {one.last_words()}") from None
            time.sleep(0.0002)
        except TimeoutError:
            raise PeerError(f"did not answer within {patience:.0f} s: {one.last_words()}") from None
