"""A host of which a test has the journal and syslog: rspd is started there from a shell, and found again."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support import PATIENCE, eventually, private_mounts

ENTER = """
: > "$1/dev/null"
mount --bind /dev/null "$1/dev/null"
mount --rbind "$1/dev" /dev
mount --rbind "$1/run" /run
shift
exec "$@"
"""


class Journal:
    """What listens where journald does. `streams` has what each connection sent, as it comes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True)
        self.streams: list[bytearray] = []
        self.connections: list[socket.socket] = []
        self.ended = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            stream = bytearray()
            self.streams.append(stream)
            self.connections.append(sock)
            thread = threading.Thread(target=self._read, args=(sock, stream))
            self._threads.append(thread)
            thread.start()

    def _read(self, sock: socket.socket, stream: bytearray) -> None:
        with sock:
            while data := sock.recv(65536):
                stream.extend(data)
        self.ended += 1

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()

    @property
    def header(self) -> bytes:
        """The seven lines that the only connection began with."""
        (stream,) = self.streams
        return b"".join(bytes(stream).splitlines(keepends=True)[:7])

    @property
    def lines(self) -> list[str]:
        """What the only connection, if there is one, has logged."""
        assert len(self.streams) <= 1
        return [line for stream in self.streams for line in bytes(stream).decode().splitlines()[7:]]

    def wait_for(self, pattern: str) -> str:
        """The first line that matches."""
        return eventually(lambda: next((line for line in self.lines if re.search(pattern, line)), ""), pattern)


class Syslog:
    """What listens where a syslog daemon does. `datagrams` has what came."""

    def __init__(self, path: Path) -> None:
        self.datagrams: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._path = path
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while data := self._sock.recv(65536):
            self.datagrams.append(data.decode())

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", str(self._path))
        self._thread.join(PATIENCE)
        self._sock.close()

    def wait_for(self, pattern: str) -> str:
        """The first line that matches."""
        return eventually(lambda: next((line for line in self.datagrams if re.search(pattern, line)), ""), pattern)


class Host:
    """Its /run and /dev are folders of the test's. What was started there and still runs is killed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal: Journal | None = None
        self.syslog: Syslog | None = None
        self._prefix = private_mounts()
        self._mark = f"RSPD_TEST={uuid.uuid4()}"
        for name in ("dev", "run"):
            (folder / name).mkdir()

    def with_journal(self) -> Journal:
        self.journal = Journal(self.folder / "run/systemd/journal/stdout")
        return self.journal

    def with_syslog(self) -> Syslog:
        self.syslog = Syslog(self.folder / "dev/log")
        return self.syslog

    def close(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)
        for server in (self.journal, self.syslog):
            if server:
                server.close()

    def command(self, *arguments: str, code: str = "") -> list[str]:
        """The command that starts rspd there, or Python with this code."""
        program = [sys.executable, *(["-c", code] if code else ["-m", "rspd"])]
        return [*self.inside, *program, *arguments]

    @property
    def inside(self) -> list[str]:
        """The beginning of a command that is run there."""
        return [*self._prefix, "sh", "-ec", ENTER, "sh", str(self.folder)]

    @property
    def env(self) -> dict[str, str]:
        name, _, value = self._mark.partition("=")
        return {**os.environ, name: value}

    def start(
        self,
        *arguments: str,
        code: str = "",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Start rspd as from a shell, and wait until that returns and nobody has its output open any more."""
        return subprocess.run(
            [*launcher, *self.command(*arguments, code=code)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**self.env, **(env or {})},
            pass_fds=pass_fds,
            timeout=PATIENCE,
            check=False,
        )

    def processes(self) -> list[int]:
        """Whatever was started there and runs."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if self._mark.encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
            except OSError:
                pass  # has ended, or is another user's
        return found

    def daemon(self) -> int:
        """The one process that runs there, once those that became it have ended."""

        def only() -> int:
            found = self.processes()
            return found[0] if len(found) == 1 else 0

        return eventually(only, "one process is left")


def wait_for_end(pid: int) -> None:
    """Of a process that need not be our child."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], PATIENCE)[0], f"process {pid} has not ended"
    finally:
        os.close(fd)


@contextmanager
def new_host() -> Iterator[Host]:
    """In a folder with a short name, which a socket's path needs."""
    with tempfile.TemporaryDirectory() as name:
        host = Host(Path(name))
        try:
            yield host
        finally:
            host.close()
