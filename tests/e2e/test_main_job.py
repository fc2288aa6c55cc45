"""The main job: ranks log, MLflow has all of it once, and says truthfully how the run ended."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator

import pytest

from mlflow_relay.launch import relay_run_id
from tests.support.jobs import (
    PREAMBLE,
    assert_exactly,
    assert_lifetime,
    ended_run,
    ended_status,
    hear,
    last_words,
    logged,
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
from tests.support.servers import MlflowServer


@pytest.fixture(scope="module")
def node(tmp_path_factory, mlflow_server) -> Iterator[Node]:
    """One node with a living daemon for all tests here that stop nothing."""
    with Node(tmp_path_factory.mktemp("node"), mlflow_server.uri) as node:
        node.start()
        yield node


@pytest.fixture
def mortal_server(tmp_path) -> Iterator[MlflowServer]:
    """A server of this test's own, to be killed."""
    with MlflowServer(tmp_path / "mlflow") as server:
        yield server


# ── the whole of it ──

WHOLE_JOB = """
    rank = int(sys.argv[1])
    say("imported")
    hear()
    before_start = now_ms()
    with mlflow_relay.start_run(
        "whole-job", "o96", run_key="whole-job", rank=rank, world_size=4,
        params={"lr": 0.1, "layers": 12}, tags={"team": "ens"},
    ) as run:
        after_start = now_ms()
        for begin, end in ((0, 900), (900, 1600), (1600, 2500)):
            for step in range(begin, end):
                run.log_metrics(metrics(rank, step), step=step)
                time.sleep(0.0005)
            if end < 2500:
                say(f"logged {end}")
                hear()
        before_end = now_ms()
    report(before_start=before_start, after_start=after_start,
           before_end=before_end, after_end=now_ms(),
           run_id=run.run_id, mlflow_run_id=run.mlflow_run_id)
"""


@pytest.mark.timeout(240)
def test_four_ranks_and_a_server_that_dies_give_one_run_with_every_point_once(
    tmp_path, mortal_server
):
    with Node(tmp_path / "node", mortal_server.uri) as node:
        node.start()
        ranks = [start_rank(node, WHOLE_JOB, rank) for rank in range(4)]
        for rank in ranks:
            hear(rank, "imported")
        for rank in ranks:
            tell(rank)
        for rank in ranks:
            hear(rank, "logged 900")
        status_when(node, "whole-job", lambda run: run["delivered_points"], "delivery has begun")
        mortal_server.kill()
        known = status_when(node, "whole-job", lambda _: True, "it is known")
        at_kill = known["delivered_points"]
        for rank in ranks:
            tell(rank)
        for rank in ranks:
            hear(rank, "logged 1600")
        mortal_server.start()
        for rank in ranks:
            tell(rank)
        words = reports(ranks)
        flush = node.command("flush", "--timeout", "150", timeout_s=160.0)
        assert flush.returncode == 0, flush.stdout + flush.stderr
        status = ended_status(node, "whole-job")
        show(f"{at_kill} of 100000 points had been delivered when the server was killed")

        run = only_run(mortal_server, "whole-job")
        expected = logged(0, range(2500))
        for rank in range(1, 4):
            expected += logged(rank, range(2500), prefix=f"rank_{rank}/")
        assert len(expected) == 100_000
        points = mortal_server.all_points(run.info.run_id)
        assert_exactly(points, expected)
        assert run.info.status == "FINISHED"
        assert run.info.run_name == "o96"
        assert_lifetime(run, words, points)
        assert {
            key: value for key, value in run.data.params.items() if not key.endswith("run_id")
        } == {"lr": "0.1", "layers": "12"}
        assert run.data.tags["team"] == "ens"
        assert run.data.tags["relay.run_id"] == relay_run_id("whole-job", 1)
        assert run.data.tags["relay.run_key"] == "whole-job"
        assert "relay.end_reason" not in run.data.tags
        assert {word["run_id"] for word in words} == {relay_run_id("whole-job", 1)}
        assert {word["mlflow_run_id"] for word in words} == {run.info.run_id}
        assert 0 < at_kill < 100_000
        for trouble in ("dead_letters", "lost_records", "damaged_records"):
            assert status[trouble] == 0


# ── the status tells the truth ──

ONE_OF_THREE = """
    rank = int(sys.argv[1])
    run = mlflow_relay.start_run("ends", run_key="early", rank=rank, world_size=3)
    run.log_metrics(metrics(rank, 0), step=0)
    say("logged")
    hear()
    before_end = now_ms()
    run.end()
    report(before_end=before_end, after_end=now_ms())
"""


def test_a_run_is_running_until_its_last_rank_has_ended(node, mlflow_server):
    ranks = [start_rank(node, ONE_OF_THREE, rank) for rank in range(3)]
    for rank in ranks:
        hear(rank, "logged")
    status_when(node, "early", lambda run: run["ranks_alive"] == 3, "all are attached")
    for gone, left in ((1, 2), (0, 1)):
        tell(ranks[gone])
        reports([ranks[gone]])
        status = status_when(
            node,
            "early",
            lambda run, left=left: (run["ranks_alive"], run["waiting_records"]) == (left, 0),
            f"{left} ranks are left and all is delivered",
        )
        assert status["state"] != "ended"
        assert only_run(mlflow_server, "early").info.status == "RUNNING"
    tell(ranks[2])
    (last,) = reports([ranks[2]])
    run = ended_run(node, mlflow_server, "early")
    assert run.info.status == "FINISHED"
    assert last["before_end"] <= run.info.end_time <= last["after_end"]
    expected = logged(0, [0]) + logged(1, [0], prefix="rank_1/") + logged(2, [0], prefix="rank_2/")
    assert_exactly(mlflow_server.all_points(run.info.run_id), expected)


ENDINGS = {
    "an end that was asked for": ("run.end()", "FINISHED", None),
    "an end as KILLED": ("run.end('KILLED', reason='preempted')", "KILLED", "preempted"),
    "the script's last line": ("pass", "FINISHED", None),
    "sys.exit(0)": ("sys.exit(0)", "FINISHED", None),
    "sys.exit(0) in a with block": ("with run:\n        sys.exit(0)", "FINISHED", None),
    "sys.exit(3) in a with block": ("with run:\n        sys.exit(3)", "FAILED", "SystemExit: 3"),
    "an exception in a with block": (
        "with run:\n        raise ValueError('loss is NaN')",
        "FAILED",
        "ValueError: loss is NaN",
    ),
    "an exception that nobody caught": (
        "raise ValueError('loss is NaN')",
        "FAILED",
        "ValueError: loss is NaN",
    ),
    "an exception that somebody caught": (
        "try:\n        raise ValueError('never mind')\n    except ValueError:\n        pass",
        "FINISHED",
        None,
    ),
    "os._exit(0)": ("os._exit(0)", "FAILED", "rank 0 on "),
    "os._exit(0) in a with block": ("with run:\n        os._exit(0)", "FAILED", "rank 0 on "),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", "FAILED", "rank 0 on "),
    "Ctrl+C": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", "KILLED", "KeyboardInterr"),
    "Ctrl+C in a with block": (
        "with run:\n        os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
        "KILLED",
        "KeyboardInterrupt",
    ),
}


def test_the_status_is_how_the_script_ended(node, mlflow_server):
    ranks = {}
    for name, (ending, _, _) in ENDINGS.items():
        script = f"""
    run = mlflow_relay.start_run("ends", run_key={name!r}, rank=0, world_size=1)
    for step in range(50):
        run.log_metrics(metrics(0, step), step=step)
    {ending}
"""
        ranks[name] = start_rank(node, script)
    found = {}
    for name, (_, status, reason) in ENDINGS.items():
        output = last_words(ranks[name])
        run = ended_run(node, mlflow_server, name)
        said = run.data.tags.get("relay.end_reason")
        found[name] = run.info.status, said
        assert run.info.status == status, f"{name}: {said}\n{output}"
        if reason is None:
            assert said is None, name
        else:
            assert said is not None, name
            assert reason in said, name
        assert_exactly(mlflow_server.all_points(run.info.run_id), logged(0, range(50)))
    for name, (status, said) in found.items():
        show(f"{name:34} {status:9} {said or ''}")


def test_the_worst_ending_of_any_rank_is_that_of_the_run_and_the_reason_names_the_rank(
    node, mlflow_server
):
    script = """
        rank = int(sys.argv[1])
        with mlflow_relay.start_run("ends", run_key="worst", rank=rank, world_size=3) as run:
            run.log_metrics(metrics(rank, 0), step=0)
            say("logged")
            hear()
            if rank == 1:
                raise RuntimeError("CUDA out of memory")
    """
    ranks = [start_rank(node, script, rank) for rank in range(3)]
    for rank in ranks:
        hear(rank, "logged")
    for rank in (1, 0, 2):
        tell(ranks[rank])
        last_words(ranks[rank])
    run = ended_run(node, mlflow_server, "worst")
    assert run.info.status == "FAILED"
    assert run.data.tags["relay.end_reason"] == "rank 1: RuntimeError: CUDA out of memory"


# ── child processes ──

FORKED = """
    import multiprocessing

    def child(number):
        for step in range(40):
            mlflow_relay.log_metrics(metrics(100 + number, step, 3), step=1000 * number + step)

    context = multiprocessing.get_context("fork")
    with mlflow_relay.start_run("children", run_key="forked", rank=0, world_size=1) as run:
        run.log_metrics(metrics(0, 0), step=0)
        children = [context.Process(target=child, args=(number,)) for number in (1, 2, 3)]
        for process in children:
            process.start()
        for process in children:
            process.join()
            assert process.exitcode == 0
        run.log_metrics(metrics(0, 1), step=1)
    report()
"""


def test_points_of_forked_workers_arrive_in_the_run_of_their_parent(node, mlflow_server):
    reports([start_rank(node, FORKED)])
    ended_run(node, mlflow_server, "forked")
    expected = logged(0, [0, 1])
    for number in (1, 2, 3):
        expected += [
            (key, 1000 * number + step, value)
            for key, step, value in logged(100 + number, range(40), count=3)
        ]
    run = only_run(mlflow_server, "forked")
    points = wait_for_points(mlflow_server, run.info.run_id, len(expected))
    assert_exactly(points, expected)
    assert ended_run(node, mlflow_server, "forked").info.status == "FINISHED"


FORKED_AND_KILLED = """
    run = mlflow_relay.start_run("children", run_key="forked and killed", rank=0, world_size=1)
    run.log_metrics(metrics(0, 0), step=0)
    pid = os.fork()
    if pid == 0:
        for step in range(1, 101):
            run.log_metrics(metrics(0, step), step=step)
        os.kill(os.getpid(), signal.SIGKILL)
    _, how = os.waitpid(pid, 0)
    assert os.WTERMSIG(how) == signal.SIGKILL
    run.log_metrics(metrics(0, 101), step=101)
    run.end()
    report()
"""


def test_a_forked_child_that_is_killed_loses_nothing_and_does_not_fail_the_run(node, mlflow_server):
    reports([start_rank(node, FORKED_AND_KILLED)])
    ended_run(node, mlflow_server, "forked and killed")
    run = only_run(mlflow_server, "forked and killed")
    points = wait_for_points(mlflow_server, run.info.run_id, 1020)
    assert_exactly(points, logged(0, range(102)))
    run = ended_run(node, mlflow_server, "forked and killed")
    assert run.info.status == "FINISHED"
    assert "relay.end_reason" not in run.data.tags


#: Since Python 3.13 multiprocessing has forgotten the exception when its exit functions run.
RAISED, LEFT = (
    ("rank 1: exit code 1", "rank 1: exit code 3")
    if sys.version_info >= (3, 13)
    else ("rank 1: ValueError: diverged", "rank 1: SystemExit: 3")
)
WORKER_ENDINGS = {
    "spawn, the last line": ("FINISHED", None),
    "spawn, an exception": ("FAILED", RAISED),
    "spawn, sys.exit(0)": ("FINISHED", None),
    "spawn, sys.exit(3)": ("FAILED", LEFT),
    "fork, the last line": ("FINISHED", None),
    "fork, an exception": ("FAILED", RAISED),
    "fork, sys.exit(0)": ("FINISHED", None),
    "fork, sys.exit(3)": ("FAILED", LEFT),
    "fork, where its parent handles an error": ("FINISHED", None),
}

WORKERS = """
    import multiprocessing

    def train(rank, key):
        run = mlflow_relay.start_run("workers", run_key=key, rank=rank, world_size=2)
        for step in range(100):
            run.log_metrics(metrics(rank, step), step=step)
        if rank == 1 and "exception" in key:
            raise ValueError("diverged")
        if rank == 1 and "exit" in key:
            sys.exit(int(key[-2]))

    if __name__ == "__main__":
        ranks = [
            multiprocessing.get_context(key.partition(",")[0]).Process(target=train, args=(n, key))
            for key in sys.argv[1:]
            for n in range(2)
        ]
        for process in ranks[:-2]:
            process.start()
        try:
            raise KeyError("no such file: start anew")
        except KeyError:
            for process in ranks[-2:]:
                process.start()
        for process in ranks:
            process.join()
        report(exit_codes=[process.exitcode for process in ranks])
"""


def test_ranks_of_multiprocessing_that_never_call_end_are_told_apart_by_how_they_left(
    node, mlflow_server, tmp_path
):
    script = tmp_path / "train.py"  # a spawned child imports the script of its parent
    script.write_text(PREAMBLE + textwrap.dedent(WORKERS))
    become_script = "os.execv(sys.executable, sys.orig_argv[:1] + sys.argv[1:])"
    (word,) = reports([start_rank(node, become_script, script, *WORKER_ENDINGS)])
    assert word["exit_codes"] == [*[0, 0, 0, 1, 0, 0, 0, 3] * 2, 0, 0]
    expected = logged(0, range(100)) + logged(1, range(100), prefix="rank_1/")
    for key, ending in WORKER_ENDINGS.items():
        # A rank that found the daemon busy has left its last word in its journal, where it is found
        # a little after the other rank has ended.
        ended_run(node, mlflow_server, key)
        wait_until(lambda: ending_of(only_run(mlflow_server, key)) == ending, f"{key}: {ending}")  # noqa: B023
        run = ended_run(node, mlflow_server, key)
        assert_exactly(mlflow_server.all_points(run.info.run_id), expected)


def ending_of(run):
    return run.info.status, run.data.tags.get("relay.end_reason")


FORKING_IN_THE_MIDDLE = """
    import random
    moments = random.Random(int(sys.argv[1]))
    sys.setswitchinterval(1e-5)  # so that forks find the other threads in the midst of things
    runs = [
        mlflow_relay.start_run("children", run_key=key, rank=0, world_size=1)
        for key in ("forks a", "forks b")
    ]
    stop = threading.Event()
    counts = [0, 0]

    def log_on(number):
        while not stop.is_set():
            for _ in range(20):
                runs[number].log_metrics(metrics(0, counts[number], 1), step=counts[number])
                counts[number] += 1
            time.sleep(0.005)

    threads = [threading.Thread(target=log_on, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for child in range(1, 21):
        time.sleep(moments.uniform(0.0, 0.02))
        pid = os.fork()
        if pid == 0:
            for run in runs:
                for step in range(5):
                    run.log_metrics(metrics(child, step, 1), step=step)
            if child % 4:
                os._exit(0)
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    stop.set()
    for thread in threads:
        thread.join()
    for run in runs:
        run.end()
    report(counts=counts)
"""


def test_forks_in_the_middle_of_logging_threads_lose_nothing(node, mlflow_server):
    seed = new_seed()
    show(f"seed of the forks: {seed}")
    rank = start_rank(node, FORKING_IN_THE_MIDDLE, seed)
    output = last_words(rank)
    assert rank.returncode == 0, output
    assert "Traceback" not in output, output
    for key, count in zip(
        ("forks a", "forks b#2"), json.loads(output.splitlines()[-1])["counts"], strict=True
    ):
        ended_run(node, mlflow_server, key)
        expected = logged(0, range(count), count=1)
        for child in range(1, 21):
            expected += logged(child, range(5), count=1)
        run = only_run(mlflow_server, key)
        points = wait_for_points(mlflow_server, run.info.run_id, len(expected))
        assert_exactly(points, expected)
        assert ended_run(node, mlflow_server, key).info.status == "FINISHED"
