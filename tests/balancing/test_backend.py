"""rspd/balancing/backend.py: from one state to another. In any order of events: see test_pool_model."""

from __future__ import annotations

from collections.abc import Callable

from rspd.balancing.backend import Backend
from rspd.engine.loop import Loop
from tests.dialled import Scene
from tests.support import FakeClock, run

ADDRESS, OTHER = "127.0.0.1:1", "127.0.0.1:2"


def follow(script: Callable[[Backend, Scene], object]) -> None:
    """Run a script with a backend that goes down when it has failed twice within 10 seconds."""

    async def main(loop: Loop) -> None:
        async with Scene(loop, ADDRESS, max_fails=2, fail_timeout=10.0) as scene:
            script(scene[ADDRESS], scene)

    run(main, FakeClock())


def test_a_backend_that_is_back_has_no_failures() -> None:
    def script(backend: Backend, _: Scene) -> None:
        backend.failed(100.0, "refused")
        backend.failed(109.0, "refused")
        backend.try_out(109.5)
        backend.reached()
        backend.failed(110.0, "refused")
        assert backend.state == "up"

    follow(script)


def test_a_backend_that_was_taken_out_and_returns_has_no_failures() -> None:
    def script(backend: Backend, scene: Scene) -> None:
        backend.enter()  # or it would be another one that returns
        backend.failed(100.0, "refused")
        scene.apply(OTHER)
        scene.apply(ADDRESS)
        assert scene[ADDRESS] is backend
        backend.failed(100.0, "refused")
        assert backend.state == "up"

    follow(script)


def test_an_attempt_without_verdict_leaves_a_later_trial_alone() -> None:
    def script(backend: Backend, _: Scene) -> None:
        backend.failed(100.0, "refused")
        backend.failed(100.0, "refused")
        backend.try_out(110.0)
        first = backend.retry_at
        backend.try_out(120.0)
        backend.no_verdict(121.0, first)
        assert (backend.state, backend.retry_at) == ("trial", 130.0)
        backend.no_verdict(122.0, 130.0)
        assert (backend.state, backend.retry_at) == ("down", 122.0)

    follow(script)
