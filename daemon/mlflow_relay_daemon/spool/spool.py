"""The daemon's directory: one folder per run, one daemon at a time.

<spool>/lock                   held while a daemon lives
<spool>/runs/<relay run id>/   card.json, <n>.segment, watermark, dead_letters.jsonl
<spool>/staging/               files that are to be artifacts
<spool>/removed/               runs on their way out; nothing in it is ever needed again
<spool>/quarantine/            what could not be read; nothing in it is ever needed again
<spool>/reserve                space for the cards of runs on a full disk
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool import segment
from mlflow_relay_daemon.spool.card import Card
from mlflow_relay_daemon.spool.disk import Disk, lock_file
from mlflow_relay_daemon.spool.reserve import Reserve
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.staging import QUOTA_PART, Staging

log = logging.getLogger(__name__)

RUNS, QUARANTINE, LOCK, NODE, RESERVE = "runs", "quarantine", "lock", "node", "reserve"
REMOVED = "removed"
#: How often a run is tried again that the disk did not let us read.
UNREAD_EVERY_S = 10.0
#: How often the free space is asked for; between two questions at most a few groups are written.
FREE_SPACE_EVERY_S = 0.2


class RunLeftAlone(Exception):
    """What stands in the spool of this run cannot be read now, and must not be written over."""


class SpoolTaken(Exception):
    """Another daemon holds this spool."""


class Spool:
    """All runs of one daemon.

    Args:
        folder: made if it is not there, for this user alone.
        segment_bytes_max: size at which a run's segment is followed by another.
        bytes_max: quota of all segments and staged files, None: none.
        free_bytes_min: free space that is left to others.
        on_progress: called before each run that is opened; one with much to read takes seconds.

    Raises: SpoolTaken; OSError: the folder cannot be made or written.
    """

    def __init__(
        self,
        disk: Disk,
        folder: Path,
        *,
        segment_bytes_max: int,
        bytes_max: int | None = None,
        free_bytes_min: int = 0,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.disk, self.folder = disk, folder
        self.bytes_max, self.free_bytes_min = bytes_max, free_bytes_min
        self.runs: dict[str, RunSpool] = {}
        self._left_alone: dict[str, str] = {}  # runs that cannot be opened, and why
        self._unread: list[Path] = []  # those of them that may be opened another time
        self._unread_asked_s = time.monotonic()
        self._not_movable: set[Path] = set()
        self._segment_bytes_max = segment_bytes_max
        self._free_bytes, self._free_asked_s = 0, float("-inf")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        disk.sync_folder(folder.parent)
        lock = lock_file(folder / LOCK)
        if lock is None:
            raise SpoolTaken(str(folder))
        self._lock = lock
        self.node = self._read_node()
        self.staging = Staging(disk, folder)
        for name in (RUNS, QUARANTINE):
            disk.make_folder(folder / name)
        shutil.rmtree(folder / REMOVED, ignore_errors=True)
        self.reserve = Reserve(disk, folder / RESERVE)
        self.reserve.restore(self.free_bytes())
        self.quarantined = sum(1 for _ in (folder / QUARANTINE).iterdir())
        for path in sorted((folder / RUNS).iterdir()):
            on_progress()
            if path.is_dir():  # else it is nothing of ours
                self._open_found(path)

    def open_run(self, card: Card) -> RunSpool:
        """Return the run of this card; a new folder, still without a card, is on the disk then.

        Raises: OSError; RunLeftAlone.
        """
        run = self.runs.get(card.run_id)
        if run is None:
            why = self._left_alone.get(card.run_id)
            if why is not None:
                raise RunLeftAlone(f"the daemon cannot read what it has of this run: {why}")
            self.check_space(0)
            self._keep_node()
            folder = self.folder / RUNS / card.run_id
            self.disk.make_folder(folder)
            run = RunSpool(self.disk, folder, card, segment_bytes_max=self._segment_bytes_max)
            self.runs[card.run_id] = run
        return run

    def open_unread(self, now_s: float) -> list[RunSpool]:
        """Try again, now and then, to open what the disk did not let us read at the start; return
        the runs that are open now."""
        if not self._unread or now_s - self._unread_asked_s < UNREAD_EVERY_S:
            return []
        self._unread_asked_s = now_s
        folders, self._unread = self._unread, []
        for folder in folders:
            self._open_found(folder, is_trusted=False)
        return [self.runs[each.name] for each in folders if each.name in self.runs]

    def remove(self, run: RunSpool) -> None:
        """Remove a run of which nothing is wanted any more.

        Raises: OSError: it is there as before. Crash: it is there as before, or not at all.
        """
        removed = self.folder / REMOVED
        removed.mkdir(exist_ok=True)
        run.folder.rename(removed / run.folder.name)
        del self.runs[run.card.run_id]
        run.close()
        shutil.rmtree(removed, ignore_errors=True)

    def check_space(self, size: int) -> None:
        """Raises: OSError (ENOSPC, EDQUOT): no room for so many bytes, by our own limits."""
        if self.bytes_max is not None and self._bytes() + size > self.bytes_max:
            raise OSError(errno.EDQUOT, f"the quota of {self.bytes_max} bytes is reached")
        if self.free_bytes() - size < self.free_bytes_min + self.reserve.missing_bytes:
            raise OSError(errno.ENOSPC, f"under {self.free_bytes_min} bytes are free")

    def segment_bytes(self) -> int:
        """Return what the segments of all runs take."""
        return sum(run.segment_bytes() for run in list(self.runs.values()))

    def _bytes(self) -> int:
        """What counts for the quota. Of staged files only those that are known from their records:
        the others can only be uploaded, and make space, when their records are taken."""
        staged = sum(run.artifacts.staged_bytes for run in list(self.runs.values()))
        return self.segment_bytes() + staged

    def publish_staging(self, socket: Path) -> None:
        """Tell ranks where to stage files, and how much may come. Raises: OSError."""
        left = None
        if self.bytes_max is not None:
            filled = self.segment_bytes() + self.staging.bytes()
            left = max(0, int(self.bytes_max * QUOTA_PART) - filled)
        self.staging.publish(socket, self.free_bytes_min, left)

    def free_bytes(self) -> int:
        """Return the free space of the spool's disk, a moment old at most."""
        now_s = time.monotonic()
        if now_s - self._free_asked_s > FREE_SPACE_EVERY_S:
            self._free_bytes, self._free_asked_s = self.disk.free_bytes(self.folder), now_s
        return self._free_bytes

    def quarantine(self, path: Path, why: object) -> None:
        """Put aside what cannot be read, so that it stops nobody and can be looked at."""
        if path in self._not_movable:
            return
        target = self.folder / QUARANTINE / f"{time.time_ns()}-{path.name}"
        log.error("%s cannot be read (%s): put aside as %s", path.name, why, target)
        self.quarantined += 1
        try:
            shutil.move(path, target)
        except OSError as error:
            self._not_movable.add(path)
            log.error("%s cannot be put aside: %s", path.name, error.strerror)

    def close(self) -> None:
        for run in self.runs.values():
            run.close()
        os.close(self._lock)

    def _read_node(self) -> str:
        """Return this spool's name among the nodes of a run: two on one machine differ."""
        try:
            return (self.folder / NODE).read_text(errors="replace").strip()
        except FileNotFoundError:
            return f"{os.uname().nodename}.{os.urandom(4).hex()}"

    def _keep_node(self) -> None:
        """Have the name on the disk before it is told: not before, the disk may be full."""
        path = self.folder / NODE
        if not path.exists():
            self.disk.replace(path, self.node.encode(), durable=True)

    # ── what is found at the start ──

    def _open_found(self, folder: Path, *, is_trusted: bool = True) -> None:
        """Open a run that an earlier life left; nothing in it may stop the daemon."""
        try:
            if all(path.name.endswith(".new") for path in folder.iterdir()):
                shutil.rmtree(folder)  # a crash before its card was written: nothing was accepted
                return
            card = self._card_of(folder)
            run = RunSpool(
                self.disk,
                folder,
                card,
                segment_bytes_max=self._segment_bytes_max,
                is_trusted=is_trusted,
            )
        except VersionError as error:
            self._left_alone[folder.name] = str(error)
            log.error("run %s is left alone: %s", folder.name, error)
        except (FormatError, ValueError) as error:
            self.quarantine(folder, error)
        except OSError as error:
            self._unread.append(folder)
            why, told = error.strerror or str(error), self._left_alone.get(folder.name)
            self._left_alone[folder.name] = why
            if why != told:
                log.error("run %s cannot be read and is left alone: %s", folder.name, error)
        else:
            if self._left_alone.pop(folder.name, None) is not None:
                log.warning("run %s can be read again", folder.name)
            self.runs[card.run_id] = run

    def _card_of(self, folder: Path) -> Card:
        try:
            return cards.read(folder)
        except VersionError:
            raise
        except (FormatError, FileNotFoundError) as error:
            card = card_in_segments(folder)
            if card is None:
                raise FormatError(str(error)) from error
            if (folder / cards.NAME).exists():
                self.quarantine(folder / cards.NAME, error)
            cards.write(self.disk, folder, card)
            return card


def card_in_segments(folder: Path) -> Card | None:
    """Return the card as it was when the newest readable segment was begun."""
    for number in reversed(segment.numbers_in(folder)):
        fd = os.open(segment.path_of(folder, number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cards.unpack(segment.read_head(fd)[0].card)
        except FormatError:
            continue
        finally:
            os.close(fd)
    return None
