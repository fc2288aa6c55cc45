"""This node's daemon, for a command that needs one: started if there is none, and again if it dies.

Every rank of a node may do this at once: of those that look, one starts it, and of daemons that
start, one has the lock.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mlflow_relay.errors import RelayError
from mlflow_relay.paths import private_dir
from mlflow_relay_daemon.lease import RUNTIME_LOCK, Lease
from mlflow_relay_daemon.spool.disk import lock_file, lock_holder

LOG_NAME = "daemon.log"
START_LOCK = "start.lock"
#: A daemon that cannot start is tried again, ever more seldom: its disk may come back.
RETRY_S, RETRY_S_MAX = 2.0, 60.0
LOG_TAIL_BYTES = 2000


class Sidecar:
    """The daemon at a socket.

    Args:
        environ: of a daemon that is started.
        before_exec: run in the child before it becomes the daemon.
        warn: told, in one line, why there is none.
    """

    def __init__(
        self,
        socket: Path,
        environ: Mapping[str, str],
        before_exec: Callable[[], None],
        warn: Callable[[str], None],
    ) -> None:
        self._socket, self._folder = socket, socket.parent
        self._environ, self._before_exec, self._warn = environ, before_exec, warn
        self._child: subprocess.Popen[bytes] | None = None
        self._start_lock: int | None = None
        self._retry_s, self._next_try_s = RETRY_S, 0.0
        self._lease = self._take_lease()

    def supervise(self) -> None:
        """Start the daemon if there is none; quick, and to be called again and again."""
        if self._child is not None and self._child.poll() is not None:
            self._note_end(self._child.returncode)
            self._child = None
        if self._serves():
            self._let_others_start()
            self._retry_s = RETRY_S
        elif self._child is None and time.monotonic() >= self._next_try_s:
            self._start()

    def is_there(self) -> bool:
        """Return whether a daemon lives: one that is just starting or leaving counts."""
        return (self._child is not None and self._child.poll() is None) or self._serves()

    def release(self) -> bool:
        """Say that this process does not need it any more; return whether nobody else does."""
        return self._lease is None or self._lease.release()

    def _serves(self) -> bool:
        """Return whether a daemon holds its lock."""
        try:
            fd = os.open(self._folder / RUNTIME_LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except PermissionError:  # a system-wide daemon's
            return self._answers()
        try:
            return lock_holder(fd) is not None
        finally:
            os.close(fd)

    def _answers(self) -> bool:
        from mlflow_relay_daemon.control_client import NoDaemon, probe_socket

        with contextlib.suppress(NoDaemon):
            probe_socket(self._socket)
            return True
        return False

    def _take_lease(self) -> Lease | None:
        """A system-wide daemon's folder takes no leases, and that daemon stays anyway."""
        try:
            private_dir(self._folder)
            return Lease(self._folder)
        except (RelayError, OSError):
            return None

    def _start(self) -> None:
        if self._start_lock is None:
            try:
                self._start_lock = lock_file(self._folder / START_LOCK)
            except OSError as error:
                self._warn(f"no daemon can be started: {self._folder}: {error.strerror}")
                self._put_off()
                return
        if self._start_lock is None or self._serves():
            return  # another one starts it
        with open(self._folder / LOG_NAME, "ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "mlflow_relay_daemon", "daemon"],
                env=dict(self._environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,  # what ends the command's group or terminal is not for it
                preexec_fn=self._before_exec,  # noqa: PLW1509  # this process has no threads yet
            )

    def _note_end(self, code: int) -> None:
        if code and not self._serves():
            self._warn(
                f"the daemon ended ({code}): {self._last_word()}: ranks keep what they log in "
                f"memory until one runs; it is tried again"
            )
            self._put_off()

    def _put_off(self) -> None:
        self._next_try_s = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)

    def _let_others_start(self) -> None:
        if self._start_lock is not None:
            os.close(self._start_lock)
            self._start_lock = None

    def _last_word(self) -> str:
        path = self._folder / LOG_NAME
        try:
            with open(path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError as error:
            return f"{path}: {error.strerror}"
        return lines[-1].removeprefix("mlflow-relay: ") if lines else f"{path} is empty"
