"""Leases on a sidecar daemon: it stays as long as somebody holds one, and leaves after the last.

A lease is a POSIX read lock on one file beside the socket: the kernel drops it when its holder
dies, however that happens, and whether there are others can be asked without taking anything.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mlflow_relay_daemon.spool.disk import lock_holder

NAME = "leases"
#: Beside it: held by the daemon as long as it lives.
RUNTIME_LOCK = "daemon.lock"


class Lease:
    """One process's lease, from its making to `release` or the process's end.

    Raises: OSError: the folder is another user's, or full.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self._fd, fcntl.LOCK_SH)

    def release(self) -> bool:
        """Give it back; return whether it was the last one.

        Of several that end at once each may be told so. Never none: who asks has let go before.
        """
        fcntl.lockf(self._fd, fcntl.LOCK_UN)
        is_last = lock_holder(self._fd) is None
        os.close(self._fd)
        return is_last


def is_leased(folder: Path) -> bool:
    """Return whether another process holds a lease."""
    try:
        fd = os.open(folder / NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return lock_holder(fd) is not None
    finally:
        os.close(fd)
