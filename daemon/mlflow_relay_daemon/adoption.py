"""Which ranks live, told by the locks of their journals; and what the dead ones left, taken over.

A journal's lock is held by its process and dropped by the kernel when that ends, however it ends.
Whoever finds it free may take the journal: its records go into the spool as if the rank had sent
them, file by file, and the files are removed once they are on the disk.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_relay import journal_files
from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay.frames import read_frame
from mlflow_relay.journal_files import BASE_SUFFIX, NEW_SUFFIX
from mlflow_relay_daemon import journal_folder
from mlflow_relay_daemon.access import NotYours
from mlflow_relay_daemon.attachment import read_attachment
from mlflow_relay_daemon.counters import Counters
from mlflow_relay_daemon.foreign import open_foreign, read_foreign, read_open
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.spool.disk import lock_holder, try_lock
from mlflow_relay_daemon.spool.spool import RunLeftAlone

log = logging.getLogger(__name__)

#: How long one look may take over journals; the loop has ranks to serve, the rest comes next time.
LOOK_BUDGET_S = 0.2
#: What is taken over in one piece: a journal may be larger than the space that there is, and each
#: piece that is delivered gives its space to the next.
GROUP_BYTES = 256 << 10
#: A session whose journal is not to be seen lives as long as it is heard of; ALIVE comes every 5 s.
UNSEEN_TIMEOUT_S = 30.0
#: What has no base file is somebody's who makes his journal; after this time, nobody's.
UNFINISHED_AGE_S = 60.0


@dataclass
class Watched:
    """A journal, and what its rank says of it."""

    fd: int
    uid: int  #: whose it is, as the file system says
    next_seq: int = 0  #: accepted by the rank
    lost: int = 0


class Watcher:
    """Looks after the journals of one folder.

    Args:
        folder: where sessions of this daemon's socket keep their journals.

    Attributes:
        is_behind: The last look ran out of time before all that dead ranks left was taken.
        is_stuck: The disk did not let it take something.
    """

    def __init__(self, folder: Path, runs: Runs, counters: Counters) -> None:
        self.folder, self._runs, self._counters = folder, runs, counters
        self._watched: dict[bytes, Watched] = {}
        self._vanished_are_closed = False
        self.is_behind = self.is_stuck = False

    def look(self, heard_s: dict[bytes, float], now_s: float) -> list[bytes]:
        """Take over what dead ranks left.

        Args:
            heard_s: the attached sessions, and when they were last heard of.
            now_s: on the monotonic clock.
        Returns: sessions that are over: there will be nothing more of them.
        """
        try:
            found = journal_folder.read(self.folder)
        except OSError as error:
            self._trouble(self.folder, error)
            return []
        for path in found.nameless:
            self._runs.spool.quarantine(path, "it has the name of no session")
        over = self._take_over(found, heard_s, now_s)
        if self.is_behind:
            return over
        present = found.bases.keys() | found.orphans.keys()
        for session in set(self._watched) - present:
            os.close(self._watched.pop(session).fd)
        if not self._vanished_are_closed:
            self._close_vanished(present | heard_s.keys())
        unseen = [
            session
            for session, then_s in heard_s.items()
            if session not in found.bases and now_s - then_s > UNSEEN_TIMEOUT_S
        ]
        return over + [session for session in unseen if self._close_unseen(session)]

    def _take_over(
        self, found: journal_folder.Contents, heard_s: Container[bytes], now_s: float
    ) -> list[bytes]:
        """Adopt what is dead; return the sessions of which nothing is left."""
        over: list[bytes] = []
        self.is_behind = self.is_stuck = False
        for session in [*found.bases, *found.orphans]:
            if time.monotonic() - now_s > LOOK_BUDGET_S:
                self.is_behind = True
                return over
            try:
                if session in found.bases or session in self._watched:
                    is_dead = self._is_dead(session)
                else:  # no lock to ask
                    is_dead = session not in heard_s and _are_old(found.orphans[session])
                if is_dead and self._adopt(session, now_s):
                    over.append(session)
                elif is_dead:
                    self.is_behind = True
            except (FormatError, RunLeftAlone, OSError) as error:
                self.is_stuck |= isinstance(error, OSError)
                self._trouble(self._path(session), error)
        return over

    def _trouble(self, path: Path, error: Exception) -> None:
        """Count what stands in the way of a journal; it stays where it is and is tried again."""
        if isinstance(error, OSError):
            why = error.strerror or error
            self._counters.count("fsync_failures", f"a dead rank's journal waits: {why}")
        else:
            self._counters.count("bad_messages", f"{path.name} is left alone: {error}")

    def _close_vanished(self, present: Container[bytes]) -> None:
        """Sessions that a former daemon knew are over, but those present: with a journal, or
        attached."""
        for hosted in list(self._runs.by_id.values()):
            for name, card in list(hosted.run.card.sessions.items()):
                session = bytes.fromhex(name)
                if card.closed or card.is_own or session in present:
                    continue
                try:
                    self._runs.close_session(hosted, session, lost=0)
                except OSError as error:
                    self._trouble(self.folder, error)
                    return
        self._vanished_are_closed = True

    def expect_vanished(self) -> None:
        """Runs have come to light whose ranks may be long gone."""
        self._vanished_are_closed = False

    def in_journals(self, hosted: Hosted) -> int:
        """Return how many records the run's ranks have accepted that are not in the spool yet."""
        return sum(
            max(0, watched.next_seq - hosted.run.next_seq(session))
            for session, watched in self._watched.items()
            if session.hex() in hosted.run.card.sessions
        )

    def lost(self, hosted: Hosted) -> int:
        """Return how many log calls of the run's living ranks found their journal full."""
        return sum(
            watched.lost
            for session, watched in self._watched.items()
            if (card := hosted.run.card.sessions.get(session.hex())) and not card.closed
        )

    def pid_of(self, session: bytes) -> int | None:
        """Return the process that holds a session's journal, as this daemon sees processes; None:
        it cannot be told (another container's)."""
        watched = self._watched.get(session)
        return None if watched is None else lock_holder(watched.fd) or None

    # ── looking ──

    def _path(self, session: bytes) -> Path:
        return self.folder / (session.hex() + BASE_SUFFIX)

    def _is_dead(self, session: bytes) -> bool:
        watched = self._watched.get(session)
        if watched is None:
            try:
                fd = open_foreign(self._path(session), os.O_RDWR)
            except FileNotFoundError:
                return False  # removed by its rank just now
            watched = self._watched[session] = Watched(fd, os.fstat(fd).st_uid)
        is_dead = try_lock(watched.fd)
        head = os.pread(watched.fd, journal_files.CARD_AT, 0)
        if len(head) == journal_files.CARD_AT:
            try:
                watched.next_seq, _, watched.lost = journal_files.read_counters(head)
            except FormatError as error:  # what they said before stands, and what the files hold
                if is_dead:
                    log.error("session %s: %s: its records count", session.hex(), error)
        return is_dead

    def _close_unseen(self, session: bytes) -> bool:
        hosted = self._runs.find_session(session)
        if hosted is None:
            return True
        log.warning("session %s: no journal, and not heard of: it is over", session.hex())
        try:
            self._runs.close_session(hosted, session, lost=0)
        except OSError:
            return False  # next time
        return True

    # ── taking over ──

    def _adopt(self, session: bytes, since_s: float) -> bool:
        """Take over a dead session's journal; return whether that is done, and not to be gone on
        with at the next look.

        Of an orphan there are entries alone: their session is known from its life, or nobody knows
        whose they are.

        Raises: OSError: the spool cannot take it now; what is left stays where it is.
        Crash: safe at any line: files are removed only when their records are on the disk, and
            records that come twice are known by their sequence numbers.
        """
        entries = journal_folder.entries_of(self.folder, session)
        try:
            hosted = self._identify(session, entries)
        except NotYours as error:
            self._put_aside(session, error)
            return True
        base = self._path(session)
        unfinished = base.with_suffix(NEW_SUFFIX)
        if hosted is None and not base.exists() and journal_folder.holds_nothing(entries):
            for each in (unfinished, *entries):  # of a rank that was killed as it made its journal
                each.unlink(missing_ok=True)
            return True
        if hosted is None:
            self._put_aside(session, "nobody can tell whose it is")
            return True
        for each in entries:
            if time.monotonic() - since_s > LOOK_BUDGET_S:
                return False
            self._take_entries(hosted, session, each)
        # What is in no file any more is a gap in the numbers, and counted as damage.
        told = self._watched.get(session, Watched(-1, -1))
        hosted.run.skip_to(session, told.next_seq)
        self._runs.close_session(hosted, session, told.lost)
        for each in (base, unfinished):
            each.unlink(missing_ok=True)
        return True

    def _put_aside(self, session: bytes, why: object) -> None:
        for each in (self._path(session), *journal_folder.entries_of(self.folder, session)):
            if each.exists():
                self._runs.spool.quarantine(each, why)

    def _identify(self, session: bytes, entries: list[Path]) -> Hosted | None:
        """Return the run of a dead session: known from its life, or by its journal's card.

        Raises: NotYours: the journal is not of the user whose run it names.
        """
        known = self._runs.find_session(session)
        watched = self._watched.get(session)
        if watched is None:
            return known
        if known is not None and not self._runs.access.may(watched.uid, known.owner):
            raise NotYours(f"a journal of uid {watched.uid} for another user's run")
        try:
            base = journal_files.read_base(read_open(watched.fd, watched.uid))
            attachment = read_attachment(base.card)
            if attachment.session != session:
                raise FormatError("the card of another session")
        except VersionError:
            raise
        except FormatError as error:
            log.error("the journal of session %s: %s", session.hex(), error)
            watched.next_seq = watched.lost = 0  # not to be trusted either
            return known
        # What was acknowledged before is in a spool, though perhaps not in this one. What is in the
        # files is taken all the same: it does no harm twice, and a counter may be damaged.
        there = [each for each in map(journal_folder.first_seq_of, entries) if each is not None]
        return known or self._runs.attach(
            replace(attachment, first_seq=min(there, default=base.acked)), watched.uid
        )

    def _take_entries(self, hosted: Hosted, session: bytes, path: Path) -> None:
        watched = self._watched.get(session)
        owner = os.getuid() if hosted.owner is None else hosted.owner
        try:
            data = read_foreign(path, owner if watched is None else watched.uid)
            salvage = journal_files.salvage_entries(data, session, hosted.run.next_seq(session))
        except VersionError:
            raise
        except FormatError as error:
            self._runs.spool.quarantine(path, error)
            return
        for group in _groups(salvage.frames):
            self._runs.append(hosted, [(read_frame(frame), frame) for frame in group])
        hosted.run.skip_to(session, salvage.next_seq)
        path.unlink(missing_ok=True)


def _groups(frames: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield frames in groups that share an fsync, of about GROUP_BYTES."""
    group: list[bytes] = []
    size = 0
    for frame in frames:
        group.append(frame)
        size += len(frame)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _are_old(paths: Iterable[Path]) -> bool:
    try:
        return journal_folder.age_s(paths, time.time()) > UNFINISHED_AGE_S
    except FileNotFoundError:
        return False  # finished meanwhile
