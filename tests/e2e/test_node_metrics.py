"""Two nodes of one job on MLflow's System metrics tab; kills, and a GPU library that always fails.

RELAY_TEST_SCREENSHOTS=<folder> keeps the screenshot, to be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.browser import Chromium, find_chromium
from tests.support.jobs import (
    ended_run,
    hear,
    last_words,
    only_run,
    reports,
    run_id_of,
    start_rank,
    status_when,
    tell,
)
from tests.support.relay import Node, wait_until

if TYPE_CHECKING:
    import subprocess

    from tests.support import MlflowServer

MEASURING = {"node_metrics": "true", "node_metrics_interval_s": "0.2"}
NODES = 2
#: One that is installed, finds two GPUs, and then fails at each call.
BROKEN_LIBRARY = """
class NVMLError(Exception): ...
def nvmlInit(): ...
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetMemoryInfo(handle): raise NVMLError("GPU is lost")
def nvmlDeviceGetUtilizationRates(handle): raise NVMLError("GPU is lost")
def nvmlDeviceGetPowerUsage(handle): raise NVMLError("GPU is lost")
def nvmlDeviceGetEnforcedPowerLimit(handle): raise NVMLError("GPU is lost")
"""

#: Types into the page's search field, so that both nodes have room on the screenshot.
SEARCH_CPU = """(() => {
    const field = document.querySelector('input[placeholder="Search metric charts"]');
    const setter = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;
    setter.call(field, 'cpu');
    field.dispatchEvent(new Event('input', {bubbles: true}));
})()"""

CURVES_IN_SIGHT = """(plots => plots.length - plots.filter(plot =>
    !plot.querySelector('.js-line') || plot.getBoundingClientRect().top > innerHeight
).length * 9)([...document.querySelectorAll('.js-plotly-plot')])"""

SCRIPT = """
    run = mlflow_relay.start_run("node metrics", run_key=sys.argv[1])
    run.log_metrics({"loss": 1.0}, step=0)
    say("logs")
    hear()
    run.end()
    report(end_ms=now_ms())
"""


def torchrun_environ(rank: int) -> dict[str, str]:
    """Return what torchrun tells a rank of a job with one rank on each node."""
    names = {"RANK": rank, "WORLD_SIZE": NODES, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    names |= {"GROUP_RANK": rank, "GROUP_WORLD_SIZE": NODES}
    return {name: str(value) for name, value in names.items()}


@pytest.fixture
def nodes(tmp_path: Path, mlflow_server: MlflowServer) -> Iterator[list[Node]]:
    """Two nodes that measure themselves five times a second; the second has a broken GPU library."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "pynvml.py").write_text(BROKEN_LIBRARY)
    with (
        Node(tmp_path / "first", mlflow_server.uri, settings=MEASURING) as first,
        Node(tmp_path / "second", mlflow_server.uri, settings=MEASURING) as second,
    ):
        second._daemon_environ["PYTHONPATH"] = str(library)
        for node in (first, second):
            node.start()
        yield [first, second]


def system_points(server: MlflowServer, key: str, node: int) -> list[tuple[str, float, int, int]]:
    """Return what a node has told of itself, all keys together."""
    run_id = only_run(server, key).info.run_id
    prefix = f"system/node_{node}/"
    return [point for point in server.all_points(run_id) if point[0].startswith(prefix)]


def ranks_of(nodes: list[Node], key: str) -> list[subprocess.Popen[str]]:
    """Start one rank on each node, and wait until the run is in MLflow."""
    ranks = [
        start_rank(node, SCRIPT, key, environ=torchrun_environ(rank))
        for rank, node in enumerate(nodes)
    ]
    for rank, node in zip(ranks, nodes, strict=True):
        hear(rank, "logs")
        status_when(node, key, lambda run: run["mlflow_run_id"], "the run is in MLflow")
    return ranks


def enough(server: MlflowServer, key: str, samples: int) -> bool:
    """Return whether each node has told so many samples."""
    counts = [
        sum(point[0].endswith("/cpu_utilization_percentage") for point in points)
        for node in range(NODES)
        if (points := system_points(server, key, node))
    ]
    return len(counts) == NODES and min(counts) >= samples


def test_two_nodes_stand_on_the_system_metrics_tab(nodes, mlflow_server, tmp_path) -> None:
    ranks = ranks_of(nodes, "two nodes")
    wait_until(lambda: enough(mlflow_server, "two nodes", 8), "eight samples of each node")
    for rank in ranks:
        tell(rank)
    ends_ms = [each["end_ms"] for each in reports(ranks)]
    status = status_when(nodes[0], "two nodes", lambda run: run["state"] == "ended", "it ended")
    for node in range(NODES):
        points = system_points(mlflow_server, "two nodes", node)
        assert len(set(points)) == len(points)
        assert max(point[2] for point in points) <= max(ends_ms), "no sample after the run"
        assert not [point for point in points if "gpu" in point[0]]
    said = nodes[1].log.read_text()
    assert len(re.findall("is left out from now on: GPU is lost", said)) == 6, said
    assert "is left out" not in nodes[0].log.read_text()

    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    with Chromium(tmp_path / "browser", chromium) as browser:
        browser.open(status["url"] + "/system-metrics")
        for node in range(NODES):
            browser.wait_for(
                f"document.body.innerText.includes('system/node_{node}')",
                f"the tab has a group for node {node}",
            )
        browser.wait_for(
            "document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length >= 2",
            "it draws curves",
        )
        browser.value(SEARCH_CPU)
        browser.wait_for(f"{CURVES_IN_SIGHT} == 2", "one curve of each node is left")
        browser.screenshot("system-metrics-two-nodes")


def test_a_daemon_killed_again_and_again_sends_no_sample_twice(nodes, mlflow_server) -> None:
    node = nodes[0]
    rank = start_rank(node, SCRIPT, "killed daemon")
    hear(rank, "logs")
    status_when(node, "killed daemon", lambda run: run["mlflow_run_id"], "the run is in MLflow")
    for life in range(3):
        before = len(system_points(mlflow_server, "killed daemon", 0))
        wait_until(
            lambda before=before: len(system_points(mlflow_server, "killed daemon", 0)) > before,
            f"new samples in life {life}",
        )
        node.kill()
        node.start()
    tell(rank)
    reports([rank])
    run = ended_run(node, mlflow_server, "killed daemon")
    assert run.info.status == "FINISHED"
    points = system_points(mlflow_server, "killed daemon", 0)
    places = [(key, timestamp_ms) for key, _, timestamp_ms, _ in points]
    assert len(set(places)) == len(places), "one value of each key at each moment"


def test_a_killed_rank_ends_its_run_and_node_metrics_do_not_keep_it_alive(
    nodes, mlflow_server
) -> None:
    node = nodes[0]
    rank = start_rank(node, SCRIPT, "killed rank")
    hear(rank, "logs")
    status_when(node, "killed rank", lambda run: run["accepted_records"] > 3, "samples are kept")
    rank.kill()
    last_words(rank)
    run = ended_run(node, mlflow_server, "killed rank")
    assert run.info.status == "FAILED"
    times_ms = [point[2] for point in system_points(mlflow_server, "killed rank", 0)]
    assert max(times_ms) <= run.info.end_time
    assert node.run(run_id_of("killed rank"))["ranks_seen"] == 1
