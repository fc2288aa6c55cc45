"""A sink in memory, behind our own interface: keeps what it is given, raises what it is told.

It holds MLflow's rules as far as a lane depends on them (limits, idempotence, params that never
change). MLflow itself is asked elsewhere.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mlflow_relay_daemon.batch import Entry
from mlflow_relay_daemon.sinks import Metric, Param, Refused, RunGone, RunInfo, SinkError, Tag

T = TypeVar("T")


@dataclass
class FakeRun:
    """One run on the server."""

    run_id: str
    experiment_id: str
    run_name: str
    start_time_ms: int
    tags: dict[str, str]
    status: str = "RUNNING"
    end_time_ms: int | None = None
    lifecycle_stage: str = "active"
    points: set[tuple[str, bytes, int, int]] = field(default_factory=set)
    params: dict[str, str] = field(default_factory=dict)

    def steps(self, key: str) -> list[int]:
        """Return the steps of one metric, as often as it has points."""
        return sorted(step for name, _, _, step in self.points if name == key)


class FakeSink:
    """A server.

    Attributes:
        calls: the names of what was asked, in order.
        before, after: called with the name and the number of a call; may raise.
        objects_to: tells the error for an entry, None: it is welcome.
    """

    uri = "fake://server"

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.experiments: dict[str, str] = {}
        self.calls: list[str] = []
        self.batches: list[tuple[str, int, int, int]] = []
        self.before: Callable[[str, int], None] = lambda name, number: None
        self.after: Callable[[str, int], None] = lambda name, number: None
        self.objects_to: Callable[[Entry], SinkError | None] | None = None
        self.is_closed = False
        self.at_once: dict[str, int] = {}  #: most requests under way at once, by run
        self._under_way: dict[str, int] = {}
        self._lock = threading.Lock()

    # ── for tests ──

    def only_run(self) -> FakeRun:
        """Return the only run that is not deleted."""
        (run,) = [run for run in self.runs.values() if run.lifecycle_stage == "active"]
        return run

    def new_run(self, experiment_id: str, tags: dict[str, str]) -> FakeRun:
        """Make a run as a create does whose answer is lost."""
        run_id = f"m{len(self.runs) + 1}"
        self.runs[run_id] = FakeRun(run_id, experiment_id, "", 0, tags)
        return self.runs[run_id]

    # ── Sink ──

    def ping(self) -> str:
        return self._asked("ping", lambda: "fake")

    def experiment_id(self, name: str) -> str:
        def find_or_make() -> str:
            return self.experiments.setdefault(name, f"e{len(self.experiments) + 1}")

        return self._asked("experiment_id", find_or_make)

    def experiment_ids(self) -> list[str]:
        return self._asked("experiment_ids", lambda: list(self.experiments.values()))

    def find_runs(self, experiment_ids: Sequence[str], tag: str, value: str) -> list[RunInfo]:
        def find() -> list[RunInfo]:
            return [
                self._info(run)
                for run in self.runs.values()
                if run.experiment_id in experiment_ids and run.tags.get(tag) == value
            ]

        return self._asked("find_runs", find)

    def get_run(self, run_id: str) -> RunInfo:
        return self._asked("get_run", lambda: self._info(self._run(run_id)))

    def create_run(
        self,
        experiment_id: str,
        *,
        run_name: str,
        user: str,
        start_time_ms: int,
        tags: Sequence[Tag],
    ) -> str:
        assert len(dict(tags)) == len(tags), "MLflow refuses a tag that comes twice"

        def create() -> str:
            run = self.new_run(experiment_id, {**dict(tags), "user": user})
            run.run_name, run.start_time_ms = run_name, start_time_ms
            return run.run_id

        return self._asked("create_run", create)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric],
        params: Sequence[Param],
        tags: Sequence[Tag],
    ) -> None:
        assert 0 < len(metrics) + len(params) + len(tags) <= 1000
        assert len(params) <= 100
        assert len(tags) <= 100
        assert len(dict(params)) == len(params), "MLflow refuses a param that comes twice"
        for key, value, timestamp_ms, step in metrics:
            assert (type(key), type(value)) == (str, float)
            assert (type(timestamp_ms), type(step)) == (int, int)

        def store() -> None:
            run = self._run(run_id)
            self._object(metrics, params, tags)
            for key, value in params:
                if run.params.get(key, value) != value:
                    raise Refused(f"Changing param values is not allowed: {key}", "INVALID")
            self.batches.append((run_id, len(metrics), len(params), len(tags)))
            run.points |= {
                (key, struct.pack(">d", value), timestamp_ms, step)
                for key, value, timestamp_ms, step in metrics
            }
            run.params.update(params)
            run.tags.update(tags)

        self._asked("log_batch", store, run_id)

    def update_run(
        self,
        run_id: str,
        *,
        status: str | None = None,
        end_time_ms: int | None = None,
        run_name: str | None = None,
    ) -> None:
        def update() -> None:
            run = self._run(run_id)
            run.status = status or run.status
            run.run_name = run_name or run.run_name
            run.end_time_ms = run.end_time_ms if end_time_ms is None else end_time_ms

        self._asked("update_run", update, run_id)

    def delete_run(self, run_id: str) -> None:
        def delete() -> None:
            self._run(run_id, deleted=True).lifecycle_stage = "deleted"

        self._asked("delete_run", delete)

    def run_url(self, experiment_id: str, run_id: str) -> str:
        return f"fake://server/{experiment_id}/{run_id}"

    def close(self) -> None:
        self.is_closed = True

    # ── inside ──

    def _asked(self, name: str, answer: Callable[[], T], run_id: str = "") -> T:
        with self._lock:
            number = len(self.calls)
            self.calls.append(name)
            self._under_way[run_id] = self._under_way.get(run_id, 0) + 1
            self.at_once[run_id] = max(self.at_once.get(run_id, 0), self._under_way[run_id])
        try:
            self.before(name, number)
            try:
                with self._lock:
                    result = answer()
            except SinkError:
                self.after(name, number)  # a refusal is an answer, too
                raise
            self.after(name, number)
        finally:
            with self._lock:
                self._under_way[run_id] -= 1
        return result

    def _run(self, run_id: str, *, deleted: bool = False) -> FakeRun:
        run = self.runs.get(run_id)
        if run is None or (run.lifecycle_stage == "deleted" and not deleted):
            raise RunGone(f"Run {run_id} not found", "RESOURCE_DOES_NOT_EXIST")
        return run

    def _object(
        self, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[Tag]
    ) -> None:
        if self.objects_to is None:
            return
        entries = [Entry("metric", key, value, ms, step) for key, value, ms, step in metrics]
        entries += [Entry("param", key, value, 0, None) for key, value in params]
        entries += [Entry("tag", key, value, 0, None) for key, value in tags]
        for entry in entries:
            error = self.objects_to(entry)
            if error is not None:
                raise error

    @staticmethod
    def _info(run: FakeRun) -> RunInfo:
        return RunInfo(
            run.run_id,
            run.experiment_id,
            run.run_name,
            run.status,
            run.start_time_ms,
            run.end_time_ms,
            run.lifecycle_stage,
            dict(run.tags),
        )
