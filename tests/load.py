"""Many clients, in a process of their own, each with a name that it wants to reach, and whether they all did."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

PATIENCE = 20.0
LINE = 20  # clients, for each line of output


class Load:
    """The process. `clients`, `seconds`, `errors`: how many there were, for how long, and what went wrong, at the end.

    targets: addresses by names. What is there has to send the line back that a client sends, `NAME NUMBER`.
    """

    def __init__(self, threads: int, targets: Mapping[str, str]) -> None:
        words = [str(threads), *(f"{name}={address}" for name, address in targets.items())]
        # Without `site`: the coverage of the clients is not measured, which would slow them down.
        self._process = subprocess.Popen(
            [sys.executable, "-IS", __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.clients = 0
        self.seconds = 0.0
        self.errors: list[str] = []

    def more(self) -> None:
        """Wait until some more clients have had their answers."""
        assert self._process.stdout
        assert self._process.stdout.readline()

    def end(self) -> None:
        """Let those that are under way have their answers."""
        output, _ = self._process.communicate(timeout=2 * PATIENCE)
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        self.clients, self.seconds, self.errors = result["clients"], result["seconds"], result["errors"]

    def kill(self) -> None:
        """Make sure that it has ended."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def load(threads: int, targets: Mapping[str, str]) -> Iterator[Load]:
    """Clients, so many at a time, for as long as the block lasts."""
    clients = Load(threads, targets)
    try:
        yield clients
        clients.end()
    finally:
        clients.kill()


# In that process


def ask(name: str, where: tuple[str, int], number: int) -> None:
    """One client. Raises OSError or ValueError if it is not served as it wants."""
    with socket.create_connection(where, PATIENCE) as sock:
        wanted = b"%s %d\n" % (name.encode(), number)
        sock.sendall(wanted)
        found = b""
        while not found.endswith(b"\n"):
            part = sock.recv(100)
            if not part:
                raise ValueError(f"the end after {found!r}")
            found += part
        if found != wanted:
            raise ValueError(f"wanted {wanted!r}, found {found!r}")


def main() -> None:
    """Run until stdin ends."""
    targets = []
    for argument in sys.argv[2:]:
        name, _, address = argument.partition("=")
        host, _, port = address.rpartition(":")
        targets.append((name, (host, int(port))))
    numbers = count(1)
    errors: list[str] = []
    answered = [0]
    lock = threading.Lock()
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            with lock:
                number = next(numbers)
            name, where = targets[number % len(targets)]
            try:
                ask(name, where, number)
            except (OSError, ValueError) as error:
                errors.append(f"{name} {number}: {error!r}")
            with lock:
                answered[0] += 1
                if answered[0] % LINE == 0:
                    print(answered[0], flush=True)

    started = time.monotonic()
    threads = [threading.Thread(target=run) for _ in range(int(sys.argv[1]))]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"clients": answered[0], "seconds": time.monotonic() - started, "errors": errors[:10]}))


if __name__ == "__main__":
    main()
