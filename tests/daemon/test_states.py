"""The life cycle as data, and how a run ended: the worst word of the ranks that have a say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay_daemon.spool.card import SessionCard
from mlflow_relay_daemon.states import (
    TRANSITIONS,
    RunEvent,
    RunState,
    Verdict,
    next_state,
    verdict,
)

BEGIN_MS, LAST_MS = 1_000_000, 2_000_000
SEVERITY = ["FINISHED", "KILLED", "FAILED"]

#: INTERNALS.md, Life cycle.
TABLE = [
    (RunState.NEW, RunEvent.CREATED, RunState.OPEN),
    (RunState.OPEN, RunEvent.STATUS_DELIVERED, RunState.ENDED),
    (RunState.ENDED, RunEvent.REOPENED, RunState.OPEN),
    (RunState.ENDED, RunEvent.STATUS_DELIVERED, RunState.ENDED),
]

SESSIONS = st.lists(
    st.builds(
        SessionCard,
        rank=st.integers(0, 3),
        node=st.just("node7"),
        pid=st.just(4711),
        primary=st.booleans(),
        start_ms=st.integers(BEGIN_MS, LAST_MS),
        closed=st.just(True),
        end_status=st.none() | st.sampled_from(SEVERITY),
        end_ms=st.integers(BEGIN_MS, 3 * BEGIN_MS),
        end_reason=st.sampled_from(["", "because"]),
    ),
    max_size=8,
    unique_by=lambda each: each.start_ms,
)


def session(rank: int = 0, **fields: object) -> SessionCard:
    card = SessionCard(rank, "node7", 4711, primary=True, start_ms=BEGIN_MS, closed=True)
    return replace(card, **fields)  # type: ignore[arg-type]


def ended(rank: int, status: str, end_ms: int, reason: str = "", **fields: object) -> SessionCard:
    return session(rank, end_status=status, end_ms=end_ms, end_reason=reason, **fields)


# ── the table ──


@pytest.mark.parametrize(("state", "event", "after"), TABLE)
def test_a_run_goes_on_as_the_table_says(state, event, after):
    assert next_state(state, event) is after


def test_nothing_else_can_happen():
    known = {(state, event) for state, event, _ in TABLE}
    assert set(TRANSITIONS) == known
    for state, event in set(itertools.product(RunState, RunEvent)) - known:
        with pytest.raises(KeyError):
            next_state(state, event)


def test_every_state_can_be_reached_and_left():
    assert {after for _, _, after in TABLE} == set(RunState) - {RunState.NEW}
    assert {state for state, _, _ in TABLE} == set(RunState)


# ── the verdict ──


def own_word(card: SessionCard) -> Verdict:
    """Return what one rank says, or what is said of it."""
    if card.end_status is None or card.end_ms is None:
        return Verdict("FAILED", max(LAST_MS, card.start_ms), "vanished")
    return Verdict(card.end_status, card.end_ms, card.end_reason)


@given(cards=SESSIONS, data=st.data())
def test_the_latest_session_of_each_rank_speaks_and_the_worst_word_stands(cards, data):
    found = verdict(data.draw(st.permutations(cards)), LAST_MS)

    latest: dict[int, SessionCard] = {}
    for card in sorted(cards, key=lambda each: each.start_ms):
        if card.primary:
            latest[card.rank] = card
    words = [own_word(card) for card in latest.values()]
    if not words:
        assert found == Verdict("FINISHED", LAST_MS, "")
        return
    assert found.status == max((word.status for word in words), key=SEVERITY.index)
    assert found.end_ms == max(word.end_ms for word in words)
    if any(word.reason for word in words if word.status == found.status):
        assert found.reason
    else:
        assert found.reason == ""


@given(cards=SESSIONS)
def test_forked_children_have_no_say(cards):
    children = [replace(card, primary=False) for card in cards]

    assert verdict([*children, ended(0, "FINISHED", 5)], LAST_MS) == Verdict("FINISHED", 5, "")


def test_all_well_is_finished_at_the_end_of_the_last():
    cards = [ended(0, "FINISHED", 30), ended(1, "FINISHED", 50), ended(2, "FINISHED", 40)]

    assert verdict(cards, 20) == Verdict("FINISHED", 50, "")


def test_one_failure_is_the_run_s_and_says_whose_it_is():
    cards = [
        ended(0, "FINISHED", 30),
        ended(3, "FAILED", 40, "ValueError: nan"),
        ended(1, "KILLED", 50, "ctrl-c"),
    ]

    assert verdict(cards, 20) == Verdict("FAILED", 50, "rank 3: ValueError: nan")


def test_a_failure_with_a_reason_says_more_than_one_without():
    cards = [ended(0, "FAILED", 30), ended(1, "FAILED", 30, "out of memory")]

    for order in (cards, cards[::-1]):
        assert verdict(order, 20).reason == "rank 1: out of memory"


def test_a_rank_that_vanished_failed_when_it_was_last_heard_of():
    found = verdict([session(2), ended(0, "FINISHED", BEGIN_MS + 5)], LAST_MS)

    assert found.status == "FAILED"
    assert found.end_ms == LAST_MS
    assert "rank 2 on node7 (pid 4711) vanished" in found.reason


def test_a_rank_that_vanished_at_once_did_not_end_before_it_began():
    assert verdict([session(0)], 0).end_ms == BEGIN_MS


def test_a_rank_that_came_back_makes_good_for_the_one_that_vanished():
    cards = [session(0), ended(0, "FINISHED", LAST_MS, start_ms=BEGIN_MS + 1)]

    assert verdict(cards, LAST_MS) == Verdict("FINISHED", LAST_MS, "")


def test_a_rank_that_came_back_and_vanished_has_vanished():
    cards = [ended(0, "FINISHED", BEGIN_MS + 1), session(0, start_ms=BEGIN_MS + 2)]

    assert verdict(cards, LAST_MS).status == "FAILED"
