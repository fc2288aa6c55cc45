"""The page at /relay/, in a real browser: runs, backlog, lineage, dead letters, live."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.browser import Chromium, find_chromium
from tests.support.relay import Node, finish, last_json, wait_until
from tests.support.scenes import fresh_name

RANK = """
import json, sys, mlflow_relay
name, resume = sys.argv[1], sys.argv[2] or None
with mlflow_relay.start_run("page", name, run_key=name, rank=0, world_size=1, resume=resume) as run:
    for step in range(20):
        run.log_metric("loss", 1 / (step + 1), step=step)
    run.log_metric("not/a//name", 1.0, step=1)
print(json.dumps(run.run_id))
"""


@pytest.fixture
def node(tmp_path, mlflow_proxy) -> Iterator[Node]:
    with Node(tmp_path / "node", mlflow_proxy.uri, settings={"http_port": 0}) as node:
        node.start()
        yield node


def test_the_page_shows_runs_lineage_and_dead_letters_and_stays_alive(node, mlflow_proxy, tmp_path):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    parent, child = fresh_name("parent"), fresh_name("<b>child</b>")
    [first] = [last_json(out) for out in finish([node.rank(RANK, parent, "")])]
    finish([node.rank(RANK, child, first)])
    wait_until(
        lambda: all(run["state"] == "ended" for run in node.status()["runs"]), "both are delivered"
    )
    url = f"http://127.0.0.1:{node.status()['daemon']['http_port']}/relay/"
    with Chromium(tmp_path / "browser", chromium) as browser:
        browser.open(url)
        browser.wait_for("document.body.dataset.looks > 1", "the page looks again and again")
        text = browser.value("document.body.innerText")
        assert parent in text
        assert child in text, "names are text, never HTML"
        assert browser.value("document.querySelectorAll('b').length") == 4
        assert browser.value(
            "[...document.querySelectorAll('#lineage li li')].map(e => e.innerText).join()"
        ).startswith(f"resumes {child}")
        assert browser.value("document.querySelector('#server b').textContent") == "up"
        assert browser.value("document.querySelectorAll('#letters tbody tr').length") == 2
        assert "not/a//name" in browser.value("document.querySelector('#letters').innerText")
        href = browser.value("document.querySelector('#runs a').href")
        assert href.startswith(mlflow_proxy.uri)
        image = browser.screenshot("page")
        assert image.stat().st_size > 20_000

        mlflow_proxy.refuse()
        rank = node.rank(RANK, fresh_name("third"), "")
        finish([rank])
        browser.wait_for(
            "document.querySelector('#server b').textContent == 'down'", "the server is away"
        )
        browser.wait_for(
            "document.querySelector('#backlog b').textContent.startsWith('22 ')", "22 wait"
        )
        browser.screenshot("page-server-away")
        mlflow_proxy.heal()
        browser.wait_for(
            "document.querySelector('#backlog b').textContent.startsWith('0 ')", "all is delivered"
        )
