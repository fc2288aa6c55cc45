"""Spools of this project's daemons: read as they stand, whoever owns them.

No lock is taken and nothing is written: a daemon that serves the spool does not notice. What nodes
have of one run is one run here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay_daemon.artifacts.source import locate
from mlflow_relay_daemon.importers.segments import Segments, add
from mlflow_relay_daemon.lane.destination import Records
from mlflow_relay_daemon.lane.progress import Progress
from mlflow_relay_daemon.sinks import RunInfo
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool import watermark
from mlflow_relay_daemon.spool.card import Card, Link
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.ledger import Ledger
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.spool import NODE, RUNS, card_in_segments
from mlflow_relay_daemon.spool.staging import NAME as STAGING
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunState
from mlflow_relay_daemon.sync.artifacts import Wanted, wanted_record
from mlflow_relay_daemon.sync.source import Size, SourceError, SyncCard
from mlflow_relay_daemon.words import plural


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
                add(seen, Sequences(mark.sequences))
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
            accepted = Ledger(Disk(), part.folder).waiting.values()
            for artifact in [*accepted, *self._reader.logged[part.folder]]:
                file = locate(artifact, self.card.run_id, staging)
                found[artifact.path] = wanted_record(artifact, file)
        return list(found.values())

    def close(self) -> None:
        """Let go of the segments."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def find_runs(
    folders: Sequence[Path], *, experiment_name: str | None
) -> Iterator[SpoolRun | SourceError]:
    """Yield the runs of spools, merged by relay run id; for one that cannot be read, why."""
    parts: dict[str, list[Part]] = {}
    for folder in folders:
        try:
            node, paths = _node(folder), sorted((folder / RUNS).iterdir())
        except OSError as error:  # one node's spool keeps none of the others back
            yield SourceError.of(error, folder)
            continue
        for path in paths:
            try:
                if not path.is_dir():
                    continue
                part = Part(node, path, _card(path))
            except OSError as error:
                yield SourceError.of(error, path)
            except (FormatError, VersionError, SourceError) as error:
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
