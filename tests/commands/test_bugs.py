"""A bug in a command is no verdict on the service."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.commands.support import LONE, answering

BROKEN = """
import sys
import rspd.commands.status
from rspd.__main__ import main
rspd.commands.status.unserved = None
sys.exit(main(["status", "--check", "--socket", sys.argv[1]]))
"""


def test_an_error_that_nobody_expected_is_70_and_no_proxy_that_cannot_serve(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with answering(path, LONE):
        end = subprocess.run([sys.executable, "-c", BROKEN, path], capture_output=True, text=True, check=False)
    assert (end.returncode, end.stdout) == (os.EX_SOFTWARE, "")
    first, *_, last = end.stderr.splitlines()
    assert first == "rspd: unexpected error; please report it"
    assert last == "rspd: TypeError: 'NoneType' object is not callable"
