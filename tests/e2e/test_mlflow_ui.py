"""What people see: MLflow's own pages of our runs, in a real browser.

RELAY_TEST_SCREENSHOTS=<folder> keeps the screenshots, to be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from mlflow_relay.launch import relay_run_id
from tests.support.browser import Chromium, find_chromium
from tests.support.relay import Node, finish

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)"
)

#: Two runs in a row, the second goes on where the first stopped. A curve that zigzags: the page
#: leaves no point out of its line, as it does on straight ways.
JOB = """
import sys
import mlflow_relay

parent, child = sys.argv[1:]
with mlflow_relay.start_run("aifs", "o96", run_key=parent, params={"lr": 0.1}) as run:
    for step in range(12):
        run.log_metrics({"loss": 1 / (step + 1) + 0.1 * (step % 2)}, step=step)
    root = run.run_id
with mlflow_relay.start_run(
    "aifs", "o96 goes on", run_key=child, resume=root, params={"lr": 0.05}
) as run:
    for step in range(12, 30):
        run.log_metrics({"loss": 1 / (step + 1) + 0.1 * (step % 2)}, step=step)
"""
PARENT_POINTS, CHILD_POINTS = 12, 18

#: The path of the line in the page's only chart.
LINE = "document.querySelector('.scatterlayer .trace .js-line')?.getAttribute('d')"


@pytest.fixture(scope="module")
def job(tmp_path_factory, mlflow_server) -> Iterator[tuple[Node, dict[str, Any], dict[str, Any]]]:
    """A node that has delivered a run and its resume, and the status of both."""
    with Node(tmp_path_factory.mktemp("node"), mlflow_server.uri) as node:
        node.start()
        finish([node.rank(JOB, "ui-parent", "ui-child")])
        # The second start_run of a process has another id than the first.
        parent = node.wait_until_ended(relay_run_id("ui-parent", 1))
        child = node.wait_until_ended(relay_run_id("ui-child", 2))
        yield node, parent, child


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Chromium]:
    assert CHROMIUM is not None
    with Chromium(tmp_path_factory.mktemp("browser"), CHROMIUM) as browser:
        yield browser


def link_to(run: dict[str, Any]) -> str:
    """Return the JavaScript for the link to a run, wherever on a page it stands."""
    return f"""document.querySelector('a[href$="/runs/{run["mlflow_run_id"]}"]')"""


def test_the_child_is_nested_under_its_parent_in_the_table_of_runs(browser, job) -> None:
    _, parent, child = job
    browser.open(parent["url"].partition("/runs/")[0] + "/runs")
    browser.wait_for(link_to(parent), "the table shows the parent")
    assert not browser.value(f"Boolean({link_to(child)})"), (
        "the child stands in the table by itself"
    )
    browser.screenshot("runs-table-folded")

    browser.click(f"{link_to(parent)}.closest('[role=gridcell]').querySelector('button')")
    browser.wait_for(link_to(child), "the parent unfolds to its child")

    left, top = (
        f"{link_to(parent)}.getBoundingClientRect().{side} < "
        f"{link_to(child)}.getBoundingClientRect().{side}"
        for side in ("left", "top")
    )
    browser.wait_for(f"{left} && {top}", "the child stands below, and further in than its parent")
    text = browser.value(f"{link_to(child)}.textContent")
    browser.screenshot("runs-table-unfolded")
    assert text == "o96 goes on"


def test_the_page_of_the_parent_names_the_child(browser, job) -> None:
    _, parent, child = job
    browser.open(parent["url"])
    browser.wait_for(link_to(child), "the parent's page has a link to the child")
    browser.screenshot("parent-page")
    assert "Child runs" in browser.value("document.body.innerText")


@pytest.mark.parametrize(("which", "points"), [(1, PARENT_POINTS), (2, CHILD_POINTS)])
def test_a_metric_is_drawn_as_a_line_through_all_its_points(browser, job, which, points) -> None:
    browser.open(job[which]["url"] + "/model-metrics")
    browser.wait_for(LINE, "the page draws a line")
    line = browser.value(LINE)
    drawn = browser.value("document.querySelectorAll('.scatterlayer .trace .point').length")
    bars = browser.value("document.querySelectorAll('.barlayer .trace').length")
    browser.screenshot(f"metric-line-{'parent' if which == 1 else 'child'}")
    assert (drawn, bars) == (points, 0)
    assert len(re.findall(r"-?[\d.]+,-?[\d.]+", line)) == points, line
    assert "loss" in browser.value("document.body.innerText")


def test_the_page_that_url_prints_for_two_runs_compares_them(browser, job) -> None:
    node, parent, child = job
    printed = node.command("url", parent["run_id"], child["run_id"])
    assert printed.returncode == 0, printed.stderr
    browser.open(printed.stdout.strip())
    for run in (parent, child):
        browser.wait_for(link_to(run), "the compare page has a link to each run")
    browser.wait_for(
        "document.body.innerText.includes('0.05') && document.body.innerText.includes('0.1')",
        "the compare page shows the params of both",
    )
    browser.wait_for("document.querySelector('.js-plotly-plot .main-svg')", "it draws a plot")
    browser.screenshot("compare")
    text = browser.value("document.body.innerText")
    assert "Comparing 2 Runs from 1 Experiment" in text
    assert parent["mlflow_run_id"] in text
    assert child["mlflow_run_id"] in text
