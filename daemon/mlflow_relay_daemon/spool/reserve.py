"""Space put by for what delivery must write on a full disk: run cards and dead letters.

Delivery gives space back, but first it has to note what it did. On a disk that somebody else has
filled to the last byte it could not, and nothing would ever be given back.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mlflow_relay_daemon.spool.disk import Disk

log = logging.getLogger(__name__)

RESERVE_BYTES = 512 << 10  # many cards of some KB, each replaced by its next; little on any disk


class Reserve:
    """A file that takes space until that is needed. Safe in threads.

    Args: path: of the file.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._path = disk, path
        self.missing_bytes = 0 if path.exists() else RESERVE_BYTES

    def spend(self) -> bool:
        """Give the space free; return False if that was done before."""
        if self.missing_bytes:
            return False
        self.missing_bytes = RESERVE_BYTES
        self._disk.unlink(self._path)
        return True

    def restore(self, free_bytes: int) -> None:
        """Put the space by again once twice as much is free: not what was spent a moment ago."""
        if not self.missing_bytes or free_bytes < 2 * RESERVE_BYTES:
            return
        try:
            fd = self._disk.create(self._path)
            try:
                os.posix_fallocate(fd, 0, RESERVE_BYTES)
            finally:
                os.close(fd)
        except OSError as error:  # another time
            log.debug("no reserve: %s", error.strerror)
            self._disk.unlink(self._path)
        else:
            self.missing_bytes = 0
