"""A run has come: tell the runs that wait for it, whoever brought them and whenever."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from mlflow_relay_daemon.dead_letters import Letters
from mlflow_relay_daemon.lane import waits
from mlflow_relay_daemon.lane.destination import RUN_ID_TAG, Destination
from mlflow_relay_daemon.lane.lineage import Resolver
from mlflow_relay_daemon.lane.links import LineageParams, Links
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.sinks import RunInfo, Sink
from mlflow_relay_daemon.sync.source import Feed, SyncCard
from mlflow_relay_daemon.sync.translation import RelativesOnly


def tell_waiting(
    sink: Sink, breaker: Breaker, names: LineageParams, letters: Letters, ids: Iterable[str]
) -> int:
    """Tell all runs on the server that wait for one of these; return how many there were.

    Args:    ids: by which a run may have been asked for: of the relay, of its first store.
    Raises:  SinkError, Stopped. Safe to repeat.
    """
    experiments = breaker.call(sink.experiment_ids)
    waiting: dict[str, RunInfo] = {}
    for asked in ids:
        search = partial(sink.find_runs, experiments, waits.AWAITS_TAG + asked, "True")
        found = breaker.call(search)
        waiting.update((run.run_id, run) for run in found if run.lifecycle_stage == "active")
    for run in waiting.values():
        _tell(run, sink, breaker, names, letters)
    return len(waiting)


def _tell(
    run: RunInfo, sink: Sink, breaker: Breaker, names: LineageParams, letters: Letters
) -> None:
    card = SyncCard(
        run_id=run.tags.get(RUN_ID_TAG, run.run_id),
        run_key="",
        experiment_name="",
        run_name=run.run_name,
        start_ms=run.start_time_ms,
        world_size=1,
        tags={},
    )
    waits.fill(card, run)
    destination = Destination(Feed(card, iter(()), {}), sink, breaker, "")
    resolver = Resolver(sink, lambda _: None)
    kept = waits.kept(run.tags)
    relatives = frozenset(value for _, _, value in card.held)
    translation = RelativesOnly(destination, resolver, relatives, kept=kept)
    Links(destination, resolver, translation, names, letters).tell()
    # What was told just now stands in tags that were read before it.
    destination.set_tags(waits.tags(card, run.tags, kept))
