"""Health for Kubernetes, load balancers and people: does the loop turn, does the disk take records?

The MLflow server has no part in it: a daemon whose server is away does what it is there for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Route

if TYPE_CHECKING:
    from starlette.requests import Request

    from mlflow_relay_daemon.service import Service

#: A turn of the loop takes one fsync, and a busy disk may need seconds for it.
LIVE_S_MAX = 60.0
READY_S_MAX = 5.0


def routes(service: Service) -> list[BaseRoute]:
    """Return /health/live and /health/ready."""

    def live(_request: Request) -> PlainTextResponse:
        return _answer(_stalled(service, LIVE_S_MAX))

    def ready(_request: Request) -> PlainTextResponse:
        return _answer(_stalled(service, READY_S_MAX) or unready_reason(service))

    return [Route("/health/live", live), Route("/health/ready", ready)]


def unready_reason(service: Service) -> str:
    """Return why nothing is acknowledged now; "": the disk takes what comes."""
    if service.is_full:
        return "the spool's disk does not take records: it is full, at its quota, or failing"
    return ""


def _stalled(service: Service, limit_s: float) -> str:
    idle_s = service.stalled_s()
    if idle_s <= limit_s:
        return ""
    return f"the loop has not turned for {idle_s:.0f} s: the spool's disk may be stuck"


def _answer(reason: str) -> PlainTextResponse:
    return PlainTextResponse(reason or "ok", 503 if reason else 200)
