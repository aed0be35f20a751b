"""Looking at a running rspd by its control socket, as its own commands do."""

from __future__ import annotations

import http.client
import os
from contextlib import closing
from pathlib import Path
from typing import Any

from rspd.admin.client import ask
from rspd.admin.query import Query
from rspd.snapshot import Connection, Connections, Snapshot, read
from tests.support import PATIENCE, Daemon


def status(path: Path) -> Snapshot:
    """What is, but for the connections."""
    return read(Snapshot, ask(str(path), "/v1/status", PATIENCE))


def connections(path: Path, **query: Any) -> tuple[Connection, ...]:
    """The open connections that are asked for."""
    return read(Connections, ask(str(path), f"/v1/connections?{Query(**query)}", PATIENCE)).connections


def metrics(port: int) -> str:
    """What Prometheus would get. Not by urllib: where packages are built, it asks a proxy that is not there."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()


def unix_listeners(daemon: Daemon) -> list[str]:
    """The paths of the unix sockets at which a process listens (proc_net_unix(5))."""
    own = {name for name in daemon.descriptors() if name.startswith("socket:")}
    rows = [line.split() for line in Path(f"/proc/{daemon.pid}/net/unix").read_text().splitlines()[1:]]
    listening = [row for row in rows if len(row) > 7 and row[3] == "00010000"]
    return [os.path.basename(row[7]) for row in listening if f"socket:[{row[6]}]" in own]
