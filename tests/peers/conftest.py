"""What all tests of this folder have in common."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them: they run other programs, and take their time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("peers")
