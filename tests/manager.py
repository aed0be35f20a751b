"""The service manager's part, without one: passing sockets, and being told how the service does."""

from __future__ import annotations

import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from tests.support import PATIENCE, Daemon, checked, eventually

# In a variable's value: the number of the process that is started.
OWN_PID = "$$"

LAUNCHER = """
import fcntl, os, sys
given = [int(number) for number in sys.argv[1].split()]
copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in given]
for fd in given:
    os.set_inheritable(fd, False)
for place, copy in enumerate(copies, 3):
    os.dup2(copy, place)
for name, value in os.environ.items():
    if value == "$$":
        os.environ[name] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""


class HasFileno(Protocol):
    def fileno(self) -> int: ...


def launch(command: Sequence[str], passed: Sequence[HasFileno]) -> tuple[list[str], list[int]]:
    """The command that places what is passed from descriptor 3 on and fills in OWN_PID; and what it is to inherit."""
    numbers = [item.fileno() for item in passed]
    return [sys.executable, "-IS", "-c", LAUNCHER, " ".join(map(str, numbers)), *command], numbers


def listen_variables(names: Sequence[str]) -> dict[str, str]:
    """What tells a service of sockets by these names."""
    if not names:
        return {}
    return {"LISTEN_PID": OWN_PID, "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}


class Message(NamedTuple):
    """What arrived, and when."""

    text: str
    when: float

    @property
    def fields(self) -> dict[str, str]:
        return dict(re.findall(r"^(\w+)=(.*)$", self.text, re.MULTILINE))

    @property
    def status(self) -> str:
        return self.fields.get("STATUS", "")


class NotifySocket:
    """A notify socket, and its messages as they come."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/notify"
        self.messages: list[Message] = []
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.path)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        while data := self.receive():
            self.messages.append(Message(data.decode("ascii"), time.monotonic()))

    def receive(self) -> bytes:
        """The next message."""
        return self.sock.recv(65536)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self.path)
        self._thread.join(PATIENCE)
        self.sock.close()

    @property
    def env(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.path}

    @property
    def status(self) -> str:
        """The last there was."""
        return next((message.status for message in reversed(self.messages) if message.status), "")

    def with_field(self, field: str) -> list[Message]:
        """Messages that assign it, or that assign it just so (`READY`, `READY=1`)."""
        return [m for m in list(self.messages) if field in m.fields or field in m.text.split("\n")]

    def wait_for(self, field: str, count: int = 1) -> list[Message]:
        """Wait for so many messages with a field."""
        return self._wait(lambda: self.with_field(field), count, field)

    def wait_for_status(self, pattern: str, count: int = 1) -> list[Message]:
        """Wait for so many messages whose status matches as a whole."""
        return self._wait(lambda: [m for m in list(self.messages) if re.fullmatch(pattern, m.status)], count, pattern)

    def _wait(self, find: Callable[[], list[Message]], count: int, what: str) -> list[Message]:
        try:
            eventually(lambda: len(find()) >= count)
        except AssertionError:
            raise AssertionError(f"no {count} messages with {what!r}: {self.messages}") from None
        return find()


@contextmanager
def notify_socket() -> Iterator[NotifySocket]:
    """One, for as long as needed. In a folder with a short name, which a socket's path needs."""
    with tempfile.TemporaryDirectory() as folder:
        server = NotifySocket(folder)
        try:
            yield server
        finally:
            server.close()


def tcp_listener(host: str = "127.0.0.1", backlog: int = 128) -> socket.socket:
    """A listening socket as systemd makes it: blocking, and for both families where the host is `::`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    sock.listen(backlog)
    return sock


def unix_listener(name: str, backlog: int = 128) -> socket.socket:
    """The same at a path, or an abstract name that begins with a null byte."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(name)
    sock.listen(backlog)
    return sock


class Service(Daemon):
    """rspd as systemd starts it: without `--foreground`, with a notify socket and passed sockets by their names."""

    def __init__(
        self,
        notify: NotifySocket,
        *arguments: str,
        sockets: Mapping[str, HasFileno],
        stored: Sequence[tuple[str, HasFileno]] = (),
        env: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.notify = notify
        passed = [*sockets.items(), *stored]
        command, pass_fds = launch(launcher, [one for _, one in passed])
        super().__init__(
            *arguments,
            env={**notify.env, **listen_variables([name for name, _ in passed]), **(env or {})},
            launcher=command,
            pass_fds=pass_fds,
            foreground=False,
            **options,
        )


@contextmanager
def service(
    *arguments: str, listen: Sequence[str] = (), sockets: Mapping[str, HasFileno] | None = None, **options: Any
) -> Iterator[Service]:
    """rspd under a service manager, checked at the end."""
    words = [word for address in listen for word in ("-l", address)]
    with notify_socket() as notify:
        daemon = Service(notify, *words, *arguments, sockets=sockets or {}, **options)
        with checked(daemon):
            yield daemon
