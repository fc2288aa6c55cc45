"""The spool: one daemon at a time, its limits, and what it finds at its start."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_relay_daemon.spool import card as cards
from mlflow_relay_daemon.spool import segment
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.spool import UNREAD_EVERY_S, RunLeftAlone, Spool, SpoolTaken
from mlflow_relay_daemon.status import read_spool
from tests.support.spools import RUN_ID, SESSION, FailingDisk, frame_of_metrics, new_card, seqs_in

OTHER_RUN = "f" * 32
OpenSpool = Callable[..., Spool]


@pytest.fixture
def disk() -> FailingDisk:
    return FailingDisk()


@pytest.fixture
def open_spool(tmp_path: Path, disk: FailingDisk) -> Iterator[OpenSpool]:
    """Open the spool of this test, again and again, as daemons do that come and go."""
    spools: list[Spool] = []

    def new(**options: Any) -> Spool:
        for spool in spools:
            spool.close()
        spools.clear()
        spools.append(Spool(disk, tmp_path / "spool", segment_bytes_max=2000, **options))
        return spools[-1]

    yield new
    for spool in spools:
        spool.close()


def run_with_frames(spool: Spool, run_id: str = RUN_ID, frames: int = 40) -> RunSpool:
    """Return a run as attachments and intake leave it."""
    run = spool.open_run(new_card(run_id=run_id))
    run.save_card()
    for first in range(0, 5 * frames, 5):
        run.append([frame_of_metrics(first, 5)])
    return run


def quarantined(spool: Spool) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in (spool.folder / "quarantine").iterdir())


def folder_of(spool: Spool, run_id: str = RUN_ID) -> Path:
    return spool.folder / "runs" / run_id


# ── one at a time ──


def test_a_spool_is_made_for_this_user_alone(open_spool):
    spool = open_spool()

    assert spool.folder.stat().st_mode & 0o777 == 0o700
    assert spool.runs == {}
    assert spool.quarantined == 0


HOLD = """
import sys
from pathlib import Path
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.spool import Spool, SpoolTaken
try:
    spool = Spool(Disk(), Path(sys.argv[1]), segment_bytes_max=2000)
except SpoolTaken:
    print("taken", flush=True)
else:
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_second_daemon_is_refused_until_the_first_is_dead(open_spool, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "spool")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"mine\n"
            with pytest.raises(SpoolTaken):
                open_spool()
        finally:
            first.kill()
    assert open_spool().runs == {}
    second = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert second.stdout == b"taken\n"


@pytest.mark.parametrize("operation", ["make_folder", "sync_folder"])
def test_a_spool_that_cannot_be_made_says_so_and_lets_go(open_spool, disk, operation):
    disk.fail(operation, error=errno.EROFS)
    with pytest.raises(OSError, match="Read-only"):
        open_spool()
    disk.mend()

    assert open_spool().runs == {}


# ── runs ──


def test_runs_are_found_again_with_all_they_have(open_spool):
    spool = open_spool()
    run_with_frames(spool)
    run_with_frames(spool, OTHER_RUN, frames=3)
    spool = open_spool()

    assert sorted(spool.runs) == sorted([RUN_ID, OTHER_RUN])
    assert seqs_in(spool.runs[RUN_ID]) == list(range(200))
    assert seqs_in(spool.runs[OTHER_RUN]) == list(range(15))
    assert spool.segment_bytes() == sum(
        path.stat().st_size for path in spool.folder.glob("runs/*/*.segment")
    )


def test_a_run_is_opened_once(open_spool):
    spool = open_spool()
    run = run_with_frames(spool)

    assert spool.open_run(new_card()) is run


def test_the_folder_of_a_run_is_on_the_disk_before_the_run_is_used(open_spool, disk):
    spool = open_spool()
    disk.asked.clear()
    spool.open_run(new_card())

    operations = [(operation, name) for operation, name, _ in disk.asked]
    at = operations.index(("make_folder", RUN_ID))
    assert operations[at + 1] == ("sync_folder", "runs")


def test_a_folder_whose_name_could_not_be_synced_is_synced_the_next_time(open_spool, disk):
    """It is there, but a power failure would take it, with all that was acknowledged in it."""
    spool = open_spool()
    disk.fail("sync_folder", "runs")
    with pytest.raises(OSError, match="Input/output"):
        spool.open_run(new_card())
    disk.asked.clear()
    spool.open_run(new_card())

    assert disk.count("sync_folder", "runs") == 1


# ── limits ──


def test_the_quota_holds_and_space_that_is_returned_counts(open_spool):
    spool = open_spool(bytes_max=10_000)
    run = run_with_frames(spool, frames=10)
    left = 10_000 - spool.segment_bytes()
    assert left > 0
    spool.check_space(left)
    with pytest.raises(OSError, match="quota of 10000 bytes") as refusal:
        spool.check_space(left + 1)
    assert refusal.value.errno == errno.EDQUOT

    mark = type(run.mark)(**vars(run.mark))
    for _, _, behind in run.pieces():
        mark.segment, mark.offset = behind
    run.settle(mark)
    spool.check_space(left + 1)


def test_free_space_is_left_to_others(open_spool, disk, monkeypatch):
    from mlflow_relay_daemon.spool import spool as module

    monkeypatch.setattr(module, "FREE_SPACE_EVERY_S", -1)
    spool = open_spool(free_bytes_min=1000)
    disk.free = 5000
    spool.check_space(4000)
    with pytest.raises(OSError, match="under 1000 bytes are free") as refusal:
        spool.check_space(4001)
    assert refusal.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="free"):
        disk.free = 0
        spool.open_run(new_card())


# ── what is found ──

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeroes": lambda data: bytes(len(data)),
    "cut": lambda data: data[:20],
    "one byte": lambda data: b"\xff" + data[1:],
    "noise": lambda data: b"noise" * 100,
    "endless": lambda data: b"[" * 200_000,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_card_costs_nothing_where_a_segment_has_a_copy(open_spool, damage):
    spool = open_spool()
    run_with_frames(spool)
    path = folder_of(spool) / cards.NAME
    path.write_bytes(damage(path.read_bytes()))
    spool = open_spool()

    run = spool.runs[RUN_ID]
    assert run.card.experiment_name == "aifs"
    assert SESSION.hex() in run.card.sessions
    assert seqs_in(run) == list(range(200))
    assert quarantined(spool) == [cards.NAME]
    assert spool.quarantined == 1
    assert open_spool().runs[RUN_ID].card == run.card


def test_a_lost_card_costs_nothing_where_a_segment_has_a_copy(open_spool):
    spool = open_spool()
    run_with_frames(spool)
    (folder_of(spool) / cards.NAME).unlink()

    assert seqs_in(open_spool().runs[RUN_ID]) == list(range(200))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_that_cannot_be_told_is_put_aside_and_the_others_go_on(open_spool, damage):
    spool = open_spool()
    run_with_frames(spool)
    run_with_frames(spool, OTHER_RUN)
    for path in folder_of(spool).iterdir():
        path.write_bytes(damage(path.read_bytes()))
    spool = open_spool()

    assert sorted(spool.runs) == [OTHER_RUN]
    assert quarantined(spool) == [RUN_ID]
    assert seqs_in(spool.runs[OTHER_RUN]) == list(range(200))
    run_with_frames(spool, RUN_ID, frames=1)  # it may come anew
    assert sorted(open_spool().runs) == sorted([RUN_ID, OTHER_RUN])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["watermark", "dead_letters.jsonl", "card.json.new", "other"])
def test_damage_elsewhere_in_a_folder_costs_no_record(open_spool, damage, name):
    spool = open_spool()
    run_with_frames(spool)
    (folder_of(spool) / name).write_bytes(damage(b"MRW\1some content"))
    spool = open_spool()

    assert seqs_in(spool.runs[RUN_ID]) == list(range(200))
    assert quarantined(spool) == []


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_segment_costs_itself_alone(open_spool, damage):
    spool = open_spool()
    run = run_with_frames(spool)
    numbers = segment.numbers_in(run.folder)
    for number in (numbers[0], numbers[len(numbers) // 2], numbers[-1]):
        path = segment.path_of(run.folder, number)
        data = path.read_bytes()
        path.write_bytes(damage(data))

        found = seqs_in(open_spool().runs[RUN_ID])
        assert len(found) >= 200 - 5 * (len(data) // 300 + 1)
        assert found == sorted(set(found))
        path.write_bytes(data)

    assert seqs_in(open_spool().runs[RUN_ID]) == list(range(200))


def test_a_crash_before_a_run_had_its_card_is_no_damage(open_spool):
    """Every daemon that is killed at the wrong moment leaves one: nobody must look at it."""
    spool = open_spool()
    (spool.folder / "runs" / RUN_ID).mkdir()
    spool = open_spool()

    assert spool.runs == {}
    assert spool.quarantined == 0
    assert seqs_in(run_with_frames(spool, frames=1)) == list(range(5))


def test_what_is_nothing_of_ours_is_left_where_it_is(open_spool):
    spool = open_spool()
    run_with_frames(spool, frames=1)
    (spool.folder / "runs" / ".nfs0001").write_text("of a network file system")
    spool = open_spool()

    assert sorted(spool.runs) == [RUN_ID]
    assert (spool.folder / "runs" / ".nfs0001").exists()


@pytest.mark.parametrize("what", ["card", "newest segment", "earlier segment"])
def test_what_a_later_release_wrote_is_left_alone_and_never_written_over(open_spool, what):
    spool = open_spool()
    run = run_with_frames(spool)
    run_with_frames(spool, OTHER_RUN)
    if what == "card":
        path = folder_of(spool) / cards.NAME
        path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 2'))
    else:
        which = -1 if what == "newest segment" else -2
        path = segment.path_of(run.folder, segment.numbers_in(run.folder)[which])
        data = path.read_bytes()
        path.write_bytes(data[:3] + b"\2" + data[4:])
    before = {path: path.read_bytes() for path in folder_of(spool).iterdir()}
    spool = open_spool()

    assert sorted(spool.runs) == [OTHER_RUN]
    with pytest.raises(RunLeftAlone, match="version 2"):
        spool.open_run(new_card())
    assert {path: path.read_bytes() for path in folder_of(spool).iterdir()} == before


def test_a_folder_that_cannot_be_read_is_left_alone(open_spool):
    if os.geteuid() == 0:
        spool = open_spool()
        run_with_frames(spool)
        (folder_of(spool) / cards.NAME).unlink()
        (folder_of(spool) / cards.NAME).mkdir()  # root reads everything but this
        spool = open_spool()
    else:
        spool = open_spool()
        run_with_frames(spool)
        folder_of(spool).chmod(0)
        spool = open_spool()

    assert spool.runs == {}
    with pytest.raises(RunLeftAlone):
        spool.open_run(new_card())


def test_a_run_is_opened_when_the_disk_lets_it_be_read(open_spool, disk):
    """Its fsync fails at the start, and so does the new file: no later fsync is believed."""
    run_with_frames(open_spool(), frames=1)
    disk.fail("sync", ".segment")
    disk.fail("rename", ".segment", times=2)
    spool = open_spool()
    now_s = time.monotonic()
    assert spool.open_unread(now_s) == []  # not so soon
    assert spool.open_unread(now_s + UNREAD_EVERY_S) == []
    with pytest.raises(RunLeftAlone):
        spool.open_run(new_card())
    before = segment.path_of(folder_of(spool), 1).stat().st_ino

    (run,) = spool.open_unread(now_s + 2 * UNREAD_EVERY_S)

    assert spool.open_run(new_card()) is run
    assert seqs_in(run) == list(range(5))
    assert segment.path_of(run.folder, 1).stat().st_ino != before
    assert spool.open_unread(now_s + 3 * UNREAD_EVERY_S) == []


def test_who_only_looks_at_a_spool_syncs_and_changes_nothing(open_spool, monkeypatch):
    """`status` without a daemon: perhaps there is one, and it is only slow to answer."""
    spool = open_spool()
    run_with_frames(spool)
    before = {path: path.stat().st_ino for path in folder_of(spool).iterdir()}

    def fdatasync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    (run,) = read_spool(spool.folder)["runs"]

    assert run["accepted_records"] == 200
    assert {path: path.stat().st_ino for path in folder_of(spool).iterdir()} == before


def test_a_quarantine_on_a_full_disk_stops_nobody(open_spool, monkeypatch):
    from mlflow_relay_daemon.spool import spool as module

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = open_spool()
    run_with_frames(spool, OTHER_RUN)
    (folder_of(spool)).mkdir()
    (folder_of(spool) / cards.NAME).write_text("noise")
    monkeypatch.setattr(module.shutil, "move", no_space)
    spool = open_spool()

    assert sorted(spool.runs) == [OTHER_RUN]


def test_the_real_disk_says_what_is_free(tmp_path):
    assert 0 < Disk().free_bytes(tmp_path) <= 1 << 60
