"""New connections as an ordinary client makes them: ab, which asks nginx as a web server for a page."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bench.peers import (
    DIRECT,
    HAPROXY,
    NGINX,
    OTHER,
    RSPD,
    SEARCH,
    Nginx,
    Peer,
    PeerError,
    Place,
    Running,
    first_answer,
)
from bench.works import MANY, Ground, Results, Sizes, Work, run_work, say

GROUP = "ab"
PAGE = 256  # bytes
CONTESTANTS = (RSPD, OTHER, NGINX, HAPROXY, DIRECT)
QUESTION = b"GET / HTTP/1.0\r\n\r\n"


@dataclass
class WebGround(Ground):
    """The same with ab as the load, and nginx as the backend."""

    def load(self, *words: object) -> dict[str, float]:
        """Run ab to its end: its name, a port, how many requests, and how many at a time. Raises PeerError."""
        program, port, count, at_a_time = map(str, words)
        path = shutil.which(program, path=SEARCH) or ""
        url = f"http://127.0.0.1:{port}/"
        before = _children_seconds()
        run = self.run([path, "-q", "-n", count, "-c", at_a_time, url])
        if run.returncode:
            raise PeerError(f"ab: {(run.stderr or run.stdout).strip().splitlines()[-1]}")
        return {"seconds": read_report(run.stdout, int(count)), "cpu": _children_seconds() - before}

    def accepted(self, ports: Sequence[int]) -> list[int]:
        """nginx does not say it."""
        return [0] * len(ports)


def read_report(text: str, count: int) -> float:
    """How many seconds ab says that so many requests took. Raises PeerError if one of them went wrong."""
    told = dict(re.findall(r"^([\w -]+): +([\d.]+)", text, re.MULTILINE))
    for name, expected in (("Complete requests", count), ("Failed requests", 0), ("Non-2xx responses", 0)):
        found = int(told.get(name, 0))
        if found != expected:
            raise PeerError(f"ab: {name.lower()}: expected {expected}, got {found}")
    return float(told["Time taken for tests"])


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _work(key: str, at_a_time: int) -> Work:
    def count(sizes: Sizes, share: float) -> float:
        return max(at_a_time, int((sizes.one_at_a_time if at_a_time == 1 else sizes.many_at_a_time) * share))

    def words(sizes: Sizes, share: float) -> list[object]:
        return ["ab", count(sizes, share), at_a_time]

    return Work(key, GROUP, f"ab and a web server: new connections, {at_a_time} at a time", "connection", words, count)


AB_1, AB_64 = "ab-1", "ab-64"
AB_WORKS = [_work(AB_1, 1), _work(AB_64, MANY)]


def missing() -> str | None:
    """What is missing and how to get it, None if nothing is."""
    if not shutil.which("ab", path=SEARCH):
        return "ab is not here: apt install apache2-utils"
    return None if shutil.which("nginx", path=SEARCH) else "nginx is not here: apt install nginx"


def run_ab(here: Sequence[Peer], place: Ground) -> dict[str, Results]:
    """The works of ab; none if it cannot run here."""
    try:
        if why := missing():
            raise PeerError(why)
        with web_ground(place) as web:
            those = [peer for peer in here if peer.name in CONTESTANTS]
            return {work.key: run_work(work, those, web) for work in AB_WORKS}
    except PeerError as error:
        say(f"bench: {error}; going on without the works of ab")
        return {}


@contextmanager
def web_ground(place: Ground) -> Iterator[WebGround]:
    """nginx with a page, on the load's processors; it ends with this. Raises PeerError if it does not start."""
    folder = place.new_folder()
    (folder / "pages").mkdir(parents=True)
    (folder / "pages" / "index.html").write_text("x" * (PAGE - 1) + "\n")
    with ExitStack() as stack:
        # Nobody else gets a port while a socket is bound to it; nginx may bind it too (SO_REUSEADDR, socket(7)).
        ports = []
        for _ in CONTESTANTS:
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            ports.append(held.getsockname()[1])
        listen = "\n        ".join(f"listen 127.0.0.1:{port} backlog=4096;" for port in ports)
        config = Place(folder, ports[0], ports, None).settings("web.conf", LISTEN=listen)
        nginx = shutil.which("nginx", path=SEARCH) or ""
        output = stack.enter_context(open(folder / "output", "w"))
        backend = subprocess.Popen(
            [nginx, "-c", config, "-e", "stderr"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, place.load_cpus),
        )
        stack.callback(backend.wait)
        stack.callback(backend.terminate)
        one = Running(Nginx("nginx as a web server"), ports[0], ports, processes=[backend], output=folder / "output")
        first_answer(one, time.monotonic(), question=QUESTION)
        yield WebGround(
            place.program, folder, place.proxy_cpus, place.load_cpus, place.sizes, backend, ports, question=QUESTION
        )
