"""`mlflow-relay flush`: make the daemon try now, and wait until it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from mlflow_relay_daemon.commands._options import example, with_config
from mlflow_relay_daemon.commands._select import select_runs
from mlflow_relay_daemon.config import Config
from mlflow_relay_daemon.control_client import ControlClient, NoDaemon
from mlflow_relay_daemon.exits import DEGRADED, DONE, TIME_RAN_OUT
from mlflow_relay_daemon.words import one_line, plural

Run = dict[str, Any]

POLL_PERIOD_S = 0.2
TIMEOUT_S = 300.0  # nothing in a job script may wait without a bound by default
BLOCKED_GRACE_S = 2.0  # a blocked run is tried by this flush too; that long for its answer
DAEMON_GRACE_S = 10.0  # a daemon that is being restarted comes back
REPORT_PERIOD_S = 5.0  # lines in a log file, where no bar can be drawn


@dataclass(frozen=True)
class Progress:
    """How far a flush has come. Pure."""

    left: Mapping[str, int]  # records to go, of runs that are not done
    blocked: Mapping[str, str]  # runs that wait for a person, and why
    dead_letters: int  # that came during this flush
    settled: int
    total: int
    files_left: Mapping[str, int] = field(default_factory=dict)  # artifacts to go

    @property
    def is_done(self) -> bool:
        return not self.left and not self.files_left


@click.command(
    epilog="Exit code: 0 all is in MLflow, 1 MLflow refused something, 69 no daemon, 75 time ran "
    "out (nothing is lost, and the daemon goes on).\n\n"
    + example("mlflow-relay flush --timeout 60", "mlflow-relay flush 1a2b3c4d o96")
)
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), default=TIMEOUT_S, metavar="SECONDS",
    help=f"Wait for at most so long; inf: without limit.  [{TIMEOUT_S:g}]",
)  # fmt: skip
@with_config("socket")
def flush(config: Config, names: tuple[str, ...], timeout_s: float) -> None:
    """Deliver now what was accepted before this call.

    Metrics, params, tags and artifacts. RUN is an id, the first characters of one, or a run name;
    none means all runs.
    """
    with ControlClient(config.socket) as client:
        before = client.status()
        runs = select_runs(before["runs"], names)
        targets = client.flush([run["run_id"] for run in runs])
        started_s = time.monotonic()
        with _reporter() as report:
            status, progress = _wait(
                client, before, targets, started_s=started_s, timeout_s=timeout_s, report=report
            )
    for line in outcome_lines(status, progress, time.monotonic() - started_s):
        click.echo(line)
    click.get_current_context().exit(exit_code(progress))


def _wait(
    client: ControlClient,
    before: dict[str, Any],
    targets: Mapping[str, int],
    *,
    started_s: float,
    timeout_s: float,
    report: Callable[[Progress], None],
) -> tuple[dict[str, Any], Progress]:
    """Poll until every run is done or blocked, or time runs out; return the last state."""
    status = before
    answered_s = started_s
    files: dict[str, int] = {}
    while True:
        try:
            status = client.status()
            answered_s = time.monotonic()
        except NoDaemon:
            if time.monotonic() - answered_s > DAEMON_GRACE_S:
                raise
        note_files(files, status, targets)
        progress = measure(before, status, targets, files)
        report(progress)
        waited_s = time.monotonic() - started_s
        is_blocked = set(progress.left) <= set(progress.blocked) and not progress.files_left
        is_blocked = is_blocked and waited_s >= BLOCKED_GRACE_S
        is_stuck = is_blocked or _is_offline(status)
        if progress.is_done or is_stuck or waited_s >= timeout_s:
            return status, progress
        time.sleep(min(POLL_PERIOD_S, max(timeout_s - waited_s, 0.0)))


# --- judge ------------------------------------------------------------------------------------


def note_files(files: dict[str, int], status: dict[str, Any], targets: Mapping[str, int]) -> None:
    """Note how many artifacts a run has once its records are settled: only then are they known."""
    for run in status["runs"]:
        run_id = run["run_id"]
        is_settled = run_id in targets and run["settled_records"] >= targets[run_id]
        if is_settled and "artifacts" in run:  # an older daemon does not know of them
            files.setdefault(run_id, run["artifacts"]["accepted"])


def measure(
    before: dict[str, Any],
    status: dict[str, Any],
    targets: Mapping[str, int],
    files: Mapping[str, int] | None = None,
) -> Progress:
    """Compare what was to be delivered with what is. Pure.

    Args: files: artifacts by run that were accepted before; see `note_files`.
    """
    first = {run["run_id"]: run for run in before["runs"]}
    now = {run["run_id"]: run for run in status["runs"]}
    left, blocked, total, settled, dead_letters = {}, {}, 0, 0, 0
    for run_id, target in targets.items():
        start = min(first[run_id]["settled_records"], target) if run_id in first else 0
        # A run that has vanished from the status is not taken for delivered.
        run = now.get(run_id, {"settled_records": start, "state": "", "dead_letters": 0})
        reached = max(min(run["settled_records"], target), start)
        total += target - start
        settled += reached - start
        dead_letters += max(run["dead_letters"] - first.get(run_id, run)["dead_letters"], 0)
        if reached < target:
            left[run_id] = target - reached
            if run["state"] == "blocked":
                blocked[run_id] = one_line(run["last_error"] or "no reason known")
    files_left = {}
    for run_id, target in (files or {}).items():
        artifacts = now.get(run_id, {}).get("artifacts", {"settled_to": 0, "waiting": target})
        if artifacts["settled_to"] < target:
            files_left[run_id] = min(target - artifacts["settled_to"], artifacts["waiting"])
    return Progress(left, blocked, dead_letters, settled, total, files_left)


def exit_code(progress: Progress) -> int:
    """Return the exit code of a flush that has ended. Pure."""
    if progress.blocked or progress.dead_letters:
        return DEGRADED
    return DONE if progress.is_done else TIME_RAN_OUT


def _is_offline(status: dict[str, Any]) -> bool:
    return bool(status["server"]) and status["server"]["state"] == "offline"


# --- print ------------------------------------------------------------------------------------


def outcome_lines(status: dict[str, Any], progress: Progress, waited_s: float) -> list[str]:
    """Return what was done and, per run, what is left and why. Pure."""
    if not progress.total and not progress.dead_letters and progress.is_done:
        return ["nothing to flush: all that was accepted is settled"]
    lines = [f"{plural(progress.settled, 'record')} settled in {waited_s:.1f} s"]
    if progress.dead_letters:
        lines.append(
            f"MLflow refused {plural(progress.dead_letters, 'record')}: `mlflow-relay "
            "dead-letters list` says why"
        )
    known = {run["run_id"]: run for run in status["runs"]}
    for run_id, records in progress.left.items():
        run = known.get(run_id, {})
        name = one_line(run.get("run_name") or "run")
        why = f"blocked: {progress.blocked[run_id]}" if run_id in progress.blocked else ""
        why = why or _why_left(status, run)
        lines.append(f"left: {name} {run_id[:8]}: {plural(records, 'record')}{why and ': ' + why}")
    for run_id, count in progress.files_left.items():
        run = known.get(run_id, {})
        why = one_line((run.get("artifacts") or {}).get("last_error") or "")
        name = one_line(run.get("run_name") or "run")
        lines.append(f"left: {name} {run_id[:8]}: {plural(count, 'artifact')}{why and ': ' + why}")
    if not progress.is_done and not _is_offline(status):
        lines.append("nothing is lost: it is in the spool, and the daemon goes on")
    return lines


def _why_left(status: dict[str, Any], run: Run) -> str:
    server = status["server"] or {"state": "unknown"}
    if not run:
        return "the daemon does not know this run any more"
    if server["state"] == "offline":
        return "the daemon is offline: deliver its spool with `mlflow-relay sync`"
    if server["state"] == "down":
        return f"the server is down: {one_line(server['last_error'] or 'no reason known')}"
    return one_line(run["last_error"] or "")


@contextmanager
def _reporter() -> Iterator[Callable[[Progress], None]]:
    """Yield what shows progress on stderr: a bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
        return
    next_s = time.monotonic() + REPORT_PERIOD_S

    def report_line(progress: Progress) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + REPORT_PERIOD_S
            click.echo(
                f"flushing: {progress.settled:,} of {plural(progress.total, 'record')}, "
                f"{plural(len({*progress.left, *progress.files_left}), 'run')} to go",
                err=True,
            )

    yield report_line


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("flushing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda progress: bar.update(
            task, completed=progress.settled, total=progress.total or None
        )
