"""Requests of MLflow's REST API → bytes, and its JSON → our types. Pure.

The server answers 200 and drops the rest of the body at the first field of a wrong type. So every
type is checked here once more, a column at a time, which costs 0.2 µs per metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import orjson

from mlflow_relay_daemon.sinks import DatasetInput, Metric, Param, Refused, RunInfo, Tag

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1  # timestamps and steps are int64 in MLflow's protobuf
RUN_STATUSES = frozenset({"RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"})

_BY_KEY = itemgetter(0)

#: a metric, a param or a tag: its key comes first
Entity = TypeVar("Entity", bound=tuple[object, ...])


def log_batch_body(
    run_id: str, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[Tag]
) -> bytes:
    """Return the body of runs/log-batch, each list sorted by key.

    Raises: Refused: a value is of a type that the server would drop in silence.
    """
    _check_metrics(metrics)
    _check_texts("params", params)
    _check_texts("tags", tags)
    return _dumps(
        {
            "run_id": run_id,
            "metrics": [
                # `value - value` is zero for every number but NaN and the infinities.
                {
                    "key": key,
                    "value": value if value - value == 0.0 else _not_finite(value),
                    "timestamp": timestamp_ms,
                    "step": step,
                }
                for key, value, timestamp_ms, step in sorted_by_key(metrics)
            ],
            "params": _entries(params),
            "tags": _entries(tags),
        }
    )


def log_inputs_body(run_id: str, inputs: Sequence[DatasetInput]) -> bytes:
    """Return the body of runs/log-inputs."""
    datasets = []
    for each in inputs:
        texts = {
            "name": each.name,
            "digest": each.digest,
            "source_type": each.source_type,
            "source": each.source,
            "schema": each.schema,
            "profile": each.profile,
        }
        _check_types("dataset", tuple(texts.values()), {str})
        _check_texts("dataset tags", each.tags)
        dataset = {name: text for name, text in texts.items() if text}
        datasets.append({"tags": _entries(each.tags), "dataset": dataset})
    return _dumps({"run_id": run_id, "datasets": datasets})


def create_experiment_body(name: str) -> bytes:
    """Return the body of experiments/create."""
    return _dumps({"name": name})


def run_id_body(run_id: str) -> bytes:
    """Return the body of a request that names a run and nothing else."""
    return _dumps({"run_id": run_id})


def create_run_body(
    experiment_id: str, run_name: str, user: str, start_time_ms: int, tags: Sequence[Tag]
) -> bytes:
    """Return the body of runs/create; of equal tag keys the last one counts.

    (MLflow answers two equal tag keys with a temporary-looking unique constraint, for ever.)
    """
    _check_texts("tags", tags)
    _check_types("start time", (start_time_ms,), {int})
    return _dumps(
        {
            "experiment_id": experiment_id,
            "run_name": run_name,
            "user_id": user,
            "start_time": start_time_ms,
            "tags": _entries(list(dict(tags).items())),
        }
    )


def update_run_body(
    run_id: str, status: str | None, end_time_ms: int | None, run_name: str | None
) -> bytes:
    """Return the body of runs/update with only what is given."""
    check_update(status)
    fields = {
        "run_id": run_id,
        "status": status,
        "end_time": end_time_ms,
        "run_name": run_name,
    }
    return _dumps({name: value for name, value in fields.items() if value is not None})


def check_update(status: str | None) -> None:
    """Raises: Refused: MLflow has no such status; its server would ignore it and answer 200."""
    if status is not None and status not in RUN_STATUSES:
        raise Refused(f"run status {status!r} is none of {', '.join(sorted(RUN_STATUSES))}")


def sorted_by_key(entities: Iterable[Entity]) -> list[Entity]:
    """Return metrics, params or tags sorted by key; equal keys keep their order.

    Two clients that write the same keys in different orders deadlock in PostgreSQL.
    """
    return sorted(entities, key=_BY_KEY)


def search_runs_body(
    experiment_ids: Sequence[str], run_filter: str, page_token: str, page_runs: int
) -> bytes:
    """Return the body of runs/search over active and deleted runs."""
    body: dict[str, object] = {
        "experiment_ids": list(experiment_ids),
        "filter": run_filter,
        "run_view_type": "ALL",
        "max_results": page_runs,
    }
    if page_token:
        body["page_token"] = page_token
    return _dumps(body)


def search_experiments_body(page_token: str, page_experiments: int) -> bytes:
    """Return the body of experiments/search over active and deleted experiments."""
    body: dict[str, object] = {"view_type": "ALL", "max_results": page_experiments}
    if page_token:
        body["page_token"] = page_token
    return _dumps(body)


def tag_filter(tag: str, value: str) -> str:
    """Return a search filter that finds at least all runs with this tag.

    MLflow's filter language has no escapes: a value with both kinds of quotes can only be found
    by a pattern, and some databases compare without case. The caller must compare once more.
    """
    if "`" in tag:
        raise Refused(f"a tag cannot be searched by a name with a backtick: {tag!r}")
    if "'" not in value:
        return f"tags.`{tag}` = '{value}'"
    if '"' not in value:
        return f'tags.`{tag}` = "{value}"'
    any_one_character = "_"
    pattern = value.replace("'", any_one_character)
    return f"tags.`{tag}` LIKE '{pattern}'"


def run_info(run: dict[str, Any]) -> RunInfo:
    """Return one run of MLflow's JSON. Raises: KeyError, TypeError, ValueError: it is none."""
    info = run["info"]
    end_time = info.get("end_time")
    tags = (run.get("data") or {}).get("tags") or []
    return RunInfo(
        run_id=info["run_id"],
        experiment_id=info["experiment_id"],
        run_name=info.get("run_name", ""),
        status=info["status"],
        # Absent where it is zero: nobody gave one.
        start_time_ms=int(info.get("start_time") or 0),
        end_time_ms=int(end_time) if end_time else None,
        lifecycle_stage=info["lifecycle_stage"],
        tags={tag["key"]: tag.get("value", "") for tag in tags},
        artifact_uri=info.get("artifact_uri", ""),
    )


def oldest_first(runs: Iterable[RunInfo], tag: str, value: str) -> list[RunInfo]:
    """Return those runs that really carry the tag; see `tag_filter`.

    The id settles equal times, so that all daemons agree which run is the oldest.
    """
    found = [run for run in runs if run.tags.get(tag) == value]
    return sorted(found, key=lambda run: (run.start_time_ms, run.run_id))


def _not_finite(value: float) -> str:
    """Return the string that MLflow reads as this number; bare NaN would be dropped in silence."""
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _entries(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in sorted_by_key(pairs)]


def _check_metrics(metrics: Sequence[Metric]) -> None:
    if not metrics:
        return
    keys, values, timestamps_ms, steps = zip(*metrics, strict=True)
    _check_types("metric key", keys, {str})
    _check_types("metric value", values, {float, int})
    _check_types("metric timestamp", timestamps_ms, {int})
    _check_types("metric step", steps, {int})
    for name, column in (("timestamp", timestamps_ms), ("step", steps)):
        if max(column) > INT64_MAX or min(column) < INT64_MIN:
            raise Refused(f"a metric {name} is beyond 64 bits")


def _check_texts(name: str, pairs: Sequence[tuple[str, str]]) -> None:
    for column in zip(*pairs, strict=True):
        _check_types(name, column, {str})


def _check_types(name: str, column: Sequence[object], allowed: set[type]) -> None:
    wrong = set(map(type, column)) - allowed
    if wrong:
        names = ", ".join(sorted(kind.__name__ for kind in wrong))
        raise Refused(f"{name}: MLflow drops values of type {names} in silence")


def _dumps(body: dict[str, object]) -> bytes:
    """Return JSON. Raises: Refused: a lone surrogate, or a number beyond 64 bits."""
    try:
        return orjson.dumps(body)
    except TypeError as error:
        raise Refused(f"this cannot be written as JSON: {error}") from None
