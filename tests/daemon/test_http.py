"""The local HTTP port: what is served, to whom, and that it never stands in the way of ranks."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.support.relay import Node, wait_until


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Iterator[Node]:
    """An offline node whose daemon serves a port of its own choice."""
    settings = {"http_port": 0, "offline": True, "drain_timeout_s": 0}
    with Node(tmp_path_factory.mktemp("http"), "http://127.0.0.1:1", settings=settings) as node:
        node.start()
        yield node


def get(node: Node, path: str, *, host: str = "", user: bool = True) -> tuple[int, str]:
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
