"""Artifacts that will not be uploaded as they are: dead letters, whose files are kept."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow_relay.records import PLACE, Artifact
from mlflow_relay_daemon.artifacts.source import locate
from mlflow_relay_daemon.batch import ARTIFACT_LETTER, Entry
from mlflow_relay_daemon.dead_letters import DeadLetters
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.staging import NAME as STAGING


def letter_of(artifact: Artifact, path: Path) -> Entry:
    """Return the dead letter; its value says where the file lies."""
    value = json.dumps({"file": str(path), "bytes": artifact.size, "id": artifact.id})
    return Entry(ARTIFACT_LETTER, artifact.path, value, artifact.timestamp_ms, None)


def try_again(run: RunSpool, letters: DeadLetters, ids: set[int] | None) -> int:
    """Put refused artifacts back into the queue; return how many. If they are refused once more,
    there will be new letters. Raises: OSError."""
    chosen = _chosen(letters, ids)
    run.artifacts.try_again(chosen.values())
    return letters.remove(set(chosen)) if chosen else 0


def drop(run: RunSpool, letters: DeadLetters, ids: set[int] | None) -> None:
    """Remove the files that were staged for these letters. Raises: OSError."""
    staging = run.folder.parent.parent / STAGING
    for artifact in run.artifacts.forget(_chosen(letters, ids).values()):
        if artifact.where != PLACE:
            locate(artifact, run.card.run_id, staging).unlink(missing_ok=True)


def _chosen(letters: DeadLetters, ids: set[int] | None) -> dict[int, str]:
    """Return the artifacts' ids by those of their letters."""
    return {
        letter.id: json.loads(str(letter.value))["id"]
        for letter in letters.list()
        if letter.kind == ARTIFACT_LETTER and (ids is None or letter.id in ids)
    }
