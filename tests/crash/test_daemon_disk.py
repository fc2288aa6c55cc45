"""A daemon that fails at, or dies of, single system calls: a little of what `make torture` does."""

from __future__ import annotations

import random

import pytest

from tests.crash.cases.daemon_disk import FAULTS, deliver_a_rank, try_plan
from tests.crash.cases.disk import EIO, BadDisk, Plan
from tests.crash.outcome import Outcome
from tests.crash.tracer import KILL, Call, Fault, why_not
from tests.support.relay import Node
from tests.support.seeds import new_seed


@pytest.fixture(autouse=True)
def _needs_a_tracer():
    reason = why_not()
    if reason:
        pytest.skip(reason)


class NothingGoes(BadDisk):
    """No staged file can be removed."""

    def before(self, call: Call) -> Fault | None:
        return EIO if call.name == "unlink" and "/staging/" in call.path else None


def test_a_staged_file_that_cannot_be_removed_stops_no_upload(tmp_path, mlflow_server):
    outcome = Outcome("", 0, "faults")

    with Node(tmp_path / f"node-{new_seed()}", mlflow_server.uri) as node:
        deliver_a_rank(node, NothingGoes(node.spool), mlflow_server, outcome)
        assert len(list((node.spool / "staging").glob("*/*"))) == 1

    assert outcome.findings == []


@pytest.mark.parametrize(("is_heir", "calls"), [(False, 70), (True, 25)])
def test_a_daemon_whose_call_fails_or_is_its_last_goes_on_or_comes_back(
    tmp_path, mlflow_server, is_heir, calls
):
    """The numbers are about how many calls such a life makes."""
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    fault, times = rng.choice([*FAULTS, (KILL, 1)])
    outcome = Outcome("", 0, "faults")

    plan = Plan("", rng.randint(1, calls), fault, times, killed_at=int(is_heir))
    try_plan(tmp_path / f"node-{seed}", mlflow_server, plan, outcome)

    assert outcome.findings == []
