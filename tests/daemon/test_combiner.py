"""When points are made: what a look may say, and what it must not say yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_relay import records
from mlflow_relay.frames import pack_entry, pack_frame, read_frame
from mlflow_relay_daemon import combiner as combiners
from mlflow_relay_daemon.combiner import Combiner
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.own_records import OwnRecords
from mlflow_relay_daemon.reduction import Giver, Reduction
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.spool import Spool
from mlflow_relay_daemon.spool.watermark import Watermark
from tests.daemon.test_node_metrics import attachment

DEADLINE_S = 30.0


class Job:
    """A run with ranks that give values, and a lane that reads when it is told to."""

    def __init__(self, runs: Runs, ranks: int = 2, **more: object) -> None:
        self.runs = runs
        for rank in range(ranks):
            shape = {"rank": rank, "world_size": ranks, **more}
            self.hosted: Hosted = runs.attach(attachment(rank + 1, **shape))
        self.combiner = Combiner(runs, OwnRecords(runs), DEADLINE_S)

    def give(self, rank: int, step: int, value: float = 1.0) -> None:
        """A rank's value comes to the spool."""
        session = bytes([rank + 1]) * 16
        entry = pack_entry(records.pack_reduce("mean", {"loss": value}, step, 1))
        frame = pack_frame(session, self.hosted.run.next_seq(session), 1, entry)
        self.hosted.run.append([(read_frame(frame), frame)])

    def leave(self, rank: int) -> None:
        self.runs.close_session(self.hosted, bytes([rank + 1]) * 16, lost=0)

    def read(self) -> list[records.Combined]:
        """The lane reads all there is; return the points that it found."""
        run = self.hosted.run
        mark = Watermark(**vars(run.mark))
        reduction = Reduction(mark.reduction)
        found = []
        for _, piece, behind in run.pieces():
            assert piece.header is not None
            for raw in piece.records:
                assert raw is not None
                record = records.unpack_record(raw)
                if isinstance(record, records.Combined):
                    reduction.made(record)
                    found.append(record)
                elif isinstance(record, records.Reduce):
                    rank = piece.header.session[0] - 1
                    assert reduction.give(Giver(rank, 0), record) == []
            mark.segment, mark.offset = behind
        mark.reduction = reduction.save()
        run.settle(mark)
        return found


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    spool = Spool(Disk(), tmp_path / "spool", segment_bytes_max=1 << 20)
    yield Runs(spool, None, None, None)
    spool.close()


def test_a_point_is_made_once_however_often_one_looks(runs: Runs) -> None:
    job = Job(runs)
    job.give(0, step=1, value=1.0)
    job.give(1, step=1, value=2.0)
    job.read()
    for now_s in range(5):
        job.combiner.look(float(now_s))
    (point,) = job.read()
    assert (point.values, point.missing) == ((1.5,), 0)
    for now_s in range(5, 100):
        job.combiner.look(float(now_s))
    assert job.read() == []


def test_a_rank_that_has_gone_is_counted_out_only_when_all_it_left_has_been_read(
    runs: Runs,
) -> None:
    job = Job(runs)
    job.give(0, step=1, value=1.0)
    job.read()
    job.combiner.look(0.0)
    job.give(1, step=1, value=2.0)  # and dies; the lane has not read it yet
    job.leave(1)
    job.combiner.look(1.0)
    job.combiner.look(2.0)
    assert job.read() == [], "no point without the value that is on its way"
    job.combiner.look(3.0)
    (point,) = job.read()
    assert (point.values, point.missing) == ((1.5,), 0)


def test_a_rank_that_left_nothing_behind_is_missing(runs: Runs) -> None:
    job = Job(runs)
    job.give(0, step=1, value=1.0)
    job.leave(1)
    job.read()
    job.combiner.look(0.0)
    (point,) = job.read()
    assert (point.values, point.missing) == ((1.0,), 1)


def test_the_deadline_counts_from_when_the_point_was_first_seen_waiting(runs: Runs) -> None:
    job = Job(runs, local_world_size=2)
    job.give(0, step=1)
    job.read()
    for now_s in (100.0, 100.0 + DEADLINE_S - 1):
        job.combiner.look(now_s)
        assert job.read() == []
    job.combiner.look(100.0 + DEADLINE_S)
    assert [point.missing for point in job.read()] == [1]


def test_after_a_restart_points_of_the_life_before_are_read_first(runs: Runs) -> None:
    job = Job(runs)
    job.give(0, step=1, value=1.0)
    job.leave(1)
    job.read()
    job.combiner.look(0.0)  # makes a point without rank 1, and the daemon is killed
    again = Combiner(runs, OwnRecords(runs), DEADLINE_S)
    for now_s in range(100):
        again.look(float(now_s))
    assert [point.missing for point in job.read()] == [1], "the one of before, and no other"


def test_no_more_values_wait_than_there_is_room_for(runs: Runs, monkeypatch) -> None:
    monkeypatch.setattr(combiners, "WAITING_VALUES_MAX", 10)
    job = Job(runs, local_world_size=2)
    for step in range(15):
        job.give(0, step=step)
    job.read()
    job.combiner.look(0.0)
    assert [point.step for point in job.read()] == list(range(5)), "the oldest go first"


def test_ranks_that_nobody_has_told_of_are_waited_for_at_first(runs: Runs) -> None:
    job = Job(runs, ranks=1, world_size=2)
    job.give(0, step=1)
    job.read()
    job.combiner.look(0.0)
    assert job.read() == []
    job.combiner.look(DEADLINE_S)
    job.give(0, step=2)
    job.read()
    job.combiner.look(DEADLINE_S + 1)
    assert [point.missing for point in job.read()] == [0], "one rank is here, the rest elsewhere"


def test_points_wait_for_a_full_disk(runs: Runs) -> None:
    job = Job(runs, ranks=1, local_world_size=1)
    job.give(0, step=1)
    job.read()
    runs.spool.bytes_max = 1
    job.combiner.look(0.0)
    assert job.read() == []
    assert job.combiner.is_waiting() is False, "a rank lives"
    runs.spool.bytes_max = None
    job.leave(0)
    assert job.combiner.is_waiting()
    job.combiner.look(1.0)
    assert len(job.read()) == 1
    assert not job.combiner.is_waiting()


@pytest.mark.parametrize(
    ("shape", "suffix"),
    [
        ({"node_count": 1, "world_size": 2}, ""),
        ({"node_count": 2, "node_rank": 1, "local_world_size": 2, "world_size": 4}, "/node_1"),
        ({"local_world_size": 4, "world_size": 4}, ""),
        ({"world_size": 2}, ""),
        ({"node_count": 2, "world_size": 4}, "/node_0"),
    ],
)
def test_the_points_of_one_node_of_several_say_which(
    runs: Runs, shape: dict[str, object], suffix: str
) -> None:
    job = Job(runs, **shape)
    for rank in range(2):
        job.give(rank, step=1)
        job.leave(rank)
    job.read()
    job.combiner.look(0.0)
    job.combiner.look(DEADLINE_S)
    assert [point.suffix for point in job.read()] == [suffix]
