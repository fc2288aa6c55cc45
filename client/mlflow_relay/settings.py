"""The client's few settings from the environment; arguments of `start_run` win over them."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import RelayError

#: One rank's journal while no daemon answers: memory, if the runtime folder is in memory.
JOURNAL_BYTES_MAX = 256 << 20
#: The longest that `end` may take.
END_TIMEOUT_S = 5.0


def journal_bytes_max(env: Mapping[str, str]) -> int:
    """Return MLFLOW_RELAY_JOURNAL_BYTES_MAX. Raises: RelayError: no number, or under 64 KiB."""
    return int(_number(env, "MLFLOW_RELAY_JOURNAL_BYTES_MAX", JOURNAL_BYTES_MAX, 64 << 10))


def end_timeout_s(env: Mapping[str, str]) -> float:
    """Return MLFLOW_RELAY_END_TIMEOUT_S. Raises: RelayError: no number, or negative."""
    return _number(env, "MLFLOW_RELAY_END_TIMEOUT_S", END_TIMEOUT_S, 0)


def autostart(env: Mapping[str, str]) -> bool:
    """Return whether MLFLOW_RELAY_AUTOSTART is set to something true."""
    return env.get("MLFLOW_RELAY_AUTOSTART", "").lower() in ("1", "true", "yes", "on")


def _number(env: Mapping[str, str], name: str, default: float, low: float) -> float:
    text = env.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = low - 1
    if not number >= low:
        raise RelayError(f"{name}={text!r}: a number of at least {low} is wanted")
    return number
