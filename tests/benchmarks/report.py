"""Figures → docs/benchmarks.md and its plots; and to the terminal. The page says what the JSON says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from tests.benchmarks.bench import OWN
from tests.benchmarks.outcome import Cell, Outcome, Plot, Table, Target, from_json


def as_text(outcome: Outcome) -> str:
    """Return an outcome for a terminal."""
    parts = [_table(table) for table in outcome.tables]
    parts += [
        f"{_mark(each)} {each.what}: {cell(each.value)} {each.unit} ({each.bound}) {each.beside}"
        for each in outcome.targets
    ]
    parts += [f"skipped: {each}" for each in outcome.skipped]
    return "\n".join(parts)


def write(page: Path, found: dict[str, Any]) -> None:
    """Write the page, its JSON beside the plots, and the plots."""
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    outcomes = {name: from_json(each) for name, each in found["cases"].items()}
    for outcome in outcomes.values():
        for plot in outcome.plots:
            _draw(plot, folder / f"{plot.name}.svg")
    page.write_text(_page(found, outcomes, folder.name))


def _page(found: dict[str, Any], outcomes: dict[str, Outcome], folder: str) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    parts = [
        "# Benchmarks",
        (
            "Made by `make bench` from "
            f"[its figures]({folder}/figures.json); not written by hand. One run, {found['took_s']} s, "
            f'size "{found["size"]}", all on one machine: {machine}. What is compared ran by turns.'
        ),
        "## Targets",
        _targets(outcomes),
        "## Where another is ahead",
        _ahead(outcomes),
    ]
    for name, outcome in outcomes.items():
        question = importlib.import_module(f"tests.benchmarks.cases.{name}").__doc__ or name
        parts.append(f"## {question.strip().splitlines()[0]}")
        parts += [_table(table) for table in outcome.tables]
        parts += [f"![{plot.title}]({folder}/{plot.name}.svg)" for plot in outcome.plots]
        parts += [f"Not measured: {each}" for each in outcome.skipped]
    return "\n\n".join(parts) + "\n"


def _targets(outcomes: dict[str, Outcome]) -> str:
    rows: list[list[Cell]] = [
        [
            target.what,
            target.bound,
            f"{cell(target.value)} {target.unit}".strip(),
            _mark(target),
            target.beside,
        ]
        for outcome in outcomes.values()
        for target in outcome.targets
    ]
    return _rows(["what", "target", "measured", "", "of this machine, in the same run"], rows)


def _ahead(outcomes: dict[str, Outcome]) -> str:
    lines = [
        f"- {table.title}: {what}"
        for outcome in outcomes.values()
        for table in outcome.tables
        for what in table.ahead_of(OWN)
    ]
    return "\n".join(lines) or "In no cell of this run."


def _mark(target: Target) -> str:
    return "met" if target.is_met() else "**missed**"


def _table(table: Table) -> str:
    parts = [f"### {table.title}", _rows(table.columns, table.rows)]
    if table.note:
        parts.append(table.note)
    return "\n\n".join(parts)


def _rows(columns: list[str], rows: list[list[Cell]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Cell) -> str:
    """Return a cell's text; numbers with three digits that count."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _draw(plot: Plot, path: Path) -> None:
    """Draw one plot as SVG; equal figures give equal bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = plot.name
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, points in plot.lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    if plot.is_log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
