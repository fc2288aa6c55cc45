"""Files that a client uploads while the server cannot take them: kept, and uploaded later.

They go the way of a rank's artifacts: a file in the staging folder, fsynced, and a record.
"""

from __future__ import annotations

import os
import shutil
from typing import IO

from mlflow_relay import clock
from mlflow_relay.fingerprint import sample_digest
from mlflow_relay.records import COPY, Artifact, pack_artifact
from mlflow_relay.values import check_artifact_path
from mlflow_relay_daemon.api.errors import invalid, kept
from mlflow_relay_daemon.api.writer import Writer
from mlflow_relay_daemon.hosted import Hosted
from mlflow_relay_daemon.spool.spool import Spool


class Files:
    """Keeps uploads of one daemon."""

    def __init__(self, spool: Spool, writer: Writer) -> None:
        self._spool, self._writer = spool, writer

    def keep(self, hosted: Hosted, path: str, body: IO[bytes]) -> None:
        """Keep a file; it is on the disk when this returns, and so is its record.

        Raises: ApiError: no place in a run; or the disk does not take it.
        """
        try:
            check_artifact_path(path)
        except ValueError as error:
            raise invalid(f"Invalid path: {error}") from None
        name = os.urandom(16).hex()
        folder = self._spool.staging.folder / hosted.run.card.run_id
        with kept():
            self._spool.check_space(body.seek(0, os.SEEK_END))
            body.seek(0)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(folder / name, "x+b", opener=_private) as file:
                shutil.copyfileobj(body, file)
                file.flush()
                os.fsync(file.fileno())
                found = os.fstat(file.fileno())
                digest = sample_digest(file.fileno(), found.st_size)
            self._spool.disk.sync_folder(folder)
            record = Artifact(
                clock.now_ms(),
                path,
                name,
                COPY,
                os.fsencode(folder / name),
                found.st_size,
                found.st_mtime_ns,
                digest,
            )
            self._writer.write(hosted, [pack_artifact(record)])


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
