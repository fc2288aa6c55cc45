"""Links, translation, creation and the end of lanes, against a small MLflow in memory."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_relay.launch import relay_run_id
from mlflow_relay_daemon.lane import lane as lane_module
from mlflow_relay_daemon.lane.ending import (
    NODE_TAG,
    NodeWord,
    RankWord,
    pack_alive,
    pack_word,
    read_words,
)
from mlflow_relay_daemon.lane.lineage import Pending, climb
from mlflow_relay_daemon.sinks import RunInfo, TryAgain
from mlflow_relay_daemon.states import Verdict
from tests.support.fake_mlflow import FakeMlflow, FakeNode

UNKNOWN = "e" * 32
HASH = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def mlflow() -> FakeMlflow:
    return FakeMlflow()


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory: nothing here is about disks."""
    with tempfile.TemporaryDirectory(prefix="relay-lane-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def node(memory, mlflow) -> FakeNode:
    return FakeNode(memory / "node 1", mlflow)


@pytest.fixture
def other_node(memory, mlflow) -> FakeNode:
    return FakeNode(memory / "node 2", mlflow)


def id_of(run_key: str) -> str:
    return relay_run_id(run_key, 1)


# ── climbing to the root ──


def info(run_id: str, **tags: str) -> RunInfo:
    named = {"parent": "mlflow.parentRunId", "waits_for": "relay.waits_for"}
    found = {named.get(key, key): value for key, value in tags.items()}
    return RunInfo(run_id, "1", "", "FINISHED", 0, None, "active", found)


def resumed(run_id: str, parent: str) -> RunInfo:
    return info(run_id, resumedRun="True", parent=parent)


CLIMBS = {
    "a run of its own is its own root": ([info("a")], "a"),
    "a child's root is its parent": ([resumed("b", "a"), info("a")], "a"),
    "a chain ends at its first run": ([resumed("c", "b"), resumed("b", "a"), info("a")], "a"),
    "a nested run that is no resume": ([info("b", parent="a"), info("a")], "b"),
    "a resume of a nested run": ([resumed("c", "b"), info("b", parent="a"), info("a")], "b"),
    "resumed, but of nobody": ([info("b", resumedRun="True")], "b"),
    "a tag that says no": ([info("b", resumedRun="False", parent="a"), info("a")], "b"),
    "a parent that is gone": ([resumed("b", "gone")], "b"),
    "its own parent": ([resumed("a", "a")], "a"),
    "a cycle of two": ([resumed("b", "a"), resumed("a", "b")], "a"),
    "a cycle of two from its other end": ([resumed("a", "b"), resumed("b", "a")], "b"),
    "a way into a cycle": ([resumed("c", "b"), resumed("b", "a"), resumed("a", "b")], "a"),
    "an empty wait is none": ([info("b", waits_for="")], "b"),
}


@pytest.mark.parametrize(("runs", "root"), CLIMBS.values(), ids=CLIMBS)
def test_climbing_ends_at_the_root(runs, root):
    assert climb(runs[0], {run.run_id: run for run in runs}.get).run_id == root


@pytest.mark.parametrize(
    "runs",
    [[info("b", waits_for="x")], [resumed("c", "b"), info("b", waits_for="x")]],
    ids=["itself", "on the way"],
)
def test_nobody_climbs_past_a_run_that_waits_for_its_parent(runs):
    with pytest.raises(Pending):
        climb(runs[0], {run.run_id: run for run in runs}.get)


# ── every order ──

ROLES = ("root", "child", "grandchild", "fork", "forks_child")
STARTS = {
    "root": {"run_name": "root"},
    "child": {"resume": id_of("root")},
    "grandchild": {"resume": id_of("child")},
    "fork": {"fork": id_of("child"), "run_name": "fork"},
    "forks_child": {"resume": id_of("fork")},
}


def lineage(mlflow: FakeMlflow, run_key: str) -> tuple[str | None, ...]:
    """Return parent, fork, what the params say of both, and the name."""
    run = mlflow.of(id_of(run_key))
    assert not run.tags.get("relay.waits_for")
    tags = (("mlflow.parentRunId", "resumedRun"), ("forkedRunId", "forkedRun"))
    for name, mark in tags:
        assert run.tags.get(mark) == ("True" if name in run.tags else None)
    assert run.params["training.run_id"] == run.params["metadata.run_id"]
    return (
        run.tags.get("mlflow.parentRunId"),
        run.tags.get("forkedRunId"),
        run.params["training.run_id"],
        run.params.get("config.training.fork_run_id"),
        run.info.run_name,
    )


def check_family(mlflow: FakeMlflow) -> None:
    """All five are linked as section 7's table has it."""
    ids = {role: mlflow.of(id_of(role)).info.run_id for role in ROLES}
    under_root = (ids["root"], None, ids["root"], None, "root")
    assert {role: lineage(mlflow, role) for role in ROLES} == {
        "root": (None, None, ids["root"], None, "root"),
        "child": under_root,
        "grandchild": under_root,
        "fork": (None, ids["child"], ids["fork"], ids["child"], "fork"),
        "forks_child": (ids["fork"], None, ids["fork"], None, "fork"),
    }


@pytest.mark.parametrize("order", list(itertools.permutations(ROLES)), ids=" ".join)
def test_one_spool_links_its_runs_in_every_order(order, mlflow, node):
    for role in order:
        node.start(role, **STARTS[role]).log().end()
        node.work()
    node.work()  # its delivery would have been told of the news
    check_family(mlflow)


def test_five_spools_link_their_runs_in_every_order(memory):
    for number, order in enumerate(itertools.permutations(ROLES)):
        mlflow = FakeMlflow()
        nodes = [FakeNode(memory / f"{number} {role}", mlflow) for role in order]
        for role, node in zip(order, nodes, strict=True):
            node.start(role, **STARTS[role]).log().end()
            node.work()
        for _ in range(3):  # the longest chain of runs that wait for each other
            for node in nodes:
                node.look()
        check_family(mlflow)
        for node in nodes:
            node.runs.spool.close()


def test_many_that_wait_for_strangers_do_not_ask_at_the_news_of_each_run(mlflow, node):
    for number in range(20):
        node.start(f"waiting {number}", resume=UNKNOWN).end()
    node.work()
    before = len(mlflow.requests)
    node.start("new").end()
    node.work(id_of("new"))
    node.work()
    assert len(mlflow.requests) - before < 20


# ── links ──


def test_a_cycle_that_others_made_ends_where_it_is_met(mlflow, node):
    first = mlflow.add("first", resumedRun="True")
    second = mlflow.add("second", resumedRun="True", mlflow__parentRunId=first)
    mlflow.runs[first].tags["mlflow.parentRunId"] = second
    run_id = node.start("child", resume=first).log().end()
    node.work()
    assert mlflow.of(run_id).tags["mlflow.parentRunId"] == second
    assert len(mlflow.of(run_id).points) == 3


def test_two_that_resume_each_other_are_delivered_and_wait(mlflow, node):
    for mine, other in (("a", "b"), ("b", "a")):
        node.start(mine, resume=id_of(other)).log().end()
    node.work()
    node.look()
    for mine in ("a", "b"):
        run = mlflow.of(id_of(mine))
        assert len(run.points) == 3
        assert run.info.status == "FINISHED"
        assert run.tags["relay.waits_for"]


def test_the_users_own_params_keep_the_relays_from_none_but_their_own_names(mlflow, node):
    run_id = node.start("child", resume=UNKNOWN).params(**{"training.run_id": "mine"}).end()
    node.work()
    assert mlflow.of(run_id).params == {"training.run_id": "mine"}
    parent = node.start("parent")
    # The parent turns up under the id that was asked for.
    mlflow.runs[UNKNOWN] = mlflow.runs.pop(mlflow.add("parent"))
    mlflow.runs[UNKNOWN].info = info(UNKNOWN)
    node.look()
    assert mlflow.of(run_id).params == {"training.run_id": "mine", "metadata.run_id": UNKNOWN}
    parent.end()


# ── translation ──


def test_the_own_id_and_that_of_a_known_run_are_translated(mlflow, node):
    first = node.start("first").end()
    node.work()
    second = id_of("second")
    node.start("second").params(base=first, me=second).tags(base=first, other=HASH).end()
    node.work()
    run, first_id = mlflow.of(second), mlflow.of(first).info.run_id
    own_id = run.info.run_id
    assert (run.params["base"], run.params["me"]) == (first_id, own_id)
    assert (run.tags["base"], run.tags["other"]) == (first_id, HASH)
    assert run.tags["relay.original.base"] == first
    assert run.tags["relay.original.me"] == second
    assert "relay.original.other" not in run.tags


def test_a_value_is_translated_whole_or_not_at_all(mlflow, node):
    first = node.start("first").end()
    node.work()
    values = {"longer": f"runs/{first}", "listed": f"{first},{first}", "capitals": first.upper()}
    second = node.start("second").params(**values).tags(**values).end()
    node.work()
    run = mlflow.of(second)
    assert {key: run.params[key] for key in values} == values
    assert {key: run.tags[key] for key in values} == values
    assert not [key for key in run.tags if key.startswith("relay.original.")]


def test_a_value_waits_for_a_run_that_is_not_delivered_yet_and_nothing_else_does(mlflow, node):
    later = id_of("later")
    second = node.start("second", fork=later).params(base=later, lr="1").tags(base=later).log()
    node.work()
    run = mlflow.of(second.run_id)
    assert run.params["lr"] == "1"
    assert len(run.points) == 3
    assert "base" not in {**run.params, **run.tags}
    node.restart()
    node.start("later").end()
    node.look()
    node.look()
    later_id = mlflow.of(later).info.run_id
    assert run.params["base"] == run.tags["base"] == later_id
    assert run.tags["relay.original.base"] == later


def test_a_later_tag_stands_though_an_earlier_one_had_to_wait(mlflow, node):
    later = id_of("later")
    node.start("second", fork=later).tags(base=later).tags(base="mine").end()
    node.work()
    node.start("later").end()
    node.look()
    node.look()
    assert mlflow.of(id_of("second")).tags["base"] == "mine"


def test_a_later_tag_of_another_batch_stands_though_an_earlier_one_had_to_wait(mlflow, node):
    later = id_of("later")
    rank = node.start("second", fork=later).tags(base=later)
    node.work()
    rank.tags(base="mine").end()
    node.work()
    node.start("later").end()
    node.look()
    node.look()
    assert mlflow.of(id_of("second")).tags["base"] == "mine"


def test_the_last_of_two_tags_that_wait_stands_whichever_is_known_first(mlflow, node):
    one, two = id_of("one"), id_of("two")
    rank = node.start("second", resume=one, fork=two).tags(base=one)
    node.work()
    rank.tags(base=two).end()
    node.work()
    for known_first in ("two", "one"):
        node.start(known_first).end()
        node.look()
        node.look()
    run = mlflow.of(id_of("second"))
    assert run.tags["base"] == mlflow.of(two).info.run_id
    assert run.tags["relay.original.base"] == two


def test_the_first_of_two_params_stands_though_it_had_to_wait(mlflow, node):
    later = id_of("later")
    rank = node.start("second", fork=later).params(base=later)
    node.work()
    rank.params(base="mine").end()
    node.work()
    node.start("later").end()
    node.look()
    node.look()
    assert mlflow.of(id_of("second")).params["base"] == mlflow.of(later).info.run_id
    (letter,) = node.hosted(id_of("second")).letters.list()
    assert (letter.kind, letter.key, letter.value) == ("param", "base", "mine")


def test_the_same_param_of_several_ranks_waits_once(mlflow, node):
    later = id_of("later")
    ranks = [node.start("second", fork=later, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.params(base=later).end()
    node.work()
    assert len(node.hosted(id_of("second")).run.card.held) == 1
    node.start("later").end()
    node.look()
    node.look()
    assert mlflow.of(id_of("second")).params["base"] == mlflow.of(later).info.run_id
    assert node.hosted(id_of("second")).letters.list() == []


BAD_NAMES = {"refused": "a//b", "too long with the prefix of its original": "k" * 240}


@pytest.mark.parametrize("key", BAD_NAMES.values(), ids=BAD_NAMES)
def test_a_text_that_waited_and_is_refused_holds_up_nothing(key, mlflow, node):
    later = id_of("later")
    rank = node.start("second", fork=later).tag(key, later)
    node.work()
    node.start("later").end()
    node.look()
    node.look()
    rank.log().end()
    node.work()
    run = mlflow.of(id_of("second"))
    assert len(run.points) == 3
    assert run.info.status == "FINISHED"
    assert node.hosted(id_of("second")).letters.count == 1


def test_ids_of_nobody_are_asked_for_only_so_often(mlflow, node):
    rank = node.start("hashes")
    for begin in range(0, 300, 50):
        rank.tags(**{f"hash {i}": f"{i:032x}"[::-1] for i in range(begin + 1, begin + 51)})
    run_id = rank.end()
    node.work()
    tags = mlflow.of(run_id).tags
    assert sum(key.startswith("hash ") for key in tags) == 300
    assert mlflow.requests.count("get_run") <= 110


# ── the same run again ──


def test_the_end_of_the_first_life_does_not_end_the_second(mlflow, node):
    """Both lives come to the server at once, after an outage: the first one's end is no news."""
    first = node.start("first")
    first.log().end()
    second = node.start("second", resume=first.run_id, resume_mode="same").log()
    node.work(first.run_id)
    assert mlflow.of(first.run_id).info.status == "FINISHED"
    node.work()
    assert mlflow.of(first.run_id).info.status == "RUNNING"
    second.end("FAILED")
    node.work()
    assert mlflow.of(first.run_id).info.status == "FAILED"


def test_a_first_life_that_ends_late_leaves_the_status_to_the_second(mlflow, node, other_node):
    """The first life's node was slow to deliver the last of it."""
    first = node.start("first").log()
    node.work()
    second = other_node.start("second", resume=first.run_id, resume_mode="same").log()
    other_node.work()
    first.end()
    node.work()
    assert mlflow.of(first.run_id).info.status == "RUNNING"
    second.end("FAILED")
    other_node.work()
    assert mlflow.of(first.run_id).info.status == "FAILED"


def test_a_first_life_that_ends_after_the_second_leaves_the_status_to_it(mlflow, node, other_node):
    first = node.start("first").log()
    node.work()
    other_node.start("second", resume=first.run_id, resume_mode="same").log().end("FAILED")
    other_node.work()
    first.end()
    node.work()
    assert mlflow.of(first.run_id).info.status == "FAILED"


# ── several nodes ──


def two_ranks(node, other_node, run_key="job", **more):
    """Start rank 0 on one node and rank 1 on the other."""
    shape = {"world_size": 2, "node_count": 2, **more}
    return node.start(run_key, rank=0, **shape), other_node.start(run_key, rank=1, **shape)


def test_the_run_ends_when_the_last_node_has(mlflow, node, other_node):
    ranks = two_ranks(node, other_node)
    for each in (node, other_node):
        each.work()
    run = mlflow.of(id_of("job"))
    ranks[0].log().end()
    node.work()
    assert run.info.status == "RUNNING"
    ranks[1].log().end("FAILED")
    other_node.work()
    assert run.info.status == "FAILED"
    node.work()
    assert run.info.status == "FAILED"


def test_a_node_that_was_restarted_before_the_others_ended_speaks_anew(mlflow, node, other_node):
    """A rank of the owner is killed; the launcher starts all ranks again."""
    ranks = two_ranks(node, other_node)
    for each in (node, other_node):
        each.work()
    ranks[0].vanish()
    node.work()  # says that it is done, and waits for the other
    again = two_ranks(node, other_node)
    ranks[1].vanish()
    for each in (node, other_node):
        each.work()
    run = mlflow.of(id_of("job"))
    assert run.info.status == "RUNNING"
    again[1].log().end()
    other_node.work()
    assert run.info.status == "RUNNING", "rank 0 still runs"
    again[0].log().end()
    node.work()
    assert run.info.status == "FINISHED"


def test_ranks_that_change_their_node_are_not_missed_where_they_were(mlflow, node, other_node):
    """torchrun numbers nodes anew at every restart."""
    ranks = two_ranks(node, other_node)
    for each in (node, other_node):
        each.work()
    ranks[0].vanish()
    ranks[1].vanish()
    swapped = two_ranks(other_node, node)
    for each in (node, other_node):
        each.work()
    for each in swapped:
        each.log().end()
    for each in (node, other_node, node, other_node):
        each.work()
    assert mlflow.of(id_of("job")).info.status == "FINISHED"


def test_a_second_life_on_the_same_nodes_does_not_hear_the_words_of_the_first(
    mlflow, node, other_node
):
    for rank in two_ranks(node, other_node, "first"):
        rank.end()
    for each in (node, other_node, node):
        each.work()
    run = mlflow.of(id_of("first"))
    assert run.info.status == "FINISHED"
    second = {"resume": id_of("first"), "resume_mode": "same"}
    ranks = two_ranks(node, other_node, "second", **second)
    for each in (node, other_node):
        each.work()
    assert run.info.status == "RUNNING"
    ranks[0].end()
    node.work()
    assert run.info.status == "RUNNING", "rank 1 of the second life still runs"
    ranks[1].end()
    other_node.work()
    assert run.info.status == "FINISHED"


def test_a_job_that_was_requeued_on_another_node_runs_again_and_ends_well(mlflow, node, other_node):
    node.start("job").log().vanish()
    node.work()
    run = mlflow.of(id_of("job"))
    assert run.info.status == "FAILED"
    again = other_node.start("job").log()
    other_node.work()
    assert run.info.status == "RUNNING"
    again.end()
    other_node.work()
    assert run.info.status == "FINISHED"


def test_a_node_that_failed_and_comes_back_late_leaves_the_end_to_the_requeued_job(
    mlflow, node, other_node
):
    first = node.start("job").log()
    node.work()
    again = other_node.start("job").log()
    other_node.work()
    first.vanish()
    node.restart()
    node.work()
    run = mlflow.of(id_of("job"))
    assert run.info.status == "RUNNING"
    again.end()
    other_node.work()
    assert run.info.status == "FINISHED"


def test_a_late_node_corrects_the_end_that_the_owner_told_without_it(mlflow, node, other_node):
    ranks = two_ranks(node, other_node)
    for each in (node, other_node):
        each.work()
    ranks[0].end()
    node.hosted(id_of("job")).lane.leave()
    node.work()
    run = mlflow.of(id_of("job"))
    assert run.info.status == "FINISHED"
    ranks[1].log().end("FAILED")
    other_node.work()
    assert run.info.status == "FAILED"


def test_a_rank_that_came_and_went_since_the_end_was_told_is_told_to_the_other_nodes(
    mlflow, node, other_node, monkeypatch
):
    """It ended no later than the others of its node, and no worse: only the word changes."""
    monkeypatch.setattr("tests.support.fake_mlflow._now_ms", lambda: 1_700_000_000_000)
    shape = {"world_size": 3, "node_count": 0}
    other_node.start("job", rank=1, **shape).end()
    node.start("job", rank=0, **shape).end()
    for each in (node, other_node):
        each.work()
    run = mlflow.of(id_of("job"))
    assert run.info.status == "RUNNING", "nothing is known of rank 2"
    other_node.start("job", rank=2, **shape).end()
    for each in (other_node, node):
        each.work()
    assert run.info.status == "FINISHED"


def test_a_rank_that_came_and_went_before_anybody_looked_has_its_say_in_the_end(mlflow, node):
    """Of ranks that nobody launched it is not known on how many nodes they are: when the first has
    ended, the others are taken for another node's."""
    ranks = {"world_size": 2, "node_count": 0}
    run_id = node.start("job", rank=0, **ranks).log().end()
    node.work()
    assert mlflow.of(run_id).info.status == "RUNNING"
    node.start("job", rank=1, **ranks).log().end("FAILED")
    node.work()
    assert mlflow.of(run_id).info.status == "FAILED"


def test_a_run_that_failed_and_then_ended_well_has_no_reason_left(mlflow, node, other_node):
    node.start("job").log().vanish()
    node.work()
    run = mlflow.of(id_of("job"))
    assert "vanished" in run.tags["relay.end_reason"]
    other_node.start("job").log().end()
    other_node.work()
    assert run.info.status == "FINISHED"
    assert run.tags["relay.end_reason"] == ""


# ── creation ──


def test_a_create_that_comes_to_the_server_after_the_end_leaves_no_second_run(
    mlflow, node, monkeypatch
):
    lost: list[str] = []

    def lose_first_create(request: str) -> None:
        if request == "create_run" and not lost:
            lost.append(request)
            raise TryAgain("no answer")

    mlflow.before = lose_first_create
    run_id = node.start("job").log().end()
    node.work()
    node.work()
    run = mlflow.of(run_id)
    mlflow.before = lambda _request: None
    tags = [("relay.run_id", run_id), ("relay.run_key", "job")]
    double = mlflow.create_run(
        run.info.experiment_id, run_name="", user="", start_time_ms=1, tags=tags
    )
    monkeypatch.setattr(lane_module, "LATE_LOOK_S", 0.0)
    node.restart()
    waits = node.work()
    assert waits == {run_id: None}
    assert mlflow.runs[double].info.lifecycle_stage == "deleted"
    assert mlflow.of(run_id) is run
    before = len(mlflow.requests)
    node.work()
    assert len(mlflow.requests) == before, "it has looked once"


# ── words ──

RANKS = [
    RankWord(2, 1000, Verdict("FINISHED", 5000, "")),
    RankWord(3, 1200, Verdict("FAILED", 4000, "rank 3: out of memory")),
]


def test_words_come_back_as_they_were_said():
    tags = {NODE_TAG + "n1": pack_word("run", RANKS), NODE_TAG + "n2": pack_alive("run", 17)}
    assert read_words(tags, "run") == [NodeWord("n1", None, RANKS), NodeWord("n2", 17, [])]


def test_words_of_another_life_are_not_heard():
    assert read_words({NODE_TAG + "n1": pack_word("run", RANKS)}, "another run") == []


def test_the_word_of_a_large_node_fits_into_a_tag():
    month_ms = 30 * 86_400_000
    end = Verdict("FINISHED", 1_795_409_329_220 + month_ms, "r" * 2000)
    words = [RankWord(rank, 1_795_409_329_220, end) for rank in range(10_000, 10_128)]
    word = pack_word("f" * 32, words)
    assert len(word) < 5000  # what every backend takes as a tag's value
    (found,) = read_words({NODE_TAG + "n": word}, "f" * 32)
    assert [(each.rank, each.end.end_ms) for each in found.ranks] == [
        (each.rank, each.end.end_ms) for each in words
    ]


@pytest.mark.parametrize(
    "text",
    ["", "yes", "[]", "{}", "null", json.dumps({"run": "run", "since_ms": None, "ranks": []})],
)
def test_a_tag_that_is_no_word_of_ours_is_passed_over(text):
    assert read_words({NODE_TAG + "n1": text, "relay.nodes": "3"}, "run") == []
