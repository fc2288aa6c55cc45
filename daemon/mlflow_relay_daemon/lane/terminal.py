"""What ranks have printed → artifacts terminal/rank_<n>.txt, now and then, and at the end."""

from __future__ import annotations

import os
import time
import uuid

from mlflow_relay import clock
from mlflow_relay.fingerprint import sample_digest
from mlflow_relay.records import COPY, Artifact
from mlflow_relay_daemon.spool import staging
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.transcript import Transcript

ARTIFACT = "terminal/rank_{rank}.txt"
#: From one upload to the next: each is of the whole text.
INTERVAL_S_MIN, INTERVAL_S_MAX = 10.0, 600.0


class TerminalOutput:
    """The output of one run's ranks."""

    def __init__(self, run: RunSpool) -> None:
        self._run = run
        self._due_s: dict[int, float] = {}
        self._interval_s: dict[int, float] = {}

    def publish(self, *, is_last: bool) -> float | None:
        """Make artifacts of what is new, where it is time; return in how many seconds it will be
        time again, None: nothing is new.

        Args: is_last: nothing more is coming soon: it is time now.
        Raises: OSError: tried again.
        """
        now_s = time.monotonic()
        waits = []
        for rank, transcript in self._run.terminal.by_rank.items():
            if transcript.is_published:
                continue
            interval_s = self._interval_s.setdefault(rank, INTERVAL_S_MIN)
            due_s = self._due_s.setdefault(rank, now_s + interval_s)
            if now_s < due_s and not is_last:
                waits.append(due_s - now_s)
                continue
            self._publish(transcript)
            self._interval_s[rank] = min(2 * interval_s, INTERVAL_S_MAX)
            self._due_s[rank] = now_s + self._interval_s[rank]
        return min(waits, default=None)

    def _publish(self, transcript: Transcript) -> None:
        """Crash: at any line, it is published again."""
        disk, run_id = self._run.terminal.disk, self._run.card.run_id
        folder = self._run.folder.parent.parent / staging.NAME / run_id
        for each in (folder.parent, folder):
            disk.make_folder(each)
        name, path = uuid.uuid4().hex, ARTIFACT.format(rank=transcript.rank)
        fd = disk.create(folder / name)
        try:
            disk.write(fd, transcript.text())
            disk.sync(fd)
            found = os.fstat(fd)
            digest = sample_digest(fd, found.st_size)
        finally:
            os.close(fd)
        now_ms, file = clock.now_ms(), os.fsencode(folder / name)
        self._run.artifacts.accept(
            [Artifact(now_ms, path, name, COPY, file, found.st_size, found.st_mtime_ns, digest)]
        )
        transcript.mark_published()
