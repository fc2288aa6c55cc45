"""Which files of this machine are taken for a run's of a database."""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import closing

import pytest

from mlflow_relay_daemon.importers.sqlite import TableRun, find_runs

TABLES = """
    CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT);
    CREATE TABLE runs (run_uuid TEXT, name TEXT, user_id TEXT, status TEXT, start_time BIGINT,
        end_time BIGINT, lifecycle_stage TEXT, experiment_id INTEGER, artifact_uri TEXT);
    CREATE TABLE metrics (key TEXT, value FLOAT, timestamp BIGINT, run_uuid TEXT);
    CREATE TABLE params (key TEXT, value TEXT, run_uuid TEXT);
    CREATE TABLE tags (key TEXT, value TEXT, run_uuid TEXT);
"""


def table_run(folder, run_id, artifact_uri) -> TableRun:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        database.executescript(TABLES)
        database.execute(
            "INSERT INTO runs VALUES (?, 'old', 'ada', 'FINISHED', 1, 2, 'active', 1, ?)",
            (run_id, artifact_uri),
        )
    (run,) = find_runs(folder / "mlflow.db", include_deleted=False, experiment_name=None)
    assert isinstance(run, TableRun)
    return run


@pytest.mark.parametrize(
    "uri", [None, "", "/", "file:///", ".", "..", "/tmp", "file:///tmp", "x/{}"]
)
def test_a_folder_that_is_not_the_runs_own_is_never_published(tmp_path, monkeypatch, uri):
    run_id = uuid.uuid4().hex
    (tmp_path / "x" / run_id).mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "x"):
        (folder / "diary.txt").write_text("dear diary")
    monkeypatch.chdir(tmp_path)
    assert table_run(tmp_path, run_id, uri and uri.format(run_id)).wanted() == []


def test_the_folder_that_bears_the_runs_id_is_found_where_it_says_and_beside(tmp_path):
    run_id = uuid.uuid4().hex
    for place in ("mlartifacts", "elsewhere"):
        folder = tmp_path / place / "1" / run_id / "artifacts"
        folder.mkdir(parents=True)
        (folder / "loss curve #1.txt").write_text(place)
    run = table_run(tmp_path, run_id, f"mlflow-artifacts:/1/{run_id}/artifacts")
    (wanted,) = run.wanted()
    assert (wanted.path, wanted.size) == ("loss curve #1.txt", len("mlartifacts"))
    run.artifact_uri = f"{tmp_path}/elsewhere/1/{run_id}/artifacts"
    (wanted,) = run.wanted()
    assert wanted.size == len("elsewhere")
