"""A network that fails by chance: a few hundred faults of what `make torture` does."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest

from tests.crash.cases.network import NODES, SETTINGS, Watched, play
from tests.support.relay import Node
from tests.support.seeds import new_seed


@pytest.mark.timeout(240)
def test_a_network_that_fails_by_chance_costs_no_point_and_doubles_none(
    tmp_path, mlflow_server, mlflow_proxy
):
    seed = new_seed()
    print(f"seed {seed}")
    watched = Watched()

    with ExitStack() as stack:
        nodes = [
            stack.enter_context(Node(tmp_path / str(index), mlflow_proxy.uri, settings=SETTINGS))
            for index in range(NODES)
        ]
        for node in nodes:
            node.start()
        play(
            f"network {seed}",
            nodes,
            mlflow_server,
            mlflow_proxy,
            random.Random(seed),
            watched,
            faults=200,
        )

    print(f"{watched.faults.total()} faults: {dict(watched.faults)}")
    assert watched.faults.total() >= 200
    assert watched.points > 0
