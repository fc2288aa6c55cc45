"""A small MLflow in memory behind our own `Sink`, and nodes whose lanes a test works by hand.

It keeps MLflow's rules that lineage depends on: ids are the server's, a param keeps its first
value, a deleted run takes nothing, a bad name is refused with all that came with it.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlflow_relay import frames, records
from mlflow_relay.launch import relay_run_id
from mlflow_relay_daemon.attachment import Attachment
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.lane.links import LineageParams
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.sinks import Metric, Param, Refused, RunGone, RunInfo, Tag
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.spool import Spool

_BAD_NAME = re.compile(r"//|^/|/$|[@,\[\]=%\n]")
NAME_CHARS_MAX = 250


@dataclass
class FakeRun:
    """What MLflow keeps of one run."""

    info: RunInfo
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    points: list[Metric] = field(default_factory=list)


class FakeMlflow:
    """Implements `Sink`. `before` is called with the name of each request, and may raise."""

    uri = "fake://"

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.requests: list[str] = []
        self.before: Callable[[str], None] = lambda _request: None
        self._experiments: dict[str, str] = {}
        self._numbers = itertools.count(1)

    # ── what a test does and sees ──

    def add(self, run_name: str = "", lifecycle_stage: str = "active", **tags: str) -> str:
        """Make a run that is none of ours; return its id."""
        tags = {key.replace("__", "."): value for key, value in tags.items()}
        run_id = self.create_run(
            self.experiment_id("theirs"), run_name=run_name, user="", start_time_ms=1,
            tags=list(tags.items()),
        )  # fmt: skip
        self._change(run_id, status="FINISHED", lifecycle_stage=lifecycle_stage)
        return run_id

    def of(self, run_id: str) -> FakeRun:
        """Return the one active run of a relay run."""
        found = [
            run
            for run in self.runs.values()
            if run.tags.get("relay.run_id") == run_id and run.info.lifecycle_stage == "active"
        ]
        assert len(found) == 1, f"{len(found)} runs for {run_id}"
        return found[0]

    # ── Sink ──

    def ping(self) -> str:
        return "fake"

    def experiment_id(self, name: str) -> str:
        return self._experiments.setdefault(name, str(len(self._experiments) + 1))

    def experiment_ids(self) -> list[str]:
        self._asked("experiment_ids")
        return list(self._experiments.values())

    def find_runs(self, experiment_ids: Sequence[str], tag: str, value: str) -> list[RunInfo]:
        self._asked(f"find_runs {tag}")
        found = [
            self._told(run)
            for run in self.runs.values()
            if run.tags.get(tag) == value and run.info.experiment_id in experiment_ids
        ]
        return sorted(found, key=lambda run: (run.start_time_ms, run.run_id))

    def get_run(self, run_id: str) -> RunInfo:
        self._asked("get_run")
        if run_id not in self.runs:
            raise RunGone(f"no run {run_id}")
        return self._told(self.runs[run_id])

    def create_run(
        self,
        experiment_id: str,
        *,
        run_name: str,
        user: str,
        start_time_ms: int,
        tags: Sequence[Tag],
    ) -> str:
        self._asked("create_run")
        number = next(self._numbers)
        run_id = f"{number:032x}"
        info = RunInfo(
            run_id=run_id,
            experiment_id=experiment_id,
            run_name=run_name or f"made-up-{number}",
            status="RUNNING",
            start_time_ms=start_time_ms,
            end_time_ms=None,
            lifecycle_stage="active",
            tags={},
        )
        self.runs[run_id] = FakeRun(info, dict(tags))
        return run_id

    def log_batch(
        self, run_id: str, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[Tag]
    ) -> None:
        self._asked("log_batch")
        run = self._active(run_id)
        for key, *_ in (*metrics, *params, *tags):
            if _BAD_NAME.search(key) or len(key) > NAME_CHARS_MAX:
                raise Refused(f"bad name {key!r}", "INVALID_PARAMETER_VALUE")
        for key, value in params:
            if run.params.get(key, value) != value:
                raise Refused(f"param {key!r} was {run.params[key]!r}", "INVALID_PARAMETER_VALUE")
        run.params.update(params)
        run.tags.update(tags)
        run.points += [each for each in metrics if each not in run.points]

    def update_run(
        self,
        run_id: str,
        *,
        status: str | None = None,
        end_time_ms: int | None = None,
        run_name: str | None = None,
    ) -> None:
        self._asked(f"update_run {status or ''}")
        self._active(run_id)
        given = {"status": status, "end_time_ms": end_time_ms, "run_name": run_name}
        self._change(run_id, **{key: value for key, value in given.items() if value is not None})

    def delete_run(self, run_id: str) -> None:
        self._asked("delete_run")
        self._change(run_id, lifecycle_stage="deleted")

    def run_url(self, experiment_id: str, run_id: str) -> str:
        return ""

    def close(self) -> None:
        pass

    def _asked(self, request: str) -> None:
        self.requests.append(request)
        self.before(request)

    def _active(self, run_id: str) -> FakeRun:
        if run_id not in self.runs or self.runs[run_id].info.lifecycle_stage != "active":
            raise RunGone(f"run {run_id} is not active")
        return self.runs[run_id]

    def _change(self, run_id: str, **changes: Any) -> None:
        run = self.runs[run_id]
        run.info = replace(run.info, **changes)

    def _told(self, run: FakeRun) -> RunInfo:
        return replace(run.info, tags=dict(run.tags))


class FakeNode:
    """A spool and its lanes, worked by hand: nothing happens but what a test asks for.

    Args: folder: for the spool; another FakeNode in it is the same node after a restart.
    """

    def __init__(self, folder: Path, mlflow: FakeMlflow) -> None:
        self._folder = folder
        self._mlflow = mlflow
        self._start()

    def restart(self) -> None:
        """As after SIGKILL: all that is known is on the disk."""
        self.runs.spool.close()
        self._start()

    def _start(self) -> None:
        spool = Spool(Disk(), self._folder, segment_bytes_max=1 << 20)
        self.runs = Runs(spool, self._mlflow, Breaker(), None, LineageParams())

    def start(self, run_key: str, **card: Any) -> FakeRank:
        """Let a rank attach."""
        return FakeRank(self, run_key, **card)

    def work(self, *run_ids: str) -> dict[str, float | None]:
        """Work all lanes, or those of these runs, until none has anything to do at once.

        Returns: in how many seconds each wants to go on; None: when it is told.
        """
        waits: dict[str, float | None] = {}
        chosen = run_ids or tuple(self.runs.by_id)
        for _ in range(100):
            waits = {run_id: self._lane(run_id).work() for run_id in chosen}
            if all(wait is None or wait > 0.0 for wait in waits.values()):
                return waits
        raise AssertionError(f"no end of it: {waits}, {self._mlflow.requests[-20:]}")

    def look(self) -> None:
        """Let the time pass after which waiting links are looked at again, and work."""
        for run_id in self.runs.by_id:
            self._lane(run_id).look_again()
        self.work()

    def hosted(self, run_id: str) -> Hosted:
        return self.runs.by_id[run_id]

    def _lane(self, run_id: str) -> Any:
        lane = self.runs.by_id[run_id].lane
        assert lane is not None
        return lane


class FakeRank:
    """A rank as the daemon sees it: a session, records, an end."""

    def __init__(
        self,
        node: FakeNode,
        run_key: str,
        *,
        resume: str = "",
        resume_mode: str = "child",
        fork: str = "",
        run_name: str = "",
        rank: int = 0,
        world_size: int = 1,
        node_count: int = 1,
        experiment_name: str = "ours",
    ) -> None:
        self.run_id = relay_run_id(run_key, 1)
        self._session = os.urandom(16)
        self._next_seq = 0
        self._node = node
        self._host = node.runs.attach(
            Attachment(
                session=self._session,
                run_id=self.run_id,
                run_key=run_key,
                experiment_name=experiment_name,
                run_name=run_name,
                rank=rank,
                world_size=world_size,
                node="host",
                pid=1,
                primary=True,
                start_ms=_now_ms(),
                tags={"mlflow.user": "somebody"},
                node_count=node_count,
                resume=resume,
                resume_mode=resume_mode,
                fork=fork,
                first_seq=0,
            )
        )

    def log(self, steps: int = 3) -> FakeRank:
        packer = records.MetricsPacker()
        return self._append(
            *(packer.pack({"loss": float(step)}, step, _now_ms()) for step in range(steps))
        )

    def params(self, **params: str) -> FakeRank:
        return self._append(records.pack_params(params, _now_ms()))

    def tags(self, **tags: str) -> FakeRank:
        return self._append(records.pack_tags(tags, _now_ms()))

    def tag(self, key: str, value: str) -> FakeRank:
        return self._append(records.pack_tags({key: value}, _now_ms()))

    def end(self, status: str = "FINISHED") -> str:
        """End it; return the relay run id."""
        self._append(records.pack_end(status, "", _now_ms()))
        return self.vanish()

    def vanish(self) -> str:
        """As after SIGKILL, once the daemon has noticed."""
        self._node.runs.close_session(self._host, self._session, lost=0)
        return self.run_id

    def _append(self, *packed: bytes) -> FakeRank:
        body = b"".join(map(frames.pack_entry, packed))
        frame = frames.pack_frame(self._session, self._next_seq, len(packed), body)
        self._next_seq += len(packed)
        self._host.run.append([(frames.read_frame(frame), frame)])
        return self


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
