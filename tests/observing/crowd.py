"""Very many connections that nobody has made: those of a proxy at work, all with the same pair of sockets."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from rspd.engine.loop import Task, news
from rspd.engine.pipes import Pipes
from rspd.engine.relay import Relay
from rspd.engine.side import UnixSide
from rspd.serving.connection import Connection
from tests.observing.scene import Scene


@contextmanager
def crowd(scene: Scene, count: int, name: str = "") -> Iterator[list[Connection]]:
    """So many connections, each a second older than the next one. No garbage is collected meanwhile: it has no bound
    in a process as large as that of the tests."""
    proxy = scene.proxies.configured[name]
    backends = proxy.router.pool.members.everyone
    near, far = socket.socketpair()
    side, pipes = UnixSide(scene.loop, near), Pipes(0)
    made = []
    for number in range(count):
        one = Connection(proxy._terms, side, (f"10.0.{number % 7}.{number % 200}", 1024 + number % 60_000))
        one.relay = Relay(scene.loop, side, side, pipes, 60.0, 60.0)
        one.relay.upload.total, one.relay.download.total = number * 7919 % 10_007, number % 13
        one.backend = backends[number % len(backends)]
        one.started -= count - number
        one.task = Task(scene.loop, news(), None)
        proxy.connections[one.task] = one
        made.append(one)
    gc.disable()
    try:
        yield made
    finally:
        gc.enable()
        proxy.connections.clear()
        near.close()
        far.close()
