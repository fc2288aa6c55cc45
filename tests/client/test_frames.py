"""Frames: damage is noticed, and costs the records that it hit and no more."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay.frames import (
    ENTRY_BYTES,
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    MAGIC,
    RECORD_BYTES_MAX,
    VERSION,
    check_frame,
    cut_entries,
    iter_entries,
    pack_entry,
    pack_frame,
    read_frame,
    read_header,
)
from mlflow_relay.records import MetricsPacker, unpack_record

SESSIONS = st.binary(min_size=16, max_size=16)
RECORDS = st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=12)
SEQS = st.integers(0, (1 << 63) - 1)
SESSION = bytes(range(16))


def frame_of(records: list[bytes], session: bytes = SESSION, first_seq: int = 7) -> bytes:
    return pack_frame(session, first_seq, len(records), b"".join(map(pack_entry, records)))


#: What a training logs, zeroes included: runs of zero bytes are what misleads a reader most.
REAL_RECORDS = [
    MetricsPacker().pack({"loss": 0.0, "accuracy": 0.0, "lr": 1e-3}, step, 1_795_412_345_678)
    for step in range(4)
]
REAL_FRAME = frame_of(REAL_RECORDS)


@given(records=RECORDS, session=SESSIONS, first_seq=SEQS)
def test_a_frame_comes_back(records, session, first_seq):
    frame = frame_of(records, session, first_seq)

    header = read_frame(frame)

    assert (header.session, header.first_seq) == (session, first_seq)
    assert header.next_seq == first_seq + len(records)
    assert header == check_frame(frame) == read_header(frame)
    assert len(frame) == HEADER_BYTES + header.body_bytes
    assert list(iter_entries(frame[HEADER_BYTES:])) == records


@given(frames=st.lists(RECORDS, min_size=1, max_size=5), before=st.binary(max_size=9))
def test_frames_one_behind_the_other_are_found_by_their_offsets(frames, before):
    data = before + b"".join(map(frame_of, frames))
    at, found = len(before), []
    while at < len(data):
        header = check_frame(memoryview(data), at)
        end = at + HEADER_BYTES + header.body_bytes
        found.append(list(iter_entries(memoryview(data)[at + HEADER_BYTES : end])))
        at = end

    assert found == frames


def test_every_flipped_byte_of_a_frame_is_noticed():
    for at in range(len(REAL_FRAME)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(REAL_FRAME)
            damaged[at] ^= flip
            with pytest.raises(FormatError):
                check_frame(damaged)


def test_every_truncation_of_a_frame_is_noticed():
    for end in range(len(REAL_FRAME)):
        with pytest.raises(FormatError):
            check_frame(REAL_FRAME[:end])


@given(behind=st.binary(min_size=1, max_size=60))
def test_a_message_is_one_frame_and_nothing_else(behind):
    with pytest.raises(FormatError, match="bytes follow"):
        read_frame(REAL_FRAME + behind)


@given(data=st.binary(max_size=200))
def test_random_bytes_are_no_frame(data):
    for tried in (data, MAGIC + data, MAGIC + bytes((VERSION,)) + data):
        with pytest.raises(FormatError):
            check_frame(tried)


def test_a_frame_of_a_later_release_is_told_from_damage():
    later = bytearray(REAL_FRAME)
    later[len(MAGIC)] = VERSION + 1
    with pytest.raises(VersionError, match=f"version {VERSION + 1}; this release reads"):
        check_frame(later)


@pytest.mark.parametrize(
    ("records", "body_bytes"),
    [(0, 0), (0, 100), (3, 3 * ENTRY_BYTES - 1), (1, FRAME_BYTES_MAX + 1)],
)
def test_numbers_that_cannot_be_are_a_format_error_before_any_body_is_read(records, body_bytes):
    head = bytearray(pack_frame(SESSION, 0, records, b""))
    head[32:36] = body_bytes.to_bytes(4, "little")
    with pytest.raises(FormatError, match=f"frame of {records} records in {body_bytes} bytes"):
        read_header(head)


def test_the_largest_record_fits_into_a_frame():
    frame = frame_of([bytes(RECORD_BYTES_MAX)])

    assert read_frame(frame).records == 1
    assert len(frame) <= FRAME_BYTES_MAX


def test_damage_costs_the_records_that_it_hit_and_invents_none():
    body = REAL_FRAME[HEADER_BYTES:]
    starts = [sum(ENTRY_BYTES + len(each) for each in REAL_RECORDS[:n]) for n in range(5)]
    for at in range(len(body)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(body)
            damaged[at] ^= flip

            found = list(iter_entries(damaged))

            hit = next(n for n, (low, high) in enumerate(pairwise(starts)) if low <= at < high)
            assert found[:hit] == REAL_RECORDS[:hit]
            assert [each for each in found if each is not None and each not in REAL_RECORDS] == []
            if at - starts[hit] >= 4:  # not in the length: the next ones are found again
                assert found == [*REAL_RECORDS[:hit], None, *REAL_RECORDS[hit + 1 :]]


def test_a_truncated_body_gives_the_records_before_the_cut():
    body = REAL_FRAME[HEADER_BYTES:]
    for end in range(len(body) + 1):
        found = list(iter_entries(body[:end]))
        assert found == REAL_RECORDS[: len(found)]


@given(data=st.binary(max_size=300))
def test_random_bytes_hold_no_records(data):
    assert [each for each in iter_entries(data) if each] == []


@given(records=RECORDS, bytes_max=st.integers(1, 400), data=st.data())
def test_entries_are_cut_where_the_next_one_would_not_fit(records, bytes_max, data):
    entries = b"".join(map(pack_entry, records))
    first = data.draw(st.integers(0, len(records) - 1))
    start = sum(map(len, map(pack_entry, records[:first])))

    count, end = cut_entries(memoryview(entries), start, len(entries), bytes_max)

    sizes = [ENTRY_BYTES + len(record) for record in records[first:]]
    fitting = [n for n in range(1, len(sizes) + 1) if sum(sizes[:n]) <= bytes_max]
    assert count == max(fitting, default=1)
    assert end == start + sum(sizes[:count])


def test_cutting_goes_on_to_the_end_and_forgets_nothing():
    rng = random.Random(5)
    records = [rng.randbytes(rng.randrange(1, 300)) for _ in range(500)]
    entries = b"".join(map(pack_entry, records))
    at, found = 0, []
    while at < len(entries):
        count, end = cut_entries(entries, at, len(entries), 1000)
        part = list(iter_entries(entries[at:end]))
        assert len(part) == count
        found += part
        at = end

    assert found == records


#: As the first release wrote it, byte by byte: PROTOCOL's example of then.
FIRST_RELEASE = bytes.fromhex(
    "4d524601 000102030405060708090a0b0c0d0e0f 0700000000000000 02000000 54000000 d7e705b8"
    "2f000000 db506c53 9501d30000018bcfe56800d3000000000000000392a46c6f7373a26c72c410"
    "3fe00000000000003f50624dd2f1a9fc 15000000 fab53325 9404cf0000018bcfe56be8a846494e4953484544a0"
)


def test_a_frame_of_the_first_release_is_read_as_before():
    header = read_frame(FIRST_RELEASE)
    assert (header.first_seq, header.records) == (7, 2)
    metrics, end = map(unpack_record, iter_entries(FIRST_RELEASE[HEADER_BYTES:]))
    assert metrics.keys == ["loss", "lr"]
    assert end.status == "FINISHED"
