"""What changes a run → records. Each request is on the disk when it is answered."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

import orjson

from mlflow_relay import clock, records, values
from mlflow_relay.messages import TEXT_CHARS_MAX
from mlflow_relay_daemon.api import checks
from mlflow_relay_daemon.api.checks import Body
from mlflow_relay_daemon.api.errors import invalid, kept, missing
from mlflow_relay_daemon.api.experiment_answers import ExperimentAnswers
from mlflow_relay_daemon.api.experiments import DEFAULT_ID
from mlflow_relay_daemon.api.ids import is_up, wait_for_id
from mlflow_relay_daemon.api.places import Places
from mlflow_relay_daemon.api.run_json import Json
from mlflow_relay_daemon.api.run_reads import RunReads
from mlflow_relay_daemon.api.writer import rank_session
from mlflow_relay_daemon.batch import PARAM_CHARS_MAX
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.sinks import Metric
from mlflow_relay_daemon.spool.card import OWN_KEY, Card

#: How long a new run may take to get the server's id, before the client is given ours.
CREATE_WAIT_S = 2.0
TAGS_AT_CREATION_MAX = 100
_ENDS = ("FINISHED", "FAILED", "KILLED")


class RunWrites:
    """Takes what is to become of runs."""

    def __init__(
        self, runs: Runs, places: Places, reads: RunReads, experiments: ExperimentAnswers
    ) -> None:
        self._runs, self._places = runs, places
        self._reads, self._experiments = reads, experiments

    def create_run(self, body: Body) -> Json:
        experiment_id = checks.text(body, "experiment_id") or DEFAULT_ID
        name, tags = checks.text(body, "run_name"), checks.tags(body)
        tagged = tags.get("mlflow.runName", "")
        if name and tagged and name != tagged:
            raise invalid(
                "Both 'run_name' argument and 'mlflow.runName' tag are specified, but with "
                f"different values (run_name='{name}', mlflow.runName='{tagged}')."
            )
        servers_id, experiment_name = self._experiments.of_new_run(experiment_id)
        at_once = {
            key: value
            for key, value in tags.items()
            # A run id in a tag may be one of ours: the lane translates it, or waits for it.
            if not (len(value) == 32 and value in self._runs.by_id) and len(value) < TEXT_CHARS_MAX
        }
        at_once = dict(list(at_once.items())[:TAGS_AT_CREATION_MAX])
        card = Card(
            run_id=uuid.uuid4().hex,
            run_key="",
            experiment_name=experiment_name,
            run_name=name or tagged,
            start_ms=checks.whole(body, "start_time"),
            world_size=1,
            tags=at_once,
            user=checks.text(body, "user_id"),
            is_named=bool(name or tagged),
            node_count=1,
            is_introduced=True,  # params are the client's own
            experiment_id=servers_id,
        )
        card.run_key = OWN_KEY + card.run_id
        later = {key: value for key, value in tags.items() if key not in at_once}
        with kept():
            hosted = self._places.writer.make_run(card)
            self._places.writer.write(hosted, _texts(records.pack_tags, later), begins=True)
        run_id = card.run_id
        if is_up(self._runs):
            run_id = wait_for_id(self._runs, hosted, CREATE_WAIT_S) or run_id
        return {"run": self._reads.run(hosted, run_id)}

    def update_run(self, body: Body) -> Json:
        run_id, status = checks.run_id(body), checks.status(body)
        name, end_ms = checks.text(body, "run_name"), checks.whole(body, "end_time")
        hosted = self._places.open(run_id)
        card = hosted.run.card
        if name:
            self._places.keep(hosted, _texts(records.pack_tags, {"mlflow.runName": name}))
        has_rank = rank_session(card) is not None
        if status in _ENDS and has_rank:
            with kept():
                self._places.writer.write(hosted, end=(status, end_ms or clock.now_ms()))
        elif status == "RUNNING" and card.itself() is None:
            if not any(each.primary and not each.closed for each in card.sessions.values()):
                with kept():
                    self._places.writer.write(hosted, begins=True)
        elif status or end_ms:
            change = {"status": status, "end_time": end_ms or None}
            call = {key: value for key, value in change.items() if value}
            with kept():
                self._places.writer.write(
                    hosted, [_call("runs/update", call)], begins=status == "RUNNING"
                )
        return {"run_info": self._reads.run(hosted, run_id)["info"]}

    def delete_run(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        hosted = self._places.writable(run_id)
        end = None if rank_session(hosted.run.card) is None else (records.GOES_ON, clock.now_ms())
        with kept():
            self._places.writer.write(hosted, [_call("runs/delete", {})], end=end)
        self._places.mark_deleted(hosted, deleted=True)
        return {}

    def restore_run(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        hosted = self._places.writable(run_id, deleted_ok=True)
        self._places.keep(hosted, [_call("runs/restore", {})])
        self._places.mark_deleted(hosted, deleted=False)
        return {}

    def place_of(self, body: Body) -> Json:
        """Tell the plugin what it needs to open a session of its own for a run."""
        run_id = checks.run_id(body)
        hosted = self._places.open(run_id)
        is_new = hosted.run.accepted_records == 0
        params = [] if is_new else self._reads.run(hosted, run_id)["data"]["params"]
        card = hosted.run.card
        return {
            "relay_run_id": card.run_id,
            "mlflow_run_id": card.mlflow_run_id or card.itself() or "",
            "experiment_name": card.experiment_name,
            "run_name": card.run_name if card.is_named else "",
            "params": {each["key"]: each["value"] for each in params},
        }

    def log_batch(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        batch = checks.log_batch(body)
        hosted = self._places.open(run_id)
        self._check_params(hosted, run_id, batch.params, is_batch=True)
        found = _metric_records(batch.metrics)
        if batch.model_metrics:
            found.append(_call("runs/log-batch", {"metrics": batch.model_metrics}))
        found += _texts(records.pack_params, batch.params)
        found += _texts(records.pack_tags, batch.tags)
        self._places.keep(hosted, found)
        return {}

    def log_metric(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        for name in ("key", "value", "timestamp"):
            checks.required(body, name)
        metric = checks.metric(body)
        hosted = self._places.open(run_id)
        if any(body.get(name) for name in checks.MODEL_FIELDS):
            fields = ("key", "value", "timestamp", "step", *checks.MODEL_FIELDS)
            each = {name: body[name] for name in fields if name in body}
            self._places.keep(hosted, [_call("runs/log-batch", {"metrics": [each]})])
        else:
            self._places.keep(hosted, _metric_records([metric]))
        return {}

    def log_param(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        checks.required(body, "key")
        key, value = checks.key_value(body, what="Param key")
        hosted = self._places.open(run_id)
        self._check_params(hosted, run_id, {key: value}, is_batch=False)
        self._places.keep(hosted, _texts(records.pack_params, {key: value}))
        return {}

    def set_tag(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        checks.required(body, "key")
        key, value = checks.key_value(body)
        self._places.keep(self._places.open(run_id), _texts(records.pack_tags, {key: value}))
        return {}

    def delete_tag(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        key = checks.text(body, "key", required=True)
        hosted = self._places.open(run_id)
        has = {each["key"] for each in self._reads.run(hosted, run_id)["data"]["tags"]}
        if key not in has:
            raise missing(f"No tag with name: {key} in run with id {run_id}")
        self._places.keep(hosted, [_call("runs/delete-tag", {"key": key})])
        return {}

    def log_inputs(self, body: Body) -> Json:
        run_id = checks.run_id(body)
        inputs = {name: checks.objects(body, name) for name in ("datasets", "models")}
        hosted = self._places.open(run_id)
        kept = {name: entries for name, entries in inputs.items() if entries}
        self._places.keep(hosted, [_call("runs/log-inputs", kept)])
        return {}

    def _check_params(
        self, hosted: Hosted, run_id: str, params: dict[str, str], *, is_batch: bool
    ) -> None:
        """Raises: ApiError: a param has another value already, as far as it is known here."""
        if not params:
            return
        view = self._reads.view(hosted)
        view.refresh()
        changed = [
            {"key": key, "old_value": view.params[key][0], "new_value": value}
            for key, value in params.items()
            if key in view.params and view.params[key][0] != value[:PARAM_CHARS_MAX]
        ]
        if changed and is_batch:
            raise invalid(
                "Changing param values is not allowed. Params were already"
                f" logged='{changed}' for run ID='{run_id}'."
            )
        if changed:
            raise invalid(
                "Changing param values is not allowed. Param with key='{key}' was already logged "
                "with value='{old_value}' for run ID='{run_id}'. Attempted logging new value "
                "'{new_value}'.".format(run_id=run_id, **changed[0])
            )


def _metric_records(metrics: Sequence[Metric]) -> list[bytes]:
    by_time: dict[int, list[Metric]] = {}
    for metric in metrics:
        by_time.setdefault(metric[2], []).append(metric)
    return [
        records.pack_points(
            [each[0] for each in part],
            [each[1] for each in part],
            [each[3] for each in part],
            timestamp_ms,
        )
        for timestamp_ms, part in by_time.items()
    ]


def _texts(pack: Callable[[dict[str, str], int], bytes], items: dict[str, str]) -> list[bytes]:
    time_ms = clock.now_ms()
    return [pack(part, time_ms) for part in values.text_chunks(items)]


def _call(name: str, body: Json) -> bytes:
    return records.pack_call(name, orjson.dumps(body), clock.now_ms())
