"""What comes over HTTP → records of the daemon's own sessions → spool, fsynced group by group.

Ranks bring sessions and journals of their own. Who speaks HTTP has none, so the daemon keeps them
for him, in the run's card:

    a rank's part   from the run's creation, or from "RUNNING" on, until its end is told
    a guest         everything else: it has no say in how the run ends, and is closed from the start

Nobody sends again what the disk did not take, so a number that may be on it is never given to
another record: a session is not used any more after an append that failed, nor in the next life of
the daemon, which cannot know how this one ended. Another takes its place.

Requests wait here while the disk syncs those before them, and go to it together.
"""

from __future__ import annotations

import concurrent.futures
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from mlflow_relay import clock, records
from mlflow_relay.messages import SESSION_BYTES
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.own_records import frames_of
from mlflow_relay_daemon.spool.card import Card, SessionCard
from mlflow_relay_daemon.spool.run_spool import Arrival, RunSpool


@dataclass
class Write:
    """One request's records."""

    hosted: Hosted
    entries: Sequence[bytes]
    begins: bool = False  #: the run is RUNNING from here on
    end: tuple[str, int] | None = None  #: status and time of the end, behind the records
    done: Future[None] = field(default_factory=Future)


class Writer:
    """Writes for the runs of one daemon; for any thread but the loop's.

    Args:
        in_loop: runs a function in the daemon's loop, which alone appends to runs.
    """

    def __init__(self, runs: Runs, in_loop: Callable[[Callable[[], Any]], Any]) -> None:
        self._runs, self._run_in_loop = runs, in_loop
        self._waiting: deque[Write] = deque()
        self._lock = threading.Lock()
        self._sound: set[bytes] = set()  # sessions of this life without a failed append

    def make_run(self, card: Card) -> Hosted:
        """Return a new run; its card is on the disk. Raises: OSError."""
        hosted: Hosted = self._in_loop(lambda: self._runs.make(card))
        return hosted

    def write(
        self,
        hosted: Hosted,
        entries: Sequence[bytes] = (),
        *,
        begins: bool = False,
        end: tuple[str, int] | None = None,
    ) -> None:
        """Keep records; they are on the disk when this returns. Raises: OSError: they are not."""
        write = Write(hosted, entries, begins, end)
        with self._lock:
            self._waiting.append(write)
        self._in_loop(self._commit)
        write.done.result()

    def _in_loop(self, function: Callable[[], Any]) -> Any:
        try:
            return self._run_in_loop(function)
        except concurrent.futures.TimeoutError:  # before Python 3.11 it is no OSError
            raise TimeoutError(errno.ETIMEDOUT, "the daemon waits for its disk") from None

    def _commit(self) -> None:
        """Keep all that waits; what came with an earlier request of the group is kept already."""
        with self._lock:
            writes = list(self._waiting)
            self._waiting.clear()
        by_run: dict[str, list[Write]] = {}
        for write in writes:
            by_run.setdefault(write.hosted.run.card.run_id, []).append(write)
        for group in by_run.values():
            try:
                self._keep(group[0].hosted, group)
            except Exception as error:  # noqa: BLE001  # who waits for it is to know
                for write in group:
                    write.done.set_exception(error)
            else:
                for write in group:
                    write.done.set_result(None)

    def _keep(self, hosted: Hosted, group: list[Write]) -> None:
        frames: list[Arrival] = []
        sizes: dict[bytes, int] = {}  # records of this group, by session
        ended: list[bytes] = []
        for write in group:
            is_rank = write.begins or rank_session(hosted.run.card) is not None
            session = self._session(hosted, primary=True) if is_rank else None
            if session is None or session in ended:
                is_rank, session = False, self._session(hosted, primary=False)
            entries = list(write.entries)
            if write.end is not None and is_rank:
                status, end_ms = write.end
                entries.append(records.pack_end(status, "", end_ms))
                ended.append(session)
            size = sizes.get(session, 0)
            frames += frames_of(session, hosted.run.next_seq(session) + size, entries)
            sizes[session] = size + len(entries)
        if frames:
            self._append(hosted, frames, sizes)
        for session in ended:
            self._runs.close_session(hosted, session, lost=0)
            self._sound.discard(session)
        self._runs.notify(hosted)

    def _append(self, hosted: Hosted, frames: list[Arrival], sessions: Iterable[bytes]) -> None:
        try:
            self._runs.append(hosted, frames)
        except OSError:
            self._sound.difference_update(sessions)
            raise

    def _session(self, hosted: Hosted, *, primary: bool) -> bytes:
        """Return the session to append to; one that is new is in the run's card, on the disk."""
        card = hosted.run.card
        known = rank_session(card) if primary else guest_session(card)
        if known is not None and known in self._sound:
            return known
        name = os.urandom(SESSION_BYTES)
        self._open(hosted.run, name, primary=primary, instead_of=known)
        self._sound.add(name)
        return name

    def _open(self, run: RunSpool, name: bytes, *, primary: bool, instead_of: bytes | None) -> None:
        """Enter a session into the run's card; at no time is the run without one that speaks."""
        with run.lock:
            before = run.card.sessions
            run.card.sessions = dict(before)
            if instead_of is not None:
                old = run.card.sessions.pop(instead_of.hex())
                next_seq = run.next_seq(instead_of)
                if next_seq:  # else it is forgotten: a full disk, tried for days, fills no card
                    kept = replace(old, closed=True, next_seq=next_seq)
                    run.card.sessions[instead_of.hex()] = kept
            run.card.sessions[name.hex()] = SessionCard(
                rank=0,
                node=os.uname().nodename,
                pid=os.getpid(),
                primary=primary,
                # A rank's latest session speaks for it, also if the clock was set back.
                start_ms=max([clock.now_ms(), *(each.start_ms for each in before.values())]),
                closed=not primary,
                is_own=True,
            )
            try:
                run.save_card()
            except OSError:
                run.card.sessions = before
                raise


def rank_session(card: Card) -> bytes | None:
    """Return the daemon's own session that speaks for a rank of the run now."""
    return _own(card, lambda each: each.primary and not each.closed)


def guest_session(card: Card) -> bytes | None:
    """Return the daemon's own session that has no say in the run's end."""
    return _own(card, lambda each: not each.primary)


def _own(card: Card, is_wanted: Callable[[SessionCard], bool]) -> bytes | None:
    found = [name for name, each in list(card.sessions.items()) if each.is_own and is_wanted(each)]
    return bytes.fromhex(found[-1]) if found else None
