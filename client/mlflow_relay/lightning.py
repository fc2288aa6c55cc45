"""RelayLogger: a logger for Lightning's Trainer, `lightning` and `pytorch_lightning` alike.

    trainer = Trainer(logger=RelayLogger("aifs", resume=run_id), ...)

Nothing of Lightning or torch is imported: the logger has what their base class asks for, and is
registered with it where it is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .run import Run, start_run

log = logging.getLogger("mlflow_relay")

__all__ = ["RelayLogger"]

#: What MLflow refuses in names; the same that Lightning's MLFlowLogger leaves out.
_REFUSED = re.compile("[^a-zA-Z0-9_/. -]+")
KEY_CHARS_MAX = 250  # mlflow.utils.validation.MAX_ENTITY_KEY_LENGTH
PARAM_CHARS_MAX = 6000  # ... MAX_PARAM_VAL_LENGTH
HYPERPARAMETERS_FILE, MODEL_FILE = "hyperparameters.json", "model.txt"
_STATUS = {"success": "FINISHED", "finished": "FINISHED"}
_BASES = (
    "lightning.pytorch.loggers.logger",
    "pytorch_lightning.loggers.logger",
    "lightning.fabric.loggers.logger",
    "lightning_fabric.loggers.logger",
)


class RelayLogger:
    """Logs a Lightning training; every rank has one, and all of them log to one run.

    The run starts when it is first needed: Lightning knows only then who is which rank. It ends
    with `fit`; what is logged later (`test`, a second `fit`) goes on in the same MLflow run.

    Args:
        experiment_name, run_name: as in `start_run`.
        log_model: checkpoints as artifacts: "all": each one as it is saved; True: those that are
            left at the end; False: none.
        prefix: before each key, with a "-" between, as in MLFlowLogger.
        save_dir: where Lightning puts checkpoints, below it in <experiment>/<run id>; default: its
            own default_root_dir.
        reduce: "mean", "sum", "min" or "max": each metric is one point for all ranks of a node;
            default: as `rank_metrics` says.
        options: further arguments of `start_run`: params, tags, run_key, resume, resume_mode, fork,
            rank_metrics, socket, ...
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        *,
        log_model: bool | str = False,
        prefix: str = "",
        save_dir: str | os.PathLike[str] | None = None,
        reduce: str | None = None,
        **options: Any,
    ) -> None:
        if log_model not in (True, False, "all"):
            raise ValueError(f"log_model={log_model!r}: True, False or 'all'")
        self._experiment_name, self._run_name = experiment_name, run_name
        self._log_model, self._prefix, self._reduce = log_model, prefix, reduce
        self._save_dir = None if save_dir is None else os.fspath(save_dir)
        self._options = options
        self._run: Run | None = None
        self._run_id: str | None = None
        self._hyperparameters: dict[str, Any] = {}
        self._checkpoints: Any = None
        self._logged_s: dict[str, float] = {}  # checkpoints, by path: as they were then
        self._said: set[str] = set()
        _register(type(self))

    def __getstate__(self) -> dict[str, Any]:
        # Lightning sends it to processes that it spawns: each has a run of its own making.
        return {**vars(self), "_run": None, "_checkpoints": None}

    # ── what Lightning asks ──

    @property
    def experiment(self) -> Run:
        """The run of this rank; `logger.experiment.log_artifact(...)` and so on."""
        if self._run is None or self._run.has_ended:
            options = {**self._options, **_place()}
            if self._run_id is not None:
                options |= {"resume": self._run_id, "resume_mode": "same", "fork": None}
            self._run = start_run(self._experiment_name, self._run_name, **options)
            self._run_id = self._run_id or self._run.run_id
        return self._run

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._experiment_name

    @property
    def version(self) -> str:
        """The relay run id: the same in all ranks."""
        return self.run_id

    @property
    def run_id(self) -> str:
        """The relay run id."""
        return self._run_id or self.experiment.run_id

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def root_dir(self) -> str | None:
        return self._save_dir and os.path.join(self._save_dir, self.name)

    @property
    def log_dir(self) -> str | None:
        return self.root_dir and os.path.join(self.root_dir, self.version)

    @property
    def group_separator(self) -> str:
        return "/"

    # ── logging ──

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values of one step; called by Lightning in every rank.

        Raises: TypeError, ValueError: a value that is no number, by name.
        """
        named = {
            self._cleaned(f"{self._prefix}{self.LOGGER_JOIN_CHAR}{key}" if self._prefix else key): v
            for key, v in metrics.items()
        }
        if self._reduce is not None and step is not None:
            self.experiment.log_metrics(named, step, reduce=self._reduce)
        else:
            self.experiment.log_metrics(named, step)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Log hyperparameters as params, flattened with dots, and whole as an artifact.

        Args: params: a mapping (OmegaConf's, too), a Namespace or a dataclass.
        """
        run = self.experiment
        if run.rank > 0:
            return  # all ranks have the same
        plain = _plain(params)
        if not isinstance(plain, dict):
            raise TypeError(f"hyperparameters are a {type(params).__name__}; a mapping is wanted")
        self._hyperparameters.update(plain)
        run.log_params(
            {
                self._cleaned(key)[:KEY_CHARS_MAX]: str(value)[:PARAM_CHARS_MAX]
                for key, value in _flat(plain).items()
            }
        )
        text = json.dumps(self._hyperparameters, indent=2, ensure_ascii=False)
        run.log_text(text, HYPERPARAMETERS_FILE)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Log how the model is built, as text."""
        run = self.experiment
        if run.rank == 0:
            run.log_text(str(model), MODEL_FILE)

    def save(self) -> None:
        """Nothing to do: what was logged is kept already."""

    def finalize(self, status: str) -> None:
        """End this rank's part of the run; Lightning calls it after `fit`, `test`, ..."""
        run = self._run
        if run is None or run.has_ended:
            return
        if self._checkpoints is not None:
            self._log_checkpoints(self._checkpoints)
        error = sys.exc_info()[1]
        if isinstance(error, KeyboardInterrupt):
            run.end("KILLED", reason="KeyboardInterrupt")
        else:
            reason = f"{type(error).__name__}: {error}" if error is not None else ""
            run.end(_STATUS.get(status, "FAILED"), reason=reason)

    # ── checkpoints ──

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Log checkpoints as artifacts, at once or at the end: see `log_model`."""
        keeps_all = getattr(checkpoint_callback, "save_top_k", None) == -1
        if self._log_model == "all" or (self._log_model and keeps_all):
            self._log_checkpoints(checkpoint_callback)
        elif self._log_model:
            self._checkpoints = checkpoint_callback

    def _log_checkpoints(self, callback: Any) -> None:
        """Log the checkpoints that are there and were not logged as they are now."""
        if self.experiment.rank > 0:
            return
        scores = dict(getattr(callback, "best_k_models", {}))
        best = getattr(callback, "best_model_path", "")
        for path in dict.fromkeys([*scores, best, getattr(callback, "last_model_path", "")]):
            if not path or not os.path.exists(path):
                continue  # none yet, or replaced by a better one
            changed_s = os.stat(path).st_mtime
            if self._logged_s.get(path) == changed_s:
                continue
            folder = Path(path).stem
            self.experiment.log_artifact(path, folder)
            about = {
                "original_filename": Path(path).name,
                "score": None if path not in scores else float(scores[path]),
                "monitor": getattr(callback, "monitor", None),
                "mode": getattr(callback, "mode", None),
                "is_best": path == best,
            }
            self.experiment.log_text(json.dumps(about, indent=2), f"{folder}/metadata.json")
            self._logged_s[path] = changed_s

    def _cleaned(self, key: str) -> str:
        """Return the key without characters that MLflow refuses; say so once."""
        clean = _REFUSED.sub("", key)
        if clean != key and key not in self._said:
            self._said.add(key)
            log.warning("MLflow does not take the name %r: it is logged as %r", key, clean)
        return clean


def _register(kind: type) -> None:
    """Let isinstance know that this is a logger, for as many Lightnings as are loaded."""
    for name in _BASES:
        base = getattr(sys.modules.get(name), "Logger", None)
        if base is not None:
            base.register(kind)


def _place() -> dict[str, int]:
    """Return what torch says of this process, where it has been told: ranks that Lightning spawned
    have no variables to know it from."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return {}
    return {"rank": distributed.get_rank(), "world_size": distributed.get_world_size()}


def _plain(value: Any) -> Any:
    """Return hyperparameters as what JSON knows; what it does not know becomes text."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return {"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found
