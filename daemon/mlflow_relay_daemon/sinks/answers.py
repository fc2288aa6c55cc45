"""An MLflow server's answer → the result, or the right error of the tree. Pure.

Where the words come from: mlflow/exceptions.py (status of each error_code), store/db/utils.py
(every OperationalError becomes 503, every other database error 400 BAD_REQUEST) and answers of a
real 3.17.2 server.
"""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from mlflow_relay_daemon.sinks import (
    Forbidden,
    NotAllowed,
    Refused,
    RunGone,
    ServerAway,
    SinkError,
    TimedOut,
    TryAgain,
)
from mlflow_relay_daemon.sinks.credentials import SET_CREDENTIALS
from mlflow_relay_daemon.sinks.http_client import Answer
from mlflow_relay_daemon.sinks.redact import redact_uri, scrub

MESSAGE_CHARS_MAX = 600  # MLflow quotes whole parameters, up to 6000 characters each

_INACTIVE = re.compile(r"(The )?(run|experiment) \S+ must be in (the )?'active'", re.IGNORECASE)
#: Another request was quicker, or held the lock: the same one passes later.
_RACED = re.compile(
    r"unique constraint|duplicate key|duplicate entry|foreign key|deadlock|is locked|"
    r"lock wait timeout|could not serialize",
    re.IGNORECASE,
)
#: The server is out of database connections: nobody is served.
_POOL_EXHAUSTED = re.compile(r"QueuePool limit|too many (clients|connections)", re.IGNORECASE)
#: The database will never take this content; the last is the file store's 500 for a changed param.
_UNSTORABLE = re.compile(
    r"DataError|NOT NULL constraint|null value in column|cannot contain NUL|"
    r"Changing param values is not allowed",
    re.IGNORECASE,
)
#: SQLAlchemy's errors: "(sqlite3.IntegrityError) ...", "... (Background on this error at: ...)".
_FROM_DATABASE = re.compile(r"^\(|sqlalche\.me|raised as a result of")

_AWAY_STATUSES = frozenset({429, 502, 503, 504})
_WRONG_PLACE_STATUSES = frozenset({404, 405, 410})


def answer_object(asked: str, answer: Answer, now_s: float) -> dict[str, Any]:
    """Return the JSON object of a good answer.

    Args:
        asked: what was asked, for the message, e.g. "log_batch to run 12ab at http://host:5000".
        now_s: seconds since 1970; a Retry-After may be a date.
    Raises:
        SinkError: the answer is none that MLflow gives when all went well.
    """
    content = _json_object(answer.body)
    if (
        answer.status == 200
        and content is not None
        and not content.keys() & {"error_code", "error"}
    ):
        return content
    if answer.status == 200:
        raise not_mlflow(asked, answer)
    if 300 <= answer.status < 400:
        raise _redirected(asked, answer)
    error_code = str((content or {}).get("error_code", ""))
    message = str((content or {}).get("message", "")) if error_code else gist(answer.body)
    raise make_error(
        asked,
        answer.status,
        error_code,
        scrub(message, answer.secrets),
        retry_after_s(answer.headers.get("retry-after", ""), now_s),
    )


def make_error(
    asked: str,
    status: int,
    error_code: str,
    message: str,
    retry_after: float | None = None,
) -> SinkError:
    """Return the error that stands for a refusal, with the hint that helps."""
    kind = classify(status, error_code, message)
    said = message if len(message) <= MESSAGE_CHARS_MAX else message[:MESSAGE_CHARS_MAX] + "..."
    text = f"{asked}: HTTP {status} {error_code or '(not in MLflow JSON)'}: {said}"
    hint = _hint(status, error_code, message)
    if hint:
        text = f"{text} ({hint})"
    if issubclass(kind, ServerAway | TryAgain):
        return kind(text, error_code, retry_after)
    return kind(text, error_code)


def classify(status: int, error_code: str, message: str) -> type[SinkError]:
    """Return which error of the tree a refusal is.

    Args:
        error_code: MLflow's own, "" if the body was not MLflow's JSON.
    """
    if status == 401:
        return NotAllowed
    if status == 403:
        known_to_mlflow = bool(error_code) or message.startswith("Permission denied")
        return Forbidden if known_to_mlflow else NotAllowed
    if status in _WRONG_PLACE_STATUSES:
        missing = error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
        return RunGone if missing else ServerAway
    if status == 413:
        return Refused
    # SQLAlchemy quotes the statement and its values: look for words only in front of them.
    reason = message.partition("[SQL:")[0]
    if error_code and _RACED.search(reason) and _is_database_trouble(status, error_code):
        return TryAgain
    if status in _AWAY_STATUSES or _POOL_EXHAUSTED.search(reason):
        return TimedOut if status == 504 else ServerAway
    if error_code and _INACTIVE.match(message):
        return RunGone
    if status == 400 and error_code:
        return _classify_bad_request(error_code, reason)
    if error_code and _UNSTORABLE.search(reason):
        return Refused
    return TryAgain


def retry_after_s(value: str, now_s: float) -> float | None:
    """Return the seconds to wait that a Retry-After header asks for (seconds or an HTTP date)."""
    value = value.strip()
    if not value:
        return None
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now_s)
    except (TypeError, ValueError, OverflowError):
        return None


def not_mlflow(asked: str, answer: Answer) -> ServerAway:
    """Return the error for a 200 that no MLflow server gives: a login page, another service."""
    said = scrub(gist(answer.body), answer.secrets)
    return ServerAway(
        f"{asked}: the server answers, but not as an MLflow server: {said!r} "
        "(is the tracking URI right? a login page or another service may stand there)"
    )


def gist(body: bytes) -> str:
    """Return the start of a body that is no JSON, as one line of text."""
    text = body[:4000].decode("utf-8", "replace")
    text = re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    return " ".join(text.split())[:200]


def _is_database_trouble(status: int, error_code: str) -> bool:
    return status >= 500 or error_code == "BAD_REQUEST"


def _classify_bad_request(error_code: str, reason: str) -> type[SinkError]:
    """Tell a refused content from database trouble that MLflow also calls a bad request."""
    if error_code == "BAD_REQUEST" and _FROM_DATABASE.search(reason):
        return Refused if _UNSTORABLE.search(reason) else TryAgain
    return Refused


def _redirected(asked: str, answer: Answer) -> ServerAway:
    location = answer.headers.get("location", "")
    target = scrub(redact_uri(location), answer.secrets)
    # The address without the API's path is what the tracking URI should be.
    base = target.partition("/api/2.0/")[0].removesuffix("/version")
    return ServerAway(
        f"{asked}: HTTP {answer.status}, redirected to {target or 'nowhere'}; redirects are not "
        f"followed: set the tracking URI to {base or 'the right address'}"
    )


def _hint(status: int, error_code: str, message: str) -> str:
    """Return what to do about it, "" where the server's words are enough."""
    if status == 401:
        return SET_CREDENTIALS
    if status == 403 and "Host header" in message:
        return (
            "MLflow's security middleware does not know this host name: start the server with "
            "--allowed-hosts naming it, or use an address that it allows"
        )
    if status == 403:
        return f"these credentials may not do this; {SET_CREDENTIALS} of a user who may"
    if status in _WRONG_PLACE_STATUSES and classify(status, error_code, message) is ServerAway:
        return "no MLflow API at this address: is the tracking URI right, its path prefix included?"
    if status == 413:
        return "a proxy in front of MLflow limits the size of a request"
    return ""


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None
