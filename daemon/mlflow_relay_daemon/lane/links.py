"""A run's links to its parent and its fork, told to MLflow as soon as they can be.

    start_run(...)   tags                                   params
    new              -                                      run_params = its own MLflow run id
    resume=A         resumedRun, mlflow.parentRunId = A     run_params = A
    fork=A           forkedRun, forkedRunId = A             fork_params = A

Where A is not known yet, the run is delivered all the same; the tag relay.waits_for says what it
waits for, and texts that name A are held in the run's card.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from mlflow_relay import clock
from mlflow_relay_daemon.batch import Entry, Objection
from mlflow_relay_daemon.dead_letters import Letters
from mlflow_relay_daemon.lane.destination import Destination
from mlflow_relay_daemon.lane.lineage import (
    FORKED_FROM_TAG,
    FORKED_TAG,
    PARENT_TAG,
    RESUMED_TAG,
    WAITS_FOR_TAG,
    Resolver,
)
from mlflow_relay_daemon.lane.translation import Translation
from mlflow_relay_daemon.sinks import Param, Refused, RunInfo, Tag
from mlflow_relay_daemon.spool.card import Link

log = logging.getLogger(__name__)

#: How often links that wait are looked at again if nothing happens here that could help.
LOOK_AGAIN_S = 15.0


@dataclass(frozen=True)
class LineageParams:
    """The names of the params that keep the lineage; empty: none are written."""

    run: tuple[str, ...] = ("training.run_id", "metadata.run_id")
    fork: tuple[str, ...] = ("config.training.fork_run_id",)


class Links:
    """The links of one run. The owner's daemon tells them, for all nodes."""

    def __init__(
        self,
        destination: Destination,
        resolver: Resolver,
        translation: Translation,
        names: LineageParams,
        letters: Letters,
    ) -> None:
        self._to, self._resolver = destination, resolver
        self._translation, self._names, self._letters = translation, names, letters
        self._look_at_s = 0.0

    def look_again(self) -> None:
        """There is news: do not wait until it is time."""
        self._look_at_s = 0.0

    def tell(self) -> bool:
        """Tell MLflow every link that is known and was not told; idempotent.

        Returns: whether something was told that others may wait for.
        Raises: SinkError, Stopped.
        """
        if not self.is_waiting():
            return False
        now_s = time.monotonic()
        if now_s < self._look_at_s:
            return False
        self._look_at_s = now_s + LOOK_AGAIN_S
        before = self._untold()
        self._tell_all()
        return self._untold() < before

    def _untold(self) -> int:
        card = self._to.card
        return len(card.open_links()) + (card.is_origin and not card.is_introduced)

    def _tell_all(self) -> None:
        card = self._to.card
        if card.is_owned:
            if card.is_origin and not card.is_introduced:
                self._introduce()
            for link in card.open_links():
                asked = link.asked
                found = self._look_up(link, asked)
                if found is None:
                    self._tell_that_it_waits(link, asked)
                elif found.run_id == card.mlflow_run_id:
                    log.warning("run %s would be its own ancestor: link dropped", card.run_id)
                    link.is_dropped = True
                    self._save()
                    self.look_again()  # it is its own origin now
                else:
                    self._tell(link, asked, found)
        if card.held:
            self._release_held()

    def is_waiting(self) -> bool:
        """Return whether something of this run waits for another run to be known."""
        card = self._to.card
        is_untold = bool(card.open_links()) or (card.is_origin and not card.is_introduced)
        return bool(card.held) or (card.is_owned and is_untold)

    def could_be_told(self) -> bool:
        """Return whether this spool has an answer to anything that is waited for."""
        card = self._to.card
        asked = {link.asked for link in (card.parent, card.fork) if link and not link.is_told}
        return any(map(self._resolver.is_known, asked | {value for _, _, value in card.held}))

    def _look_up(self, link: Link, asked: str) -> RunInfo | None:
        find = self._resolver.find_root if link is self._to.card.parent else self._resolver.find
        return self._to.ask(lambda: find(asked))

    def _introduce(self) -> None:
        """A run that resumes none is its own origin."""
        card = self._to.card
        self._log_params(self._names.run, self._to.mlflow_run_id)
        if card.parent is not None and (card.parent.is_waiting or card.parent.is_by_hand):
            self._to.set_tags([(WAITS_FOR_TAG, "")])
        card.is_introduced = True
        self._save()

    def _tell_that_it_waits(self, link: Link, asked: str) -> None:
        """Creation has told it, unless an operator has named another run since."""
        if link.is_by_hand and not link.is_waiting and link is self._to.card.resumed_parent():
            self._to.set_tags([(WAITS_FOR_TAG, asked)])
            link.is_waiting = True
            self._save()

    def _tell(self, link: Link, asked: str, found: RunInfo) -> None:
        card = self._to.card
        if link is card.parent:
            names = self._names.run
            tags: list[Tag] = [(RESUMED_TAG, "True"), (PARENT_TAG, found.run_id)]
            if link.is_waiting or link.is_by_hand:
                tags.append((WAITS_FOR_TAG, ""))
                if not card.is_named:
                    self._to.update(run_name=found.run_name)
                    card.run_name = found.run_name
        else:
            names = self._names.fork
            tags = [(FORKED_TAG, "True"), (FORKED_FROM_TAG, found.run_id)]
        self._log_params(names, found.run_id)
        self._to.set_tags(tags)
        with self._to.run.lock:
            if link.asked == asked:  # else an operator has named another run: that one is told next
                link.mlflow_run_id, link.is_told, link.is_dropped = found.run_id, True, False
                self._save()

    def _release_held(self) -> None:
        """Deliver texts whose id can be translated by now; what is refused is a dead letter."""
        left = []
        for kind, key, value in self._to.card.held:
            translated = self._translation.of(value, key)
            if translated is None:
                left.append([kind, key, value])
                continue
            is_taken = self._release(kind, key, translated)
            original = self._translation.original_tag(key)
            if is_taken and translated != value and original is not None:
                self._release("tag", original, value)
        if len(left) < len(self._to.card.held):
            self._to.card.held = left
            self._save()

    def _release(self, kind: str, key: str, value: str) -> bool:
        try:
            if kind == "param":
                self._to.log([], [(key, value)], [])
            else:
                self._to.set_tags([(key, value)])
        except Refused as refusal:
            now_ms = clock.now_ms()
            entry = Entry(kind, key, value, now_ms, None)
            self._letters.add([Objection(entry, str(refusal), refusal.error_code)], now_ms)
            return False
        return True

    def _log_params(self, names: tuple[str, ...], value: str) -> None:
        params: list[Param] = [(name, value) for name in names]
        if not params:
            return
        try:
            self._to.log([], params, [])
        except Refused as refusal:  # the user's own value of that name was first, and stays
            if len(names) == 1:
                log.warning("run %s: %s", self._to.card.run_id, refusal)
                return
            for name in names:
                self._log_params((name,), value)

    def _save(self) -> None:
        self._to.run.save_card()
