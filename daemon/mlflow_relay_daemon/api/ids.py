"""The ids that a client may use → the server's: relay run ids, and ids made up for experiments.

Clients keep the id that they were given first, for ever; so it is taken everywhere the server's own
is, in addresses, queries and bodies.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from mlflow_relay_daemon.api.errors import ApiError, away
from mlflow_relay_daemon.api.experiments import Experiments
from mlflow_relay_daemon.hosted import Hosted, Runs

_RUN_ID = re.compile(r"(?<![0-9a-fA-F])[0-9a-f]{32}(?![0-9a-fA-F])")
_OWN_EXPERIMENT_ID = re.compile(r"(?<![0-9])[0-9]{18}(?![0-9])")
POLL_S = 0.005


class Ids:
    """Finds runs by any of their ids.

    Args: bring_about: makes an experiment at the server and returns its id; None: not now.
    """

    def __init__(
        self,
        runs: Runs,
        experiments: Experiments,
        bring_about: Callable[[str], str | None],
    ) -> None:
        self._runs, self._experiments, self._bring_about = runs, experiments, bring_about
        self._found: dict[str, str] = {}  # relay run id by the id that was asked for

    def find(self, run_id: str) -> Hosted | None:
        """Return the run of this spool that an id means, or None."""
        hosted = self._runs.by_id.get(run_id) or self._runs.by_id.get(self._found.get(run_id, ""))
        if hosted is not None:
            return hosted
        for each in reversed(list(self._runs.by_id.values())):
            card = each.run.card
            if run_id in (card.mlflow_run_id, card.itself()):
                self._found[run_id] = card.run_id
                return each
        return None

    def count(self) -> int:
        """Return how many runs this spool has."""
        return len(self._runs.by_id)

    def translated(self, text: str, *, wait_s: float) -> str:
        """Return an address or a body with the server's ids in the place of ours.

        Args: wait_s: how long a run may take that is not there yet.
        Raises: ApiError: a run in it has no id of the server's, or an experiment.
        """
        found = {run_id: self._servers_run(run_id, wait_s) for run_id in _RUN_ID.findall(text)}
        for run_id, servers in found.items():
            text = text.replace(run_id, servers)
        own = self._experiments.own_ids()
        for experiment_id in set(_OWN_EXPERIMENT_ID.findall(text)) & set(own):
            name = own[experiment_id]
            servers_id = self._experiments.servers_id(experiment_id) or self._bring_about(name)
            if servers_id is None:
                raise _not_there(f"experiment {name!r}")
            text = text.replace(experiment_id, servers_id)
        return text

    def _servers_run(self, run_id: str, wait_s: float) -> str:
        hosted = self._runs.by_id.get(run_id)
        if hosted is None:
            return run_id
        servers_id = wait_for_id(self._runs, hosted, wait_s)
        if servers_id is None:
            raise _not_there(f"run {run_id}")
        return servers_id


def wait_for_id(runs: Runs, hosted: Hosted, wait_s: float) -> str | None:
    """Return a run's id at the server, made within a moment; None: it takes longer."""
    card = hosted.run.card
    until_s = time.monotonic() + wait_s
    if runs.delivery is None or hosted.lane is None:
        return card.mlflow_run_id
    if not card.mlflow_run_id:
        runs.delivery.deliver_now([hosted.lane])
    while not card.mlflow_run_id and time.monotonic() < until_s and is_up(runs):
        time.sleep(POLL_S)
    return card.mlflow_run_id


def is_up(runs: Runs) -> bool:
    """Return whether the server is not known to be away."""
    return runs.breaker is not None and runs.breaker.snapshot().state != "down"


def _not_there(what: str) -> ApiError:
    found = away(
        f"{what} is not at the MLflow server yet, which is away or has not answered: what is "
        "logged to it is kept and delivered later, but this request needs the server"
    )
    found.status = 424
    return found
