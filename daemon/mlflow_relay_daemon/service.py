"""Start, loop, stop."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from mlflow_relay._version import __version__
from mlflow_relay.paths import journal_dir
from mlflow_relay_daemon import opening, systemd
from mlflow_relay_daemon.access import Access, gid_of
from mlflow_relay_daemon.adoption import Watcher
from mlflow_relay_daemon.combiner import Combiner
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.control import Control
from mlflow_relay_daemon.counters import Counters, Durations
from mlflow_relay_daemon.delivery import Delivery
from mlflow_relay_daemon.exits import DEGRADED, DONE
from mlflow_relay_daemon.hosted import Runs
from mlflow_relay_daemon.intake import Intake
from mlflow_relay_daemon.lane.links import LineageParams
from mlflow_relay_daemon.lease import is_leased
from mlflow_relay_daemon.logs import say_repeats, set_up_logging
from mlflow_relay_daemon.own_records import OwnRecords
from mlflow_relay_daemon.reload import take_over
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.sinks.redact import redact_uri
from mlflow_relay_daemon.status import StatusReader
from mlflow_relay_daemon.words import plural

if TYPE_CHECKING:
    from mlflow_relay_daemon.api.http import HttpServer
    from mlflow_relay_daemon.artifacts.uploads import Uploads

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How often journals are looked at: within it a vanished rank is noticed.
LOOK_EVERY_S = 0.5
TIDY_EVERY_S = 60.0
#: The default interval, 5 ms, is how long a lane that computes may keep intake from its socket.
SWITCH_INTERVAL_S = 0.0005
#: How long other threads wait for the loop: one fsync of a busy disk.
LOOP_TIMEOUT_S = 5.0


def run_daemon(config: Config, load_again: Callable[[], Config] | None = None) -> int:
    """Serve until told to stop; return an exit code.

    Args: load_again: reads the settings anew, at SIGHUP; raises ConfigError.
    Raises: CommandError: it cannot start; says what to do.
    """
    set_up_logging(config.log_level, config.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    opening.allow_many_files()
    service = Service(config)
    service.load_again = load_again
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, service.request_stop)
    signal.signal(signal.SIGHUP, service.request_reload)
    try:
        service.serve()
        return service.drain()
    finally:
        service.close()
        say_repeats(at_once=True)


class Service:
    """All parts of one daemon.

    Raises: CommandError: the spool or the socket is taken, cannot be written, ...
    """

    def __init__(self, config: Config) -> None:
        self.config = self._config = config
        self.load_again: Callable[[], Config] | None = None
        self._is_to_reload = False
        self._stopped_s: float | None = None  # when it was told to leave
        self._is_leased = True
        self._looked_s = self._busy_s = self._tidied_s = time.monotonic()
        self._asked: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._runtime_lock = opening.lock_runtime_folder(config)
        self._spool = opening.open_spool(config)
        self._uploads: Uploads | None = None
        self._look_after_files()
        self._delivery = None
        sink = breaker = None
        if not config.offline:
            sink = opening.open_sink(config)
            breaker = Breaker(cap_s=config.retry_wait_s_max)
            self._delivery = Delivery(
                breaker, threads=config.delivery_threads, batch_age_s=config.batch_age_s
            )
        counters = Counters()
        names = LineageParams(config.lineage_params or (), config.lineage_fork_params or ())
        gid = gid_of(config.group)
        access = Access(os.getuid(), is_shared=gid is not None)
        self.runs = self._runs = Runs(
            self._spool,
            sink,
            breaker,
            self._delivery,
            names,
            artifact_wait_s=config.artifact_wait_s,
            access=access,
        )
        self._uploads = self._runs.uploads = sink and opening.open_uploads(config, self._runs, sink)
        self._watcher = Watcher(journal_dir(config.socket), self._runs, counters)
        self._combiner = Combiner(self._runs, OwnRecords(self._runs), config.reduce_deadline_s)
        self._node_metrics = opening.open_node_metrics(config, self._runs, self._watcher)
        self._status = StatusReader(config, self._runs, self._watcher, counters)
        control = Control(
            self._runs, self.read_status, self._look, self._watcher.in_journals, self._open_door
        )
        self._intake = Intake(
            config.socket,
            self._runs,
            control,
            counters,
            config.group_bytes_max,
            gid=gid,
        )
        self.status_for = control.status_for
        control.answer_later = self._intake.answer_later
        self._door_lock = threading.Lock()
        self._http = self._open_http()

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
        if self._http is not None:
            self._http.start()
        systemd.notify("READY=1")
        while not self._is_over():
            self._turn()
        systemd.notify("STOPPING=1")
        systemd.extend_timeout(self._config.drain_timeout_s)

    def drain(self) -> int:
        """Deliver what is left, for as long as the drain may take; return an exit code."""
        until_s = (self._stopped_s or time.monotonic()) + self._config.drain_timeout_s
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
        if self._watcher.is_behind or self._watcher.is_stuck:
            log.error(
                "not all that dead ranks left in memory, in %s, is on the disk: start the daemon "
                "here again before the machine is switched off",
                self._watcher.folder,
            )
            return DEGRADED
        return DONE if not (left or files) or self._config.offline else DEGRADED

    def request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        """Signal handler: only sets a flag."""
        self._stopped_s = self._stopped_s or time.monotonic()
        self._intake.wake()

    def request_reload(self, _signum: int, _frame: FrameType | None) -> None:
        """Signal handler: only sets a flag. A login shell that ends sends this, too."""
        self._is_to_reload = True
        self._intake.wake()

    def in_loop(self, function: Callable[[], T]) -> T:
        """Return what a function returns that the loop's thread runs; for all other threads.

        Raises: TimeoutError: the loop did not come to it; and whatever the function raises.
        """
        answer: Future[T] = Future()
        self._asked.append((answer, function))
        self._intake.wake()
        try:
            return answer.result(LOOP_TIMEOUT_S)
        finally:
            answer.cancel()  # nobody waits for it any more

    def delivery_failures(self) -> int:
        """Return how many requests the server did not answer."""
        return 0 if self._runs.breaker is None else self._runs.breaker.failures_total

    def sync_times(self) -> Durations:
        """Return how long the spool's disk took."""
        return self._spool.disk.sync_times

    @property
    def is_full(self) -> bool:
        """Whether the last thing that was to be stored was not."""
        return self._runs.is_full

    def stalled_s(self) -> float:
        """Return since when the loop has not come round; normally less than a second."""
        return time.monotonic() - self._looked_s

    def close(self) -> None:
        if self._http is not None:
            self._http.stop()
        self._intake.close()
        self._stop_delivery()
        self._spool.close()
        os.close(self._runtime_lock)

    # ── the loop ──

    def _turn(self, wait_s: float = LOOK_EVERY_S) -> None:
        self._intake.turn(wait_s)
        self._answer_threads()
        if self._is_to_reload:
            self._is_to_reload = False
            self._reload()
        if time.monotonic() - self._looked_s >= LOOK_EVERY_S:
            self._intake.endpoint.look()
            self._look()
            if self._node_metrics is not None and not self._watcher.is_behind:
                self._node_metrics.look(self._looked_s)
            if self._delivery is not None:
                self._combiner.look(self._looked_s)
            self._runs.return_space()
            self._runs.look_for_space()
            if self._runs.host_unread(self._looked_s):
                self._watcher.expect_vanished()
            self._tidy()
            self._look_after_files()
            say_repeats()
            self._is_leased = self._config.sidecar and is_leased(self._config.socket.parent)
            systemd.notify("WATCHDOG=1")

    def _tidy(self) -> None:
        """Once a minute: a node lives for months, and sees thousands of runs."""
        keep_s = self._config.keep_ended_s
        if keep_s is not None and self._looked_s - self._tidied_s >= min(TIDY_EVERY_S, keep_s):
            self._tidied_s = self._looked_s
            self._runs.remove_ended(keep_s)

    def _look_after_files(self) -> None:
        try:
            self._spool.publish_staging(self._config.socket)
        except OSError as error:
            log.debug("ranks are not told where to stage files: %s", error)
        if self._uploads is not None:
            self._uploads.look()

    def _is_delivered(self) -> bool:
        """Return whether lanes and artifacts have nothing to do, nor will have when there is space
        for what dead ranks left."""
        if self._delivery is None or self._uploads is None:
            return True
        if self._watcher.is_behind or self._watcher.is_stuck:
            return False
        is_idle = self._delivery.is_idle() and not self._combiner.is_waiting()
        return is_idle and self._uploads.is_idle()

    def _stop_delivery(self) -> None:
        if self._uploads is not None:
            self._uploads.stop()
        if self._delivery is not None:
            self._delivery.stop()

    def _answer_threads(self) -> None:
        while self._asked:
            answer, function = self._asked.popleft()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(function())
            except Exception as error:  # noqa: BLE001  # who asked is to know
                answer.set_exception(error)

    def _reload(self) -> None:
        """Read the settings anew, take over what can be, and ask the server again: a token may be
        new."""
        systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        if self.load_again is not None:
            self._config = self.config = take_over(self._config, self.load_again, self._apply)
        if self._delivery is not None:
            self._delivery.deliver_now([])
        systemd.notify("READY=1")

    def _apply(self, config: Config) -> None:
        set_up_logging(config.log_level, config.log_format)
        self._spool.bytes_max = config.spool_bytes_max
        self._spool.free_bytes_min = config.free_bytes_min
        self._intake.group_bytes_max = config.group_bytes_max
        if self._delivery is not None:
            self._delivery.batch_age_s = config.batch_age_s
        if self._runs.breaker is not None:
            self._runs.breaker.cap_s = config.retry_wait_s_max

    def _look(self) -> None:
        self._looked_s = now_s = time.monotonic()
        heard_s = {name: each.heard_s for name, each in self._intake.sessions.items()}
        for session in self._watcher.look(heard_s, now_s):
            self._intake.forget(session)

    def read_status(self) -> dict[str, Any]:
        """Return the status object. In the loop's thread."""
        return self._status.read(
            sessions_open=len(self._intake.sessions),
            accepts_ranks=not self._intake.endpoint.is_hidden,
            is_full=self._runs.is_full,
            http_port=None if self._http is None else self._http.port,
        )

    def _open_http(self) -> HttpServer | None:
        """Return the HTTP server, if one is wanted and has its port."""
        port = self._config.http_port
        if port is None:
            return None
        from mlflow_relay_daemon.api.http import HttpServer

        try:
            return HttpServer(self, port)
        except OSError as error:
            # Ranks do not need it: a port that another user's daemon has is no reason to stay away.
            log.error(
                "no HTTP on port %d: %s: choose another --http-port, or 0 for any that is free",
                port,
                error.strerror,
            )
            return None

    def _open_door(self) -> tuple[int, str]:
        """Return port and token of the local endpoint, started if nobody has asked for it yet; from
        a thread, for what it imports takes a moment.

        Raises: OSError, CommandError: there is none.
        """
        from mlflow_relay_daemon.api.http import HttpServer

        with self._door_lock:
            if self._http is None:
                self._http = HttpServer(self, 0)
                self._http.start()
            return self._http.port, self._http.token

    def _is_over(self) -> bool:
        """Return whether to leave: told to, or not needed any more.

        A sidecar shares the fate of the job's processes, and the SIGTERM that ends the job reaches
        all of them: it stays for those that still write their last words.
        """
        stopped_s = self._stopped_s
        if not self._config.sidecar:
            return stopped_s is not None or self._is_idle_for_long()
        if not self._is_leased and not self._intake.sessions:
            return True
        limit_s = self._config.drain_timeout_s
        return stopped_s is not None and time.monotonic() - stopped_s >= limit_s

    def _is_idle_for_long(self) -> bool:
        limit_s = self._config.exit_when_idle_s
        if limit_s is None:
            return False
        if self._intake.sessions or not self._is_delivered():
            self._busy_s = time.monotonic()
        return time.monotonic() - self._busy_s >= limit_s
