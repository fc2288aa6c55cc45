"""The sink for every URI but http(s): databases, databricks, plugins, through the mlflow package.

mlflow is imported at the first call, in the lane that makes it: 2.7 s and 169 MB. A database that
is away when the daemon starts is `ServerAway` like any other time.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from mlflow_relay_daemon.sinks import (
    DatasetInput,
    Metric,
    Param,
    RunGone,
    RunInfo,
    ServerAway,
    SinkError,
    Tag,
    TryAgain,
)
from mlflow_relay_daemon.sinks.answers import make_error
from mlflow_relay_daemon.sinks.bodies import check_update, oldest_first, sorted_by_key, tag_filter
from mlflow_relay_daemon.sinks.experiments import Experiment, ExperimentIds
from mlflow_relay_daemon.sinks.redact import redact_uri, scrub, uri_secrets

SEARCH_PAGE_RUNS = 1000
#: Repeats are the breaker's business. Only defaults: what the user has set stands.
MLFLOW_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}

_NO_ANSWER = re.compile(r"API request to .* failed with (timeout )?exception", re.DOTALL)
_TOO_MANY = re.compile(r"too many (\d{3}) error responses")
_LOCKED = re.compile(r"is locked|deadlock|lock wait timeout", re.IGNORECASE)

T = TypeVar("T")


class StoreSink:
    """One store of the mlflow package. Implements `Sink`; made for many threads."""

    def __init__(self, tracking_uri: str) -> None:
        self.uri = redact_uri(tracking_uri)
        self._tracking_uri = tracking_uri
        self._secrets = uri_secrets(tracking_uri)
        self._lock = threading.Lock()
        self._opened: Any = None
        self._experiments = ExperimentIds(self._find_experiment, self._create_experiment)

    def __repr__(self) -> str:
        return f"StoreSink({self.uri!r})"

    def ping(self) -> str:
        """Return the mlflow package's version: there is no server to ask."""
        from mlflow.entities import ViewType
        from mlflow.version import VERSION

        self._ask(
            "ask for an experiment",
            lambda store: store.search_experiments(view_type=ViewType.ALL, max_results=1),
        )
        return str(VERSION)

    def experiment_id(self, name: str) -> str:
        """Return the id of the experiment of that name, made if there is none.

        Raises: RunGone: it was deleted there (MLflow creates no runs in a deleted one).
        """
        return self._experiments.id_of(name)

    def experiment_ids(self) -> list[str]:
        """Return the ids of all experiments, deleted ones too."""
        ids: list[str] = []
        page_token: str | None = None
        while True:
            page = self._ask(
                "list the experiments",
                partial(_experiments_page, page_token=page_token),
            )
            ids += [str(each.experiment_id) for each in page]
            page_token = page.token
            if not page_token:
                return ids

    def find_runs(self, experiment_ids: Sequence[str], tag: str, value: str) -> list[RunInfo]:
        """Return all runs (deleted ones too) there that carry this tag, oldest first."""
        run_filter = tag_filter(tag, value)
        runs: list[RunInfo] = []
        page_token: str | None = None
        while True:
            page = self._search_page(experiment_ids, run_filter, page_token)
            runs += [_run_info(run) for run in page]
            page_token = page.token
            if not page_token:
                return oldest_first(runs, tag, value)

    def get_run(self, run_id: str) -> RunInfo:
        """Return one run, deleted or not. Raises: RunGone: there is none of that id."""
        return _run_info(self._ask(f"get run {run_id}", lambda store: store.get_run(run_id)))

    def create_run(
        self,
        experiment_id: str,
        *,
        run_name: str,
        user: str,
        start_time_ms: int,
        tags: Sequence[Tag],
    ) -> str:
        """Create a run that is RUNNING and return its id. Not idempotent: search by tag first."""
        from mlflow.entities import RunTag

        run_tags = [RunTag(key, value) for key, value in dict(tags).items()]
        try:
            run = self._ask(
                f"create a run in experiment {experiment_id}",
                lambda store: store.create_run(
                    experiment_id, user, start_time_ms, run_tags, run_name
                ),
            )
        except RunGone:
            self._experiments.forget(experiment_id)
            raise
        return str(run.info.run_id)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric],
        params: Sequence[Param],
        tags: Sequence[Tag],
    ) -> None:
        """Store at most 1000 entities (1000 metrics, 100 params, 100 tags); idempotent."""
        from mlflow import entities

        metric_list = [entities.Metric(*metric) for metric in sorted_by_key(metrics)]
        param_list = [entities.Param(key, value) for key, value in sorted_by_key(params)]
        tag_list = [entities.RunTag(key, value) for key, value in sorted_by_key(tags)]
        self._ask(
            f"log_batch to run {run_id}",
            lambda store: store.log_batch(run_id, metric_list, param_list, tag_list),
        )

    def log_inputs(self, run_id: str, inputs: Sequence[DatasetInput]) -> None:
        """Tell which datasets a run has used; idempotent."""
        from mlflow import entities

        datasets = [
            entities.DatasetInput(
                entities.Dataset(
                    each.name,
                    each.digest,
                    each.source_type,
                    each.source,
                    each.schema or None,
                    each.profile or None,
                ),
                [entities.InputTag(key, value) for key, value in each.tags],
            )
            for each in inputs
        ]
        self._ask(
            f"log inputs of run {run_id}",
            lambda store: store.log_inputs(run_id, datasets),
        )

    def update_run(
        self,
        run_id: str,
        *,
        status: str | None = None,
        end_time_ms: int | None = None,
        run_name: str | None = None,
    ) -> None:
        """Change what is given; idempotent."""
        from mlflow.entities import RunStatus

        check_update(status)
        code = None if status is None else RunStatus.from_string(status)
        self._ask(
            f"update run {run_id}",
            lambda store: store.update_run_info(run_id, code, end_time_ms, run_name),
        )

    def delete_run(self, run_id: str) -> None:
        """Delete (MLflow can restore it); a run that is deleted already is no error."""
        try:
            self._ask(f"delete run {run_id}", lambda store: store.delete_run(run_id))
        except RunGone as gone:
            if gone.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise

    def run_url(self, experiment_id: str, run_id: str) -> str:
        """Return the address of the run's page; "" for a database, which has none."""
        if not self.uri.startswith(("http://", "https://")):
            return ""
        return f"{self.uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"

    def close(self) -> None:
        """Close the database connections; the next call opens new ones."""
        with self._lock:
            engine = getattr(self._opened, "engine", None)
            self._opened = None
        if engine is not None:
            engine.dispose()

    def _search_page(
        self, experiment_ids: Sequence[str], run_filter: str, page_token: str | None
    ) -> Any:
        """Return one page of runs, deleted ones too: mlflow's PagedList, with the next token."""
        from mlflow.entities import ViewType

        return self._ask(
            "search runs",
            lambda store: store.search_runs(
                list(experiment_ids), run_filter, ViewType.ALL, SEARCH_PAGE_RUNS, None, page_token
            ),
        )

    def _ask(self, asked: str, question: Callable[[Any], T]) -> T:
        """Put a question to the store. Raises: SinkError, whatever the store raises."""
        store = self._store()
        try:
            return question(store)
        except Exception as error:  # noqa: BLE001  # plugins raise what they like
            raise self._translated(f"{asked} at {self.uri}", error) from None

    def _store(self) -> Any:
        """Return the store, opened at first use. Raises: ServerAway: it cannot be opened.

        Never a permanent error: a wrong address must not turn records into dead letters.
        """
        with self._lock:
            if self._opened is None:
                try:
                    self._opened = _open_store(self._tracking_uri)
                except Exception as error:  # noqa: BLE001  # SQLAlchemy's, a plugin's, mlflow's
                    why = scrub(f"{type(error).__name__}: {error}", self._secrets)[:600]
                    raise ServerAway(f"{self.uri} cannot be opened: {why}") from None
            return self._opened

    def _translated(self, asked: str, error: Exception) -> SinkError:
        """Return the error of our tree that stands for one of the store."""
        text = scrub(str(error), self._secrets)
        status_of = getattr(error, "get_http_status_code", None)
        if isinstance(error, SinkError):
            return error
        if status_of is None:
            return _foreign_error(asked, error, text)
        too_many = _TOO_MANY.search(text)
        if too_many is None and _NO_ANSWER.search(text):
            return ServerAway(f"{asked}: {text[:600]}")
        status = int(too_many.group(1)) if too_many else status_of()
        return make_error(asked, status, str(getattr(error, "error_code", "")), text)

    def _find_experiment(self, name: str) -> Experiment | None:
        """Return an experiment, None if there is none of that name."""
        try:
            found = self._ask(
                f"find experiment {name!r}", lambda store: store.get_experiment_by_name(name)
            )
        except RunGone:  # databricks raises where the others return None
            return None
        if found is None:
            return None
        return Experiment(str(found.experiment_id), found.lifecycle_stage == "deleted")

    def _create_experiment(self, name: str) -> str:
        """Create an experiment and return its id."""
        asked = f"create experiment {name!r}"
        return str(self._ask(asked, lambda store: store.create_experiment(name)))


def _experiments_page(store: Any, page_token: str | None) -> Any:
    from mlflow.entities import ViewType

    return store.search_experiments(ViewType.ALL, SEARCH_PAGE_RUNS, None, None, page_token)


def _open_store(tracking_uri: str) -> Any:
    """Import mlflow and return its store for this URI."""
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking._tracking_service.utils import _get_store

    return _get_store(tracking_uri)  # type: ignore[no-untyped-call]


def _foreign_error(asked: str, error: Exception, text: str) -> SinkError:
    """Return the error for what is no MlflowException: a driver's, a plugin's, a bug's."""
    message = f"{asked}: {type(error).__name__}: {text[:600]}"
    if _LOCKED.search(text.partition("[SQL:")[0]):
        return TryAgain(message)
    no_connection = type(error).__name__ in ("OperationalError", "InterfaceError")
    if isinstance(error, OSError) or no_connection:
        return ServerAway(message)
    return TryAgain(message)


def _run_info(run: Any) -> RunInfo:
    """Return our record of one of mlflow's Run objects."""
    info = run.info
    return RunInfo(
        run_id=info.run_id,
        experiment_id=str(info.experiment_id),
        run_name=info.run_name or "",
        status=info.status,
        start_time_ms=int(info.start_time or 0),
        end_time_ms=info.end_time or None,
        lifecycle_stage=info.lifecycle_stage,
        tags=dict(run.data.tags),
        artifact_uri=info.artifact_uri or "",
    )
