"""One run of a source on its way to the server, from finding it there to telling its end.

    found by its tag? ──no──▶ create ──▶ links ──▶ records ──▶ inputs ──▶ end ──▶ what still waits
          └──yes: what it has already is passed over ──▲

Crash: at any line the next call finds by the tags of the run what this one has done.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from mlflow_relay_daemon.artifacts.stores import Store, Stores
from mlflow_relay_daemon.batch import TAGS_MAX, Objection
from mlflow_relay_daemon.dead_letters import DeadLetter, as_letter
from mlflow_relay_daemon.lane import waits
from mlflow_relay_daemon.lane.batches import Batches
from mlflow_relay_daemon.lane.creation import Creation
from mlflow_relay_daemon.lane.destination import OWNER_TAG, RUN_ID_TAG, SOURCE_TAG, Destination
from mlflow_relay_daemon.lane.ending import Ending as RelayEnding
from mlflow_relay_daemon.lane.lineage import PARENT_TAG, Resolver
from mlflow_relay_daemon.lane.links import LineageParams, Links
from mlflow_relay_daemon.lane.progress import Progress
from mlflow_relay_daemon.lane.translation import Translation
from mlflow_relay_daemon.reduction import has_waiting
from mlflow_relay_daemon.retry import Breaker, Stopped, backoff_s
from mlflow_relay_daemon.sinks import NotYet, RunGone, RunInfo, Sink, Tag, TryAgain
from mlflow_relay_daemon.states import RunState
from mlflow_relay_daemon.sync.artifacts import bring
from mlflow_relay_daemon.sync.source import (
    Feed,
    ForeignRun,
    NoTerminal,
    Source,
    SourceError,
)
from mlflow_relay_daemon.sync.translation import RelativesOnly

#: How often it is written down how far the run has come: what a kill makes us send again.
PROGRESS_EVERY_S = 5.0
#: A request that fails so often while the server answers others is given up, and its run with it.
TRIES_MAX = 12
#: How often another process that makes the same run is waited for, 2 s each.
WAITS_MAX = 10
REFUSALS_KEPT_MAX = 1000
#: In a progress: how many dataset inputs were told. No metric can have such a key.
INPUTS_SEEN = "#inputs"
#: The name of the progress of the artifacts, whatever they come from.
ARTIFACTS_NAME = "artifacts"

T = TypeVar("T")


class Skipped(Exception):
    """Nothing is to be done for this run; the text says why."""


class Refusals:
    """What MLflow refused of one run: told in the summary. The source keeps the records."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[DeadLetter] = []

    def add(self, objections: Iterable[Objection], now_ms: int) -> None:
        """Keep refused entries, the first of them whole."""
        for objection in objections:
            self.count += 1
            if len(self._kept) < REFUSALS_KEPT_MAX:
                self._kept.append(as_letter(self.count, objection, now_ms))

    def list(self) -> list[DeadLetter]:
        """Return the first of them."""
        return list(self._kept)

    def remove(self, ids: set[int]) -> int:
        """Nothing is retried here."""
        return 0


@dataclass
class Server:
    """Where to, and what all runs share."""

    sink: Sink
    breaker: Breaker
    names: LineageParams
    stores: Stores
    stop: threading.Event = field(default_factory=threading.Event)

    def patiently(self, step: Callable[[int], T], waits_max: int = WAITS_MAX) -> T:
        """Do a step until it is answered; it is told how often it failed.

        Args:    waits_max: how often somebody else is waited for.
        Raises:  SinkError: its last word; Stopped.
        """
        rng, failures, waited = random.Random(), 0, 0
        while not self.stop.is_set():
            try:
                return step(failures)
            except NotYet as error:
                waited += 1
                if waited > waits_max:
                    raise
                self.stop.wait(error.retry_after_s or 2.0)
            except TryAgain:
                failures += 1
                if failures >= TRIES_MAX:
                    raise
                self.stop.wait(backoff_s(failures, rng))
        raise Stopped


class OneRun:
    """Brings one run. `bring` may be called again after any failure."""

    def __init__(self, source: Source, server: Server) -> None:
        self.source, self.server = source, server
        self.card = source.card
        self.refusals = Refusals()
        self.info: RunInfo | None = None
        self.is_new = False  #: this call made the MLflow run
        self.sent_points = 0  #: by this call
        self.uploaded_files = self.uploaded_bytes = 0
        self._links: Links | None = None
        self._to: Destination | None = None
        self._progress_s = 0.0

    def bring(self) -> None:
        """Have all of the run on the server.

        Raises: Skipped; SinkError, SourceError, OSError: what stopped it; Stopped.
        """
        server = self.server
        info = self.info = self._find_or_create()
        records = self.source.open(info)
        self.source.uploaded = Progress.read(info.tags, ARTIFACTS_NAME).seen
        self._to = to = Destination(records, server.sink, server.breaker, self.source.node)
        translation = self._translation(to)
        resolver = Resolver(server.sink, lambda _: None)
        self._links = Links(to, resolver, translation, server.names, self.refusals)
        self.tell_links()
        batches = Batches(to, self.refusals, translation)
        self._progress_s = time.monotonic()
        while server.patiently(batches.deliver_next):
            self.sent_points = to.run.mark.delivered_points
            if time.monotonic() - self._progress_s >= PROGRESS_EVERY_S:
                self._save_progress()
        self._note_what_stays(to)
        server.patiently(lambda _: self._tell_inputs())
        self._bring_artifacts()
        self.tell_links()
        server.patiently(lambda _: self._tell_end())
        self._save_progress()
        if isinstance(self.source, ForeignRun) and self.source.is_deleted:
            self._ask(lambda: server.sink.delete_run(info.run_id))

    def tell_links(self) -> None:
        """Tell the links that can be told by now."""
        assert self._links is not None
        links = self._links

        def tell(_: int) -> None:
            links.look_again()
            links.tell()

        self.server.patiently(tell)

    def tell_what_waits(self) -> None:
        """Leave word for whoever brings the runs that this one waits for."""
        assert self._to is not None
        assert self.info is not None
        kept = self.source.kept if isinstance(self.source, ForeignRun) else frozenset()
        wanted = waits.tags(self.card, self.info.tags, kept)
        self._to.set_tags(wanted)
        self._note(wanted)

    def _translation(self, to: Destination) -> Translation:
        resolver = Resolver(self.server.sink, lambda _: None)
        if not isinstance(self.source, ForeignRun):
            return Translation(to, resolver)
        source = self.source
        return RelativesOnly(to, resolver, source.relatives, source.originals, source.kept)

    # ── the run ──

    def find(self) -> RunInfo | None:
        """Return the MLflow run, deleted or not, if there is one. Raises: SinkError, Stopped."""
        sink, card = self.server.sink, self.card

        def search() -> list[RunInfo]:
            return sink.find_runs(sink.experiment_ids(), RUN_ID_TAG, card.run_id)

        found = self._ask(search)
        return found[0] if found else None

    def _find_or_create(self) -> RunInfo:
        found = self.server.patiently(lambda _: self._ask(self._find))
        if found is None:
            creation = self._creation()
            wanted = self.card.itself()
            if wanted is not None:
                # Who is waited for comes in this call, or in another one: see sync.engine.
                found = self.server.patiently(
                    lambda _: self._ask(lambda: creation.go_on_with(wanted)), waits_max=0
                )
            else:
                found = self.server.patiently(lambda _: self._ask(creation.find_or_create))
                self.is_new = self.card.create_attempts > 0
        card, parent = self.card, self.card.resumed_parent()
        if parent is not None and not parent.is_by_hand:
            parent.mlflow_run_id = found.tags.get(PARENT_TAG)
        card.mlflow_run_id, card.experiment_id = found.run_id, found.experiment_id
        card.run_name = found.run_name
        card.state = RunState.OPEN
        card.held += [text for text in waits.held_texts(found.tags) if text not in card.held]
        return found

    def _find(self) -> RunInfo | None:
        """Return the run if somebody has brought it before, in whatever experiment."""
        sink, card = self.server.sink, self.card
        if card.itself() is not None:
            return None
        found = sink.find_runs(sink.experiment_ids(), RUN_ID_TAG, card.run_id)
        active = [run for run in found if run.lifecycle_stage == "active"]
        if found and not active:
            raise Skipped(f"it was deleted on the server (run {found[0].run_id})")
        if not found and self._is_destination():
            raise Skipped("the server has a run of this very id: it is the source itself")
        return next((run for run in active if OWNER_TAG in run.tags), None)

    def _is_destination(self) -> bool:
        """Return whether the server is the store that the run is from, under another address."""
        source_id = self.card.tags.get(SOURCE_TAG)
        if source_id is None:
            return False
        try:
            self.server.sink.get_run(source_id)
        except RunGone:
            return False
        return True

    def _creation(self) -> Creation:
        to = Destination(
            Feed(self.card, iter(()), {}), self.server.sink, self.server.breaker, self.source.node
        )
        return Creation(to, Resolver(self.server.sink, lambda _: None))

    # ── the rest ──

    def _note_what_stays(self, to: Destination) -> None:
        """Only a daemon makes points of several ranks' values, and artifacts of their output."""
        terminal = to.run.terminal
        stays = ["values for reduction"] if has_waiting(to.run.mark.reduction) else []
        if isinstance(terminal, NoTerminal) and terminal.was_asked:
            stays.append("terminal output")
        if stays:
            self.source.notes.append(
                f"{' and '.join(stays)} not brought: `mlflow-relay daemon --spool` does that"
            )

    def _bring_artifacts(self) -> None:
        """Upload them, behind the records. Raises: SourceError: some are to come another time."""
        info = self.info
        assert info is not None

        def store() -> Store:
            return self.server.stores.open(info.artifact_uri)

        def report() -> None:
            if self.server.stop.is_set():
                raise Stopped
            if time.monotonic() - self._progress_s >= PROGRESS_EVERY_S:
                self._save_progress()

        done = bring(self.source.wanted(), self.source.uploaded, store, self.refusals, report)
        self.uploaded_files, self.uploaded_bytes = done.files, done.bytes
        if done.failures:
            self._save_progress()
            more = f" (and {len(done.failures) - 1} more)" if len(done.failures) > 1 else ""
            raise SourceError(done.failures[0] + more)

    def _tell_inputs(self) -> None:
        source, sink, to = self.source, self.server.sink, self._to
        assert to is not None
        if not isinstance(source, ForeignRun) or source.feed is None:
            return
        if source.inputs and source.feed.seen.get(INPUTS_SEEN) != len(source.inputs):
            self._ask(lambda: sink.log_inputs(to.mlflow_run_id, source.inputs))
            source.feed.seen[INPUTS_SEEN] = len(source.inputs)

    def _tell_end(self) -> None:
        to = self._to
        assert to is not None
        self._ask(self._creation().remove_doubles)
        if isinstance(self.source, ForeignRun):
            self._tell_foreign_end(self.source, to)
            return
        ranks = [each for each in self.card.sessions.values() if each.primary]
        for each in ranks:
            each.closed = each.closed or each.end_status is not None  # nothing follows an END
        if ranks and all(each.closed for each in ranks):
            ending = RelayEnding(to)
            ending.is_leaving = True  # other nodes' spools may come in another month
            ending.tell()
            card = self.card
            told = [card.status, card.end_ms, card.end_reason, card.told_sessions]
            self.source.told_end = told
        else:
            if self.card.state is RunState.ENDED:  # a rank has come back
                RelayEnding(to).reopen()
                self.source.told_end = None
            self.source.notes.append("not ended: a rank lives, or nobody has seen it end")

    def _tell_foreign_end(self, source: ForeignRun, to: Destination) -> None:
        word = [source.status, source.end_ms]
        if word != (source.told_end or ["RUNNING", None]):
            changes: dict[str, str | int] = {"status": source.status}
            if source.end_ms is not None:
                changes["end_time_ms"] = source.end_ms
            to.update(**changes)
        source.told_end = word

    def _save_progress(self) -> None:
        """Write down how far it has come, and before it what is held: it is not read again."""
        self.tell_what_waits()
        assert self._to is not None
        assert self.info is not None
        wanted: list[Tag] = []
        for name, progress in self.source.progress().items():
            wanted += progress.tags(name)
        if self.source.uploaded:
            wanted += Progress(self.source.uploaded).tags(ARTIFACTS_NAME)
        news = [tag for tag in wanted if self.info.tags.get(tag[0]) != tag[1]]
        for at in range(0, len(news), TAGS_MAX):  # a job may have more nodes
            self._to.set_tags(news[at : at + TAGS_MAX])
        self._note(wanted)
        self._progress_s = time.monotonic()

    def _note(self, tags: list[Tag]) -> None:
        assert self.info is not None
        self.info = replace(self.info, tags={**self.info.tags, **dict(tags)})

    def _ask(self, operation: Callable[[], T]) -> T:
        return self.server.breaker.call(operation)
