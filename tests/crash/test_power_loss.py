"""Power failures of a real ext4: a few of what `make torture` does."""

from __future__ import annotations

import pytest

from mlflow_relay_daemon.spool.disk import Disk
from tests.crash.cases.power_loss import MEGABYTES, PowerLoss
from tests.crash.outcome import Outcome
from tests.support.ext4 import FLAGS, Ext4, why_not
from tests.support.seeds import new_seed

CYCLES = 2
CYCLES_MAX = 50


@pytest.fixture
def ext4(tmp_path, caplog):
    caplog.set_level("CRITICAL")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Ext4(tmp_path, MEGABYTES) as disk:
        yield disk


def test_what_was_acknowledged_is_there_after_the_power_has_failed(ext4):
    seed = new_seed()
    print(f"seed {seed}")
    outcome = Outcome("", 0, "power failures")
    cycles = PowerLoss()

    for number in range(CYCLES):
        for flag in FLAGS:
            cycles.play(ext4, f"{seed}/{number}", flag, outcome)

    assert outcome.findings == []
    assert outcome.count == CYCLES * len(FLAGS)


class Hasty(Disk):
    """Says that all is on the disk."""

    def sync(self, fd: int) -> None:
        """As if it were."""


def test_a_spool_that_does_not_sync_is_found(ext4):
    outcome = Outcome("", 0, "power failures")
    cycles = PowerLoss(Hasty)

    for number in range(CYCLES_MAX):
        if not outcome.bad:
            cycles.play(ext4, str(number), "no log flush", outcome)

    assert outcome.bad
