"""More who knock at the daemon's door than it has file descriptors for.

libzmq ends the process that has no descriptor for a connection that comes in. The crowd comes as
ranks do that are started together, some hundreds in a quarter of a second; who knocks as fast as the
kernel allows is quicker than any thread of the daemon, and ends it: nothing is lost by that.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import pytest

from tests.support.relay import Node, finish, last_json, wait_until
from tests.support.scenes import STEADY, fresh_name, steady_points, stored

DESCRIPTORS = 1024
KNOCKERS, KNOCKS = 2, 800
ROUNDS = 5

KNOCK = """
import socket, sys, time

sys.stdin.readline()
here = []
try:
    for _ in range(int(sys.argv[2])):
        here.append(socket.socket(socket.AF_UNIX))
        here[-1].connect(sys.argv[1])
        time.sleep(0.001)
except OSError:  # nobody is let in any more
    pass
print(len(here), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def node(tmp_path, mlflow_server):
    within = ("sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh")
    with Node(tmp_path / "node", mlflow_server.uri, within=within) as node:
        node.start()
        yield node


def tell(processes: Sequence[subprocess.Popen[str]]) -> None:
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()


def test_a_crowd_that_would_take_all_descriptors_finds_the_door_shut(node, mlflow_server):
    rank = node.rank(STEADY, fresh_name("crowd"), fresh_name("key"))
    run_id = rank.stdout.readline().strip()
    for number in range(ROUNDS):
        crowd = [node.rank(KNOCK, node.socket, KNOCKS) for _ in range(KNOCKERS)]
        tell(crowd)
        came = [int(each.stdout.readline()) for each in crowd]
        print(f"round {number}: {came} of {KNOCKS} each were let in")
        assert sum(came) < KNOCKERS * KNOCKS
        assert node.daemon.poll() is None, "the daemon lives"
        said = node.command("status")
        assert "short of file descriptors" in said.stdout, said
        tell(crowd)
        finish(crowd)
        wait_until(node.socket.exists, "the door is open again")
    calls = last_json(finish([rank])[0])["calls"]

    run = node.wait_until_ended(run_id)
    assert stored(mlflow_server, run["mlflow_run_id"]).points == steady_points(calls)
