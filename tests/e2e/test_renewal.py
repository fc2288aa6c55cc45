"""What is renewed while the daemon runs: the server's token, and its settings at SIGHUP."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import TcpProxy
from tests.support.jobs import assert_exactly, only_run, status_when
from tests.support.proxy import answer
from tests.support.relay import Node, finish, wait_until
from tests.support.scenes import fresh_name

RANK = """
import sys, time, mlflow_relay
with mlflow_relay.start_run("renewal", run_key=sys.argv[1], rank=0, world_size=1) as run:
    for step in range(400):
        run.log_metric("loss", step / 4, step=step)
        if step == 200:
            print("half", flush=True)
            sys.stdin.readline()
"""
REFUSAL = json.dumps({"error_code": "UNAUTHENTICATED", "message": "token expired"}).encode()


class Guard:
    """A server in front of the real one that knows one token, and answers 401 to all others."""

    def __init__(self, proxy: TcpProxy) -> None:
        self.token = ""
        self.refused = proxy.fail(
            answer(401, REFUSAL, content_type="application/json"),
            on=lambda head: b"bearer " + self.token.encode() not in head.lower(),
        )


@pytest.fixture
def guard(mlflow_proxy) -> Guard:
    return Guard(mlflow_proxy)


@pytest.fixture
def token_file(tmp_path) -> Path:
    return tmp_path / "token"


@pytest.fixture
def node(tmp_path, mlflow_proxy, token_file) -> Iterator[Node]:
    settings = {"token_file": token_file, "retry_wait_s_max": 3600}
    with Node(tmp_path / "node", mlflow_proxy.uri, settings=settings) as node:
        yield node


@pytest.mark.parametrize("by_signal", [False, True])
def test_delivery_goes_on_when_an_expired_token_is_renewed_and_no_point_is_lost(
    node, guard, token_file, mlflow_server, by_signal
):
    if not by_signal:  # then it is seen at the next try, which must not be an hour away
        node._daemon_environ["MLFLOW_RELAY_RETRY_WAIT_S_MAX"] = "0.5"
    guard.token = "first-token"
    token_file.write_text("first-token\n")
    node.start()
    pid = node.daemon.pid
    key = fresh_name("key")
    rank = node.rank(RANK, key)
    assert rank.stdout.readline() == "half\n"
    status_when(node, key, lambda run: run["delivered_records"] >= 200, "half is delivered")

    guard.token = "second-token"
    rank.stdin.write("on\n")
    finish([rank])
    wait_until(lambda: node.status()["server"]["state"] == "down", "the token is refused")
    wait_until(lambda: guard.refused.hits >= 3, "the server is asked again and again")
    status = node.status()
    assert "401" in status["server"]["last_error"] or "token" in status["server"]["last_error"]
    assert "-token" not in json.dumps(status)
    assert status["runs"][0]["waiting_records"] > 0

    token_file.write_text("second-token\n")
    if by_signal:
        node.daemon.send_signal(signal.SIGHUP)
    node.wait_until_ended()
    assert node.daemon.pid == pid
    run = only_run(mlflow_server, key)
    assert_exactly(
        mlflow_server.all_points(run.info.run_id), [("loss", i, i / 4) for i in range(400)]
    )
    assert "-token" not in node.log.read_text()


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read: No such file"), (" \n", "is empty")]
)
def test_a_token_file_without_a_token_is_said_and_waited_for(node, token_file, content, said):
    if content is not None:
        token_file.write_text(content)
    node.start()
    finish(
        [
            node.rank(
                "import mlflow_relay as m\nwith m.start_run(run_key='k'): m.log_metric('a', 1.0)"
            )
        ]
    )
    wait_until(lambda: node.status()["server"]["state"] == "down", "nobody can be asked")
    assert said in node.status()["server"]["last_error"]
    token_file.write_text("any")
    node.daemon.send_signal(signal.SIGHUP)
    node.wait_until_ended()


def test_sighup_takes_over_what_it_can_and_says_what_needs_a_restart(node, tmp_path, token_file):
    token_file.write_text("any")
    file = tmp_path / "relay.toml"
    file.write_text('log_level = "warning"\n')
    node._daemon_environ["MLFLOW_RELAY_CONFIG"] = str(file)
    node.start()

    file.write_text('log_level = "info"\nspool_bytes_max = "5MB"\nsegment_bytes_max = "1MB"\n')
    node.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "settings are reloaded" in node.log.read_text(), "it is reloaded")
    said = node.log.read_text()
    assert "INFO settings are reloaded: spool_bytes_max, log_level" in said
    assert "WARNING changed, but only a restart takes them over: segment_bytes_max" in said
    assert node.status()["disk"]["spool_bytes_max"] == 5_000_000

    file.write_text("spool_bytes_max = -1\n")
    node.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "nothing is reloaded" in node.log.read_text(), "it is refused")
    assert f"nothing is reloaded: {file}: spool_bytes_max = -1 is refused" in node.log.read_text()
    assert node.status()["disk"]["spool_bytes_max"] == 5_000_000
