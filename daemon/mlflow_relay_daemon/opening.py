"""What a daemon needs before it can serve: locks, spool, sink. Each failure says what to do."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

from mlflow_relay.errors import RelayError
from mlflow_relay.paths import private_dir, share_runtime_dir
from mlflow_relay_daemon import systemd
from mlflow_relay_daemon.access import gid_of
from mlflow_relay_daemon.adoption import Watcher
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.exits import CommandError
from mlflow_relay_daemon.hosted import Runs
from mlflow_relay_daemon.lease import RUNTIME_LOCK
from mlflow_relay_daemon.node_metrics import NodeMetrics
from mlflow_relay_daemon.own_records import OwnRecords
from mlflow_relay_daemon.sinks import Sink
from mlflow_relay_daemon.spool.disk import Disk, lock_file
from mlflow_relay_daemon.spool.spool import Spool, SpoolTaken

if TYPE_CHECKING:
    from mlflow_relay_daemon.artifacts.uploads import Uploads


def allow_many_files() -> None:
    """A node may have hundreds of ranks, each with a connection and a journal: two descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def lock_runtime_folder(config: Config) -> int:
    """Two daemons at one socket would take it from each other; two sockets in one folder would
    share the journals beside them."""
    try:
        private_dir(config.socket.parent)
        gid = gid_of(config.group)
        if gid is not None:
            share_runtime_dir(config.socket, gid)
        lock = lock_file(config.socket.parent / RUNTIME_LOCK)
    except (RelayError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise CommandError(f"{config.socket}: {why}: choose another --socket") from error
    if config.socket.exists() and not config.socket.is_socket():
        raise CommandError(  # ZeroMQ would remove a file
            f"{config.socket} is there and no socket: choose another --socket, or remove it"
        )
    if lock is None:
        raise CommandError(
            f"another daemon serves {config.socket.parent}: `mlflow-relay status` shows it; stop "
            "that one first, or choose a --socket in another folder, and another --spool"
        )
    return lock


def open_spool(config: Config) -> Spool:
    try:
        return Spool(
            Disk(),
            config.spool,
            segment_bytes_max=config.segment_bytes_max,
            bytes_max=config.spool_bytes_max,
            free_bytes_min=config.free_bytes_min,
            on_progress=systemd.extend_timeout,
        )
    except SpoolTaken:
        raise CommandError(
            f"another daemon writes to the spool {config.spool}: stop that one first, or choose "
            "another --spool"
        ) from None
    except OSError as error:
        raise CommandError(
            f"the spool {config.spool} cannot be written: {error.strerror}: mend that, or choose "
            "another --spool"
        ) from error


def open_uploads(config: Config, runs: Runs, sink: Sink) -> Uploads:
    """Nothing is started or connected before there is an artifact."""
    from mlflow_relay_daemon.artifacts.helper_client import Helper
    from mlflow_relay_daemon.artifacts.stores import Stores
    from mlflow_relay_daemon.artifacts.uploads import Uploads
    from mlflow_relay_daemon.sinks.rest import RestSink

    helper = Helper(config.tracking_uri, config.artifact_uploads)
    return Uploads(
        runs,
        sink,
        Stores(
            config.tracking_uri,
            is_direct=isinstance(sink, RestSink),
            helper=helper,
            token_file=str(config.token_file or ""),
        ),
        threads=config.artifact_uploads,
        bytes_per_s=config.artifact_bytes_per_s,
        wait_s_max=config.retry_wait_s_max,
    )


def open_node_metrics(config: Config, runs: Runs, watcher: Watcher) -> NodeMetrics | None:
    if not config.node_metrics:
        return None
    return NodeMetrics(
        runs,
        OwnRecords(runs),
        interval_s=config.node_metrics_interval_s,
        pid_of=watcher.pid_of if config.rank_process_metrics else None,
    )


def open_sink(config: Config) -> Any:
    from mlflow_relay_daemon.sinks.open import open_sink

    try:
        return open_sink(
            config.tracking_uri, timeout_s=config.request_timeout_s, token_file=config.token_file
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
