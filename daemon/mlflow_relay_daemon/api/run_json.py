"""A run as MLflow's API shows it: the server's word, and what waits for the server. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from mlflow_relay.records import GOES_ON
from mlflow_relay_daemon.api.view import View, stored
from mlflow_relay_daemon.spool.card import Card
from mlflow_relay_daemon.spool.run_spool import Place
from mlflow_relay_daemon.states import RunState, verdict

Json = dict[str, Any]
T = TypeVar("T")
_NOWHERE = Place(0, 0)


def run_of_spool(card: Card, view: View, experiment_id: str) -> Json:
    """Return a run as the spool alone knows it."""
    run_id = card.mlflow_run_id or card.run_id
    info = {
        "run_id": run_id,
        "run_uuid": run_id,
        "run_name": card.run_name,
        "experiment_id": experiment_id,
        "user_id": card.user or card.tags.get("mlflow.user", ""),
        "status": card.status,
        "start_time": card.start_ms,
        "artifact_uri": f"mlflow-artifacts:/{experiment_id}/{run_id}/artifacts",
        "lifecycle_stage": "active",
    }
    if card.end_ms is not None:
        info["end_time"] = card.end_ms
    name = {"mlflow.runName": card.run_name} if card.run_name else {}
    tags = [{"key": key, "value": value} for key, value in {**name, **card.tags}.items()]
    run: Json = {"info": info, "data": {"tags": tags}, "inputs": {}}
    return merged(run, card, view, _NOWHERE, end_is_told=is_end_told(card))


def is_end_told(card: Card) -> bool:
    """Return whether MLflow knows how the run ended: what it says since is its own."""
    ranks = [each for each in list(card.sessions.values()) if each.primary]
    own = verdict(ranks, card.end_ms or card.start_ms)
    return card.state is RunState.ENDED and card.status == own.status


def merged(run: Json, card: Card, view: View, delivered: Place, *, end_is_told: bool) -> Json:
    """Return a run with what was not delivered when the server was asked.

    Args:
        run: the server's word; changed.
        delivered: where delivery stood before that: what stands behind it counts more.
        end_is_told: before that, too.
    """
    info, data = run["info"], run.setdefault("data", {})
    params, tags, metrics = (_by_key(data.get(name)) for name in ("params", "tags", "metrics"))
    with view.lock:
        for key, value in _behind(delivered, view.params):
            params.setdefault(key, {"key": key, "value": value})
        for key, text in _behind(delivered, view.tags):
            tags.pop(key, None)
            if text is not None:
                tags[key] = {"key": key, "value": text}
        for key, point in _behind(delivered, view.latest):
            metrics[key] = _latest(key, metrics.get(key), point)
        changes = dict(_behind(delivered, view.info))
        inputs = [body for body, place in view.inputs if place >= delivered]
    data.update(params=[*params.values()], tags=[*tags.values()], metrics=[*metrics.values()])
    known = run.setdefault("inputs", {}).setdefault("dataset_inputs", [])
    for body in inputs:
        known += [each for each in body.get("datasets", ()) if each not in known]
    info.update(changes)
    info.update(_life(card, is_decided="status" in changes or end_is_told))
    return run


def point_json(key: str, value: float, timestamp_ms: int, step: int) -> Json:
    """Return one point."""
    return {"key": key, "value": number(value), "timestamp": timestamp_ms, "step": step}


def number(value: float) -> float | str:
    """Return a value as MLflow's JSON has it."""
    return "NaN" if math.isnan(value) else stored(value)


def _life(card: Card, *, is_decided: bool) -> Json:
    """Return status and end as far as MLflow has not been told them yet."""
    ranks = [each for each in list(card.sessions.values()) if each.primary]
    if any(each.is_own and not each.closed for each in ranks):
        return {"status": "RUNNING"}
    if not ranks:
        return {}
    if any(not each.closed and each.end_status is None for each in ranks):
        return {} if is_decided else {"status": "RUNNING"}
    if is_decided:
        return {}
    own = verdict(ranks, card.end_ms or card.start_ms)
    if own.status == GOES_ON:
        return {"status": own.status}
    return {"status": own.status, "end_time": own.end_ms}


def _latest(key: str, known: Json | None, point: tuple[int, int, float]) -> Json:
    step, timestamp_ms, value = point
    if known is not None:
        theirs = (int(known.get("step", 0)), int(known.get("timestamp", 0)))
        if theirs > (step, timestamp_ms):
            return known
        if theirs == (step, timestamp_ms) and float(known.get("value", 0)) >= value:
            return known
    return point_json(key, value, timestamp_ms, step)


def _behind(delivered: Place, items: Mapping[str, tuple[T, Place]]) -> Iterator[tuple[str, T]]:
    return ((key, value) for key, (value, place) in items.items() if place >= delivered)


def _by_key(entries: list[Json] | None) -> dict[str, Json]:
    return {each["key"]: each for each in entries or ()}
