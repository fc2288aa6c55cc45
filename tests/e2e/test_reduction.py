"""log_metrics(reduce=...): exact values with slow, killed and late ranks, and a daemon that is killed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.jobs import (
    ended_run,
    ended_status,
    hear,
    last_words,
    reports,
    show,
    start_rank,
    status_when,
    tell,
)
from tests.support.relay import Node, wait_until
from tests.support.seeds import new_seed

if TYPE_CHECKING:
    import subprocess

    from mlflow.entities import Run as MlflowRun

    from tests.support import MlflowServer

RANKS, STEPS = 8, 1000
SLOW, KILLED, KILLED_AFTER = 3, 5, 400

#: Exact in binary, and so are mean, sum, min and max of any of them.
VALUE = """
    def value(rank, step):
        return rank * 4.0 + step / 8
"""
SCRIPT = (
    VALUE
    + """
    key, rank, steps, slow, killed_after = sys.argv[1], *map(int, sys.argv[2:6])
    run = mlflow_relay.start_run("reduction", run_key=key)
    say("began")
    hear()
    for step in range(steps):
        if step == killed_after:
            say("last step")
            os.kill(os.getpid(), signal.SIGKILL)
        if slow and step % 10 == 0:
            time.sleep(0.02)
        loss = value(rank, step)
        run.log_metrics({"loss": loss}, step=step, reduce="mean")
        run.log_metrics({"sum": loss, "two/sum": -loss}, step=step, reduce="sum")
        run.log_metrics({"least": loss}, step=step, reduce="min")
        run.log_metrics({"most": loss}, step=step, reduce="max")
    run.end()
    report()
"""
)


def value(rank: int, step: int) -> float:
    return rank * 4.0 + step / 8


def expected(step: int, ranks: list[int]) -> dict[str, float]:
    """Return the points of one step, made of these ranks' values."""
    values = [value(rank, step) for rank in ranks]
    total = sum(values)
    return {
        "loss": total / len(values),
        "sum": total,
        "two/sum": -total,
        "least": min(values),
        "most": max(values),
    }


def environ(rank: int, ranks: int = RANKS, node: int = 0, nodes: int = 1) -> dict[str, str]:
    """Return what torchrun tells a rank."""
    here = ranks // nodes
    names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % here}
    names |= {"LOCAL_WORLD_SIZE": here, "GROUP_RANK": node, "GROUP_WORLD_SIZE": nodes}
    return {name: str(value) for name, value in names.items()}


@pytest.fixture
def node(tmp_path: Path, mlflow_server: MlflowServer) -> Iterator[Node]:
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        yield node


def start_ranks(
    node: Node, key: str, *, steps: int, slow: int = -1, killed: int = -1, killed_after: int = -1
) -> list[subprocess.Popen[str]]:
    """Start all ranks, and let them begin together."""
    ranks = []
    for rank in range(RANKS):
        dies = killed_after if rank == killed else -1
        arguments = (key, rank, steps, int(rank == slow), dies)
        ranks.append(start_rank(node, SCRIPT, *arguments, environ=environ(rank)))
    for process in ranks:
        hear(process, "began")
    for process in ranks:
        tell(process)
    return ranks


def assert_points(server: MlflowServer, run: MlflowRun, steps: range, ranks: list[int]) -> None:
    """The run has exactly one point of each key and step, made of these ranks' values."""
    found = sorted(
        (step, key, value)
        for key, value, _, step in server.all_points(run.info.run_id)
        if step in steps
    )
    wanted = sorted(
        (step, key, value) for step in steps for key, value in expected(step, ranks).items()
    )
    assert found == wanted


def test_eight_ranks_a_thousand_steps_one_slow_one_killed(node, mlflow_server) -> None:
    key = "reduce 8 x 1000"
    ranks = start_ranks(node, key, steps=STEPS, slow=SLOW, killed=KILLED, killed_after=KILLED_AFTER)
    killed = ranks.pop(KILLED)
    last_words(killed)
    assert killed.returncode == -signal.SIGKILL
    reports(ranks)
    run = ended_run(node, mlflow_server, key)
    everybody = list(range(RANKS))
    assert_points(mlflow_server, run, range(KILLED_AFTER), everybody)
    left = [rank for rank in everybody if rank != KILLED]
    assert_points(mlflow_server, run, range(KILLED_AFTER, STEPS), left)
    keys = len(expected(0, [0]))
    points = mlflow_server.all_points(run.info.run_id)
    assert len(points) == STEPS * keys
    missing = (STEPS - KILLED_AFTER) * keys
    assert run.data.tags["relay.missing_values"] == str(missing)
    assert node.command("dead-letters", "list", "--json").stdout.count('"late"') == 0
    show(f"{RANKS} ranks x {STEPS} steps x {keys} keys: {len(points)} points, {missing} missing")


def test_a_daemon_killed_again_and_again_makes_each_point_once(node, mlflow_server) -> None:
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    key = "reduce, daemon killed"
    ranks = start_ranks(node, key, steps=300, slow=SLOW)
    for _ in range(6):
        time.sleep(rng.uniform(0.0, 0.4))
        node.kill()
        node.start()
    reports(ranks)
    run = ended_run(node, mlflow_server, key)
    assert_points(mlflow_server, run, range(300), list(range(RANKS)))
    assert "relay.missing_values" not in run.data.tags


def test_a_rank_that_hangs_is_waited_for_until_the_deadline_and_is_late_then(
    tmp_path, mlflow_server
) -> None:
    script = """
        rank = int(sys.argv[1])
        run = mlflow_relay.start_run("reduction", run_key="hanging")
        run.log_metrics({"loss": 1.0 + rank}, step=0, reduce="mean")
        say("logged")
        hear()
        run.log_metrics({"loss": 5.0 + rank}, step=1, reduce="mean")
        run.end()
        report()
    """
    settings = {"reduce_deadline_s": 1}
    with Node(tmp_path / "node", mlflow_server.uri, settings=settings) as node:
        node.start()
        ranks = [start_rank(node, script, rank, environ=environ(rank, 2)) for rank in range(2)]
        for process in ranks:
            hear(process, "logged")
        tell(ranks[0])
        reports(ranks[:1])
        status_when(node, "hanging", lambda run: run["delivered_points"] == 1, "step 0 is there")
        # Rank 0 has ended, rank 1 lives and is silent: step 1 is made without it in time.
        status_when(node, "hanging", lambda run: run["delivered_points"] == 2, "step 1 is there")
        tell(ranks[1])
        reports(ranks[1:])
        run = ended_run(node, mlflow_server, "hanging")
        letters = node.command("dead-letters", "list").stdout
    points = [
        (key, value, step) for key, value, _, step in mlflow_server.all_points(run.info.run_id)
    ]
    assert points == [("loss", 1.5, 0), ("loss", 5.0, 1)]
    assert run.data.tags["relay.missing_values"] == "1"
    assert "rank 1 gave it after the mean of this step was made" in " ".join(letters.split())


def test_each_of_two_nodes_makes_its_own_point(tmp_path, mlflow_server) -> None:
    script = """
        run = mlflow_relay.start_run("reduction", run_key="two nodes reduce", rank_metrics="zero")
        for step in range(20):
            run.log_metrics({"loss": float(run.rank)}, step=step, reduce="mean")
        run.end()
        report()
    """
    with (
        Node(tmp_path / "first", mlflow_server.uri) as first,
        Node(tmp_path / "second", mlflow_server.uri) as second,
    ):
        nodes = [first, second]
        for node in nodes:
            node.start()
        reports(
            start_rank(node, script, environ=environ(rank, 4, node=rank // 2, nodes=2))
            for rank in range(4)
            for node in [nodes[rank // 2]]
        )
        for node in nodes:
            ended_status(node, "two nodes reduce")
        run = ended_run(first, mlflow_server, "two nodes reduce")
    found = {(key, value) for key, value, _, _ in mlflow_server.all_points(run.info.run_id)}
    assert found == {("loss/node_0", 0.5), ("loss/node_1", 2.5)}
    assert len(mlflow_server.all_points(run.info.run_id)) == 40


def test_points_of_a_job_that_ended_while_the_server_was_away_are_made_later(
    tmp_path, mlflow_server
) -> None:
    with Node(tmp_path / "node", "http://127.0.0.1:9") as node:
        node.start()
        ranks = start_ranks(node, "reduce, server away", steps=50)
        reports(ranks)
        wait_until(lambda: node.run()["ranks_alive"] == 0, "all ranks are gone")
        node.stop()
        node._daemon_environ["MLFLOW_RELAY_TRACKING_URI"] = mlflow_server.uri
        node.start()
        run = ended_run(node, mlflow_server, "reduce, server away")
    assert_points(mlflow_server, run, range(50), list(range(RANKS)))
    assert run.info.status == "FINISHED"
    assert "relay.missing_values" not in run.data.tags
