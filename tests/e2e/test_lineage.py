"""Lineage, read back through MLflow's API: DESIGN section 7, in every order."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pytest

from mlflow_relay.launch import relay_run_id
from tests.support import MlflowServer, TcpProxy
from tests.support.lineage import (
    LOOKED_AGAIN_S,
    Rank,
    all_runs,
    collect_and_leave,
    deliver_and_leave,
    expected_lineage,
    first_id,
    fresh_key,
    is_linked,
    lineage_of,
    made,
    make_one,
    offline_node,
    only,
    plan,
    seen,
    show,
    start_making,
    statuses,
    values,
    wait_until_all_ended,
    waits,
    when,
)
from tests.support.proxy import hold
from tests.support.relay import Node, finish, wait_until

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun


@pytest.fixture(scope="module")
def node(tmp_path_factory, mlflow_server) -> Iterator[Node]:
    """One node with a living daemon for all tests here that stop nothing."""
    with Node(tmp_path_factory.mktemp("node"), mlflow_server.uri) as node:
        node.start()
        yield node


# ── the table ──


@dataclass
class Table:
    """One run for each row, as MLflow shows them when all is delivered."""

    new: MlflowRun
    child: MlflowRun
    fork: MlflowRun
    both: MlflowRun
    again_id: str  #: relay run id of the one that resumed `new` as itself
    server: MlflowServer


@pytest.fixture(scope="module", params=["server up all along", "server down until the end"])
def table(request, tmp_path_factory, mlflow_server) -> Iterator[Table]:
    """The rows of section 7's table, made one after the other by ranks of one node."""
    keys = {row: fresh_key(row) for row in ("new", "child", "again", "fork", "both")}
    ids = {row: first_id(key) for row, key in keys.items()}
    rows = {
        "new": {"run_name": "o96", "steps": (0, 5)},
        "child": {"resume": ids["new"]},
        "again": {"resume": ids["new"], "resume_mode": "same", "steps": (5, 10)},
        "fork": {"fork": ids["new"], "run_name": "rollout"},
        "both": {"resume": ids["new"], "fork": ids["fork"]},
    }
    with (
        TcpProxy(mlflow_server.uri) as proxy,
        Node(tmp_path_factory.mktemp("table"), proxy.uri) as node,
    ):
        if request.param == "server down until the end":
            proxy.refuse()
        node.start()
        for row, start in rows.items():
            assert make_one(node, run_key=keys[row], experiment_name="table", **start) == ids[row]
            if request.param == "server up all along":
                wait_until_all_ended(node, [ids[row]])
        proxy.heal()
        wait_until_all_ended(node, ids.values())
        for row in ("child", "both"):
            when(mlflow_server, ids[row], is_linked, f"{row} has its parent")
        found = {row: only(mlflow_server, ids[row]) for row in rows if row != "again"}
        yield Table(**found, again_id=ids["again"], server=mlflow_server)


def test_a_new_run_is_its_own_origin(table):
    run = table.new
    assert run.data.tags["relay.run_id"] == first_id(run.data.tags["relay.run_key"])
    # Its second life adds nothing but this tag.
    expected = expected_lineage(name="o96", origin=run.info.run_id)
    assert lineage_of(run) == {**expected, "resumedRun": "True"}


def test_a_resumed_run_is_a_child_with_the_parents_name(table):
    parent_id = table.new.info.run_id
    assert table.child.info.run_id != parent_id
    assert lineage_of(table.child) == expected_lineage(
        name="o96", origin=parent_id, parent=parent_id
    )
    assert values(table.server, table.child.info.run_id) == [0, 1, 2, 3, 4]


def test_a_run_that_goes_on_as_itself_is_the_same_mlflow_run(table):
    run = table.new
    assert run.data.tags[f"relay.resumed_by.{table.again_id}"] == "True"
    assert values(table.server, run.info.run_id) == list(range(10))
    assert run.info.status == "FINISHED"
    experiment = [run.info.experiment_id]
    keys = table.server.client().search_runs(
        experiment, f"tags.`relay.run_id` = '{table.again_id}'"
    )
    assert list(keys) == []


def test_a_fork_is_an_entry_of_its_own(table):
    fork = table.fork
    assert lineage_of(fork) == expected_lineage(
        name="rollout", origin=fork.info.run_id, fork=table.new.info.run_id
    )


def test_a_resumed_run_with_other_weights_has_the_marks_of_both(table):
    parent_id = table.new.info.run_id
    assert lineage_of(table.both) == expected_lineage(
        name="o96", origin=parent_id, parent=parent_id, fork=table.fork.info.run_id
    )


# ── every order ──

#: Each role, and the roles of the runs that it goes back to, the nearest last.
ANCESTORS = {
    "root": (),
    "child": ("root",),
    "grandchild": ("root", "child"),
    "fork": ("root", "child"),
    "forks_child": ("root", "child", "fork"),
}
ORDERS = list(itertools.permutations(ANCESTORS))
#: A link may wait for a run that waits itself; so deep is the deepest chain here.
ROUNDS_MAX = 3


class Member(NamedTuple):
    """One run of the family that is delivered in an order.

    Families share a run where its ancestors and it are delivered in the same places: a root has
    several children. So 265 runs do for 120 families of five.
    """

    role: str
    places: tuple[int, ...]  #: of its ancestors and, last, its own

    @property
    def place(self) -> int:
        return self.places[-1]

    def ancestor(self, role: str) -> Member:
        depth = len(ANCESTORS[role]) + 1
        return Member(role, self.places[:depth])


def family_of(order: tuple[str, ...]) -> dict[str, Member]:
    """Return the five that are delivered in this order."""
    return {
        role: Member(role, tuple(order.index(each) for each in (*above, role)))
        for role, above in ANCESTORS.items()
    }


@dataclass
class Families:
    """All families, and how they are made: those with the same place by one process."""

    salt: str
    members: list[list[Member]]  #: by place, as they are made
    ids: dict[Member, str]

    def plan(self, member: Member) -> dict[str, object]:
        """Return how this run is started."""
        lineage: dict[str, object] = {}
        match member.role:
            case "root":
                lineage = {"run_name": f"root {member.places}"}
            case "child":
                lineage = {"resume": self.ids[member.ancestor("root")]}
            case "grandchild":
                lineage = {"resume": self.ids[member.ancestor("child")]}
            case "fork":
                name = f"fork {member.places}"
                lineage = {"fork": self.ids[member.ancestor("child")], "run_name": name}
            case "forks_child":
                lineage = {"resume": self.ids[member.ancestor("fork")]}
        key = key_of(member, self.salt)
        small = {"journal_bytes_max": 1 << 20}
        return plan((0, 2), run_key=key, experiment_name=self.salt, **small, **lineage)


def key_of(member: Member, salt: str) -> str:
    return f"{member.role} {member.places} {salt}"


def all_families() -> Families:
    salt = fresh_key("orders")
    members = sorted({member for order in ORDERS for member in family_of(order).values()})
    by_place = [
        [each for each in members if each.place == place] for place in range(len(ANCESTORS))
    ]
    # The number of a run in its process is part of its id.
    ids = {
        member: relay_run_id(key_of(member, salt), number)
        for place in by_place
        for number, member in enumerate(place, 1)
    }
    return Families(salt, by_place, ids)


def expected_of(found: dict[str, MlflowRun]) -> dict[str, dict[str, str | None]]:
    """Return what MLflow must show of all five."""
    mlflow_ids = {role: run.info.run_id for role, run in found.items()}
    root, fork = mlflow_ids["root"], mlflow_ids["fork"]
    root_name, fork_name = found["root"].info.run_name, found["fork"].info.run_name
    assert root_name.startswith("root (")
    assert fork_name.startswith("fork (")
    under_root = expected_lineage(name=root_name, origin=root, parent=root)
    return {
        "root": expected_lineage(name=root_name, origin=root),
        "child": under_root,
        "grandchild": under_root,
        "fork": expected_lineage(name=fork_name, origin=fork, fork=mlflow_ids["child"]),
        "forks_child": expected_lineage(name=fork_name, origin=fork, parent=fork),
    }


@pytest.mark.timeout(400)
def test_lineage_is_right_in_every_order_of_delivery(tmp_path, mlflow_server):
    """Five spools of five nodes: the n-th holds, for each of the 120 orders, the run that this
    order has in the n-th place. They are delivered one after the other, each as a whole."""
    families = all_families()
    begin_s = time.monotonic()
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(offline_node(tmp_path / f"place {place}", mlflow_server.uri))
            for place in range(len(ANCESTORS))
        ]
        for node in nodes:
            node.start(wait=False)
        processes = []
        for node, members in zip(nodes, families.members, strict=True):
            node.wait_until_it_answers()
            processes.append(start_making(node, [families.plan(each) for each in members]))
        for output, members in zip(finish(processes), families.members, strict=True):
            assert made(output) == [families.ids[each] for each in members]
        for node, members in zip(nodes, families.members, strict=True):
            collect_and_leave(node, runs=len(members))
        made_s = time.monotonic()
        there = 0
        for node, members in zip(nodes, families.members, strict=True):
            assert len(all_runs(mlflow_server, families.salt)) == there
            deliver_and_leave(node)
            there += len(members)
        delivered_s = time.monotonic()
        rounds = 0
        while any(map(waits, all_runs(mlflow_server, families.salt))):
            rounds += 1
            assert rounds <= ROUNDS_MAX
            for node in nodes:
                deliver_and_leave(node)
        linked_s = time.monotonic()
    runs = {run.data.tags["relay.run_id"]: run for run in all_runs(mlflow_server, families.salt)}
    assert len(runs) == there == len(families.ids) == 265
    for order in ORDERS:
        found = {role: runs[families.ids[each]] for role, each in family_of(order).items()}
        shown = {role: lineage_of(run) for role, run in found.items()}
        assert shown == expected_of(found), f"delivered in the order {order}"
    for run in runs.values():
        assert values(mlflow_server, run.info.run_id) == [0, 1]
        assert run.info.status == "FINISHED"
    show(
        f"{len(ORDERS)} orders, {there} runs: made {made_s - begin_s:.1f} s, "
        f"delivered {delivered_s - made_s:.1f} s, "
        f"linked in {rounds} more rounds {linked_s - delivered_s:.1f} s"
    )


# ── parents that this relay never saw ──


def plain_run(server: MlflowServer, name: str, experiment_name: str = "theirs", **tags: str) -> str:
    """Make a run by plain MLflow, with a param, a metric and these tags; return its id."""
    import mlflow

    mlflow.set_tracking_uri(server.uri)
    mlflow.set_experiment(experiment_name)
    with mlflow.start_run(run_name=name) as run:
        mlflow.log_param("lr", 0.1)
        mlflow.log_metric("prepared", 1.0)
        mlflow.set_tags({key.replace("__", "."): value for key, value in tags.items()})
    return str(run.info.run_id)


def child_of(node: Node, server: MlflowServer, **start: object) -> MlflowRun:
    """Return what MLflow shows of a new run, delivered and linked."""
    run_id = make_one(node, run_key=fresh_key("child"), experiment_name="ours", **start)
    wait_until_all_ended(node, [run_id])
    run = when(server, run_id, lambda run: not waits(run), "its parent is known")
    assert values(server, run.info.run_id) == [0, 1, 2, 3, 4]
    return run


def test_a_run_of_plain_mlflow_is_resumed_and_forked(node, mlflow_server):
    parent, weights = plain_run(mlflow_server, "theirs"), plain_run(mlflow_server, "weights")
    run = child_of(node, mlflow_server, resume=parent, fork=weights)
    assert lineage_of(run) == expected_lineage(
        name="theirs", origin=parent, parent=parent, fork=weights
    )


def test_a_parent_in_another_experiment_is_found(node, mlflow_server):
    first = make_one(node, run_key=fresh_key("elsewhere"), experiment_name="a third one")
    wait_until_all_ended(node, [first])
    parent = only(mlflow_server, first).info
    run = child_of(node, mlflow_server, resume=first)
    assert run.info.experiment_id != parent.experiment_id
    assert lineage_of(run) == expected_lineage(
        name=parent.run_name, origin=parent.run_id, parent=parent.run_id
    )


def test_a_chain_of_anemoi_is_climbed_to_its_root(node, mlflow_server):
    root = plain_run(mlflow_server, "o96 baseline")
    resumed = {"resumedRun": "True", "mlflow__parentRunId": root}
    child = plain_run(mlflow_server, "o96 baseline", **resumed)
    fork = plain_run(mlflow_server, "o96 rollout", forkedRun="True", forkedRunId=child)
    under_root = {"name": "o96 baseline", "origin": root, "parent": root}
    for resume, weights, expected in (
        (child, None, under_root),
        (root, child, {**under_root, "fork": child}),
        (fork, None, {"name": "o96 rollout", "origin": fork, "parent": fork}),
    ):
        run = child_of(node, mlflow_server, resume=resume, fork=weights)
        assert lineage_of(run) == expected_lineage(**expected)


def test_a_nested_run_that_is_no_resume_is_a_root(node, mlflow_server):
    sweep = plain_run(mlflow_server, "sweep")
    trial = plain_run(mlflow_server, "trial 3", mlflow__parentRunId=sweep)
    run = child_of(node, mlflow_server, resume=trial)
    assert lineage_of(run) == expected_lineage(name="trial 3", origin=trial, parent=trial)


def test_a_prepared_run_goes_on_as_itself_and_keeps_all_that_was_prepared(node, mlflow_server):
    tags = {"dry_run": "True", "team": "ens", "resumedRun": "False"}
    prepared = plain_run(mlflow_server, "prepared", **tags)
    before = mlflow_server.client().get_run(prepared)
    start = {"resume": prepared, "resume_mode": "same", "run_name": "another name"}
    again = make_one(node, run_key=fresh_key("again"), experiment_name="ours", **start)
    wait_until_all_ended(node, [again])
    after = mlflow_server.client().get_run(prepared)
    assert after.info.run_name == "prepared"
    assert after.info.start_time == before.info.start_time
    assert after.data.params == before.data.params
    changed = {key: value for key, value in before.data.tags.items() if key != "resumedRun"}
    assert changed.items() <= after.data.tags.items()
    assert after.data.tags["resumedRun"] == "True"
    assert values(mlflow_server, prepared) == [0, 1, 2, 3, 4]
    assert values(mlflow_server, prepared, "prepared") == [1]
    assert after.info.status == "FINISHED"
    assert seen(mlflow_server, again) == []


def test_a_run_that_goes_on_as_itself_is_running_again(node, mlflow_server):
    prepared = plain_run(mlflow_server, "prepared", dry_run="True")
    rank = Rank(
        node, run_key=fresh_key("again"), resume=prepared, resume_mode="same",
        experiment_name="ours",
    )  # fmt: skip
    client = mlflow_server.client()
    wait_until(lambda: client.get_run(prepared).info.status == "RUNNING", "it runs again")
    rank.kill()
    wait_until(lambda: client.get_run(prepared).info.status == "FAILED", "it has failed")
    assert "vanished" in client.get_run(prepared).data.tags["relay.end_reason"]


# ── ids in tags and params ──


def test_whole_ids_become_mlflows_and_nothing_else_does(node, mlflow_server):
    first = make_one(node, run_key=fresh_key("first"), experiment_name="ours")
    wait_until_all_ended(node, [first])
    key = fresh_key("second")
    texts = {
        "base": first,
        "me": first_id(key),
        "hash": uuid.uuid4().hex,
        "path": f"runs:/{first}/model",
        "dashed": str(uuid.UUID(first)),
    }
    made_id = make_one(node, run_key=key, experiment_name="ours", params=texts, tags=texts)
    wait_until_all_ended(node, [made_id])
    first_run, run = only(mlflow_server, first), only(mlflow_server, made_id)
    expected = {**texts, "base": first_run.info.run_id, "me": run.info.run_id}
    assert {name: run.data.params[name] for name in texts} == expected
    assert {name: run.data.tags[name] for name in texts} == expected
    originals = {k: v for k, v in run.data.tags.items() if k.startswith("relay.original.")}
    assert originals == {"relay.original.base": first, "relay.original.me": made_id}


def test_an_id_of_a_run_that_is_not_delivered_yet_waits_for_it(tmp_path, mlflow_server):
    """The server comes when both are there; the one that is named comes to it last."""
    with (
        TcpProxy(mlflow_server.uri) as proxy,
        Node(tmp_path / "node", proxy.uri) as node,
    ):
        node.start()
        keys = fresh_key("first"), fresh_key("second")
        first, second = map(first_id, keys)
        until = threading.Event()

        def creates_first(head: bytes) -> bool:
            return b"runs/create" in head and not until.is_set()

        proxy.fail(hold(until), on=creates_first, times=1)
        make_one(node, run_key=keys[0], experiment_name="ours")
        wait_until(lambda: proxy.requests("runs/create") == 1, "the first is being made")
        make_one(node, run_key=keys[1], experiment_name="ours", params={"base": first, "lr": 1})
        run = when(mlflow_server, second, lambda run: "lr" in run.data.params, "the rest is there")
        assert "base" not in run.data.params
        assert values(mlflow_server, run.info.run_id) == [0, 1, 2, 3, 4]
        until.set()
        wait_until_all_ended(node, [first, second])
        first_run = only(mlflow_server, first)
        run = when(mlflow_server, second, lambda run: "base" in run.data.params, "base is there")
        assert run.data.params["base"] == first_run.info.run_id
        assert run.data.tags["relay.original.base"] == first


# ── parents that come late, or not at all ──


def test_a_link_waits_for_its_parent_over_restarts_and_is_made_when_it_comes(
    tmp_path, mlflow_server
):
    with (
        Node(tmp_path / "here", mlflow_server.uri) as node,
        offline_node(tmp_path / "there", mlflow_server.uri) as elsewhere,
    ):
        elsewhere.start()
        parent = make_one(elsewhere, run_key=fresh_key("late"), run_name="late")
        node.start()
        child = make_one(node, run_key=fresh_key("child"), resume=parent, fork=parent)
        wait_until_all_ended(node, [child])
        run = only(mlflow_server, child)
        assert run.data.tags["relay.waits_for"] == parent
        assert "mlflow.parentRunId" not in run.data.tags
        assert values(mlflow_server, run.info.run_id) == [0, 1, 2, 3, 4]
        assert run.info.status == "FINISHED"
        for stop in (node.kill, node.stop):
            stop()
            node.start()
            assert node.run(child)["waits_for"] == [parent, parent]  # as parent, and as fork
            assert waits(only(mlflow_server, child))
        collect_and_leave(elsewhere, runs=1)
        deliver_and_leave(elsewhere)
        run = when(mlflow_server, child, is_linked, "it is linked", LOOKED_AGAIN_S)
        run = when(
            mlflow_server, child, lambda run: "forkedRunId" in run.data.tags, "its fork is known"
        )
        parent_id = only(mlflow_server, parent).info.run_id
        assert lineage_of(run) == expected_lineage(
            name="late", origin=parent_id, parent=parent_id, fork=parent_id
        )
        wait_until(lambda: node.run(child)["waits_for"] == [], "nothing waits")


def test_a_run_that_is_to_go_on_as_itself_waits_for_it(tmp_path, mlflow_server):
    with (
        Node(tmp_path / "here", mlflow_server.uri) as node,
        offline_node(tmp_path / "there", mlflow_server.uri) as elsewhere,
    ):
        elsewhere.start()
        first = make_one(elsewhere, run_key=fresh_key("late"))
        node.start()
        start = {"resume": first, "resume_mode": "same", "steps": (5, 10)}
        again = make_one(node, run_key=fresh_key("again"), **start)
        wait_until(
            lambda: "which nobody knows yet" in (node.run(again)["last_error"] or ""), "words"
        )
        assert node.run(again)["waiting_records"] == 6
        collect_and_leave(elsewhere, runs=1)
        deliver_and_leave(elsewhere)
        wait_until_all_ended(node, [again])
        run = only(mlflow_server, first)
        assert values(mlflow_server, run.info.run_id) == list(range(10))
        assert run.info.status == "FINISHED"


# ── what others do ──


def test_a_parent_that_is_deleted_is_a_parent_still(node, mlflow_server):
    parent = plain_run(mlflow_server, "deleted")
    mlflow_server.client().delete_run(parent)
    run = child_of(node, mlflow_server, resume=parent)
    assert lineage_of(run) == expected_lineage(name="deleted", origin=parent, parent=parent)


def test_a_run_that_is_deleted_is_not_gone_on_with_and_nothing_is_lost(node, mlflow_server):
    parent = plain_run(mlflow_server, "deleted")
    client = mlflow_server.client()
    client.delete_run(parent)
    start = {"resume": parent, "resume_mode": "same"}
    again = make_one(node, run_key=fresh_key("again"), **start)
    words = f"run {parent}, which is to go on, was deleted: restore it"
    found = wait_until(
        lambda: run if words in ((run := node.run(again))["last_error"] or "") else None, words
    )
    assert found["state"] == "blocked"
    assert found["waiting_records"] == 6
    client.restore_run(parent)
    assert node.command("flush", again).returncode == 0
    wait_until_all_ended(node, [again])
    assert values(mlflow_server, parent) == [0, 1, 2, 3, 4]


def test_a_parent_that_is_deleted_while_its_child_runs_harms_nobody(node, mlflow_server):
    parent = plain_run(mlflow_server, "deleted meanwhile")
    rank = Rank(node, run_key=fresh_key("child"), resume=parent)
    rank.log(0, 5)
    when(mlflow_server, rank.run_id, is_linked, "it is linked")
    mlflow_server.client().delete_run(parent)
    rank.log(5, 10)
    rank.leave()
    wait_until_all_ended(node, [rank.run_id])
    run = only(mlflow_server, rank.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert values(mlflow_server, run.info.run_id) == list(range(10))


def test_a_cycle_that_others_made_ends_where_it_is_met(node, mlflow_server):
    first = plain_run(mlflow_server, "first", resumedRun="True")
    second = plain_run(mlflow_server, "second", resumedRun="True", mlflow__parentRunId=first)
    mlflow_server.client().set_tag(first, "mlflow.parentRunId", second)
    run = child_of(node, mlflow_server, resume=first)
    assert lineage_of(run) == expected_lineage(name="second", origin=second, parent=second)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("resume='not an id'", "resume='not an id' is no run id: 32 hex digits are"),
        ("fork='o96 baseline'", "fork='o96 baseline' is no run id: 32 hex digits are"),
        ("resume=own_id", "cannot resume or fork itself"),
        ("fork=own_id", "cannot resume or fork itself"),
        ("resume=own_id, resume_mode='same'", "cannot resume or fork itself"),
    ],
)
def test_what_cannot_be_is_refused_at_the_call_and_leaves_nothing(node, argument, words):
    key = fresh_key("refused")
    script = f"""
    import sys
    import mlflow_relay
    run_key, own_id = sys.argv[1:]
    try:
        mlflow_relay.start_run(run_key=run_key, {argument})
    except ValueError as error:
        print(error)
    """
    (output,) = finish([node.rank(script, key, first_id(key))])
    assert words in output
    assert statuses(node, [first_id(key)]) == {}
    assert list((node.runtime / "journals").glob("*")) == []


# ── elastic restarts ──


def torchrun_environ(rank: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": TORCH_ID,
    }


def slurm_environ(rank: int) -> dict[str, str]:
    return {
        "SLURM_CLUSTER_NAME": CLUSTER,
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }


TORCH_ID, CLUSTER = str(uuid.uuid4()), uuid.uuid4().hex
RESTARTS = {
    "torchrun": (torchrun_environ, "TORCHELASTIC_RESTART_COUNT"),
    "a requeued Slurm job": (slurm_environ, "SLURM_RESTART_COUNT"),
}


@pytest.mark.parametrize(("environ", "count"), RESTARTS.values(), ids=RESTARTS)
def test_a_restarted_job_goes_on_in_the_same_run(node, mlflow_server, environ, count):
    ranks = [Rank(node, environ(rank), experiment_name="ours") for rank in range(2)]
    run_id = ranks[0].run_id
    for rank in ranks:
        assert rank.run_id == run_id
        rank.log(0, 5)
        rank.kill()
    when(mlflow_server, run_id, lambda run: run.info.status == "FAILED", "it has failed")
    again = [Rank(node, {**environ(rank), count: "1"}, experiment_name="ours") for rank in range(2)]
    when(mlflow_server, run_id, lambda run: run.info.status == "RUNNING", "it runs again")
    for rank in again:
        assert rank.run_id == run_id
        rank.log(5, 10)
        rank.leave()
    run = when(mlflow_server, run_id, lambda run: run.info.status == "FINISHED", "it ended well")
    for key in ("loss", "rank_1/loss"):
        assert values(mlflow_server, run.info.run_id, key) == list(range(10))
    assert not run.data.tags.get("relay.end_reason")
