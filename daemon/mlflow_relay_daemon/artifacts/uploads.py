"""The lane of the artifacts: takes what waits in the ledgers to where it goes, some side by side.

    ledger ─▶ next that may go ─▶ Source (checked) ─▶ Store ─▶ ledger: done ─▶ staged file removed

Metrics never wait for it: other threads, other connections, nothing held in common but the run's
MLflow run id. A store that is away is left alone for a while; of those that wait for it, one tries.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_relay.records import PLACE, Artifact
from mlflow_relay_daemon.artifacts.source import NoSuchContent, NotReadable, Source, locate
from mlflow_relay_daemon.artifacts.stores import Store, Stores
from mlflow_relay_daemon.artifacts.throttle import Throttle
from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.retry import backoff_s
from mlflow_relay_daemon.sinks import Permanent, Refused, ServerAway, Sink, SinkError
from mlflow_relay_daemon.spool.ledger import REFUSED, REPLACED, UPLOADED, End

if TYPE_CHECKING:
    from mlflow_relay_daemon.hosted import Hosted, Runs

log = logging.getLogger(__name__)

#: Ends that share one fsync of a ledger; and how long the first of them waits for more.
ENDS_MAX, ENDS_AGE_S = 64, 0.5
#: How long threads that hold an upload may still take when the daemon stops.
STOP_TIMEOUT_S = 2.0
#: Where MLflow has no run to upload to any more, somebody may restore it.
BLOCKED_RETRY_S = 60.0


class Cut(Exception):
    """The daemon stops in the middle of an upload: it is done again."""


@dataclass
class _Pause:
    """Of one store: until when it is left alone."""

    failures: int = 0
    until_s: float = 0.0
    is_tried: bool = False

    def may_try(self, now_s: float) -> bool:
        return not self.failures or (not self.is_tried and self.until_s <= now_s)


@dataclass
class _Job:
    """One upload under way."""

    work: _Work
    number: int
    artifact: Artifact
    pause: _Pause  # of the store, as far as it was known when the job was taken


@dataclass
class _Work:
    """What is known of one run's uploads."""

    hosted: Hosted
    store: Store | None = None
    busy: dict[str, int] = field(default_factory=dict)  # path → number, being uploaded
    later_s: dict[int, float] = field(default_factory=dict)  # number → not before
    failures: dict[int, int] = field(default_factory=dict)
    ends: dict[int, End] = field(default_factory=dict)  # not in the ledger yet
    ends_since_s: float = 0.0
    sent_bytes: int = 0  # of uploads under way
    last_error: str | None = None


class Uploads:
    """Uploads the artifacts of all runs.

    Args:
        staging: this spool's staging folder.
        threads: uploads side by side.
        bytes_per_s: of all together; None: no limit.
    """

    def __init__(
        self,
        runs: Runs,
        sink: Sink,
        stores: Stores,
        staging: Path,
        *,
        threads: int,
        bytes_per_s: float | None,
        wait_s_max: float,
    ) -> None:
        self._runs, self._sink, self._stores, self._staging = runs, sink, stores, staging
        self._throttle = Throttle(bytes_per_s)
        self._wait_s_max = wait_s_max
        self._changed = threading.Condition()
        self._work: dict[str, _Work] = {}
        self._pauses: dict[str, _Pause] = {}
        self._turn = 0
        self._rng = random.Random()
        self._stopping = False
        self._threads_max = threads
        self._threads: list[threading.Thread] = []

    # ── for the service and for operators ──

    def look(self) -> None:
        """There may be something new; called now and then by the service's loop."""
        waiting = [each for each in list(self._runs.by_id.values()) if each.run.artifacts.waiting]
        with self._changed:
            for hosted in waiting:
                self._work.setdefault(hosted.run.card.run_id, _Work(hosted))
            if waiting and not self._threads and not self._stopping:
                self._threads = [
                    threading.Thread(target=self._serve, name=f"artifacts {index}", daemon=True)
                    for index in range(self._threads_max)
                ]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()
        self._stores.helper.rest()

    def try_now(self) -> None:
        """Leave no store alone any longer."""
        with self._changed:
            for pause in self._pauses.values():
                pause.until_s = 0.0
            for work in self._work.values():
                work.later_s.clear()
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
        until_s = time.monotonic() + STOP_TIMEOUT_S
        self._stores.close()
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    def status_of(self, run_id: str) -> dict[str, Any]:
        """Return what status shows of a run besides its ledger."""
        work = self._work.get(run_id)
        if work is None:
            return {"sending": 0, "sent_bytes": 0, "last_error": None}
        return {
            "sending": len(work.busy),
            "sent_bytes": work.sent_bytes,
            "last_error": work.last_error,
        }

    # ── the threads ──

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            delay_s = None
            try:
                delay_s = self._upload(job)
            except Cut:
                return
            except Exception:
                log.exception("artifact %r: tried again in a minute", job.artifact.path)
                job.work.last_error = "an error of the relay itself: see the daemon's log"
                delay_s = BLOCKED_RETRY_S
            finally:
                self._give_back(job, delay_s)

    def _next(self) -> _Job | None:
        """Return the next upload; None when stopping."""
        while True:
            with self._changed:
                if self._stopping:
                    return None
                job = self._find()
                if job is not None:
                    job.work.busy[job.artifact.path] = job.number
                    job.pause.is_tried = True
                    return job
                due = [work for work in self._work.values() if _are_ends_due(work)]
                if not due:
                    self._changed.wait(ENDS_AGE_S)
            for work in due:
                self._settle(work)

    def _find(self) -> _Job | None:
        """Return the oldest upload that may go now, run by run in turn."""
        works = list(self._work.values())
        now_s = time.monotonic()
        for index in range(len(works)):
            work = works[(self._turn + index) % len(works)]
            pause = self._pause_of(work)
            if work.hosted.run.card.mlflow_run_id is None or not pause.may_try(now_s):
                continue
            for number, artifact in work.hosted.run.artifacts.oldest_first():
                is_due = number not in work.ends and work.later_s.get(number, 0.0) <= now_s
                if is_due and artifact.path not in work.busy:
                    self._turn += index + 1
                    return _Job(work, number, artifact, pause)
        return None

    def _pause_of(self, work: _Work) -> _Pause:
        root = "" if work.store is None else work.store.root  # "": the server that tells the store
        return self._pauses.setdefault(root, _Pause())

    def _upload(self, job: _Job) -> float | None:
        """Upload one; return in how many seconds it is to be tried again, None: it is done."""
        work, artifact, run = job.work, job.artifact, job.work.hosted.run
        try:
            if run.artifacts.is_replaced(job.number):
                end = End(job.number, REPLACED)
            else:
                end = End(job.number, UPLOADED, self._send(work, artifact))
        except (NoSuchContent, Refused) as error:
            self._refuse(work, artifact, str(error))
            end = End(job.number, REFUSED)
        except (NotReadable, SinkError) as error:
            return self._trouble(job, error)
        with self._changed:
            work.last_error = None
            job.pause.failures = self._pause_of(work).failures = 0
            work.ends[job.number] = end
            work.ends_since_s = work.ends_since_s or time.monotonic()
            is_full = len(work.ends) >= ENDS_MAX
        if is_full:
            self._settle(work)
        return None

    def _send(self, work: _Work, artifact: Artifact) -> str:
        """Return the sha256 of what the store has now."""
        path = locate(artifact, work.hosted.run.card.run_id, self._staging)
        with Source(artifact, path, self._taker(work)) as source:
            try:
                return self._store_of(work).put(artifact.path, source)
            finally:
                with self._changed:
                    work.sent_bytes -= source.sent

    def _taker(self, work: _Work) -> Callable[[int], None]:
        def take(size: int) -> None:
            self._throttle.take(size)
            with self._changed:
                if self._stopping:
                    raise Cut
                work.sent_bytes += size

        return take

    def _store_of(self, work: _Work) -> Store:
        """Return the run's store, as its artifact URI says. Raises: SinkError."""
        if work.store is None:
            mlflow_run_id = work.hosted.run.card.mlflow_run_id
            assert mlflow_run_id is not None
            work.store = self._stores.open(self._sink.get_run(mlflow_run_id).artifact_uri)
        return work.store

    def _refuse(self, work: _Work, artifact: Artifact, reason: str) -> None:
        now_ms = time.time_ns() // 1_000_000
        run_id = work.hosted.run.card.run_id
        path = locate(artifact, run_id, self._staging)
        entry = Entry("artifact", artifact.path, str(path), artifact.timestamp_ms, None)
        log.warning("run %s: artifact %r: %s", run_id, artifact.path, reason)
        work.hosted.letters.add([Objection(entry, reason)], now_ms)

    def _trouble(self, job: _Job, error: Exception) -> float:
        """Note why it did not go; return in how many seconds this one is to be tried again."""
        work, text = job.work, str(error)
        if text != work.last_error:
            log.warning("run %s: artifacts wait: %s", work.hosted.run.card.run_id, text)
        with self._changed:
            work.last_error = text
            if isinstance(error, Permanent):
                return BLOCKED_RETRY_S
            if isinstance(error, ServerAway):
                pause = self._pause_of(work)
                pause.failures += 1
                wait_s = backoff_s(pause.failures, self._rng, cap_s=self._wait_s_max)
                pause.until_s = time.monotonic() + wait_s + (error.retry_after_s or 0.0)
                return 0.0
            failures = work.failures[job.number] = work.failures.get(job.number, 0) + 1
            return backoff_s(failures, self._rng, cap_s=self._wait_s_max)

    def _give_back(self, job: _Job, delay_s: float | None) -> None:
        with self._changed:
            job.work.busy.pop(job.artifact.path, None)
            job.pause.is_tried = False
            if delay_s:
                job.work.later_s[job.number] = time.monotonic() + delay_s
            self._changed.notify_all()

    # ── the end of an upload ──

    def _settle(self, work: _Work) -> None:
        """Write down what is done, then remove what was staged for it. Crash: between the two, a
        file that nobody wants is left, and is removed with the run's others."""
        run = work.hosted.run
        with self._changed:
            ends = list(work.ends.values())
        waiting = run.artifacts.waiting
        done = [(end, waiting[end.number]) for end in ends if end.number in waiting]
        try:
            run.artifacts.settle(ends)
        except OSError as error:
            work.last_error = f"the spool's disk: {error.strerror}"
            work.ends_since_s = time.monotonic()
            return
        with self._changed:
            for end in ends:
                work.ends.pop(end.number, None)
                work.later_s.pop(end.number, None)
                work.failures.pop(end.number, None)
            work.ends_since_s = 0.0
        for end, artifact in done:
            if artifact.where != PLACE and end.how != REFUSED:
                locate(artifact, run.card.run_id, self._staging).unlink(missing_ok=True)
        if not run.artifacts.waiting:
            self._runs.notify(work.hosted)  # its end may have waited for this


def _are_ends_due(work: _Work) -> bool:
    return bool(work.ends) and time.monotonic() - work.ends_since_s >= ENDS_AGE_S
