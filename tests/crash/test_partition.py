"""A few cuts of the network between two nodes of one run: of what `make torture` does."""

from __future__ import annotations

import pytest

from tests.crash.cases import partition
from tests.crash.outcome import Job
from tests.support.namespaces import why_not
from tests.support.seeds import new_seed


@pytest.mark.timeout(240)
def test_a_job_whose_nodes_are_cut_off_for_a_while_is_one_run_with_every_point_once(tmp_path):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    seed = new_seed()
    print(f"seed {seed}")

    outcome = partition.run(Job(seed, 200.0, tmp_path), goal=3)

    assert outcome.findings == []
    assert outcome.count >= 3
