"""Looks at MLflow from outside, through its REST API, as any client would; nothing of the relay."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from .witness import Point

ANSWER_TIMEOUT_S = 10.0
PAGE_POINTS = 25_000  # what MLflow gives at once


@dataclass(frozen=True)
class RunSeen:
    """A run as MLflow knows it."""

    run_id: str
    experiment_id: str
    status: str
    keys: list[str]  #: of its metrics


class MlflowApi:
    """Talks to the server on this machine.

    Raises: OSError, http.client.HTTPException, ValueError: in any method, no good answer.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    def runs(self, experiment_name: str) -> list[RunSeen]:
        """Return all runs of an experiment."""
        found = self._get("experiments/get-by-name", experiment_name=experiment_name)
        experiment_id = found["experiment"]["experiment_id"]
        answer = self._ask("POST", "runs/search", {"experiment_ids": [experiment_id]})
        return [
            RunSeen(
                run["info"]["run_id"],
                experiment_id,
                run["info"]["status"],
                [each["key"] for each in run["data"].get("metrics", [])],
            )
            for run in answer.get("runs", [])
        ]

    def history(self, run_id: str, key: str) -> list[Point]:
        """Return every point of one metric."""
        points: list[Point] = []
        page: dict[str, str] = {}
        while True:
            answer = self._get(
                "metrics/get-history",
                run_id=run_id,
                metric_key=key,
                max_results=str(PAGE_POINTS),
                **page,
            )
            points += [
                (each["key"], int(each.get("step", 0)), float(each["value"]))
                for each in answer.get("metrics", [])
            ]
            if not answer.get("next_page_token"):
                return points
            page = {"page_token": answer["next_page_token"]}

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        return self._ask("GET", f"{path}?{urlencode(query)}")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request(
                method,
                f"/api/2.0/mlflow/{path}",
                None if body is None else json.dumps(body),
                {"Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise ValueError(f"{path.partition('?')[0]}: HTTP {answer.status}: {content[:200]!r}")
        read: dict[str, Any] = json.loads(content)
        return read
