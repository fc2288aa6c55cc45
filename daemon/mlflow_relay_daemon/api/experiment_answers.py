"""Experiments: the server's answer, which is remembered for the time that it is away."""

from __future__ import annotations

from mlflow_relay_daemon.api import checks
from mlflow_relay_daemon.api.checks import Body
from mlflow_relay_daemon.api.errors import ApiError, kept, missing
from mlflow_relay_daemon.api.experiments import Experiments
from mlflow_relay_daemon.api.run_json import Json
from mlflow_relay_daemon.api.upstream import Told, Upstream, unanswered
from mlflow_relay_daemon.sinks import ServerAway


class ExperimentAnswers:
    """Answers what is asked of experiments."""

    def __init__(self, upstream: Upstream, experiments: Experiments) -> None:
        self._upstream, self._experiments = upstream, experiments

    def create(self, body: Body) -> Json:
        name = checks.text(body, "name", required=True)
        try:
            answer = self._upstream.ask("POST", "experiments/create", body)
        except ServerAway as error:
            if body.get("artifact_location") or body.get("tags"):
                raise unanswered(
                    "an experiment with tags or a place for artifacts", error
                ) from None
            if self._experiments.id_of(name) is not None:
                raise ApiError(
                    "RESOURCE_ALREADY_EXISTS", f"Experiment(name={name}) already exists."
                ) from None
            with kept():
                return {"experiment_id": self._experiments.make_later(name)}
        with kept():
            self._experiments.learn(name, str(answer["experiment_id"]))
        return answer

    def get(self, body: Body) -> Json:
        experiment_id = checks.text(body, "experiment_id", required=True)
        name = self._experiments.name_of(experiment_id)
        if name is not None and self._experiments.servers_id(experiment_id) is None:
            return self.get_by_name({"experiment_name": name})
        servers_id = self._experiments.servers_id(experiment_id) or experiment_id
        try:
            answer = self._upstream.ask("GET", "experiments/get", {"experiment_id": servers_id})
        except ServerAway as error:
            if name is None:
                raise unanswered(f"experiment {experiment_id}", error) from None
            return {"experiment": self._experiments.as_json(name)}
        return self._learned(answer)

    def get_by_name(self, body: Body) -> Json:
        name = checks.text(body, "experiment_name", required=True)
        try:
            fields = {"experiment_name": name}
            return self._learned(self._upstream.ask("GET", "experiments/get-by-name", fields))
        except Told as told:
            if told.status != 404 or self._experiments.id_of(name) is None:
                raise
        except ServerAway:
            if self._experiments.id_of(name) is None:
                raise missing(f"Could not find experiment with name '{name}'") from None
        return {"experiment": self._experiments.as_json(name)}

    def of_new_run(self, experiment_id: str) -> tuple[str | None, str]:
        """Return id (None: to be made) and name of the experiment that a run is to go to."""
        servers_id = self._experiments.servers_id(experiment_id)
        name = self._experiments.name_of(experiment_id)
        if name is None:
            try:
                name = self._learned(
                    self._upstream.ask("GET", "experiments/get", {"experiment_id": servers_id})
                )["experiment"]["name"]
            except ServerAway:
                name = ""  # its id says enough
        return servers_id, name

    def bring_about(self, name: str) -> str | None:
        """Return the server's id of an experiment that was made while it was away: there by now, or
        made now. None: the server is away still."""
        try:
            found = self.get_by_name({"experiment_name": name})["experiment"]["experiment_id"]
            if self._experiments.servers_id(found) is None:
                found = self.create({"name": name})["experiment_id"]
            return self._experiments.servers_id(str(found))
        except ApiError:
            return None

    def _learned(self, answer: Json) -> Json:
        experiment = answer["experiment"]
        if experiment.get("lifecycle_stage") == "active":
            with kept():
                self._experiments.learn(experiment["name"], str(experiment["experiment_id"]))
        return answer
