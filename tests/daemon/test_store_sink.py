"""The sink over the mlflow package: SQLite here, the errors of others by a fake store."""

from __future__ import annotations

import math
import sqlite3
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_relay_daemon.sinks import (
    Refused,
    RunGone,
    ServerAway,
    SinkError,
    TryAgain,
)
from mlflow_relay_daemon.sinks.open import open_sink, redact_uri
from mlflow_relay_daemon.sinks.rest import RestSink
from mlflow_relay_daemon.sinks.store import StoreSink

SECRET = "s3cr3t-Zq7w"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "deep" / "er" / "mlflow.db"


@pytest.fixture(scope="module")
def sink(database: Path) -> Iterator[StoreSink]:
    opened = StoreSink(f"sqlite:///{database}")
    yield opened
    opened.close()


@pytest.fixture
def run_id(sink: StoreSink) -> str:
    return new_run(sink)


def new_run(sink: StoreSink, *, experiment: str = "tests", **tags: str) -> str:
    return sink.create_run(
        sink.experiment_id(experiment),
        run_name="a run",
        user="ann",
        start_time_ms=1_700_000_000_000,
        tags=list(tags.items()),
    )


def points(database: Path, run_id: str) -> list[tuple[str, float, int, int]]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute(
            "SELECT key, value, is_nan, timestamp, step FROM metrics WHERE run_uuid = ?", (run_id,)
        ).fetchall()
    connection.close()
    return sorted((k, math.nan if is_nan else v, ts, step) for k, v, is_nan, ts, step in rows)


def test_ping_tells_the_packages_version(sink: StoreSink) -> None:
    import mlflow

    assert sink.ping() == mlflow.__version__


def test_everything_arrives_and_twice_is_once(sink: StoreSink, database: Path, run_id: str) -> None:
    metrics = [("a/µ", 0.1, 5, 6), ("b", -math.inf, 5, 6), ("c", math.inf, 7, -1)]
    for _ in range(2):
        sink.log_batch(run_id, metrics, [("p", "é")], [("t", "1"), ("t", "2")])
    sink.log_batch(run_id, [("nan", math.nan, 5, 6)], [], [])
    largest = sys.float_info.max
    stored = points(database, run_id)
    assert stored[:3] == [("a/µ", 0.1, 5, 6), ("b", -largest, 5, 6), ("c", largest, 7, -1)]
    assert [math.isnan(value) for _, value, _, _ in stored[3:]] == [True]
    assert sink.get_run(run_id).tags["t"] == "2"


def test_a_thousand_metrics_arrive_at_once(sink: StoreSink, database: Path, run_id: str) -> None:
    metrics = [(f"k{i % 7}", i / 3, 10**12 + i, i) for i in range(1000)]
    sink.log_batch(run_id, metrics, [], [])
    assert points(database, run_id) == sorted(metrics)


def test_a_run_is_created_updated_found_and_deleted(sink: StoreSink) -> None:
    tag = uuid.uuid4().hex
    run_id = new_run(sink, **{"relay.run_id": tag})
    sink.update_run(run_id, run_name="another")
    assert sink.get_run(run_id).status == "RUNNING"
    sink.update_run(run_id, status="KILLED", end_time_ms=1_700_000_000_009)
    sink.delete_run(run_id)
    sink.delete_run(run_id)
    (found,) = sink.find_runs([sink.experiment_id("tests")], "relay.run_id", tag)
    assert (found.run_id, found.run_name, found.status) == (run_id, "another", "KILLED")
    assert (found.start_time_ms, found.end_time_ms) == (1_700_000_000_000, 1_700_000_000_009)
    assert found.lifecycle_stage == "deleted"


def test_runs_are_found_over_several_pages(
    sink: StoreSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_relay_daemon.sinks.store.SEARCH_PAGE_RUNS", 2)
    created = {new_run(sink, experiment="pages", **{"relay.run_id": "x"}) for _ in range(5)}
    found = sink.find_runs([sink.experiment_id("pages")], "relay.run_id", "x")
    assert {run.run_id for run in found} == created


def test_a_changed_param_and_a_bad_key_are_refused(sink: StoreSink, run_id: str) -> None:
    sink.log_batch(run_id, [], [("lr", "1")], [])
    with pytest.raises(Refused, match="Changing param values"):
        sink.log_batch(run_id, [], [("lr", "2")], [])
    with pytest.raises(Refused, match="a@b"):
        sink.log_batch(run_id, [("a@b", 1.0, 2, 3)], [], [])
    with pytest.raises(Refused, match="DONE"):
        sink.update_run(run_id, status="DONE")


def test_unknown_and_deleted_runs_are_gone(sink: StoreSink, run_id: str) -> None:
    nobody = uuid.uuid4().hex
    with pytest.raises(RunGone):
        sink.get_run(nobody)
    with pytest.raises(RunGone):
        sink.log_batch(nobody, [("m", 1.0, 2, 3)], [], [])
    sink.delete_run(run_id)
    with pytest.raises(RunGone):
        sink.log_batch(run_id, [("m", 1.0, 2, 3)], [], [])


def test_a_deleted_experiment_is_gone(sink: StoreSink, database: Path) -> None:
    from mlflow.tracking import MlflowClient

    experiment_id = sink.experiment_id("to be deleted")
    MlflowClient(f"sqlite:///{database}").delete_experiment(experiment_id)
    with pytest.raises(RunGone):
        new_run(sink, experiment="to be deleted")
    with pytest.raises(RunGone, match="restore"):
        sink.experiment_id("to be deleted")


def test_many_lanes_may_write_at_once(sink: StoreSink, database: Path) -> None:
    run_ids = [new_run(sink) for _ in range(4)]

    def lane(run_id: str) -> None:
        for step in range(10):
            sink.log_batch(run_id, [("m", float(step), step, step)], [], [])

    threads = [threading.Thread(target=lane, args=(run_id,)) for run_id in run_ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert [len(points(database, run_id)) for run_id in run_ids] == [10] * 4


def test_the_sink_can_be_used_again_after_close(sink: StoreSink) -> None:
    sink.close()
    assert sink.ping()


def test_a_database_that_cannot_be_opened_is_server_away_and_shows_no_password() -> None:
    sink = StoreSink(f"nosuchdb://ann:{SECRET}@127.0.0.1:1/mlflow?password={SECRET}")
    assert sink.uri == "nosuchdb://127.0.0.1:1/mlflow"
    with pytest.raises(ServerAway) as caught:
        sink.get_run("x")
    assert SECRET not in f"{caught.value!r} {sink!r}"


class FakeStore:
    """A store that raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def get_run(self, run_id: str) -> None:
        raise self.error


def error_of(error: Exception) -> SinkError:
    sink = StoreSink("fake://")
    sink._opened = FakeStore(error)
    with pytest.raises(SinkError) as caught:
        sink.get_run("x")
    return caught.value


def test_errors_of_stores_are_told_apart() -> None:
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2 as codes

    locked = sqlite3.OperationalError("database is locked")
    statement = "INSERT INTO t VALUES ('deadlock')"
    by_mlflow = sqlalchemy.exc.OperationalError(statement, {}, locked)
    gone_away = sqlalchemy.exc.OperationalError(statement, {}, Exception("server closed"))
    temporary = codes.TEMPORARILY_UNAVAILABLE
    cases = [
        (MlflowException(str(by_mlflow), temporary), TryAgain),
        (MlflowException(str(gone_away), temporary), ServerAway),
        (by_mlflow, TryAgain),
        (gone_away, ServerAway),
        (ConnectionResetError("reset"), ServerAway),
        (RuntimeError("a plugin's mistake"), TryAgain),
        (MlflowException("API request to http://x failed with exception y"), ServerAway),
        (
            MlflowException(
                "API request to http://x failed with exception HTTPConnectionPool: Max retries "
                "exceeded (Caused by ResponseError('too many 500 error responses'))"
            ),
            TryAgain,
        ),
        (MlflowException("oops"), TryAgain),
        (MlflowException("no", codes.INVALID_PARAMETER_VALUE), Refused),
    ]
    assert [type(error_of(error)) for error, _ in cases] == [kind for _, kind in cases]


# -- open_sink --------------------------------------------------------------------------------


def test_http_is_spoken_directly_and_all_else_goes_through_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(open_sink("http://h:5000"), RestSink)
    assert isinstance(open_sink("HTTPS://h/p"), RestSink)
    for uri in ("sqlite:///x.db", "postgresql://u:p@h/d", "databricks", "databricks://p"):
        assert isinstance(open_sink(uri), StoreSink)
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "kubernetes")
    signed = open_sink("http://h:5000/")
    assert isinstance(signed, StoreSink)
    assert signed.run_url("1", "ab") == "http://h:5000/#/experiments/1/runs/ab"


@pytest.mark.parametrize("uri", ["./mlruns", "/data/mlruns", "file:///data/mlruns", "mlruns"])
def test_a_folder_is_refused_with_what_to_do(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ValueError, match=r"sqlite:///.*mlruns\.db"):
        open_sink(uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert isinstance(open_sink(uri), StoreSink)


def test_a_folder_works_where_mlflow_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    sink = open_sink(str(tmp_path / "mlruns"))
    created = sink.create_run(
        sink.experiment_id("e"), run_name="n", user="u", start_time_ms=5, tags=[("k", "v")]
    )
    sink.log_batch(created, [("m", 1.5, 2, 3)], [("p", "1")], [])
    assert [run.run_id for run in sink.find_runs([sink.experiment_id("e")], "k", "v")] == [created]
    with pytest.raises(Refused):
        sink.log_batch(created, [], [("p", "2")], [])


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://h:5000", "http://h:5000"),
        ("https://ann:pw@h:5000/p/?token=x#y", "https://h:5000/p/"),
        ("https://tok@h", "https://h"),
        ("https://ann:p@w@h/p", "https://h/p"),
        ("https://ann:p/w@h/p", "https://..."),
        ("https://ann:1/w@h/p", "https://..."),
        ("https://ann:p?w@h/p", "https://..."),
        ("https://ann:1#w@h/p", "https://..."),
        ("http://[::1]:5000/x", "http://[::1]:5000/x"),
        ("postgresql+psycopg2://u:p@h:5432/db?sslpassword=x", "postgresql+psycopg2://h:5432/db"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("databricks://profile", "databricks://profile"),
        ("databricks", "databricks"),
        ("./mlruns", "./mlruns"),
    ],
)
def test_a_uri_is_shown_without_its_secrets(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown
