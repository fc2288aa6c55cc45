"""The memory-mapped files in which a session keeps the records that are not acknowledged.

A call that has returned is in these files, and the kernel keeps them when the process is killed:
bytes are copied first and the tail is moved after. The base file is locked with a POSIX record
lock, which the kernel drops at death and which a forked child does not inherit: the daemon knows
without guessing at pids which sessions are over. Bytes: journal_files.py; PROTOCOL.md, Journal.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import deque
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import RLock
from typing import NamedTuple
from zlib import adler32

from .errors import JournalError, RelayError
from .frames import FRAME_BYTES_TARGET, cut_entries, pack_entry, pack_frame
from .journal_files import (
    ACKED_WORD,
    BASE_SUFFIX,
    CARD_AT,
    ENTRIES_AT,
    ENTRIES_SUFFIX,
    LOST_WORD,
    NEW_SUFFIX,
    NEXT_SEQ_WORD,
    TAIL_WORD,
    pack_base_head,
    pack_entries_head,
)

#: Room that is kept in each file for the END of a session: a full journal must not turn a good end
#: into a vanished rank.
END_BYTES_MAX = 2560
#: Two of these (one in use, one in reserve) are what a journal starts with.
ENTRIES_FILE_BYTES = 8 << 20
ENTRIES_FILE_BYTES_MIN = 32 << 10
PRIVATE_MODE, SHARED_MODE = 0o600, 0o660


class SentFrame(NamedTuple):
    """A frame, and the places in the journal where its entries begin and end."""

    data: bytes
    first_seq: int
    next_seq: int
    start: tuple[_EntriesFile, int]
    end: tuple[_EntriesFile, int]

    @property
    def body_bytes(self) -> int:
        return self.end[1] - self.start[1]


class _EntriesFile:
    """One preallocated file. `tail` is where the next entry goes, `limit` where none may end.

    Args:
        ahead: nobody waits for it, and none of the process's other threads shall.
    """

    def __init__(self, path: Path, size: int, mode: int, ahead: bool) -> None:
        self.path = path
        self.tail = ENTRIES_AT
        self.limit = size - END_BYTES_MAX
        self.next: _EntriesFile | None = None  # the file in which the session goes on
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            os.fchmod(fd, mode)  # whatever the umask
            # A sparse mapping on a full file system is a SIGBUS in the middle of training.
            os.posix_fallocate(fd, 0, size)
            # The page tables are filled now, and not at a log call. MAP_POPULATE is the quickest
            # way, 4 ms for 8 MB, in which it keeps the interpreter's lock.
            populate = 0 if ahead else mmap.MAP_POPULATE
            self.map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | populate)
        except OSError:
            _remove(path)
            raise
        finally:
            os.close(fd)
        if ahead:
            adler32(self.map)  # reads every page, without the lock
        # The only view of the map: a forked child can let go of both at any moment.
        self.words = memoryview(self.map)[:ENTRIES_AT].cast("Q")

    def begin(self, session: bytes, first_seq: int) -> None:
        """Take the file into use; the first record in it will have this sequence number."""
        head = pack_entries_head(session, first_seq)
        self.map[: len(head)] = head
        self.words[TAIL_WORD] = ENTRIES_AT

    def close(self, *, unlink: bool) -> None:
        self.words.release()
        self.map.close()
        if unlink:
            _remove(self.path)


class Journal:
    """A session's journal. The rank's threads call `append`; all the rest is its sender's.

    Args:
        folder: exists; on a file system in memory if log calls are to be quick at all times.
        session: 16 bytes.
        card: what the daemon must know to take the session over when nobody is left to tell it.
        bytes_max: of all entries files together, and a file more where two threads make one at the
            same time; beyond it records are lost, and counted.
        shared: the daemon is another user, who reads the files as a member of the folder's group.

    Raises: JournalError: no space, no permission.
    """

    def __init__(
        self,
        folder: Path,
        session: bytes,
        card: bytes,
        *,
        bytes_max: int,
        file_bytes: int = ENTRIES_FILE_BYTES,
        shared: bool = False,
    ) -> None:
        self._mode = SHARED_MODE if shared else PRIVATE_MODE
        self.session = session
        self.path = folder / (session.hex() + BASE_SUFFIX)
        self.next_seq = 0  #: of the record that comes next
        self.acked = 0  #: all records before this one are fsynced in the spool
        self.lost = 0  #: records that found the journal full
        self.in_flight_bytes = 0
        self._lock = RLock()  # a signal handler may log in the middle of a log call
        # At least two: one can be given back only when there is another to go on in.
        self._file_bytes = max(ENTRIES_FILE_BYTES_MIN, min(file_bytes, bytes_max // 2))
        self._files_max = max(2, bytes_max // self._file_bytes)
        self._files_made = 0
        self._numbers = count(1)
        self._oldest: _EntriesFile | None = None
        self._spare: _EntriesFile | None = None
        self._rolling = 0
        self._sealed = False
        self._in_flight: deque[SentFrame] = deque()
        try:
            self._open_base(card)
            try:
                self._current = self._oldest = self._make_file()
                self._current.begin(session, 0)
                # Only now may the daemon see it: complete, and locked.
                os.rename(self.path.with_suffix(NEW_SUFFIX), self.path)
            except OSError:
                self.close(unlink=True)
                raise
        except OSError as error:
            raise JournalError(
                f"cannot keep a journal in {folder}: {error.strerror}. "
                "Set MLFLOW_RELAY_SOCKET to a path in a folder that has space for it"
            ) from error
        self._sent_to = (self._current, ENTRIES_AT)

    # ── the rank's threads ──

    def append(self, record: bytes) -> bool:
        """Keep a record. Returns False if the journal is full: the record is lost, and counted.

        Raises: RelayError: it is sealed.
        Crash: SIGKILL at any line leaves the records before this one, and this one whole or not
            at all.
        """
        entry = pack_entry(record)
        size = len(entry)
        with self._lock:
            while True:
                file = self._current
                at = file.tail
                end = at + size
                if end <= file.limit:
                    # A signal handler may log in the middle of a log call (RLock lets it in), but
                    # not between the reading of the tail and the counter: Python runs handlers at
                    # calls, loops and (3.10) jumps that are taken, and here is none of them.
                    file.map[at:end] = entry
                    file.tail = end
                    file.words[TAIL_WORD] = end  # one aligned store, of which there is no half
                    self.next_seq += 1
                    self._words[NEXT_SEQ_WORD] = self.next_seq
                    return True
                if self._sealed:
                    raise RelayError("the run has ended: start_run makes a new one")
                if not self._roll(size):
                    self.lose()
                    return False

    def lose(self) -> None:
        """Count a log call whose content cannot be kept."""
        with self._lock:
            self.lost += 1
            self._words[LOST_WORD] = self.lost

    def seal(self, record: bytes) -> None:
        """Keep the last record; there is room for it. What comes later is refused."""
        with self._lock:
            if self._sealed:
                return
            self._current.limit += END_BYTES_MAX
            self.append(record)
            self._sealed = True
            self._current.limit = 0

    def _roll(self, size: int) -> bool:
        """Go on in the next file.

        The spare is ready, unless 8 MB came between two looks of the sender: only then is a file
        made here, in the caller's thread.
        """
        if size > self._file_bytes - ENTRIES_AT - END_BYTES_MAX:
            return False
        full = self._current
        self._rolling += 1
        try:
            # Taken out before it is looked at: the sender may put another there at any moment.
            file, self._spare = self._spare, None
            file = file or self._try_make_file()
            if file is None:
                return self._current is not full
            seq = self.next_seq
            file.begin(self.session, seq)
        finally:
            self._rolling -= 1
        # A signal handler that logged meanwhile may have gone on to a file of its own. As in
        # `append`, there must be no call from the question to the answer.
        if self._current is full and self.next_seq == seq:
            full.next = file
            self._current = file
        else:
            self._put_back(file)
        return True

    def _put_back(self, file: _EntriesFile) -> None:
        if self._spare is None:
            self._spare = file
        else:
            self._close_file(file, unlink=True)

    # ── the sender ──

    def prepare(self) -> bool:
        """Have the next file ready before it is needed; return whether it is.

        Without the lock: no log call waits while the kernel allocates. Nobody else sets a spare.
        """
        if self._spare is None:
            self._spare = self._try_make_file(ahead=True)
        return self._spare is not None

    @property
    def fills_a_frame(self) -> bool:
        """Whether what was not sent is enough for a frame, and need not wait for more."""
        file, at = self._sent_to
        return file is not self._current or file.tail - at >= FRAME_BYTES_TARGET

    def next_frame(self) -> SentFrame | None:
        """Return the oldest records that were not sent, as a frame; None if there are none."""
        file, at = self._sent_to
        while True:
            left = file is not self._current  # asked first: a file that is left grows no more
            if at < file.tail:
                break
            if not left:
                return None
            assert file.next is not None  # it was left
            file, at = file.next, ENTRIES_AT
        seq = self._in_flight[-1].next_seq if self._in_flight else self.acked
        records, end = cut_entries(file.map, at, file.tail, FRAME_BYTES_TARGET)
        data = pack_frame(self.session, seq, records, file.map[at:end])
        return SentFrame(data, seq, seq + records, (file, at), (file, end))

    def mark_sent(self, frame: SentFrame) -> None:
        """The frame is on its way: `next_frame` goes on behind it."""
        self._in_flight.append(frame._replace(data=b""))
        self._sent_to = frame.end
        self.in_flight_bytes += frame.body_bytes

    def ack(self, next_seq: int) -> None:
        """All before `next_seq` is fsynced elsewhere: give its space back."""
        while self._in_flight and self._in_flight[0].next_seq <= next_seq:
            frame = self._in_flight.popleft()
            self.in_flight_bytes -= frame.body_bytes
            self.acked = frame.next_seq
        self._words[ACKED_WORD] = self.acked
        keep = self._in_flight[0].start[0] if self._in_flight else self._sent_to[0]
        while self._oldest is not None and self._oldest is not keep:
            following = self._oldest.next
            self._close_file(self._oldest, unlink=True)
            self._oldest = following

    def rewind(self, next_seq: int) -> None:
        """The spool has all before `next_seq` and asks for what follows: send it again."""
        self.ack(next_seq)
        while self._in_flight:
            frame = self._in_flight.pop()
            self.in_flight_bytes -= frame.body_bytes
            self._sent_to = frame.start
        self._skip_to(min(next_seq, self.next_seq))
        self.ack(next_seq)

    def _skip_to(self, seq: int) -> None:
        """Go on at a record in the midst of what was a frame: the spool may have it from an earlier
        sending, when the frame was cut elsewhere."""
        file, at = self._sent_to
        while self.acked < seq:
            if at >= file.tail and file.next is not None:
                file, at = file.next, ENTRIES_AT
            _, at = cut_entries(file.map, at, file.tail, 0)
            self.acked += 1
        self._sent_to = file, at

    @property
    def unacked(self) -> int:
        """Records that are kept here and nowhere else."""
        return self.next_seq - self.acked

    def close(self, *, unlink: bool) -> None:
        """Unmap and unlock.

        Args:
            unlink: True once all is acked; False where the files must stay for the daemon, and in
                a forked child, which lets go of its parent's.
        """
        file = self._oldest
        while file is not None:
            self._close_file(file, unlink=unlink)
            file = file.next
        if self._spare is not None:
            self._close_file(self._spare, unlink=unlink)
        self._oldest = self._spare = None
        if unlink:
            _remove(self.path)
            _remove(self.path.with_suffix(NEW_SUFFIX))
        # Last: closing the map drops the lock, for a map has a descriptor of its own.
        self._words.release()
        self._base.close()
        os.close(self._fd)

    # ── files ──

    def _open_base(self, card: bytes) -> None:
        new = self.path.with_suffix(NEW_SUFFIX)
        self._fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
        try:
            os.fchmod(self._fd, self._mode)  # whatever the umask
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._fd, 0, CARD_AT + len(card))
            self._base = mmap.mmap(self._fd, CARD_AT + len(card))
        except OSError:
            _remove(new)
            os.close(self._fd)
            raise
        self._words = memoryview(self._base)[:CARD_AT].cast("Q")
        self._base[CARD_AT:] = card
        head = pack_base_head(card)
        self._base[: len(head)] = head

    def _make_file(self, *, ahead: bool = False) -> _EntriesFile:
        name = f"{self.session.hex()}.{next(self._numbers):06d}{ENTRIES_SUFFIX}"
        file = _EntriesFile(self.path.with_name(name), self._file_bytes, self._mode, ahead)
        self._files_made += 1
        return file

    def _close_file(self, file: _EntriesFile, *, unlink: bool) -> None:
        file.close(unlink=unlink)
        self._files_made -= 1

    def _try_make_file(self, *, ahead: bool = False) -> _EntriesFile | None:
        """Return a new file, or None if the limit is reached or the file system has no space."""
        # One more where a signal handler came in between a file's making and its use.
        if self._files_made >= self._files_max + max(0, self._rolling - 1):
            return None
        try:
            return self._make_file(ahead=ahead)
        except OSError:
            return None


def _remove(path: Path) -> None:
    """Remove a file, if it can be: what stays is removed by the daemon when the session is over."""
    with suppress(OSError):
        os.unlink(path)
