"""What a case has found: tables, plots and targets; as JSON and back. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

Cell = str | float | int | None


@dataclass
class Table:
    """Rows of text and numbers; a number is printed with three digits that count.

    Args: is_race: whoever has the lowest number is ahead; the report names those ahead of us.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""
    is_race: bool = False

    def ahead_of(self, us: str) -> list[str]:
        """Return who is ahead of us in which column, among rows with the same words in them; names
        in brackets do not take part."""
        found = []
        for ours in (row for row in self.rows if row[0] == us):
            for row in self.rows if self.is_race else ():
                if row is ours or str(row[0]).startswith("(") or _words(row) != _words(ours):
                    continue
                pairs = zip(self.columns, row, ours, strict=True)
                found += [
                    f"{row[0]} in {column} ({their:.3g}, ours {our:.3g})"
                    for column, their, our in pairs
                    if isinstance(their, float | int) and isinstance(our, float | int)
                    if their < our
                ]
        return found


@dataclass
class Plot:
    """Lines over one axis, both axes logarithmic unless told otherwise."""

    name: str  #: of its file
    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    is_log: bool = True


@dataclass
class Target:
    """One line of DESIGN 12: what was measured, and what it must be.

    Args:
        least, most: the bound, as DESIGN has it.
        is_ratio: of two things measured by turns in this run: the short form fails on these.
        beside: what the same run shows of this machine: a floor, or what another one takes.
    """

    what: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None
    is_ratio: bool = False
    beside: str = ""

    def is_met(self, slack: float = 1.0) -> bool:
        """Args: slack: above 1, how far the value may lie behind its bound (short runs are noisy)."""
        if self.least is not None and self.value * slack < self.least:
            return False
        return self.most is None or self.value <= self.most * slack

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.least is not None:
            return f"≥ {self.least:.3g} {self.unit}".strip()
        return f"≤ {self.most:.3g} {self.unit}".strip()


@dataclass
class Outcome:
    """All that one case has found."""

    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  #: what could not be measured, and why


def to_json(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome)


def from_json(data: dict[str, Any]) -> Outcome:
    return Outcome(
        [Table(**each) for each in data["tables"]],
        [Plot(**{**each, "lines": _tuples(each["lines"])}) for each in data["plots"]],
        [Target(**each) for each in data["targets"]],
        list(data["skipped"]),
    )


def _tuples(lines: dict[str, list[list[float]]]) -> dict[str, list[tuple[float, float]]]:
    return {name: [(x, y) for x, y in points] for name, points in lines.items()}


def _words(row: list[Cell]) -> list[str]:
    return [cell for cell in row[1:] if isinstance(cell, str)]
