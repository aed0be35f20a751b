"""HAProxy and nginx as processes: what rspd has to get on with."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from bench.peers import HAProxy, Nginx, Peer
from rspd.protocols.proxy_protocol import Header, parse
from tests.support import PATIENCE, eventually

HAPROXY = HAProxy("haproxy", "haproxy", "haproxy")
NGINX = Nginx("nginx", "nginx", "nginx libnginx-mod-stream")


def haproxy(config: str, host: str = "127.0.0.1") -> AbstractContextManager[int]:
    """HAProxy with this configuration, in which `@PORT@` is the port it listens on at `host`; yields the port.

    `@FOLDER@` is a folder for sockets and logs. Skips the test if HAProxy is not installed.
    """
    timeouts = "defaults\n    timeout connect 5s\n    timeout client 1m\n    timeout server 1m\n"
    return _running(HAPROXY, ["-db", "-f"], timeouts + config, host)


def nginx(config: str, host: str = "127.0.0.1") -> AbstractContextManager[int]:
    """The same for nginx and its `stream { }` or `http { }` block, after `events { }` if that is to have something.

    Skips the test also without its stream module.
    """
    module = f"load_module {NGINX.MODULE};\n" if NGINX.MODULE.exists() else ""
    events = "" if config.startswith("events {") else "events { }"
    alone = f"daemon off; master_process off; pid @FOLDER@/nginx.pid; error_log stderr; {events}\n"
    return _running(NGINX, ["-e", "stderr", "-c"], module + alone + config, host)


@contextmanager
def _running(peer: Peer, options: Sequence[str], config: str, host: str) -> Iterator[int]:
    if missing := peer.missing():
        pytest.skip(missing)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(family) as held,
        open(f"{folder}/output", "w+") as output,
    ):
        # Nobody else gets the port while it is bound here; the peer may bind it too (SO_REUSEADDR, socket(7)).
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, 0))
        port: int = held.getsockname()[1]
        path = Path(folder, "config")
        path.write_text(config.replace("@PORT@", str(port)).replace("@FOLDER@", folder))
        command = [peer.path or "", *options, str(path)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            eventually(lambda: process.poll() is not None or listening(port, host), f"{peer.name} listens")
            assert process.poll() is None, f"{peer.name} ended: {Path(output.name).read_text()}"
            yield port
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)


def listening(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody listens on a TCP port of a host: without connecting, which the peer would pass on (proc_net(5)).

    Others may listen on that port of other addresses of this machine.
    """
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()]
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    places = {f"{address}:{port:04X}" for address in ("".join(f"{word:08X}" for word in words), "0" * 8, "0" * 32)}
    return any(row[1] in places and row[3] == "0A" for row in rows)


def receive_header(sock: socket.socket) -> Header:
    """The PROXY header that a socket has next, and not a byte more."""
    data = b""
    while not (found := parse(data)):
        part = sock.recv(1)
        assert part, f"ended after {data!r}"
        data += part
    return found[0]
