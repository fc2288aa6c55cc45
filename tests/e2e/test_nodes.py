"""One run on several nodes: several daemons with spools of their own on one machine."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import MlflowServer
from tests.support.lineage import (
    Rank,
    collect_and_leave,
    deliver_and_leave,
    first_id,
    fresh_key,
    make_one,
    offline_node,
    only,
    seen,
    show,
    values,
    wait_until_all_ended,
    when,
)
from tests.support.proxy import Action, Exchange, hold
from tests.support.relay import Node, finish, wait_until
from tests.support.seeds import new_seed

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

EXPERIMENT = "nodes"


@pytest.fixture
def nodes(tmp_path, mlflow_server) -> Iterator[list[Node]]:
    """Two nodes; their daemons are not started yet."""
    with (
        Node(tmp_path / "first", mlflow_server.uri) as first,
        Node(tmp_path / "second", mlflow_server.uri) as second,
    ):
        yield [first, second]


def shape(run_key: str, rank: int, world_size: int = 2, **more: Any) -> dict[str, Any]:
    """Return how a rank starts its part of a job on several nodes."""
    return {
        "run_key": run_key,
        "rank": rank,
        "world_size": world_size,
        "experiment_name": EXPERIMENT,
        **more,
    }


def ranks_on(nodes: Sequence[Node], run_key: str) -> list[Rank]:
    """Start one rank on each node."""
    return [Rank(node, **shape(run_key, rank, len(nodes))) for rank, node in enumerate(nodes)]


def check_values(server: MlflowServer, run: MlflowRun, expected: dict[int, Sequence[int]]) -> None:
    """Each rank's values are there under its own key, each once, and nobody else's."""
    keys = {("loss" if rank == 0 else f"rank_{rank}/loss"): v for rank, v in expected.items()}
    points = server.all_points(run.info.run_id)
    found = {key: sorted(point[1] for point in points if point[0] == key) for key in keys}
    assert found == {key: list(steps) for key, steps in keys.items()}
    assert len(points) == sum(map(len, expected.values()))


def status_is(status: str) -> Any:
    return lambda run: run.info.status == status


# ── who makes the run ──


def test_other_nodes_wait_for_an_owner_that_is_late(nodes, mlflow_server):
    first, second = nodes
    key = fresh_key()
    second.start()
    make_one(second, **shape(key, rank=1))
    run_id = first_id(key)
    words = "waits for the node of rank 0 to make the run"
    wait_until(lambda: words in (second.run(run_id)["last_error"] or ""), words)
    assert second.run(run_id)["waiting_records"] == 6
    assert seen(mlflow_server, run_id) == []
    first.start()
    make_one(first, **shape(key, rank=0))
    run = when(mlflow_server, run_id, status_is("FINISHED"), "both have ended")
    for node in nodes:
        wait_until_all_ended(node, [run_id])
    check_values(mlflow_server, run, {0: range(5), 1: range(5)})
    assert second.run(run_id)["mlflow_run_id"] == run.info.run_id


def test_other_nodes_wait_for_an_owner_that_is_offline(tmp_path, mlflow_server):
    with (
        offline_node(tmp_path / "first", mlflow_server.uri) as first,
        Node(tmp_path / "second", mlflow_server.uri) as second,
    ):
        first.start()
        second.start()
        key = fresh_key()
        ranks = ranks_on([first, second], key)
        for rank in ranks:
            rank.log(0, 7)
            rank.leave()
        run_id = first_id(key)
        words = "waits for the node of rank 0 to make the run"
        wait_until(lambda: words in (second.run(run_id)["last_error"] or ""), words)
        assert seen(mlflow_server, run_id) == []
        collect_and_leave(first, runs=1)
        deliver_and_leave(first, timeout_s=120)
        wait_until_all_ended(second, [run_id])
        run = when(mlflow_server, run_id, status_is("FINISHED"), "both have ended")
        check_values(mlflow_server, run, {0: range(7), 1: range(7)})


def keep_response(done: threading.Event, until: threading.Event) -> Action:
    """Let the server do it, set `done`, and never pass on its response."""

    def act(exchange: Exchange) -> bool:
        exchange.forward()
        done.set()
        until.wait(60.0)
        return False

    return act


@pytest.mark.parametrize("is_made", [False, True], ids=["before it is made", "after it is made"])
def test_an_owner_killed_in_the_middle_of_the_creation_leaves_one_run(
    is_made, tmp_path, mlflow_server, mlflow_proxy
):
    until, asked = threading.Event(), threading.Event()
    action = keep_response(asked, until) if is_made else hold(until, asked)
    mlflow_proxy.fail(action, on=b"runs/create", times=1)
    key = fresh_key()
    run_id = first_id(key)
    with (
        Node(tmp_path / "first", mlflow_proxy.uri) as first,
        Node(tmp_path / "second", mlflow_server.uri) as second,
    ):
        second.start()
        make_one(second, **shape(key, rank=1))
        first.start()
        rank = Rank(first, **shape(key, rank=0))
        rank.log(0, 5)
        assert asked.wait(60.0)
        first.kill()
        assert len(seen(mlflow_server, run_id)) == is_made
        first.start()
        wait_until_all_ended(second, [run_id])
        # If it was not made, the first try comes to the server only now.
        until.set()
        wait_until(lambda: len(seen(mlflow_server, run_id)) == 2 - is_made, "the first try is done")
        rank.leave()
        wait_until_all_ended(first, [run_id])
        run = when(mlflow_server, run_id, status_is("FINISHED"), "both have ended")
        check_values(mlflow_server, run, {0: range(5), 1: range(5)})


def test_two_daemons_that_make_the_run_at_once_make_one(tmp_path, mlflow_server, mlflow_proxy):
    """A rank 0 on each of two nodes: a job that was started again elsewhere."""
    until = threading.Event()
    mlflow_proxy.fail(hold(until), on=b"runs/create", times=2)
    key = fresh_key()
    run_id = first_id(key)
    with (
        Node(tmp_path / "first", mlflow_proxy.uri) as first,
        Node(tmp_path / "second", mlflow_proxy.uri) as second,
    ):
        for steps, node in (((0, 5), first), ((5, 10), second)):
            node.start()
            make_one(node, steps, **shape(key, rank=0, world_size=1))
        wait_until(lambda: mlflow_proxy.requests("runs/create") == 2, "both are making it")
        assert seen(mlflow_server, run_id) == []
        until.set()
        for node in (first, second):
            wait_until_all_ended(node, [run_id])
        run = only(mlflow_server, run_id)
        check_values(mlflow_server, run, {0: range(10)})
        assert run.info.status == "FINISHED"
        ids = {node.run(run_id)["mlflow_run_id"] for node in (first, second)}
        assert ids == {run.info.run_id}


# ── how it ends ──


def test_the_run_is_running_until_the_last_node_has_ended(nodes, mlflow_server):
    key = fresh_key()
    for node in nodes:
        node.start()
    ranks = ranks_on(nodes, key)
    run_id = first_id(key)
    for rank in ranks:
        rank.log(0, 5)
    ranks[0].leave()
    words = "waits for the other nodes to end"
    wait_until(lambda: words in (nodes[0].run(run_id)["last_error"] or ""), words)
    assert only(mlflow_server, run_id).info.status == "RUNNING"
    ranks[1].log(5, 10)
    ranks[1].leave()
    run = when(mlflow_server, run_id, status_is("FINISHED"), "the last one has ended")
    check_values(mlflow_server, run, {0: range(5), 1: range(10)})
    for node in nodes:
        wait_until_all_ended(node, [run_id])


@pytest.mark.parametrize("victim", [0, 1], ids=["the owner's", "the other's"])
def test_a_killed_rank_of_one_node_fails_the_run(nodes, mlflow_server, victim):
    key = fresh_key()
    for node in nodes:
        node.start()
    ranks = ranks_on(nodes, key)
    for rank in ranks:
        rank.log(0, 5)
    ranks[victim].kill()
    ranks[1 - victim].leave()
    run = when(mlflow_server, first_id(key), status_is("FAILED"), "it has failed")
    assert run.data.tags["relay.end_reason"].startswith(f"rank {victim} on ")
    assert "vanished" in run.data.tags["relay.end_reason"]
    check_values(mlflow_server, run, {0: range(5), 1: range(5)})


@pytest.mark.parametrize("victim", [0, 1], ids=["the owner's", "the other's"])
def test_a_daemon_that_dies_and_comes_back_tells_the_end(nodes, mlflow_server, victim):
    key = fresh_key()
    for node in nodes:
        node.start()
    ranks = ranks_on(nodes, key)
    for rank in ranks:
        rank.log(0, 5)
    run_id = first_id(key)
    when(mlflow_server, run_id, lambda run: len(run.data.metrics) == 2, "both have delivered")
    nodes[victim].kill()
    for rank in ranks:
        rank.log(5, 10)
        rank.leave()
    assert only(mlflow_server, run_id).info.status == "RUNNING"
    nodes[victim].start()
    run = when(mlflow_server, run_id, status_is("FINISHED"), "it has ended")
    check_values(mlflow_server, run, {0: range(10), 1: range(10)})


def test_a_job_whose_ranks_are_started_again_is_running_again_and_ends_well(nodes, mlflow_server):
    """As torchrun does it: one rank dies, the others are ended, and all are started again."""
    key = fresh_key()
    for node in nodes:
        node.start()
    run_id = first_id(key)
    ranks = ranks_on(nodes, key)
    for rank in ranks:
        rank.log(0, 5)
    ranks[0].kill()
    words = "waits for the other nodes to end"
    wait_until(lambda: words in (nodes[0].run(run_id)["last_error"] or ""), words)
    ranks[1].kill()
    when(mlflow_server, run_id, status_is("FAILED"), "it has failed")
    again = ranks_on(nodes, key)
    when(mlflow_server, run_id, status_is("RUNNING"), "it runs again")
    for rank in again:
        rank.log(5, 10)
    again[1].leave()
    wait_until(
        lambda: nodes[1].run(run_id)["state"] == "ended", "the second node has said its word"
    )
    assert only(mlflow_server, run_id).info.status == "RUNNING"
    again[0].leave()
    run = when(mlflow_server, run_id, status_is("FINISHED"), "it has ended well")
    check_values(mlflow_server, run, {0: range(10), 1: range(10)})
    assert not run.data.tags["relay.end_reason"]


def test_a_job_that_is_requeued_on_other_nodes_is_running_again(tmp_path, mlflow_server):
    key = fresh_key()
    run_id = first_id(key)
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(Node(tmp_path / name, mlflow_server.uri))
            for name in ("first", "second", "third", "fourth")
        ]
        for node in nodes:
            node.start()
        for rank in ranks_on(nodes[:2], key):
            rank.log(0, 5)
            rank.kill()
        when(mlflow_server, run_id, status_is("FAILED"), "it has failed")
        ranks = ranks_on(nodes[2:], key)
        when(mlflow_server, run_id, status_is("RUNNING"), "it runs again")
        for rank in ranks:
            rank.log(5, 10)
        mlflow_run_id = only(mlflow_server, run_id).info.run_id
        for metric in ("loss", "rank_1/loss"):
            wait_until(
                lambda metric=metric: len(values(mlflow_server, mlflow_run_id, metric)) == 10,
                f"both nodes have delivered: {metric}",
            )
        ranks[0].leave()
        words = "waits for the other nodes to end"
        wait_until(lambda: words in (nodes[2].run(run_id)["last_error"] or ""), words)
        assert only(mlflow_server, run_id).info.status == "RUNNING"
        ranks[1].leave()
        run = when(mlflow_server, run_id, status_is("FINISHED"), "it has ended well")
        check_values(mlflow_server, run, {0: range(10), 1: range(10)})


# ── many ──

#: Eight ranks of a node, forked by one process as many launchers do.
_RANKS = """
import os, random, sys, time
import mlflow_relay

run_key, first, count, world_size, calls = sys.argv[1], *map(int, sys.argv[2:])
children = []
for rank in range(first, first + count):
    pid = os.fork()
    if pid == 0:
        run = mlflow_relay.start_run(
            "nodes", run_key=run_key, rank=rank, world_size=world_size, journal_bytes_max=1 << 20
        )
        for step in range(calls):
            run.log_metrics({"loss": rank * 1000 + step, "lr": step}, step=step)
            time.sleep(random.uniform(0.0, 0.05))
        run.end()
        os._exit(0)
    children.append(pid)
failed = [pid for pid in children if os.waitpid(pid, 0)[1] != 0]
assert not failed, failed
"""

NODES, RANKS_PER_NODE, CALLS = 8, 8, 20


def test_64_ranks_on_8_nodes_are_one_run(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    seed = new_seed()
    rng = random.Random(seed)
    show(f"seed {seed}")
    key = fresh_key()
    run_id = first_id(key)
    world_size = NODES * RANKS_PER_NODE
    begin_s = time.monotonic()
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(Node(tmp_path / f"node {number}", mlflow_server.uri))
            for number in range(NODES)
        ]
        launchers = [
            node.rank(_RANKS, key, number * RANKS_PER_NODE, RANKS_PER_NODE, world_size, CALLS)
            for number, node in enumerate(nodes)
        ]
        order = rng.sample(nodes, NODES)
        victims = rng.sample(nodes, 2)
        for node in order:
            node.start(wait=False)
        for node in victims:
            node.wait_until_it_answers()
            time.sleep(rng.uniform(0.0, 0.5))  # any moment will do
            node.kill()
        for node in victims:
            node.start(wait=False)
        finish(launchers)
        for node in nodes:
            node.wait_until_it_answers()
            wait_until_all_ended(node, [run_id])
        run = when(mlflow_server, run_id, status_is("FINISHED"), "it has ended")
        end_s = time.monotonic()
        assert {node.run(run_id)["mlflow_run_id"] for node in nodes} == {run.info.run_id}
    found: dict[str, list[float]] = {}
    for metric, value, _, _ in mlflow_server.all_points(run.info.run_id):
        found.setdefault(metric, []).append(value)
    expected = {}
    for rank in range(world_size):
        prefix = f"rank_{rank}/" if rank else ""
        expected[prefix + "loss"] = [rank * 1000.0 + step for step in range(CALLS)]
        expected[prefix + "lr"] = [float(step) for step in range(CALLS)]
    assert {metric: sorted(points) for metric, points in found.items()} == expected
    assert values(mlflow_server, run.info.run_id) == [float(step) for step in range(CALLS)]
    show(f"{world_size} ranks on {NODES} nodes, {len(found)} keys: {end_s - begin_s:.1f} s")
