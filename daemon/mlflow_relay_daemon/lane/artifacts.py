"""What the end of a run has to do with its artifacts: it waits for them a while, and says so."""

from __future__ import annotations

import time

from mlflow_relay_daemon.lane.destination import Destination

#: How many artifacts were still to come when MLflow was told the end; "0" once all are there.
WAITING_TAG = "relay.artifacts_waiting"
ASK_AGAIN_S = 0.5


class ArtifactWord:
    """The artifacts of one run, as its lane sees them."""

    def __init__(self, destination: Destination) -> None:
        self._to = destination
        self._since_s: float | None = None

    def wait_s(self) -> float | None:
        """Return in how many seconds to look again, for all else of the run is delivered; None:
        all are uploaded, or the end has waited for long enough."""
        if not self._to.run.artifacts.waiting:
            self._since_s = None
            return None
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
        return ASK_AGAIN_S if now_s - self._since_s < self._to.artifact_wait_s else None

    def tell(self) -> None:
        """Tell MLflow, with the end, that artifacts are to come, and later that all are there.

        Raises: SinkError, Stopped, OSError.
        """
        card, waiting = self._to.card, len(self._to.run.artifacts.waiting)
        if bool(waiting) == card.has_artifacts_to_come:
            return
        # Of several nodes each has its own.
        tag = WAITING_TAG if card.node_count == 1 else f"{WAITING_TAG}.{self._to.node}"
        self._to.set_tags([(tag, str(waiting))])
        with self._to.run.lock:
            card.has_artifacts_to_come = bool(waiting)
            self._to.run.save_card()
