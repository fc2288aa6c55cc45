"""Records that the daemon itself adds to a run: through the spool, like those of the ranks.

They have a session of their own, which is no rank's: it is in no card, keeps no run alive and says
nothing of its end. What is on the disk is delivered once, whatever happens to the daemon; what is
not, never was.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from mlflow_relay.frames import (
    FRAME_BYTES_TARGET,
    cut_entries,
    pack_entry,
    pack_frame,
    read_header,
)
from mlflow_relay.messages import SESSION_BYTES
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.spool.run_spool import Arrival


def frames_of(session: bytes, first_seq: int, records: Sequence[bytes]) -> list[Arrival]:
    """Return records as the frames in which intake would have them from a rank."""
    body = b"".join(map(pack_entry, records))
    found: list[Arrival] = []
    at, seq = 0, first_seq
    while at < len(body):
        count, end = cut_entries(body, at, len(body), FRAME_BYTES_TARGET)
        frame = pack_frame(session, seq, count, body[at:end])
        found.append((read_header(frame), frame))
        at, seq = end, seq + count
    return found


class OwnRecords:
    """Appends to the runs of this daemon. Called by the thread that appends for the ranks, too."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._session = os.urandom(SESSION_BYTES)

    def append(self, hosted: Hosted, records: Sequence[bytes]) -> None:
        """Return when the records are on the disk.

        Raises: OSError: they are not. Crash: any of them may be found, each whole.
        """
        frames = frames_of(self._session, hosted.run.next_seq(self._session), records)
        try:
            self._runs.append(hosted, frames)
        except OSError:
            # Nobody can tell what of it is on the disk: its numbers are not used again.
            self._session = os.urandom(SESSION_BYTES)
            raise
