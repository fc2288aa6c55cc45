"""Lightning's own MLFlowLogger and Hugging Face's own MLflowCallback, with the server away in the middle.

Where they are not installed there is nothing to show: `pip install lightning transformers accelerate`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import MlflowServer, TcpProxy
from tests.support.relay import Node, wait_until
from tests.support.servers import free_port

pytestmark = pytest.mark.torture

LIGHTNING = """
import sys, torch, lightning
from lightning.pytorch.loggers import MLFlowLogger

class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        loss = self.layer(batch).pow(2).mean()
        self.log("loss", loss)
        if index == 20:
            print("half", flush=True)
            sys.stdin.readline()
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

data = torch.utils.data.DataLoader(torch.randn(40, 4))
logger = MLFlowLogger(experiment_name=sys.argv[1], run_name="lightning")
logger.log_hyperparams({"lr": 0.01})
trainer = lightning.Trainer(max_epochs=1, logger=logger, log_every_n_steps=1, accelerator="cpu",
                            enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Model(), data)
"""

HUGGING_FACE = """
import sys, os, torch, tempfile
os.environ["MLFLOW_EXPERIMENT_NAME"] = sys.argv[1]
from transformers import Trainer, TrainerCallback, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def forward(self, x, labels=None):
        return {"loss": (self.layer(x) - labels).pow(2).mean()}

class Pause(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 20:
            print("half", flush=True)
            sys.stdin.readline()

data = [{"x": torch.randn(4), "labels": torch.zeros(1)} for _ in range(40)]
arguments = TrainingArguments(tempfile.mkdtemp(), report_to=["mlflow"], logging_steps=1, num_train_epochs=1,
                              per_device_train_batch_size=1, save_strategy="no", use_cpu=True,
                              run_name="hugging face", disable_tqdm=True)
Trainer(Model(), arguments, train_dataset=data, callbacks=[Pause()]).train()
import mlflow
mlflow.end_run()
"""


@pytest.mark.parametrize("door", ["plugin", "endpoint"])
@pytest.mark.parametrize(
    ("package", "script", "metric"),
    [("lightning", LIGHTNING, "loss"), ("transformers", HUGGING_FACE, "loss")],
)
def test_a_training_is_whole_though_the_server_was_away_in_the_middle(
    door: str,
    package: str,
    script: str,
    metric: str,
    tmp_path: Path,
    mlflow_server: MlflowServer,
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here")
    port = free_port()
    uri = "relay://" if door == "plugin" else f"http://127.0.0.1:{port}"
    experiment = f"{package} {door}"
    with (
        TcpProxy(mlflow_server.uri) as proxy,
        Node(tmp_path, proxy.uri, settings={"http_port": port}) as node,
    ):
        node.start()
        training = subprocess.Popen(
            [sys.executable, "-c", script, experiment],
            env={**os.environ, **node.environ, "MLFLOW_TRACKING_URI": uri, "TQDM_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        try:
            output = _until_half(training)
            proxy.refuse()
            rest, _ = training.communicate("\n", timeout=100)
        finally:
            training.kill()
            training.wait()
        assert training.returncode == 0, (output + rest)[-3000:]
        proxy.heal()
        run = wait_until(lambda: _ended(node), "the run has ended")

        assert run["status"] == "FINISHED"
        assert run["dead_letters"] == 0
        points = mlflow_server.all_points(run["mlflow_run_id"])
        steps = [step for key, _, _, step in points if key == metric]
        assert len(steps) == len(set(steps)) == 40, steps


def _ended(node: Node) -> dict[str, Any] | None:
    (run,) = node.status()["runs"]
    return run if run["state"] == "ended" else None


def _until_half(training: subprocess.Popen[str]) -> str:
    assert training.stdout is not None
    seen = ""
    while "half\n" not in seen:
        line = training.stdout.readline()
        assert line, seen[-3000:]
        seen += line
    return seen
