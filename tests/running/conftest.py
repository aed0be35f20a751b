"""What the tests of running share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests import keeper
from tests.running.routed import Scene


@pytest.fixture
def stack(no_descriptor_is_left_open: None) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def store(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> keeper.Store:
    """The manager's part, also for a process of another user."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    os.chmod(folder, 0o755)
    store = keeper.Store(folder)
    os.chmod(store.path, 0o777)
    stack.callback(store.close)
    monkeypatch.setenv("NOTIFY_SOCKET", store.path)
    # As soon as a test has found that something does not fit.
    monkeypatch.setattr("rspd.running.handover.AGAIN", 0.01)
    return store


@pytest.fixture
def scene(store: keeper.Store, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Scene:
    scene = Scene(store, stack)
    monkeypatch.setattr("rspd.serving.connection.write", scene.write)
    return scene
