"""Spools of this project's daemons: read as they stand, whoever owns them.

No lock is taken and nothing is written: a daemon that serves the spool does not notice. What nodes
have of one run is one run here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay.records import ARTIFACT, Artifact, unpack_record
from mlflow_relay_daemon.artifacts.source import locate
from mlflow_relay_daemon.lane.destination import Records
from mlflow_relay_daemon.lane.progress import Progress
from mlflow_relay_daemon.sinks import RunInfo
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool import segment, watermark
from mlflow_relay_daemon.spool.card import Card, Link
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.ledger import Ledger
from mlflow_relay_daemon.spool.run_spool import Place
from mlflow_relay_daemon.spool.segment import Piece
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.spool import NODE, RUNS, card_in_segments
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunState
from mlflow_relay_daemon.sync.artifacts import Wanted, wanted_record
from mlflow_relay_daemon.sync.source import NotHere, Size, SourceError, SyncCard
from mlflow_relay_daemon.words import plural

#: An array of the kind and the fields: PROTOCOL, Records.
ARTIFACT_HEAD = bytes((0x90 + 1 + len(Artifact._fields), ARTIFACT))
STAGING = "staging"  # of a spool: where ranks put what they log


class Part(NamedTuple):
    """What one node has of a run."""

    node: str
    folder: Path
    card: Card


class SpoolRun:
    """One run, of one or several spools. Implements `Source`."""

    kind = "spool"

    def __init__(self, parts: Sequence[Part], experiment_name: str | None) -> None:
        # The node of rank 0 first: its word on the run counts.
        self.parts = sorted(parts, key=lambda part: (not part.card.is_owned, part.node))
        self.card = _merged([part.card for part in self.parts])
        if experiment_name is not None:
            self.card.experiment_name = experiment_name
        self.where = ", ".join(str(part.folder) for part in self.parts)
        self.node = self.parts[0].node
        self.notes: list[str] = []
        self.told_end: list[Any] | None = None
        self.uploaded: dict[str, int] = {}
        self._reader: Segments | None = None

    def size(self) -> Size:
        """Return how many records there are, from the heads of the segments."""
        size = Size()
        for part in self.parts:
            with Segments(self.card, [part.folder]) as found:
                size.records += found.records
                size.bytes += found.bytes
        return size

    def open(self, found: RunInfo) -> Records:
        """Return what is in the segments and not on the server."""
        self.close()
        reader = self._reader = Segments(self.card, [part.folder for part in self.parts])
        self.notes = list(reader.notes)
        seen, last_record_ms = reader.before, 0
        for part in self.parts:
            progress = Progress.read(found.tags, part.node)
            if part.card.mlflow_run_id == found.run_id:
                mark = _mark(part.folder)
                _add(seen, Sequences(mark.sequences))
                last_record_ms = max(last_record_ms, mark.last_record_ms)
            elif reader.settled_records.get(part.folder):
                count = plural(reader.settled_records[part.folder], "record")
                self.notes.append(f"{count} were delivered elsewhere, and are not in the spool")
            for session, next_seq in progress.sessions().items():
                seen.add(session, 0, next_seq)
            last_record_ms = max(last_record_ms, progress.last_record_ms)
            self.told_end = self.told_end or progress.end
        for name, known in self.card.sessions.items():
            seen.give_up(bytes.fromhex(name), known.first_seq)  # it spoke to another spool before
        reader.mark = Watermark(sequences=seen.save(), last_record_ms=last_record_ms)
        if self.told_end is not None and len(self.told_end) == 4:
            status, end_ms, reason, sessions = self.told_end
            card = self.card
            card.state, card.status, card.end_reason = RunState.ENDED, str(status), str(reason)
            card.end_ms = int(end_ms) if end_ms is not None else None
            card.told_sessions = int(sessions)
        return reader

    def done(self) -> Size:
        """Return how much of it the server has by now."""
        if self._reader is None:
            return Size()
        return Size(self._reader.mark.settled_records, self._reader.read_bytes)

    def progress(self) -> dict[str, Progress]:
        """Return how far each node's records are delivered.

        The END of a session is never counted: its word is for whoever reads it, the daemon too.
        """
        assert self._reader is not None
        seen = Sequences(self._reader.mark.sequences)
        told: dict[str, Progress] = {}
        for part in self.parts:
            is_whole = all(self.uploaded.get(each.path) == each.mark for each in self.wanted())
            last_ms = self._reader.mark.last_record_ms
            progress = Progress({}, last_ms, self.told_end, is_whole)
            for name in part.card.sessions:
                known = self.card.sessions[name]
                next_seq = seen.next_seq(bytes.fromhex(name)) - (known.end_status is not None)
                if next_seq > 0:
                    progress.seen[name] = next_seq
            told[part.node] = progress
        return told

    def wanted(self) -> list[Wanted]:
        """Return what ranks have logged as artifacts, the last of each name."""
        assert self._reader is not None
        found: dict[str, Wanted] = {}
        for part in self.parts:
            staging = part.folder.parent.parent / STAGING
            logged = Ledger(Disk(), part.folder).oldest_first()
            for artifact in [each for _, each in logged] + self._reader.logged[part.folder]:
                file = locate(artifact, self.card.run_id, staging)
                found[artifact.path] = wanted_record(artifact, file)
        return list(found.values())

    def close(self) -> None:
        """Let go of the segments."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class Segments:
    """The segments of a run, of all its folders, one behind the other. Implements `Records`.

    All files are open from the beginning on: a daemon may remove what it has delivered, and what
    is open stays readable.
    """

    def __init__(self, card: Card, folders: Sequence[Path]) -> None:
        self.card, self.lock, self.mark = card, threading.RLock(), Watermark()
        self.before = Sequences()  #: what was delivered before the first segment that is left
        self.settled_records: dict[Path, int] = {}  #: how many those are, by folder
        self.records = self.bytes = 0
        self.notes: list[str] = []
        self.artifacts = NotHere()
        self.logged: dict[Path, list[Artifact]] = {}  #: artifacts, by folder
        self._files: list[tuple[int, int, int]] = []  # descriptor, first frame, end
        self._sequences = Sequences()
        self._piece: tuple[Place, Piece] | None = None
        try:
            for folder in folders:
                self._open(folder)
        except (FormatError, VersionError) as error:
            self.close()
            raise SourceError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Segments:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd, _, _ in self._files:
            os.close(fd)
        self._files.clear()

    @property
    def read_bytes(self) -> int:
        """How much stands before the watermark."""
        whole = sum(end for _, _, end in self._files[: max(0, self.mark.segment - 1)])
        return whole + self.mark.offset

    def pieces(self) -> Iterator[tuple[Place, Piece, Place]]:
        """Yield (where it stands, what stands there, what is behind it) from the watermark on."""
        number, offset = max(1, self.mark.segment), self.mark.offset
        while number <= len(self._files):
            fd, start, end = self._files[number - 1]
            at = offset or start
            if at >= end:
                number, offset = number + 1, 0
                continue
            here = Place(number, at)
            if self._piece is None or self._piece[0] != here:
                self._piece = here, segment.read_piece(fd, at, end)
            piece = self._piece[1]
            offset = piece.end
            yield here, piece, Place(number, offset)

    def settle(self, mark: Watermark) -> None:
        self.mark = mark

    def is_drained(self) -> bool:
        return self.waiting_bytes() == 0

    def waiting_bytes(self) -> int:
        return max(0, sum(end for _, _, end in self._files) - self.read_bytes)

    def next_seq(self, session: bytes) -> int:
        return self._sequences.next_seq(session)

    def save_card(self) -> None:
        """The card is the daemon's: here it is made anew each time."""

    def _open(self, folder: Path) -> None:
        numbers = segment.numbers_in(folder)
        logged = self.logged[folder] = []
        for index, number in enumerate(numbers):
            fd = os.open(segment.path_of(folder, number), os.O_RDONLY | os.O_CLOEXEC)
            end = os.fstat(fd).st_size
            self._files.append((fd, start := segment.first_frame(fd, end), end))
            self.bytes += end
            if index == 0:
                self._take_head(folder, fd)
            self._count(fd, start, end, logged, is_last=index == len(numbers) - 1)

    def _take_head(self, folder: Path, fd: int) -> None:
        """The head of the oldest segment says what was settled before it."""
        try:
            head, _ = segment.read_head(fd)
        except FormatError:
            return
        found = Sequences(head.sequences)
        _add(self.before, found)
        _add(self._sequences, found)
        self.settled_records[folder] = head.accepted_records

    def _count(
        self, fd: int, start: int, end: int, logged: list[Artifact], *, is_last: bool
    ) -> None:
        at = start
        while at < end:
            piece = segment.read_piece(fd, at, end)
            at = piece.end
            logged += map(_artifact, filter(_is_artifact, piece.records))
            if piece.header is not None and piece.whole:
                header = piece.header
                self.records += header.records
                self._sequences.add(header.session, header.first_seq, header.next_seq)
            elif is_last and piece.end >= end:
                size = piece.end - piece.start
                self.notes.append(f"torn tail: {size} bytes behind the last whole frame")
            else:
                size = piece.end - piece.start
                self.notes.append(f"damaged: {size} bytes in a segment")


def _is_artifact(record: bytes | None) -> bool:
    """Told by its first two bytes; thousands of times as many are metrics."""
    return record is not None and record[:2] == ARTIFACT_HEAD


def _artifact(record: bytes) -> Artifact:
    found = unpack_record(record)
    assert isinstance(found, Artifact)
    return found


def find_runs(
    folders: Sequence[Path], *, experiment_name: str | None
) -> Iterator[SpoolRun | SourceError]:
    """Yield the runs of spools, merged by relay run id; for one that cannot be read, why."""
    parts: dict[str, list[Part]] = {}
    for folder in folders:
        node = _node(folder)
        for path in sorted((folder / RUNS).iterdir()):
            if not path.is_dir():
                continue
            try:
                part = Part(node, path, _card(path))
            except (FormatError, VersionError, OSError, SourceError) as error:
                yield SourceError(f"{path}: {error}")
            else:
                parts.setdefault(part.card.run_id, []).append(part)
    for found in parts.values():
        yield SpoolRun(found, experiment_name)


def is_spool(folder: Path) -> bool:
    """Return whether a daemon has served this folder."""
    return (folder / RUNS).is_dir() and (folder / NODE).is_file()


def _node(folder: Path) -> str:
    return (folder / NODE).read_text("utf-8", errors="replace").strip()


def _card(folder: Path) -> Card:
    try:
        return cards.read(folder)
    except VersionError:
        raise
    except (FormatError, FileNotFoundError):
        found = card_in_segments(folder)
        if found is None:
            raise SourceError("no run card that can be read: was it copied in part?") from None
        return found


def _mark(folder: Path) -> Watermark:
    try:
        return watermark.read(folder) or Watermark()
    except FormatError:
        return Watermark()


def _add(seen: Sequences, more: Sequences) -> None:
    for session, (next_seq, ahead) in more.save().items():
        for low, high in [(0, next_seq), *ahead]:
            if high > low:
                seen.add(session, low, high)


def _merged(found: Sequence[Card]) -> SyncCard:
    """Return one card of all nodes' cards; what MLflow was told is asked anew."""
    first = found[0]
    values = {each.name: getattr(first, each.name) for each in fields(Card)}
    card = SyncCard(**values)
    card.start_ms = min(each.start_ms for each in found)
    card.world_size = max(each.world_size for each in found)
    card.node_count = max(each.node_count for each in found)
    card.sessions = {}
    for each in found:
        for name, session in each.sessions.items():
            known = card.sessions.get(name)
            if known is None or (session.closed and not known.closed):
                card.sessions[name] = replace(session)
    card.parent, card.fork = _untold(first.parent), _untold(first.fork)
    card.held = [list(text) for each in found for text in each.held]
    card.state, card.status = RunState.NEW, "RUNNING"
    card.experiment_id = card.mlflow_run_id = card.end_ms = None
    card.is_introduced, card.create_attempts, card.end_reason = False, 0, ""
    card.told_sessions = 0
    return card


def _untold(link: Link | None) -> Link | None:
    if link is None:
        return None
    return replace(link, mlflow_run_id=None, is_told=False, is_waiting=False)
