"""A lane's way to MLflow, and the threads that work lanes: once in effect, whatever dies."""

from __future__ import annotations

import itertools
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from mlflow_relay.frames import VERSION
from mlflow_relay_daemon.batch import Entry
from mlflow_relay_daemon.dead_letters import DeadLetters
from mlflow_relay_daemon.delivery import Delivery
from mlflow_relay_daemon.lane import Lane
from mlflow_relay_daemon.lane.batches import FAILURES_SUSPECT
from mlflow_relay_daemon.lane.destination import Destination
from mlflow_relay_daemon.lane.lane import BLOCKED_RETRY_S, REST_WAIT_S
from mlflow_relay_daemon.lane.lineage import Resolver
from mlflow_relay_daemon.lane.links import LineageParams
from mlflow_relay_daemon.lane.terminal import TerminalOutput
from mlflow_relay_daemon.retry import Breaker, Stopped
from mlflow_relay_daemon.sinks import Refused, RunGone, ServerAway, SinkError, TimedOut, TryAgain
from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool import segment
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.states import RunState
from tests.support.fake_sink import FakeRun, FakeSink
from tests.support.relay import PATIENCE_S, wait_until
from tests.support.seeds import new_seed
from tests.support.spools import (
    RUN_ID,
    SESSION,
    START_MS,
    FailingDisk,
    attachment,
    end,
    frame,
    frame_of_metrics,
    metrics,
    new_card,
    param,
    tag,
)

OTHER = bytes(16)
END_MS = START_MS + 99_000


class Crash(BaseException):
    """The daemon is killed here."""


def new_lane(run: RunSpool, sink: FakeSink, breaker: Breaker, letters: DeadLetters) -> Lane:
    """Return a lane of a run that is alone: lineage and other nodes are told of elsewhere."""
    return Lane(
        Destination(run, sink, breaker, "node7"),
        Resolver(sink, lambda run_id: None),
        letters,
        LineageParams(run=(), fork=()),
        TerminalOutput(run),
        on_news=lambda: None,
    )


class Life:
    """One daemon's life of one run: its spool, its lane. What it leaves is on the disk."""

    def __init__(self, folder: Path, sink: FakeSink, disk: FailingDisk | None = None) -> None:
        self.disk = disk or FailingDisk()
        self.sink = sink
        card = cards.read(folder) if (folder / cards.NAME).exists() else new_card([SESSION, OTHER])
        self.run = RunSpool(self.disk, folder, card, segment_bytes_max=3000)
        self.run.save_card()
        self.letters = DeadLetters(self.disk, folder)
        self.breaker = Breaker(base_s=0.001, cap_s=0.002)
        self.lane = new_lane(self.run, sink, self.breaker, self.letters)

    def append(self, *frames: Any) -> None:
        self.run.append(list(frames))

    def log(self, first: int, *records: bytes, session: bytes = SESSION) -> None:
        self.append(frame(first, records, session))

    def close_session(self, session: bytes, *, lost: int = 0) -> None:
        with self.run.lock:
            self.run.card.sessions[session.hex()].closed = True
            self.run.card.sessions[session.hex()].next_seq = self.run.next_seq(session)
            self.run.card.sessions[session.hex()].lost = lost
            self.run.save_card()

    def end_all(self, first: int, status: str = "FINISHED", reason: str = "") -> None:
        """Both ranks say their last word and go."""
        self.log(first, end(status, reason, END_MS))
        self.log(0, end("FINISHED", "", END_MS - 5), session=OTHER)
        self.close_session(SESSION)
        self.close_session(OTHER)

    def work(self, steps_max: int = 1000) -> float | None:
        """Work until nothing is left to do at once; return how long it wants to wait."""
        for _ in range(steps_max):
            delay_s = self.lane.work()
            if delay_s is None or delay_s not in (0.0, REST_WAIT_S):
                return delay_s
        raise AssertionError(f"still at work after {steps_max} steps")

    def insist(self, times: int = 60) -> None:
        """Work, and do not wait where it would; a late look for doubles is all that may be left."""
        for _ in range(times):
            if self.work() is None or self.lane.is_parked:
                return
        raise AssertionError(f"not done after {times} attempts: {self.lane.last_error}")

    def close(self) -> None:
        self.run.close()


@pytest.fixture
def sink() -> FakeSink:
    return FakeSink()


@pytest.fixture
def new_life(tmp_path: Path, sink: FakeSink) -> Iterator[Callable[..., Life]]:
    lives: list[Life] = []

    def new(disk: FailingDisk | None = None) -> Life:
        for each in lives:
            each.close()
        lives.append(Life(tmp_path, sink, disk))
        return lives[-1]

    yield new
    for each in lives:
        each.close()
        each.breaker.stop()


@pytest.fixture
def life(new_life: Callable[..., Life]) -> Life:
    return new_life()


def points_of(*seqs: int) -> set[tuple[str, int]]:
    return {(f"m{index}", seq) for seq in seqs for index in range(2)}


def points_in(run: FakeRun) -> set[tuple[str, int]]:
    found = {(key, step) for key, _, _, step in run.points}
    assert len(found) == len(run.points), "a point is there twice, under another time or value"
    return found


# ── the good way ──


def test_a_run_is_made_filled_and_ended(life, sink):
    life.append(frame_of_metrics(0, 50))
    life.log(50, param("lr", "0.1"), tag("team", "ens"))
    life.end_all(52)

    assert life.work() is None

    run = sink.only_run()
    assert points_in(run) == points_of(*range(50))
    assert run.params == {"lr": "0.1"}
    assert run.tags["team"] == "ens"
    assert run.tags["relay.run_id"] == RUN_ID
    assert run.tags["relay.run_key"] == "a key"
    assert (run.run_name, run.start_time_ms, run.tags["user"]) == ("o96", START_MS, "ada")
    assert (run.status, run.end_time_ms) == ("FINISHED", END_MS)
    assert life.run.card.mlflow_run_id == run.run_id
    assert life.run.card.state is RunState.ENDED
    assert life.run.mark.delivered_points == 100
    assert life.run.waiting_records() == 0
    assert life.letters.count == 0


def test_a_run_is_made_as_soon_as_it_is_known(life, sink):
    assert life.work() is None

    assert sink.only_run().status == "RUNNING"
    assert cards.read(life.run.folder).mlflow_run_id == sink.only_run().run_id


def test_what_comes_later_goes_to_the_same_run_and_the_end_is_told_once(life, sink):
    life.append(frame_of_metrics(0, 5))
    life.work()
    life.append(frame_of_metrics(5, 5))
    life.work()
    life.end_all(10)
    for _ in range(3):
        assert life.work() is None

    assert points_in(sink.only_run()) == points_of(*range(10))
    assert sink.calls.count("create_run") == 1
    assert sink.calls.count("update_run") == 1


def test_a_run_is_running_while_a_rank_lives(life, sink):
    life.log(0, end())
    life.close_session(SESSION)
    life.work()
    assert sink.only_run().status == "RUNNING"

    life.log(0, end("FAILED", "ValueError: no", END_MS + 7), session=OTHER)
    life.close_session(OTHER)
    life.work()

    run = sink.only_run()
    assert (run.status, run.end_time_ms) == ("FAILED", END_MS + 7)
    assert run.tags["relay.end_reason"] == "rank 1: ValueError: no"


def test_a_rank_that_vanished_failed_with_its_last_record(life, sink):
    life.append(frame_of_metrics(0, 5))
    life.close_session(SESSION)
    life.log(0, end(), session=OTHER)
    life.close_session(OTHER)
    life.work()

    run = sink.only_run()
    assert run.status == "FAILED"
    assert "rank 0 on node7 (pid 4711) vanished" in run.tags["relay.end_reason"]
    assert run.end_time_ms == END_MS


def test_a_rank_that_comes_back_opens_the_run_again(new_life, sink):
    life = new_life()
    life.append(frame_of_metrics(0, 5))
    life.close_session(SESSION)
    life.close_session(OTHER)
    life.work()
    assert sink.only_run().status == "FAILED"

    life = new_life()
    again = bytes([7]) * 16
    with life.run.lock:
        card = attachment(again, start_ms=START_MS + 1).session_card()
        life.run.card.sessions[again.hex()] = card
        life.run.save_card()
    life.log(0, metrics(5), session=again)
    life.work()
    assert sink.only_run().status == "RUNNING"
    assert points_in(sink.only_run()) == points_of(*range(6))

    life.run.card.sessions[OTHER.hex()].end_status = "FINISHED"
    life.run.card.sessions[OTHER.hex()].end_ms = END_MS
    life.log(1, end(at_ms=END_MS + 9), session=again)
    life.close_session(again)
    life.work()

    run = sink.only_run()
    assert (run.status, run.end_time_ms) == ("FINISHED", END_MS + 9)
    assert run.tags["relay.end_reason"] == ""  # the old one is no longer true
    assert sink.calls.count("create_run") == 1


@pytest.mark.parametrize("at", range(3))  # the end takes three requests
def test_a_rank_that_comes_back_while_the_end_is_told_loses_nothing(life, sink, at):
    life.append(frame_of_metrics(0, 5))
    life.work()
    life.end_all(5)
    again, calls = bytes([7]) * 16, itertools.count()

    def come_back(name: str, number: int) -> None:
        if next(calls) == at:
            with life.run.lock:
                card = attachment(again, start_ms=START_MS + 1).session_card()
                life.run.card.sessions[again.hex()] = card
                life.run.save_card()
            life.log(0, metrics(5), metrics(6), session=again)

    sink.before = come_back
    life.insist()
    life.work()
    assert again.hex() in life.run.card.sessions
    assert sink.only_run().status == "RUNNING"
    assert points_in(sink.only_run()) == points_of(*range(7))
    life.log(2, end(at_ms=END_MS + 9), session=again)
    life.close_session(again)
    life.insist()
    assert sink.only_run().status == "FINISHED"
    assert life.run.mark.damaged_records == 0


def test_losses_and_damage_become_tags_of_the_run(life, sink):
    life.log(0, metrics(0), end())
    life.close_session(SESSION, lost=17)
    life.close_session(OTHER, lost=3)
    life.work()

    assert sink.only_run().tags["relay.lost_records"] == "20"
    assert "relay.damaged_records" not in sink.only_run().tags


def test_batches_hold_mlflow_s_limits_over_many_records(life, sink):
    """FakeSink asserts them at each request."""
    rng = random.Random(7)
    seq = 0
    for _ in range(60):
        records = [metrics(seq + n, size=rng.choice([1, 90, 1000])) for n in range(3)]
        records.append(param(f"p{seq}", "x" * rng.randrange(6000)))
        life.log(seq, *records)
        seq += len(records)
    life.end_all(seq)
    life.insist()

    expected = sum(len(run.points) for run in sink.runs.values())
    assert life.run.mark.delivered_points == expected
    assert len(sink.only_run().params) == 60
    assert len(sink.batches) > 30


# ── creation ──


def test_a_run_that_is_there_already_is_found_and_not_made_again(life, sink):
    sink.experiments["aifs"] = "e1"
    there = sink.new_run("e1", {"relay.run_id": RUN_ID})
    life.append(frame_of_metrics(0, 5))
    life.work()

    assert life.run.card.mlflow_run_id == there.run_id
    assert points_in(there) == points_of(*range(5))
    assert sink.calls.count("create_run") == 0


def test_a_create_whose_answer_is_lost_makes_one_run(life, sink):
    lost = itertools.count()

    def lose_the_first_answer(name: str, number: int) -> None:
        if name == "create_run" and next(lost) == 0:
            raise ServerAway("the connection was reset")

    sink.after = lose_the_first_answer
    life.append(frame_of_metrics(0, 5))
    life.insist()

    assert len(sink.runs) == 1
    assert points_in(sink.only_run()) == points_of(*range(5))


def test_a_create_that_is_carried_out_late_leaves_no_second_run(life, sink):
    refused = itertools.count()

    def away_once(name: str, number: int) -> None:
        if name == "create_run" and next(refused) == 0:
            raise ServerAway("timed out")

    sink.before = away_once
    life.append(frame_of_metrics(0, 5))
    life.insist()
    late = sink.new_run("e1", {"relay.run_id": RUN_ID})
    foreign = sink.new_run("e1", {"relay.run_id": "another"})
    life.end_all(5)
    life.insist()

    assert late.lifecycle_stage == "deleted"
    assert foreign.lifecycle_stage == "active"
    assert points_in(sink.runs["m1"]) == points_of(*range(5))


@pytest.mark.parametrize("stage", ["before", "after"])
def test_a_run_that_was_deleted_in_mlflow_waits_and_says_so(life, sink, stage):
    if stage == "before":
        sink.experiments["aifs"] = "e1"
        sink.new_run("e1", {"relay.run_id": RUN_ID}).lifecycle_stage = "deleted"
    else:
        life.work()
        sink.only_run().lifecycle_stage = "deleted"
    life.append(frame_of_metrics(0, 5))
    delay_s = life.work()

    assert delay_s == BLOCKED_RETRY_S
    assert life.lane.is_blocked
    assert life.lane.last_error
    assert life.run.waiting_records() == 5
    assert len(sink.runs) == 1

    next(iter(sink.runs.values())).lifecycle_stage = "active"  # restored by somebody
    assert life.work() is None
    assert not life.lane.is_blocked
    assert life.lane.last_error is None
    assert points_in(sink.only_run()) == points_of(*range(5))


def test_an_experiment_that_was_deleted_blocks_its_run_alone(life, sink):
    def gone(name: str, number: int) -> None:
        if name == "experiment_id":
            raise RunGone("experiment aifs was deleted")

    sink.before = gone
    assert life.work() == BLOCKED_RETRY_S
    assert life.lane.last_error == "experiment aifs was deleted"


# ── refusals ──


def by_name(*names: str, error: Callable[[str], SinkError] = Refused) -> Any:
    def objects_to(entry: Entry) -> SinkError | None:
        return error(f"{entry.key} is no name") if entry.key in names else None

    return objects_to


def test_the_guilty_become_dead_letters_and_all_others_arrive(life, sink):
    sink.objects_to = by_name("a@b", "p@q", "t@u")
    life.append(frame_of_metrics(0, 30))
    life.log(30, param("p@q", "1"), param("p", "1"), tag("t@u", "1"), tag("t", "1"))
    from mlflow_relay.records import MetricsPacker

    bad = MetricsPacker().pack({"fine": 1.0, "a@b": 2.0, "also": 3.0}, 34, START_MS)
    life.log(34, bad)
    life.append(frame_of_metrics(35, 30))
    life.end_all(65)
    life.insist()

    run = sink.only_run()
    expected = points_of(*range(30), *range(35, 65)) | {("fine", 34), ("also", 34)}
    assert points_in(run) == expected
    assert (run.params, run.tags["t"]) == ({"p": "1"}, "1")
    letters = {(each.kind, each.key, each.reason) for each in life.letters.list()}
    assert letters == {
        ("metric", "a@b", "a@b is no name"),
        ("param", "p@q", "p@q is no name"),
        ("tag", "t@u", "t@u is no name"),
    }
    assert run.status == "FINISHED"


def test_another_value_of_a_param_is_a_dead_letter_also_after_a_restart(new_life, sink):
    life = new_life()
    life.log(0, param("lr", "1"))
    life.work()
    life = new_life()
    life.log(1, param("lr", "1"), param("lr", "2"), param("other", "3"))
    life.insist()

    assert sink.only_run().params == {"lr": "1", "other": "3"}
    assert [(each.key, each.value) for each in life.letters.list()] == [("lr", "2")]


def test_a_name_that_is_refused_once_is_not_asked_about_a_thousand_times(life, sink):
    sink.objects_to = by_name("m1")
    for first in range(0, 1000, 10):
        life.append(frame_of_metrics(first, 10))
        life.insist()

    assert len(points_in(sink.only_run())) == 1000
    assert life.letters.count == 1000
    assert len(sink.calls) < 300


def test_records_that_cannot_be_read_are_dead_letters_too(life, sink):
    life.log(0, metrics(0), b"no record", metrics(2))
    life.insist()

    assert points_in(sink.only_run()) == points_of(0, 2)
    (letter,) = life.letters.list()
    assert letter.kind == "record"
    assert life.run.waiting_records() == 0


def test_one_entry_that_the_server_always_stumbles_over_holds_up_nobody_for_ever(life, sink):
    """500 for whatever contains it: after some attempts it is asked about alone."""
    sink.objects_to = by_name("m1", error=TryAgain)
    life.append(frame_of_metrics(0, 5))
    life.end_all(5)
    life.insist()

    assert points_in(sink.only_run()) == {("m0", seq) for seq in range(5)}
    assert {letter.key for letter in life.letters.list()} == {"m1"}
    assert sink.only_run().status == "FINISHED"
    assert sink.calls.count("log_batch") > FAILURES_SUSPECT


def test_a_server_that_stumbles_over_everything_makes_no_dead_letters(life, sink):
    """Nobody is guilty of what happens to all: a tag that the run has already is the witness."""
    life.work()
    sink.objects_to = lambda entry: TryAgain("the database is locked")
    life.append(frame_of_metrics(0, 5))
    for _ in range(5 * FAILURES_SUSPECT):
        delay_s = life.work()
        assert delay_s is not None
        assert delay_s >= 0
    assert life.letters.count == 0
    assert life.run.waiting_records() == 5
    assert life.lane.last_error == "the database is locked"

    sink.objects_to = None
    life.insist()
    assert points_in(sink.only_run()) == points_of(*range(5))
    assert life.letters.count == 0


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_server_that_stumbles_by_chance_makes_no_dead_letters(life, sink, share):
    """Two or four servers behind one address, of which one is well: nobody's data are guilty."""
    life.work()
    rng = random.Random(new_seed())

    def stumble(name: str, number: int) -> None:
        if name == "log_batch" and rng.random() < share:
            raise TryAgain("500 of a balancer")

    arrived: dict[int, None] = {}

    def note(entry: Entry) -> None:
        if entry.step is not None:
            arrived.setdefault(entry.step)

    sink.before, sink.objects_to = stumble, note
    for first in range(0, 1000, 5):
        life.append(frame_of_metrics(first, 5))
        for _ in range(1000):
            if not life.run.waiting_records():
                break
            life.work()

    assert life.letters.count == 0
    assert points_in(sink.only_run()) == points_of(*range(1000))
    assert list(arrived) == list(range(1000)), "in order, too"


def test_a_refusal_and_a_stumble_in_one_batch_hold_up_nobody_for_ever(life, sink):
    """The one is found by halving; the other breaks the halving off, each time anew."""

    def objects_to(entry: Entry) -> SinkError | None:
        if entry.key == "m0" and entry.step == 1:
            return Refused("refused")
        if entry.key == "m1" and entry.step == 3:
            return TryAgain("stumbled")
        return None

    sink.objects_to = objects_to
    life.append(frame_of_metrics(0, 5))
    life.insist()

    assert points_in(sink.only_run()) == points_of(*range(5)) - {("m0", 1), ("m1", 3)}
    assert {(each.key, each.step) for each in life.letters.list()} == {("m0", 1), ("m1", 3)}


def test_a_key_that_the_server_stumbled_over_once_is_welcome_again(life, sink):
    """A 500 says nothing of the name: one bad point must not cost the whole curve."""

    def objects_to(entry: Entry) -> SinkError | None:
        is_bad = (entry.key, entry.step) == ("m1", 2)
        return TryAgain("integer out of range") if is_bad else None

    sink.objects_to = objects_to
    life.append(frame_of_metrics(0, 5))
    life.insist()
    life.append(frame_of_metrics(5, 5))
    life.insist()

    assert points_in(sink.only_run()) == points_of(*range(10)) - {("m1", 2)}
    assert life.letters.count == 1


def test_a_stumble_that_passes_costs_nothing(life, sink):
    failures = iter(range(5))

    def stumble(name: str, number: int) -> None:
        if name == "log_batch" and next(failures, None) is not None:
            raise TryAgain("deadlock detected")

    sink.before = stumble
    life.append(frame_of_metrics(0, 5))
    life.insist()

    assert points_in(sink.only_run()) == points_of(*range(5))
    assert life.letters.count == 0
    assert life.lane.last_error is None


def test_a_server_that_is_away_is_waited_for(life, sink):
    failures = iter(range(5))

    def away(name: str, number: int) -> None:
        if next(failures, None) is not None:
            raise ServerAway("connection refused")

    sink.before = away
    life.append(frame_of_metrics(0, 5))
    assert life.work() is None
    assert points_in(sink.only_run()) == points_of(*range(5))


@pytest.mark.parametrize("too_much", [700, 100, 7, 2])
def test_a_server_that_is_too_slow_for_a_request_gets_it_in_pieces(life, sink, too_much):
    sizes: list[int] = []
    log_batch = sink.log_batch

    def slow(run_id, metrics, params, tags):
        sizes.append(len(metrics))
        if len(metrics) >= too_much:
            raise TimedOut("no answer within 30 s")
        log_batch(run_id, metrics, params, tags)

    sink.log_batch = slow
    for first in range(0, 2500, 500):
        life.append(frame_of_metrics(first, 500))
    life.insist()
    assert points_in(sink.only_run()) == points_of(*range(2500))
    failures = sum(size >= too_much for size in sizes)
    assert failures < len(sizes) // 2 + 12  # it is not tried in vain again and again
    sizes.clear()
    sink.log_batch = log_batch
    life.append(frame_of_metrics(2500, 500))
    life.insist()
    assert points_in(sink.only_run()) == points_of(*range(3000))


def test_dead_letters_are_delivered_when_they_are_welcome(life, sink):
    sink.objects_to = by_name("m1")
    life.append(frame_of_metrics(0, 5))
    life.insist()
    assert life.lane.retry_letters(None) == 0
    assert life.letters.count == 5

    sink.objects_to = None
    first = life.letters.list()[0].id
    assert life.lane.retry_letters({first, 999}) == 1
    assert life.letters.count == 4
    assert life.lane.retry_letters(None) == 4

    assert points_in(sink.only_run()) == points_of(*range(5))
    life.append(frame_of_metrics(5, 5))
    life.insist()
    assert points_in(sink.only_run()) == points_of(*range(10))
    assert life.letters.count == 0


# ── a disk that fails ──


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("write", "dead_letters"),
        ("sync", "dead_letters"),
        ("sync", "card"),
        ("rename", "card"),
        ("rename", "watermark"),
        ("unlink", ".segment"),
    ],
)
def test_a_disk_that_fails_delays_and_loses_nothing(new_life, sink, operation, name):
    disk = FailingDisk()
    life = new_life(disk)
    sink.objects_to = by_name("m1")
    life.append(frame_of_metrics(0, 30))
    life.append(frame_of_metrics(30, 30))
    life.append(frame_of_metrics(60, 30))
    life.end_all(90)
    disk.fail(operation, name, times=3)
    life.insist()
    life = new_life()
    life.insist()

    run = sink.only_run()
    assert points_in(run) == {("m0", seq) for seq in range(90)}
    assert {each.step for each in life.letters.list()} == set(range(90))
    assert (run.status, run.end_time_ms) == ("FINISHED", END_MS)
    assert len(sink.runs) == 1


# ── crashes ──


#: Steps at which the script logs a second metric, which MLflow will not have.
GUILTY = (3, 20)
SCRIPTED = (*range(12), *range(15, 40), 41)


def script(life: Life) -> None:
    """All that happens to a run, told anew to each life: what it has already, it passes over."""

    def scripted(seqs: Sequence[int]) -> list[bytes]:
        return [metrics(seq, size=2 if seq in GUILTY else 1) for seq in seqs]

    told = life.run.next_seq(SESSION)
    parts = [
        (0, scripted(range(12))),
        (12, [param("lr", "1"), tag("team", "a"), tag("team", "b")]),
        (15, scripted(range(15, 40))),
        (40, [param("lr", "2"), *scripted([41]), end("FINISHED", "", END_MS)]),
    ]
    for first, records in parts:
        if first >= told:
            life.log(first, *records)
    if life.run.next_seq(OTHER) == 0:
        life.log(0, end("FINISHED", "", END_MS - 5), session=OTHER)
    for session in (SESSION, OTHER):
        if not life.run.card.sessions[session.hex()].closed:
            life.close_session(session)
    life.insist()
    life.run.return_space()


def assert_done_once(life: Life, sink: FakeSink) -> None:
    run = sink.only_run()
    assert points_in(run) == {("m0", seq) for seq in SCRIPTED}
    assert run.params == {"lr": "1"}
    assert run.tags["team"] == "b"
    assert (run.status, run.end_time_ms) == ("FINISHED", END_MS)
    letters = {(each.kind, each.key, each.step, str(each.value)) for each in life.letters.list()}
    bad = {("metric", "m1", seq, str(seq + 1 / 16)) for seq in GUILTY}
    assert letters == bad | {("param", "lr", None, "2")}
    assert life.run.card.state is RunState.ENDED
    assert life.run.waiting_records() == 0
    assert segment.numbers_in(life.run.folder) == []


def crash_at(at: int) -> Callable[[str, int], None]:
    def crash(name: str, number: int) -> None:
        if number == at:
            raise Crash(f"{name}, call {number}")

    return crash


def calls_of_a_whole_life(folder: Path) -> int:
    sink = FakeSink()
    sink.objects_to = by_name("m1")
    life = Life(folder, sink)
    script(life)
    assert_done_once(life, sink)
    life.close()
    return len(sink.calls)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_daemon_killed_between_any_two_requests_delivers_once_in_effect(
    tmp_path_factory, tmp_path, when
):
    calls = calls_of_a_whole_life(tmp_path)
    assert calls > 20
    for at in range(calls):
        sink = FakeSink()
        sink.objects_to = by_name("m1")
        setattr(sink, when, crash_at(at))
        folder = tmp_path_factory.mktemp("run")
        life = Life(folder, sink)
        with pytest.raises(Crash):
            script(life)
        life.close()
        life = Life(folder, sink)
        script(life)

        assert_done_once(life, sink)
        life.close()


class KillingDisk(FailingDisk):
    """Kills the daemon at one operation: before it, or when it is done."""

    def __init__(self, at: int, when: str) -> None:
        super().__init__()
        self._at, self._when = at, when

    def _due(self, operation: str, path: Path) -> Any:
        if self._when == "before" and len(self.asked) == self._at:
            raise Crash(f"{operation} of {path.name}")
        if self._when == "after" and len(self.asked) == self._at + 1:
            raise Crash(f"behind {self.asked[-1]}")
        return super()._due(operation, path)


def test_a_daemon_killed_between_any_two_disk_operations_delivers_once_in_effect(
    tmp_path_factory,
):
    for at in itertools.count():
        sink = FakeSink()
        sink.objects_to = by_name("m1")
        folder = tmp_path_factory.mktemp("run")
        life = None
        try:
            life = Life(folder, sink, KillingDisk(at, "before"))
            script(life)
        except Crash:
            crashed = True
        else:
            crashed = False
        finally:
            if life is not None:
                life.close()
        life = Life(folder, sink)
        script(life)

        assert_done_once(life, sink)
        life.close()
        if not crashed:
            break
    assert at > 40


def test_many_kills_in_one_run_deliver_once_in_effect(tmp_path_factory):
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(8):
        sink = FakeSink()
        sink.objects_to = by_name("m1")
        folder = tmp_path_factory.mktemp("run")
        for _ in range(12):
            at = len(sink.calls) + rng.randrange(8)
            setattr(sink, rng.choice(["before", "after"]), crash_at(at))
            life = None
            try:
                life = Life(folder, sink, KillingDisk(rng.randrange(40), "before"))
                script(life)
            except Crash:
                pass
            finally:
                if life is not None:
                    life.close()
            sink.before = sink.after = lambda name, number: None
        life = Life(folder, sink)
        script(life)

        assert_done_once(life, sink)
        life.close()


# ── damage ──


def test_what_was_acknowledged_and_cannot_be_read_is_counted_and_said_on_the_run(new_life, sink):
    life = new_life()
    for first in range(0, 30, 10):
        life.append(frame_of_metrics(first, 10))
    life.close()
    path = segment.path_of(life.run.folder, 1)
    data = bytearray(path.read_bytes())
    size = len(frame_of_metrics(10, 10)[1])
    at = len(data) - 2 * size
    data[at : at + 40] = bytes(40)  # the header of the second frame
    path.write_bytes(data)
    life = new_life()
    life.run.skip_to(SESSION, 30)  # the rank has nothing before that any more
    life.append(frame_of_metrics(30, 10))
    life.end_all(40)
    life.insist()

    run = sink.only_run()
    assert points_in(run) == points_of(*range(10), *range(20, 40))
    assert run.tags["relay.damaged_records"] == "10"
    assert life.run.mark.damaged_records == 10


@pytest.mark.parametrize("cut", ["a frame", "all frames", "all of the file"])
def test_what_is_cut_off_behind_a_session_that_is_closed_is_counted(new_life, sink, cut):
    """Nobody comes back who would ask for it, or tell of it."""
    life = new_life()
    life.append(frame_of_metrics(0, 10))
    life.close()
    life = new_life()  # goes on in a segment of its own
    life.append(frame_of_metrics(10, 10))
    life.end_all(20)
    ends = len(frame(20, [end("FINISHED", "", END_MS)])[1]) * 2
    path = segment.path_of(life.run.folder, 2)
    whole = len(frame_of_metrics(10, 10)[1])
    size = {"a frame": path.stat().st_size - ends - 1,
            "all frames": path.stat().st_size - ends - whole, "all of the file": 0}[cut]  # fmt: skip
    life.close()
    os.truncate(path, size)
    for _ in range(2):  # told, and not counted again
        life = new_life()
        life.insist()
        run = sink.only_run()
        assert points_in(run) == points_of(*range(10))
        assert run.tags["relay.damaged_records"] == "12"
        assert run.status == "FAILED"
        assert life.run.waiting_records() == 0


def test_a_damaged_record_is_counted_once_and_its_neighbours_arrive(new_life, sink):
    life = new_life()
    life.append(frame_of_metrics(0, 10))
    life.close()
    path = segment.path_of(life.run.folder, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF  # the last record's value
    path.write_bytes(data)
    life = new_life()
    life.run.skip_to(SESSION, 10)
    life.append(frame_of_metrics(10, 10))
    life.end_all(20)
    life.insist()

    run = sink.only_run()
    assert points_in(run) == points_of(*range(9), *range(10, 20))
    assert run.tags["relay.damaged_records"] == "1"


def test_a_frame_that_was_torn_and_came_again_whole_is_delivered_whole(new_life, sink):
    """The daemon was killed by a power failure before it had acknowledged the frame."""
    life = new_life()
    life.append(frame_of_metrics(0, 10))
    life.append(frame_of_metrics(10, 10))
    life.close()
    path = segment.path_of(life.run.folder, 1)
    data = path.read_bytes()
    path.write_bytes(data[:-20] + bytes(20))  # the end of the last record was not on the disk
    life = new_life()
    life.insist()
    assert life.run.next_seq(SESSION) <= 19
    life.append(frame_of_metrics(life.run.next_seq(SESSION), 20 - life.run.next_seq(SESSION)))
    life.end_all(20)
    life.insist()

    run = sink.only_run()
    assert points_in(run) == points_of(*range(20))
    assert "relay.damaged_records" not in run.tags


def test_a_frame_of_a_later_release_blocks_its_run_in_words_and_is_kept(new_life, sink):
    life = new_life()
    life.append(frame_of_metrics(0, 10))
    life.close()
    path = segment.path_of(life.run.folder, 1)
    data = path.read_bytes()
    whole = len(frame_of_metrics(0, 10)[1])
    before, later = data[:-whole], bytearray(data[-whole:])
    later[3] = VERSION + 1
    later[36:40] = crc32(later[40:], crc32(later[:36])).to_bytes(4, "little")
    life = new_life()
    life.append(frame_of_metrics(10, 10))  # so that recovery has no need to read the other
    path.write_bytes(before + later)

    assert life.work() == BLOCKED_RETRY_S
    assert life.lane.is_blocked
    assert f"version {VERSION + 1}; this release reads up to {VERSION}" in life.lane.last_error
    assert path.read_bytes() == before + later


# ── the threads ──


class FakeLane:
    """What Delivery needs of a lane."""

    def __init__(self, answers: list[Any] | None = None) -> None:
        self.answers = iter(answers or [])
        self.worked: list[float] = []
        self.at_once = self.at_once_max = 0
        self.last_error: str | None = None
        self.is_parked = False
        self.release = threading.Event()
        self.release.set()
        self.run: Any = self
        self.waiting = 0
        self.card: Any = self
        self.run_id = "fake"

    def waiting_bytes(self) -> int:
        return self.waiting

    def work(self) -> float | None:
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        self.worked.append(time.monotonic())
        try:
            assert self.release.wait(30)
            answer = next(self.answers, None)
            if isinstance(answer, BaseException):
                raise answer
            return answer
        finally:
            self.at_once -= 1


@pytest.fixture
def new_delivery() -> Iterator[Callable[..., Delivery]]:
    made: list[Delivery] = []

    def new(threads: int = 2, batch_age_s: float = 0.01) -> Delivery:
        made.append(Delivery(Breaker(), threads=threads, batch_age_s=batch_age_s))
        made[-1].start()
        return made[-1]

    yield new
    for each in made:
        each.stop()


def test_a_lane_is_worked_until_it_has_nothing_left(new_delivery):
    delivery = new_delivery()
    lane = FakeLane([0.0, 0.0, 0.01, None])
    delivery.notify(lane)
    wait_until(lambda: len(lane.worked) == 4, "worked")
    wait_until(delivery.is_idle, "idle")

    assert len(lane.worked) == 4
    delivery.notify(lane)
    wait_until(lambda: len(lane.worked) == 5, "worked again")


def test_a_lane_is_worked_by_one_thread_at_a_time_and_lanes_side_by_side(new_delivery):
    delivery = new_delivery(threads=3)
    lanes_ = [FakeLane([0.0] * 20) for _ in range(3)]
    for lane in lanes_:
        lane.release.clear()
        delivery.deliver_now([lane])
    wait_until(lambda: all(lane.at_once for lane in lanes_), "all are worked")
    for lane in lanes_:
        for _ in range(10):
            delivery.notify(lane)
        lane.release.set()
    wait_until(delivery.is_idle, "idle")

    assert [lane.at_once_max for lane in lanes_] == [1, 1, 1]
    assert all(len(lane.worked) >= 21 for lane in lanes_)


def test_a_batch_that_is_not_full_waits_for_more_and_a_full_one_does_not(new_delivery):
    delivery = new_delivery(batch_age_s=0.3)
    lane, full = FakeLane(), FakeLane()
    full.waiting = 1 << 20
    begin_s = time.monotonic()
    for _ in range(5):
        delivery.notify(lane)
    delivery.notify(full)
    wait_until(lambda: lane.worked, "worked")

    assert len(lane.worked) == 1
    assert lane.worked[0] - begin_s >= 0.3
    assert full.worked[0] - begin_s < 0.3


def test_what_is_new_while_a_lane_is_worked_is_not_forgotten(new_delivery):
    delivery = new_delivery()
    lane = FakeLane()
    lane.release.clear()
    delivery.notify(lane)
    wait_until(lambda: lane.worked, "worked")
    delivery.notify(lane)
    lane.release.set()
    wait_until(lambda: len(lane.worked) == 2, "worked again")


def test_between_two_steps_a_lane_is_never_seen_with_nothing_to_do(new_delivery):
    delivery = new_delivery(threads=1)
    lane = FakeLane([0.0] * 5000)
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        delivery.deliver_now([lane])
        until_s = time.monotonic() + PATIENCE_S
        while not delivery.is_idle():  # without a pause: it is to be asked in the wrong moment
            assert time.monotonic() < until_s
        steps = len(lane.worked)
    finally:
        sys.setswitchinterval(switch_s)

    assert steps == 5001


def test_who_is_told_to_go_on_at_work_is_not_parked_by_the_step_that_ends(new_delivery):
    delivery = new_delivery()
    lane = FakeLane([3600.0, 3600.0])
    lane.is_parked = True  # as a step says that had begun before there was more to do
    lane.release.clear()
    delivery.notify(lane)
    wait_until(lambda: lane.worked, "worked")
    delivery.batch_age_s = 0.2
    delivery.notify(lane)
    lane.release.set()
    wait_until(delivery.is_idle, "idle")

    assert len(lane.worked) == 2


def test_a_flush_does_not_wait_for_a_lane_s_long_pause(new_delivery):
    delivery = new_delivery()
    lane = FakeLane([3600.0, None])
    delivery.notify(lane)
    wait_until(lambda: lane.worked, "worked")
    wait_until(lambda: lane in delivery._due_s, "it waits")
    assert not delivery.is_idle()
    delivery.deliver_now([lane])

    wait_until(lambda: len(lane.worked) == 2, "worked at once")


def test_an_error_of_ours_in_one_lane_stops_neither_it_nor_the_others(new_delivery, caplog):
    delivery = new_delivery(threads=1)
    broken, fine = FakeLane([ZeroDivisionError("ours"), None]), FakeLane()
    with caplog.at_level(logging.ERROR, "mlflow_relay_daemon"):
        delivery.notify(broken)
        wait_until(lambda: broken.worked, "worked")
        delivery.notify(fine)
        wait_until(lambda: fine.worked, "the other is worked")

    assert broken.last_error is not None
    assert "ZeroDivisionError: ours" in caplog.text
    delivery.deliver_now([broken])
    wait_until(lambda: len(broken.worked) == 2, "worked again")


def test_stopping_lets_the_request_finish_and_nothing_begin(new_delivery):
    delivery = new_delivery(threads=1)
    lane, waiting = FakeLane([0.0, 0.0]), FakeLane()
    lane.release.clear()
    delivery.deliver_now([lane])
    wait_until(lambda: lane.worked, "worked")
    delivery.notify(waiting)
    stopping = threading.Thread(target=delivery.stop)
    stopping.start()
    wait_until(lambda: delivery._stopping, "it stops")
    lane.release.set()
    stopping.join(30)

    assert not stopping.is_alive()
    assert len(lane.worked) == 1
    assert waiting.worked == []


def test_a_lane_that_waits_for_a_server_that_is_away_leaves_when_stopped(new_delivery):
    delivery = new_delivery(threads=1)
    lane = FakeLane([Stopped()])
    delivery.deliver_now([lane])
    wait_until(lambda: lane.worked, "worked")
    delivery.stop()

    assert [thread.is_alive() for thread in delivery._threads] == [False]


def test_many_runs_arrive_whole_with_one_request_each_at_a_time(tmp_path, sink, new_delivery):
    """Four threads, twelve runs, appends while they are delivered, a server that stumbles."""
    rng = random.Random(11)
    disk = FailingDisk()
    runs: list[tuple[RunSpool, Lane]] = []
    breaker = Breaker(base_s=0.001, cap_s=0.002)
    delivery = Delivery(breaker, threads=4, batch_age_s=0.001)
    stumble = itertools.count()

    def trouble(name: str, number: int) -> None:
        which = next(stumble) % 40
        if which == 7:
            raise ServerAway("reset")
        if which == 23:
            raise TryAgain("deadlock")

    sink.before = trouble
    try:
        for number in range(12):
            folder = tmp_path / f"run{number}"
            folder.mkdir()
            card = new_card([SESSION], run_id=f"{number:032x}")
            run = RunSpool(disk, folder, card, segment_bytes_max=5000)
            run.save_card()
            runs.append((run, new_lane(run, sink, breaker, DeadLetters(disk, folder))))
        delivery.start()
        for first in range(0, 400, 20):
            for run, lane in rng.sample(runs, len(runs)):
                run.append([frame_of_metrics(first, 20)])
                delivery.notify(lane)
        wait_until(lambda: all(run.is_drained() for run, _ in runs), "all is delivered")
    finally:
        delivery.stop()
        for run, _ in runs:
            run.close()

    for number in range(12):
        (found,) = [r for r in sink.runs.values() if r.tags["relay.run_id"] == f"{number:032x}"]
        assert points_in(found) == points_of(*range(400))
    assert all(most == 1 for run_id, most in sink.at_once.items() if run_id)
