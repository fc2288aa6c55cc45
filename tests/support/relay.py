"""A real daemon and real ranks, each a process of its own that a test may kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

#: For things that take a second on an idle machine; a test that waits so long has failed.
PATIENCE_S = 60.0
POLL_S = 0.02


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = PATIENCE_S) -> T:
    """Return what the condition returns as soon as it is true. Raises: AssertionError: too late."""
    until_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < until_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)
    return found


class Node:
    """One compute node: a daemon, its spool, its runtime folder, and ranks.

    Args:
        folder: for spool and logs.
        tracking_uri: where the daemon delivers to.
        settings: further settings of the daemon by name, such as {"batch_age_s": 0.05}.
        spool, runtime: other places than usual for the spool and for socket and journals.
        within: a command that runs the daemon, such as one that enters a namespace.
    """

    def __init__(
        self,
        folder: Path,
        tracking_uri: str,
        *,
        settings: dict[str, object] | None = None,
        spool: Path | None = None,
        runtime: Path | None = None,
        within: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._within = within
        self.spool = spool or folder / "spool"
        # A unix socket's path is short, pytest's folders are not.
        self._own_runtime = runtime is None
        self.runtime = runtime or Path(tempfile.mkdtemp(prefix="relay-", dir="/dev/shm"))
        self.socket = self.runtime / "relay.sock"
        self.log = folder / "daemon.log"
        self.environ = _clean_environ()
        self.environ["MLFLOW_RELAY_SOCKET"] = str(self.socket)
        self.environ["MLFLOW_RELAY_TERMINAL"] = "none"
        self._daemon_environ = {
            **self.environ,
            "MLFLOW_RELAY_SPOOL": str(self.spool),
            "MLFLOW_RELAY_TRACKING_URI": tracking_uri,
            "MLFLOW_RELAY_FREE_BYTES_MIN": "0",
            "MLFLOW_RELAY_BATCH_AGE_S": "0.05",
            "MLFLOW_RELAY_RETRY_WAIT_S_MAX": "0.5",
            "MLFLOW_RELAY_NODE_METRICS": "0",  # tests count what their ranks have logged
        }
        for name, value in (settings or {}).items():
            self._daemon_environ["MLFLOW_RELAY_" + name.upper()] = str(value)
        self.daemon: subprocess.Popen[bytes] | None = None
        self.ranks: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.ranks, *([self.daemon] if self.daemon else [])):
            if process.poll() is None:
                process.kill()
                process.wait()
        if self._own_runtime:
            shutil.rmtree(self.runtime)

    # ── the daemon ──

    def start(self, *, wait: bool = True) -> None:
        """Start the daemon; return when it answers."""
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                [*self._within, sys.executable, "-m", "mlflow_relay_daemon", "daemon"],
                env=self._daemon_environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if wait:
            self.wait_until_it_answers()

    def wait_until_it_answers(self) -> None:
        daemon = self.daemon
        assert daemon is not None
        from mlflow_relay_daemon.control_client import ControlClient, NoDaemon

        def answers() -> bool:
            assert daemon.poll() is None, f"the daemon ended:\n{self.log.read_text()[-3000:]}"
            try:
                with ControlClient(self.socket) as control:
                    return bool(control.ping()["pid"] == daemon.pid)
            except NoDaemon:
                return False

        wait_until(answers, "the daemon answers")

    def kill(self) -> None:
        """SIGKILL."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def stop(self, timeout_s: float = PATIENCE_S) -> int:
        """SIGTERM; return the exit status."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait(timeout_s)

    def status(self) -> dict[str, Any]:
        """Return the status object of the living daemon."""
        from mlflow_relay_daemon.control_client import ControlClient

        with ControlClient(self.socket) as control:
            return control.status()

    def run(self, run_id: str | None = None) -> dict[str, Any]:
        """Return the status of the only run, or of this one."""
        runs = [each for each in self.status()["runs"] if run_id in (None, each["run_id"])]
        assert len(runs) == 1, f"{len(runs)} runs"
        found: dict[str, Any] = runs[0]
        return found

    def wait_until_ended(self, run_id: str | None = None, timeout_s: float = PATIENCE_S) -> Any:
        """Return the run's status once MLflow knows how it ended and has all of it."""

        def ended() -> dict[str, Any] | None:
            if not self.status()["runs"]:
                return None
            run = self.run(run_id)
            return run if run["state"] == "ended" else None

        return wait_until(ended, "the run ended and is delivered", timeout_s)

    def command(self, *arguments: str, timeout_s: float = PATIENCE_S) -> Any:
        """Run `mlflow-relay ...` for this node; return the finished process (text)."""
        return subprocess.run(
            [sys.executable, "-m", "mlflow_relay_daemon", *arguments],
            env=self._daemon_environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    # ── ranks ──

    def rank(
        self, script: str, *arguments: object, environ: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a Python script as a rank; its output is to be read from the process."""
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            env={**self.environ, **(environ or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.ranks.append(process)
        return process


def finish(processes: Sequence[subprocess.Popen[str]], timeout_s: float = PATIENCE_S) -> list[str]:
    """Wait for ranks that must end well; return what each printed."""
    outputs = [rest_of(process, timeout_s) for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def rest_of(process: subprocess.Popen[str], timeout_s: float = PATIENCE_S) -> str:
    """Return what a process prints until its end.

    Not by `communicate`, which misses what a `readline` before it has read ahead.
    """
    assert process.stdout is not None
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    output = process.stdout.read()
    process.wait(timeout_s)
    return output


def last_json(output: str) -> Any:
    """Return what a rank printed last, as JSON."""
    return json.loads(output.strip().splitlines()[-1])


def _clean_environ() -> dict[str, str]:
    """Return the environment without what would tell a process who it is, or where MLflow is; and
    without what has a line written in two parts, between which another thread's may come."""
    foreign = ("MLFLOW_", "SLURM_", "OMPI_", "PMI", "TORCHELASTIC_", "XDG_")
    names = (
        "PYTHONUNBUFFERED",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and name not in names
    }
