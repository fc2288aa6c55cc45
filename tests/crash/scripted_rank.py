"""A rank with a script, in a forked process that may be killed anywhere or meet a bad disk, and what
must be in MLflow of it. The oracle is outside: what has returned is counted in shared memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sqlite3
from pathlib import Path
from typing import Any

import mlflow_relay
import mlflow_relay.run as run_room
from mlflow_relay.errors import RelayError
from mlflow_relay.launch import relay_run_id
from mlflow_relay_daemon.control_client import NoDaemon
from tests.crash.outcome import Outcome
from tests.support import MlflowServer
from tests.support.relay import Node, wait_until
from tests.support.scenes import stored

STEPS = 12
#: Two files of 64 KiB: the script goes on from the first into the second.
JOURNAL_BYTES = 128 << 10
TEXT, TEXT_NAME = "what a rank has to say\n" * 50, "notes/said.txt"
PATIENCE_S = 300.0
_STARTED, _STEPS_DONE, _TEXT_KEPT, _ENDED, _WORDS = range(5)


def tag_of(step: int) -> tuple[str, str]:
    return f"bulk {step:02d}", f"{step:02d} " * 2000


class ScriptedRank:
    """One life of a rank.

    Args: key: its run's; a run has this one rank.
    """

    def __init__(self, node: Node, key: str) -> None:
        self.key, self.run_id = key, relay_run_id(key, 1)
        self._node = node
        self._memory = mmap.mmap(-1, 8 * _WORDS)
        self._words = memoryview(self._memory).cast("Q")

    def live(self) -> None:
        """The script; in the child."""
        words = self._words
        run_room._started = 0  # the process that we are forked from may have had runs
        os.environ.update(self._node.environ)
        os.environ["MLFLOW_RELAY_STAGING"] = str(staging_of(self._node))
        try:
            run = mlflow_relay.start_run(
                "scripted",
                run_key=self.key,
                rank=0,
                world_size=1,
                terminal="none",
                journal_bytes_max=JOURNAL_BYTES,
            )
        except RelayError as error:  # no place for a journal: said to who starts the training
            print(f"no run: {error}", flush=True)
            return
        words[_STARTED] = 1
        for step in range(STEPS):
            run.log_metrics({"a": step + 0.5, "b": -step}, step=step)
            run.set_tag(*tag_of(step))
            words[_STEPS_DONE] = step + 1
        run.log_text(TEXT, TEXT_NAME)
        words[_TEXT_KEPT] = 1
        run.end()
        words[_ENDED] = 1

    @property
    def was_started(self) -> bool:
        """Whether `start_run` had returned."""
        return bool(self._words[_STARTED])

    @property
    def has_ended(self) -> bool:
        """Whether `end` had returned."""
        return bool(self._words[_ENDED])

    def check(self, server: MlflowServer, run: dict[str, Any]) -> None:
        """Assert that MLflow has what this rank logged.

        Args: run: what the daemon's status says of it.
        """
        steps, lost = self._words[_STEPS_DONE], run["lost_records"]
        counts = {name: run[name] for name in ("dead_letters", "damaged_records")}
        assert not any(counts.values()), f"{counts}"
        made = _runs_of(server, self.run_id)
        assert made == [run["mlflow_run_id"]], f"MLflow runs: {made}, not {run['mlflow_run_id']}"
        found = stored(server, run["mlflow_run_id"])
        by_step: dict[int, list[tuple[str, float]]] = {}
        for key, value, step in found.points:
            by_step.setdefault(step, []).append((key, value))
        for step, points in by_step.items():
            assert sorted(points) == [("a", step + 0.5), ("b", -step)], f"step {step}: {points}"
        # Behind the last call that had returned one more may be there.
        assert set(by_step) <= set(range(min(steps + 1, STEPS))), f"of {steps} steps: {by_step}"
        assert found.tags.items() <= dict(map(tag_of, range(STEPS))).items()
        missing = [f"step {step}" for step in range(steps) if step not in by_step]
        missing += [key for key, _ in map(tag_of, range(steps)) if key not in found.tags]
        missing += ["the text"] * bool(self._words[_TEXT_KEPT] and not self._has_text(server, run))
        assert len(missing) <= lost, f"{missing} missing, {lost} counted as lost"
        may_be = {"FINISHED"} if self.has_ended else {"FAILED"}
        if self._words[_TEXT_KEPT]:
            may_be.add("FINISHED")  # its END may have been accepted
        assert found.status in may_be, f"{found.status}, must be {may_be}"
        if found.status == "FAILED":
            assert "vanished" in found.all_tags["relay.end_reason"]

    def _has_text(self, server: MlflowServer, run: dict[str, Any]) -> bool:
        folder = server.folder / "artifacts" / run["experiment_id"] / run["mlflow_run_id"]
        path = folder / "artifacts" / TEXT_NAME
        return path.exists() and path.read_text() == TEXT


def _runs_of(server: MlflowServer, run_id: str) -> list[str]:
    """Return the MLflow runs that there are of a relay run."""
    query = """
        SELECT runs.run_uuid FROM runs JOIN tags ON tags.run_uuid = runs.run_uuid
        WHERE tags.key = 'relay.run_id' AND tags.value = ? AND runs.lifecycle_stage = 'active'
    """
    uri = f"file:{server.database}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30.0)) as database:
        return [found for (found,) in database.execute(query, (run_id,))]


def staging_of(node: Node) -> Path:
    """Return where the ranks of a node stage files, whether a daemon has told them or not."""
    return node.spool / "staging"


def check_all(
    node: Node, server: MlflowServer, ranks: dict[str, ScriptedRank], outcome: Outcome
) -> None:
    """Wait until the daemon has delivered what these ranks left; note each that broke a promise.

    Args: ranks: by what was done to them.
    """
    journals = node.runtime / "journals"
    wait_until(lambda: not list(journals.glob("*.journal")), "all journals are taken", PATIENCE_S)

    def runs_when_over() -> list[dict[str, dict[str, Any]]]:
        try:
            runs = {run["run_id"]: run for run in node.status()["runs"]}
        except NoDaemon:  # killed, and on its way back
            return []
        is_over = all(
            run["state"] == "ended" and not run["artifacts"]["waiting"] for run in runs.values()
        )
        is_there = all(each.run_id in runs for each in ranks.values() if each.was_started)
        return [runs] * (is_over and is_there)

    (runs,) = wait_until(runs_when_over, "all runs have ended and are delivered", PATIENCE_S)
    for name, rank in ranks.items():
        try:
            if rank.run_id in runs:
                rank.check(server, runs[rank.run_id])
        except AssertionError as error:
            outcome.found(f"{name}: {error}")
    status = node.status()
    if status["counters"]["quarantined_files"]:
        outcome.found(f"files were quarantined: {list((node.spool / 'quarantine').iterdir())}")
