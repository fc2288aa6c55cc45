"""MLflow's fluent calls, by turns on `relay://` and on a store of MLflow's that does nothing.

    python fluent.py '{"turns": 20, "calls": 200, "metrics": 10}'

One process, one active run: what differs is the store behind it. Prints JSON: the median of each
turn's calls in µs, [[relay, nothing], ...], for log_metrics and log_metric.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import mlflow
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.tracking._tracking_service.utils import _tracking_store_registry


class NoStore(AbstractStore):
    """Takes everything and does nothing."""

    def log_batch(self, run_id, metrics, params, tags) -> None:
        pass

    def log_metric(self, run_id, metric) -> None:
        pass


NoStore.__abstractmethods__ = frozenset()


def turn(uri: str, call, calls: int) -> float:
    mlflow.set_tracking_uri(uri)
    call(0)  # makes the store
    took_ns = []
    for step in range(calls):
        begin_ns = time.perf_counter_ns()
        call(step)
        took_ns.append(time.perf_counter_ns() - begin_ns)
    return statistics.median(took_ns) / 1000


def main(job: dict) -> None:
    _tracking_store_registry.register("nothing", lambda store_uri, artifact_uri=None: NoStore())
    mlflow.set_tracking_uri("relay://")
    mlflow.start_run()
    metrics = {f"train/loss_{index}": index * 1.1 for index in range(job["metrics"])}
    several = lambda step: mlflow.log_metrics(metrics, step=step)  # noqa: E731
    one = lambda step: mlflow.log_metric("one", 1.5, step=step)  # noqa: E731
    found = {
        name: [
            [turn(uri, call, job["calls"]) for uri in ("relay://", "nothing://")]
            for _ in range(job["turns"])
        ]
        for name, call in (("log_metrics", several), ("log_metric", one))
    }
    mlflow.set_tracking_uri("relay://")
    mlflow.end_run()
    print(json.dumps(found), flush=True)
    os._exit(0)  # no word of MLflow's behind the JSON


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
