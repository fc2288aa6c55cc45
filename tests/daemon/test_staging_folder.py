"""The staging folder: what it holds, what it tells ranks, what is swept out of it."""

from __future__ import annotations

import time

from mlflow_relay.paths import staging_notice
from mlflow_relay.staging import find_room, run_folder
from mlflow_relay_daemon.spool.card import Card
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.spool import Spool
from mlflow_relay_daemon.spool.staging import LEFT_OVER_AGE_S, UNKNOWN_RUN_AGE_S, Staging

DAY_S = LEFT_OVER_AGE_S


def test_ranks_find_what_the_daemon_tells(tmp_path):
    staging, socket = Staging(Disk(), tmp_path), tmp_path / "relay.sock"
    staging.publish(socket, 5, None)
    room = find_room(socket, {})
    assert (room.root, room.free_bytes_min, room.bytes_left) == (tmp_path / "staging", 5, None)
    staging.publish(socket, 5, 100)
    assert find_room(socket, {}).bytes_left == 100


def test_a_notice_is_written_only_when_it_says_something_new(tmp_path):
    staging, socket = Staging(Disk(), tmp_path), tmp_path / "relay.sock"
    staging.publish(socket, 5, None)
    before = staging_notice(socket).stat()
    staging.publish(socket, 5, None)
    assert staging_notice(socket).stat() == before
    staging.publish(socket, 6, None)
    assert staging_notice(socket).stat() != before


def test_its_size_is_that_of_all_files_in_it(tmp_path):
    staging = Staging(Disk(), tmp_path)
    assert staging.bytes() == 0
    for run_id in ("a" * 32, "b" * 32):
        (run_folder(tmp_path / "staging", run_id) / "file").write_bytes(b"x" * 100)
    assert staging.bytes() == 200
    (tmp_path / "staging" / ("a" * 32) / "file").unlink()
    assert staging.bytes() == 100


def test_only_what_nobody_can_need_is_swept_and_only_after_a_day(tmp_path):
    staging = Staging(Disk(), tmp_path)
    known, busy, unknown = "a" * 32, "b" * 32, "c" * 32
    for run_id in (known, busy, unknown):
        for name in ("wanted", "left over"):
            (run_folder(staging.folder, run_id) / name).write_bytes(b"x")

    def wanted(run_id: str) -> set[str] | None:
        return {known: {"wanted"}, busy: None}[run_id]

    now_s = time.time()
    assert staging.sweep(wanted, now_s) == 0
    assert staging.sweep(wanted, now_s + DAY_S + 60) == 1
    left = sorted(f"{path.parent.name[0]}/{path.name}" for path in staging.folder.glob("*/*"))
    assert left == ["a/wanted", "b/left over", "b/wanted", "c/left over", "c/wanted"]
    assert staging.sweep(wanted, now_s + UNKNOWN_RUN_AGE_S + 60) == 2
    assert staging.sweep(wanted, time.time() + UNKNOWN_RUN_AGE_S + 60) == 0
    assert sorted(path.name[0] for path in staging.folder.iterdir()) == ["a", "b"]


def test_the_quota_counts_staged_files_and_leaves_a_part_to_records(tmp_path):
    spool = Spool(Disk(), tmp_path / "spool", segment_bytes_max=1 << 20, bytes_max=10_000)
    try:
        socket = tmp_path / "relay.sock"
        spool.publish_staging(socket)
        assert find_room(socket, {}).bytes_left == 9_000
        (run_folder(spool.staging.folder, "a" * 32) / "file").write_bytes(b"x" * 8_000)
        spool.publish_staging(socket)
        assert find_room(socket, {}).bytes_left == 1_000
        # A file whose record is not here yet must not keep its record out.
        spool.check_space(9_000)
        run = spool.open_run(Card("a" * 32, "key", "exp", "", 0, 1, {}))
        run.artifacts.staged_bytes = 8_000
        spool.check_space(2_000)
        try:
            spool.check_space(2_001)
        except OSError as error:
            assert "quota" in str(error)
        else:
            raise AssertionError("the quota does not count files")
    finally:
        spool.close()
