"""`mlflow-relay lineage`: the tree of resumes and forks of a run, and links by hand."""

from __future__ import annotations

from typing import Any

import click

from mlflow_relay.lineage import run_id as checked_run_id
from mlflow_relay_daemon.commands._family import Family, Member, everyone, in_order, top_of
from mlflow_relay_daemon.commands._gather import gather
from mlflow_relay_daemon.commands._json import SCHEMA_VERSION, print_json
from mlflow_relay_daemon.commands._options import (
    PLACE,
    example,
    help_without_command,
    with_config,
)
from mlflow_relay_daemon.commands._select import fitting_runs, select_run
from mlflow_relay_daemon.commands._terminal import fold, stdout_width
from mlflow_relay_daemon.commands._tree import SHORT_ID, Words, print_tree
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.control_client import ControlClient, DaemonRefused, NoDaemon
from mlflow_relay_daemon.exits import CommandError
from mlflow_relay_daemon.words import one_line

Run = dict[str, Any]
Status = dict[str, Any]

#: A server that answers slowly must not keep an operator from what the spool knows.
SERVER_TIMEOUT_S = 3.0
#: The daemon takes so many ids at once (lane.relatives.IDS_MAX).
IDS_ASKED_MAX = 10


class RunOrCommand(click.Group):
    """A group whose first word may be a run: `lineage o96` is `lineage show o96`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *self.get_help_option_names(ctx)):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=RunOrCommand,
    invoke_without_command=True,
    subcommand_metavar="RUN | COMMAND [ARGS]...",
    epilog=example(
        "mlflow-relay lineage o96",
        "mlflow-relay lineage link 1a2b3c4d 5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b",
        "mlflow-relay lineage drop 1a2b3c4d",
    ),
)
@click.pass_context
def lineage(ctx: click.Context) -> None:
    """Draw the tree of resumes and forks of a run.

    RUN is an id, the first characters of one, or a run name; `lineage RUN` is short for
    `lineage show RUN`. A link to a run that nobody knows yet waits; by hand it is decided with
    `link` and `drop`.
    """
    help_without_command(ctx)


@lineage.command(epilog=example("mlflow-relay lineage show o96 --json | jq '.tree.children[]'"))
@click.argument("name", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print the tree as JSON.")
@with_config(*PLACE)
def show(config: Config, name: str, as_json: bool) -> None:
    """Draw the tree that RUN belongs to.

    With or without a daemon. Runs outside this spool are shown by their id, and with a name where
    the daemon can ask the server.
    """
    view = gather(config)
    if view.note:
        click.echo(f"mlflow-relay: {view.note}", err=True)
    runs = view.status["runs"]
    family = Family(runs)
    chosen = _find(family, runs, name)
    relatives = _ask_server(config, view.status, chosen)
    if relatives:
        family = Family(runs, relatives)
        chosen = family.at(chosen.name)
    root = top_of(chosen)
    if as_json:
        body = {"schema_version": SCHEMA_VERSION, "id": chosen.name, "tree": as_dict(root)}
        print_json(body)
        return
    words = Words(family, chosen, server_was_asked=relatives is not None)
    print_tree(words.tree(root))
    for line in words.notes(root):
        for folded in fold(line, stdout_width(), "  "):
            click.echo(folded)


@lineage.command(
    epilog="Exit code: 0 linked, or linked as soon as PARENT is known; 1 nothing of CHILD waits; "
    "69 no daemon.\n\n" + example("mlflow-relay lineage link o96-cont 1a2b3c4d")
)
@click.argument("child", metavar="CHILD")
@click.argument("parent", metavar="PARENT")
@click.option("--fork", "is_fork", is_flag=True, help="PARENT is what CHILD is a fork of.")
@with_config("socket")
def link(config: Config, child: str, parent: str, is_fork: bool) -> None:
    """Name the run that a waiting link of CHILD goes to.

    PARENT is an MLflow run id, a relay run id, or a run of this spool by name or first characters.
    """
    with ControlClient(config.socket) as client:
        runs = client.status()["runs"]
        run = select_run(runs, child)
        to = _identifier(runs, parent)
        [decided] = client.link(run["run_id"], to, "fork" if is_fork else None)
    what = "is a fork of" if decided["kind"] == "fork" else "resumes"
    click.echo(
        f"{_named(run)} {what} {decided['to']} now (was {decided['asked']}): MLflow is told as "
        f"soon as that run is known, `mlflow-relay lineage {run['run_id'][:SHORT_ID]}` shows it"
    )


@lineage.command(
    epilog="Exit code: 0 given up; 1 nothing of CHILD waits; 69 no daemon.\n\n"
    + example("mlflow-relay lineage drop o96-cont")
)
@click.argument("child", metavar="CHILD")
@with_config("socket")
def drop(config: Config, child: str) -> None:
    """Give up the waiting links of CHILD.

    It is then what it would be without them: a run of its own.
    """
    with ControlClient(config.socket) as client:
        run = select_run(client.status()["runs"], child)
        decided = client.drop_links(run["run_id"])
    for each in decided:
        what = "fork of" if each["kind"] == "fork" else "resume of"
        click.echo(f"{_named(run)}: its link as {what} {each['asked']} is given up")


# --- gather -----------------------------------------------------------------------------------


def _find(family: Family, runs: list[Run], name: str) -> Member:
    """Return the run that is meant: one of the spool, or one that these go back to.

    A resume takes its parent's name: where several of one tree fit, the oldest stands for it.
    """
    strangers = [
        {"run_id": each.name, "mlflow_run_id": each.mlflow_run_id} for each in family.strangers()
    ]
    found = [family.at(run["run_id"]) for run in fitting_runs([*runs, *strangers], name)]
    if len({id(top_of(each)) for each in found}) == 1:
        return in_order(found)[0]
    return family.at(select_run([*runs, *strangers], name)["run_id"])


def _ask_server(config: Config, status: Status, chosen: Member) -> list[Run] | None:
    """Return what the server knows of the tree's runs; None: it could not be asked."""
    if status["daemon"] is None or status["server"] is None or status["server"]["state"] != "up":
        return None
    root = top_of(chosen)
    ids = [each.mlflow_run_id for each in (root, chosen) if each.mlflow_run_id]
    ids += [each.name for each in everyone(root) if not each.is_known]
    ids = list(dict.fromkeys(ids))[:IDS_ASKED_MAX]
    if not ids:
        return []
    try:
        with ControlClient(config.socket, SERVER_TIMEOUT_S) as client:
            return client.relatives(ids)
    except (DaemonRefused, NoDaemon):
        click.echo(
            "mlflow-relay: the server does not answer; shown is what the spool knows",
            err=True,
        )
        return None


def _identifier(runs: list[Run], parent: str) -> str:
    """Return the id that an operator means: a whole one, known here or not, or a run of ours."""
    try:
        return checked_run_id("PARENT", parent)
    except ValueError as no_id:
        try:
            run_id: str = select_run(runs, parent)["run_id"]
        except CommandError as error:
            raise CommandError(f"{error}; {no_id}", error.exit_code) from None
        return run_id


# --- print ------------------------------------------------------------------------------------


def as_dict(member: Member) -> dict[str, Any]:
    """Return a run of the tree, and all beneath it, for --json. Pure."""
    return {
        "id": member.name,
        "run_id": member.run_id,
        "mlflow_run_id": member.mlflow_run_id,
        "run_name": member.run_name,
        "status": member.status,
        "here": member.is_here,
        "known": member.is_known,
        "link": member.link,
        "resumes": member.resumes,
        "resume_mode": member.resume_mode if member.resumes else None,
        "forks": member.forks,
        "waits_for": member.waits_for,
        "dropped": member.dropped,
        "mention": member.is_mention,
        "url": member.url,
        "children": [as_dict(child) for child in in_order(member.children)],
    }


def _named(run: Run) -> str:
    return f"{one_line(run['run_name'] or 'run')} {run['run_id'][:SHORT_ID]}"
