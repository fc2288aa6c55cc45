"""The runs around a run, as the server knows them: for people who look, not for delivery."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlflow_relay_daemon.lane.destination import RUN_ID_TAG
from mlflow_relay_daemon.lane.lineage import (
    FORKED_FROM_TAG,
    FORKED_TAG,
    PARENT_TAG,
    RESUMED_TAG,
    WAITS_FOR_TAG,
    Pending,
    Resolver,
    climb,
)
from mlflow_relay_daemon.sinks import RunInfo, Sink

#: Ids that may be asked for at once; each costs some 0.2 s.
IDS_MAX = 10
#: Of all these runs, so many are told at most.
RUNS_MAX = 1000


def relatives(sink: Sink, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return the runs that these ids mean, their roots, and the resumes and forks of both.

    Deleted ones are left out. Raises: SinkError.
    """
    resolver = Resolver(sink, lambda _: None)
    experiments = sink.experiment_ids()
    found: dict[str, RunInfo] = {}
    searched: set[str] = set()
    for asked in ids:
        run = resolver.find(asked)
        if run is None:
            continue
        for each in {each.run_id: each for each in (_root(run, resolver), run)}.values():
            found[each.run_id] = each
            if each.run_id in searched:
                continue
            searched.add(each.run_id)
            for tag in (PARENT_TAG, FORKED_FROM_TAG):
                near = sink.find_runs(experiments, tag, each.run_id)
                found.update((other.run_id, other) for other in near if _is_kin(other, tag))
    return [_told(run, sink) for run in _first(found.values())]


def _root(run: RunInfo, resolver: Resolver) -> RunInfo:
    try:
        return climb(run, resolver.get)
    except Pending:
        return run


def _is_kin(run: RunInfo, tag: str) -> bool:
    """A nested run that is no resume (of a sweep, say) is none of the family."""
    return run.lifecycle_stage == "active" and (
        tag != PARENT_TAG or run.tags.get(RESUMED_TAG) == "True"
    )


def _first(runs: Iterable[RunInfo]) -> list[RunInfo]:
    return sorted(runs, key=lambda run: (run.start_time_ms, run.run_id))[:RUNS_MAX]


def _told(run: RunInfo, sink: Sink) -> dict[str, Any]:
    tags = run.tags
    return {
        "run_id": tags.get(RUN_ID_TAG),
        "mlflow_run_id": run.run_id,
        "run_name": run.run_name,
        "status": run.status,
        "deleted": run.lifecycle_stage != "active",
        "start_ms": run.start_time_ms,
        "resumes": tags.get(PARENT_TAG) if tags.get(RESUMED_TAG) == "True" else None,
        "forks": tags.get(FORKED_FROM_TAG) if tags.get(FORKED_TAG) == "True" else None,
        "waits_for": tags.get(WAITS_FOR_TAG) or None,
        "url": sink.run_url(run.experiment_id, run.run_id) or None,
    }
