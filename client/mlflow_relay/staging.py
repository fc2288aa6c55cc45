"""A file → a place where it is safe until the daemon has brought it to MLflow.

    reflink   at once; a copy of its own          btrfs, XFS, ... on one file system
    hard link at once; shares later writes        large files, one file system
    copy      as long as a copy takes             everything else
    in place  at once; the user's own file        on request, or where there is no space for a copy

Where: MLFLOW_RELAY_STAGING, else what the daemon wrote into the notice beside its socket (a folder
in its spool), else the place of the default spool. Never beside the journal: that is memory, and a
checkpoint does not belong there. INTERNALS.md, Artifacts, has the why.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .errors import RelayError
from .fingerprint import open_regular, sample_digest
from .paths import private_dir, staging_notice
from .records import COPY, LINK, PLACE

#: Errors of a disk that has no room, or is not to be written: then the file stays where it is.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

#: Of a file that says that it is empty, such as /proc/cpuinfo.
UNSIZED_BYTES_MAX = 16 << 20
COPY_BYTES = 1 << 20

_FICLONE = 0x40049409  # linux/fs.h


class Staged(NamedTuple):
    """Where a file's bytes lie now, and what tells that they are still the same."""

    where: str  #: records.COPY, LINK or PLACE
    file: bytes  #: absolute path
    size: int
    modified_ns: int
    digest: bytes


class Room(NamedTuple):
    """Where files may be staged, and how much."""

    root: Path  #: the folder of all runs
    free_bytes_min: int = 0  #: free space of the disk that is left to others
    bytes_left: int | None = None  #: what the daemon's quota leaves; None: there is none

    def check(self, size: int) -> None:
        """Raises: OSError: there is no room for a file of this size."""
        if self.bytes_left is not None and size > self.bytes_left:
            raise OSError(errno.EDQUOT, "the quota of the daemon's spool is reached")
        if self.free_bytes_min and size:
            found = os.statvfs(self.root)
            if found.f_bavail * found.f_frsize - size < self.free_bytes_min:
                raise OSError(errno.ENOSPC, f"under {self.free_bytes_min} bytes would be free")


def find_room(socket: Path, environ: Mapping[str, str]) -> Room:
    """Return where the ranks of this socket stage files. Asked at each call: a daemon may come."""
    import json

    named = environ.get("MLFLOW_RELAY_STAGING")
    if named:
        return Room(Path(named).absolute())
    try:
        told = json.loads(staging_notice(socket).read_text(encoding="utf-8"))
        room = Room(Path(told["folder"]), told["free_bytes_min"], told["bytes_left"])
        if told["version"] == 1 and room.root.is_dir():
            return room
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no daemon has been here yet, or a later one that says it in another way
    return Room(default_staging(environ))


def default_staging(environ: Mapping[str, str]) -> Path:
    """Return the staging folder of the spool that a daemon without settings would have."""
    state = environ.get("XDG_STATE_HOME", "")
    home = Path(state) if os.path.isabs(state) else Path(os.path.expanduser("~/.local/state"))
    return home / "mlflow-relay" / os.uname().nodename / "staging"


def run_folder(root: Path, run_id: str) -> Path:
    """Return a run's own folder there, made if it is not there; nobody else may look into it.

    Raises: OSError: it cannot be made.
    """
    folder = root / run_id
    if not folder.is_dir():
        try:
            root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            private_dir(root)
            private_dir(folder)
        except RelayError as error:
            raise PermissionError(errno.EACCES, str(error)) from error
    return folder


def stage_file(source: str, target: Path, link_bytes_min: float) -> Staged:
    """Keep a file as it is now.

    Args:
        target: where to keep it; must not exist. Its name appears only there.
        link_bytes_min: smaller files are never linked.
    Raises: ValueError: no regular file, by kind; OSError: it cannot be read, or kept.
    """
    fd = open_regular(source)
    try:
        found = os.fstat(fd)
        try:
            out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if not _reflink(out, fd):
                    if found.st_size >= link_bytes_min and _link(source, found, target):
                        return _described(LINK, target, fd)
                    _copy(out, fd, found.st_size)
                return _described(COPY, target, out)
            finally:
                os.close(out)
        except OSError:
            target.unlink(missing_ok=True)
            raise
    finally:
        os.close(fd)


def stage_bytes(data: bytes, target: Path) -> Staged:
    """Keep content that is no file. Raises: OSError."""
    out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _write_all(out, data)
        return _described(COPY, target, out)
    except OSError:
        target.unlink(missing_ok=True)
        raise
    finally:
        os.close(out)


def leave_in_place(source: str) -> Staged:
    """Keep only the name of a file. Raises: as `stage_file`."""
    fd = open_regular(source)
    try:
        return _described(PLACE, Path(source), fd)
    finally:
        os.close(fd)


def _described(where: str, file: Path, fd: int) -> Staged:
    found = os.fstat(fd)
    path = os.fsencode(os.path.abspath(file))
    digest = sample_digest(fd, found.st_size)
    return Staged(where, path, found.st_size, found.st_mtime_ns, digest)


def _reflink(out: int, fd: int) -> bool:
    try:
        fcntl.ioctl(out, _FICLONE, fd)
    except OSError:  # whatever the file system calls it: there are two other ways
        return False
    return True


def _link(source: str, found: os.stat_result, target: Path) -> bool:
    """Put a hard link in the place of the empty target; return False if that is not to be had."""
    link = target.with_name(target.name + ".link")
    try:
        os.link(os.path.realpath(source), link)
        made = os.stat(link)
        if (made.st_dev, made.st_ino) != (found.st_dev, found.st_ino):
            link.unlink()  # another file has taken the name since we opened it
            return False
    except OSError:
        link.unlink(missing_ok=True)
        return False
    # Not over the target: for a file that replaces another one ext4 finds room on the disk at once,
    # which takes 0.7 s for 2 GB that were just written.
    target.unlink()
    os.rename(link, target)
    return True


def _copy(out: int, fd: int, size: int) -> None:
    """Copy `size` bytes; less if the file shrinks meanwhile.

    By hand: sendfile and copy_file_range are quicker where they work, and not every file system
    lets them.
    """
    left = size or UNSIZED_BYTES_MAX
    while left and (data := os.read(fd, min(left, COPY_BYTES))):
        _write_all(out, data)
        left -= len(data)


def _write_all(out: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(out, left) :]
