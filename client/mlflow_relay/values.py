"""What users give → what a record may hold, or an error that names key and value. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from .frames import RECORD_BYTES_MAX

#: What one record holds at most: one request of MLflow's, so that a record never spans many.
METRICS_PER_RECORD_MAX = 1000  # mlflow.utils.validation.MAX_METRICS_PER_BATCH
TEXTS_PER_RECORD_MAX = 100  # ... MAX_PARAMS_TAGS_PER_BATCH
#: Four bytes a character at most, and room to spare; one longer value has a record of its own.
TEXT_CHARS_PER_RECORD_MAX = RECORD_BYTES_MAX // 8
#: A key is for people to read; MLflow takes 250 characters, and says so in a dead letter.
KEY_CHARS_MAX = 1000

NAME_BYTES_MAX = 255  # of a file on Linux
ARTIFACT_PATH_BYTES_MAX = 800  # an object's key in S3 has 1024, the run's own part among them

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


def check_key(what: str, key: object) -> str:
    """Return the key. Raises: TypeError: no text; ValueError: empty, or not to be encoded."""
    if not isinstance(key, str):
        raise TypeError(f"{what} key {key!r} is a {type(key).__name__}; it must be a str")
    if not key:
        raise ValueError(f"{what} key is empty")
    if len(key) > KEY_CHARS_MAX:
        raise ValueError(f"{what} key {short(key)} has {len(key)} characters: log it as a value")
    return _encodable(f"{what} key", key)


def check_artifact_path(path: object) -> str:
    """Return the path of an artifact within its run. Raises: TypeError, ValueError: it is none.

    Stores differ in what they make of a path that goes up, or that names one place in two ways.
    """
    if not isinstance(path, str):
        raise TypeError(f"artifact path {path!r} is a {type(path).__name__}; it must be a str")
    _encodable("artifact path", path)
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"artifact path {short(path)} is not a plain relative path: no '..', no '.', no "
            "empty part, no '/' at either end"
        )
    if "\0" in path or any(len(part.encode()) > NAME_BYTES_MAX for part in parts):
        raise ValueError(
            f"artifact path {short(path)}: a name in it has over {NAME_BYTES_MAX} bytes, or a NUL"
        )
    if len(path.encode()) > ARTIFACT_PATH_BYTES_MAX:
        raise ValueError(
            f"artifact path {short(path)} is longer than {ARTIFACT_PATH_BYTES_MAX} bytes"
        )
    return path


def to_text(what: str, key: str, value: object) -> str:
    """Return `str(value)`. Raises: ValueError: it cannot be encoded, or is larger than a record."""
    text = _encodable(f"{what} {key!r}: its value", str(value))
    if len(text) > TEXT_CHARS_PER_RECORD_MAX:
        raise ValueError(
            f"{what} {key!r}: its value has {len(text)} characters; "
            f"at most {TEXT_CHARS_PER_RECORD_MAX} can be kept: write it to a file"
        )
    return text


def to_float(key: str, value: Any) -> float:
    """Return the number. Raises: TypeError: it is none; names key and value."""
    try:
        is_text = isinstance(value, str | bytes | bytearray)  # float() would read "1.5"
        return float(value.item() if is_text or not _has_float(value) else value)
    except OverflowError:
        raise ValueError(f"metric {key!r}: {short(value)} is too large for a float64") from None
    except Exception as error:  # whatever a foreign __float__ or item raises
        raise TypeError(
            f"metric {key!r}: {short(value)} ({type(value).__name__}) is no number"
        ) from error


def _has_float(value: Any) -> bool:
    """Return whether float() takes it; arrays of one element only have item()."""
    if getattr(value, "ndim", 0):
        return False
    return hasattr(value, "__float__") or hasattr(value, "__index__")


def to_step(step: Any) -> int:
    """Return the step as an int. Raises: TypeError, ValueError: no whole number of 64 bits."""
    try:
        whole = int(step)
        exact = bool(whole == step)
    except (TypeError, ValueError, OverflowError):
        exact = False
    if isinstance(step, str) or not exact:
        raise TypeError(f"step {short(step)} ({type(step).__name__}) is no whole number")
    if not INT64_MIN <= whole <= INT64_MAX:
        raise ValueError(f"step {whole} does not fit into 64 bits")
    return whole


def chunks(items: Mapping[str, Any], size: int) -> Iterable[dict[str, Any]]:
    """Yield the items in dicts of at most `size`, in order."""
    rest = iter(items.items())
    while part := dict(islice(rest, size)):
        yield part


def text_chunks(items: Mapping[str, str]) -> Iterable[dict[str, str]]:
    """Yield the items in dicts that fit into a record each, in order."""
    part: dict[str, str] = {}
    chars = 0
    for key, value in items.items():
        chars += len(key) + len(value)
        if part and (len(part) == TEXTS_PER_RECORD_MAX or chars > TEXT_CHARS_PER_RECORD_MAX):
            yield part
            part, chars = {}, len(key) + len(value)
        part[key] = value
    if part:
        yield part


def _encodable(what: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} {short(text)} cannot be encoded as UTF-8: "
            f"lone surrogate at position {error.start}"
        ) from None
    return text


def short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # a foreign __repr__ must not hide what we are about to say
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."
