"""When a point is made of what the ranks of this node have given for a step.

    lane         values of the ranks ─▶ watermark (reduction.Reduction)
    main loop    all have spoken, or it is too late ─▶ record of the point ─▶ spool
    lane         record of the point ─▶ MLflow; its values leave the watermark

A rank that has gone is not waited for. Whether it has left a value behind is known only when all
that was in the spool at the time of its end has been read; until then nothing is said without it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

from mlflow_relay.records import pack_combined
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.node_metrics import node_number
from mlflow_relay_daemon.own_records import OwnRecords
from mlflow_relay_daemon.reduction import Ident, Ranks, Reduction, has_waiting, joined, points
from mlflow_relay_daemon.spool.card import Card
from mlflow_relay_daemon.spool.run_spool import Place

log = logging.getLogger(__name__)

#: Values of one run that wait for others; beyond it the oldest points are made without waiting.
WAITING_VALUES_MAX = 100_000


class Moment(NamedTuple):
    """What was the case when the spool ended at some place."""

    now_s: float
    place: Place
    gone: frozenset[int]


@dataclass
class View:
    """What is remembered of one run between two looks; nothing of it must survive."""

    begin: Place  #: points of an earlier life of the daemon may lie before it
    begun_s: float
    since_s: dict[Ident, float] = field(default_factory=dict)
    made: dict[Ident, Place] = field(default_factory=dict)  #: and not read by the lane yet
    moment: Moment | None = None


class Combiner:
    """Makes points for all runs of this daemon.

    Args: deadline_s: how long a point waits for ranks that are late.
    """

    def __init__(self, runs: Runs, own: OwnRecords, deadline_s: float) -> None:
        self._runs, self._own, self._deadline_s = runs, own, deadline_s
        self._views: dict[str, View] = {}

    def look(self, now_s: float) -> None:
        """Make the points that can be made now."""
        for run_id, hosted in self._runs.by_id.items():
            if not has_waiting(hosted.run.mark.reduction):
                if run_id in self._views:
                    self._views[run_id].since_s.clear()
                continue
            view = self._views.get(run_id)
            if view is None:
                view = self._views[run_id] = View(hosted.run.end_place(), now_s)
            self._make(hosted, view, now_s)

    def is_waiting(self) -> bool:
        """Return whether points are about to be made of runs whose ranks have all gone."""
        return any(
            has_waiting(each.run.mark.reduction) and not _living(each.run.card)
            for each in self._runs.by_id.values()
        )

    def _make(self, hosted: Hosted, view: View, now_s: float) -> None:
        run, card = hosted.run, hosted.run.card
        mark = run.mark  # once: what it says of place and values belongs together
        here = Place(mark.segment, mark.offset)
        if here < view.begin:
            return
        view.made = {ident: place for ident, place in view.made.items() if place > here}
        reduction = Reduction(mark.reduction)
        view.since_s = {ident: view.since_s.get(ident, now_s) for ident in reduction.waiting}
        gone, then_s = self._known_gone(hosted, view, here, now_s)
        overdue = self._overdue(reduction, view, then_s)
        ready = points(
            reduction, self._ranks(card, view, gone, now_s), _suffix(card), overdue.__contains__
        )
        ready = {ident: point for ident, point in ready.items() if ident not in view.made}
        if not ready:
            return
        try:
            self._own.append(hosted, [pack_combined(each) for each in joined(ready.values())])
        except OSError as error:
            log.debug("run %s: points wait for the disk: %s", card.run_id, error)
            return
        place = run.end_place()
        view.made.update(dict.fromkeys(ready, place))

    def _known_gone(
        self, hosted: Hosted, view: View, here: Place, now_s: float
    ) -> tuple[frozenset[int], float | None]:
        """Return who had gone at a moment up to which all has been read, and when that was; None:
        there is no such moment yet."""
        if view.moment is None:
            gone = frozenset(_seen(hosted.run.card) - _living(hosted.run.card))
            view.moment = Moment(now_s, hosted.run.end_place(), gone)
        if here < view.moment.place:
            return frozenset(), None
        moment, view.moment = view.moment, None
        return moment.gone, moment.now_s

    def _overdue(self, reduction: Reduction, view: View, then_s: float | None) -> set[Ident]:
        """Return the points that had waited long enough at that moment, and those for which there
        is no room."""
        overdue = set()
        surplus = sum(map(len, reduction.waiting.values())) - WAITING_VALUES_MAX
        for ident, by_rank in reduction.waiting.items():
            waited_long = then_s is not None and then_s - view.since_s[ident] >= self._deadline_s
            if surplus > 0 or waited_long:
                overdue.add(ident)
                surplus -= len(by_rank)
        return overdue

    def _ranks(self, card: Card, view: View, gone: frozenset[int], now_s: float) -> Ranks:
        seen, expected = _seen(card), _told(card)
        if not expected and now_s - view.begun_s < self._deadline_s:
            expected = card.world_size  # nobody told how many are here: wait for all, at first
        return Ranks(seen, gone, expected or len(seen))


def _suffix(card: Card) -> str:
    """Return what tells this node's points from those of others; "" if there are no others."""
    is_alone = max(_told(card), len(_seen(card))) >= card.world_size
    return "" if is_alone else f"/node_{node_number(card)}"


def _told(card: Card) -> int:
    """Return how many ranks this node has; 0: nobody told."""
    if card.node_count == 1:
        return card.world_size
    return max((each.local_world_size for each in list(card.sessions.values())), default=0)


def _seen(card: Card) -> set[int]:
    return {each.rank for each in list(card.sessions.values()) if each.primary}


def _living(card: Card) -> set[int]:
    return {each.rank for each in list(card.sessions.values()) if each.primary and not each.closed}
