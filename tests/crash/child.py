"""A function in a forked process of its own, and what it said, however it ended."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import TracebackType


class Child:
    """Lives once it is told to go. A context manager: at its end nothing is left.

    Args: live: what it does; what that raises is said, and its status is 1.
    """

    def __init__(self, live: Callable[[], None]) -> None:
        self._said = os.memfd_create("said")  # is there also when the process is not
        wait_end, self._go_end = os.pipe()
        self.status: int | None = None  #: as subprocess has it; None: it has not ended
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go_end)
            self._live(live, wait_end)
        os.close(wait_end)

    def _live(self, live: Callable[[], None], wait_end: int) -> None:
        """The child's part; does not return."""
        status = 1
        try:
            os.setpgid(0, 0)  # so that all its threads can be waited for
            os.dup2(self._said, 1)
            os.dup2(self._said, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)  # not pytest's
            os.read(wait_end, 1)
            live()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    def go(self) -> None:
        os.write(self._go_end, b"!")  # another child may have the pipe open, too
        os.close(self._go_end)
        self._go_end = -1

    @property
    def said(self) -> str:
        """What it has written to stdout and stderr."""
        return os.pread(self._said, os.fstat(self._said).st_size, 0).decode()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.kill()
        if self._go_end >= 0:
            os.close(self._go_end)
        os.close(self._said)

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """Return its status when it has ended."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status
