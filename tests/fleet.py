"""Several backends, their configuration, and clients that tell which of them they got."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support import PATIENCE, Backend, Daemon, echo, free_port, receive_all, rspd

REPOSITORY = Path(__file__).resolve().parent.parent


class File:
    """A configuration file. Keys are as in rspd.yaml(5), and stay until they are given anew, or dropped by None."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.path = folder / "rspd.yaml"
        self.keys: dict[str, Any] = {"listen": "127.0.0.1:0", "max_connections": 1000}
        self.write(**keys)

    def write(self, **keys: Any) -> None:
        self.keys = {key: value for key, value in {**self.keys, **keys}.items() if value is not None}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.keys))  # JSON is YAML
        os.replace(new, self.path)

    def reload(self, daemon: Daemon, **keys: Any) -> None:
        """Write the file, have it read, and wait until it is in force."""
        self.write(**keys)
        count = len(daemon.find("reloaded"))
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("reloaded", count + 1)

    @contextmanager
    def rspd(self, **options: Any) -> Iterator[Daemon]:
        with rspd("-c", str(self.path), listen=(), **options) as daemon:
            yield daemon


def tells(name: str) -> Callable[[socket.socket], object]:
    """A handler that sends its name, and closes."""
    return lambda sock: sock.sendall(name.encode())


def stays(name: str) -> Callable[[socket.socket], object]:
    """A handler that sends its name, then everything back, until the client ends."""

    def handle(sock: socket.socket) -> None:
        sock.sendall(name.encode())
        echo(sock)

    return handle


@contextmanager
def backends(*handlers: Callable[[socket.socket], object]) -> Iterator[list[Backend]]:
    """Backends with these handlers."""
    with ExitStack() as stack:
        yield [stack.enter_context(Backend(handler)) for handler in handlers]


def ask(daemon: Daemon, source: str = "127.0.0.1") -> str:
    """The name of the backend that a client from this address gets, which `tells` it; empty if it gets none."""
    where = ("127.0.0.1", daemon.port)
    with socket.create_connection(where, PATIENCE, (source, 0)) as client:
        return receive_all(client).decode()


def enter(daemon: Daemon) -> tuple[str, socket.socket]:
    """A client of a backend that `stays`, and the backend's name, of one letter."""
    client = daemon.connect()
    return client.recv(1).decode(), client


def talks(client: socket.socket) -> bool:
    """Whether what the client sends comes back."""
    client.sendall(b"hello")
    return client.recv(5, socket.MSG_WAITALL) == b"hello"


ESTABLISHED, SYN_SENT = "01", "02"


def connections(daemon: Daemon, port: int, state: str = SYN_SENT) -> int:
    """How many connections to this port of an IPv4 address there are; by default those that are being dialled."""
    with open(f"/proc/{daemon.pid}/net/tcp") as file:
        rows = [line.split() for line in file][1:]
    # The file is read in parts, and meanwhile others open and close sockets: the kernel may list one twice.
    return len({row[1] for row in rows if row[3] == state and int(row[2].rpartition(":")[2], 16) == port})


class BackendProcess:
    """A backend that may be killed: answers each client that sent a byte with `ok`. Starts on the same port again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.deaths: list[tuple[float, float]] = []  # from when to when it was being killed, by time.monotonic
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it listens."""
        self.process = _start("serve", str(self.port))
        assert self.process.stdout
        assert self.process.stdout.readline()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        began = time.monotonic()
        self.end()
        self.deaths.append((began, time.monotonic()))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)


@contextmanager
def backend_processes(count: int) -> Iterator[list[BackendProcess]]:
    """So many backends, each in a process of its own."""
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            processes.append(BackendProcess())
            stack.callback(processes[-1].end)
        yield processes


class Load:
    """Clients that come at a steady rate, from a process of its own, until `end`."""

    def __init__(self, port: int, rate: int) -> None:
        self._process = _start("load", str(port), str(rate))

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=PATIENCE)

    def end(self) -> Sequence[tuple[str, float, float, str]]:
        """Let no more come; of each: its address, when it began and ended (time.monotonic), and the answer or error."""
        clients, _ = self._process.communicate("end\n", timeout=PATIENCE)
        return [tuple(client) for client in json.loads(clients)]


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fleet", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY)


def serve(port: str) -> None:
    """What a `BackendProcess` does."""
    listener = socket.create_server(("127.0.0.1", int(port)), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    while True:
        sock, _ = listener.accept()
        with sock:
            if sock.recv(100):
                sock.sendall(b"ok")


def load(port: str, rate: str) -> None:
    """What `Load` has done: prints what became of each client, as JSON."""
    import asyncio

    clients: list[tuple[str, float, float, str]] = []

    async def client() -> None:
        began = time.monotonic()
        outcome = ""
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.bind(("127.0.0.1", 0))  # it has a name also if it is reset before it sees that it is connected
            name = "{}:{}".format(*sock.getsockname())
            loop = asyncio.get_running_loop()
            try:
                await loop.sock_connect(sock, ("127.0.0.1", int(port)))
                await loop.sock_sendall(sock, b"?")
                while data := await loop.sock_recv(sock, 100):
                    outcome += data.decode()
            except OSError as error:
                outcome = str(error)
        clients.append((name, began, time.monotonic(), outcome))

    async def clients_until_end() -> None:
        loop = asyncio.get_running_loop()
        ended = loop.run_in_executor(None, sys.stdin.readline)
        tasks = []
        due = loop.time()
        while not ended.done():
            tasks.append(asyncio.create_task(client()))
            due += 1 / int(rate)
            await asyncio.sleep(due - loop.time())
        await asyncio.gather(*tasks)

    asyncio.run(clients_until_end())
    print(json.dumps(clients))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        load(*sys.argv[2:])
