"""The segments of one run, of all nodes' spools, one behind the other. Reads only."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay.records import ARTIFACT, Artifact, unpack_record
from mlflow_relay_daemon.spool import segment
from mlflow_relay_daemon.spool.card import Card
from mlflow_relay_daemon.spool.run_spool import Place
from mlflow_relay_daemon.spool.segment import Piece
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.sync.source import NoTerminal, NotHere, SourceError

#: An array of the kind and the fields: PROTOCOL, Records.
ARTIFACT_HEAD = bytes((0x90 + 1 + len(Artifact._fields), ARTIFACT))


class Segments:
    """All segments of some folders. Implements `Records`.

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
        self.terminal = NoTerminal()
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
        add(self.before, found)
        add(self._sequences, found)
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


def add(seen: Sequences, more: Sequences) -> None:
    """Take in what others have seen."""
    for session, (next_seq, ahead) in more.save().items():
        for low, high in [(0, next_seq), *ahead]:
            if high > low:
                seen.add(session, low, high)
