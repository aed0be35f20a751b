"""What the tests of running share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest


@pytest.fixture
def stack(no_descriptor_is_left_open: None) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
