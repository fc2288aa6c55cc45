"""`status --watch` and `status --all-nodes`: rates, the way of a backlog, the spools of all nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_relay_daemon.commands import status
from mlflow_relay_daemon.commands._gather import View
from mlflow_relay_daemon.commands._trends import LOOKS_MAX, SPARK, Trends, sparkline
from tests.daemon.test_commands import ID_A, ID_B, a_run, a_status
from tests.support.relay import Node, finish

RANK = """
import sys, mlflow_relay
with mlflow_relay.start_run("nodes", run_key=sys.argv[1], rank=0, world_size=1) as run:
    for step in range(5):
        run.log_metric("loss", 1.0, step=step)
"""


def test_a_rate_is_what_came_between_the_first_look_and_the_last():
    trends = Trends()
    for second in range(4):
        run = a_run(delivered_points=100 * second, accepted_records=0)
        trends.add(a_status(run, time_ms=1000 * second))
    assert trends.of(ID_A).points_per_s == 100
    assert trends.of(ID_A).records_per_s == 0
    assert trends.of(ID_B).points_per_s is None


def test_only_the_last_looks_count_and_a_count_that_begins_anew_is_no_negative_rate():
    trends = Trends()
    for second in range(100):
        waiting = a_run(waiting_records=second, delivered_points=1000 - second)
        trends.add(a_status(waiting, time_ms=1000 * second))
    trend = trends.of(ID_A)
    assert trend.waiting == tuple(range(100 - LOOKS_MAX, 100))
    assert trend.points_per_s == 0


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ((), ""),
        ((0, 0), ""),
        ((0, 1, 1000), SPARK[0] + SPARK[1] + SPARK[7]),
        ((5, 5), SPARK[7] * 2),
    ],
)
def test_a_sparkline_goes_from_zero_to_the_largest(values, bars):
    assert sparkline(values) == bars


@pytest.mark.parametrize("width", [None, 80, 160])
def test_a_watched_status_shows_rate_and_backlog_in_the_width_there_is(width):
    trends = Trends()
    for second in range(3):
        run = a_run(waiting_records=10 * second, delivered_points=7000 * second)
        trends.add(a_status(run, time_ms=1000 * second))
    lines = [line.plain for line in status.draw(View(a_status(run)), width, trends)]
    text = "\n".join(lines)
    assert "POINTS/S" in text
    assert "7000" in text
    assert SPARK[0] in text
    assert width is None or max(map(len, lines)) <= width


@pytest.fixture(scope="module")
def spools(tmp_path_factory) -> Path:
    """Two nodes' spools in one folder, as on a shared home; their daemons are gone."""
    folder = tmp_path_factory.mktemp("shared")
    for name in ("node1", "node2"):
        with Node(
            tmp_path_factory.mktemp(name), "x", spool=folder / name,
            settings={"offline": True, "drain_timeout_s": 0},
        ) as node:  # fmt: skip
            node.start()
            finish([node.rank(RANK, name)])
            node.stop()
    (folder / "mlflow.db").write_text("")
    return folder


def all_nodes(folder: Path, *more: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "mlflow_relay_daemon", "status", "--all-nodes", str(folder)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_runs_of_all_nodes_stand_in_one_table_and_say_whose_records_nobody_delivers(spools):
    lines = all_nodes(spools).splitlines()
    assert lines[0] == "nodes   2, with a daemon 0"
    assert lines[1] == (
        "! node1: records wait, and no daemon serves this spool: `mlflow-relay sync` delivers them"
    )
    rows = [line.split() for line in lines if line.startswith("node1 ") or line[:5] == "node2"]
    assert [row[0] for row in rows] == ["node1", "node2"]
    assert all("6" in row for row in rows), "five calls and the end"


def test_all_nodes_as_json_is_one_status_object_with_the_node_of_each_run(spools):
    found = json.loads(all_nodes(spools, "--json"))
    assert found["schema_version"] == 1
    assert [(node["node"], node["served"]) for node in found["nodes"]] == [
        ("node1", False), ("node2", False),
    ]  # fmt: skip
    assert sorted(run["node"] for run in found["runs"]) == ["node1", "node2"]
    assert {run["waiting_records"] for run in found["runs"]} == {6}


def test_a_living_daemon_is_seen_by_its_lock(spools, tmp_path):
    with Node(tmp_path, "x", spool=spools / "node2", settings={"offline": True}) as node:
        node.start()
        nodes = json.loads(all_nodes(spools, "--json"))["nodes"]
    assert [node["served"] for node in nodes] == [False, True]


def test_a_folder_without_spools_is_one_line_that_says_what_to_name(tmp_path):
    assert "there is no spool in it" in all_nodes(tmp_path, code=1)
    assert "No such file" in all_nodes(tmp_path / "missing", code=1)
