"""The backends of a pool in words, for the log and the status."""

from __future__ import annotations

from collections.abc import Sequence

from rspd.balancing.backend import Backend

# How many backends are named with the reason why each is down.
REASONS_MAX = 3


def describe(backends: Sequence[Backend]) -> str:
    """Which backends there are, and which are down."""
    down = [f"{backend.name} down: {backend.why_down}" for backend in backends if not backend.in_service]
    if not backends:
        return "no backend known yet"
    if len(backends) == 1:
        return f"backend {down[0] if down else backends[0].name}"
    which = f" ({_first(down)})" if down else ""
    return f"{len(backends) - len(down)} of {len(backends)} backends up{which}"


def situation(backends: Sequence[Backend]) -> str:
    """Why there is no backend to dial."""
    if any(backend.in_service for backend in backends):
        return "every backend has its max_connections"
    down = [f"{backend.name} is down: {backend.why_down}" for backend in backends]
    return _first(down) or "no backend is known"


def _first(reasons: Sequence[str]) -> str:
    """The first reasons, and how many more there are."""
    more = [f"and {len(reasons) - REASONS_MAX} more"] if len(reasons) > REASONS_MAX else []
    return "; ".join([*reasons[:REASONS_MAX], *more])
