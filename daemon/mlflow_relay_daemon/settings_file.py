"""The TOML file of the daemon's settings: which one counts, and what it says."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from mlflow_relay_daemon.setting import (
    ConfigError,
    Setting,
    parse_value,
    shown_key,
    shown_path,
    size_text,
)
from mlflow_relay_daemon.words import one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SYSTEM_FILE = Path("/etc/mlflow-relay.toml")
FILE_NAME = "mlflow-relay.toml"
FILE_BYTES_MAX = 1_000_000  # a settings file has a few lines; anything longer is a wrong path


def find_file(config_file: Path | str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the settings file in force; one that was named must exist, the others may."""
    if config_file is not None:
        return _named_file(config_file, "flag --config")
    if environ.get("MLFLOW_RELAY_CONFIG"):
        return _named_file(environ["MLFLOW_RELAY_CONFIG"], "MLFLOW_RELAY_CONFIG")
    candidates = [SYSTEM_FILE]
    with suppress(ConfigError):  # a system service has no home, and needs none for /etc
        candidates.insert(0, xdg_folder("XDG_CONFIG_HOME", ".config", environ) / FILE_NAME)
    return next((path for path in candidates if os.path.lexists(path)), None)


def _named_file(name: Path | str, where: str) -> Path:
    path = parse_value(Setting("config", "path", ""), str(name), where)
    assert isinstance(path, Path)
    if not os.path.lexists(path):
        raise ConfigError(f"{where}: there is no file {shown_path(path)}: create it or drop it")
    return path


def read_file(path: Path, known: Collection[str]) -> dict[str, object]:
    """Return what a settings file says. Raises: ConfigError: it cannot be used; says why."""
    where = shown_path(path)
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(
            f"{where}: cannot be read: {error.strerror}: mend its permissions, or name another "
            "file with --config"
        ) from None
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(
            f"{where}: is over {size_text(FILE_BYTES_MAX)}, which no settings file is: name "
            "another with --config"
        )
    try:
        table: dict[str, object] = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError included
        reason = one_line(str(error)) or type(error).__name__
        raise ConfigError(f"{where}: is not TOML: {reason[:200]}") from None
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: {shown_key(key)} is no setting{_hint(key, known)}")
    return table


def _hint(key: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1)
    if close:
        return f": did you mean {close[0]}?"
    return f": allowed are {', '.join(sorted(known))}"


def xdg_folder(variable: str, fallback: str, environ: Mapping[str, str] | None) -> Path:
    """Return a folder of the XDG specification. Raises: ConfigError: there is no home for it."""
    environ = os.environ if environ is None else environ
    value = Path(environ.get(variable, ""))
    if value.is_absolute():  # the XDG specification: relative ones are to be ignored
        return value
    try:
        return Path(environ.get("HOME") or Path.home()) / fallback
    except RuntimeError:
        raise ConfigError(
            f"HOME and {variable} are not set: set one, or give --spool and --tracking-uri"
        ) from None
