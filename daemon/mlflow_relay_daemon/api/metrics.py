"""`/metrics` for Prometheus: sums over all runs and no names, for all users of a node may ask.

Counts that live with a run (what it accepted, what was delivered) are summed by what came since
the last look, so that they never fall when a run is forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

if TYPE_CHECKING:
    from prometheus_client import Metric
    from starlette.requests import Request

    from mlflow_relay_daemon.service import Service

Status = dict[str, Any]

#: name, help, field of each run
RUN_COUNTERS = (
    ("accepted_records", "Log calls that are fsynced in the spool.", "accepted_records"),
    ("delivered_records", "Log calls in requests that MLflow took.", "delivered_records"),
    ("delivered_points", "Metric values in requests that MLflow took.", "delivered_points"),
    ("lost_records", "Log calls that found their rank's journal full.", "lost_records"),
    ("damaged_records", "Records that the disk gave back damaged.", "damaged_records"),
    ("uploaded_artifacts", "Files that MLflow's artifact store took.", "artifacts.uploaded"),
    ("uploaded_bytes", "Bytes of these.", "artifacts.uploaded_bytes"),
)
RUN_GAUGES = (
    ("waiting_records", "Records accepted and not in MLflow yet.", "waiting_records"),
    ("waiting_bytes", "Bytes of these in the spool.", "waiting_bytes"),
    ("journal_records", "Records in ranks' journals, not in the spool yet.", "journal_records"),
    ("dead_letters", "Records that MLflow refused, kept with the reason.", "dead_letters"),
    ("ranks", "Ranks that live.", "ranks_alive"),
    ("waiting_artifacts", "Files that wait for their upload.", "artifacts.waiting"),
    ("waiting_artifact_bytes", "Bytes of these.", "artifacts.waiting_bytes"),
)
COUNTERS = (
    ("fsync_failures", "Groups, cards and journals that the disk did not take.", "fsync_failures"),
    ("bad_messages", "Messages that were none of ours.", "bad_messages"),
    ("resent_frames", "Frames that came twice or too early.", "resent_frames"),
)
DISK_GAUGES = (
    ("spool_bytes", "Bytes of all segments.", "spool_bytes"),
    ("spool_max_bytes", "Quota of the spool; 0: none.", "spool_bytes_max"),
    ("disk_free_bytes", "Free bytes on the spool's disk.", "free_bytes"),
    ("disk_free_min_bytes", "Free bytes that are left to others.", "free_bytes_min"),
    ("disk_full", "1: nothing is acknowledged now.", "full"),
)
STATES = ("waiting", "running", "ending", "ended", "blocked")


def routes(service: Service) -> list[BaseRoute]:
    """Return /metrics."""
    registry = CollectorRegistry()
    registry.register(RelayCollector(service))
    ProcessCollector(registry=registry)

    def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    return [Route("/metrics", metrics)]


class RelayCollector(Collector):
    """Makes metrics of the status, when it is asked."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()  # two may scrape at once
        self._seen: dict[str, dict[str, int]] = {}
        self._sums = dict.fromkeys([field for _, _, field in RUN_COUNTERS], 0)

    def describe(self) -> list[Metric]:
        """Return nothing: the registry need not ask before the loop turns."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics of one look at the daemon."""
        status = self._service.in_loop(self._service.read_status)
        yield from self._of_runs(status)
        yield from _of_daemon(status)
        failures, durations = self._service.delivery_failures(), self._service.sync_times()
        yield CounterMetricFamily(
            "mlflow_relay_delivery_failures", "Requests that the server did not answer.", failures
        )
        yield HistogramMetricFamily(
            "mlflow_relay_fsync_seconds",
            "Time of one fdatasync of the spool.",
            buckets=durations.buckets(),
            sum_value=durations.sum_s,
        )

    def _of_runs(self, status: Status) -> Iterator[Metric]:
        runs = [_flat(run) for run in status["runs"]]
        with self._lock:
            self._add(runs)
            sums = dict(self._sums)
        for name, text, field in RUN_COUNTERS:
            yield CounterMetricFamily(f"mlflow_relay_{name}", text, sums[field])
        for name, text, field in RUN_GAUGES:
            total = sum(run[field] for run in runs)
            yield GaugeMetricFamily(f"mlflow_relay_{name}", text, total)
        family = GaugeMetricFamily("mlflow_relay_runs", "Runs in the spool.", labels=["state"])
        for state in STATES:
            family.add_metric([state], sum(run["state"] == state for run in runs))
        yield family
        oldest = [run["oldest_waiting_ms"] for run in runs if run["oldest_waiting_ms"] is not None]
        age_s = max(0.0, (status["time_ms"] - min(oldest)) / 1000) if oldest else 0.0
        yield GaugeMetricFamily(
            "mlflow_relay_oldest_waiting_seconds", "Age of the oldest waiting record.", age_s
        )

    def _add(self, runs: list[dict[str, Any]]) -> None:
        """Add to the sums what is new since the last look."""
        for run in runs:
            before = self._seen.get(run["run_id"], {})
            for field in self._sums:
                self._sums[field] += max(0, run[field] - before.get(field, 0))
        self._seen = {run["run_id"]: {field: run[field] for field in self._sums} for run in runs}


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run with what it says of its artifacts beside the rest."""
    return {**run, **{f"artifacts.{name}": n for name, n in run["artifacts"].items()}}


def _of_daemon(status: Status) -> Iterator[Metric]:
    server = status["server"]
    info = GaugeMetricFamily("mlflow_relay_build_info", "The release.", labels=["version"])
    info.add_metric([status["daemon"]["version"]], 1)
    yield info
    yield GaugeMetricFamily(
        "mlflow_relay_sessions", "Sessions attached.", status["daemon"]["sessions_open"]
    )
    yield GaugeMetricFamily(
        "mlflow_relay_server_up", "1: MLflow answers, or was not asked yet.",
        server["state"] != "down",
    )  # fmt: skip
    for name, text, field in COUNTERS:
        yield CounterMetricFamily(f"mlflow_relay_{name}", text, status["counters"][field])
    yield GaugeMetricFamily(
        "mlflow_relay_quarantined_files", "Damaged files that were put aside.",
        status["counters"]["quarantined_files"],
    )  # fmt: skip
    for name, text, field in DISK_GAUGES:
        yield GaugeMetricFamily(f"mlflow_relay_{name}", text, status["disk"][field] or 0)
