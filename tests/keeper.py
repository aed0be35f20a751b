"""The service manager's descriptor store, and restarts with it, without a service manager."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tests.manager import NotifySocket, Service
from tests.support import eventually

# Seconds of a timeout that pass before a restart, and that a connection may end late: fewer, so that a timeout that
# begins anew after the restart is found.
BEFORE, LATE = 1.5, 1.3


class Stored:
    """A descriptor in the store."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


class Store(NotifySocket):
    """A notify socket that also keeps descriptors by their names, as systemd does.

    room: FileDescriptorStoreMax=.
    """

    def __init__(self, folder: str, room: int = 512) -> None:
        self.room = room
        self.kept: list[tuple[str, Stored]] = []
        self._lock = threading.Lock()  # messages come in a thread of their own
        super().__init__(folder)

    def receive(self) -> bytes:
        data, ancillary, _, _ = self.sock.recvmsg(65536, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC)
        fds = [fd for _, _, rights in ancillary for fd in struct.unpack(f"{len(rights) // 4}i", rights)]
        fields = dict(line.split("=", 1) for line in data.decode("ascii").split("\n") if "=" in line)
        name = fields.get("FDNAME", "stored")
        if "FDSTORE" in fields:
            with self._lock:
                for fd in fds[: max(0, self.room - len(self.kept))]:
                    self.kept.append((name, Stored(fd)))
                    fds.remove(fd)
        if "FDSTOREREMOVE" in fields:
            self.remove(name)
        for fd in fds:  # of a barrier, or without room
            os.close(fd)
        return data

    def remove(self, name: str) -> None:
        """Close what has this name."""
        with self._lock:
            gone = [stored for other, stored in self.kept if other == name]
            self.kept = [entry for entry in self.kept if entry[0] != name]
        for stored in gone:
            os.close(stored.fileno())

    def clear(self) -> None:
        """Close everything, as at the end of the service."""
        for name in {name for name, _ in self.kept}:
            self.remove(name)

    def close(self) -> None:
        """Take no more, and close everything."""
        super().close()
        self.clear()


class Manager:
    """rspd as a service that can be restarted. `daemon` is the process that runs."""

    def __init__(self, store: Store, arguments: Sequence[str], options: Mapping[str, Any]) -> None:
        self.store = store
        self._arguments = arguments
        self._options = options
        self.daemons: list[Service] = []
        self.daemon = self.start()

    def start(self, wait: bool = True, **options: Any) -> Service:
        """Start the next process, with what is stored. options: in place of those that the service has."""
        count = len(self.store.with_field("READY=1"))
        given = {"sockets": {}, **self._options, **options}
        self.daemon = Service(self.store, *self._arguments, stored=self.store.kept, wait=False, **given)
        self.daemons.append(self.daemon)
        if wait:
            self.store.wait_for("READY=1", count + 1)
            self.daemon.wait_for("listening address=")  # what it has taken over is in the log before
        return self.daemon

    def begin_to_stop(self) -> Service:
        """Tell the process to hand over. Returns it."""
        self.daemon.signal(signal.SIGURG)
        self.daemon.signal(signal.SIGTERM)
        return self.daemon

    def stop(self) -> Service:
        """Let the process hand over, and end. Returns it."""
        daemon = self.begin_to_stop()
        assert daemon.wait() == 0, daemon.log
        return daemon

    def restart(self, **options: Any) -> Service:
        """Restart the service. Returns the process before. options: as for `start`."""
        before = self.stop()
        self.start(**options)
        return before

    @property
    def names(self) -> list[str]:
        """Of all that is stored, each once, without the numbers of a listener."""
        return sorted({re.sub(r"-[\d-]+$", "-", name) for name, _ in self.store.kept})


def in_time(end: Mapping[str, str], timeout: float, came: float, waits: float, back: float) -> bool:
    """Whether a client was there for a timeout that went on over a restart: by rspd's clock, whenever the test looks.

    end: its line. came, waits: when it had not come yet, and when its timeout had begun. back: when the next process
    was there. If that is later than the timeout, the client ends then.
    """
    return timeout <= float(end["seconds"]) < max(waits + timeout, back) - came + LATE


@contextmanager
def managed(*arguments: str, room: int = 512, **options: Any) -> Iterator[Manager]:
    """rspd as a service that can be restarted, checked at the end: it stops, and nothing is left in the store."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, room)
        try:
            manager = Manager(store, arguments, options)
            yield manager
            if manager.daemon.process.poll() is None:
                assert manager.daemon.stop() == 0, manager.daemon.log
            for daemon in manager.daemons:
                assert "Traceback" not in daemon.log, daemon.log
            eventually(lambda: not store.kept, "the process that has ended leaves nothing")
        finally:
            for daemon in manager.daemons:
                daemon.kill()
            store.close()
