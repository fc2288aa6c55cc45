"""Which artifact goes next, and what failures say of a file or of its store."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mlflow_relay.records import COPY, Artifact
from mlflow_relay_daemon.artifacts import queue as queues
from mlflow_relay_daemon.artifacts.queue import Job, Queue, Work
from mlflow_relay_daemon.artifacts.throttle import Throttle
from mlflow_relay_daemon.sinks import RunGone, ServerAway, TryAgain
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.ledger import UPLOADED, End, Ledger


def a_run(folder, name: str, *paths: str) -> Work:
    (folder / name).mkdir()
    ledger = Ledger(Disk(), folder / name)
    ledger.accept(
        Artifact(1, path, f"{index:032x}", COPY, b"/f", 1, 1, b"d")
        for index, path in enumerate(paths)
    )
    run = SimpleNamespace(artifacts=ledger, card=SimpleNamespace(mlflow_run_id="1"))
    return Work(SimpleNamespace(run=run), store=SimpleNamespace(root="store"))


@pytest.fixture
def queue() -> Queue:
    return Queue(wait_s_max=1000.0)


def take(queue: Queue) -> Job:
    job = queue.take()
    assert job is not None
    return job


def finish(queue: Queue, job: Job) -> None:
    job.work.hosted.run.artifacts.settle([End(job.number, UPLOADED)])
    queue.went_well(job)
    queue.give_back(job)


def test_the_oldest_goes_first_and_runs_take_turns(queue, tmp_path):
    queue.works = {"a": a_run(tmp_path, "a", "1", "2", "3"), "b": a_run(tmp_path, "b", "4", "5")}
    order = []
    while (job := queue.take()) is not None:
        order.append(job.artifact.path)
        finish(queue, job)
    assert order == ["1", "4", "2", "5", "3"]


def test_two_of_one_name_never_go_side_by_side(queue, tmp_path):
    queue.works = {"a": a_run(tmp_path, "a", "same", "same", "other")}
    first, second = take(queue), take(queue)
    assert [first.artifact.path, second.artifact.path] == ["same", "other"]
    assert queue.take() is None
    finish(queue, first)
    assert take(queue).number == 1


def test_a_run_that_mlflow_does_not_have_yet_waits(queue, tmp_path):
    queue.works = {"a": a_run(tmp_path, "a", "1"), "b": a_run(tmp_path, "b", "2")}
    queue.works["a"].hosted.run.card.mlflow_run_id = None
    assert take(queue).artifact.path == "2"
    assert queue.take() is None


def test_a_store_that_is_away_is_left_alone_and_then_tried_by_one(queue, tmp_path):
    queue.works = {"a": a_run(tmp_path, "a", "1", "2", "3")}
    job = take(queue)
    assert queue.failed(job, ServerAway("away", retry_after_s=100.0))
    queue.give_back(job)
    assert queue.take() is None
    queue.try_now()
    probe = take(queue)
    assert queue.take() is None  # the others wait for its answer
    finish(queue, probe)
    assert take(queue)
    assert take(queue)


def test_one_store_that_is_away_holds_up_no_other(queue, tmp_path):
    queue.works = {"a": a_run(tmp_path, "a", "1"), "b": a_run(tmp_path, "b", "2")}
    queue.works["b"].store = SimpleNamespace(root="another")
    job = take(queue)
    queue.failed(job, ServerAway("away", retry_after_s=100.0))
    queue.give_back(job)
    assert take(queue).artifact.path == "2"


def test_a_file_that_fails_waits_alone_and_many_failures_in_a_row_are_the_stores(queue, tmp_path):
    names = [str(index) for index in range(queues.STRIKES_MAX + 2)]
    queue.works = {"a": a_run(tmp_path, "a", *names)}
    for name in names[: queues.STRIKES_MAX]:
        job = take(queue)
        assert job.artifact.path == name  # the one that failed is not tried at once
        assert queue.failed(job, TryAgain("500"))
        queue.works["a"].failures[job.number].later_s += 100.0
        queue._stores["store"].until_s += 100.0
        queue.give_back(job)
    assert queue.take() is None


def test_only_a_file_that_fails_again_and_again_while_others_go_is_given_up(queue, tmp_path):
    queue.works = {"a": a_run(tmp_path, "a", "bad", "good")}

    def fail() -> bool:
        queue.try_now()
        job = take(queue)
        assert job.artifact.path == "bad"
        is_later = queue.failed(job, TryAgain("500"))
        queue.give_back(job)
        return is_later

    assert all(fail() for _ in range(3 * queues.FAILURES_SUSPECT))  # it may be the store
    queue.works["a"].failures[0].later_s += 1000.0
    queue._stores["store"].until_s = 0.0
    good = take(queue)
    assert good.artifact.path == "good"
    finish(queue, good)
    assert not fail()


def test_a_run_that_is_gone_is_asked_for_again_later(queue, tmp_path):
    queue.works = {"a": a_run(tmp_path, "a", "1")}
    job = take(queue)
    assert queue.failed(job, RunGone("deleted"))
    queue.give_back(job)
    assert queue.take() is None
    queue.try_now()
    assert take(queue)


def test_files_that_wait_are_synced_once(queue, tmp_path):
    queue.works = {"a": a_run(tmp_path, "a", "1", "2")}
    run_id, found = queue.unsynced()
    assert (run_id, [each.path for each in found]) == ("a", ["1", "2"])
    assert queue.unsynced() == ("", [])


def test_a_throttle_lets_the_first_go_and_makes_the_rest_pay(monkeypatch):
    throttle = Throttle(1000.0)
    waits = []
    monkeypatch.setattr(throttle._stopped, "wait", waits.append)
    for _ in range(3):
        throttle.take(500)
    assert waits == pytest.approx([0.0, 0.5, 1.0], abs=0.2)
    Throttle(None).take(1 << 60)


def test_a_throttle_that_is_stopped_holds_nobody():
    throttle = Throttle(1.0)
    throttle.stop()
    throttle.take(1 << 40)
    throttle.take(1 << 40)
