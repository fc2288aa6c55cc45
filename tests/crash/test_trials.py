"""Each hardship of `make torture` once; the longest of them only there."""

from __future__ import annotations

import random

import pytest

from tests.crash.trials import TRIALS, Scene
from tests.support.seeds import new_seed

QUICK = ("frozen_server", "clock_jumps", "too_few_descriptors", "thousand_sessions")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.torture) for name in TRIALS],
)
def test_a_hardship_costs_no_point(name, tmp_path, mlflow_server):
    seed = new_seed()
    print(f"seed {seed}")

    TRIALS[name](Scene(mlflow_server, tmp_path, random.Random(seed), f"{name} {seed}"))
