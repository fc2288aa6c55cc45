"""Tells whether a signal was meant for this process alone, or reached its whole group or job.

A wrapper must pass a signal on to its command exactly if the command did not get it itself: a
second SIGUSR1 would requeue a job twice, a missing one not at all. Launchers differ: torchrun and
Kubernetes signal one process, a terminal a process group, Slurm a job step, in one way or the
other. So beside the command there is a witness: a process in the same group, session and job, in
which all signals stay pending. What is pending there, the command has got as well.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)
#: Slurm signals the processes of a step one after the other.
PATIENCE_S = 0.1
_POLL_S = 0.005


class Witness:
    """A forked process that does nothing. Make it before any thread."""

    def __init__(self) -> None:
        self._prctl = ctypes.CDLL(None).prctl
        self._pid = self._fork()

    def saw(self, signum: int) -> bool:
        """Return whether others were sent this signal, which this process has just received."""
        until_s = time.monotonic() + PATIENCE_S
        while not self._is_pending(signum):
            if time.monotonic() > until_s:
                return False
            time.sleep(_POLL_S)
        self.close()  # what is pending stays so: the next signal needs another witness
        self._pid = self._fork()
        return True

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _is_pending(self, signum: int) -> bool:
        for line in Path(f"/proc/{self._pid}/status").read_text(errors="replace").splitlines():
            if line.startswith(("SigPnd:", "ShdPnd:")) and int(line[7:], 16) >> (signum - 1) & 1:
                return True
        return False

    def _fork(self) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            while os.getppid() == parent:  # else it died before prctl
                time.sleep(3600)
        finally:
            os._exit(0)
