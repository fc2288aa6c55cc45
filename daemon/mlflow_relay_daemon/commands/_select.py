"""Finds the run that an operator means by a few characters. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlflow_relay_daemon.exits import USAGE, CommandError
from mlflow_relay_daemon.words import one_line

Run = dict[str, Any]

PREFIX_CHARACTERS_MIN = 4  # 3 hex digits meet by chance among some 75 runs, 4 among some 300
CANDIDATES_SHOWN_MAX = 6


def select_runs(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """Return the runs that are named, in that order and each once.

    Args:    names: ids of relay or MLflow, prefixes of these, or run names that are unique.
    Raises:  CommandError: none fits, or several do; then it lists them.
    """
    chosen = {run["run_id"]: run for run in (select_run(runs, name) for name in names)}
    return list(chosen.values())


def select_run(runs: Sequence[Run], name: str) -> Run:
    """Return the one run that is meant. Raises: CommandError."""
    fitting = fitting_runs(runs, name)
    if len(fitting) == 1:
        return fitting[0]
    shown = repr(one_line(name))
    if not fitting:
        short = len(_identifier(name)) < PREFIX_CHARACTERS_MIN
        hint = f" (a prefix needs {PREFIX_CHARACTERS_MIN} characters)" if short else ""
        raise CommandError(
            f"no run is called {shown}{hint}: `mlflow-relay runs` lists those there are", USAGE
        )
    listed = ", ".join(_described(run) for run in fitting[:CANDIDATES_SHOWN_MAX])
    more = len(fitting) - CANDIDATES_SHOWN_MAX
    raise CommandError(
        f"{shown} may be any of {len(fitting)} runs: {listed}"
        + (f" and {more} more" if more > 0 else "")
        + ": give more of the id",
        USAGE,
    )


def fitting_runs(runs: Sequence[Run], name: str) -> list[Run]:
    """Return the runs that may be meant: one if its whole id is given."""
    identifier = _identifier(name)
    exact = [run for run in runs if identifier in _identifiers(run)]
    if len(exact) == 1:
        return exact
    return [run for run in runs if _fits(run, name.strip(), identifier)]


def _identifier(name: str) -> str:
    return name.strip().lower().replace("-", "")  # a UUID may come with its dashes


def _identifiers(run: Run) -> list[str]:
    return [i for i in (run["run_id"], run.get("mlflow_run_id")) if i]


def _fits(run: Run, wanted: str, identifier: str) -> bool:
    if wanted and wanted == run.get("run_name"):
        return True
    return len(identifier) >= PREFIX_CHARACTERS_MIN and any(
        i.startswith(identifier) for i in _identifiers(run)
    )


def _described(run: Run) -> str:
    return f"{run['run_id'][:12]} ({one_line(run.get('run_name') or 'no name')})"
