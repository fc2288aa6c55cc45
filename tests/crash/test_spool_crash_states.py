"""Every crash state of a scripted life of the spool, recovered and looked through.

The system calls of the spool's disk are recorded. After each call the power may fail, or the daemon
alone be killed. Each state that this may leave is laid out as a folder and opened by a new daemon.

Source: INTERNALS.md, crash states.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.crash.explorer import Explorer, record_life
from tests.crash.life import live_by_chance
from tests.crash.recorder import RecordedDisk
from tests.support.seeds import new_seed


@pytest.fixture
def folder(caplog: pytest.LogCaptureFixture) -> Iterator[Path]:
    caplog.set_level(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="relay-crash-", dir="/dev/shm") as path:
        yield Path(path)


def test_whatever_was_acknowledged_is_found_after_any_crash(folder):
    moments = record_life(folder / "life")
    explorer = Explorer(folder)

    explorer.explore(moments)

    print(f"{len(moments)} moments, {explorer.opened} states opened")
    assert explorer.failures == []
    assert explorer.opened > 1000


def test_whatever_was_acknowledged_in_a_life_by_chance_is_found_after_any_crash(folder):
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    moments = record_life(folder / "life", life=partial(live_by_chance, rng=rng))
    explorer = Explorer(folder)

    explorer.explore(moments[:100], rng)

    assert explorer.failures == []


# ── the explorer itself: more planted bugs are in planted.py ──


class NoCut(RecordedDisk):
    """Leaves what failed where it is, and is told that all went well."""

    def write(self, fd: int, data: bytes) -> None:
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        try:
            super().sync(fd)
        except OSError:
            super().sync(fd)  # "a retry after a failed fdatasync succeeds and lies"


def test_an_fsync_that_is_tried_again_is_found(folder):
    moments = record_life(folder / "life", NoCut)
    explorer = Explorer(folder, failures_max=1)

    explorer.explore(moments)

    assert explorer.failures
