"""`mlflow-relay url`: the MLflow page of a run, or the compare page of several."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import click

from mlflow_relay_daemon.commands._gather import gather
from mlflow_relay_daemon.commands._options import PLACE, example, with_config
from mlflow_relay_daemon.commands._select import select_runs
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.exits import DEGRADED, CommandError
from mlflow_relay_daemon.words import one_line

Run = dict[str, Any]


@click.command(
    epilog=example(
        "mlflow-relay url 1a2b3c4d", "mlflow-relay url o96 n320 --base https://mlflow.example.org"
    )
)
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
@click.option("--base", metavar="URL", help="Address of MLflow's pages, if it is not that of its "
              "API.")  # fmt: skip
@with_config(*PLACE, "tracking_uri")
def url(config: Config, names: tuple[str, ...], base: str | None) -> None:
    """Print the MLflow page of a run, or of several compared.

    RUN is an id, the first characters of one, or a run name.
    """
    view = gather(config)
    chosen = select_runs(view.status["runs"], names)
    given = config.origin["tracking_uri"] == "flag --tracking-uri"
    daemon = view.status["daemon"]
    uri = daemon["tracking_uri"] if daemon and not given else config.tracking_uri
    if base is None and len(chosen) == 1 and chosen[0]["url"] and not given:
        click.echo(one_line(chosen[0]["url"]))
        return
    click.echo(page_url(base or uri, chosen))


def page_url(base: str, runs: list[Run]) -> str:
    """Return the page of one run, or the page that compares several. Pure.

    Raises:  CommandError: a run is not in MLflow yet, or the store has no pages.
    Source:  getRunPageRoute and getCompareRunPageRoute of MLflow 3.17's user interface.
    """
    root = pages_root(base)
    for run in runs:
        if run["mlflow_run_id"] is None or run["experiment_id"] is None:
            raise CommandError(
                f"{one_line(run['run_name'] or 'run')} {run['run_id'][:8]} is not in MLflow yet: "
                "`mlflow-relay status` says what it waits for",
                DEGRADED,
            )
    if len(runs) == 1:
        experiment, run_id = runs[0]["experiment_id"], runs[0]["mlflow_run_id"]
        return f"{root}/#/experiments/{quote(experiment, safe='')}/runs/{quote(run_id, safe='')}"
    experiments = list(dict.fromkeys(run["experiment_id"] for run in runs))
    return (
        f"{root}/#/compare-runs?runs={_json_quoted([run['mlflow_run_id'] for run in runs])}"
        f"&experiments={_json_quoted(experiments)}"
    )


def pages_root(base: str) -> str:
    """Return the address below which MLflow's pages are, without name and password. Pure.

    Raises:  CommandError: it is no http(s) address.
    """
    parts = urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        shown = parts.scheme or "this store"
        raise CommandError(
            f"a {shown} store has no pages: start `mlflow server` on it, and name that with --base",
            DEGRADED,
        )
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def _json_quoted(values: list[str]) -> str:
    # JSON.stringify of the browser puts no blanks.
    return quote(json.dumps(values, separators=(",", ":")), safe="")
