"""Ranks and daemons killed with SIGKILL: nothing lost, nothing twice, and the run says so."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.jobs import (
    assert_exactly,
    assert_lifetime,
    ended_run,
    ended_status,
    hear,
    last_words,
    logged,
    now_ms,
    only_run,
    reports,
    show,
    start_rank,
    status_when,
    tell,
    wait_for_points,
)
from tests.support.relay import Node, wait_until
from tests.support.seeds import new_seed

KILLS = 20
#: A call takes microseconds; this says only that nothing waits for a daemon that is dead.
STALL_MS_MAX = 1000.0
#: Seconds that a daemon has left: from its exec for every other one, which catches some of them as
#: they start, and from its first answer for the rest. It starts in about 0.2 s.
LIFE_S_MAX = 0.5


@pytest.fixture(scope="module")
def node(tmp_path_factory, mlflow_server) -> Iterator[Node]:
    """One node with a living daemon for all tests here that kill only ranks."""
    with Node(tmp_path_factory.mktemp("node"), mlflow_server.uri) as node:
        node.start()
        yield node


@pytest.fixture
def mortal_node(tmp_path, mlflow_server) -> Iterator[Node]:
    """A node of this test's own."""
    with Node(tmp_path / "node", mlflow_server.uri) as node:
        yield node


# ── ranks ──

KILLED_AFTER_500 = """
    run = mlflow_relay.start_run("kills", run_key=sys.argv[1], rank=0, world_size=1)
    say(json.dumps([os.uname().nodename, os.getpid(), now_ms()]))
    for step in range(499):
        run.log_metrics(metrics(0, step), step=step)
    say(now_ms())
    if sys.argv[1] == "killed by itself":
        run.log_metrics(metrics(0, 499), step=499)
        os.kill(os.getpid(), signal.SIGKILL)
    run.log_metrics(metrics(0, 499), step=499)
    say("done 500")
    hear()
"""


@pytest.mark.parametrize("key", ["killed by the batch system", "killed by itself"])
def test_all_points_of_a_rank_killed_after_its_500th_call_arrive_and_the_run_is_failed(
    node, mlflow_server, key
):
    before_start = now_ms()
    rank = start_rank(node, KILLED_AFTER_500, key)
    host, pid, after_start = json.loads(hear(rank, "["))
    before_end = int(hear(rank, ""))
    if key == "killed by the batch system":
        hear(rank, "done 500")
        rank.kill()
    last_words(rank)
    after_end = now_ms()
    assert rank.returncode == -signal.SIGKILL

    run = ended_run(node, mlflow_server, key)
    assert_exactly(mlflow_server.all_points(run.info.run_id), logged(0, range(500)))
    assert run.info.status == "FAILED"
    reason = run.data.tags["relay.end_reason"]
    assert reason.startswith(f"rank 0 on {host} (pid {pid}) vanished")
    assert before_start <= run.info.start_time <= after_start
    assert before_end <= run.info.end_time <= after_end


def test_one_killed_rank_of_two_fails_the_run_and_is_named(node, mlflow_server):
    script = """
        rank = int(sys.argv[1])
        run = mlflow_relay.start_run("kills", run_key="one of two", rank=rank, world_size=2)
        for step in range(100):
            run.log_metrics(metrics(rank, step), step=step)
        say("logged")
        hear()
        before_end = now_ms()
        run.end()
        report(before_end=before_end, after_end=now_ms())
    """
    ranks = [start_rank(node, script, rank) for rank in range(2)]
    for rank in ranks:
        hear(rank, "logged")
    ranks[1].kill()
    ranks[1].wait()
    status_when(
        node,
        "one of two",
        lambda run: (run["ranks_seen"], run["ranks_alive"], run["waiting_records"]) == (2, 1, 0),
        "rank 1 is known to be gone and all is delivered",
    )
    assert only_run(mlflow_server, "one of two").info.status == "RUNNING"
    tell(ranks[0])
    (word,) = reports([ranks[0]])
    run = ended_run(node, mlflow_server, "one of two")
    assert run.info.status == "FAILED"
    assert re.match(rf"rank 1 on .* \(pid {ranks[1].pid}\)", run.data.tags["relay.end_reason"])
    assert word["before_end"] <= run.info.end_time <= word["after_end"]
    expected = logged(0, range(100)) + logged(1, range(100), prefix="rank_1/")
    assert_exactly(mlflow_server.all_points(run.info.run_id), expected)


def test_every_call_that_returned_before_a_kill_at_any_moment_arrives(node, mlflow_server):
    """Each rank writes to a pipe after each call: what it says there, it had logged."""
    seed = new_seed()
    show(f"seed of the kills: {seed}")
    moments = random.Random(seed)
    script = """
        key = sys.argv[1]
        run = mlflow_relay.start_run("kills", run_key=key, rank=0, world_size=1)
        for step in range(20_000):
            run.log_metrics(metrics(0, step, 1), step=step)
            os.write(1, b".")
        sys.stdin.read()  # until it is killed, however late that comes
    """
    keys = [f"any moment {number}" for number in range(6)]
    said = {}
    for key in keys:
        rank = start_rank(node, script, key)
        assert rank.stdout is not None
        assert rank.stdout.read(1) == ".", last_words(rank)
        time.sleep(moments.uniform(0.0, 0.03))  # the moment is the point
        rank.kill()
        said[key] = 1 + last_words(rank).count(".")
    show(f"calls that had returned: {list(said.values())}")
    for key in keys:
        run = ended_run(node, mlflow_server, key)
        assert run.info.status == "FAILED"
        points = mlflow_server.all_points(run.info.run_id)
        # The last call may have returned with no time left to say so.
        calls = max(said[key], len(points))
        assert calls <= said[key] + 1
        assert_exactly(points, logged(0, range(calls), count=1))


def test_a_run_whose_rank_was_killed_is_running_again_when_the_rank_comes_back(node, mlflow_server):
    script = """
        first = int(sys.argv[1])
        run = mlflow_relay.start_run(
            "kills", run_key="comes back", rank=0, world_size=1, params={"lr": 0.1}
        )
        for step in range(first, first + 100):
            run.log_metrics(metrics(0, step), step=step)
        say("logged")
        hear()
        before_end = now_ms()
        run.end()
        report(before_end=before_end, after_end=now_ms())
    """
    killed = start_rank(node, script, 0)
    hear(killed, "logged")
    killed.kill()
    killed.wait()
    failed = ended_run(node, mlflow_server, "comes back")
    assert failed.info.status == "FAILED"

    back = start_rank(node, script, 100)
    hear(back, "logged")
    wait_until(
        lambda: only_run(mlflow_server, "comes back").info.status == "RUNNING",
        "MLflow shows the run as RUNNING again",
    )
    assert_exactly(wait_for_points(mlflow_server, failed.info.run_id, 2000), logged(0, range(200)))
    assert only_run(mlflow_server, "comes back").info.status == "RUNNING"

    tell(back)
    (word,) = reports([back])
    run = ended_run(node, mlflow_server, "comes back")
    assert run.info.run_id == failed.info.run_id
    assert run.info.status == "FINISHED"
    assert not run.data.tags.get("relay.end_reason")
    assert run.info.start_time == failed.info.start_time
    assert word["before_end"] <= run.info.end_time <= word["after_end"]
    assert {key: value for key, value in run.data.params.items() if not key.endswith("run_id")} == {
        "lr": "0.1"
    }
    assert_exactly(mlflow_server.all_points(run.info.run_id), logged(0, range(200)))


# ── daemons ──

UNDER_LOAD = """
    rank = int(sys.argv[1])
    stop = threading.Event()

    def wait_for_the_end():
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    before_start = now_ms()
    run = mlflow_relay.start_run("kills", run_key="load", rank=rank, world_size=4)
    after_start = now_ms()
    say("logging")
    step, longest_s = 0, 0.0
    while not stop.is_set():
        for step in range(step, step + 4):
            values = metrics(rank, step, 1)
            begin_s = time.perf_counter()
            run.log_metrics(values, step=step)
            longest_s = max(longest_s, time.perf_counter() - begin_s)
        step += 1
        time.sleep(0.005)
    before_end = now_ms()
    begin_s = time.perf_counter()
    run.end()
    end_s = time.perf_counter() - begin_s
    report(before_start=before_start, after_start=after_start,
           before_end=before_end, after_end=now_ms(),
           calls=step, longest_ms=longest_s * 1000, end_took_ms=end_s * 1000)
"""


def test_ranks_and_daemon_that_are_killed_by_turns_lose_nothing(mortal_node, mlflow_server):
    """Dead ranks' journals are taken over by daemons that are killed as they do it."""
    seed = new_seed()
    show(f"seed of the kills: {seed}")
    moments = random.Random(seed)
    node = mortal_node
    script = """
        rank = int(sys.argv[1])
        run = mlflow_relay.start_run("kills", run_key="turns", rank=rank, world_size=3)
        for step in range(3000):
            run.log_metrics(metrics(rank, step, 1), step=step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    for rank in [start_rank(node, script, rank) for rank in range(3)]:
        last_words(rank)
        assert rank.returncode == -signal.SIGKILL
    for _ in range(6):
        node.start(wait=False)
        time.sleep(moments.uniform(0.1, 0.6))  # the moment is the point
        node.kill()
    node.start()
    run = ended_run(node, mlflow_server, "turns")
    expected = logged(0, range(3000), count=1)
    for rank in (1, 2):
        expected += logged(rank, range(3000), count=1, prefix=f"rank_{rank}/")
    assert_exactly(mlflow_server.all_points(run.info.run_id), expected)
    assert run.info.status == "FAILED"
    assert list((node.runtime / "journals").iterdir()) == []


@pytest.mark.timeout(240)
def test_twenty_kills_of_the_daemon_under_load_lose_nothing_and_stall_nobody(
    mortal_node, mlflow_server
):
    seed = new_seed()
    show(f"seed of the kills: {seed}")
    moments = random.Random(seed)
    node = mortal_node
    node.start()
    ranks = [start_rank(node, UNDER_LOAD, rank) for rank in range(4)]
    for rank in ranks:
        hear(rank, "logging")
    for number in range(KILLS):
        time.sleep(moments.uniform(0.0, LIFE_S_MAX))  # the moment is the point
        node.kill()
        node.start(wait=number % 2 == 1)
    for rank in ranks:
        tell(rank)
    words = reports(ranks)  # no rank raised: each has ended well
    flush = node.command("flush", "--timeout", "150", timeout_s=160.0)
    assert flush.returncode == 0, flush.stdout + flush.stderr
    status = ended_status(node, "load")
    show(
        f"{KILLS} kills, calls {[word['calls'] for word in words]}, longest call of each rank "
        f"{[round(word['longest_ms'], 2) for word in words]} ms, end() "
        f"{[round(word['end_took_ms'], 1) for word in words]} ms"
    )
    run = only_run(mlflow_server, "load")
    expected = []
    for rank, word in enumerate(words):
        prefix = f"rank_{rank}/" if rank else ""
        expected += logged(rank, range(word["calls"]), count=1, prefix=prefix)
    points = mlflow_server.all_points(run.info.run_id)
    assert_exactly(points, expected)
    assert run.info.status == "FINISHED"
    assert "relay.end_reason" not in run.data.tags
    assert_lifetime(run, words, points)
    assert max(word["longest_ms"] for word in words) <= STALL_MS_MAX
    assert (status["dead_letters"], status["lost_records"], status["damaged_records"]) == (0, 0, 0)
    assert node.status()["counters"]["quarantined_files"] == 0
