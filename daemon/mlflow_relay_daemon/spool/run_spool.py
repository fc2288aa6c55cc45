"""One run's folder: intake appends frames at one end, its lane reads records at the other."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay.frames import Header
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool import segment, watermark
from mlflow_relay_daemon.spool.card import Card
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.ledger import Ledger
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.transcript import Transcripts
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunState

log = logging.getLogger(__name__)

#: A segment that is delivered is given up for a new one beyond this size, to return its space.
RETURN_BYTES_MIN = 1 << 20

#: A frame as it came, and what its header says.
Arrival = tuple[Header, bytes | memoryview]


class Place(NamedTuple):
    """Where in a run's segments; compares in reading order."""

    segment: int
    offset: int  #: 0: its first frame, wherever that is


class RunSpool:
    """The folder of one run. Safe for one appending thread (intake) and one reading (the lane).

    Opening it recovers: whatever a crash left is read as far as it goes, and nothing is appended to
    a file of an earlier life.

    Args:   is_trusted: False: it could not be opened before, perhaps because an fsync failed.
    Raises: VersionError: a later release wrote here; OSError.
    """

    def __init__(
        self,
        disk: Disk,
        folder: Path,
        card: Card,
        *,
        segment_bytes_max: int,
        is_trusted: bool = True,
    ) -> None:
        self.folder, self.card = folder, card
        self.lock = threading.RLock()  # guards the card and what follows
        self._mark_lock = threading.Lock()  # guards the watermark's file
        self._disk = disk
        self._segment_bytes_max = segment_bytes_max
        self._writer: segment.Writer | None = None
        self._last_number = 0
        self._reading: tuple[int, int] | None = None  # the lane's: segment, descriptor
        self._piece: tuple[Place, segment.Piece] | None = None  # the lane's
        self._starts: dict[int, int] = {}
        self._ends = {
            number: segment.path_of(folder, number).stat().st_size
            for number in segment.numbers_in(folder)
        }
        for number in self._ends:
            self._start_of(number)  # a segment of a later release is met now, and not by a lane
        self.mark = self._read_mark()
        self.accepted_records = self.mark.settled_records
        self.sequences = Sequences(self.mark.sequences)
        self.artifacts = Ledger(disk, folder)
        self.terminal = Transcripts(disk, folder)
        try:
            self._recover(is_trusted=is_trusted)
        except BaseException:
            self._forget_descriptor()  # it may be opened again and again
            raise

    # ── intake ──

    def append(self, arrivals: Sequence[Arrival]) -> None:
        """Append frames; they are on the disk when this returns.

        Raises: OSError: no frame of these counts; the next call begins a new file.
        Crash: before the fsync returns, any part of the frames may be found: they were not acked,
            come again, and are known by their sequence numbers.
        """
        writer = self._writer
        if writer is not None and (writer.broken or writer.synced >= self._segment_bytes_max):
            self._close_writer()
            writer = None
        if writer is None:
            writer = self._begin_segment()
        try:
            writer.append([frame for _, frame in arrivals])
        except OSError:
            if (
                writer.synced == writer.start
            ):  # a disk that stays full must not fill with beginnings
                self._close_writer()
                with self.lock:
                    self._remove([writer.number])
            raise
        with self.lock:  # size and counts change together, or the lane could settle one of them
            self._ends[writer.number] = writer.synced
            for header, _ in arrivals:
                self._count(header)

    def next_seq(self, session: bytes) -> int:
        """Return the sequence number that is wanted next: all before it is on the disk."""
        with self.lock:
            return self.sequences.next_seq(session)

    def skip_to(self, session: bytes, seq: int) -> None:
        """The session has nothing before `seq` any more: do not wait for it."""
        with self.lock:
            self.sequences.give_up(session, seq)

    def _begin_segment(self) -> segment.Writer:
        # Also after one that could be neither begun nor removed.
        number = max([self.mark.segment, self._last_number, *self._ends]) + 1
        self._last_number = number
        with self.lock:
            card = cards.pack(self.card)
        head = segment.Head(self.accepted_records, self.sequences.save(), card)
        self._writer = segment.Writer(self._disk, self.folder, number, head)
        with self.lock:
            self._ends[number] = self._writer.synced
            self._starts[number] = self._writer.start
        return self._writer

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _count(self, header: Header) -> None:
        self.accepted_records += header.records
        self.sequences.add(header.session, header.first_seq, header.next_seq)

    def return_space(self, *, is_needed: bool = False) -> None:
        """If all is delivered, let go of the segments: of all if the run has ended, else of those
        before a new one.

        Args:   is_needed: also where it is little; nothing more may come that would make it much.
        Raises: OSError: no space for the head of a new one.
        Crash: safe at any line: nothing in these segments is wanted any more.
        """
        with self.lock:
            if not self._ends and self.card.is_over:
                self.artifacts.compact()
            if not self._ends or not self.is_drained():
                return
            newest = max(self._ends)
            # A new segment has a head, too: below that there is nothing to gain.
            worth_bytes = self._start_of(newest) if is_needed else RETURN_BYTES_MIN
            mark = Watermark(**vars(self.mark))
            mark.segment, mark.offset, mark.skip = newest, self._ends[newest], 0
            if self.card.is_over:
                self._close_writer()
            elif self._ends[newest] - self._start_of(newest) >= worth_bytes:
                self._close_writer()
                writer = self._begin_segment()
                mark.segment, mark.offset = writer.number, writer.start
            else:
                return
            self._write_mark(mark)
            self.mark = mark
            kept = () if self.card.is_over else (mark.segment,)
            self._remove([number for number in self._ends if number not in kept])

    def save_card(self) -> None:
        """Put the card on the disk. Raises: OSError."""
        with self.lock:
            cards.write(self._disk, self.folder, self.card)

    # ── the lane ──

    def pieces(self) -> Iterator[tuple[Place, segment.Piece, Place]]:
        """Yield (where it stands, what stands there, what is behind it) from the watermark on."""
        place = Place(self.mark.segment, self.mark.offset)
        while (found := self._locate(place)) is not None:
            number, start, end = found
            if start >= end:
                place = Place(number + 1, 0)
                continue
            fd = self._descriptor(number)
            here = Place(number, start)
            if self._piece is None or self._piece[0] != here:  # a large frame fills many batches
                self._piece = here, segment.read_piece(fd, start, end)
            piece = self._piece[1]
            place = Place(number, piece.end)
            yield here, piece, place
        self._forget_descriptor()  # an open file takes space also when it is removed

    def settle(self, mark: Watermark) -> None:
        """All before the mark is done with: remember it, and remove the segments before it.

        Crash: safe at any line: an old watermark costs a resend; a removed segment is followed by
            one whose head says what was accepted before it.
        Raises: OSError: the mark must last, and cannot be written; nothing is settled.
        """
        if watermark.must_last(mark):
            self._write_mark(mark)  # an fsync: not while intake waits for the lock
        with self.lock:
            if self._next_number(mark.segment) is None and mark.offset >= self._ends.get(
                mark.segment, 0
            ):
                mark.settled_records = self.accepted_records  # damage is settled, too
            self.mark = mark
            if not watermark.must_last(mark):
                self._write_mark(mark)
            self._remove([number for number in self._ends if number < mark.segment])

    def is_drained(self) -> bool:
        """Return whether the watermark stands behind the last frame."""
        with self.lock:
            return self.waiting_bytes() == 0

    # ── both ──

    def place(self) -> Place:
        """Return where delivery stands."""
        with self.lock:
            return Place(self.mark.segment, self.mark.offset)

    def pieces_since(self, place: Place) -> Iterator[tuple[Place, segment.Piece, Place]]:
        """Yield what stands from a place on, as `pieces` does; for any thread.

        Segments that are delivered while it reads stay readable for it.
        """
        with self.lock:
            spans = []
            for number in sorted(each for each in self._ends if each >= place.segment):
                begin = place.offset if number == place.segment else 0
                path = segment.path_of(self.folder, number)
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                spans.append((number, fd, begin or self._start_of(number), self._ends[number]))
        try:
            for number, fd, start, end in spans:
                at = start
                while at < end:
                    piece = segment.read_piece(fd, at, end)
                    yield Place(number, at), piece, Place(number, piece.end)
                    at = piece.end
        finally:
            for _, fd, _, _ in spans:
                os.close(fd)

    def waiting_bytes(self) -> int:
        """Return the bytes of frames behind the watermark."""
        with self.lock:
            total = 0
            for number, end in self._ends.items():
                if number < self.mark.segment:
                    continue
                here = number == self.mark.segment and self.mark.offset
                start = self.mark.offset if here else self._start_of(number)
                total += max(0, end - start)
            return total

    def end_place(self) -> Place:
        """Return the place behind the last frame; a watermark there has seen all there is now."""
        with self.lock:
            filled = (n for n, end in self._ends.items() if end > self._start_of(n))
            newest = max(filled, default=0)
            return Place(newest, self._ends.get(newest, 0))

    def waiting_records(self) -> int:
        """Return how many records are behind the watermark."""
        return max(0, self.accepted_records - self.mark.settled_records)

    def oldest_waiting_ms(self) -> int | None:
        """Return about when the oldest waiting record was spooled; None if none waits."""
        with self.lock:
            if self.is_drained():
                return None
            number = min((each for each in self._ends if each >= self.mark.segment), default=0)
        try:
            found = os.stat(segment.path_of(self.folder, number))
        except FileNotFoundError:
            return None  # delivered just now
        begun_ms = int(found.st_ctime * 1000) if found.st_size else 0
        return max(begun_ms, self.mark.last_record_ms)

    def segment_bytes(self) -> int:
        """Return what the segments take on the disk."""
        with self.lock:
            return sum(self._ends.values())

    def changed_ms(self) -> int:
        """Return when something of this run was last written, by this node's clock."""
        times = [each.stat().st_mtime_ns for each in self.folder.iterdir()]
        return max(times, default=0) // 1_000_000

    def close(self) -> None:
        """Close files; the folder stays as it is."""
        self._close_writer()
        self._forget_descriptor()

    # ── recovery ──

    def _read_mark(self) -> Watermark:
        try:
            mark = watermark.read(self.folder) or Watermark()
        except FormatError as error:
            log.warning("run %s: %s: what is there is sent again", self.card.run_id, error)
            mark = Watermark()
        oldest = min(self._ends, default=mark.segment)
        if mark.segment >= oldest:
            return mark
        fd = self._descriptor(oldest)
        try:
            head, _ = segment.read_head(fd)
        except VersionError:
            raise
        except FormatError:
            return Watermark(**{**vars(mark), "segment": oldest, "offset": 0, "skip": 0})
        fresh = Watermark(segment=oldest, sequences=head.sequences)
        fresh.settled_records = head.accepted_records
        fresh.delivered_records = max(mark.delivered_records, head.accepted_records)
        fresh.delivered_points = mark.delivered_points
        fresh.reduction = mark.reduction
        return fresh

    def _recover(self, *, is_trusted: bool) -> None:
        """Find out what was accepted: from the head of the newest segment and the frames in it."""
        numbers = sorted(self._ends)
        unread: list[int] = []
        for number in reversed(numbers):
            unread.insert(0, number)
            try:
                head, _ = segment.read_head(self._descriptor(number))
            except VersionError:
                raise
            except FormatError:
                continue  # its frames are read, and the head before it is asked
            self.accepted_records = head.accepted_records
            self.sequences = Sequences(head.sequences)
            break
        for number in unread:
            fd, end = self._descriptor(number), self._ends[number]
            for piece in segment.iter_pieces(fd, self._start_of(number), end):
                # One that is not whole was torn before it was acknowledged, and comes again; or was
                # damaged later, and the rank will say that it has it no more.
                if piece.header is not None and piece.whole:
                    self._count(piece.header)
            # Frames that were written and not synced are about to be acknowledged.
            path = segment.path_of(self.folder, number)
            segment.keep_found(self._disk, path, fd, end, is_trusted=is_trusted)
        self._forget_descriptor()  # the name may be another file's now
        self.accepted_records = max(self.accepted_records, self.mark.settled_records)
        if self.card.state is not RunState.ENDED:  # then it is counted, and the segments are gone
            for name, session in self.card.sessions.items():
                # What was acknowledged, and is cut off the newest segment: it will not come again.
                self.sequences.give_up(bytes.fromhex(name), session.next_seq)

    # ── files ──

    def _locate(self, place: Place) -> tuple[int, int, int] | None:
        """Return (segment, start, end) to read from there on; None: no segment is left."""
        with self.lock:
            number: int | None = place.segment
            if number not in self._ends:
                number = self._next_number(place.segment)
            if number is None:
                return None
            start = place.offset if number == place.segment else 0
            return number, start or self._start_of(number), self._ends[number]

    def _next_number(self, number: int) -> int | None:
        return min((each for each in self._ends if each > number), default=None)

    def _start_of(self, number: int) -> int:
        """Return where the first frame of a segment begins; asked by any thread."""
        if number not in self._starts:
            fd = os.open(segment.path_of(self.folder, number), os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._starts[number] = segment.first_frame(fd, self._ends[number])
            finally:
                os.close(fd)
        return self._starts[number]

    def _descriptor(self, number: int) -> int:
        if self._reading is None or self._reading[0] != number:
            self._forget_descriptor()
            path = segment.path_of(self.folder, number)
            self._reading = number, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._reading[1]

    def _forget_descriptor(self) -> None:
        if self._reading is not None:
            os.close(self._reading[1])
            self._reading = None

    def _write_mark(self, mark: Watermark) -> None:
        try:
            with self._mark_lock:
                watermark.write(self._disk, self.folder, mark)
        except OSError as error:
            if watermark.must_last(mark):
                raise
            # It costs a resend, if anything.
            log.warning("run %s: watermark not written: %s", self.card.run_id, error.strerror)

    def _remove(self, numbers: list[int]) -> None:
        for number in numbers:
            self._disk.unlink(segment.path_of(self.folder, number))
            del self._ends[number]
            self._starts.pop(number, None)
