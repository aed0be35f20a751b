"""Machines for the tests, as in tests/system: SUITES, DEB and REQUIRED=1 are the same."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import (  # noqa: F401  # hooks and fixtures
    bare,
    deb,
    installed,
    machine,
    pytest_configure,
    pytest_itemcollected,
    pytest_terminal_summary,
)
from tests.system.test_package import newer  # noqa: F401  # a fixture

FOLDER = Path(__file__).parent

# What needs the whole host, and takes longest: these measure, or hand over most of the descriptors that a user may have
# in flight (unix(7)), and the user rspd of all machines is one.
ALONE = ["test_restart", "test_states", "test_gap", "test_room", "test_numbers"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files in order."""
    items.sort(key=lambda item: ALONE.index(item.path.stem) if item.path.stem in ALONE else len(ALONE))


@pytest.fixture(autouse=True)
def turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests that need the host alone have it; the others run beside each other."""
    folder = tmp_path_factory.getbasetemp()
    with open((folder.parent if folder.name.startswith("popen-") else folder) / "turn", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if request.path.stem in ALONE else fcntl.LOCK_SH)
        yield


@pytest.fixture(scope="session")
def former() -> Path:
    """The package of 0.2.0, the last version that hands nothing over, as it was released."""
    return FOLDER / "rspd_0.2.0_all.deb"
