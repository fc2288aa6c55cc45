"""`mlflow-relay status`: gather the status object, then print it as JSON or as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlflow_relay_daemon.commands._gather import View, gather
from mlflow_relay_daemon.commands._json import print_json
from mlflow_relay_daemon.commands._options import PLACE, example, with_config
from mlflow_relay_daemon.commands._select import select_runs
from mlflow_relay_daemon.commands._terminal import fold, print_lines, stdout_width
from mlflow_relay_daemon.commands._trends import Trends
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.exits import DEGRADED, DONE
from mlflow_relay_daemon.words import age_text, bytes_text, one_line, plural

if TYPE_CHECKING:
    from rich.text import Text

Status = dict[str, Any]
Run = dict[str, Any]

WATCH_PERIOD_S = 2.0
NAME_SHOWN_MAX = 40  # in a sentence; the table shows more of it where there is room


@click.command(
    epilog="Exit code: 0 all is well, 1 something needs a person (it says what), 78 bad "
    "configuration.\n\n"
    + example(
        "mlflow-relay status",
        "mlflow-relay status --watch 5 --run o96",
        "mlflow-relay status --json | jq '.runs[].waiting_records'",
    )
)
@click.option("--json", "as_json", is_flag=True, help="Print the status object as JSON.")
@click.option(
    "--watch", "period_s", is_flag=False, flag_value=str(WATCH_PERIOD_S), default=None,
    type=click.FloatRange(min=0.1, max=3600), metavar="[SECONDS]",
    help=f"Repeat until Ctrl+C, every {WATCH_PERIOD_S:g} s if nothing else is said.",
)  # fmt: skip
@click.option("--run", "names", multiple=True, metavar="RUN", help="Only this run; repeatable.")
@click.option(
    "--all-nodes", "folder", type=click.Path(path_type=Path), metavar="DIR",
    help="Read the spools of all nodes in this folder of a shared file system.",
)  # fmt: skip
@with_config(*PLACE)
def status(
    config: Config,
    as_json: bool,
    period_s: float | None,
    names: tuple[str, ...],
    folder: Path | None,
) -> None:
    """Show what is accepted, delivered and waiting.

    Without a daemon it shows what the spool holds, and says so. --watch adds the points delivered
    per second and the way of each backlog.
    """

    def look() -> View:
        return _gather_runs(config, names, folder)

    if period_s is not None:
        from mlflow_relay_daemon.commands._watch import watch

        watch(look, draw, period_s, as_json=as_json)
    view = look()
    if view.note:
        click.echo(f"mlflow-relay: {view.note}", err=True)
    if as_json:
        print_json(view.status)
    else:
        print_lines(draw(view, stdout_width()))
    click.get_current_context().exit(DEGRADED if troubles(view.status) else DONE)


def _gather_runs(config: Config, names: tuple[str, ...], folder: Path | None) -> View:
    if folder is None:
        view = gather(config)
    else:
        from mlflow_relay_daemon.commands._all_nodes import merged, read_nodes

        view = View(merged(read_nodes(folder)))
    if not names:
        return view
    runs = select_runs(view.status["runs"], names)
    return View({**view.status, "runs": runs}, view.note)


# --- print ------------------------------------------------------------------------------------


def draw(view: View, width: int | None, trends: Trends | None = None) -> list[Text]:
    """Return a view as lines."""
    return status_lines(view.status, width, trends)


def status_lines(status: Status, width: int | None, trends: Trends | None = None) -> list[Text]:
    """Return the status as lines of at most `width` columns: header, one line per run, troubles.

    Args: trends: of a status that is shown again and again.
    """
    from rich.text import Text

    from mlflow_relay_daemon.commands._run_table import ERROR_COLUMN_WIDTH_MIN, run_lines

    lines = [Text(line) for text in header(status) for line in fold(text, width, " " * 8)]
    lines.append(Text())
    if status["runs"]:
        lines += run_lines(status, width, trends)
    else:
        lines.append(Text("no runs"))
    below = [(f"! {trouble}", "red") for trouble in troubles(status)]
    below += [(f"- {wait}", "") for wait in waiting_links(status)]
    below += [(f"- {wait}", "") for wait in waiting_artifacts(status)]
    if width is not None and width < ERROR_COLUMN_WIDTH_MIN:
        below += [(f"- {error}", "") for error in passing_errors(status)]
    if below:
        lines.append(Text())
    for words, style in below:
        lines += [Text(line, style=style) for line in fold(words, width, "  ")]
    return lines


def header(status: Status) -> list[str]:
    """Return what is known of daemon, server and disk, one sentence each."""
    if "nodes" in status:
        from mlflow_relay_daemon.commands._all_nodes import node_lines

        return [*node_lines(status), f"disk    {_disk_words(status['disk'])}"]
    return [
        f"daemon  {_daemon_words(status)}",
        f"server  {_server_words(status)}",
        f"disk    {_disk_words(status['disk'])}",
    ]


def _daemon_words(status: Status) -> str:
    daemon = status["daemon"]
    if daemon is None:
        return "not running"
    age = age_text(status["time_ms"] - daemon["started_ms"])
    sessions = plural(daemon["sessions_open"], "rank")
    memory = bytes_text(daemon["memory_bytes"])
    return (
        f"up for {age}, {sessions} attached, {memory} memory, {daemon['cpu_s']:.0f} s CPU, "
        f"pid {daemon['pid']}, version {daemon['version']}"
    )


def _server_words(status: Status) -> str:
    server, daemon = status["server"], status["daemon"]
    if server is None:
        return "not asked: there is no daemon"
    uri = one_line(daemon["tracking_uri"]) if daemon else "MLflow"
    since = age_text(status["time_ms"] - server["since_ms"])
    if server["state"] == "offline":
        return "offline: everything stays in the spool until `mlflow-relay sync`"
    if server["state"] == "unknown":
        return f"{uri} not tried yet"
    if server["state"] == "up":
        return f"{uri} up for {since}"
    words = f"{uri} down for {since}: {one_line(server['last_error'] or 'no reason known')}"
    if server["next_try_ms"] is not None:
        words += f"; next try in {age_text(server['next_try_ms'] - status['time_ms'])}"
    return words


def _disk_words(disk: dict[str, Any]) -> str:
    quota = disk["spool_bytes_max"]
    words = f"{bytes_text(disk['spool_bytes'])} in the spool"
    staged = disk.get("staged_bytes")  # an older daemon does not know of it
    words += f", {bytes_text(staged)} staged" if staged else ""
    words += f" (quota {bytes_text(quota)})" if quota is not None else ""
    words += f", {bytes_text(disk['free_bytes'])} free"
    return ("FULL: " if disk["full"] else "") + words


# --- judge ------------------------------------------------------------------------------------


def troubles(status: Status) -> list[str]:
    """Return what needs a person, one line each with the mend; empty: all is well."""
    found = []
    server = status["server"]
    if server is not None and server["state"] == "down":
        found.append(
            f"the server is down ({one_line(server['last_error'] or 'no reason known')}): nothing "
            "is lost, delivery goes on by itself when it is back; `mlflow-relay check` tests it"
        )
    if not (status["daemon"] or {}).get("accepts_ranks", True):  # an older one does not say
        found.append(
            "the daemon is short of file descriptors: ranks that come now wait, and their journals "
            "hold what they log; raise its limit (LimitNOFILE= of the unit, ulimit -Hn)"
        )
    if status["disk"]["full"]:
        found.append(
            "the spool's disk is full or its quota is reached: journals hold what ranks log; free "
            "some space, or raise spool_bytes_max"
        )
    counters = status["counters"]
    if counters["fsync_failures"]:
        found.append(
            f"{plural(counters['fsync_failures'], 'fsync')} failed: the spool's disk may be dying, "
            "see the kernel's log (dmesg)"
        )
    if counters["quarantined_files"] or counters["damaged_records"]:
        found.append(
            f"{plural(counters['quarantined_files'], 'damaged file')} set aside in the spool, "
            f"{plural(counters['damaged_records'], 'record')} unreadable: see the daemon's log"
        )
    for run in status["runs"]:
        found += _run_troubles(run)
    return found


def passing_errors(status: Status) -> list[str]:
    """Return the last errors that need nobody: the daemon tries again by itself."""
    return [
        f"{_who(run)}: {one_line(run['last_error'])}"
        for run in status["runs"]
        if run["last_error"] and run["state"] != "blocked"
    ]


def waiting_links(status: Status) -> list[str]:
    """Return which links wait for a run to be known, and what a person can do; nobody must.

    Of a run that is not delivered yet, nobody has been asked for its parent either.
    """
    server = status["server"]
    is_up = server is not None and server["state"] == "up"
    return [
        _wait_words(run)
        for run in status["runs"]
        if run.get("waits_for") and (run["mlflow_run_id"] is not None or is_up)
    ]


def waiting_artifacts(status: Status) -> list[str]:
    """Return which runs have artifacts to come, and why they are not there yet."""
    lines = []
    for run in status["runs"]:
        artifacts = run.get("artifacts")
        if artifacts and artifacts["waiting"]:
            size = bytes_text(artifacts["waiting_bytes"])
            words = f"{_who(run)}: {plural(artifacts['waiting'], 'artifact')} to come, {size}"
            if artifacts["sending"]:
                words += f", {bytes_text(artifacts['sent_bytes'])} of those being sent are there"
            if artifacts["last_error"]:
                words += f": {one_line(artifacts['last_error'])}"
            lines.append(words)
    return lines


def _wait_words(run: Run) -> str:
    ids = " and ".join(one_line(each)[:8] + "…" for each in run["waits_for"])
    short = run["run_id"][:8]
    is_same = run["mlflow_run_id"] is None
    what = "goes on with" if is_same else "is to be linked to"
    known = "that run is known" if is_same else "that run and its own parent are known"
    return (
        f"{_who(run)}: {what} {ids} once {known}; if it never is: `mlflow-relay lineage link "
        f"{short} PARENT` names another, `mlflow-relay lineage drop {short}` gives it up"
    )


def _who(run: Run) -> str:
    name = one_line(run["run_name"] or "run")
    shown = name if len(name) <= NAME_SHOWN_MAX else name[: NAME_SHOWN_MAX - 1] + "…"
    return f"{shown} {run['run_id'][:8]}"


def _run_troubles(run: Run) -> list[str]:
    who = _who(run)
    error = one_line(run["last_error"] or "no reason known")
    found = []
    if run["state"] == "blocked":
        found.append(
            f"{who}: blocked: {error}: when that is mended, "
            f"`mlflow-relay flush {run['run_id'][:8]}` tries again"
        )
    if run["dead_letters"]:
        found.append(
            f"{who}: MLflow refused {plural(run['dead_letters'], 'record')}: "
            f"`mlflow-relay dead-letters list --run {run['run_id'][:8]}` says why"
        )
    if run["lost_records"]:
        found.append(
            f"{who}: {plural(run['lost_records'], 'record')} lost, a rank's journal was full: "
            "raise journal_bytes_max there, or mend what kept the daemon from taking them"
        )
    if run["damaged_records"]:
        found.append(
            f"{who}: {plural(run['damaged_records'], 'record')} damaged on disk: see the "
            "daemon's log"
        )
    return found
