"""What the Makefile would do, asked without doing it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PATIENCE, free_port

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
    return subprocess.run(
        ["make", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


@pytest.mark.parametrize(
    ("target", "installed"),
    [
        ("run", ["."]),
        ("bench", ["."]),
        ("bench-restarts", ["."]),
        ("bench-routes", ["."]),
        ("test", [".", "'.[test]'"]),
        ("test-system", [".", "'.[test]'"]),
        ("test-handover", [".", "'.[test]'"]),
        ("lint", [".", "'.[test]'", "'.[test,lint]'"]),
    ],
)
def test_each_target_installs_what_it_needs_and_says_so_before(fresh: Path, target: str, installed: list[str]) -> None:
    would = make(fresh, "-n", target).stdout
    assert re.findall(r"pip install -q -e (\S+)$", would, re.MULTILINE) == installed
    told = re.findall(r"^echo 'make: .*\.venv.*: less than a minute, once'$", would, re.MULTILINE)
    assert len(told) == len(installed)


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


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "nocheck"),
        (["CHECK=yes"], "pytest"),
        (["CHECK=no"], "nocheck"),
        (["DEB_BUILD_OPTIONS=parallel=2"], "nocheck"),
    ],
)
def test_the_package_is_built_without_its_tests_unless_they_are_asked_for(
    fresh: Path, lacking: str, words: list[str], named: str
) -> None:
    done = make(fresh, "deb", *words, path=lacking)
    said = f"make deb: build dependencies are missing: apt install debhelper {named}"
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, said)


def test_a_package_is_not_built_where_the_path_has_a_blank(fresh: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    shutil.copy(fresh / "Makefile", folder)
    done = make(folder, "deb")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        f"make deb: pybuild needs a path without blanks, found {folder}",
    )


@pytest.fixture
def ready(fresh: Path) -> Path:
    """The folder with an environment made: this one, and an rspd that ends at once."""
    programs = fresh / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    (fresh / ".venv/run").touch()
    (fresh / "rspd").mkdir()
    (fresh / "rspd/__init__.py").touch()  # or another rspd that PYTHONPATH names would come first
    (fresh / "rspd/__main__.py").write_text("import sys; sys.exit(69)")
    return fresh


def test_run_ends_as_rspd_does(ready: Path) -> None:
    done = make(ready, "run", f"PORT={free_port()}", f"BACKEND_PORT={free_port()}")
    assert "Error 69" in done.stderr


@pytest.mark.parametrize(("port", "why"), [("taken", "[Errno 98] Address already in use"), ("8080x", "'8080x'")])
def test_run_says_why_a_port_cannot_be_used(ready: Path, port: str, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1]) if port == "taken" else port
        done = make(ready, "run", f"PORT={port}", "BACKEND_PORT=0")
    said = done.stderr.splitlines()[0]
    assert done.returncode == 2
    assert said.startswith(f"make run: port {port} or 0 cannot be used: {why}")
    assert said.endswith("; choose PORT=... BACKEND_PORT=...")
