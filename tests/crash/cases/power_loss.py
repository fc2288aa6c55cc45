"""The power of a real file system fails while a spool is written to it: ext4 on a loop device."""

from __future__ import annotations

import itertools
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlflow_relay_daemon.spool.disk import Disk
from tests.crash import life
from tests.crash.child import Child
from tests.crash.outcome import Job, Outcome
from tests.crash.teller import Teller, last_known
from tests.support.ext4 import FLAGS, Ext4, why_not

GOAL = 200
MEGABYTES = 64
LIFE_S_MAX = 0.25


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "A process lives lives of a spool on an ext4 of its own (a loop device over a file in "
        f"memory); at a moment within {LIFE_S_MAX} s that file system is shut down by "
        f"EXT4_IOC_SHUTDOWN ({', '.join(FLAGS)}, by turns), unmounted and mounted again, which "
        "replays its journal; what had been said to be acknowledged must be there, and the spool go "
        "on. What the device itself had taken is not lost here",
        GOAL,
        "power failures",
    )
    outcome.skipped = why_not()
    if outcome.skipped:
        return outcome
    cycles = PowerLoss()
    logging.disable(logging.CRITICAL)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="relay-power-", dir="/dev/shm") as path,
            Ext4(Path(path), MEGABYTES) as disk,
        ):
            for number in itertools.count():
                if job.is_over:
                    break
                cycles.play(disk, f"{job.seed}/{number}", list(FLAGS)[number % len(FLAGS)], outcome)
    finally:
        logging.disable(logging.NOTSET)
    outcome.figures = cycles.figures()
    return outcome


class PowerLoss:
    """Cycles of a life, a power failure, and a look at what is left.

    Args: make_disk: the spool's; another one for a planted bug.
    """

    def __init__(self, make_disk: Callable[[], Disk] = Disk) -> None:
        self._make_disk = make_disk
        self._by_flag = dict.fromkeys(FLAGS, 0)
        self._acked = self._lost_bytes = self._with_loss = 0

    def play(self, disk: Ext4, chance: str, flag: str, outcome: Outcome) -> None:
        """Play one cycle. The file system is mounted and empty before and after it."""
        rng = random.Random(chance)
        root = disk.folder / "spool"
        with Child(partial(self._live, root, rng)) as child:
            child.go()
            time.sleep(rng.uniform(0, LIFE_S_MAX))  # the moment is the point
            # What is said later nobody hears: an fdatasync that is cut short by the shutdown of a
            # journal that is not flushed may return 0. Segments may go as long as anything goes.
            heard = last_known(child.said)
            disk.fail(flag)
            child.kill()
            known = replace(heard, settled=last_known(child.said).settled)
        seen = _bytes_in(root)
        disk.unmount()
        disk.mount()
        lost = seen - _bytes_in(root)
        self._lost_bytes += max(0, lost)
        self._with_loss += lost > 0
        self._by_flag[flag] += 1
        self._acked += sum(known.acked.values())
        outcome.count += 1
        try:
            with life.opened(Disk(), root) as spool:
                life.check(spool, known, in_order=True)
        except Exception as error:  # any is a finding
            outcome.found(f"{flag}, life {chance}: {error!r}")
        shutil.rmtree(root, ignore_errors=True)
        Disk().sync_folder(disk.folder)  # or the next failure brings it back

    def _live(self, root: Path, rng: random.Random) -> None:
        """Live until the power fails: then nothing goes any more."""
        teller = Teller(root)
        while True:
            life.live_by_chance(teller, self._make_disk(), rng)  # type: ignore[arg-type]

    def figures(self) -> dict[str, str]:
        return {
            **{f"failures of the kind {flag!r}": f"{n:,}" for flag, n in self._by_flag.items()},
            "acknowledged records that were looked for": f"{self._acked:,}",
            "failures that took something unacknowledged": f"{self._with_loss:,}",
            "bytes that they took": f"{self._lost_bytes:,}",
        }


def _bytes_in(root: Path) -> int:
    """Return the size of all files, as far as it can be told."""
    total = 0
    for path in root.rglob("*"):
        total += path.lstat().st_size
    return total
