"""A service in which connections end for each cause that there is, and clients are refused by each key.

What cannot be produced from outside is brought about by the program that is executed: `ERROR` and `DAMAGE` change it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from tempfile import TemporaryDirectory
from typing import Any, get_args

from rspd.engine.cause import Cause
from tests.counting import LOCAL, Service, exchange, wait_for_end
from tests.numbers import Looker, Numbers
from tests.support import Backend, eventually, free_port, full_tcp, receive_all, reset

CAUSES = set(get_args(Cause))

# Causes for which another process has to go on, or this one to end.
LATER = {"handover-failed", "drain-timeout"}

KEYS = {"allow", "deny", "max_connections_per_client"}

# A client that has sent so many bytes and then ends meets an error.
UNLUCKY = 666

ERROR = f"""
from rspd.engine.relay import Relay
half_close = Relay._half_close
def fail(self):
    if self.upload.total == {UNLUCKY}:
        raise RuntimeError("brought about by a test")
    return half_close(self)
Relay._half_close = fail
"""

# Of the connections of the proxy `damaged`, one after the other: the document of a handover names a descriptor that
# does not come, or it lacks something.
DAMAGE = """
from rspd.running import legacy
read = legacy.read
def damage(content):
    document = read(content)
    for proxy in document["proxies"]:
        for number, one in enumerate(proxy["connections"] if proxy["name"] == "damaged" else ()):
            if number % 2:
                del one["relay"]["backend"]["fd"]
            else:
                one["descriptors"].append(99_999)
    return document
legacy.read = damage
"""

HEADER = b"PROXY TCP4 192.0.2.7 198.51.100.1 1234 443\r\n"


def get(host: str) -> bytes:
    """A request."""
    return f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def causes(numbers: Numbers) -> set[str]:
    """The causes that have been counted."""
    return {labels[3] for labels in numbers if labels[0] == "ends"}


def keys(numbers: Numbers) -> set[str]:
    """The keys by which clients were refused."""
    return {labels[2] for labels in numbers if labels[0] == "refused"}


def serve(sock: socket.socket) -> None:
    """What the backend does: it goes by the first word, and else sends everything back."""
    data = sock.recv(1 << 16)
    if data.startswith(b"close"):
        sock.sendall(b"the backend says this, and closes")
    elif data.startswith(b"abort"):
        reset(sock)
    elif data.startswith(b"half"):
        sock.sendall(b"this is all")
        sock.shutdown(socket.SHUT_WR)
        receive_all(sock)
    else:
        with suppress(ConnectionError):
            while data:
                sock.sendall(data)
                data = sock.recv(1 << 16)


class World:
    """The service, with backends that serve, and others that do not."""

    def __init__(
        self,
        stack: ExitStack,
        folder: str,
        more: Mapping[str, Mapping[str, Any]],
        more_pools: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """more, more_pools: proxies, and pools of the file."""
        self.backend = stack.enter_context(Backend(serve))
        self._well = True
        checked = stack.enter_context(Backend(self._serve_checked))
        full = stack.enter_context(full_tcp())
        web, check = self.backend.address, {"http": "/health", "interval": "50ms", "fall": 1}
        port = free_port()  # of a proxy that is its own backend
        soon = "1s"
        proxies: dict[str, Mapping[str, Any]] = {
            "web": {"backend": web},
            "slow": {"backend": web, "idle_timeout": soon, "half_close_timeout": "100ms"},
            "nobody": {"backend": f"{LOCAL}:{free_port()}"},
            "nowhere": {"backend": f"{folder}/log/sock"},
            "unknown": {"backend": "nowhere.invalid:80"},
            "silent": {"backend": full, "connect_timeout": soon},
            "sick": {"backend": checked.address, "health": check, "on_down": "abort"},
            "one": {"backend": {"address": web, "max_connections": 1}, "queue_timeout": soon},
            "round": {"listen": f"{LOCAL}:{port}", "backend": f"127.1:{port}"},
            "told": {"backend": web, "accept_proxy": LOCAL, "accept_proxy_timeout": soon},
            "sites": {
                "routes": [{"host": "a.example", "pool": "common"}, {"host": "b.example", "backend": web}],
                "first_bytes_timeout": soon,
            },
            "others": {"routes": [{"pool": "common"}]},
            "allow": {"backend": web, "allow": "192.0.2.0/24"},
            "deny": {"backend": web, "deny": LOCAL},
            "few": {"backend": web, "max_connections_per_client": 1},
            "guest": {"backend": web},
            "damaged": {"routes": [{"backend": web}]},
            "drained": {"backend": web, "drain_timeout": "100ms"},
            **more,
        }
        pools = {"common": {"backends": [web, {"address": checked.address, "backup": True}]}, **more_pools}
        self.service = Service(folder, proxies, ERROR, pools=pools, max_connections=64)
        self.service.ports["round"] = port
        stack.callback(self.service.end)
        self.service.wait_for("listening address=", sum(len(listening(one)) for one in proxies.values()))
        self.looker = Looker(self.service.metrics, self.service.control)

    def every_cause(self) -> None:
        """Have connections end for each cause but those of LATER, and clients refused by each of KEYS."""
        come, talk = self.service.come, self.service.talk
        said = {
            "slow": [b"silence", b"half"],
            "nobody": [b"hello"],
            "nowhere": [b""],
            "unknown": [b""],
            "silent": [b"hello"],
            "round": [b"hello"],
            "told": [b"hello", HEADER[:20]],
            "sites": [get("c.example"), b"GET / HTTP/1.1\r\n\r\n", b"GET / HT"],
            "web": [b"close", b"abort"],
            "allow": [b""],
            "deny": [b"hello"],
        }
        waiting = [come(proxy, data) for proxy, each in said.items() for data in each]
        with talk("one"), talk("few"):
            wait_for_end(come("one", b"hello"))
            wait_for_end(come("few", b"hello"))
        for client in (
            come("told", HEADER + b"hello"),
            talk("sites", get("a.example")),
            talk("others", get("b.example")),
            talk("guest"),
            talk("web", b"x" * 300_000),
            talk("web", b"x" * UNLUCKY),
        ):
            client.shutdown(socket.SHUT_WR)
            waiting.append(client)
        reset(talk("web"))
        for sock in waiting:
            wait_for_end(sock)
        self._well = True
        eventually(lambda: self._is_served("sick"))
        sick = talk("sick")
        self._well = False
        wait_for_end(sick)
        wait_for_end(come("sick"))

    def looked_at_while_open(self, *proxies: str) -> list[socket.socket]:
        """A client of each of these proxies, whose bytes have been counted while it is open."""
        sizes = {proxy: 1000 + number for number, proxy in enumerate(proxies)}
        before = self.service.bytes_from_clients()
        clients = [self.service.talk(proxy, b"x" * size) for proxy, size in sizes.items()]
        after = self.service.bytes_from_clients()
        assert all(after[proxy] >= before[proxy] + size for proxy, size in sizes.items())
        return clients

    def without_haste(self) -> dict[str, Any]:
        """Proxies that wait longer for what their clients say first, for `Service.reload`."""
        proxies = self.service.proxies
        return {
            "told": {**proxies["told"], "accept_proxy_timeout": "60s"},
            "sites": {**proxies["sites"], "first_bytes_timeout": "60s"},
        }

    def _is_served(self, proxy: str) -> bool:
        """Whether a client gets a backend there now."""
        with self.service.come(proxy) as client, suppress(ConnectionError, AssertionError):
            exchange(client, b"hello")
            return True
        return False

    def _serve_checked(self, sock: socket.socket) -> None:
        """As `serve`, and checks are good or bad."""
        if sock.recv(5, socket.MSG_PEEK) == b"GET /":
            sock.recv(1000)
            sock.sendall(b"HTTP/1.0 %d Whatever\r\n\r\n" % (200 if self._well else 503))
        else:
            serve(sock)


def listening(proxy: Mapping[str, Any]) -> list[str]:
    """Where a proxy listens."""
    listen = proxy.get("listen", "")
    return listen if isinstance(listen, list) else [listen]


@contextmanager
def world(
    more: Mapping[str, Mapping[str, Any]] | None = None, more_pools: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[World]:
    """It. What looks at it does so all the time."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        world = World(stack, folder, more or {}, more_pools or {})
        stack.enter_context(world.looker.at_work())
        yield world
