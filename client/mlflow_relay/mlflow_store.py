"""`MLFLOW_TRACKING_URI=relay://`: MLflow's own client code on the relay. Imported by MLflow alone.

Hot writes (metrics, params, tags, the end) go into a journal of this process, as a rank's do; all
else goes to the daemon's local endpoint, which speaks MLflow's API. Before anything is asked there,
the daemon has what was logged before.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Any

from mlflow.entities import RunInfo, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.store.model_registry.rest_store import RestStore as RegistryRestStore
from mlflow.store.tracking.rest_store import RestStore
from mlflow.utils import validation
from mlflow.utils.async_logging.run_operations import RunOperations
from mlflow.utils.rest_utils import MlflowHostCreds, http_request

from . import clock, records, values
from .errors import RelayError
from .mlflow_artifacts import to_ours, to_servers
from .mlflow_door import Door, Endpoint, read_uri
from .mlflow_writer import RunWriter

_ENDS = frozenset({"FINISHED", "FAILED", "KILLED"})
#: Keys that MLflow's rules have passed; a program that makes up keys for ever must not grow.
_GOOD_KEYS_MAX = 100_000
_PARAM_CHARS_MAX = 6000  # mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
_NUMBERS = (float, int)


class _ThroughDoor:
    """What the tracking store and the model registry have in common."""

    def __init__(self, store_uri: str | None = None, artifact_uri: str | None = None) -> None:
        try:
            self.door = Door(read_uri(store_uri or "relay://"))
        except RelayError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None
        super().__init__(self.credentials)  # type: ignore[call-arg]

    def credentials(self) -> MlflowHostCreds:
        """Return where to ask. While no daemon answers, where one did: MLflow asks for it also to
        print an address, at the end of a run.

        Raises: MlflowException: no daemon has ever answered.
        """
        endpoint = self.door.last or self._endpoint()
        return MlflowHostCreds(host=endpoint.url, token=endpoint.token)

    def _endpoint(self) -> Endpoint:
        """Return where the daemon answers now. Raises: MlflowException: at once, not after
        minutes of retries."""
        try:
            return self.door.endpoint()
        except (RelayError, OSError) as error:
            raise MlflowException(str(error), TEMPORARILY_UNAVAILABLE) from None

    def _call_endpoint(self, api: Any, json_body: Any = None, *more: Any, **options: Any) -> Any:
        self._endpoint()
        body = to_servers(json_body) if isinstance(json_body, str) else json_body
        ask: Any = super()
        answer = ask._call_endpoint(api, body, *more, **options)  # noqa: SLF001  # our own
        _show_ours(answer)
        return answer


class RelayRegistryStore(_ThroughDoor, RegistryRestStore):
    """The model registry, passed on to the server."""


class RelayStore(_ThroughDoor, RestStore):  # type: ignore[misc]
    """The tracking store of `relay://`."""

    def __init__(self, store_uri: str | None = None, artifact_uri: str | None = None) -> None:
        super().__init__(store_uri, artifact_uri)
        self._writers: dict[str, RunWriter] = {}
        self._infos: dict[str, RunInfo] = {}  # of runs that this process has begun
        self._good_keys: set[str] = set()
        self._lock = Lock()

    def _endpoint(self) -> Endpoint:
        """Return where the daemon answers, once it has what was logged before."""
        found = super()._endpoint()
        for writer in list(self._writers.values()):
            if not writer.settle():
                raise MlflowException(
                    "the daemon has not taken what was logged before: its disk may be full or "
                    "stuck, see `mlflow-relay status`; nothing is lost",
                    TEMPORARILY_UNAVAILABLE,
                )
        return found

    # ── runs ──

    def create_run(self, *arguments: Any, **named: Any) -> Any:
        """Create a run; if this process vanishes, it has failed."""
        run = super().create_run(*arguments, **named)
        self._begin(run.info)
        return run

    def update_run_info(
        self, run_id: str, run_status: Any, end_time: int | None, run_name: str | None
    ) -> Any:
        """Change status, end or name; the end of a run of this process needs no daemon."""
        writer = self._writers.get(run_id)
        status = None if run_status is None else RunStatus.to_string(run_status)
        if writer is not None and writer.is_rank and status in _ENDS:
            return self._end(run_id, writer, status, end_time or clock.now_ms(), run_name)
        info = super().update_run_info(run_id, run_status, end_time, run_name)
        if status == "RUNNING" and (writer is None or not writer.is_rank):
            self._begin(info)
        return info

    def delete_run(self, run_id: str) -> None:
        """Delete a run: what is logged to it from now on is refused."""
        with self._lock:
            writer = self._writers.pop(run_id, None)
        if writer is not None:
            writer.leave()
        super().delete_run(run_id)

    def get_run(self, run_id: str) -> Any:
        """Return a run; while no daemon answers, what this process knows of its own."""
        try:
            return super().get_run(run_id)
        except MlflowException as error:
            info = self._infos.get(run_id)
            if info is None or error.error_code != "TEMPORARILY_UNAVAILABLE":
                raise
            from mlflow.entities import Run, RunData

            return Run(info, RunData())

    def _begin(self, info: RunInfo) -> None:
        with self._lock:
            before = self._writers.pop(info.run_id, None)
            self._writers[info.run_id] = self._new_writer(info.run_id, is_rank=True)
            self._infos[info.run_id] = info
        if before is not None:
            before.leave()

    def _end(
        self, run_id: str, writer: RunWriter, status: str, end_ms: int, run_name: str | None
    ) -> RunInfo:
        if run_name:
            writer.append(records.pack_tags({"mlflow.runName": run_name}, clock.now_ms()))
        with self._lock:
            self._writers.pop(run_id, None)
            known = self._infos.pop(run_id)
        writer.end(status, end_ms)
        return RunInfo(
            run_id=run_id,
            experiment_id=known.experiment_id,
            user_id=known.user_id,
            status=status,
            start_time=known.start_time,
            end_time=end_ms,
            lifecycle_stage=known.lifecycle_stage,
            artifact_uri=known.artifact_uri,
            run_name=run_name or known.run_name,
        )

    # ── what is logged ──

    def log_metric(self, run_id: str, metric: Any) -> None:
        self._log_metrics(run_id, (metric,), self._checked((metric,)))

    def log_param(self, run_id: str, param: Any) -> None:
        validation._validate_param(param.key, param.value)  # noqa: SLF001  # MLflow's own rules
        self._log_params(run_id, {param.key: param.value})

    def set_tag(self, run_id: str, tag: Any) -> None:
        validation._validate_tag(tag.key, tag.value)  # noqa: SLF001
        self._writer(run_id).append(records.pack_tags({tag.key: _text(tag)}, clock.now_ms()))

    def log_batch(
        self, run_id: str, metrics: Sequence[Any], params: Sequence[Any], tags: Sequence[Any]
    ) -> None:
        """Log what one request may hold; all of it is checked before any of it is kept."""
        validation._validate_batch_log_limits(metrics, params, tags)  # noqa: SLF001
        points = self._checked(metrics)
        if params or tags:
            validation._validate_batch_log_data((), params, tags)  # noqa: SLF001
            validation._validate_param_keys_unique(params)  # noqa: SLF001
            self._log_params(run_id, {each.key: each.value for each in params})
        self._log_metrics(run_id, metrics, points)
        if tags:
            items = {each.key: _text(each) for each in tags}
            self._append_texts(run_id, records.pack_tags, items)

    def log_batch_async(
        self, run_id: str, metrics: Sequence[Any], params: Sequence[Any], tags: Sequence[Any]
    ) -> RunOperations:
        """As `log_batch`, which takes microseconds: nothing waits in a queue that dies with us."""
        done: Future[None] = Future()
        try:
            self.log_batch(run_id, metrics, params, tags)
            done.set_result(None)
        except MlflowException as error:
            done.set_exception(error)
        return RunOperations([done])

    def _log_metrics(
        self, run_id: str, metrics: Sequence[Any], points: Sequence[tuple[str, float, int, int]]
    ) -> None:
        if any(
            getattr(each, "model_id", None) or getattr(each, "dataset_name", None)
            for each in metrics
        ):
            super().log_batch(run_id, metrics, [], [])  # it belongs to a model, too
            return
        times_ms = dict.fromkeys(timestamp_ms for *_, timestamp_ms in points)
        for time_ms in times_ms:  # one, as a rule
            part = points if len(times_ms) == 1 else [each for each in points if each[3] == time_ms]
            keys, values, steps, _ = zip(*part, strict=True)
            self._writer(run_id).append(records.pack_points(keys, values, steps, time_ms))

    def _checked(self, metrics: Sequence[Any]) -> list[tuple[str, float, int, int]]:
        """Return (key, value, step, timestamp in ms) of each: what MLflow's entities hold is slow
        to ask for.

        Raises: MlflowException: MLflow would not take one.
        """
        points = []
        for each in metrics:
            key, value, step, timestamp_ms = each.key, each.value, each.step, each.timestamp
            is_plain = type(value) in _NUMBERS and type(timestamp_ms) is int and type(step) is int
            if not (is_plain and key in self._good_keys):
                validation._validate_metric(key, value, timestamp_ms, step)  # noqa: SLF001
                if not is_plain:
                    value, step, timestamp_ms = float(value), int(step), int(timestamp_ms)
                    each._value, each._step, each._timestamp = value, step, timestamp_ms  # noqa: SLF001
                if len(self._good_keys) >= _GOOD_KEYS_MAX:
                    self._good_keys.clear()
                self._good_keys.add(key)
            points.append((key, value, step, timestamp_ms))
        return points

    def _log_params(self, run_id: str, items: dict[str, str]) -> None:
        if not items:
            return
        known = self._writer(run_id).params
        texts = {key: str(value)[:_PARAM_CHARS_MAX] for key, value in items.items()}
        for key, value in texts.items():
            if known.get(key, value) != value:
                raise MlflowException(
                    f"Changing param values is not allowed. Param with key='{key}' was already "
                    f"logged with value='{known[key]}' for run ID='{run_id}'. Attempted logging "
                    f"new value '{value}'.",
                    INVALID_PARAMETER_VALUE,
                )
        self._append_texts(run_id, records.pack_params, texts)
        known.update(texts)

    def _append_texts(self, run_id: str, pack: Any, items: dict[str, str]) -> None:
        for part in values.text_chunks(items):
            self._writer(run_id).append(pack(part, clock.now_ms()))

    # ── the journals ──

    def _writer(self, run_id: str) -> RunWriter:
        writer = self._writers.get(run_id)
        if writer is not None:
            return writer
        with self._lock:
            writer = self._writers.get(run_id)
            if writer is None:
                writer = self._writers[run_id] = self._new_writer(run_id, is_rank=False)
            return writer

    def _new_writer(self, run_id: str, *, is_rank: bool) -> RunWriter:
        """Raises: MlflowException: the server does not know the run, or no daemon answers."""
        from mlflow.utils.rest_utils import verify_rest_response

        address = "/api/2.0/mlflow/relay/run"
        endpoint = super()._endpoint()
        creds = MlflowHostCreds(host=endpoint.url, token=endpoint.token)
        answer = http_request(creds, address, "GET", params={"run_id": run_id})
        found = verify_rest_response(answer, address).json()
        try:
            return RunWriter(found, self.door.options, is_rank=is_rank)
        except RelayError as error:
            raise MlflowException(str(error), TEMPORARILY_UNAVAILABLE) from None


def _text(entity: Any) -> str:
    return "" if entity.value is None else str(entity.value)


def _show_ours(message: Any) -> None:
    """Put addresses of artifacts into an answer that MLflow's client can use with relay://."""
    for name in ("run", "run_info", "model", "trace_info", "trace"):
        if hasattr(message, name) and message.HasField(name):
            _show_ours(getattr(message, name))
    for name in ("runs", "models", "traces"):
        for each in getattr(message, name, ()):
            _show_ours(each)
    if hasattr(message, "info") and message.HasField("info"):
        _show_ours(message.info)
    if hasattr(message, "artifact_uri"):
        message.artifact_uri = to_ours(message.artifact_uri)
    for tag in getattr(message, "tags", ()):
        if getattr(tag, "key", "") == "mlflow.artifactLocation":
            tag.value = to_ours(tag.value)
