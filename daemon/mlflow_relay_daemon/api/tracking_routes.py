"""MLflow's REST API on the local port: what `tracking` serves, and all else passed on.

Handlers run in threads: each may wait for the disk or the server.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import orjson
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from mlflow_relay_daemon.api import files
from mlflow_relay_daemon.api.checks import Body
from mlflow_relay_daemon.api.errors import ApiError, invalid
from mlflow_relay_daemon.api.experiments import Experiments
from mlflow_relay_daemon.api.guard import Guard
from mlflow_relay_daemon.api.run_writes import CREATE_WAIT_S
from mlflow_relay_daemon.api.tracking import Tracking
from mlflow_relay_daemon.api.upstream import Upstream, unanswered
from mlflow_relay_daemon.api.waiting_files import WaitingFiles, named
from mlflow_relay_daemon.api.writer import Writer
from mlflow_relay_daemon.sinks import ServerAway
from mlflow_relay_daemon.sinks.redact import redact_uri

if TYPE_CHECKING:
    from mlflow_relay_daemon.service import Service

log = logging.getLogger(__name__)

PREFIXES = tuple(
    f"/{api}/{version}/mlflow/" for api in ("api", "ajax-api") for version in ("2.0", "3.0")
)
#: What is spoken through a JSON body, ids and all; larger ones are files.
JSON_BYTES_MAX = 64 << 20
MEMORY_BYTES_MAX = 1 << 20  # of a body that is passed on; the rest is on the disk meanwhile
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]

Answering = Callable[[Request], Any]


def routes(service: Service, guard: Guard) -> list[BaseRoute]:
    """Return MLflow's API; stands last, because it passes on whatever nobody else has taken."""
    config = service.config
    is_http = config.tracking_uri.startswith(("http://", "https://")) and not config.offline
    upstream = Upstream(
        config.tracking_uri if is_http else None,
        service.runs.breaker,
        timeout_s=config.request_timeout_s,
    )
    spool = service.runs.spool
    experiments = Experiments(spool.disk, spool.folder, redact_uri(config.tracking_uri))
    writer = Writer(service.runs, service.in_loop)
    tracking = Tracking(service.runs, writer, upstream, experiments)
    waiting = WaitingFiles(tracking.ids, tracking.run_reads, spool.staging.folder)
    doors = _Doors(tracking, upstream, guard, files.Files(spool, writer), waiting)
    return [
        Route("/health", _health),
        Route("/version", doors.version),
        *[
            Route(prefix + name, doors.answering(answer), methods=["POST", "PATCH"])
            for name, answer in tracking.writes.items()
            for prefix in PREFIXES
        ],
        *[
            Route(prefix + name, doors.answering(answer), methods=["GET"])
            for name, answer in tracking.reads.items()
            for prefix in PREFIXES
        ],
        Route("/{rest:path}", doors.pass_on, methods=_METHODS),
    ]


async def _health(_request: Request) -> Response:
    """As MLflow's own: it takes what is logged, so it is well, whatever the server is."""
    return PlainTextResponse("OK")


class _Doors:
    """HTTP on one side, `Tracking` and the server on the other."""

    def __init__(
        self,
        tracking: Tracking,
        upstream: Upstream,
        guard: Guard,
        kept_files: files.Files,
        waiting: WaitingFiles,
    ) -> None:
        self._tracking, self._upstream, self._guard = tracking, upstream, guard
        self._files, self._waiting = kept_files, waiting

    def answering(self, answer: Callable[[Body], dict[str, Any]]) -> Answering:
        """Return the handler of one request of the API."""

        async def handle(request: Request) -> Response:
            data = await request.body()

            def work() -> Response:
                self._guard.check(request)
                content = orjson.dumps(answer(_fields(request, data)))
                return Response(content, media_type="application/json")

            return await run_in_threadpool(_refusals, work)

        return handle

    async def version(self, request: Request) -> Response:
        """The server's version; while it is away, that of MLflow's package here."""

        def work() -> Response:
            try:
                answer = self._upstream.pass_on("GET", "/version", None, {})
                if answer.status == 200:
                    return PlainTextResponse(b"".join(answer.chunks))
            except ServerAway as error:
                log.debug("%s", error)
            from importlib.metadata import version

            return PlainTextResponse(version("mlflow"))

        return await run_in_threadpool(_refusals, work)

    async def pass_on(self, request: Request) -> Response:
        """Everything else is the server's."""
        with tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES_MAX) as body:
            async for chunk in request.stream():
                await run_in_threadpool(body.write, chunk)
            size = body.tell()
            body.seek(0)
            return await run_in_threadpool(_refusals, lambda: self._pass_on(request, body, size))

    def _pass_on(self, request: Request, body: IO[bytes], size: int) -> Response:
        self._guard.check(request)
        path = request.url.path
        if request.method == "GET":
            here = self._of_waiting_files(request)
            if here is not None:
                return here
        # A file must not come to the server before an earlier one of its name.
        elif request.method == "PUT" and self._waiting.waits(path):
            return self._keep(path, body)
        try:
            return self._ask_server(request, body, size)
        except ApiError as error:
            # The server cannot be asked, or does not know the run yet: a file can wait.
            is_away = error.error_code == "TEMPORARILY_UNAVAILABLE"
            place = named(path) if request.method == "PUT" and is_away else None
            if place is None or self._tracking.ids.find(place[0]) is None:
                raise
            return self._keep(path, body)

    def _keep(self, path: str, body: IO[bytes]) -> Response:
        run_id, name = named(path) or ("", "")
        hosted = self._tracking.ids.find(run_id)
        assert hosted is not None  # it was found a moment ago
        self._files.keep(hosted, name, body)
        return JSONResponse({})

    def _of_waiting_files(self, request: Request) -> Response | None:
        """Return the answer about files that wait here; None: it is the server's alone."""
        found = self._waiting.open(request.url.path, request.query_params)
        if found is not None:
            size, pieces = found
            return StreamingResponse(
                iterate_in_threadpool(pieces),
                media_type="application/octet-stream",
                headers={"content-length": str(size)},
            )

        def ask() -> dict[str, Any]:
            query = self._tracking.ids.translated(request.url.query, wait_s=CREATE_WAIT_S)
            return self._upstream.ask_at(f"{request.url.path}?{query}")

        try:
            listing = self._waiting.listing(request.url.path, request.query_params, ask)
        except ServerAway as error:
            raise unanswered(f"GET {request.url.path}", error) from None
        return None if listing is None else JSONResponse(listing)

    def _ask_server(self, request: Request, body: IO[bytes], size: int) -> Response:
        ids = self._tracking.ids
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        target = ids.translated(target, wait_s=CREATE_WAIT_S)
        headers = dict(request.headers)
        is_api = request.url.path.startswith(("/api/", "/ajax-api/"))
        data: bytes | IO[bytes] | None = body if size else None
        is_json = "json" in headers.get("content-type", "")
        if size and size <= JSON_BYTES_MAX and is_json and request.method != "PUT":
            text = body.read().decode("utf-8", "surrogateescape")
            data = ids.translated(text, wait_s=CREATE_WAIT_S).encode("utf-8", "surrogateescape")
            size = len(data)
        if size:
            headers["content-length"] = str(size)  # also if it came in chunks
        if is_api and "mlflow-artifacts" not in request.url.path:
            self._tracking.settle()
        try:
            answer = self._upstream.pass_on(request.method, target, data, headers)
        except ServerAway as error:
            raise unanswered(f"{request.method} {request.url.path}", error) from None
        return StreamingResponse(
            iterate_in_threadpool(answer.chunks), answer.status, headers=answer.headers
        )


def _refusals(work: Callable[[], Response]) -> Response:
    """Return what a handler returns; what it refuses, in MLflow's own form."""
    try:
        return work()
    except ApiError as error:
        return JSONResponse(error.body(), error.status)


def _fields(request: Request, data: bytes) -> Body:
    """Return what a request says: its JSON body, or the query of a GET. Raises: ApiError."""
    if request.method == "GET" and request.query_params:
        return dict(request.query_params)
    if not data:
        return {}
    try:
        content = orjson.loads(data)
        if isinstance(content, str):  # MLflow's oldest clients encode it twice
            content = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request's body is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise invalid("The request's body is no JSON object")
    return content
