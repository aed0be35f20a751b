"""Run rspd and count the Python instructions it executes: python -m tests.instructions FILE ... rspd ARGUMENT...

The count is written to FILE at the end. What stands before `rspd` is passed over, so that this can stand before the
command that it takes the place of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from rspd.cli import main


def count_instructions(run: Callable[[], int]) -> tuple[int, int]:
    """What a function returns, and how many instructions this thread executed for it."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
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


if __name__ == "__main__":
    arguments = sys.argv[sys.argv.index("rspd") + 1 :]
    code, executed = count_instructions(lambda: main(arguments))
    Path(sys.argv[1]).write_text(str(executed))
    sys.exit(code)
