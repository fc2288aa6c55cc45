"""What went wrong since the daemon started: counted, and logged once a minute."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

log = logging.getLogger(__name__)

REPORT_EVERY_S = 60.0


#: Upper bounds of a disk's answers, in seconds: from memory to a disk that is about to fail.
SYNC_BOUNDS_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


class Durations:
    """How long something took, as a histogram."""

    def __init__(self) -> None:
        self.sum_s = 0.0
        self._counts = [0] * (len(SYNC_BOUNDS_S) + 1)

    def add(self, duration_s: float) -> None:
        """Count one."""
        self._counts[bisect_left(SYNC_BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, how many were not longer), as Prometheus wants it."""
        bounds = [*map(str, SYNC_BOUNDS_S), "+Inf"]
        return list(zip(bounds, accumulate(map(float, self._counts)), strict=True))


@dataclass
class Counters:
    """Counts by kind; `count` logs the first of a kind at once and then sums up each minute."""

    bad_messages: int = 0  #: bytes on the socket that are no message of ours
    fsync_failures: int = 0  #: groups that the disk did not take; ranks kept them
    resent_frames: int = 0  #: frames that were here already, or came too early
    _reported: dict[str, tuple[float, int]] = field(default_factory=dict)

    def count(self, kind: str, why: object) -> None:
        """Count one; say so, if it was not said within the last minute."""
        total = getattr(self, kind) + 1
        setattr(self, kind, total)
        said_s, said = self._reported.get(kind, (float("-inf"), 0))
        now_s = time.monotonic()
        if now_s - said_s >= REPORT_EVERY_S:
            self._reported[kind] = now_s, total
            log.warning("%s: %s (%d more, %d in all)", kind, why, total - said, total)
