"""A real Lightning training on two processes, the server away in the middle, against MLFlowLogger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import MlflowServer, TcpProxy
from tests.support.jobs import only_run, status_when
from tests.support.relay import Node, wait_until

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

pytest.importorskip("torch", reason="no torch here: pip install torch lightning pytorch-lightning")

EPOCHS, STEPS_PER_EPOCH, PROCESSES = 4, 8, 2

TRAINING = """
    import importlib, os, sys, time
    from pathlib import Path
    import torch

    package, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    pl = importlib.import_module(package)
    callbacks = importlib.import_module(package + ".callbacks")

    class Model(pl.LightningModule):
        def __init__(self, optimizer, width):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 1)

        def step(self, batch):
            inputs, targets = batch
            return torch.nn.functional.mse_loss(self.layer(inputs), targets)

        def training_step(self, batch, index):
            loss = self.step(batch)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", self.step(batch), sync_dist=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.optimizer["lr"])

    class Pause(callbacks.Callback):
        # Lets the test take the server away in the middle, and waits until it has.
        def on_train_epoch_end(self, trainer, module):
            if kind == "relay" and trainer.current_epoch == 1 and trainer.is_global_zero:
                (folder / "in the middle").touch()
                while not (folder / "server is away").exists():
                    time.sleep(0.02)

    def data(seed):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(STEPS * PROCESSES * 4, 3, generator=generator)
        dataset = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
        return torch.utils.data.DataLoader(dataset, batch_size=4)

    if kind == "relay":
        from mlflow_relay.lightning import RelayLogger
        logger = RelayLogger("lightning", package, log_model=True, save_dir=folder)
    else:
        MLFlowLogger = importlib.import_module(package + ".loggers").MLFlowLogger
        logger = MLFlowLogger("lightning", package, tracking_uri=os.environ["SERVER"], log_model=True)

    pl.seed_everything(7)
    torch.set_num_threads(1)
    checkpoint = callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=PROCESSES, strategy="ddp", max_epochs=EPOCHS, logger=logger,
        log_every_n_steps=1, callbacks=[Pause(), checkpoint], default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=True,
        num_sanity_val_steps=0,
    )
    trainer.fit(Model({"name": "sgd", "lr": 0.05}, 3), data(1), data(2))
    if trainer.is_global_zero:
        print("VERSION", logger.version)
"""


def start_training(
    folder: Path, package: str, kind: str, environ: dict[str, str]
) -> subprocess.Popen[str]:
    script = folder / "train.py"
    numbers = f"EPOCHS, STEPS, PROCESSES = {EPOCHS}, {STEPS_PER_EPOCH}, {PROCESSES}\n"
    script.write_text(numbers + textwrap.dedent(TRAINING))
    return subprocess.Popen(
        [sys.executable, str(script), package, kind, str(folder)],
        env={**environ, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """Wait for a training that must end well; return its logger's version."""
    output = process.communicate(timeout=110)[0]
    assert process.returncode == 0, output[-5000:]
    return next(line.split()[1] for line in output.splitlines() if line.startswith("VERSION"))


def curves(server: MlflowServer, run_id: str) -> list[tuple[str, int, float]]:
    """Return what rank 0 has logged."""
    return sorted(
        (key, step, value)
        for key, value, _, step in server.all_points(run_id)
        if not key.startswith("rank_")
    )


def files(server: MlflowServer, run: MlflowRun, folder: str | None = None) -> dict[str, int]:
    """Return the artifacts of a run and their sizes."""
    found: dict[str, int] = {}
    for each in server.client().list_artifacts(run.info.run_id, folder):
        found |= files(server, run, each.path) if each.is_dir else {each.path: each.file_size}
    return found


def trained_directly(server: MlflowServer, folder: Path, package: str) -> MlflowRun:
    """Train with Lightning's own logger at a healthy server."""
    folder.mkdir()
    environ = {**os.environ, "SERVER": server.uri}
    run_id = finished(start_training(folder, package, "mlflow", environ))
    return server.client().get_run(run_id)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "package",
    ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.torture)],
)
def test_a_training_whose_server_goes_away_has_what_one_with_mlflowlogger_has(
    tmp_path, mlflow_server, package
) -> None:
    pytest.importorskip(package, reason=f"no {package} here")
    folder = tmp_path / "relay"
    folder.mkdir()
    with TcpProxy(mlflow_server.uri) as proxy, Node(tmp_path / "node", proxy.uri) as node:
        node.start()
        environ = {**node.environ, "MLFLOW_RELAY_RUN_KEY": f"training {package}"}
        process = start_training(folder, package, "relay", environ)
        try:
            wait_until((folder / "in the middle").exists, "the training is in its middle")
            key = environ["MLFLOW_RELAY_RUN_KEY"]
            status_when(node, key, lambda run: run["delivered_points"], "some of it is in MLflow")
            proxy.refuse()
            (folder / "server is away").touch()
            version = finished(process)
        finally:
            process.kill()
            process.wait()
        assert node.run(version)["state"] == "ending", "the server was away until the end"
        proxy.heal()
        node.wait_until_ended(version)
        run = only_run(mlflow_server, key)
        # A checkpoint and what is known of it; hyperparameters.json; model.txt.
        wait_until(lambda: len(files(mlflow_server, run)) == 4, "all artifacts are in MLflow")

    reference = trained_directly(mlflow_server, tmp_path / "direct", package)
    ours, theirs = (curves(mlflow_server, each.info.run_id) for each in (run, reference))
    assert ours == theirs
    steps = EPOCHS * STEPS_PER_EPOCH
    assert sum(key == "train_loss_step" for key, _, _ in ours) == steps
    assert run.info.status == reference.info.status == "FINISHED"
    assert run.info.run_name == package
    expected = {key.replace("/", "."): text for key, text in reference.data.params.items()}
    assert expected == {"optimizer.name": "sgd", "optimizer.lr": "0.05", "width": "3"}
    assert expected.items() <= run.data.params.items()
    from_rank_1 = [
        point
        for point in mlflow_server.all_points(run.info.run_id)
        if point[0] == "rank_1/train_loss_step"
    ]
    assert len(from_rank_1) == steps

    mine, direct = files(mlflow_server, run), files(mlflow_server, reference)
    (weights,) = [path for path in mine if path.endswith(".ckpt")]
    assert abs(mine[weights] - direct[weights]) < 1000, "the same but for the paths within"
    client = mlflow_server.client()
    whole = client.download_artifacts(run.info.run_id, "hyperparameters.json", str(tmp_path))
    assert json.loads(Path(whole).read_text()) == {
        "optimizer": {"name": "sgd", "lr": 0.05},
        "width": 3,
    }
