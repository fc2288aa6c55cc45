"""Start, loop, stop."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from mlflow_relay._version import __version__
from mlflow_relay.errors import RelayError
from mlflow_relay.paths import journal_dir, private_dir
from mlflow_relay_daemon.adoption import Watcher
from mlflow_relay_daemon.combiner import Combiner
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.control import Control
from mlflow_relay_daemon.counters import Counters
from mlflow_relay_daemon.delivery import Delivery
from mlflow_relay_daemon.exits import DEGRADED, DONE, CommandError
from mlflow_relay_daemon.hosted import Runs
from mlflow_relay_daemon.intake import Intake
from mlflow_relay_daemon.lane.links import LineageParams
from mlflow_relay_daemon.logs import set_up_logging
from mlflow_relay_daemon.node_metrics import NodeMetrics
from mlflow_relay_daemon.own_records import OwnRecords
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.sinks import Sink
from mlflow_relay_daemon.sinks.redact import redact_uri
from mlflow_relay_daemon.spool.disk import Disk, lock_file
from mlflow_relay_daemon.spool.spool import Spool, SpoolTaken
from mlflow_relay_daemon.status import StatusReader
from mlflow_relay_daemon.words import plural

if TYPE_CHECKING:
    from mlflow_relay_daemon.artifacts.uploads import Uploads

log = logging.getLogger(__name__)

#: How often journals are looked at: within it a vanished rank is noticed.
LOOK_EVERY_S = 0.5
RUNTIME_LOCK = "daemon.lock"
#: The default interval, 5 ms, is how long a lane that computes may keep intake from its socket.
SWITCH_INTERVAL_S = 0.0005


def run_daemon(config: Config) -> int:
    """Serve until told to stop; return an exit code.

    Raises: CommandError: it cannot start; says what to do.
    """
    set_up_logging(config.log_level, config.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _allow_many_files()
    service = Service(config)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, service.request_stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a login shell that ends is no reason to leave
    try:
        service.serve()
        return service.drain()
    finally:
        service.close()


class Service:
    """All parts of one daemon.

    Raises: CommandError: the spool or the socket is taken, cannot be written, ...
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stopping = False
        self._uploads: Uploads | None = None
        self._looked_s = self._busy_s = time.monotonic()
        self._runtime_lock = _lock_runtime_folder(config)
        self._spool = _open_spool(config)
        self._look_after_files()
        self._delivery = None
        sink = breaker = None
        if not config.offline:
            sink = _open_sink(config)
            breaker = Breaker(cap_s=config.retry_wait_s_max)
            self._delivery = Delivery(
                breaker, threads=config.delivery_threads, batch_age_s=config.batch_age_s
            )
        counters = Counters()
        names = LineageParams(config.lineage_params or (), config.lineage_fork_params or ())
        self._runs = Runs(
            self._spool,
            sink,
            breaker,
            self._delivery,
            names,
            artifact_wait_s=config.artifact_wait_s,
        )
        self._uploads = self._runs.uploads = sink and _open_uploads(config, self._runs, sink)
        self._watcher = Watcher(journal_dir(config.socket), self._runs, counters)
        self._combiner = Combiner(self._runs, OwnRecords(self._runs), config.reduce_deadline_s)
        self._node_metrics = _open_node_metrics(config, self._runs, self._watcher)
        self._status = StatusReader(config, self._runs, self._watcher, counters)
        control = Control(self._runs, self._read_status, self._look, self._watcher.in_journals)
        self._intake = Intake(config.socket, self._runs, control, counters, config.group_bytes_max)
        control.answer_later = self._intake.answer_later

    def serve(self) -> None:
        """Take what ranks send, until asked to stop or idle for long enough."""
        if self._delivery is not None:
            self._delivery.start()
        for hosted in self._runs.by_id.values():
            self._runs.notify(hosted)
        log.info(
            "mlflow-relay %s serves %s; spool %s; %s",
            __version__,
            self._config.socket,
            self._config.spool,
            "offline" if self._config.offline else redact_uri(self._config.tracking_uri),
        )
        _notify_systemd("READY=1")
        while not self._stopping and not self._is_idle_for_long():
            self._turn()
        _notify_systemd("STOPPING=1")

    def drain(self) -> int:
        """Deliver what is left, for as long as the drain may take; return an exit code."""
        until_s = time.monotonic() + self._config.drain_timeout_s
        self._look()
        while self._watcher.is_behind and time.monotonic() < until_s:
            self._look()  # what dead ranks left in memory is on the disk before we go
        if self._delivery is not None:
            lanes = [each.lane for each in self._runs.by_id.values() if each.lane is not None]
            for lane in lanes:
                lane.leave()
            self._delivery.deliver_now(lanes)
            while time.monotonic() < until_s and not self._is_delivered():
                self._turn(0.05)
            self._stop_delivery()
        self._runs.return_space()
        hosted = self._runs.by_id.values()
        left = sum(each.run.waiting_records() for each in hosted)
        files = sum(len(each.run.artifacts.waiting) for each in hosted)
        if left or files:
            log.warning(
                "%d records%s are not in MLflow yet; they are kept in %s and delivered at the next "
                "start",
                left,
                f" and {plural(files, 'artifact')}" if files else "",
                self._config.spool,
            )
        return DONE if not (left or files) or self._config.offline else DEGRADED

    def request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Signal handler: only sets a flag."""
        self._stopping = True
        self._intake.wake()

    def close(self) -> None:
        self._intake.close()
        self._stop_delivery()
        self._config.socket.unlink(missing_ok=True)
        self._spool.close()
        os.close(self._runtime_lock)

    # ── the loop ──

    def _turn(self, wait_s: float = LOOK_EVERY_S) -> None:
        self._intake.turn(wait_s)
        if time.monotonic() - self._looked_s >= LOOK_EVERY_S:
            if self._intake.bind_again():
                log.error("the socket %s was gone and is made anew", self._config.socket)
            self._look()
            if self._node_metrics is not None and not self._watcher.is_behind:
                self._node_metrics.look(self._looked_s)
            if self._delivery is not None:
                self._combiner.look(self._looked_s)
            self._runs.return_space()
            self._runs.look_for_space()
            self._look_after_files()
            _notify_systemd("WATCHDOG=1")

    def _look_after_files(self) -> None:
        try:
            self._spool.publish_staging(self._config.socket)
        except OSError as error:
            log.debug("ranks are not told where to stage files: %s", error)
        if self._uploads is not None:
            self._uploads.look()

    def _is_delivered(self) -> bool:
        """Return whether lanes and artifacts have nothing to do."""
        if self._delivery is None or self._uploads is None:
            return True
        is_idle = self._delivery.is_idle() and not self._combiner.is_waiting()
        return is_idle and self._uploads.is_idle()

    def _stop_delivery(self) -> None:
        if self._uploads is not None:
            self._uploads.stop()
        if self._delivery is not None:
            self._delivery.stop()

    def _look(self) -> None:
        self._looked_s = now_s = time.monotonic()
        heard_s = {name: each.heard_s for name, each in self._intake.sessions.items()}
        for session in self._watcher.look(heard_s, now_s):
            self._intake.forget(session)

    def _read_status(self) -> dict[str, Any]:
        return self._status.read(
            sessions_open=len(self._intake.sessions), is_full=self._runs.is_full
        )

    def _is_idle_for_long(self) -> bool:
        limit_s = self._config.exit_when_idle_s
        if limit_s is None:
            return False
        if self._intake.sessions or not self._is_delivered():
            self._busy_s = time.monotonic()
        return time.monotonic() - self._busy_s >= limit_s


# ── the start ──


def _allow_many_files() -> None:
    """A node may have hundreds of ranks, each with a connection and a journal: two descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _lock_runtime_folder(config: Config) -> int:
    """Two daemons at one socket would take it from each other; two sockets in one folder would
    share the journals beside them."""
    try:
        private_dir(config.socket.parent)
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


def _open_spool(config: Config) -> Spool:
    try:
        return Spool(
            Disk(),
            config.spool,
            segment_bytes_max=config.segment_bytes_max,
            bytes_max=config.spool_bytes_max,
            free_bytes_min=config.free_bytes_min,
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


def _open_uploads(config: Config, runs: Runs, sink: Sink) -> Uploads:
    """Nothing is started or connected before there is an artifact."""
    from mlflow_relay_daemon.artifacts.helper_client import Helper
    from mlflow_relay_daemon.artifacts.stores import Stores
    from mlflow_relay_daemon.artifacts.uploads import Uploads
    from mlflow_relay_daemon.sinks.rest import RestSink

    helper = Helper(config.tracking_uri, config.artifact_uploads)
    return Uploads(
        runs,
        sink,
        Stores(config.tracking_uri, is_direct=isinstance(sink, RestSink), helper=helper),
        threads=config.artifact_uploads,
        bytes_per_s=config.artifact_bytes_per_s,
        wait_s_max=config.retry_wait_s_max,
    )


def _open_sink(config: Config) -> Any:
    from mlflow_relay_daemon.sinks.open import open_sink

    try:
        return open_sink(config.tracking_uri, timeout_s=config.request_timeout_s)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _open_node_metrics(config: Config, runs: Runs, watcher: Watcher) -> NodeMetrics | None:
    if not config.node_metrics:
        return None
    return NodeMetrics(
        runs,
        OwnRecords(runs),
        interval_s=config.node_metrics_interval_s,
        pid_of=watcher.pid_of if config.rank_process_metrics else None,
    )


def _notify_systemd(message: str) -> None:
    """Speak sd_notify(3) if there is somebody to listen."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(message.encode(), address)
    except OSError as error:
        log.debug("systemd does not listen: %s", error)
