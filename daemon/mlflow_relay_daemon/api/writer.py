"""What comes over HTTP → records of the daemon's own sessions → spool, fsynced group by group.

Ranks bring sessions and journals of their own. Who speaks HTTP has none, so the daemon keeps them
for him, in the run's card:

    a rank's part   from the run's creation, or from "RUNNING" on, until its end is told
    a guest         everything else: it has no say in how the run ends, and is closed from the start

Requests wait here while the disk syncs those before them, and go to it together.
"""

from __future__ import annotations

import concurrent.futures
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mlflow_relay import clock, records
from mlflow_relay.messages import SESSION_BYTES
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.own_records import frames_of
from mlflow_relay_daemon.spool.card import Card, SessionCard
from mlflow_relay_daemon.spool.run_spool import Arrival


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
            if write.begins and rank_session(hosted.run.card) is None:
                self._open(hosted, primary=True)
            session = rank_session(hosted.run.card)
            if session is None or session in ended:
                session = self._guest(hosted)
            entries = list(write.entries)
            if write.end is not None and session != guest_session(hosted.run.card):
                status, end_ms = write.end
                entries.append(records.pack_end(status, "", end_ms))
                ended.append(session)
            size = sizes.get(session, 0)
            frames += frames_of(session, hosted.run.next_seq(session) + size, entries)
            sizes[session] = size + len(entries)
        if frames:
            self._runs.append(hosted, frames)
        for session in ended:
            self._runs.close_session(hosted, session, lost=0)
        self._runs.notify(hosted)

    def _guest(self, hosted: Hosted) -> bytes:
        return guest_session(hosted.run.card) or self._open(hosted, primary=False)

    def _open(self, hosted: Hosted, *, primary: bool) -> bytes:
        """Return a new session; it is in the run's card, on the disk."""
        name = os.urandom(SESSION_BYTES)
        card = SessionCard(
            rank=0,
            node=os.uname().nodename,
            pid=os.getpid(),
            primary=primary,
            start_ms=clock.now_ms(),
            closed=not primary,
            is_own=True,
        )
        run = hosted.run
        with run.lock:
            run.card.sessions[name.hex()] = card
            try:
                run.save_card()
            except OSError:
                del run.card.sessions[name.hex()]
                raise
        return name


def rank_session(card: Card) -> bytes | None:
    """Return the daemon's own session that speaks for a rank of the run now."""
    return _own(card, lambda each: each.primary and not each.closed)


def guest_session(card: Card) -> bytes | None:
    """Return the daemon's own session that has no say in the run's end."""
    return _own(card, lambda each: not each.primary)


def _own(card: Card, is_wanted: Callable[[SessionCard], bool]) -> bytes | None:
    found = (name for name, each in list(card.sessions.items()) if each.is_own and is_wanted(each))
    return next((bytes.fromhex(name) for name in found), None)
