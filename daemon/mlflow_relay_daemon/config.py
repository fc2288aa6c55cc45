"""Every setting of the daemon, once: default, unit, allowed range, help, and where it came from.

Order: flags > MLFLOW_RELAY_<NAME> > one TOML file > MLFLOW_TRACKING_URI (for tracking_uri) and
systemd's credential mlflow-token (for token_file) > defaults. The file is the first that exists of
--config, MLFLOW_RELAY_CONFIG, $XDG_CONFIG_HOME/mlflow-relay.toml and /etc/mlflow-relay.toml.

A value that is overridden is checked all the same: a wrong line in a file should be heard of on
the day it is written, not on the day when the flag that hid it is dropped.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import socket as sockets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlflow_relay.paths import SOCKET_PATH_BYTES_MAX, default_socket
from mlflow_relay_daemon.setting import (
    VARIABLE_PREFIX,
    ConfigError,
    Setting,
    parse_value,
    shown,
    shown_path,
    size_text,
)
from mlflow_relay_daemon.settings_file import find_file, read_file, xdg_folder
from mlflow_relay_daemon.words import KB, MB, TB

__all__ = ["SETTINGS", "Config", "ConfigError", "describe", "load_config", "unknown_variables"]

CREDENTIAL = "mlflow-token"


def _setting(kind: str, help: str, **more: Any) -> dict[str, Any]:
    return {"setting": {"kind": kind, "help": help, **more}}


def state_home(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder that holds the spools of all nodes and the embedded MLflow store."""
    return xdg_folder("XDG_STATE_HOME", ".local/state", environ) / "mlflow-relay"


def default_spool(environ: Mapping[str, str] | None = None) -> Path:
    """Return this node's spool: homes are shared between nodes, and each has a daemon."""
    return state_home(environ) / sockets.gethostname()


def default_tracking_uri(environ: Mapping[str, str] | None = None) -> str:
    """Return the embedded SQLite store, beside the spools: works before there is a server."""
    return f"sqlite:///{state_home(environ) / 'mlflow.db'}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one daemon. `load_config` fills it; every value is in its range."""

    spool: Path = field(
        default_factory=default_spool,
        metadata=_setting(
            "path", "Folder that keeps what MLflow does not have yet; one daemon each.",
            flag="--spool",
        ),
    )  # fmt: skip
    socket: Path = field(
        default_factory=default_socket,
        metadata=_setting("path", "Unix socket at which ranks and commands meet the daemon.",
                          flag="--socket"),
    )  # fmt: skip
    group: str | None = field(
        default=None,
        metadata=_setting(
            "group", "Group whose members share this daemon, each with runs of his own; none: it "
            "is for its own user alone.", flag="--group", optional=True,
        ),
    )  # fmt: skip
    tracking_uri: str = field(
        default_factory=default_tracking_uri,
        repr=False,  # may hold a password, and a repr ends up in tracebacks and logs
        metadata=_setting(
            "uri",
            "The MLflow server or store. Passwords belong in MLFLOW_TRACKING_PASSWORD, not here.",
            flag="--tracking-uri", secret=True,
        ),
    )  # fmt: skip
    token_file: Path | None = field(
        default=None,
        metadata=_setting(
            "path", "File with the server's bearer token, read for each request: renew it and it "
            "counts. With systemd the credential mlflow-token, if there is one.",
            flag="--token-file", optional=True,
        ),
    )  # fmt: skip
    offline: bool = field(
        default=False,
        metadata=_setting("switch", "Keep everything in the spool; `mlflow-relay sync` delivers "
                          "it later.", flag="--offline"),
    )  # fmt: skip
    exit_when_idle_s: float | None = field(
        default=None,
        metadata=_setting(
            "seconds", "Leave after so many seconds without a rank and with nothing to deliver.",
            flag="--exit-when-idle", least=0, most=2_592_000, optional=True,
        ),
    )  # fmt: skip
    keep_ended_s: float | None = field(
        default=2_592_000.0,
        metadata=_setting(
            "seconds", "Remove a run from the spool so long after it has ended, if MLflow has all "
            "of it.", flag="--keep-ended", most=31_536_000, optional=True,
        ),
    )  # fmt: skip
    sidecar: bool = field(
        default=False,
        metadata=_setting("switch", "Leave when no `mlflow-relay exec` needs it any more; SIGTERM "
                          "waits for that, too.", flag="--sidecar"),
    )  # fmt: skip
    drain_timeout_s: float = field(
        default=10.0,
        metadata=_setting("seconds", "After SIGTERM, deliver for at most so many seconds; the "
                          "rest stays in the spool.", flag="--drain-timeout", most=86_400),
    )  # fmt: skip
    spool_bytes_max: int | None = field(
        default=None,
        metadata=_setting(
            "bytes", "Quota of the spool; when it is reached nothing is acknowledged until there "
            "is space again.", flag="--spool-bytes-max", least=MB, most=1000 * TB, optional=True,
        ),
    )  # fmt: skip
    free_bytes_min: int = field(
        default=256 * MB,
        metadata=_setting("bytes", "Free space that is left to others on the spool's disk.",
                          flag="--free-bytes-min", most=1000 * TB),
    )  # fmt: skip
    segment_bytes_max: int = field(
        default=16 * MB,
        metadata=_setting("bytes", "Size at which a new spool file begins; space returns by "
                          "whole files.", least=64 * KB, most=1 << 30),
    )  # fmt: skip
    group_bytes_max: int = field(
        default=MB,
        metadata=_setting("bytes", "Bytes that share one fdatasync, at most.", least=4 * KB,
                          most=64 << 20),
    )  # fmt: skip
    batch_age_s: float = field(
        default=0.5,
        metadata=_setting("seconds", "How long a small batch for MLflow waits for more.", most=60),
    )  # fmt: skip
    delivery_threads: int = field(
        default=4,
        metadata=_setting("count", "Runs that are delivered side by side.",
                          flag="--delivery-threads", least=1, most=64),
    )  # fmt: skip
    request_timeout_s: float = field(
        default=30.0,
        metadata=_setting("seconds", "How long one request to MLflow may take.",
                          flag="--request-timeout", least=0.1, most=3600),
    )  # fmt: skip
    retry_wait_s_max: float = field(
        default=30.0,
        metadata=_setting("seconds", "The longest pause between two tries at a server that is "
                          "down.", least=0.01, most=3600),
    )  # fmt: skip
    artifact_uploads: int = field(
        default=2,
        metadata=_setting("count", "Artifacts that are uploaded side by side.",
                          flag="--artifact-uploads", least=1, most=64),
    )  # fmt: skip
    artifact_bytes_per_s: int | None = field(
        default=None,
        metadata=_setting(
            "bytes", "How fast artifacts may be uploaded, all together, in bytes a second.",
            flag="--artifact-bytes-per-s", least=KB, most=1000 * TB, optional=True,
        ),
    )  # fmt: skip
    artifact_wait_s: float = field(
        default=10.0,
        metadata=_setting("seconds", "How long the end of a run waits for its artifacts before "
                          "MLflow is told; they go on all the same.", most=86_400),
    )  # fmt: skip
    lineage_params: tuple[str, ...] | None = field(
        default=("training.run_id", "metadata.run_id"),
        metadata=_setting(
            "names", "Params that name the run itself or, of a resumed child, its parent.",
            optional=True,
        ),
    )  # fmt: skip
    lineage_fork_params: tuple[str, ...] | None = field(
        default=("config.training.fork_run_id",),
        metadata=_setting("names", "Params that name the run that was forked.", optional=True),
    )  # fmt: skip
    http_port: int | None = field(
        default=None,
        metadata=_setting(
            "count", "Loopback port for MLflow's API, metrics, health and a page; 0: any.",
            flag="--http-port", least=0, most=65535, optional=True,
        ),
    )  # fmt: skip
    node_metrics: bool = field(
        default=True,
        metadata=_setting("switch", "Log CPU, memory, disk, network and GPUs of this node for each "
                          "run that has a living rank here.", flag="--node-metrics"),
    )  # fmt: skip
    node_metrics_interval_s: float = field(
        default=10.0,
        metadata=_setting("seconds", "How often that is measured.",
                          flag="--node-metrics-interval", least=0.1, most=3600),
    )  # fmt: skip
    rank_process_metrics: bool = field(
        default=False,
        metadata=_setting("switch", "Measure the process of each rank, too.",
                          flag="--rank-process-metrics"),
    )  # fmt: skip
    reduce_deadline_s: float = field(
        default=30.0,
        metadata=_setting("seconds", "How long a point of log_metrics(reduce=...) waits for ranks "
                          "that are late.", flag="--reduce-deadline", least=0, most=86_400),
    )  # fmt: skip
    log_level: str = field(
        default="info",
        metadata=_setting("choice", "How much the daemon says on stderr.", flag="--log-level",
                          choices=("debug", "info", "warning", "error")),
    )  # fmt: skip
    log_format: str = field(
        default="text",
        metadata=_setting("choice", "One line of text, or one JSON object per event.",
                          flag="--log-format", choices=("text", "json")),
    )  # fmt: skip
    origin: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        f.name: Setting(name=f.name, **f.metadata["setting"])
        for f in dataclasses.fields(Config)
        if "setting" in f.metadata
    }
)


def load_config(
    flags: Mapping[str, object] | None = None,
    *,
    config_file: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Gather the settings from all sources.

    Args:    flags: by field name; None means that the flag was not given. config_file: --config.
    Returns: a Config in which every value is in its range and has an origin.
    Raises:  ConfigError.
    """
    environ = os.environ if environ is None else environ
    chosen: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, raw, where in _offers(flags or {}, config_file, environ):
        value = parse_value(SETTINGS[name], raw, where)
        if name not in chosen:
            chosen[name], origin[name] = value, where
    for name in set(SETTINGS) - set(chosen):
        origin[name] = "default"
    if "spool" not in chosen:
        chosen["spool"] = default_spool(environ)
    if "tracking_uri" not in chosen:
        chosen["tracking_uri"] = default_tracking_uri(environ)
    config = Config(**chosen, origin=MappingProxyType(origin))
    _check_socket_length(config)
    return config


def _offers(
    flags: Mapping[str, object], config_file: Path | str | None, environ: Mapping[str, str]
) -> Iterator[tuple[str, object, str]]:
    """Yield (setting, raw value, where it stands), the strongest source first."""
    for name, raw in flags.items():
        if raw is not None:
            yield name, raw, f"flag {SETTINGS[name].flag}"
    for name, setting in SETTINGS.items():
        if environ.get(setting.variable):  # set to nothing means not set, as in a shell's ${X:-}
            yield name, environ[setting.variable], setting.variable
    path = find_file(config_file, environ)
    if path is not None:
        for name, raw in read_file(path, SETTINGS).items():
            yield name, raw, shown_path(path)
    credential = Path(environ.get("CREDENTIALS_DIRECTORY", ""), CREDENTIAL)
    if credential.is_absolute() and credential.exists():  # systemd.exec(5), LoadCredential=
        yield "token_file", credential, "CREDENTIALS_DIRECTORY"
    uri = environ.get("MLFLOW_TRACKING_URI", "")
    # relay:// is what ranks are given to reach this daemon; it never is the daemon's own target,
    # and must not stop `status` in the same shell. `mlflow-relay daemon` asks for a real one.
    if uri and not uri.startswith("relay:"):
        yield "tracking_uri", uri, "MLFLOW_TRACKING_URI"


def _check_socket_length(config: Config) -> None:
    length = len(os.fsencode(config.socket))
    if length > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"{config.origin['socket']}: socket = {shown(str(config.socket))} is {length} bytes "
            f"long, a Unix socket's path may have {SOCKET_PATH_BYTES_MAX}: set a shorter one, such "
            "as /tmp/relay/relay.sock, as MLFLOW_RELAY_SOCKET for the daemon and the ranks"
        )


def unknown_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return variables that look like a misspelt setting, each with the setting it resembles.

    They are not refused: the prefix is shared with the client, whose variables are its own.
    """
    environ = os.environ if environ is None else environ
    known = {setting.variable for setting in SETTINGS.values()}
    found: dict[str, str] = {}
    for variable in environ:
        if variable.startswith(VARIABLE_PREFIX) and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1, cutoff=0.9)
            if close:
                found[variable] = close[0]
    return found


def describe(config: Config) -> list[tuple[str, str, str]]:
    """Return (name, value, origin) of every setting, fit to be printed: passwords are left out."""
    from mlflow_relay_daemon.sinks.redact import redact_uri

    rows = []
    for name, setting in SETTINGS.items():
        value = getattr(config, name)
        if value is None:
            text = "none"
        elif setting.kind == "bytes":
            text = size_text(value)
        elif setting.kind == "names":
            text = ", ".join(value)
        elif setting.kind == "uri":
            text = redact_uri(value)
        elif setting.kind == "switch":
            text = "true" if value else "false"
        else:
            text = f"{value:.9g}" if isinstance(value, float) else str(value)
        rows.append((name, text, config.origin.get(name, "default")))
    return rows
