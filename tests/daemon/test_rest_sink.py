"""The REST sink against a real MLflow server, some of it through a faulty network."""

from __future__ import annotations

import math
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from email.utils import formatdate

import pytest

from mlflow_relay_daemon.sinks import (
    Forbidden,
    NotAllowed,
    Refused,
    RunGone,
    ServerAway,
    SinkError,
    TimedOut,
    TryAgain,
)
from mlflow_relay_daemon.sinks.rest import RestSink
from tests.support import MlflowServer, TcpProxy, proxy

Points = list[tuple[str, float, int, int]]
CREDENTIALS = (
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "HTTP_PROXY",
    "http_proxy",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_WORKSPACE",
)
SECRET = "s3cr3t-Zq7w"


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]) -> None:
    """Whoever runs the tests may have credentials; the tests see none."""
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,127.0.0.2")


@pytest.fixture
def sink(mlflow_server: MlflowServer) -> Iterator[RestSink]:
    with_sink = RestSink(mlflow_server.uri)
    yield with_sink
    with_sink.close()


@pytest.fixture
def far_sink(mlflow_proxy: TcpProxy) -> Iterator[RestSink]:
    """A sink behind the proxy that impatiently waits one second."""
    with_sink = RestSink(mlflow_proxy.uri, timeout_s=1.0)
    yield with_sink
    with_sink.close()


@pytest.fixture
def run_id(sink: RestSink) -> str:
    return new_run(sink)


def new_run(sink: RestSink, *, experiment: str = "", **tags: str) -> str:
    experiment_id = sink.experiment_id(experiment or "tests")
    return sink.create_run(
        experiment_id,
        run_name="a run",
        user="ann",
        start_time_ms=1_700_000_000_000,
        tags=list(tags.items()),
    )


# -- what is stored ---------------------------------------------------------------------------


def test_every_kind_of_number_arrives_as_it_was(
    mlflow_server: MlflowServer, sink: RestSink, run_id: str
) -> None:
    largest = sys.float_info.max
    values = {
        "zero": 0.0,
        "negative zero": -0.0,
        "tiny": 5e-324,
        "largest": largest,
        "third": 1 / 3,
        "whole": 7,
        "not a number": math.nan,
        "infinite": math.inf,
        "minus infinite": -math.inf,
    }
    sink.log_batch(
        run_id, [(key, value, 1_700_000_000_123, 5) for key, value in values.items()], [], []
    )

    stored = {key: value for key, value, _, _ in mlflow_server.all_points(run_id)}

    # MLflow has no infinity in SQL: it stores the largest number.
    expected = {**values, "infinite": largest, "minus infinite": -largest}
    assert math.isnan(stored.pop("not a number"))
    del expected["not a number"]
    assert stored == expected


def test_timestamps_and_steps_of_all_sizes_arrive(
    mlflow_server: MlflowServer, sink: RestSink, run_id: str
) -> None:
    points: Points = [
        ("m", 1.0, 0, 0),
        ("m", 2.0, 1, -5),
        ("m", 3.0, 4_102_444_800_000, 2**63 - 1),
        ("m", 4.0, 1_700_000_000_001, 2**53 + 1),
    ]
    sink.log_batch(run_id, points, [], [])
    assert sorted(mlflow_server.all_points(run_id)) == sorted(points)


GOOD_KEYS = ["a b", "µ/loss", "日本", "a.b", "a-b", "a:b", "_", "a/b/c", "x" * 250, "-1"]
BAD_KEYS = ["a@b", "a,b", "a[0]", "a=b", "a%b", "a\nb", "a//b", "/a", "a/", "../a", "", "x" * 251]


@pytest.mark.parametrize("key", GOOD_KEYS)
def test_unusual_keys_that_mlflow_takes_arrive_unchanged(
    mlflow_server: MlflowServer, sink: RestSink, run_id: str, key: str
) -> None:
    sink.log_batch(run_id, [(key, 1.0, 2, 3)], [(key, "é😀\u0000"[:2])], [(key, "'\"\\\n")])
    run = mlflow_server.client().get_run(run_id)
    assert mlflow_server.all_points(run_id) == [(key, 1.0, 2, 3)]
    assert run.data.params == {key: "é😀"}
    assert run.data.tags[key] == "'\"\\\n"


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_that_mlflow_refuses_are_refused_and_nothing_of_the_batch_is_stored(
    mlflow_server: MlflowServer, sink: RestSink, run_id: str, key: str
) -> None:
    with pytest.raises(Refused) as caught:
        sink.log_batch(run_id, [("good", 1.0, 2, 3), (key, 1.0, 2, 3)], [], [])
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    assert mlflow_server.all_points(run_id) == []


@pytest.mark.parametrize(
    "metric",
    [
        ("bad", "abc", 2, 3),
        ("bad", True, 2, 3),
        ("bad", None, 2, 3),
        ("bad", 1.0, 2.5, 3),
        ("bad", 1.0, 2, 3.5),
        ("bad", 1.0, 2, 2**63),
        ("bad", 1.0, 2, 2**65),
        ("bad", 10**400, 2, 3),
        (7, 1.0, 2, 3),
        ("lone \ud800 surrogate", 1.0, 2, 3),
    ],
)
def test_what_the_server_would_drop_in_silence_is_refused_here(
    mlflow_server: MlflowServer, sink: RestSink, run_id: str, metric: tuple[object, ...]
) -> None:
    with pytest.raises(Refused):
        sink.log_batch(run_id, [("good", 1.0, 2, 3), metric], [], [])  # type: ignore[list-item]
    assert mlflow_server.all_points(run_id) == []


def test_a_param_that_is_no_text_is_refused_here(sink: RestSink, run_id: str) -> None:
    with pytest.raises(Refused):
        sink.log_batch(run_id, [], [("p", 3)], [])  # type: ignore[list-item]


def test_a_full_batch_of_a_thousand_metrics_arrives_once_even_if_sent_twice(
    mlflow_server: MlflowServer, sink: RestSink, run_id: str
) -> None:
    metrics: Points = [
        (f"key/{i % 40}", i / 7, 1_700_000_000_000 + i, i // 40) for i in range(1000)
    ]
    sink.log_batch(run_id, metrics, [], [])
    sink.log_batch(run_id, metrics, [], [])
    assert sorted(mlflow_server.all_points(run_id)) == sorted(metrics)


def test_a_hundred_params_and_tags_arrive(
    mlflow_server: MlflowServer, sink: RestSink, run_id: str
) -> None:
    params = [(f"p{i}", f"value {i}") for i in range(100)]
    tags = [(f"t{i}", f"value {i}") for i in range(100)]
    sink.log_batch(run_id, [], params, tags)
    data = mlflow_server.client().get_run(run_id).data
    assert data.params == dict(params)
    assert {key: data.tags[key] for key, _ in tags} == dict(tags)


def test_of_two_equal_tag_keys_in_a_batch_the_last_one_stands(
    mlflow_server: MlflowServer, sink: RestSink, run_id: str
) -> None:
    sink.log_batch(run_id, [], [], [("t", "first"), ("a", "b"), ("t", "last")])
    assert mlflow_server.client().get_run(run_id).data.tags["t"] == "last"


def test_a_body_of_more_than_a_megabyte_is_sent_all_the_same(
    mlflow_server: MlflowServer, sink: RestSink, run_id: str
) -> None:
    metrics: Points = [(f"{i:04}" + "x" * 246, 1.0, i, i) for i in range(1000)]
    tags = [(f"t{i}", "y" * 8000) for i in range(100)]
    sink.log_batch(run_id, metrics[:900], [], tags)
    assert len(mlflow_server.all_points(run_id)) == 900


# -- what is refused --------------------------------------------------------------------------


def test_a_changed_param_is_refused_with_mlflows_own_words(sink: RestSink, run_id: str) -> None:
    sink.log_batch(run_id, [], [("lr", "0.1")], [])
    sink.log_batch(run_id, [], [("lr", "0.1")], [])
    with pytest.raises(Refused, match="Changing param values is not allowed"):
        sink.log_batch(run_id, [], [("lr", "0.2")], [])


def test_an_unknown_run_is_gone(sink: RestSink) -> None:
    nobody = uuid.uuid4().hex
    for ask in (
        lambda: sink.log_batch(nobody, [("m", 1.0, 2, 3)], [], []),
        lambda: sink.update_run(nobody, status="FINISHED"),
        lambda: sink.get_run(nobody),
        lambda: sink.delete_run(nobody),
    ):
        with pytest.raises(RunGone) as caught:
            ask()
        assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"


def test_a_deleted_run_is_gone_for_writers_but_still_there_to_look_at(
    sink: RestSink, run_id: str
) -> None:
    sink.delete_run(run_id)
    sink.delete_run(run_id)
    with pytest.raises(RunGone, match="active"):
        sink.log_batch(run_id, [("m", 1.0, 2, 3)], [], [])
    with pytest.raises(RunGone, match="active"):
        sink.update_run(run_id, status="FINISHED")
    assert sink.get_run(run_id).lifecycle_stage == "deleted"


def test_a_status_that_mlflow_does_not_know_is_refused(sink: RestSink, run_id: str) -> None:
    with pytest.raises(Refused, match="DONE"):
        sink.update_run(run_id, status="DONE")


# -- runs and experiments ---------------------------------------------------------------------


def test_ping_tells_the_version(sink: RestSink) -> None:
    import mlflow

    assert sink.ping() == mlflow.__version__


def test_a_created_run_has_what_was_asked_for(mlflow_server: MlflowServer, sink: RestSink) -> None:
    created = new_run(sink, **{"relay.run_id": "abc", "text": 'with "quotes" and é'})
    run = sink.get_run(created)
    assert run.tags["relay.run_id"] == "abc"
    assert run.tags["text"] == 'with "quotes" and é'
    assert (run.run_name, run.status, run.start_time_ms) == ("a run", "RUNNING", 1_700_000_000_000)
    assert run.end_time_ms is None
    assert mlflow_server.client().get_run(created).info.user_id == "ann"


def test_two_equal_tag_keys_at_creation_are_no_error(sink: RestSink) -> None:
    created = sink.create_run(
        sink.experiment_id("tests"),
        run_name="",
        user="",
        start_time_ms=1,
        tags=[("t", "first"), ("t", "last")],
    )
    assert sink.get_run(created).tags["t"] == "last"


def test_update_changes_only_what_is_given(sink: RestSink, run_id: str) -> None:
    sink.update_run(run_id, run_name="another name")
    assert sink.get_run(run_id).status == "RUNNING"
    sink.update_run(run_id, status="FAILED", end_time_ms=1_700_000_001_000)
    run = sink.get_run(run_id)
    assert (run.run_name, run.status, run.end_time_ms) == (
        "another name",
        "FAILED",
        1_700_000_001_000,
    )


@pytest.mark.parametrize(
    "value", ["0123abcd" * 4, "it's", 'a "quoted" one', "both ' and \"", "100 % _ \\", "é😀"]
)
def test_runs_are_found_by_tag_whatever_its_value(sink: RestSink, value: str) -> None:
    experiment_id = sink.experiment_id("found by tag")
    ours = sink.create_run(
        experiment_id,
        run_name="",
        user="",
        start_time_ms=1,
        tags=[("relay.run_id", value)],
    )
    for similar in (value.upper() + "x", value.replace("'", "x") + "x" * ("'" not in value)):
        sink.create_run(
            experiment_id,
            run_name="",
            user="",
            start_time_ms=1,
            tags=[("relay.run_id", similar)],
        )
    found = sink.find_runs([experiment_id], "relay.run_id", value)
    assert [run.run_id for run in found] == [ours]


def test_deleted_runs_are_found_too_and_the_oldest_comes_first(sink: RestSink) -> None:
    experiment_id = sink.experiment_id("oldest first")
    tag = uuid.uuid4().hex
    created = [
        sink.create_run(
            experiment_id,
            run_name="",
            user="",
            start_time_ms=start_time_ms,
            tags=[("relay.run_id", tag)],
        )
        for start_time_ms in (3, 1, 2)
    ]
    sink.delete_run(created[1])
    found = sink.find_runs([experiment_id], "relay.run_id", tag)
    assert [run.run_id for run in found] == [created[1], created[2], created[0]]
    assert found[0].lifecycle_stage == "deleted"


def test_runs_are_found_over_several_pages(sink: RestSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_relay_daemon.sinks.rest.SEARCH_PAGE_RUNS", 2)
    experiment_id = sink.experiment_id("several pages")
    created = {
        sink.create_run(
            experiment_id, run_name="", user="", start_time_ms=i, tags=[("relay.run_id", "x")]
        )
        for i in range(5)
    }
    found = sink.find_runs([experiment_id], "relay.run_id", "x")
    assert {run.run_id for run in found} == created


def test_an_experiment_is_made_once_even_if_many_ask_at_once(mlflow_server: MlflowServer) -> None:
    name = f"raced/é '{uuid.uuid4().hex}'"
    barrier = threading.Barrier(6)
    ids: list[str] = []

    def ask() -> None:
        sink = RestSink(mlflow_server.uri)
        barrier.wait()
        ids.append(sink.experiment_id(name))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    experiment = mlflow_server.client().get_experiment_by_name(name)
    assert experiment is not None
    assert ids == [experiment.experiment_id] * 6


def test_a_deleted_experiment_is_gone_and_the_message_says_how_to_restore_it(
    mlflow_server: MlflowServer, sink: RestSink
) -> None:
    name = uuid.uuid4().hex
    experiment_id = sink.experiment_id(name)
    mlflow_server.client().delete_experiment(experiment_id)
    with pytest.raises(RunGone):  # the id is still known here
        new_run(sink, experiment=name)
    with pytest.raises(RunGone, match=f"experiments restore --experiment-id {experiment_id}"):
        sink.experiment_id(name)
    mlflow_server.client().restore_experiment(experiment_id)
    assert sink.experiment_id(name) == experiment_id


def test_the_run_url_is_the_one_of_mlflows_pages() -> None:
    sink = RestSink("https://ann:pw@example.org/mlflow/")
    assert sink.run_url("3", "abc") == "https://example.org/mlflow/#/experiments/3/runs/abc"


# -- the network ------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_refused_connection_is_server_away_at_once() -> None:
    sink = RestSink(f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ServerAway, match="Connection refused"):
        sink.ping()


def test_a_server_that_comes_back_is_served_again(
    mlflow_server: MlflowServer, mlflow_proxy: TcpProxy, far_sink: RestSink, run_id: str
) -> None:
    far_sink.log_batch(run_id, [("m", 1.0, 2, 1)], [], [])
    mlflow_proxy.refuse()
    with pytest.raises(ServerAway):
        far_sink.log_batch(run_id, [("m", 1.0, 2, 2)], [], [])
    mlflow_proxy.heal()
    far_sink.log_batch(run_id, [("m", 1.0, 2, 3)], [], [])
    assert mlflow_server.all_points(run_id) == [("m", 1.0, 2, 1), ("m", 1.0, 2, 3)]


def test_an_unknown_host_is_server_away() -> None:
    with pytest.raises(ServerAway, match=r"no-such-host\.invalid.*not known"):
        RestSink("http://no-such-host.invalid:5000", connect_timeout_s=2.0).ping()


def test_a_black_hole_is_server_away_after_the_timeout(mlflow_proxy: TcpProxy, run_id: str) -> None:
    mlflow_proxy.fail(proxy.black_hole())
    sink = RestSink(mlflow_proxy.uri, timeout_s=0.2)
    with pytest.raises(ServerAway, match=r"no answer within 0\.2 s"):
        sink.log_batch(run_id, [("m", 1.0, 2, 3)], [], [])
    assert mlflow_proxy.requests("log-batch") == 1


def test_a_reset_connection_is_tried_once_more_and_then_server_away(
    mlflow_server: MlflowServer, mlflow_proxy: TcpProxy, far_sink: RestSink, run_id: str
) -> None:
    mlflow_proxy.fail(proxy.reset(), on=b"log-batch", times=1)
    far_sink.log_batch(run_id, [("m", 1.0, 2, 3)], [], [])
    mlflow_proxy.fail(proxy.reset(), on=b"log-batch")
    with pytest.raises(ServerAway):
        far_sink.log_batch(run_id, [("n", 1.0, 2, 3)], [], [])
    assert mlflow_server.all_points(run_id) == [("m", 1.0, 2, 3)]


def test_a_batch_whose_response_was_lost_is_stored_once(
    mlflow_server: MlflowServer, mlflow_proxy: TcpProxy, far_sink: RestSink, run_id: str
) -> None:
    lost = mlflow_proxy.fail(proxy.lose_response(), on=b"log-batch", times=1)
    far_sink.log_batch(run_id, [("m", 1.0, 2, 3)], [("p", "1")], [])
    assert lost.hits == 1
    assert mlflow_server.all_points(run_id) == [("m", 1.0, 2, 3)]


def test_a_run_creation_whose_response_was_lost_is_never_repeated_and_found_by_its_tag(
    mlflow_proxy: TcpProxy, far_sink: RestSink
) -> None:
    experiment_id = far_sink.experiment_id("lost response")
    tag = uuid.uuid4().hex
    mlflow_proxy.fail(proxy.lose_response(), on=b"runs/create", times=1)
    with pytest.raises(ServerAway):
        new_run(far_sink, experiment="lost response", **{"relay.run_id": tag})
    assert mlflow_proxy.requests("runs/create") == 1
    assert len(far_sink.find_runs([experiment_id], "relay.run_id", tag)) == 1


def test_a_response_that_breaks_off_is_server_away(
    mlflow_proxy: TcpProxy, far_sink: RestSink, run_id: str
) -> None:
    mlflow_proxy.fail(proxy.cut(60), on=b"runs/get")
    with pytest.raises(ServerAway):
        far_sink.get_run(run_id)


def test_one_connection_serves_many_requests(mlflow_proxy: TcpProxy, run_id: str) -> None:
    sink = RestSink(mlflow_proxy.uri)
    for step in range(20):
        sink.log_batch(run_id, [("m", 1.0, 2, step)], [], [])
    assert mlflow_proxy.connections == 1


def test_an_idle_connection_is_not_used_again(
    mlflow_proxy: TcpProxy, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_relay_daemon.sinks.http_client.IDLE_S_MAX", 0.0)
    sink = RestSink(mlflow_proxy.uri)
    sink.log_batch(run_id, [("m", 1.0, 2, 1)], [], [])
    sink.log_batch(run_id, [("m", 1.0, 2, 2)], [], [])
    assert mlflow_proxy.connections == 2
    assert mlflow_proxy.requests("log-batch") == 2


def test_a_run_is_created_after_the_server_has_closed_the_idle_connection(
    mlflow_server: MlflowServer,
) -> None:
    sink = RestSink(mlflow_server.uri)
    new_run(sink)
    before = len(mlflow_server.run_ids())
    time.sleep(5.5)  # uvicorn closes idle connections after 5 s; there is no event to wait for
    new_run(sink)
    assert len(mlflow_server.run_ids()) == before + 1


def test_more_callers_than_connections_wait_for_each_other(
    mlflow_server: MlflowServer, mlflow_proxy: TcpProxy, run_id: str
) -> None:
    sink = RestSink(mlflow_proxy.uri, pool=2)
    threads = [
        threading.Thread(target=sink.log_batch, args=(run_id, [("m", 1.0, 2, step)], [], []))
        for step in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert mlflow_proxy.connections <= 2
    assert len(mlflow_server.all_points(run_id)) == 8


# -- what else may answer -----------------------------------------------------------------------


def failure(sink: RestSink, action: Callable[[], object]) -> SinkError:
    with pytest.raises(SinkError) as caught:
        action()
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}', Refused),
        (400, b'{"error_code": "BAD_REQUEST", "message": "no"}', Refused),
        (
            400,
            (
                b'{"error_code": "BAD_REQUEST", "message": "(sqlite3.IntegrityError) UNIQUE '
                b'constraint failed: params.key, params.run_uuid [SQL: INSERT"}'
            ),
            TryAgain,
        ),
        (
            400,
            (
                b'{"error_code": "BAD_REQUEST", "message": "QueuePool limit of size 5 overflow 10 '
                b"reached, connection timed out, timeout 30.00 (Background on this error at: "
                b'https://sqlalche.me/e/20/3o7r)"}'
            ),
            ServerAway,
        ),
        (
            400,
            (
                b'{"error_code": "BAD_REQUEST", "message": "(psycopg2.DataError) value too long '
                b'[SQL: INSERT ... deadlock"}'
            ),
            Refused,
        ),
        (400, b"<html>plain HTTP to an HTTPS port", TryAgain),
        (404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Run not found"}', RunGone),
        (404, b'{"error_code": "ENDPOINT_NOT_FOUND", "message": "no such path"}', ServerAway),
        (404, b"<html>404", ServerAway),
        (405, b"<html>405", ServerAway),
        (408, b"", TryAgain),
        (409, b'{"error_code": "ABORTED", "message": "again"}', TryAgain),
        (413, b"<html>too large", Refused),
        (429, b"", ServerAway),
        (500, b"<html>oops", TryAgain),
        (500, b'{"error_code": "INTERNAL_ERROR", "message": "oops"}', TryAgain),
        (
            500,
            (
                b'{"error_code": "INTERNAL_ERROR", "message": "A string literal cannot contain NUL '
                b'(0x00) characters."}'
            ),
            Refused,
        ),
        (502, b"<html>", ServerAway),
        (503, b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "no database"}', ServerAway),
        (
            503,
            (
                b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "(psycopg2.errors.'
                b'DeadlockDetected) deadlock detected [SQL: INSERT"}'
            ),
            TryAgain,
        ),
        (504, b"", TimedOut),
        (401, b"You are not authenticated.", NotAllowed),
        (403, b"<html>Forbidden by the gateway", NotAllowed),
        (403, b"Permission denied", Forbidden),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "not yours"}', Forbidden),
        (200, b"<html>Please log in", ServerAway),
        (200, b"[1]", ServerAway),
        (200, b"", ServerAway),
        (200, b'{"error": "who are you"}', ServerAway),
        (204, b"", TryAgain),
    ],
)
def test_each_answer_is_told_apart(
    mlflow_proxy: TcpProxy,
    far_sink: RestSink,
    status: int,
    body: bytes,
    kind: type[SinkError],
) -> None:
    mlflow_proxy.fail(proxy.answer(status, body))
    error = failure(far_sink, lambda: far_sink.log_batch("ab", [("m", 1.0, 2, 3)], [], []))
    assert type(error) is kind
    assert mlflow_proxy.uri in str(error)
    assert mlflow_proxy.requests() == 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_kept_in_seconds_and_as_a_date(
    mlflow_proxy: TcpProxy, far_sink: RestSink, status: int
) -> None:
    mlflow_proxy.fail(proxy.answer(status, headers={"Retry-After": "17"}), times=1)
    seconds = failure(far_sink, lambda: far_sink.get_run("ab"))
    date = formatdate(time.time() + 100, usegmt=True)
    mlflow_proxy.fail(proxy.answer(status, headers={"Retry-After": date}), times=1)
    dated = failure(far_sink, lambda: far_sink.get_run("ab"))
    mlflow_proxy.fail(proxy.answer(status, headers={"Retry-After": "soon"}), times=1)
    silly = failure(far_sink, lambda: far_sink.get_run("ab"))
    assert isinstance(seconds, ServerAway)
    assert seconds.retry_after_s == 17.0
    assert isinstance(dated, ServerAway)
    assert dated.retry_after_s == pytest.approx(100, abs=10)
    assert isinstance(silly, ServerAway)
    assert silly.retry_after_s is None


def test_a_login_page_is_not_taken_for_success(mlflow_proxy: TcpProxy, far_sink: RestSink) -> None:
    page = b"<html><style>p {}</style><title>Sign in</title> to the <b>network</b></html>"
    mlflow_proxy.fail(proxy.answer(200, page))
    for ask in (
        far_sink.ping,
        lambda: far_sink.experiment_id("x"),
        lambda: far_sink.get_run("x"),
        lambda: far_sink.update_run("x", status="FINISHED"),
        lambda: far_sink.find_runs(["0"], "t", "v"),
        lambda: new_run(far_sink),
    ):
        error = failure(far_sink, ask)
        assert isinstance(error, ServerAway)
        assert "answers, but not as an MLflow server: 'Sign in to the network'" in str(error)


@pytest.mark.parametrize("body", [b"{}", b'{"run": {}}', b'{"run": null}', b'{"experiment": 3}'])
def test_json_of_another_shape_is_not_taken_for_a_run(
    mlflow_proxy: TcpProxy, far_sink: RestSink, body: bytes
) -> None:
    mlflow_proxy.fail(proxy.answer(200, body, content_type="application/json"))
    error = failure(far_sink, lambda: far_sink.get_run("x"))
    assert isinstance(error, ServerAway)
    assert "not as an MLflow server" in str(error)


def test_a_redirect_is_not_followed_and_the_message_names_the_right_address(
    mlflow_proxy: TcpProxy, far_sink: RestSink
) -> None:
    location = "https://new.example.org/ml/api/2.0/mlflow/runs/log-batch?token=" + SECRET
    mlflow_proxy.fail(proxy.answer(301, headers={"Location": location}))
    error = failure(far_sink, lambda: far_sink.log_batch("ab", [("m", 1.0, 2, 3)], [], []))
    assert isinstance(error, ServerAway)
    assert "set the tracking URI to https://new.example.org/ml" in str(error)
    assert SECRET not in str(error)


def test_a_wrong_path_prefix_says_so(mlflow_server: MlflowServer) -> None:
    sink = RestSink(mlflow_server.uri + "/prefix")
    with pytest.raises(ServerAway, match="path prefix"):
        sink.log_batch("ab", [("m", 1.0, 2, 3)], [], [])
    with pytest.raises(ServerAway, match="path prefix"):
        sink.ping()


def test_a_host_name_that_mlflow_does_not_know_is_explained(mlflow_server: MlflowServer) -> None:
    # /health and /version answer 200 under any name, the API does not.
    with TcpProxy(mlflow_server.uri, host="127.0.0.2") as strange:
        sink = RestSink(strange.uri)
        with pytest.raises(NotAllowed, match="--allowed-hosts"):
            sink.ping()


# -- credentials ------------------------------------------------------------------------------


def authorization(mlflow_proxy: TcpProxy) -> str:
    head = mlflow_proxy.heads()[-1].decode("latin-1")
    lines = [line for line in head.split("\r\n") if line.lower().startswith("authorization:")]
    return lines[0].partition(": ")[2] if lines else ""


def test_credentials_are_read_anew_for_each_request(
    mlflow_proxy: TcpProxy,
    far_sink: RestSink,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: os.PathLike[str],
) -> None:
    def ask() -> str:
        far_sink.find_runs(["0"], "t", "v")
        return authorization(mlflow_proxy)

    assert ask() == ""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-1\n")
    assert ask() == "Bearer tok-1"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-2")
    assert ask() == "Bearer tok-2"

    folder = os.path.join(tmp_path, ".mlflow")
    os.mkdir(folder)
    with open(os.path.join(folder, "credentials"), "w") as file:
        file.write("[mlflow]\nmlflow_tracking_username = bob\nmlflow_tracking_password = 1%2\n")
    assert ask() == "Basic Ym9iOjElMg=="  # bob:1%2
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw")
    assert ask() == "Basic YW5uOnB3"  # ann:pw


def test_user_and_password_in_the_uri_are_sent_and_never_shown(mlflow_proxy: TcpProxy) -> None:
    uri = mlflow_proxy.uri.replace("://", f"://ann:{SECRET}%2F@")
    sink = RestSink(uri)
    sink.find_runs(["0"], "t", "v")
    assert authorization(mlflow_proxy).startswith("Basic ")
    assert (sink.uri, repr(sink)) == (mlflow_proxy.uri, f"RestSink({mlflow_proxy.uri!r})")
    assert SECRET not in sink.run_url("0", "1")


def test_the_workspace_is_sent(
    mlflow_proxy: TcpProxy, far_sink: RestSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a")
    mlflow_proxy.fail(proxy.answer(200, b"{}"))  # this server knows no workspaces
    far_sink.find_runs(["0"], "t", "v")
    assert b"X-MLFLOW-WORKSPACE: team-a" in mlflow_proxy.heads()[-1]


def test_wrong_credentials_name_the_variables_to_set(
    mlflow_proxy: TcpProxy, far_sink: RestSink
) -> None:
    mlflow_proxy.fail(proxy.answer(401, b"You are not authenticated."))
    error = failure(far_sink, lambda: far_sink.get_run("x"))
    assert isinstance(error, NotAllowed)
    assert "MLFLOW_TRACKING_USERNAME" in str(error)
    assert "MLFLOW_TRACKING_TOKEN" in str(error)


def test_no_secret_is_shown_even_if_the_server_echoes_it(
    mlflow_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = RestSink(mlflow_proxy.uri.replace("://", f"://ann:{SECRET}@"), timeout_s=0.2)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    echo = f"you sent ann:{SECRET}".encode()
    faults = [
        proxy.answer(200, echo),
        proxy.answer(401, echo),
        proxy.answer(500, echo),
        proxy.answer(400, b'{"error_code": "BAD_REQUEST", "message": "' + echo + b'"}'),
        proxy.answer(302, headers={"Location": f"http://x/{SECRET}?t={SECRET}"}),
        proxy.black_hole(),
        proxy.reset(),
        proxy.cut(10),
    ]
    for fault in faults:
        mlflow_proxy.heal()
        mlflow_proxy.fail(fault)
        error = failure(sink, lambda: sink.get_run("x"))
        assert SECRET not in "".join(traceback.format_exception(error))
        assert SECRET not in repr(error)


@pytest.mark.parametrize("token", [f"{SECRET}\nX-Evil: 1", f"{SECRET}é", f"{SECRET}😀"])
def test_a_token_that_no_header_can_carry_is_an_error_that_does_not_show_it(
    mlflow_proxy: TcpProxy, far_sink: RestSink, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    error = failure(far_sink, lambda: far_sink.get_run("x"))
    assert isinstance(error, NotAllowed)
    assert "MLFLOW_TRACKING_TOKEN" in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))
    assert mlflow_proxy.requests() == 0


@pytest.mark.parametrize(
    "uri", ["http://", f"http://ann:{SECRET}/x@host", f"http://ann:{SECRET}#x@host:5000"]
)
def test_an_address_that_cannot_be_taken_apart_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(ValueError, match="percent-encoded") as caught:
        RestSink(uri)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two self-signed certificates for 127.0.0.1, each in one file with its key."""
    folder = tmp_path_factory.mktemp("certificates")
    paths = [str(folder / name) for name in ("one.pem", "two.pem")]
    for path in paths:
        command = [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=relay test", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", path + ".key", "-out", path + ".crt"),
        ]
        subprocess.run(command, check=True, capture_output=True)
        with open(path, "w") as both, open(path + ".key") as key, open(path + ".crt") as crt:
            both.write(key.read() + crt.read())
    return paths


@pytest.fixture
def tls_proxy(mlflow_server: MlflowServer, certificates: list[str]) -> Iterator[TcpProxy]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates[0])
    with TcpProxy(mlflow_server.uri, tls=context) as secured:
        yield secured


def test_a_server_with_an_unknown_certificate_is_away_and_the_message_names_the_variable(
    tls_proxy: TcpProxy,
) -> None:
    with pytest.raises(ServerAway, match="MLFLOW_TRACKING_SERVER_CERT_PATH"):
        RestSink(tls_proxy.uri).ping()
    assert tls_proxy.requests() == 0


def test_certificates_are_checked_as_the_variables_say_and_read_anew_when_they_change(
    tls_proxy: TcpProxy,
    certificates: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: os.PathLike[str],
) -> None:
    trusted = os.path.join(tmp_path, "ca.pem")
    shutil.copy(certificates[1], trusted)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", trusted)
    sink = RestSink(tls_proxy.uri)
    with pytest.raises(ServerAway, match="certificate verify failed"):
        sink.ping()
    shutil.copy(certificates[0], trusted)
    os.utime(trusted, ns=(1, 1))
    assert sink.ping()
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    with pytest.raises(ServerAway):
        sink.ping()
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    assert sink.ping()


def test_the_proxy_of_the_environment_is_used_and_its_password_never_shown(
    mlflow_proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", mlflow_proxy.uri.replace("://", f"://ann:{SECRET}@"))
    sink = RestSink("http://mlflow.invalid:5000")
    mlflow_proxy.fail(proxy.answer(200, b"{}"), times=1)
    assert sink.find_runs(["0"], "t", "v") == []
    assert mlflow_proxy.heads()[0].startswith(b"POST http://mlflow.invalid:5000/api/2.0/")
    assert b"Proxy-Authorization: Basic" in mlflow_proxy.heads()[0].title()
    mlflow_proxy.refuse()
    error = failure(sink, lambda: sink.find_runs(["0"], "t", "v"))
    assert isinstance(error, ServerAway)
    assert "HTTP_PROXY" in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))


def test_a_certificate_file_that_is_missing_is_server_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "/no/such/ca.pem")
    with pytest.raises(ServerAway, match=r"No such file"):
        RestSink(f"https://127.0.0.1:{closed_port()}").ping()


def test_the_sink_works_without_importing_mlflow(mlflow_server: MlflowServer) -> None:
    program = (
        "import sys\n"
        "from mlflow_relay_daemon.sinks.open import open_sink\n"
        f"print(open_sink({mlflow_server.uri!r}).ping())\n"
        "assert 'mlflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
