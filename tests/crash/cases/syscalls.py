"""SIGKILL at every system call with which a spool changes its disk."""

from __future__ import annotations

import logging
import random
import tempfile
from functools import partial
from pathlib import Path

from mlflow_relay_daemon.spool.disk import Disk
from tests.crash import life
from tests.crash.outcome import Job, Outcome
from tests.crash.teller import Teller, last_known
from tests.crash.tracer import KILL, Call, Fault, run_traced, why_not


class Killer:
    """Kills at the n-th call that changes something below a folder."""

    def __init__(self, root: Path, number: int) -> None:
        self._root, self._left = root, number
        self.hit = ""  #: the call at which it did

    def before(self, call: Call) -> Fault | None:
        self._left -= call.changes(self._root)
        if self._left or self.hit:
            return None
        self.hit = call.name
        return KILL

    def after(self, call: Call, result: int) -> None:
        """Nothing is asked of what went well."""


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "The n-th write, fdatasync, fsync, rename, unlink, mkdir, open for writing or fallocate of a "
        "process that lives the life of a spool (append, ack, deliver, letters, cards, ends, "
        "restarts) is its last, for every n; what it had said that it had acknowledged must be there",
        0,
        "kills",
    )
    outcome.skipped = why_not()
    if outcome.skipped:
        return outcome
    lives = 0
    kinds: dict[str, int] = {}
    logging.disable(logging.CRITICAL)
    try:
        while not job.is_over:
            number = 1
            while not job.is_over and (hit := kill_at(number, f"{job.seed}/{lives}", outcome)):
                kinds[hit] = kinds.get(hit, 0) + 1
                number += 1
            lives += not job.is_over
    finally:
        logging.disable(logging.NOTSET)
    outcome.figures = {
        "lives killed at every call": f"{lives:,}",
        **{f"at {name}": f"{count:,}" for name, count in sorted(kinds.items())},
    }
    return outcome


def kill_at(number: int, chance: str, outcome: Outcome) -> str:
    """Return the call at which the process was killed; "" if it lived to its end."""
    with tempfile.TemporaryDirectory(prefix="relay-syscalls-", dir="/dev/shm") as path:
        root = Path(path) / "spool"
        killer = Killer(root, number)
        live = partial(life.live_by_chance, Teller(root), Disk(), random.Random(chance))
        ended = run_traced(live, killer)
        if ended.status == 0:
            return ""
        outcome.count += 1
        outcome.goal += 1
        try:
            assert killer.hit, f"status {ended.status}: {ended.said[-500:]}"
            with life.opened(Disk(), root) as spool:
                life.check(spool, last_known(ended.said), in_order=True)
        except Exception as error:  # any is a finding
            outcome.found(f"{killer.hit} {number} of life {chance}: {error!r}")
    return killer.hit or "no call of ours"
