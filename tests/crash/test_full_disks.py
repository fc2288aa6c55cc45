"""A real disk that others fill while a daemon and ranks are at work: a round of each kind."""

from __future__ import annotations

import random

import pytest

from tests.crash.cases.full_disks import KINDS, FullDisks
from tests.support.ext4 import why_not
from tests.support.seeds import new_seed


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_others_fill_costs_nothing_but_time(tmp_path, mlflow_server, kind):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    seed = new_seed()
    print(f"seed {seed}")

    FullDisks(mlflow_server).play(tmp_path, kind, random.Random(seed), 1)
