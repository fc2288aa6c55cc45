"""Stores of offline runs for `mlflow-relay sync`, and calls of it.

File stores are written by hand: what MLflow's own writes is the same (see test_sync_stores.py, which
compares), and it takes a second per thousand points.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_relay import records
from mlflow_relay.frames import pack_entry, pack_frame, read_frame
from mlflow_relay_daemon.spool.card import Card, Link, SessionCard
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.spool import Spool
from tests.support.relay import _clean_environ
from tests.support.servers import Point

SYNC_PATIENCE_S = 100.0  #: less than a test may last

START_MS = 1_795_000_000_000
FINISHED = 3  # mlflow.entities.RunStatus


@dataclass
class Run:
    """A run of MLflow's file store."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    name: str = "o96"
    user: str = "anna"
    status: int = FINISHED
    start_ms: int = START_MS
    end_ms: int | None = START_MS + 60_000
    is_deleted: bool = False
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)  #: of metrics, by key

    def points(self) -> list[Point]:
        """Return what MLflow is to have of it."""
        found = []
        for key, lines in self.lines.items():
            for line in lines:
                fields = line.split()
                step = int(fields[2]) if len(fields) > 2 else 0
                found.append((key, float(fields[1]), int(fields[0]), step))
        return sorted(found, key=lambda point: (point[0], point[3], point[2], repr(point[1])))


def anemoi_run(
    points: int = 40, *, parent: Run | None = None, fork: Run | None = None, **fields: Any
) -> Run:
    """Return a run as Anemoi's logger leaves it offline."""
    run = Run(**fields)
    origin = parent.run_id if parent else run.run_id
    run.params = {
        "config.training.run_id": origin,
        "metadata.run_id": origin,
        "config.training.fork_run_id": fork.run_id if fork else "None",
        "config.model.num_channels": "1024",
    }
    run.tags = {"mlflow.user": run.user, "mlflow.runName": run.name, "projectName": "Anemoi"}
    if parent:
        run.tags |= {"mlflow.parentRunId": parent.run_id, "resumedRun": "True"}
    if fork:
        run.tags |= {"forkedRunId": fork.run_id, "forkedRun": "True"}
    run.lines = steady_lines(points)
    return run


def steady_lines(points: int, keys: Sequence[str] = ("train/loss", "val/z_500")) -> dict[str, Any]:
    """Return lines of so many points in all, no two of a key alike."""
    each = points // len(keys)
    return {key: [f"{START_MS + at} {at / 8} {at}" for at in range(each)] for key in keys}


def write_mlruns(folder: Path, runs: Iterable[Run], experiment: str = "aifs") -> Path:
    """Write runs into a file store; returns its folder."""
    place = folder / "547247666917800932"
    place.mkdir(parents=True, exist_ok=True)
    _yaml(
        place / "meta.yaml",
        {
            "experiment_id": place.name,
            "name": experiment,
            "lifecycle_stage": "active",
            "artifact_location": f"file:///nowhere/{place.name}",
        },
    )
    for run in runs:
        write_run(place / run.run_id, run)
    return folder


def write_run(place: Path, run: Run) -> None:
    """Write one run's folder, or write it anew."""
    place.mkdir(exist_ok=True)
    _yaml(
        place / "meta.yaml",
        {
            "run_id": run.run_id,
            "run_name": run.name,
            "user_id": run.user,
            "status": run.status,
            "start_time": run.start_ms,
            "end_time": run.end_ms,
            "experiment_id": place.parent.name,
            "lifecycle_stage": "deleted" if run.is_deleted else "active",
            "artifact_uri": f"file:///nowhere/{run.run_id}/artifacts",
            "source_type": 4,
            "source_name": "",
            "source_version": "",
            "entry_point_name": "",
            "tags": [],
        },
    )
    (place / "artifacts").mkdir(exist_ok=True)
    for kind, texts in (("params", run.params), ("tags", run.tags)):
        for key, value in texts.items():
            _file(place / kind / key, value)
    for key, lines in run.lines.items():
        _file(place / "metrics" / key, "".join(f"{line}\n" for line in lines))


# ── spools ──


def session_of(run_id: str, rank: int) -> bytes:
    return uuid.uuid5(uuid.UUID(run_id), str(rank)).bytes


def new_card(
    run_id: str,
    *,
    experiment: str = "aifs",
    name: str = "o96",
    ranks: Sequence[int] = (0,),
    world_size: int = 1,
    node_count: int = 1,
    resume: str | None = None,
    fork: str | None = None,
    closed: bool = True,
) -> Card:
    """Return the card that a daemon has of a run once its ranks are gone."""
    return Card(
        run_id=run_id,
        run_key=f"key of {run_id}",
        experiment_name=experiment,
        run_name=name,
        start_ms=START_MS,
        world_size=world_size,
        tags={"mlflow.user": "anna"},
        is_named=bool(name),
        node_count=node_count,
        parent=Link(resume) if resume else None,
        fork=Link(fork) if fork else None,
        sessions={
            session_of(run_id, rank).hex(): SessionCard(
                rank, f"node{rank}", 1, True, START_MS, closed=closed
            )
            for rank in ranks
        },
    )


def write_spool(
    folder: Path,
    card: Card,
    *,
    points: int = 40,
    ends: str | None = "FINISHED",
    segment_bytes_max: int = 1 << 20,
    records_per_frame: int = 10,
    is_counted: bool = False,
    first_step: int = 0,
) -> list[Point]:
    """Write a run into a spool as a daemon that was offline leaves it; return its points.

    Each rank has so many points, two in each record.

    Args: is_counted: return none of them, there are too many to hold.
    """
    spool = Spool(Disk(), folder, segment_bytes_max=segment_bytes_max)
    run = spool.open_run(card)
    run.save_card()
    found: list[Point] = []
    for name, session in card.sessions.items():
        key = f"rank_{session.rank}/" if session.rank else ""
        packed: list[bytes] = []
        seq = 0
        packer = records.MetricsPacker(key)
        for step in range(first_step, first_step + points // 2):
            at_ms = START_MS + step
            packed.append(packer.pack({"loss": step / 8, "lr": step / 16}, step, at_ms))
            if not is_counted:
                found += [
                    (f"{key}loss", step / 8, at_ms, step),
                    (f"{key}lr", step / 16, at_ms, step),
                ]
            if len(packed) == records_per_frame:
                run.append([_frame(bytes.fromhex(name), seq, packed)])
                seq, packed = seq + len(packed), []
        if ends is not None:
            packed.append(records.pack_end(ends, "", START_MS + 60_000))
        if packed:
            run.append([_frame(bytes.fromhex(name), seq, packed)])
    spool.close()
    return sorted(found, key=lambda point: (point[0], point[3], point[2], repr(point[1])))


def _frame(session: bytes, seq: int, packed: Sequence[bytes]) -> Any:
    data = pack_frame(session, seq, len(packed), b"".join(map(pack_entry, packed)))
    return read_frame(data), data


# ── calls ──


def start_sync(
    *arguments: object, environ: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `mlflow-relay sync` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlflow_relay_daemon", "sync", *map(str, arguments)],
        env={**_clean_environ(), "PYTHONFAULTHANDLER": "1", **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sync(
    *arguments: object,
    code: int = 0,
    environ: Mapping[str, str] | None = None,
    patience_s: float = SYNC_PATIENCE_S,
) -> dict[str, Any]:
    """Call `mlflow-relay sync --json`, which must end with this code; return what it printed."""
    process = start_sync(*arguments, "--json", environ=environ)
    output, errors = _communicate(process, patience_s)
    assert process.returncode == code, f"{process.returncode}\n{output}\n{errors}"
    found: dict[str, Any] = json.loads(output)
    return found


def complaint(*arguments: object, code: int, environ: Mapping[str, str] | None = None) -> str:
    """Call `mlflow-relay sync`, which must fail with this code and one line; return the line."""
    process = start_sync(*arguments, environ=environ)
    _, errors = _communicate(process, SYNC_PATIENCE_S)
    assert process.returncode == code, errors
    (line,) = errors.strip().splitlines()
    return line


def _communicate(process: subprocess.Popen[str], patience_s: float) -> tuple[str, str]:
    """Wait for its end; a process that hangs is ended, and says where it was."""
    try:
        return process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        return process.communicate()


def sent(done: Mapping[str, Any]) -> int:
    """Return how many points a call sent."""
    return sum(run["sent_points"] for run in done["runs"])


def _yaml(path: Path, fields: Mapping[str, Any]) -> None:
    _file(path, "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()))


def _file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path)
