"""What an importer makes of a run: its card, and its records in pieces of bounded size.

An importer yields chunks; `Feed` shows them to the lane's rooms as if they stood in a spool.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from mlflow_relay.frames import Header
from mlflow_relay.records import Artifact
from mlflow_relay_daemon.lane.destination import Records
from mlflow_relay_daemon.lane.progress import Progress
from mlflow_relay_daemon.sinks import DatasetInput, RunInfo
from mlflow_relay_daemon.spool.card import Card
from mlflow_relay_daemon.spool.run_spool import Place
from mlflow_relay_daemon.spool.segment import Piece
from mlflow_relay_daemon.spool.transcript import Printed
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.sync.artifacts import Wanted

#: Runs of other stores have no sessions; all their records are of this one.
SESSION = bytes(16)


@dataclass
class SyncCard(Card):
    """The card of a run that a sync brings: whoever brings a run makes it."""

    @property
    def is_owned(self) -> bool:
        return True


@dataclass
class Size:
    """How much a run is, as far as it can be told beforehand."""

    records: int = 0  #: of a spool: log calls; of other stores: points
    bytes: int = 0


class Source(Protocol):
    """One run, as a store holds it. Reads only."""

    card: SyncCard
    kind: str  #: "spool", "mlruns", "sqlite" or "server"
    where: str  #: for people
    node: str  #: who brings it, as other nodes of the run see it
    notes: list[str]  #: what people should know: a torn tail, an artifact that is not there
    told_end: list[Any] | None  #: how the server was told that it ended; known once it is open
    uploaded: dict[str, int]  #: marks of the artifacts that the server has, by path

    def size(self) -> Size:
        """Return how much there is. Raises: SourceError, OSError."""
        ...

    def open(self, found: RunInfo) -> Records:
        """Return what there is to deliver to this MLflow run. Raises: SourceError, OSError."""
        ...

    def done(self) -> Size:
        """Return how much of it the server has by now."""
        ...

    def progress(self) -> dict[str, Progress]:
        """Return how far it is delivered, by the names to keep it under."""
        ...

    def wanted(self) -> list[Wanted]:
        """Return its artifacts; known once it is open. Raises: SourceError, OSError."""
        ...

    def close(self) -> None:
        """Let go of files; `open` may be called again."""
        ...


class SourceError(Exception):
    """A source, or a run in it, cannot be read. One line that says why."""

    @classmethod
    def of(cls, error: OSError, where: object) -> SourceError:
        """Return what the system said, in words; `where` is for an error that names no file."""
        return cls(f"{error.filename or where} cannot be read: {error.strerror or error}")


class Chunk(NamedTuple):
    """Records that belong together, and how far the source is read behind them."""

    records: Sequence[Any]  #: records.Params, records.Tags or batch.Points
    seen: Mapping[str, int]  #: what `Progress.seen` is to say once they are delivered


@dataclass(frozen=True)
class Ending:
    """How another store says that a run ended."""

    status: str
    end_ms: int | None


@dataclass
class ForeignRun:
    """A run of another store; its importer makes the chunks. Implements `Source`."""

    card: SyncCard
    kind: str
    where: str
    status: str
    end_ms: int | None
    is_deleted: bool = False
    relatives: frozenset[str] = frozenset()  #: ids of runs that it names as parent or origin
    originals: frozenset[str] = frozenset()  #: params and tags that keep an id as it was
    kept: frozenset[str] = frozenset()  #: those whose original value stands in `originals`
    inputs: list[DatasetInput] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    told_end: list[Any] | None = None
    uploaded: dict[str, int] = field(default_factory=dict)
    node: str = "sync"
    feed: Feed | None = None

    def size(self) -> Size:
        """Return how much there is. Raises: SourceError, OSError."""
        raise NotImplementedError

    def chunks(self, seen: Mapping[str, int]) -> Iterator[Chunk]:
        """Yield all that is behind what was seen. Raises: SourceError, OSError."""
        raise NotImplementedError

    def open(self, found: RunInfo) -> Records:
        """Return what is left to deliver."""
        before = Progress.read(found.tags, self.kind)
        self.told_end = before.end
        self.feed = Feed(self.card, self.chunks(before.seen), before.seen)
        return self.feed

    def done(self) -> Size:
        """Return how much of it the server has by now."""
        return Size() if self.feed is None else Size(self.feed.mark.delivered_points)

    def wanted(self) -> list[Wanted]:
        """Return its artifacts. Raises: SourceError, OSError."""
        raise NotImplementedError

    def progress(self) -> dict[str, Progress]:
        """Return how far it is delivered."""
        assert self.feed is not None
        return {self.kind: Progress(dict(self.feed.seen), 0, self.told_end)}

    def close(self) -> None:
        """Nothing is held open between chunks."""


class NotHere:
    """Artifacts are brought apart from records: see sync.artifacts."""

    waiting: Mapping[int, Artifact] = MappingProxyType({})

    def accept(self, artifacts: Iterable[Artifact]) -> None:
        """They are found again by whoever brings them."""


class NoTerminal:
    """A sync brings no terminal output; it says so."""

    was_asked = False

    def add(self, printed: Sequence[Printed]) -> None:
        """It stays in the source."""
        self.was_asked |= bool(printed)


class Feed:
    """Chunks in the form of a spool's folder. Holds what a few requests take, and no more."""

    def __init__(self, card: SyncCard, chunks: Iterator[Chunk], seen: Mapping[str, int]) -> None:
        self.card: Card = card
        self.lock = threading.RLock()
        self.mark = Watermark(segment=1, offset=0)
        self.artifacts = NotHere()
        self.terminal = NoTerminal()
        self.seen = dict(seen)
        self._chunks = chunks
        self._window: deque[tuple[int, Piece, Mapping[str, int]]] = deque()
        self._pulled = 0
        self._records = 0

    def pieces(self) -> Iterator[tuple[Place, Piece, Place]]:
        """Yield what stands behind the watermark."""
        at = 0
        while True:
            if at == len(self._window) and not self._pull():
                return
            number, piece, _ = self._window[at]
            yield Place(1, number), piece, Place(1, number + 1)
            at += 1

    def settle(self, mark: Watermark) -> None:
        """All before the mark is delivered."""
        while self._window and self._window[0][0] < mark.offset:
            _, _, seen = self._window.popleft()
            self.seen.update(seen)
        self.mark = mark

    def is_drained(self) -> bool:
        """Return whether all chunks are delivered."""
        return not self._window and not self._pull()

    def waiting_bytes(self) -> int:
        """Nothing is known of chunks that were not read."""
        return 0

    def next_seq(self, session: bytes) -> int:
        """Return how many records were read."""
        return self._records

    def save_card(self) -> None:
        """The card is made anew from the source and the server each time."""

    def _pull(self) -> bool:
        """Read one more chunk; return whether there was one."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        header = Header(SESSION, self._records, len(chunk.records), 0, 0)
        piece = Piece(0, 0, header, list(chunk.records), whole=True)
        self._window.append((self._pulled, piece, chunk.seen))
        self._pulled += 1
        self._records += len(chunk.records)
        return True
