"""The table of `status`: one line per run. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow_relay_daemon.commands._table import Cell, Column, lay_out
from mlflow_relay_daemon.commands._trends import Trends, sparkline
from mlflow_relay_daemon.words import age_text, bytes_text, count_text

if TYPE_CHECKING:
    from rich.text import Text

ERROR_COLUMN_WIDTH_MIN = 110  # narrower terminals read the errors below the table
STATE_STYLES = {"running": "green", "waiting": "yellow", "ending": "yellow", "blocked": "bold red",
                "ended": "dim"}  # fmt: skip


def run_lines(
    status: dict[str, Any], width: int | None, trends: Trends | None = None
) -> list[Text]:
    """Return a heading and one line per run. Args: trends: adds rates and backlogs."""
    columns = [
        Column("NAME", least=8), Column("RUN"), Column("STATE"), Column("RANKS", right=True),
        Column("ACCEPTED", right=True), Column("DELIVERED", right=True),
        Column("WAITING", right=True), Column("OLDEST", right=True), Column("DEAD", right=True),
    ]  # fmt: skip
    with_error = width is None or width >= ERROR_COLUMN_WIDTH_MIN
    if with_error:
        columns.append(Column("LAST ERROR", least=16))
    rows = [_run_cells(run, status["time_ms"])[: len(columns)] for run in status["runs"]]
    if "nodes" in status:
        columns.insert(0, Column("NODE", least=6))
        rows = [[Cell(run["node"]), *row] for run, row in zip(status["runs"], rows, strict=True)]
    if trends is not None:
        at = len(columns) - with_error
        columns[at:at] = [Column("POINTS/S", right=True), Column("BACKLOG", least=6)]
        for run, row in zip(status["runs"], rows, strict=True):
            trend = trends.of(run["run_id"])
            rate = trend.points_per_s
            pace = "-" if rate is None else count_text(round(rate))
            row[at:at] = [Cell(pace), Cell(sparkline(trend.waiting))]
    return lay_out(columns, rows, width)


def _run_cells(run: dict[str, Any], time_ms: int) -> list[Cell]:
    waiting = run["waiting_records"] + run["journal_records"]
    amount = f"{count_text(waiting)} {bytes_text(run['waiting_bytes'])}" if waiting else "-"
    oldest = run["oldest_waiting_ms"]
    state = run["state"] if run["state"] != "ended" else run["status"].lower()
    return [
        Cell(run["run_name"] or "-"),
        Cell(run["run_id"][:8]),
        Cell(state, STATE_STYLES.get(run["state"], "")),
        Cell(f"{run['ranks_alive']}/{max(run['ranks_seen'], run['world_size'])}"),
        Cell(count_text(run["accepted_records"])),
        Cell(count_text(run["delivered_records"])),
        Cell(amount),
        Cell(age_text(time_ms - oldest) if oldest is not None else "-"),
        Cell(count_text(run["dead_letters"]), "red" if run["dead_letters"] else ""),
        Cell(run["last_error"] or ""),
    ]
