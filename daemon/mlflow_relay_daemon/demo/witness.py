"""What a rank logged and how long that took, noted beside the relay: the demo counts with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: key, step, value
Point = tuple[str, int, float]


class Witness:
    """Stands beside one rank's log calls."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._calls: list[tuple[int, int, int, dict[str, float]]] = []

    def watch(self, log_metrics: Callable[..., None]) -> Callable[..., None]:
        """Return the same function, watched."""

        def watched(metrics: Mapping[str, Any], step: int) -> None:
            begin_ns = time.monotonic_ns()
            log_metrics(metrics, step=step)
            end_ns = time.monotonic_ns()
            values = {key: float(value) for key, value in metrics.items()}
            self._calls.append((begin_ns, end_ns, step, values))

        return watched

    def write(self, folder: Path) -> None:
        """Write it down; to be called at once after the run has ended."""
        end_ns = time.monotonic_ns() - self._calls[-1][1]
        testimony = {"rank": self._rank, "calls": self._calls, "end_ns": end_ns}
        _path(folder, self._rank).write_text(json.dumps(testimony), encoding="ascii")


@dataclass(frozen=True)
class Testimony:
    """What a witness wrote. Times are those of the machine's monotonic clock."""

    rank: int
    calls: list[tuple[int, int, int, dict[str, float]]]  #: begin and end in ns, step, values
    end_ns: int  #: how long `end` took

    def points(self) -> Iterator[Point]:
        """Yield what MLflow must have of this rank, under the keys that `start_run` promises."""
        prefix = f"rank_{self.rank}/" if self.rank else ""
        for _, _, step, values in self.calls:
            for key, value in values.items():
                yield prefix + key, step, value

    def calls_s(self) -> list[float]:
        """Return how long each call took."""
        return [(end_ns - begin_ns) / 1e9 for begin_ns, end_ns, _, _ in self.calls]

    def calls_between(self, begin_s: float, end_s: float) -> int:
        """Return how many calls returned between two times of time.monotonic."""
        return sum(begin_s <= end_ns / 1e9 < end_s for _, end_ns, _, _ in self.calls)


def read_testimony(folder: Path, rank: int) -> Testimony:
    """Return what a rank's witness wrote. Raises: FileNotFoundError: it did not get so far."""
    return Testimony(**json.loads(_path(folder, rank).read_text(encoding="ascii")))


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"
