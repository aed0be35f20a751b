"""The ways to restart a proxy while it serves: as systemd and Debian's packages do it, and as its manual advises."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench import counters, peers
from bench.peers import HAProxy, Nginx, Peer, PeerError, Place, Rspd
from bench.store import Store, hand_over

PATIENCE = 10.0
STOP = 5.0  # seconds that what is stopped has for each signal: TimeoutStopSec= of Debian's nginx.service
LOOK = 0.002


def eventually(holds: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Wait until something holds. Returns whether it does."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK)
    return True


@dataclass
class Way:
    """A contestant, and a way to restart it. This one stops it and starts it again.

    told: what the way is, for the table. stop: the signals, one after the other while it still runs.
    to_all: each goes to all processes of the service (KillMode=control-group), otherwise to the first one, and what
    is left then is killed (mixed). keep: the others are left alone (process).
    """

    name: str
    peer: Peer
    told: str
    stop: Sequence[signal.Signals] = (signal.SIGTERM,)
    to_all: bool = True
    keep: bool = False
    main: int = 0
    leaders: set[int] = field(default_factory=set)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def prepare(self, place: Place, held: socket.socket, output: int, cpus: set[int]) -> None:
        """What is needed at each start. The port is that of `held`."""
        self.place, self.held, self.output, self.cpus = place, held, output, cpus

    def command(self) -> list[str]:
        """What is run."""
        return self.peer.command(self.place)

    def start(self) -> None:
        """Start the first process."""
        command, stdin = self.command(), subprocess.DEVNULL
        if self.peer.passed:
            command, stdin = ["sh", "-c", peers.PASS_SOCKET, "sh", *command], self.held.fileno()
        child = peers.start(command, stdin, self.output, self.peer, self.cpus)
        self.children.append(child)
        self.main = child.pid
        self.leaders.add(child.pid)

    def pids(self) -> list[int]:
        """All processes of the contestant that live, of whatever age."""
        for child in self.children:
            child.poll()
        found = counters.sessions(self.leaders)
        self.leaders.intersection_update(found.values())  # whose session has ended may soon be somebody else's number
        return list(found)

    def restart(self) -> bool:
        """Restart it. Returns whether another process serves new connections then."""
        before = self.main
        self._stop()
        self.start()
        return self.main != before

    def _stop(self) -> None:
        for number in self.stop:
            for pid in self.pids() if self.to_all else [self.main]:
                send(pid, number)
            if eventually(lambda: self.main not in self.pids(), STOP):
                break
        if not self.keep:
            self.kill()

    def kill(self) -> None:
        """Nothing of it lives afterwards."""
        for pid in self.pids():
            send(pid, signal.SIGKILL)
        eventually(lambda: not self.pids())

    def close(self) -> None:
        """The end of the contestant."""
        self.kill()


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to who may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class RspdRestart(Way):
    """rspd under its unit: it leaves its connections in the descriptor store, and the next process takes them."""

    def prepare(self, place: Place, held: socket.socket, output: int, cpus: set[int]) -> None:
        """The store outlives the processes."""
        super().prepare(place, held, output, cpus)
        self._store = Store(place.folder)

    def command(self) -> list[str]:
        """As a service, not in the foreground."""
        return [word for word in super().command() if word != "--foreground"]

    def start(self) -> None:
        """As systemd starts it."""
        assert isinstance(self.peer, Rspd)
        self.main = self._store.start(self.command(), peers.environment(self.peer.tree), self.output)
        os.sched_setaffinity(self.main, self.cpus)
        self.leaders.add(self.main)
        if not self._store.wait(PATIENCE):
            raise PeerError("is not ready")

    def restart(self) -> bool:
        """As systemd restarts it."""
        before = self.main
        code = hand_over(before, 90.0)
        if code != 0:
            raise PeerError(f"expected exit code 0 of the old process, found {code}")
        self.start()
        return True

    def close(self) -> None:
        """Also of the store."""
        super().close()
        self._store.close()
        with suppress(ChildProcessError):
            os.waitpid(self.main, 0)


class HAProxyReload(Way):
    """HAProxy with a master, which gets SIGUSR2: its program is loaded again, and the old worker serves its own."""

    def command(self) -> list[str]:
        """In the foreground, with a master (by its settings)."""
        return [self.peer.path or "", "-f", settings(self.place, "haproxy-reload.cfg")]

    def restart(self) -> bool:
        """What ExecReload= of Debian's haproxy.service does."""
        return self.another(lambda: send(self.main, signal.SIGUSR2))

    def another(self, change: Callable[[], None]) -> bool:
        """Returns whether there is a process afterwards that was not there before."""
        before = set(self.pids())
        change()
        return eventually(lambda: set(self.pids()) - before)


class HAProxyRestart(HAProxyReload):
    """The same, stopped and started."""

    def restart(self) -> bool:
        """As systemd does by Debian's unit."""
        return Way.restart(self)


class NginxReload(HAProxyReload):
    """nginx as a daemon, whose master gets SIGHUP: a new worker, and the old one serves its own."""

    def command(self) -> list[str]:
        """It becomes a daemon by its settings."""
        module = f"load_module {Nginx.MODULE};" if Nginx.MODULE.exists() else ""
        return [self.peer.path or "", "-c", settings(self.place, "nginx-upgrade.conf", MODULE=module)]

    def start(self) -> None:
        """What was started ends; its pid file says who goes on."""
        super().start()
        if self.children[-1].wait(PATIENCE) or not eventually(self._is_daemon):
            raise PeerError("has not become a daemon")
        self.main = self.pid_of("nginx.pid")
        self.leaders.add(self.main)

    def _is_daemon(self) -> bool:
        # Debian's nginx writes the file before the daemon has a session of its own.
        pid = self.pid_of("nginx.pid")
        with suppress(ProcessLookupError):
            return pid != 0 and os.getsid(pid) == pid
        return False

    def pid_of(self, name: str) -> int:
        """What a pid file says; 0 if it says nothing."""
        with suppress(OSError, ValueError):
            return int(Path(self.place.folder, name).read_text())
        return 0

    def restart(self) -> bool:
        """What ExecReload= of Debian's nginx.service does."""
        return self.another(lambda: send(self.main, signal.SIGHUP))


class NginxUpgrade(NginxReload):
    """nginx as a daemon, whose program is replaced: SIGUSR2, and SIGQUIT to the old master."""

    def restart(self) -> bool:
        """What Debian's package does at an upgrade (`/etc/init.d/nginx upgrade`), which checks no more than this."""
        before = self.pid_of("nginx.pid")
        send(before, signal.SIGUSR2)
        if not eventually(lambda: self.pid_of("nginx.pid") and self.pid_of("nginx.pid.oldbin")):
            return False
        time.sleep(0.2)  # the new master has a worker then
        send(self.pid_of("nginx.pid.oldbin"), signal.SIGQUIT)
        self.main = self.pid_of("nginx.pid")
        return self.main != before


class NginxRestart(NginxReload):
    """The same, stopped and started."""

    def restart(self) -> bool:
        """As systemd does by Debian's unit."""
        return Way.restart(self)


def settings(place: Place, template: str, **values: object) -> str:
    """Fill in the settings of a contestant that is restarted."""
    return place.settings(template, BACKEND=place.backend, **values)


def ways(python: str) -> list[Way]:
    """All of them, whether their programs are here or not."""
    found = {peer.name: peer for peer in peers.contestants(python, None)}
    rspd, nginx, haproxy = found[peers.RSPD], found[peers.NGINX], found[peers.HAPROXY]
    assert isinstance(nginx, Nginx)
    assert isinstance(haproxy, HAProxy)
    passed, socat, rinetd = found[peers.SOCKET_PROXYD_NAME], found[peers.SOCAT], found["rinetd"]
    at_once = signal.SIGTERM
    return [
        RspdRestart("rspd", rspd, "`systemctl restart`: handover"),
        HAProxyReload("haproxy, reload", haproxy, "`systemctl reload`: SIGUSR2, the socket is passed on"),
        NginxReload("nginx, reload", nginx, "`systemctl reload`: SIGHUP, the program stays the old one"),
        NginxUpgrade("nginx, upgrade", nginx, "`/etc/init.d/nginx upgrade`: SIGUSR2, then SIGQUIT to the old master"),
        HAProxyRestart("haproxy, restart", haproxy, "`systemctl restart`: SIGTERM", to_all=False),
        NginxRestart(
            "nginx, restart",
            nginx,
            "`systemctl restart`: SIGQUIT, SIGTERM after 5 s",
            stop=(signal.SIGQUIT, at_once),
            to_all=False,
        ),
        Way("socket-proxyd", passed, "`systemctl restart`, its socket unit goes on"),
        Way("rinetd", rinetd, "`systemctl restart`"),
        Way("socat", socat, "`systemctl restart`"),
        Way("socat, kept", socat, "`systemctl restart`, with `KillMode=process`", to_all=False, keep=True),
    ]
