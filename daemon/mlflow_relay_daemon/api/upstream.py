"""The MLflow server behind the local endpoint: requests go on, answers come back as they are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import quote, urlencode

import orjson

from mlflow_relay import clock
from mlflow_relay_daemon.api.errors import ApiError, away
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.sinks import ServerAway
from mlflow_relay_daemon.sinks.http_client import HttpClient

API = "/api/2.0/mlflow/"
#: After a failure nobody waits for the server for so long: a training that asks does not stand
#: still for one connect timeout after the other.
HOLD_OFF_S = 5.0
CONNECT_TIMEOUT_S = 3.0
CONNECTIONS_MAX = 64  # a page of the UI asks for a dozen things at once
CHUNK_BYTES = 1 << 16
#: Between one connection and the next; what stands here is no part of the request itself.
_HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te"),
        *("trailers", "transfer-encoding", "upgrade"),
    }
)
#: Of a request: ours to set, or words for the local endpoint alone.
_NOT_PASSED_ON = _HOP_BY_HOP | {"host", "authorization", "origin", "referer"}


@dataclass(frozen=True)
class Answer:
    """What the server says."""

    status: int
    headers: dict[str, str]
    chunks: Iterator[bytes]


class Upstream:
    """One server; safe for many threads.

    Args:
        tracking_uri: None: there is none that could be asked (offline, or a database).
        breaker: of the same server; delivery may know that it is back.
    """

    def __init__(
        self, tracking_uri: str | None, breaker: Breaker | None, *, timeout_s: float
    ) -> None:
        self._breaker = breaker
        self._http = tracking_uri and HttpClient(
            tracking_uri,
            timeout_s=timeout_s,
            connect_timeout_s=CONNECT_TIMEOUT_S,
            connections_max=CONNECTIONS_MAX,
        )
        self._failed_s, self._failed_ms = float("-inf"), 0

    def is_away(self) -> bool:
        """Return whether it did not answer a moment ago."""
        if not self._http or time.monotonic() - self._failed_s >= HOLD_OFF_S:
            return not self._http
        seen = self._breaker.snapshot() if self._breaker else None
        is_back = seen is not None and seen.state == "up" and seen.since_ms > self._failed_ms
        return not is_back

    def pass_on(
        self, method: str, target: str, body: bytes | IO[bytes] | None, headers: Mapping[str, str]
    ) -> Answer:
        """Return the server's answer to a request. Raises: ServerAway."""
        if not self._http:
            raise ServerAway("this daemon has no MLflow server to ask")
        if self.is_away():
            raise ServerAway(f"{self._http.uri} did not answer a moment ago")
        passed = {key: value for key, value in headers.items() if key not in _NOT_PASSED_ON}
        try:
            response = self._http.open(method, target, body, passed)
        except ServerAway:
            self._failed_s, self._failed_ms = time.monotonic(), clock.now_ms()
            raise
        kept = {
            key.lower(): value
            for key, value in response.headers.items()
            if key.lower() not in _HOP_BY_HOP
        }
        return Answer(response.status, kept, _chunks(response))

    def ask(
        self, method: str, name: str, fields: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the JSON object of one request of MLflow's API.

        Raises: ServerAway; ApiError: the server's own refusal.
        """
        target = API + quote(name)
        if method == "GET":
            return self.ask_at(f"{target}?{urlencode(fields or {}, doseq=True)}")
        return self.ask_at(target, method, orjson.dumps(fields or {}))

    def ask_at(self, target: str, method: str = "GET", body: bytes | None = None) -> dict[str, Any]:
        """Return the JSON object that an address answers with.

        Raises: ServerAway; ApiError: the server's own refusal.
        """
        headers = {"accept": "application/json"}
        if body is not None:
            headers["content-type"] = "application/json"
        answer = self.pass_on(method, target, body, headers)
        content = _object(b"".join(answer.chunks))
        if answer.status == 200 and content is not None:
            return content
        if content is not None and "error_code" in content and answer.status < 500:
            raise Told(answer.status, content)
        raise ServerAway(f"the MLflow server answers {answer.status} to {target}")


class Told(ApiError):
    """The server's own refusal, with its own code."""

    def __init__(self, status: int, content: Mapping[str, Any]) -> None:
        Exception.__init__(self, str(content.get("message", "")))
        self.error_code, self.status = str(content["error_code"]), status


def unanswered(what: str, error: ServerAway) -> ApiError:
    """Return the error for a question that only the server can answer.

    Not 503: MLflow's client would ask again for four minutes, and training would stand still.
    """
    found = away(f"{what} cannot be answered while the MLflow server is away ({error})")
    found.status = 424
    return found


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def _chunks(response: Any) -> Iterator[bytes]:
    try:
        yield from response.stream(CHUNK_BYTES, decode_content=False)
    finally:
        response.release_conn()
