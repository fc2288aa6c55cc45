"""Runs that have ended leave the spool, and nobody who comes back to one of them notices."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support import MlflowServer
from tests.support.relay import Node, finish, wait_until
from tests.support.rest import Api
from tests.support.scenes import fresh_name, stored

RANK = """
import sys, mlflow_relay
key, resume, bad_key = sys.argv[1:]
with mlflow_relay.start_run(
    "kept", key, run_key=key, rank_metrics="all", resume=resume or None
) as run:
    run.log_metrics({"loss": 1.0 + run.rank}, step=run.rank)
    if bad_key:
        run.log_metrics({"a" * 300: 1.0}, step=0)
    print(run.run_id, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def node(tmp_path: Path, mlflow_server: MlflowServer):
    settings = {"keep_ended_s": 0}
    with Node(tmp_path / "node", mlflow_server.uri, settings=settings) as node:
        node.start()
        yield node


class Rank:
    """A rank that has logged one point, and ends when it is told."""

    def __init__(self, node: Node, key: str, rank: int = 0, resume: str = "", bad_key: str = ""):
        job = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        environ = {name: str(number) for name, number in job.items()}
        self.process = node.rank(RANK, key, resume, bad_key, environ=environ)
        self.run_id: str = self.process.stdout.readline().strip()

    def end(self) -> None:
        finish([self.process])


def known_to_mlflow(node: Node, run_id: str) -> str:
    """Return the MLflow run id once the first point is delivered."""

    def found() -> str | None:
        runs = [run for run in node.status()["runs"] if run["run_id"] == run_id]
        return runs[0]["mlflow_run_id"] if runs and runs[0]["delivered_points"] else None

    return wait_until(found, "MLflow has the run")


def is_gone(node: Node, run_id: str) -> bool:
    return not any(run["run_id"] == run_id for run in node.status()["runs"])


def test_a_run_leaves_the_spool_when_mlflow_has_all_of_it(node, mlflow_server):
    rank = Rank(node, fresh_name("key"))
    mlflow_run_id = known_to_mlflow(node, rank.run_id)
    time.sleep(2 * 0.5)  # it is looked at twice a second, and stays while it runs
    assert not is_gone(node, rank.run_id)
    rank.end()
    wait_until(lambda: is_gone(node, rank.run_id), "the run is removed")
    assert os.listdir(node.spool / "runs") == []
    assert not (node.spool / "removed").exists()
    found = stored(mlflow_server, mlflow_run_id)
    assert (found.status, found.points) == ("FINISHED", [("loss", 1.0, 0)])
    node.stop()
    node.start()
    assert node.status()["runs"] == []


def test_a_run_with_a_dead_letter_stays_until_that_is_dropped(node):
    rank = Rank(node, fresh_name("key"), bad_key="yes")
    rank.end()
    wait_until(lambda: not is_gone(node, rank.run_id), "the rank has come")
    node.wait_until_ended(rank.run_id)
    time.sleep(3 * 0.5)
    assert node.run(rank.run_id)["dead_letters"] == 1
    node.command("dead-letters", "drop", "--yes")
    wait_until(lambda: is_gone(node, rank.run_id), "the run is removed")


def test_a_late_rank_of_a_removed_run_goes_on_in_the_same_mlflow_run(node, mlflow_server):
    key = fresh_name("key")
    first = Rank(node, key)
    mlflow_run_id = known_to_mlflow(node, first.run_id)
    first.end()
    wait_until(lambda: is_gone(node, first.run_id), "the run is removed")
    late = Rank(node, key, rank=1)
    assert late.run_id == first.run_id
    assert known_to_mlflow(node, late.run_id) == mlflow_run_id
    wait_until(lambda: stored(mlflow_server, mlflow_run_id).status == "RUNNING", "it runs again")
    late.end()
    wait_until(lambda: is_gone(node, late.run_id), "the run is removed again")
    found = stored(mlflow_server, mlflow_run_id)
    assert found.status == "FINISHED"
    assert found.points == [("loss", 1.0, 0), ("loss", 2.0, 1)]


def test_a_run_that_resumes_a_removed_one_is_its_child(node, mlflow_server):
    first = Rank(node, fresh_name("key"))
    parent_id = known_to_mlflow(node, first.run_id)
    first.end()
    wait_until(lambda: is_gone(node, first.run_id), "the run is removed")
    second = Rank(node, fresh_name("key"), resume=first.run_id)
    child_id = known_to_mlflow(node, second.run_id)
    second.end()
    wait_until(lambda: is_gone(node, second.run_id), "the child is removed")
    tags = mlflow_server.client().get_run(child_id).data.tags
    assert tags["mlflow.parentRunId"] == parent_id


def test_an_id_that_a_client_was_given_is_good_for_ever(node, mlflow_server):
    def begin_anew(**settings: object) -> Api:
        node.stop()
        for name, value in settings.items():
            node._daemon_environ["MLFLOW_RELAY_" + name.upper()] = str(value)
        node.start()
        return Api(f"http://127.0.0.1:{node.status()['daemon']['http_port']}")

    relay = begin_anew(http_port=0, offline=1)  # else the client would be given the server's id
    run_id = relay.new_run(run_name="offline")
    point = {"run_id": run_id, "key": "loss", "value": 1.0, "timestamp": 1}
    relay.post("runs/log-metric", **point, step=0)
    relay.post("runs/update", run_id=run_id, status="FINISHED", end_time=9)
    relay = begin_anew(offline=0)
    wait_until(lambda: is_gone(node, run_id), "the run is removed")
    mlflow_run_id = relay.run(run_id)["run_id"]
    assert mlflow_run_id != run_id
    relay = begin_anew()
    relay.post("runs/log-metric", **point, step=1)
    wait_until(lambda: len(mlflow_server.all_points(mlflow_run_id)) == 2, "the point is delivered")
    assert relay.run(run_id)["status"] == "FINISHED"
    found = relay.post("runs/search", experiment_ids=["0"], filter=f"run_id = '{run_id}'")["runs"]
    assert [run["info"]["run_id"] for run in found] == [mlflow_run_id]
