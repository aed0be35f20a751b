"""Processes that are killed, or stopped, at a call that they make; by strace(1)."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tests.support import PATIENCE, skip_for_kernel


class Call(NamedTuple):
    """A system call: the number-th of this name."""

    name: str
    number: int

    def kill(self) -> list[str]:
        """Options of strace: the process is killed instead of that call."""
        return [*self._send("KILL"), "-e", "signal=none", "-o", "/dev/null"]

    def stop(self) -> list[str]:
        """Options of strace: the process stops after that call."""
        return self._send("STOP")

    def _send(self, signal: str) -> list[str]:
        inject = f"inject={self.name}:signal=SIG{signal}:when={self.number}"
        return ["-e", f"trace={self.name}", "-e", inject]


class Trace:
    """What was traced into a file: calls, in order."""

    def __init__(self, file: Path) -> None:
        self.lines = re.findall(r"^\w+\(.*$", file.read_text(), re.MULTILINE)

    @property
    def calls(self) -> list[Call]:
        """They can be met again in another process that does the same."""
        counts = Counter[str]()
        found = []
        for line in self.lines:
            name = line.partition("(")[0]
            counts[name] += 1
            found.append(Call(name, counts[name]))
        return found

    def first(self, pattern: str, after: int = 0) -> int:
        """Where the first call is that matches."""
        return next(place for place, line in enumerate(self.lines) if place >= after and re.search(pattern, line))


class Tracer:
    """strace at a process that runs already, with these options, as long as the block, or the process."""

    def __init__(self, pid: int, *options: str) -> None:
        self._process = subprocess.Popen(["strace", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr
        said = self._process.stderr.readline()
        if "attached" not in said:
            self.__exit__(None, None, None)
            if "not permitted" in said:
                skip_for_kernel("nobody may trace what runs already (kernel.yama.ptrace_scope)")
            raise AssertionError(said)

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stderr
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._process.stderr.close()

    def wait_for_stop(self) -> None:
        """Wait until the process has stopped, as it was told, or has ended."""
        assert self._process.stderr
        assert any("stopped by SIGSTOP" in line for line in self._process.stderr), "it has not stopped"

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.wait(PATIENCE)
