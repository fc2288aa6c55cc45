"""The ids of runs that have left the spool: who was given a relay run id may use it for ever.

One line each: relay run id, MLflow run id.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlflow_relay_daemon.spool.disk import Disk


class FormerRuns:
    """Args: path: of the file. Raises: OSError: it is there and cannot be read."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._path = disk, path
        self._ids: dict[str, str] = {}
        self._whole_bytes = 0  # behind them stands what a crash has cut off
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        self._whole_bytes = data.rfind(b"\n") + 1
        for line in data[: self._whole_bytes].decode("ascii", "replace").splitlines():
            match line.split():
                case [relay_run_id, mlflow_run_id]:
                    self._ids[relay_run_id] = mlflow_run_id

    def get(self, relay_run_id: str) -> str | None:
        """Return the MLflow run id; None: no such run has been here."""
        return self._ids.get(relay_run_id)

    def add(self, relay_run_id: str, mlflow_run_id: str) -> None:
        """Keep an id; it is on the disk when this returns. Raises: OSError."""
        if self._ids.get(relay_run_id) == mlflow_run_id:
            return
        is_new = not self._path.exists()
        fd = self._disk.create(self._path) if is_new else self._disk.open(self._path)
        line = f"{relay_run_id} {mlflow_run_id}\n".encode()
        try:
            self._disk.truncate(fd, self._whole_bytes)
            self._disk.write(fd, line)
            self._disk.sync(fd)
        finally:
            os.close(fd)
        if is_new:
            self._disk.sync_folder(self._path.parent)
        self._whole_bytes += len(line)
        self._ids[relay_run_id] = mlflow_run_id
