"""Programs of this host that run in the network of a machine."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import pytest

from tests.peers.programs import listening
from tests.support import PATIENCE, eventually
from tests.system.machine import BOUND, ENVIRONMENT

# The package postgresql brings this user. PostgreSQL refuses to run as root; sshd as root wants folders of the host's.
USER = "postgres"
AS_USER = ["setpriv", "--pdeathsig", "KILL", "--reuid", USER, "--regid", USER, "--clear-groups"]

# Debian's, which has the module websockets; the tests' own has not.
PYTHON = "/usr/bin/python3"

PACKAGES = {
    "curl": "curl",
    "mosquitto": "mosquitto",
    "mosquitto_pub": "mosquitto-clients",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
}


def check_programs() -> None:
    """Skip the test if a program is not there."""
    missing = [package for name, package in PACKAGES.items() if not shutil.which(name, path=ENVIRONMENT["PATH"])]
    if not postgresql_programs():
        missing.append("postgresql")
    if subprocess.run([PYTHON, "-c", "import websockets"], capture_output=True).returncode:
        missing.append("python3-websockets")
    if missing:
        pytest.skip(f"programs are not there: apt install {' '.join(missing)}")


def postgresql_programs() -> str:
    """The folder of PostgreSQL's programs, with a `/` at its end; the newest, empty if there is none."""
    found = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest = max(found, key=lambda path: int(path.parts[-3]), default=None)
    return f"{newest.parent}/" if newest else ""


class Program:
    """A program that runs as an ordinary user, with its lines, those of stderr too, read as they come."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**ENVIRONMENT, "HOME": str(folder)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            # The first process of a namespace, if there is one, is the only child: all others end with it.
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for pid in children or [str(self.process.pid)]:
                os.kill(int(pid), signal.SIGKILL)
        self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self._say_no_more()
        assert self.process.stdout
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def say(self, line: str) -> None:
        """Give it a line to read. If it has ended, `hear` tells."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _say_no_more(self) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # at what it has not read
            self.process.stdin.close()

    def hear(self, pattern: str) -> None:
        """Wait until it has said a line with this at its end."""

        def said() -> bool:
            if any(re.search(rf"(?:{pattern})$", line) for line in list(self.lines)):
                return True
            assert self._reader.is_alive(), "it has ended"
            return False

        try:
            eventually(said)
        except AssertionError as error:
            raise AssertionError(f"{self.process.args!r} without {pattern!r}, {error}: {self.lines[-20:]}") from None

    def end(self, with_signal: int = 0) -> list[str]:
        """Give it nothing more to read, or a signal, and wait until it ends in order; all that it has said."""
        self._say_no_more()
        if with_signal:
            self.process.send_signal(with_signal)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert code == 0, f"{self.process.args!r} ended with {code}: {self.lines[-20:]}"
        return self.lines


# ------------------------------------------------------------------ servers


class Servers:
    """The servers, each with its files below a folder of USER's; nothing is left of them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    def start(self, port: int, *command: str) -> Program:
        """Start a server, and wait until it listens."""
        # Its processes all end with the first one, and so does the shared memory that PostgreSQL asks for.
        server = self._stack.enter_context(Program(self.folder, *BOUND, "--ipc", *AS_USER, *command))

        def listens() -> bool:
            assert server.process.poll() is None, f"{command} ended: {server.lines}"
            return listening(port)

        eventually(listens, f"{command} listens")
        return server

    def write(self, name: str, text: str) -> str:
        """Write a file, and return its path."""
        path = self.folder / name
        path.write_text(text)
        shutil.chown(path, USER)
        return str(path)

    def make(self, *command: str) -> None:
        """Run a command that makes files."""
        made = subprocess.run([*AS_USER, *command], cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True)
        assert made.returncode == 0, f"{command} ended with {made.returncode}: {made.stdout}{made.stderr}"

    def client(self, *command: str) -> Program:
        """Start a client."""
        return self._stack.enter_context(Program(self.folder, *AS_USER, *command))


@contextmanager
def servers() -> Iterator[Servers]:
    """A place for servers, which end with the block."""
    with tempfile.TemporaryDirectory(prefix="rspd-") as folder, ExitStack() as stack:
        user = pwd.getpwnam(USER)
        os.chown(folder, user.pw_uid, user.pw_gid)
        yield Servers(Path(folder), stack)
