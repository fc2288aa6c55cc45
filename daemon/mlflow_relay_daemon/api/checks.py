"""Bodies of MLflow's API → checked values, or the server's own refusal. Pure.

The rules and words are those of mlflow.server.handlers and mlflow.utils.validation. One rule is
ours: where a field has a wrong type, the server answers 200 and drops the rest of the body; here it
is refused.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_relay_daemon.api.errors import ApiError, invalid
from mlflow_relay_daemon.batch import ENTITIES_MAX, METRICS_MAX, PARAMS_MAX, TAGS_MAX
from mlflow_relay_daemon.sinks import Metric

Body = Mapping[str, Any]

KEY_CHARS_MAX = 250  # MAX_ENTITY_KEY_LENGTH
#: MLflow keeps 6000 characters of a param and 8000 of a tag; more than this is no value any more.
VALUE_CHARS_MAX = 1 << 19
INT64_MAX = (1 << 63) - 1
STATUSES = ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED")
_SEE = " See the API docs for more information about request parameters."
_NAME = re.compile(r"[/\w.\- :]*")
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
_RUN_ID = re.compile(r"[a-zA-Z0-9][\w\-]{0,255}")
#: Fields of a metric that no record has; with one of them the request is kept as it is.
MODEL_FIELDS = ("model_id", "dataset_name", "dataset_digest")


@dataclass(frozen=True)
class LogBatch:
    """What is to be logged."""

    metrics: list[Metric]
    params: dict[str, str]
    tags: dict[str, str]
    #: metrics that belong to a model or a dataset too, as they came
    model_metrics: list[dict[str, Any]]


def log_batch(body: Body) -> LogBatch:
    """Return what a runs/log-batch asks for. Raises: ApiError."""
    if not is_run_id(run_id(body)):
        raise _wrong("run_id", run_id(body))
    lists = {name: _list(body, name) for name in ("metrics", "params", "tags")}
    for name, entries in lists.items():
        for index, each in enumerate(entries):
            _present(each, "key", f"{name}[{index}].key")
            if name == "metrics":
                _present(each, "value", f"{name}[{index}].value")
                _present(each, "timestamp", f"{name}[{index}].timestamp")
    metrics = [metric(each, f"metrics[{at}]") for at, each in enumerate(lists["metrics"])]
    params = [
        key_value(each, f"params[{at}]", "Param key") for at, each in enumerate(lists["params"])
    ]
    tags = [key_value(each, f"tags[{at}]") for at, each in enumerate(lists["tags"])]
    _limit("metrics", METRICS_MAX, len(metrics))
    _limit("params", PARAMS_MAX, len(params))
    _limit("tags", TAGS_MAX, len(tags))
    total = len(metrics) + len(params) + len(tags)
    _limit("metrics, params, and tags", ENTITIES_MAX, total)
    _unique(key for key, _ in params)
    plain, special = [], []
    for each, found in zip(lists["metrics"], metrics, strict=True):
        if any(each.get(name) for name in MODEL_FIELDS):
            special.append(dict(each))
        else:
            plain.append(found)
    return LogBatch(plain, dict(params), dict(tags), special)


def metric(body: Body, path: str = "") -> Metric:
    """Return one metric. Raises: ApiError."""
    key = _text(body, "key", _at(path, "key"))
    _name(key, _at(path, "name"), "Metric name")
    value = number(body, "value", _at(path, "value"))
    timestamp_ms = whole(body, "timestamp", _at(path, "timestamp"))
    step = whole(body, "step", _at(path, "step"))
    if timestamp_ms < 0:
        raise _wrong(
            _at(path, "timestamp"),
            timestamp_ms,
            f" metric '{key}' (value={value}). Timestamp must be a nonnegative long "
            "(64-bit integer) ",
        )
    return key, value, timestamp_ms, step


def key_value(body: Body, path: str = "", what: str = "") -> tuple[str, str]:
    """Return a param or tag. Args: what: its name where it is too long. Raises: ApiError."""
    key = _text(body, "key", _at(path, "key"))
    _name(key, _at(path, "key"), what or _at(path, "key"))
    return key, _text(body, "value", _at(path, "value"))


def tags(body: Body) -> dict[str, str]:
    """Return the tags of a run that is to be made. Raises: ApiError."""
    found: dict[str, str] = {}
    for index, each in enumerate(_list(body, "tags")):
        key, value = key_value(each, f"tags[{index}]")
        if key in found:
            raise ApiError("BAD_REQUEST", f"tag {key!r} is given twice")
        found[key] = value
    return found


def run_id(body: Body) -> str:
    """Return the run that a request names. Raises: ApiError."""
    name = "run_uuid" if body.get("run_id") is None and body.get("run_uuid") else "run_id"
    return text(body, name, required=True)


def is_run_id(given: str) -> bool:
    """Return whether any server could have a run of this id."""
    return _RUN_ID.fullmatch(given) is not None


def status(body: Body) -> str | None:
    """Return the status that a run is to have, None: as it is. Raises: ApiError."""
    found = text(body, "status")
    if found and found not in STATUSES:
        raise _wrong("status", found, f" it is none of {', '.join(STATUSES)}.")
    return found or None


def required(body: Body, name: str) -> None:
    """Raises: ApiError: it is not there."""
    _present(body, name, name)


def objects(body: Body, name: str) -> list[Body]:
    """Return a list of objects, empty if it is not there. Raises: ApiError."""
    return _list(body, name)


def text(body: Body, name: str, *, required: bool = False) -> str:
    """Return a text, "" if it is not there. Raises: ApiError: it must be there; or is none."""
    if required:
        _present(body, name, name)
    return _text(body, name, name)


def whole(body: Body, name: str, path: str = "") -> int:
    """Return a 64-bit number, 0 if it is not there. Raises: ApiError."""
    value = body.get(name)
    if value is None:
        return 0
    found = None
    if (
        type(value) is int
        or (isinstance(value, float) and value.is_integer())
        or (isinstance(value, str) and _WHOLE.fullmatch(value))
    ):
        found = int(value)
    if found is None or not -INT64_MAX <= found <= INT64_MAX:
        raise _wrong_type(path or name, value)
    return found


def number(body: Body, name: str, path: str = "") -> float:
    """Return a number; NaN and infinities come as text. Raises: ApiError."""
    value = body.get(name)
    try:
        if isinstance(value, bool) or value == "nan":
            raise TypeError
        found = float(value)  # type: ignore[arg-type]  # what it does not take is said below
    except (TypeError, ValueError, OverflowError):
        raise _wrong_type(path or name, value) from None
    if math.isinf(found) and not isinstance(value, str):
        raise _wrong_type(path or name, value)  # 1e400: the server would drop it
    return found


def _list(body: Body, name: str) -> list[Body]:
    found = body.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise _wrong_type(name, found)
    return found


def _text(body: Body, name: str, path: str) -> str:
    found = body.get(name)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise _wrong_type(path, found)
    if len(found) > VALUE_CHARS_MAX:
        raise invalid(f"'{path}' exceeds the maximum length of {VALUE_CHARS_MAX} characters")
    return found


def _name(name: str, path: str, what: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise _wrong(
            path,
            name,
            " Names may only contain alphanumerics, underscores (_), dashes (-), periods (.),"
            " spaces ( ), colon(:) and slashes (/).",
        )
    norm = posixpath.normpath(name)
    if norm != name or norm == "." or norm.startswith(("..", "/")):
        raise _wrong(
            path,
            name,
            " Names may be treated as files in certain cases, and must not resolve to other names "
            f"when treated as such. This name would resolve to {norm!r}",
        )
    if len(name) > KEY_CHARS_MAX:
        raise invalid(f"'{what}' exceeds the maximum length of {KEY_CHARS_MAX} characters")


def _present(body: Body, name: str, path: str) -> None:
    if body.get(name) in (None, ""):
        raise invalid(f"Missing value for required parameter '{path}'.{_SEE}")


def _limit(what: str, limit: int, length: int) -> None:
    if length > limit:
        raise invalid(
            f"A batch logging request can contain at most {limit} {what}. "
            f"Got {length} {what}. Please split up {what} across multiple requests and try again."
        )


def _unique(keys: Iterable[str]) -> None:
    seen: set[str] = set()
    twice = [key for key in keys if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
    if twice:
        raise invalid(
            f"Duplicate parameter keys have been submitted: {twice}. Please ensure "
            "the request contains only one param value per param key."
        )


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _wrong(path: str, value: object, why: str = "") -> ApiError:
    shown = json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)
    tail = f":{why}" if why else "."
    return invalid(f"Invalid value {shown} for parameter '{path}' supplied{tail}")


def _wrong_type(path: str, value: object) -> ApiError:
    why = f"  Hint: Value was of type '{type(value).__name__}'.{_SEE}"
    return _wrong(path, value, why)
