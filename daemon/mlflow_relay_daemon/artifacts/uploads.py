"""The lane of the artifacts: takes what waits in the ledgers to where it goes, some side by side.

    ledger ─▶ Queue: next that may go ─▶ Source: checked ─▶ Store ─▶ ledger: done ─▶ file removed

Metrics never wait for it: other threads, other connections, nothing held in common but the run's
MLflow run id.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mlflow_relay import clock
from mlflow_relay.records import PLACE, Artifact
from mlflow_relay_daemon.artifacts.queue import Job, Queue, Work
from mlflow_relay_daemon.artifacts.refused import letter_of
from mlflow_relay_daemon.artifacts.source import (
    NoSuchContent,
    NotReadable,
    Source,
    locate,
    sync_file,
)
from mlflow_relay_daemon.artifacts.stores import RepositoryStore, Store, Stores
from mlflow_relay_daemon.artifacts.throttle import Throttle
from mlflow_relay_daemon.batch import Objection
from mlflow_relay_daemon.sinks import Refused, Sink, SinkError, TryAgain
from mlflow_relay_daemon.spool.ledger import NOT_UPLOADING, REFUSED, REPLACED, UPLOADED, End

if TYPE_CHECKING:
    from mlflow_relay_daemon.hosted import Runs

log = logging.getLogger(__name__)

#: Ends that share one fsync of a ledger; and how long the first of them waits for more.
ENDS_MAX, ENDS_AGE_S = 64, 0.5
#: How long threads that hold an upload may still take when the daemon stops.
STOP_TIMEOUT_S = 2.0
#: How often what is left over in the staging folder is looked for.
SWEEP_EVERY_S = 600.0


class Cut(Exception):
    """The daemon stops in the middle of an upload: it is done again."""


class Uploads:
    """Uploads the artifacts of all runs.

    Args:
        threads: uploads side by side.
        bytes_per_s: of all together; None: no limit.
        wait_s_max: the longest pause between two tries at a store that is away.
    """

    def __init__(
        self,
        runs: Runs,
        sink: Sink,
        stores: Stores,
        *,
        threads: int,
        bytes_per_s: float | None,
        wait_s_max: float,
    ) -> None:
        self._runs, self._sink, self._stores = runs, sink, stores
        self._staging = runs.spool.staging.folder
        self._throttle = Throttle(bytes_per_s)
        self._changed = threading.Condition()  # guards the queue and all in it
        self._queue = Queue(wait_s_max)
        self._sweep_s = time.monotonic() + SWEEP_EVERY_S
        self._stopping = False
        self._threads_max = threads
        self._threads: list[threading.Thread] = []

    # ── for the service and for operators ──

    def look(self) -> None:
        """There may be something new; called now and then by the service's loop."""
        waiting = [each for each in list(self._runs.by_id.values()) if each.run.artifacts.waiting]
        with self._changed:
            for hosted in waiting:
                self._queue.works.setdefault(hosted.run.card.run_id, Work(hosted))
            if waiting and not self._threads and not self._stopping:
                self._start_threads()
            self._changed.notify_all()
        self._stores.helper.rest()
        if time.monotonic() >= self._sweep_s:
            self._sweep_s = time.monotonic() + SWEEP_EVERY_S
            self._sweep()

    def try_now(self) -> None:
        """Leave no store alone any longer."""
        with self._changed:
            self._queue.try_now()
        self.look()

    def is_idle(self) -> bool:
        """Return whether nothing waits."""
        return not any(each.run.artifacts.waiting for each in list(self._runs.by_id.values()))

    def stop(self) -> None:
        """Cut what is under way; it is in the ledger, and is done again."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._throttle.stop()
        self._stores.close()
        until_s = time.monotonic() + STOP_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        for work in self._queue.works.values():
            self._settle(work)

    def status_of(self, run_id: str) -> dict[str, Any]:
        """Return what status shows of a run besides its ledger."""
        work = self._queue.works.get(run_id)
        if work is None:
            return NOT_UPLOADING
        return {
            "sending": len(work.busy),
            "sent_bytes": work.sent_bytes,
            "last_error": work.last_error,
        }

    def _start_threads(self) -> None:
        self._threads = [
            threading.Thread(target=self._serve, name=f"artifacts {index}", daemon=True)
            for index in range(self._threads_max)
        ]
        for thread in self._threads:
            thread.start()

    def _sweep(self) -> None:
        """Remove staged files that no record names. The ranks of their run are gone, and all that
        these have logged is in the ledger."""

        def wanted(run_id: str) -> set[str] | None:
            run = self._runs.by_id[run_id].run
            with run.lock:
                is_over = run.is_drained() and all(s.closed for s in run.card.sessions.values())
            return run.artifacts.wanted_ids() if is_over else None

        try:
            removed = self._runs.spool.staging.sweep(wanted)
        except OSError as error:
            log.warning("the staging folder cannot be swept: %s", error.strerror)
        else:
            if removed:
                log.info("%d staged files removed that no record names", removed)

    # ── the threads ──

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._upload(job)
            except Cut:
                return
            except OSError as error:  # a dead letter could not be written
                self._try_later(job, TryAgain(str(error)))
            except Exception:
                log.exception("artifact %r: tried again later", job.artifact.path)
                self._try_later(job, TryAgain("an error of the relay itself: see the daemon's log"))
            finally:
                with self._changed:
                    self._queue.give_back(job)
                    self._changed.notify_all()

    def _next(self) -> Job | None:
        """Return the next upload; None when stopping. Where there is none, do what else is due."""
        while True:
            with self._changed:
                if self._stopping:
                    return None
                due = [work for work in self._queue.works.values() if _are_ends_due(work)]
                job = None if due else self._queue.take()
                if job is not None:
                    return job
                run_id, unsynced = ("", []) if due else self._queue.unsynced()
                if not due and not unsynced:
                    self._changed.wait(ENDS_AGE_S)
            for work in due:
                self._settle(work)
            for artifact in unsynced:
                sync_file(artifact, locate(artifact, run_id, self._staging))

    def _upload(self, job: Job) -> None:
        """Upload one, and note how it ended, or that it is to be tried again."""
        work, artifact = job.work, job.artifact
        try:
            if work.hosted.run.artifacts.is_replaced(job.number):
                end = End(job.number, REPLACED)
            else:
                end = End(job.number, UPLOADED, self._send(work, artifact))
                with self._changed:
                    self._queue.went_well(job)
        except (NoSuchContent, Refused) as error:
            end = self._refuse(job, str(error))
        except (NotReadable, SinkError) as error:
            if self._try_later(job, error):
                return
            end = self._refuse(job, f"{error} (the store takes others, and not this one)")
        with self._changed:
            work.ends[job.number] = end
            work.ends_since_s = work.ends_since_s or time.monotonic()
            # A dead letter's file is to be found as soon as the letter is.
            is_due = len(work.ends) >= ENDS_MAX or end.how == REFUSED
        if is_due:
            self._settle(work)

    def _send(self, work: Work, artifact: Artifact) -> str:
        """Return the sha256 of what the store has now."""
        path = locate(artifact, work.hosted.run.card.run_id, self._staging)
        owner = work.hosted.owner if self._runs.access.is_shared else None
        with Source(artifact, path, self._taker(work), owner) as source:
            try:
                store = self._store_of(work)
                if owner is not None and isinstance(store, RepositoryStore):
                    # mlflow's repositories open the path anew: by then it may lead elsewhere.
                    raise NoSuchContent("a group's daemon uploads to the tracking server alone")
                return store.put(artifact.path, source)
            finally:
                with self._changed:
                    work.sent_bytes -= source.taken

    def _taker(self, work: Work) -> Callable[[int], None]:
        def take(size: int) -> None:
            self._throttle.take(size)
            with self._changed:
                if self._stopping:
                    raise Cut
                work.sent_bytes += size

        return take

    def _store_of(self, work: Work) -> Store:
        """Return the run's store, as its artifact URI says. Raises: SinkError."""
        if work.store is None:
            mlflow_run_id = work.hosted.run.card.mlflow_run_id
            assert mlflow_run_id is not None
            work.store = self._stores.open(self._sink.get_run(mlflow_run_id).artifact_uri)
        return work.store

    def _try_later(self, job: Job, error: Exception) -> bool:
        """Return False if it is of no use."""
        work, text = job.work, str(error)
        if text != work.last_error:
            log.warning("run %s: artifacts wait: %s", work.hosted.run.card.run_id, text)
        with self._changed:
            work.last_error = text
            return self._queue.failed(job, error)

    # ── the end of an upload ──

    def _refuse(self, job: Job, reason: str) -> End:
        hosted, artifact = job.work.hosted, job.artifact
        run_id = hosted.run.card.run_id
        log.warning("run %s: artifact %r: %s", run_id, artifact.path, reason)
        letter = letter_of(artifact, locate(artifact, run_id, self._staging))
        hosted.letters.add([Objection(letter, reason)], clock.now_ms())
        return End(job.number, REFUSED)

    def _settle(self, work: Work) -> None:
        """Write down what is done, then remove what was staged for it. Crash: between the two, a
        file that nobody wants is left, and is swept."""
        run = work.hosted.run
        with self._changed:
            ends = list(work.ends.values())
        try:
            done = run.artifacts.settle(ends)
        except OSError as error:
            work.last_error = f"the spool's disk: {error.strerror}"
            work.ends_since_s = time.monotonic()
            return
        with self._changed:
            for end in ends:
                work.ends.pop(end.number, None)
                work.failures.pop(end.number, None)
            work.ends_since_s = 0.0
        for how, artifact in done:
            if artifact.where != PLACE and how != REFUSED:
                with suppress(OSError):  # what stays is swept
                    locate(artifact, run.card.run_id, self._staging).unlink(missing_ok=True)
        if not run.artifacts.waiting:
            self._runs.notify(work.hosted)  # its end may have waited for this


def _are_ends_due(work: Work) -> bool:
    return bool(work.ends) and time.monotonic() - work.ends_since_s >= ENDS_AGE_S
