"""One MLflow run for one relay run, whatever is repeated, lost, or done by two nodes at once.

MLflow has no "create if there is none". So the run is searched for by its tag before each creation
and after it, and is established by another tag before anything is written to it:

    found, established ─────────────────────────────────────▶ use it
    found, not established  owner ── the first of them ─────▶ establish it, use it
    found, not established  another node ───────────────────▶ wait for the owner
    none found              another node ───────────────────▶ wait for the owner
    none found              owner ── create, search again ──▶ alone: establish; else wait a moment,
                                                              so that whoever else made one has
                                                              established it, and look again

Crash: at any line the next try finds by the tag what this one left.
"""

from __future__ import annotations

import logging

from mlflow_relay_daemon.lane.destination import (
    LAST_LIFE_TAG,
    OWNER_TAG,
    RESUMED_BY_TAG,
    RUN_ID_TAG,
    RUN_KEY_TAG,
    Destination,
    is_followed,
)
from mlflow_relay_daemon.lane.lineage import PARENT_TAG, RESUMED_TAG, WAITS_FOR_TAG, Resolver
from mlflow_relay_daemon.sinks import NotYet, RunGone, RunInfo, Tag

log = logging.getLogger(__name__)

#: Longer than it takes from a creation to the second search and the tag.
RACE_GRACE_S = 2.0
OWNER_WAIT_S = 2.0
LOOK_AGAIN_S = 5.0


class Creation:
    """Finds or makes the MLflow run of one relay run."""

    def __init__(self, destination: Destination, resolver: Resolver) -> None:
        self._to, self._resolver = destination, resolver

    def find_or_create(self) -> RunInfo:
        """Return the run to deliver to; safe to repeat.

        Raises: NotYet: somebody else must come first; SinkError.
        """
        card = self._to.card
        experiment_id = self._to.sink.experiment_id(card.experiment_name)
        active = self._find(experiment_id)
        if not active:
            if not card.is_owned:
                raise NotYet(
                    "waits for the node of rank 0 to make the run", retry_after_s=OWNER_WAIT_S
                )
            self._create(experiment_id)
            active = self._find(experiment_id)
            if len(active) > 1 and not any(OWNER_TAG in run.tags for run in active):
                raise NotYet(
                    "another node made the run at the same time", retry_after_s=RACE_GRACE_S
                )
        established = [run for run in active if OWNER_TAG in run.tags]
        if not established and not card.is_owned:
            raise NotYet(
                "waits for the node of rank 0 to establish the run", retry_after_s=OWNER_WAIT_S
            )
        chosen = (established or active)[0]
        if not established:
            self._to.sink.log_batch(chosen.run_id, [], [], [(OWNER_TAG, self._to.node)])
        return chosen

    def go_on_with(self, asked: str) -> RunInfo:
        """Return the run that is resumed as itself, RUNNING again.

        Args: asked: its id.
        Raises: NotYet: nobody knows it; RunGone: it was deleted; SinkError.
        """
        found = self._resolver.find(asked)
        if found is None:
            raise NotYet(
                f"waits for run {asked}, which is to go on, and which nobody knows yet",
                retry_after_s=LOOK_AGAIN_S,
            )
        if found.lifecycle_stage != "active":
            raise RunGone(f"run {found.run_id}, which is to go on, was deleted: restore it")
        card = self._to.card
        tags: list[Tag] = [(RESUMED_TAG, "True"), (RESUMED_BY_TAG + card.run_id, "True")]
        is_last = not is_followed(found.tags, card)
        if is_last:
            tags.append((LAST_LIFE_TAG, f"{card.start_ms} {card.run_id}"))
        self._to.sink.log_batch(found.run_id, [], [], tags)
        if is_last:
            self._to.sink.update_run(found.run_id, status="RUNNING")
        return found

    def remove_doubles(self) -> None:
        """Remove what a creation left whose answer was lost, or that came late: empty runs with our
        tag that nobody established."""
        card = self._to.card
        if card.create_attempts == 0 or card.experiment_id is None:
            return
        for run in self._find(card.experiment_id):
            if run.run_id == card.mlflow_run_id:
                continue
            if OWNER_TAG in run.tags:
                log.error("run %s has a double with data: %s", card.run_id, run.run_id)
            else:
                log.warning("run %s: removing its empty double %s", card.run_id, run.run_id)
                self._to.sink.delete_run(run.run_id)

    def _find(self, experiment_id: str) -> list[RunInfo]:
        """Return the runs with our tag that are not deleted, in an order that all nodes agree on.

        Raises: RunGone: there were some, and all are deleted: somebody does not want the run.
        """
        found = self._to.sink.find_runs([experiment_id], RUN_ID_TAG, self._to.card.run_id)
        active = [run for run in found if run.lifecycle_stage == "active"]
        if found and not active:
            raise RunGone(f"run {found[0].run_id} was deleted in MLflow: restore it there")
        return active

    def _create(self, experiment_id: str) -> None:
        card, parent = self._to.card, self._to.card.resumed_parent()
        root = self._resolver.find_root(parent.asked) if parent else None
        tags = {**card.tags, RUN_ID_TAG: card.run_id}
        if card.run_key:  # runs of other stores have none
            tags[RUN_KEY_TAG] = card.run_key
        if root is not None:
            tags |= {RESUMED_TAG: "True", PARENT_TAG: root.run_id}
        elif parent is not None:
            # From its first moment on: whoever resumes this run must not take it for a root.
            tags[WAITS_FOR_TAG] = parent.asked
            parent.is_waiting = True
        with self._to.run.lock:
            card.create_attempts += 1
            self._to.run.save_card()
        self._to.sink.create_run(
            experiment_id,
            run_name=root.run_name if root and not card.is_named else card.run_name,
            user=card.tags.get("mlflow.user", ""),
            start_time_ms=card.start_ms,
            tags=list(tags.items()),
        )
