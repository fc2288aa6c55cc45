"""The runs of this daemon, each with its spool, its dead letters and its lane."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mlflow_relay import clock
from mlflow_relay_daemon.access import RUNS_PER_USER_MAX, Access, NotYours, private_access
from mlflow_relay_daemon.attachment import Attachment
from mlflow_relay_daemon.dead_letters import DeadLetters
from mlflow_relay_daemon.delivery import Delivery
from mlflow_relay_daemon.lane import Lane
from mlflow_relay_daemon.lane.destination import Destination
from mlflow_relay_daemon.lane.lineage import Resolver
from mlflow_relay_daemon.lane.links import LineageParams
from mlflow_relay_daemon.lane.terminal import TerminalOutput
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.sinks import Sink
from mlflow_relay_daemon.spool.card import Card, SessionCard
from mlflow_relay_daemon.spool.run_spool import Arrival, RunSpool
from mlflow_relay_daemon.spool.spool import Spool
from mlflow_relay_daemon.states import RunState

if TYPE_CHECKING:
    from mlflow_relay_daemon.artifacts.uploads import Uploads

log = logging.getLogger(__name__)

#: A disk is no longer called full if it has so much space, and nobody has met its end for so long.
SPACE_BYTES_MIN, SPACE_AGE_S = 64 << 10, 5.0


@dataclass(frozen=True)
class Hosted:
    """One run."""

    run: RunSpool
    letters: DeadLetters
    lane: Lane | None  #: None: this daemon is offline

    @property
    def owner(self) -> int | None:
        """The uid of the user whose run it is; None: the daemon's own."""
        return self.run.card.uid


class Runs:
    """All runs; finds or makes what a session asks for.

    Args:
        sink, breaker, delivery: None: offline, nothing is delivered.
        artifact_wait_s: how long the end of a run waits for its artifacts.
        access: None: of one user.
    """

    def __init__(
        self,
        spool: Spool,
        sink: Sink | None,
        breaker: Breaker | None,
        delivery: Delivery | None,
        lineage_params: LineageParams | None = None,
        *,
        artifact_wait_s: float = 0.0,
        access: Access | None = None,
    ) -> None:
        self.access = access or private_access()
        self._artifact_wait_s = artifact_wait_s
        self.uploads: Uploads | None = None  #: set by the service, unless it is offline
        self._lineage_params = lineage_params or LineageParams()
        self.spool, self.sink, self.breaker, self.delivery = spool, sink, breaker, delivery
        self.by_id: dict[str, Hosted] = {}
        self.is_full = False  #: records could not be written, and none could since
        self._full_s = 0.0
        for run in spool.runs.values():
            self._host(run)

    def attach(self, attachment: Attachment, uid: int | None = None) -> Hosted:
        """Return the run of a session that attaches; run and session are on the disk.

        Args: uid: of the session's process; None: not told.
        Raises: OSError: they are not; RunLeftAlone; NotYours: the run is another user's.
        """
        return self.attach_all([attachment], uid)

    def attach_all(self, attachments: Sequence[Attachment], uid: int | None = None) -> Hosted:
        """Attach sessions of one run and user, at least one: one card, one fsync for all of them.

        The card has every session of the run in it: hundreds of ranks that come together, each
        with a card of its own, would cost the square of their number.

        Raises: OSError: none of them is on the disk; RunLeftAlone; NotYours.
        """
        for each in attachments:
            self._check_owner(each, uid)
        hosted = self.by_id.get(attachments[0].run_id)
        if hosted is None:
            card = replace(attachments[0].new_card(), uid=uid)
            hosted = self._host(self.spool.open_run(card))
        run = hosted.run
        with run.lock:
            changes = [_enter(run.card, each) for each in attachments]
            undoes = [undo for undo in changes if undo is not None]
            if undoes:
                try:
                    run.save_card()
                except OSError:
                    for undo in undoes:
                        undo()
                    raise
        for each in attachments:
            run.skip_to(each.session, each.first_seq)
        self.notify(hosted)
        return hosted

    def make(self, card: Card) -> Hosted:
        """Return a new run; its card is on the disk. Raises: OSError."""
        run = self.spool.open_run(card)
        run.save_card()
        hosted = self._host(run)
        self.notify(hosted)
        return hosted

    def of_user(self, uid: int | None) -> list[Hosted]:
        """Return the runs that this user may see."""
        return [each for each in list(self.by_id.values()) if self.access.may(uid, each.owner)]

    def _check_owner(self, attachment: Attachment, uid: int | None) -> None:
        """Raises: NotYours: the session would write to a run of another user."""
        if self.access.is_admin(uid):
            return
        if uid is None:
            raise NotYours("this daemon serves several users, and cannot tell which one asks")
        written = {attachment.run_id}
        if attachment.resume_mode == "same":
            written.add(attachment.resume)
        count = 0
        for each in list(self.by_id.values()):
            is_meant = not written.isdisjoint((each.run.card.run_id, each.run.card.mlflow_run_id))
            if is_meant and not self.access.may(uid, each.owner):
                raise NotYours(
                    "this run is another user's at this daemon: choose another run key, or resume "
                    "it as a child"
                )
            count += each.owner == uid and not each.run.card.is_over
        if attachment.run_id not in self.by_id and count >= RUNS_PER_USER_MAX:
            raise NotYours(f"uid {uid} has {count} runs here that have not ended")

    def append(self, hosted: Hosted, frames: Sequence[Arrival]) -> None:
        """Append frames to a run; they are on the disk when this returns.

        Raises: OSError: not one of them counts.
        """
        try:
            self.spool.check_space(sum(len(frame) for _, frame in frames))
            hosted.run.append(frames)
        except OSError:
            self.note_full()
            raise
        if self.is_full:
            self._take_again()
        self.notify(hosted)

    def note_full(self) -> None:
        """Something could not be stored."""
        self.is_full, self._full_s = True, time.monotonic()

    def look_for_space(self) -> None:
        """See whether a full disk has space again, though no record comes that would tell."""
        if self.is_full and time.monotonic() > self._full_s + SPACE_AGE_S:
            with contextlib.suppress(OSError):
                self.spool.check_space(SPACE_BYTES_MIN)
                self._take_again()

    def close_session(self, hosted: Hosted, session: bytes, lost: int) -> None:
        """The session is over: see `close_all`."""
        self.close_all(hosted, {session: lost})

    def close_all(self, hosted: Hosted, lost_by_session: Mapping[bytes, int]) -> None:
        """Sessions are over, all that they had is in the spool: one card, one fsync for all.

        Args: lost_by_session: log calls that found its journal full. Raises: OSError: not written.
        """
        run = hosted.run
        with run.lock:
            closed: list[SessionCard] = []
            for session, lost in lost_by_session.items():
                card = run.card.sessions.get(session.hex())
                if card is not None and not card.closed:
                    card.closed, card.lost, card.next_seq = True, lost, run.next_seq(session)
                    closed.append(card)
            if closed:
                try:
                    run.save_card()
                except OSError:
                    for card in closed:
                        card.closed = False
                    raise
        self.notify(hosted)

    def find_session(self, session: bytes) -> Hosted | None:
        """Return the run that knows this session."""
        name = session.hex()
        return next((each for each in self.by_id.values() if name in each.run.card.sessions), None)

    def notify(self, hosted: Hosted) -> None:
        """Something is new in this run: its lane has work."""
        if self.delivery is not None and hosted.lane is not None:
            self.delivery.notify(hosted.lane)

    def return_space(self) -> None:
        """Let go of segments whose content is delivered; put a reserve by if there is none."""
        for hosted in list(self.by_id.values()):
            try:
                hosted.run.return_space(is_needed=self.is_full)
            except OSError as error:
                log.debug("run %s: %s", hosted.run.card.run_id, error)
        self.spool.reserve.restore(self.spool.free_bytes())

    def host_unread(self, now_s: float) -> bool:
        """Serve runs that could not be read at the start and can be now; return whether any."""
        opened = [self._host(run) for run in self.spool.open_unread(now_s)]
        for hosted in opened:
            self.notify(hosted)
        return bool(opened)

    def remove_ended(self, keep_s: float) -> None:
        """Remove the runs that ended so long ago, if MLflow has all of them.

        A rank that comes all the same makes its run anew, and finds it in MLflow by its tag, as
        those do that resume it.
        """
        before_ms = clock.now_ms() - int(keep_s * 1000)
        for run_id, hosted in list(self.by_id.items()):
            try:
                if self._is_done(hosted, before_ms):
                    self.spool.remove(hosted.run)
                    del self.by_id[run_id]
            except OSError as error:  # of a disk that will be no better at the next run
                log.warning("run %s stays in the spool: %s", run_id, error)
                return

    def _is_done(self, hosted: Hosted, before_ms: int) -> bool:
        """Return whether nobody here has anything to do with this run, or to be told of it.

        Raises: OSError: its folder cannot be read.
        """
        run, card = hosted.run, hosted.run.card
        return (
            card.is_over
            and not (run.segment_bytes() or run.artifacts.waiting or card.held or card.open_links())
            and not (hosted.letters.count or card.lost_records or run.mark.damaged_records)
            and hosted.lane is not None
            and self.delivery is not None
            and self.delivery.is_at_rest(hosted.lane)
            and run.changed_ms() < before_ms
        )

    def _take_again(self) -> None:
        log.warning("the spool takes records again")
        self.is_full = False

    def _card_of(self, run_id: str) -> Card | None:
        hosted = self.by_id.get(run_id)
        return None if hosted is None else hosted.run.card

    def _spread_news(self) -> None:
        """A run has an id, or a parent: those that wait for it look again."""
        for hosted in list(self.by_id.values()):
            if hosted.lane is not None and hosted.lane.waits_for_others():
                hosted.lane.look_again()
                self.notify(hosted)

    def _host(self, run: RunSpool) -> Hosted:
        letters = DeadLetters(self.spool.disk, run.folder)
        lane = None
        if self.sink is not None and self.breaker is not None:
            destination = Destination(
                run, self.sink, self.breaker, self.spool.node, self._artifact_wait_s
            )
            resolver = Resolver(self.sink, self._card_of)
            lane = Lane(
                destination,
                resolver,
                letters,
                self._lineage_params,
                TerminalOutput(run),
                on_news=self._spread_news,
                on_full=self.spool.reserve.spend,
            )
        hosted = self.by_id[run.card.run_id] = Hosted(run, letters, lane)
        return hosted


def _enter(card: Card, attachment: Attachment) -> Callable[[], object] | None:
    """Have a session in the card, open; return how to take that back, None: it was there."""
    name = attachment.session.hex()
    known = card.sessions.get(name)
    if known is not None and known.closed:
        # It was taken for dead, and lives (its journal was out of sight for a while).
        known.closed = False
        return partial(setattr, known, "closed", True)
    if known is not None:
        return None
    if attachment.primary:
        # A process with a lock takes the place of the daemon, which spoke for it.
        for each in card.sessions.values():
            each.closed |= each.is_own
    card.sessions[name] = attachment.session_card()
    card.world_size = max(card.world_size, attachment.world_size)
    # The run began when its first rank did, whichever reached us first.
    if card.state is RunState.NEW:
        card.start_ms = min(card.start_ms, attachment.start_ms)
    return partial(card.sessions.pop, name)
