"""REQUIRED=1: on a host that has all that the tests want, a test that is skipped has failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PATIENCE

REPOSITORY = Path(__file__).resolve().parent.parent

SKIPS = """
import pytest
from tests.support import skip_for_kernel
def test_for_want_of_a_program():
    {for_program}
def test_for_want_of_something_in_the_kernel():
    skip_for_kernel('no IPv6')
def test_that_passes():
    pass
"""


SKIP = "pytest.skip('ip is not here')"


@pytest.mark.parametrize(
    ("required", "for_program", "failed"), [("1", SKIP, True), ("1", "pass", False), ("0", SKIP, False)]
)
def test_what_is_skipped_has_failed_where_it_is_required_but_for_want_of_something_in_the_kernel(
    tmp_path: Path, required: str, for_program: str, failed: bool
) -> None:
    file = tmp_path / "test_skips.py"
    file.write_text(SKIPS.format(for_program=for_program))
    options = ["-n", "1", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    end = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, str(file)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "REQUIRED": required},
        timeout=3 * PATIENCE,
        check=False,
    )
    assert end.returncode == failed, end.stdout
    said = [line for line in end.stdout.splitlines() if "REQUIRED" in line]
    assert said == ["REQUIRED=1 forbids to skip a test: ip is not here"] * failed
