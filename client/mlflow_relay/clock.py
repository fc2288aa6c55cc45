"""The time as records, cards and MLflow have it."""

from __future__ import annotations

from time import time_ns


def now_ms() -> int:
    """Return ms since 1970, UTC."""
    return time_ns() // 1_000_000
