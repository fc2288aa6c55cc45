"""Ids and ancestry: which MLflow run an id means, and under which run its resumes hang.

An id may be a relay run id or an MLflow run id, of this spool, of another node, or of nobody yet.
What is not known is asked for again later; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable

from mlflow_relay_daemon.lane.destination import RESUMED_BY_TAG, RUN_ID_TAG, SOURCE_TAG
from mlflow_relay_daemon.sinks import RunGone, RunInfo, Sink
from mlflow_relay_daemon.spool.card import Card

PARENT_TAG = "mlflow.parentRunId"
RESUMED_TAG = "resumedRun"
FORKED_TAG, FORKED_FROM_TAG = "forkedRun", "forkedRunId"
#: Of a run whose parent is not known yet: the id it asks for. Empty again once it is.
WAITS_FOR_TAG = "relay.waits_for"


class Pending(Exception):
    """It cannot be told yet: something before it is not known."""


def climb(run: RunInfo, get: Callable[[str], RunInfo | None]) -> RunInfo:
    """Return the root of a chain of resumes: users of the MLflow UI expect all children under one.

    A nested run that is no resume (of a sweep, say) is a root of its own. A cycle, which others'
    tags may hold, or a parent that is gone, ends the climb where it is met.

    Args: get: returns a run of the server, None if it has none of that id.
    Raises: Pending: a run on the way does not know its own parent yet.
    """
    seen = {run.run_id}
    while True:
        if run.tags.get(WAITS_FOR_TAG):
            raise Pending
        above = run.tags.get(PARENT_TAG) if run.tags.get(RESUMED_TAG) == "True" else None
        if not above or above in seen:
            return run
        seen.add(above)
        parent = get(above)
        if parent is None:
            return run
        run = parent


class Resolver:
    """Finds runs by id.

    Args:
        card_of: returns the card of one of this daemon's runs by relay run id.
    """

    def __init__(self, sink: Sink, card_of: Callable[[str], Card | None]) -> None:
        self._sink, self._card_of = sink, card_of

    def find(self, asked: str) -> RunInfo | None:
        """Return the MLflow run that an id means; None if nobody knows it. Raises: SinkError."""
        card = self._card_of(asked)
        if card is not None:
            return self.get(card.mlflow_run_id) if card.mlflow_run_id else None
        found = self.get(asked)
        if found is not None:
            return found
        experiments = self._sink.experiment_ids()
        tags = ((RUN_ID_TAG, asked), (RESUMED_BY_TAG + asked, "True"), (SOURCE_TAG, asked))
        for tag, value in tags:
            runs = self._sink.find_runs(experiments, tag, value)
            active = [run for run in runs if run.lifecycle_stage == "active"]
            if active or runs:
                return (active or runs)[0]
        return None

    def is_ours(self, asked: str) -> bool:
        """Return whether the id is a relay run id of this daemon's spool."""
        return self._card_of(asked) is not None

    def is_known(self, asked: str) -> bool:
        """Return whether the id is a relay run id of this spool that MLflow has a run of."""
        card = self._card_of(asked)
        return card is not None and card.mlflow_run_id is not None

    def find_root(self, asked: str) -> RunInfo | None:
        """Return the root of the run that an id means; None if it cannot be told yet."""
        found = self.find(asked)
        if found is None:
            return None
        try:
            return climb(found, self.get)
        except Pending:
            return None

    def get(self, run_id: str) -> RunInfo | None:
        """Return the run of an MLflow run id; None if the server has none. Raises: SinkError."""
        try:
            return self._sink.get_run(run_id)
        except RunGone:
            return None
