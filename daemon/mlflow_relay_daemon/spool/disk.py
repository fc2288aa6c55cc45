"""All access of the spool to its disk: one small interface, so that tests can make it fail."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from pathlib import Path

from mlflow_relay_daemon.counters import Durations

_FLOCK = "hhqqi4x"  # struct flock of fcntl(2): type, whence, start, length, pid


class Disk:
    """The real disk. Every method raises OSError as the kernel does."""

    def __init__(self) -> None:
        self.sync_times = Durations()

    def create(self, path: Path) -> int:
        """Return a descriptor of a new file, for appending."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def open(self, path: Path) -> int:
        """Return a descriptor of an existing file, for appending."""
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)

    def write(self, fd: int, data: bytes | memoryview) -> None:
        """Write all of it. A short write is ENOSPC here: the next one would say so."""
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, "short write")

    def sync(self, fd: int) -> None:
        """Return when what was written to the file is on the disk."""
        begin_s = time.perf_counter()
        os.fdatasync(fd)
        self.sync_times.add(time.perf_counter() - begin_s)

    def sync_folder(self, path: Path) -> None:
        """Return when the names in the folder are on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        """Make a folder that is there after a crash, too."""
        path.mkdir(mode=0o700, exist_ok=True)
        self.sync_folder(path.parent)

    def replace(self, path: Path, data: bytes, *, durable: bool) -> None:
        """Put a file in the place of another: readers, and crashes, find the old one or the new.

        Args:
            durable: return only when the new one is on the disk.
        """
        new = path.with_name(path.name + ".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self.write(fd, data)
            if durable:
                self.sync(fd)
        finally:
            os.close(fd)
        os.rename(new, path)
        if durable:
            self.sync_folder(path.parent)

    def free_bytes(self, path: Path) -> int:
        """Return how much this user may still write there."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


class LookingDisk(Disk):
    """The disk of who only looks at a spool, which may be a living daemon's."""

    def sync(self, fd: int) -> None:
        """It is for the daemon to do, and to know if it fails."""


def lock_file(path: Path) -> int | None:
    """Lock the file for as long as this process lives; return its descriptor, None if it is taken.

    A POSIX record lock: it works on NFS and Lustre, and the kernel drops it at death.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if try_lock(fd):
        return fd
    os.close(fd)
    return None


def try_lock(fd: int) -> bool:
    """Lock the open file; return False if another process holds it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def lock_holder(fd: int) -> int | None:
    """Return the pid that holds the POSIX lock of a file, 0 for one elsewhere, None for nobody."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return None
    return int(pid) if pid > 0 and Path(f"/proc/{pid}").exists() else 0
