"""What was logged against what MLflow has, point by point. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .witness import Point

#: key, step
Place = tuple[str, int]


@dataclass(frozen=True)
class Verdict:
    """What the comparison has found."""

    logged: int
    delivered: int  #: are in MLflow as they were logged
    lost: list[Place]  #: logged, and not in MLflow
    doubled: list[Place]  #: in MLflow more than once; one entry for each that is too many
    wrong: list[Place]  #: in MLflow with another value, or though nobody logged it

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.doubled or self.wrong)


def compare(logged: Iterable[Point], found: Iterable[Point]) -> Verdict:
    """Compare what ranks logged, each key and step once, with all that MLflow has of their run."""
    expected = {(key, step): value for key, step, value in logged}
    present: defaultdict[Place, list[float]] = defaultdict(list)
    for key, step, value in found:
        present[key, step].append(value)
    wrong = {
        place
        for place, values in present.items()
        if not all(_is_same(value, expected.get(place)) for value in values)
    }
    return Verdict(
        logged=len(expected),
        delivered=len(present.keys() - wrong),
        lost=sorted(expected.keys() - present.keys()),
        doubled=sorted(place for place, values in present.items() for _ in values[1:]),
        wrong=sorted(wrong),
    )


def _is_same(value: float, expected: float | None) -> bool:
    if expected is None:
        return False
    return value == expected or (math.isnan(value) and math.isnan(expected))
