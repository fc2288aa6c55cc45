"""One run's hot writes out of MLflow's own code: into a journal, as a rank's are."""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections.abc import Callable
from threading import Lock
from time import monotonic, sleep
from typing import Any

from . import clock, records
from .autostart import start_daemon
from .mlflow_door import Options
from .session import Session

log = logging.getLogger("mlflow_relay")

#: The longest that a question to the daemon waits until it has what was logged before.
SETTLE_TIMEOUT_S = 5.0
_POLL_S = 0.002

_writers: weakref.WeakSet[RunWriter] = weakref.WeakSet()


class RunWriter:
    """Appends records to one run; safe for many threads, and after a fork.

    Args:
        place: what the daemon says of the run: relay run id, MLflow run id, names, params.
        is_rank: this process began the run, or goes on with it: if it vanishes, the run has failed.
    """

    def __init__(self, place: dict[str, Any], options: Options, *, is_rank: bool) -> None:
        self.is_rank = is_rank
        self.params: dict[str, str] = dict(place["params"])  #: MLflow lets nobody change them
        self._place, self._options = place, options
        self._lock = Lock()
        self._session: Session | None = self._open(is_rank=is_rank)
        _writers.add(self)

    def append(self, record: bytes) -> None:
        """Keep a record: it survives this process when the call has returned."""
        session = self._session
        if session is None:
            with self._lock:
                session = self._session = self._session or self._open(is_rank=False)
        session.journal.append(record)

    def settle(self) -> bool:
        """Return once the daemon has on its disk what was logged before; False: it takes too long.

        What other threads log meanwhile is not waited for: that may never end.
        """
        session = self._session
        if session is None or not session.journal.unacked:
            return True
        logged = session.journal.next_seq
        session.sender.wake()
        until_s = monotonic() + SETTLE_TIMEOUT_S
        while session.journal.acked < logged:
            if monotonic() > until_s:
                return False
            sleep(_POLL_S)
        return True

    def end(self, status: str, end_ms: int) -> None:
        """The run has ended; return when the daemon knows it, or after the end's timeout."""
        self._leave(records.pack_end(status, "", end_ms))

    def leave(self) -> None:
        """This process has nothing more to say, and the run goes on without it."""
        self._leave(records.pack_end(records.GOES_ON, "", clock.now_ms()))

    def _leave(self, end: bytes) -> None:
        session, self._session = self._session, None
        _writers.discard(self)
        if session is None:
            return
        if self.is_rank:
            session.journal.seal(end)
        if not session.end(self._options.end_timeout_s):
            log.warning(
                "no daemon has acknowledged the last %d records of run %s; they are kept in %s and "
                "delivered when one runs",
                session.journal.unacked,
                self._place["relay_run_id"],
                session.journal.path,
            )

    def forked(self) -> None:
        """In a forked child: the parent's session stays the parent's."""
        session, self._session, self.is_rank = self._session, None, False
        self._lock = Lock()
        if session is not None:
            session.leave_to_parent()

    def _open(self, *, is_rank: bool) -> Session:
        # A daemon with another spool, should one come, knows of the run what stands here.
        place = self._place
        card: dict[str, Any] = {
            "run_id": place["relay_run_id"],
            "run_key": f"plugin/{place['relay_run_id']}",
            "experiment_name": place["experiment_name"],
            "run_name": place["run_name"],
            "resume": place["mlflow_run_id"],
            "resume_mode": "guest",
            "rank": 0,
            "world_size": 1,
            "node": os.uname().nodename,
            "start_ms": clock.now_ms(),
            "tags": {},
            "primary": is_rank,
            "node_count": 1,
            "is_plain": True,
        }
        options = self._options
        start: Callable[[], None] | None = None
        if options.autostart:
            start = lambda: start_daemon(options.socket)  # noqa: E731
        return Session(
            card,
            socket=options.socket,
            journal_bytes_max=options.journal_bytes_max,
            on_mlflow_run_id=lambda _: None,
            on_no_daemon=start,
        )


def _after_fork_in_child() -> None:
    for writer in list(_writers):
        writer.forked()


def _mark_at_exit() -> None:
    """What nobody ended goes on, as in MLflow, unless MLflow's own exit ends it after us."""
    for writer in list(_writers):
        if writer.is_rank:
            writer.append(records.pack_end(records.GOES_ON, "", clock.now_ms()))


atexit.register(_mark_at_exit)
os.register_at_fork(after_in_child=_after_fork_in_child)
