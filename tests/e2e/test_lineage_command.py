"""`mlflow-relay lineage`: the tree, and links by hand, with real daemons and a real server."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import TcpProxy
from tests.support.lineage import (
    RUN_PARAMS,
    Rank,
    expected_lineage,
    first_id,
    fresh_key,
    lineage_of,
    make_one,
    only,
    seen,
    values,
    wait_until_all_ended,
    waits,
    when,
)
from tests.support.proxy import black_hole
from tests.support.relay import Node, wait_until

EXPERIMENT = "lineage command"
STEPS = (0, 5)


@pytest.fixture(scope="module")
def node(tmp_path_factory, mlflow_server) -> Iterator[Node]:
    """One node with a living daemon for all tests here that stop nothing."""
    with Node(tmp_path_factory.mktemp("node"), mlflow_server.uri) as node:
        node.start()
        yield node


def nobody() -> str:
    """Return an id that nobody knows."""
    return uuid.uuid4().hex


def new_run(node: Node, **start: Any) -> str:
    """Make a short run; return its relay run id."""
    return make_one(node, STEPS, experiment_name=EXPERIMENT, run_key=fresh_key(), **start)


def lineage(node: Node, *arguments: str, code: int = 0) -> str:
    """Run the command, and return what it prints on stdout; on stderr if it must fail."""
    done = node.command("lineage", *arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def tree(node: Node, run_id: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(lineage(node, run_id, "--json"))
    assert body["schema_version"] == 1
    found: dict[str, Any] = body["tree"]
    return found


def shape(member: dict[str, Any]) -> tuple[Any, ...]:
    """Return ids and links of a tree."""
    children = [shape(child) for child in member["children"]]
    return (member["run_id"], member["link"], *children)


def mlflow_id(node: Node, run_id: str) -> str:
    found = node.run(run_id)["mlflow_run_id"]
    assert isinstance(found, str)
    return found


# ── the tree ──


def test_resumes_stand_beneath_the_root_and_forks_beneath_their_origin(node) -> None:
    root = new_run(node, run_name="root")
    child = new_run(node, resume=root)
    grandchild = new_run(node, resume=child)
    fork = new_run(node, run_name="fork", fork=child)
    both = new_run(node, resume=fork, fork=root)
    same = new_run(node, resume=root, resume_mode="same")
    wait_until_all_ended(node, [root, child, grandchild, fork, both, same])
    expected = (
        root,
        None,
        (child, "resume", (fork, "fork", (both, "resume"))),
        (grandchild, "resume"),
        (both, "fork"),  # only mentioned here
        (same, "same"),
    )
    for asked in (root, grandchild, both, mlflow_id(node, child)):
        assert shape(tree(node, asked)) == expected
    assert tree(node, root)["children"][2]["mention"]

    node.kill()
    try:
        assert shape(tree(node, child)) == expected
        drawn = lineage(node, child)
    finally:
        node.start()
    lines = drawn.splitlines()
    ids = [f"{each[:8]}  MLflow {mlflow_id(node, each)[:8]}  finished" for each in (root, child)]
    assert lines[0].startswith(f"root  {ids[0]}")
    assert lines[1].startswith(f"├── root  {ids[1]}")
    assert lines[1].endswith("◀")
    assert lines[2].startswith(f"│   └── fork: fork  {fork[:8]}")
    assert lines[4].endswith(f"resumes root {child[:8]}…")
    assert lines[6].startswith(f"└── goes on as it: root  {same[:8]}")


def test_a_name_that_resumes_have_taken_over_means_the_tree(node) -> None:
    name = f"named {nobody()[:8]}"
    root = new_run(node, run_name=name)
    child = new_run(node, resume=root)
    wait_until_all_ended(node, [root, child])
    assert node.run(child)["run_name"] == name
    assert json.loads(lineage(node, name, "--json"))["id"] == root
    stranger = new_run(node, run_name=name)
    wait_until_all_ended(node, [stranger])
    assert "may be any of 3 runs" in lineage(node, name, code=64)


def test_runs_of_others_are_shown_as_the_server_knows_them(tmp_path, node, mlflow_server) -> None:
    client = mlflow_server.client()
    found = client.get_experiment_by_name(EXPERIMENT)
    experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
    plain = client.create_run(experiment, run_name="made by hand").info.run_id
    client.create_run(experiment, run_name="a trial", tags={"mlflow.parentRunId": plain})
    child = new_run(node, resume=plain)
    with Node(tmp_path / "other", mlflow_server.uri) as other:
        other.start()
        sibling = new_run(other, run_name="sibling", resume=plain)
        wait_until_all_ended(other, [sibling])
    wait_until_all_ended(node, [child])

    found = tree(node, child)
    assert (found["run_name"], found["mlflow_run_id"], found["here"]) == (
        "made by hand",
        plain,
        False,
    )
    assert shape(found) == (None, None, (child, "resume"), (sibling, "resume"))
    assert shape(tree(node, plain)) == shape(found)
    drawn = lineage(node, child).splitlines()
    assert drawn[0] == f"made by hand  MLflow {plain[:8]}  running  not of this spool"

    node.kill()
    try:
        assert shape(tree(node, child)) == (None, None, (child, "resume"))
        drawn = lineage(node, child).splitlines()
    finally:
        node.start()
    assert drawn[0] == f"MLflow {plain[:8]}  not of this spool"


def test_a_server_that_does_not_answer_is_not_waited_for(tmp_path, mlflow_server) -> None:
    with (
        TcpProxy(mlflow_server.uri) as proxy,
        Node(tmp_path / "node", proxy.uri, settings={"request_timeout_s": 30}) as node,
    ):
        node.start()
        parent = mlflow_server.client().create_run("0", run_name="outside").info.run_id
        child = new_run(node, resume=parent)
        wait_until_all_ended(node, [child])
        proxy.fail(black_hole())
        done = node.command("lineage", child, timeout_s=20)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == f"MLflow {parent[:8]}  not of this spool"
        assert "the server does not answer" in done.stderr
        # The daemon has not been waiting either: it takes new ranks, and answers.
        assert node.run(new_run(node, run_name="meanwhile"))["accepted_records"] > 0
        proxy.refuse()
        node.command("flush", "--timeout", "0")
        wait_until(lambda: node.status()["server"]["state"] == "down", "the server is down")
        done = node.command("lineage", child, "--json", timeout_s=20)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tree"]["mlflow_run_id"] == parent
        proxy.heal()


# ── what waits ──


def test_a_link_that_waits_is_shown_with_what_to_do(node, mlflow_server) -> None:
    parent = nobody()
    child = new_run(node, run_name="waiter", resume=parent)
    grandchild = new_run(node, resume=child)
    wait_until_all_ended(node, [child, grandchild])
    assert node.run(child)["waits_for"] == [parent]
    assert node.run(grandchild)["waits_for"] == [child]
    assert waits(only(mlflow_server, child))

    found = tree(node, grandchild)
    assert (found["id"], found["known"], found["mlflow_run_id"]) == (parent, False, None)
    assert [each["waits_for"] for each in found["children"]] == [[parent], [child]]

    lines = lineage(node, child).splitlines()
    assert lines[0] == f"{parent[:8]}…  not of this spool"
    assert lines[1].endswith(f"waits for {parent[:8]}…, which nobody knows yet  ◀")
    assert lines[2].endswith(f"waits for waiter {child[:8]}…, which itself waits")
    assert len(lines) == 4, "one hint, for the one that a person can help"
    assert f"mlflow-relay lineage link {child[:8]} PARENT" in lines[3]
    assert f"mlflow-relay lineage drop {child[:8]}" in lines[3]

    status = node.command("status", "--run", child)
    assert status.returncode == 0, "a parent that is not known yet is no error"
    [note] = [line for line in status.stdout.splitlines() if line.startswith("- ")]
    assert parent[:8] in note
    assert f"mlflow-relay lineage drop {child[:8]}" in note

    node.kill()
    try:
        done = node.command("lineage", child)
        status = node.command("status", "--json", "--run", child)
    finally:
        node.start()
    assert f"waits for {parent[:8]}…, which this spool does not know" in done.stdout
    assert json.loads(status.stdout)["runs"][0]["waits_for"] == [parent]


def test_a_child_is_linked_by_hand_and_what_waited_for_it_follows(node, mlflow_server) -> None:
    wrong = nobody()
    root = new_run(node, run_name="right one")
    child = new_run(node, resume=wrong)
    grandchild = new_run(node, resume=child)
    wait_until_all_ended(node, [root, child, grandchild])
    assert waits(only(mlflow_server, grandchild))

    printed = lineage(node, "link", child, "right one")
    assert root in printed
    assert wrong in printed
    root_id = mlflow_id(node, root)
    expected = expected_lineage(name="right one", origin=root_id, parent=root_id)
    for run_id in (child, grandchild):
        run = when(mlflow_server, run_id, lambda run: lineage_of(run) == expected, "it is linked")
        assert run.data.tags["relay.waits_for"] == ""
        wait_until(lambda run_id=run_id: node.run(run_id)["waits_for"] == [], "nothing waits")
    assert shape(tree(node, child)) == (root, None, (child, "resume"), (grandchild, "resume"))
    assert "no link of run" in lineage(node, "link", child, root, code=1)
    assert "no link of run" in lineage(node, "drop", child, code=1)


def test_a_link_by_hand_may_name_a_run_that_is_to_come(node, mlflow_server) -> None:
    child = new_run(node, resume=nobody())
    wait_until_all_ended(node, [child])
    plain = nobody()
    lineage(node, "link", child, plain)
    run = when(
        mlflow_server,
        child,
        lambda run: run.data.tags["relay.waits_for"] == plain,
        "MLflow is told what it waits for now",
    )
    assert "mlflow.parentRunId" not in run.data.tags
    assert node.run(child)["waits_for"] == [plain]
    parent = mlflow_server.client().create_run("0", run_name="at last").info.run_id
    lineage(node, "link", child, parent)
    expected = expected_lineage(name="at last", origin=parent, parent=parent)
    when(mlflow_server, child, lambda run: lineage_of(run) == expected, "it is linked")


def test_a_run_whose_parent_is_given_up_is_a_root_of_its_own(node, mlflow_server) -> None:
    parent = nobody()
    child = new_run(node, run_name="alone", resume=parent, tags={"source": parent})
    grandchild = new_run(node, resume=child)
    wait_until_all_ended(node, [child, grandchild])
    assert "source" not in only(mlflow_server, child).data.tags, "it waits for a translation"

    assert parent in lineage(node, "drop", child)
    own = mlflow_id(node, child)
    expected = expected_lineage(name="alone", origin=own)
    run = when(mlflow_server, child, lambda run: "source" in run.data.tags, "it waits no more")
    assert lineage_of(run) == expected
    assert run.data.tags["source"] == parent
    expected = expected_lineage(name="alone", origin=own, parent=own)
    when(mlflow_server, grandchild, lambda run: lineage_of(run) == expected, "its child has a root")
    found = tree(node, grandchild)
    assert shape(found) == (child, None, (grandchild, "resume"))
    assert found["dropped"] == [parent]
    assert f"link to {parent[:8]}… given up" in lineage(node, child)


def test_a_parent_that_was_given_up_too_early_can_be_named_again(node, mlflow_server) -> None:
    child = new_run(node, run_name="changed its mind", resume=nobody())
    wait_until_all_ended(node, [child])
    lineage(node, "drop", child)
    own = mlflow_id(node, child)
    when(mlflow_server, child, lambda run: not waits(run) and run.data.params, "it stands alone")
    root = new_run(node, run_name="late root")
    wait_until_all_ended(node, [root])
    lineage(node, "link", child, root)
    run = when(
        mlflow_server,
        child,
        lambda run: run.data.tags.get("mlflow.parentRunId") == mlflow_id(node, root),
        "it is linked",
    )
    # A param keeps its first value in MLflow.
    assert [run.data.params[name] for name in RUN_PARAMS] == [own, own]


def test_a_fork_is_linked_by_hand(node, mlflow_server) -> None:
    root, origin = new_run(node, run_name="o"), new_run(node, run_name="origin")
    wrong_parent, wrong_origin = nobody(), nobody()
    run_id = new_run(node, run_name="both", resume=wrong_parent, fork=wrong_origin)
    wait_until_all_ended(node, [root, origin, run_id])
    assert node.run(run_id)["waits_for"] == [wrong_parent, wrong_origin]
    lineage(node, "link", "--fork", run_id, origin)
    wait_until(lambda: node.run(run_id)["waits_for"] == [wrong_parent], "the fork is linked")
    lineage(node, "link", run_id, root)
    root_id, origin_id = mlflow_id(node, root), mlflow_id(node, origin)
    expected = expected_lineage(name="both", origin=root_id, parent=root_id, fork=origin_id)
    when(mlflow_server, run_id, lambda run: lineage_of(run) == expected, "both are linked")


# ── mode "same" ──


def test_a_run_that_never_found_itself_becomes_a_new_run(node, mlflow_server) -> None:
    run_id = new_run(node, run_name="fresh", resume=nobody(), resume_mode="same")
    lost = node.run(run_id)
    assert (lost["mlflow_run_id"], len(lost["waits_for"])) == (None, 1)
    assert "not in MLflow yet" in lineage(node, run_id)
    wait_until(
        lambda: "goes on with" in node.command("status", "--run", run_id).stdout, "status says so"
    )
    lineage(node, "drop", run_id)
    wait_until_all_ended(node, [run_id])
    run = only(mlflow_server, run_id)
    assert lineage_of(run) == expected_lineage(name="fresh", origin=run.info.run_id)
    assert values(mlflow_server, run.info.run_id) == list(range(*STEPS))
    assert run.info.status == "FINISHED"
    assert "was given up" in lineage(node, "link", run_id, nobody(), code=1)


def test_a_run_goes_on_as_the_one_that_is_named_by_hand(node, mlflow_server) -> None:
    root = new_run(node, run_name="itself")
    wait_until_all_ended(node, [root])
    rank = Rank(
        node,
        experiment_name=EXPERIMENT,
        run_key=fresh_key(),
        resume=nobody(),
        resume_mode="same",
    )
    rank.log(5, 9)
    lineage(node, "link", rank.run_id, root)
    root_id = mlflow_id(node, root)
    wait_until(lambda: node.run(rank.run_id)["mlflow_run_id"] == root_id, "it goes on as the other")
    rank.leave()
    wait_until_all_ended(node, [rank.run_id])
    assert values(mlflow_server, root_id) == list(range(9))
    assert seen(mlflow_server, rank.run_id) == [], "no run of its own"
    assert shape(tree(node, rank.run_id)) == (root, None, (rank.run_id, "same"))


# ── errors ──


def test_what_cannot_be_linked_says_why(node) -> None:
    run_id = new_run(node, run_name="plain")
    child = new_run(node, run_name="waits", resume=nobody())
    wait_until_all_ended(node, [run_id, child])
    assert "it resumes no run and is no fork" in lineage(node, "link", run_id, child, code=1)
    assert "it resumes no run and is no fork" in lineage(node, "drop", run_id, code=1)
    assert "cannot be its own parent" in lineage(node, "link", child, child, code=1)
    assert "no link of run" in lineage(node, "link", "--fork", child, run_id, code=1)
    assert "is no run id" in lineage(node, "link", child, "0123", code=64)
    assert "no run is called" in lineage(node, "drop", nobody(), code=64)
    assert "no run is called" in lineage(node, nobody(), code=64)
    assert node.run(child)["lineage"]["resumes"]["by_hand"] is False


def test_two_runs_that_resume_each_other_are_drawn_and_can_be_parted(node, mlflow_server) -> None:
    keys = fresh_key(), fresh_key()
    ids = [first_id(key) for key in keys]
    for key, name, other in zip(keys, ("one", "two"), reversed(ids), strict=True):
        made = make_one(
            node, STEPS, experiment_name=EXPERIMENT, run_key=key, run_name=name, resume=other
        )
        assert made in ids
    wait_until_all_ended(node, ids)
    for run_id in ids:
        assert {each[:8] for each in ids} <= {
            word for word in lineage(node, run_id).split() if len(word) == 8
        }
    lineage(node, "drop", ids[0])
    own = mlflow_id(node, ids[0])
    expected = expected_lineage(name="two", origin=own, parent=own)
    when(mlflow_server, ids[1], lambda run: lineage_of(run) == expected, "the other hangs under it")


def test_links_by_hand_need_a_daemon(tmp_path) -> None:
    with Node(tmp_path / "node", "http://127.0.0.1:9") as node:
        assert "no daemon" in lineage(node, "drop", nobody(), code=69)
        assert "no daemon" in lineage(node, "link", nobody(), nobody(), code=69)


def test_an_offline_daemon_takes_links_by_hand_for_later(tmp_path, mlflow_server) -> None:
    with Node(tmp_path / "node", mlflow_server.uri, settings={"offline": True}) as node:
        node.start()
        parent = nobody()
        child = new_run(node, run_name="kept", resume=parent)
        wait_until(lambda: node.run(child)["ranks_alive"] == 0, "the rank has left")
        assert node.run(child)["waits_for"] == [parent]
        assert "the server is not asked" in lineage(node, child)
        lineage(node, "drop", child)
        assert node.stop() == 0
        node._daemon_environ.pop("MLFLOW_RELAY_OFFLINE")
        node.start()
        wait_until_all_ended(node, [child])
        run = only(mlflow_server, child)
        assert lineage_of(run) == expected_lineage(name="kept", origin=run.info.run_id)
        assert "relay.waits_for" not in run.data.tags
