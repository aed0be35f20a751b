"""What the tests share: real sockets, real peers, the daemon as a process. Every wait has a bound."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import pytest

from rspd.engine.loop import Loop
from rspd.engine.pipes import PIPE_SIZE, Pipe

T = TypeVar("T")
B = TypeVar("B", bound="Backend")

PATIENCE = 20.0  # seconds before a wait in a test fails

# Bytes, more than the kernel holds on the way of a flow: tcp(7) has buffers of 32 MiB at most on the systems known.
FILL_MAX = 1 << 28

LOG_SIZE = 1 << 19  # bytes of the log that may wait to be read
LINGER_0 = struct.pack("ii", 1, 0)


def eventually(condition: Callable[[], T], what: str = "", patience: float = PATIENCE) -> T:
    """Wait until a condition is true, and return what it said."""
    deadline = time.monotonic() + patience
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {patience} s: {what or condition}")
        time.sleep(0.005)
    return result


def large_pipes(count: int) -> bool:
    """Whether there are so many to be had."""
    with ExitStack() as stack:
        for _ in range(count):
            pipe = Pipe()
            stack.callback(pipe.close)
            if pipe.size < PIPE_SIZE:
                return False
    return True


# For root to become: a number that is no user's on Debian. Nobody else uses his pages for pipes.
OUR_USER = random.SystemRandom().randrange(30_000, 60_000)


def abstract_name() -> str:
    """A name for a unix socket, after `@`, that nobody has. Not by process ids: namespaces may share the names."""
    return f"rspd-test-{uuid.uuid4()}"


def open_descriptors() -> int:
    """How many descriptors this process has, one of the look at them included."""
    return len(os.listdir("/proc/self/fd"))


def client_hello(name: str | None, alpn: Sequence[str] = ()) -> bytes:
    """What a TLS client says first that asks for a server by this name, and offers these protocols."""
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    if alpn:
        context.set_alpn_protocols(list(alpn))
    said = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), said, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return said.read()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets: the one that connected, and the one that was accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.settimeout(PATIENCE)
    far.settimeout(PATIENCE)
    return near, far


_kept_ports: list[socket.socket] = []


def free_port() -> int:
    """A port where nobody listens, on any address; kept until the test ends, for whoever names it.

    A socket that does not listen has it. So the kernel gives the port to nobody who asks for any, and lets another bind
    it who names it (SO_REUSEADDR, socket(7)).
    """
    both = socket.has_dualstack_ipv6()
    held = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
    _kept_ports.append(held)
    if both:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    port: int = held.getsockname()[1]
    return port


def let_ports_go() -> None:
    """Let others have the ports that were kept."""
    while _kept_ports:
        _kept_ports.pop().close()


def reset(sock: socket.socket) -> None:
    """Close a TCP socket so that its peer gets RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    sock.close()


def is_reset(sock: socket.socket) -> bool:
    """Whether the stream ends in RST rather than in FIN; waits for the end."""
    try:
        while sock.recv(1 << 20):
            pass
    except ConnectionResetError:
        return True
    return False


def receive_all(sock: socket.socket) -> bytes:
    """All bytes up to the end of the stream."""
    parts = []
    while data := sock.recv(1 << 20):
        parts.append(data)
    return b"".join(parts)


def send_and_close(sock: socket.socket, data: bytes) -> None:
    """Send all of it, then close."""
    with sock:
        sock.sendall(data)


def fill(sock: socket.socket, pause: float = 0.3) -> int:
    """Send until nobody has taken anything for so many seconds; how many bytes went, no more than FILL_MAX.

    Whoever relays may only be late, on a busy machine: a test that needs the stream to be full takes a longer pause.
    """
    timeout = sock.gettimeout()
    sock.settimeout(pause)
    sent = 0
    try:
        while sent < FILL_MAX:
            sent += sock.send(b"x" * 65536)
        raise AssertionError("nothing holds the sender back")
    except TimeoutError:
        return sent
    finally:
        sock.settimeout(timeout)


@contextmanager
def full_tcp() -> Iterator[str]:
    """The address of a TCP listener that does not accept, and has no room: the kernel drops each SYN."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        where = listener.getsockname()
        with socket.create_connection(where):
            yield f"127.0.0.1:{where[1]}"


# How the reason begins why a test is skipped for want of something that no package brings: REQUIRED=1 lets it pass.
KERNEL = "kernel: "


def skip_for_kernel(lacking: str) -> NoReturn:
    """Skip the test, for want of something in the kernel of this host, or in what its settings allow."""
    pytest.skip(KERNEL + lacking)


def loopback(family: int) -> str:
    """The loopback address; skips the test where there is none."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    try:
        socket.create_server((host, 0), family=socket.AddressFamily(family)).close()
    except OSError as error:
        skip_for_kernel(f"no {host} ({error.strerror})")
    return host


def private_mounts() -> list[str]:
    """The beginning of a command that sees mounts of its own, as root there; skips where that cannot be had."""
    prefix = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    try:
        possible = subprocess.run([*prefix, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("unshare is not here: apt install util-linux")
    if possible.returncode:
        skip_for_kernel(f"no mounts of our own ({possible.stderr.strip()})")
    return prefix


# linux/prctl.h, linux/capability.h
PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
CAPABILITY_VERSION_3, CAPABILITIES_MAX = 0x20080522, 64

LIBC = ctypes.CDLL(None, use_errno=True)


def drop_capabilities() -> None:
    """Take the rights of root from this thread and from what it executes, which stays user 0; as preexec_fn, too.

    A program of root's gets what is in the bounding set, and what is in the inheritable one, as it may be in a
    container (capabilities(7)).
    """
    for capability in range(CAPABILITIES_MAX):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those that no user has, or that there are not
    LIBC.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, none = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    if LIBC.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def can_trace() -> None:
    """Skip the test where strace(1) cannot be used."""
    if not shutil.which("strace"):
        pytest.skip("strace is not here: apt install strace")
    if subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True).returncode:
        skip_for_kernel("nobody may be traced")


class FakeClock:
    """A clock for `Loop` that stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def tasks_of(loop: Loop) -> int:
    """How many tasks are not done, the loop's own one among them."""
    return len(loop._tasks)


def run(
    main: Callable[[Loop], Coroutine[Any, Any, T]],
    clock: Callable[[], float] = time.monotonic,
    patience: float = PATIENCE,
) -> T:
    """Run a coroutine on a loop of its own. Fails if it takes too long, or leaves a task behind."""

    async def bounded(loop: Loop) -> T:
        return await main(loop)

    def too_late(*_: object) -> None:
        # No Exception: the loop would take it for a task's own.
        pytest.fail(f"the loop still runs after {patience} s")

    previous = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, patience)
    try:
        with Loop(clock) as loop:
            before = tasks_of(loop)
            result = loop.run(bounded(loop))
            assert tasks_of(loop) == before, f"{tasks_of(loop) - before} tasks left behind"
            return result
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Backend:
    """A real TCP server in threads: `handler` gets each accepted socket, which is closed after it.

    `accepted` counts; `errors` has what handlers raised. The port stays ours until the test ends, for another one.
    """

    def __init__(
        self, handler: Callable[[socket.socket], object], backlog: int = 1024, port: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self.handler = handler
        self.accepted = 0
        self.errors: list[Exception] = []
        self.host = host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, port or free_port()), family=family, backlog=backlog)
        self.port: int = self.listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._acceptor = self._start(self._accept)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def __enter__(self: B) -> B:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, end what is open, and wait until no descriptor of it is left."""
        # shutdown, since a thread that waits in accept keeps a closed socket listening.
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        deadline = time.monotonic() + PATIENCE
        self._acceptor.join(PATIENCE)  # it may be about to start one more
        for sock in list(self._sockets):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    def _start(self, target: Callable[..., object], *arguments: object) -> threading.Thread:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.settimeout(4 * PATIENCE)  # a handler waits while the test has several waits of its own
            self.accepted += 1
            self._sockets.append(sock)
            self._start(self._handle, sock)

    def _handle(self, sock: socket.socket) -> None:
        with sock:
            try:
                self.handler(sock)
            except Exception as error:
                self.errors.append(error)
        self._sockets.remove(sock)


def echo(sock: socket.socket) -> None:
    """A handler that sends everything back, and ends when the client does."""
    while data := sock.recv(65536):
        sock.sendall(data)


def answer(sock: socket.socket) -> None:
    """A handler that reads one request, if there is one, and sends `ok`."""
    if sock.recv(65536):
        sock.sendall(b"ok")


class Daemon:
    """rspd as a process: `rspd --foreground` with these arguments and its log read as it comes.

    launcher: the beginning of the command, which is to execute the rest.
    pass_fds: what the launcher inherits.
    """

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        limit: tuple[int, int] | None = None,
        wait: bool = True,
        foreground: bool = True,
        launcher: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        stay = ["--foreground"] if foreground else []
        command = [*launcher, sys.executable, "-m", "rspd", *stay, *arguments]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            pass_fds=pass_fds,
            preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)) if limit else None,
        )
        self.pid = self.process.pid
        assert self.process.stderr
        # rspd drops lines that nobody reads, and here a thread reads them that may have to wait for many others.
        # Refused in a user namespace while root's pipes, of other tests too, fill fs.pipe-user-pages-soft (pipe(7)).
        with suppress(PermissionError):
            fcntl.fcntl(self.process.stderr, fcntl.F_SETPIPE_SZ, LOG_SIZE)
        self._rest = b""
        self._reading = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            try:
                self.wait_for("listening address=")
            except AssertionError:  # nobody else knows of it
                self.kill()
                raise

    def _read(self) -> None:
        assert self.process.stderr
        something = select.poll()
        something.register(self.process.stderr, select.POLLIN)
        while True:
            something.poll()
            with self._reading:
                if something.poll(0) and not self._take():  # who looks may have been quicker
                    return

    def _take(self) -> int:
        """Read what is there; the caller holds the lock. Returns the count of bytes, 0 at the end."""
        assert self.process.stderr
        data = os.read(self.process.stderr.fileno(), LOG_SIZE)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data and self._rest:
            lines.append(self._rest)
        self.lines += [line.decode() for line in lines]
        return len(data)

    def _catch_up(self) -> None:
        """Read all that rspd has written until now: who has its answer finds the lines before it."""
        assert self.process.stderr
        with self._reading:
            if not self.process.stderr.closed:
                there = struct.unpack("i", fcntl.ioctl(self.process.stderr, termios.FIONREAD, bytes(4)))[0]
                while there > 0:
                    there -= self._take()

    @property
    def log(self) -> str:
        self._catch_up()
        return "\n".join(self.lines)

    def find(self, pattern: str) -> list[str]:
        """The lines of the log that match."""
        self._catch_up()
        return [line for line in list(self.lines) if re.search(pattern, line)]

    def wait_for(self, pattern: str, count: int = 1, patience: float = PATIENCE) -> list[str]:
        """Wait until the log has so many lines that match, and return them."""

        def found() -> list[str] | None:
            lines = self.find(pattern)
            if len(lines) >= count:
                return lines
            if self.process.poll() is not None and not self._reader.is_alive():
                raise AssertionError(f"rspd ended with {self.process.returncode} and without {pattern!r}:\n{self.log}")
            return None

        try:
            return eventually(found, patience=patience) or []
        except AssertionError:
            raise AssertionError(f"no {count} lines with {pattern!r} in the log:\n{self.log}") from None

    def wait_for_ends(self, count: int) -> list[dict[str, str]]:
        """Wait until so many connections have ended; the fields of their lines, in order."""
        lines = self.wait_for("connection closed", count)
        return [dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line)) for line in lines]

    @property
    def port(self) -> int:
        """The port of the first listener."""
        return int(re.findall(r"listening address=\S+:(\d+)", self.log)[0])

    def connect(self) -> socket.socket:
        """A client."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        sock.settimeout(PATIENCE)
        return sock

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def descriptors(self) -> list[str]:
        """What each descriptor of the process is."""
        folder = f"/proc/{self.pid}/fd"
        found = []
        for name in os.listdir(folder):
            try:
                found.append(os.readlink(f"{folder}/{name}"))
            except FileNotFoundError:
                pass
        return found

    def memory(self) -> int:
        """Resident bytes."""
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def cpu_seconds(self) -> float:
        """CPU time so far."""
        total = 0
        for task in os.listdir(f"/proc/{self.pid}/task"):
            # A thread that looked a name up may end meanwhile.
            with suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{self.pid}/task/{task}/schedstat") as file:
                    total += int(file.read().split()[0])
        return total / 1e9

    def wait(self) -> int:
        """Wait for the process to end by itself; its exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def stop(self) -> int:
        """Send SIGTERM and wait; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Make sure that it has ended, and give back what belongs to it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream
            stream.close()


@contextmanager
def rspd(*arguments: str, listen: Sequence[str] = ("127.0.0.1:0",), **options: Any) -> Iterator[Daemon]:
    """rspd in front of a backend, checked at the end."""
    daemon = Daemon(*(word for address in listen for word in ("-l", address)), *arguments, **options)
    with checked(daemon):
        yield daemon


@contextmanager
def checked(daemon: Daemon) -> Iterator[None]:
    """At the end, rspd stops with 0, unless it has ended before, and no traceback is in its log."""
    try:
        yield
        if daemon.process.poll() is None:
            assert daemon.stop() == 0, daemon.log
        assert "Traceback" not in daemon.log, daemon.log
    finally:
        daemon.kill()
