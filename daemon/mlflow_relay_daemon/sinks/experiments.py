"""Experiment names → ids, each asked for once; what both sinks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlflow_relay_daemon.sinks import RunGone, SinkError


@dataclass(frozen=True, slots=True)
class Experiment:
    """What a server says of one experiment."""

    experiment_id: str
    is_deleted: bool


class ExperimentIds:
    """The ids of one server's experiments.

    Args:
        find: asks the server for the experiment of a name; None if there is none.
        create: makes one and returns its id; SinkError RESOURCE_ALREADY_EXISTS if there is one.
    """

    def __init__(
        self, find: Callable[[str], Experiment | None], create: Callable[[str], str]
    ) -> None:
        self._find = find
        self._create = create
        self._known: dict[str, str] = {}

    def id_of(self, name: str) -> str:
        """Return the id of the experiment of that name, made if there is none.

        Raises: RunGone: it was deleted there (MLflow creates no runs in a deleted one).
        """
        known = self._known.get(name)
        if known is None:
            found = self._find(name) or self._create_or_find(name)
            if found.is_deleted:
                raise RunGone(
                    f"experiment {name!r} (id {found.experiment_id}) is deleted on the server: "
                    f"restore it (mlflow experiments restore --experiment-id "
                    f"{found.experiment_id}) or use another name"
                )
            known = self._known[name] = found.experiment_id
        return known

    def forget(self, experiment_id: str) -> None:
        """Ask anew next time: the server says that this one is gone."""
        for name, known in list(self._known.items()):
            if known == experiment_id:
                self._known.pop(name, None)

    def _create_or_find(self, name: str) -> Experiment:
        """Create an experiment; where somebody else was quicker, return theirs."""
        try:
            return Experiment(self._create(name), is_deleted=False)
        except SinkError as error:
            found = None
            if error.error_code == "RESOURCE_ALREADY_EXISTS":
                found = self._find(name)
            if found is None:
                raise
            return found
