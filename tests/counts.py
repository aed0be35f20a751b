"""Run rspd and count what Python does for it: python -m tests.counts instructions|calls FILE ... rspd ARGUMENT...

The counts at each line of the log are written to FILE at the end. What stands before `rspd` is passed over, so that
this can stand before the command that it takes the place of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from rspd.cli import main
from rspd.log import StderrHandler


def count_instructions(
    run: Callable[[], int], noted: CodeType | None = None, notes: list[int] | None = None
) -> tuple[int, int]:
    """What a function returns, and how many instructions this thread executed for it.

    notes: gets the count at each call of the function whose code is `noted`.
    """
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        if notes is not None and frame.f_code is noted and event == "call":
            notes.append(count)
        return trace

    # Python 3.12 asks for it where tracing begins.
    sys._getframe().f_trace_opcodes = True
    measuring_coverage = sys.gettrace()
    sys.settrace(trace)
    try:
        result = run()
    finally:
        sys.settrace(measuring_coverage)
    return result, count


def count_calls(run: Callable[[], int], noted: CodeType, notes: list[int]) -> tuple[int, int]:
    """Count calls in the same way: of functions, and of coroutines and generators that go on (sys.setprofile)."""
    count = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event == "call":
            count += 1
            if frame.f_code is noted:
                notes.append(count)

    sys.setprofile(profile)
    try:
        result = run()
    finally:
        sys.setprofile(None)
    return result, count


COUNTERS = {"instructions": count_instructions, "calls": count_calls}

if __name__ == "__main__":
    arguments = sys.argv[sys.argv.index("rspd") + 1 :]
    counts: list[int] = []
    code, _ = COUNTERS[sys.argv[1]](lambda: main(arguments), StderrHandler.write.__code__, counts)
    Path(sys.argv[2]).write_text(" ".join(map(str, counts)))
    sys.exit(code)
