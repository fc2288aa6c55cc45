"""Opens what other users may have made in a folder that they may write to.

A link there could lead anywhere, a pipe would let the daemon wait for ever, and a file may be of
any size or belong to somebody else than it says.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from mlflow_relay.errors import FormatError

#: More than any file of a journal: PROTOCOL.md, Limits.
FILE_BYTES_MAX = 64 << 20


def open_foreign(path: Path, access: int = os.O_RDONLY) -> int:
    """Return a descriptor of a plain file.

    Raises: FileNotFoundError: it is gone; FormatError: a link, a pipe, ...; OSError.
    """
    flags = access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise FormatError("no plain file stands there") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError("no plain file stands there")
    return fd


def read_foreign(path: Path, uid: int, size: int = FILE_BYTES_MAX) -> bytes:
    """Return the first bytes of a plain file of this user.

    Raises: as open_foreign; FormatError: it is another user's, or larger than any of ours.
    """
    fd = open_foreign(path)
    try:
        return read_open(fd, uid, size)
    finally:
        os.close(fd)


def read_open(fd: int, uid: int, size: int = FILE_BYTES_MAX) -> bytes:
    """Return the same of a file that is open. Raises: FormatError, OSError."""
    found = os.fstat(fd)
    if found.st_uid != uid:
        raise FormatError(f"a file of uid {found.st_uid}, not of {uid}")
    if found.st_size > FILE_BYTES_MAX:
        raise FormatError(f"a file of {found.st_size} bytes")
    return os.pread(fd, min(size, found.st_size), 0)
