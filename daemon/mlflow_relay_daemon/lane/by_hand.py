"""What an operator says of links that wait: another run than the rank named, or none.

Only the card is changed here; the run's lane tells MLflow.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from mlflow_relay.lineage import run_id
from mlflow_relay_daemon.spool.card import Card, Link
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.states import RunState

log = logging.getLogger(__name__)

KINDS = ("resume", "fork")


class Decision(NamedTuple):
    """What was decided of one link."""

    kind: str  #: "resume" or "fork"
    asked: str  #: the id before
    to: str  #: the id from now on; "": none


def link(run: RunSpool, to: object, kind: str | None = None) -> Decision:
    """Name the run that a link goes to; the link waits, or was given up.

    Args:    to: a relay run id or an MLflow run id. kind: None: the one link that can be meant.
    Raises:  TypeError, ValueError: it cannot be, and why; OSError: not written.
    """
    wanted = run_id("PARENT", to)
    card = run.card
    with run.lock:
        if wanted in (card.run_id, card.mlflow_run_id):
            raise ValueError(f"run {card.run_id} cannot be its own parent")
        kind, chosen = _choose(card, kind)
        decision = Decision(kind, chosen.asked, wanted)
        before = dict(vars(chosen))
        chosen.asked, chosen.is_by_hand, chosen.mlflow_run_id = wanted, True, None
        chosen.is_dropped = chosen.is_waiting = False
        _save(run, {id(chosen): before})
    log.info("run %s: %s of %s is %s now, by hand", card.run_id, kind, decision.asked, wanted)
    return decision


def drop(run: RunSpool) -> list[Decision]:
    """Give up all links that wait: the run is then what it would be without them.

    Raises:  ValueError: none waits; OSError: not written.
    """
    card = run.card
    with run.lock:
        waiting = card.waiting_links()
        if not waiting:
            raise ValueError(f"no link of run {card.run_id} waits: {_state_words(card)}")
        before = {id(each): dict(vars(each)) for each in waiting}
        for each in waiting:
            each.is_dropped = True
        _save(run, before)
    decisions = [Decision(_kind(card, each), each.asked, "") for each in waiting]
    for decision in decisions:
        log.info("run %s: %s of %s given up, by hand", card.run_id, decision.kind, decision.asked)
    return decisions


def _choose(card: Card, kind: str | None) -> tuple[str, Link]:
    """Return the link that is meant. Raises: ValueError."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r}: one of {', '.join(KINDS)}")
    links = [("resume", card.parent), ("fork", card.fork)]
    meant = [(name, each) for name, each in links if each is not None and kind in (None, name)]
    waiting = [id(each) for each in card.waiting_links()]
    for name, each in meant:
        if id(each) in waiting:
            return name, each
    for name, each in meant:
        if _can_be_taken_up(card, each):
            return name, each
    raise ValueError(f"no link of run {card.run_id} waits: {_state_words(card)}")


def _can_be_taken_up(card: Card, link: Link) -> bool:
    """Return whether a link that was given up can be named again: mode "same" is past that once
    it is a run of its own."""
    is_past = link is card.parent and card.resume_mode == "same" and card.state is not RunState.NEW
    return link.is_dropped and not is_past


def _state_words(card: Card) -> str:
    """Say why nothing waits."""
    words = []
    for name, each in (("resumes", card.parent), ("is a fork of", card.fork)):
        if each is not None and each.is_dropped:
            words.append(f"its link to {each.asked} was given up")
        elif each is not None:
            words.append(f"it {name} {each.mlflow_run_id or card.mlflow_run_id or each.asked}")
    if not words:
        return "it resumes no run and is no fork"
    if not card.is_owned:
        words.append("the daemon on the node of rank 0 tells its links")
    return ", ".join(words)


def _kind(card: Card, link: Link) -> str:
    return "resume" if link is card.parent else "fork"


def _save(run: RunSpool, before: dict[int, dict[str, object]]) -> None:
    """Write the card; if that fails, all is as it was."""
    card = run.card
    was_introduced = card.is_introduced
    # Whatever it was told to be, its origin is told again once it has none.
    card.is_introduced = False
    try:
        run.save_card()
    except OSError:
        card.is_introduced = was_introduced
        for each in (card.parent, card.fork):
            if each is not None and id(each) in before:
                vars(each).update(before[id(each)])
        raise
