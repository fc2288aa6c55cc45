"""Which artifact may go next: the oldest of a run, runs in turn, no two of one name at a time.

A store that is away is left alone for a while, and then one upload tries it. One that fails on a
single file is asked for the others meanwhile. Not safe for threads: `Uploads` holds its lock.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from mlflow_relay.records import PLACE, Artifact
from mlflow_relay_daemon.artifacts.stores import Store
from mlflow_relay_daemon.retry import backoff_s
from mlflow_relay_daemon.sinks import Permanent, ServerAway
from mlflow_relay_daemon.spool.ledger import End

if TYPE_CHECKING:
    from mlflow_relay_daemon.hosted import Hosted

#: Where MLflow has no run to upload to any more, somebody may restore it.
BLOCKED_RETRY_S = 60.0
SYNCED_AT_ONCE = 100
#: So many failures in a row, of whatever files, and it is the store that is in trouble.
STRIKES_MAX = 3
#: So many failures of one file, while the store took others, and it is the file.
FAILURES_SUSPECT = 8


@dataclass
class Health:
    """What is known of one store."""

    strikes: int = 0  #: failures since it took a file
    taken: int = 0  #: files that it took
    until_s: float = 0.0  #: it is left alone
    is_tried: bool = False

    @property
    def is_down(self) -> bool:
        return self.strikes >= STRIKES_MAX

    def may_try(self, now_s: float) -> bool:
        return not self.is_down or (not self.is_tried and self.until_s <= now_s)


@dataclass
class Failures:
    """Of one artifact."""

    count: int = 0
    taken_before: int = 0  #: files that the store had taken at the first of them
    later_s: float = 0.0  #: not to be tried before


@dataclass
class Work:
    """What is known of one run's uploads."""

    hosted: Hosted
    store: Store | None = None
    busy: dict[str, int] = field(default_factory=dict)  #: path → number, being uploaded
    failures: dict[int, Failures] = field(default_factory=dict)
    ends: dict[int, End] = field(default_factory=dict)  #: not in the ledger yet
    ends_since_s: float = 0.0
    synced_to: int = 0  #: staged files before this number are on the disk
    sent_bytes: int = 0  #: of uploads under way
    last_error: str | None = None

    def may_go(self, now_s: float, number: int, artifact: Artifact) -> bool:
        failures = self.failures.get(number)
        is_due = failures is None or failures.later_s <= now_s
        return is_due and number not in self.ends and artifact.path not in self.busy


@dataclass
class Job:
    """One upload under way."""

    work: Work
    number: int
    artifact: Artifact
    health: Health  #: of the store, as far as it was known when the job was taken


class Queue:
    """All runs with artifacts. Args: wait_s_max: the longest pause between two tries."""

    def __init__(self, wait_s_max: float) -> None:
        self._wait_s_max = wait_s_max
        self._stores: dict[str, Health] = {}
        self._turn = 0
        self._rng = random.Random()
        self.works: dict[str, Work] = {}

    def take(self) -> Job | None:
        """Return the next upload; None: nothing may go now."""
        works = list(self.works.values())
        now_s = time.monotonic()
        for index in range(len(works)):
            work = works[(self._turn + index) % len(works)]
            health = self._health_of(work)
            if work.hosted.run.card.mlflow_run_id is None or not health.may_try(now_s):
                continue
            found = work.hosted.run.artifacts.first(partial(work.may_go, now_s))
            if found is not None:
                self._turn += index + 1
                job = Job(work, *found, health)
                work.busy[job.artifact.path] = job.number
                health.is_tried = True
                return job
        return None

    def give_back(self, job: Job) -> None:
        """The job is over, well or not."""
        job.work.busy.pop(job.artifact.path, None)
        job.health.is_tried = False

    def went_well(self, job: Job) -> None:
        """The store took it; or it was none of the store's business."""
        job.work.last_error = None
        for health in (job.health, self._health_of(job.work)):
            health.strikes = 0
        self._health_of(job.work).taken += 1

    def failed(self, job: Job, error: Exception) -> bool:
        """It is to be tried again later; return False if that is of no use, for it is the file
        and not the store that is at fault."""
        health, now_s = self._health_of(job.work), time.monotonic()
        failures = job.work.failures.setdefault(job.number, Failures(0, health.taken))
        failures.count += 1
        if isinstance(error, Permanent):
            failures.later_s = now_s + BLOCKED_RETRY_S
            return True
        if isinstance(error, ServerAway):
            failures.count = 0  # says nothing of this file
            health.strikes = max(health.strikes, STRIKES_MAX - 1)
        elif failures.count >= FAILURES_SUSPECT and health.taken > failures.taken_before:
            return False
        else:
            wait_s = backoff_s(failures.count, self._rng, cap_s=self._wait_s_max)
            failures.later_s = now_s + wait_s
        health.strikes += 1
        if health.is_down:
            wait_s = backoff_s(health.strikes - STRIKES_MAX + 1, self._rng, cap_s=self._wait_s_max)
            health.until_s = now_s + wait_s + (getattr(error, "retry_after_s", None) or 0.0)
        return True

    def try_now(self) -> None:
        """Wait for nothing any longer."""
        for health in self._stores.values():
            health.until_s = 0.0
        for work in self.works.values():
            for failures in work.failures.values():
                failures.later_s = 0.0

    def unsynced(self) -> tuple[str, list[Artifact]]:
        """Return a run, and some of its files that wait and that a power failure could still take;
        none if all are on the disk."""
        for run_id, work in self.works.items():
            found = work.hosted.run.artifacts.waiting_from(work.synced_to, SYNCED_AT_ONCE)
            if found:
                work.synced_to = found[-1][0] + 1
                return run_id, [artifact for _, artifact in found if artifact.where != PLACE]
        return "", []

    def _health_of(self, work: Work) -> Health:
        root = "" if work.store is None else work.store.root  # "": the server that tells the store
        return self._stores.setdefault(root, Health())
