"""Sequence numbers against a model that is a set of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay_daemon.spool.sequences import Sequences

A, B = bytes(16), bytes(range(16))
RUNS = st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda run: (run[0], sum(run)))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from([A, B]), RUNS),
        st.tuples(st.just("give up"), st.sampled_from([A, B]), st.integers(0, 60)),
        st.tuples(st.just("give up all"), st.sampled_from([A, B]), st.none()),
        st.tuples(st.just("reload"), st.just(A), st.none()),
    ),
    max_size=20,
)


def first_missing(seen: set[int]) -> int:
    return next(number for number in range(len(seen) + 1) if number not in seen)


@given(steps=STEPS, asked=RUNS)
def test_numbers_are_seen_or_given_up_and_nothing_else(steps, asked):
    sequences = Sequences()
    seen: dict[bytes, set[int]] = {A: set(), B: set()}
    for what, session, value in steps:
        numbers = seen[session]
        if what == "add":
            sequences.add(session, *value)
            numbers |= set(range(*value))
        elif what == "reload":
            sequences = Sequences(sequences.save())
        else:
            before = max(numbers, default=-1) + 1 if value is None else value
            given_up = set(range(before)) - numbers
            assert sequences.give_up(session, value) == len(given_up)
            numbers |= given_up
        for each, expected in seen.items():
            assert sequences.next_seq(each) == first_missing(expected)
            assert sequences.is_new(each, *asked) == bool(set(range(*asked)) - expected)


def test_frames_out_of_order_wait_for_what_is_missing_before_them():
    sequences = Sequences()
    sequences.add(A, 0, 10)
    sequences.add(A, 20, 30)
    assert sequences.next_seq(A) == 10
    assert sequences.is_new(A, 10, 20)
    assert not sequences.is_new(A, 20, 30)

    sequences.add(A, 10, 20)

    assert sequences.next_seq(A) == 30


def test_giving_up_to_a_number_asks_for_all_behind_it():
    """A rank that has nothing before 10 any more still has what is missing from 10 on."""
    sequences = Sequences()
    sequences.add(A, 0, 10)
    sequences.add(A, 30, 40)

    assert sequences.give_up(A, 10) == 0

    assert sequences.next_seq(A) == 10
    assert sequences.is_new(A, 10, 30)


def test_what_is_given_up_is_counted_though_more_came_behind_it():
    sequences = Sequences()
    sequences.add(A, 0, 10)
    sequences.add(A, 30, 40)
    sequences.give_up(A, 0)

    assert sequences.give_up(A, 40) == 20
    assert sequences.missing == 20


def test_one_gap_does_not_make_every_later_frame_a_thing_to_remember():
    """A damaged frame is never mended; all that follows it is one run of numbers."""
    sequences = Sequences()
    sequences.add(A, 0, 10)
    for first in range(20, 20_000, 10):
        sequences.add(A, first, first + 10)

    _, ahead = sequences.save()[A]
    assert len(ahead) == 1


def test_a_session_that_is_forgotten_begins_anew():
    sequences = Sequences()
    sequences.add(A, 0, 10)
    sequences.add(A, 20, 30)
    sequences.forget(A)

    assert sequences.next_seq(A) == 0
    assert sequences.is_new(A, 20, 30)


@pytest.mark.parametrize("session", [A, B])
def test_an_unknown_session_has_shown_nothing(session):
    assert Sequences().next_seq(session) == 0
    assert Sequences().is_new(session, 0, 1)
    assert Sequences().give_up(session) == 0
