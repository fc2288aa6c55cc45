"""`mlflow-relay sync`: what never reached a server gets there, once, from anywhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mlflow_relay_daemon.commands._json import print_json
from mlflow_relay_daemon.commands._options import example, with_config
from mlflow_relay_daemon.commands._sync_report import (
    as_object,
    exit_code,
    reporter,
    summary_lines,
    table_lines,
    trouble_lines,
)
from mlflow_relay_daemon.commands._terminal import print_lines, stdout_width
from mlflow_relay_daemon.config import Config, ConfigError
from mlflow_relay_daemon.exits import USAGE, CommandError

if TYPE_CHECKING:
    from mlflow_relay_daemon.sync.engine import Engine, Outcome
    from mlflow_relay_daemon.sync.one_run import Server

PATIENCE_S = 300.0
PREFIX_CHARACTERS_MIN = 4


@click.command(
    epilog=(
        "A SOURCE is a spool, a folder of spools, an mlruns folder, an mlflow.db, a folder with "
        "one of these in it, or the address of an MLflow server. It is only read. Called again, it "
        "sends only what may be missing. Exit codes: 0 all is there, 1 something failed (it is "
        "named), 64 usage, 75 the server was away for too long, 78 bad configuration.\n\n"
        + example(
            "mlflow-relay sync /scratch/me/spools --tracking-uri http://mlflow.example.org:5000",
            "mlflow-relay sync mlruns mlflow.db --run 046f8812 --dry-run",
        )
    )
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "--run", "names", multiple=True, metavar="RUN",
    help="Only this run: an id, the first characters of one, or a name; repeatable.",
)  # fmt: skip
@click.option("--experiment-name", metavar="NAME", help="For all runs, instead of their own.")
@click.option("--include-deleted", is_flag=True, help="Deleted runs of MLflow's stores, too.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
@click.option(
    "--jobs", type=click.IntRange(1, 64), default=4, show_default=True,
    help="Runs that are brought side by side.",
)  # fmt: skip
@click.option(
    "--patience", "patience_s", type=click.FloatRange(min=0), default=PATIENCE_S,
    metavar="SECONDS", help="Give up when the server is away for so long.  [300]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@with_config("tracking_uri", "request_timeout_s")
def sync(
    config: Config,
    *,
    sources: tuple[str, ...],
    names: tuple[str, ...],
    experiment_name: str | None,
    include_deleted: bool,
    dry_run: bool,
    jobs: int,
    patience_s: float,
    as_json: bool,
) -> None:
    """Bring spools and other stores' runs to a server.

    Each run comes once, whatever is interrupted, repeated, or done from two machines at once; links
    between runs are told in whatever order they come.
    """
    from mlflow_relay_daemon.sync.engine import Engine

    begun_s = time.monotonic()
    outcomes, errors = _gather(
        sources, names, experiment_name, include_deleted=include_deleted, config=config
    )
    server = _open_server(config, jobs)
    engine = Engine(server, outcomes, jobs=jobs, patience_s=patience_s)
    if dry_run:
        _look(engine, outcomes)
    elif outcomes:
        with reporter(outcomes) as report:
            engine.run(report)
    code = exit_code(outcomes, errors, engine.gave_up)
    if as_json:
        print_json(as_object(outcomes, errors, dry_run=dry_run, code=code))
    else:
        print_lines(table_lines(outcomes, stdout_width()))
        for line in summary_lines(outcomes, errors, time.monotonic() - begun_s, dry_run=dry_run):
            click.echo(line)
        for line in trouble_lines(outcomes, errors, engine.gave_up):
            click.echo(f"mlflow-relay: {line}", err=True)
    server.stores.close()
    server.sink.close()
    click.get_current_context().exit(code)


# --- gather -----------------------------------------------------------------------------------


def _gather(
    sources: tuple[str, ...],
    names: tuple[str, ...],
    experiment_name: str | None,
    *,
    include_deleted: bool,
    config: Config,
) -> tuple[list[Outcome], list[str]]:
    """Return the runs that are meant, and why others cannot be read.

    Raises: CommandError: there is nothing to bring.
    """
    from mlflow_relay_daemon.importers.recognise import recognise
    from mlflow_relay_daemon.sinks.redact import redact_uri
    from mlflow_relay_daemon.sync.engine import Outcome
    from mlflow_relay_daemon.sync.source import SourceError

    stores, found = recognise(sources, timeout_s=config.request_timeout_s)
    if any(each.uri == redact_uri(config.tracking_uri).rstrip("/") for each in stores.servers):
        raise CommandError("the source is the destination itself: name another one", USAGE)
    errors = [str(error) for error in found]
    outcomes = []
    for run in stores.runs(include_deleted=include_deleted, experiment_name=experiment_name):
        if isinstance(run, SourceError):
            errors.append(str(run))
        else:
            outcomes.append(Outcome(run))
    outcomes = _selected(outcomes, names)
    for outcome in outcomes:
        try:
            outcome.size = outcome.source.size()
        except (SourceError, OSError):
            outcome.size.records = 0  # bringing it will say why
    if len(errors) == 1 and not outcomes:
        raise CommandError(errors[0])
    return outcomes, errors


def _selected(outcomes: list[Outcome], names: tuple[str, ...]) -> list[Outcome]:
    """Return the runs that are named. Raises: CommandError: one is not there."""
    if not names:
        return outcomes
    chosen: list[Outcome] = []
    for name in names:
        meant = [each for each in outcomes if _is_meant(each, name)]
        if not meant:
            raise CommandError(f"the sources hold no run {name!r}: see --dry-run", USAGE)
        if len({each.source.card.run_id for each in meant}) > 1:
            ids = ", ".join(sorted({each.source.card.run_id[:12] for each in meant})[:6])
            raise CommandError(f"{name!r} fits several runs: {ids}: give more of the id", USAGE)
        chosen += [each for each in meant if each not in chosen]
    return chosen


def _is_meant(outcome: Outcome, name: str) -> bool:
    from mlflow_relay_daemon.lane.destination import SOURCE_TAG

    card = outcome.source.card
    ids = (card.run_id, card.tags.get(SOURCE_TAG, ""))
    wanted = name.lower()
    is_prefix = len(wanted) >= PREFIX_CHARACTERS_MIN and any(
        each.startswith(wanted) for each in ids
    )
    return is_prefix or card.run_name == name


def _open_server(config: Config, jobs: int) -> Server:
    """Return the server, once it has answered. Raises: CommandError: it does not."""
    from mlflow_relay_daemon.artifacts.helper_client import Helper
    from mlflow_relay_daemon.artifacts.stores import Stores
    from mlflow_relay_daemon.lane.links import LineageParams
    from mlflow_relay_daemon.retry import Breaker
    from mlflow_relay_daemon.sinks import SinkError
    from mlflow_relay_daemon.sinks.open import open_sink
    from mlflow_relay_daemon.sinks.rest import RestSink
    from mlflow_relay_daemon.sync.one_run import Server

    if config.origin["tracking_uri"] == "default":
        raise ConfigError("no server is named: give --tracking-uri, or set MLFLOW_TRACKING_URI")
    try:
        sink = open_sink(config.tracking_uri, timeout_s=config.request_timeout_s)
        sink.ping()
    except (ValueError, SinkError) as error:
        raise CommandError(str(error)) from None
    names = LineageParams(config.lineage_params or (), config.lineage_fork_params or ())
    stores = Stores(
        config.tracking_uri,
        is_direct=isinstance(sink, RestSink),
        helper=Helper(config.tracking_uri, jobs),
    )
    return Server(sink, Breaker(cap_s=config.retry_wait_s_max), names, stores)


def _look(engine: Engine, outcomes: Sequence[Outcome]) -> None:
    """Find out what is there, and change nothing."""
    from mlflow_relay_daemon.retry import Stopped
    from mlflow_relay_daemon.sinks import SinkError

    for outcome in outcomes:
        try:
            outcome.state = engine.look(outcome)
        except (SinkError, Stopped) as error:
            outcome.state, outcome.error = "failed", str(error)
