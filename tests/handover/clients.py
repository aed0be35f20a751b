"""Real servers and their clients: of each kind one server behind rspd, and a client that goes through it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import socket
import subprocess
import threading
from types import TracebackType

from tests.handover.programs import AS_USER, PYTHON, USER, Program, Servers, postgresql_programs
from tests.support import PATIENCE, Backend
from tests.system.machine import ENVIRONMENT

# By the name of the proxy: where rspd listens, and where the server does.
PORTS = {
    "ssh": (8122, 8022),
    "postgresql": (8132, 8032),
    "websocket": (8142, 8042),
    "mqtt": (8152, 8052),
    "download": (8162, 8062),
}

# ------------------------------------------------------------------ SSH

# Each line has the count, and what was heard last: bytes move all the time, and answers too.
COUNT = """
import select, sys
count, heard = 0, ""
while heard != "end":
    if select.select([sys.stdin], [], [], 0.02)[0]:
        heard = sys.stdin.readline().strip()
    print(count, heard, flush=True)
    count += 1
"""

SSHD = """
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
# The folder is in /tmp, where everybody may write.
StrictModes no
"""


def ssh(servers: Servers) -> Program:
    """A session at an SSH server, in which a counter runs until it hears `end`."""
    listen, port = PORTS["ssh"]
    for name in ("host", "user"):
        servers.make("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{servers.folder}/{name}")
    configuration = servers.write("sshd", SSHD.format(port=port, folder=servers.folder))
    servers.start(port, "/usr/sbin/sshd", "-D", "-e", "-f", configuration)
    options = ["BatchMode=yes", "LogLevel=ERROR", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
    words = ["-F", "none", "-i", f"{servers.folder}/user", "-p", str(listen), *(f"-o{option}" for option in options)]
    return servers.client("ssh", *words, f"{USER}@127.0.0.1", f"{PYTHON} {servers.write('count', COUNT)}")


# ------------------------------------------------------------------ PostgreSQL

# Nothing of it is to outlive the test, on the disk or in shared memory.
POSTGRESQL = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
dynamic_shared_memory_type = mmap
fsync = off
"""


def postgresql(servers: Servers) -> Program:
    """A PostgreSQL server, and psql in a session that is told what to do by lines."""
    port, programs, folder = PORTS["postgresql"][1], postgresql_programs(), servers.folder / "cluster"
    options = ["--no-sync", "--no-locale", "--encoding=UTF8", "--auth=trust", f"--username={USER}"]
    servers.make(f"{programs}initdb", *options, f"--pgdata={folder}")
    configuration = servers.write("postgresql.conf", POSTGRESQL.format(port=port))
    server = servers.start(port, f"{programs}postgres", "-D", str(folder), f"--config-file={configuration}")
    server.hear("ready to accept connections")
    return psql(servers)


def psql(servers: Servers) -> Program:
    """One more session, which ends at the first error."""
    where = ["-h", "127.0.0.1", "-p", str(PORTS["postgresql"][0]), "-U", USER]
    return servers.client(f"{postgresql_programs()}psql", "-XAtq", "-v", "ON_ERROR_STOP=1", *where, "postgres")


# ------------------------------------------------------------------ a websocket

ECHO = """
import asyncio, sys, websockets

async def echo(client):
    async for message in client:
        await client.send(message)

async def main():
    async with websockets.serve(echo, "127.0.0.1", int(sys.argv[1])):
        await asyncio.Future()

asyncio.run(main())
"""

# What it reads is sent many times in one message, and printed when that has come back.
TALK = """
import asyncio, sys, websockets

async def main():
    async with websockets.connect(f"ws://127.0.0.1:{sys.argv[1]}/") as server:
        while line := await asyncio.to_thread(sys.stdin.readline):
            await server.send(line * 5000)
            assert await server.recv() == line * 5000
            print(line, end="", flush=True)

asyncio.run(main())
"""


def websocket(servers: Servers) -> Program:
    """A websocket server that sends all messages back, and a client that says what has come back."""
    listen, port = PORTS["websocket"]
    servers.start(port, PYTHON, servers.write("echo", ECHO), str(port))
    return servers.client(PYTHON, servers.write("talk", TALK), str(listen))


# ------------------------------------------------------------------ MQTT

MOSQUITTO = """
listener {port} 127.0.0.1
allow_anonymous true
log_dest stderr
"""


def mqtt(servers: Servers) -> tuple[Program, Program, Program]:
    """A broker, a client that publishes each line, and one that has subscribed to them."""
    listen, port = PORTS["mqtt"]
    broker = servers.start(port, "mosquitto", "-v", "-c", servers.write("broker", MOSQUITTO.format(port=port)))
    words = ["-h", "127.0.0.1", "-p", str(listen), "-q", "1", "-t", "words"]
    subscriber = servers.client("mosquitto_sub", *words, "-i", "subscriber")
    broker.hear("Sending SUBACK to subscriber")
    publisher = servers.client("mosquitto_pub", *words, "-i", "publisher", "-l")
    return broker, publisher, subscriber


# ------------------------------------------------------------------ a download

BLOCK = 1 << 20
BLOCKS = 2000
SIZE = BLOCK * BLOCKS
TWICE = memoryview(random.Random(19).randbytes(BLOCK) * 2)
RATE = "150M"  # bytes in a second, so that it takes about as long as twenty restarts


class Download:
    """A download of 2 GB by curl, at a steady rate. No more than a share of it comes until more is allowed.

    So it is never over too early: who reads from curl stops there, then curl does, and rspd holds bytes back.
    The content is a block of random bytes again and again, each time from another place on.
    """

    def __init__(self, share: float) -> None:
        listen, port = PORTS["download"]
        self.received = 0
        self._sent, self._found = hashlib.sha256(), hashlib.sha256()
        self._more = threading.Condition()
        self._allowed = int(SIZE * share)
        self._server = Backend(self._send, port=port)
        command = [*AS_USER, "curl", "-q", "-sS", "--limit-rate", RATE, "--noproxy", "*", f"http://127.0.0.1:{listen}/"]
        self._curl = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd="/", env=ENVIRONMENT
        )
        self._reader = threading.Thread(target=self._receive, daemon=True)
        self._reader.start()

    def __enter__(self) -> Download:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.allow(1)
        self._curl.kill()
        self._curl.wait()
        self._reader.join(PATIENCE)
        self._server.close()
        assert self._curl.stdout
        self._curl.stdout.close()

    def _send(self, sock: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            part = sock.recv(65536)
            assert part, f"an end after {request!r}"
            request += part
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % SIZE)
        for number in range(BLOCKS):
            start = number * 7919 % BLOCK
            block = TWICE[start : start + BLOCK]
            self._sent.update(block)
            sock.sendall(block)

    def _receive(self) -> None:
        assert self._curl.stdout
        fd = self._curl.stdout.fileno()
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, BLOCK)
        while part := os.read(fd, BLOCK):
            self._found.update(part)
            with self._more:
                self.received += len(part)
                self._more.wait_for(lambda: self.received < self._allowed or self._allowed == SIZE)

    def allow(self, share: float) -> None:
        """Let this share of it come."""
        with self._more:
            self._allowed = int(SIZE * share)
            self._more.notify()

    def end(self) -> str:
        """Wait for the end: `complete`, or what else."""
        self._reader.join(2 * PATIENCE)
        assert not self._reader.is_alive(), f"the download goes on after {self.received} bytes"
        code = self._curl.wait(PATIENCE)
        same = self._found.digest() == self._sent.digest() and self.received == SIZE
        return "complete" if code == 0 and same else f"{code} after {self.received} bytes"
