"""What the daemon knows, as one object: the stable contract of `status --json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil

from mlflow_relay import clock
from mlflow_relay._version import __version__
from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay_daemon.adoption import Watcher
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.counters import Counters
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.sinks.redact import redact_uri
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool.card import Link
from mlflow_relay_daemon.spool.disk import LookingDisk
from mlflow_relay_daemon.spool.ledger import COUNTS, NOT_UPLOADING
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.spool import QUARANTINE, RUNS
from mlflow_relay_daemon.spool.staging import Staging
from mlflow_relay_daemon.states import RunState

SCHEMA_VERSION = 1


class StatusReader:
    """Gathers the status of a living daemon; asked by its loop, so it must be quick."""

    def __init__(self, config: Config, runs: Runs, watcher: Watcher, counters: Counters) -> None:
        self._config, self._runs = config, runs
        self._watcher, self._counters = watcher, counters
        self._process = psutil.Process()
        self._started_ms = clock.now_ms()

    def read(
        self,
        *,
        sessions_open: int,
        accepts_ranks: bool,
        is_full: bool,
        http_port: int | None = None,
    ) -> dict[str, Any]:
        """Return the status object."""
        spool = self._runs.spool
        return {
            "schema_version": SCHEMA_VERSION,
            "time_ms": clock.now_ms(),
            "daemon": {
                **self._daemon(sessions_open),
                "accepts_ranks": accepts_ranks,
                "http_port": http_port,
            },
            "server": _server(self._runs.breaker),
            "disk": {
                "spool_bytes": spool.segment_bytes(),
                "staged_bytes": spool.staging.bytes(),
                "spool_bytes_max": spool.bytes_max,
                "free_bytes": spool.free_bytes(),
                "free_bytes_min": spool.free_bytes_min,
                "full": is_full,
            },
            "counters": {
                "bad_messages": self._counters.bad_messages,
                "fsync_failures": self._counters.fsync_failures,
                "quarantined_files": spool.quarantined,
                "damaged_records": sum(
                    hosted.run.mark.damaged_records for hosted in self._runs.by_id.values()
                ),
                "resent_frames": self._counters.resent_frames,
            },
            "runs": [self._run(hosted) for hosted in list(self._runs.by_id.values())],
        }

    def _daemon(self, sessions_open: int) -> dict[str, Any]:
        times = self._process.cpu_times()
        return {
            "pid": os.getpid(),
            "version": __version__,
            "started_ms": self._started_ms,
            "spool": str(self._config.spool),
            "socket": str(self._config.socket),
            "tracking_uri": redact_uri(self._config.tracking_uri),
            "offline": self._config.offline,
            "sidecar": self._config.sidecar,
            "memory_bytes": self._process.memory_info().rss,
            "cpu_s": times.user + times.system,
            "sessions_open": sessions_open,
        }

    def _run(self, hosted: Hosted) -> dict[str, Any]:
        card, lane = hosted.run.card, hosted.lane
        found = run_status(hosted.run, hosted.letters.count)
        found["journal_records"] = self._watcher.in_journals(hosted)
        found["lost_records"] += self._watcher.lost(hosted)
        if self._runs.uploads is not None:
            found["artifacts"].update(self._runs.uploads.status_of(card.run_id))
        if lane is not None:
            found["last_error"] = lane.last_error
            if lane.is_blocked:
                found["state"] = "blocked"
        if self._runs.sink is not None and card.mlflow_run_id and card.experiment_id:
            url = self._runs.sink.run_url(card.experiment_id, card.mlflow_run_id)
            found["url"] = url or None
        return found


def run_status(run: RunSpool, dead_letters: int) -> dict[str, Any]:
    """Return what a run's folder says of it."""
    card, mark = run.card, run.mark
    with run.lock:
        primaries = [each for each in card.sessions.values() if each.primary]
        return {
            "run_id": card.run_id,
            "run_key": card.run_key,
            "experiment_name": card.experiment_name,
            "run_name": card.run_name,
            "mlflow_run_id": card.mlflow_run_id,
            "experiment_id": card.experiment_id,
            "state": _state(run),
            "status": card.status,
            "ranks_alive": sum(not each.closed for each in primaries),
            "ranks_seen": len({each.rank for each in primaries}),
            "world_size": card.world_size,
            "accepted_records": run.accepted_records,
            "delivered_records": mark.delivered_records,
            "settled_records": mark.settled_records,
            "delivered_points": mark.delivered_points,
            "waiting_records": run.waiting_records(),
            "waiting_bytes": run.waiting_bytes(),
            "journal_records": 0,
            "oldest_waiting_ms": run.oldest_waiting_ms(),
            "dead_letters": dead_letters,
            "lost_records": card.lost_records,
            "damaged_records": mark.damaged_records,
            "last_error": None,
            "waits_for": [link.asked for link in card.waiting_links()],
            "lineage": {
                "resume_mode": card.resume_mode,
                "resumes": _link(card.parent),
                "forks": _link(card.fork),
            },
            "start_ms": card.start_ms,
            "end_ms": card.end_ms,
            "url": None,
            "artifacts": run.artifacts.status(),
        }


def _link(link: Link | None) -> dict[str, Any] | None:
    if link is None:
        return None
    return {
        "asked": link.asked,
        "mlflow_run_id": link.mlflow_run_id,
        "told": link.is_told,
        "dropped": link.is_dropped,
        "by_hand": link.is_by_hand,
    }


def read_spool(folder: Path) -> dict[str, Any]:
    """Return the status of a spool that no daemon serves; changes nothing in it.

    Raises: OSError: the folder cannot be read.
    """
    from mlflow_relay_daemon.dead_letters import DeadLetters

    disk = LookingDisk()
    runs = []
    for path in sorted(each for each in (folder / RUNS).glob("*") if each.is_dir()):
        try:
            run = RunSpool(disk, path, cards.read(path), segment_bytes_max=1 << 30)
        except (FormatError, VersionError, OSError) as error:
            runs.append({**_unreadable(path), "last_error": str(error)})
            continue
        try:
            runs.append(run_status(run, DeadLetters(disk, path).count))
        finally:
            run.close()
    quarantined = len(list((folder / QUARANTINE).glob("*")))
    return {
        "schema_version": SCHEMA_VERSION,
        "time_ms": clock.now_ms(),
        "daemon": None,
        "server": None,
        "disk": {
            "spool_bytes": sum(each.stat().st_size for each in folder.glob(f"{RUNS}/*/*.segment")),
            "staged_bytes": Staging(disk, folder).bytes(),
            "spool_bytes_max": None,
            "free_bytes": disk.free_bytes(_existing(folder)),
            "free_bytes_min": 0,
            "full": False,
        },
        "counters": {
            "bad_messages": 0,
            "fsync_failures": 0,
            "quarantined_files": quarantined,
            "damaged_records": sum(run["damaged_records"] for run in runs),
            "resent_frames": 0,
        },
        "runs": runs,
    }


def _server(breaker: Breaker | None) -> dict[str, Any]:
    if breaker is None:
        return {"state": "offline", "since_ms": 0, "last_error": None, "next_try_ms": None}
    seen = breaker.snapshot()
    return {
        "state": seen.state,
        "since_ms": seen.since_ms,
        "last_error": seen.last_error or None,
        "next_try_ms": seen.next_try_ms,
    }


def _state(run: RunSpool) -> str:
    """Return the state in an operator's words."""
    card = run.card
    if card.state is RunState.NEW:
        return "waiting"
    if any(not each.closed for each in card.sessions.values()):
        return "running"
    is_done = card.state is RunState.ENDED and run.is_drained() and not run.artifacts.waiting
    return "ended" if is_done else "ending"


def _unreadable(path: Path) -> dict[str, Any]:
    run = run_status_of_nothing()
    return {**run, "run_id": path.name, "state": "blocked"}


def run_status_of_nothing() -> dict[str, Any]:
    """Return the fields of a run of which nothing can be read."""
    texts = dict.fromkeys(("run_id", "run_key", "experiment_name", "run_name"), "")
    unknown = dict.fromkeys(
        ("mlflow_run_id", "experiment_id", "oldest_waiting_ms", "end_ms", "last_error", "url")
    )
    counts = dict.fromkeys(
        (
            "ranks_alive",
            "ranks_seen",
            "world_size",
            "accepted_records",
            "delivered_records",
            "settled_records",
            "delivered_points",
            "waiting_records",
            "waiting_bytes",
            "journal_records",
            "dead_letters",
            "lost_records",
            "damaged_records",
            "start_ms",
        ),
        0,
    )
    lineage = {"resume_mode": "child", "resumes": None, "forks": None}
    return {
        **texts,
        **unknown,
        **counts,
        "waits_for": [],
        "lineage": lineage,
        "state": "waiting",
        "status": "RUNNING",
        "artifacts": dict.fromkeys(COUNTS, 0) | NOT_UPLOADING,
    }


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
