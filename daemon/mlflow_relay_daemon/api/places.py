"""Runs that are written to: those of this spool, and others', for which a place is made in it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence

from mlflow_relay import clock
from mlflow_relay_daemon.api.checks import is_run_id
from mlflow_relay_daemon.api.errors import ApiError, invalid, kept, missing
from mlflow_relay_daemon.api.ids import Ids
from mlflow_relay_daemon.api.upstream import Upstream
from mlflow_relay_daemon.api.writer import Writer
from mlflow_relay_daemon.hosted import Hosted
from mlflow_relay_daemon.sinks import ServerAway
from mlflow_relay_daemon.spool.card import Card, Link


class Places:
    """Finds the run that a client writes to; makes a guest's place where it is others'."""

    def __init__(self, ids: Ids, writer: Writer, upstream: Upstream) -> None:
        self.writer = writer
        self._ids, self._upstream = ids, upstream
        self._lock = threading.Lock()
        self._deleted: set[str] = set()  # relay run ids, of this daemon's life

    def open(self, run_id: str) -> Hosted:
        """Return a run that is to be written to. Raises: ApiError: there is none, or deleted."""
        hosted = self.writable(run_id)
        if hosted.run.card.run_id in self._deleted:
            raise _deleted(run_id)
        return hosted

    def mark_deleted(self, hosted: Hosted, *, deleted: bool) -> None:
        """Remember that a run was deleted, or restored."""
        (self._deleted.add if deleted else self._deleted.discard)(hosted.run.card.run_id)

    def keep(self, hosted: Hosted, found: Sequence[bytes]) -> None:
        """Keep records; they are on the disk when this returns. Raises: ApiError."""
        if found:
            with kept():
                self.writer.write(hosted, found)

    def writable(self, run_id: str, *, deleted_ok: bool = False) -> Hosted:
        """Return the run of an id; of one that is others', a place for what is written to it."""
        hosted = self._ids.find(run_id)
        if hosted is not None:
            return hosted
        try:
            info = self._upstream.ask("GET", "runs/get", {"run_id": run_id})["run"]["info"]
        except ServerAway:
            if not is_run_id(run_id):
                raise missing(f"Run with id={run_id} not found") from None
            info = {}
        if info.get("lifecycle_stage") == "deleted" and not deleted_ok:
            raise _deleted(run_id)
        card = Card(
            run_id=uuid.uuid4().hex,
            run_key="",
            experiment_name="",
            run_name=info.get("run_name", ""),
            start_ms=int(info.get("start_time") or clock.now_ms()),
            world_size=1,
            tags={},
            node_count=1,
            resume_mode="guest",
            parent=Link(run_id),
            is_introduced=True,
            experiment_id=info.get("experiment_id"),
        )
        card.run_key = f"guest/{run_id}"
        with self._lock, kept():
            return self._ids.find(run_id) or self.writer.make_run(card)


def _deleted(run_id: str) -> ApiError:
    return invalid(f"The run {run_id} must be in the 'active' state. Current state is deleted.")
