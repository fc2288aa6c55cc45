"""Settings → the lane of the artifacts, and the notice that tells ranks where to stage."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow_relay.paths import staging_notice
from mlflow_relay_daemon.artifacts.helper_client import Helper
from mlflow_relay_daemon.artifacts.stores import Stores
from mlflow_relay_daemon.artifacts.uploads import Uploads
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.hosted import Runs
from mlflow_relay_daemon.sinks import Sink
from mlflow_relay_daemon.sinks.rest import RestSink
from mlflow_relay_daemon.spool.disk import Disk

STAGING = "staging"  #: folder in the spool


def publish_staging(disk: Disk, spool: Path, socket: Path) -> Path:
    """Make the staging folder, and tell the ranks of this socket; return it. Raises: OSError."""
    folder = spool / STAGING
    disk.make_folder(folder)
    notice = {"version": 1, "folder": str(folder.resolve())}
    disk.replace(staging_notice(socket), json.dumps(notice).encode(), durable=False)
    return folder


def open_uploads(config: Config, runs: Runs, sink: Sink, staging: Path) -> Uploads:
    """Return the lane; nothing is started or connected before there is an artifact."""
    helper = Helper(config.tracking_uri, config.artifact_uploads)
    return Uploads(
        runs,
        sink,
        Stores(config.tracking_uri, is_direct=isinstance(sink, RestSink), helper=helper),
        staging,
        threads=config.artifact_uploads,
        bytes_per_s=config.artifact_bytes_per_s,
        wait_s_max=config.retry_wait_s_max,
    )
