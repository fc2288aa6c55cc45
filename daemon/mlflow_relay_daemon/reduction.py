"""One value of each rank and step → one point of the node. Pure. See docs/reduction.md.

What the ranks have given, and no point was made of yet, is part of the watermark: both say how far
the run's records have been read, and are replaced together. A point is a record in the spool before
it is sent; so it is made once, whatever is killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from mlflow_relay.records import Combined, Reduce
from mlflow_relay.values import METRICS_PER_RECORD_MAX
from mlflow_relay_daemon.batch import Entry, Objection

#: Tag of the run: values that ranks owed to points, in all.
MISSING_TAG = "relay.missing_values"
LATE = "late"  #: the kind of dead letter that a value becomes which came after its point


class Ident(NamedTuple):
    """Which point."""

    how: str
    key: str
    step: int


class Given(NamedTuple):
    """A rank's value for a point."""

    value: float
    timestamp_ms: int
    born_ms: int  #: when the rank's session began


class Giver(NamedTuple):
    """Whose records are read."""

    rank: int
    born_ms: int


class Ranks(NamedTuple):
    """The ranks of this node, as far as they matter to a point."""

    seen: Collection[int]
    gone: Collection[int]  #: of these, who will give nothing more
    expected: int  #: so many there are, seen or not yet

    def have_spoken(self, given: Collection[int]) -> bool:
        """Return whether nobody is to be waited for."""
        known = {*given, *self.gone}
        return known.issuperset(self.seen) and len(known) >= self.expected

    def missing(self, given: Collection[int]) -> int:
        """Return how many values there should be and are not."""
        return max(self.expected, len({*self.seen, *given})) - len(given)


class Reduction:
    """What a run's records say up to the watermark.

    Args: saved: as `save` gave it.
    """

    def __init__(self, saved: Sequence[Any] = ()) -> None:
        waiting, done, missing = saved or ((), (), 0)
        self.missing: int = missing
        #: What was given, by point and rank; oldest point first.
        self.waiting: dict[Ident, dict[int, Given]] = {
            Ident(*ident): {rank: Given(*given) for rank, *given in by_rank}
            for *ident, by_rank in waiting
        }
        #: How far each curve has come: the last step, and when the youngest of its givers began.
        self._done: dict[tuple[str, str], tuple[int, int]] = {
            (how, key): (step, born_ms) for how, key, step, born_ms in done
        }

    def save(self) -> list[Any]:
        """Return what the constructor takes, fit for msgpack."""
        waiting = [
            [*ident, [[rank, *given] for rank, given in by_rank.items()]]
            for ident, by_rank in self.waiting.items()
        ]
        return [waiting, [[*curve, *done] for curve, done in self._done.items()], self.missing]

    def give(self, giver: Giver, record: Reduce) -> list[Objection]:
        """Take in what a rank says; of two values for one point its last one stands.

        Returns: the values that came after their point had been made.
        """
        late = []
        for key, value in zip(record.keys, record.values, strict=True):
            ident = Ident(record.how, key, record.step)
            if ident not in self.waiting and self._is_done(ident, giver):
                entry = Entry(LATE, key, value, record.timestamp_ms, record.step)
                reason = f"rank {giver.rank} gave it after the {record.how} of this step was made"
                late.append(Objection(entry, reason))
                continue
            given = Given(value, record.timestamp_ms, giver.born_ms)
            self.waiting.setdefault(ident, {})[giver.rank] = given
        return late

    def made(self, record: Combined) -> None:
        """A point has been made: what was given for it is no longer needed."""
        for key in record.keys:
            self.waiting.pop(Ident(record.how, key, record.step), None)
            step, born_ms = self._done.get((record.how, key), (record.step, record.born_ms))
            youngest_ms = max(born_ms, record.born_ms)
            self._done[record.how, key] = max(step, record.step), youngest_ms
        self.missing += record.missing * len(record.keys)

    def _is_done(self, ident: Ident, giver: Giver) -> bool:
        """Ranks go from step to step, so what lies before the last point has been made; unless the
        rank was started anew and goes the way once more."""
        step, born_ms = self._done.get((ident.how, ident.key), (None, 0))
        return step is not None and ident.step <= step and giver.born_ms <= born_ms


def has_waiting(saved: Sequence[Any]) -> bool:
    """Return whether anything waits in what `Reduction.save` gave."""
    return bool(saved and saved[0])


def points(
    reduction: Reduction, ranks: Ranks, suffix: str, is_overdue: Callable[[Ident], bool]
) -> dict[Ident, Combined]:
    """Return the points that can be made now, each on its own.

    Args:
        suffix: behind the key, in MLflow.
        is_overdue: whether a point has waited long enough.
    """
    return {
        ident: _point(ident, by_rank, ranks, suffix)
        for ident, by_rank in reduction.waiting.items()
        if ranks.have_spoken(by_rank) or is_overdue(ident)
    }


def _point(ident: Ident, by_rank: dict[int, Given], ranks: Ranks, suffix: str) -> Combined:
    given = by_rank.values()
    return Combined(
        timestamp_ms=max(each.timestamp_ms for each in given),
        how=ident.how,
        step=ident.step,
        suffix=suffix,
        keys=[ident.key],
        values=[combine(ident.how, [each.value for each in given])],
        missing=ranks.missing(by_rank),
        born_ms=max(each.born_ms for each in given),
    )


def joined(combined: Iterable[Combined]) -> list[Combined]:
    """Return the points with those of one step in one record, as far as they are alike."""
    alike: dict[tuple[Any, ...], list[Combined]] = {}
    for point in combined:
        group = alike.setdefault(tuple(point._replace(keys=(), values=())), [])
        group.append(point)
    found = []
    for group in alike.values():
        for at in range(0, len(group), METRICS_PER_RECORD_MAX):
            part = group[at : at + METRICS_PER_RECORD_MAX]
            keys = [key for point in part for key in point.keys]
            values = [value for point in part for value in point.values]
            found.append(part[0]._replace(keys=keys, values=values))
    return found


def combine(how: str, values: Sequence[float]) -> float:
    """Return mean, sum, min or max exactly: a NaN makes all NaN. Order does not matter."""
    if any(map(math.isnan, values)):
        return math.nan
    if how == "min":
        return min(values)
    if how == "max":
        return max(values)
    return _sum(values, len(values) if how == "mean" else 1)


def _sum(values: Sequence[float], divisor: int) -> float:
    """Return the sum divided, exact until it is rounded: the same in whatever order values came."""
    infinite = {value for value in values if math.isinf(value)}
    if infinite:
        return sum(infinite)
    try:
        return math.fsum(values) / divisor
    except OverflowError:  # on the way, though perhaps not in the end
        total = sum(map(Fraction, values)) / divisor
    try:
        return float(total)
    except OverflowError:
        return math.inf if total > 0 else -math.inf
