"""What comes over HTTP, on a disk that fails, and through the lives of the daemon."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlflow_relay import clock, records
from mlflow_relay_daemon.api.writer import Writer, guest_session, rank_session
from mlflow_relay_daemon.hosted import Hosted, Runs
from mlflow_relay_daemon.retry import Breaker
from mlflow_relay_daemon.spool.card import OWN_KEY, Card, Link
from mlflow_relay_daemon.spool.spool import Spool
from tests.support.fake_sink import FakeRun, FakeSink
from tests.support.spools import RUN_ID, START_MS, FailingDisk


class Life:
    """One life of a daemon, as far as HTTP reaches into it. What it leaves is on the disk."""

    def __init__(self, folder: Path, sink: FakeSink) -> None:
        self.disk = FailingDisk()
        self.spool = Spool(self.disk, folder / "spool", segment_bytes_max=1 << 20)
        self.breaker = Breaker(base_s=0.001, cap_s=0.002)
        self.runs = Runs(self.spool, sink, self.breaker, None)
        self.writer = Writer(self.runs, lambda function: function())

    @property
    def hosted(self) -> Hosted:
        (hosted,) = self.runs.by_id.values()
        return hosted

    @property
    def card(self) -> Card:
        return self.hosted.run.card

    def begin(self, *, guest: bool = False) -> None:
        parent = Link("f" * 32) if guest else None
        card = Card(RUN_ID, OWN_KEY + RUN_ID, "aifs", "", START_MS, 1, {}, node_count=1)
        card.is_introduced, card.experiment_id = True, "e1"
        if parent is not None:
            card.parent, card.resume_mode, card.run_key = parent, "guest", f"guest/{parent.asked}"
        hosted = self.writer.make_run(card)
        self.writer.write(hosted, begins=not guest)

    def log(self, *steps: int) -> None:
        found = [records.pack_points(["m"], [float(n)], [n], START_MS + n) for n in steps]
        self.writer.write(self.hosted, found)

    def end(self, status: str) -> None:
        self.writer.write(self.hosted, end=(status, START_MS + 99))

    def leave_behind(self) -> None:
        """Let the next append fail, and what it has written stay in the file."""
        is_new = not list(self.hosted.run.folder.glob("*.segment"))  # then its head goes well
        self.disk.fail("sync", ".segment", after=int(is_new))
        self.disk.fail("truncate", ".segment")
        self.disk.fail("unlink", ".segment")

    def deliver(self) -> None:
        assert self.hosted.lane is not None
        for _ in range(100):
            if self.hosted.lane.work() is None:
                return
        raise AssertionError(f"still at work: {self.hosted.lane.last_error}")


OTHERS = "f" * 32


@pytest.fixture
def sink() -> FakeSink:
    sink = FakeSink()
    sink.runs[OTHERS] = sink.new_run("e1", {})
    del sink.runs["m1"]
    sink.runs[OTHERS].run_id = OTHERS
    return sink


@pytest.fixture
def new_life(tmp_path: Path, sink: FakeSink) -> Iterator[Callable[[], Life]]:
    lives: list[Life] = []

    def end_the_last() -> None:
        if lives:
            lives[-1].spool.close()
            lives[-1].breaker.stop()

    def new() -> Life:
        end_the_last()
        lives.append(Life(tmp_path, sink))
        return lives[-1]

    yield new
    end_the_last()


def run_in(sink: FakeSink, life: Life) -> FakeRun:
    return sink.runs[life.card.mlflow_run_id or ""]


@pytest.mark.parametrize("before", [(), (0, 1)], ids=["its first", "a later one"])
@pytest.mark.parametrize("guest", [False, True], ids=["a rank's part", "a guest's"])
def test_what_is_answered_after_a_failed_append_is_delivered_by_the_next_daemon(
    new_life, sink, guest, before
):
    life = new_life()
    life.begin(guest=guest)
    if before:
        life.log(*before)
    life.leave_behind()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        life.log(10, 11)
    life.disk.mend()
    life.log(20)
    life.log(21, 22)

    life = new_life()
    life.log(30)
    life.deliver()

    answered, refused = {*before, 20, 21, 22, 30}, {10, 11}
    assert answered <= set(run_in(sink, life).steps("m")) <= answered | refused
    assert run_in(sink, life).status == "RUNNING"
    assert life.hosted.run.mark.damaged_records == 0


def test_what_is_answered_after_a_crash_is_not_taken_for_what_the_crash_left(new_life, sink):
    """Of a frame that was never answered the first record is on the disk, and can be read."""
    life = new_life()
    life.begin()
    life.log(0)
    life.log(11, 12)
    (segment,) = life.hosted.run.folder.glob("*.segment")
    with segment.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\xff" * 5)

    life = new_life()
    life.log(20)
    life.log(21)
    life = new_life()
    life.deliver()

    assert {0, 20, 21} <= set(run_in(sink, life).steps("m"))


def test_an_end_that_was_not_answered_does_not_end_a_run_that_goes_on(new_life, sink):
    life = new_life()
    life.begin()
    life.log(0)
    life.leave_behind()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        life.end("FINISHED")
    life.disk.mend()
    life.log(1)

    life = new_life()
    life.deliver()
    assert run_in(sink, life).status == "RUNNING"
    life.log(2)
    life.end("FAILED")
    life.deliver()
    assert run_in(sink, life).steps("m") == [0, 1, 2]
    assert (run_in(sink, life).status, life.card.is_over) == ("FAILED", True)


def test_the_latest_word_counts_though_the_clock_was_set_back(new_life, sink, monkeypatch):
    life = new_life()
    life.begin()
    life.log(0)
    monkeypatch.setattr(clock, "now_ms", lambda: START_MS)
    life = new_life()
    life.log(1)
    life.end("FINISHED")
    life.deliver()
    assert run_in(sink, life).status == "FINISHED"
    assert "relay.end_reason" not in run_in(sink, life).tags


@pytest.mark.parametrize("guest", [False, True], ids=["a rank's part", "a guest's"])
def test_a_full_disk_that_is_tried_again_and_again_fills_no_card(new_life, sink, guest):
    life = new_life()
    life.begin(guest=guest)
    life.log(0)
    for step in range(50):
        life.disk.fail("write", ".segment", errno.ENOSPC)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            life.log(step)
    assert len(life.card.sessions) <= 3
    life.log(1)
    life.deliver()
    assert run_in(sink, life).steps("m") == [0, 1]


def test_a_card_that_cannot_be_written_leaves_all_as_it_was(new_life, sink):
    life = new_life()
    life.begin()
    life.log(0)
    life.disk.fail("sync", ".segment")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        life.log(1)
    before = dict(life.card.sessions)
    life.disk.fail("rename", "card.json")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        life.log(1)
    assert life.card.sessions == before
    life.log(2)
    life.end("FINISHED")
    life.deliver()
    assert run_in(sink, life).steps("m") == [0, 2]
    assert run_in(sink, life).status == "FINISHED"
    assert (rank_session(life.card), guest_session(life.card)) == (None, None)
