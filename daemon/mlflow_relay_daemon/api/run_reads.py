"""Runs and their metrics: the server's answer with what waits for it, or what the spool knows."""

from __future__ import annotations

import threading

from mlflow_relay_daemon.api import checks
from mlflow_relay_daemon.api.checks import Body
from mlflow_relay_daemon.api.experiments import DEFAULT_ID, Experiments
from mlflow_relay_daemon.api.ids import Ids
from mlflow_relay_daemon.api.run_json import Json, is_end_told, merged, point_json, run_of_spool
from mlflow_relay_daemon.api.upstream import Told, Upstream, unanswered
from mlflow_relay_daemon.api.view import View, points_of
from mlflow_relay_daemon.hosted import Hosted
from mlflow_relay_daemon.sinks import ServerAway


class RunReads:
    """Answers what is asked of runs."""

    def __init__(self, ids: Ids, upstream: Upstream, experiments: Experiments) -> None:
        self._ids, self._upstream, self._experiments = ids, upstream, experiments
        self._views: dict[str, View] = {}
        self._lock = threading.Lock()

    def get_run(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        hosted = self._ids.find(run_id)
        if hosted is None:
            return self._from_server("runs/get", {"run_id": run_id}, f"run {run_id}")
        return {"run": self.run(hosted, run_id)}

    def metric_history(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        key = checks.text(body, "metric_key", required=True)
        hosted = self._ids.find(run_id)
        fields = {**body, "run_id": run_id}
        if hosted is None:
            return self._from_server("metrics/get-history", fields, f"run {run_id}")
        waiting = [point_json(key, *point) for point in points_of(hosted.run, key)]
        servers_id = hosted.run.card.mlflow_run_id
        answer: Json = {}
        try:
            if servers_id is not None:
                fields["run_id"] = servers_id
                answer = self._upstream.ask("GET", "metrics/get-history", fields)
        except ServerAway as error:
            if not waiting:
                raise unanswered(f"the history of metric {key!r}", error) from None
        if answer.get("next_page_token"):
            return answer  # what waits comes with the last page
        points = answer.get("metrics", [])
        seen = {_identity(each) for each in points}
        points += [each for each in waiting if _identity(each) not in seen]
        points.sort(key=lambda each: (int(each["timestamp"]), int(each.get("step", 0))))
        return {"metrics": points}

    def run(self, hosted: Hosted, asked: str) -> Json:
        """Return a run under the id that it was asked for."""
        view, card = self.view(hosted), hosted.run.card
        end_is_told, delivered = is_end_told(card), view.refresh()
        found: Json | None = None
        servers_id = card.mlflow_run_id or card.itself()
        try:
            if servers_id is not None:
                found = self._upstream.ask("GET", "runs/get", {"run_id": servers_id})["run"]
        except (ServerAway, Told):
            found = None  # what the spool knows
        if found is None:
            known = self._experiments.id_of(card.experiment_name)
            run = run_of_spool(card, view, card.experiment_id or known or DEFAULT_ID)
        else:
            run = merged(found, card, view, delivered, end_is_told=end_is_told)
        run["info"]["run_id"] = run["info"]["run_uuid"] = asked
        return run

    def view(self, hosted: Hosted) -> View:
        """Return what the spool knows of a run; to be refreshed before use."""
        with self._lock:
            if len(self._views) > self._ids.count():  # some are of runs that have left the spool
                self._views = {k: v for k, v in self._views.items() if self._ids.find(k)}
            return self._views.setdefault(hosted.run.card.run_id, View(hosted.run))

    def _from_server(self, name: str, fields: Json, what: str) -> Json:
        try:
            return self._upstream.ask("GET", name, fields)
        except ServerAway as error:
            raise unanswered(what, error) from None


def _identity(point: Json) -> tuple[int, int, str]:
    return int(point["timestamp"]), int(point.get("step", 0)), repr(float(point["value"]))
