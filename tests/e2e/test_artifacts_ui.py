"""What people see of artifacts: MLflow's own page, in a real browser.

RELAY_TEST_SCREENSHOTS=<folder> keeps the screenshot, to be looked at.
"""

from __future__ import annotations

import pytest

from tests.support.browser import Chromium, find_chromium
from tests.support.relay import Node, finish

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)"
)

JOB = """
import sys, numpy as np, mlflow_relay
from matplotlib.figure import Figure

with mlflow_relay.start_run("aifs", "o96 with files", run_key="artifacts-ui") as run:
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    for step in range(5):
        run.log_metric("loss", 1 / (step + 1), step=step)
        run.log_image(np.random.default_rng(step).random((64, 64)), key="sample", step=step)
    axes.plot([1 / (step + 1) for step in range(5)])
    run.log_figure(figure, "plots/loss.png")
    run.log_dict({"layers": 12, "heads": 8}, "model.json")
    run.log_table({"input": ["a", "b"], "score": [0.25, 0.75]}, "eval.json")
    run.log_text("checkpoint", "checkpoints/last.ckpt")
"""


def test_the_artifacts_page_shows_files_and_folders_and_draws_the_figure(tmp_path, mlflow_server):
    assert CHROMIUM is not None
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node.start()
        finish([node.rank(JOB)])
        run = node.wait_until_ended()
    with Chromium(tmp_path / "browser", CHROMIUM) as browser:
        browser.open(f"{run['url']}/artifacts/plots/loss.png")
        text = "document.body.innerText"
        for name in ("checkpoints", "images", "plots", "eval.json", "model.json"):
            browser.wait_for(f"{text}.includes({name!r})", f"{name} is listed")
        # The page fetches the file and shows it as an image of its own making.
        drawn = "[...document.images].some(image => image.naturalWidth >= 400)"
        browser.wait_for(drawn, "the figure is drawn")
        browser.screenshot("artifacts")
