"""Where batches go: the interface that every sink serves, and the errors it may raise.

A sink is given only what MLflow's limits allow (`batch.py` sees to that) and is called by one
lane per run, several lanes at a time: it must be safe to use from many threads.

    SinkError
    ├── Temporary            the same request may succeed later; nothing is wrong with it
    │   ├── ServerAway       nobody can deliver now: refused, reset, timed out, 429, 502-504, a page
    │   │   └── NotAllowed   the server answers, but not to us: 401, 403 (a token can be renewed)
    │   ├── NotYet           ours, not the server's: what is wanted is not there yet
    │   └── TryAgain         this request only: 500, a deadlock, a unique constraint raced
    │       └── Forbidden    our credentials are good, but not for this run or experiment: 403
    └── Permanent            the same request will be refused again
        ├── Refused          MLflow says that the content is wrong; the reason is its own
        └── RunGone          the run or its experiment does not exist there, or was deleted
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

#: key, value, timestamp in ms since 1970, step
Metric = tuple[str, float, int, int]
#: key, value
Param = tuple[str, str]
#: key, value
Tag = tuple[str, str]


class SinkError(Exception):
    """What a sink raises, and the only thing.

    Args:
        message: for an operator: what was asked, what came back. Never holds a secret.
        error_code: MLflow's own, such as "INVALID_PARAMETER_VALUE"; "" where there is none.
    """

    def __init__(self, message: str, error_code: str = "") -> None:
        super().__init__(message)
        self.error_code = error_code


class Temporary(SinkError):
    """The same request may succeed later. `retry_after_s`: the server's own word, if any."""

    def __init__(
        self, message: str, error_code: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, error_code)
        self.retry_after_s = retry_after_s


class ServerAway(Temporary):
    """The server cannot be reached, or says that it cannot serve: nobody can deliver now."""


class TimedOut(ServerAway):
    """No answer in time: the server is away, or the request is too much for it."""


class NotAllowed(ServerAway):
    """The server refuses our credentials (401, 403)."""


class NotYet(Temporary):
    """What is asked for is not there yet; somebody else is expected to bring it."""


class TryAgain(Temporary):
    """This one request failed inside the server; others may well succeed."""


class Forbidden(TryAgain):
    """We are known there, but may not touch this run or experiment (403 "Permission denied").

    Not `NotAllowed`: one experiment without permission must not hold up everybody else's runs.
    """


class Permanent(SinkError):
    """The same request will be refused again."""


class Refused(Permanent):
    """MLflow refuses the content: nothing (more) of the request will be stored."""


class RunGone(Permanent):
    """The run (or experiment) does not exist on this server, or was deleted there."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What the server says of one run."""

    run_id: str
    experiment_id: str
    run_name: str
    status: str  #: RUNNING, SCHEDULED, FINISHED, FAILED or KILLED
    start_time_ms: int
    end_time_ms: int | None
    lifecycle_stage: str  #: "active" or "deleted"
    tags: Mapping[str, str]
    artifact_uri: str = ""  #: where its files go


@dataclass(frozen=True, slots=True)
class DatasetInput:
    """A dataset that a run has used."""

    name: str
    digest: str
    source_type: str
    source: str
    schema: str  #: "" where there is none
    profile: str
    tags: tuple[Tag, ...]  #: of its use by this run, such as mlflow.data.context


class Sink(Protocol):
    """One MLflow server or store. Every method may raise any `SinkError`."""

    #: the tracking URI without credentials, for people to read
    uri: str

    def ping(self) -> str:
        """Return the server's version ("" where it has none to tell); cheap."""
        ...

    def experiment_id(self, name: str) -> str:
        """Return the id of the experiment of that name, made if there is none.

        Raises: RunGone: it was deleted there (MLflow creates no runs in a deleted one).
        """
        ...

    def find_runs(self, experiment_ids: Sequence[str], tag: str, value: str) -> list[RunInfo]:
        """Return all runs (deleted ones too) there that carry this tag, oldest first."""
        ...

    def experiment_ids(self) -> list[str]:
        """Return the ids of all experiments, deleted ones too."""
        ...

    def get_run(self, run_id: str) -> RunInfo:
        """Return one run, deleted or not. Raises: RunGone: there is none of that id."""
        ...

    def create_run(
        self,
        experiment_id: str,
        *,
        run_name: str,
        user: str,
        start_time_ms: int,
        tags: Sequence[Tag],
    ) -> str:
        """Create a run that is RUNNING and return its id. Not idempotent: search by tag first."""
        ...

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric],
        params: Sequence[Param],
        tags: Sequence[Tag],
    ) -> None:
        """Store at most 1000 entities (1000 metrics, 100 params, 100 tags); idempotent.

        NaN and infinities are values like others. Values must be of the types given above: the
        server answers 200 and drops what follows a wrong one.
        """
        ...

    def log_inputs(self, run_id: str, inputs: Sequence[DatasetInput]) -> None:
        """Tell which datasets a run has used; idempotent."""
        ...

    def update_run(
        self,
        run_id: str,
        *,
        status: str | None = None,
        end_time_ms: int | None = None,
        run_name: str | None = None,
    ) -> None:
        """Change what is given; idempotent."""
        ...

    def call(self, name: str, body: dict[str, Any]) -> None:
        """Carry out another request of MLflow's API that changes a run.

        Args: name: its path, such as "runs/delete-tag"; body: its JSON object, `run_id` in it.
        """
        ...

    def delete_run(self, run_id: str) -> None:
        """Delete (MLflow can restore it); a run that is deleted already is no error."""
        ...

    def run_url(self, experiment_id: str, run_id: str) -> str:
        """Return the address of the run's page ("" where there is none)."""
        ...

    def close(self) -> None:
        """Give back connections and threads."""
        ...
