"""A run, and the server it goes to: what all rooms of a lane share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from mlflow_relay.records import Artifact
from mlflow_relay_daemon.batch import METRICS_MAX
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.sinks import Metric, Param, Sink, Tag, TimedOut
from mlflow_relay_daemon.spool.card import Card
from mlflow_relay_daemon.spool.run_spool import Place
from mlflow_relay_daemon.spool.segment import Piece
from mlflow_relay_daemon.spool.transcript import Printed
from mlflow_relay_daemon.spool.watermark import Watermark

T = TypeVar("T")

RUN_ID_TAG, RUN_KEY_TAG = "relay.run_id", "relay.run_key"
RESUMED_BY_TAG = "relay.resumed_by."  #: followed by the relay run id that goes on with a run
OWNER_TAG = "relay.owner"  #: the node that established the run
#: Of a run that goes on as itself: when its last life began, and the relay run id of that.
LAST_LIFE_TAG = "relay.last_life"
#: The run id in the store from which `mlflow-relay sync` took the run.
SOURCE_TAG = "relay.source_run_id"


class Artifacts(Protocol):
    """What is to be uploaded of a run."""

    @property
    def waiting(self) -> Mapping[int, Artifact]:
        """Those that are not uploaded yet, by number."""
        ...

    def accept(self, artifacts: Iterable[Artifact]) -> None:
        """Take them in; they are on the disk when this returns. Raises: OSError."""
        ...


class Terminal(Protocol):
    """What the ranks of a run have printed."""

    def add(self, printed: Sequence[Printed]) -> None:
        """Take it in; it is on the disk when this returns. Raises: OSError."""
        ...


class Records(Protocol):
    """A run's records and card: a folder of this daemon's spool, or a source of a sync."""

    card: Card
    lock: threading.RLock
    mark: Watermark

    @property
    def artifacts(self) -> Artifacts:
        """Those whose records were delivered."""
        ...

    @property
    def terminal(self) -> Terminal:
        """What ranks have printed, of the records that were delivered."""
        ...

    def pieces(self) -> Iterator[tuple[Place, Piece, Place]]:
        """Yield (where it stands, what stands there, what is behind it) from the watermark on."""
        ...

    def settle(self, mark: Watermark) -> None:
        """All before the mark is done with."""
        ...

    def is_drained(self) -> bool:
        """Return whether nothing is left to deliver."""
        ...

    def waiting_bytes(self) -> int:
        """Return about how much is left to deliver."""
        ...

    def next_seq(self, session: bytes) -> int:
        """Return the first sequence number that the session has not reached."""
        ...

    def save_card(self) -> None:
        """Keep the card. Raises: OSError."""
        ...


@dataclass
class Portion:
    """How many metrics of a run its server takes in one request, as far as is known."""

    metrics: int = METRICS_MAX

    def shrink(self, tried: int) -> None:
        """So many took too long."""
        self.metrics = max(1, tried // 2)

    def grow(self) -> None:
        """A request came through: a little more, lest the next one takes too long again."""
        self.metrics = min(METRICS_MAX, self.metrics + 1 + self.metrics // 50)


@dataclass(frozen=True)
class Destination:
    """One run of this daemon and its MLflow run.

    Args:
        node: this daemon's name, unique among all that serve the run.
        artifact_wait_s: how long the end of the run waits for its artifacts.
    """

    run: Records
    sink: Sink
    breaker: Breaker
    node: str
    artifact_wait_s: float = 0.0
    portion: Portion = field(default_factory=Portion)

    @property
    def card(self) -> Card:
        return self.run.card

    @property
    def mlflow_run_id(self) -> str:
        """The MLflow run; only asked for once there is one."""
        assert self.card.mlflow_run_id is not None
        return self.card.mlflow_run_id

    def ask(self, operation: Callable[[], T]) -> T:
        """Do something at the server, waiting for it as long as it is away.

        Raises: SinkError: its answer; Stopped.
        """
        return self.breaker.call(operation)

    @property
    def witness(self) -> Tag:
        """A tag that the MLflow run has already: setting it again changes nothing."""
        if self.card.itself() is not None:
            return RESUMED_BY_TAG + self.card.run_id, "True"
        return RUN_ID_TAG, self.card.run_id

    def log(self, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[Tag]) -> None:
        """Deliver a batch; to a server that is too slow for all of it in pieces.

        A request that takes too long would take too long each time, and stop the run for ever.
        """
        done = 0

        def send() -> None:
            nonlocal done
            while True:
                part = metrics[done : done + self.portion.metrics]
                texts = ([], []) if done else (params, tags)
                try:
                    self.sink.log_batch(self.mlflow_run_id, part, *texts)
                except TimedOut:
                    self.portion.shrink(len(part))
                    raise
                self.portion.grow()
                done += len(part)
                if done >= len(metrics):
                    return

        self.ask(send)

    def set_tags(self, tags: Sequence[Tag]) -> None:
        """Set tags of the MLflow run, if there are any to set."""
        if tags:
            self.log([], [], tags)

    def update(self, **changes: str | int) -> None:
        """Change status, end time or name of the MLflow run."""
        self.ask(lambda: self.sink.update_run(self.mlflow_run_id, **changes))  # type: ignore[arg-type]


def is_followed(tags: Mapping[str, str], card: Card) -> bool:
    """Return whether an MLflow run has a later life than the relay run of this card."""
    begin, _, run_id = tags.get(LAST_LIFE_TAG, "").partition(" ")
    if not begin.isdecimal() or run_id == card.run_id:
        return False
    return card.itself() is None or int(begin) > card.start_ms
