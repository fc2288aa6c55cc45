"""Segments: what was written is found, also behind damage; a file that failed is left for good."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlflow_relay import frames
from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay_daemon.spool import segment
from mlflow_relay_daemon.spool.disk import Disk
from mlflow_relay_daemon.spool.segment import Head, Writer, iter_pieces, read_head, read_piece
from tests.support.spools import SESSION, FailingDisk, frame_of_metrics, metrics

HEAD = Head(17, {SESSION: (17, [(20, 30)])}, b"the card")
FRAMES = [frame_of_metrics(first, 3)[1] for first in (0, 3, 6, 9)]
ON_DISK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def write_segment(folder: Path, frames: list[bytes] | None = None) -> Path:
    writer = Writer(Disk(), folder, 1, HEAD)
    writer.append(FRAMES if frames is None else frames)
    writer.close()
    return segment.path_of(folder, 1)


def seqs_found(path: Path, start: int) -> list[int]:
    """Return the sequence numbers of what can be read; each must be what was written."""
    found = []
    with opened(path) as fd:
        at, end = start, os.fstat(fd).st_size
        while at < end:
            piece = read_piece(fd, at, end)
            assert piece.start == at < piece.end <= end
            if piece.header is not None:
                for seq, record in enumerate(piece.records, piece.header.first_seq):
                    if record is not None:
                        assert record == metrics(seq)
                        found.append(seq)
            at = piece.end
    return found


# ── the head ──


@ON_DISK
@given(
    accepted=st.integers(0, 1 << 60),
    sessions=st.dictionaries(
        st.binary(min_size=16, max_size=16), st.integers(0, 1 << 60), max_size=4
    ),
    card=st.binary(max_size=200),
)
def test_a_head_comes_back_with_the_place_of_the_first_frame(tmp_path, accepted, sessions, card):
    head = Head(accepted, {name: (number, []) for name, number in sessions.items()}, card)
    packed = segment.pack_head(head)
    path = tmp_path / "a.segment"
    path.write_bytes(packed + b"frames")
    with opened(path) as fd:
        found, start = read_head(fd)

    assert start == len(packed)
    assert (found.accepted_records, found.card) == (accepted, card)
    assert found.sequences == {name: [number, []] for name, number in sessions.items()}


def test_every_flipped_byte_and_every_truncation_of_a_head_is_noticed(tmp_path):
    packed = segment.pack_head(HEAD)
    path = tmp_path / "a.segment"
    damaged = [packed[:end] for end in range(len(packed))]
    for at in range(len(packed)):
        for flip in (0x01, 0x80, 0xFF):
            flipped = bytearray(packed)
            flipped[at] ^= flip
            damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with opened(path) as fd, pytest.raises(FormatError):
            read_head(fd)


@ON_DISK
@given(data=st.binary(max_size=100))
def test_random_bytes_are_no_head(tmp_path, data):
    path = tmp_path / "a.segment"
    for tried in (data, b"MRS\1" + data, bytes(50)):
        path.write_bytes(tried)
        with opened(path) as fd, pytest.raises(FormatError):
            read_head(fd)


@pytest.mark.parametrize(
    "head", [(0, 6, b""), (0, {b"s": 1}, b""), ("0", {}, b""), (0, {}, None), (0, {}), 5]
)
def test_a_head_of_wrong_types_is_a_format_error(tmp_path, head):
    body = msgpack.packb(head)
    file = tmp_path / "head"
    file.write_bytes(segment._HEAD.pack(b"MRS", 1, len(body), crc32(body)) + body)
    with file.open("rb") as opened, pytest.raises(FormatError):
        segment.read_head(opened.fileno())


def test_a_segment_of_a_later_release_is_told_from_damage(tmp_path):
    path = write_segment(tmp_path)
    data = bytearray(path.read_bytes())
    data[3] += 1
    path.write_bytes(data)
    with opened(path) as fd, pytest.raises(VersionError, match="this release reads 1"):
        read_head(fd)


def test_a_version_that_never_was_is_damage_and_the_frames_are_found(tmp_path):
    path = write_segment(tmp_path)
    data = bytearray(path.read_bytes())
    begin = data.index(frames.MAGIC)
    data[3] = 0
    path.write_bytes(data)
    with opened(path) as fd:
        with pytest.raises(FormatError, match="not a segment"):
            read_head(fd)
        assert segment.first_frame(fd, len(data)) == begin


# ── frames ──


def test_what_was_appended_is_found(tmp_path):
    path = write_segment(tmp_path)
    with opened(path) as fd:
        _, start = read_head(fd)
        pieces = list(iter_pieces(fd, start, path.stat().st_size))

    assert [piece.whole for piece in pieces] == [True] * 4
    assert seqs_found(path, start) == list(range(12))


def test_damage_anywhere_costs_no_frame_but_the_one_that_it_hit(tmp_path):
    """Of that one, at most the record that was hit, unless it hit what holds the frame together."""
    path = write_segment(tmp_path)
    data = path.read_bytes()
    start = len(segment.pack_head(HEAD))
    starts = [start + sum(map(len, FRAMES[:number])) for number in range(4)]
    for at in range(start, len(data)):
        for flip in (0x02, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            path.write_bytes(damaged)

            found = seqs_found(path, start)

            hit = sum(each <= at for each in starts) - 1
            others = [seq for seq in range(12) if seq // 3 != hit]
            assert [seq for seq in found if seq in others] == others, (at, flip)


def test_a_tail_torn_anywhere_costs_the_last_frame_alone(tmp_path):
    path = write_segment(tmp_path)
    data = path.read_bytes()
    start = len(segment.pack_head(HEAD))
    last = len(data) - len(FRAMES[-1])
    for end in range(last, len(data)):
        for torn in (data[:end], data[:end] + bytes(len(data) - end)):
            path.write_bytes(torn)
            found = seqs_found(path, start)
            assert found[:9] == list(range(9))
            assert set(found) <= set(range(12))  # whole records of the torn frame are welcome


def test_a_sector_of_zeroes_in_the_middle_costs_the_frames_that_it_hit(tmp_path):
    frames = [frame_of_metrics(first, 3)[1] for first in range(0, 60, 3)]
    path = write_segment(tmp_path, frames)
    data = path.read_bytes()
    start = len(segment.pack_head(HEAD))
    for at in range(512, len(data) - 512, 512):
        path.write_bytes(data[:at] + bytes(512) + data[at + 512 :])

        found = seqs_found(path, start)

        hit = {
            number
            for number in range(20)
            if start + sum(map(len, frames[: number + 1])) > at
            and start + sum(map(len, frames[:number])) < at + 512
        }
        assert set(found) >= {seq for seq in range(60) if seq // 3 not in hit}
        assert found == sorted(set(found))


def test_damage_that_fills_a_large_part_of_a_segment_is_passed_in_one_piece(tmp_path):
    """Not byte by byte: a daemon that starts must not spend minutes on it."""
    path = write_segment(tmp_path, [FRAMES[0], b"MRF\1" * 200_000, FRAMES[1]])
    start = len(segment.pack_head(HEAD))

    assert seqs_found(path, start) == list(range(6))


def test_a_frame_of_a_later_release_is_not_passed_over_as_damage(tmp_path):
    """It is whole: its CRC, which holds over its version, too, says so."""
    from zlib import crc32

    later = bytearray(FRAMES[1])
    later[3] += 1
    later[36:40] = crc32(later[40:], crc32(later[:36])).to_bytes(4, "little")
    path = write_segment(tmp_path, [FRAMES[0], bytes(later)])
    start = len(segment.pack_head(HEAD))
    with pytest.raises(VersionError):
        seqs_found(path, start)


@ON_DISK
@given(data=st.binary(max_size=300))
def test_random_bytes_hold_no_frames(tmp_path, data):
    path = tmp_path / "a.segment"
    path.write_bytes(data + b"\0")
    assert seqs_found(path, 0) == []


def test_frames_are_found_behind_a_damaged_head(tmp_path):
    path = write_segment(tmp_path)
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)
    with opened(path) as fd:
        start = segment.first_frame(fd, len(data))

    assert seqs_found(path, start) == list(range(12))


def test_segments_are_counted_in_order_and_others_are_none(tmp_path):
    for number in (10, 2, 1):
        segment.path_of(tmp_path, number).touch()
    (tmp_path / "x.segment").touch()
    (tmp_path / "0000000003.segment.new").touch()

    assert segment.numbers_in(tmp_path) == [1, 2, 10]


# ── writing ──


def test_a_new_segment_is_on_the_disk_with_its_name_before_it_is_used(tmp_path):
    disk = FailingDisk()
    writer = Writer(disk, tmp_path, 1, HEAD)
    assert [operation for operation, *_ in disk.asked] == ["create", "write", "sync", "sync_folder"]
    disk.asked.clear()

    writer.append([FRAMES[0]])
    writer.close()

    assert [operation for operation, *_ in disk.asked] == ["write", "sync"]


@pytest.mark.parametrize("operation", ["create", "write", "sync", "sync_folder"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_segment_that_cannot_be_begun_is_not_there(tmp_path, operation, error):
    disk = FailingDisk()
    disk.fail(operation, error=error, written=7)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=os.strerror(error)):
        Writer(disk, tmp_path, 1, HEAD)

    assert segment.numbers_in(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("operation", "error", "written"),
    [
        ("write", errno.EIO, None),
        ("write", errno.ENOSPC, 5),
        ("write", errno.ENOSPC, 100),
        ("sync", errno.EIO, None),
        ("sync", errno.ENOSPC, None),
    ],
)
@pytest.mark.parametrize("cut_fails", [False, True])
def test_what_could_not_be_appended_does_not_count_and_the_file_is_given_up(
    tmp_path, operation, error, written, cut_fails
):
    disk = FailingDisk()
    writer = Writer(disk, tmp_path, 1, HEAD)
    writer.append([FRAMES[0]])
    good = writer.synced
    disk.fail(operation, error=error, written=written)
    if cut_fails:
        disk.fail("truncate", error=errno.EROFS)
    with pytest.raises(OSError, match=os.strerror(error)):
        writer.append([FRAMES[1]])
    writer.close()

    assert writer.broken
    assert writer.synced == good
    size = segment.path_of(tmp_path, 1).stat().st_size
    assert size >= good if cut_fails else size == good


def test_a_short_write_is_a_full_disk(tmp_path):
    """The kernel writes what fits and says so only the next time; a limit stands for the disk."""
    writer = Writer(Disk(), tmp_path, 1, HEAD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.synced + 10, before[1]))
    try:
        with pytest.raises(OSError, match="short write"):
            writer.append([FRAMES[0]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.close()

    assert writer.broken
    assert segment.path_of(tmp_path, 1).stat().st_size == writer.synced
