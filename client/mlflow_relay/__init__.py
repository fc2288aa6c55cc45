"""The thin client: log calls that copy and return, for every rank of a training.

import mlflow_relay

with mlflow_relay.start_run(experiment_name="aifs", params=config) as run:
    run.log_metrics({"train/loss": loss}, step=step)
"""

from ._version import __version__
from .errors import JournalError, LaunchError, RelayError
from .fluent import (
    active_run,
    end_run,
    log_artifact,
    log_artifacts,
    log_dict,
    log_figure,
    log_image,
    log_metric,
    log_metrics,
    log_param,
    log_params,
    log_table,
    log_text,
    set_tag,
    set_tags,
)
from .run import Run, start_run

__all__ = [
    "JournalError",
    "LaunchError",
    "RelayError",
    "Run",
    "__version__",
    "active_run",
    "end_run",
    "log_artifact",
    "log_artifacts",
    "log_dict",
    "log_figure",
    "log_image",
    "log_metric",
    "log_metrics",
    "log_param",
    "log_params",
    "log_table",
    "log_text",
    "set_tag",
    "set_tags",
    "start_run",
]
