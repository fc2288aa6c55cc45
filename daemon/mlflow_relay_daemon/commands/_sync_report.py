"""What `mlflow-relay sync` tells: while it works, and in the end. Pure but for the printing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mlflow_relay_daemon.commands._json import SCHEMA_VERSION
from mlflow_relay_daemon.exits import DEGRADED, DONE, TIME_RAN_OUT
from mlflow_relay_daemon.words import bytes_text, count_text, one_line, plural

if TYPE_CHECKING:
    from rich.text import Text

    from mlflow_relay_daemon.sync.engine import Outcome

REPORT_PERIOD_S = 5.0


# --- judge ------------------------------------------------------------------------------------


def exit_code(outcomes: Sequence[Outcome], errors: Sequence[str], gave_up: str) -> int:
    """Return the exit code. Pure."""
    if gave_up:
        return TIME_RAN_OUT
    if errors or any(each.state == "failed" or each.refused for each in outcomes):
        return DEGRADED
    return DONE


def as_object(
    outcomes: Sequence[Outcome], errors: Sequence[str], *, dry_run: bool, code: int
) -> dict[str, Any]:
    """Return the stable contract of --json. Pure."""
    return {
        "schema_version": SCHEMA_VERSION,
        "dry_run": dry_run,
        "exit_code": code,
        "runs": [_run_object(each) for each in outcomes],
        "errors": list(errors),
    }


def _run_object(outcome: Outcome) -> dict[str, Any]:
    card, one = outcome.source.card, outcome.one
    letters = one.refusals.list() if one is not None else []
    return {
        "run_id": card.run_id,
        "kind": outcome.source.kind,
        "source": outcome.source.where,
        "run_name": card.run_name,
        "experiment_name": card.experiment_name,
        "mlflow_run_id": card.mlflow_run_id,
        "state": outcome.state,
        "new": bool(one is not None and one.is_new),
        "records": outcome.size.records,
        "uploaded_files": one.uploaded_files if one is not None else 0,
        "sent_points": one.sent_points if one is not None else 0,
        "refused": outcome.refused,
        "refusals": [
            {"kind": each.kind, "key": each.key, "step": each.step, "reason": each.reason}
            for each in letters
        ],
        "waits_for": outcome.waits_for,
        "notes": list(outcome.source.notes),
        "error": outcome.error or None,
        "seconds": round(outcome.seconds, 3),
    }


# --- print ------------------------------------------------------------------------------------


def table_lines(outcomes: Sequence[Outcome], width: int | None) -> list[Text]:
    """Return a heading and one line per run. Pure."""
    from mlflow_relay_daemon.commands._table import Cell, Column, lay_out

    if not outcomes:
        return []
    columns = [
        Column("RUN"), Column("NAME", least=8), Column("EXPERIMENT", least=6), Column("FROM"),
        Column("MLFLOW RUN"), Column("THERE", right=True), Column("SENT", right=True),
        Column("STATE"),
    ]  # fmt: skip
    styles = {"failed": "red", "done": "green"}
    rows = [
        [
            Cell(each.source.card.run_id[:8]),
            Cell(each.source.card.run_name or "-"),
            Cell(each.source.card.experiment_name or "-"),
            Cell(each.source.kind),
            Cell((each.source.card.mlflow_run_id or "-")[:8]),
            Cell(count_text(each.size.records)),
            Cell(count_text(each.one.sent_points if each.one is not None else 0)),
            Cell(each.state, styles.get(each.state, "")),
        ]
        for each in outcomes
    ]
    return lay_out(columns, rows, width)


def summary_lines(
    outcomes: Sequence[Outcome], errors: Sequence[str], took_s: float, *, dry_run: bool
) -> list[str]:
    """Return what was done in all. Pure."""
    if dry_run:
        return [f"dry run: {plural(len(outcomes), 'run')} found, nothing was changed"]
    done = sum(each.state == "done" for each in outcomes)
    sent = sum(each.one.sent_points for each in outcomes if each.one is not None)
    rate = f", {sent / took_s:,.0f} a second" if sent and took_s >= 1 else ""
    words = [f"{done} of {plural(len(outcomes), 'run')} there"]
    files = sum(each.one.uploaded_files for each in outcomes if each.one is not None)
    words += [f"{plural(files, 'file')} uploaded"] if files else []
    words += [
        f"{plural(sent, 'point')} sent in {took_s:.1f} s{rate}" if sent else "nothing to send"
    ]
    return ["; ".join(words)]


def trouble_lines(outcomes: Sequence[Outcome], errors: Sequence[str], gave_up: str) -> list[str]:
    """Return what people should know: one line for each thing. Pure."""
    lines = [one_line(error) for error in errors]
    if gave_up:
        lines.append(f"given up, call it again: {one_line(gave_up)}")
    for each in outcomes:
        name = f"run {each.source.card.run_id[:8]}"
        if each.error and each.error != gave_up:
            lines.append(f"{name}: {each.state}: {one_line(each.error)}")
        if each.refused and each.one is not None:
            first = each.one.refusals.list()[0]
            lines.append(
                f"{name}: MLflow refused or cut {plural(each.refused, 'entry')}, the first: "
                f"{first.kind} {one_line(first.key)}: {one_line(first.reason)}"
            )
        if each.waits_for:
            ids = ", ".join(id_[:8] for id_ in each.waits_for[:3])
            lines.append(f"{name}: waits for run {ids}: its link is told when that is synced")
        lines += [f"{name}: {one_line(note)}" for note in each.source.notes]
    return lines


# --- while it works ---------------------------------------------------------------------------


@contextmanager
def reporter(outcomes: Sequence[Outcome]) -> Iterator[Callable[[], None]]:
    """Yield what shows progress on stderr: a bar on a terminal, a line now and then elsewhere."""
    total = sum(each.size.records for each in outcomes)
    if sys.stderr.isatty():
        with _bar(outcomes, total) as report:
            yield report
        return
    next_s = time.monotonic() + REPORT_PERIOD_S

    def report_line() -> None:
        nonlocal next_s
        if time.monotonic() < next_s:
            return
        next_s = time.monotonic() + REPORT_PERIOD_S
        records, size, runs = _done(outcomes)
        click.echo(
            f"syncing: {records:,} of {plural(total, 'record')}, {bytes_text(size)}, "
            f"{runs} of {plural(len(outcomes), 'run')}",
            err=True,
        )

    yield report_line


def _done(outcomes: Sequence[Outcome]) -> tuple[int, int, int]:
    """Return records and bytes that are there, and runs that are over."""
    records = size = runs = 0
    for each in outcomes:
        is_over = each.state not in ("waiting", "syncing")
        there = each.size if is_over else each.source.done()
        records, size, runs = records + there.records, size + there.bytes, runs + is_over
    return records, size, runs


@contextmanager
def _bar(outcomes: Sequence[Outcome], total: int) -> Iterator[Callable[[], None]]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("syncing"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[more]}"),
        progress.TimeRemainingColumn(),
    )
    begun_s = time.monotonic()
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total or None, more="")

        def report() -> None:
            records, size, runs = _done(outcomes)
            rate = records / max(time.monotonic() - begun_s, 0.1)
            more = f"{count_text(round(rate))}/s {bytes_text(size)} {runs}/{len(outcomes)} runs"
            bar.update(task, completed=records, more=more)

        yield report
