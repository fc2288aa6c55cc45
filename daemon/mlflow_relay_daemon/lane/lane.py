"""One run, step after step.

    NEW ──create──▶ OPEN ──batches──▶ (drained, all ranks gone) ──tell the end──▶ ENDED
                      ▲──────────────── a rank came back ◀────────────────────────┘

Every step may be repeated after a crash: creation searches by tag, batches are idempotent, links
and the end can be told again. One lane has one request under way at most: concurrent batches to
one run deadlock on PostgreSQL (mlflow#24923).
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from collections.abc import Callable

from mlflow_relay.errors import VersionError
from mlflow_relay_daemon.dead_letters import DeadLetters
from mlflow_relay_daemon.lane.artifacts import ArtifactWord
from mlflow_relay_daemon.lane.batches import Batches
from mlflow_relay_daemon.lane.creation import Creation
from mlflow_relay_daemon.lane.destination import Destination
from mlflow_relay_daemon.lane.ending import Ending
from mlflow_relay_daemon.lane.lineage import PARENT_TAG, Resolver
from mlflow_relay_daemon.lane.links import LOOK_AGAIN_S, LineageParams, Links
from mlflow_relay_daemon.lane.progress import Progress
from mlflow_relay_daemon.lane.terminal import TerminalOutput
from mlflow_relay_daemon.lane.translation import Translation
from mlflow_relay_daemon.lane.waits import held_texts
from mlflow_relay_daemon.reduction import has_waiting
from mlflow_relay_daemon.retry import backoff_s
from mlflow_relay_daemon.sinks import NotYet, Permanent, RunInfo, SinkError, TryAgain
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunEvent, RunState, next_state

log = logging.getLogger(__name__)

#: How long a run waits that MLflow will not have (deleted there, its experiment deleted): somebody
#: may restore it.
BLOCKED_RETRY_S = 60.0
#: From so many waiting bytes on a request is full anyway.
FULL_BATCH_BYTES = 64 << 10
#: How long what is left of a request's records waits for more.
REST_WAIT_S = 0.25
#: A create that was given up long ago may still come to the server: look for it after this time.
LATE_LOOK_S = 60.0
#: After so long without a delivery a sync may have brought what waits here.
SYNC_LOOK_AFTER_S = 60.0
#: How long a run waits while its dead letters or its card cannot be written.
DISK_RETRY_S = 5.0


class Lane:
    """Delivers one run. `work` is called by one thread at a time.

    Args:
        on_news: called when the run has an id or a parent that others may wait for.
        on_full: called when the disk is full; returns whether there is space now.
    """

    def __init__(
        self,
        destination: Destination,
        resolver: Resolver,
        letters: DeadLetters,
        lineage_params: LineageParams,
        output: TerminalOutput,
        *,
        on_news: Callable[[], None],
        on_full: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run = destination.run
        self.last_error: str | None = None
        self.is_blocked = False
        self._is_leaving = False
        self.is_parked = False  #: after work(): nobody need wait for what it will do next
        self._failures = 0
        self._one_request = threading.Lock()  # see above: never two to one run
        self._late_look_s: float | None = None
        self._delivered_s = float("-inf")
        self._rng = random.Random()
        self._on_news, self._on_full = on_news, on_full
        self._to = destination
        translation = Translation(destination, resolver)
        self._creation = Creation(destination, resolver)
        self._links = Links(destination, resolver, translation, lineage_params, letters)
        self._output = output
        self._batches = Batches(destination, letters, translation)
        self._ending = Ending(destination)
        self._artifacts = ArtifactWord(destination)

    def work(self) -> float | None:
        """Do one step, and return in how many seconds there is another; None: when told.

        Raises: Stopped.
        """
        self.is_parked = False
        try:
            with self._one_request:
                delay_s = self._step()
        except NotYet as error:
            return self._trouble(error, error.retry_after_s or LOOK_AGAIN_S)
        except TryAgain as error:
            self._failures += 1
            return self._trouble(error, backoff_s(self._failures, self._rng))
        except (Permanent, VersionError) as error:  # a frame of a later release: its to deliver
            self.is_blocked = True
            return self._trouble(error, BLOCKED_RETRY_S)
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return self._trouble(error, 0.0 if is_full and self._on_full() else DISK_RETRY_S)
        self.last_error, self.is_blocked, self._failures = None, False, 0
        return delay_s

    def retry_letters(self, ids: set[int] | None) -> int:
        """Deliver dead letters again: see `Batches.retry_letters`."""
        with self._one_request:
            return self._batches.retry_letters(ids)

    def waits_for_others(self) -> bool:
        """Return whether this run waits for another of this spool that can be named by now.

        Asked of all lanes at every news, and each that says yes asks the server: so not "could any
        news help", or hundreds of runs that wait for other nodes would ask once for each new run.
        """
        card = self.run.card
        is_same_to_come = card.state is RunState.NEW and card.itself() is not None
        return (is_same_to_come or self._links.is_waiting()) and self._links.could_be_told()

    def look_again(self) -> None:
        """There is news of another run."""
        self._links.look_again()

    def leave(self) -> None:
        """The daemon stops: tell what can be told now, and wait for no other node."""
        self._ending.is_leaving = self._is_leaving = True

    def _trouble(self, error: SinkError | VersionError | OSError, wait_s: float) -> float:
        text = str(error)
        if text != self.last_error:
            log.warning("run %s: %s", self.run.card.run_id, text)
        self.last_error = text
        return wait_s

    def _step(self) -> float | None:
        card = self.run.card
        if card.state is RunState.NEW:
            self._create()
            return 0.0
        if self._ranks_alive():
            if card.state is RunState.ENDED:
                self._ending.reopen()
            else:
                self._ending.take_back()
        if self._links.tell():
            self._on_news()
        self._look_for_sync()
        if self._batches.deliver_next(self._failures):
            self._delivered_s = time.monotonic()
            waiting = self.run.waiting_bytes()
            # A rest that fills no request waits for more, as a first record does.
            return REST_WAIT_S if 0 < waiting < FULL_BATCH_BYTES and self._ranks_alive() else 0.0
        terminal_s = self._output.publish(is_last=self._is_leaving or self._all_are_closed())
        if self._is_over():
            if card.state is RunState.OPEN and not card.is_deleted:
                wait_s = self._artifacts.wait_s()
                if wait_s is not None and not self._ending.is_leaving:
                    return wait_s
                self._to.ask(self._creation.remove_doubles)
            self._artifacts.tell()  # first: who sees the end sees what is to come
            self._ending.tell()
        waits = [self._late_doubles_s(), terminal_s]
        if self._links.is_waiting():
            waits.append(LOOK_AGAIN_S)
        known = [wait_s for wait_s in waits if wait_s is not None]
        self.is_parked = bool(known)
        return min(known, default=None)

    def _late_doubles_s(self) -> float | None:
        """Look once more, a while after the end, if creation had to be tried again: the first try
        may have come to the server only now. Return in how many seconds, None: done."""
        card = self.run.card
        if card.state is not RunState.ENDED or card.create_attempts < 2:
            return None
        now_s = time.monotonic()
        if self._late_look_s is None:
            self._late_look_s = now_s + LATE_LOOK_S
        if now_s >= self._late_look_s:
            self._to.ask(self._creation.remove_doubles)
            with self.run.lock:
                card.create_attempts = 1
                self.run.save_card()
            return None
        return self._late_look_s - now_s

    def _create(self) -> None:
        """Have an MLflow run, and know it. Crash: at any line, it is found again by its tag."""
        card = self.run.card
        wanted = card.itself()
        if wanted is not None:
            found = self._to.ask(lambda: self._creation.go_on_with(wanted))
        else:
            found = self._to.ask(self._creation.find_or_create)
            if self._ranks_alive():
                self._ending.join(found)
        with self.run.lock:
            if wanted != card.itself():
                return  # meanwhile an operator has decided for another run, or for none
            parent = card.resumed_parent()
            if parent is not None and not parent.is_by_hand:
                parent.mlflow_run_id = found.tags.get(PARENT_TAG)
            card.mlflow_run_id, card.experiment_id = found.run_id, found.experiment_id
            card.run_name = found.run_name
            card.held += [text for text in held_texts(found.tags) if text not in card.held]
            self._pass_over_synced(found)
            card.state = next_state(card.state, RunEvent.CREATED)
            self.run.save_card()
        log.info("run %s is MLflow run %s", card.run_id, found.run_id)
        self._on_news()

    def _look_for_sync(self) -> None:
        """Somebody may have synced the spool while the server was away from here."""
        now_s = time.monotonic()
        is_backlog = self.run.waiting_bytes() >= FULL_BATCH_BYTES
        if is_backlog and now_s - self._delivered_s >= SYNC_LOOK_AFTER_S:
            to = self._to
            self._pass_over_synced(to.ask(lambda: to.sink.get_run(to.mlflow_run_id)))

    def _pass_over_synced(self, found: RunInfo) -> None:
        """What a sync has brought of this spool, while the daemon could not, is not sent again."""
        self._delivered_s = time.monotonic()
        synced = Progress.read(found.tags, self._to.node)
        if not synced.seen or not synced.is_whole:
            return  # what is passed over brings no artifact
        mark = Watermark(**vars(self.run.mark))
        seen = Sequences(mark.sequences)
        for session, next_seq in synced.sessions().items():
            seen.add(session, 0, next_seq)
        mark.sequences = seen.save()
        mark.last_record_ms = max(mark.last_record_ms, synced.last_record_ms)
        self.run.settle(mark)

    def _ranks_alive(self) -> bool:
        with self.run.lock:
            return any(each.primary and not each.closed for each in self.run.card.sessions.values())

    def _all_are_closed(self) -> bool:
        with self.run.lock:
            return all(each.closed for each in self.run.card.sessions.values())

    def _is_over(self) -> bool:
        """Return whether all is delivered and no rank is alive.

        Forked children have no say, unless nothing else is known of the run; and of a run without
        any session nothing can be said: its first one is still on its way to the disk.
        """
        with self.run.lock:
            sessions = list(self.run.card.sessions.values())
            ranks = [each for each in sessions if each.primary] or sessions
            if not ranks or not all(each.closed for each in ranks):
                return False
            return self.run.is_drained() and not has_waiting(self.run.mark.reduction)
