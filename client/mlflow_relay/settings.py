"""The client's few settings from the environment; arguments of `start_run` win over them."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import RelayError

#: One rank's journal while no daemon answers: memory, if the runtime folder is in memory.
JOURNAL_BYTES_MAX = 256 << 20
#: Whose terminal output is kept; the first is the default.
TERMINAL_MODES = ("rank0", "all", "none")
#: The longest that `end` may take.
END_TIMEOUT_S = 5.0
#: Smaller files are staged as copies rather than as hard links: a copy of 32 MiB takes some tens of
#: milliseconds, and cannot change.
LINK_BYTES_MIN = 32 << 20


def journal_bytes_max(env: Mapping[str, str], given: object = None) -> int:
    """Return the argument, else MLFLOW_RELAY_JOURNAL_BYTES_MAX.

    Raises: TypeError, ValueError, RelayError: no number, or under 64 KiB.
    """
    name, low = "journal_bytes_max", 64 << 10
    if given is not None:
        return int(_checked(name, given, low))
    return int(_number(env, "MLFLOW_RELAY_JOURNAL_BYTES_MAX", JOURNAL_BYTES_MAX, low))


def end_timeout_s(env: Mapping[str, str], given: object = None) -> float:
    """Return the argument, else MLFLOW_RELAY_END_TIMEOUT_S.

    Raises: TypeError, ValueError, RelayError: no number, or negative.
    """
    if given is not None:
        return _checked("end_timeout_s", given, 0)
    return _number(env, "MLFLOW_RELAY_END_TIMEOUT_S", END_TIMEOUT_S, 0)


def link_bytes_min(env: Mapping[str, str]) -> float:
    """Return MLFLOW_RELAY_LINK_BYTES_MIN: smaller files are staged as copies, never as hard links.

    Raises: RelayError: no number, or negative.
    """
    return _number(env, "MLFLOW_RELAY_LINK_BYTES_MIN", LINK_BYTES_MIN, 0)


def terminal(env: Mapping[str, str], given: str | None = None) -> str:
    """Return the argument, else MLFLOW_RELAY_TERMINAL: whose terminal output is kept.

    Raises: ValueError, RelayError: none of TERMINAL_MODES.
    """
    mode = given or env.get("MLFLOW_RELAY_TERMINAL") or TERMINAL_MODES[0]
    if mode not in TERMINAL_MODES:
        if given:
            raise ValueError(f"terminal={given!r}: one of {', '.join(TERMINAL_MODES)}")
        raise RelayError(f"MLFLOW_RELAY_TERMINAL={mode!r}: one of {', '.join(TERMINAL_MODES)}")
    return mode


def autostart(env: Mapping[str, str]) -> bool:
    """Return whether MLFLOW_RELAY_AUTOSTART is set to something true."""
    return env.get("MLFLOW_RELAY_AUTOSTART", "").lower() in ("1", "true", "yes", "on")


def _checked(name: str, given: object, low: float) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise TypeError(f"{name}={given!r} is a {type(given).__name__}; it must be a number")
    if not low <= given < float("inf"):
        raise ValueError(f"{name}={given!r}: a number of at least {low} is wanted")
    return given


def _number(env: Mapping[str, str], name: str, default: float, low: float) -> float:
    text = env.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = low - 1
    if not low <= number < float("inf"):
        raise RelayError(f"{name}={text!r}: a number of at least {low} is wanted")
    return number
