"""How the runs of this process end that nobody ends: at its exit, by an exception, as a worker
of multiprocessing."""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Run

_REASON_BYTES_MAX = 2000  # it must fit into journal.END_BYTES_MAX


open_runs: weakref.WeakSet[Run] = weakref.WeakSet()


def end_by(run: Run, error: BaseException | None) -> None:
    """End a run as the exception tells that ended the code around it; None: there was none."""
    status = _status_of(error)
    run.end(status, reason="" if error is None or status == "FINISHED" else describe(error))


def describe(error: BaseException) -> str:
    """Return an exception as the reason of an end."""
    return cut(f"{type(error).__name__}: {error}")


def cut(reason: str) -> str:
    """Return as much of a reason as is kept."""
    return reason.encode(errors="replace")[:_REASON_BYTES_MAX].decode(errors="ignore")


def _status_of(error: BaseException | None) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "KILLED"
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "FAILED"


def _end_all(error: BaseException | None) -> None:
    for run in list(open_runs):
        end_by(run, error)


def _end_at_exit() -> None:
    """FINISHED, unless the interpreter is leaving with an exception."""
    _end_all(getattr(sys, "last_exc", None) or getattr(sys, "last_value", None))


# ── workers of multiprocessing ──


def end_at_exit_of_worker() -> None:
    """multiprocessing's children leave by os._exit, past atexit; they have hooks of their own."""
    process = sys.modules.get("multiprocessing.process")
    util = sys.modules.get("multiprocessing.util")
    if process is None or util is None or process.parent_process() is None:
        return
    register = getattr(threading, "_register_atexit", None)
    if sys.version_info >= (3, 13) and register is not None:
        register(_end_as_worker_did)
        return
    # Called while the exception that ends the child, if any, is still being handled. What is being
    # handled now is the parent's, in whose `except` the child was forked.
    parents = sys.exc_info()[1]

    def end() -> None:
        error = sys.exc_info()[1]
        _end_all(None if error is parents else error)

    util.Finalize(None, end, exitpriority=0)


def _end_as_worker_did() -> None:
    """Since Python 3.13 the exception is over when the hooks run. Its exit code is not: it waits in
    the frame that has caught it."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001
    while frame is not None and frame.f_code.co_name != "_bootstrap":
        frame = frame.f_back
    code = 0 if frame is None else frame.f_locals.get("exitcode", 0)
    for run in list(open_runs):
        run.end("FAILED" if code else "FINISHED", reason=f"exit code {code}" if code else "")


atexit.register(_end_at_exit)
