"""SIGKILL at single system calls of a life of the spool: a few of what `make torture` does."""

from __future__ import annotations

import random

import pytest

from tests.crash.cases.syscalls import kill_at
from tests.crash.outcome import Outcome
from tests.crash.tracer import why_not
from tests.support.seeds import new_seed

KILLS = 20
CALLS = 60  # a life has more


def test_a_kill_at_a_system_call_loses_nothing_that_was_acknowledged(caplog):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    seed = new_seed()
    print(f"seed {seed}")
    caplog.set_level("CRITICAL")
    outcome = Outcome("", 0, "kills")

    for number in random.Random(seed).sample(range(1, CALLS), KILLS):
        kill_at(number, str(seed), outcome)

    assert outcome.findings == []
    assert outcome.count > 0
