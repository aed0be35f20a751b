"""`rspd upgrade`: a process executes the program anew in its place, where no service manager starts the next one.

The command listens at a socket whose name has the number of the process, and sends SIGURG, which is ignored by default.
The process connects, and answers there; or the program does, once it has been executed and is at work. If nobody
listens, SIGURG has its other meaning: systemd restarts the service.
"""

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from rspd.errors import StartError
from rspd.host.detach import Starter, wait_for_release
from rspd.host.store import STORE_MAX
from rspd.host.systemd import FIRST_SOCKET, STORED, PassedSocket

# A version that does not know it ignores it. At a restart of the service, SIGTERM follows.
UPGRADE_OR_RESTART = signal.SIGURG

# The names that the new program finds, besides those of a store: the command, and the pid file.
COMMAND, PID_FILE = "command", "pid-file"

# An option that goes with --check. A version that could not take over does not know it.
CAN_TAKE_OVER = "--can-take-over"

# Seconds that a process has to answer the signal.
PATIENCE = 10.0

CREDENTIALS = struct.Struct("3i")  # struct ucred (unix(7)): pid, uid, gid

STDERR = 2


class Program(NamedTuple):
    """How this process was started: its program, its arguments, and the folder that their paths begin in."""

    executable: str
    arguments: Sequence[str]
    folder: str

    @classmethod
    def of_this_process(cls) -> "Program":
        """To be called before the process changes its folder."""
        try:
            folder = os.getcwd()
        except OSError:
            folder = "/"  # it is gone
        return cls(sys.executable, sys.orig_argv, folder)

    def check(self, report: int) -> int:
        """Begin to check the configuration with it. Returns the number of the new process. Raises OSError.

        report: a file for what the check says on stderr.
        """
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the kernel keeps no exit code of the check
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            return os.posix_spawn(
                self.executable,
                [*self.arguments, "--check", CAN_TAKE_OVER],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, report, STDERR),
                ],
            )
        finally:
            os.chdir(here)


class Successor:
    """What this process leaves to the program that it executes in its place; as systemd's store, see `Notifier`.

    pid_file: the descriptor of the pid file, or -1; its lock goes on.
    command: who asked for it, and waits for an answer; None if nobody has.
    """

    def __init__(self, program: Program, passed: Sequence[PassedSocket]) -> None:
        """passed: the sockets that were passed to this process; they go on."""
        self.program = program
        self._passed = passed
        # Copies are above all places in which the new program finds descriptors.
        self._above = FIRST_SOCKET + STORE_MAX + len(passed)
        self._kept: list[tuple[str, int]] = []  # each with the name that the new program finds
        self.pid_file = -1
        self.command: Starter | None = None

    def store(self, name: str, fds: Sequence[int], poll: bool = True) -> bool:
        """Keep copies of these descriptors. Raises OSError."""
        for fd in fds:
            self._keep(STORED + name, fd)
        return True

    def _keep(self, name: str, fd: int) -> None:
        self._kept.append((name, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self._above)))

    def remove(self, name: str) -> bool:
        """Close what is kept with this name."""
        for kept, fd in self._kept:
            if kept == STORED + name:
                os.close(fd)
        self._kept = [entry for entry in self._kept if entry[0] != STORED + name]
        return True

    def barrier(self, fd: int) -> bool:
        """Nothing is to be waited for: the caller closes the only copy."""
        return True

    def prepare(self, command: Starter) -> None:
        """Keep what goes on besides connections and listeners. Raises OSError."""
        self.command = command
        self.store(COMMAND, [command.fd])
        if self.pid_file >= 0:
            self.store(PID_FILE, [self.pid_file])
        for name, sock in self._passed:
            self._keep(name, sock.fileno())

    def clear(self) -> None:
        """Close all that is kept: this process goes on."""
        while self._kept:
            os.close(self._kept.pop()[1])
        self.command = None

    def execute(self) -> NoReturn:
        """Execute the program. Only what is kept stays open, and the log. Raises OSError: then this one has to end."""
        names = [name for name, _ in self._kept]
        for place, (_, fd) in enumerate(self._kept, FIRST_SOCKET):
            os.dup2(fd, place)
        environment = {
            **os.environ,
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(names)),
            "LISTEN_FDNAMES": ":".join(names),
        }
        os.chdir(self.program.folder)
        os.execve(self.program.executable, list(self.program.arguments), environment)


# The process


def who_asks() -> Starter | None:
    """The command that waits for this process's answer; None if SIGURG did not come from one."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(_name(os.getpid()))
            _, uid, _ = CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
            return Starter(sock.detach()) if uid in (0, os.geteuid()) else None
    except OSError:
        return None


# The command


def ask(pid: int) -> NoReturn:
    """Ask a process to execute its program anew, say its answer, and exit as it says. Raises StartError."""
    try:
        with open(f"/proc/{pid}/status") as status:
            caught = next((line.split()[1] for line in status if line.startswith("SigCgt:")), "0")
        known = int(caught, 16) >> (UPGRADE_OR_RESTART - 1) & 1
    except (FileNotFoundError, ProcessLookupError):
        raise StartError(f"process {pid}: there is none; is rspd running?", os.EX_UNAVAILABLE) from None
    if not known:
        raise StartError(f"process {pid}: it is not rspd, or a version that cannot be upgraded so", os.EX_UNAVAILABLE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(_name(pid))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise StartError(f"process {pid}: another command upgrades it just now", os.EX_TEMPFAIL) from None
        listener.listen()
        try:
            os.kill(pid, UPGRADE_OR_RESTART)
        except PermissionError:
            raise StartError(f"process {pid}: it belongs to another user; run this as root", os.EX_NOPERM) from None
        answer = _answer(listener, pid)
    wait_for_release(answer.detach(), f"process {pid} ended; its log may say why")


def _answer(listener: socket.socket, pid: int) -> socket.socket:
    """The connection of the process. Raises StartError."""
    until = time.monotonic() + PATIENCE
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while poll.poll(max(0.0, until - time.monotonic()) * 1000):
        sock, _ = listener.accept()
        peer, _, _ = CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        if peer == pid:
            return sock
        sock.close()
    reason = f"it has not answered for {PATIENCE:g} seconds; it hangs, or its version cannot do it"
    raise StartError(f"process {pid}: {reason}", os.EX_UNAVAILABLE)


def _name(pid: int) -> str:
    """The name of the command's socket, in the abstract namespace (unix(7))."""
    return f"\0rspd-upgrade-{pid}"
