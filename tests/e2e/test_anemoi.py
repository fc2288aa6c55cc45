"""Anemoi's own AnemoiMLflowLogger, unchanged, on the local endpoint: the server up, away, and lost in the
middle; the same is there afterwards as from the server itself.

RELAY_TEST_ANEMOI_PYTHON names an interpreter that has anemoi-training, if this one has not.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import MlflowServer, TcpProxy
from tests.support.drop_in import seen_run
from tests.support.foreign_python import python_with
from tests.support.relay import Node, last_json, rest_of, wait_until
from tests.support.servers import free_port

TERMINAL_LOG = "terminal_log.txt"
#: The lives of one model, as `anemoi-training train` asks for them: new, resumed as a child, resumed
#: as itself, forked, resumed and forked. Trained by Lightning, which calls the logger.
LIVES = """
import json, os, sys, torch
import pytorch_lightning as lightning
from anemoi.training.diagnostics.mlflow.logger import AnemoiMLflowLogger

uri, experiment, pause_before = (os.environ["LIVES_" + name] for name in ("URI", "EXPERIMENT", "PAUSE"))

class Model(lightning.LightningModule):
    def __init__(self, life):
        super().__init__()
        self.layer, self.life = torch.nn.Linear(4, 1), life
    def training_step(self, batch, index):
        self.log("train_loss", float(index + 100 * self.life))
        return self.layer(batch).pow(2).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

def train(life, **lineage):
    if life == int(pause_before):
        print("half", flush=True)
        sys.stdin.readline()
    logger = AnemoiMLflowLogger(
        experiment_name=experiment, project_name="anemoi", run_name="o96", tracking_uri=uri,
        authentication=False, **lineage)
    logger.log_hyperparams({"config": {"lr": 0.1, "life": life, "levels": [[1, 2], [3]]}, "metadata": {"seed": 7}})
    logger.log_terminal_output(artifact_save_dir=f"plots{life}")
    print("said in life", life, flush=True)
    trainer = lightning.Trainer(
        max_steps=20, logger=logger, log_every_n_steps=1, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Model(life), torch.utils.data.DataLoader(torch.randn(20, 4)))
    with open("notes.txt", "w") as file:
        file.write(f"of life {life}")
    logger.experiment.log_artifact(logger.run_id, "notes.txt")
    return logger.run_id

first = train(0)
child = train(1, run_id=first, on_resume_create_child=True)
same = train(2, run_id=first, on_resume_create_child=False)
forked = train(3, fork_run_id=first)
both = train(4, run_id=first, fork_run_id=child)
print(json.dumps([first, child, same, forked, both]))
"""


def lives_of(
    folder: Path,
    uri: str,
    experiment: str,
    node: Node,
    *,
    pause_before: int = -1,
    pause: Any = None,
) -> list[str]:
    """Return the run ids that the logger had, life by life."""
    folder.mkdir()
    python = python_with("RELAY_TEST_ANEMOI_PYTHON", "anemoi.training", "anemoi-training")
    training = subprocess.Popen(
        [python, "-c", LIVES],  # its arguments would be in a tag
        env={
            **node.environ,
            "LIVES_URI": uri,
            "LIVES_EXPERIMENT": experiment,
            "LIVES_PAUSE": str(pause_before),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "GIT_PYTHON_REFRESH": "quiet",
        },
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    node.ranks.append(training)
    assert training.stdout is not None
    assert training.stdin is not None
    before = ""
    if pause is not None:
        while (line := training.stdout.readline()) != "half\n":
            before += line
            assert line, before[-3000:]
        pause()
        training.stdin.write("\n")
        training.stdin.flush()
    output = rest_of(training, 150)
    assert training.returncode == 0, (before + output)[-4000:]
    ids: list[str] = last_json(output)
    return ids


def left_by(server: MlflowServer, ids: list[str], folder: Path) -> list[dict[str, Any]]:
    """Return what is there of each life, with names in the place of ids."""
    client = server.client()
    names = {run_id: f"life {life}" for life, run_id in reversed(list(enumerate(ids)))}
    found = []
    for life, run_id in enumerate(ids):
        run = seen_run(client, client.get_run(run_id), names)
        # It has times and paths in it; of a run with two lives it is the second's.
        said = f"said in life {2 if life == 0 else life}\n"
        text = Path(client.download_artifacts(run_id, TERMINAL_LOG, str(folder))).read_text()
        assert run["artifacts"].pop(TERMINAL_LOG)
        found.append({**run, "terminal log is whole": said in text})
    return found


@pytest.mark.timeout(600)
@pytest.mark.torture
@pytest.mark.parametrize("away", ["never", "from the start", "from the second life on"])
def test_all_that_its_logger_does_is_there_as_from_the_server(
    away: str, tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    port, experiment = free_port(), f"anemoi, away {away}"
    uri = f"http://127.0.0.1:{port}"
    with (
        TcpProxy(mlflow_server.uri) as proxy,
        Node(tmp_path / "node", proxy.uri, settings={"http_port": port}) as node,
    ):
        node.start()
        expected = left_by(
            mlflow_server,
            lives_of(tmp_path / "server", mlflow_server.uri, f"{experiment}: server", node),
            tmp_path,
        )
        if away == "from the start":
            proxy.refuse()
        middle = {"pause_before": 1, "pause": proxy.refuse} if "second" in away else {}
        ids = lives_of(tmp_path / "relay", uri, experiment, node, **middle)  # type: ignore[arg-type]
        proxy.heal()
        wait_until(lambda: is_delivered(node), "all is delivered")
        found = left_by(mlflow_server, [servers_id(node, each) for each in ids], tmp_path)
        assert all(run["dead_letters"] == 0 for run in node.status()["runs"])
    differing = [
        (life, field, wanted[field], there.get(field))
        for life, (wanted, there) in enumerate(zip(expected, found, strict=True))
        for field in wanted
        if there.get(field) != wanted[field]
    ]
    assert differing == []
    assert ids[0] == ids[2]


def is_delivered(node: Node) -> bool:
    return all(
        run["accepted_records"] == run["settled_records"]
        and run["state"] == "ended"
        and not run["artifacts"]["waiting"]
        for run in node.status()["runs"]
    )


def servers_id(node: Node, run_id: str) -> str:
    """Return the server's id of a run."""
    for run in node.status()["runs"]:
        if run_id in (run["run_id"], run["mlflow_run_id"]):
            return str(run["mlflow_run_id"])
    raise AssertionError(f"{run_id} is no run of this spool")
