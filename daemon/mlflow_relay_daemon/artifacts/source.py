"""The file of an artifact, read once from begin to end and found to be what it was at the call."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from mlflow_relay.fingerprint import open_regular, sample_digest
from mlflow_relay.records import LINK, PLACE, Artifact

log = logging.getLogger(__name__)

#: Bytes that are read, hashed and sent at a time.
PIECE_BYTES = 1 << 20


class NoSuchContent(Exception):
    """What was to be uploaded is not there any more; says why. No second try can help."""


class NotReadable(Exception):
    """It is there, and cannot be read now: no permission, a disk in trouble."""


def locate(artifact: Artifact, run_id: str, staging: Path) -> Path:
    """Return where the file lies: in this spool's staging folder, wherever that has been moved to,
    else where the rank put it."""
    if artifact.where != PLACE:
        here = staging / run_id / artifact.id
        if here.exists():
            return here
    return Path(os.fsdecode(artifact.file))


def sync_file(artifact: Artifact, path: Path) -> None:
    """Have a staged file on the disk, name and all. It is safe from the death of processes as it
    is; this is for power failures. What fails here is seen at the upload."""
    for each in (path, path.parent):
        try:
            fd = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # uploaded meanwhile
        except OSError as error:
            log.warning("artifact %r: %s cannot be synced: %s", artifact.path, each, error.strerror)
            return
        try:
            os.fsync(fd)
        except OSError as error:
            log.warning("artifact %r: %s cannot be synced: %s", artifact.path, each, error.strerror)
        finally:
            os.close(fd)


class Source:
    """An open file with its checks. A context manager.

    Args:
        take: called with the number of bytes before they are handed on; it may wait or raise.
        owner: uid whose file it must be: ranks of several users name paths, and what the daemon may
            read is not all theirs. None: of one user.
    Raises: NoSuchContent, NotReadable.
    """

    def __init__(
        self,
        artifact: Artifact,
        path: Path,
        take: Callable[[int], None],
        owner: int | None = None,
    ) -> None:
        self.size = artifact.size
        self.path = path
        self.sent = self.taken = 0
        self._artifact, self._take, self._owner = artifact, take, owner
        self._sha256 = hashlib.sha256()
        try:
            self._fd = open_regular(os.fspath(path))
        except FileNotFoundError:
            raise NoSuchContent(f"{path} is gone{self._advice()}") from None
        except ValueError as error:
            raise NoSuchContent(f"{error}: it was a file when it was logged") from None
        except OSError as error:
            raise self._not_readable(error) from None
        try:
            self.check()
            if self._sample() != artifact.digest:
                raise self._changed()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, size: int = PIECE_BYTES) -> bytes:
        """Return the next bytes, b"" at the end. Raises: NoSuchContent, NotReadable."""
        wanted = min(size if size and size > 0 else PIECE_BYTES, self.size - self.sent)
        if wanted == 0:
            return b""
        self._take(wanted)
        self.taken += wanted
        try:
            data = os.pread(self._fd, wanted, self.sent)
        except OSError as error:
            raise self._not_readable(error) from None
        if len(data) < wanted:
            raise self._changed()
        self._sha256.update(data)
        self.sent += len(data)
        if self.sent == self.size:
            self.check()  # before the last piece is handed on: a torn file is never whole there
        return data

    @property
    def sha256(self) -> str:
        """Hex digits, of what was read."""
        return self._sha256.hexdigest()

    def check(self) -> None:
        """Raises: NoSuchContent: it is not what it was at the call any more."""
        found = os.fstat(self._fd)
        if self._owner is not None and found.st_uid != self._owner:
            raise NoSuchContent(f"{self.path} is not a file of the user whose run it is")
        if found.st_size != self.size or (
            # A copy is ours alone; its time may change when a spool is moved by rsync.
            self._artifact.where in (LINK, PLACE)
            and found.st_mtime_ns != self._artifact.modified_ns
        ):
            raise self._changed()

    def _sample(self) -> bytes:
        try:
            return sample_digest(self._fd, self.size)
        except OSError as error:
            raise self._not_readable(error) from None

    def _not_readable(self, error: OSError) -> NotReadable:
        return NotReadable(f"{self.path} cannot be read: {error.strerror}")

    def _changed(self) -> NoSuchContent:
        return NoSuchContent(f"{self.path} is not what it was when it was logged{self._advice()}")

    def _advice(self) -> str:
        if self._artifact.where == LINK:
            return (
                ": it was kept as a hard link, and somebody has written into it since; write to a "
                "new file and rename it, or raise MLFLOW_RELAY_LINK_BYTES_MIN to have copies"
            )
        if self._artifact.where == PLACE:
            return ": it was logged with copy=False, or there was no room for a copy"
        return ": something else than the relay has touched the staging folder, or the disk failed"
