"""Machines for the tests. SUITES names them, DEB a package in place of a new one; REQUIRED=1 forbids to skip."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.machine import Machine, NoMachineError, booted, check_host

SUITES = os.environ.get("SUITES", "bookworm trixie").split()

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parent.parent

# What takes longest begins first; what measures is left for the end, when less else runs.
ORDER = {"test_idle": 0, "test_cost": 2}

# What the workers learn from the process that starts them: why all is skipped.
REASON = "RSPD_REASON_TO_SKIP"


def pytest_configure(config: pytest.Config) -> None:
    """Build the package, once for all workers."""
    if hasattr(config, "workerinput"):
        return
    try:
        check_host()
        if "DEB" not in os.environ:
            os.environ["DEB"] = str(_build())
    except NoMachineError as error:
        os.environ[REASON] = str(error)


def _build() -> Path:
    made = subprocess.run(["make", "-C", str(PROJECT), "deb"], capture_output=True, text=True)
    if "make deb: " in made.stderr:  # says what is missing
        raise NoMachineError(made.stderr.splitlines()[0])
    if made.returncode:
        pytest.exit(f"make deb ended with {made.returncode}:\n{made.stdout[-4000:]}{made.stderr[-4000:]}", 1)
    return next((PROJECT / "dist").glob("rspd_*_all.deb"))


def pytest_itemcollected(item: pytest.Item) -> None:
    """A file's tests of one suite run on one worker, for they share a machine."""
    suite = item.callspec.params.get("bare", "host") if hasattr(item, "callspec") else "host"
    item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{suite}"))
    if reason := os.environ.get(REASON):
        item.add_marker(pytest.mark.skip(reason))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files in order."""
    items.sort(key=lambda item: ORDER.get(item.path.stem, 1))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def deb() -> Path:
    """The package."""
    return Path(os.environ["DEB"])


@pytest.fixture(scope="module", params=SUITES)
def bare(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine without the package, of its own for each file."""
    try:
        machine = booted(request.param)
        with machine as started:
            yield started
    except NoMachineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def installed(bare: Machine, deb: Path) -> Machine:
    """A machine with the package, not running."""
    bare.install(deb)
    bare.systemctl("disable", "--now", "rspd")
    return bare


@pytest.fixture
def machine(installed: Machine) -> Iterator[Machine]:
    """The file's machine as it was after the installation, the service not running, the journal empty."""
    configuration = installed.path("/etc/rspd.yaml").read_text()
    installed.mark()
    yield installed
    provoked = installed.path("/opt/fault").exists()
    unexpected = [] if provoked else installed.log("^Traceback")
    installed.systemctl("stop", "rspd*.socket", "rspd*.service")
    installed.systemctl("disable", "--quiet", "rspd.socket")
    installed.shell("rm -rf /etc/systemd/system/rspd* /etc/rspd/* /opt/fault")
    installed.write("/etc/rspd.yaml", configuration)
    installed.systemctl("daemon-reload")
    installed.systemctl("reset-failed")
    assert not unexpected, installed.log()
