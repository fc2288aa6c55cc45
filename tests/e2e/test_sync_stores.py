"""`mlflow-relay sync` of MLflow's own stores: all that a run is, of every form that was ever written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import shutil
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from tests.support import MlflowServer, TcpProxy
from tests.support.lineage import only, seen
from tests.support.proxy import answer
from tests.support.scenes import fingerprint
from tests.support.stores import (
    START_MS,
    anemoi_run,
    complaint,
    new_card,
    sent,
    start_sync,
    sync,
    write_mlruns,
    write_spool,
)

ANEMOI = Path(__file__).parents[1] / "data" / "anemoi-mlruns"
#: Of tests/data: written by Anemoi 0.17.1's own logger, offline.
NEW, CHILD, FORK = (
    "046f88123f65488dbdb04008909b0d9a",
    "c16d9c09ab3b48219b2820854d7a8a26",
    "2700ad69085d4dba81f0708229d42a20",
)


def with_fresh_ids(store: Path, folder: Path) -> dict[str, str]:
    """Copy a file store, its runs under ids that no other test has; return old id → fresh id."""
    fresh = {old: uuid.uuid4().hex for old in (NEW, CHILD, FORK)}
    shutil.copytree(store, folder)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.parent.name != "plots":
            text = path.read_text()
            for old, new in fresh.items():
                text = text.replace(old, new)
            path.write_text(text)
        elif path.name in fresh:
            path.rename(path.with_name(fresh[path.name]))
    return fresh


def artifacts_of(server: MlflowServer, run_id: str, folder: Path) -> dict[str, bytes]:
    """Return the content of all artifacts of an MLflow run, by path."""
    folder.mkdir()
    server.client().download_artifacts(run_id, "", str(folder))
    return files_in(folder)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ── file stores ──


def test_anemois_own_offline_runs_arrive_as_its_users_know_them(tmp_path, mlflow_server):
    ids = with_fresh_ids(ANEMOI, tmp_path / "save_dir" / "mlruns")
    before = fingerprint(tmp_path / "save_dir")
    done = sync(tmp_path / "save_dir", "--tracking-uri", mlflow_server.uri)
    assert {run["run_id"]: run["records"] for run in done["runs"]} == {
        ids[NEW]: 630,
        ids[CHILD]: 420,
        ids[FORK]: 315,
    }
    assert sent(done) == 1365
    new, child, fork = (only(mlflow_server, ids[old]) for old in (NEW, CHILD, FORK))
    assert child.data.tags["mlflow.parentRunId"] == new.info.run_id
    assert fork.data.tags["forkedRunId"] == new.info.run_id
    assert child.data.params["metadata.run_id"] == new.info.run_id
    assert fork.data.params["config.training.fork_run_id"] == new.info.run_id
    assert new.data.params["metadata.offline_run_id"] == ids[NEW]
    assert new.data.tags["SLURM_JOB_ID"] == "4242"
    assert (new.info.start_time, new.info.end_time) == (1795409329220, 1795409329745)
    assert (child.info.run_name, fork.info.run_name) == ("o96 baseline", "o96 rollout")
    assert len(mlflow_server.all_points(new.info.run_id)) == 630
    folder = tmp_path / "save_dir" / "mlruns" / "547247666917800932" / ids[NEW] / "artifacts"
    assert artifacts_of(mlflow_server, new.info.run_id, tmp_path / "there") == files_in(folder)
    assert fingerprint(tmp_path / "save_dir") == before
    (folder / "config.json").write_text("{}")
    again = sync(tmp_path / "save_dir", "--tracking-uri", mlflow_server.uri)
    assert {run["run_id"]: run["uploaded_files"] for run in again["runs"]} == {
        ids[NEW]: 1,
        ids[CHILD]: 0,
        ids[FORK]: 0,
    }
    there = artifacts_of(mlflow_server, new.info.run_id, tmp_path / "there again")
    assert there == files_in(folder)
    assert there["config.json"] == b"{}"


def test_every_form_of_a_metric_line_is_read(tmp_path, mlflow_server):
    run = anemoi_run(0)
    run.lines = {
        "old": ["1795000000001 0.5", "1795000000002 1.5"],
        "deep/er/key": [f"{START_MS} 1e-3 -4", f"{START_MS + 1} nan 5", f"{START_MS} inf 6"],
        "with/dataset": [f"{START_MS} 0.25 7 train-2020 a1b2c3", f"{START_MS} -inf 8"],
        "bad": ["no line of ours", f"{START_MS} 2.0 1"],
    }
    store = write_mlruns(tmp_path / "mlruns", [run])
    (told,) = sync(store, "--tracking-uri", mlflow_server.uri)["runs"]
    assert told["notes"] == ["metric bad: left out, cannot be read: 1 line"]
    points = mlflow_server.all_points(told["mlflow_run_id"])
    largest = 1.7976931348623157e308  # what MLflow keeps of an infinity
    assert [point for point in points if not math.isnan(point[1])] == [
        ("bad", 2.0, START_MS, 1),
        ("deep/er/key", 0.001, START_MS, -4),
        ("deep/er/key", largest, START_MS, 6),
        ("old", 0.5, 1795000000001, 0),
        ("old", 1.5, 1795000000002, 0),
        ("with/dataset", 0.25, START_MS, 7),
        ("with/dataset", -largest, START_MS, 8),
    ]
    assert [(key, step) for key, value, _, step in points if math.isnan(value)] == [
        ("deep/er/key", 5)
    ]


_BY_MLFLOW = """
import sys
import mlflow
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.http_dataset_source import HTTPDatasetSource

for uri in sys.argv[1:]:
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("made by mlflow")
    with mlflow.start_run(run_name="by mlflow") as run:
        dataset = MetaDataset(HTTPDatasetSource("http://data.example.org/era5"), name="era5")
        mlflow.log_input(dataset, context="training")
        mlflow.log_param("lr", 0.1)
        mlflow.log_metrics({"loss": 0.5, "nan": float("nan")}, step=3)
        mlflow.log_metric("loss", 0.25, step=4)
        mlflow.log_text("hello", "notes/hello.txt")
    with mlflow.start_run(run_name="unwanted") as deleted:
        mlflow.log_metric("loss", 1.0)
    mlflow.MlflowClient().delete_run(deleted.info.run_id)
    print(run.info.run_id, deleted.info.run_id)
"""


@pytest.fixture(scope="module")
def by_mlflow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, str]]:
    """A run and a deleted one in stores that MLflow itself wrote: (store, id, id of the deleted)."""
    folder = tmp_path_factory.mktemp("by_mlflow")
    environ = {**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    uris = [f"file://{folder}/mlruns", f"sqlite:///{folder}/mlflow.db"]
    done = subprocess.run(
        [sys.executable, "-c", _BY_MLFLOW, *uris],
        env=environ, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids = [line.split() for line in done.stdout.splitlines()]
    names = ("mlruns", "mlflow.db")
    return {name: (folder / name, *pair) for name, pair in zip(names, ids, strict=True)}


@pytest.mark.parametrize("kind", ["mlruns", "mlflow.db"])
def test_what_mlflow_itself_wrote_arrives_with_datasets_and_deleted_runs(
    tmp_path, by_mlflow, mlflow_server, kind
):
    store, run_id, deleted_id = by_mlflow[kind]
    before = fingerprint(store.parent)
    arguments = (store, "--tracking-uri", mlflow_server.uri)
    assert len(sync(*arguments)["runs"]) == 1
    run = only(mlflow_server, run_id)
    assert (run.info.run_name, run.info.status) == ("by mlflow", "FINISHED")
    assert run.data.params == {"lr": "0.1"}
    assert run.data.tags["offlineRun"] == "True"
    points = mlflow_server.all_points(run.info.run_id)
    assert [(key, step) for key, _, _, step in points] == [("loss", 3), ("loss", 4), ("nan", 3)]
    there = artifacts_of(mlflow_server, run.info.run_id, tmp_path / "there")
    assert there == {"notes/hello.txt": b"hello"}
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "era5"
    assert json.loads(dataset.dataset.source)["url"] == "http://data.example.org/era5"
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]
    sync(*arguments, "--include-deleted")
    assert not seen(mlflow_server, deleted_id)
    experiment = mlflow_server.client().get_experiment_by_name("made by mlflow")
    deleted = mlflow_server.client().search_runs(
        [experiment.experiment_id], f"tags.`relay.run_id` = '{deleted_id}'", run_view_type=2
    )
    assert [each.info.lifecycle_stage for each in deleted] == ["deleted"]
    states = {run["run_id"]: run["state"] for run in sync(*arguments, "--include-deleted")["runs"]}
    assert states == {run_id: "done", deleted_id: "skipped"}
    assert fingerprint(store.parent) == before


def test_a_database_of_an_old_schema_is_read(tmp_path, mlflow_server):
    run_id = uuid.uuid4().hex
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.executescript(
            f"""
            CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT);
            CREATE TABLE runs (run_uuid TEXT, name TEXT, user_id TEXT, status TEXT,
                start_time BIGINT, end_time BIGINT, lifecycle_stage TEXT, experiment_id INTEGER);
            CREATE TABLE metrics (key TEXT, value FLOAT, timestamp BIGINT, run_uuid TEXT);
            CREATE TABLE params (key TEXT, value TEXT, run_uuid TEXT);
            CREATE TABLE tags (key TEXT, value TEXT, run_uuid TEXT);
            INSERT INTO experiments VALUES (1, 'of 2018', 'active');
            INSERT INTO runs VALUES ('{run_id}', 'old', 'ada', 'KILLED', 1500000000000,
                1500000001000, 'active', 1);
            INSERT INTO metrics VALUES ('loss', 0.5, 1500000000500, '{run_id}');
            INSERT INTO metrics VALUES ('loss', 0.25, 1500000000600, '{run_id}');
            INSERT INTO params VALUES ('lr', '0.1', '{run_id}');
            """
        )
    (told,) = sync(tmp_path, "--tracking-uri", mlflow_server.uri)["runs"]
    run = only(mlflow_server, run_id)
    assert mlflow_server.all_points(run.info.run_id) == [
        ("loss", 0.5, 1500000000500, 0),
        ("loss", 0.25, 1500000000600, 0),
    ]
    assert (run.info.status, run.info.start_time) == ("KILLED", 1500000000000)
    assert (run.data.tags["mlflow.user"], told["experiment_name"]) == ("ada", "of 2018")
    assert not mlflow_server.client().list_artifacts(run.info.run_id), "of no folder that it named"


@pytest.mark.parametrize("beside", ["mlartifacts", ""])
def test_artifacts_of_a_database_that_was_moved_are_found_beside_it_or_named(
    tmp_path, mlflow_server, beside
):
    run_id = uuid.uuid4().hex
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.executescript(
            f"""
            CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT);
            CREATE TABLE runs (run_uuid TEXT, name TEXT, user_id TEXT, status TEXT,
                start_time BIGINT, end_time BIGINT, lifecycle_stage TEXT, experiment_id INTEGER,
                artifact_uri TEXT);
            CREATE TABLE metrics (key TEXT, value FLOAT, timestamp BIGINT, run_uuid TEXT);
            CREATE TABLE params (key TEXT, value TEXT, run_uuid TEXT);
            CREATE TABLE tags (key TEXT, value TEXT, run_uuid TEXT);
            INSERT INTO runs VALUES ('{run_id}', 'moved', 'ada', 'FINISHED', 1500000000000,
                1500000001000, 'active', 1, 'file:///scratch/train/mlruns/1/{run_id}/artifacts');
            """
        )
    if beside:
        folder = tmp_path / beside / "1" / run_id / "artifacts" / "plots"
        folder.mkdir(parents=True)
        (folder / "loss.png").write_bytes(b"a picture")
    (told,) = sync(tmp_path, "--tracking-uri", mlflow_server.uri)["runs"]
    there = artifacts_of(mlflow_server, told["mlflow_run_id"], tmp_path / "there")
    assert there == ({"plots/loss.png": b"a picture"} if beside else {})
    assert [note for note in told["notes"] if "are not here" in note] or beside


# ── a server ──


@pytest.mark.timeout(300)  # it starts a second server
def test_runs_of_another_server_arrive_with_the_links_between_them(tmp_path, mlflow_server):
    with MlflowServer(tmp_path / "source") as source:
        client = source.client()
        experiment = client.create_experiment("on the source")
        ids = []
        for index in range(2):
            tags = {"mlflow.user": "anna", "mlflow.runName": f"run {index}"}
            if ids:
                tags |= {"mlflow.parentRunId": ids[0], "resumedRun": "True"}
            run = client.create_run(experiment, start_time=START_MS + index, tags=tags)
            ids.append(run.info.run_id)
            client.log_param(ids[-1], "metadata.run_id", ids[0])
            for step in range(3):
                client.log_metric(ids[-1], "loss", step / 2, START_MS + step, step)
            client.log_text(ids[-1], f"of run {index}", "deep/er/notes.txt")
            client.set_terminated(ids[-1], "FAILED", START_MS + 9)
        arguments = (source.uri, "--tracking-uri", mlflow_server.uri)
        assert sent(sync(*arguments, "--run", ids[1])) == 3
        assert sent(sync(*arguments)) == 3
        assert sent(sync(*arguments)) == 0
        client.log_metric(ids[0], "loss", 9.0, START_MS - 5, -5)
        sync(*arguments)
        line = complaint(source.uri, "--tracking-uri", source.uri, code=64)
        assert "destination itself" in line
        alias = source.uri.replace("127.0.0.1", "localhost")
        told = sync(alias, "--tracking-uri", source.uri)["runs"]
        assert [run["state"] for run in told] == ["skipped", "skipped"]
        assert len(source.run_ids()) == 2
    parent, child = (only(mlflow_server, each) for each in ids)
    there = artifacts_of(mlflow_server, child.info.run_id, tmp_path / "there")
    assert there == {"deep/er/notes.txt": b"of run 1"}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["metadata.run_id"] == parent.info.run_id
    assert child.data.params["metadata.server2server_run_id"] == ids[0]
    assert child.data.tags["server2server"] == "True"
    assert "offlineRun" not in child.data.tags
    assert (child.info.status, child.info.end_time) == ("FAILED", START_MS + 9)
    assert (child.info.start_time, child.info.run_name) == (START_MS + 1, "run 1")
    assert [point[1] for point in mlflow_server.all_points(parent.info.run_id)] == [9, 0, 0.5, 1]


# ── what goes wrong ──


def test_what_is_no_source_is_said_in_one_line(tmp_path, mlflow_server):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("hello")
    (tmp_path / "half" / "1" / "2").mkdir(parents=True)
    (tmp_path / "broken.db").write_bytes(b"SQLite format 3\0 and nothing more")
    words = {
        "empty": "is empty: a source is",
        "other": "holds no runs: a source is",
        "other/file.txt": "no SQLite database",
        "nowhere": "No such file",
        "half": "holds no runs",
        "broken.db": "cannot be read as MLflow's database",
    }
    for name, said in words.items():
        line = complaint(tmp_path / name, "--tracking-uri", mlflow_server.uri, code=1)
        assert said in line, line
    line = complaint("http://127.0.0.1:9", "--tracking-uri", mlflow_server.uri, code=1)
    assert "does not answer" in line


def test_one_bad_run_stops_no_other(tmp_path, mlflow_server):
    good, bad = anemoi_run(10), anemoi_run(10)
    store = write_mlruns(tmp_path / "mlruns", [good, bad])
    (store / "547247666917800932" / bad.run_id / "meta.yaml").write_text("")
    done = sync(store, "--tracking-uri", mlflow_server.uri, code=1)
    assert [run["run_id"] for run in done["runs"]] == [good.run_id]
    assert bad.run_id in done["errors"][0]
    assert "was it copied in part?" in done["errors"][0]
    assert len(mlflow_server.all_points(only(mlflow_server, good.run_id).info.run_id)) == 10


def test_what_mlflow_refuses_is_named_and_the_rest_arrives(tmp_path, mlflow_server):
    run = anemoi_run(10)
    run.params["a" * 251] = "a key that MLflow refuses"
    run.params["long"] = "x" * 7000
    store = write_mlruns(tmp_path / "mlruns", [run])
    (told,) = sync(store, "--tracking-uri", mlflow_server.uri, code=1)["runs"]
    assert sorted(each["key"] for each in told["refusals"]) == ["a" * 251, "long"]
    arrived = only(mlflow_server, run.run_id)
    assert len(arrived.data.params["long"]) == 6000
    assert len(mlflow_server.all_points(arrived.info.run_id)) == 10
    assert sync(store, "--tracking-uri", mlflow_server.uri)["runs"][0]["refused"] == 0


def test_a_server_that_is_away_or_refuses_us_is_said_in_one_line(
    tmp_path, mlflow_server, mlflow_proxy: TcpProxy
):
    store = write_mlruns(tmp_path / "mlruns", [anemoi_run(10)])
    assert "no server is named" in complaint(store, code=78)
    line = complaint(store, "--tracking-uri", "http://127.0.0.1:9", code=1)
    assert "cannot be reached" in line
    mlflow_proxy.fail(answer(401, b"who are you?"))
    token = {"MLFLOW_TRACKING_TOKEN": "secret-token-of-anna"}
    line = complaint(store, "--tracking-uri", mlflow_proxy.uri, code=1, environ=token)
    assert "401" in line
    assert "MLFLOW_TRACKING_TOKEN" in line
    assert "secret-token" not in line


def test_a_server_that_goes_away_for_good_ends_the_call_and_the_next_one_goes_on(
    tmp_path, mlflow_server, mlflow_proxy: TcpProxy
):
    run = anemoi_run(4000)
    store = write_mlruns(tmp_path / "mlruns", [run])
    mlflow_proxy.fail(answer(503, b"no more"), on=b"/runs/log-batch")
    call = start_sync(store, "--tracking-uri", mlflow_proxy.uri, "--patience", "1")
    _, errors = call.communicate(timeout=60)
    assert call.returncode == 75, errors
    assert "given up, call it again" in errors
    mlflow_proxy.heal()
    sync(store, "--tracking-uri", mlflow_proxy.uri)
    found = only(mlflow_server, run.run_id)
    assert mlflow_server.all_points(found.info.run_id) == run.points()


# ── the command ──


def test_a_dry_run_tells_and_changes_nothing(tmp_path, mlflow_server):
    name = f"never made {uuid.uuid4().hex}"
    run_id = uuid.uuid4().hex
    write_spool(tmp_path / "spool", new_card(run_id, experiment=name))
    done = sync(tmp_path, "--tracking-uri", mlflow_server.uri, "--dry-run")
    assert [(run["run_id"], run["state"]) for run in done["runs"]] == [(run_id, "new")]
    assert mlflow_server.client().get_experiment_by_name(name) is None
    sync(tmp_path, "--tracking-uri", mlflow_server.uri)
    done = sync(tmp_path, "--tracking-uri", mlflow_server.uri, "--dry-run")
    assert [run["state"] for run in done["runs"]] == ["there"]


def test_runs_are_chosen_by_id_prefix_or_name_and_brought_to_another_experiment(
    tmp_path, mlflow_server
):
    runs = [anemoi_run(10, name=f"run {index}") for index in range(3)]
    store = write_mlruns(tmp_path / "mlruns", runs)
    experiment = f"chosen {uuid.uuid4().hex}"
    arguments = ("--tracking-uri", mlflow_server.uri, "--experiment-name", experiment)
    done = sync(store, *arguments, "--run", runs[0].run_id[:8], "--run", "run 2")
    assert {run["run_id"] for run in done["runs"]} == {runs[0].run_id, runs[2].run_id}
    found = mlflow_server.client().get_experiment_by_name(experiment)
    assert only(mlflow_server, runs[2].run_id).info.experiment_id == found.experiment_id
    line = complaint(store, *arguments, "--run", "nobody", code=64)
    assert "no run 'nobody'" in line


def test_without_a_terminal_there_is_a_table_and_no_bar(tmp_path, mlflow_server):
    run = anemoi_run(10)
    call = start_sync(write_mlruns(tmp_path / "mlruns", [run]), "--tracking-uri", mlflow_server.uri)
    output, errors = call.communicate(timeout=60)
    assert re.match(r"RUN +NAME +EXPERIMENT +FROM +MLFLOW RUN +THERE +SENT +STATE\n", output)
    assert "1 of 1 run there; 10 points sent" in output
    assert errors == ""


def test_on_a_terminal_there_is_a_bar(tmp_path, mlflow_server):
    store = write_mlruns(tmp_path / "mlruns", [anemoi_run(3000)])
    terminal, stderr = pty.openpty()
    call = subprocess.Popen(
        [sys.executable, "-m", "mlflow_relay_daemon", "sync", str(store)],
        env={**os.environ, "MLFLOW_TRACKING_URI": mlflow_server.uri, "COLUMNS": "120"},
        stdout=subprocess.DEVNULL, stderr=stderr,
    )  # fmt: skip
    os.close(stderr)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a pty is EIO
        while block := os.read(terminal, 65536):
            shown += block
    os.close(terminal)
    assert call.wait(60) == 0
    assert re.search(rb"syncing .*3000/3000", shown)
    assert b"0/1 runs" in shown
