"""Module functions as in `mlflow`: they act on the run that was started last and has not ended.

`mlflow.log_metric` without a run starts one. Here it is an error: in a job of many ranks a
forgotten start_run would make a run without the job's name, resume or fork, and nobody would see it
before the training has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import RelayError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from .run import Run

#: Innermost last; when a `with start_run()` within another ends, the outer run is active again.
_active: list[Run] = []


def active_run() -> Run | None:
    """Return the run that the functions of this module act on, or None."""
    return _active[-1] if _active else None


def set_active(run: Run) -> None:
    """Make a run the active one; start_run calls this."""
    _active.append(run)


def clear_active(run: Run) -> None:
    """Forget a run, whether or not it is the innermost one; Run.end calls this."""
    _active[:] = [other for other in _active if other is not run]


def end_run(status: str = "FINISHED") -> None:
    """End the active run; without one, do nothing, as in mlflow."""
    run = active_run()
    if run is not None:
        run.end(status)


def log_metric(key: str, value: Any, step: int | None = None) -> None:
    """Log one metric of the active run, see Run.log_metric."""
    _needed("log_metric").log_metric(key, value, step)


def log_metrics(metrics: Mapping[str, Any], step: int | None = None, **options: Any) -> None:
    """Log metrics of the active run, see Run.log_metrics."""
    _needed("log_metrics").log_metrics(metrics, step, **options)


def log_param(key: str, value: Any) -> None:
    """Log one param of the active run, see Run.log_param."""
    _needed("log_param").log_param(key, value)


def log_params(params: Mapping[str, Any]) -> None:
    """Log params of the active run, see Run.log_params."""
    _needed("log_params").log_params(params)


def set_tag(key: str, value: Any) -> None:
    """Set one tag of the active run, see Run.set_tag."""
    _needed("set_tag").set_tag(key, value)


def set_tags(tags: Mapping[str, Any]) -> None:
    """Set tags of the active run, see Run.set_tags."""
    _needed("set_tags").set_tags(tags)


def log_artifact(
    local_path: str | os.PathLike[str], artifact_path: str | None = None, *, copy: bool = True
) -> None:
    """Log a file of the active run, see Run.log_artifact."""
    _needed("log_artifact").log_artifact(local_path, artifact_path, copy=copy)


def log_artifacts(
    local_dir: str | os.PathLike[str], artifact_path: str | None = None, *, copy: bool = True
) -> None:
    """Log all files of a folder, see Run.log_artifacts."""
    _needed("log_artifacts").log_artifacts(local_dir, artifact_path, copy=copy)


def log_text(text: str, artifact_file: str) -> None:
    """Log text as a file of the active run, see Run.log_text."""
    _needed("log_text").log_text(text, artifact_file)


def log_dict(dictionary: Mapping[str, Any] | list[Any], artifact_file: str) -> None:
    """Log a dict as JSON or YAML, see Run.log_dict."""
    _needed("log_dict").log_dict(dictionary, artifact_file)


def log_figure(
    figure: Any, artifact_file: str, *, save_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Log a figure of matplotlib or plotly, see Run.log_figure."""
    _needed("log_figure").log_figure(figure, artifact_file, save_kwargs=save_kwargs)


def log_image(  # noqa: PLR0917  # mlflow's order
    image: Any,
    artifact_file: str | None = None,
    key: str | None = None,
    step: int | None = None,
    timestamp: int | None = None,
    synchronous: bool | None = None,
) -> None:
    """Log an image of the active run, see Run.log_image."""
    _needed("log_image").log_image(image, artifact_file, key, step, timestamp, synchronous)


def log_table(data: Any, artifact_file: str) -> None:
    """Log rows of a table, see Run.log_table."""
    _needed("log_table").log_table(data, artifact_file)


def _needed(function: str) -> Run:
    if not _active:
        raise RelayError(
            f"mlflow_relay.{function}: no run is active. Call mlflow_relay.start_run(...) first; "
            "unlike mlflow, the relay starts none by itself"
        )
    return _active[-1]
