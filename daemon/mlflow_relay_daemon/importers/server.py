"""An MLflow server as a source: its REST API, page by page."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import orjson

from mlflow_relay_daemon.artifacts.source import NoSuchContent, Source
from mlflow_relay_daemon.batch import METRICS_MAX, Points
from mlflow_relay_daemon.importers.foreign import (
    Texts,
    make_card,
    make_input,
    make_texts,
    text_chunks,
)
from mlflow_relay_daemon.sinks import Metric, SinkError
from mlflow_relay_daemon.sinks.answers import answer_object
from mlflow_relay_daemon.sinks.http_client import HttpClient
from mlflow_relay_daemon.sync.artifacts import Wanted, mark_of, wanted_file
from mlflow_relay_daemon.sync.source import Chunk, ForeignRun, Size, SourceError

API = "/api/2.0/mlflow"
PAGE_RUNS = 200
PAGE_POINTS = 25_000  # mlflow.server.handlers: what get-history answers at most at once
TRIES = 3  # of one question; a sync that is called again goes on where it was


class SourceServer:
    """The questions that an importer has. Raises: ValueError: this is no address."""

    def __init__(self, uri: str, *, timeout_s: float) -> None:
        self._http = HttpClient(uri, timeout_s=timeout_s, connect_timeout_s=5.0, connections_max=8)
        self.uri = self._http.uri

    def ask(self, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Return the answer. Raises: SourceError."""
        method, data = ("GET", None) if body is None else ("POST", orjson.dumps(body))
        for attempt in range(1, TRIES + 1):
            try:
                answer = self._http.exchange(method, API + path, data)
                asked = f"{path.partition('?')[0]} at {self.uri}"
                return answer_object(asked, answer, time.time())
            except SinkError as error:
                if attempt == TRIES:
                    raise SourceError(f"the source does not answer: {error}") from None
                time.sleep(attempt)
        raise AssertionError

    def experiments(self) -> dict[str, str]:
        """Return the names of all experiments by id."""
        pages = self._pages("/experiments/search", {"view_type": "ALL", "max_results": 1000})
        return {
            str(each["experiment_id"]): str(each["name"])
            for page in pages
            for each in page.get("experiments", [])
        }

    def runs(self, experiment_ids: list[str], *, include_deleted: bool) -> Iterator[dict[str, Any]]:
        """Yield the runs of these experiments."""
        body = {
            "experiment_ids": experiment_ids,
            "run_view_type": "ALL" if include_deleted else "ACTIVE_ONLY",
            "max_results": PAGE_RUNS,
            "order_by": ["attributes.start_time ASC"],
        }
        for page in self._pages("/runs/search", body):
            yield from page.get("runs", [])

    def history(self, run_id: str, key: str) -> Iterator[list[dict[str, Any]]]:
        """Yield all points of one metric, page by page; servers of old answer with one page."""
        query = {"run_id": run_id, "metric_key": key, "max_results": str(PAGE_POINTS)}
        while True:
            page = self.ask(f"/metrics/get-history?{urlencode(query)}")
            yield page.get("metrics", [])
            if not page.get("next_page_token"):
                return
            query["page_token"] = page["next_page_token"]

    def files(self, run_id: str, folder: str = "") -> Iterator[tuple[str, int]]:
        """Yield path and size of all artifacts of a run."""
        query = urlencode({"run_id": run_id, **({"path": folder} if folder else {})})
        for each in self.ask(f"/artifacts/list?{query}").get("files", []):
            if each.get("is_dir"):
                yield from self.files(run_id, each["path"])
            else:
                yield each["path"], int(each.get("file_size") or 0)

    @contextmanager
    def fetch(self, run_id: str, path: str) -> Iterator[Source]:
        """Have an artifact in a file for as long as the context lasts.

        Raises: NoSuchContent; OSError: no space for it here.
        """
        query = urlencode({"run_uuid": run_id, "path": path})
        with tempfile.TemporaryDirectory(prefix="mlflow-relay-") as folder:
            file = Path(folder, "artifact")
            try:
                with file.open("wb") as opened:
                    self._http.fetch(f"/get-artifact?{query}", opened)
            except SinkError as error:
                raise NoSuchContent(f"the source does not give it: {error}") from None
            with wanted_file(path, file).open() as source:
                yield source

    def _pages(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        while True:
            page = self.ask(path, body)
            yield page
            if not page.get("next_page_token"):
                return
            body["page_token"] = page["next_page_token"]


@dataclass
class ServerRun(ForeignRun):
    """One run of a server."""

    server: SourceServer | None = None
    run_id: str = ""
    keys: list[str] = field(default_factory=list)
    texts: Texts = field(default_factory=lambda: Texts({}, {}, *[frozenset()] * 3))

    def size(self) -> Size:
        """Nothing is known before it is read."""
        return Size()

    def chunks(self, seen: Mapping[str, int]) -> Iterator[Chunk]:
        """Yield params and tags, then the metrics that have another number of points than before.

        A server sorts by time, so new points may stand anywhere: a metric that has grown is sent
        whole, and MLflow ignores what it has.
        """
        assert self.server is not None
        yield from text_chunks(self.texts, self.card.start_ms, seen)
        for key in self.keys:
            if key in seen and seen[key] == self._count(key):
                continue
            count = 0
            for page in self.server.history(self.run_id, key):
                for at in range(0, len(page), METRICS_MAX):
                    points = [_point(each) for each in page[at : at + METRICS_MAX]]
                    count += len(points)
                    yield Chunk([Points(max(point[2] for point in points), points)], {})
            yield Chunk([], {key: count})

    def wanted(self) -> list[Wanted]:
        """Return its artifacts; what they are is told by their size, and known when they come."""
        server = self.server
        assert server is not None
        return [
            Wanted(path, size, mark_of(size, b""), partial(server.fetch, self.run_id, path))
            for path, size in server.files(self.run_id)
        ]

    def _count(self, key: str) -> int:
        assert self.server is not None
        return sum(len(page) for page in self.server.history(self.run_id, key))


def find_runs(
    server: SourceServer, *, include_deleted: bool, experiment_name: str | None
) -> Iterator[ForeignRun | SourceError]:
    """Yield the runs of a server. Raises: SourceError: it does not answer."""
    experiments = server.experiments()
    for experiment_id, name in sorted(experiments.items()):
        for run in server.runs([experiment_id], include_deleted=include_deleted):
            yield _read_run(server, run, experiment_name or name)


def _read_run(server: SourceServer, run: dict[str, Any], experiment: str) -> ServerRun:
    info, data = run["info"], run.get("data", {})
    run_id = str(info["run_id"])
    params, tags = _texts(data.get("params")), _texts(data.get("tags"))
    texts = make_texts(run_id, params, tags, is_server=True)
    inputs = (run.get("inputs") or {}).get("dataset_inputs") or []
    return ServerRun(
        card=make_card(
            run_id,
            name=info.get("run_name", ""),
            experiment=experiment,
            user=info.get("user_id", ""),
            start_ms=int(info.get("start_time") or 0),
            tags=tags,
        ),
        kind="server",
        where=f"{server.uri}:{run_id}",
        status=info["status"],
        end_ms=int(info["end_time"]) if info.get("end_time") else None,
        is_deleted=info.get("lifecycle_stage") == "deleted",
        inputs=[make_input(each["dataset"], _texts(each.get("tags"))) for each in inputs],
        server=server,
        run_id=run_id,
        keys=sorted(each["key"] for each in data.get("metrics", [])),
        texts=texts,
        **texts.fields(),
    )


def _point(metric: Mapping[str, Any]) -> Metric:
    """Return one point; protobuf writes NaN and infinities as text, and leaves out zeroes."""
    return (
        str(metric["key"]),
        float(metric.get("value", 0.0)),
        int(metric.get("timestamp", 0)),
        int(metric.get("step", 0)),
    )


def _texts(pairs: list[dict[str, str]] | None) -> dict[str, str]:
    return {each["key"]: each.get("value", "") for each in pairs or []}
