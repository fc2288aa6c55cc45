"""One script of MLflow's own, on a server and through each door: the same is there afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import MlflowServer, TcpProxy
from tests.support.drop_in import CUT_OFF, FLUENT, MODELS, OLD_CLIENT, seen
from tests.support.relay import Node, finish, last_json, wait_until
from tests.support.servers import free_port

DOORS = ("server", "endpoint", "plugin")
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}


def run_on_all(
    script: str,
    folder: Path,
    server: MlflowServer,
    *,
    python: str = sys.executable,
    doors: tuple[str, ...] = DOORS,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a script on the server and through each door; return what it saw, and what is there."""
    port = free_port()
    addresses = dict(zip(DOORS, (server.uri, f"http://127.0.0.1:{port}", "relay://"), strict=True))
    answers, left = {}, {}
    with Node(folder / "node", server.uri, settings={"http_port": port}) as node:
        node.start()
        for door in doors:
            experiment = f"{folder.name} {door}"
            done = subprocess.run(
                [python, "-c", script, experiment],
                env={
                    **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
                    "MLFLOW_TRACKING_URI": addresses[door],
                    "MLFLOW_RELAY_SOCKET": str(node.socket),
                    **QUIET,
                },
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                timeout=180,
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
        for door in set(results) - {"server"}
        for name in results["server"]
        for field in results["server"][name]
        if results[door][name].get(field) != results["server"][name][field]
    ]
    assert differing == []
    assert all(set(found) == set(results["server"]) for found in results.values())


def test_runs_points_tags_files_inputs_and_errors_are_the_same(tmp_path, mlflow_server):
    answers, left = run_on_all(FLUENT, tmp_path, mlflow_server)
    assert_equal(left)
    for door in DOORS[1:]:
        assert answers[door] == answers["server"], door


def test_a_client_of_mlflow_2_9_finds_the_endpoint_to_be_the_server(tmp_path, mlflow_server):
    variable = "RELAY_TEST_MLFLOW_2_9_PYTHON"
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(
            f"no old client: pip install mlflow-skinny==2.9.2, name its Python in {variable}"
        )
    doors = ("server", "endpoint")
    answers, left = run_on_all(OLD_CLIENT, tmp_path, mlflow_server, python=python, doors=doors)
    assert answers["server"]["version"].startswith("2.9.")
    assert answers["endpoint"] == answers["server"]
    assert_equal(left)


@pytest.mark.parametrize("door", DOORS[1:])
def test_with_the_server_away_what_can_wait_is_taken_and_the_rest_says_so_at_once(
    door, tmp_path, mlflow_server
):
    port, name = free_port(), f"{tmp_path.name} {door}"
    uri = "relay://" if door == "plugin" else f"http://127.0.0.1:{port}"
    with (
        TcpProxy(mlflow_server.uri) as proxy,
        Node(tmp_path / "node", proxy.uri, settings={"http_port": port}) as node,
    ):
        node.start()
        training = node.rank(CUT_OFF, name, environ={**QUIET, "MLFLOW_TRACKING_URI": uri})
        until_line(training, "half")
        proxy.refuse()
        assert training.stdin is not None
        training.stdin.write("\n")
        training.stdin.flush()
        (output,) = finish([training])
        said = last_json(output)
        print(json.dumps(said, indent=1))
        proxy.heal()
        wait_until(lambda: is_delivered(node), "what was taken is delivered")
        run = seen(mlflow_server.client(), name)["cut off"]

    taken = ("log_metric", "log_text", "log_image", "set_terminated others")
    assert [said[each].get("answer") for each in taken] == ["done"] * 4, output
    assert said["own run"]["answer"] == [0, 1]
    assert said["set_experiment"]["answer"] == name
    refused = ("log_model", "search_runs", "search_registered_models", "create_registered_model")
    for each in refused:
        assert said[each].get("error_code") == "TEMPORARILY_UNAVAILABLE", said[each]
        assert "MLflow server" in said[each]["words"]
        assert "away" in said[each]["words"] or "did not answer" in said[each]["words"]
    assert "MLflow server is away" in said["list_artifacts"]["words"]
    assert run["status"] == "FINISHED"
    assert [(value, step) for value, step, _ in run["points"]["m"]] == [("1.0", 0), ("2.0", 1)]
    assert {"a.txt", "image.png"} <= set(run["artifacts"])


def until_line(process: subprocess.Popen[str], wanted: str) -> None:
    """Read what a process prints up to a line."""
    assert process.stdout is not None
    before = ""
    while (line := process.stdout.readline()) != f"{wanted}\n":
        assert line, before[-3000:]
        before += line


@pytest.mark.timeout(600)
@pytest.mark.torture
def test_autologging_and_models_are_the_same(tmp_path, mlflow_server):
    answers, left = run_on_all(MODELS, tmp_path, mlflow_server)
    assert_equal(left)
    assert all(answers[door] == {"loads back": True, "from the registry": True} for door in DOORS)
