"""MLflow's tracking API for what goes through this daemon: one implementation behind both doors.

Writes become records and are on the disk when they are answered. Reads are the server's answer with
what waits for it; while it is away, what the spool knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mlflow_relay_daemon.api.checks import Body
from mlflow_relay_daemon.api.experiment_answers import ExperimentAnswers
from mlflow_relay_daemon.api.experiments import Experiments
from mlflow_relay_daemon.api.ids import POLL_S, Ids, is_up
from mlflow_relay_daemon.api.places import Places
from mlflow_relay_daemon.api.run_json import Json
from mlflow_relay_daemon.api.run_reads import RunReads
from mlflow_relay_daemon.api.run_writes import RunWrites
from mlflow_relay_daemon.api.upstream import Upstream
from mlflow_relay_daemon.api.writer import Writer
from mlflow_relay_daemon.hosted import Runs

#: How long a question for the server waits until it has what was accepted before.
SETTLE_WAIT_S = 5.0

Answer = Callable[[Body], Json]


class Tracking:
    """Answers requests by their path below /api/2.0/mlflow/; for any thread but the loop's.

    Every answer is a JSON object; every refusal an ApiError.
    """

    def __init__(self, runs: Runs, writer: Writer, upstream: Upstream, known: Experiments) -> None:
        self._runs = runs
        experiments = ExperimentAnswers(upstream, known)
        self.ids = Ids(runs, known, experiments.bring_about)
        self.run_reads = reads = RunReads(self.ids, upstream, known)
        places = Places(self.ids, writer, upstream)
        writes = RunWrites(runs, places, reads, experiments)
        self.writes: dict[str, Answer] = {
            "runs/create": writes.create_run,
            "runs/update": writes.update_run,
            "runs/delete": writes.delete_run,
            "runs/restore": writes.restore_run,
            "runs/log-batch": writes.log_batch,
            "runs/log-metric": writes.log_metric,
            "runs/log-parameter": writes.log_param,
            "runs/set-tag": writes.set_tag,
            "runs/delete-tag": writes.delete_tag,
            "runs/log-inputs": writes.log_inputs,
            "experiments/create": experiments.create,
        }
        self.reads: dict[str, Answer] = {
            "runs/get": reads.get_run,
            "relay/run": writes.place_of,
            "metrics/get-history": reads.metric_history,
            "experiments/get": experiments.get,
            "experiments/get-by-name": experiments.get_by_name,
        }

    def settle(self) -> None:
        """Wait until the server has what was accepted before, for a moment and if it is there."""
        waiting = [
            each
            for each in list(self._runs.by_id.values())
            if each.lane is not None and not each.lane.is_blocked and each.run.waiting_records()
        ]
        if not waiting or self._runs.delivery is None:
            return
        targets = [(each, each.run.accepted_records) for each in waiting]
        self._runs.delivery.deliver_now([each.lane for each in waiting if each.lane is not None])
        until_s = time.monotonic() + SETTLE_WAIT_S
        while time.monotonic() < until_s and is_up(self._runs):
            if all(each.run.mark.settled_records >= target for each, target in targets):
                return
            time.sleep(POLL_S)
