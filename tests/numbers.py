"""What a service has counted: as the lines of its log say it, as its metrics do, and as its status does.

A number has a name, as `ends`, and labels. What is zero is not there.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rspd.engine.cause import WELL
from tests.support import PATIENCE, eventually

Numbers = Counter[tuple[str, ...]]

FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')
SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

# What the reason of a line about refused clients looks like, and the key that it stands for.
REASONS = {"in deny ": "deny", "not in allow": "allow", "max_connections_per_client is": "max_connections_per_client"}

# The metrics that the log knows too, with the names of their numbers and of their labels. A histogram is its number of
# values.
METRICS = {
    "rspd_connections_total": ("ends", "proxy", "backend", "cause"),
    "rspd_connection_seconds_count": ("ended", "proxy"),
    "rspd_bytes_total": ("bytes", "proxy", "backend", "direction"),
    "rspd_accepted_total": ("accepted", "proxy"),
    "rspd_refused_total": ("refused", "proxy", "reason"),
    "rspd_routed_total": ("routed", "proxy", "route"),
    "rspd_reloads_total": ("reloads", "result"),
    "rspd_handovers_total": ("handovers",),
}

# These metrics are zero while there is no connection.
BUSY = {"rspd_open_connections", "rspd_queue_length", "rspd_backend_connections"}

# Of these metrics, no series ever goes back.
COUNTERS = re.compile(r"\w+_(total|count|sum|bucket)")


def logged(lines: Iterable[str]) -> Numbers:
    """What the log says. Each client that was accepted has ended, or was refused."""
    found = Numbers()
    for line in lines:
        _, _, text = line[24:].partition(" ")  # after the time and the level
        text = text.lstrip()
        if text.startswith("connection closed "):
            _note_end(found, dict(FIELD.findall(text)))
        elif text.startswith("client refused "):
            fields = dict(FIELD.findall(text))
            [key] = [key for said, key in REASONS.items() if said in fields["reason"]]
            found["refused", fields.get("proxy", ""), key] += (number := 1 + int(fields.get("more", 0)))
            found["accepted", fields.get("proxy", "")] += number
        elif text.startswith("reloaded "):
            found["reloads", "ok"] += 1
        elif text.startswith("reload failed, "):
            found["reloads", "failed"] += 1
        elif text.startswith("took over "):
            found["handovers",] += 1
    return +found


def _note_end(found: Numbers, fields: Mapping[str, str]) -> None:
    proxy, backend = fields.get("proxy", ""), fields["backend"]
    found["ends", proxy, backend, fields["cause"]] += 1
    found["ended", proxy] += 1
    found["accepted", proxy] += 1
    found["bytes", proxy, backend, "upload"] += int(fields["sent"])
    found["bytes", proxy, backend, "download"] += int(fields["received"])
    if "route" in fields:
        found["routed", proxy, fields["route"].strip('"')] += 1


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """The samples of a text in Prometheus' format: the name, the labels, and the value."""
    for line in text.splitlines():
        if not line.startswith("#"):
            parts = SAMPLE.fullmatch(line)
            assert parts, line
            name, labels, value = parts.groups()
            yield name, dict(LABEL.findall(labels or "")), float(value)


def measured(text: str) -> Numbers:
    """What the metrics say."""
    found = Numbers()
    for name, labels, value in samples(text):
        if name in METRICS:
            number, *names = METRICS[name]
            series = (number, *(labels[one] for one in names))
            found[series] += int(value)
    return +found


def told(status: Mapping[str, Any]) -> Numbers:
    """What the status says."""
    process = status["process"]
    found = Numbers({("reloads", "ok"): process["reloads"], ("reloads", "failed"): process["reloads_failed"]})
    found["handovers",] = process["handovers"]
    for proxy in status["proxies"]:
        name = proxy["name"]
        found["accepted", name] += proxy["accepted"]
        for ends in proxy["ends"]:
            found["ends", name, ends["backend"], ends["cause"]] += ends["number"]
        for volume in proxy["volumes"]:
            found["bytes", name, volume["backend"], "upload"] += volume["sent"]
            found["bytes", name, volume["backend"], "download"] += volume["received"]
        for refused in proxy["refused"]:
            found["refused", name, refused["reason"]] += refused["number"]
        found["ended", name] += sum(proxy["seconds"]["counts"])
    for route in status["routes"]:
        found["routed", route["proxy"], route["name"]] += route["clients"]
    return +found


def failed(status: Mapping[str, Any]) -> Numbers:
    """What the status says of failures, by proxy, backend and cause: those of ten minutes."""
    found = Numbers()
    for proxy in status["proxies"]:
        for failure in proxy["failures"]:
            found["failed", proxy["name"], failure["backend"], failure["cause"]] += failure["number"]
    return +found


def failures(numbers: Numbers) -> Numbers:
    """The same, by other numbers."""
    found = Numbers()
    for (name, *labels), number in numbers.items():
        if name == "ends" and labels[2] not in WELL:
            found["failed", labels[0], labels[1], labels[2]] = number
        elif name == "refused":
            found["failed", labels[0], "-", f"refused: {labels[1]}"] = number
    return found


def busy(text: str) -> list[str]:
    """What the metrics say that is not so if there is no connection."""
    return [f"{name} {labels}: {value:g}" for name, labels, value in samples(text) if name in BUSY and value]


def differences(one: Numbers, other: Numbers) -> list[str]:
    """What is another number in the other, in words."""
    return [f"{' '.join(key)}: {one[key]}, {other[key]}" for key in sorted(one | other) if one[key] != other[key]]


def ask(path: str, target: str) -> str:
    """What is answered at a unix socket. Raises OSError, also if the answer is cut."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        try:
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            body = answer.read().decode()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from None
        assert answer.status == 200, body
        if answer.length is None and not body.endswith("}\n"):
            raise ConnectionError("the answer is cut")
        return body


class Looker:
    """Asks for the metrics ten times a second, or as soon as they have come, and at times for all else there is.

    looks: how many answers there were. faults: the counters that went back.
    """

    def __init__(self, metrics: str, control: str) -> None:
        self._metrics, self._control = metrics, control
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._before: dict[tuple[str, ...], float] = {}
        self.looks = 0
        self.faults: list[str] = []

    def _run(self) -> None:
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            due = max(due + 0.1, time.monotonic())
            with suppress(OSError):  # while another process begins
                self.look()
                if not self.looks % 5:
                    ask(self._control, "/v1/connections?limit=10&sort=bytes")
                    json.loads(ask(self._control, "/v1/status"))

    def again(self) -> None:
        """Wait for a look that has yet to begin. The counts of a backend begin anew if it is gone between two looks."""
        before = self.looks
        eventually(lambda: self.looks >= before + 2)

    def look(self) -> str:
        """Look at the metrics. Returns their text."""
        text = ask(self._metrics, "/metrics")
        self.looks += 1
        found = {(name, *labels.values()): value for name, labels, value in samples(text) if COUNTERS.fullmatch(name)}
        for series in found.keys() & self._before.keys():
            before, value = self._before[series], found[series]
            if value < before:
                self.faults.append(f"{' '.join(series)} went from {before:g} to {value:g}")
        self._before = found
        return text

    @contextmanager
    def at_work(self) -> Iterator[Looker]:
        """It looks as long as the block lasts."""
        self._thread.start()
        try:
            yield self
        finally:
            self._over.set()
            self._thread.join(PATIENCE)
        assert self.looks > 0
        assert not self.faults, "\n".join(self.faults)
