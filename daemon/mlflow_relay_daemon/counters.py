"""What went wrong since the daemon started: counted, and logged once a minute."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

REPORT_EVERY_S = 60.0


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
