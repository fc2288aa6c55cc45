"""The bytes of a journal: what a dead rank left is read as far as it can be, and never misread."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_relay.errors import FormatError, VersionError
from mlflow_relay.frames import (
    FRAME_BYTES_TARGET,
    HEADER_BYTES,
    iter_entries,
    pack_entry,
    read_frame,
)
from mlflow_relay.journal_files import (
    ACKED_WORD,
    CARD_AT,
    COUNTER_MAX,
    ENTRIES_AT,
    LOST_WORD,
    NEXT_SEQ_WORD,
    TAIL_WORD,
    UNACKED_MAX,
    Salvage,
    holds_nothing,
    pack_base_head,
    pack_entries_head,
    read_base,
    read_counters,
    salvage_entries,
)
from mlflow_relay.records import MetricsPacker

SESSION = bytes(range(16))
OTHER = bytes(16)
RECORDS = st.lists(st.binary(min_size=1, max_size=40), max_size=12)
WORDS = st.integers(0, (1 << 64) - 1)
REAL_RECORDS = [
    MetricsPacker().pack({"loss": 0.0, "lr": 1e-3}, step, 1_795_412_345_678) for step in range(5)
]


def base_file(card: bytes, next_seq: int = 0, acked: int = 0, lost: int = 0) -> bytes:
    data = bytearray(CARD_AT + len(card))
    head = pack_base_head(card)
    data[: len(head)] = head
    for word, value in ((NEXT_SEQ_WORD, next_seq), (ACKED_WORD, acked), (LOST_WORD, lost)):
        struct.pack_into("@Q", data, 8 * word, value)
    data[CARD_AT:] = card
    return bytes(data)


def entries_file(
    records: list[bytes], first_seq: int = 0, *, room: int = 200, tail: int | None = None
) -> bytes:
    body = b"".join(map(pack_entry, records))
    data = bytearray(ENTRIES_AT + len(body) + room)
    head = pack_entries_head(SESSION, first_seq)
    data[: len(head)] = head
    struct.pack_into("@Q", data, 8 * TAIL_WORD, ENTRIES_AT + len(body) if tail is None else tail)
    data[ENTRIES_AT : ENTRIES_AT + len(body)] = body
    return bytes(data)


def records_by_seq(salvage: Salvage) -> dict[int, bytes]:
    """Return what the frames hold; every frame must be whole, and no number comes twice."""
    found: dict[int, bytes] = {}
    for frame in salvage.frames:
        header = read_frame(frame)
        assert header.session == SESSION
        for seq, record in enumerate(iter_entries(frame[HEADER_BYTES:]), header.first_seq):
            assert record is not None
            assert seq not in found
            found[seq] = record
    assert list(found) == sorted(found)
    return found


# ── the base file ──


@given(
    card=st.binary(max_size=300),
    acked=st.integers(0, COUNTER_MAX - UNACKED_MAX),
    unacked=st.integers(-1, UNACKED_MAX),
    lost=st.integers(0, COUNTER_MAX),
)
def test_a_base_file_comes_back(card, acked, unacked, lost):
    next_seq = max(0, acked + unacked)
    data = base_file(card, next_seq, acked, lost)

    assert read_base(data) == (card, next_seq, acked, lost)
    assert read_counters(data[:CARD_AT]) == (next_seq, acked, lost)


@pytest.mark.parametrize(
    "counters",
    [(1 << 56, 3, 1), (5, 1 << 30, 1), (5, 3, 1 << 48), (COUNTER_MAX + 1, COUNTER_MAX, 0)],
)
def test_counters_that_cannot_be_are_damage_and_the_card_is_read_all_the_same(counters):
    data = base_file(b"card", *counters)

    with pytest.raises(FormatError, match="counters"):
        read_counters(data)
    assert read_base(data) == (b"card", 0, 0, 0)


def test_every_flipped_byte_of_head_and_card_is_noticed():
    card = b"what the daemon must know"
    data = base_file(card, 5, 3, 1)
    counters = range(8 * NEXT_SEQ_WORD, 8 * (LOST_WORD + 1))
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            try:
                base = read_base(bytes(damaged))
            except FormatError:
                assert at not in counters  # they change with each call: there is no CRC of them
            else:
                assert base.card == card
                assert at in counters or base == (card, 5, 3, 1)


def test_every_truncation_of_a_base_file_is_noticed():
    data = base_file(b"card")
    for end in range(len(data)):
        with pytest.raises(FormatError):
            read_base(data[:end])


@given(data=st.binary(max_size=200))
def test_random_bytes_are_no_base_file(data):
    with pytest.raises(FormatError):
        read_base(data)
    with pytest.raises(FormatError):
        read_base(b"MRJ\1" + data)


def test_a_base_file_of_a_later_release_is_told_from_damage():
    data = bytearray(base_file(b"card"))
    data[3] += 1
    with pytest.raises(VersionError, match="this release reads 1"):
        read_base(bytes(data))


# ── entries files ──


@given(records=RECORDS, first_seq=st.integers(0, 1 << 40), data=st.data())
def test_what_is_not_in_the_spool_comes_back_with_its_numbers(records, first_seq, data):
    from_seq = first_seq + data.draw(st.integers(-3, len(records) + 3))

    salvage = salvage_entries(entries_file(records, first_seq), SESSION, from_seq)

    assert records_by_seq(salvage) == {
        seq: record for seq, record in enumerate(records, first_seq) if seq >= from_seq
    }
    assert salvage.next_seq == first_seq + len(records)
    assert salvage.damaged == 0


def test_much_is_cut_into_frames_that_a_daemon_takes():
    records = [bytes((number % 251,)) * 1000 for number in range(1000)]

    salvage = salvage_entries(entries_file(records), SESSION, 0)

    assert records_by_seq(salvage) == dict(enumerate(records))
    assert len(salvage.frames) >= 3
    assert all(len(frame) <= FRAME_BYTES_TARGET + 2000 for frame in salvage.frames)


@pytest.mark.parametrize("size", [0, 1, ENTRIES_AT - 1, ENTRIES_AT, 4096])
def test_a_spare_that_nothing_was_ever_put_into_is_no_damage(size):
    """Also one that was in the making at a kill: every growing journal has that moment."""
    assert salvage_entries(bytes(size), SESSION, 17) == Salvage([], 17, 0)


def test_only_what_no_record_was_ever_put_into_holds_nothing():
    assert holds_nothing(bytes(72))
    assert holds_nothing(b"")
    assert holds_nothing(entries_file([])[:72])
    assert holds_nothing(entries_file([], tail=0)[:72])  # killed between head and tail
    whole = entries_file([b"x"])[:72]
    assert not holds_nothing(whole)
    assert not holds_nothing(entries_file([b"x"], tail=0)[:72])
    assert not holds_nothing(entries_file([], tail=500)[:72])
    assert not holds_nothing(whole[:3] + b"\2" + whole[4:])
    assert not holds_nothing(b"noise")


@pytest.mark.parametrize("tail", [0, ENTRIES_AT - 1, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("room", [0, 3, 200])
def test_a_tail_that_cannot_be_costs_no_record(tail, room):
    data = entries_file(REAL_RECORDS, 7, room=room, tail=tail)

    salvage = salvage_entries(data, SESSION, 7)

    assert records_by_seq(salvage) == dict(enumerate(REAL_RECORDS, 7))
    assert salvage.next_seq == 7 + len(REAL_RECORDS)


def damages(data: bytes, places: range) -> Iterator[tuple[int, dict[int, bytes]]]:
    """Yield (place, what is salvaged) for flips in every byte; refused files are passed over."""
    for at in places:
        for flip in (0x01, 0x08, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            try:
                yield at, records_by_seq(salvage_entries(bytes(damaged), SESSION, 7))
            except FormatError:
                assert at < ENTRIES_AT


def test_damaged_entries_cost_the_records_that_were_hit_and_no_more():
    originals = dict(enumerate(REAL_RECORDS, 7))
    sizes = [len(pack_entry(record)) for record in REAL_RECORDS]
    starts = [ENTRIES_AT + sum(sizes[:number]) for number in range(len(sizes))]
    lengths = {start + byte for start in starts for byte in range(4)}

    for at, found in damages(entries_file(REAL_RECORDS, 7), range(ENTRIES_AT, sum(sizes))):
        hit = 7 + sum(start <= at for start in starts) - 1
        assert {seq: each for seq, each in found.items() if seq < hit} == {
            seq: each for seq, each in originals.items() if seq < hit
        }
        if at in lengths:  # what follows may be found under a number that is too small
            behind = [each for seq, each in found.items() if seq >= hit]
            assert behind == [each for each in REAL_RECORDS if each in behind]
        else:
            assert found == {seq: each for seq, each in originals.items() if seq != hit}


def test_a_damaged_head_of_an_entries_file_misplaces_no_record():
    originals = dict(enumerate(REAL_RECORDS, 7))
    wrong = {
        at: found
        for at, found in damages(entries_file(REAL_RECORDS, 7), range(ENTRIES_AT))
        if not found.items() <= originals.items()
    }
    assert wrong == {}


def test_every_truncation_gives_the_records_before_the_cut_or_a_format_error():
    data = entries_file(REAL_RECORDS, 7, room=0)
    for end in range(len(data)):
        try:
            salvage = salvage_entries(data[:end], SESSION, 7)
        except FormatError:
            assert end < ENTRIES_AT
            continue
        found = records_by_seq(salvage)
        assert found == dict(enumerate(REAL_RECORDS[: len(found)], 7))
        assert ENTRIES_AT + sum(map(len, map(pack_entry, REAL_RECORDS[: len(found) + 1]))) > end


def test_the_entries_of_another_session_are_a_format_error():
    with pytest.raises(FormatError, match="another session"):
        salvage_entries(entries_file(REAL_RECORDS), OTHER, 0)


def test_entries_of_a_later_release_are_told_from_damage():
    data = bytearray(entries_file(REAL_RECORDS))
    data[3] += 1
    with pytest.raises(VersionError):
        salvage_entries(bytes(data), SESSION, 0)


@given(data=st.binary(min_size=1, max_size=300).filter(any))
def test_random_bytes_are_no_entries_file(data):
    with pytest.raises(FormatError):
        salvage_entries(data + bytes(64), SESSION, 0)


@given(data=st.binary(max_size=300), tail=WORDS)
def test_random_entries_hold_no_records(data, tail):
    head = bytearray(entries_file([], 3, room=0, tail=tail))

    salvage = salvage_entries(bytes(head) + data, SESSION, 3)

    assert [record for record in records_by_seq(salvage).values() if record] == []
