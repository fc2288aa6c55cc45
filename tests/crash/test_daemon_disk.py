"""A daemon whose disk fails at a single system call: one of what `make torture` does."""

from __future__ import annotations

import random

import pytest

from tests.crash.cases.daemon_disk import FAULTS, try_plan
from tests.crash.cases.disk import Plan
from tests.crash.outcome import Outcome
from tests.crash.tracer import why_not
from tests.support.seeds import new_seed

CALLS = 70  # a life has about so many


def test_a_daemon_goes_on_when_its_disk_is_well_again(tmp_path, mlflow_server):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    fault, calls = rng.choice(FAULTS)
    outcome = Outcome("", 0, "faults")

    plan = Plan("", rng.randint(1, CALLS), fault, calls)
    try_plan(tmp_path / f"node-{seed}", mlflow_server, plan, outcome)

    assert outcome.findings == []
