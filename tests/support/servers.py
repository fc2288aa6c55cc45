"""A real MLflow server on SQLite, that tests may stop, kill and start again on the same port."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

#: key, value, timestamp in ms, step
Point = tuple[str, float, int, int]

START_TIMEOUT_S = 120.0  # 6 s on an idle machine
POLL_S = 0.05
PORT_ATTEMPTS = 20
# Below Linux's range for outgoing connections (32768 and up): while the server is down between
# kill() and start(), nobody's client socket can be given its port.
PORTS = range(20000, 32000)

_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # starts faster; not needed here
    "MLFLOW_DISABLE_TELEMETRY": "true",  # tests stay on loopback
    "DO_NOT_TRACK": "true",
}


class MlflowServer:
    """`mlflow server` in a folder of its own; `uri` stays the same over restarts.

    Args:
        folder: where database, artifacts and log go; made if it is not there.
        arguments: further arguments of `mlflow server`.
        environ: further environment variables of the server.
    """

    def __init__(
        self,
        folder: Path,
        *,
        arguments: Sequence[str] = (),
        environ: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.database = folder / "mlflow.db"
        self.log = folder / "server.log"
        self.port = 0
        self._log_start = 0
        self._arguments = list(arguments)
        self._environ = {**os.environ, **_ENVIRONMENT, **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """The tracking URI; known once the server was started for the first time."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it answers; on the port it had before, if it had one.

        Raises: RuntimeError: it ended or did not answer in time, with the end of its log.
        """
        fixed = self.port != 0
        for _ in range(PORT_ATTEMPTS):
            if not fixed:
                self.port = free_port()
            self._launch()
            if self._wait_until_healthy():
                return
            taken = "address already in use" in self._log_end().lower()
            self.kill()
            if fixed or not taken:
                break
        raise RuntimeError(f"mlflow server at {self.uri} did not start:\n{self._log_end()}")

    def stop(self) -> None:
        """End it as an administrator would (SIGTERM), by force if that takes too long."""
        self._signal(signal.SIGTERM, timeout_s=15.0)
        self.kill()

    def kill(self) -> None:
        """End it at once (SIGKILL), its workers too; open connections are reset."""
        self._signal(signal.SIGKILL, timeout_s=15.0)
        self._process = None
        if self.port:
            self._wait_until_refused()

    def freeze(self) -> None:
        """SIGSTOP: connections are accepted by the kernel, and nobody answers."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal_all(signal.SIGCONT)

    def restart(self) -> None:
        """Stop and start again: the same port, the same database."""
        self.stop()
        self.start()

    def client(self) -> MlflowClient:
        """Return MLflow's own client for this server, to look at things from outside."""
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.uri)

    def all_points(self, run_id: str) -> list[Point]:
        """Return every stored point of a run, sorted by key, step and time.

        Read from the database file, so it works while the server is down. NaN is NaN; MLflow
        stores the infinities as +-1.7976931348623157e308.
        """
        with contextlib.closing(self._read_only()) as database:
            rows = database.execute(
                "SELECT key, value, is_nan, timestamp, step FROM metrics WHERE run_uuid = ?",
                (run_id,),
            ).fetchall()
        points = [
            (key, float("nan") if is_nan else value, timestamp_ms, step)
            for key, value, is_nan, timestamp_ms, step in rows
        ]
        return sorted(points, key=_order)

    def all_points_by_api(self, run_id: str) -> list[Point]:
        """Return the same through MLflow's API, as a user would see it; slow."""
        client = self.client()
        return sorted(
            (
                (metric.key, metric.value, metric.timestamp, metric.step)
                for key in client.get_run(run_id).data.metrics
                for metric in client.get_metric_history(run_id, key)
            ),
            key=_order,
        )

    def run_ids(self) -> list[str]:
        """Return the ids of all runs, deleted ones too, oldest first."""
        with contextlib.closing(self._read_only()) as database:
            rows = database.execute("SELECT run_uuid FROM runs ORDER BY start_time, rowid")
            return [run_id for (run_id,) in rows.fetchall()]

    def _read_only(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=30.0)

    def _launch(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--backend-store-uri", f"sqlite:///{self.database}"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
            *self._arguments,
        ]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: one signal reaches the server and its workers, and only them.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environ, start_new_session=True
            )

    def _wait_until_healthy(self) -> bool:
        """Wait until /health answers; False as soon as the process has ended, or time is up."""
        assert self._process is not None
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            # A stranger on our port would answer too, but then our own process ends.
            if self._answers() and self._is_ours():
                return True
            time.sleep(POLL_S)
        return False

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5.0) as answer:
                return bool(answer.read() == b"OK")
        except OSError:
            return False

    def _is_ours(self) -> bool:
        """Tell whether it is our worker that has served this health check, by its log."""
        return f":{self.port} (Press CTRL+C" in self._log_end()

    def _wait_until_refused(self) -> None:
        """Wait until nobody listens: a killed worker may outlive its parent by a moment."""
        deadline_s = time.monotonic() + 10.0
        while time.monotonic() < deadline_s:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) != 0:
                    return
            time.sleep(POLL_S)

    def _signal(self, number: signal.Signals, timeout_s: float) -> None:
        """Signal the whole group of our process and wait for the process to end."""
        if self._process is None:
            return
        self._signal_all(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def _signal_all(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)  # its group has its id: start_new_session

    def _log_end(self) -> str:
        """Return what the present process has logged, the last 4000 characters of it."""
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[self._log_start :].decode("utf-8", "replace")[-4000:]
        return ""


def free_port() -> int:
    """Return a loopback port that nobody uses now and that is not given to client sockets."""
    for _ in range(100):
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port between {PORTS.start} and {PORTS.stop}")


def _order(point: Point) -> tuple[str, int, int, str]:
    key, value, timestamp_ms, step = point
    return key, step, timestamp_ms, repr(value)  # repr: NaN has no order
