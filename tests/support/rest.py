"""MLflow's REST API, spoken by hand."""

from __future__ import annotations

import http.client
import json
from typing import Any

T0_MS = 1_700_000_000_000


class Api:
    """One client that speaks MLflow's API by hand."""

    def __init__(self, uri: str) -> None:
        self.address = uri.removeprefix("http://")

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any]:
        """Return status and content of an answer."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            kind = {"Content-Type": "application/json"}
            connection.request(method, path, data, {**kind, **(headers or {})})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(content)
        except ValueError:
            return answer.status, content

    def post(self, path: str, /, **body: Any) -> Any:
        """Return the content of a good answer."""
        status, content = self.ask("POST", f"/api/2.0/mlflow/{path}", body)
        assert status == 200, content
        return content

    def get(self, name: str, query: str) -> Any:
        """Return the content of a good answer."""
        status, content = self.ask("GET", f"/api/2.0/mlflow/{name}?{query}")
        assert status == 200, content
        return content

    def new_run(self, **fields: Any) -> str:
        """Return the id of a new run."""
        body = {"experiment_id": "0", "start_time": T0_MS, **fields}
        return str(self.post("runs/create", **body)["run"]["info"]["run_id"])

    def run(self, run_id: str) -> dict[str, Any]:
        """Return status, params, tags and latest metrics."""
        run = self.get("runs/get", f"run_id={run_id}")["run"]
        data = {
            name: {each["key"]: each["value"] for each in run["data"].get(name, [])}
            for name in ("params", "tags", "metrics")
        }
        return {**run["info"], **data}
