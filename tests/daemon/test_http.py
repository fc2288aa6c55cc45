"""The local HTTP port: what is served, to whom, and that it never stands in the way of ranks."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlflow_relay_daemon.api import peers
from mlflow_relay_daemon.api.page import PAGE, content_security_policy
from mlflow_relay_daemon.api.peers import connection_uid, diag_uid, table_uid
from tests.support.relay import Node, finish, wait_until
from tests.support.users import ALICE, MALLORY, skip_unless_root


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Iterator[Node]:
    """An offline node whose daemon serves a port of its own choice."""
    settings = {"http_port": 0, "offline": True, "drain_timeout_s": 0}
    with Node(tmp_path_factory.mktemp("http"), "http://127.0.0.1:1", settings=settings) as node:
        node.start()
        yield node


def get(node: Node, path: str, *, host: str = "") -> tuple[int, str]:
    port = node.status()["daemon"]["http_port"]
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_healthy_daemon_is_live_and_ready(node):
    assert get(node, "/health/live") == (200, "ok")
    assert get(node, "/health/ready") == (200, "ok")


def test_a_page_of_the_internet_that_resolves_to_loopback_is_refused(node):
    assert get(node, "/health/ready", host="evil.example.org")[0] == 400
    assert get(node, "/health/ready", host="localhost")[0] == 200


def test_a_taken_port_is_said_in_the_log_and_the_daemon_serves_its_ranks(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Node(tmp_path, "x", settings={"http_port": port, "offline": True}) as node:
            node.start()
            assert node.status()["daemon"]["http_port"] is None
            assert f"no HTTP on port {port}: Address already in use" in node.log.read_text()


def test_a_spool_that_takes_nothing_is_not_ready_and_lives(tmp_path):
    settings = {"http_port": 0, "offline": True, "drain_timeout_s": 0}
    settings["free_bytes_min"] = "900TB"
    with Node(tmp_path, "x", settings=settings) as node:
        node.start()
        rank = node.rank("import mlflow_relay as m, time; r = m.start_run(run_key='k', rank=0,"
                         " world_size=1); r.log_metric('a', 1.0); input()")  # fmt: skip
        wait_until(lambda: get(node, "/health/ready")[0] == 503, "the daemon is not ready")
        assert "full" in get(node, "/health/ready")[1]
        assert get(node, "/health/live") == (200, "ok")
        rank.kill()
        rank.wait()


# ── metrics ──

RANK = """
import sys, mlflow_relay
with mlflow_relay.start_run("secret-experiment", "secret-name", run_key=sys.argv[1], rank=0,
                            world_size=1) as run:
    for step in range(9):
        run.log_metrics({"a": 1.0, "b": 2.0}, step=step)
"""


def metrics(node: Node) -> dict[str, float]:
    """Return all samples by name and labels."""
    status, text = get(node, "/metrics")
    assert status == 200
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_say_what_came_and_what_waits(node):
    before = metrics(node)
    finish([node.rank(RANK, "metrics")])
    after = metrics(node)
    assert after["mlflow_relay_accepted_records_total"] - before[
        "mlflow_relay_accepted_records_total"
    ] == 10, "nine calls and the end"  # fmt: skip
    assert after["mlflow_relay_waiting_records"] - before["mlflow_relay_waiting_records"] == 10
    assert after["mlflow_relay_delivered_points_total"] == 0
    assert after["mlflow_relay_oldest_waiting_seconds"] > 0
    assert after["mlflow_relay_runs{state=waiting}"] >= 1
    assert after["mlflow_relay_disk_full"] == 0
    assert after["mlflow_relay_disk_free_bytes"] > 0
    assert after["mlflow_relay_fsync_seconds_count"] > before["mlflow_relay_fsync_seconds_count"]
    assert (
        after["mlflow_relay_fsync_seconds_bucket{le=+Inf}"]
        == (after["mlflow_relay_fsync_seconds_count"])
    )
    assert after["process_resident_memory_bytes"] > 1e6


def test_metrics_follow_the_conventions_and_name_nothing_of_a_run(node):
    finish([node.rank(RANK, "names")])
    _, text = get(node, "/metrics")
    assert "secret" not in text
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert re.fullmatch(r"(mlflow_relay|process)_[a-z_]+[a-z]", family.name)
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {
                f"{family.name}_total", f"{family.name}_created"
            }  # fmt: skip


def test_a_count_does_not_fall_when_a_run_is_forgotten():
    from mlflow_relay_daemon.api.metrics import RelayCollector, _flat
    from tests.daemon.test_commands import ID_A, ID_B, a_run

    collector = RelayCollector(None)
    for runs in ([a_run(ID_A, accepted_records=7), a_run(ID_B, accepted_records=5)],
                 [a_run(ID_B, accepted_records=6)], [a_run(ID_B, accepted_records=2)]):  # fmt: skip
        collector._add([_flat(run) for run in runs])
    assert collector._sums["accepted_records"] == 13


# ── the page, and who may see it ──


def test_the_page_asks_nobody_else_and_runs_nothing_but_its_own_script(node):
    status, html = get(node, "/relay/")
    assert status == 200
    assert html == PAGE.read_text()
    assert set(re.findall(r"https?://[^\s\"'`)]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in html
    policy = content_security_policy(html)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_data_of_the_page_is_the_status_of_whoever_asks(node):
    finish([node.rank(RANK, "page")])
    status, body = get(node, "/relay/status")
    assert status == 200
    assert {run["run_id"] for run in json.loads(body)["runs"]} == {
        run["run_id"] for run in node.status()["runs"]
    }
    assert get(node, "/relay/dead-letters/" + "0" * 32) == (200, "[]")


def test_another_user_of_the_node_sees_health_and_sums_and_no_run(node):
    skip_unless_root()
    finish([node.rank(RANK, "other")])
    port = node.status()["daemon"]["http_port"]
    ask = """
    import sys, urllib.request
    for path in ("health/live", "metrics", "relay/status"):
        with urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/{path}") as reply:
            print(path, reply.status, "secret" in reply.read().decode())
    """
    output, _ = ALICE.python(ask, port, environ=node.environ).communicate(timeout=60)
    assert output.splitlines() == [
        "health/live 200 False", "metrics 200 False", "relay/status 200 False",
    ]  # fmt: skip
    assert get(node, "/relay/status")[1].count("secret-name") >= 1


@pytest.mark.parametrize("uid_of", [connection_uid, diag_uid, table_uid])
def test_a_connection_is_known_by_its_owner_and_one_that_is_closed_is_nobodys(uid_of):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        here = listener.getsockname()
        client = socket.create_connection(here)
        name = client.getsockname()
        served, _ = listener.accept()
        with served:
            assert uid_of(name, here) == os.getuid()
            client.close()
            assert uid_of(name, here) is None, "not root's"


@pytest.mark.parametrize("uid_of", [diag_uid, table_uid])
def test_a_connection_of_another_user_is_his(uid_of):
    skip_unless_root()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        here = listener.getsockname()
        other = MALLORY.start(
            *("/bin/bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{here[1]}; read"), environ={}
        )
        try:
            served, name = listener.accept()
            with served:
                assert uid_of(name, here) == MALLORY.uid
        finally:
            other.kill()
            other.communicate()


def test_where_netlink_is_not_allowed_the_table_is_read(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(peers, "diag_uid", refuse)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()) as client:
            found = connection_uid(client.getsockname(), listener.getsockname())
            assert found == os.getuid()


def test_the_port_costs_nothing_where_it_is_not_wanted(tmp_path):
    with Node(tmp_path, "x", settings={"offline": True}) as node:
        node._daemon_environ["PYTHONPROFILEIMPORTTIME"] = "1"
        node.start()
        assert node.stop() == 0
        assert "uvicorn" not in node.log.read_text()
        assert "starlette" not in node.log.read_text()
        assert "prometheus" not in node.log.read_text()
