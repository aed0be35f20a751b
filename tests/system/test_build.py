"""Building the package: on this host, without a network, the same each time."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package built again, from a copy of the sources at another place, without a network."""
    folder = tmp_path_factory.mktemp("build")
    ignored = [line.strip("/") for line in (PROJECT / ".gitignore").read_text().split()]
    shutil.copytree(PROJECT, folder / "rspd", symlinks=True, ignore=shutil.ignore_patterns(".git", *ignored))
    made = subprocess.run(
        ["unshare", "--net", "dpkg-buildpackage", "-us", "-uc"],
        cwd=folder / "rspd",
        env={**os.environ, "DEB_BUILD_OPTIONS": "nocheck", "DEB_BUILD_PROFILES": "nocheck"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout[-5000:] + made.stderr[-5000:]
    return folder


def test_two_builds_are_the_same_bit_for_bit(built: Path, deb: Path) -> None:
    again = next(built.glob("rspd_*_all.deb"))
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(deb.read_bytes()).digest()


def test_lintian_finds_no_error_and_no_warning(built: Path) -> None:
    changes = next(built.glob("rspd_*.changes"))
    done = subprocess.run(
        ["lintian", "-I", "--pedantic", "--fail-on=error,warning", "--allow-root", str(changes)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
