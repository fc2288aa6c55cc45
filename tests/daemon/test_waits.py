"""What a run waits for, in its tags: whoever brings the other run can make a card of it."""

from __future__ import annotations

from mlflow_relay_daemon.lane import waits
from mlflow_relay_daemon.sinks import RunInfo
from mlflow_relay_daemon.spool.card import Card, Link
from tests.support.stores import new_card

PARENT, FORK, OWN = "aa" * 16, "bb" * 16, "cc" * 16


def info(tags: dict[str, str]) -> RunInfo:
    return RunInfo(OWN, "1", "a name", "FINISHED", 1, 2, "active", tags)


def test_links_and_texts_that_wait_come_back_as_they_were():
    card = new_card(OWN, resume=PARENT, fork=FORK, name="")
    card.held = [["param", "config.training.run_id", PARENT]]
    tags = dict(waits.tags(card, {}, frozenset({"forkedRunId"})))
    assert tags[waits.AWAITS_TAG + PARENT] == tags[waits.AWAITS_TAG + FORK] == "True"
    again = new_card(OWN)
    waits.fill(again, info(tags))
    assert again.parent == Link(PARENT, is_waiting=True)
    assert again.fork == Link(FORK)
    assert (again.held, again.is_named) == (card.held, False)
    assert waits.kept(tags) == {"forkedRunId"}


def test_what_has_come_is_taken_back_and_nothing_else_is_written():
    card = new_card(OWN, resume=PARENT, fork=FORK)
    before = dict(waits.tags(card, {}))
    assert waits.tags(card, before) == []
    assert card.fork is not None
    card.fork.is_told = True
    changed = dict(waits.tags(card, before))
    assert changed.pop(waits.AWAITS_TAG + FORK) == ""
    assert set(changed) == {waits.WAITS_TAG}
    assert card.parent is not None
    card.parent.is_told = True
    rest = dict(waits.tags(card, before))
    assert set(rest.values()) == {""}


def test_a_run_that_waits_for_nothing_has_no_such_tags():
    assert waits.tags(new_card(OWN), {}) == []


def test_a_held_parent_is_told_to_whoever_climbs_from_child_to_root():
    card: Card = new_card(OWN)
    card.held = [["tag", "mlflow.parentRunId", PARENT]]
    before = dict(waits.tags(card, {}))
    assert before["relay.waits_for"] == PARENT
    card.held = []
    assert dict(waits.tags(card, before))["relay.waits_for"] == ""


def test_tags_of_somebody_else_hold_nothing():
    for text in ("", "nonsense", "[]", "1"):
        assert waits.held_texts({waits.WAITS_TAG: text}) == []
        assert waits.kept({waits.WAITS_TAG: text}) == frozenset()
