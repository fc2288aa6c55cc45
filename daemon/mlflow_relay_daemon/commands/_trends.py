"""What a run did over the last looks at it: how quick, and which way its backlog goes. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

SPARK = "▁▂▃▄▅▆▇█"
LOOKS_MAX = 24  # a sparkline of so many cells


@dataclass(frozen=True)
class Trend:
    """One run's."""

    points_per_s: float | None  # delivered; None: seen once only
    records_per_s: float | None  # accepted
    waiting: tuple[int, ...]  # records at each look, oldest first


class Trends:
    """Remembers the last looks at a status."""

    def __init__(self) -> None:
        self._looks: deque[dict[str, Any]] = deque(maxlen=LOOKS_MAX)

    def add(self, status: dict[str, Any]) -> None:
        """Remember one more look."""
        runs = {run["run_id"]: run for run in status["runs"]}
        self._looks.append({"time_ms": status["time_ms"], "runs": runs})

    def of(self, run_id: str) -> Trend:
        """Return the trend of a run over the looks at it."""
        seen = [
            (look["time_ms"], look["runs"][run_id])
            for look in self._looks
            if run_id in look["runs"]
        ]
        waiting = tuple(run["waiting_records"] + run["journal_records"] for _, run in seen)
        return Trend(_rate(seen, "delivered_points"), _rate(seen, "accepted_records"), waiting)


def _rate(seen: list[tuple[int, dict[str, Any]]], field: str) -> float | None:
    if len(seen) < 2 or seen[-1][0] <= seen[0][0]:
        return None
    (begin_ms, first), (end_ms, last) = seen[0], seen[-1]
    # A daemon that has forgotten what it delivered of an ended run counts from zero again.
    grown: int = max(last[field] - first[field], 0)
    return grown * 1000 / (end_ms - begin_ms)


def sparkline(values: tuple[int, ...]) -> str:
    """Return the values as a row of bars, from zero to the largest."""
    top = max(values, default=0)
    if not top:
        return ""
    return "".join(SPARK[-(-value * (len(SPARK) - 1) // top)] for value in values)
