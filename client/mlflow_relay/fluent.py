"""Module functions as in `mlflow`: they act on the run that was started last and has not ended.

`mlflow.log_metric` without a run starts one. Here it is an error: in a job of many ranks a
forgotten start_run would make a run without the job's name, resume or fork, and nobody would see it
before the training has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import RelayError

if TYPE_CHECKING:
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


def _needed(function: str) -> Run:
    if not _active:
        raise RelayError(
            f"mlflow_relay.{function}: no run is active. Call mlflow_relay.start_run(...) first; "
            "unlike mlflow, the relay starts none by itself"
        )
    return _active[-1]
