"""What the spool knows of a run: what waits for MLflow, and what this daemon has read of it before.

Read from the run's segments, piece by piece as they grow. Each thing keeps its place there, so that
it can be told whether MLflow has it by now: if it has, MLflow's word counts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from mlflow_relay import records
from mlflow_relay.errors import FormatError
from mlflow_relay_daemon.spool.run_spool import Place, RunSpool

#: step, time in ms, value: MLflow's latest metric is the largest of these
Latest = tuple[int, int, float]
#: What MLflow stores and answers for an infinity.
FLOAT_MAX = 1.7976931348623157e308
_START = Place(0, 0)


@dataclass
class View:
    """One run. `refresh` before use; safe for many threads by its lock."""

    run: RunSpool
    params: dict[str, tuple[str, Place]] = field(default_factory=dict)
    tags: dict[str, tuple[str | None, Place]] = field(default_factory=dict)  #: None: deleted
    latest: dict[str, tuple[Latest, Place]] = field(default_factory=dict)
    #: fields of the run's info that a request has changed
    info: dict[str, tuple[Any, Place]] = field(default_factory=dict)
    inputs: list[tuple[dict[str, Any], Place]] = field(default_factory=list)
    files: dict[str, tuple[records.Artifact, Place]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _read_to: Place = _START

    def refresh(self) -> Place:
        """Read what is new, and return where delivery stood before."""
        delivered = self.run.place()
        with self.lock:
            for place, piece, behind in self.run.pieces_since(self._read_to):
                for raw in piece.records:
                    self._take(place, raw)
                self._read_to = behind
        return delivered

    def _take(self, place: Place, raw: bytes | None) -> None:
        record = _read(raw)
        match record:
            case records.Metrics():
                self._take_metrics(place, record)
            case records.Params():
                for key, text in record.items.items():
                    self.params.setdefault(key, (text, place))
            case records.Tags():
                for key, text in record.items.items():
                    self._set_tag(key, text, place)
            case records.End():
                self.info["status"] = record.status, place
                if record.status != records.GOES_ON:
                    self.info["end_time"] = record.timestamp_ms, place
            case records.Artifact():
                self.files[record.path] = record, place
            case records.Call():
                self._take_call(place, record.name, orjson.loads(record.body))

    def _take_metrics(self, place: Place, record: records.Metrics) -> None:
        for key, value, step in zip(record.keys, record.values, record.steps, strict=True):
            point = (step, record.timestamp_ms, value)
            known = self.latest.get(key)
            newest = point if known is None else max(known[0], point, key=_order)
            self.latest[key] = newest, place

    def _set_tag(self, key: str, value: str, place: Place) -> None:
        self.tags[key] = value, place
        if key == "mlflow.runName":
            self.info["run_name"] = value, place

    def _take_call(self, place: Place, name: str, body: dict[str, Any]) -> None:
        match name:
            case "runs/update":
                for key in ("status", "end_time"):
                    if body.get(key):
                        self.info[key] = body[key], place
            case "runs/delete":
                self.info["lifecycle_stage"] = "deleted", place
            case "runs/restore":
                self.info["lifecycle_stage"] = "active", place
            case "runs/delete-tag":
                self.tags[body["key"]] = None, place
            case "runs/log-inputs":
                self.inputs.append((body, place))
            case "runs/log-batch":
                for each in body["metrics"]:
                    point = (int(each.get("step", 0)), int(each["timestamp"]), float(each["value"]))
                    self.latest[each["key"]] = point, place


def points_of(run: RunSpool, key: str) -> Iterator[tuple[float, int, int]]:
    """Yield (value, time in ms, step) of one metric, as far as it waits for MLflow."""
    for _, piece, _ in run.pieces_since(run.place()):
        for raw in piece.records:
            record = _read(raw)
            if isinstance(record, records.Metrics):
                rows = zip(record.keys, record.values, record.steps, strict=True)
                yield from (
                    (stored(value), record.timestamp_ms, step)
                    for name, value, step in rows
                    if name == key
                )
            elif isinstance(record, records.Call) and record.name == "runs/log-batch":
                for each in orjson.loads(record.body)["metrics"]:
                    if each["key"] == key:
                        step = int(each.get("step", 0))
                        yield float(each["value"]), int(each["timestamp"]), step


def stored(value: float) -> float:
    """Return a value as MLflow keeps it."""
    return max(-FLOAT_MAX, min(FLOAT_MAX, value)) if value == value else value  # noqa: PLR0124


def _order(point: Latest) -> tuple[int, int, bool, float]:
    step, timestamp_ms, value = point
    is_number = value == value  # noqa: PLR0124  # NaN
    return step, timestamp_ms, is_number, value if is_number else 0.0


def _read(raw: bytes | None) -> records.Record | None:
    """Return a record, None for what is none: the lane makes a dead letter of it."""
    if raw is None:
        return None
    try:
        return records.unpack_record(raw)
    except FormatError:
        return None
