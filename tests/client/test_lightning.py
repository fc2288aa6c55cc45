"""RelayLogger, called as Lightning calls it, at a daemon's door; neither Lightning nor torch is needed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mlflow_relay import messages
from mlflow_relay.lightning import RelayLogger
from mlflow_relay.records import Artifact, End, Metrics, Params, Record, Reduce
from tests.client.test_run import clean_environ, new_key  # noqa: F401  # a fixture for all here
from tests.support.fake_daemon import FakeDaemon

NewLogger = Callable[..., RelayLogger]


@pytest.fixture
def new_logger(socket: Path, daemon: FakeDaemon) -> Iterator[NewLogger]:
    loggers: list[RelayLogger] = []

    def new(**options: Any) -> RelayLogger:
        loggers.append(RelayLogger("aifs", **{"run_key": new_key(), "socket": socket, **options}))
        return loggers[-1]

    yield new
    for logger in loggers:
        logger.finalize("success")


def records_of(logger: RelayLogger, daemon: FakeDaemon) -> list[Record]:
    """End the run and return what has come of it."""
    logger.finalize("success")
    return daemon.records()


def of_kind(records: list[Record], kind: type[Any]) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


def test_it_imports_neither_torch_nor_lightning() -> None:
    script = (
        "import mlflow_relay.lightning, sys;"
        "assert not {'torch', 'lightning', 'pytorch_lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_run_starts_when_it_is_first_needed(new_logger, daemon) -> None:
    logger = new_logger()
    assert daemon.cards == {}
    assert logger.name == "aifs"
    assert logger.version == logger.experiment.run_id
    daemon.wait_for(messages.ATTACH)
    assert daemon.only_card()["run_id"] == logger.run_id


@dataclasses.dataclass
class Optimizer:
    name: str
    betas: tuple[float, float]


def test_hyperparameters_are_flat_and_cut_and_whole_as_an_artifact(new_logger, daemon) -> None:
    logger = new_logger()
    params = {
        "model": {"layers": 12, "attention": {"heads": 8}},
        "optimizer": Optimizer("adam", (0.9, 0.95)),
        "data": argparse.Namespace(path=Path("/data")),
        "k" * 300: "long key",
        "text": "x" * 7000,
        "nothing": {},
    }
    logger.log_hyperparams(params)
    logger.log_hyperparams({"seed": 1})
    found = records_of(logger, daemon)
    texts = {key: text for record in of_kind(found, Params) for key, text in record.items.items()}
    assert texts == {
        "model.layers": "12",
        "model.attention.heads": "8",
        "optimizer.name": "adam",
        "optimizer.betas": "[0.9, 0.95]",
        "data.path": "/data",
        "k" * 250: "long key",
        "text": "x" * 6000,
        "nothing": "{}",
        "seed": "1",
    }
    files = of_kind(found, Artifact)
    assert [each.path for each in files] == ["hyperparameters.json"] * 2
    whole = json.loads(Path(files[-1].file.decode()).read_text())
    assert whole["text"] == "x" * 7000
    assert whole["model"] == {"layers": 12, "attention": {"heads": 8}}
    assert whole["seed"] == 1, "what comes later is added"


def test_names_lose_what_mlflow_refuses_and_get_the_prefix(new_logger, daemon, caplog) -> None:
    logger = new_logger(prefix="big")
    for step in range(3):
        logger.log_metrics({"acc@1": 0.5, "val/loss": 1.0}, step=step)
    (first, *_) = of_kind(records_of(logger, daemon), Metrics)
    assert list(first.keys) == ["big-acc1", "big-val/loss"]
    assert caplog.text.count("acc@1") == 1


def test_metrics_are_reduced_over_ranks_if_asked(new_logger, daemon) -> None:
    logger = new_logger(reduce="mean")
    logger.log_metrics({"loss": 0.5}, step=3)
    (record,) = of_kind(records_of(logger, daemon), Reduce)
    assert (record.how, record.step, record.keys) == ("mean", 3, ["loss"])


def test_a_rank_that_is_not_the_first_logs_metrics_and_leaves_the_rest(new_logger, daemon) -> None:
    logger = new_logger(rank=1, world_size=2)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_graph("a model")
    logger.log_metrics({"loss": 0.5}, step=0)
    found = records_of(logger, daemon)
    assert [type(each) for each in found] == [Metrics, End]
    assert list(found[0].keys) == ["rank_1/loss"]


def test_what_is_logged_after_the_end_goes_on_in_the_same_run(new_logger, daemon) -> None:
    logger = new_logger(fork="0" * 32)
    logger.log_metrics({"loss": 0.5}, step=0)
    first = logger.run_id
    logger.finalize("success")
    logger.finalize("success")
    logger.log_metrics({"test/loss": 0.5}, step=1)
    logger.finalize("success")
    cards = list(daemon.cards.values())
    assert len(cards) == 2
    assert (cards[1]["resume"], cards[1]["resume_mode"], cards[1]["fork"]) == (first, "same", "")
    assert logger.version == first
    ends = [daemon.records(session)[-1] for session in daemon.kept]
    assert [end.status for end in ends if isinstance(end, End)] == ["FINISHED", "FINISHED"]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("out of memory"), "FAILED", "RuntimeError: out of memory"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
    ],
)
def test_a_training_that_fails_says_why(new_logger, daemon, error, status, reason) -> None:
    logger = new_logger()
    logger.log_metrics({"loss": 0.5}, step=0)
    try:
        raise error
    except BaseException:  # as Lightning does
        logger.finalize("failed")
    (end,) = of_kind(daemon.records(), End)
    assert (end.status, end.reason) == (status, reason)


def checkpoint(path: Path, content: bytes = b"weights") -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("when", ["all", True])
def test_checkpoints_become_artifacts_each_once(new_logger, daemon, tmp_path, when) -> None:
    logger = new_logger(log_model=when)
    callback = SimpleNamespace(save_top_k=1, monitor="val_loss", mode="min")
    callback.best_model_path = checkpoint(tmp_path / "epoch=1.ckpt")
    callback.best_k_models = {callback.best_model_path: 0.25}
    callback.last_model_path = ""
    for _ in range(2):
        logger.after_save_checkpoint(callback)
    logger.log_metrics({"loss": 0.5}, step=0)
    files = of_kind(records_of(logger, daemon), Artifact)
    assert [each.path for each in files] == ["epoch=1/epoch=1.ckpt", "epoch=1/metadata.json"]
    assert Path(files[0].file.decode()).read_bytes() == b"weights"
    about = json.loads(Path(files[1].file.decode()).read_text())
    assert about == {
        "original_filename": "epoch=1.ckpt",
        "score": 0.25,
        "monitor": "val_loss",
        "mode": "min",
        "is_best": True,
    }


def test_no_checkpoint_is_logged_unless_asked(new_logger, daemon, tmp_path) -> None:
    logger = new_logger()
    callback = SimpleNamespace(save_top_k=-1, best_k_models={})
    callback.best_model_path = callback.last_model_path = checkpoint(tmp_path / "last.ckpt")
    logger.after_save_checkpoint(callback)
    logger.log_metrics({"loss": 0.5}, step=0)
    assert of_kind(records_of(logger, daemon), Artifact) == []


def test_it_can_be_sent_to_processes_that_lightning_spawns(new_logger, daemon) -> None:
    logger = new_logger()
    assert logger.experiment.run_id
    again = pickle.loads(pickle.dumps(logger))
    assert again._run is None
    assert again.version == logger.version


def test_it_is_a_logger_for_each_lightning_that_is_loaded(monkeypatch) -> None:
    import abc

    bases = []
    for name in ("lightning.pytorch.loggers.logger", "pytorch_lightning.loggers.logger"):
        module: Any = ModuleType(name)
        module.Logger = abc.ABCMeta("Logger", (), {})
        monkeypatch.setitem(sys.modules, name, module)
        bases.append(module.Logger)
    logger = RelayLogger()
    assert all(isinstance(logger, base) for base in bases)


def test_a_wrong_argument_is_named() -> None:
    with pytest.raises(ValueError, match="log_model='some'"):
        RelayLogger(log_model="some")
