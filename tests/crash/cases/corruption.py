"""Damage at every byte of segments, watermark, card and journal."""

from __future__ import annotations

import logging
import random
import tempfile
from pathlib import Path

from tests.crash.damage import check, make_scene
from tests.crash.outcome import Job, Outcome


def run(job: Job) -> Outcome:
    outcome = Outcome(
        "Each byte of two segments (64 KiB and a small one), the watermark, the card and a dead "
        "rank's journal flipped, the file cut there, bytes zeroed or doubled; a daemon adopts and "
        "delivers what is left. No crash, no point that nobody logged, nothing lost but the frames "
        "that were hit, and what is lost is counted",
        0,
        "damaged files",
    )
    rng = random.Random(job.seed)
    kinds: dict[str, int] = {}
    logging.disable(logging.CRITICAL)  # the daemon says of each what it found
    try:
        with tempfile.TemporaryDirectory(prefix="relay-damage-", dir="/dev/shm") as path:
            scene = make_scene(Path(path))
        for spoilt in scene.places(rng):
            outcome.goal += 1
            if job.is_over:
                continue
            outcome.count += 1
            kinds[spoilt.kind] = kinds.get(spoilt.kind, 0) + 1
            try:
                check(scene, spoilt)
            except Exception as error:  # any is a finding
                outcome.found(f"{spoilt}: {error!r}")
    finally:
        logging.disable(logging.NOTSET)
    outcome.figures = {kind: f"{count:,}" for kind, count in kinds.items()}
    return outcome
