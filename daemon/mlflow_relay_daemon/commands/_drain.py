"""How far the delivery of a node is, when a command that used its daemon has ended."""

from __future__ import annotations

import time
from typing import Any

from mlflow_relay_daemon.commands._gather import gather
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.control_client import ControlClient
from mlflow_relay_daemon.exits import CommandError
from mlflow_relay_daemon.words import plural

ASK_EVERY_S = 0.5


class Drain:
    """A sidecar leaves by itself when it is done; any other daemon is told to deliver, and asked.

    Args: config: where the daemon and its spool are.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._asked_s = 0.0
        self._targets: dict[str, int] | None = None  # of a daemon that stays
        self._status: dict[str, Any] | None = None

    def is_done(self, is_there: bool) -> bool:
        """Return whether there is nothing more to wait for. Args: is_there: a daemon lives."""
        if not is_there:
            return True
        if time.monotonic() - self._asked_s < ASK_EVERY_S:
            return False
        self._asked_s = time.monotonic()
        try:
            with ControlClient(self._config.socket, ASK_EVERY_S) as client:
                self._status = client.status()
                if self._status["daemon"]["sidecar"]:
                    return False
                if self._targets is None:
                    self._targets = client.flush()
        except CommandError:
            return False  # it is leaving, or its disk is busy, or it is offline
        return not _left(self._status, self._targets)

    def left(self) -> str:
        """Return what is not in MLflow yet, in words; "": nothing. Of a daemon that stays, records
        that it was asked to deliver."""
        try:
            status = gather(self._config).status
        except CommandError:
            status = self._status or {"runs": []}
        if self._targets is not None:
            return _in_words(_left(status, self._targets), 0)
        runs = status["runs"]
        return _in_words(
            sum(run["waiting_records"] + run["journal_records"] for run in runs),
            sum(run["artifacts"]["waiting"] for run in runs),
        )


def _in_words(records: int, artifacts: int) -> str:
    parts = [(records, "record"), (artifacts, "artifact")]
    return " and ".join(plural(number, thing) for number, thing in parts if number)


def _left(status: dict[str, Any], targets: dict[str, int]) -> int:
    """Return how many records of these targets are not settled. Pure."""
    return sum(
        max(0, targets[run["run_id"]] - run["settled_records"])
        for run in status["runs"]
        if run["run_id"] in targets
    )
