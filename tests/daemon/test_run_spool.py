"""One run's folder on a disk that fails: what was acknowledged is delivered, whatever happens."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import crc32

import msgpack
import pytest

from mlflow_relay.frames import Header
from mlflow_relay_daemon.spool import run_spool, segment, watermark
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.run_spool import RunSpool
from mlflow_relay_daemon.spool.sequences import Sequences
from mlflow_relay_daemon.spool.watermark import Watermark
from mlflow_relay_daemon.states import RunState
from tests.support.seeds import new_seed
from tests.support.spools import (
    SESSION,
    FailingDisk,
    found_in,
    frame_of_metrics,
    metrics,
    new_card,
    seqs_in,
)

OTHER = bytes(16)
SEGMENT_BYTES = 2000

OpenRun = Callable[..., RunSpool]


@pytest.fixture
def disk() -> FailingDisk:
    return FailingDisk()


@pytest.fixture
def open_run(tmp_path: Path, disk: FailingDisk) -> Iterator[OpenRun]:
    """Open the run of this test, again and again, as daemons do that come and go."""
    runs: list[RunSpool] = []

    def new(segment_bytes_max: int = SEGMENT_BYTES) -> RunSpool:
        for run in runs:
            run.close()
        card = new_card([SESSION, OTHER])
        runs.append(RunSpool(disk, tmp_path, card, segment_bytes_max=segment_bytes_max))
        return runs[-1]

    yield new
    for run in runs:
        run.close()


def append(run: RunSpool, *firsts: int, count: int = 5, session: bytes = SESSION) -> None:
    run.append([frame_of_metrics(first, count, session) for first in firsts])


def settle_next(run: RunSpool, pieces: int = 1) -> None:
    """Do what a lane does with the next pieces, but for the delivery."""
    mark = Watermark(**vars(run.mark))
    seen = Sequences(mark.sequences)
    for _, piece, behind in itertools.islice(run.pieces(), pieces):
        header: Header | None = piece.header
        if header is not None:
            seen.add(header.session, header.first_seq, header.next_seq)
            mark.settled_records += header.records
            mark.delivered_records += header.records
        mark.segment, mark.offset = behind
    mark.sequences = seen.save()
    run.settle(mark)


def settle_all(run: RunSpool) -> None:
    settle_next(run, 1 << 30)


def segments(folder: Path) -> list[int]:
    return segment.numbers_in(folder)


# ── the good way ──


def test_what_was_appended_is_found_in_order_over_many_segments(open_run, tmp_path):
    run = open_run()
    for first in range(0, 200, 5):
        append(run, first)

    assert len(segments(tmp_path)) > 3
    assert [record for _, _, record in found_in(run)] == [metrics(seq) for seq in range(200)]
    assert run.next_seq(SESSION) == 200
    assert run.accepted_records == run.waiting_records() == 200


def test_sessions_share_the_segments_and_keep_their_numbers(open_run):
    run = open_run()
    run.append([frame_of_metrics(0, 3, SESSION), frame_of_metrics(0, 4, OTHER)])
    run.append([frame_of_metrics(4, 2, OTHER), frame_of_metrics(3, 1, SESSION)])

    assert (run.next_seq(SESSION), run.next_seq(OTHER)) == (4, 6)
    assert seqs_in(run, SESSION) == list(range(4))
    assert seqs_in(run, OTHER) == list(range(6))


def test_one_group_is_one_write_and_one_fsync(open_run, disk):
    run = open_run()
    append(run, 0)
    disk.asked.clear()

    append(run, 5, 10, 15)

    assert [operation for operation, *_ in disk.asked] == ["write", "sync"]


def test_counts_follow_the_watermark(open_run):
    run = open_run()
    append(run, 0, 5)
    append(run, 10)
    assert run.waiting_bytes() == sum(len(frame_of_metrics(first, 5)[1]) for first in (0, 5, 10))
    assert not run.is_drained()
    assert run.oldest_waiting_ms() is not None

    settle_next(run, 2)
    assert run.waiting_records() == 5
    assert run.waiting_bytes() == len(frame_of_metrics(10, 5)[1])
    assert seqs_in(run) == list(range(10, 15))

    settle_next(run)
    assert (run.waiting_records(), run.waiting_bytes()) == (0, 0)
    assert run.is_drained()
    assert run.oldest_waiting_ms() is None
    append(run, 15)
    assert (run.waiting_records(), seqs_in(run)) == (5, list(range(15, 20)))


def test_segments_are_removed_only_when_a_later_one_is_there(open_run, tmp_path):
    run = open_run()
    for first in range(0, 100, 5):
        append(run, first)
    before = segments(tmp_path)

    while not run.is_drained():
        settle_next(run)
        there = segments(tmp_path)
        assert there == [number for number in before if number >= run.mark.segment]
        assert there

    assert segments(tmp_path) == before[-1:]


@pytest.mark.parametrize("again", [False, True])
def test_a_new_life_finds_all_and_goes_on_in_a_file_of_its_own(open_run, tmp_path, again):
    run = open_run()
    append(run, 0, 5)
    settle_next(run)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.segment")}
    for _ in range(3 if again else 1):
        run = open_run()
        assert (run.next_seq(SESSION), run.accepted_records, run.waiting_records()) == (10, 10, 5)

    append(run, 10)

    assert seqs_in(run) == list(range(5, 15))
    assert {path: path.read_bytes() for path in before} == before


def test_a_place_in_the_midst_of_a_frame_is_remembered(open_run):
    run = open_run()
    append(run, 0, 5)
    ((here, piece, _),) = itertools.islice(run.pieces(), 1)
    assert piece.header is not None
    mark = Watermark(**vars(run.mark))
    mark.segment, mark.offset = here
    mark.skip, mark.settled_records = 3, 3
    run.settle(mark)

    run = open_run()
    assert run.mark.skip == 3
    assert run.waiting_records() == 7
    assert seqs_in(run) == list(range(10))  # whose reader skips what the mark says


# ── a disk that fails ──

FAILURES = {
    "write, nothing": ("write", errno.EIO, None),
    "write, full": ("write", errno.ENOSPC, None),
    "write, quota": ("write", errno.EDQUOT, None),
    "write, short": ("write", errno.ENOSPC, 30),
    "write, short by one frame": ("write", errno.ENOSPC, len(frame_of_metrics(10, 5)[1])),
    "fsync": ("sync", errno.EIO, None),
    "fsync, full": ("sync", errno.ENOSPC, None),
}


@pytest.mark.parametrize(("operation", "error", "written"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("cut_fails", [False, True])
@pytest.mark.parametrize("reopened", [False, True])
def test_what_failed_does_not_count_and_is_taken_when_it_comes_again(
    open_run, disk, operation, error, written, cut_fails, reopened
):
    run = open_run()
    append(run, 0, 5)
    disk.fail(operation, ".segment", error, written=written)
    if cut_fails:
        disk.fail("truncate", error=errno.EROFS)
    with pytest.raises(OSError, match=os.strerror(error)):
        append(run, 10, 15)

    assert (run.next_seq(SESSION), run.accepted_records) == (10, 10)
    assert seqs_in(run) == list(range(10))
    disk.mend()
    if reopened:
        run = open_run()
        assert run.next_seq(SESSION) >= 10
    append(run, 10, 15)
    append(run, 20)

    assert run.next_seq(SESSION) == 25
    assert sorted(set(seqs_in(run))) == list(range(25))
    assert set(found_in(run)) == {(SESSION, seq, metrics(seq)) for seq in range(25)}
    assert set(seqs_in(open_run())) == set(range(25))
    disk.assert_no_failed_file_was_trusted(".segment")


@pytest.mark.parametrize("operation", ["create", "write", "sync", "sync_folder"])
def test_a_segment_that_cannot_be_begun_costs_nothing(open_run, disk, tmp_path, operation):
    run = open_run()
    append(run, 0)
    for first in range(5, 100, 5):
        disk.fail(operation, error=errno.ENOSPC, written=20)
        for _ in range(2):
            try:
                append(run, first)
            except OSError:
                assert run.next_seq(SESSION) == first
                continue
            break
        disk.mend()
        if run.next_seq(SESSION) == first:
            append(run, first)

    assert seqs_in(run) == seqs_in(open_run()) == list(range(100))
    disk.assert_no_failed_file_was_trusted(".segment")


def test_a_segment_that_cannot_be_begun_nor_removed_is_in_nobodys_way(open_run, disk):
    run = open_run()
    disk.fail("sync", ".segment")
    disk.fail("unlink", ".segment")
    with pytest.raises(OSError, match="Input/output"):
        append(run, 0)
    disk.mend()

    append(run, 0)

    assert seqs_in(run) == seqs_in(open_run()) == list(range(5))


def test_a_disk_that_is_full_for_long_is_not_filled_with_beginnings(open_run, disk, tmp_path):
    """A try each half second, for a night: none may leave something behind."""
    run = open_run()
    append(run, 0)
    disk.fail("write", ".segment", errno.ENOSPC, times=-1)
    for _ in range(50):
        with pytest.raises(OSError, match="No space"):
            append(run, 5)
        disk.failures[0].after = 1  # the head of a new segment fits in, the frames do not
    disk.mend()

    assert len(segments(tmp_path)) <= 3
    append(run, 5)
    assert seqs_in(run) == list(range(10))


def test_what_was_delivered_is_given_back_on_a_full_disk_too(open_run, disk, tmp_path):
    """Else a full spool would stay full: nothing can be appended that would let the lane go on."""
    run = open_run(segment_bytes_max=1 << 30)
    for first in range(0, 40_000, 500):
        append(run, first, count=500)
    size = run.segment_bytes()
    assert size > 2 * run_spool.RETURN_BYTES_MIN
    disk.fail("write", ".segment", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        append(run, 40_000)
    disk.mend()
    settle_all(run)
    run.return_space()
    settle_all(run)

    assert run.segment_bytes() < size / 10
    assert sum(path.stat().st_size for path in tmp_path.glob("*.segment")) == run.segment_bytes()
    assert run.next_seq(SESSION) == 40_000
    append(run, 40_000)
    assert seqs_in(run) == seqs_in(open_run()) == list(range(40_000, 40_005))


def test_little_is_not_worth_a_new_segment(open_run, tmp_path):
    run = open_run(segment_bytes_max=1 << 30)
    append(run, 0)
    settle_all(run)
    run.return_space()
    run.return_space()

    assert segments(tmp_path) == [1]


def test_little_is_given_back_too_where_nothing_more_could_be_taken(open_run, tmp_path):
    run = open_run(segment_bytes_max=1 << 30)
    append(run, 0, count=200)
    settle_all(run)
    before = run.segment_bytes()
    run.return_space(is_needed=True)
    assert segments(tmp_path) == [2]
    assert run.segment_bytes() < before / 2

    run.return_space(is_needed=True)  # a head for a head would be no gain
    assert segments(tmp_path) == [2]
    append(run, 200)
    assert seqs_in(run) == seqs_in(open_run()) == list(range(200, 205))


def test_nothing_is_given_back_that_is_not_delivered(open_run, tmp_path):
    run = open_run(segment_bytes_max=1 << 30)
    for first in range(0, 40_000, 500):
        append(run, first, count=500)
    settle_next(run, 79)
    run.return_space()

    assert seqs_in(run) == seqs_in(open_run()) == list(range(39_500, 40_000))


def test_a_run_that_is_over_gives_all_back_and_knows_its_counts(open_run, tmp_path):
    run = open_run()
    for first in range(0, 100, 5):
        append(run, first)
    settle_all(run)
    for each in run.card.sessions.values():
        each.closed = True
    run.card.state = RunState.ENDED
    run.return_space()

    assert segments(tmp_path) == []
    assert run.segment_bytes() == 0
    for life in (run, open_run()):
        assert (life.accepted_records, life.waiting_records()) == (100, 0)
        assert life.mark.delivered_records == 100
        assert life.is_drained()
    again = open_run()
    append(again, 100)  # a rank has come back
    assert seqs_in(again) == list(range(100, 105))
    assert (again.accepted_records, again.waiting_records()) == (105, 5)


@pytest.mark.parametrize("failing", ["create", "write", "sync", "sync_folder", "unlink", "rename"])
def test_space_that_cannot_be_given_back_costs_nothing(open_run, disk, failing):
    run = open_run(segment_bytes_max=1 << 30)
    for first in range(0, 40_000, 500):
        append(run, first, count=500)
    settle_all(run)
    disk.fail(failing, error=errno.EIO)
    try:
        run.return_space()
    except OSError:
        assert failing != "rename"  # the watermark only costs a resend
    disk.mend()
    append(run, 40_000)

    assert seqs_in(run)[-5:] == list(range(40_000, 40_005))
    life = open_run()
    assert life.next_seq(SESSION) == 40_005
    assert seqs_in(life)[-5:] == list(range(40_000, 40_005))


@pytest.mark.parametrize("operation", ["write", "rename"])
def test_a_watermark_that_cannot_be_written_stops_nothing(open_run, disk, operation):
    run = open_run()
    append(run, 0, 5)
    disk.fail(operation, "watermark", errno.ENOSPC)
    settle_next(run)

    assert seqs_in(run) == list(range(5, 10))
    assert seqs_in(open_run()) in (list(range(10)), list(range(5, 10)))


def test_a_card_that_cannot_be_written_says_so(open_run, disk):
    run = open_run()
    disk.fail("sync", "card")
    with pytest.raises(OSError, match="Input/output"):
        run.save_card()


# ── watermarks that are lost, old or damaged ──


def life_with_marks(open_run: OpenRun, folder: Path) -> tuple[RunSpool, list[bytes]]:
    """Return a run in the midst of its delivery, and all watermarks that it ever had."""
    run = open_run()
    marks = []
    for first in range(0, 200, 5):
        append(run, first)
    for _ in range(25):
        settle_next(run)
        marks.append((folder / watermark.NAME).read_bytes())
    return run, marks


def test_a_lost_or_damaged_watermark_only_resends(open_run, tmp_path):
    run, _ = life_with_marks(open_run, tmp_path)
    waiting = seqs_in(run)
    there = segments(tmp_path)
    for damage in (None, b"", b"MRW\1", b"noise" * 10, bytes(60)):
        if damage is None:
            (tmp_path / watermark.NAME).unlink()
        else:
            (tmp_path / watermark.NAME).write_bytes(damage)
        again = open_run()

        found = seqs_in(again)
        assert found[-len(waiting) :] == waiting
        assert found == list(range(found[0], 200))
        assert segments(tmp_path) == there
        assert again.next_seq(SESSION) == 200
        assert again.accepted_records == 200
        assert again.waiting_records() == len(found)


def test_every_old_watermark_only_resends(open_run, tmp_path):
    run, marks = life_with_marks(open_run, tmp_path)
    waiting = seqs_in(run)
    for mark in marks:
        (tmp_path / watermark.NAME).write_bytes(mark)
        again = open_run()

        found = seqs_in(again)
        assert found[-len(waiting) :] == waiting
        assert found == list(range(found[0], 200))
        assert (again.next_seq(SESSION), again.accepted_records) == (200, 200)
        assert again.waiting_records() == len(found)


def test_a_watermark_of_the_future_loses_nothing_that_comes(open_run, tmp_path):
    """All segments may be gone, and with them what the watermark points at."""
    run = open_run()
    append(run, 0)
    settle_all(run)
    for path in tmp_path.glob("*.segment"):
        path.unlink()
    again = open_run()
    append(again, 5)

    assert seqs_in(again) == seqs_in(open_run()) == list(range(5, 10))


# ── damage ──


def test_every_flipped_byte_of_a_segment_costs_at_most_its_frame_and_never_the_run(
    open_run, tmp_path
):
    run = open_run(segment_bytes_max=1 << 20)
    append(run, 0, 5, 10, count=5)
    run.close()
    path = segment.path_of(tmp_path, 1)
    data = path.read_bytes()
    with path.open("rb") as file:
        _, start = segment.read_head(file.fileno())
    size = len(frame_of_metrics(0, 5)[1])
    wrong = []
    for at in range(start, len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        hit = (at - start) // size
        try:
            again = open_run()
            found = seqs_in(again)
        except Exception as error:  # what it raises is what is asserted
            wrong.append((at - start, repr(error)))
            continue
        if not {seq for seq in range(15) if seq // 5 != hit} <= set(found):
            wrong.append((at - start, str(found)))
        if again.next_seq(SESSION) > 15:
            wrong.append((at - start, f"claims to have all before {again.next_seq(SESSION)}"))
    assert wrong == []


def test_a_damaged_head_costs_nothing(open_run, tmp_path):
    run = open_run()
    for first in range(0, 100, 5):
        append(run, first)
    settle_next(run, 6)
    there = segments(tmp_path)
    assert len(there) >= 3
    waiting = seqs_in(run)
    for number in there:
        path = segment.path_of(tmp_path, number)
        data = path.read_bytes()
        path.write_bytes(data[:15] + b"\xff" + data[16:])
        again = open_run()

        assert seqs_in(again) == waiting
        assert again.next_seq(SESSION) == 100
        path.write_bytes(data)


def test_frames_out_of_order_after_a_failed_fsync_and_a_crash_are_all_delivered(
    open_run, disk, tmp_path
):
    """A group of three is written, its fsync fails, and so does the cut. The kernel has dropped the
    page of the one in the middle; then the daemon is killed. The rank has all three still."""
    run = open_run()
    append(run, 0)
    disk.fail("sync", ".segment")
    disk.fail("truncate")
    with pytest.raises(OSError, match="Input/output"):
        append(run, 5, 10, 15)
    path = segment.path_of(tmp_path, 1)
    size = len(frame_of_metrics(0, 5)[1])
    data = path.read_bytes()
    path.write_bytes(data[: -2 * size] + bytes(size) + data[-size:])
    disk.mend()

    run = open_run()
    run.skip_to(SESSION, 5)  # what an attachment says: the rank has all from 5 on
    assert run.next_seq(SESSION) == 10
    append(run, 10)
    assert run.next_seq(SESSION) == 20
    append(run, 20)

    assert sorted(set(seqs_in(run))) == list(range(25))
    assert sorted(set(seqs_in(open_run()))) == list(range(25))


def test_what_a_start_cannot_sync_is_written_anew_before_anybody_is_told_of_it(
    open_run, disk, tmp_path
):
    """A daemon is killed between write and fsync, and the fsync of the next one fails: the kernel
    has dropped the pages, and a second fsync would return 0."""
    append(open_run(), 0)
    path = segment.path_of(tmp_path, 1)
    before = path.stat().st_ino
    disk.fail("sync", ".segment")

    run = open_run()

    assert run.next_seq(SESSION) == 5
    assert path.stat().st_ino != before
    assert ("sync", "0000000001.segment.new", None) in disk.asked
    assert seqs_in(run) == list(range(5))


def test_what_can_be_neither_synced_nor_written_anew_is_not_opened(open_run, disk, tmp_path):
    append(open_run(), 0)
    disk.fail("sync", ".segment")
    disk.fail("rename", ".segment", errno.ENOSPC)

    with pytest.raises(OSError, match="No space"):
        open_run()

    assert seqs_in(open_run()) == list(range(5))


def test_a_run_may_be_opened_and_closed_a_thousand_times_without_a_trace(open_run, tmp_path):
    run = open_run()
    append(run, 0)
    files = sorted(tmp_path.iterdir())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        run = open_run()

    assert sorted(tmp_path.iterdir()) == files
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert seqs_in(run) == list(range(5))


# ── a long random life ──


def test_a_random_life_of_appends_failures_settles_and_restarts_loses_nothing(open_run, disk):
    seed = new_seed()
    print(f"seed {seed}")
    rng = random.Random(seed)
    run = open_run()
    acked = {SESSION: 0, OTHER: 0}
    found: dict[bytes, set[int]] = {SESSION: set(), OTHER: set()}
    operations = ["create", "write", "sync", "sync_folder", "truncate", "unlink", "rename"]
    for _ in range(800):
        disk.mend()
        action = rng.random()
        if action < 0.3:
            disk.fail(rng.choice(operations), after=rng.randrange(3), written=rng.randrange(300))
            if rng.random() < 0.3:
                disk.fail("truncate")
        if action < 0.75:
            groups = []
            expected = dict(acked)
            for session in rng.sample([SESSION, OTHER], rng.randrange(1, 3)):
                for _ in range(rng.randrange(1, 4)):
                    count = rng.randrange(1, 6)
                    groups.append(frame_of_metrics(expected[session], count, session))
                    expected[session] += count
            try:
                run.append(groups)
            except OSError:
                pass
            else:
                acked = expected
        elif action < 0.95:
            pieces = rng.randrange(1, 6)
            for _, piece, _ in itertools.islice(run.pieces(), pieces):
                if piece.header is not None:
                    numbers = range(piece.header.first_seq, piece.header.next_seq)
                    found[piece.header.session] |= set(numbers)
            try:
                settle_next(run, pieces)
                run.return_space()
            except OSError:
                assert disk.failures
        else:
            run = open_run(rng.choice([200, SEGMENT_BYTES, 50_000]))
            for session, seq in acked.items():
                run.skip_to(session, seq)
                assert run.next_seq(session) >= seq
                acked[session] = run.next_seq(session)  # known to be there: the rank lets go of it
        for session, seq in acked.items():
            assert run.next_seq(session) == seq
    disk.mend()
    run = open_run()
    for session in acked:
        found[session] |= set(seqs_in(run, session))

    for session, seq in acked.items():
        assert set(range(seq)) <= found[session], session
    disk.assert_no_failed_file_was_trusted(".segment")


def test_the_real_disk_is_what_these_tests_fail(tmp_path):
    """Every operation of the interface has its failure here, or is a question."""
    operations = {name for name in vars(Disk) if not name.startswith("_")}
    assert operations - {"free_bytes"} <= set(vars(FailingDisk))


# ── a watermark with values that wait for other ranks ──

WAITING = [[["mean", "loss", 1, [[0, 1.0, 1, 1]]]], [], 0]


def test_a_watermark_with_waiting_values_is_fsynced_before_a_segment_goes(open_run, disk) -> None:
    run = open_run()
    append(run, 0, count=200)
    append(run, 200)
    last = max(segment.numbers_in(run.folder))
    assert last > 1
    disk.asked.clear()
    run.settle(Watermark(segment=last, offset=0, reduction=WAITING))
    operations = [(operation, name) for operation, name, _ in disk.asked]
    names = [name for operation, name in operations if operation in ("rename", "unlink")]
    assert names[0] == watermark.NAME
    assert len(names) > 1, "a segment was removed, after it"
    assert watermark.read(run.folder).reduction == WAITING


def test_nothing_is_settled_if_waiting_values_cannot_be_kept(open_run, disk) -> None:
    run = open_run()
    append(run, 0, count=200)
    append(run, 200)
    run.settle(Watermark())
    before, segments = vars(run.mark).copy(), segment.numbers_in(run.folder)
    disk.fail("rename", watermark.NAME, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        run.settle(Watermark(segment=max(segments), offset=0, reduction=WAITING))
    assert vars(run.mark) == before
    assert segment.numbers_in(run.folder) == segments


def test_a_watermark_of_before_reduction_is_read(tmp_path: Path) -> None:
    body = msgpack.packb(list(vars(Watermark(segment=3, offset=7)).values())[:-1])
    data = b"MRW\x01" + crc32(body).to_bytes(4, "little") + body
    (tmp_path / watermark.NAME).write_bytes(data)
    assert watermark.read(tmp_path) == Watermark(segment=3, offset=7)


def test_the_end_of_a_run_is_where_its_last_frame_ends(open_run) -> None:
    run = open_run()
    assert run.end_place() == (0, 0)
    append(run, 0)
    first = run.end_place()
    assert first > (1, 0)
    append(run, 5)
    assert run.end_place() > first
    places = [behind for _, _, behind in run.pieces()]
    assert places[-1] == run.end_place()
    assert open_run().end_place() == places[-1]
