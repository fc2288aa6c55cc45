"""`MLFLOW_TRACKING_URI=relay://`: MLflow's own client, unchanged, in a training."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import MlflowServer, TcpProxy
from tests.support.relay import Node, finish, last_json, wait_until

RELAY = {"MLFLOW_TRACKING_URI": "relay://", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="module")
def proxy(mlflow_server: MlflowServer) -> Iterator[TcpProxy]:
    with TcpProxy(mlflow_server.uri) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def node(proxy: TcpProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("plugin"), proxy.uri) as node:
        node.start()
        yield node


@pytest.fixture(autouse=True)
def healed(proxy: TcpProxy) -> Iterator[None]:
    yield
    proxy.heal()


def id_in(output: str) -> str:
    """Return the run id that a script printed, among what MLflow prints."""
    found = re.search(r"^run ([0-9a-f]{32})$", output, re.MULTILINE)
    assert found, output
    return found[1]


def is_empty(function: object) -> bool:
    """Return whether a method does nothing: it would return None, and lose what it was given."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body  # type: ignore[arg-type]
    assert isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef)
    return all(
        isinstance(each, ast.Pass)
        or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        for each in tree.body
    )


def test_no_method_of_mlflows_stores_is_forgotten():
    from mlflow.store.model_registry.abstract_store import AbstractStore as AbstractRegistry
    from mlflow.store.tracking.abstract_store import AbstractStore

    from mlflow_relay.mlflow_store import RelayRegistryStore, RelayStore

    looked_at = 0
    for ours, abstract in ((RelayStore, AbstractStore), (RelayRegistryStore, AbstractRegistry)):
        for name, function in inspect.getmembers(ours, inspect.isfunction):
            if hasattr(abstract, name):
                looked_at += 1
                assert not getattr(function, "__isabstractmethod__", False), name
                assert not is_empty(function), f"{ours.__name__}.{name} does nothing"
    assert looked_at > 100


def test_what_a_killed_training_logged_arrives_and_its_run_has_failed(node, mlflow_server):
    rank = node.rank(
        """
        import os, signal, mlflow
        mlflow.set_experiment("killed")
        with mlflow.start_run() as run:
            print("run", run.info.run_id, flush=True)
            for step in range(500):
                mlflow.log_metrics({"a": step, "b": -step}, step=step)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        environ=RELAY,
    )
    run_id = id_in(rank.communicate(timeout=60)[0])
    assert rank.returncode == -signal.SIGKILL
    run = wait_until(
        lambda: next(
            (
                each
                for each in node.status()["runs"]
                if each["mlflow_run_id"] == run_id and each["state"] == "ended"
            ),
            None,
        ),
        "the run has ended",
    )
    assert run["status"] == "FAILED"
    assert "vanished" in mlflow_server.client().get_run(run_id).data.tags["relay.end_reason"]
    points = mlflow_server.all_points(run_id)
    assert sorted((key, step) for key, _, _, step in points) == sorted(
        (key, step) for key in "ab" for step in range(500)
    )


def test_with_the_server_away_a_training_begins_reads_and_ends(
    node, proxy, mlflow_server, tmp_path
):
    proxy.refuse()
    rank = node.rank(
        """
        import json, time, mlflow
        mlflow.set_experiment("away from the start")
        with mlflow.start_run(run_name="lonely") as run:
            mlflow.log_params({"lr": 0.1})
            for step in range(50):
                mlflow.log_metric("loss", step, step=step)
            mlflow.set_tag("t", 1)
            for row in (1, 2):  # the second time it reads what the first has written
                mlflow.log_table({"row": [row]}, "table.json")
            seen = mlflow.get_run(run.info.run_id)
            history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
            with mlflow.start_run(nested=True, run_name="inner"):
                mlflow.log_metric("m", 1.0)
        ended = mlflow.get_run(run.info.run_id)
        print(json.dumps([run.info.run_id, seen.data.params, seen.data.metrics, len(history),
                          ended.info.status]))
        """,
        environ=RELAY,
    )
    (output,) = finish([rank])
    run_id, *seen = last_json(output)
    assert seen == [{"lr": "0.1"}, {"loss": 49.0}, 50, "FINISHED"]

    proxy.heal()
    node.wait_until_ended(run_id)
    client = mlflow_server.client()
    experiment = client.get_experiment_by_name("away from the start")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["inner", "lonely"]
    lonely = runs["lonely"]
    assert lonely.info.status == "FINISHED"
    assert runs["inner"].data.tags["mlflow.parentRunId"] == lonely.info.run_id
    assert len(mlflow_server.all_points(lonely.info.run_id)) == 50
    wait_until(lambda: not node.run(run_id)["artifacts"]["waiting"], "the table is there")
    table = client.download_artifacts(lonely.info.run_id, "table.json", str(tmp_path))
    assert json.loads(Path(table).read_text())["data"] == [[1], [2]]


def test_a_daemon_that_dies_in_the_middle_stops_no_training(mlflow_server, tmp_path):
    with Node(tmp_path, mlflow_server.uri) as node:
        node.start()
        rank = node.rank(
            """
            import sys, time, mlflow
            with mlflow.start_run() as run:
                mlflow.log_metric("m", 0, step=0)
                print("begun", flush=True)
                sys.stdin.readline()
                begin = time.monotonic()
                for step in range(1, 100):
                    mlflow.log_metric("m", step, step=step)
                print("logged", flush=True)
                sys.stdin.readline()
            """,
            environ=RELAY,
        )
        assert rank.stdout is not None
        assert rank.stdin is not None
        while "begun" not in rank.stdout.readline():
            pass
        wait_until(lambda: node.run()["mlflow_run_id"], "the run is there")
        node.kill()
        rank.stdin.write("\n")
        rank.stdin.flush()
        while "logged" not in rank.stdout.readline():
            pass
        rank.communicate("\n", timeout=60)
        assert rank.returncode == 0
        node.start()
        run = node.wait_until_ended()
        assert run["status"] == "FINISHED"
        steps = [step for *_, step in mlflow_server.all_points(run["mlflow_run_id"])]
        assert sorted(steps) == list(range(100))


def test_a_forked_process_logs_to_the_same_run_and_ends_it_not(node, mlflow_server):
    rank = node.rank(
        """
        import os, json, mlflow
        with mlflow.start_run() as run:
            mlflow.log_metric("parent", 1.0)
            child = os.fork()
            if child == 0:  # MLflow's fluent functions would begin a run of their own here
                mlflow.MlflowClient().log_metric(run.info.run_id, "child", 2.0)
                os._exit(0)
            os.waitpid(child, 0)
            mlflow.log_metric("parent", 2.0, step=1)
            print("run", run.info.run_id, flush=True)
        """,
        environ=RELAY,
    )
    run_id = id_in(finish([rank])[0])

    def arrived() -> bool:
        return sorted(key for key, *_ in mlflow_server.all_points(run_id)) == [
            "child",
            "parent",
            "parent",
        ]

    wait_until(arrived, "all points are there")
    assert mlflow_server.client().get_run(run_id).info.status == "FINISHED"


def test_without_a_daemon_it_is_said_at_once_what_to_do(tmp_path, mlflow_server):
    with Node(tmp_path, mlflow_server.uri) as node:
        rank = node.rank(
            """
            import mlflow
            try:
                mlflow.start_run()
            except mlflow.MlflowException as error:
                print(error.error_code, error)
            """,
            environ=RELAY,
        )
        (output,) = finish([rank], timeout_s=30)
    assert "TEMPORARILY_UNAVAILABLE" in output
    assert "mlflow-relay daemon" in output


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("relay://?no_such=1", "'no_such' is no option"),
        ("relay://host/x", "relay:///path/to/relay.sock"),
        ("relay://?end_timeout_s=soon", "a number of at least 0"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused_in_words(uri, said):
    from mlflow.exceptions import MlflowException

    from mlflow_relay.mlflow_store import RelayStore

    with pytest.raises(MlflowException, match=said):
        RelayStore(uri)


#: Python imports it before the daemon, and makes it another release.
OTHER_RELEASE = {
    "newer": """
import mlflow_relay_daemon.control as control
control.API_VERSION, control.__version__ = 2, "9.0.0"
""",
    "older": """
import mlflow_relay._version as own
own.__version__ = "0.0.1"
from mlflow_relay_daemon.control import Control
answer = Control.answer
def without_door(self, peer, payload, uid=None):
    return answer(self, peer, payload.replace(b"door", b"d00r"), uid)
Control.answer = without_door
""",
}


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("newer", r"its daemon \(9\.0\.0\) do not understand each other: update the older one"),
        (
            "older",
            r"no command of this daemon \(0\.0\.1\): it is older than this client .*, restart",
        ),
    ],
)
def test_a_daemon_of_another_release_is_told_apart(
    release, said, mlflow_server, tmp_path, monkeypatch
):
    from mlflow.exceptions import MlflowException

    from mlflow_relay.mlflow_store import RelayStore

    monkeypatch.setenv("NO_PROXY", os.environ.get("NO_PROXY", "127.0.0.1"))
    (tmp_path / "sitecustomize.py").write_text(OTHER_RELEASE[release])
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        node._daemon_environ["PYTHONPATH"] = str(tmp_path)
        node.start()
        store = RelayStore(f"relay://{node.socket}")
        with pytest.raises(MlflowException, match=said):
            store.get_experiment("0")
