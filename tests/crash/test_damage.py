"""Damage by chance in every file of a spool and a journal: a sample of what `make torture` does."""

from __future__ import annotations

import itertools
import logging
import random
import tempfile
from pathlib import Path

from tests.crash.damage import check, make_scene
from tests.support.seeds import new_seed

SAMPLE = 150


def test_damage_anywhere_is_survived_bounded_and_counted(caplog):
    seed = new_seed()
    print(f"seed {seed}")
    caplog.set_level(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="relay-damage-", dir="/dev/shm") as path:
        scene = make_scene(Path(path))
    for spoilt in itertools.islice(scene.places(random.Random(seed)), SAMPLE):
        print(spoilt)  # the last one that is said is the one that was not survived
        check(scene, spoilt)
