"""`mlflow-relay runs`: what the spool knows, newest first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mlflow_relay_daemon.commands._gather import gather
from mlflow_relay_daemon.commands._json import SCHEMA_VERSION, print_json
from mlflow_relay_daemon.commands._options import PLACE, example, with_config
from mlflow_relay_daemon.commands._terminal import print_lines, stdout_width
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.words import age_text, count_text, date_text

if TYPE_CHECKING:
    from rich.text import Text

Run = dict[str, Any]

SHORT_ID = 8
FULL_ID = 32


@click.command(epilog=example("mlflow-relay runs", "mlflow-relay runs --full-ids | grep o96"))
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON.")
@click.option("--full-ids", is_flag=True, help="Do not shorten ids.")
@with_config(*PLACE)
def runs(config: Config, as_json: bool, full_ids: bool) -> None:
    """List the runs that the spool knows.

    Newest first, with or without a daemon.
    """
    view = gather(config)
    if view.note:
        click.echo(f"mlflow-relay: {view.note}", err=True)
    newest_first = sorted(view.status["runs"], key=lambda run: run["start_ms"], reverse=True)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "runs": newest_first})
    elif not newest_first:
        click.echo("no runs")
    else:
        length = FULL_ID if full_ids else SHORT_ID
        time_ms = view.status["time_ms"]
        print_lines(run_lines(newest_first, time_ms, length, stdout_width()))


def run_lines(runs: list[Run], time_ms: int, id_length: int, width: int | None) -> list[Text]:
    """Return a heading and one line per run. Pure."""
    from mlflow_relay_daemon.commands._table import Cell, Column, lay_out

    columns = [
        Column("RUN"), Column("NAME", least=8), Column("EXPERIMENT", least=6),
        Column("MLFLOW RUN"), Column("STATUS"), Column("STARTED"),
        Column("LASTED", right=True), Column("RECORDS", right=True),
    ]  # fmt: skip
    rows = []
    for run in runs:
        end_ms = run["end_ms"] if run["end_ms"] is not None else time_ms
        rows.append(
            [
                Cell(run["run_id"][:id_length]),
                Cell(run["run_name"] or "-"),
                Cell(run["experiment_name"] or "-"),
                Cell((run["mlflow_run_id"] or "-")[:id_length]),
                Cell(run["status"].lower()),
                Cell(date_text(run["start_ms"])),
                Cell(age_text(end_ms - run["start_ms"])),
                Cell(count_text(run["accepted_records"])),
            ]
        )
    return lay_out(columns, rows, width)
