"""Ranks that are killed at, or fail in, single system calls: a few of what `make torture` does."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.crash.cases import rank_disk, rank_syscalls
from tests.crash.outcome import Outcome
from tests.crash.tracer import why_not
from tests.support.relay import Node
from tests.support.seeds import new_seed

CALLS = 500  # a life has about so many
DISK_CALLS = 20
TRIES = 4


@pytest.fixture(autouse=True)
def _needs_a_tracer():
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def rng():
    seed = new_seed()
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.parametrize("is_served", [True, False], ids=["with a daemon", "alone"])
def test_what_a_killed_rank_had_logged_arrives(tmp_path, mlflow_server, rng, is_served):
    outcome = Outcome("", 0, "kills")
    numbers = sorted(rng.sample(range(1, CALLS), TRIES))

    with Node(tmp_path / f"node-{rng.random()}", mlflow_server.uri) as node:
        rank_syscalls.play(node, mlflow_server, numbers, Counter(), outcome, is_served=is_served)

    assert outcome.findings == []


@pytest.mark.parametrize("is_served", [True, False], ids=["with a daemon", "alone"])
def test_a_bad_disk_under_a_rank_raises_nothing_and_what_is_lost_is_counted(
    tmp_path, mlflow_server, rng, is_served
):
    outcome = Outcome("", 0, "faults")
    numbers = rng.sample(range(1, DISK_CALLS), TRIES)
    plans = [(number, *rng.choice(rank_disk.FAULTS)) for number in numbers]

    with Node(tmp_path / f"node-{rng.random()}", mlflow_server.uri) as node:
        rank_disk.play(node, mlflow_server, plans, Counter(), outcome, is_served=is_served)

    assert outcome.findings == []
