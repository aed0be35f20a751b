"""Checking backends: one check, and the checker that makes one after another."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable

from rspd.engine.loop import Loop
from rspd.engine.side import Handed, Side
from rspd.net.connect import OUR_FAULT, send_all
from rspd.net.waiting import wait
from rspd.settings import HealthConfig

# Bytes of an answer that are read: the status line, or what is expected, is to be among them.
ANSWER_MAX = 16384

# Bytes of a wrong answer that the log shows.
SHOWN_MAX = 40

# The status line as servers send it. RFC 9112 lets clients accept a bare line feed, and no space if no reason follows.
STATUS_LINE = rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: .*)?\r?"

# Connects, up to a deadline.
Dial = Callable[[float], Awaitable[Side]]

# Hears the verdict: whether the backend is up, and if not, why.
Report = Callable[[bool, str], object]

log = logging.getLogger(__name__)


class CheckError(Exception):
    """A check was bad. The text says why in one line, for the log."""


# One check


async def check(loop: Loop, config: HealthConfig, connect: Dial, host: str, preface: bytes) -> None:
    """Check a backend once, within the running task; return if it is well.

    connect: gives a connected side, watched by the running task, by a time of the loop. `check` closes the side.
    host: the backend's address as it is written, for the Host header.
    preface: sent before all else.
    Raises CheckError if the check is bad. Raises the OSError of `connect` if rspd is short of something (OUR_FAULT):
    this says nothing of the backend.
    """
    deadline = loop.now + config.timeout
    awaited = "answer"
    buffer = memoryview(bytearray(ANSWER_MAX))
    try:
        side = await connect(deadline)
        if loop.now >= deadline:
            # It was connected in time, but seen late, as after a freeze: the backend has not been asked yet.
            deadline = loop.now + config.timeout
        try:
            await send_all(side, preface + _request(config, host), deadline)
            if config.http or config.expect:
                awaited = "status line" if config.http else f"'{_shown(config.expect)}'"
                await _receive(side, config, buffer, deadline, awaited)
            elif side.aborted and (preface or config.send):
                raise CheckError("aborted before all was sent")
        finally:
            # Close with FIN. RST would save the TIME_WAIT, one port of thousands for a minute. But after RST, accept,
            # getpeername or read fail at the backend, and many backends log that. Read what has come first: closing
            # with unread bytes sends RST too.
            side.read_into(buffer)
            side.close()
    except TimeoutError as error:
        reason = error.strerror if error.errno else f"no {awaited} within {config.timeout:g} s"
        raise CheckError(reason) from None
    except OSError as error:
        if error.errno in OUR_FAULT:
            raise
        raise CheckError(error.strerror or str(error)) from None


def _request(config: HealthConfig, host: str) -> bytes:
    if not config.http:
        return config.send
    lines = (
        f"GET {config.http} HTTP/1.0",
        f"Host: {config.host or _host(host)}",
        "User-Agent: rspd-health",
        "Connection: close",
        "\r\n",
    )
    return "\r\n".join(lines).encode(errors="surrogateescape")


def _host(address: str) -> str:
    """What a Host header calls a backend."""
    if address.startswith(("/", "@")):
        return "localhost"
    # A zone (fe80::1%eth0) has a meaning on this machine only, and is no part of the header (RFC 6874).
    name = re.sub(r"%[^]]*", "", address)
    return f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name


async def _receive(side: Side, config: HealthConfig, buffer: memoryview, deadline: float, awaited: str) -> None:
    """Read until the answer is a good one. Raises CheckError or TimeoutError."""
    total = 0
    while True:
        # Read until there is no more: bytes and the end of the stream may have come with one event.
        count = side.read_into(buffer[total:])
        if count is None:
            await wait(side.loop, deadline)
            continue
        total += count
        if count and _is_good(config, bytes(buffer[:total])):
            return
        if not count:
            raise CheckError(f"{'aborted' if side.aborted else 'ended'} without {awaited}")
        if total == ANSWER_MAX:
            raise CheckError(f"no {awaited} in the first {ANSWER_MAX} bytes")


def _is_good(config: HealthConfig, answer: bytes) -> bool:
    """Whether an answer is a good one as far as it has come. Raises CheckError if it will never be."""
    if not config.http:
        return config.expect in answer
    line, end, _ = answer.partition(b"\n")
    if not end:
        return False
    match = re.fullmatch(STATUS_LINE, line)
    if not match:
        raise CheckError(f"expected a status line, found '{_shown(line[:SHOWN_MAX])}'")
    # After a 1xx, nothing more is expected: no server may send one to an HTTP/1.0 client (RFC 9110, 15.2).
    status = int(match[1])
    if not any(low <= status <= high for low, high in config.status):
        raise CheckError(f"status {status}, expected {', '.join(map(str, config.status))}")
    return True


def _shown(data: bytes) -> str:
    """Bytes in printable ASCII: a backend must not be able to write lines of the log."""
    return data.decode("latin-1").encode("unicode_escape").decode()


# One after another


class Verdicts:
    """What the checks of a backend have said, over all checkers that it has had.

    good, bad: how many. at: when the last one was, by the loop's time; 0 before. reason: why it was bad, or empty.
    """

    def __init__(self) -> None:
        self.good = self.bad = 0
        self.at = 0.0
        self.reason = ""

    def note(self, good: bool, reason: str, now: float) -> None:
        """Count one."""
        self.good += good
        self.bad += not good
        self.at, self.reason = now, reason

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process."""
        return {"good": self.good, "bad": self.bad, "at": self.at, "reason": self.reason}

    def resume(self, handed: Handed) -> None:
        """Go on with those of the process before."""
        self.good += handed.get("good", 0)
        self.bad += handed.get("bad", 0)
        self.at, self.reason = handed.get("at", 0.0), handed.get("reason", "")


class Checker:
    """Checks one backend again and again, in a task of its own, until `stop`.

    config, connect, host, preface: as for `check`.
    first: seconds from the first check, made at once, to the second: above 0, up to `interval`. Further checks follow
    every `interval`. So the owner of many checkers can spread their checks. A check that takes longer delays the next.
    verdicts: notes what each check says.
    report: called when the verdict changes: whether the backend is up, and if not, why. The constructor never calls it.
    The first check decides alone. Later, `fall` bad checks or `rise` good checks in a row decide. A check for which
    rspd was short of something does not count.
    """

    def __init__(
        self,
        loop: Loop,
        config: HealthConfig,
        connect: Dial,
        host: str,
        preface: bytes,
        first: float,
        verdicts: Verdicts,
        report: Report,
    ) -> None:
        self._loop = loop
        self._config = config
        self._connect = connect
        self._host = host
        self._preface = preface
        self._verdicts = verdicts
        self._report = report
        self._up: bool | None = None  # as reported; None: report the next verdict, whatever it is
        self._latest: bool | None = None  # what the last check said; None before the first
        self._in_a_row = 0  # how many checks said the same
        self._stopped = False
        self._task = loop.spawn(self._run(first))

    def doubt(self) -> None:
        """A client could not connect: after `rise` good checks, report again that the backend is up."""
        if self._up:
            self._up = None
        if self._latest:
            self._in_a_row = 0

    def hand_over(self) -> Handed:
        """What `resume` takes, in the next process: the verdicts so far."""
        return {"up": self._up, "latest": self._latest, "in_a_row": self._in_a_row}

    def resume(self, handed: Handed) -> None:
        """Go on with the verdicts of the process before."""
        self._up, self._latest = handed.get("up"), handed.get("latest")
        self._in_a_row = handed.get("in_a_row", 0)

    def stop(self) -> None:
        """Make no further check and no report. What a check has open is closed in the loop's next turn."""
        self._stopped = True
        self._task.cancel()

    async def _run(self, first: float) -> None:
        loop = self._loop
        await loop.yield_turn()
        due = loop.now + first
        while not self._stopped:
            try:
                await self._check()
            except Exception:
                log.exception("a check of %s failed unexpectedly; this is a bug", self._host)
            due = max(due, loop.now)
            await loop.sleep(due - loop.now)
            due += self._config.interval

    async def _check(self) -> None:
        good, reason = True, ""
        try:
            await check(self._loop, self._config, self._connect, self._host, self._preface)
        except CheckError as error:
            good, reason = False, str(error)
        except OSError:
            return  # a shortage has log lines of its own
        self._verdicts.note(good, reason, self._loop.now)
        first = self._latest is None
        self._in_a_row = self._in_a_row + 1 if good == self._latest else 1
        self._latest = good
        needed = 1 if first else self._config.rise if good else self._config.fall
        if good != self._up and self._in_a_row >= needed and not self._stopped:
            self._up = good
            self._report(good, reason)
