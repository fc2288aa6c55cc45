"""A tracking URI → the sink that serves it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

from mlflow_relay_daemon.sinks import Sink
from mlflow_relay_daemon.sinks.redact import redact_uri
from mlflow_relay_daemon.sinks.rest import RestSink
from mlflow_relay_daemon.sinks.store import StoreSink

__all__ = ["open_sink", "redact_uri"]


def open_sink(
    tracking_uri: str, *, timeout_s: float = 30.0, token_file: Path | None = None
) -> Sink:
    """Return the sink for a tracking URI; nothing is connected yet.

    http and https are spoken directly, unless the environment asks for something that only the
    mlflow package can do. All else (databases, databricks, plugins) goes through that package.

    Raises: ValueError: MLflow cannot write there, whatever happens; the message says what to do.
    """
    scheme = tracking_uri.partition(":")[0].lower() if ":" in tracking_uri else ""
    if scheme in ("http", "https") and not needs_mlflow_package(os.environ):
        return RestSink(tracking_uri, timeout_s=timeout_s, token_file=str(token_file or ""))
    if token_file is not None:
        raise ValueError(
            "token_file is for http(s) servers that are spoken to directly: unset it here, and use "
            "MLflow's own variables"
        )
    if scheme in ("", "file") and not tracking_uri.startswith("databricks"):
        _refuse_file_store(tracking_uri, os.environ)
    return StoreSink(tracking_uri)


def needs_mlflow_package(environ: Mapping[str, str]) -> bool:
    """Tell whether requests must be signed or decorated by plugins written for mlflow."""
    signed = environ.get("MLFLOW_TRACKING_AUTH") or environ.get(
        "MLFLOW_TRACKING_AWS_SIGV4", ""
    ).lower() in ("true", "1")
    return bool(signed) or bool(entry_points(group="mlflow.request_header_provider"))


def _refuse_file_store(tracking_uri: str, environ: Mapping[str, str]) -> None:
    """Raise if this is a folder and MLflow's file store is off, as it is by default."""
    if environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return
    folder = redact_uri(tracking_uri).removeprefix("file://").removeprefix("file:")
    raise ValueError(
        f"{folder} is a folder, and MLflow no longer writes to folders: "
        f"use sqlite:///{folder.rstrip('/')}.db, or set MLFLOW_ALLOW_FILE_STORE=true"
    )
