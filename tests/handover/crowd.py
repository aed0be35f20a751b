"""Very many clients and their backend, as fast as Python can: `python -IS crowd.py backend|clients ...`.

The backend sends back what it gets. `close` has it close, and `abort` reset the connection.
"""

from __future__ import annotations

import json
import random
import select
import signal
import socket
import struct
import sys
from collections import Counter

LINGER_0 = struct.pack("ii", 1, 0)

# Seconds until the process ends whatever happens.
LONGEST = 600

# Clients that are there at once: each step is made by all of them.
BATCH = 24

HEADER = b"PROXY TCP4 192.0.2.7 198.51.100.1 1234 443\r\n"
REQUEST = b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n"

# What clients say first, by kind.
SAYS = {
    "talk": b"hello",
    "more": b"x" * 3000,
    "bulk": b"y" * 100_000,
    "leave": b"hello",
    "close": b"close",
    "abort": b"abort",
    "look": b"",
    "via": HEADER + b"hello",
    "a": REQUEST % b"a.example",
    "b": REQUEST % b"b.example",
    "c": REQUEST % b"c.example",
    "none": b"hello",
}

# Who reads up to the end.
TO_THE_END = {"close", "abort", "c", "none"}


def listener(where: str) -> socket.socket:
    """A socket that listens at HOST:PORT or at a path."""
    if where.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(where)
        sock.listen(1024)
        return sock
    host, _, port = where.rpartition(":")
    return socket.create_server((host, int(port)), backlog=1024)


def backend(places: list[str]) -> None:
    """Serve at these places, for ever."""
    epoll = select.epoll()
    listeners = {}
    for where in places:
        sock = listener(where)
        sock.setblocking(False)
        listeners[sock.fileno()] = sock
        epoll.register(sock.fileno(), select.EPOLLIN)
    print("ready", flush=True)
    served: dict[int, socket.socket] = {}
    while True:
        for fd, _ in epoll.poll():
            try:
                if fd in listeners:
                    sock, _ = listeners[fd].accept()
                    sock.setblocking(True)
                    served[sock.fileno()] = sock
                    epoll.register(sock.fileno(), select.EPOLLIN)
                else:
                    sock = served[fd]
                    data = sock.recv(1 << 16)
                    if data == b"abort":
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
                    elif data and data != b"close":
                        sock.sendall(data)
                        continue
                    served.pop(fd).close()
            except ConnectionError:
                served.pop(fd).close()


def connect(where: str) -> socket.socket:
    if where.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(where)
        return sock
    host, _, port = where.rpartition(":")
    sock = socket.socket()
    sock.connect((host, int(port)))
    return sock


def hear(sock: socket.socket, size: int) -> None:
    while size > 0:
        data = sock.recv(size)
        if not data:
            raise ConnectionError("the end")
        size -= len(data)


def come(kind: str, where: str, count: int, errors: Counter[str]) -> None:
    """So many clients of a kind at once."""
    says = SAYS[kind]
    socks = []
    for _ in range(count):
        sock = connect(where)
        socks.append(sock)
        try:
            sock.sendall(says)
        except ConnectionError:
            pass  # it is refused
    expected = len(says) - (len(HEADER) if kind == "via" else 0)
    for sock in socks:
        try:
            if kind in TO_THE_END:
                while sock.recv(1 << 16):
                    pass
            else:
                hear(sock, expected)
        except ConnectionError as error:
            if kind not in TO_THE_END:
                errors[f"{kind} {where}: {error}"] += 1
        if kind == "leave":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        sock.close()


def clients(wanted: list[str]) -> None:
    """Make so many clients of each KIND=ADDRESS=NUMBER, in batches, in any order. Print what went wrong as JSON."""
    errors: Counter[str] = Counter()
    batches = []
    for word in wanted:
        kind, where, number = word.split("=")
        size = BATCH if kind != "bulk" else 2
        batches += [(kind, where, min(size, int(number) - at)) for at in range(0, int(number), size)]
    random.Random(1).shuffle(batches)
    for kind, where, count in batches:
        come(kind, where, count, errors)
    print(json.dumps(errors.most_common(9)))


if __name__ == "__main__":
    signal.alarm(LONGEST)
    (backend if sys.argv[1] == "backend" else clients)(sys.argv[2:])
