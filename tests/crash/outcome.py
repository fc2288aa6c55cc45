"""What a case is given, and what it has found. Pure."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

#: So many findings are kept word by word; the rest is counted.
BAD_MAX = 5


@dataclass
class Job:
    """One case's order.

    Args:
        seed: of all its chances.
        budget_s: how long it may go on.
        folder: scratch of its own.
        stop: set where somebody wants the figures of what ran so far.
    """

    seed: int
    budget_s: float
    folder: Path
    stop: threading.Event = field(default_factory=threading.Event)
    began_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.began_s + self.budget_s - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.stop.is_set() or self.left_s <= 0


@dataclass
class Outcome:
    """What came of it."""

    what: str
    goal: int  #: how many there should be in the long form
    unit: str
    count: int = 0
    bad: int = 0
    findings: list[str] = field(default_factory=list)  #: the first of the bad ones
    figures: dict[str, str] = field(default_factory=dict)  #: what else was measured, in words
    skipped: str = ""  #: why it could not be run here

    def found(self, what: str) -> None:
        """Count one that broke a promise."""
        self.bad += 1
        if len(self.findings) < BAD_MAX:
            self.findings.append(what)
