"""`mlflow-relay sync`: each run once, each point once, each link right, whatever is done in between."""

from __future__ import annotations

import itertools
import random
import shutil
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlflow_relay_daemon.spool.card import write
from mlflow_relay_daemon.spool.disk import Disk
from tests.support import MlflowServer
from tests.support.lineage import FORK_PARAM, RUN_PARAMS, only, show
from tests.support.relay import Node, wait_until
from tests.support.scenes import fingerprint
from tests.support.stores import (
    Run,
    anemoi_run,
    new_card,
    sent,
    start_sync,
    sync,
    write_mlruns,
    write_run,
    write_spool,
)

ORDERS = [list(order) for order in itertools.permutations(("parent", "child", "fork"))]
#: Of the six, those in which everything comes before what it waits for, or behind it.
HARD_ORDERS = [["child", "fork", "parent"], ["fork", "parent", "child"]]


def fresh_id() -> str:
    return uuid.uuid4().hex


def points_of(server: MlflowServer, run_id: str) -> Any:
    """Return the MLflow run of an old id, and its points."""
    run = only(server, run_id)
    return run, server.all_points(run.info.run_id)


# ── parent, child and fork, in any order ──


def anemoi_family(points: int) -> dict[str, Run]:
    parent = anemoi_run(points)
    return {
        "parent": parent,
        "child": anemoi_run(points, parent=parent),
        "fork": anemoi_run(points, fork=parent, name="rollout"),
    }


def check_anemoi_links(server: MlflowServer, family: dict[str, Run]) -> None:
    """All is there once, and says of its ancestry what Anemoi's users look for."""
    runs = {}
    for role, source in family.items():
        runs[role], points = points_of(server, source.run_id)
        assert points == source.points(), role
    new = {role: run.info.run_id for role, run in runs.items()}
    old = {role: source.run_id for role, source in family.items()}
    for role, run in runs.items():
        tags, params = run.data.tags, run.data.params
        origin = "parent" if role == "child" else role
        assert params["metadata.run_id"] == params["config.training.run_id"] == new[origin]
        assert params["metadata.offline_run_id"] == old[origin]
        assert params["config.training.offline_run_id"] == old[origin]
        assert tags["offlineRun"] == "True"
        assert tags.get("mlflow.parentRunId") == (new["parent"] if role == "child" else None)
        assert tags.get("forkedRunId") == (new["parent"] if role == "fork" else None)
        assert not tags.get("relay.waits_for")
        assert (run.info.status, run.info.start_time) == ("FINISHED", family[role].start_ms)
        assert run.info.end_time == family[role].end_ms
        assert tags["mlflow.user"] == "anna"
    assert runs["child"].data.params["config.training.offline_self_run_id"] == old["child"]
    assert runs["child"].data.tags["mlflow.offline.parentRunId"] == old["parent"]
    assert runs["fork"].data.tags["offline.forkedRunId"] == old["parent"]
    assert runs["fork"].data.params[FORK_PARAM] == new["parent"]
    assert runs["fork"].data.params["config.training.offline_fork_run_id"] == old["parent"]


def bring_anemoi_family(folder: Path, server: MlflowServer, order: list[str], points: int) -> None:
    family = anemoi_family(points)
    store = write_mlruns(folder, family.values())
    for role in order:
        sync(store, "--tracking-uri", server.uri, "--run", family[role].run_id)
    check_anemoi_links(server, family)


@pytest.mark.parametrize("order", HARD_ORDERS, ids="-".join)
def test_a_family_of_a_file_store_is_linked_in_whatever_order_it_comes(
    tmp_path, mlflow_server, order
):
    bring_anemoi_family(tmp_path / "mlruns", mlflow_server, order, 40)


@pytest.mark.torture
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_fifty_thousand_points_each_of_a_family_in_all_orders(tmp_path, mlflow_server, order):
    bring_anemoi_family(tmp_path / "mlruns", mlflow_server, order, 50_000)


def bring_relay_family(folder: Path, server: MlflowServer, order: list[str], points: int) -> None:
    ids = {role: fresh_id() for role in ("parent", "child", "fork")}
    cards = {
        "parent": new_card(ids["parent"]),
        "child": new_card(ids["child"], resume=ids["parent"], name=""),
        "fork": new_card(ids["fork"], fork=ids["parent"], name="rollout"),
    }
    points_by_role = {
        role: write_spool(folder / role, card, points=points) for role, card in cards.items()
    }
    for role in order:
        sync(folder / role, "--tracking-uri", server.uri, patience_s=600)
    runs = {role: only(server, ids[role]) for role in ids}
    for role, run in runs.items():
        assert server.all_points(run.info.run_id) == points_by_role[role], role
        assert not run.data.tags.get("relay.waits_for")
        assert run.info.status == "FINISHED"
    parent = runs["parent"].info.run_id
    assert runs["child"].data.tags["mlflow.parentRunId"] == parent
    assert runs["child"].data.tags["resumedRun"] == "True"
    assert runs["child"].info.run_name == "o96"
    assert runs["fork"].data.tags["forkedRunId"] == parent
    assert runs["fork"].data.params[FORK_PARAM] == parent
    for name in RUN_PARAMS:
        assert runs["parent"].data.params[name] == runs["child"].data.params[name] == parent
        assert runs["fork"].data.params[name] == runs["fork"].info.run_id


@pytest.mark.parametrize("order", HARD_ORDERS, ids="-".join)
def test_a_family_of_spools_is_linked_in_whatever_order_it_comes(tmp_path, mlflow_server, order):
    bring_relay_family(tmp_path, mlflow_server, order, 40)


@pytest.mark.torture
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_fifty_thousand_points_each_of_spools_in_all_orders(tmp_path, mlflow_server, order):
    bring_relay_family(tmp_path, mlflow_server, order, 50_000)


def test_a_run_that_goes_on_as_itself_comes_in_one_call_with_the_run_that_it_goes_on(
    tmp_path, mlflow_server
):
    first, second = fresh_id(), fresh_id()
    card = new_card(second, resume=first)
    card.resume_mode, card.start_ms = "same", card.start_ms - 1000  # a clock that was set back
    later = write_spool(tmp_path / "a", card, points=20, ends="FAILED", first_step=100)
    alone = sync(tmp_path / "a", "--tracking-uri", mlflow_server.uri, code=1)["runs"][0]
    assert f"waits for run {first}" in alone["error"]
    wanted = write_spool(tmp_path / "b", new_card(first), points=20)
    sync(tmp_path, "--tracking-uri", mlflow_server.uri)
    run, points = points_of(mlflow_server, first)
    assert points == sorted(wanted + later, key=lambda point: (point[0], point[3]))
    assert run.data.tags[f"relay.resumed_by.{second}"] == "True"


# ── several nodes ──


def test_spools_of_four_nodes_one_torn_are_one_run_with_exact_counts(tmp_path, mlflow_server):
    run_id = fresh_id()
    wanted = []
    for node in range(4):
        card = new_card(run_id, ranks=[2 * node, 2 * node + 1], world_size=8, node_count=4)
        wanted += write_spool(tmp_path / f"node{node}", card, points=100)
    (torn,) = (tmp_path / "node2" / "runs" / run_id).glob("*.segment")
    with torn.open("ab") as file:
        size = file.write(b"MRF\x01 and then the node lost its power")
    before = fingerprint(tmp_path)
    done = sync(tmp_path, "--tracking-uri", mlflow_server.uri)
    (told,) = done["runs"]
    assert told["records"] == 4 * (2 * 50 + 2)
    assert [note for note in told["notes"] if note.startswith(f"torn tail: {size} bytes")]
    run, points = points_of(mlflow_server, run_id)
    assert points == sorted(wanted, key=lambda point: (point[0], point[3]))
    assert (run.info.status, run.info.end_time) == ("FINISHED", 1_795_000_060_000)
    assert fingerprint(tmp_path) == before
    assert sent(sync(tmp_path, "--tracking-uri", mlflow_server.uri)) == 0


def test_a_job_may_have_more_nodes_than_a_request_may_have_tags(tmp_path, mlflow_server):
    run_id, nodes, wanted = fresh_id(), 101, []
    for node in range(nodes):
        card = new_card(run_id, ranks=[node], world_size=nodes, node_count=nodes)
        wanted += write_spool(tmp_path / f"node{node}", card, points=4)
    assert sent(sync(tmp_path, "--tracking-uri", mlflow_server.uri)) == 4 * nodes
    run, points = points_of(mlflow_server, run_id)
    assert points == sorted(wanted, key=lambda point: (point[0], point[3]))
    assert run.info.status == "FINISHED"
    assert sent(sync(tmp_path, "--tracking-uri", mlflow_server.uri)) == 0


def test_a_rank_that_comes_back_makes_a_synced_run_run_again(tmp_path, mlflow_server):
    run_id = fresh_id()
    card = new_card(run_id)
    write_spool(tmp_path / "spool", card, points=4)
    sync(tmp_path, "--tracking-uri", mlflow_server.uri)
    assert only(mlflow_server, run_id).info.status == "FINISHED"
    card.sessions["ab" * 16] = replace(next(iter(card.sessions.values())), closed=False)
    write(Disk(), tmp_path / "spool" / "runs" / run_id, card)
    sync(tmp_path, "--tracking-uri", mlflow_server.uri)
    assert only(mlflow_server, run_id).info.status == "RUNNING"
    card.sessions["ab" * 16].closed = True
    write(Disk(), tmp_path / "spool" / "runs" / run_id, card)
    sync(tmp_path, "--tracking-uri", mlflow_server.uri)
    assert only(mlflow_server, run_id).info.status == "FAILED"


def test_nodes_that_come_in_different_calls_are_one_run(tmp_path, mlflow_server):
    run_id = fresh_id()
    wanted = []
    for node in (1, 0):  # that of rank 0 comes last
        card = new_card(run_id, ranks=[node], world_size=2, node_count=2)
        ends = "FAILED" if node else "FINISHED"
        wanted += write_spool(tmp_path / f"node{node}", card, points=20, ends=ends)
        sync(tmp_path / f"node{node}", "--tracking-uri", mlflow_server.uri)
    run, points = points_of(mlflow_server, run_id)
    assert points == sorted(wanted, key=lambda point: (point[0], point[3]))
    assert run.info.status == "FAILED"


_TRAINING = """
import sys
import mlflow_relay

run = mlflow_relay.start_run("aifs", "o96", run_key=sys.argv[1])
print(run.run_id, flush=True)
for step in range(400):
    run.log_metrics({"loss": step / 4}, step=step)
    if step == 200:
        print("half", flush=True)
        sys.stdin.readline()
run.end()
"""


def test_a_spool_is_synced_under_a_daemon_that_then_sends_no_point_again(
    tmp_path, mlflow_server, mlflow_proxy
):
    with Node(tmp_path / "node", mlflow_proxy.uri, settings={"offline": True}) as node:
        node.start()
        rank = node.rank(_TRAINING, fresh_id())
        assert rank.stdout is not None
        assert rank.stdin is not None
        run_id = rank.stdout.readline().strip()
        assert rank.stdout.readline() == "half\n"
        wait_until(
            lambda: [run for run in node.status()["runs"] if run["accepted_records"] >= 201],
            "half of it is in the spool",
        )
        first = sync(node.spool, "--tracking-uri", mlflow_server.uri)
        assert sent(first) >= 201
        assert only(mlflow_server, run_id).info.status == "RUNNING"
        rank.communicate("go on\n", timeout=60)
        wait_until(lambda: not node.run()["ranks_alive"], "the rank is gone")
        assert sent(sync(node.spool, "--tracking-uri", mlflow_server.uri)) == 400 - sent(first)
        run, points = points_of(mlflow_server, run_id)
        assert [point[1] for point in points] == [step / 4 for step in range(400)]
        assert run.info.status == "FINISHED"
        assert node.stop() == 0
        assert mlflow_proxy.requests() == 0  # offline is offline
        node._daemon_environ.pop("MLFLOW_RELAY_OFFLINE")
        node.start()
        told = node.wait_until_ended()
        assert told["delivered_points"] == 0
        assert told["mlflow_run_id"] == run.info.run_id
        assert told["settled_records"] == told["accepted_records"] == 401
        assert node.stop() == 0
    again = only(mlflow_server, run_id)
    assert (again.info.status, again.info.end_time) == (run.info.status, run.info.end_time)


_LOGGING_ON = """
import sys
import mlflow_relay

run = mlflow_relay.start_run("aifs", "o96", run_key=sys.argv[1])
run.log_metrics({"loss": 0.0}, step=0)
print(run.run_id, flush=True)
sys.stdin.readline()
for step in range(1, 3000):
    run.log_metrics({"loss": step / 4}, step=step)
run.end()
"""


def test_a_daemon_that_was_cut_off_sends_nothing_that_was_synced_meanwhile(
    tmp_path, mlflow_server, mlflow_proxy
):
    with Node(tmp_path / "node", mlflow_proxy.uri, settings={"drain_timeout_s": 0}) as node:
        node.start()
        rank = node.rank(_LOGGING_ON, fresh_id())
        assert rank.stdout is not None
        run_id = rank.stdout.readline().strip()
        wait_until(lambda: only_point_of(node), "its first point is delivered")
        mlflow_proxy.refuse()
        rank.communicate("go on\n", timeout=60)
        wait_until(lambda: not node.run()["ranks_alive"], "the rank is gone")
        assert node.stop() == 1
        assert sent(sync(node.spool, "--tracking-uri", mlflow_server.uri)) == 2999
        mlflow_proxy.heal()
        node.start()
        assert node.wait_until_ended()["delivered_points"] == 1
        assert node.stop() == 0
    run, points = points_of(mlflow_server, run_id)
    assert [point[1] for point in points] == [step / 4 for step in range(3000)]
    assert run.info.status == "FINISHED"


def only_point_of(node: Node) -> bool:
    return [run["delivered_points"] for run in node.status()["runs"]] == [1]


_LOGGING_FILES = """
import sys
from pathlib import Path
import mlflow_relay

folder = Path(sys.argv[2])
(folder / "kept.txt").write_text("kept")
(folder / "large.bin").write_bytes(bytes(range(256)) * 20_000)
(folder / "gone.txt").write_text("gone")
with mlflow_relay.start_run("aifs", "files", run_key=sys.argv[1]) as run:
    run.log_artifact(folder / "kept.txt", "notes")
    run.log_artifact(folder / "large.bin")
    run.log_artifact(folder / "gone.txt", copy=False)
    run.log_metric("loss", 0.5, step=1)
print(run.run_id)
"""


def test_artifacts_of_a_spool_arrive_once_and_one_that_vanished_is_named(tmp_path, mlflow_server):
    with Node(tmp_path / "node", mlflow_server.uri, settings={"offline": True}) as node:
        node.start()
        output = node.rank(_LOGGING_FILES, fresh_id(), tmp_path).communicate(timeout=60)[0]
        run_id = output.split()[-1]
        wait_until(lambda: not node.run()["ranks_alive"], "the rank is gone")
        assert node.stop() == 0
    (tmp_path / "gone.txt").unlink()
    (told,) = sync(node.spool, "--tracking-uri", mlflow_server.uri, code=1)["runs"]
    assert told["uploaded_files"] == 2
    assert [(each["kind"], each["key"]) for each in told["refusals"]] == [("artifact", "gone.txt")]
    run = only(mlflow_server, run_id)
    there = tmp_path / "there"
    there.mkdir()
    mlflow_server.client().download_artifacts(run.info.run_id, "", str(there))
    assert (there / "notes" / "kept.txt").read_text() == "kept"
    assert (there / "large.bin").read_bytes() == bytes(range(256)) * 20_000
    again = sync(node.spool, "--tracking-uri", mlflow_server.uri)["runs"][0]
    assert (again["uploaded_files"], again["refused"], again["sent_points"]) == (0, 0, 0)


# ── again, at once, cut off ──


def test_two_syncs_at_the_same_time_leave_one_run_and_each_point_once(tmp_path, mlflow_server):
    source = anemoi_run(400)
    for copy in ("one", "two"):
        write_mlruns(tmp_path / copy, [source])
    calls = [
        start_sync(tmp_path / copy, "--tracking-uri", mlflow_server.uri) for copy in ("one", "two")
    ]
    for call in calls:
        _, errors = call.communicate(timeout=120)
        assert call.returncode == 0, errors
    _, points = points_of(mlflow_server, source.run_id)
    assert points == source.points()


def kill_and_repeat(
    folder: Path, server: MlflowServer, kills: int, points: int, longest_s: float
) -> None:
    seed = random.randrange(1 << 30)
    show(f"seed {seed}")
    rng = random.Random(seed)
    family = anemoi_family(points)
    write_mlruns(folder / "mlruns", family.values())
    run_id = fresh_id()
    wanted = write_spool(folder / "spool", new_card(run_id), points=points)
    calls = cut = 0
    while cut < kills:  # one that came to its end before its moment is followed by another
        call = start_sync(folder / "mlruns", folder / "spool", "--tracking-uri", server.uri)
        time.sleep(rng.uniform(0.2, longest_s))  # the moment is what is random here
        cut, calls = cut + (call.poll() is None), calls + 1
        call.kill()
        call.communicate()
    show(f"{cut} of {calls} calls were cut off")
    sync(folder / "mlruns", folder / "spool", "--tracking-uri", server.uri)
    check_anemoi_links(server, family)
    _, found = points_of(server, run_id)
    assert found == wanted


def test_a_sync_that_is_killed_again_and_again_is_exact_in_the_end(tmp_path, mlflow_server):
    kill_and_repeat(tmp_path, mlflow_server, 4, 2000, 2.5)


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_fifty_kills_at_random_moments(tmp_path, mlflow_server):
    kill_and_repeat(tmp_path, mlflow_server, 50, 40_000, 10.0)


def test_a_source_that_grew_is_sent_from_where_it_was(tmp_path, mlflow_server):
    source = anemoi_run(40, status=1, end_ms=None)
    store = write_mlruns(tmp_path / "mlruns", [source])
    assert sent(sync(store, "--tracking-uri", mlflow_server.uri)) == 40
    assert only(mlflow_server, source.run_id).info.status == "RUNNING"
    source.lines["train/loss"] += ["1795000099000 0.5 99", "1795000098000 nan 98"]
    source.lines["late/key"] = ["1795000099000 inf 99"]
    source.status, source.end_ms = 4, 1_795_000_100_000
    write_run(store / "547247666917800932" / source.run_id, source)
    assert sent(sync(store, "--tracking-uri", mlflow_server.uri)) == 3
    assert sent(sync(store, "--tracking-uri", mlflow_server.uri)) == 0
    run, points = points_of(mlflow_server, source.run_id)
    assert len(points) == 43
    assert (run.info.status, run.info.end_time) == ("FAILED", source.end_ms)


def test_what_users_changed_on_the_server_since_is_left_alone(tmp_path, mlflow_server):
    source = anemoi_run(10)
    store = write_mlruns(tmp_path / "mlruns", [source])
    sync(store, "--tracking-uri", mlflow_server.uri)
    client, run = mlflow_server.client(), only(mlflow_server, source.run_id)
    client.set_tag(run.info.run_id, "projectName", "another")
    client.update_run(run.info.run_id, status="RUNNING", name="another name")
    sync(store, "--tracking-uri", mlflow_server.uri, "--experiment-name", "another experiment")
    again = only(mlflow_server, source.run_id)
    assert again.data.tags["projectName"] == "another"
    assert (again.info.status, again.info.run_name) == ("RUNNING", "another name")


def test_a_copy_of_a_source_that_is_complete_only_now_is_completed(tmp_path, mlflow_server):
    source = anemoi_run(40)
    whole = write_mlruns(tmp_path / "whole", [source])
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    metric = copy / "547247666917800932" / source.run_id / "metrics" / "train" / "loss"
    content = metric.read_bytes()
    metric.write_bytes(content[: len(content) // 2 + 3])
    told = sync(copy, "--tracking-uri", mlflow_server.uri)["runs"][0]
    assert [note for note in told["notes"] if "last line is not complete" in note]
    sync(whole, "--tracking-uri", mlflow_server.uri)
    _, points = points_of(mlflow_server, source.run_id)
    assert points == source.points()
