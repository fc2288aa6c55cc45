"""Power failures and kills at every step of lives of the spool."""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.crash.explorer import Explorer, record_life
from tests.crash.life import live, live_by_chance
from tests.crash.outcome import Job, Outcome

GOAL = 1_000_000


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "Power failure or SIGKILL after every write, fsync, rename and unlink of the spool: "
        "sets of names kept × unsynced data kept, dropped, torn at 512 B and 4 KiB; "
        "each is opened by a new daemon",
        GOAL,
        "states",
    )
    lives = moments_in_all = 0
    began_s = time.monotonic()
    logging.disable(logging.CRITICAL)  # the daemon says of each what it found
    try:
        # In memory: the model says what is on the disk.
        with tempfile.TemporaryDirectory(prefix="relay-states-", dir="/dev/shm") as path:
            while not job.is_over and outcome.count < GOAL:
                rng = random.Random(f"{job.seed}/{lives}")
                life = partial(live_by_chance, rng=rng) if lives else live
                moments = record_life(Path(path) / "life", life=life)
                explorer = Explorer(Path(path))
                explorer.explore(moments, rng)
                for failure in explorer.failures:
                    outcome.found(f"life {job.seed}/{lives}, {failure}")
                outcome.count += explorer.opened
                moments_in_all += len(moments)
                lives += 1
                shutil.rmtree(Path(path) / "life")
    finally:
        logging.disable(logging.NOTSET)
    outcome.figures = {
        "lives": f"{lives:,}",
        "moments": f"{moments_in_all:,}",
        "states/s": f"{outcome.count / (time.monotonic() - began_s):.0f}",
    }
    return outcome
