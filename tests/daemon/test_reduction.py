"""Values of ranks → points: how they are combined, when, and what is missing or late."""

from __future__ import annotations

import itertools
import math
import random

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay.records import REDUCTIONS, Combined, Reduce, pack_combined, unpack_record
from mlflow_relay_daemon.reduction import (
    Giver,
    Ident,
    Ranks,
    Reduction,
    combine,
    has_waiting,
    joined,
    points,
)

ALL = Ranks(seen=range(4), gone=(), expected=4)


def gives(
    reduction: Reduction, rank: int, step: int, value: float = 1.0, born_ms: int = 0, **more: object
) -> list[str]:
    """A rank gives one value of "loss"; return why it was not taken."""
    fields = {"how": "mean", "keys": ["loss"], **more}
    record = Reduce(timestamp_ms=1000 + rank, step=step, values=[value], **fields)  # type: ignore[arg-type]
    return [each.reason for each in reduction.give(Giver(rank, born_ms), record)]


def ready(reduction: Reduction, ranks: Ranks = ALL, overdue: bool = False) -> list[Combined]:
    return list(points(reduction, ranks, "", lambda _: overdue).values())


# ── how ──


@given(
    st.sampled_from(REDUCTIONS),
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=20),
)
def test_values_are_combined_as_numpy_does(how: str, values: list[float]) -> None:
    with np.errstate(all="ignore"):
        theirs = float(getattr(np, how)(np.array(values, dtype=np.float64)))
    ours = combine(how, values)
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-300, nan_ok=True) or (
        # numpy rounds after each addition; ours is the exact sum, rounded once
        abs(ours - theirs) <= 1e-12 * sum(map(abs, values))
    )


def test_a_sum_beyond_float64_is_infinite_and_its_mean_what_it_is() -> None:
    assert combine("sum", [1e308, 1e308]) == math.inf
    assert combine("mean", [-1e308, -1e308]) == -1e308
    assert combine("sum", [1e308, 1e308, -1e308]) == 1e308
    assert math.isnan(combine("sum", [math.inf, -math.inf, 1.0]))


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=2, max_size=8), st.randoms())
def test_the_order_in_which_ranks_come_changes_nothing(
    values: list[float], shuffled: random.Random
) -> None:
    again = values.copy()
    shuffled.shuffle(again)
    for how in REDUCTIONS:
        one, other = combine(how, values), combine(how, again)
        assert one == other or (math.isnan(one) and math.isnan(other))


# ── when ──


def test_a_point_is_made_when_all_ranks_have_spoken_and_not_before() -> None:
    reduction = Reduction()
    for rank in range(3):
        gives(reduction, rank, step=7, value=float(rank))
        assert ready(reduction) == []
    gives(reduction, 3, step=7, value=6.0)
    (point,) = ready(reduction)
    assert (point.keys, point.values, point.step, point.missing) == (["loss"], [2.25], 7, 0)
    assert point.timestamp_ms == 1003, "the time of the latest value"


def test_ranks_that_have_not_shown_up_yet_are_waited_for() -> None:
    reduction = Reduction()
    gives(reduction, 0, step=0)
    assert ready(reduction, Ranks(seen=[0], gone=(), expected=4)) == []
    assert ready(reduction, Ranks(seen=[0], gone=(), expected=1))


def test_a_rank_that_has_gone_is_not_waited_for_and_is_missing() -> None:
    reduction = Reduction()
    for rank in range(3):
        gives(reduction, rank, step=0, value=float(rank))
    (point,) = ready(reduction, ALL._replace(gone=[3]))
    assert (point.values, point.missing) == ([1.0], 1)


def test_what_a_rank_gave_before_it_went_counts() -> None:
    reduction = Reduction()
    for rank in range(4):
        gives(reduction, rank, step=0, value=float(rank))
    (point,) = ready(reduction, ALL._replace(gone=[3]))
    assert (point.values, point.missing) == ([1.5], 0)


def test_an_overdue_point_is_made_of_what_is_there() -> None:
    reduction = Reduction()
    gives(reduction, 2, step=0, value=5.0)
    (point,) = ready(reduction, overdue=True)
    assert (point.values, point.missing) == ([5.0], 3)


def test_the_last_of_two_values_of_a_rank_stands() -> None:
    reduction = Reduction()
    for rank in range(4):
        gives(reduction, rank, step=0, value=9.0)
    gives(reduction, 1, step=0, value=1.0)
    assert ready(reduction)[0].values == [7.0]


def test_other_keys_steps_and_reductions_are_other_points() -> None:
    reduction = Reduction()
    for rank in range(4):
        gives(reduction, rank, step=0, value=1.0)
        gives(reduction, rank, step=1, value=2.0)
        gives(reduction, rank, step=0, value=3.0, how="sum")
        gives(reduction, rank, step=0, value=4.0, keys=["lr"])
    found = {(each.how, *each.keys, each.step): each.values for each in ready(reduction)}
    assert found == {
        ("mean", "loss", 0): [1.0],
        ("mean", "loss", 1): [2.0],
        ("sum", "loss", 0): [12.0],
        ("mean", "lr", 0): [4.0],
    }


# ── afterwards ──


def test_a_value_that_comes_after_its_point_is_late() -> None:
    reduction = Reduction()
    for rank in range(3):
        gives(reduction, rank, step=5)
    (point,) = ready(reduction, overdue=True)
    reduction.made(point)
    assert reduction.missing == 1
    assert gives(reduction, 3, step=5) == ["rank 3 gave it after the mean of this step was made"]
    assert gives(reduction, 3, step=6) == []
    assert list(reduction.waiting) == [Ident("mean", "loss", 6)]


def test_a_point_that_still_waits_takes_values_though_a_later_one_was_made() -> None:
    reduction = Reduction()
    gives(reduction, 0, step=1)
    for rank in range(4):
        gives(reduction, rank, step=2)
    (later,) = ready(reduction)
    reduction.made(later)
    assert gives(reduction, 1, step=1) == []
    assert set(reduction.waiting[Ident("mean", "loss", 1)]) == {0, 1}


def test_ranks_that_were_started_again_may_go_the_same_way_again() -> None:
    reduction = Reduction()
    for rank in range(4):
        gives(reduction, rank, step=9, born_ms=100)
    reduction.made(ready(reduction)[0])
    for rank in range(4):
        assert gives(reduction, rank, step=3, value=2.0, born_ms=200) == []
    assert ready(reduction)[0].values == [2.0]


def test_points_of_one_step_share_a_record_if_they_are_alike() -> None:
    reduction = Reduction()
    for rank, key in itertools.product(range(4), ["a", "b"]):
        gives(reduction, rank, step=0, keys=[key])
    gives(reduction, 0, step=1, keys=["a"])
    found = joined(ready(reduction, overdue=True))
    assert [(each.step, list(each.keys), each.missing) for each in found] == [
        (0, ["a", "b"], 0),
        (1, ["a"], 3),
    ]


def test_what_is_saved_comes_back() -> None:
    reduction = Reduction()
    for rank in range(4):
        gives(reduction, rank, step=0, value=math.inf)
    reduction.made(ready(reduction, overdue=True)[0])
    gives(reduction, 2, step=1, value=0.1, born_ms=7)
    saved = msgpack.unpackb(msgpack.packb(reduction.save()))
    again = Reduction(saved)
    assert again.save() == reduction.save()
    assert again.waiting == reduction.waiting
    assert has_waiting(saved)
    assert not has_waiting(Reduction().save())
    assert not has_waiting([])


def test_a_point_is_the_same_behind_the_spool() -> None:
    point = Combined(5, 3, "max", "/node_1", ["a", "b"], (1.5, -math.inf), 2, 11)
    assert unpack_record(pack_combined(point)) == point
