"""One script of MLflow's own, on a server and through each door: the same is there afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import MlflowServer
from tests.support.drop_in import FLUENT, MODELS, seen
from tests.support.relay import Node, wait_until
from tests.support.servers import free_port

DOORS = ("server", "endpoint", "plugin")


def run_on_all(
    script: str, folder: Path, server: MlflowServer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a script on the server and through each door; return what it saw, and what is there."""
    port = free_port()
    addresses = (server.uri, f"http://127.0.0.1:{port}", "relay://")
    answers, left = {}, {}
    with Node(folder / "node", server.uri, settings={"http_port": port}) as node:
        node.start()
        for door, uri in zip(DOORS, addresses, strict=True):
            experiment = f"{folder.name} {door}"
            done = subprocess.run(
                [sys.executable, "-c", script, experiment],
                env={
                    **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
                    "MLFLOW_TRACKING_URI": uri,
                    "MLFLOW_RELAY_SOCKET": str(node.socket),
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "GIT_PYTHON_REFRESH": "quiet",
                },
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                timeout=110,
            )
            assert done.returncode == 0, f"{door}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
            answers[door] = json.loads(done.stdout.strip().splitlines()[-1])
            wait_until(lambda: is_delivered(node), f"what came through the {door} is delivered")
            left[door] = seen(server.client(), experiment)
        assert all(run["dead_letters"] == 0 for run in node.status()["runs"])
    return answers, left


def is_delivered(node: Node) -> bool:
    return all(
        run["accepted_records"] == run["settled_records"]
        and run["journal_records"] == 0
        and run["state"] in ("ended", "running")
        for run in node.status()["runs"]
    )


def assert_equal(results: dict[str, Any]) -> None:
    differing = [
        (door, name, field, results["server"][name][field], results[door][name].get(field))
        for door in DOORS[1:]
        for name in results["server"]
        for field in results["server"][name]
        if results[door][name].get(field) != results["server"][name][field]
    ]
    assert differing == []
    assert all(set(results[door]) == set(results["server"]) for door in DOORS)


def test_runs_points_tags_files_inputs_and_errors_are_the_same(tmp_path, mlflow_server):
    answers, left = run_on_all(FLUENT, tmp_path, mlflow_server)
    assert_equal(left)
    for door in DOORS[1:]:
        assert answers[door] == answers["server"], door


@pytest.mark.torture
def test_autologging_and_models_are_the_same(tmp_path, mlflow_server):
    answers, left = run_on_all(MODELS, tmp_path, mlflow_server)
    assert_equal(left)
    assert all(answers[door] == {"loads back": True, "from the registry": True} for door in DOORS)
