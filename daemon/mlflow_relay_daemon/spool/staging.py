"""The folder in the spool where ranks stage files: what it holds, what is left over, who may add.

<spool>/staging/<relay run id>/<id>      PROTOCOL.md, Artifacts
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from mlflow_relay.paths import staging_notice
from mlflow_relay_daemon.spool.disk import Disk

NAME = "staging"
#: The part of the quota that ranks may fill with files; the rest is kept for records.
QUOTA_PART = 0.9
#: A file that no record names is a rank's that was killed in the middle of the call, or its record
#: is in a journal that nobody has found yet: a day is long enough to tell.
LEFT_OVER_AGE_S = 86_400.0
#: Of a run that this spool does not know: its ranks may not have reached the daemon yet.
UNKNOWN_RUN_AGE_S = 7 * 86_400.0


class Staging:
    """The staging folder of one spool; not there before `publish`."""

    def __init__(self, disk: Disk, spool: Path) -> None:
        self.folder = spool / NAME
        self._disk = disk
        self._known: dict[str, tuple[int, int]] = {}  # run → when its folder changed, bytes
        self._told: bytes = b""

    def publish(self, socket: Path, free_bytes_min: int, bytes_left: int | None) -> None:
        """Tell the ranks of this socket where to stage, and how much. Raises: OSError.

        Args: bytes_left: what the quota leaves for files; None: there is no quota.
        """
        notice = {
            "version": 1,
            "folder": str(self.folder.resolve()),
            "free_bytes_min": free_bytes_min,
            "bytes_left": bytes_left,
        }
        data = json.dumps(notice).encode()
        if data != self._told:
            if not self.folder.is_dir():
                self._disk.make_folder(self.folder)
            self._disk.replace(staging_notice(socket), data, durable=False)
            self._told = data

    def bytes(self) -> int:
        """Return the size of all files in it. Only folders that have changed are looked into."""
        known: dict[str, tuple[int, int]] = {}
        for entry in _entries(self.folder):
            try:
                changed_ns = entry.stat().st_mtime_ns
                before = self._known.get(entry.name)
                if before is None or before[0] != changed_ns:
                    before = changed_ns, sum(each.stat().st_size for each in _entries(entry.path))
            except OSError:
                continue  # a file was uploaded, or a folder removed, just now
            known[entry.name] = before
        self._known = known
        return sum(size for _, size in known.values())

    def sweep(self, wanted: Callable[[str], set[str] | None], now_s: float | None = None) -> int:
        """Remove what is left over; return how many files that were.

        Args:
            wanted: returns the ids that a run may still need, None: all of them; raises KeyError
                if nothing is known of the run.
            now_s: since 1970.
        """
        now_s = time.time() if now_s is None else now_s
        removed = 0
        for folder in _entries(self.folder):
            try:
                ids, age_s = wanted(folder.name), LEFT_OVER_AGE_S
            except KeyError:
                ids, age_s = set(), UNKNOWN_RUN_AGE_S
            if ids is None:
                continue
            for file in _entries(folder.path):
                # The time of a hard link's content is its user's; that of its making is ours.
                if file.name not in ids and now_s - file.stat().st_ctime > age_s:
                    os.unlink(file.path)
                    removed += 1
            if not _entries(folder.path) and now_s - folder.stat().st_mtime > age_s:
                os.rmdir(folder.path)
        return removed


def _entries(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
