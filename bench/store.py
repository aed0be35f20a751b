"""What systemd does for rspd at a restart, without systemd: a notify socket that keeps descriptors (sd_notify(3))."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

MESSAGE, DESCRIPTORS = 65_536, 253  # the most of a message (unix(7), SCM_RIGHTS)
FIRST = 3  # where passed descriptors begin (sd_listen_fds(3))
ABOVE = 1000  # numbers of what is kept: none of them is in the way of those that are passed

# The process that is started knows its own number. The shell becomes that process.
OWN_PID = 'export LISTEN_PID=$$; exec "$@"'


class Store:
    """The descriptors that a service has left, by name, and whether its process is ready."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "notify")
        self._kept: list[tuple[str, int]] = []
        self._ready = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        room = socket.CMSG_SPACE(DESCRIPTORS * struct.calcsize("i"))
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
            if not data:
                return
            fields = dict(line.split("=", 1) for line in data.decode().split("\n") if "=" in line)
            fds = [fd for _, _, rights in ancillary for fd in struct.unpack(f"{len(rights) // 4}i", rights)]
            name = fields.get("FDNAME", "stored")
            if "FDSTORE" in fields:
                self._kept += [(name, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ABOVE)) for fd in fds]
            elif "FDSTOREREMOVE" in fields:
                self._forget(name)
            for fd in fds:  # that of a barrier too: whoever waits for it goes on
                os.close(fd)
            if fields.get("READY") == "1":
                self._ready.set()

    def _forget(self, name: str | None) -> None:
        for other, fd in self._kept:
            if name in (None, other):
                os.close(fd)
        self._kept = [(other, fd) for other, fd in self._kept if name not in (None, other)]

    def start(self, command: Sequence[str], environment: Mapping[str, str], output: int) -> int:
        """Start the service's process in a session of its own, with all that is kept. Returns its number."""
        self._ready.clear()
        names = [name for name, _ in self._kept]
        passed = {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)} if names else {}
        return os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", OWN_PID, "sh", *command],
            {**environment, **passed, "NOTIFY_SOCKET": self._path},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output, 1),
                (os.POSIX_SPAWN_DUP2, output, 2),
                *((os.POSIX_SPAWN_DUP2, fd, FIRST + place) for place, (_, fd) in enumerate(self._kept)),
            ],
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )

    def wait(self, seconds: float) -> bool:
        """Wait until the process is ready. Returns whether it is."""
        return self._ready.wait(seconds)

    def close(self) -> None:
        """Keep nothing any more, as systemd at the end of a service."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self._path)
        self._thread.join()
        self._socket.close()
        self._forget(None)


def hand_over(process: int, seconds: float) -> int | None:
    """Tell a process of rspd that it is restarted, as its unit does. Returns its exit code; None if it stays."""
    os.kill(process, signal.SIGURG)
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None
