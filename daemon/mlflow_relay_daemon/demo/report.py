"""The figures at the end, and the table that shows them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from .compare import Place, Verdict

#: A log call of this length would be felt in training.
STALL_S = 0.1
PLACES_SHOWN_MAX = 3


@dataclass(frozen=True)
class Bridge:
    """An outage, and what the training did meanwhile."""

    length_s: float
    steps: int


@dataclass(frozen=True)
class Report:
    """What came out of the demo."""

    verdict: Verdict
    statuses: list[str]  #: of the runs in MLflow; there must be one
    ranks: int
    steps: int
    is_late: bool  #: the count was made before all was delivered
    calls_s: Sequence[float]  #: how long each log call took
    ends_s: Sequence[float]  #: how long each rank's `end` took
    server_away: Bridge
    daemon_dead: Bridge
    accuracy: tuple[float, float]  #: first and last
    loss: tuple[float, float]

    @property
    def is_good(self) -> bool:
        """Every point is in MLflow once, in one run that has ended well."""
        return self.verdict.is_good and self.statuses == ["FINISHED"]

    @property
    def stalled_s(self) -> float:
        return sum(call_s for call_s in self.calls_s if call_s > STALL_S)


def table(report: Report) -> Table:
    """Return the report as people read it."""
    verdict, calls_s = report.verdict, report.calls_s
    metrics = verdict.logged // (report.ranks * report.steps)
    shown = Table(box=box.ROUNDED, show_header=False, title="What came of it", title_justify="left")
    shown.add_column(no_wrap=True)
    shown.add_column(justify="right", no_wrap=True)
    shown.add_column(style="dim")

    def row(name: str, figure: str, note: str = "", is_good: bool | None = None) -> None:
        style = "bold" if is_good is None else "bold green" if is_good else "bold red"
        shown.add_row(name, Text(figure, style=style), note)

    row(
        "points accepted",
        f"{verdict.logged:,}",
        f"{report.ranks} ranks x {report.steps:,} steps x {metrics} metrics",
    )
    row(
        "delivered",
        f"{verdict.delivered:,}",
        "read back from MLflow: key, step, value",
        verdict.delivered == verdict.logged,
    )
    lost = "lost or late" if report.is_late else "lost"
    row(lost, f"{len(verdict.lost):,}", _places(verdict.lost), not verdict.lost)
    row("duplicates", f"{len(verdict.doubled):,}", _places(verdict.doubled), not verdict.doubled)
    row("wrong", f"{len(verdict.wrong):,}", _places(verdict.wrong), not verdict.wrong)
    row(
        "runs in MLflow",
        f"{len(report.statuses)}",
        ", ".join(report.statuses) + " (one for all ranks)",
        report.statuses == ["FINISHED"],
    )
    shown.add_section()
    row(
        "log call, p50",
        duration_text(quantile(calls_s, 0.5)),
        f"p99.9 {duration_text(quantile(calls_s, 0.999))}, longest {duration_text(max(calls_s))}",
    )
    row(
        "training stalled",
        duration_text(report.stalled_s),
        f"in log calls of more than {duration_text(STALL_S)}",
        not report.stalled_s,
    )
    row("end()", duration_text(max(report.ends_s)), "the slowest rank")
    shown.add_section()
    away, dead = report.server_away, report.daemon_dead
    row("server away", duration_text(away.length_s), f"bridged: {away.steps:,} steps meanwhile")
    row("daemon dead", duration_text(dead.length_s), f"bridged: {dead.steps:,} steps meanwhile")
    shown.add_section()
    row(
        "test accuracy",
        f"{report.accuracy[1]:.1%}",
        f"{report.accuracy[0]:.1%} after the first step; "
        f"loss {report.loss[0]:.2f} → {report.loss[1]:.2f}",
    )
    return shown


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest of the values that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def duration_text(seconds: float) -> str:
    """Return 0 s, 4.2 µs, 380 µs, 21 ms, 9.8 s."""
    if seconds == 0:
        return "0 s"
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
    unit_s, name = next((each for each in units if seconds >= each[0]), units[-1])
    value = seconds / unit_s
    return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"


def _places(places: Sequence[Place]) -> str:
    """Return where to look, if there is something to look for."""
    first = [f"{key} at step {step}" for key, step in places[:PLACES_SHOWN_MAX]]
    return ", ".join([*first, "..."] if len(places) > PLACES_SHOWN_MAX else first)
