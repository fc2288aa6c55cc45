"""Failing system calls in a life of the spool: a few of what `make torture` does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mlflow_relay_daemon.spool import segment
from mlflow_relay_daemon.spool.disk import Disk
from tests.crash.cases.disk import plans, try_plan
from tests.crash.outcome import Outcome
from tests.crash.tracer import why_not
from tests.support.seeds import new_seed

PLANS = 40


@pytest.fixture(autouse=True)
def _needs_a_tracer(caplog):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    caplog.set_level("CRITICAL")


def test_a_call_that_fails_costs_nothing_that_was_acknowledged():
    seed = new_seed()
    print(f"seed {seed}")
    outcome = Outcome("", 0, "faults")

    for plan in random.Random(seed).sample(list(plans(str(seed))), PLANS):
        try_plan(plan, outcome)

    assert outcome.findings == []
    assert outcome.count == PLANS


def test_a_start_that_believes_the_second_fsync_is_found(monkeypatch):
    def sync(disk: Disk, path: Path, fd: int, end: int, *, is_trusted: bool) -> None:
        disk.sync(fd)

    monkeypatch.setattr(segment, "keep_found", sync)
    outcome = Outcome("", 0, "faults")

    for plan in plans("trusting"):
        if plan.killed_at and not outcome.bad:
            try_plan(plan, outcome)

    assert outcome.bad
