"""`mlflow-relay dead-letters`: the records that MLflow refused for good."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mlflow_relay_daemon.commands._json import SCHEMA_VERSION, print_json
from mlflow_relay_daemon.commands._options import example, help_without_command, with_config
from mlflow_relay_daemon.commands._select import select_run
from mlflow_relay_daemon.commands._terminal import print_lines, stdout_width
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.control_client import ControlClient
from mlflow_relay_daemon.exits import DEGRADED
from mlflow_relay_daemon.words import date_text, plural

if TYPE_CHECKING:
    from rich.text import Text

Letter = dict[str, Any]
Function = Callable[..., Any]


@click.group(
    "dead-letters",
    invoke_without_command=True,
    epilog=example(
        "mlflow-relay dead-letters list --run o96", "mlflow-relay dead-letters retry --run o96"
    ),
)
@click.pass_context
def dead_letters(ctx: click.Context) -> None:
    """List, retry or drop refused records.

    A record that MLflow refuses for good is kept with the reason, and the rest goes on.
    """
    help_without_command(ctx)


def _chosen(function: Function) -> Function:
    """Give a command the options that choose letters."""
    for option in (
        click.option(
            "--id", "ids", multiple=True, metavar="ID", help="Only this one of --run; repeatable."
        ),
        click.option("--run", "name", metavar="RUN", help="Only those of this run."),
    ):
        function = option(function)
    return function


@dead_letters.command("list", epilog=example("mlflow-relay dead-letters list --json"))
@_chosen
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
@with_config("socket")
def list_(config: Config, name: str | None, ids: tuple[str, ...], as_json: bool) -> None:
    """List what was refused, and why."""
    with ControlClient(config.socket) as client:
        letters = _gather(client, name, ids)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "dead_letters": letters})
    elif not letters:
        click.echo("no dead letters")
    else:
        print_lines(letter_lines(letters, stdout_width()))


@dead_letters.command(epilog=example("mlflow-relay dead-letters retry --run o96"))
@_chosen
@click.option("--json", "as_json", is_flag=True, help="Print the count as JSON.")
@with_config("socket")
def retry(config: Config, name: str | None, ids: tuple[str, ...], as_json: bool) -> None:
    """Offer them to MLflow once more, after what it minded is mended.

    Waits for MLflow's answer. Those that are refused again stay; the exit code is 1 then.
    """
    with ControlClient(config.socket) as client:
        letters = _gather(client, name, ids)
        count = _act(client, "retry", letters)
    refused = len(letters) - count
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "count": count, "refused": refused})
    elif not letters:
        click.echo("no dead letters")
    else:
        click.echo(f"{plural(count, 'record')} delivered, {refused:,} refused again")
    if refused:
        click.get_current_context().exit(DEGRADED)


@dead_letters.command(epilog=example("mlflow-relay dead-letters drop --run o96 --yes"))
@_chosen
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print the count as JSON.")
@with_config("socket")
def drop(config: Config, name: str | None, ids: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Forget them for ever."""
    with ControlClient(config.socket) as client:
        letters = _gather(client, name, ids)
        if letters and not yes and not _agreed(letters):
            click.get_current_context().exit(DEGRADED)
        # Only what was shown: one that arrives while the question stands is not dropped unseen.
        count = _act(client, "drop", letters)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "count": count})
    else:
        click.echo(f"{plural(count, 'record')} dropped" if count else "no dead letters")


# --- gather -----------------------------------------------------------------------------------


def _gather(client: ControlClient, name: str | None, ids: tuple[str, ...]) -> list[Letter]:
    if ids and name is None:
        raise click.UsageError("an --id counts within its run: name that with --run")
    run = select_run(client.status()["runs"], name)["run_id"] if name is not None else None
    letters: list[Letter] = client.dead_letters("list", run)["dead_letters"]
    if not ids:
        return letters
    known = {str(letter["id"]) for letter in letters}
    for unknown in (wanted for wanted in ids if wanted not in known):
        raise click.UsageError(f"no dead letter has the id {unknown!r}")
    return [letter for letter in letters if str(letter["id"]) in ids]


def _act(client: ControlClient, action: str, letters: list[Letter]) -> int:
    count = 0
    for run in dict.fromkeys(letter["run_id"] for letter in letters):
        ids = [letter["id"] for letter in letters if letter["run_id"] == run]
        count += int(client.dead_letters(action, run, ids)["count"])
    return count


def _agreed(letters: list[Letter]) -> bool:
    runs = len({letter["run_id"] for letter in letters})
    if not sys.stdin.isatty():
        raise click.UsageError("nobody is there to be asked: say --yes to drop them")
    question = f"Drop {plural(len(letters), 'record')} of {plural(runs, 'run')} for ever?"
    return click.confirm(question, err=True)


# --- print ------------------------------------------------------------------------------------


def letter_lines(letters: list[Letter], width: int | None) -> list[Text]:
    """Return a heading and one line per letter. Pure."""
    from mlflow_relay_daemon.commands._table import Cell, Column, lay_out

    columns = [
        Column("RUN"), Column("ID", least=4), Column("KIND"), Column("KEY", least=8),
        Column("VALUE", least=6), Column("STEP", right=True), Column("REFUSED"),
        Column("REASON", least=16),
    ]  # fmt: skip
    rows = [
        [
            Cell(letter["run_id"][:8]),
            Cell(str(letter["id"])),
            Cell(str(letter["kind"])),
            Cell(str(letter["key"])),
            Cell(str(letter["value"])),
            Cell("-" if letter["step"] is None else str(letter["step"])),
            Cell(date_text(letter["refused_ms"], "%m-%d %H:%M")),
            Cell(f"{letter['error_code'] or ''} {letter['reason'] or ''}".strip()),
        ]
        for letter in letters
    ]
    return lay_out(columns, rows, width)
