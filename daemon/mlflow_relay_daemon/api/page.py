"""A page for those who would rather look than read: one static file, and the data that it shows."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import BaseRoute, Route

from mlflow_relay_daemon.api.peers import request_uid

if TYPE_CHECKING:
    from starlette.requests import Request

    from mlflow_relay_daemon.service import Service

PAGE = Path(__file__).with_name("page.html")
LETTERS_MAX = 200  # of one run; `mlflow-relay dead-letters list` has all


def routes(service: Service) -> list[BaseRoute]:
    """Return /relay/ and its data, each user's own."""
    html = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }

    def page(_request: Request) -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    def status(request: Request) -> JSONResponse:
        uid = request_uid(request)
        return JSONResponse(service.in_loop(lambda: service.status_for(uid)), headers=headers)

    def letters(request: Request) -> JSONResponse:
        uid, run_id = request_uid(request), request.path_params["run_id"]
        found: list[dict[str, Any]] = [
            asdict(letter)
            for hosted in service.runs.of_user(uid)
            if hosted.run.card.run_id == run_id
            for letter in hosted.letters.list()[:LETTERS_MAX]
        ]
        return JSONResponse(_strict(found), headers=headers)

    return [
        Route("/relay/", page),
        Route("/relay/status", status),
        Route("/relay/dead-letters/{run_id}", letters),
    ]


def content_security_policy(html: str) -> str:
    """Return a policy by which a browser runs this page's own script and asks nobody else. Pure."""
    rules = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"]
    rules += ["frame-ancestors 'none'", "img-src data:"]
    for tag in ("script", "style"):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(rules)


def _strict(letters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no NaN: values are shown as text."""
    return [{**letter, "value": str(letter["value"])} for letter in letters]
