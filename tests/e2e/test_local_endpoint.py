"""MLflow's REST API on the daemon's port: the same answers as the server's, and none lost."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import MlflowServer, TcpProxy
from tests.support.browser import Chromium, find_chromium
from tests.support.proxy import answer
from tests.support.relay import Node, wait_until
from tests.support.servers import free_port

T0_MS = 1_700_000_000_000


class Api:
    """One client that speaks MLflow's API by hand."""

    def __init__(self, uri: str) -> None:
        self.address = uri.removeprefix("http://")

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any]:
        """Return status and content of an answer."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            kind = {"Content-Type": "application/json"}
            connection.request(method, path, data, {**kind, **(headers or {})})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(content)
        except ValueError:
            return answer.status, content

    def post(self, path: str, /, **body: Any) -> Any:
        """Return the content of a good answer."""
        status, content = self.ask("POST", f"/api/2.0/mlflow/{path}", body)
        assert status == 200, content
        return content

    def get(self, name: str, query: str) -> Any:
        """Return the content of a good answer."""
        status, content = self.ask("GET", f"/api/2.0/mlflow/{name}?{query}")
        assert status == 200, content
        return content

    def new_run(self, **fields: Any) -> str:
        """Return the id of a new run."""
        body = {"experiment_id": "0", "start_time": T0_MS, **fields}
        return str(self.post("runs/create", **body)["run"]["info"]["run_id"])

    def run(self, run_id: str) -> dict[str, Any]:
        """Return status, params, tags and latest metrics."""
        run = self.get("runs/get", f"run_id={run_id}")["run"]
        data = {
            name: {each["key"]: each["value"] for each in run["data"].get(name, [])}
            for name in ("params", "tags", "metrics")
        }
        return {**run["info"], **data}


@pytest.fixture(scope="module")
def proxy(mlflow_server: MlflowServer) -> Iterator[TcpProxy]:
    with TcpProxy(mlflow_server.uri) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def node(proxy: TcpProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    settings = {"http_port": free_port()}
    with Node(tmp_path_factory.mktemp("endpoint"), proxy.uri, settings=settings) as node:
        node.start()
        yield node


@pytest.fixture
def relay(node: Node) -> Api:
    return Api(f"http://127.0.0.1:{node.status()['daemon']['http_port']}")


@pytest.fixture(autouse=True)
def healed(proxy: TcpProxy) -> Iterator[None]:
    yield
    proxy.heal()


BAD_BODIES = [
    ("runs/log-metric", {}),
    ("runs/log-metric", {"key": "m", "value": 1, "timestamp": 1}),
    ("runs/log-metric", {"run_id": "RUN", "value": 1, "timestamp": 1}),
    ("runs/log-metric", {"run_id": "RUN", "key": "m", "timestamp": 1}),
    ("runs/log-metric", {"run_id": "RUN", "key": "m", "value": 1}),
    ("runs/log-metric", {"run_id": "RUN", "key": "m@", "value": 1, "timestamp": 1}),
    ("runs/log-metric", {"run_id": "RUN", "key": "a//b", "value": 1, "timestamp": 1}),
    ("runs/log-metric", {"run_id": "RUN", "key": "m" * 251, "value": 1, "timestamp": 1}),
    ("runs/log-metric", {"run_id": "RUN", "key": "m", "value": 1, "timestamp": -1}),
    ("runs/log-parameter", {"run_id": "RUN", "value": "v"}),
    ("runs/log-parameter", {"run_id": "RUN", "key": "p", "value": "another"}),
    ("runs/log-parameter", {"run_id": "RUN", "key": "../p", "value": "v"}),
    ("runs/set-tag", {"run_id": "RUN", "value": "v"}),
    ("runs/set-tag", {"run_id": "RUN", "key": "t,", "value": "v"}),
    ("runs/delete-tag", {"run_id": "RUN", "key": "not there"}),
    ("runs/delete-tag", {"run_id": "RUN"}),
    ("runs/log-batch", {}),
    ("runs/log-batch", {"run_id": "RUN", "metrics": [{"key": "m", "value": 1}]}),
    ("runs/log-batch", {"run_id": "RUN", "metrics": [{"key": "m", "timestamp": 1}]}),
    ("runs/log-batch", {"run_id": "RUN", "params": [{"value": "v"}]}),
    ("runs/log-batch", {"run_id": "RUN", "params": [{"key": "p", "value": "another"}]}),
    ("runs/log-batch", {"run_id": "RUN", "params": [{"key": "q", "value": "1"}] * 2}),
    ("runs/log-batch", {"run_id": "RUN", "params": [{"key": f"{n}", "value": ""} for n in range(101)]}),
    ("runs/log-batch", {"run_id": "RUN", "tags": [{"key": f"{n}", "value": ""} for n in range(101)]}),
    ("runs/log-batch", {"run_id": "RUN", "metrics": [{"key": "m", "value": 1, "timestamp": n} for n in range(1001)]}),
    ("runs/log-metric", {"run_id": "f" * 32, "key": "m", "value": 1, "timestamp": 1}),
    ("runs/log-metric", {"run_id": "not an id!", "key": "m", "value": 1, "timestamp": 1}),
    ("runs/create", {"experiment_id": "987654"}),
    ("runs/create", {"run_name": "a", "tags": [{"key": "mlflow.runName", "value": "b"}]}),
    ("runs/update", {"status": "FINISHED"}),
    ("experiments/create", {}),
]  # fmt: skip


def test_what_the_server_refuses_is_refused_with_its_own_code_and_words(relay, mlflow_server):
    server = Api(mlflow_server.uri)
    run_ids = {}
    for name, api in (("relay", relay), ("server", server)):
        run_ids[name] = api.new_run()
        api.post("runs/log-parameter", run_id=run_ids[name], key="p", value="v")

    differing = []
    for path, body in BAD_BODIES:
        said = {}
        for name, api in (("relay", relay), ("server", server)):
            text = json.dumps(body).replace('"RUN"', f'"{run_ids[name]}"').encode()
            status, content = api.ask("POST", f"/api/2.0/mlflow/{path}", text)
            words = str(content.get("message", "")).replace(run_ids[name], "RUN")
            said[name] = status, content.get("error_code"), words
        if said["relay"] != said["server"]:
            differing.append((path, str(body)[:80], said))
    assert differing == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"metrics": [{"key": "m", "value": "abc", "timestamp": 1}]},
        {"metrics": [{"key": "m", "value": 1, "timestamp": 1.5}]},
        {"metrics": [{"key": "m", "value": 1, "timestamp": 1, "step": 1 << 63}]},
        {"metrics": [{"key": "m", "value": True, "timestamp": 1}]},
        {"params": [{"key": "p", "value": 5}]},
        {"tags": [{"key": "t", "value": ["a"]}]},
        {"metrics": "none"},
        b'{"run_id": "RUN", "metrics": [{"key": "m", "value": NaN, "timestamp": 1}]}',
        b'{"run_id": "RUN", "metrics": [{"key": "m", "value": 1e400, "timestamp": 1}]}',
        b'{"run_id": "RUN"',
    ],
    ids=str,
)
def test_what_the_server_would_swallow_is_refused(relay, wrong):
    run_id = relay.new_run()
    if isinstance(wrong, bytes):
        body = wrong.replace(b"RUN", run_id.encode())
    else:
        good = [{"key": "good", "value": 1, "timestamp": 1}]
        body = json.dumps({"run_id": run_id, "metrics": good, **wrong}).encode()

    status, content = relay.ask("POST", "/api/2.0/mlflow/runs/log-batch", body)

    assert (status, content["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), content
    assert relay.run(run_id)["metrics"] == {}


def test_numbers_that_json_has_no_words_for_come_as_the_server_has_them(relay, mlflow_server):
    values = {"nan": "NaN", "inf": "Infinity", "minus": "-Infinity", "text": "1.5"}
    metrics = [{"key": key, "value": value, "timestamp": "7"} for key, value in values.items()]
    seen = []
    for api in (relay, Api(mlflow_server.uri)):
        run_id = api.new_run()
        api.post("runs/log-batch", run_id=run_id, metrics=metrics)
        seen.append(api.run(run_id)["metrics"])
    assert seen[0] == seen[1]


def test_with_the_server_away_runs_begin_go_on_are_read_and_end(relay, node, proxy, mlflow_server):
    before = relay.new_run(run_name="before")
    proxy.refuse()
    experiment = relay.post("experiments/create", name="made offline")["experiment_id"]
    run_id = relay.new_run(experiment_id=experiment, run_name="offline")
    child = relay.new_run(
        experiment_id=experiment,
        run_name="child",
        tags=[{"key": "mlflow.parentRunId", "value": run_id}],
    )
    for step in range(20):
        for each in (before, run_id):
            relay.post(
                "runs/log-metric",
                run_id=each,
                key="loss",
                value=step / 2,
                timestamp=T0_MS + step,
                step=step,
            )
    relay.post("runs/log-parameter", run_id=run_id, key="p", value="v")
    relay.post("runs/set-tag", run_id=run_id, key="kept", value="1")
    relay.post("runs/set-tag", run_id=run_id, key="gone", value="1")
    relay.post("runs/delete-tag", run_id=run_id, key="gone")
    dataset = {"name": "d", "digest": "abc", "source_type": "local", "source": "x"}
    relay.post("runs/log-inputs", run_id=run_id, datasets=[{"dataset": dataset, "tags": []}])
    relay.post("runs/update", run_id=run_id, run_name="renamed")
    relay.post("runs/update", run_id=run_id, status="FAILED", end_time=T0_MS + 99)

    offline = relay.run(run_id)
    assert (offline["status"], offline["end_time"]) == ("FAILED", T0_MS + 99)
    assert (offline["run_name"], offline["params"]) == ("renamed", {"p": "v"})
    assert offline["metrics"] == {"loss": 9.5}
    assert "gone" not in offline["tags"]
    history = relay.get("metrics/get-history", f"run_id={run_id}&metric_key=loss")["metrics"]
    assert [point["step"] for point in history] == list(range(20))
    assert relay.run(before)["metrics"] == {"loss": 9.5}
    named = relay.get("experiments/get-by-name", "experiment_name=made%20offline")
    assert named["experiment"]["experiment_id"] == experiment
    status, said = relay.ask("POST", "/api/2.0/mlflow/runs/search", {"experiment_ids": ["0"]})
    assert (status, said["error_code"]) == (424, "TEMPORARILY_UNAVAILABLE")

    proxy.heal()
    node.wait_until_ended(run_id)
    online = relay.run(run_id)
    assert {**online, "tags": None} == {
        **offline,
        "tags": None,
        "artifact_uri": online["artifact_uri"],
        "experiment_id": online["experiment_id"],
    }
    runs = relay.post("runs/search", experiment_ids=[experiment])["runs"]
    servers = {run["info"]["run_name"]: run["info"]["run_id"] for run in runs}
    assert sorted(servers) == ["child", "renamed"]
    points = mlflow_server.all_points(servers["renamed"])
    assert [(value, at_ms, step) for _, value, at_ms, step in points] == [
        (step / 2, T0_MS + step, step) for step in range(20)
    ]
    client = mlflow_server.client()
    assert client.get_run(servers["child"]).data.tags["mlflow.parentRunId"] == servers["renamed"]
    assert client.get_run(servers["renamed"]).inputs.dataset_inputs[0].dataset.digest == "abc"
    assert relay.run(child)["run_id"] == child


def test_others_runs_are_written_to_and_left_as_they_are(relay, mlflow_server, proxy):
    server = Api(mlflow_server.uri)
    ended, deleted = server.new_run(), server.new_run()
    server.post("runs/update", run_id=ended, status="FINISHED", end_time=T0_MS + 5)
    server.post("runs/delete", run_id=deleted)

    relay.post("runs/log-metric", run_id=ended, key="late", value=2, timestamp=T0_MS)
    status, said = relay.ask(
        "POST", "/api/2.0/mlflow/runs/set-tag", {"run_id": deleted, "key": "t", "value": "v"}
    )
    assert (status, said["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), said
    assert relay.run(ended)["metrics"] == {"late": 2}
    wait_until(lambda: server.run(ended)["metrics"] == {"late": 2}, "the server has the metric")
    seen = server.run(ended)
    assert (seen["status"], seen["end_time"]) == ("FINISHED", T0_MS + 5)
    assert [key for key in seen["tags"] if not key.startswith(("mlflow.", "relay."))] == []

    relay.post("runs/update", run_id=ended, status="RUNNING")
    wait_until(lambda: server.run(ended)["status"] == "RUNNING", "it goes on")
    relay.post("runs/update", run_id=ended, status="KILLED", end_time=T0_MS + 9)
    assert relay.run(ended)["status"] == "KILLED"
    wait_until(lambda: server.run(ended)["status"] == "KILLED", "it has ended again")
    assert server.run(ended)["end_time"] == T0_MS + 9


def test_every_point_that_was_answered_before_a_kill_is_delivered_once(mlflow_server, tmp_path):
    port = free_port()
    with Node(tmp_path, mlflow_server.uri, settings={"http_port": port}) as node:
        node.start()
        relay = Api(f"http://127.0.0.1:{port}")
        run_id = relay.new_run()
        answered: list[int] = []

        def log(first: int) -> None:
            for step in range(first, first + 200):
                try:
                    relay.post(
                        "runs/log-metric",
                        run_id=run_id,
                        key="m",
                        value=step,
                        timestamp=T0_MS,
                        step=step,
                    )
                except (OSError, http.client.HTTPException):
                    return  # the kill
                answered.append(step)

        with ThreadPoolExecutor(4) as pool:
            for worker in range(4):
                pool.submit(log, worker * 1000)
            wait_until(lambda: len(answered) > 40, "points are answered")
            node.kill()
        node.start()
        assert relay.run(run_id)["status"] == "RUNNING"
        relay.post("runs/update", run_id=run_id, status="FINISHED", end_time=T0_MS + 1)
        servers_id = node.wait_until_ended()["mlflow_run_id"]
        steps = [step for *_, step in mlflow_server.all_points(servers_id)]
        assert len(steps) == len(set(steps))
        assert set(answered) <= set(steps)
        assert len(set(steps) - set(answered)) <= 4, "more than what was on its way"


#: A disk of which the kernel says EIO for a segment, as long as a file says so: neither is what was
#: written synced, nor can it be taken back. Python imports it before the daemon.
FAILING_DISK = """
import errno, os
real = {name: getattr(os, name) for name in ("fdatasync", "ftruncate")}

def failing(name):
    def call(fd, *arguments):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith(".segment") and os.path.exists(os.environ["FAILING_WHILE"]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real[name](fd, *arguments)
    return call

for name in real:
    setattr(os, name, failing(name))
"""


def test_what_is_answered_after_a_write_that_failed_outlives_the_daemon(mlflow_server, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(FAILING_DISK)
    trouble, port = tmp_path / "trouble", free_port()
    with (
        TcpProxy(mlflow_server.uri) as proxy,
        Node(tmp_path, proxy.uri, settings={"http_port": port}) as node,
    ):
        node._daemon_environ |= {
            "PYTHONPATH": str(tmp_path / "path"),
            "FAILING_WHILE": str(trouble),
        }
        node.start()
        relay = Api(f"http://127.0.0.1:{port}")
        run_id = relay.new_run()
        proxy.refuse()

        def log(step: int) -> int:
            point = {"key": "m", "value": step, "timestamp": T0_MS, "step": step}
            path = "/api/2.0/mlflow/runs/log-metric"
            return relay.ask("POST", path, {"run_id": run_id, **point})[0]

        assert log(0) == 200
        trouble.touch()
        assert log(1) == 503
        trouble.unlink()
        assert [log(2), log(3)] == [200, 200]
        node.kill()
        node.start()
        proxy.heal()
        relay.post("runs/update", run_id=run_id, status="FINISHED", end_time=T0_MS + 1)
        run = node.wait_until_ended()

        steps = {step for *_, step in mlflow_server.all_points(run["mlflow_run_id"])}
        assert {0, 2, 3} <= steps <= {0, 1, 2, 3}
        assert (run["status"], run["damaged_records"]) == ("FINISHED", 0)


def test_sixty_four_clients_at_once_are_all_answered(relay, node):
    run_ids = [relay.new_run() for _ in range(4)]

    def log(client: int) -> None:
        for step in range(5):
            relay.post(
                "runs/log-metric",
                run_id=run_ids[client % 4],
                key=f"m{client}",
                value=step,
                timestamp=T0_MS,
                step=step,
            )

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(log, range(64)))
    found = [relay.run(run_id)["metrics"] for run_id in run_ids]
    assert [len(metrics) for metrics in found] == [16] * 4
    assert all(set(metrics.values()) == {4} for metrics in found)


def test_another_user_is_refused_without_the_token_and_served_with_it(relay, node):
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    token = (node.runtime / "http-token").read_text()
    assert (node.runtime / "http-token").stat().st_mode & 0o777 == 0o600
    url = f"http://{relay.address}/api/2.0/mlflow/experiments/get?experiment_id=0"

    def as_nobody(url: str, token: str) -> str:
        bearer = ["-H", f"Authorization: Bearer {token}"] if token else []
        command = ["curl", "-sS", "-w", "%{stderr}%{http_code}", url, *bearer]
        done = subprocess.run(command, capture_output=True, text=True, check=True, user=65534)
        return done.stderr + done.stdout

    refused = as_nobody(url, "")
    assert refused.startswith("401"), refused
    assert "http-token" in refused
    assert as_nobody(url, "wrong").startswith("401")
    assert as_nobody(url, token).startswith("200")
    assert as_nobody(f"http://{relay.address}/health", "").startswith("200")


def test_a_page_of_the_internet_in_our_own_browser_is_refused(relay):
    status, said = relay.ask(
        "POST", "/api/2.0/mlflow/runs/create", {}, {"Origin": "https://example.com"}
    )
    assert (status, said["error_code"]) == (403, "PERMISSION_DENIED")


def test_everything_else_is_the_servers_own_answer(relay, mlflow_server):
    server = Api(mlflow_server.uri)
    for method, path, body in (
        ("GET", "/version", None),
        ("GET", "/", None),
        ("GET", "/api/2.0/mlflow/registered-models/get?name=none", None),
        ("POST", "/ajax-api/2.0/mlflow/experiments/search", {"max_results": 1}),
        ("GET", "/no/such/page", None),
    ):
        assert relay.ask(method, path, body) == server.ask(method, path, body), path


def test_files_of_any_size_go_both_ways_in_chunks(relay, mlflow_server):
    run_id = relay.new_run()
    path = f"/api/2.0/mlflow-artifacts/artifacts/0/{run_id}/artifacts/big.bin"
    data = os.urandom(3 << 20)
    status, _ = relay.ask("PUT", path, data, {"Content-Type": "application/octet-stream"})
    assert status == 200
    assert relay.ask("GET", path)[1] == data
    listed = relay.get("artifacts/list", f"run_id={run_id}")["files"]
    assert listed == [{"path": "big.bin", "is_dir": False, "file_size": len(data)}]


def test_files_that_are_uploaded_while_the_server_is_away_arrive_later(
    relay, node, proxy, mlflow_server, tmp_path
):
    known = relay.new_run()
    proxy.refuse()
    unknown = relay.new_run()
    files = {"small.txt": b"hello", "sub/large.bin": os.urandom(2 << 20)}
    for run_id in (known, unknown):
        for path, data in files.items():
            address = f"/api/2.0/mlflow-artifacts/artifacts/0/{run_id}/artifacts/{path}"
            status, said = relay.ask("PUT", address, data, {"Content-Type": "text/plain"})
            assert (status, said) == (200, {})
        relay.post("runs/update", run_id=run_id, status="FINISHED", end_time=T0_MS + 1)
    proxy.heal()
    client = mlflow_server.client()
    for run_id in (known, unknown):
        servers_id = wait_until(
            lambda run_id=run_id: next(
                each["mlflow_run_id"]
                for each in node.status()["runs"]
                if run_id in (each["run_id"], each["mlflow_run_id"])
            ),
            "the run is there",
        )
        wait_until(
            lambda servers_id=servers_id: len(client.list_artifacts(servers_id)) == 2,
            "its files are there",
        )
        folder = tmp_path / servers_id
        folder.mkdir()
        for path, data in files.items():
            found = client.download_artifacts(servers_id, path, str(folder))
            assert Path(found).read_bytes() == data


def test_files_that_wait_are_listed_and_read_and_the_later_of_a_name_stands(
    relay, node, proxy, mlflow_server
):
    known = relay.new_run()

    def put(run_id: str, path: str, data: bytes) -> None:
        address = f"/api/2.0/mlflow-artifacts/artifacts/0/{run_id}/artifacts/{path}"
        assert relay.ask("PUT", address, data, {"Content-Type": "text/plain"})[0] == 200

    def read(run_id: str, path: str) -> Any:
        return relay.ask("GET", f"/api/2.0/mlflow-artifacts/artifacts/0/{run_id}/artifacts/{path}")

    def names(run_id: str, folder: str = "") -> list[str]:
        found = relay.get("artifacts/list", f"run_id={run_id}&path={folder}")["files"]
        query = f"path=0/{run_id}/artifacts/{folder}".rstrip("/")
        status, listed = relay.ask("GET", f"/api/2.0/mlflow-artifacts/artifacts?{query}")
        assert status == 200, listed
        assert [each["path"].rpartition("/")[2] for each in found] == [
            each["path"] for each in listed["files"]
        ]
        return [each["path"] + "/" * each["is_dir"] for each in found]

    put(known, "before.txt", b"at the server")
    wait_until(lambda: relay.run(known)["artifact_uri"], "the run is there")
    proxy.refuse()
    new = relay.new_run()
    assert names(new) == []
    for run_id in (known, new):
        put(run_id, "sub/a.txt", b"first")
        put(run_id, "sub/a.txt", b"second")
        put(run_id, "b.txt", b"of b")
        assert read(run_id, "sub/a.txt") == (200, b"second")
        asked_by_ui = f"/ajax-api/2.0/mlflow/get-artifact?path=sub%2Fa.txt&run_uuid={run_id}"
        assert relay.ask("GET", asked_by_ui) == (200, b"second")
    assert names(new) == ["b.txt", "sub/"]
    assert names(new, "sub") == ["sub/a.txt"]
    # Half a list would be believed: code that misses a file in it writes that file anew.
    status, said = relay.ask("GET", f"/api/2.0/mlflow/artifacts/list?run_id={known}")
    assert (status, said["error_code"]) == (424, "TEMPORARILY_UNAVAILABLE")
    assert read(known, "before.txt")[0] == 424

    proxy.heal()
    put(known, "b.txt", b"the last")  # while an earlier one may still wait
    wait_until(lambda: not waiting_files(node), "all files are there")
    for run_id, last in ((known, b"the last"), (new, b"of b")):
        before = ["before.txt"] if run_id == known else []
        assert names(run_id) == ["b.txt", *before, "sub/"]
        assert read(run_id, "b.txt") == (200, last)
        assert read(run_id, "sub/a.txt") == (200, b"second")


def test_while_the_store_is_away_a_list_is_the_servers_with_what_waits(
    relay, node, proxy, mlflow_server
):
    """The server answers; only uploads fail."""
    run_id = relay.new_run()
    address = f"/api/2.0/mlflow-artifacts/artifacts/0/{run_id}/artifacts/"
    kind = {"Content-Type": "text/plain"}
    assert relay.ask("PUT", address + "there.txt", b"1", kind)[0] == 200
    proxy.fail(answer(503), on=b"PUT /api/2.0/mlflow-artifacts/")
    proxy.refuse()
    assert relay.ask("PUT", address + "waits.txt", b"first", kind)[0] == 200
    proxy._listen()

    def listed() -> list[str]:
        status, found = relay.ask("GET", f"/api/2.0/mlflow/artifacts/list?run_id={run_id}")
        return [each["path"] for each in found["files"]] if status == 200 else []

    wait_until(lambda: listed() == ["there.txt", "waits.txt"], "both are listed")
    assert relay.ask("PUT", address + "waits.txt", b"second", kind) == (200, {})
    assert relay.ask("GET", address + "waits.txt") == (200, b"second")
    proxy.heal()
    wait_until(lambda: not waiting_files(node), "all files are there")
    found = mlflow_server.client().download_artifacts(run_id, "waits.txt", str(node.folder))
    assert Path(found).read_bytes() == b"second"


def waiting_files(node: Node) -> int:
    return sum(run["artifacts"]["waiting"] for run in node.status()["runs"])


def test_curl_logs_and_reads(relay):
    def curl(path: str, *arguments: str) -> Any:
        url = f"http://{relay.address}/api/2.0/mlflow/{path}"
        command = ["curl", "-sS", "--fail-with-body", url, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    body = json.dumps({"experiment_id": "0", "start_time": T0_MS})
    run_id = curl("runs/create", "--json", body)["run"]["info"]["run_id"]
    metric = {"run_id": run_id, "key": "m", "value": 1.5, "timestamp": T0_MS}
    assert curl("runs/log-metric", "-d", json.dumps(metric)) == {}
    found = curl(f"runs/get?run_id={run_id}")["run"]["data"]["metrics"]
    assert [each["value"] for each in found] == [1.5]


def test_the_ui_of_mlflow_is_served_through_the_endpoint(relay, tmp_path):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    run_id = relay.new_run(run_name="seen in a browser")
    relay.post("runs/log-metric", run_id=run_id, key="loss", value=0.125, timestamp=T0_MS)
    with Chromium(tmp_path, chromium) as browser:
        browser.open(f"http://{relay.address}/#/experiments/0/runs/{run_id}")
        for text in ("seen in a browser", "0.125"):
            browser.wait_for(
                f"document.body.innerText.includes('{text}')", f"the page shows {text}"
            )
        browser.screenshot("through-the-endpoint")
