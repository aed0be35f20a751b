"""What tests of several files ask for by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import open_descriptors


@pytest.fixture
def no_descriptor_is_left_open() -> Iterator[None]:
    """The test, and the fixtures that ask for this one, close what they open."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before
