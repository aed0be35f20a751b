"""What the Makefile would do, asked without doing it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder in which nothing has been made yet."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run make, not as a part of the make that may have started the tests, nor of a package's build."""
    theirs = ("CHECK", "MAKE", "MFLAGS", "DEB_BUILD_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("target", "installed"),
    [
        ("run", ["."]),
        ("bench", ["."]),
        ("test", [".", "'.[test]'"]),
        ("test-system", [".", "'.[test]'"]),
        ("lint", [".", "'.[test]'", "'.[test,lint]'"]),
    ],
)
def test_each_target_installs_what_it_needs_and_says_so_before(fresh: Path, target: str, installed: list[str]) -> None:
    would = make(fresh, "-n", target).stdout
    assert re.findall(r"pip install -q -e (\S+)$", would, re.MULTILINE) == installed
    assert len(re.findall(r"^echo 'make: .*\.venv.*: some ten seconds, once'$", would, re.MULTILINE)) == len(installed)


@pytest.fixture
def lacking(tmp_path: Path) -> str:
    """A folder of programs with a dpkg that misses something, by what it is to build for."""
    programs = tmp_path / "programs"
    programs.mkdir()
    warned = "dpkg-architecture: warning: cannot determine CC system type, falling back to default"
    said = f"{warned}\\ndpkg-checkbuilddeps: error: unmet build dependencies: "
    for name, script in {
        "dpkg-buildpackage": "false",
        "dpkg-checkbuilddeps": f'printf "{said}debhelper-compat (= 13) ${{DEB_BUILD_PROFILES:-pytest}}\\n" >&2; false',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    return str(programs)


@pytest.mark.parametrize(("words", "named"), [([], "nocheck"), (["CHECK=yes"], "pytest"), (["CHECK=no"], "nocheck")])
def test_the_package_is_built_without_its_tests_unless_they_are_asked_for(
    fresh: Path, lacking: str, words: list[str], named: str
) -> None:
    done = make(fresh, "deb", *words, path=lacking)
    said = f"make deb: build dependencies are missing: apt install debhelper {named}"
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, said)
